"""What a run's data section says about its mixture: in tokens, by temperature, with caps and a schedule in steps."""

import math
from collections import Counter

import numpy as np
import pytest

from data_pipelines.batches.loader import Loader
from data_pipelines.batches.run_mixture import KEYS, change, make_mixture, phase_lines
from data_pipelines.conversation import Conversation, Turn
from data_pipelines.errors import InputError
from data_pipelines.templates.template import Example

SECTION = {"batch_size": 4, "length": 64, "packing": "best_fit", "pool": 64, **KEYS}
LENGTHS = {"short": 5, "long": 40}


def encode(conversation):
    """As many tokens as the text says."""
    size = int(conversation.turns[0].text)
    return Example(np.full(size, 3, np.int32), np.ones(size, np.float32))


def conversations(name, count):
    """Of the source's length, give or take a few tokens."""
    return [Conversation(name, f"{i}", (Turn("text", f"{LENGTHS[name] + i % 3}", 1.0),)) for i in range(count)]


SOURCES = {"short": conversations("short", 900), "long": conversations("long", 300)}


def mixture(weights=None, unit="examples", **keys):
    return make_mixture({**SECTION, **keys}, SOURCES, encode, weights, 0, unit)


def loader(made):
    return Loader(SOURCES, made, encode, batch_size=4, length=64, pool=64)


def tokens_by_source(made, steps):
    """Of each step, the tokens of each source."""
    names = list(SOURCES)
    counted = []
    for _, batch in zip(range(steps), loader(made)):
        arrays = batch.arrays
        ids = arrays["source_ids"][arrays["segment_ids"] > 0]
        counted.append(Counter(names[i] for i in ids.tolist()))
    return counted


def share(counted, name):
    total = sum(counted, Counter())
    return total[name] / total.total()


def test_weights_by_tokens_mix_tokens():
    by_tokens = mixture({"short": 1, "long": 1}, weigh="tokens")
    assert share(tokens_by_source(by_tokens, 150), "short") == pytest.approx(0.5, abs=0.02)
    assert mixture({"short": 1, "long": 1}, unit="tokens").cycle_weights == by_tokens.cycle_weights
    by_examples = mixture({"short": 1, "long": 1})  # the control: the same weights of examples
    assert share(tokens_by_source(by_examples, 150), "short") < 0.2


def test_temperature_makes_shares_even():
    shares = lambda t: mixture(temperature=t).phases[0].shares["short"]
    assert shares(1.0) == 0.75
    assert shares(2.0) == pytest.approx(math.sqrt(3) / (1 + math.sqrt(3)), abs=1e-4)
    assert shares(float("inf")) == 0.5


def test_a_cap_ends_a_source_and_then_the_data():
    made = mixture({"short": 1, "long": 1}, max_epochs=("long=0.5", "short=1"))
    assert made.end == 150 + 900
    assert made.counts(made.end) == {"short": 900, "long": 150}
    assert phase_lines(made)[-1] == "the data ends after draw 1,050" and len(phase_lines(made)) == 3
    assert phase_lines(mixture()) == []
    ids = Counter()
    for batch in loader(made):
        ids.update(segment for row in batch.examples for segment in row)
    assert Counter(name for name, *_ in ids.elements()) == {"short": 900, "long": 150}
    assert set(ids.values()) == {1}


@pytest.mark.parametrize("unit", ["examples", "tokens"])
def test_a_schedule_changes_weights_at_its_steps(unit):
    made = mixture({"short": 1, "long": 0}, weigh=unit, schedule=("60: short=1, long=1", "120: short=0, long=1"))
    counted = tokens_by_source(made, 200)
    assert share(counted[:58], "long") == 0 and share(counted[132:], "short") == 0
    expected = 0.5 if unit == "tokens" else LENGTHS["long"] / sum(LENGTHS.values())
    assert share(counted[64:118], "long") == pytest.approx(expected, abs=0.04)
    first = next(step for step, each in enumerate(counted) if each["long"])
    last = max(step for step, each in enumerate(counted) if each["short"])
    assert abs(first - 60) <= 2 and abs(last + 1 - 120) <= 10  # four shards come to the change one after the other


def test_nothing_is_shuffled_again_where_weights_change():
    order = lambda made: [d for d in map(made.draw, range(600)) if d.source == 0]
    plain, scheduled = (
        mixture({"short": 1, "long": 1}),
        mixture({"short": 1, "long": 1}, schedule=("20: short=3, long=1",)),
    )
    assert len(scheduled.phases) == 2
    both = list(zip(order(plain), order(scheduled)))
    assert len(both) > 250 and all(a == b for a, b in both)


def test_entries_of_the_schedule():
    assert change("1000: hc3=1, sharegpt=0.5") == (1000, {"hc3": 1.0, "sharegpt": 0.5})
    assert change("7:") == (7, {})


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"weigh": "bytes"}, "data.weigh: found 'bytes'; expected 'examples' or 'tokens'"),
        ({"schedule": ("soon: short=1",)}, "data.schedule: found 'soon: short=1'; expected 'STEP: name=weight"),
        ({"schedule": ("0: short=1, long=1",)}, "data.schedule: found '0: short=1, long=1'"),
        ({"schedule": ("9: short=much",)}, "data.schedule: found ' short=much'; expected 'name=number'"),
        ({"schedule": ("9: short=1, long=2", "9: short=1, long=3")}, "found step 9 after step 9; expected ascending"),
        ({"schedule": ("9: short=1",)}, "weights: found none for .'long'."),
        ({"max_epochs": ("other=1",)}, "max_epochs: found .'other'."),
        ({"temperature": 0.0}, "temperature: found 0"),
    ],
)
def test_what_does_not_fit(keys, message):
    with pytest.raises(InputError, match=message):
        mixture({"short": 1, "long": 1}, **keys)
