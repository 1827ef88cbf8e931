"""Multiply-adds of a program's matrix products, against arithmetic."""

import jax
import jax.numpy as jnp
import pytest

from easylm_plus.planning.products import products


def text_of(function, *arrays):
    return jax.jit(function).lower(*arrays).compile().as_text()


def test_a_product_counts_once_a_round():
    def program(x, w):
        layer = lambda x, _: (jnp.tanh(x @ w) @ w.T, None)
        return jax.lax.scan(lambda x, _: jax.lax.scan(layer, x, None, length=5), x, None, length=3)[0] @ w

    assert products(text_of(program, jnp.ones((6, 16)), jnp.ones((16, 32)))) == {
        "f32 x f32": (3 * 5 * 2 + 1) * 6 * 16 * 32
    }


def test_batches_and_sides():
    both = lambda x, y: jnp.einsum("abmk,abkn->abmn", x, y)
    assert products(text_of(both, jnp.ones((2, 3, 4, 5)), jnp.ones((2, 3, 5, 7)))) == {"f32 x f32": 2 * 3 * 4 * 5 * 7}


def test_a_program_without_products():
    assert products(text_of(lambda x: x + 1, jnp.ones(3))) == {}


def test_an_unknown_number_of_times_is_an_error():
    program = lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ x), x)
    with pytest.raises(ValueError, match="how often it is executed is not known"):
        products(text_of(program, jnp.ones((8, 8)), jnp.int32(3)))


CALL = """HloModule jit_f, is_scheduled=true

ENTRY %main (x: f8e4m3fn[64,32], w: f8e5m2[48,32]) -> bf16[64,48] {
  %x = f8e4m3fn[64,32]{1,0} parameter(0)
  %w = f8e5m2[48,32]{1,0} parameter(1)
  %c = (bf16[64,48]{1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul$f8", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %s = f32[] custom-call(%x), custom_call_target="Sharding"
  ROOT %y = bf16[64,48]{1,0} get-tuple-element(%c), index=0
}
"""


def test_library_calls():
    assert products(CALL) == {"f8e4m3fn x f8e5m2": 64 * 32 * 48}
    batched = CALL.replace('"lhs_batch_dimensions":[]', '"lhs_batch_dimensions":["0"]')
    for old, new in (("[64,32]", "[4,16,32]"), ("f8e5m2[48,32]", "f8e5m2[4,48,32]"), ("[64,48]", "[4,16,48]")):
        batched = batched.replace(old, new)
    assert products(batched) == {"f8e4m3fn x f8e5m2": 4 * 16 * 32 * 48}


def test_other_shapes_are_an_error():
    with pytest.raises(ValueError, match="no shapes of a matrix product"):
        products(CALL.replace("[48,32]", "[48,33]"))
