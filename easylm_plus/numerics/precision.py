"""Precision policies: which dtype each part of a step uses, as one named value.

A mix of flags can be inconsistent; a name cannot. `float32` is the reference that numerical tests run in. `bf16`
keeps float32 weights and computes in bfloat16, as LLaMA-class models are trained. `bf16_pure` also stores the
weights in bfloat16: half the memory, for inference and for the optimizers that carry their own master copy.
"""

import dataclasses

import jax.numpy as jnp
from jax.typing import DTypeLike

from easylm_plus.errors import UserError


@dataclasses.dataclass(frozen=True)
class Precision:
    """Dtypes by role. `matmul` is the JAX matmul precision, which matters where hardware has faster modes.

    Norms, softmax statistics, and sums over micro-batches and chunks of the loss are float32 in all of them. Logits are
    multiplied in `compute` and then held in `logits`: in bf16 they have 8 bits, as in most PyTorch trainers.
    """

    name: str
    param: DTypeLike
    compute: DTypeLike
    logits: DTypeLike
    matmul: str


POLICIES = {
    policy.name: policy
    for policy in (
        Precision("float32", jnp.float32, jnp.float32, jnp.float32, "highest"),
        Precision("bf16", jnp.float32, jnp.bfloat16, jnp.float32, "default"),
        Precision("bf16_pure", jnp.bfloat16, jnp.bfloat16, jnp.float32, "default"),
    )
}


def precision(name: str) -> Precision:
    """Looks up a policy; an unknown name is an error that lists the known ones."""
    if name not in POLICIES:
        raise UserError(f"numerics.precision = {name!r}: expected one of {', '.join(POLICIES)}")
    return POLICIES[name]
