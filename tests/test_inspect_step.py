"""`inspect --run --step` shows what a run read: the hash that it logged, from any checkpoint, stored tokens or none."""

import json
import shutil

import pytest
import tiny

from data_pipelines import tokenize
from data_pipelines.batches import replay
from data_pipelines.errors import InputError
from data_pipelines.workers import Workers
from easylm_plus.training.metrics import read_rows

STEPS, EVERY = 12, 4
VALUES = {"train__steps": STEPS, "checkpoint__every": EVERY, "mesh__fsdp": 4, "mesh__tensor": 2, "data__pool": 20}
LENGTHS = {"best_fit": 64, "concat_split": 32}
WHOLE, SPLIT = ({"data__packing": packing, "data__length": length} for packing, length in LENGTHS.items())


@pytest.fixture(scope="module")
def run_with(tmp_path_factory):
    """A run with these values; each is made once."""
    made = {}

    def run_of(values):
        key = tuple(values.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run")
            status, output = tiny.inside(f"--config={tiny.write_config(made[key], **VALUES, **values)}")
            assert status == 0, output
        return made[key]

    return run_of


@pytest.fixture(params=(WHOLE, SPLIT), ids=LENGTHS)
def run(request, run_with):
    return run_with(request.param)


def with_tokens(copy, section):
    """A copy of the data with its tokens."""
    shutil.copytree(tiny.data(), copy)
    with Workers(1) as pool:
        tokenize.tokenise(tokenize.Job(str(copy), "chat", "", section["length"], section["packing"]), pool)
    return str(copy)


def steps_of(folder, numbers):
    opened = replay.open_run(folder)
    section, data = replay.open_run_data(opened)
    return [replay.at_step(opened, section, data, number, lambda *_: None) for number in numbers]


def logged(folder):
    return {row["step"]: row["examples"] for row in read_rows(folder / "metrics.jsonl") if "examples" in row}


def without(folder, copy, *steps):
    """A copy of the run that lacks some checkpoints."""
    shutil.copytree(folder, copy)
    for step in steps:
        shutil.rmtree(copy / f"checkpoints/{step}")
    return copy


def test_every_step_is_as_logged(run, tmp_path):
    found = steps_of(run, range(1, STEPS + 1))
    assert [replay.agrees(step) for step in found] == [True] * STEPS
    assert len(set(logged(run).values())) == STEPS
    lacking = without(run, tmp_path / "copy", 4, 8)  # the only state left is of the end
    for again, step in zip(steps_of(lacking, (1, 7, STEPS)), (found[0], found[6], found[-1])):
        assert replay.agrees(again) and again.batch.examples == step.batch.examples
    beyond = steps_of(run, [STEPS + 30])[0]  # not yet made
    assert replay.agrees(beyond) is None and any(beyond.rows)


def test_another_log_is_noticed(run, tmp_path):
    copy = without(run, tmp_path / "copy")
    rows = read_rows(copy / "metrics.jsonl")
    rows[4]["examples"] = rows[5]["examples"]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [replay.agrees(step) for step in steps_of(copy, (5, 6))] == [False, True]


def test_the_command(run, tmp_path):
    status, output = tiny.run(f"--run={run}", "--step=6", "--rows=0:1", door="data_pipelines.inspect")
    assert status == 0, output
    step = steps_of(run, [6])[0]
    assert f"examples {logged(run)[6]}: as logged" in output and "no tokens are stored of letters, sums" in output
    items = [item for row in step.rows for item in row]
    tokens = sum(item.example.positions for item in items)
    assert f"step 6: 8 rows x {step.batch.arrays['inputs'].shape[1]}, {len(items)} segments, {tokens} tokens" in output
    assert all(item.id in output for item in items) and "<|assistant|>" in output and "padding" in output
    assert ("positions 0 to" in output) == any(item.span for item in items)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--step=0",), "step 0: expected 1 or more"),
        (("--step=2", "--rows=x"), "--rows: found 'x'"),
        (("/nowhere", "--step=2"), "/nowhere: found no such folder"),
    ],
)
def test_what_cannot_be_shown(run_with, arguments, message):
    status, output = tiny.run(f"--run={run_with(WHOLE)}", *arguments, door="data_pipelines.inspect")
    assert status == 1 and message in output and "Traceback" not in output


def test_no_run_and_other_data(run_with, tmp_path):
    with pytest.raises(InputError, match="found no checkpoint; expected a run"):
        replay.open_run(tmp_path)
    opened = replay.open_run(run_with(WHOLE))
    other = {**opened.config, "data": {**opened.config["data"], "template": "tokenizer"}}
    with pytest.raises(InputError, match=r"found data, tokenizer or template with the hash \w+; expected \w+"):
        replay.open_run_data(opened._replace(data_hash="0" * 64))
    with pytest.raises(InputError):
        replay.open_run_data(opened._replace(config=other))


def test_a_run_on_stored_tokens_is_the_same_run(run, tmp_path):
    section = replay.open_run(run).config["data"]
    same = {f"data__{key}": section[key] for key in ("packing", "length")} | {"checkpoint__every": 100}
    stored = {"data__path": with_tokens(tmp_path / "data", section)}
    (tmp_path / "run").mkdir()
    status, output = tiny.inside(f"--config={tiny.write_config(tmp_path / 'run', **{**VALUES, **same, **stored})}")
    assert status == 0 and "read from the store: letters, sums" in output, output
    computed = lambda folder: [
        (row["step"], row["loss"], row["examples"]) for row in read_rows(folder / "metrics.jsonl")
    ]
    assert computed(tmp_path / "run") == computed(run)


def test_with_stored_tokens_nothing_is_tokenised(run, tmp_path, monkeypatch):
    opened = replay.open_run(run)
    expected = steps_of(run, (3, STEPS))
    section, data = replay.open_run_data(opened, with_tokens(tmp_path / "data", opened.config["data"]))
    assert set(data.tokens) == {"letters", "sums"}
    monkeypatch.setattr(type(data.template), "encode_many", lambda *_: pytest.fail("nothing is to be tokenised"))
    for number, step in zip((3, STEPS), expected):
        found = replay.at_step(
            opened._replace(states={STEPS: opened.states[STEPS]}), section, data, number, lambda *_: None
        )
        assert found.batch.examples == step.batch.examples and replay.agrees(found)
        assert all((found.batch.arrays[key] == step.batch.arrays[key]).all() for key in step.batch.arrays)
