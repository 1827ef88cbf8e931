"""One table from logical axes to mesh axes, and the three functions that read it.

Weights and activations name their axes by meaning ("embed", "heads", ...); nothing else in the code base knows
mesh axes. GSPMD (Xu et al. 2021, arXiv:2105.04663) partitions the step from the shardings of the weights and the
few constraints on activations that `constrain` states.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from easylm_plus.errors import UserError

MeshAxes = str | tuple[str, ...] | None

RULES: Mapping[str, MeshAxes] = {
    # weights
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "experts": "expert",
    "head_dim": None,
    # activations
    "batch": ("replica", "fsdp", "expert"),
    "length": "sequence",
    "residual": "sequence",  # the length, between attention and feed-forward
    "act_embed": None,
    "act_heads": "tensor",
    "act_kv_heads": "tensor",
    "act_mlp": "tensor",
}
DATA_AXES = ("replica", "fsdp", "expert", "sequence")  # the axes that cut a batch [B, T]

_rules: ContextVar[Mapping[str, MeshAxes]] = ContextVar("sharding_rules", default=RULES)
_device: ContextVar[jax.Device | None] = ContextVar("device", default=None)


def rules_for(mesh: Mesh, num_heads: int, num_kv_heads: int, cut_residual: bool = False) -> Mapping[str, MeshAxes]:
    """RULES, with heads left whole where their *count* does not divide: half a head is of no use to anyone.

    `cut_residual`: sequence parallelism, `tensor` cuts the length where it cuts nothing else.
    """
    tensor = mesh.shape["tensor"]
    whole: dict[str, MeshAxes] = {}
    if num_heads % tensor:
        whole |= {"heads": None, "act_heads": None}
    if num_kv_heads % tensor:
        whole |= {"kv_heads": None, "act_kv_heads": None}
    residual: dict[str, MeshAxes] = {"residual": ("sequence", "tensor")} if cut_residual else {}
    return {**RULES, **whole, **residual}


@contextmanager
def use(mesh: Mesh, rules: Mapping[str, MeshAxes] = RULES) -> Iterator[None]:
    """Everything traced inside is partitioned over `mesh` by `rules`."""
    tokens = _rules.set(rules), _device.set(mesh.devices.flat[0])
    try:
        with jax.set_mesh(mesh):
            yield
    finally:
        _rules.reset(tokens[0])
        _device.reset(tokens[1])


def device() -> jax.Device:
    """A device that what is traced here is for: of the mesh in use, which may be elsewhere, or of this process."""
    return _device.get() or jax.devices()[0]


def mesh_axis_size(axis: str) -> int:
    """Size of a mesh axis in the current context; 1 where there is no mesh."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1)


def free_axes(mesh: Any = None) -> tuple[str, ...]:
    """The axes that can cut an array here: of the mesh in context, larger than 1 and not manual already."""
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(axis for axis, kind in kinds if kind != AxisType.Manual and mesh.shape[axis] > 1)


def manual_axes() -> tuple[str, ...]:
    """The axes along which this code sees one device's part only, larger than 1."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(axis for axis, kind in kinds if kind == AxisType.Manual and mesh.shape[axis] > 1)


def island(local: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`local` on each device's parts of the arguments: a region that is manual over all axes that are not so yet.

    Where there is nothing to cut it is `local` itself. Inside a region it closes the axes of size 1 too: a fused kernel
    that the partitioner may still cut, be it into one part, aborts on what is manual already (cuDNN, jax 0.12).
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind != AxisType.Manual}
    if not axes or not (free_axes() or manual_axes()):
        return local
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)


def spec_of(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Any = None) -> PartitionSpec:
    """Logical axes of an array -> PartitionSpec over the free axes of `mesh`, or of the mesh in context.

    Where mesh axes do not divide a dimension, the last of them are left out until they do.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    rules, entries, free = _rules.get(), [], free_axes(mesh)
    used: set[str] = set()
    for name, dim in zip(axes, shape, strict=True):
        wanted = rules[name] if name is not None else None
        wanted = (wanted,) if isinstance(wanted, str) else wanted or ()
        picked = tuple(a for a in wanted if a not in used and a in free)
        while dim % math.prod(mesh.shape[axis] for axis in picked):
            picked = picked[:-1]
        used.update(picked)
        entries.append(picked if len(picked) > 1 else picked[0] if picked else None)
    return PartitionSpec(*entries)


def stored_spec(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Any = None) -> PartitionSpec:
    """As spec_of, of what is kept between steps where it is cut over `replica` too (ZeRO, Rajbhandari et al. 2020,
    arXiv:1910.02054): along the side that `fsdp` cuts, whose parts are cut once more."""
    token = _rules.set({**_rules.get(), "embed": ("fsdp", "replica")})
    try:
        return spec_of(axes, shape, mesh)
    finally:
        _rules.reset(token)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """States how an activation is sharded; a no-op where there is nothing to cut it."""
    if not free_axes():
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(axes, x.shape))


def shardings(axes: Any, shapes: Any, mesh: Mesh, spec: Callable = spec_of) -> Any:
    """Trees of logical axes and of shapes -> tree of NamedSharding (weights, as declared at init); `spec` may be
    `stored_spec`."""
    return jax.tree.map(
        lambda names, leaf: NamedSharding(mesh, spec(tuple(names), leaf.shape, mesh)),
        axes,
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def axes_in(spec: PartitionSpec) -> tuple[str, ...]:
    """The mesh axes that a PartitionSpec names."""
    return tuple(axis for entry in spec for axis in ((entry,) if isinstance(entry, str) else entry or ()))


def cut_shares(axes: Any, shapes: Any, mesh: Mesh) -> dict[str, float]:
    """For each mesh axis that cuts weights and is larger than 1: the share of the weights' elements it does cut.

    Raises UserError for one that cuts none, since a side that an axis does not divide stays whole.
    """
    leaves = jax.tree.leaves(shapes)
    specs = [s.spec for s in jax.tree.leaves(shardings(axes, shapes, mesh))]
    used = [set(axes_in(spec)) for spec in specs]
    shares = {}
    for axis in ("fsdp", "expert", "tensor"):
        if mesh.shape[axis] > 1:
            cut = sum(leaf.size for leaf, over in zip(leaves, used, strict=True) if axis in over)
            shares[axis] = cut / sum(leaf.size for leaf in leaves)
            if not cut:
                raise UserError(
                    f"mesh.{axis} = {mesh.shape[axis]}: divides no side of the weights that it could cut; expected a "
                    "divisor of them, or mesh.replica, which copies the weights"
                )
    return shares
