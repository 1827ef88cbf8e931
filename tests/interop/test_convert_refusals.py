"""What the conversion door refuses, what it replaces, and what it leaves behind."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from test_convert import GOLDEN, hashes, run

from easylm_plus.errors import UserError
from easylm_plus.interop import translate
from easylm_plus.interop.huggingface import load_hf
from easylm_plus.training import output
from easylm_plus.training.checkpoint import Checkpoints
from easylm_plus.training.source import open_source


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


@pytest.mark.parametrize("output", ("../out", "../hub/../out", "{top}/hub/../out"))
def test_a_place_beside_the_input_that_is_named_by_way_of_it(hub, tmp_path, monkeypatch, output):
    shutil.copytree(hub, tmp_path / "hub")
    monkeypatch.chdir(tmp_path / "hub")
    run(input=".", output=output.format(top=tmp_path), to="hf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub", "out"]


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
        open_source(left / "new")
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
