"""llama2.c files: every weight lands where it belongs, rotary pairs are reordered, a real model tells its stories.

stories260K (Karpathy, MIT licence; ../shared/data) is compared with float64 NumPy results: perplexity over 259 stories
in packed rows, the first logits, 200 greedy tokens.
"""

import functools
import gzip
import json
import math
import struct

import jax
import numpy as np
import pytest

from data_pipelines.batches.packing import empty_arrays, fill_row, pack
from data_pipelines.templates.template import Example
from data_pipelines.tokenizers.tokenizer import load_tokenizer
from easylm_plus.errors import UserError
from easylm_plus.inference.generate import Generator
from easylm_plus.interop import llama2c
from easylm_plus.interop.llama2c import load_llama2c
from easylm_plus.models.rope import rotate, rotations
from easylm_plus.objectives.lm import LanguageModel

DIM, FFN, LAYERS, HEADS, KV, VOCAB, LENGTH = 16, 24, 2, 4, 2, 32, 8
SIZE = DIM // HEADS


def write(path, tied=True, seed=0):
    """A small file of random weights -> its arrays by llama2.c's names."""
    rng, Q, G = np.random.default_rng(seed), HEADS * SIZE, KV * SIZE
    shapes = {
        "tok_emb": (VOCAB, DIM), "attn_norm": (LAYERS, DIM), "wq": (LAYERS, Q, DIM), "wk": (LAYERS, G, DIM),
        "wv": (LAYERS, G, DIM), "wo": (LAYERS, DIM, Q), "ffn_norm": (LAYERS, DIM), "w1": (LAYERS, FFN, DIM),
        "w2": (LAYERS, DIM, FFN), "w3": (LAYERS, FFN, DIM), "norm": (DIM,), "freqs": (LENGTH, SIZE),
        **({} if tied else {"head": (VOCAB, DIM)}),
    }  # fmt: skip
    arrays = {name: rng.normal(size=shape).astype("<f4") for name, shape in shapes.items()}
    header = struct.pack("<7i", DIM, FFN, LAYERS, HEADS, KV, VOCAB if tied else -VOCAB, LENGTH)
    path.write_bytes(header + b"".join(a.tobytes() for a in arrays.values()))
    return arrays


@pytest.mark.parametrize("tied", (True, False))
def test_every_weight_lands_where_it_belongs(tmp_path, tied):
    theirs = write(tmp_path / "model.bin", tied)
    model, params = load_llama2c(tmp_path / "model.bin")
    layers, c = params["layers"], model.config
    expected = {
        "tok_emb": params["embed_tokens"]["embedding"],
        "attn_norm": layers["input_layernorm"]["weight"],
        "wv": layers["self_attn"]["v_proj"]["kernel"].swapaxes(1, 2),
        "wo": layers["self_attn"]["o_proj"]["kernel"].swapaxes(1, 2),
        "ffn_norm": layers["post_attention_layernorm"]["weight"],
        "w1": layers["mlp"]["gate_proj"]["kernel"].swapaxes(1, 2),
        "w2": layers["mlp"]["down_proj"]["kernel"].swapaxes(1, 2),
        "w3": layers["mlp"]["up_proj"]["kernel"].swapaxes(1, 2),
        "norm": params["norm"]["weight"],
    }
    if not tied:
        expected["head"] = params["lm_head"]["kernel"].T
    for name, ours in expected.items():
        np.testing.assert_array_equal(ours, theirs[name], err_msg=name)
    assert (c.num_heads, c.num_kv_heads, c.head_dim, c.max_length, c.norm_eps) == (HEADS, KV, SIZE, LENGTH, 1e-5)
    assert c.tie_embeddings == tied and c.vocab_size == VOCAB


@pytest.mark.parametrize("reordered", (True, False))
def test_scores_are_those_of_interleaved_pairs(tmp_path, monkeypatch, reordered):
    """q k' of rotated vectors in their layout and in ours; without the reordering they differ."""
    if not reordered:
        monkeypatch.setattr(llama2c, "_halves", lambda w, heads: w)
    theirs = write(tmp_path / "model.bin")
    model, params = load_llama2c(tmp_path / "model.bin")
    x, positions = np.random.default_rng(1).normal(size=(LENGTH, DIM)).astype(np.float32), np.arange(LENGTH)

    def interleaved(w, heads):
        pairs = (x @ w.T).reshape(LENGTH, heads, SIZE // 2, 2)
        angles = positions[:, None, None] * 10000.0 ** (-2 * np.arange(SIZE // 2) / SIZE)
        turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
        return np.stack([turned.real, turned.imag], axis=-1).reshape(LENGTH, heads, SIZE)

    def ours(name, heads):
        y = (x @ params["layers"]["self_attn"][name]["kernel"][1]).reshape(1, LENGTH, heads, SIZE)
        return np.asarray(rotate(y, *rotations(positions[None], model.config))[0])

    scores = lambda q, k: np.einsum("thk,shk->hts", q, np.repeat(k, HEADS // KV, axis=1))
    expected = scores(interleaved(theirs["wq"][1], HEADS), interleaved(theirs["wk"][1], KV))
    actual = scores(ours("q_proj", HEADS), ours("k_proj", KV))
    assert np.allclose(actual, expected, atol=1e-4) == reordered


def test_unrolled_layers(tmp_path):
    write(tmp_path / "model.bin")
    tokens = np.arange(6)[None]
    logits = [
        jax.jit(model.apply)({"params": params}, tokens)
        for model, params in (load_llama2c(tmp_path / "model.bin", scan_layers=scan) for scan in (True, False))
    ]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kept", "found"), (*((kept, r"ends after \d+ weights") for kept in (-4, -3, -400, 30)), (20, "found 20 bytes"))
)
def test_a_truncated_file_is_named(tmp_path, kept, found):
    path = tmp_path / "model.bin"
    write(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=rf"model\.bin: {found}, expected"):
        load_llama2c(path)


def test_a_file_that_is_too_long_is_named(tmp_path):
    path = tmp_path / "model.bin"
    write(path)
    path.write_bytes(path.read_bytes() + bytes(8))
    with pytest.raises(UserError, match=r"model\.bin: .*expected"):
        load_llama2c(path)


@pytest.mark.parametrize("header", ((0, 24, 2, 4, 2, 32, 8), (16, 24, 2, 3, 1, 32, 8), (16, 24, -2, 4, 2, 32, 8)))
def test_a_file_of_another_kind_is_named(tmp_path, header):
    (tmp_path / "model.bin").write_bytes(struct.pack("<7i", *header) + bytes(100))
    with pytest.raises(UserError, match=r"model\.bin: found header \(.*\), expected a llama2\.c version 0 file"):
        load_llama2c(tmp_path / "model.bin")


# --- a real model ---


@functools.cache
def stories260k(data):
    folder = data / "weights" / "stories260K"
    model, params = load_llama2c(folder / "stories260K.bin")
    return model, params, load_tokenizer(folder / "tok512.bin"), json.loads((folder / "golden.json").read_text())


def packed_stories(data):
    """The stories that the golden file counts, packed into rows; the first five and the rest as sources."""
    tokenizer = stories260k(data)[2]
    with gzip.open(data / "pretrain" / "tinystories" / "tinystories_sample_2MiB.txt.gz", "rt") as file:
        stories = [story.strip() for story in file.read().split("<|endoftext|>")[:300]]
    ids = [[1, *map(int, row)] for row in tokenizer.encode_batch(stories)]
    examples = [Example(np.asarray(row), np.ones(len(row), np.float32)) for row in ids if len(row) <= 512]
    rows = pack([example.positions for example in examples], 511, "best_fit")
    arrays = empty_arrays(len(rows), 511)
    for at, members in enumerate(rows):
        fill_row(arrays, at, [(examples[i], min(i, 5)) for i, _, _ in members])
    return len(examples), arrays


@pytest.mark.real_data
def test_perplexity_of_stories(real_data):
    model, params, _, golden = stories260k(real_data)
    golden = golden["tinystories_2MiB_first300"]
    stories, batch = packed_stories(real_data)
    assert stories == golden["stories_used"]
    objective = LanguageModel(model, num_sources=6, chunk=4096)
    evaluate = jax.jit(lambda params, batch: objective(params, batch, objective.denominators(batch)))
    loss, sums = evaluate(params, batch)
    assert sums["tokens"].sum() == golden["tokens"]
    assert float(loss) == pytest.approx(golden["mean_nll"], abs=2e-6)
    assert round(math.exp(loss), 4) == 4.4352
    for i, story in enumerate(golden["first5"]):
        assert sums["tokens"][i] == story["tokens"] - 1  # it counts BOS
        assert float(sums["nll"][i] / sums["tokens"][i]) == pytest.approx(story["mean_nll"], abs=1e-5)


@pytest.mark.real_data
def test_first_logits(real_data):
    model, params, _, golden = stories260k(real_data)
    logits = np.asarray(jax.jit(model.apply)({"params": params}, np.asarray([[1]]))[0, 0])
    np.testing.assert_allclose(logits[:8], golden["logits_pos0_first8"], rtol=0, atol=5e-5)
    top = [(int(i), float(logits[i])) for i in np.argsort(-logits)[:5]]
    assert [i for i, _ in top] == [i for i, _ in golden["first_step_top5"]]
    np.testing.assert_allclose([x for _, x in top], [x for _, x in golden["first_step_top5"]], rtol=0, atol=5e-5)


@pytest.mark.real_data
def test_greedy_story(real_data):
    model, params, tokenizer, golden = stories260k(real_data)
    expected = golden["greedy_ids_200"]
    generator = Generator(model, params, stop_ids=())
    assert generator([expected[:1]], len(expected) - 1) == [expected[1:]]
    assert list(generator.stream(expected[:1], len(expected) - 1)) == expected[1:]
    assert tokenizer.decode(expected[1:]).strip() == golden["greedy_text"].strip()
    generator.params = {**params, "layers": jax.tree.map(lambda x: x[::-1], params["layers"])}  # upside down
    assert generator([expected[:1]], len(expected) - 1) != [expected[1:]]


@pytest.mark.real_data
def test_a_story_read_with_unordered_pairs_is_much_less_likely(real_data, monkeypatch):
    golden = stories260k(real_data)[3]
    monkeypatch.setattr(llama2c, "_halves", lambda w, heads: w)
    model, params = load_llama2c(real_data / "weights" / "stories260K" / "stories260K.bin")
    ids = np.asarray([golden["greedy_ids_200"]])
    logp = jax.nn.log_softmax(jax.jit(model.apply)({"params": params}, ids[:, :-1]))
    wrong = -np.take_along_axis(np.asarray(logp), ids[:, 1:, None], axis=-1).mean()
    assert wrong > 2.0  # the greedy story's own is far below 1
