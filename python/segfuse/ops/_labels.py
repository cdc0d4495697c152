"""What operators on labels share: their axes, ignored ids, and the distances that define them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..registry import Make
from ._checks import as_integer, check_tensor, wrong

INTEGERS = (
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
)
TESTED = (torch.uint8, torch.int64, torch.int32)  # by generated tests; the rest by one of their own
MOST_AXES = 3
MOST_IGNORED = 8

Ids: TypeAlias = int | Sequence[int]


def check_labels(op: str, labels: object, dims: object) -> int:
    """Return the number of spatial axes; TypeError or ValueError."""
    check_tensor(op, "labels", labels)
    assert isinstance(labels, Tensor)  # noqa: S101  (what was just checked, for the type checker)
    if labels.dtype not in INTEGERS:
        raise TypeError(f"{op}: labels: expected an integer dtype, got {labels.dtype}")
    axes = as_integer(op, "dims", dims)
    if not 1 <= axes <= MOST_AXES:
        raise wrong(op, "dims", "1, 2 or 3", axes)
    if labels.dim() != axes and labels.dim() != axes + 1:
        expected = f"{axes} spatial axes (dims), with a batch's axis or without"
        raise wrong(op, "labels", expected, f"shape {tuple(labels.shape)}")
    return axes


def as_ids(op: str, ids: Ids | None, dtype: torch.dtype) -> list[int]:
    """Return the ids that labels of a dtype can have; TypeError or ValueError."""
    if ids is None:
        return []
    several = isinstance(ids, Sequence) and not isinstance(ids, str)
    numbers = [as_integer(op, "ignore_index", i) for i in (ids if several else [ids])]  # type: ignore[union-attr]
    if len(numbers) > MOST_IGNORED:
        raise wrong(op, "ignore_index", f"at most {MOST_IGNORED} ids", len(numbers))
    span = torch.iinfo(dtype)
    return [number for number in numbers if span.min <= number <= span.max]


def as_number(op: str, argument: str, value: object, *, above: float, or_equal: bool) -> float:
    """Return a finite number that is above a limit; TypeError or ValueError."""
    symbolic = isinstance(value, (torch.SymFloat, torch.SymInt))  # in a trace
    if not (symbolic or isinstance(value, Real)) or isinstance(value, bool):
        raise TypeError(f"{op}: {argument}: expected a number, got {value!r}")
    number = float(value)  # type: ignore[arg-type]
    if not (above < number < math.inf or (or_equal and number == above)):
        limit = f"a finite number {'of at least' if or_equal else 'above'} {above:g}"
        raise wrong(op, argument, limit, value)
    return number


def wide(labels: Tensor) -> Tensor:
    """As int64, which PyTorch computes with; what is above it wraps, and ids stay distinct."""
    return labels.to(torch.int64)


def distances_to(features: Tensor, spacing: Sequence[float]) -> Tensor:
    """Squared distances from each element to the nearest that is true, float64; inf for none."""
    squared = torch.full(features.shape, torch.inf, dtype=torch.float64, device=features.device)
    squared[features] = 0
    for axis, step in enumerate(spacing):
        n = features.shape[axis]
        place = torch.arange(n, dtype=torch.float64, device=features.device) * step
        lines = squared.movedim(axis, -1)
        across = lines.unsqueeze(-2) + (place[:, None] - place).square()
        squared = across.amin(-1).movedim(-1, axis) if n else squared
    return squared


def two_nearest(labels: Tensor, spacing: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Squared distances (2, *S) in float64 and ids of an image's two nearest labels: one transform
    a label.
    """  # noqa: D205
    distances = torch.full((2, *labels.shape), torch.inf, dtype=torch.float64, device=labels.device)
    ids = torch.zeros((2, *labels.shape), dtype=torch.int64, device=labels.device)
    for label in wide(labels).unique().tolist():
        if label == 0:
            continue
        own = distances_to(wide(labels) == label, spacing)
        nearest, second = own < distances[0], own < distances[1]
        distances[1] = torch.where(nearest, distances[0], torch.where(second, own, distances[1]))
        ids[1] = torch.where(nearest, ids[0], torch.where(second, label, ids[1]))
        distances[0] = torch.where(nearest, own, distances[0])
        ids[0] = torch.where(nearest, label, ids[0])
    return distances, ids


def per_image(labels: Tensor, dims: int, function: Callable[[Tensor], Any]) -> list[Any]:
    """Call a function with each image."""
    return [function(image) for image in (labels if labels.dim() > dims else labels[None])]


def as_labels(make: Make, *size: int, share: float = 0.1, ids: int = 9) -> Tensor:
    """Samples' labels: a share of the pixels in ids 1 to `ids`, of the dtype that `make` has.

    Floats stand for int32, since every operator is traced with samples of float32.
    """
    numbers = make(*size)
    dtype = torch.int32 if numbers.is_floating_point() else numbers.dtype
    generator = torch.Generator().manual_seed(sum(size) + ids)
    chosen = torch.rand(size, generator=generator) < share
    labels = torch.randint(1, ids + 1, size, generator=generator) * chosen
    return labels.to(dtype).to(numbers.device)
