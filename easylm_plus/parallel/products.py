"""How the product of activations and a weight lies on the mesh, for code that runs on each device's parts.

Legend: B batch, T length, D in-features, F out-features.
"""

from typing import NamedTuple

from jax.sharding import PartitionSpec

from easylm_plus.parallel.sharding import axes_in, manual_axes, spec_of

# the axis of the activations that meets a side of a weight
MEETS = {"embed": "act_embed", "heads": "act_heads", "kv_heads": "act_kv_heads", "mlp": "act_mlp", None: None}


class Cut(NamedTuple):
    """How a product lies on the mesh."""

    x: PartitionSpec
    w: PartitionSpec
    y: PartitionSpec
    data: tuple[str, ...]  # axes that cut the tokens: gradients are summed over them
    gathered: tuple[str, ...]  # those of them that cut the weight, which has to be brought together
    dim: int  # the side of the weight that they cut, -2 or -1
    inside: tuple[str, ...]  # axes that cut the in-features of x and w: y is summed over them
    scattered: bool  # ... and cut along the length, instead of the same on all of them (sequence.py)
    outside: tuple[str, ...]  # axes that cut the out-features of w and y: dx is summed over them
    feature: PartitionSpec  # of something that x's in-features have, [D]
    replicas: tuple[str, ...]  # axes along which this code sees one device's part already


def cut_of(x_shape: tuple[int, ...], w_shape: tuple[int, ...], axes: tuple[str | None, str | None]) -> Cut:
    """The cut of x[..., D] times w[D, F] on the mesh in context."""
    y_shape = (*x_shape[:-1], w_shape[1])
    lie = lambda length, side, shape: spec_of((*("batch", length)[: len(shape) - 1], MEETS[axes[side]]), shape)
    w, x, y = spec_of(axes, w_shape), lie("length", 0, x_shape), lie("length", 1, y_shape)
    data = axes_in(x[:-1])
    sides = [axes_in(w[:1]), axes_in(w[1:])]
    gathered = tuple(axis for axis in (*sides[0], *sides[1]) if axis in data)
    inside, outside = (tuple(axis for axis in side if axis not in data) for side in sides)
    assert (inside, outside) == (axes_in(x[-1:]), axes_in(y[-1:])), f"{x} times {w} gives {y}"
    x_feature = PartitionSpec(x[-1] if len(x) == len(x_shape) else None)
    pieces = lie("residual", 1, y_shape)
    scattered = inside != () and axes_in(pieces[:-1]) == (*data, *inside)
    dim = -1 if gathered and gathered[0] in sides[1] else -2
    return Cut(
        x, w, pieces if scattered else y, data, gathered, dim, inside, scattered, outside, x_feature, manual_axes()
    )
