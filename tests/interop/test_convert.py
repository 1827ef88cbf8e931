"""The conversion door: to our checkpoints and back, byte for byte; what it refuses, and what it leaves behind."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl import flags
from absl.testing import flagsaver
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file
from test_llama2c import write

from easylm_plus import convert
from easylm_plus.errors import UserError
from easylm_plus.inference.load import open_model
from easylm_plus.interop import translate
from easylm_plus.interop.configs import read_config
from easylm_plus.interop.huggingface import load_hf, save_hf
from easylm_plus.interop.llama2c import load_llama2c
from easylm_plus.interop.tensor_files import INDEX
from easylm_plus.models.transformer import Transformer
from easylm_plus.training import output, stream
from easylm_plus.training.checkpoint import Checkpoints, locate, read_meta, read_parameters
from easylm_plus.training.restore import read_weights

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ("llama_tiny", "qwen2_tiny", "yuan2_tiny", "yuan2_m32_moe_tiny", "mixtral_tiny", "bitnet_tiny")


def run(**values):
    """The door with these flags, in this process."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    with flagsaver.flagsaver(**{name: str(v) if isinstance(v, Path) else v for name, v in values.items()}):
        return convert.main()


def truncate(path):
    path.write_bytes(path.read_bytes()[:8190])


def hashes(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hugging Face folder of a model of our own with a tokenizer, in several files."""
    folder = tmp_path_factory.mktemp("hub") / "llama"
    model, params = tiny.model(vocab=300, scan_layers=True)
    (folder.parent / "words").mkdir()
    shutil.copytree(tiny.data() / "tokenizer", folder.parent / "words", dirs_exist_ok=True)
    template = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    template += "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    (folder.parent / "words" / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (folder.parent / "words" / "generation_config.json").write_text('{"temperature": 0.6}')
    save_hf(model, params, folder, max_shard_bytes=20_000, tokenizer_from=folder.parent / "words")
    assert (folder / INDEX).is_file()
    return folder


# --- there and back ---


def published(name):
    """The tensors of a golden folder, without those that follow from others."""
    tensors = load_file(GOLDEN / name / "model.safetensors")
    tied = json.loads((GOLDEN / name / "config.json").read_text()).get("tie_word_embeddings", False)
    return {k: x for k, x in tensors.items() if not k.endswith("inv_freq") and not (tied and k == "lm_head.weight")}


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name, strict=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back(name, tmp_path):
    """hf -> ours -> hf -> ours -> hf: parameters as load_hf reads them, tensors as the folder had them."""
    run(input=GOLDEN / name, output=tmp_path / "ours")
    _, expected = load_hf(GOLDEN / name, numerics=())
    found = read_parameters(*locate(tmp_path / "ours"))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    run(input=tmp_path / "ours", output=tmp_path / "hf", to="hf")
    assert_same_tensors(load_file(tmp_path / "hf/model.safetensors"), published(name))
    run(input=tmp_path / "hf", output=tmp_path / "again")
    run(input=tmp_path / "again", output=tmp_path / "hf2", to="hf")
    assert hashes(tmp_path / "hf") == hashes(tmp_path / "hf2")
    assert read_config(tmp_path / "hf") == read_config(GOLDEN / name)
    raw, was = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "hf", GOLDEN / name))
    assert raw["eos_token_id"] == was["eos_token_id"], "other keys of the original stay"


FIRST_LAYER = lambda right: lambda self, name, index: right(self, name, (0, *index[1:]) if index else index)
FIRST_EXPERT = lambda right: lambda self, name, index: right(self, name, (*index[:1], 0) if len(index) > 1 else index)
ZEROS = lambda right: lambda self, name, index: np.zeros_like(right(self, name, index))
TURNED = lambda right: lambda self, name, index: right(self, name, index)[::-1]


@pytest.mark.parametrize(
    ("name", "wrong"),
    (
        ("llama_tiny", FIRST_LAYER),
        ("mixtral_tiny", FIRST_EXPERT),
        ("yuan2_m32_moe_tiny", FIRST_LAYER),
        ("qwen2_tiny", ZEROS),
        ("llama_tiny", TURNED),
    ),
)
def test_an_export_of_other_pieces_is_seen(name, wrong, tmp_path, monkeypatch):
    """The comparison above would notice, whatever is wrong with the reading of our checkpoints."""
    run(input=GOLDEN / name, output=tmp_path / "ours")
    monkeypatch.setattr(stream.Chunked, "_map", wrong(stream.Chunked._map))
    run(input=tmp_path / "ours", output=tmp_path / "hf", to="hf")
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        assert_same_tensors(load_file(tmp_path / "hf/model.safetensors"), published(name))


def test_one_changed_number_is_seen(tmp_path):
    """The comparison above would notice: a single bit of a single chunk."""
    run(input=GOLDEN / "llama_tiny", output=tmp_path / "ours")
    chunk = tmp_path / "ours/0/state/params.layers.mlp.up_proj.kernel/1.0.0"
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    _, expected = load_hf(GOLDEN / "llama_tiny")
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, read_parameters(*locate(tmp_path / "ours")), expected)


@pytest.mark.parametrize(("change", "message"), ((lambda p: p.unlink(), "no file"), (truncate, "8190 bytes")))
def test_a_damaged_piece_is_named(tmp_path, change, message):
    run(input=GOLDEN / "llama_tiny", output=tmp_path / "ours")
    change(tmp_path / "ours/0/state/params.layers.self_attn.v_proj.kernel/1.0.0")
    with pytest.raises(UserError, match=rf"v_proj\.kernel/1\.0\.0: found {message}, expected 16384 bytes of layers"):
        run(input=tmp_path / "ours", output=tmp_path / "hf", to="hf")


def test_the_checkpoint_is_one_like_any_other(hub, tmp_path):
    """It opens with its tokenizer and template, starts a run, and restores onto a mesh."""
    run(input=hub, output=tmp_path / "ours")
    opened, theirs = open_model(tmp_path / "ours"), open_model(hub)
    assert (
        type(opened.template) is type(theirs.template) and opened.tokenizer.fingerprint == theirs.tokenizer.fingerprint
    )
    tokens = np.arange(12)[None]
    logits = [jax.jit(o.model.apply)({"params": o.params}, tokens) for o in (opened, theirs)]
    np.testing.assert_allclose(*logits, rtol=0, atol=1e-6)
    assert opened.model.precision.name == "float32"
    for scan in (True, False):
        found = {}
        config = read_config(hub, scan_layers=scan)
        read_weights(tmp_path / "ours", Transformer(config, opened.model.precision), found.__setitem__)
        expected = {}
        read_weights(hub, Transformer(config, opened.model.precision), expected.__setitem__)
        assert found.keys() == expected.keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)
    sharding = NamedSharding(jax.make_mesh((8,), ("fsdp",)), PartitionSpec())
    sharded = read_parameters(*locate(tmp_path / "ours"), sharding)
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(sharded))


def test_companions_travel_both_ways(hub, tmp_path):
    run(input=hub, output=tmp_path / "ours")
    run(input=tmp_path / "ours", output=tmp_path / "hf", to="hf")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (hub / name).read_bytes()


def test_a_run_of_ours_is_exported_from_its_average(tmp_path):
    """A checkpoint of training, in unrolled layers and written by orbax as it likes; the EMA goes out, not the rest."""
    model, params = tiny.model(vocab=300)
    average = jax.tree.map(lambda x: x + 1, params)
    run_config = {"model": vars(model.config), "numerics": {"precision": "bf16", "deterministic": True},
                  "data": {"template": "chat", "length": 64, "date": ""}}  # fmt: skip
    checkpoints = Checkpoints(tmp_path / "run", {"every": 1, "keep": 0, "keep_best": ""})
    state = {"params": params, "ema": average, "step": jnp.zeros((), jnp.int32)}
    checkpoints.save(3, state, {}, {"config": run_config}, {})
    checkpoints.close()
    words = shutil.copytree(tiny.data() / "tokenizer", tmp_path / "run/tokenizer") / "tokenizer.json"
    run(input=tmp_path / "run", output=tmp_path / "hf", to="hf", dtype="bfloat16")
    again = load_hf(tmp_path / "hf", jnp.bfloat16, scan_layers=False)[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), again, average)
    assert (tmp_path / "hf/tokenizer.json").read_bytes() == words.read_bytes()
    with pytest.raises(UserError, match="has no step 2; it has 3"):
        run(input=tmp_path / "run", output=tmp_path / "copy", step=2)
    run(input=tmp_path / "run", output=tmp_path / "copy", step=3)
    copied = read_meta(tmp_path / "copy", 0)["config"]
    assert copied["data"]["template"] == "chat" and copied["numerics"] == run_config["numerics"]


def test_a_tokenizer_of_ones_own(hub, tmp_path):
    run(input=GOLDEN / "llama_tiny", output=tmp_path / "file", tokenizer=hub / "tokenizer.json", to="hf")
    run(input=GOLDEN / "llama_tiny", output=tmp_path / "folder", tokenizer=hub, to="hf")
    assert (tmp_path / "file/tokenizer.json").read_bytes() == (hub / "tokenizer.json").read_bytes()
    assert (tmp_path / "folder/tokenizer_config.json").is_file()
    with pytest.raises(UserError, match="nowhere: found no tokenizer there; expected its file or folder"):
        run(input=hub, output=tmp_path / "none", tokenizer=tmp_path / "nowhere")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_dtype(tmp_path, dtype):
    run(input=GOLDEN / "llama_tiny", output=tmp_path / "ours", dtype=dtype)
    meta = read_meta(tmp_path / "ours", 0)
    assert {info["dtype"] for info in meta["arrays"].values()} == {dtype}
    assert meta["config"]["numerics"]["precision"] == "bf16_pure"
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)),
        read_parameters(*locate(tmp_path / "ours")), load_hf(GOLDEN / "llama_tiny")[1],
    )  # fmt: skip


@pytest.mark.parametrize("tied", (True, False))
def test_llama2c(tmp_path, tied):
    """A file of the format that test_llama2c.py writes becomes a Hugging Face folder."""
    write(tmp_path / "model.bin", tied)
    run(input=tmp_path / "model.bin", output=tmp_path / "hf", to="hf")
    expected, found = load_llama2c(tmp_path / "model.bin")[1], load_hf(tmp_path / "hf")[1]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_folder_of_pieces_is_written_anew(hub, tmp_path):
    """Hugging Face to Hugging Face: other files, another dtype, the same tensors."""
    run(input=hub, output=tmp_path / "out", to="hf", dtype="float16")
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.float16)),
        load_hf(tmp_path / "out")[1], load_hf(hub)[1],
    )  # fmt: skip
    assert len(list(hub.glob("*.safetensors"))) > 1 == len(list((tmp_path / "out").glob("*.safetensors")))


# --- what it refuses, and what it leaves ---


def test_what_is_there_stays_unless_forced(hub, tmp_path):
    output = tmp_path / "ours"
    run(input=hub, output=output)
    before = hashes(output / "0/state/params.norm.weight")
    with pytest.raises(UserError, match="ours: found something there already; --force replaces it"):
        run(input=GOLDEN / "llama_tiny", output=output)
    assert hashes(output / "0/state/params.norm.weight") == before
    for to in ("easylm_plus", "hf", "hf", "easylm_plus"):
        run(input=GOLDEN / "llama_tiny", output=output, to=to, force=True)
    assert hashes(output / "0/state/params.norm.weight") != before
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def a_thesis(place):
    (place / "config.json").write_text("{}")
    (place / "thesis.tex").write_text("a year")


def a_model_with_more(place):
    shutil.copyfile(GOLDEN / "llama_tiny/model.safetensors", place / "model.safetensors")
    shutil.copyfile(GOLDEN / "llama_tiny/config.json", place / "config.json")
    (place / "thesis.tex").write_text("a year")


def a_config_alone(place):
    shutil.copyfile(GOLDEN / "llama_tiny/config.json", place / "config.json")


def a_run(place, *steps):
    model, params = tiny.model(vocab=300)
    checkpoints = Checkpoints(place, {"every": 1, "keep": 0, "keep_best": ""})
    for step in steps:
        checkpoints.save(step, {"params": params}, {}, {"config": {"model": vars(model.config)}}, {})
    checkpoints.close()


def a_conversion_with_more(place):
    run(input=GOLDEN / "llama_tiny", output=place / "x")
    (place / "x/0").rename(place / "0")
    shutil.rmtree(place / "x")
    (place / "notes.txt").write_text("dear")


@pytest.mark.parametrize(
    ("make", "found"),
    (
        (lambda place: (place / "letter.txt").write_text("dear"), "no model"),
        (a_thesis, "no model"),
        (a_config_alone, "no model"),
        (a_model_with_more, "thesis.tex"),
        (a_conversion_with_more, "notes.txt"),
        (lambda place: a_run(place, 0), "a checkpoint of a training run"),
        (lambda place: a_run(place, 0, 5), "5"),
        (lambda place: a_run(place, 3), "no model"),
    ),
)
def test_force_replaces_conversions_only(hub, tmp_path, make, found):
    (tmp_path / "home").mkdir()
    make(tmp_path / "home")
    before = tree(tmp_path)
    with pytest.raises(UserError, match=f"home: found {found} there; --force replaces only what a conversion has"):
        run(input=hub, output=tmp_path / "home", force=True)
    assert tree(tmp_path) == before


def test_force_replaces_no_file(hub, tmp_path):
    (tmp_path / "letter").write_text("dear")
    with pytest.raises(UserError, match="letter: found no folder there; --force replaces only"):
        run(input=hub, output=tmp_path / "letter", force=True)
    assert (tmp_path / "letter").read_text() == "dear"


INPUTS = (
    # where we stand, --input, --output, message
    ("T/sub", "{top}/T/hub", "../hub", "found the input .*hub there"),
    ("T/sub", "../hub", "{top}/T/hub", "found the input .*hub there"),
    ("T", "link", "hub", "found the input link there"),
    ("T", "hub", "link/../hub", "found the input hub there"),
    ("T", "hub", "linked_sub/../hub", "found the input hub there"),
    ("T/sub", "../hub", "..", "found the input ../hub there"),
    ("T/hub", ".", "..", "found the input . there"),
    ("T/hub", ".", "{top}/T/hub", "found the input . there"),
    ("T", "hub", "hub/new", "lies in the input hub"),
    ("T/hub", ".", "new", "lies in the input ."),
    ("T", "files_elsewhere", "hub", "found the input files_elsewhere/model.* there"),
)


@pytest.mark.parametrize("flag", ("input", "diff_base", "tokenizer"))
@pytest.mark.parametrize(("here", "source", "output", "message"), INPUTS)
def test_no_input_is_overwritten(hub, tmp_path, monkeypatch, flag, here, source, output, message):
    """However the two are written: relative, through a link, one around the other."""
    shutil.copytree(hub, tmp_path / "T/hub")
    for name in ("sub", "files_elsewhere"):
        (tmp_path / "T" / name).mkdir()
    (tmp_path / "T/link").symlink_to("hub")
    (tmp_path / "T/linked_sub").symlink_to("sub")
    for path in (tmp_path / "T/hub").iterdir():
        (tmp_path / "T/files_elsewhere" / path.name).symlink_to(path)
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path / here)
    options = {"input": hub, flag: source.format(top=tmp_path)}
    with pytest.raises(UserError, match=rf"--output=\S+: {message}"):
        run(output=output.format(top=tmp_path), to="hf" if flag != "diff_base" else None, force=True, **options)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("to", ("hf", "easylm_plus"))
def test_relative_paths(hub, tmp_path, monkeypatch, to):
    """With .. in them, which tensorstore does not take; and back."""
    (tmp_path / "a/b").mkdir(parents=True)
    shutil.copytree(hub, tmp_path / "hub")
    monkeypatch.chdir(tmp_path / "a/b")
    run(input="../../hub", output="../out", to=to)
    run(input="../out", output="../../again", to="hf")
    assert hashes(tmp_path / "again").keys() >= {"config.json", "model.safetensors", "tokenizer.json"}
    jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path / "again")[1], load_hf(hub)[1])


@pytest.mark.parametrize("forced", (False, True))
@pytest.mark.parametrize("target", ("hub", "nowhere"))
def test_a_link_is_no_output(hub, tmp_path, monkeypatch, target, forced):
    """Said at once, not when everything is written."""
    shutil.copytree(hub, tmp_path / "hub")
    (tmp_path / "out").symlink_to(target)
    monkeypatch.setattr(translate.Translated, "read", lambda *_: pytest.fail("began to read"))
    with pytest.raises(UserError, match="out: found a link there; expected a new folder"):
        run(input=GOLDEN / "llama_tiny", output=tmp_path / "out", force=forced)
    assert (tmp_path / "out").is_symlink() and hashes(tmp_path / "hub") == hashes(hub)


def test_two_conversions_to_one_place(hub, tmp_path, monkeypatch):
    """One ends while the other still reads: the first stays whole, the second says so and leaves nothing."""
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/letter.txt").write_text("not ours")
    read, count = translate.Translated.read, iter(range(1000))

    def meanwhile(self, names, index):
        if next(count) == 3:
            run(input=GOLDEN / "llama_tiny", output=tmp_path / "out", to="hf")
        return read(self, names, index)

    monkeypatch.setattr(translate.Translated, "read", meanwhile)
    with pytest.raises(UserError, match="out: found something there already"):
        run(input=hub, output=tmp_path / "out", to="hf")
    jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path / "out")[1], load_hf(GOLDEN / "llama_tiny")[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "out"]
    assert (tmp_path / ".out.partial/letter.txt").read_text() == "not ours"


def test_the_old_comes_back_if_the_new_cannot_be_moved(hub, tmp_path, monkeypatch):
    run(input=GOLDEN / "llama_tiny", output=tmp_path / "out", to="hf")
    before, rename = tree(tmp_path), Path.rename

    def broken(self, target):
        if self.name == "new":
            raise OSError(5, "the disk is broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OSError, match="the disk is broken"):
        run(input=hub, output=tmp_path / "out", to="hf", force=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("to", ("hf", "easylm_plus"))
@pytest.mark.parametrize("forced", (False, True))
def test_a_broken_run_leaves_nothing(hub, tmp_path, monkeypatch, to, forced):
    """The fifth tensor cannot be read: no new folder, and with --force the old one as it was."""
    output = tmp_path / "out"
    if forced:
        run(input=hub, output=output, to=to)
    before = sorted(tmp_path.rglob("*"))
    read, count = translate.Translated.read, iter(range(100))

    def broken(self, names, index):
        if next(count) == 5:
            raise OSError(5, "the disk is broken")
        return read(self, names, index)

    monkeypatch.setattr(translate.Translated, "read", broken)
    with pytest.raises(OSError, match="the disk is broken"):
        run(input=hub, output=output, to=to, force=forced)
    assert sorted(tmp_path.rglob("*")) == before and next(count) > 5


@pytest.mark.parametrize("to", ("hf", "easylm_plus"))
def test_what_a_killed_run_leaves_does_not_open(hub, tmp_path, monkeypatch, capsys, to):
    """A process that dies cannot tidy up; the next one does not know whether it is dead, and says what it found."""
    monkeypatch.setattr(output.shutil, "rmtree", lambda *_, **__: None)
    monkeypatch.setattr(translate.Translated, "read", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(input=hub, output=tmp_path / "out", to=to)
    (left,) = tmp_path.iterdir()
    message = "no config.json; expected that of the model" if to == "hf" else "new/0: found no readable meta"
    with pytest.raises(UserError, match=message):
        convert.open_source(left / "new")
    monkeypatch.undo()
    run(input=hub, output=tmp_path / "out", to=to)
    assert f"{left} is of a conversion that still runs, or was killed" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [left.name, "out"]


ZIP, OLD_TORCH = b"PK\x03\x04" + bytes(400), b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19." + bytes(400)


@pytest.mark.parametrize("kind", (None, "llama2c", "easylm"))
@pytest.mark.parametrize(
    ("name", "start"), (("x.pth", ZIP), ("x.bin", ZIP), ("x", ZIP), ("x.bin", OLD_TORCH), ("x.pt", b""))
)
def test_a_single_file_of_pytorch_is_pointed_to_its_folder(tmp_path, name, start, kind):
    (tmp_path / name).write_bytes(start)
    message = f"{name}: found tensors without a config; expected --input=FOLDER --allow_pickle, the folder with it and"
    with pytest.raises(UserError, match=message):
        run(input=tmp_path / name, output=tmp_path / "out", allow_pickle=True, **{"from": kind})


def test_a_single_file_of_safetensors_is_pointed_to_its_folder(tmp_path):
    with pytest.raises(
        UserError, match=r"model\.safetensors: found tensors without a config; expected --input=FOLDER, the"
    ):
        run(input=GOLDEN / "llama_tiny/model.safetensors", output=tmp_path / "out")


@pytest.mark.parametrize("name", ("consolidated.00.pth", "pytorch_model.bin", "model.safetensors"))
def test_weights_without_a_config_are_named(tmp_path, name):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_bytes(ZIP)
    with pytest.raises(
        UserError, match=f"model: found {name}, but no config.json; expected that of the model beside it"
    ):
        run(input=tmp_path / "model", output=tmp_path / "out", allow_pickle=True)


FLAGS_WITHOUT_EFFECT = (
    ({"diff_base": "HUB", "to": "hf"}, "--to=hf counts only where a model is written: without --diff_base, or"),
    ({"diff_base": "HUB", "to": "easylm_plus"}, "--to=easylm_plus counts only where"),
    ({"max_shard_gb": 1.0}, "--max_shard_gb=1.0 counts only with --to=hf and for differences"),
    ({"max_shard_gb": 5.0, "to": "easylm_plus"}, "--max_shard_gb=5.0 counts only with"),
    ({"max_shard_gb": -1.0, "to": "hf"}, "--max_shard_gb=-1.0: expected a positive number"),
    ({"max_shard_gb": 0.0, "to": "hf"}, "--max_shard_gb=0.0: expected a positive number"),
    ({"max_shard_gb": float("nan"), "to": "hf"}, "--max_shard_gb=nan: expected a positive number"),
    ({"max_shard_gb": float("inf"), "to": "hf"}, "--max_shard_gb=inf: expected a positive number"),
    ({"model": "koala-13b"}, "--model=koala-13b counts only with --from=easylm; .*llama is hf"),
    ({"model": "koala-13b", "from": "hf"}, "--model=koala-13b counts only with --from=easylm; .*llama is hf"),
    ({"step": 0}, "--step=0 counts only for runs of ours; .*llama is hf"),
    ({"step": 3, "diff_base": "HUB"}, "--step=3 counts only for runs of ours; .*llama is hf"),
    ({"recover": True, "diff_base": "HUB", "from": "hf"}, "found no difference.json; expected one and no --from"),
)


@pytest.mark.parametrize(("options", "message"), FLAGS_WITHOUT_EFFECT)
def test_a_flag_that_would_change_nothing_is_refused(hub, tmp_path, options, message):
    options = {name: hub if value == "HUB" else value for name, value in options.items()}
    with pytest.raises(UserError, match=message):
        run(input=hub, output=tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_size_of_shards_counts(hub, tmp_path):
    """For Hugging Face and for differences."""
    for name, options in (("hf", {"to": "hf"}), ("difference", {"diff_base": hub})):
        run(input=hub, output=tmp_path / name, **options)
        run(input=hub, output=tmp_path / f"{name}_small", max_shard_gb=2e-5, **options)
        one, many = (len(list((tmp_path / f"{name}{end}").glob("*.safetensors"))) for end in ("", "_small"))
        assert one == 1 < many


def test_a_difference_is_not_converted_alone(hub, tmp_path):
    run(input=hub, diff_base=hub, output=tmp_path / "difference")
    with pytest.raises(UserError, match="difference: found a difference; expected --recover --diff_base=BASE with it"):
        run(input=tmp_path / "difference", output=tmp_path / "out")


def test_a_tensor_that_does_not_fit_is_named_before_anything_is_written(tmp_path):
    shutil.copytree(GOLDEN / "llama_tiny", tmp_path / "hf")
    raw = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps({**raw, "intermediate_size": 8}))
    with pytest.raises(UserError, match=r"mlp\.gate_proj\.weight has shape \[\d+, 64\], expected \[8, 64\]"):
        run(input=tmp_path / "hf", output=tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_full_disk_is_told_before(hub, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match="No space left"):
        run(input=hub, output=tmp_path / "ours")
    assert list(tmp_path.iterdir()) == []


def test_what_hugging_face_cannot_express_is_named(tmp_path):
    run(input=GOLDEN / "llama_tiny", output=tmp_path / "ours")
    path = tmp_path / "ours/0/meta/metadata"
    meta = json.loads(path.read_text())
    meta["config"]["model"]["logit_scale"] = 0.5
    path.write_text(json.dumps(meta))
    with pytest.raises(UserError, match=r"model\.logit_scale = 0\.5: LlamaForCausalLM has no place for it"):
        run(input=tmp_path / "ours", output=tmp_path / "hf", to="hf")
    assert not (tmp_path / "hf").exists()


def test_the_command(hub, tmp_path):
    """As a person runs it: progress on stderr, an error in one line."""
    status, output = tiny.run(f"--input={hub}", f"--output={tmp_path / 'ours'}", door="easylm_plus.convert")
    assert status == 0 and re.search(r"([\d.]+ KiB) of \1, .*/s", output), output
    status, output = tiny.run(f"--input={hub}", f"--output={tmp_path / 'ours'}", door="easylm_plus.convert")
    assert status == 1 and output.count("\n") == 1 and "convert.py: error: " in output
    status, output = tiny.run(f"--input={tmp_path / 'none'}", "--output=x", door="easylm_plus.convert")
    assert status == 1 and "none: not found; expected weights" in output
