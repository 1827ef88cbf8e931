"""What a matrix can be made smaller as, by the words of a command line: int4:group=128,method=gptq.

    int8 int6 int5 int4 int3 int2   group=N (in-features that share a scale; by default all), asym,
                                    method=rtn | gptq | awq, act_order (gptq)
    nf4                             block=64 (in-features that share an absmax), double (absmaxes rounded, too)
    fp8                             E4M3 codes, a scale a matrix
    ternary                         {-1, 0, 1} times one scale a matrix; of a model that was trained so, exactly itself
    sparse                          share=0.5 (of the weights that go), method=magnitude | wanda | sparsegpt
    2:4                             method=magnitude | wanda | sparsegpt

All take embed=int8 | keep: whether the table of tokens and the head are rounded too, to 8 bits a row; where weights go
and are not rounded the default is keep.

A scheme is a row of SCHEMES: the keys that it takes with their defaults, and a function (weight [D, F], what was seen
of its inputs, the keys' values) -> leaf.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from easylm_plus.compression.awq import awq
from easylm_plus.compression.gptq import gptq
from easylm_plus.compression.pruning import kept_of, magnitude, sparsegpt, wanda
from easylm_plus.errors import UserError
from easylm_plus.numerics.deploy import EMBEDS, HEAD
from easylm_plus.numerics.formats import E4M3, encode
from easylm_plus.numerics.int8_rows import int8_rows
from easylm_plus.numerics.integer import WIDTHS, integers
from easylm_plus.numerics.nf4 import BLOCK, nf4
from easylm_plus.numerics.packed_ternary import packed
from easylm_plus.numerics.sparsity import sparse, two_four
from easylm_plus.numerics.watched import Seen

Values = Mapping[str, Any]
Make = Callable[[Any, Seen | None, Values], Any]
CALIBRATED = ("gptq", "awq", "wanda", "sparsegpt")  # methods that look at a matrix's inputs
CHOICES = {"embed": EMBEDS}


def _of_expert(seen: Seen | None, e: int) -> Seen | None:
    """What an expert saw; for one that no row met, inputs that are all alike, with which methods make the same leaf."""
    if seen is None:
        return None
    own: Seen = jax.tree.map(lambda x: x[e], seen)
    D = len(own.magnitude)
    return own if own.magnitude.any() else Seen(np.eye(D), np.ones(D))


def _integers(bits: int, w: Any, seen: Seen | None, values: Values) -> Any:
    group, asymmetric = values["group"], values["asym"]
    if values["method"] == "rtn" or seen is None:
        return integers(jnp.asarray(w), bits, group, asymmetric)
    if values["method"] == "awq":
        return awq(w, seen.gram, seen.magnitude, bits, group, asymmetric)
    return gptq(w, seen.gram, bits, group, asymmetric, values["act_order"])


def _pruned(w: Any, seen: Seen | None, values: Values) -> Any:
    share, method, w = values.get("share", 0.0), values["method"], jnp.asarray(w)
    if seen is None or method == "magnitude":
        kept, method = magnitude(w, share), "magnitude"
    elif method == "wanda":
        kept = wanda(w, seen.gram, share)
    else:
        changed, kept = sparsegpt(w, seen.gram, share)
        w = changed.astype(w.dtype)
    return sparse(w, kept, kept_of(w.shape[0], w.shape[1], share, method)) if share else two_four(w, kept)


def _keys(make: Make, **defaults: Any) -> tuple[Make, Values]:
    return make, {"embed": "int8", **defaults}


_PRUNING = ("magnitude", "wanda", "sparsegpt")
SCHEMES: dict[str, tuple[Make, Values]] = {
    **{
        f"int{bits}": _keys(partial(_integers, bits), group=0, method="rtn", asym=False, act_order=False)
        for bits in WIDTHS
    },
    "nf4": _keys(lambda w, seen, keys: nf4(jnp.asarray(w), keys["block"], keys["double"]), block=BLOCK, double=False),
    "fp8": _keys(lambda w, seen, values: encode(jnp.asarray(w), E4M3)),
    "ternary": _keys(lambda w, seen, values: packed(jnp.asarray(w))),
    "sparse": _keys(_pruned, share=0.5, method="wanda", embed="keep"),
    "2:4": _keys(_pruned, method="wanda", embed="keep"),
}
METHODS = {name: _PRUNING if make is _pruned else ("rtn", "gptq", "awq") for name, (make, _) in SCHEMES.items()}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A scheme with its keys' values."""

    text: str  # as it was asked for
    name: str
    values: Values

    @property
    def calibrated(self) -> bool:
        """Whether matrices cannot be done without their inputs."""
        return self.values.get("method") in CALIBRATED

    def __call__(self, name: str, w: Any, seen: Seen | None = None) -> Any:
        """The leaf of a weight [D, F], or of one for each expert [E, D, F]; `name` is for errors."""
        make = SCHEMES[self.name][0]
        try:
            if w.ndim == 2:
                return make(w, seen, self.values)
            parts = [make(w[e], _of_expert(seen, e), self.values) for e in range(len(w))]
        except ValueError as error:
            sides = " x ".join(map(str, w.shape[-2:]))
            raise UserError(f"--quantize={self.text}: {name} ({sides}): {error}; expected another") from None
        return jax.tree.map(lambda *xs: jnp.stack(xs), *parts)

    def ends(self, name: str, w: Any) -> Any:
        """What becomes of the table of tokens or the head."""
        return int8_rows(jnp.asarray(w), name == HEAD) if self.values["embed"] == "int8" else w


def scheme(text: str) -> Scheme:
    """ "int4:group=128,method=gptq" -> a Scheme; an error names the nearest of what is not known."""
    name = max((n for n in SCHEMES if text == n or text.startswith(f"{n}:")), key=len, default="")
    if not name:
        raise _unknown(text, text.partition(":")[0], "scheme", SCHEMES)
    defaults = SCHEMES[name][1]
    values = dict(defaults)
    for item in filter(None, text[len(name) + 1 :].split(",")):
        key, separator, given = item.partition("=")
        if key not in defaults:
            raise _unknown(text, key, f"key of {name}", defaults)
        values[key] = _value(text, name, key, given if separator else None, defaults[key])
    if values.get("act_order") and values["method"] != "gptq":
        raise UserError(f"--quantize={text}: act_order is of method=gptq; found method={values['method']}")
    return Scheme(text, name, values)


def _value(text: str, name: str, key: str, given: str | None, default: Any) -> Any:
    """A key's value, of the kind that its default has."""
    if isinstance(default, bool):
        if given in (None, "true", "false"):
            return given != "false"
        expected = f"{key} alone, {key}=true or {key}=false"
    elif key == "group":
        if given is not None and given.isdecimal():
            return int(given)
        expected = "in-features that share a scale, 0: all"
    elif key == "block":
        if given is not None and given.isdecimal() and int(given) and not int(given) % 2:
            return int(given)
        expected = "an even number of in-features that share an absmax"
    elif key == "share":
        try:
            if given is not None and 0 < float(given) < 1:
                return float(given)
        except ValueError:
            pass
        expected = "a number between 0 and 1"
    else:
        known = METHODS[name] if key == "method" else CHOICES[key]
        if given in known:
            return given
        raise _unknown(text, given or "", key, known)
    raise UserError(f"--quantize={text}: found {key}={given or ''}, expected {expected}")


def _unknown(text: str, found: str, what: str, known: Any) -> UserError:
    near = difflib.get_close_matches(found, known, n=1, cutoff=0.0)[0]
    return UserError(f"--quantize={text}: unknown {what} {found!r}: did you mean {near!r}? Known: {', '.join(known)}")
