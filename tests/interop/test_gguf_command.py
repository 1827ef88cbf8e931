"""convert --to=gguf: one file from a run or a folder, with the tokenizer in it; never over anything else."""

import json
import shutil

import pytest

gguf = pytest.importorskip("gguf")

from gguf_models import random_model, words  # noqa: E402
from test_convert import run  # noqa: E402
from test_gguf import read  # noqa: E402

from easylm_plus import convert  # noqa: E402
from easylm_plus.errors import UserError  # noqa: E402
from easylm_plus.interop import gguf_files  # noqa: E402
from easylm_plus.interop.huggingface import save_hf  # noqa: E402
from easylm_plus.numerics.rules import BITNET  # noqa: E402
from easylm_plus.planning.memory import human  # noqa: E402
from easylm_plus.training.checkpoint import write_parameters  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    model, params = random_model(num_layers=2)
    save_hf(model, params, tmp_path / "hf", tokenizer_from=words().path.parent)
    return tmp_path / "hf"


@pytest.fixture
def ternary_run(tmp_path):
    model, params = random_model(num_layers=2, sub_norms=True)
    config = {
        "model": vars(model.config),
        "numerics": {"precision": "float32", "rules": BITNET},
        "data": {"template": "chat", "length": 64},
    }
    write_parameters(tmp_path / "run", params, {"config": config})
    shutil.copytree(words().path.parent, tmp_path / "run/tokenizer")
    return tmp_path / "run"


def test_a_run_with_ternary_rules(ternary_run, tmp_path, capsys):
    run(to="gguf", gguf_type="tq2_0", input=ternary_run, output=tmp_path / "out/mine.gguf")
    keys, tensors = read(tmp_path / "out/mine.gguf")
    assert keys["general.architecture"] == "bitnet" and keys["general.name"] == "mine"
    assert tensors["blk.1.ffn_down.weight"].tensor_type.name == "TQ2_0" and "blk.1.ffn_down.scale" in tensors
    assert "<|assistant|>" in keys["tokenizer.chat_template"] and "generation %" not in keys["tokenizer.chat_template"]
    told = capsys.readouterr().out
    size = (tmp_path / "out/mine.gguf").stat().st_size
    assert "llama.cpp's bitnet" in told and human(size) in told and "2.06 bits with scales" in told
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.gguf"]


def test_a_folder_and_its_types(folder, tmp_path):
    sizes = {}
    for kind, ends, other in (("f16", None, "F16"), ("q8_0", "f16", "F16"), ("q4_0", None, "Q8_0")):
        path = tmp_path / f"{kind}.gguf"
        run(to="gguf", gguf_type=kind, gguf_ends=ends, input=folder, output=path)
        kinds = {name: tensor.tensor_type.name for name, tensor in read(path)[1].items()}
        assert kinds["blk.0.attn_v.weight"] == kind.upper() and kinds["token_embd.weight"] == other
        sizes[kind] = path.stat().st_size
    assert sizes["q4_0"] < sizes["q8_0"] < sizes["f16"]


def test_force_replaces_gguf_files_only(folder, tmp_path):
    path = tmp_path / "x.gguf"
    run(to="gguf", input=folder, output=path)
    with pytest.raises(UserError, match="found something there already; --force replaces it"):
        run(to="gguf", input=folder, output=path)
    run(to="gguf", gguf_type="q8_0", input=folder, output=path, force=True)
    assert read(path)[0]["general.file_type"] == 7
    (tmp_path / "notes.gguf").write_text("mine")
    for place in (tmp_path / "notes.gguf", folder):
        with pytest.raises(UserError, match=r"no GGUF file there|found the input"):
            run(to="gguf", input=folder, output=place, force=True)
    with pytest.raises(UserError, match="found no folder there"):
        run(to="hf", input=folder, output=path, force=True)
    assert (tmp_path / "notes.gguf").read_text() == "mine"


def test_an_interrupted_write_leaves_what_was_there(folder, tmp_path, monkeypatch):
    path = tmp_path / "x.gguf"
    run(to="gguf", input=folder, output=path)
    before = path.read_bytes()
    monkeypatch.setattr(gguf_files, "encoded", lambda *_: (_ for _ in ()).throw(UserError("in the middle")))
    with pytest.raises(UserError, match="in the middle"):
        run(to="gguf", input=folder, output=path, force=True)
    assert path.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["hf", "x.gguf"]


def test_a_full_disk_is_told_before(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="No space left"):
        run(to="gguf", input=folder, output=tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("flags", "told"),
    (
        ({"to": "hf", "gguf_type": "f16"}, "--gguf_type=f16 counts only with --to=gguf"),
        ({"gguf_ends": "f16"}, "--gguf_ends=f16 counts only with --to=gguf"),
        ({"to": "gguf", "dtype": "float16"}, "--dtype=float16 counts only without --to=gguf"),
        ({"to": "gguf", "max_shard_gb": 1.0}, "--max_shard_gb=1.0 counts only"),
    ),
    ids=str,
)
def test_flags_that_would_change_nothing(folder, tmp_path, flags, told):
    with pytest.raises(UserError, match=told):
        run(input=folder, output=tmp_path / "x", **flags)


def test_no_tokenizer(folder, tmp_path):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"found none of tokenizer\.json"):
        run(to="gguf", input=folder, output=tmp_path / "x.gguf")
    raw = json.loads((folder / "config.json").read_text())
    assert raw["architectures"] == ["LlamaForCausalLM"] and not (tmp_path / "x.gguf").exists()
    run(to="gguf", input=folder, output=tmp_path / "x.gguf", tokenizer=words().path)
    assert convert.OUTPUT.name == "output" and read(tmp_path / "x.gguf")[0]["tokenizer.ggml.model"] == "gpt2"
