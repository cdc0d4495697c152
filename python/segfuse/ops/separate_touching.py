"""Background between labels that touch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..registry import (
    Benchmark,
    Kernel,
    Make,
    OpSpec,
    Sample,
    defined_by,
    register,
    runs_reference,
)
from ._labels import TESTED, as_labels, check_labels, wide


def _reference(labels: Tensor, *, dims: int = 2) -> Tensor:
    numbers = wide(labels)
    if labels.dtype == torch.uint64:  # in the order of unsigned numbers
        numbers = numbers ^ torch.iinfo(torch.int64).min
    some = wide(labels) != 0
    cut = torch.zeros_like(numbers, dtype=torch.bool)
    axes = range(labels.dim() - dims, labels.dim())
    for steps in product((-1, 0, 1), repeat=dims):
        here, there = [slice(None)] * labels.dim(), [slice(None)] * labels.dim()
        for axis, step in zip(axes, steps, strict=True):
            here[axis] = slice(max(0, -step), labels.shape[axis] - max(0, step))
            there[axis] = slice(max(0, step), labels.shape[axis] - max(0, -step))
        if 0 in numbers[tuple(here)].shape:
            continue
        own, other = numbers[tuple(here)], numbers[tuple(there)]
        cut[tuple(here)] |= some[tuple(there)] & (other < own)
    kept = torch.where(cut, 0, wide(labels)).to(labels.dtype)
    return kept.clone(memory_format=torch.contiguous_format)


@defined_by(_reference)
def separate_touching(labels: Tensor, *, dims: int = 2) -> Tensor:
    """Put background between labels that touch.

    A pixel becomes 0 if and only if one of its 8 (in three dimensions 26) neighbours carries
    another label with a smaller id.  So no two labels stay neighbours, a straight contact gets a
    gap of one pixel, and the result turns with the picture.  The separation borders of Ronneberger,
    Fischer, Brox 2015, section 3, are made by morphology too, which the paper does not detail.

    Args:
        labels: ``(*S)`` or ``(N, *S)``, any integer dtype; 0 is background.
        dims: the number of spatial axes, 1, 2 or 3.

    Returns:
        Labels of the same shape and dtype, contiguous.

    Raises:
        ValueError: a shape that does not fit ``dims``.
        TypeError: labels that are no integers.

    Limits: a label that is one pixel wide may vanish between smaller ids.  No gradient.
    """
    op = "separate_touching"
    axes = check_labels(op, labels, dims)
    if runs_reference(op, labels):
        return _reference(labels, dims=axes)
    batch = labels if labels.dim() > axes else labels[None]
    result: Tensor = torch.ops.segfuse.separate_touching(batch)
    return result if labels.dim() > axes else result[0]


def _fake(labels: Tensor) -> Tensor:
    return labels.new_empty(labels.shape)


def _samples(make: Make) -> Iterator[Sample]:
    def case(name: str, *size: int, share: float = 0.8, ids: int = 4, dims: int = 2) -> Sample:
        return Sample((as_labels(make, *size, share=share, ids=ids),), {"dims": dims}, name)

    yield case("picture", 13, 17)
    yield case("pictures", 2, 9, 40)
    yield case("volume", 4, 5, 6, share=0.3, dims=3)
    yield case("volumes", 2, 4, 5, 6, share=0.2, dims=3)
    yield case("signal", 37, dims=1)
    yield case("signals", 3, 20, dims=1)
    yield case("many ids", 11, 19, ids=100)
    yield case("no background", 9, 8, share=1.0, ids=2)
    yield case("one pixel", 1, 1)
    yield case("a column", 30, 1)
    yield case("more than a thread's share", 130, 700, share=0.4)
    yield case("empty batch", 0, 4, 5)
    yield case("no pixels", 2, 0, 4)


def _failures(make: Make) -> Iterator[tuple[Sample, type[Exception], str]]:
    labels = as_labels(make, 2, 5, 6)

    def on(*args: Any, **kwargs: Any) -> Sample:
        return Sample(args or (labels,), kwargs)

    yield on("a"), TypeError, "labels: expected a torch.Tensor, got str"
    yield on(labels.half()), TypeError, "labels: expected an integer dtype, got torch.float16"
    yield on(dims=0), ValueError, "dims: expected 1, 2 or 3, got 0"
    yield on(dims=1), ValueError, "labels: expected 1 spatial axes (dims), with a batch's axis or"


def _benchmarks(make: Make) -> Iterator[Benchmark]:
    from .label_distances import discs  # noqa: PLC0415

    labels = discs(1024, 400).to(make(0).device)
    yield Benchmark(
        "1024^2, 400 labels, fresh",
        ours=lambda: separate_touching(labels),
        peer=lambda: _reference(labels),
        bytes_moved=2 * labels.numel() * labels.element_size(),
    )


register(
    OpSpec(
        function=separate_touching,
        kernels=(Kernel("separate_touching", _fake),),
        samples=_samples,
        failures=_failures,
        benchmarks=_benchmarks,
        dtypes=TESTED,
        exact=True,
        differentiable=False,
    )
)
