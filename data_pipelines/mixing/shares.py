"""How large a part of a mixture each source is: weights as people write them, made whole numbers.

Weights are taken as the decimal numbers they are written as and brought to integers exactly (0.3 and 0.7 become 3
and 7); if their sum, the length of a cycle, would be above MAX_CYCLE they are rounded to shares of 1/100,000, and none
to zero.

Temperature T is that of T5 (Raffel et al., "Exploring the limits of transfer learning with a unified text-to-text
transformer", JMLR 21 (2020), section 3.5.2): the share of a source is in proportion to r^(1/T), r being its weight or
its size. 1 leaves weights as they are, above 1 small sources gain, and at infinity all are equal. Roots are taken in
decimal arithmetic, which gives the same digits on every machine.
"""

import decimal
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from data_pipelines.errors import InputError

MAX_CYCLE = 1 << 20
_ROUNDED_CYCLE = 100_000
_SMALLEST = decimal.Decimal("1e-40")  # of a weight after temperature, in parts of the largest
_DECIMALS = decimal.Context(prec=60, traps=[decimal.InvalidOperation, decimal.DivisionByZero])


def integer_weights(
    sizes: Mapping[str, int], weights: Mapping[str, float], temperature: float = 1.0, partial: bool = False
) -> list[int]:
    """Whole weights in the order of the sources, without a common divisor.

    Without weights (absent or 0 for every source) a source weighs its size, so that all of them are read once in the
    same number of draws. Weights for some sources only are an error, since no common scale is given; where `partial`
    is true a source of weight 0 has no share, but the 0 has to be written.
    """
    if not temperature > 0:
        raise InputError(f"temperature: found {temperature}; expected a number above 0, or inf")
    return _whole(_tempered(_numbers(sizes, weights, partial), temperature))


def example_weights(token_weights: Mapping[str, float], mean_tokens: Mapping[str, float]) -> dict[str, float]:
    """Weights by examples that mix tokens in proportion to `token_weights`: sources of long examples are drawn less
    often. mean_tokens: of an example of each source, measured with the tokenizer and template of the run."""
    if wrong := {name: w for name, w in token_weights.items() if not 0 <= w < math.inf}:
        raise InputError(f"weights by tokens: found {wrong}; expected finite numbers of at least 0")
    if missing := [name for name, weight in token_weights.items() if weight and name not in mean_tokens]:
        raise InputError(f"mean tokens of an example: found none for {missing}; expected one for every source")
    means = {name: mean_tokens[name] for name, weight in token_weights.items() if weight}
    if wrong := {name: mean for name, mean in means.items() if not 0 < mean < math.inf}:
        raise InputError(f"mean tokens of an example: found {wrong}; expected finite numbers above 0")
    return {name: weight / mean_tokens[name] if weight else 0.0 for name, weight in token_weights.items()}


def turn_limits(sizes: Mapping[str, int], max_epochs: Mapping[str, float]) -> dict[str, int]:
    """How often a source may be drawn at most, of those that have a limit."""
    if unknown := [name for name in max_epochs if name not in sizes]:
        raise InputError(f"max_epochs: found {unknown}; expected names among {list(sizes)}")
    if wrong := {name: epochs for name, epochs in max_epochs.items() if not 0 < epochs < math.inf}:
        raise InputError(f"max_epochs: found {wrong}; expected finite numbers above 0")
    return {name: math.floor(Fraction(str(epochs)) * sizes[name]) for name, epochs in max_epochs.items()}


def _numbers(sizes: Mapping[str, int], weights: Mapping[str, float], partial: bool) -> list[Fraction]:
    """Weights in the order of the sources, or their sizes where no source has one."""
    if unknown := [name for name in weights if name not in sizes]:
        raise InputError(f"weights: found {unknown}; expected names among {list(sizes)}")
    if wrong := {name: w for name, w in weights.items() if not (0 <= w < math.inf)}:
        raise InputError(f"weights: found {wrong}; expected finite numbers of at least 0")
    if not any(weights.values()):
        return [Fraction(size) for size in sizes.values()]
    if missing := [name for name in sizes if (name not in weights if partial else not weights.get(name))]:
        expected = "one for every source (0: it has no share)" if partial else "one for every source, or for none"
        raise InputError(f"weights: found none for {missing}; expected {expected}")
    return [Fraction(str(weights[name])) for name in sizes]


def _tempered(numbers: Sequence[Fraction], temperature: float) -> Sequence[Fraction]:
    """Numbers to the power 1 / temperature, in parts of the largest; no number above 0 becomes 0."""
    if temperature == 1:
        return numbers
    if temperature == math.inf:
        return [Fraction(number > 0) for number in numbers]
    power = _DECIMALS.divide(decimal.Decimal(1), decimal.Decimal(str(temperature)))
    return [_power(number / max(numbers), power) for number in numbers]


def _power(part: Fraction, power: decimal.Decimal) -> Fraction:
    if part == 0:
        return part
    exact = _DECIMALS.power(_DECIMALS.divide(part.numerator, part.denominator), power)
    return Fraction(max(_SMALLEST, exact.quantize(_SMALLEST, context=_DECIMALS)))


def _whole(numbers: Sequence[Fraction]) -> list[int]:
    scale = math.lcm(*(number.denominator for number in numbers))
    exact = [int(number * scale) for number in numbers]
    if sum(exact) // math.gcd(*exact) > MAX_CYCLE:
        total = sum(exact)
        exact = [weight and max(1, round(Fraction(weight * _ROUNDED_CYCLE, total))) for weight in exact]
    divisor = math.gcd(*exact)
    return [weight // divisor for weight in exact]
