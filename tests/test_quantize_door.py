"""convert --quantize: from a run or a Hugging Face folder to a checkpoint that every other door opens."""

import dataclasses
import math
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from converting import run

from data_pipelines import datasets
from data_pipelines.batches.loader import evaluation_batches
from easylm_plus.compression.quantize import rows_of
from easylm_plus.errors import UserError
from easylm_plus.evaluation.loss import make_evaluate
from easylm_plus.inference.generate import Generator
from easylm_plus.inference.load import open_model
from easylm_plus.interop.huggingface import load_hf
from easylm_plus.models.transformer import Transformer, unstack_layers
from easylm_plus.numerics.coded import Coded
from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.int8_rows import Int8Rows
from easylm_plus.numerics.integer import Integers
from easylm_plus.numerics.leaves import is_kept
from easylm_plus.numerics.nf4 import NF4
from easylm_plus.numerics.packed_ternary import PackedTernary
from easylm_plus.numerics.precision import precision
from easylm_plus.numerics.rules import BITNET
from easylm_plus.numerics.sparsity import TwoFour
from easylm_plus.objectives.lm import LanguageModel
from easylm_plus.training import stream
from easylm_plus.training.checkpoint import read_meta, write_parameters
from easylm_plus.training.restore import warm_start
from easylm_plus.training.stream import open_checkpoint

GOLDEN = Path(__file__).parent / "golden"
MATRICES = ("gate", "up", "down")


def a_run(folder, rules=(), **overrides):
    """A checkpoint as a run leaves it: the tiny model on the tiny data."""
    datasets.open_source(tiny.data(), "sums", "train")  # what reads records defines flags, which flagsaver would remove
    model, params = tiny.model(**{"vocab": 300, "max_length": 64, "scan_layers": True, **overrides})
    section = {"path": str(tiny.data()), "length": 64, "date": "", "template": "chat"}
    described = {
        "model": {**vars(model.config)},
        "numerics": {"precision": "float32", "rules": list(rules), "fp8_level": "none", "lora": []},
        "data": section,
    }
    write_parameters(folder, jax.device_get(params), {"config": described, "config.json": None})
    (folder / "tokenizer").mkdir()
    for path in (tiny.data() / "tokenizer").iterdir():
        (folder / "tokenizer" / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def float_run(tmp_path_factory):
    return a_run(tmp_path_factory.mktemp("run") / "float")


@pytest.fixture(scope="module")
def four_bits(float_run, tmp_path_factory):
    """(the checkpoint, what the door printed)."""
    folder = tmp_path_factory.mktemp("quantized") / "int4"
    with pytest.MonkeyPatch.context() as patch:
        told = []
        patch.setattr("easylm_plus.convert.console.print", lambda *args, **_: told.extend(args))
        run(input=float_run, output=folder, quantize="int4:group=8,method=gptq", calibration_rows=8, examples=4)
    return folder, told


def heldout_loss(checkpoint):
    """As evaluate measures it, whose flags and convert's cannot be in one process."""
    opened = open_model(checkpoint)
    sources = {name: datasets.open_source(tiny.data(), name, "heldout") for name in ("sums", "letters")}
    batches = evaluation_batches(sources, opened.template, batch_size=8, length=64, limit_per_source=4)
    objective = LanguageModel(opened.model, 2)
    return make_evaluate(objective, list(sources))(opened.params, [b.arrays for b in batches])["eval/loss"]


def test_perplexity_is_what_evaluation_measures(float_run, four_bits):
    folder, told = four_bits
    assert [line.split(",")[0] for line in told if isinstance(line, str)][1:] == ["layer 1 of 2", "layer 2 of 2"]
    table = told[-1]
    rows = dict(zip(*(list(table.columns[n].cells) for n in (0, 2)), strict=True))
    before = dict(zip(*(list(table.columns[n].cells) for n in (0, 1)), strict=True))
    losses = [heldout_loss(path) for path in (float_run, folder)]
    assert float(before["held-out loss"]) == pytest.approx(losses[0], abs=2e-5)
    assert float(rows["held-out loss"]) == pytest.approx(losses[1], abs=2e-5)
    assert abs(losses[0] - losses[1]) > 1e-4
    assert float(rows["held-out perplexity"]) == pytest.approx(math.exp(losses[1]), rel=1e-4)
    assert rows["their bits a weight"] == "8.00", "4 and a scale of 32 for 8 weights"


def test_as_many_rows_are_looked_at_as_were_asked_for(float_run):
    """Also where batches do not divide them."""
    described = read_meta(float_run, 0)["config"]
    rows = [len(batch["inputs"]) for batch in rows_of(described, float_run / "tokenizer", "", 11, 4).calibration]
    assert rows == [8, 3]


def test_what_the_checkpoint_says(four_bits):
    folder, _ = four_bits
    meta = read_meta(folder, 0)
    assert meta["quantized"] == "int4:group=8,method=gptq" and meta["config"]["numerics"]["rules"] == []
    opened = open_model(folder)
    kernel = opened.params["layers"]["mlp"]["up_proj"]["kernel"]
    assert isinstance(kernel, Integers) and kernel.bits == 4 and kernel.shape == (2, 16, 32)
    assert isinstance(opened.params["lm_head"]["kernel"], Int8Rows)
    assert isinstance(opened.params["embed_tokens"]["embedding"], Int8Rows)
    assert not isinstance(opened.params["layers"]["input_layernorm"]["weight"], Coded)


def test_to_hugging_face_and_as_a_warm_start(four_bits, tmp_path):
    folder, _ = four_bits
    values = jax.tree.map(decode, open_model(folder).params, is_leaf=is_kept)
    run(input=folder, output=tmp_path / "hf", to="hf")
    model, params = load_hf(tmp_path / "hf")
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(same, params, values)
    for scan in (True, False):
        own = Transformer(dataclasses.replace(model.config, scan_layers=scan), precision("float32"))
        fresh = jax.tree.map(jax.numpy.zeros_like, params if scan else unstack_layers(params))
        warm, taken = warm_start(fresh, folder, own, ())
        assert all(item.outcome == "taken" for item in taken)
        jax.tree.map(same, warm, values if scan else unstack_layers(values))


def test_answers(four_bits):
    folder, _ = four_bits
    exact, rounded = (open_model(folder, kv_cache=kind) for kind in ("compute", "int8"))
    assert rounded.model.config.kv_cache == "int8"
    answers = [Generator(opened.model, opened.params, ())([[5, 6, 7]], 6)[0] for opened in (exact, rounded)]
    values = jax.tree.map(decode, exact.params, is_leaf=is_kept)
    assert answers[0] == Generator(exact.model, values, ())([[5, 6, 7]], 6)[0]
    assert len(answers[1]) == 6


@pytest.mark.slow
def test_the_other_doors(four_bits):
    folder, _ = four_bits
    for door, *args in (
        ("chat", "--prompt=1 + 2", "--max_new_tokens=3", "--kv_cache=int8"),
        ("evaluate", "--examples=2", "--max_new_tokens=3", "--kv_cache=int8"),
        ("inspect",),
    ):
        status, output = tiny.run(f"--checkpoint={folder}", *args, door=f"easylm_plus.{door}")
        assert status == 0, output
        assert door != "inspect" or "Integers: codes uint8" in output
        assert door != "evaluate" or "eval/loss" in output


def test_a_hugging_face_folder_without_data(tmp_path, capsys):
    run(input=GOLDEN / "llama_tiny", output=tmp_path / "out", quantize="int8")
    assert "perplexity is not measured; --data=FOLDER" in capsys.readouterr().out
    weights, meta, _ = open_checkpoint(tmp_path / "out")
    original, _, _ = open_checkpoint_of(GOLDEN / "llama_tiny", tmp_path)
    name = "layers/{i}/mlp/up_proj/kernel"
    off = np.abs(weights.read((name,), (1,))[0] - original.read((name,), (1,))[0]).max()
    assert 0 < off < 0.01 * np.abs(original.read((name,), (1,))[0]).max()
    assert meta["config.json"]["architectures"] == ["LlamaForCausalLM"]


def open_checkpoint_of(folder, tmp_path):
    run(input=folder, output=tmp_path / "plain")
    return open_checkpoint(tmp_path / "plain")


def test_a_ternary_run_is_frozen_as_it_is(tmp_path):
    """The same codes and scales as in training, so the same losses; rounding its latents otherwise is refused."""
    rules = ["layers/.*/mlp/.*_proj=ternary"]
    source = a_run(tmp_path / "run", rules)
    run(input=source, output=tmp_path / "out", quantize="ternary:embed=keep", examples=4)
    kernels = open_model(tmp_path / "out").params["layers"]["1"]  # what is packed is served unrolled
    assert isinstance(kernels["mlp"]["up_proj"]["kernel"], PackedTernary)
    assert not isinstance(kernels["self_attn"]["q_proj"]["kernel"], Coded), "was trained as it is"
    leaf = read_meta(tmp_path / "out", 0)["leaves"]["params/layers/mlp/up_proj/kernel"]
    assert leaf["type"] == "Trits", "1.6 bits on disk"
    losses = [heldout_loss(path) for path in (source, tmp_path / "out")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    with pytest.raises(UserError, match="expected --quantize=ternary, which is exactly it"):
        run(input=source, output=tmp_path / "other", quantize="int4")
    assert not (tmp_path / "other").exists()


def test_a_stack_of_a_ternary_run_is_read_once(tmp_path, monkeypatch):
    """Not once a layer, which for many layers is all of the time."""
    source = a_run(tmp_path / "run", BITNET, sub_norms=True)
    counts = Counter()
    read = stream.read_parameters
    counting = lambda *where, only: (counts.update([only]), read(*where, only=only))[1]
    monkeypatch.setattr(stream, "read_parameters", counting)
    run(input=source, output=tmp_path / "out", quantize="ternary", examples=4)
    assert counts["layers/mlp/up_proj/kernel"] == 1 and set(counts.values()) == {1}


def test_some_layers_of_a_run_are_ternary(tmp_path):
    """Of those that train as they are, nothing is made; nobody takes the model for a dense one, in no dtype."""
    source = a_run(tmp_path / "run", ["layers/1/mlp/.*_proj=ternary"], scan_layers=False, sub_norms=True)
    run(input=source, output=tmp_path / "out", quantize="ternary:embed=keep", examples=4)
    layers = open_model(tmp_path / "out").params["layers"]
    is_packed = lambda i: {isinstance(layers[i]["mlp"][f"{name}_proj"]["kernel"], PackedTernary) for name in MATRICES}
    assert [is_packed(i) for i in "01"] == [{False}, {True}]
    losses = [heldout_loss(path) for path in (source, tmp_path / "out")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for dtype in (None, "bfloat16"):
        with pytest.raises(UserError, match="expected --quantize=ternary, which is exactly it"):
            run(input=source, output=tmp_path / "other", quantize="int4", dtype=dtype)
        with pytest.raises(UserError, match=r"not ternary in every layer; Hugging Face's formats have all"):
            run(input=source, output=tmp_path / "other", to="hf", dtype=dtype)


def test_what_was_frozen_in_four_bits_may_go_to_others(tmp_path):
    """Of rules, only ternary ones say what the trained weights mean."""
    source = a_run(tmp_path / "run", ["layers/.*/mlp/.*_proj=nf4", "lm_head=plain"])
    run(input=source, output=tmp_path / "out", quantize="int8", examples=4)
    opened = open_model(tmp_path / "out")
    assert isinstance(opened.params["layers"]["mlp"]["up_proj"]["kernel"], Integers)


def test_a_sparse_checkpoint(float_run, tmp_path):
    run(input=float_run, output=tmp_path / "out", quantize="2:4:method=sparsegpt", calibration_rows=8, examples=4)
    kernel = open_model(tmp_path / "out").params["layers"]["self_attn"]["o_proj"]["kernel"]
    assert isinstance(kernel, TwoFour) and ((np.asarray(decode(kernel)) == 0).mean() == 0.5)
    again = {"input": float_run, "output": tmp_path / "out", "quantize": "fp8:embed=keep", "examples": 4}
    with pytest.raises(UserError, match="--force replaces it"):
        run(**again)
    run(**again, force=True)
    assert not isinstance(open_model(tmp_path / "out").params["lm_head"]["kernel"], Int8Rows)
    run(**{**again, "quantize": "nf4:double"}, force=True)
    assert isinstance(open_model(tmp_path / "out").params["layers"]["self_attn"]["o_proj"]["kernel"], NF4)


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("int5x", "unknown scheme 'int5x': did you mean 'int5'"),
        ("int4:grup=8", "unknown key of int4 'grup': did you mean 'group'"),
        ("int4:method=gtpq", "unknown method 'gtpq': did you mean 'gptq'"),
        ("int4:group=x", "found group=x, expected in-features that share a scale"),
        ("int4:group=24", r"layers/self_attn/(\w+)/kernel \(16 x \d+\): groups of 24 do not divide 16 in-features"),
        ("int4:act_order", "act_order is of method=gptq; found method=rtn"),
        ("int4:asym=maybe", "expected asym alone, asym=true or asym=false"),
        ("sparse:share=1.5", "found share=1.5, expected a number between 0 and 1"),
        ("fp8:embed=int4", "unknown embed 'int4': did you mean 'int8'"),
        ("nf4:block=7", "found block=7, expected an even number"),
        ("fp8:group=4", "unknown key of fp8 'group'"),
    ),
)
def test_what_is_refused(float_run, tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        run(input=float_run, output=tmp_path / "out", quantize=text, examples=1, calibration_rows=1)
    assert not (tmp_path / "out").exists()


def test_what_else_is_refused(four_bits, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="is Int8Rows already; expected the checkpoint that it was made from"):
        run(input=four_bits[0], output=out, quantize="int3")
    with pytest.raises(UserError, match="method=gptq needs calibration: no data"):
        run(input=GOLDEN / "llama_tiny", output=out, quantize="int4:method=gptq")
    for to in ("hf", "gguf", "peft"):
        with pytest.raises(UserError, match="--quantize=int4 counts only where a checkpoint of ours is written"):
            run(input=GOLDEN / "llama_tiny", output=out, quantize="int4", to=to)
    with pytest.raises(UserError, match="--calibration_rows=3 counts only with --quantize"):
        run(input=GOLDEN / "llama_tiny", output=out, calibration_rows=3)
    assert not out.exists()
