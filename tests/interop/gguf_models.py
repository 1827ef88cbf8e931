"""Models of random weights that llama.cpp can hold, and their files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from data_pipelines.tokenizers.tokenizer import load_tokenizer
from easylm_plus.interop.gguf_files import write_gguf
from easylm_plus.interop.gguf_tokenizer import tokenizer_keys
from easylm_plus.interop.weights import Latents, of_params
from easylm_plus.models.config import ModelConfig
from easylm_plus.models.transformer import Transformer, abstract_parameters

SMALL = {
    "vocab_size": 320, "hidden_size": 256, "intermediate_size": 512, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 64, "max_length": 128, "norm_eps": 1e-5, "tie_embeddings": True, "scan_layers": False,
    "attention": "xla",
}  # fmt: skip
LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_length": 32, "rope_theta": 5e5}


@functools.cache
def words():
    return load_tokenizer(tiny.data() / "tokenizer")


def random_model(**overrides):
    """(model, parameters): norms and biases are no ones and zeros, and logits of a few units."""
    model = Transformer(ModelConfig(**{**SMALL, **overrides}))
    rng = np.random.default_rng(0)

    def leaf(path, x):
        name = jax.tree_util.keystr(path)
        scale, mean = (0.2, 1) if "weight" in name else (0.2, 0) if "bias" in name else (0.03, 0)
        return jnp.asarray(rng.normal(mean, scale, x.shape), jnp.float32)

    return model, jax.tree.map_with_path(leaf, abstract_parameters(model)[0])


def written(path, model, params, kind, rules=(), **rest):
    """Writes the file of a model; what `rules` make ternary is latents."""
    keys = tokenizer_keys(words(), model.config.vocab_size, ours=True)
    return write_gguf(Latents(of_params(model.config, params, "params"), rules), path, kind, keys, **rest)
