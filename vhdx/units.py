# SPDX-License-Identifier: MIT
"""Sizes in binary units, as people write and read them."""

from __future__ import annotations

import re

from vhdx.errors import InvalidArgumentError

__all__ = ["GIB", "KIB", "MIB", "TIB", "format_size", "parse_size", "round_up"]

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTPE]?)(?:I?B)?", re.ASCII | re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}


def parse_size(text: str) -> int:
    """Bytes of a size such as ``64G``, ``512M``, ``1.5T`` or ``4096``; units are binary.

    Raises:
        InvalidArgumentError: the text is not a size, or not a whole number of bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise InvalidArgumentError(f"{text!r} is not a size", hint="write 64G, 512M or 4096")
    whole, _, fraction = match[1].partition(".")
    unit: int = 1 << 10 * _POWERS[match[2].upper()]
    value, rest = divmod(int(whole + fraction) * unit, 10 ** len(fraction))
    if rest:
        raise InvalidArgumentError(f"{text!r} is not a whole number of bytes")
    return int(value)


def format_size(size: int) -> str:
    """``size`` bytes with at most one decimal in the largest unit that fits."""
    unit = 0
    while size >= 1024 ** (unit + 1) and unit < 6:
        unit += 1
    if unit == 0:
        return f"{size} B"
    text = f"{size / 1024**unit:.1f}".removesuffix(".0")
    return f"{text} {'KMGTPE'[unit - 1]}iB"


def round_up(value: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple
