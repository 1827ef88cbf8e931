"""A trained ternary model becomes its packed self: the same codes, the same answers; what cannot be is told."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from easylm_plus.errors import UserError
from easylm_plus.inference.generate import Generator
from easylm_plus.inference.load import open_model, told, unrolled
from easylm_plus.models.config import ModelConfig
from easylm_plus.models.transformer import Transformer
from easylm_plus.numerics.deploy import all_filed, all_served, deployed, filed, frozen, is_packed, thawed
from easylm_plus.numerics.formats import FP16, decode, encode
from easylm_plus.numerics.int8_rows import Int8Rows
from easylm_plus.numerics.kernels import choice
from easylm_plus.numerics.leaves import is_kept
from easylm_plus.numerics.lora import LowRank
from easylm_plus.numerics.packed_ternary import PackedTernary, packed
from easylm_plus.numerics.precision import precision
from easylm_plus.numerics.rules import BITNET, attach
from easylm_plus.numerics.ternary import ternary_codes
from easylm_plus.numerics.trits import Trits
from easylm_plus.training.checkpoint import write_parameters
from easylm_plus.tree import path_name

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6]]
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}


def bitnet(**overrides):
    return tiny.model(**SHAPE, sub_norms=True, **overrides)


def leaves(params):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_kept)}


@pytest.mark.parametrize("kind", ({"scan_layers": True}, {"scan_layers": False, "tie_embeddings": True}), ids=str)
def test_what_each_weight_becomes(kind):
    _, params = bitnet(**kind)
    found, before = leaves(deployed(params, BITNET)), leaves(params)
    packed_ = [leaf for leaf in found.values() if isinstance(leaf, PackedTernary)]
    assert len(packed_) == (7 if kind["scan_layers"] else 14)
    for name, leaf in found.items():
        if name.endswith("_proj/kernel"):
            codes, inverse = ternary_codes(before[name])
            np.testing.assert_array_equal(decode(leaf), codes * (1 / inverse)[..., None, None], err_msg=name)
        elif name in ("embed_tokens/embedding", "lm_head/kernel"):
            assert isinstance(leaf, Int8Rows) and leaf.shape == before[name].shape
            np.testing.assert_allclose(decode(leaf), before[name], atol=float(abs(before[name]).max()) / 250)
        else:
            assert leaf is before[name], name
    assert set(found) == set(before)
    kept = leaves(deployed(params, BITNET, embed="keep"))
    assert kept["embed_tokens/embedding"] is before["embed_tokens/embedding"]


def test_deployed_twice_and_from_codes():
    _, params = bitnet()
    once = deployed(params, BITNET)
    jax.tree.map(np.testing.assert_array_equal, deployed(once, BITNET), once)
    matrices = lambda path, leaf: encode(leaf, FP16) if path_name(path).endswith("_proj/kernel") else leaf
    values = lambda path, leaf: decode(encode(leaf, FP16)) if path_name(path).endswith("_proj/kernel") else leaf
    stored, plain = (jax.tree.map_with_path(f, params) for f in (matrices, values))
    jax.tree.map(np.testing.assert_array_equal, deployed(stored, BITNET), deployed(plain, BITNET))


@pytest.mark.parametrize(
    ("rules", "embed", "message"),
    (
        (("nothing=ternary",), "int8", "'nothing=ternary', which matches no weight that can be transformed"),
        (("embed_tokens=ternary",), "int8", "'embed_tokens=ternary', which matches no weight that can be transformed"),
        (("norm=ternary",), "int8", "'norm=ternary', which matches no weight that can be transformed"),
        (("layers=fp8",), "int8", "self_attn/k_proj/kernel is fp8; expected ternary or plain|layers/.* is fp8"),
        (("layers=tiny",), "int8", "'layers=tiny', expected 'regular expression=transform'"),
        (BITNET, "int4", "embed = 'int4': expected one of int8, keep"),
    ),
)
def test_what_cannot_be(rules, embed, message):
    with pytest.raises(UserError, match=message):
        deployed(bitnet()[1], rules, embed)


def test_codes_of_another_kind():
    _, params = bitnet(scan_layers=True)
    table = Int8Rows(params["layers"]["mlp"]["up_proj"]["kernel"].astype(jnp.int8), jnp.ones((2, 32)))
    mlp = {**params["layers"]["mlp"], "up_proj": {"kernel": table}}
    with pytest.raises(UserError, match="up_proj/kernel: found Int8Rows, expected trained weights"):
        deployed({**params, "layers": {**params["layers"], "mlp": mlp}}, BITNET)


def test_an_adapter_is_not_packed_with_its_base():
    _, params = bitnet(scan_layers=True)
    params = jax.tree.map(lambda x: x, params)
    base = params["layers"]["mlp"]["up_proj"]["kernel"]
    a, b = jnp.ones((*base.shape[:-1], 2)), jnp.ones((2, 2, base.shape[-1]))
    params["layers"]["mlp"]["up_proj"]["kernel"] = LowRank(base, a, b, 1.0)
    with pytest.raises(UserError, match="up_proj/kernel: found an adapter of a ternary weight"):
        deployed(params, BITNET)
    used = frozen(attach(params, BITNET))["layers"]["mlp"]["up_proj"]["kernel"]
    assert isinstance(used, LowRank) and isinstance(used.base, PackedTernary) and is_packed({"only": used})
    np.testing.assert_array_equal(used.base.codes, packed(base).codes)


# --- and back ---


@pytest.mark.parametrize("kind", (lambda leaf: leaf, filed), ids=("packed", "trits"))
def test_latents_that_round_to_what_is_packed(kind):
    """Codes exactly, scales to float32; values as they are would come back smaller by the share of zeros."""
    w = np.random.default_rng(0).normal(size=(3, 40, 24)).astype(np.float32)
    w[1] = 0
    leaf = packed(jnp.asarray(w))
    again = packed(jnp.asarray(thawed(jax.tree.map(np.asarray, kind(leaf)))))
    np.testing.assert_array_equal(again.codes, leaf.codes)
    np.testing.assert_allclose(again.scale[::2], leaf.scale[::2], rtol=1e-6)
    smaller = packed(jnp.asarray(decode(leaf)))
    assert (np.asarray(smaller.scale / leaf.scale)[::2] < 0.75).all()


# --- what it answers ---


@functools.cache
def answers_of_training(model_and_params):
    model, params = model_and_params()
    return Generator(model, attach(params, BITNET), ())(PROMPTS, 24)


TIED = functools.partial(tiny.model, **SHAPE, tie_embeddings=True, vocab=300, sub_norms=True, scan_layers=True)
FULL = functools.partial(TIED, tie_embeddings=False, num_kv_heads=4)


@pytest.mark.parametrize("made", (TIED, FULL), ids=("tied", "as many keys"))
@pytest.mark.parametrize("path", ("xla", "auto"))
def test_greedy_tokens_are_those_of_training(made, path):
    """With embeddings kept, and enough tokens that there is something to get wrong."""
    (model, params), trained = made(), answers_of_training(made)
    with choice.use(path):
        stack = deployed(params, BITNET, embed="keep")
        assert Generator(model, stack, ())(PROMPTS, 24) == trained, "scanned"
        apart = Generator(*unrolled(model, stack), ())
        assert apart(PROMPTS, 24) == trained, "and layer by layer"
        assert [*apart.stream(PROMPTS[1], 24)] == trained[1]


def test_rounded_once_more_it_is_another_model():
    model, params = tiny.model(**SHAPE, vocab=300, sub_norms=True)
    once = deployed(params, BITNET, embed="keep")
    again = lambda w: packed(decode(w)) if isinstance(w, PackedTernary) else w
    twice = jax.tree.map(again, once, is_leaf=is_kept)
    assert Generator(model, twice, ())(PROMPTS, 24) != Generator(model, once, ())(PROMPTS, 24)


def test_int8_embeddings_answer_as_the_values_that_they_are():
    model, params = tiny.model(**SHAPE, vocab=300, sub_norms=True)
    small = deployed(params, BITNET)
    values = jax.tree.map(lambda w: decode(w) if isinstance(w, Int8Rows) else w, small, is_leaf=is_kept)
    assert Generator(model, small, ())(PROMPTS, 24) == Generator(model, values, ())(PROMPTS, 24)


def test_a_checkpoint_of_trits_is_opened_packed_and_unrolled(tmp_path):
    config = tiny.config(tmp_path, numerics__rules=BITNET, model__sub_norms=True, model__scan_layers=True)
    model = Transformer(ModelConfig(**config.model), precision("float32"))
    params = tiny.fresh(model, 3)
    kept = all_filed(deployed(params, BITNET))
    write_parameters(tmp_path / "checkpoints", kept, {"config": config.to_dict()})
    opened = open_model(tmp_path, tokenizer=str(tiny.data() / "tokenizer"), template="chat")
    found = leaves(opened.params)
    assert not any(isinstance(leaf, Trits) for leaf in found.values()) and is_packed(opened.params)
    assert not opened.model.config.scan_layers and "layers/1/mlp/up_proj/kernel" in found
    assert told(opened.params).startswith("ternary products: ") and told(params) == ""
    expected = Generator(*unrolled(model, all_served(kept)), ())(PROMPTS, 8)
    assert Generator(opened.model, opened.params, ())(PROMPTS, 8) == expected


def test_a_run_that_trained_ternary_is_opened_packed_too(tmp_path):
    """Rounded once, not for every token; latents as they lie are another model."""
    config = tiny.config(tmp_path, numerics__rules=BITNET, model__sub_norms=True, model__scan_layers=True)
    model = Transformer(ModelConfig(**config.model), precision("float32"))
    params = tiny.fresh(model, 3)
    write_parameters(tmp_path / "checkpoints", params, {"config": config.to_dict()})
    opened = open_model(tmp_path, tokenizer=str(tiny.data() / "tokenizer"), template="chat")
    assert is_packed(opened.params) and not opened.model.config.scan_layers
    assert (
        sum(isinstance(leaf, PackedTernary) for leaf in leaves(opened.params).values()) == 7 * config.model.num_layers
    )
    said = Generator(opened.model, opened.params, ())(PROMPTS, 8)
    assert said == Generator(model, attach(params, BITNET), ())(PROMPTS, 8)
    assert said != Generator(model, params, ())(PROMPTS, 8)
