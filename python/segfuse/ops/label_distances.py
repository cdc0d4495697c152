"""Distances to the nearest and second nearest label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from ._checks import wrong
from ._labels import (
    TESTED,
    as_labels,
    as_number,
    check_labels,
    distances_to,
    per_image,
    two_nearest,
    wide,
)

Spacing = float | Sequence[float]
LEAST, MOST = 1e-15, 1e15  # so that squares and their ratios are float64


def _reference(
    labels: Tensor, *, spacing: Spacing = 1.0, squared: bool = False, dims: int = 2
) -> tuple[Tensor, Tensor]:
    steps = _spacing(spacing, dims)
    results = per_image(labels, dims, lambda image: two_nearest(image, steps))
    if not results:
        shape = (0, 2, *labels.shape[1:])
        return labels.new_empty(shape, dtype=torch.float32), labels.new_empty(shape)
    distances = torch.stack([d if squared else d.sqrt() for d, _ in results])
    ids = torch.stack([i for _, i in results]).to(labels.dtype)
    if labels.dim() == dims:
        distances, ids = distances[0], ids[0]
    return distances.float(), ids


@defined_by(_reference)
def label_distances(
    labels: Tensor, *, spacing: Spacing = 1.0, squared: bool = False, dims: int = 2
) -> tuple[Tensor, Tensor]:
    """Find, for every pixel, the nearest label and the nearest of another label, and how far.

    The distances d1 and d2 of U-Net's weight map (Ronneberger, Fischer, Brox 2015, equation 2),
    and a Voronoi partition: ``ids[..., 0, :, :]`` is the label whose pixel is nearest.  Exact
    Euclidean distances between centres of pixels, in time linear in the pixels, whatever the number
    of labels: csrc/core/nearest.h has the algorithm and its proof.

    Args:
        labels: ``(*S)`` or ``(N, *S)``, any integer dtype; 0 is background and every other number
            a label, connected or not.
        spacing: of the pixels, a number or one an axis, 1e-15 to 1e15: distances are in its unit.
        squared: give squared distances.
        dims: the number of spatial axes, 1, 2 or 3.

    Returns:
        distances float32 and ids of ``labels``' dtype, both ``(N, 2, *S)`` or ``(2, *S)``,
        contiguous, the nearest first.  Within a label the first distance is 0 and its id that
        label.  Where there are fewer labels: infinity and id 0.  Of labels that are equally near
        any may be named, but each id lies at its distance.  Distances are within 1 ulp of the
        truth.

    Raises:
        ValueError: a shape that does not fit ``dims``, a spacing that is not above 0.
        TypeError: labels that are no integers.

    Limits: fewer than 2^28 pixels along an axis.  No gradient.  What is above 3.4e38, as squared
    distances may be, is infinity too, beside the label's id.  It needs scratch memory of 8 bytes
    a pixel (12 for int64), in three dimensions 24 (36); where the spacing is uneven, or the squares
    of the axes' pixels sum to 2^30 or more, 12 (16) and 36 (48).
    """
    op = "label_distances"
    axes = check_labels(op, labels, dims)
    steps = _spacing(spacing, axes)
    if runs_reference(op, labels):
        return _reference(labels, spacing=spacing, squared=squared, dims=axes)
    batch = labels if labels.dim() > axes else labels[None]
    z, y, x = (1.0, 1.0, steps[0]) if axes == 1 else (steps[0], steps[-2], steps[-1])
    distances, ids = torch.ops.segfuse.label_distances(batch, z, y, x, squared)
    return (distances, ids) if labels.dim() > axes else (distances[0], ids[0])


def _spacing(spacing: Spacing, dims: int) -> list[float]:
    op = "label_distances"
    several = isinstance(spacing, Sequence) and not isinstance(spacing, str)
    steps = list(spacing) if several else [spacing] * dims  # type: ignore[arg-type]
    if len(steps) != dims:
        raise wrong(op, "spacing", f"a number, or {dims} of them", repr(spacing))
    numbers = [as_number(op, "spacing", step, above=0, or_equal=False) for step in steps]
    if min(numbers) < LEAST or max(numbers) > MOST:
        raise wrong(op, "spacing", f"{LEAST:g} to {MOST:g}", repr(spacing))
    return numbers


def _fake(
    labels: Tensor,
    z: float,  # noqa: ARG001
    y: float,  # noqa: ARG001
    x: float,  # noqa: ARG001
    squared: bool,  # noqa: ARG001, FBT001
) -> tuple[Tensor, Tensor]:
    shape = (labels.shape[0], 2, *labels.shape[1:])
    return labels.new_empty(shape, dtype=torch.float32), labels.new_empty(shape)


def _at_their_ids(sample: Sample, result: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Distances, and those at which the ids lie in truth: equal wherever ids may differ.

    Infinity is -1, so that errors can be measured.
    """
    (labels,), options = sample.args, sample.kwargs
    dims = options.get("dims", 2)
    steps = _spacing(options.get("spacing", 1.0), dims)
    distances, ids = (t if labels.dim() > dims else t[None] for t in result)

    def lie(image: Tensor, ids: Tensor) -> Tensor:
        true = torch.full(ids.shape, torch.inf, dtype=torch.float64, device=ids.device)
        for label in wide(image).unique().tolist():
            if label != 0:
                own = distances_to(wide(image) == label, steps).expand(ids.shape)
                true = torch.where(wide(ids) == label, own, true)
        return true if options.get("squared") else true.sqrt()

    images = labels if labels.dim() > dims else labels[None]
    true = [lie(*both) for both in zip(images, ids, strict=True)]
    there = torch.stack(true) if true else ids.double()
    first, second = (wide(ids)[:, k] for k in (0, 1))
    twice = (first == second) & (first != 0)
    return (
        distances.nan_to_num(posinf=-1),
        there.float().nan_to_num(posinf=-1),
        twice,
    )


def _samples(make: Make) -> Iterator[Sample]:
    def case(name: str, labels: Tensor, **options: Any) -> Sample:
        return Sample((labels,), options, name)

    yield case("picture", as_labels(make, 13, 17))
    yield case("pictures, spacing", as_labels(make, 2, 11, 9), spacing=(0.5, 2.0))
    yield case("volume", as_labels(make, 5, 6, 7, share=0.05), dims=3)
    yield case("volumes, spacing", as_labels(make, 2, 4, 5, 6), dims=3, spacing=(3, 1, 0.7))
    yield case("signal", as_labels(make, 37), dims=1)
    yield case("squared", as_labels(make, 9, 70, share=0.02, ids=3), squared=True, spacing=0.5)
    yield case("signals", as_labels(make, 3, 41), dims=1, spacing=0.25, squared=True)
    yield case("dense", as_labels(make, 12, 15, share=1.0))
    yield case("one label", as_labels(make, 10, 9, ids=1))
    yield case("two labels", as_labels(make, 33, 70, share=0.004, ids=2))
    yield case("no label", as_labels(make, 6, 5, share=0))
    yield case("one pixel", as_labels(make, 1, 1, share=1))
    yield case("a row", as_labels(make, 1, 150, share=0.05))
    yield case("a column", as_labels(make, 150, 1, share=0.05))
    yield case("more than a thread's share", as_labels(make, 40, 230, share=0.003, ids=2))
    yield case("deep", as_labels(make, 40, 5, 6, share=0.01), dims=3)
    corners = as_labels(make, 12, 12, 96, share=0)
    corners[0, 9, 13] = corners[9, 0, 12] = 1  # as far from [0, 0, :], but for rounding
    yield case("rounding", corners, spacing=(0.1, 0.1, 1e-9), dims=3)
    yield case("empty batch", as_labels(make, 0, 4, 5))
    yield case("no pixels", as_labels(make, 2, 0, 4))


def _failures(make: Make) -> Iterator[tuple[Sample, type[Exception], str]]:
    labels = as_labels(make, 2, 5, 6)

    def on(*args: Any, **kwargs: Any) -> Sample:
        return Sample(args or (labels,), kwargs)

    yield on([1]), TypeError, "labels: expected a torch.Tensor, got list"
    yield on(labels.float()), TypeError, "labels: expected an integer dtype, got torch.float32"
    yield on(labels.bool()), TypeError, "labels: expected an integer dtype, got torch.bool"
    yield on(dims=4), ValueError, "dims: expected 1, 2 or 3, got 4"
    yield on(dims=1.5), TypeError, "dims: expected an integer, got 1.5"
    yield on(labels[None]), ValueError, "labels: expected 2 spatial axes (dims), with a batch's"
    yield on(labels[0, 0]), ValueError, "labels: expected 2 spatial axes (dims), with a batch's"
    yield on(spacing=0), ValueError, "spacing: expected a finite number above 0, got 0"
    yield on(spacing=1e-20), ValueError, "spacing: expected 1e-15 to 1e+15, got 1e-20"
    yield on(spacing=(1, float("nan"))), ValueError, "spacing: expected a finite number above 0"
    yield on(spacing=(1, 2, 3)), ValueError, "spacing: expected a number, or 2 of them, got (1, 2,"
    yield on(spacing="a"), TypeError, "spacing: expected a number, got 'a'"


def _benchmarks(make: Make) -> Iterator[Benchmark]:
    from scipy import ndimage  # noqa: PLC0415  (only to be timed)

    side = 512
    for cells in (10, 50):
        labels = discs(side, cells).to(make(0).device)

        def peer(labels: Tensor = labels) -> Tensor:
            """One transform a label, keeping the two nearest."""
            picture = labels.cpu().numpy()
            first = second = torch.full(labels.shape, torch.inf, dtype=torch.float64)
            for label in labels.unique().tolist()[1:]:
                own = torch.from_numpy(ndimage.distance_transform_edt(picture != label))
                second = torch.minimum(second, torch.maximum(first, own))
                first = torch.minimum(first, own)
            return torch.stack([first, second]).float()

        yield Benchmark(
            f"{side}^2, {cells} labels, fresh",
            ours=lambda labels=labels: label_distances(labels)[0],  # type: ignore[misc]
            peer=peer,
            bytes_moved=None,
        )


def discs(side: int, count: int) -> Tensor:
    """A square picture of discs, some of which touch."""
    generator = torch.Generator().manual_seed(count)
    radius = max(1.0, 0.35 * side / count**0.5)
    reach = int(radius) + 1
    labels = torch.zeros(side, side, dtype=torch.int32)
    for label, centre in enumerate((torch.rand(count, 2, generator=generator) * side).tolist(), 1):
        top, left = (max(0, int(c) - reach) for c in centre)
        part = labels[top : int(centre[0]) + reach + 1, left : int(centre[1]) + reach + 1]
        y, x = (torch.arange(n) + o for n, o in zip(part.shape, (top, left), strict=True))
        inside = (y[:, None] - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2
        part[inside] = label
    return labels


register(
    OpSpec(
        function=label_distances,
        kernels=(Kernel("label_distances", _fake),),
        samples=_samples,
        failures=_failures,
        benchmarks=_benchmarks,
        dtypes=TESTED,
        differentiable=False,
        comparable=_at_their_ids,
    )
)
