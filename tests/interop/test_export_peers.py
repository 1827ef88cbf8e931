"""Models of ours, exported, are the same models to transformers' AutoModelForCausalLM (marker `parity`)."""

import os
import subprocess
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny

from easylm_plus.interop.huggingface import save_hf
from easylm_plus.interop.torch_files import TorchFiles
from easylm_plus.numerics.rules import BITNET, attach

BIASED = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), True)
CASES = {
    "llama": {},
    "llama, wide heads, biases": {"head_dim": 8, **BIASED},
    "llama3.2": {"tie_embeddings": True, "rope_theta": 5e5, "rope_scaling": "llama3", "rope_factor": 32.0,
                 "rope_original_length": 32},
    "mistral": {"sliding_window": 6},
    "qwen2": {"qkv_bias": True, "tie_embeddings": True},
    "mixtral": {"num_experts": 4},
    "gpt2": {"num_kv_heads": 4, "norm": "layer", "positions": "learned", "gated": False, "activation": "gelu_tanh",
             "tie_embeddings": True, **BIASED},
    "bitnet": {"sub_norms": True, "activation": "relu2"},
    "bitnet, dense": {"sub_norms": True, "activation": "relu2"},
    "stablelm": {"norm": "layer", "rotary_share": 0.5, "qkv_bias": True},
}  # fmt: skip
pytestmark = pytest.mark.parity


def noisy(params):
    """Norms and biases differ too, or a swapped one would not be seen."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.asarray(x + 0.2 * rng.normal(size=x.shape) * (x.ndim < 3), np.float32), params)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, peer):
    """Every case exported, and what transformers computes."""
    place = tmp_path_factory.mktemp("exported")
    ids = np.random.default_rng(1).integers(0, 50, (2, 20))
    for name, keys in CASES.items():
        model, params = tiny.model(**keys, scan_layers=True)
        params = attach(noisy(params), BITNET if name == "bitnet" else ())
        save_hf(model, params, place / name, max_shard_bytes=10_000)
        np.save(place / name / "input_ids.npy", ids)
    script = Path(__file__).with_name("peer_models.py")
    plain = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}  # BitNet's rounding is decorated with torch.compile
    subprocess.run([peer, script, place, "open"], check=True, timeout=200, env=plain)
    return place


@pytest.mark.parametrize("name", CASES)
def test_logits(name, folder):
    model, params = tiny.model(**CASES[name], scan_layers=True)
    dense, ids = noisy(params), np.load(folder / name / "input_ids.npy")
    params = attach(dense, BITNET if name == "bitnet" else ())
    theirs = np.load(folder / name / "logits.npy")
    ours = lambda params: jax.jit(model.apply)({"params": params}, ids)
    np.testing.assert_allclose(ours(params), theirs, rtol=0, atol=5e-5)
    turned = jax.tree.map(lambda x: x[::-1], params["layers"])  # layers in the wrong order
    assert np.abs(ours({**params, "layers": turned}) - theirs).max() > 1e-2
    if name == "bitnet":
        assert np.abs(ours(dense) - theirs).max() > 1e-2, "weights that are not rounded"


def test_a_file_made_by_torch(peer, tmp_path):
    """A module's state_dict with its metadata, shared storages, strides, bfloat16 and a scalar."""
    script = """
import sys, torch
torch.manual_seed(0)
layer = torch.nn.Linear(5, 3)
base = torch.randn(4, 6)
state = layer.state_dict()
state.update(half=base.half(), brain=base.bfloat16(), part=base[1:3, ::2], turned=base.T, one=torch.tensor(2.5))
torch.save(state, sys.argv[1] + "/weights.bin")
torch.save({n: t.float().contiguous().numpy() for n, t in state.items()}, sys.argv[1] + "/arrays.bin")
import numpy
numpy.savez(sys.argv[1] + "/expected.npz", **{n: t.float().numpy() for n, t in state.items()})
"""
    subprocess.run([peer, "-c", script, tmp_path], check=True, timeout=100)
    tensors = TorchFiles([tmp_path / "weights.bin"], "here")
    with np.load(tmp_path / "expected.npz") as expected:
        assert tensors.names() == set(expected)
        for name, array in expected.items():
            found = tensors.read(name)
            assert found.shape == tensors.shape(name) == array.shape and found.dtype == tensors.dtype(name)
            np.testing.assert_array_equal(found.astype(np.float32), array, err_msg=name)
    assert tensors.dtype("brain") == ml_dtypes.bfloat16 and tensors.dtype("half") == np.float16
    with pytest.raises(Exception, match=r"arrays\.bin: found the name numpy\."):
        TorchFiles([tmp_path / "arrays.bin"], "here")
