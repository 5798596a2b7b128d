"""Sizes as people write them on a command line."""

from __future__ import annotations

from typing import Any

import click

from blockrepl.units import parse_size


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
