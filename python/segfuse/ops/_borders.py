"""What lies beyond an image's border, for operators that read there: csrc/core/border.h."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ..registry import FLOATING
from ._checks import wrong

Border: TypeAlias = Literal["mirror", "symmetric", "edge", "wrap", "constant"]
BORDERS = ("mirror", "symmetric", "edge", "wrap", "constant")  # as csrc numbers them
INTEGERS = (
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
)
CONSTANT = BORDERS.index("constant")


def source(place: Tensor, n: int, border: str) -> Tensor:
    """Return the elements of an axis at these places; of a constant border, its nearest."""
    if border in ("edge", "constant") or n == 1:
        return place.clamp(0, n - 1)
    if border == "wrap":
        return place.remainder(n)
    last = 2 * n - 1 if border == "symmetric" else 2 * n - 2
    there = place.remainder(2 * n if border == "symmetric" else last)
    return torch.minimum(there, last - there)


def check_border(op: str, border: object) -> None:
    """ValueError unless the name of a border."""
    if border not in BORDERS:
        raise wrong(op, "border", f"one of {', '.join(BORDERS)}", repr(border))


def check_fill(op: str, fill: object, dtype: torch.dtype) -> None:
    """TypeError unless a number, ValueError unless an integer dtype holds it."""
    if not isinstance(fill, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{op}: fill: expected a number, got {fill!r}")
    if dtype in FLOATING:
        return
    low, high = (0, 1) if dtype == torch.bool else _range(dtype)
    if not low <= fill <= high or fill != int(fill) or float(fill) != fill:
        raise wrong(op, "fill", f"an integer that {dtype} and float64 hold", fill)


def _range(dtype: torch.dtype) -> tuple[int, int]:
    limits = torch.iinfo(dtype)
    return limits.min, limits.max
