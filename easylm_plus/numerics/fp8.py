"""FP8 products: activations and weights in E4M3, gradients of outputs in E5M2 (FP8-LM, Peng et al. 2023,
arXiv:2310.18313; the formats are those of Micikevicius et al. 2022, arXiv:2209.05433).

    y  = x w           x, w in E4M3        added up fast
    dx = dy w^T        dy in E5M2, which has the range that gradients need, and less precision
    dw = x^T dy        added up in full, summed over devices in E4M3, kept in E4M3

A tensor has one scale, a power of two, that of the whole tensor over all devices: y and dx do not depend on the mesh
but for the order of sums (dw is rounded by each device before it is summed). Under a scan over layers it is one scale a
layer. Scales come from the tensor at hand, or with windows from the steps before (windows.py).

Products run in an island, a region that is manual over all axes of the mesh. GSPMD would gather weights and reduce
gradients in a dtype of its own choosing, in places that no code outside sees; in an island what travels is written
down: the weight's codes to all devices of `fsdp`, forwards and again backwards, and the gradient's codes back
(reduction.py). Sums over `tensor` (of y where it cuts the in-features, of dx where it cuts the out-features) are in the
compute dtype, as in the released code.

The gradient is the cotangent of a handle of E4M3 codes (handles.py): one byte a weight. With it comes what the pass has
seen of x, dy and dw: the largest value, and the shares of values that overflowed and underflowed.

XLA:GPU makes a cuBLASLt FP8 call of a product whose operands are FP8, with one contracting axis each, times a scalar.
XLA:CPU multiplies FP8 in slow loops; there the codes are widened to bfloat16 first, exactly.

Legend: B batch, T length, N tokens of a device, D in-features, F out-features; `...` stack axes.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from easylm_plus.numerics import handles, verbs
from easylm_plus.numerics.formats import E4M3, E5M2, Format, Scaled, amax, cast, scale_of
from easylm_plus.numerics.reduction import encode_shared, ring, two_shot
from easylm_plus.numerics.windows import Window, scale_now
from easylm_plus.parallel import collectives
from easylm_plus.parallel.products import Cut, cut_of
from easylm_plus.parallel.sharding import island, manual_axes

UNIT = Format("unit", jnp.float32, 1.0)  # for powers of two at most 1 / x
FAST, FULL = jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST
TENSORS, SEEN = ("input", "output_grad", "gradient"), ("amax", "overflow", "underflow")  # rows and columns of a tap


@struct.dataclass
class Fp8Handle:
    """What is differentiated in the place of an Fp8. Its values are never read; its cotangent is the gradient."""

    code: jax.Array  # E4M3 [..., D, F]
    scale_inv: jax.Array  # float32[...]
    tap: jax.Array  # float32[..., 3, 3]: TENSORS by SEEN
    uses: jax.Array  # float32[...]: 1. Cotangents of two uses of a leaf add up, and sums of codes mean nothing


@struct.dataclass
class Fp8:
    """A matrix that multiplies in FP8."""

    weight: jax.Array  # [..., D, F]: what travels to the devices; E4M3 codes, or wider values
    scale: jax.Array  # float32[...]: weight * scale is cast to E4M3, unless it is so already
    scale_inv: jax.Array  # float32[...]: value = E4M3 code * scale_inv
    handle: Fp8Handle | None  # None: nothing is learned here
    input: Window | None  # None: scales from the tensor at hand
    output_grad: Window | None
    mu: jax.Array | None  # float32[...]: gradients are summed by the ring, with this factor; None: by two shots
    axes: tuple[str | None, str | None] = struct.field(pytree_node=False)  # logical axes of the matrix
    smooth: bool = struct.field(pytree_node=False, default=False)  # in-features that stand out are evened out


@verbs._project.register
def _(w: Fp8, x: jax.Array) -> jax.Array:
    return _fp8_project(x, w)


@jax.custom_vjp
def _fp8_project(x: jax.Array, w: Fp8) -> jax.Array:
    return _forward(x, w)[0]


def _forward(x: jax.Array, w: Fp8) -> Any:
    cut = cut_of(x.shape, w.weight.shape, w.axes)
    even = evened(x) if w.smooth else None
    code, x_inv, seen = narrowed(x if even is None else x * even.astype(x.dtype), E4M3, w.input)
    whole = PartitionSpec()
    product = island(partial(_product, cut, x.dtype), (cut.x, cut.w, whole, cut.feature, whole), cut.y)
    y = product(code, w.weight, w.scale, even, x_inv * w.scale_inv)
    return y, (collectives.as_bytes(code), x_inv, seen, even, w)


def _backward(residuals: Any, dy: jax.Array) -> Any:
    x_bytes, x_inv, x_seen, even, w = residuals
    x_code = collectives.from_bytes(x_bytes, E4M3.dtype)
    cut = cut_of(x_code.shape, w.weight.shape, w.axes)
    code, dy_inv, dy_seen = narrowed(dy, E5M2, w.output_grad)
    whole = PartitionSpec()
    backwards = island(
        partial(_backwards, cut, dy.dtype, w.handle is not None),
        (cut.x, cut.w, whole, cut.feature, cut.y, whole, whole, whole),
        (cut.x, (cut.w, whole, whole) if w.handle else None),
    )
    dx, learned = backwards(x_code, w.weight, w.scale, even, code, dy_inv * w.scale_inv, x_inv * dy_inv, w.mu)
    handle = None
    if learned is not None:
        gradient, scale_inv, dw_seen = learned
        handle = Fp8Handle(gradient, scale_inv, jnp.stack([x_seen, dy_seen, dw_seen]), jnp.ones(()))
    return dx, handles.cotangent_of(w, handle)


_fp8_project.defvjp(_forward, _backward)


def narrowed(x: jax.Array, fmt: Format, window: Window | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(codes of x, the factor back to values float32[], SEEN float32[3]), with one scale over all devices.

    The factor is NaN where x is not finite: a cast saturates, and would hide it.
    """
    largest = collectives.largest(amax(x, None), manual_axes())
    scale = scale_now(window, largest, fmt)
    code = cast(x, scale, fmt)
    back = jnp.where(jnp.isfinite(largest), 1 / scale, jnp.nan)
    # a scale of its own amax lets nothing saturate
    over = jnp.abs(x.astype(jnp.float32)) * scale > fmt.largest if window else jnp.zeros(())  # type: ignore[operator]
    return code, back, jnp.stack([largest, over.mean(dtype=jnp.float32), underflow(x, code)])


def underflow(x: jax.Array, code: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
    """Share of x's values that became 0, over these axes (None: all)."""
    return ((code.astype(jnp.float32) == 0) & (x != 0)).mean(axes, dtype=jnp.float32)


def evened(x: jax.Array) -> jax.Array:
    """Powers of two, float32[D], that in-features of x are multiplied by and rows of the weight divided by.

    Late in training a few features of SwiGLU's product grow by orders of magnitude, and under their scale all others
    become 0 (Smooth-SwiGLU, Fishman et al. 2024, arXiv:2409.12517). There every feature is brought to one size, and its
    weights take all of the difference; here they share it, square root each (SmoothQuant, Xiao et al. 2022,
    arXiv:2211.10438, alpha 0.5), since E4M3 has room for 2^14 on either side.
    """
    largest_D = collectives.largest(amax(x, tuple(range(x.ndim - 1))), manual_axes())
    ratio = largest_D.max() / jnp.where(largest_D > 0, largest_D, largest_D.max())
    return scale_of(1 / jnp.sqrt(ratio), UNIT)


def _product(
    cut: Cut, dtype: DTypeLike, x: jax.Array, weight: jax.Array, scale: jax.Array, even: jax.Array | None,
    back: jax.Array,
) -> jax.Array:  # fmt: skip
    """One device's y[..., F] of x's codes [..., D]."""
    w_DF, factor = _codes(cut, weight, scale, even)
    y_NF = _dot(_rows(x), w_DF, (1, 0), dtype, FAST) * (back * factor).astype(dtype)
    y = y_NF.reshape(*x.shape[:-1], -1)
    if cut.scattered:
        return jax.lax.psum_scatter(y, cut.inside, scatter_dimension=1, tiled=True)
    return jax.lax.psum(y, cut.inside) if cut.inside else y


def _backwards(
    cut: Cut, dtype: DTypeLike, learned: bool, x: jax.Array, weight: jax.Array, scale: jax.Array,
    even: jax.Array | None, dy: jax.Array, dx_back: jax.Array, dw_back: jax.Array, mu: jax.Array | None,
) -> tuple[jax.Array, Any]:  # fmt: skip
    """One device's dx[..., D], and (codes, factor, SEEN) of its block of the gradient, summed over `data`."""
    dy = collectives.all_gather_codes(dy, cut.inside, 1) if cut.scattered else dy
    w_DF, factor = _codes(cut, weight, scale, even)
    dx_ND = _dot(_rows(dy), w_DF, (1, 1), dtype, FULL) * (dx_back * factor).astype(dtype)
    dx_ND = dx_ND if even is None else dx_ND * even.astype(dtype)
    dx_ND = jax.lax.psum(dx_ND, cut.outside) if cut.outside else dx_ND
    dx = dx_ND.reshape(*dy.shape[:-1], -1)
    if not learned:
        return dx, None
    dw_DF = _dot(_rows(x), _rows(dy), (0, 0), jnp.float32, FULL) * dw_back
    dw_DF = dw_DF if even is None else dw_DF / even[:, None]
    others = (*cut.inside, *cut.outside, *cut.replicas)
    total = local = encode_shared(dw_DF, (*cut.data, *others), 1.0 if mu is None else mu)
    overflow = jnp.zeros(())
    if cut.data and mu is None:
        total = two_shot(local, cut.data, cut.gathered, cut.dim, others)
    elif cut.data:
        total, overflow = ring(local, cut.data, cut.gathered, cut.dim, others)
    seen = jnp.stack([amax(dw_DF), overflow, underflow(dw_DF, local.code)])
    return dx, (total.code, total.scale_inv, collectives.largest(seen, (*cut.data, *others)))


def _codes(
    cut: Cut, weight: jax.Array, scale: jax.Array, even: jax.Array | None
) -> tuple[jax.Array, jax.Array | float]:
    """(the weight's E4M3 codes, brought together from the devices that cut it, a factor that they lack)."""
    weight = collectives.all_gather_codes(weight, cut.gathered, cut.dim)
    if even is not None:  # rows divided by it, and a scale for what comes out
        rows_DF = weight.astype(jnp.float32) * scale / even[:, None]
        own = scale_of(collectives.largest(amax(rows_DF), (*cut.inside, *cut.outside)), E4M3)
        return cast(rows_DF, own, E4M3), 1 / own
    return weight if weight.dtype == E4M3.dtype else cast(weight, scale, E4M3), 1.0


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int], dtype: DTypeLike, precision: Any) -> jax.Array:
    """The product of two matrices of codes, contracted over one axis of each."""

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        axes = (((contract[0],), (contract[1],)), ((), ()))
        return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=dtype)

    widened = lambda a, b: product(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16))
    return jax.lax.platform_dependent(a, b, cpu=widened, default=product)


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


# --- what is differentiated ---


def new_handle(shape: tuple[int, ...]) -> Fp8Handle:
    """The handle of a weight [..., D, F]."""
    stack = shape[:-2]
    tap = jnp.zeros((*stack, len(TENSORS), len(SEEN)))
    return Fp8Handle(jnp.zeros(shape, E4M3.dtype), jnp.zeros(stack), tap, jnp.zeros(stack))


@handles.handle_of.register
def _(leaf: Fp8) -> Fp8Handle:
    return new_handle(leaf.weight.shape)


@handles.hold.register
def _(leaf: Fp8, handle: Any) -> Fp8:
    return dataclasses.replace(leaf, handle=handle)


@handles.cotangent_of.register
def _(leaf: Fp8, handle: Any) -> Fp8:
    nothing: Any = None
    return Fp8(nothing, nothing, nothing, handle, None, None, None, leaf.axes, leaf.smooth)


@handles.gradient_of.register
def _(cotangent: Fp8Handle) -> Scaled:
    return Scaled(cotangent.code, jnp.where(cotangent.uses > 1, jnp.nan, cotangent.scale_inv))


@handles.observation_of.register
def _(cotangent: Fp8Handle) -> jax.Array:
    return cotangent.tap
