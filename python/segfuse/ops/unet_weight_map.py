"""U-Net's weight maps, which teach a network the gaps between touching cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

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
from ._checks import check_out, wrong
from ._labels import (
    TESTED,
    Ids,
    as_ids,
    as_labels,
    as_number,
    check_labels,
    per_image,
    two_nearest,
    wide,
)

ClassWeight: TypeAlias = Literal["balanced"] | Sequence[float] | None


def _gaussian(distance: Tensor, sigma: float) -> Tensor:
    return torch.exp(-distance.square() / (2 * sigma**2))


def _cells(image: Tensor, ignored: list[int]) -> tuple[Tensor, Tensor]:
    """An image's labels without those that are ignored, and where these are."""
    labels = wide(image)
    skipped = torch.zeros_like(labels, dtype=torch.bool)
    for number in ignored:
        skipped |= labels == wide(torch.tensor(number, dtype=image.dtype, device=image.device))
    return labels.masked_fill(skipped, 0), skipped


def _collect(labels: Tensor, dims: int, maps: list[Tensor], out: Tensor | None) -> Tensor:
    empty = labels.new_empty(labels.shape, dtype=torch.float32)
    result = torch.stack(maps).float() if maps else empty
    result = result if labels.dim() > dims else result[0]
    return result if out is None else out.copy_(result)


def _reference(
    labels: Tensor,
    *,
    w0: float = 10.0,
    sigma: float = 5.0,
    class_weight: ClassWeight = "balanced",
    border_on: Literal["background", "all"] = "background",
    dims: int = 2,
    ignore_index: Ids | None = None,
    out: Tensor | None = None,
) -> Tensor:
    ignored = as_ids("unet_weight_map", ignore_index, labels.dtype)

    def one(image: Tensor) -> Tensor:
        cells, skipped = _cells(image, ignored)
        background, cell = _class_weight(class_weight) or (1.0, 1.0)
        if isinstance(class_weight, str):
            some = int((cells != 0).sum())
            none = cells.numel() - int(skipped.sum()) - some
            if some and none:
                background, cell = (some + none) / (2 * none), (some + none) / (2 * some)
        squared, _ = two_nearest(cells, [1.0] * dims)
        border = w0 * _gaussian(squared.sqrt().sum(0), sigma)
        if border_on == "background":
            border = border.masked_fill(cells != 0, 0.0)
        classes = torch.where(cells == 0, background, cell).double()
        return (classes + border).masked_fill(skipped, 0.0)

    return _collect(labels, dims, per_image(labels, dims, one), out)


@defined_by(_reference)
def unet_weight_map(
    labels: Tensor,
    *,
    w0: float = 10.0,
    sigma: float = 5.0,
    class_weight: ClassWeight = "balanced",
    border_on: Literal["background", "all"] = "background",
    dims: int = 2,
    ignore_index: Ids | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Weigh each pixel so that a network learns to separate touching cells.

    ``w_c + w0 exp(-(d1 + d2)^2 / (2 sigma^2))``, equation 2 of Ronneberger, Fischer, Brox 2015: d1
    and d2 are the distances to the nearest and second nearest cell, w_c balances the classes.  In
    time linear in the pixels, whatever the number of cells; the last axis's distances are never
    stored (:func:`segfuse.ops.label_distances` gives them).

    Args:
        labels: cells by ids, ``(*S)`` or ``(N, *S)``, any integer dtype, 0 is background.
        w0: the largest weight of a border, at least 0.
        sigma: of its fall, in pixels, above 0.
        class_weight: w_c: "balanced", ``P / (2 P_c)`` for background and cells, P pixels of an
            image that are not ignored, P_c those of the class; 1 where a class is absent.  Or the
            weights of background and cells; or None, 1.
        border_on: where the border's term is added: on the "background", as the paper's figure 3d
            shows it, or on "all" pixels, as its equation says; within a cell d1 is 0.
        dims: the number of spatial axes, 1, 2 or 3.
        ignore_index: an id, or up to 8, of pixels that weigh 0 and are no cell.
        out: where to write the result, float32 of its shape, on its device, of any strides.

    Returns:
        float32, of ``labels``' shape, contiguous.  With fewer than two cells the border's term is
        0.

    Raises:
        ValueError: a shape that does not fit ``dims``, a number out of range, or an ``out`` that
            cannot be written to.
        TypeError: labels that are no integers.

    Limits: distances are between centres of pixels.  A border's term too small to change the sum in
    float32 is 0.  Fewer than 2^28 pixels along an axis, 2^30 images.  Scratch memory as
    :func:`segfuse.ops.label_distances` needs it.
    """
    op = "unet_weight_map"
    axes = check_labels(op, labels, dims)
    w0 = as_number(op, "w0", w0, above=0, or_equal=True)
    sigma = as_number(op, "sigma", sigma, above=0, or_equal=False)
    pair = _class_weight(class_weight)
    if border_on not in ("background", "all"):
        raise wrong(op, "border_on", "background or all", repr(border_on))
    ignored = as_ids(op, ignore_index, labels.dtype)
    if out is not None:
        check_out(op, out, labels.shape, labels.new_empty(0, dtype=torch.float32), labels=labels)
    if runs_reference(op, labels):
        return _reference(
            labels,
            w0=w0,
            sigma=sigma,
            class_weight=class_weight,
            border_on=border_on,
            dims=axes,
            ignore_index=ignored,
            out=out,
        )
    background, cell = pair or (1.0, 1.0)
    balanced = pair is None and class_weight is not None
    numbers = (w0, sigma, None, 1.0, background, cell, balanced, border_on == "all", ignored)
    return _run(labels, axes, numbers, out)


def _run(labels: Tensor, dims: int, numbers: tuple[Any, ...], out: Tensor | None) -> Tensor:
    batch = labels if labels.dim() > dims else labels[None]
    if out is not None:
        target = out if labels.dim() > dims else out[None]
        torch.ops.segfuse.unet_weight_map_out(batch, *numbers, target)
        increment_version(out)
        return out
    result: Tensor = torch.ops.segfuse.unet_weight_map(batch, *numbers)
    return result if labels.dim() > dims else result[0]


def _class_weight(weights: ClassWeight) -> tuple[float, float] | None:
    op, argument = "unet_weight_map", "class_weight"
    if weights is None or (isinstance(weights, str) and weights == "balanced"):
        return None
    if isinstance(weights, str) or not isinstance(weights, Sequence) or len(weights) != 2:  # noqa: PLR2004
        raise wrong(op, argument, '"balanced", None or two numbers', repr(weights))
    background, cell = (as_number(op, argument, w, above=0, or_equal=True) for w in weights)
    return background, cell


def _fake(labels: Tensor, *_numbers: Any) -> Tensor:
    return labels.new_empty(labels.shape, dtype=torch.float32)


def _fake_out(labels: Tensor, *numbers_and_out: Any) -> None:
    pass


def _reference_2019(
    labels: Tensor,
    *,
    border: float = 50.0,
    sigma: float = 6.0,
    ratio: float = 0.1,
    sigma1: float = 10.0,
    dims: int = 2,
    ignore_index: Ids | None = None,
    out: Tensor | None = None,
) -> Tensor:
    ignored = as_ids("unet_weight_map_2019", ignore_index, labels.dtype)

    def one(image: Tensor) -> Tensor:
        cells, skipped = _cells(image, ignored)
        squared, _ = two_nearest(cells, [1.0] * dims)
        first, both = squared[0].sqrt(), squared.sqrt().sum(0)
        background = ratio + border * _gaussian(both, sigma)
        background += (1 - ratio) * _gaussian(first, sigma1)
        return torch.where(cells == 0, background, 1.0).masked_fill(skipped, 0.0)

    return _collect(labels, dims, per_image(labels, dims, one), out)


@defined_by(_reference_2019)
def unet_weight_map_2019(
    labels: Tensor,
    *,
    border: float = 50.0,
    sigma: float = 6.0,
    ratio: float = 0.1,
    sigma1: float = 10.0,
    dims: int = 2,
    ignore_index: Ids | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Weigh each pixel as U-Net's authors did later, for one class of objects.

    1 in objects, and on background ``ratio + border exp(-(d1 + d2)^2 / (2 sigma^2)) + (1 - ratio)
    exp(-d1^2 / (2 sigma1^2))``: besides the gaps, the surroundings of objects count more than what
    lies far from all (Falk et al., U-Net: deep learning for cell counting, detection, and
    morphometry, Nature Methods 2019, Supplementary Note 2).

    Args:
        labels: objects by ids, ``(*S)`` or ``(N, *S)``, any integer dtype, 0 is background.
        border: the largest weight of a gap, at least 0.
        sigma: of its fall, in pixels, above 0.
        ratio: the weight of background far from all objects, 0 to 1.
        sigma1: of the fall around objects, in pixels, above 0.
        dims: the number of spatial axes, 1, 2 or 3.
        ignore_index: an id, or up to 8, of pixels that weigh 0 and are no object.
        out: where to write the result, float32 of its shape, on its device, of any strides.

    Returns:
        float32, of ``labels``' shape, contiguous.

    Raises:
        ValueError: a shape that does not fit ``dims``, a number out of range, or an ``out`` that
            cannot be written to.
        TypeError: labels that are no integers.

    Limits: those of :func:`unet_weight_map`.
    """
    op = "unet_weight_map_2019"
    axes = check_labels(op, labels, dims)
    border = as_number(op, "border", border, above=0, or_equal=True)
    sigma = as_number(op, "sigma", sigma, above=0, or_equal=False)
    sigma1 = as_number(op, "sigma1", sigma1, above=0, or_equal=False)
    ratio = as_number(op, "ratio", ratio, above=0, or_equal=True)
    if ratio > 1:
        raise wrong(op, "ratio", "0 to 1", ratio)
    ignored = as_ids(op, ignore_index, labels.dtype)
    if out is not None:
        check_out(op, out, labels.shape, labels.new_empty(0, dtype=torch.float32), labels=labels)
    if runs_reference(op, labels):
        return _reference_2019(
            labels,
            border=border,
            sigma=sigma,
            ratio=ratio,
            sigma1=sigma1,
            dims=axes,
            ignore_index=ignored,
            out=out,
        )
    numbers = (border, sigma, 1 - ratio, sigma1, ratio, 1.0, False, False, ignored)
    return _run(labels, axes, numbers, out)


def _samples(make: Make) -> Iterator[Sample]:
    def case(name: str, labels: Tensor, **options: Any) -> Sample:
        return Sample((labels,), options, name)

    yield case("picture", as_labels(make, 23, 31, share=0.05))
    yield case("pictures", as_labels(make, 3, 15, 26, share=0.1), class_weight=None, sigma=2.0)
    yield case("volume", as_labels(make, 6, 7, 9, share=0.05), dims=3, border_on="all")
    yield case("volumes", as_labels(make, 2, 5, 6, 7, share=0.05), dims=3, class_weight=(0.3, 2))
    yield case("signal", as_labels(make, 60), dims=1, sigma=3)
    yield case("ignored", as_labels(make, 20, 21, share=0.3), ignore_index=[2, 5, 99], w0=3)
    yield case("wide", as_labels(make, 12, 70, share=0.01), sigma=12.0, w0=50, ignore_index=4)
    yield case("narrow", as_labels(make, 12, 70, share=0.02), sigma=0.5, class_weight=[0, 1])
    yield case("no borders", as_labels(make, 9, 8), w0=0)
    yield case("one label", as_labels(make, 10, 9, ids=1))
    yield case("no label", as_labels(make, 6, 5, share=0))
    yield case("full", as_labels(make, 6, 5, share=1), border_on="all")
    yield case("one pixel", as_labels(make, 1, 1, share=1))
    yield case("more than a thread's share", as_labels(make, 40, 230, share=0.003, ids=2))
    yield case("empty batch", as_labels(make, 0, 4, 5))
    yield case("no pixels", as_labels(make, 2, 0, 4))


def _samples_2019(make: Make) -> Iterator[Sample]:
    def case(name: str, labels: Tensor, **options: Any) -> Sample:
        return Sample((labels,), options, name)

    yield case("picture", as_labels(make, 23, 31, share=0.03))
    yield case("pictures", as_labels(make, 2, 15, 26, share=0.05), border=10.0, sigma1=2.0)
    yield case("volume", as_labels(make, 6, 7, 9, share=0.02), dims=3, ratio=0)
    yield case("ignored", as_labels(make, 20, 21, share=0.1), ignore_index=(1, 2), ratio=1)
    yield case("no borders", as_labels(make, 30, 8, share=0.02), border=0)
    yield case("one label", as_labels(make, 30, 40, share=0.01, ids=1))
    yield case("no label", as_labels(make, 6, 5, share=0))
    yield case("empty batch", as_labels(make, 0, 4, 5))


def _shared_failures(make: Make) -> Iterator[tuple[Sample, type[Exception], str]]:
    labels = as_labels(make, 2, 5, 6)
    out = torch.zeros(2, 5, 6, device=labels.device)

    def on(*args: Any, **kwargs: Any) -> Sample:
        return Sample(args or (labels,), kwargs)

    yield on([1]), TypeError, "labels: expected a torch.Tensor, got list"
    yield on(labels.float()), TypeError, "labels: expected an integer dtype, got torch.float32"
    yield on(dims=3.5), TypeError, "dims: expected an integer, got 3.5"
    yield on(labels[0, 0]), ValueError, "labels: expected 2 spatial axes (dims), with a batch's"
    yield on(sigma=0), ValueError, "sigma: expected a finite number above 0, got 0"
    yield on(ignore_index=range(9)), ValueError, "ignore_index: expected at most 8 ids, got 9"
    yield on(ignore_index=0.5), TypeError, "ignore_index: expected an integer, got 0.5"
    yield on(out=out[0]), ValueError, "out: expected shape (2, 5, 6), got (5, 6)"
    yield on(out=out.double()), TypeError, "out: expected dtype torch.float32, got torch.float64"
    overlapping = out[:1].expand(2, 5, 6)
    yield on(out=overlapping), ValueError, "out: expected distinct elements"


def _failures(make: Make) -> Iterator[tuple[Sample, type[Exception], str]]:
    yield from _shared_failures(make)
    labels = as_labels(make, 2, 5, 6)

    def on(**kwargs: Any) -> Sample:
        return Sample((labels,), kwargs)

    yield on(w0=-1), ValueError, "w0: expected a finite number of at least 0, got -1"
    yield on(w0="a"), TypeError, "w0: expected a number, got 'a'"
    yield on(class_weight="even"), ValueError, 'class_weight: expected "balanced", None or two'
    yield on(class_weight=(1, 2, 3)), ValueError, 'class_weight: expected "balanced", None or two'
    yield on(class_weight=(1, -2)), ValueError, "class_weight: expected a finite number of at least"
    yield on(border_on="cells"), ValueError, "border_on: expected background or all, got 'cells'"


def _failures_2019(make: Make) -> Iterator[tuple[Sample, type[Exception], str]]:
    yield from _shared_failures(make)
    labels = as_labels(make, 2, 5, 6)

    def on(**kwargs: Any) -> Sample:
        return Sample((labels,), kwargs)

    yield on(border=-1), ValueError, "border: expected a finite number of at least 0, got -1"
    yield on(sigma1=-1), ValueError, "sigma1: expected a finite number above 0, got -1"
    yield on(ratio=1.5), ValueError, "ratio: expected 0 to 1, got 1.5"


def _benchmarks(make: Make) -> Iterator[Benchmark]:
    from scipy import ndimage  # noqa: PLC0415  (only to be timed)

    from .label_distances import discs  # noqa: PLC0415

    side = 512
    for cells in (10, 50):
        labels = discs(side, cells).to(make(0).device)
        out = torch.empty(labels.shape, device=labels.device)

        def peer(labels: Tensor = labels) -> Tensor:
            """One transform a cell, keeping the two nearest."""
            picture = labels.cpu().numpy()
            first = torch.full(labels.shape, torch.inf, dtype=torch.float64)
            second = first
            for label in labels.unique().tolist()[1:]:
                own = torch.from_numpy(ndimage.distance_transform_edt(picture != label))
                second = torch.minimum(second, torch.maximum(first, own))
                first = torch.minimum(first, own)
            border = 10 * torch.exp(-(first + second).square() / 50)
            return (1 + border * (labels.cpu() == 0)).float()

        yield Benchmark(
            f"{side}^2, {cells} cells, out=",
            ours=lambda labels=labels, out=out: unet_weight_map(labels, class_weight=None, out=out),  # type: ignore[misc]
            peer=peer,
            bytes_moved=None,
        )


def _no_benchmarks(make: Make) -> Iterator[Benchmark]:  # noqa: ARG001
    """The same kernel."""
    yield from ()


register(
    OpSpec(
        function=unet_weight_map,
        kernels=(Kernel("unet_weight_map", _fake), Kernel("unet_weight_map_out", _fake_out)),
        samples=_samples,
        failures=_failures,
        benchmarks=_benchmarks,
        dtypes=TESTED,
        takes_out=True,
        differentiable=False,
    )
)
register(
    OpSpec(
        function=unet_weight_map_2019,
        kernels=(),
        samples=_samples_2019,
        failures=_failures_2019,
        benchmarks=_no_benchmarks,
        dtypes=TESTED,
        takes_out=True,
        differentiable=False,
    )
)
