"""Whatever is wrong, the command ends with one message that names it, without a traceback, and harms no checkpoint."""

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny

MESH = {"mesh__fsdp": 4, "mesh__tensor": 2}  # the eight devices of the tests
SMALL = {**MESH, "train__steps": 2, "checkpoint__every": 2}


def digest(folder):
    """Of the names and bytes of all files, except what a start may sweep away or write anew."""
    files = sorted(p for p in Path(folder).rglob("*") if p.is_file())
    return [(str(p.relative_to(folder)), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files]


def one_message(output):
    return "Traceback" not in output and output.count("error:") == 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps with a checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    assert tiny.inside(f"--config={tiny.write_config(folder, **SMALL)}")[0] == 0
    return folder


@pytest.fixture
def refuses(trained, tmp_path):
    """Runs the door on a copy of the trained run; requires one message with these words and unharmed checkpoints."""

    def check(*words, argv=(), arg="", run=tiny.inside, status=1, fresh=True, **values):
        folder = tmp_path / "run"
        shutil.copytree(trained, folder)
        before = digest(folder / "checkpoints")
        others = {"checkpoint__resume": False, "checkpoint__dir": str(tmp_path / "other")} if fresh else {}
        config = tiny.write_config(folder, **{**SMALL, **others, **values})
        code, output = run(f"--config={config}{arg}", *argv)
        assert one_message(output) and code == status, output[-800:]
        message = output[output.index("train.py: error: ") :]
        for word in words:
            assert word in message, message
        assert digest(folder / "checkpoints") == before
        return message

    return check


# --- files of data ---


def chat(*turns):
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in turns]}


GOOD = chat(("human", "ask"), ("gpt", "tell"))
lines = lambda *rows: "".join(json.dumps(row) + "\n" for row in rows).encode()
DATA = {
    "empty": ("a.jsonl", b"", "sharegpt/a.jsonl: found no rows; expected a row or more"),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(lines(*[GOOD] * 9))[:-9], "found the end of the file within gzip"),
    "not gzip": ("a.jsonl.gz", lines(GOOD), "expected a gzip file, because of .gz"),
    "wrong keys": ("a.jsonl", lines(GOOD, {"question": "a"}), 'row 2: found an object with the keys "question"'),
    "not alternating": ("a.jsonl", lines(chat(("human", "a"), ("human", "b"), ("gpt", "c"))),
                        "row 1, turn 2: found a turn of the user after a turn of the user"),
    "not UTF-8": ("a.jsonl", lines(GOOD) + b'{"conversations": "\xff"}\n', "is 0xff, which is not UTF-8"),
    "turn of a megabyte": ("a.jsonl", lines(chat(("human", "a"), ("gpt", "b" * 1_000_000))),
                           "row 1, turn 2: found a turn of 1,000,000 characters"),
    "not JSON": ("a.jsonl", lines(GOOD) + b'{"conversations": [\n', "a.jsonl, row 2: found"),
}  # fmt: skip
DATA_CONFIG = """
from ml_collections import ConfigDict


def get_config(arg=""):
    tokenizer = {"train": True, "vocab_size": 300, "special_tokens": ("<|user|>", "<|assistant|>", "<|end|>")}
    return ConfigDict({"sources": {"sharegpt": {}}, "policy": "error", "tokenizer": tokenizer})
"""


@pytest.mark.parametrize("name, content, words", DATA.values(), ids=DATA)
def test_a_file_of_data(refuses, tmp_path, name, content, words):
    (tmp_path / "raw" / "sharegpt").mkdir(parents=True)
    (tmp_path / "raw" / "sharegpt" / name).write_bytes(content)
    (tmp_path / "data_config.py").write_text(DATA_CONFIG)
    refuses(words, "expected", data__path=str(tmp_path / "data"), data__prepare=str(tmp_path / "data_config.py"),
            data__prepare_input=str(tmp_path / "raw"))  # fmt: skip
    assert not (tmp_path / "data").exists(), "nothing is half prepared"


# --- the config ---

COMMAND_LINE = {
    "unknown key": (["--config.optimizer.learning_rat=1e-3"], "'learning_rat'", "learning_rate"),
    "unknown section": (["--config.optimiser.b1=0.5"], "optimiser", "optimizer"),
    "text for a number": (["--config.optimizer.learning_rate=fast"], "learning_rate", "fast"),
    "a half for a whole number": (["--config.data.batch_size=2.5"], "batch_size", "2.5"),
    "unknown flag": (["--confg.data.batch_size=2"], "confg"),
}


@pytest.mark.parametrize("argv, words", [(a, w) for a, *w in COMMAND_LINE.values()], ids=COMMAND_LINE)
def test_the_command_line(refuses, argv, words):
    message = refuses(*words, argv=argv, status=2)
    assert message.count("\n") == 1


def test_the_argument_of_a_config(refuses):
    message = refuses("unknown config argument 'stepz': did you mean 'steps'?", arg=":stepz=3", status=2)
    assert message.count("\n") == 1


def test_the_type_of_an_argument(refuses):
    refuses("config argument steps=many: expected int", arg=":steps=many", status=2)


CONFIG_FILES = {
    "unknown model": ('base("lama-7b")', "unknown model 'lama-7b': did you mean 'llama-7b'?"),
    "unknown key of the model": ('base("debug", hidden=3)', "hidden", "hidden_size"),
    "unknown key": ('base("debug"); config.data.lenght = 3', "lenght", "length"),
    "unknown section": ('base("debug"); config.optimiser.b1 = 3', "optimiser", "optimizer"),
    "another type": ('base("debug"); config.data.length = "long"', "length", "long"),
}


@pytest.mark.parametrize("code, words", [(c, w) for c, *w in CONFIG_FILES.values()], ids=CONFIG_FILES)
def test_a_config_file(tmp_path, code, words):
    path = tmp_path / "mine.py"
    text = f"from easylm_plus.config import base\n\n\ndef get_config(arg=''):\n    config = {code}\n    return config\n"
    path.write_text(text)
    status, output = tiny.inside(f"--config={path}")
    assert status == 2 and one_message(output), output[-800:]
    assert all(word in output for word in words), output[-800:]


@pytest.mark.parametrize(
    "argv", [["--config=no/such_config.py"], ["--config=no/such_config.py", "--config.data.length=8"]]
)
def test_no_config_file(argv):
    status, output = tiny.inside(*argv)
    assert status == 2 and one_message(output) and "no/such_config.py" in output, output[-800:]


def test_no_config_at_all():
    status, output = tiny.inside()
    assert status == 2 and one_message(output) and "--config" in output, output[-800:]


VALUES = {
    "steps and epochs": ({"train__epochs": 1.0}, "train: set exactly one of steps, epochs and tokens; found steps and"),
    "no length of the run": ({"train__steps": 0}, "train: set exactly one of steps, epochs and tokens; found none"),
    "rows longer than the model": ({"data__length": 65}, "data.length = 65: longer than model.max_length = 64"),
    "accumulate": ({"train__accumulate": 3}, "train.accumulate = 3: expected a divisor of data.batch_size = 8"),
    "batch of no rows": ({"data__batch_size": 0}, "data.batch_size = 0: expected a positive number"),
    "mesh": ({"mesh__tensor": 3}, "mesh fsdp=4 x tensor=3 does not fit 8 devices"),
    "batch and mesh": ({"data__batch_size": 4}, "data.batch_size = 4", "a multiple of mesh.replica x mesh.fsdp"),
    "length and mesh": ({"mesh__fsdp": 1, "mesh__tensor": 1, "mesh__sequence": 8, "data__length": 60},
                        "data.length = 60: expected a multiple of mesh.sequence = 8"),
    "precision": ({"numerics__precision": "fp32"}, "numerics.precision = 'fp32': expected one of float32, bf16"),
    "attention": ({"model__attention": "cudnn"}, "model.attention = 'cudnn' needs a GPU"),
    "remat": ({"model__remat": "some"}, "model.remat = 'some': expected one of none, dots, full"),
    "an axis that cuts nothing": ({"mesh__stage": 2}, "mesh.stage = 2: expected 1"),
    "experts that are not there": ({"mesh__expert": 2, "mesh__tensor": 1, "train__accumulate": 1},
                                   "mesh.expert = 2: divides no side of the weights"),
    "a bucket": ({"log__dir": "gs://bucket/run"}, "log.dir = 'gs://bucket/run'", "mount the bucket"),
    "date": ({"data__date": "1 May"}, "data.date = '1 May': expected YYYY-MM-DD"),
    "init": ({"model__init": "zeros"}, "model.init = 'zeros': expected one of llama"),
    "schedule": ({"optimizer__schedule": "cosin"}, "optimizer.schedule = 'cosin': expected one of constant"),
    "warm-up": ({"optimizer__warmup_steps": 9}, "optimizer.warmup_steps = 9: longer than the run of 2 steps"),
    "pattern of decay": ({"optimizer__decay": "(kernel"}, "optimizer.decay = '(kernel'"),
    "packing": ({"data__packing": "best"}, "packing", "'best'", "best_fit"),
    "template": ({"data__template": "koalla"}, "template", "'koalla'", "koala"),
    "template file": ({"data__template": "no/such.jinja"}, "no/such.jinja"),
    "profile": ({"train__profile": "10"}, "train.profile = '10': expected 'first:last'"),
    "profile backwards": ({"train__profile": "3:1"}, "train.profile = '3:1'"),
    "best by nothing": ({"checkpoint__keep_best": "eval/los"}, "checkpoint.keep_best = 'eval/los'"),
    "unknown source": ({"data__sources": ("sums", "lettres")}, "data.sources: found 'lettres', expected one of"),
    "weight of a source": ({"data__sources": ("sums=two",)}, "data.sources: found weight 'two' of sums"),
    "no data": ({"data__path": "no/such"}, "no/such (config.data.path)", "data_pipelines.prepare"),
    "no path of data": ({"data__path": ""}, "data.path is not set"),
    "no tokenizer": ({"data__tokenizer": "no/tokenizer.json"}, "tokenizer: no/tokenizer.json (config.data.tokenizer)"),
    "no weights": ({"init_from__path": "no/weights"}, "weights: no/weights (config.init_from.path)"),
    "small vocabulary": ({"model__vocab_size": 280}, "model.vocab_size = 280: the tokenizer", "has 300"),
    "divisor of heads": ({"model__num_kv_heads": 3}, "model.num_kv_heads = 3: expected a divisor of num_heads = 4"),
}  # fmt: skip


@pytest.mark.parametrize("values, words", [(v, w) for v, *w in VALUES.values()], ids=VALUES)
def test_a_value(refuses, values, words):
    refuses(*words, **values)


def test_everything_that_is_missing_is_told_at_once(refuses):
    refuses("weights: no/weights", "data: no/data", "tokenizer: no/tokenizer", init_from__path="no/weights",
            data__path="no/data", data__tokenizer="no/tokenizer")  # fmt: skip


# --- damaged files ---


@pytest.fixture
def copied(tmp_path):
    """A prepared folder to damage."""
    shutil.copytree(tiny.data(), tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize("content", [b'{"model": {', b"{}", b"[]", b"\xff\xfe", b"", b'{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer(refuses, copied, content):
    (copied / "tokenizer" / "tokenizer.json").write_bytes(content)
    refuses(str(copied / "tokenizer" / "tokenizer.json"), data__path=str(copied))


def test_a_tokenizer_of_an_unknown_kind(refuses, tmp_path):
    (tmp_path / "words.txt").write_text("a b c")
    refuses("words.txt: expected a .json", data__tokenizer=str(tmp_path / "words.txt"))


def test_a_tokenizer_folder_without_one(refuses, tmp_path):
    refuses("found none of tokenizer.json", data__tokenizer=str(tmp_path))


def test_damaged_data(refuses, copied):
    shard = next(copied.glob("sums/**/*train.array_record*"))
    shard.write_bytes(shard.read_bytes()[:-10])
    refuses(shard.name, "expected", "--force", data__path=str(copied))


def test_a_damaged_manifest(refuses, copied):
    (copied / "manifest.json").write_text("{")
    refuses("manifest.json: found a damaged manifest", data__path=str(copied))


def test_a_bad_pattern_of_weights(refuses, trained):
    refuses("init_from.rename", "'(x=y'", init_from__path=str(trained), init_from__rename=("(x=y",))


def test_weights_of_another_model(refuses, trained):
    refuses("none of its weights fits this model", init_from__path=str(trained), model__hidden_size=8,
            model__head_dim=6, model__intermediate_size=16)  # fmt: skip


def test_a_folder_that_holds_no_weights(refuses, tmp_path):
    refuses("found no checkpoint", init_from__path=str(tmp_path))


# --- resuming ---


def test_starting_over_where_checkpoints_are(refuses):
    refuses("checkpoint.resume = False", "already has step 2", "log.dir", fresh=False, checkpoint__resume=False)


def test_another_config(refuses):
    refuses("was written by another run", "  optimizer.b1: found 0.9, now 0.8", "  train.seed: found 0, now 3",
            "checkpoint.force=True", fresh=False, optimizer__b1=0.8, train__seed=3)  # fmt: skip


def test_another_model(refuses):
    refuses("does not hold this model", "kernel: found float32[16, 32], expected float32[16, 48]", fresh=False,
            checkpoint__force=True, model__intermediate_size=48)  # fmt: skip


@pytest.mark.parametrize("content", [b"{", b"", b"{}", b"\xff"])
def test_damaged_meta(trained, tmp_path, content):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run/checkpoints/2/meta/metadata").write_bytes(content)
    before = digest(tmp_path / "run/checkpoints")
    status, output = tiny.inside(f"--config={tiny.write_config(tmp_path / 'run', **SMALL)}")
    assert status == 1 and one_message(output) and "checkpoints/2: found no readable meta" in output, output[-800:]
    assert digest(tmp_path / "run/checkpoints") == before


@pytest.mark.parametrize("part", ["state", "data"])
def test_damaged_checkpoint(trained, tmp_path, part):
    shutil.copytree(trained, tmp_path / "run")
    for path in (tmp_path / "run/checkpoints/2" / part).rglob("*"):
        if path.is_file() and path.stat().st_size > 8 and "commit" not in path.name:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    before = digest(tmp_path / "run/checkpoints")
    status, output = tiny.inside(f"--config={tiny.write_config(tmp_path / 'run', **SMALL)}")
    assert status == 1 and one_message(output) and "checkpoints/2: found a damaged" in output, output[-800:]
    assert digest(tmp_path / "run/checkpoints") == before


# --- the machine ---


@contextlib.contextmanager
def mounted(place, options):
    """A disk in memory with these options at a folder; skips the test where that is not allowed."""
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted here: {getattr(error, 'stderr', error)}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own with four megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    with mounted(place, "size=4m"):
        yield place


@pytest.fixture
def nearly_full(trained, small_disk):
    """A function (bytes left) -> (its digest, config) of a run with a checkpoint at step 2 and two more steps to go."""

    def fill(room):
        shutil.copytree(trained / "checkpoints", small_disk / "checkpoints")
        config = tiny.write_config(small_disk, **{**SMALL, "train__steps": 4, "checkpoint__force": True})
        free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
        (small_disk / "filler").write_bytes(bytes(max(0, free - room)))
        return digest(small_disk / "checkpoints/2"), config

    return fill


@pytest.mark.parametrize("room", [4_000, pytest.param(400_000, marks=pytest.mark.slow)])
def test_a_full_disk(nearly_full, small_disk, room):
    """One message, also at the end of the process; nothing is lost, and with more room the run goes on."""
    before, config = nearly_full(room)
    status, output = tiny.run(f"--config={config}", devices=8)
    assert status == 28 and one_message(output) and "the disk is full" in output, output[-800:]
    assert ("a checkpoint takes" in output) == (room > 4_000), "the log cannot even be written"
    assert digest(small_disk / "checkpoints/2") == before
    (small_disk / "filler").unlink()
    status, output = tiny.run(f"--config={config}", devices=8)
    assert status == 0 and "starts from step 2" in output, output[-800:]


@pytest.mark.parametrize("room", [pytest.param(60_000, marks=pytest.mark.slow), 120_000])
def test_a_disk_that_fills_up_during_a_save(nearly_full, small_disk, tmp_path, room):
    """However far the save gets, the one before it is whole, and what is there can be continued from.

    As a process, with which dies what the broken save still does in the background; that also writes tracebacks, which
    is why the room is looked at before a save.
    """
    before, config = nearly_full(room)
    unchecked = "from easylm_plus.training import checkpoint\n\ncheckpoint._check_room = lambda *args: None\n"
    (tmp_path / "unchecked.py").write_text(unchecked + config.read_text())
    status, output = tiny.run(f"--config={tmp_path / 'unchecked.py'}", devices=8)
    assert status == 28 and output.count("the disk is full") == 1, output[-800:]
    assert digest(small_disk / "checkpoints/2") == before
    (small_disk / "filler").unlink()
    status, output = tiny.run(f"--config={config}", devices=8)
    assert status == 0 and "starts from step 2" in output, output[-800:]


@pytest.fixture(params=["a file", "below a file", "locked", "read only"])
def place(request, tmp_path):
    """A path at which no folder can be made."""
    where = tmp_path / request.param.replace(" ", "_")
    if request.param.endswith("a file"):
        where.write_text("")
        yield where if request.param == "a file" else where / "run"
    elif request.param == "locked":
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere")
        where.mkdir(mode=0o500)
        yield where / "run"
    else:
        where.mkdir()
        with mounted(where, "ro"):
            yield where / "run"


@pytest.mark.parametrize("key", ["log__dir", "checkpoint__dir"])
def test_a_place_that_cannot_be_written(refuses, place, key):
    refuses(str(place), **{key: str(place)})


# --- as a process ---


@pytest.mark.parametrize(
    "argv, status, words",
    [
        (["--config.optimizer.learning_rat=1"], 2, "learning_rate"),
        (["--config.train.epochs=1"], 1, "found steps and epochs"),
    ],
)
def test_the_command_itself(tmp_path, argv, status, words):
    code, output = tiny.run(f"--config={tiny.write_config(tmp_path)}", *argv)
    assert code == status and output.startswith("train.py: error: ") and words in output, output
    assert output.count("\n") == 1
