"""Writes qwix.npz beside it: what Qwix 0.1.8 makes of a small matrix. Run where qwix is installed.

w[64, 8] is random, gram[64, 64] that of random inputs; groups are 32 in-features. Scales divide; codes are as Qwix has
them, -2^(b-1) to 2^(b-1) - 1, and so are zeros. What is of GPTQ is [out, in], as there.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import qwix
from qwix._src.core.qarray import HowToQuantize
from qwix.contrib import gptq_core

GROUP = 32


def main() -> None:
    rng = np.random.default_rng(7)
    w_DF = rng.normal(size=(64, 8)).astype(np.float32)
    x_ND = (rng.normal(size=(200, 64)) @ rng.normal(size=(64, 64)) / 8).astype(np.float32)
    gram_DD = x_ND.T @ x_ND
    out = {"w": w_DF, "gram": gram_DD}
    for bits in (8, 4):
        for kind, method in (("symmetric", "absmax"), ("asymmetric", "minmax")):
            q = qwix.quantize(
                w_DF, f"int{bits}", channelwise_axes=(1,), tiled_axes={0: GROUP}, calibration_method=method
            )
            zero = {} if q.zero_point is None else {"zero": np.asarray(q.zero_point, np.int8)}
            parts = {"codes": np.asarray(q.qvalue, np.int8), "scale": np.asarray(q.scale), **zero}
            out |= {f"int{bits}.{kind}.{part}": array for part, array in parts.items()}
    how = HowToQuantize(qtype=jnp.int4, channelwise_axes=(0,), tiled_axes={1: GROUP})
    q, _ = gptq_core.quantize_weight(jnp.asarray(w_DF.T), jnp.asarray(gram_DD), how)
    out |= {"gptq.codes": np.asarray(q.qvalue, np.int8), "gptq.scale": np.asarray(q.scale)}
    np.savez(Path(__file__).parent / "qwix.npz", **out)


if __name__ == "__main__":
    main()
