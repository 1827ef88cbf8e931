"""Adapters in PEFT's files: there and back byte by byte, merged and beside a base, and what has no place in them."""

import json
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from converting import converted, refuse
from safetensors.numpy import load_file, save_file

from easylm_plus.errors import UserError
from easylm_plus.inference.load import open_model
from easylm_plus.interop.huggingface import load_hf, save_hf
from easylm_plus.interop.peft import CONFIG, TENSORS, Adapted, beside, modules_of, read_adapters, write_adapters
from easylm_plus.interop.weights import of_params
from easylm_plus.models.config import ModelConfig
from easylm_plus.numerics.formats import decode
from easylm_plus.numerics.leaves import is_kept
from easylm_plus.numerics.lora import LowRank
from easylm_plus.numerics.nf4 import NF4
from easylm_plus.numerics.rules import BITNET, attach
from easylm_plus.training import checkpoint
from easylm_plus.training.checkpoint import locate, read_parameters
from easylm_plus.tree import path_name

LORA = ("self_attn/(q|v)_proj=4", "mlp=2")
IDS = np.arange(24, dtype=np.int32).reshape(2, 12)
Q = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Hugging Face folder that has no adapters."""
    folder = tmp_path_factory.mktemp("peft")
    model, params = tiny.model(vocab=300, scan_layers=True)
    save_hf(model, params, folder / "hf", tokenizer_from=tiny.data() / "tokenizer")
    return folder / "hf"


@pytest.fixture(scope="module")
def run(base):
    """A LoRA run on it, of which adapters of different ranks have learned something."""
    folder = base.parent / "run"
    folder.mkdir()
    values = {"numerics__lora": LORA, "numerics__lora_alpha": 8.0, "model__scan_layers": True, "train__steps": 4,
              "optimizer__learning_rate": 3e-2, "init_from__path": str(base), "mesh__replica": 2, "mesh__fsdp": 2,
              "mesh__tensor": 2}  # fmt: skip
    status, output = tiny.inside(f"--config={tiny.write_config(folder, **values)}")
    assert status == 0, output[-2000:]
    return folder


@pytest.fixture(scope="module")
def adapter(run):
    converted(input=run, output=run.parent / "adapter", to="peft")
    return run.parent / "adapter"


def logits(opened):
    return np.asarray(tiny.applied(opened.model)({"params": opened.params}, IDS))


def merged(params):
    return jax.tree.map(decode, params, is_leaf=is_kept)


# --- out ---


def test_what_is_written(run, adapter, base):
    tensors, own = load_file(adapter / TENSORS), read_parameters(*locate(run))
    leaf = own["layers"]["self_attn"]["q_proj"]["kernel"]
    np.testing.assert_array_equal(tensors[f"{Q}.lora_A.weight"], leaf.a[1].T)
    np.testing.assert_array_equal(tensors[f"{Q}.lora_B.weight"], leaf.b[1].T)
    assert np.abs(leaf.b).max() > 0 and len(tensors) == 2 * 2 * 5
    raw = json.loads((adapter / CONFIG).read_text())
    expected = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "rank_pattern": {"q_proj": 4, "v_proj": 4},
                "alpha_pattern": {}, "base_model_name_or_path": str(base), "bias": "none"}  # fmt: skip
    assert {key: raw[key] for key in expected} == expected
    assert raw["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj", "v_proj"]
    assert (adapter / "tokenizer.json").is_file()


def test_there_and_back(run, adapter, tmp_path):
    """Byte by byte; scales come back from alpha and rank."""
    config = open_model(run).model.config
    adapters = read_adapters(adapter, config)
    own = read_parameters(*locate(run))["layers"]["mlp"]["down_proj"]["kernel"]
    leaf = adapters["layers/{i}/mlp/down_proj/kernel", (1,)]
    assert leaf.scale == own.scale == 4.0
    np.testing.assert_array_equal(leaf.a, own.a[1])
    told = json.loads((adapter / CONFIG).read_text())["base_model_name_or_path"]
    write_adapters(adapters, config, None, told, tmp_path, "here")
    for name in (CONFIG, TENSORS):
        assert (tmp_path / name).read_bytes() == (adapter / name).read_bytes()


def test_some_layers_only(tmp_path):
    """Modules and ranks go by their whole names where not all layers are alike."""
    config = ModelConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=4, num_kv_heads=2,
                         head_dim=4)  # fmt: skip
    pair = lambda rank, alpha: LowRank(None, np.ones((16, rank), np.float32), np.ones((rank, 16), np.float32),
                                       alpha / rank)  # fmt: skip
    name = lambda part: f"layers/{{i}}/self_attn/{part}_proj/kernel"
    adapters = {(name("q"), (0,)): pair(2, 16), (name("q"), (1,)): pair(3, 16), (name("o"), (1,)): pair(2, 5)}
    write_adapters(adapters, config, None, "", tmp_path, "here")
    raw = json.loads((tmp_path / CONFIG).read_text())
    q, o = (f"model.layers.{{}}.self_attn.{part}_proj" for part in "qo")
    assert set(raw["target_modules"]) == {"q_proj", o.format(1)}
    assert raw["rank_pattern"] == {q.format(1): 3} and raw["alpha_pattern"] == {o.format(1): 5.0}
    again = read_adapters(tmp_path, config)
    assert {key: leaf.scale for key, leaf in again.items()} == pytest.approx({k: x.scale for k, x in adapters.items()})


# --- in ---


def test_merged_and_beside_the_base(run, adapter, base, tmp_path):
    """Into a folder, around plain weights and around codes: the run's own answers."""
    expected = logits(open_model(run))
    converted(input=base, adapter=adapter, output=tmp_path / "ours")
    converted(input=base, adapter=adapter, output=tmp_path / "hf", to="hf")
    bare = logits(open_model(base, template="chat"))
    assert np.abs(bare - expected).max() > 0.05
    for opened in (
        open_model(tmp_path / "ours", template="chat"),
        open_model(tmp_path / "hf", template="chat"),
        open_model(base, template="chat", adapter=str(adapter)),
    ):
        np.testing.assert_allclose(logits(opened), expected, atol=2e-5)
    plain = load_hf(tmp_path / "hf")[1]["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_allclose(plain, merged(open_model(run).params)["layers"]["mlp"]["up_proj"]["kernel"], atol=1e-6)
    opened = open_model(base, template="chat", adapter=str(adapter))
    coded = beside(attach(load_hf(base)[1], ("layers=nf4",)), read_adapters(adapter, opened.model.config),
                   opened.model.config)  # fmt: skip
    assert isinstance(coded["layers"]["mlp"]["up_proj"]["kernel"].base, NF4)
    np.testing.assert_allclose(logits(opened._replace(params=coded)), logits(opened._replace(params=merged(coded))),
                               atol=2e-5)  # fmt: skip


def test_doors_take_an_adapter(base, run, adapter):
    """The answer is the run's, and not the base's."""

    def answer(*options):
        told = (*options, "--template=chat", "--prompt=Add: 3 + 4", "--max_new_tokens=8", "--temperature=0")
        status, output = tiny.run(*told, door="easylm_plus.chat")
        assert status == 0, output[-2000:]
        return output.strip().splitlines()[-1]

    assert answer(f"--checkpoint={base}", f"--adapter={adapter}") == answer(f"--checkpoint={run}")
    assert answer(f"--checkpoint={base}") != answer(f"--checkpoint={run}")


def test_adapters_in_half_precision_are_computed_with_in_float32(base, adapter, tmp_path):
    tensors = {name: x.astype(np.float16) for name, x in load_file(adapter / TENSORS).items()}
    config = open_model(base, template="chat").model.config
    found = read_adapters(changed(adapter, tmp_path / "half", tensors), config)
    assert {x.dtype for leaf in found.values() for x in (leaf.a, leaf.b)} == {np.dtype(np.float32)}


def test_the_base_is_not_read_with_the_adapters(run, monkeypatch):
    """Of 13B it is 26 GB, which would be thrown away."""
    read, seen = checkpoint._read, []
    monkeypatch.setattr(checkpoint, "_read", lambda d, s, tree, how: (seen.append(tree), read(d, s, tree, how))[1])
    checkpoint.read_adapters(*locate(run))
    names = {path_name(path).rpartition("/")[2] for path, _ in jax.tree_util.tree_leaves_with_path(seen[0])}
    assert names == {"a", "b"}


def test_adapters_are_written_again_with_force(run, adapter, tmp_path):
    converted(input=run, output=tmp_path / "a", to="peft")
    converted(input=run, output=tmp_path / "a", to="peft", force=True)
    assert (tmp_path / "a" / TENSORS).read_bytes() == (adapter / TENSORS).read_bytes()
    (tmp_path / "a" / "mine.txt").write_text("kept")
    refuse("found mine.txt there", input=run, output=tmp_path / "a", to="peft", force=True)


def test_adapters_of_ternary_weights_leave_and_are_not_merged(tmp_path):
    values = {"numerics__rules": BITNET, "numerics__lora": ("mlp=2",), "model__sub_norms": True, "train__steps": 2,
              "model__scan_layers": True, "mesh__replica": 2, "mesh__fsdp": 2, "mesh__tensor": 2}  # fmt: skip
    source = tmp_path / "run"
    source.mkdir()
    status, output = tiny.inside(f"--config={tiny.write_config(source, **values)}")
    assert status == 0, output[-2000:]
    refuse("which is ternary; the two cannot be merged", input=source, output=tmp_path / "x")
    converted(input=source, output=tmp_path / "adapter", to="peft")
    opened = open_model(source)
    params = jax.tree.map(lambda leaf: leaf.base if isinstance(leaf, LowRank) else leaf, opened.params, is_leaf=is_kept)
    found = read_adapters(tmp_path / "adapter", opened.model.config)
    again = opened._replace(params=beside(params, found, opened.model.config))
    np.testing.assert_allclose(logits(again), logits(opened), atol=1e-6)
    assert np.abs(logits(opened._replace(params=params)) - logits(opened)).max() > 1e-4
    packed_base = of_params(opened.model.config, params, "the base")
    with pytest.raises(UserError, match="ternary; an adapter cannot be merged with it"):
        Adapted(packed_base, found)


def test_unstacked_layers_take_the_same_adapters(base, adapter):
    model, params = load_hf(base, scan_layers=False)
    tree = beside(params, read_adapters(adapter, model.config), model.config)
    stacked = open_model(base, template="chat", adapter=str(adapter))
    np.testing.assert_allclose(model.apply({"params": tree}, IDS), logits(stacked), atol=2e-5)


# --- what has no place ---


def test_families_whose_layers_are_not_ours():
    yuan = ModelConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_layers=1, num_heads=4, num_kv_heads=4,
                       head_dim=4, lfa_variant="yuan")  # fmt: skip
    modules = {module.rpartition(".")[2] for module in modules_of(yuan, None, "here")}
    assert "v_proj" in modules and not modules & {"q_proj", "k_proj"}
    with pytest.raises(UserError, match="an adapter of layers/0/self_attn/q_proj/kernel, which is no linear layer"):
        pair = LowRank(None, np.ones((16, 2), np.float32), np.ones((2, 16), np.float32), 1.0)
        write_adapters({("layers/{i}/self_attn/q_proj/kernel", (0,)): pair}, yuan, None, "", Path("nowhere"), "here")
    up, gate = (modules_of(yuan, None, "here")[f"model.layers.0.mlp.{name}_proj"][0] for name in ("up", "gate"))
    assert "gate_proj" in up and "up_proj" in gate, "as the table has them"


def changed(adapter, folder, tensors=(), **keys):
    shutil.copytree(adapter, folder)
    raw = json.loads((folder / CONFIG).read_text()) | keys
    (folder / CONFIG).write_text(json.dumps(raw))
    every = load_file(folder / TENSORS) | dict(tensors)
    save_file({name: x for name, x in every.items() if x is not None}, folder / TENSORS)
    return folder


@pytest.mark.parametrize(
    ("tensors", "keys", "message"),
    (
        ({}, {"peft_type": "IA3"}, "found peft_type .IA3., expected LORA"),
        ({}, {"use_dora": True}, "found use_dora = True, which is not supported"),
        ({}, {"bias": "all"}, "found bias = 'all'"),
        ({}, {"init_lora_weights": "pissa"}, "found init_lora_weights = 'pissa', adapters to a base that was changed"),
        ({}, {"init_lora_weights": "olora"}, "found init_lora_weights = 'olora'"),
        ({}, {"rank_pattern": [2]}, r"found rank_pattern = \[2\], expected an object"),
        ({}, {"rank_pattern": {"q_proj(": 2}}, r"rank_pattern: found 'q_proj\(', not a regular expression"),
        ({}, {"alpha_pattern": {"q_proj": "x"}}, "found alpha 'x' for .*q_proj, expected a positive number"),
        ({}, {"lora_alpha": 0}, "found alpha 0.0 for .*, expected a positive number"),
        ({}, {"r": 3}, r"found rank 3 for model\.layers\.0\.mlp\.\w+_proj, whose tensors have 2"),
        ({f"{Q}.lora_B.weight": None}, {}, "found no tensor .*q_proj.lora_B"),
        ({f"{Q}.lora_B.weight": np.zeros((16, 5), np.float32)}, {}, r"expected \[r, 16\] and \[16, r\]"),
        ({f"{Q}.lora_magnitude_vector": np.zeros(16, np.float32)}, {}, "lora_magnitude_vector .* has no place"),
    ),
)
def test_what_ours_cannot_be(adapter, tmp_path, tensors, keys, message):
    config = tiny.model(vocab=300, scan_layers=True)[0].config
    with pytest.raises(UserError, match=message):
        read_adapters(changed(adapter, tmp_path / "bad", tensors, **keys), config)


def test_roots_of_ranks(adapter, tmp_path):
    config = tiny.model(vocab=300, scan_layers=True)[0].config
    found = read_adapters(changed(adapter, tmp_path / "rs", use_rslora=True), config)
    assert found["layers/{i}/self_attn/q_proj/kernel", (0,)].scale == 8 / 4**0.5


def test_conversions_that_make_no_sense(base, run, adapter, tmp_path):
    refuse("counts only for runs of ours", input=base, output=tmp_path / "x", to="peft")
    refuse("counts only where whole weights", input=run, output=tmp_path / "x", to="peft", dtype="bfloat16")
    converted(input=base, output=tmp_path / "plain")
    refuse("found no adapters, expected a run with numerics.lora", input=tmp_path / "plain", output=tmp_path / "x",
           to="peft")  # fmt: skip
    refuse("found no adapter_config.json", input=base, adapter=base, output=tmp_path / "x")


# --- against PEFT ---


@pytest.mark.parity
def test_peft_computes_the_same(peer, base, run, adapter, tmp_path):
    """Beside the base and merged by PEFT itself; with adapters' halves scaled otherwise it does not."""
    if subprocess.run([peer, "-c", "import peft"], capture_output=True).returncode:
        pytest.skip(f"{peer} has no peft: pip install --no-deps peft accelerate psutil")
    script = Path(__file__).with_name("peer_peft.py")
    np.save(tmp_path / "ids.npy", IDS)
    theirs = {}
    for name, folder in (("as it is", adapter), ("other", changed(adapter, tmp_path / "other", lora_alpha=16))):
        command = [peer, script, base, folder, tmp_path / "ids.npy", tmp_path / "logits.npy"]
        subprocess.run(command, check=True, timeout=200)
        theirs[name] = np.load(tmp_path / "logits.npy")
    expected = logits(open_model(run))
    np.testing.assert_allclose(theirs["as it is"], np.stack([expected, expected]), atol=5e-5)
    assert np.abs(theirs["other"] - expected).max() > 1e-2
