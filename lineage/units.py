"""Numbers as text with three digits and a unit."""

from __future__ import annotations


def _with_unit(value: float, units: tuple[str, ...]) -> str:
    """`value` in the largest fitting unit; each unit is a thousand times the one before it."""
    power = 0
    while float(f"{value:.3g}") >= 1000 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    digits = f"{value:,.0f}" if float(f"{value:.3g}") >= 1000 else f"{value:.3g}"
    return f"{digits} {units[power]}".strip()


def as_count(value: float) -> str:
    """1234567 -> `1.23 M`."""
    return _with_unit(value, ("", "k", "M", "G", "T"))


def as_seconds(value: float) -> str:
    """0.0123 -> `12.3 ms`."""
    return _with_unit(value * 1e3, ("ms", "s"))


def as_bytes(value: float) -> str:
    """1234567 -> `1.23 MB`."""
    return _with_unit(value, ("B", "kB", "MB", "GB", "TB"))
