"""Cross-entropy at full resolution from coarse scores, which are never upsampled as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

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
from ._losses import REDUCTIONS, Reduction, checked_loss
from ._tiles import wide
from ._upsampling import Upsampling
from .weighted_cross_entropy import weighted_cross_entropy


def _reference(
    scores: Tensor,
    target: Tensor,
    *,
    factor: int | None = None,
    offset: int | Sequence[int] = 0,
    kernel_size: int | None = None,
    weight: Tensor | None = None,
    align_corners: bool = False,
    weight_map: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int | None = 255,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    validate: bool = False,
) -> Tensor:
    how = Upsampling.checked(
        "upsample_cross_entropy",
        scores,
        weight,
        target.shape[1:],
        factor,
        kernel_size,
        offset,
        align_corners,
    )
    return weighted_cross_entropy.reference(
        how.reference(scores, weight),
        target,
        weight_map=weight_map,
        class_weight=class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        validate=validate,
    )


@defined_by(_reference)
def upsample_cross_entropy(
    scores: Tensor,
    target: Tensor,
    *,
    factor: int | None = None,
    offset: int | Sequence[int] = 0,
    kernel_size: int | None = None,
    weight: Tensor | None = None,
    align_corners: bool = False,
    weight_map: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int | None = 255,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    validate: bool = False,
) -> Tensor:
    """Compute the loss of coarse scores at the target's resolution, without upsampled scores.

    :func:`segfuse.ops.weighted_cross_entropy` of the scores upsampled to the target's size:
    without a factor as by ``F.interpolate(scores, target.shape[1:], mode="bilinear",
    align_corners=align_corners)``; with one as by ``deconv_upsample(scores, weight, factor=factor,
    kernel_size=kernel_size, offset=offset, size=target.shape[1:])``, FCN's upsampling (Long,
    Shelhamer, Darrell 2015, section 3.3), zero beyond the border.

    Forward keeps one value a pixel, the logarithm of its sum of exponentials.  Backward computes
    a class at a time: its upsampled scores' gradient, some rows of it, and from those the coarse
    one.  Nothing of the size of classes times pixels is ever stored.

    Args:
        scores: ``(N, C, H, W)``, floating, of any strides.
        target: class ids ``(N, *S)``, uint8, int8, int16, int32 or int64.
        factor: None: interpolate; else the stride of the transposed convolution.
        offset: with a factor: elements to crop from the start, a number or one an axis.
        kernel_size: with a factor: of its filter; by default the weight's, without one
            ``2 factor - factor % 2``.
        weight: with a factor: ``(C, k, k)``, of the dtype of ``scores`` or float32; None: bilinear.
        align_corners: of the interpolation.
        weight_map: ``(N, *S)`` or ``(N, 1, *S)``, of the dtype of ``scores`` or float32; None means
            1 everywhere.  It gets no gradient.
        class_weight: ``(C,)``, of the dtype of ``scores`` or float32; None means 1.  No gradient.
        ignore_index: pixels of this target have loss and gradient 0, whatever their scores, even
            where it is a class: None with 256 classes or more.
        reduction: "none", "sum" or "mean", which divides by the weights of the pixels.
        label_smoothing: 0 to 1.
        validate: on CUDA, look for ids out of range before computing, as
            ``weighted_cross_entropy``.

    Returns:
        ``(N, *S)`` for "none", else a scalar; float32, or float64 for float64 scores.  Sums are
        taken in float64 and in the same order every time.  Under autocast scores are taken as they
        are.  Gradients go to ``scores`` and ``weight``, the same bits every time.

    Raises:
        ValueError: shapes or devices that do not fit, an argument out of its range, or an id that
            is no class; the text names the first one.
        TypeError: dtypes other than those above.

    Limits: two spatial axes; kernels of at most 1024 taps an axis.  One value a pixel is kept, so
    that the relative error of gradients, the weight's too, may be an ulp of the pixel's largest
    score.  A learned ``weight`` takes far longer than the bilinear one, and its gradient is that of
    a class a thread.  Scores, their gradients and a map of half precision are converted as a whole,
    at their own size, which is the coarse one.  On the CPU, tables take about 100 bytes a column of
    pixels, whatever the classes.  Where scores are infinite, positions that are whole but for
    rounding may give NaN in other pixels than torch.  Gradients of gradients are computed in plain
    PyTorch, which stores the upsampled scores.  Within ``torch.func`` and forward-mode
    differentiation the reference runs.
    """
    op = "upsample_cross_entropy"
    spatial = getattr(target, "shape", (0,) * 3)[1:]
    how = Upsampling.checked(
        op,
        scores,
        weight,
        spatial if len(spatial) == 2 else (0, 0),  # noqa: PLR2004  (what is wrong is said below)
        factor,
        kernel_size,
        offset,
        align_corners,
    )
    weight_map, class_weight, ignore_index = checked_loss(
        op,
        "scores",
        scores,
        target,
        (scores.shape[0], *how.size),
        weight_map=weight_map,
        class_weight=class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        validate=validate,
    )
    if runs_reference(op, scores):
        return _reference(
            scores,
            target,
            factor=factor,
            offset=offset,
            kernel_size=kernel_size,
            weight=weight,
            align_corners=align_corners,
            weight_map=weight_map,
            class_weight=class_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    result: Tensor = torch.ops.segfuse.upsample_cross_entropy(
        scores,
        target,
        weight,
        weight_map,
        class_weight,
        *how.arguments,
        ignore_index,
        REDUCTIONS.index(reduction),
        label_smoothing,
    )[0]
    return result


def _fake(scores: Tensor, target: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    reduction = arguments[-2]
    each = scores.new_empty(target.shape, dtype=wide(scores.dtype))
    one = scores.new_empty((), dtype=wide(scores.dtype))
    return (torch.empty_like(each) if reduction == 0 else one), each, torch.empty_like(one)


def _fake_backward(grad: Tensor, scores: Tensor, *_: Any) -> Tensor:  # noqa: ARG001
    return scores.new_empty(scores.shape)


def _fake_backward_weight(grad: Tensor, scores: Tensor, *arguments: Any) -> Tensor:  # noqa: ARG001
    weight: Tensor = arguments[1]
    return weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors, ctx.options = inputs[:5], inputs[5:]
    _, log_sums, denominator = output
    ctx.mark_non_differentiable(log_sums, denominator)
    ctx.save_for_backward(*tensors, log_sums, denominator)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    arguments = (grad, *ctx.saved_tensors, *ctx.options)
    of_scores = of_weight = None
    if ctx.needs_input_grad[0]:
        of_scores = torch.ops.segfuse.upsample_cross_entropy_backward(*arguments)
    if ctx.needs_input_grad[2]:
        of_weight = torch.ops.segfuse.upsample_cross_entropy_backward_weight(*arguments)
    return (of_scores, None, of_weight, *[None] * 9)


# Gradients of the two backward kernels: of the reference's own backward, in plain PyTorch.


def _setup_context_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[8:]


def _second(ctx: Any, second: Tensor, which: int) -> tuple[Tensor | None, ...]:
    """Gradients of grad, scores and weight; `which` first gradient has the gradient `second`."""
    grad, scores, target, weight, weight_map, class_weight = ctx.saved_tensors
    *how, ignore_index, reduction, smoothing = ctx.options
    upsampling = Upsampling(tuple(target.shape[1:]), *how)
    with torch.enable_grad():
        grad, scores = grad.detach().requires_grad_(), scores.detach().requires_grad_()
        if weight is not None:
            weight = weight.detach().requires_grad_()
        loss = weighted_cross_entropy.reference(
            upsampling.reference(scores, weight),
            target,
            weight_map=weight_map,
            class_weight=class_weight,
            ignore_index=ignore_index,
            reduction=cast("Reduction", REDUCTIONS[reduction]),
            label_smoothing=smoothing,
        )
        (first,) = torch.autograd.grad(loss, (scores, weight)[which], grad, create_graph=True)
        leaves = [grad, scores, *([] if weight is None else [weight])]
        found = torch.autograd.grad(first, leaves, second, allow_unused=True)
    return found[0], found[1], None, found[2] if len(found) > 2 else None, *[None] * 11  # noqa: PLR2004


def _backward_scores(ctx: Any, second: Tensor) -> tuple[Tensor | None, ...]:
    return _second(ctx, second, 0)


def _backward_weight(ctx: Any, second: Tensor) -> tuple[Tensor | None, ...]:
    return _second(ctx, second, 1)


def _target(make: Make, *size: int, classes: int, ignore: int | None = 255) -> Tensor:
    ids = (make(*size).double().abs() * 1000).long() % (classes + (ignore is not None))
    return ids if ignore is None else ids.masked_fill(ids == classes, ignore)


def _samples(make: Make) -> Iterator[Sample]:
    def case(name: str, shape: Sequence[int], size: Sequence[int], **options: Any) -> Sample:
        batch, classes, *_ = shape
        ignore = options.get("ignore_index", 255)
        dtype = options.pop("dtype", torch.int64)
        if options.pop("mapped", False):
            options["weight_map"] = make(batch, *size).abs()
        if options.pop("weighted", False):
            options["class_weight"] = make(classes).abs()
        if "learned" in options:
            kernel = options.pop("learned")
            options["weight"] = make(classes, kernel, kernel)
        target = _target(make, batch, *size, classes=classes, ignore=ignore)
        return Sample((make(*shape), target.to(dtype)), options, name, asking=("weight",))

    yield case("interpolated", (2, 3, 3, 4), (12, 16))
    yield case("crop", (2, 3, 3, 4), (5, 6), factor=2, offset=1, mapped=True)
    yield case("learned", (2, 3, 3, 4), (5, 6), factor=2, offset=1, learned=4, mapped=True)
    yield case("odd ratio", (1, 5, 3, 4), (10, 9), weighted=True, dtype=torch.uint8)
    yield case("corners", (2, 3, 3, 4), (8, 11), align_corners=True, label_smoothing=0.1)
    yield case("each", (2, 3, 3, 4), (7, 8), reduction="none", mapped=True, weighted=True)
    yield case("sum", (2, 3, 3, 4), (6, 8), reduction="sum", label_smoothing=0.2, weighted=True)
    yield case("FCN-8s", (1, 3, 5, 5), (16, 17), factor=8, offset=11, mapped=True)
    yield case("odd kernel", (1, 2, 4, 5), (9, 15), factor=4, kernel_size=7, offset=(3, 1))
    yield case("many taps", (1, 2, 4, 5), (7, 9), factor=2, kernel_size=9, offset=3)
    yield case("many taps, learned", (1, 2, 4, 3), (9, 8), factor=2, learned=7, reduction="none")
    yield case("gaps", (1, 2, 3, 3), (13, 13), factor=5, kernel_size=3)
    yield case("one class", (2, 1, 3, 3), (5, 4), mapped=True)
    yield case("one pixel", (1, 4, 1, 1), (7, 3))
    yield case("to one pixel", (1, 4, 5, 6), (1, 1), align_corners=True)
    yield case("to fewer", (1, 3, 9, 11), (4, 3))
    yield case("to much fewer", (1, 3, 3, 40), (2, 3), align_corners=True)
    yield case("the same", (1, 3, 5, 6), (5, 6), dtype=torch.int32)
    yield case("far", (1, 3, 1, 2), (5, 70))
    yield case("wide", (1, 2, 2, 150), (3, 600))
    yield case("300 classes", (1, 300, 2, 2), (3, 5), weighted=True, ignore_index=None)
    yield case("1000 classes", (1, 1000, 1, 2), (2, 3), ignore_index=None, label_smoothing=0.1)
    yield case("a class ignored", (1, 3, 2, 3), (4, 5), ignore_index=1, dtype=torch.int16)
    yield case("all ignored", (1, 1, 2, 2), (4, 4), ignore_index=0)
    yield case("empty batch", (0, 3, 4, 4), (8, 8))
    yield case("no pixels", (1, 3, 4, 4), (0, 3), factor=2, reduction="none")


def _failures(make: Make) -> Iterator[tuple[Sample, type[Exception], str]]:
    scores = make(2, 3, 2, 3)
    target = torch.zeros(2, 4, 6, dtype=torch.uint8, device=scores.device)

    def call(*args: Any, **kwargs: Any) -> Sample:
        return Sample(args, kwargs)

    yield call(1, target), TypeError, "scores: expected a torch.Tensor, got int"
    yield call(scores, 1), TypeError, "target: expected a torch.Tensor, got int"
    yield call(scores[0], target), ValueError, "scores: expected (N, C, H, W), C, H and W at least"
    yield call(scores, target.float()), TypeError, "target: expected uint8, int8, int16, int32 or"
    yield call(scores, target[0]), ValueError, "target: expected shape"
    yield call(scores, target[:1]), ValueError, "target: expected shape (2, 4, 6), got (1, 4, 6)"
    yield call(scores, target, offset=1), ValueError, "offset: expected 0 without a factor, got 1"
    yield call(scores, target, factor=1), ValueError, "offset and size: expected a range within the"
    yield call(scores, target, factor=2, align_corners=True), ValueError, "align_corners: expected"
    yield call(scores, target, weight_map=make(2, 5, 4)), ValueError, "weight_map: expected shape"
    yield call(scores, target, class_weight=make(4)), ValueError, "class_weight: expected shape (3"
    yield call(scores, target, reduction="all"), ValueError, "reduction: expected 'none', 'mean' or"
    yield call(scores, target, label_smoothing=2.0), ValueError, "label_smoothing: expected 0 to 1"
    beyond = target.clone()
    beyond[1, 2, 3] = 3
    text = "target: expected class ids 0 to 2 or ignore_index 255, got 3 at (1, 2, 3)"
    yield call(scores, beyond, validate=True), ValueError, text


def _benchmarks(make: Make) -> Iterator[Benchmark]:
    cases = [((1, 150, 128, 128), 4), ((1, 150, 64, 64), 8), ((1, 150, 256, 256), 2)]
    cases += [((1, 21, 64, 64), 8), ((1, 21, 16, 16), 32), ((1, 1000, 64, 64), 4)]
    for shape, factor in cases:
        batch, classes, *coarse = shape
        size = [n * factor for n in coarse]
        scores = make(*shape).requires_grad_()
        ignore = 255 if classes < 255 else -100  # noqa: PLR2004
        target = _target(make, batch, *size, classes=classes, ignore=None)

        def ours(scores: Any = scores, target: Any = target, ignore: int = ignore) -> Any:
            loss = upsample_cross_entropy(scores, target, ignore_index=ignore)
            return torch.autograd.grad(loss, scores)

        def peer(scores: Any = scores, target: Any = target, ignore: int = ignore) -> Any:
            full = interpolate(scores, target.shape[1:], mode="bilinear")
            return torch.autograd.grad(cross_entropy(full, target, ignore_index=ignore), scores)

        yield Benchmark(
            f"{shape}, factor {factor}, forward + backward, fresh",
            ours=ours,
            peer=peer,
            bytes_moved=None,
        )


register(
    OpSpec(
        function=upsample_cross_entropy,
        kernels=(
            Kernel("upsample_cross_entropy", _fake, _backward, _setup_context),
            Kernel(
                "upsample_cross_entropy_backward",
                _fake_backward,
                _backward_scores,
                _setup_context_backward,
            ),
            Kernel(
                "upsample_cross_entropy_backward_weight",
                _fake_backward_weight,
                _backward_weight,
                _setup_context_backward,
            ),
        ),
        samples=_samples,
        failures=_failures,
        benchmarks=_benchmarks,
    )
)
