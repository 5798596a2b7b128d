"""Sizes and durations as people write them on a command line."""

from __future__ import annotations

import re
from typing import Any

import click

from blockrepl.units import parse_size

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SECONDS_MAX = 36500 * 86400  # from now, instants in ns still fit 63 bits, and a calendar


class SizeType(click.ParamType[int]):
    """Bytes, with an optional K, M, G or T (powers of 1024)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        size = parse_size(str(value))
        if size is None:
            self.fail(f"{value!r} is not a size; write 10G, 512M or a number of bytes", param, ctx)
        return size


class RateType(SizeType):
    """Bytes per second: a size, with or without /s."""

    name = "rate"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        size = value.strip().removesuffix("/s") if isinstance(value, str) else value
        return super().convert(size, param, ctx)


class Duration(click.ParamType[float]):
    """``90s``, ``15m``, ``1h``, ``7d``: seconds, of a hundred years at the most."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d{1,9})([smhdw])", str(value))
        if match is None or not int(match[1]):
            self.fail(f"{value!r} is no duration; write 90s, 15m, 1h or 7d", param, ctx)
        seconds = int(match[1]) * _SECONDS[match[2]]
        if seconds > _SECONDS_MAX:
            self.fail(f"{value!r} is too long; at most 36500d", param, ctx)
        return float(seconds)
