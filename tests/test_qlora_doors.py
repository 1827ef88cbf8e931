"""A QLoRA run from door to door: it starts in codes, resumes bit for bit, and is evaluated, talked to and converted as
base and adapters together."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from converting import converted

from data_pipelines.conversation import Conversation, Turn
from easylm_plus.config import model_config
from easylm_plus.inference.load import open_model
from easylm_plus.models.config import ModelConfig
from easylm_plus.models.transformer import Transformer
from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.leaves import is_kept
from easylm_plus.numerics.lora import LowRank
from easylm_plus.numerics.nf4 import NF4, nf4
from easylm_plus.numerics.precision import precision
from easylm_plus.numerics.rules import CODED
from easylm_plus.training.checkpoint import locate, read_meta, read_parameters, write_parameters
from easylm_plus.training.metrics import read_rows
from easylm_plus.training.restore import warm_start
from easylm_plus.tree import path_name

STEPS = 6
MESH = {"mesh__replica": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
VALUES = {
    "numerics__rules": ("layers=nf4_double",), "numerics__lora": ("self_attn=4", "mlp=2"), "train__steps": STEPS,
    "model__scan_layers": True, "model__hidden_size": 32, "eval__every": STEPS, "log__params_hash": True,
    "optimizer__learning_rate": 3e-2, **MESH,
}  # fmt: skip
WHOLE = jax.NamedSharding(jax.make_mesh((), ()), jax.P())
TIMES = ("tokens_per_second", "tflops", "input_wait", "memory_bytes")


def trained(folder, **values):
    folder.mkdir(parents=True, exist_ok=True)
    status, output = tiny.inside(f"--config={tiny.write_config(folder, **values)}")
    assert status == 0, output[-3000:]
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model with all weights in float32."""
    folder = tmp_path_factory.mktemp("base")
    config = tiny.config(folder, model__scan_layers=True, model__hidden_size=32)
    model = Transformer(model_config(config), precision("float32"))
    write_parameters(folder, tiny.fresh(model, 5), {"config": config.to_dict()})
    return folder


@pytest.fixture(scope="module")
def run(base):
    """A QLoRA run that begins with its weights, unbroken: checkpoints at 4 and 6."""
    return trained(base / "qlora", init_from__path=str(base), **VALUES)


def named(tree):
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_kept)}


@functools.cache
def kept(folder, step=None):
    return named(read_parameters(*locate(folder, step)))


def rows(folder):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(folder / "metrics.jsonl")]


def test_it_starts_from_the_base_in_codes(base, run):
    """Which do not move, and the rest is in bfloat16's place: the compute dtype, float32 here."""
    plain = kept(base)
    for name, leaf in kept(run).items():
        if not name.startswith("layers/") or not name.endswith("kernel"):
            np.testing.assert_array_equal(leaf, plain[name])
            continue
        assert isinstance(leaf, LowRank) and isinstance(leaf.base, NF4)
        expected = jax.jit(lambda w: nf4(w, double=True))(plain[name][0])
        for one, other in zip(jax.tree.leaves(leaf.base[0]), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(one, other)
        assert np.abs(leaf.b).max() > 0, "the adapter has learned"
    told = read_meta(*locate(run))["leaves"]["params/layers/mlp/up_proj/kernel/base"]
    assert told == {"type": "NF4", "inputs": 32}


def test_resuming_is_bitwise(run, tmp_path):
    """From the checkpoint at 4: losses, hashes of all parameters' bits, and the evaluation."""
    again = tmp_path / "again"
    shutil.copytree(run, again, ignore=shutil.ignore_patterns(str(STEPS), "metrics*"))
    values = {**VALUES, "init_from__path": str(run.parent)}
    trained(again, **values)
    rest = [row for row in rows(run) if row["step"] > 4]
    assert rows(again)[-len(rest) :] == rest and len(rest) == 3
    for name, leaf in kept(run).items():
        for one, other in zip(jax.tree.leaves(leaf), jax.tree.leaves(kept(again)[name]), strict=True):
            np.testing.assert_array_equal(one, other)
    losses = [row["loss"] for row in rows(run) if "loss" in row]
    assert losses[-1] < losses[0]


def answer(opened):
    return opened.chatter().reply([Conversation("chat", "0", (Turn("user", "Add: 3 + 4", 0.0),))], 4)


def logits(opened):
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    return np.asarray(tiny.applied(opened.model)({"params": opened.params}, tokens))


def test_evaluation_and_chat_read_base_and_adapters(run):
    figures = run / "figures.json"
    options = (f"--checkpoint={run}", "--examples=4", "--max_new_tokens=4", f"--output={figures}")
    status, output = tiny.run(*options, door="easylm_plus.evaluate")
    assert status == 0, output[-2000:]
    last = [row["eval/loss"] for row in rows(run) if "eval/loss" in row][-1]
    assert json.loads(figures.read_text())["eval/loss"] == pytest.approx(last, abs=1e-5)
    opened = open_model(run)
    turned = lambda how: opened._replace(params=jax.tree.map(how, opened.params, is_leaf=is_kept))
    np.testing.assert_allclose(logits(opened), logits(turned(decode)), atol=1e-5)
    assert answer(opened) == answer(turned(decode))
    bare = turned(lambda x: decode(x.base) if isinstance(x, LowRank) else x)
    assert np.abs(logits(opened) - logits(bare)).max() > 0.01, "without its adapters it is another"


def test_conversion_merges(run, tmp_path):
    """Whole matrices, which are not rounded to codes again when they are opened."""
    converted(input=run, output=tmp_path / "plain")
    converted(input=run, output=tmp_path / "hf", to="hf")
    for folder in ("plain", "hf"):
        np.testing.assert_allclose(logits(open_model(tmp_path / folder, template="chat")),
                                   logits(open_model(run)), atol=1e-5)  # fmt: skip
    assert not any(isinstance(leaf, NF4 | LowRank) for leaf in kept(tmp_path / "plain").values())
    config = read_meta(*locate(tmp_path / "plain"))["config"]
    assert config["numerics"]["rules"] == ["layers=plain"] and "lora" not in config["numerics"]


def test_codes_that_are_the_same_are_not_rounded_again(run, tmp_path):
    """As those of a model that is kept in codes; in another kind of codes they are rounded once more."""
    opened = open_model(run)
    base = jax.tree.map(lambda x: x.base if isinstance(x, LowRank) else x, opened.params, is_leaf=is_kept)
    write_parameters(tmp_path, base, {"config": opened.config})
    empty = lambda x: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=WHOLE)
    shapes = jax.tree.map(empty, base, is_leaf=is_kept)
    names = [name for name, leaf in named(base).items() if isinstance(leaf, NF4)]
    start = lambda kind: named(
        warm_start(shapes, tmp_path, opened.model, (), None, dict.fromkeys(names, CODED[kind]))[0]
    )
    for name, leaf in start("nf4_double").items():
        for found, expected in zip(jax.tree.leaves(leaf), jax.tree.leaves(named(base)[name]), strict=True):
            np.testing.assert_array_equal(found, expected)
    other = start("nf4")["layers/mlp/up_proj/kernel"]
    assert other.absmax.dtype == np.float32 and isinstance(other, NF4)
    expected = decode(named(base)["layers/mlp/up_proj/kernel"])
    np.testing.assert_allclose(decode(other), expected, atol=1e-6)


def test_what_is_not_found_starts_random(base):
    """As it would without anything to start from; only what is missing is made."""
    model, params = (
        Transformer(ModelConfig(**read_meta(*locate(base))["config"]["model"])),
        read_parameters(*locate(base)),
    )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=WHOLE), params)
    fresh = lambda: tiny.fresh(model, 7)
    rename = ("^norm/=elsewhere/",)
    found, taken = warm_start(shapes, base, model, rename, fresh)
    assert {item.name for item in taken if item.outcome != "taken"} == {"norm/weight", "elsewhere/weight"}
    np.testing.assert_array_equal(found["norm"]["weight"], fresh()["norm"]["weight"])
    np.testing.assert_array_equal(found["lm_head"]["kernel"], params["lm_head"]["kernel"])
