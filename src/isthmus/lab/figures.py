"""Figures as people read them."""

DASH = "–"  # where there is no number


def rate_text(rate: float | None) -> str:
    """A fraction in percent, without the sign."""
    return DASH if rate is None else f"{100 * rate:.2f}"


def interval_text(bounds: tuple[float, float] | None) -> str:
    """Bounds of a rate in percent, without the sign."""
    return DASH if bounds is None else between(100 * bounds[0], 100 * bounds[1], digits=1)


def between(low: float, high: float, digits: int) -> str:
    """Two bounds: 1.2–3.4, but -1.2 to 3.4, where a dash would be read as one more minus."""
    return f"{low:.{digits}f}{' to ' if min(low, high) < 0 else DASH}{high:.{digits}f}"


def count_text(number: int) -> str:
    """3 digits: 412, 17.3 M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size * 0.9995:
            return f"{number / size:.3g} {unit}"
    return str(number)


def duration_text(seconds: float) -> str:
    """Two largest units: 1 h 12 min, 3 min 5 s."""
    return " ".join(f"{number} {unit}" for number, unit in _largest_units(seconds))


def duration_html(seconds: float) -> str:
    """Two largest units, as HTML."""
    return " ".join(f"{number}<small>{unit}</small>" for number, unit in _largest_units(seconds))


def _largest_units(seconds: float) -> list[tuple[int, str]]:
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    pairs = [(hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((place for place, (number, _) in enumerate(pairs) if number), 2)
    return [pair for pair in pairs[first : first + 2] if pair[0] or len(pairs[first:]) == 1]
