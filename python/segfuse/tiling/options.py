"""The options of a prediction, checked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Integral
from typing import Any

__all__ = ["Asked", "overlaps", "wrong"]

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_CHOICES = {
    "output": ("labels", "scores", "probabilities"),
    "border": ("mirror", "symmetric", "edge", "constant"),
    "blend": (None, "gaussian", "hann"),
    "augment": (None, "d4"),
}


@dataclass(frozen=True)
class Asked:
    """The options of `segfuse.predict`, checked.

    Raises:
        ValueError: one out of its range, or two that contradict each other.
    """

    output: str = "labels"
    border: str = "mirror"
    tile: int | Sequence[int] | str = "auto"
    memory: Any = None
    batch: int | str = "auto"
    blend: str | None = None
    overlap: float | Sequence[int] | None = None
    augment: str | None = None
    margin: int | Sequence[int] | None = None
    stride: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                listed = ", ".join(map(str, choices))
                raise wrong(name, f"one of {listed}", getattr(self, name))
        several = self.tile if isinstance(self.tile, (list, tuple)) else [self.tile]
        for name, numbers in (("tile", several), ("batch", [self.batch])):
            value = getattr(self, name)
            if value != "auto" and not all(map(_is_count, numbers)):
                raise wrong(name, "'auto' or integers from 1 on", value)
        if self.memory is not None:
            object.__setattr__(self, "memory", _bytes(self.memory))
        for name, contradiction, wanted in (
            ("blend", self.overlap is None or self.tile == "auto", "a tile and an overlap with it"),
            ("overlap", not self.blend, "blend with it: exact tiles overlap as they must"),
            ("margin", self.blend, "no blend with it"),
            ("stride", self.margin is None, "a margin with it"),
        ):
            if getattr(self, name) is not None and contradiction:
                raise wrong(name, wanted, getattr(self, name))


def overlaps(overlap: Any, tile: Sequence[int]) -> tuple[int, ...]:
    """Pixels, an axis, from a share, a number of pixels, or one an axis."""
    each = [overlap] * len(tile) if isinstance(overlap, (int, float)) else list(overlap)
    found = []
    for value, length in zip(each, tile, strict=False):
        if not isfinite(value):
            raise wrong("overlap", f"a share or pixels, below the tile {tuple(tile)}", overlap)
        pixels = int(value * length) if isinstance(value, float) else value
        found.append(pixels)
    if len(each) != len(tile) or any(
        not 0 <= pixels < length for pixels, length in zip(found, tile, strict=True)
    ):
        raise wrong("overlap", f"a share or pixels, below the tile {tuple(tile)}", overlap)
    return tuple(found)


def _bytes(memory: Any) -> int:
    """Turn 2**30, "1.5GB" or "800 MiB" into bytes, the units being powers of 1024."""
    if _is_count(memory):
        return int(memory)
    text = str(memory).strip().lower()
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*([kmgt]?)(?:i?b)?", text)
    if isinstance(memory, str) and found and (size := float(found[1]) * _UNITS[found[2]]) >= 1:
        return int(size)
    raise wrong("memory", 'bytes or a text such as "1.5GB"', memory)


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def wrong(name: str, wanted: str, value: Any) -> ValueError:
    """An error that names the option, what it may be and what it was."""
    return ValueError(f"predict: {name}: expected {wanted}, got {value!r}")
