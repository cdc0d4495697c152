"""What gather_tiles and stitch_tiles share: corners, sizes, and checks of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from ._checks import as_integer, check_tensor, wrong

MOST_AXES = 3

Corners: TypeAlias = Tensor | Sequence[Sequence[int]]


def as_corners(op: str, corners: Corners, dims: int, device: torch.device) -> Tensor:
    """Return the corners as ``(T, dims)`` int64 on the device; TypeError or ValueError."""
    if not isinstance(corners, Tensor):
        if isinstance(corners, str) or not isinstance(corners, Sequence):
            got = type(corners).__name__
            raise TypeError(f"{op}: corners: expected a tensor or a sequence of corners, got {got}")
        rows = []
        for corner in corners:
            if not isinstance(corner, Sequence) or len(corner) != dims:
                raise wrong(op, "corners", f"{dims} numbers a tile", repr(corner))
            rows.append([as_integer(op, "corners", number) for number in corner])
        return torch.tensor(rows, dtype=torch.int64, device=device).reshape(-1, dims)
    check_tensor(op, "corners", corners)
    if corners.dtype != torch.int64:
        raise TypeError(f"{op}: corners: expected int64, got {corners.dtype}")
    if corners.dim() != 2 or corners.shape[1] != dims:  # noqa: PLR2004
        raise wrong(op, "corners", f"shape (T, {dims})", tuple(corners.shape))
    if corners.device not in (device, torch.device("cpu")):
        raise wrong(op, "corners", f"device {device} or cpu", corners.device)
    return corners.to(device)


def as_size(op: str, size: Sequence[int], dims: int) -> tuple[int, ...]:
    """Return one length for each spatial axis; TypeError or ValueError."""
    if not isinstance(size, Sequence):
        raise TypeError(f"{op}: size: expected {dims} integers, got {size!r}")
    lengths = tuple(as_integer(op, "size", length) for length in size)
    if len(lengths) != dims or any(length < 0 for length in lengths):
        raise wrong(op, "size", f"{dims} lengths, none below 0", lengths)
    return lengths


def wide(dtype: torch.dtype) -> torch.dtype:
    """In what is computed: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
