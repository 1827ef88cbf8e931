"""The formats in which a compiled program multiplies are found in its text."""

import jax
import jax.numpy as jnp
import pytest

from easylm_plus.planning.products import matmul_formats


def compiled(dtype, products=2):
    def program(x, w):
        for _ in range(products):
            x = jnp.tanh(x @ w)
        return x

    arrays = jnp.ones((64, 64), dtype), jnp.ones((64, 64), dtype)
    return jax.jit(program).lower(*arrays).compile().as_text()


@pytest.mark.parametrize("products", [1, 3])
def test_products_of_a_compiled_program(products):
    assert matmul_formats(compiled(jnp.float32, products)) == f"dot f32 x f32: {products}"


def test_a_program_without_products():
    assert matmul_formats(compiled(jnp.float32, 0)) == ""


@pytest.mark.parametrize(
    "target, name",
    [
        ("__cublas$lt$matmul$f8", "cuBLASLt FP8"),
        ("__cublas$lt$matmul", "cuBLASLt"),
        ("__cublas$gemm", "cuBLAS"),
        ("__cudnn$fmhaSoftmaxBackward", "cuDNN attention"),
        ("__onednn$matmul", "oneDNN"),
        ("tpu_custom_call", "Pallas (TPU)"),
    ],
)
def test_library_calls(target, name):
    line = f'%c.1 = f32[8,8] custom-call(f32[8,8] %a), custom_call_target="{target}", backend_config={{}}\n'
    assert matmul_formats(line * 2) == f"{name}: 2"
    assert matmul_formats(line.replace(target, "Sharding")) == ""


def test_mixed_types_and_order():
    text = """
      %a = bf16[8,8]{1,0} parameter(0)
      %b.2 = f8e4m3fn[8,8]{1,0} parameter(1)
      %d.1 = f32[8,8]{1,0} dot(%a, %b.2), lhs_contracting_dims={1}
      %d.2 = f32[8,8]{1,0} dot(bf16[8,8]{1,0} %a, bf16[8,8]{1,0} %a), lhs_contracting_dims={1}
      %d.3 = f32[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}
    """
    assert matmul_formats(text) == "dot bf16 x bf16: 2, dot bf16 x f8e4m3fn: 1"
