"""The objectives of text through the training door: they train, and refuse what cannot work."""

import functools
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from data_pipelines.batches.training_data import TEXT_OBJECTIVE
from data_pipelines.prepare import prepare
from easylm_plus.config import base, check
from easylm_plus.errors import UserError
from easylm_plus.training import data as data_module

MESH = {"mesh__fsdp": 4, "mesh__tensor": 2}  # the eight devices of the tests
_FOLDER = tempfile.TemporaryDirectory(prefix="documents_")
SPECIAL = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<mask>", *(f"<extra_id_{i}>" for i in range(8))]
OBJECTIVES = {
    "middle": {"data__fim_rate": 0.9},
    "spans": {"data__corruption": "spans"},
    "masked": {"data__corruption": "masked", "model__causal": False},
}


@functools.cache
def documents():
    """A prepared folder of a hundred documents and a tokenizer with the special tokens."""
    raw, rng = Path(_FOLDER.name) / "raw" / "text", random.Random(1)
    raw.mkdir(parents=True)
    words = ["bees", "like", "honey", "moon", "far", "away", "from", "every", "river", "of", "this", "land"]
    lines = [" ".join(rng.choices(words, k=rng.randint(6, 14))) for _ in range(100)]
    (raw / "lines.txt").write_text("\n\n".join(lines))
    tokenizer = {"train": True, "vocab_size": 300, "special_tokens": SPECIAL}
    settings = {"sources": {"text": {"kind": "text"}}, "heldout": 0.1, "policy": "error", "tokenizer": tokenizer}
    prepare(ConfigDict(settings), str(raw.parent), Path(_FOLDER.name) / "data")
    return Path(_FOLDER.name) / "data"


def config(folder, **values):
    return tiny.write_config(folder, **{"data__path": str(documents()), "data__template": "text", **values})


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_masked_tokens_train_through_the_door(tmp_path):
    """On eight devices, with an evaluation of masked tokens: the loss falls from ln 300 = 5.7, as that of a text of
    twelve words does; a model that saw what it has to tell would get it all right."""
    path = config(tmp_path, **OBJECTIVES["masked"], **MESH, train__steps=40, eval__every=40, checkpoint__every=40)
    status, output = tiny.inside(f"--config={path}")
    assert status == 0, output[-1500:]
    rows = rows_of(tmp_path)
    losses = [row["loss"] for row in rows if "loss" in row]
    heldout = [row["eval/loss"] for row in rows if "eval/loss" in row][-1]
    assert 5.2 < losses[0] < 6.5 and 2 < np.mean(losses[-5:]) < 4 and 2 < heldout < 4


def test_the_data_hash_and_the_held_out_batches(tmp_path):
    settings = {"plain": {}, **OBJECTIVES, "more": {"data__fim_rate": 0.8}}
    values = {"data__path": str(documents()), "data__template": "text"}
    configs = {name: tiny.config(tmp_path, **values, **own) for name, own in settings.items()}
    opened = {name: data_module.open_data(value) for name, value in configs.items()}
    assert len({data.hash for data in opened.values()}) == len(opened)
    batches = {name: next(data_module.heldout_batches(configs[name], opened[name])).arrays for name in opened}
    same = lambda name: all((batches[name][key] == batches["plain"][key]).all() for key in batches["plain"])
    assert same("middle") and same("more") and not same("spans") and not same("masked")
    masked = batches["masked"]
    changed = masked["inputs"] != masked["targets"]
    assert (masked["loss_weights"][changed] > 0).all() and changed.any()
    train = next(data_module.make_loader(configs["middle"], opened["middle"])).arrays
    assert np.isin(train["inputs"], opened["middle"].tokenizer.special_tokens["<|fim_middle|>"]).any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data__corruption": "masked"}, r"model\.causal = True: expected False with data\.corruption = 'masked'"),
        ({"model__causal": False}, r"model\.causal = False: .*only then; found data\.corruption = 'none'"),
        ({**OBJECTIVES["masked"], "eval__every": 1, "eval__samples": 2}, r"eval\.samples = 2: expected 0"),
    ],
)
def test_what_does_not_go_together(values, message, tmp_path):
    with pytest.raises(UserError, match=message):
        check(tiny.config(tmp_path, **values))
    check(tiny.config(tmp_path, **OBJECTIVES["masked"]))


def test_defaults_change_nothing():
    section = base("debug").data
    assert (section.fim_rate, section.corruption) == (0.0, "none")
    assert set(TEXT_OBJECTIVE) <= set(section)


def test_wrong_values_end_with_one_message(tmp_path):
    cases = {
        "data.sentinels = '100:500': expected ids": {"data__corruption": "spans", "data__sentinels": "100:500"},
        "model.vocab_size = 300: data.corruption = 'spans' writes ids up to 309": {
            "data__corruption": "spans",
            "data__sentinels": "300:310",
        },
        "data.fim_rate = 1.5: expected a share": {"data__fim_rate": 1.5},
        "data.corruption = 'mask': expected one of none, spans, masked": {"data__corruption": "mask"},
    }
    for number, (message, values) in enumerate(cases.items()):
        (tmp_path / str(number)).mkdir()
        status, output = tiny.inside(f"--config={config(tmp_path / str(number), **MESH, **values)}")
        assert status == 1 and message in output and "Traceback" not in output, output[-800:]
