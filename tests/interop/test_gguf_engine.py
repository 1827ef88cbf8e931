"""llama.cpp computes from our files what we compute, with its rounding of activations (marker `engine`).

    EASYLM_PLUS_ENGINE=PYTHON ./run.sh test tests/interop/test_gguf_engine.py

Its cache is in float32, as everything here is. Prompts of the one-layer models are such that no activation lies near a
tie (engine.far_from_ties), where another order of a sum would round it the other way. Weights in f16 the engine
multiplies as the processor likes best: by activations in float32 (AMX), by activations in f16, or with sums in f16
(AVX512-FP16); so there the bound is that of f16.
"""

import dataclasses
import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_tokenizers

pytest.importorskip("gguf")

import engine
import gguf
from engine import AsEngine, Crashed, ask, far_from_ties, load
from gguf_models import LLAMA3, random_model, words, written

from data_pipelines.templates.template import CHAT
from easylm_plus.interop.gguf_files import encoded, write_gguf
from easylm_plus.interop.gguf_names import _paired
from easylm_plus.interop.gguf_tokenizer import tokenizer_keys
from easylm_plus.interop.weights import of_params
from easylm_plus.numerics.rules import BITNET

pytestmark = pytest.mark.engine
EXACT, TIE = 1e-5, 2e-4  # of logits of a few units; codes
is_matrix = lambda x: isinstance(x, AsEngine)


def computed(model, tree, tokens):
    return np.asarray(jax.jit(model.apply)({"params": tree}, np.asarray(tokens)))


def prompts_for(model, tree, count=3, length=4):
    """Random prompts [count, length], far from ties."""
    candidates = np.random.default_rng(1).integers(7, 290, (200, length))
    return far_from_ties(model, tree, candidates, TIE)[:count]


def worst(model, tree, prompts, answers):
    """The largest difference of a logit."""
    expected = np.stack([answers[f"logits::{i}"] for i in range(len(prompts))])
    return np.abs(computed(model, tree, prompts) - expected).max()


def changed(tree, change, name=""):
    """The tree with other matrices, where their path has `name` in it."""
    pick = lambda path, x: change(x) if is_matrix(x) and name in jax.tree_util.keystr(path) else x
    return jax.tree.map_with_path(pick, tree, is_leaf=is_matrix)


def with_neighbours(tree, config):
    """Queries and keys as another rotary layout has them."""
    for name, heads in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads)):
        turn = lambda x, heads=heads: jax.tree.map(lambda a: a if a.ndim == 0 else jnp.asarray(_paired(a, heads)), x)
        tree = changed(tree, turn, name)
    return tree


@pytest.mark.parametrize("kind", ("tq2_0", "tq1_0"))
@pytest.mark.parametrize(
    ("variant", "ends"),
    (({"sub_norms": True}, "f32"), ({"sub_norms": True}, "q8_0"), ({"tie_embeddings": False, "qkv_bias": True}, "f32")),
    ids=("bitnet", "bitnet_q8_0_ends", "biases"),
)
def test_one_ternary_layer(tmp_path, engine_python, kind, variant, ends):
    model, params = random_model(**variant)
    written(tmp_path / "x.gguf", model, params, kind, rules=BITNET, ends=ends)
    tree = load(tmp_path / "x.gguf", model.config)
    prompts = prompts_for(model, tree)
    assert len(prompts) == 3
    _, answers = ask(engine_python, model=tmp_path / "x.gguf", prompts=prompts.tolist())
    error = functools.partial(worst, model, prompts=prompts, answers=answers)
    assert error(tree) < EXACT
    by_token = lambda x: dataclasses.replace(x, kind="token") if x.kind == kind else x
    assert error(changed(tree, by_token)) > 100 * EXACT, "rounded by token, as training does"
    assert error(load(tmp_path / "x.gguf", model.config, rounding=False)) > 100 * EXACT, "not rounded"
    larger = lambda x: dataclasses.replace(x, gamma=1.01 * x.gamma)
    assert error(changed(tree, larger, "o_proj")) > 100 * EXACT, "a wrong gamma"
    assert error(with_neighbours(tree, model.config)) > 100 * EXACT, "a wrong rotary layout"


def test_ternary_without_sub_norms_and_with_gamma_beside(tmp_path, engine_python):
    """llama.cpp's `llama`: gamma as a scale is exact, and is read at all."""
    model, params = random_model(**LLAMA3)
    written(tmp_path / "x.gguf", model, params, "tq2_0", rules=BITNET, ends="f32")
    tree = load(tmp_path / "x.gguf", model.config)
    prompts = prompts_for(model, tree)
    _, answers = ask(engine_python, model=tmp_path / "x.gguf", prompts=prompts.tolist())
    error = functools.partial(worst, model, prompts=prompts, answers=answers)
    assert error(tree) < EXACT
    as_f16 = lambda x: dataclasses.replace(x, gamma=x.gamma.astype(jnp.float16).astype(jnp.float32))
    assert error(changed(tree, as_f16)) > EXACT, "gamma in the blocks' f16"


def test_layers_on_the_engines_tokens(tmp_path, engine_python):
    """Through several layers some activation meets a tie, and logits part by some hundredths: tokens that differ have
    to be as near to each other."""
    model, params = random_model(sub_norms=True, num_layers=4)
    written(tmp_path / "x.gguf", model, params, "tq2_0", rules=BITNET, ends="f32")
    prompts = np.random.default_rng(2).integers(7, 290, (4, 8)).tolist()
    _, answers = ask(engine_python, model=tmp_path / "x.gguf", prompts=prompts, new=24)
    ids = np.stack([answers[f"ids::{i}"] for i in range(4)])
    chosen = ids[:, 8:]
    assert len(np.unique(chosen)) > 20, "something is said"
    tree = load(tmp_path / "x.gguf", model.config)
    theirs = np.stack([answers[f"logits::{i}"] for i in range(4)])[:, 7:]

    def compared(tree):
        """(share of equal tokens, of the others the most that a margin of the engine's is above twice the error)."""
        ours = computed(model, tree, ids[:, :-1])[:, 7:]
        ordered = np.sort(theirs, -1)
        beyond = ordered[..., -1] - ordered[..., -2] - 2 * np.abs(ours - theirs).max(-1)
        equal = ours.argmax(-1) == chosen
        return equal.mean(), beyond[~equal].max(initial=-np.inf), np.median(np.abs(ours - theirs).max(-1))

    share, beyond, error = compared(tree)
    assert share >= 0.97 and beyond <= 0 and error < 0.05
    for wrong in (with_neighbours(tree, model.config), load(tmp_path / "x.gguf", model.config, rounding=False)):
        share_of_wrong, _, error_of_wrong = compared(wrong)
        assert share_of_wrong < share and error_of_wrong > 3 * error


@pytest.mark.parametrize(
    "variant",
    ({**LLAMA3, "tie_embeddings": False}, {"qkv_bias": True}, {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
     {"rope_scaling": "linear", "rope_factor": 4.0}, {"rope_scaling": "ntk", "rope_factor": 4.0}, {"head_dim": 32},
     {"sub_norms": True}),
    ids=("llama3", "qwen2", "biases", "linear", "ntk", "heads", "bitnet"),
)  # fmt: skip
def test_every_variant_in_float32(tmp_path, engine_python, variant):
    model, params = random_model(num_layers=2, **variant)
    written(tmp_path / "x.gguf", model, params, "f32")
    prompts = np.random.default_rng(3).integers(7, 290, (2, 60))
    _, answers = ask(engine_python, model=tmp_path / "x.gguf", prompts=prompts.tolist())
    assert worst(model, params, prompts, answers) < EXACT
    plain = random_model(num_layers=2, **{**variant, "rope_scaling": "none"})[0]
    if plain.config != model.config:
        assert worst(plain, params, prompts, answers) > 10 * EXACT, "without its scaling"
    assert worst(model, with_neighbours(load(tmp_path / "x.gguf", model.config), model.config), prompts, answers) > 1e-3


@pytest.mark.parametrize("kind", ("f16", "bf16"))
def test_llama_in_16_bits(tmp_path, engine_python, kind):
    model, params = random_model(num_layers=2, **LLAMA3)
    written(tmp_path / "x.gguf", model, params, kind)
    prompts = np.random.default_rng(4).integers(7, 290, (2, 16))
    _, answers = ask(engine_python, model=tmp_path / "x.gguf", prompts=prompts.tolist())
    bound = np.abs(answers["logits::0"]).max() * {"f16": 2**-10, "bf16": 2**-7}[kind]
    exact = load(tmp_path / "x.gguf", model.config, rounding=False)
    assert worst(model, exact, prompts, answers) < bound
    assert worst(model, with_neighbours(exact, model.config), prompts, answers) > 2 * bound


@pytest.mark.parametrize("kind", ("q8_0", "q4_0"))
def test_llama_in_blocks_of_32(tmp_path, engine_python, kind):
    """Weights laid out for AMX crash some hosts when several tokens are evaluated at once: see docs/quantisation.md."""
    model, params = random_model()
    written(tmp_path / "x.gguf", model, params, kind, ends="f32")
    tree = load(tmp_path / "x.gguf", model.config)
    prompts = prompts_for(model, tree)
    for how in ({"repack": False}, {"batch": 1}):
        _, answers = ask(engine_python, model=tmp_path / "x.gguf", prompts=prompts.tolist(), **how)
        assert worst(model, tree, prompts, answers) < EXACT
    assert worst(model, params, prompts, answers) > 100 * EXACT, "weights that are not rounded"
    assert worst(model, load(tmp_path / "x.gguf", model.config, rounding=False), prompts, answers) > 10 * EXACT
    try:
        _, answers = ask(engine_python, model=tmp_path / "x.gguf", prompts=prompts.tolist())
    except Crashed as error:
        assert "signal 11" in str(error)
    else:
        assert worst(model, tree, prompts, answers) < EXACT


# --- tokens ---

TEXTS = (
    "Hello world", "It's 12345 o'clock.\n\nThe 'The' of\tit\n\n\n  def f(x):\n        return x\n", "  two  spaces ",
    "é ü 琵琶湖 ½ ² ٣ नमस्ते 😀 \u00a0nbsp\u3000wide", "a\n\nb\r\n\r\nc\n \n d\n\n e",
    "'S 'LL 's's <|user|> <s> </s> [INST] ▁x", "\n", " ", "x\n\n\n\n\n1\n\n2  3", "\t\tx\t \ty",
)  # fmt: skip
ALPHABET = ("a", "b", "the", " ", " ", "  ", "\n", "\n", "\n\n", "\r\n", "\t", "1", "23", "'", "s", "'s", "T", ".", ",",
            "(", "é", "琵", "½", "😀", "_", "<", "|", ">")  # fmt: skip


def texts():
    draw = random.Random(0)
    return [*TEXTS, *("".join(draw.choices(ALPHABET, k=draw.randint(1, 14))) for _ in range(400))]


def file_with(tokenizer, path):
    model, params = random_model(hidden_size=16, num_heads=2, num_kv_heads=2, head_dim=8, intermediate_size=16,
                                 vocab_size=tokenizer.vocab_size + 5)  # fmt: skip
    chat = CHAT if "<|user|>" in tokenizer.special_tokens else None
    keys = tokenizer_keys(tokenizer, model.config.vocab_size, chat, ours=True)
    write_gguf(of_params(model.config, params, "params"), path, "f32", keys)
    return path


KINDS = ("ours", "bytes", "llama3", "qwen2", "sentencepiece", "control", "llama2c", "code_llama")


@pytest.mark.parametrize("kind", KINDS)
def test_tokens(tmp_path, engine_python, kind):
    from test_gguf_tokenizer import BYTES, LLAMA3, QWEN2, byte_level, split

    if kind in ("llama3", "qwen2"):
        more = {"ignore_merges": True} if kind == "llama3" else {}
        tokenizer = byte_level(tmp_path, [split(LLAMA3 if kind == "llama3" else QWEN2), BYTES], **more)
    else:
        tokenizer = words() if kind == "ours" else tiny_tokenizers.tiny(kind)
    told, found = ask(engine_python, model=file_with(tokenizer, tmp_path / "x.gguf"), texts=texts())
    wrong = [text for i, text in enumerate(texts()) if tokenizer.encode(text) != found[f"tokens::{i}"].tolist()]
    assert wrong == []
    assert (told["bos"], told["eos"]) == (tokenizer.bos_id, tokenizer.eos_id)
    assert told["with_bos"] == [tokenizer.bos_id, *tokenizer.encode("a")]


def test_line_breaks_of_our_own_tokenizers(tmp_path, engine_python, monkeypatch):
    from data_pipelines.tokenizers.tokenizer import load_tokenizer
    from data_pipelines.tokenizers.training import train
    from easylm_plus.interop import gguf_tokenizer

    train(["a\n\nb\n\nc the 's def " * 20, "def f():\n    return 1\n\n" * 20], 300, [], tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    tokens = lambda: ask(engine_python, model=file_with(tokenizer, tmp_path / "x.gguf"), texts=texts())[1]
    wrong = lambda found: [t for i, t in enumerate(texts()) if tokenizer.encode(t) != found[f"tokens::{i}"].tolist()]
    assert wrong(tokens()) == []
    monkeypatch.setattr(gguf_tokenizer, "_own_words", lambda *_: None)
    assert len(wrong(tokens())) > 10, "line breaks that are not user-defined"
    monkeypatch.undo()
    monkeypatch.setitem(gguf_tokenizer.PRE, gguf_tokenizer._splits(gguf_tokenizer.read_json(tokenizer.path)), "gpt-2")
    assert len(wrong(tokens())) > 5, "another way of cutting words"


def test_chat_template(tmp_path, engine_python):
    from data_pipelines.conversation import Conversation, Turn
    from data_pipelines.templates.template import load_template

    messages = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    messages += [{"role": "user", "content": "And 2 + 2?"}]
    told, _ = ask(engine_python, model=file_with(words(), tmp_path / "x.gguf"), chat=messages)
    turns = tuple(Turn(m["role"], m["content"], float(m["role"] == "assistant")) for m in messages)
    expected = load_template("chat", words(), max_length=100).render_prompt(Conversation("id", "source", turns))
    assert told["chat"] == expected


def test_the_emulation_rounds_as_the_blocks_do():
    x = np.random.default_rng(0).normal(size=(3, 512)).astype(np.float32)
    codes, d = engine.in_codes(jnp.asarray(x), "q8_0")
    values = (codes * d[..., None]).reshape(x.shape)
    np.testing.assert_array_equal(values, gguf.quants.dequantize(encoded(x, "q8_0"), gguf.GGMLQuantizationType.Q8_0))
