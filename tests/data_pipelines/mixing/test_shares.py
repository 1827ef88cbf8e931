"""Weights become whole numbers, by T5's temperature and by tokens."""

import math

import pytest

from data_pipelines.mixing.shares import MAX_CYCLE, example_weights, integer_weights, turn_limits

KOALA = {
    "sharegpt": 30_000,
    "hc3": 87_000,
    "oig": 30_000,
    "alpaca": 52_000,
    "hh": 160_000,
    "webgpt": 20_000,
    "summary": 93_000,
}


def whole(*weights, **options):
    return integer_weights(
        {str(i): 3 for i in range(len(weights))}, {str(i): w for i, w in enumerate(weights)}, **options
    )


def test_weights_become_integers():
    assert whole(0.3, 0.7) == [3, 7]
    assert whole(10, 20) == [1, 2]
    assert whole(0.1, 1e-6) == [100_000, 1]
    assert whole(2, 0, 4, partial=True) == [1, 0, 2]
    rounded = whole(1.0, 3.14159265358979, 1e-9)
    assert rounded[2] == 1 and sum(rounded) <= MAX_CYCLE
    assert rounded[1] / rounded[0] == pytest.approx(3.14159265358979, rel=1e-4)
    assert whole(1.0, 3.14159265358979, 0, partial=True)[2] == 0
    assert integer_weights({"a": 2**40, "b": 3 * 2**40}, {}) == [1, 3]


@pytest.mark.parametrize("temperature", (0.5, 1.5, 2, 3.3, 10, 1000))
@pytest.mark.parametrize("weights", ({}, dict(zip(KOALA, (3, 0.5, 1, 1.25, 2, 0.01, 1)))))
def test_temperature_is_that_of_t5(temperature, weights):
    powers = [(weights.get(name, size)) ** (1 / temperature) for name, size in KOALA.items()]
    found = integer_weights(KOALA, weights, temperature)
    rounding = 0.5e-5 + 1e-12
    assert [w / sum(found) for w in found] == pytest.approx([p / sum(powers) for p in powers], abs=2 * rounding)
    wrong = [(weights.get(name, size)) ** (0.5 / temperature) for name, size in KOALA.items()]
    assert max(abs(w / sum(found) - p / sum(wrong)) for w, p in zip(found, wrong)) > 4 * rounding


def test_temperatures_at_the_ends():
    assert integer_weights(KOALA, {}, 1) == [30, 87, 30, 52, 160, 20, 93]
    assert integer_weights(KOALA, {}, math.inf) == integer_weights(KOALA, {}, 1e300) == [1] * 7
    assert integer_weights(KOALA, {}, 5e-324) == [1, 1, 1, 1, 100_000, 1, 1]
    assert whole(4, 0, 1, temperature=math.inf, partial=True) == [1, 0, 1]
    assert whole(4, 0, 1, temperature=2, partial=True) == [2, 0, 1]


def test_weights_by_tokens_are_divided_by_lengths():
    assert example_weights({"a": 3, "b": 1, "c": 0}, {"a": 300, "b": 50}) == {"a": 0.01, "b": 0.02, "c": 0.0}
    by_tokens = {"a": 0.7, "b": 0.2, "c": 0.1}
    lengths = {"a": 613.7, "b": 91.25, "c": 1788.0}
    cycle = integer_weights(
        KOALA | dict.fromkeys("abc", 9), example_weights(by_tokens, lengths) | dict.fromkeys(KOALA, 1e-9)
    )
    tokens = [w * n for w, n in zip(cycle[-3:], lengths.values())]
    assert [t / sum(tokens) for t in tokens] == pytest.approx(list(by_tokens.values()), abs=2e-4)
    for weights, means, message in [
        ({"a": 1}, {}, "found none for \\['a'\\]"),
        ({"a": 1}, {"a": 0}, "'a': 0"),
        ({"a": 1}, {"a": math.nan}, "nan"),
        ({"a": -1}, {"a": 1}, "'a': -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            example_weights(weights, means)


def test_limits_are_whole_examples():
    assert turn_limits({"a": 10, "b": 7, "c": 1}, {"a": 0.29, "b": 2}) == {"a": 2, "b": 14}
    assert turn_limits({"a": 100}, {"a": 0.29}) == {"a": 29}  # 0.29 * 100 is 28.999...
    for limits, message in [({"x": 1}, "\\['x'\\]"), ({"a": 0}, "'a': 0"), ({"a": math.inf}, "inf")]:
        with pytest.raises(ValueError, match=message):
            turn_limits({"a": 1}, limits)


def test_what_is_no_weight_is_named():
    for weights, options, message in [
        ((1, 0), {}, "found none for \\['1'\\]"),
        ((1, -1), {}, "'1': -1"),
        ((1, math.inf), {}, "inf"),
        ((1, 2), {"temperature": 0}, "temperature: found 0"),
        ((1, 2), {"temperature": math.nan}, "temperature: found nan"),
    ]:
        with pytest.raises(ValueError, match=message):
            whole(*weights, **options)
    with pytest.raises(ValueError, match=r"found none for \['b'\]; .*0: it has no share"):
        integer_weights({"a": 1, "b": 1}, {"a": 1}, partial=True)
