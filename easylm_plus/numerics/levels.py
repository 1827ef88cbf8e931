"""FP8-LM's levels (Peng et al. 2023, arXiv:2310.18313): how weights are stored, and as what a step multiplies by them.

    level   products   gradients, on the wire and off   masters and moments         weights on the wire
    none    compute    as the weights                   float32, 4 + 4 + 4 bytes    compute
    O1      FP8        E4M3                             float32, 4 + 4 + 4          compute
    O2      FP8        E4M3                             FP16, E4M3, FP16: 2 + 1 + 2 FP16
    O3      FP8        E4M3                             FP16, E4M3, FP16: 2 + 1 + 2 E4M3

Each level is the one before and something more; no hyper-parameter changes with them. They concern the matrices of the
blocks (rules.py says which); embeddings, head, norms, biases and routers are left as they are, with masters and moments
in float32. Matrices that cannot multiply in FP8, those of experts and such whose sides are no multiples of 16, are
`narrow`: kept as the level says, multiplied (and their gradients summed over `fsdp`) in the compute dtype. The
released code stores weights in FP16 from O1 on; here that is part of O2, where the memory is won.

A run's parameters are the *stored* ones, float32 arrays or formats.Scaled in FP16. Each step makes its *view* of them,
the tree of leaves that the model multiplies by; for O3 that includes the weights' E4M3 codes, made once a step from the
masters and not kept.

Legend: `...` stack axes (layers, experts), D and F the sides of a matrix.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from easylm_plus.numerics import handles
from easylm_plus.numerics.auto_scaling import initial_mu, update_mu
from easylm_plus.numerics.coded import Coded
from easylm_plus.numerics.formats import (
    E4M3,
    E5M2,
    FORMATS,
    FP16,
    Scaled,
    amax,
    decode,
    encode,
    scale_of,
)
from easylm_plus.numerics.fp8 import SEEN, TENSORS, Fp8
from easylm_plus.numerics.leaves import is_kept
from easylm_plus.numerics.lora import Frozen, LowRank, new_adapter
from easylm_plus.numerics.precision import Precision
from easylm_plus.numerics.rules import CODED, adapter_ranks, assign, not_fp8
from easylm_plus.numerics.settings import check, check_transforms, deals, formats_of, rings, summed_over, warmup_of
from easylm_plus.numerics.stored import Copy
from easylm_plus.numerics.ternary import Ternary, ternary_codes
from easylm_plus.numerics.ternary_codes import TernaryCodes, pack, side_of, turned
from easylm_plus.numerics.windows import new_window, observed, scale_now
from easylm_plus.parallel.collectives import as_bytes, from_bytes
from easylm_plus.parallel.sharding import constrain, mesh_axis_size, stored_spec
from easylm_plus.parallel.zero import DEALT, Deal
from easylm_plus.tree import path_name


class Plain:
    """Weights that are kept and multiplied as they are: what a step does without a config."""

    axes: Any = None
    cut = False
    deal = None
    assigned: Mapping[str, str] = MappingProxyType({})
    warmup = 0
    adapters: Mapping[str, int] = MappingProxyType({})
    sums = "float32"

    def store(self, params: Any) -> Any:
        return params

    def state(self) -> dict[str, Any]:
        return {}

    def trained(self, stored: Any) -> Any:
        return stored

    def merged(self, stored: Any, trained: Any) -> Any:
        return trained

    def laid(self, tree: Any) -> Any:
        return tree

    def named(self, tree: Any) -> Any:
        return tree

    def view(self, stored: Any, state: dict[str, Any]) -> Any:
        return stored

    def observe(self, state: dict[str, Any], seen: Any, ok: jax.Array) -> dict[str, Any]:
        return state

    def report(self, seen: Any, state: Any, view: Any, after: Any) -> dict[str, Any]:
        return {}


PLAIN = Plain()
Axes = tuple[str | None, ...] | None
READERS = ("q_proj", "k_proj", "v_proj", "qk_proj", "gate_proj", "up_proj", "router")  # of what a block's norms write
ADAPTERS = 1  # the stream of random numbers that adapters start from


class Numerics:
    """The transforms of one run.

    Args:
      section, optimizer: the sections `numerics` and `optimizer` of a config.
      shapes, axes: of the parameters, by models.transformer.abstract_parameters.
      seed: of the run, for adapters.
    """

    def __init__(
        self,
        section: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        precision: Precision,
        shapes: Any,
        axes: Any,
        seed: int = 0,
    ):
        check(section, optimizer)
        self.level, self.size, self.precision = section["fp8_level"], section["fp8_window"], precision
        self.smooth, self.sums, self.ring = section["fp8_smooth"], section["fp8_accumulate"], rings(section)
        self.formats = formats_of(self.level, optimizer)
        self.shapes, self.axes, self.seed = shapes, axes, seed
        self.assigned = assign(shapes, section["rules"], "plain" if self.level == "none" else "fp8")
        self.alpha, self.adapters = section["lora_alpha"], adapter_ranks(shapes, section["lora"])
        check_transforms(self.level, optimizer, set(self.assigned.values()), bool(self.adapters))
        self.warmup = warmup_of(section, self.assigned)
        # whether masters are cut over the replicas, so that a step's view has to be brought together
        self.cut = optimizer["zero"] != "none" and mesh_axis_size("replica") > 1
        self.deal = None  # or whose they are, of those that are dealt out whole
        if deals(section, optimizer, FORMATS[self.formats.master], bool(self.adapters)):
            kinds = {name: transform for name, transform in self.assigned.items() if self.narrow(name)}
            self.deal = Deal(shapes, kinds, mesh_axis_size("replica"))

    def narrow(self, name: str) -> bool:
        """Whether this weight's master and moments are in the level's formats."""
        return self.assigned.get(name, "plain") != "plain" and not self.adapters

    @property
    def gathers(self) -> str:
        """What activations travel as under sequence parallelism: the codes that FP8 products read, if all do."""
        is_reader = lambda name: name.endswith("/kernel") and set(READERS) & set(name.split("/"))
        read = {transform for name, transform in self.assigned.items() if is_reader(name)}
        return "e4m3" if self.level == "O3" and read == {"fp8"} else "compute"

    # --- what is kept ---

    @property
    def codings(self) -> dict[str, Callable[[Any], Coded]]:
        """name -> what a weight's codes are made by, of those that are kept in codes."""
        return {name: CODED[transform] for name, transform in self.assigned.items() if transform in CODED}

    @property
    def ternary(self) -> set[str]:
        """The weights that multiply as their ternary rounding."""
        return {name for name, transform in self.assigned.items() if transform == "ternary"}

    def store(self, params: Any) -> Any:
        """Fresh or loaded parameters as the run keeps them; those that are in codes already stay so."""
        master = FORMATS[self.formats.master]
        key = jax.random.fold_in(jax.random.key(self.seed), ADAPTERS)

        def keep(path: Any, p: jax.Array) -> Any:
            name = path_name(path)
            if not self.adapters:
                return encode(p, master) if self.narrow(name) and master.name != "float32" else p
            base = self._frozen(name, p)
            if name not in self.adapters:
                return base
            number = sorted(self.adapters).index(name)
            return new_adapter(jax.random.fold_in(key, number), base, self.adapters[name], self.alpha)

        return self.laid(jax.tree_util.tree_map_with_path(keep, params, is_leaf=is_kept))

    def laid(self, tree: Any) -> Any:
        """A tree like the parameters as the state has it: laid where whole tensors are dealt out (parallel/zero.py)."""
        if not self.deal:
            return tree
        pinned = lambda spec: lambda leaf: jax.tree.map(partial(_pinned, spec=spec), leaf)
        laid = self.deal.lay(tree, pinned(PartitionSpec("replica")))
        return {**laid, DEALT: pinned(PartitionSpec(None, "replica"))(laid[DEALT])}

    def named(self, tree: Any) -> Any:
        """The inverse of `laid`: by name, and cut as masters are elsewhere."""
        if not self.deal:
            return tree
        # each rank sends its part of a matrix to each other; a side that they do not divide is sent whole
        part = lambda x: (
            PartitionSpec(None, "replica") if x.ndim > 1 and not x.shape[1] % x.shape[0] else PartitionSpec()
        )
        named = self.deal.named(tree, lambda slot: _pinned(slot, part(slot)))

        def cut(axes: tuple[str | None, ...], leaf: Any) -> Any:
            return jax.tree.map(lambda x: _pinned(x, stored_spec(axes, x.shape)) if x.ndim == len(axes) else x, leaf)

        return jax.tree.map(cut, self.axes, named, is_leaf=lambda x: isinstance(x, tuple))

    def placed(self, stored: Any, mesh: Mesh) -> Any:
        """Shardings of the parameters by name, as they are kept -> of the state's."""
        if not self.deal:
            return stored
        own = NamedSharding(mesh, PartitionSpec(None, "replica"))
        return self.deal.set_aside(stored, dict.fromkeys(self.deal.stacks, own))

    def _frozen(self, name: str, p: jax.Array) -> Any:
        """A weight that does not learn, as narrow as it is multiplied."""
        if name in self.codings:
            return p if isinstance(p, Coded) else self.codings[name](p)
        if name in self.ternary:
            return p  # whose codes change where it is rounded first
        if self.assigned[name] == "fp8":
            return encode(p, E4M3 if self.level == "O3" else FP16)
        return p.astype(self.precision.compute) if name.endswith(("kernel", "embedding")) else p

    def trained(self, stored: Any) -> Any:
        """What the optimizer moves: the stored parameters, or of a run with adapters those, and None for the rest."""
        if not self.adapters:
            return stored
        adapter = lambda leaf: {"a": leaf.a, "b": leaf.b} if isinstance(leaf, LowRank) else None
        return jax.tree.map(adapter, stored, is_leaf=is_kept)

    def merged(self, stored: Any, trained: Any) -> Any:
        """The stored parameters with what the optimizer has made of its part."""
        if not self.adapters:
            return trained
        put = lambda leaf, new: leaf if new is None else dataclasses.replace(leaf, **new)
        return jax.tree.map(put, stored, trained, is_leaf=is_kept)

    def state(self) -> dict[str, Any]:
        """What is remembered between steps, before the first one."""
        shapes = {path_name(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(self.shapes)}
        stacks = {name: shapes[name][:-2] for name, transform in self.assigned.items() if transform == "fp8"}
        windows = lambda: {name: new_window(stack, self.size) for name, stack in stacks.items()}
        state: dict[str, Any] = {"input": windows(), "output_grad": windows()} if self.size > 1 else {}
        if self.ring and stacks:
            state["mu"] = {name: initial_mu(summed_over(), stack) for name, stack in stacks.items()}
        if self.warmup:
            state["taken"] = jnp.zeros((), jnp.int32)
        return state

    def observe(self, state: dict[str, Any], seen: Mapping[str, jax.Array], ok: jax.Array) -> dict[str, Any]:
        """The state after a step that saw this: {name: taps float32[..., 3, 3]}; unchanged if it does not count."""
        of = lambda name, tensor, what: seen[name][..., TENSORS.index(tensor), SEEN.index(what)]
        moved: dict[str, Any] = {}
        for kind, fmt in (("input", E4M3), ("output_grad", E5M2)):
            if kind in state:
                moved[kind] = {n: observed(window, of(n, kind, "amax"), fmt) for n, window in state[kind].items()}
        if "mu" in state:
            moved["mu"] = {n: update_mu(mu, of(n, "gradient", "overflow"), ok) for n, mu in state["mu"].items()}
        if "taken" in state:
            moved["taken"] = state["taken"] + 1
        return jax.tree.map(lambda new, old: jnp.where(ok, new, old), moved, state)

    # --- what a step multiplies by ---

    def view(self, stored: Any, state: dict[str, Any]) -> Any:
        """The leaves of this step."""
        dealt: Collection[str] = self.deal.shapes if self.deal else ()
        stored = self._brought_together(stored) if self.deal else stored
        windows = {kind: state.get(kind, {}) for kind in ("input", "output_grad")}

        def leaf(path: Any, kept: Any, axes: tuple[str | None, ...]) -> Any:
            if isinstance(kept, LowRank):
                return dataclasses.replace(kept, base=base(path, kept.base, axes))
            return Frozen(base(path, kept, axes)) if self.adapters else base(path, kept, axes)

        def base(path: Any, kept: Any, axes: tuple[str | None, ...]) -> Any:
            name = path_name(path)
            if isinstance(kept, Coded):
                return kept
            transform = self.assigned[name]
            cut = None if name in dealt else axes
            if transform == "fp8":
                weight, scale, scale_inv = self._codes(kept, cut)
                own = {kind: remembered.get(name) for kind, remembered in windows.items()}
                mu = state["mu"][name] if self.ring else None
                smooth = self.smooth and name.endswith("/down_proj/kernel")
                return Fp8(weight, scale, scale_inv, None, mu=mu, axes=(axes[-2], axes[-1]), smooth=smooth, **own)
            if transform == "ternary":
                return self._towards_ternary(kept, cut, state) if self.warmup else self._ternary(kept, cut, axes)
            if transform == "narrow":
                return self._copy(kept, cut, self.precision.compute, True)
            if name.endswith(("kernel", "embedding")):
                return self._copy(kept, axes, self.precision.compute)
            return self._gathered(kept, axes)  # norms and biases: small, and not read by a verb

        return jax.tree_util.tree_map_with_path(leaf, stored, self.axes, is_leaf=is_kept)

    def _brought_together(self, laid: Any) -> Any:
        """By name, on all devices, what was dealt out: as the codes that travel at this level, cast by their owners."""
        assert self.deal is not None
        everywhere = lambda slot: _pinned(_pinned(slot, PartitionSpec("replica")), PartitionSpec())
        to_fp8 = lambda key: self.level == "O3" and self.deal.stacks[key].kind == "fp8"
        stacks = {key: encode(decode(s), E4M3) if to_fp8(key) else s for key, s in laid[DEALT].items()}
        return self.deal.put_back(laid, self.deal.unpack(stacks, everywhere))

    def _codes(self, kept: Any, axes: Axes) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(what travels, its factor to E4M3 codes, their factor to values) of a matrix that multiplies in FP8."""
        is_code = isinstance(kept, Scaled) and kept.code.dtype == E4M3.dtype
        if self.level == "O3" or is_code:
            codes = kept if is_code else encode(decode(kept), E4M3)
            return self._gathered(codes.code, axes), jnp.ones_like(codes.scale_inv), codes.scale_inv
        if isinstance(kept, Scaled):
            scale = scale_of(amax(kept.code) * kept.scale_inv, E4M3)
            return self._gathered(kept.code, axes), scale * kept.scale_inv, 1 / scale
        scale = scale_of(amax(kept), E4M3)
        return self._gathered(kept.astype(self.precision.compute), axes), scale, 1 / scale

    def _ternary(self, kept: Any, cut: Axes, axes: tuple[str | None, ...]) -> TernaryCodes:
        """Codes that are made of the masters where these lie. `cut`: as of `_gathered`."""
        codes, inverse = ternary_codes(decode(kept))
        own, side, narrow = tuple(axis for axis in axes if axis != "layers"), side_of(axes), self.level != "none"
        packed = self._gathered(pack(codes, side), cut)
        return TernaryCodes(
            packed, inverse, None, side, codes.shape[side], own, jnp.dtype(self.precision.param), narrow
        )

    def _towards_ternary(self, kept: Any, cut: Axes, state: dict[str, Any]) -> Ternary:
        """A latent on its way, which needs it whole: it travels as it is multiplied."""
        share = jnp.minimum(state["taken"].astype(jnp.float32) / self.warmup, 1.0)
        latent = self._copy(kept, cut, self.precision.param, self.level != "none")
        return Ternary(latent, jnp.full(kept.shape[:-2], share))

    def _copy(self, kept: Any, axes: Axes, dtype: DTypeLike, narrow: bool = False) -> Any:
        """A weight that multiplies in a float dtype: as it is kept, or brought together in `dtype`; `narrow`: with a
        gradient in E4M3."""
        if isinstance(kept, Scaled):
            return Copy(Scaled(self._gathered(kept.code, axes), kept.scale_inv), narrow=narrow)
        if self.cut:
            return Copy(self._gathered(kept.astype(dtype), axes), narrow=narrow)
        return Copy(kept, narrow=True) if narrow else kept

    def _gathered(self, x: jax.Array, axes: Axes) -> jax.Array:
        """x on all devices of `replica`, where it was cut over them: the one gather of a step. FP8 travels as bytes.
        `axes`: its logical axes, or None for what is everywhere already.

        What travels is pinned before as well: the partitioner may gather whatever it was made of, which is wider.
        """
        if not self.cut or axes is None:
            return x
        before = _pinned(as_bytes(x), stored_spec(axes, x.shape))
        return from_bytes(constrain(before, *axes), x.dtype)

    # --- what a person is told ---

    def report(self, seen: Mapping[str, jax.Array], state: dict[str, Any], view: Any, after: Any) -> dict[str, Any]:
        """What a step logs, by the name of the weight. `after`: the stored parameters that it ends with.

        Of FP8 products: what was seen of x, dy and dw, float32[..., 3, 3] (fp8.TENSORS by fp8.SEEN), the scales they
        were cast with, float32[..., 3], and mu. Of ternary matrices that learn: shares of weights that have turned and
        that are 0, float32[..., 2], and the weights of one matrix.
        """
        return self._report_fp8(seen, state) | self._report_ternary(view, after)

    def _report_ternary(self, view: Any, after: Any) -> dict[str, Any]:
        if self.deal or not self.ternary:  # dealt out, no device has the matrices by name
            return {}
        learning = lambda leaf: isinstance(leaf, TernaryCodes | Ternary)
        before = {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(view, is_leaf=handles.is_typed)}
        now = {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(after, is_leaf=is_kept)}
        shares = {
            name: (turned(leaf, decode(now[name])), math.prod(now[name].shape[-2:]))
            for name, leaf in before.items()
            if learning(leaf)
        }
        return {"ternary": shares} if shares else {}

    def _report_fp8(self, seen: Mapping[str, jax.Array], state: dict[str, Any]) -> dict[str, Any]:
        if not seen:
            return {}
        mu = state.get("mu", {})
        scales = {}
        for name, taps in seen.items():
            own = [scale_now(state.get(kind, {}).get(name), taps[..., row, SEEN.index("amax")], fmt)
                   for row, (kind, fmt) in enumerate(zip(TENSORS, (E4M3, E5M2, E4M3), strict=True))]  # fmt: skip
            scales[name] = jnp.stack([*own[:-1], own[-1] * mu.get(name, 1.0)], -1)
        return {"seen": dict(seen), "scale": scales, "mu": mu}

    def describe(self) -> str:
        """One line: what multiplies in FP8, and what does not, and why; or what rules make of the weights. "" where all
        are plain."""
        leaves = jax.tree_util.tree_leaves_with_path(self.shapes)
        total = sum(x.size for _, x in leaves)
        if self.level == "none":
            by_rule: Counter[str] = Counter()
            for path, x in leaves:
                by_rule[self.assigned[path_name(path)]] += x.size
            shares = ", ".join(f"{kind} {size / total:.1%}" for kind, size in by_rule.most_common())
            turning = f"; turning over {self.warmup:,} steps" if self.warmup else ""
            return shares + turning if by_rule.keys() != {"plain"} else ""
        sizes = Counter({"fp8": 0})
        for path, x in leaves:
            name = path_name(path)
            transform = self.assigned[name]
            sizes["fp8" if transform == "fp8" else not_fp8(name, x.shape) or f"{transform} by rule"] += x.size
        own = sizes.pop("fp8")
        rest = ", ".join(f"{reason} {size / total:.1%}" for reason, size in sizes.most_common())
        dealt = f"; whole tensors are dealt out to replicas, {self.deal.padding:.1%} padding" if self.deal else ""
        return f"{self.level}: {own / total:.1%} of the weights multiply in FP8; not: {rest}{dealt}"


def _pinned(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """x, to lie so."""
    return jax.lax.with_sharding_constraint(x, spec)
