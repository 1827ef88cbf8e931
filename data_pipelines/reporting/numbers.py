"""Numbers and texts as they stand on the page."""

import datetime


def clipped(text: str, longest: int) -> str:
    """The beginning of a text, with how much more there is."""
    return text if len(text) <= longest else f"{text[:longest]} … ({number(len(text) - longest)} more characters)"


def number(value: int) -> str:
    return f"{value:,}".replace("-", "−")


def short(value: float) -> str:
    """Large numbers with three digits: 12.3 M."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit * 0.9995 and abs(value) >= 10_000:
            return f"{value / unit:.3g} {name}"
    return f"{value:,.0f}"


def power(value: int) -> str:
    """A power of two as at the axis of a picture: 2048 -> 2k."""
    for bits, name in ((30, "G"), (20, "M"), (10, "k")):
        if value >= 1 << bits:
            return f"{value >> bits}{name}"
    return str(value)


def share(value: float) -> str:
    """A share as per cent; never 0 or 100 % for what is not."""
    if value <= 0 or value >= 1:
        return f"{value * 100:.0f} %"
    if value < 0.001:
        return "< 0.1 %"
    if value > 0.999:
        return "> 99.9 %"
    return f"{value * 100:.1f} %" if value < 0.1 or value > 0.9 else f"{value * 100:.0f} %"


def size(count: int) -> str:
    """Bytes, in binary units."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} bytes"


def about(estimate: tuple[int, int]) -> str:
    """An estimate with its margin; an exact number without."""
    value, margin = estimate
    return f"≈ {short(value)} ± {share(margin / value) if value else '0'}" if margin else number(value)


def date(seconds: float) -> str:
    """A time of a file as a day, in UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()


def words(name: str) -> str:
    """A name of the code as words: empty_text -> empty text."""
    return name.replace("_", " ")
