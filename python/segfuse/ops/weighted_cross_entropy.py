"""Cross-entropy weighted by a map, without the log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

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
from ._checks import check_tensor, wrong
from ._losses import REDUCTIONS, Reduction, checked_loss
from ._tiles import wide


def _reference(
    logits: Tensor,
    target: Tensor,
    *,
    weight_map: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int | None = 255,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    validate: bool = False,  # noqa: ARG001  (torch checks)
) -> Tensor:
    dtype, ids = wide(logits.dtype), target.long()
    ignored = torch.zeros_like(ids, dtype=torch.bool)
    if ignore_index is not None:
        ignored = ids == ignore_index
    none = torch.iinfo(torch.int64).min  # no id, so that torch refuses all that are no class
    ids = ids.masked_fill(ignored, none)
    c = None if class_weight is None else class_weight.detach().to(dtype)
    loss = cross_entropy(
        logits.to(dtype).masked_fill(ignored[:, None], 0),
        ids,
        weight=c,
        ignore_index=none,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    m = torch.ones_like(loss) if weight_map is None else weight_map.detach().to(dtype)
    m = m.reshape(loss.shape).masked_fill(ignored, 0)
    loss = loss * m
    if reduction == "none":
        return loss.contiguous()
    if reduction == "sum":
        return loss.sum()
    denominator = (m if c is None else m * c[ids.clamp(min=0)]).sum()
    counts = denominator != 0
    return counts * loss.sum() / denominator.where(counts, torch.ones_like(denominator))


@defined_by(_reference)
def weighted_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight_map: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int | None = 255,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    validate: bool = False,
) -> Tensor:
    r"""Compute U-Net's loss: softmax cross-entropy a pixel, times a weight map.

    Ronneberger, Fischer, Brox 2015, section 3, equation 1.  A pixel of class ``t``, with weight
    ``m`` in the map, class weights ``c`` and label smoothing ``e`` of ``K`` classes, has the loss
    ``m ((1 - e) c[t] (-log p[t]) + (e / K) sum_k c[k] (-log p[k]))``, and "mean" divides the sum by
    that of ``m c[t]``.  Without a map this is ``torch.nn.functional.cross_entropy``, save that
    where all pixels are ignored, or weigh nothing, the mean is 0 with zero gradients, not NaN
    (unless a logit that is not ignored is).

    One pass forward, which keeps a value a pixel, and one backward: log-probabilities and the
    unweighted loss are not stored.

    Args:
        logits: ``(N, C, *S)``, floating, one to three spatial axes, contiguous or of any strides.
        target: class ids ``(N, *S)``, uint8, int8, int16, int32 or int64.
        weight_map: ``(N, *S)`` or ``(N, 1, *S)``, of the dtype of ``logits`` or float32; None means
            1 everywhere.  It gets no gradient.
        class_weight: ``(C,)``, of the dtype of ``logits`` or float32; None means 1.  No gradient.
        ignore_index: pixels of this target have loss and gradient 0, whatever their logits, even
            where it is a class: None with 256 classes or more.
        reduction: "none", "sum" or "mean".
        label_smoothing: 0 to 1.
        validate: on CUDA, look for ids out of range before computing, which waits for the GPU, so
            that they raise; otherwise they end in a device-side assert.  The CPU always looks.
            Not within ``torch.compile(fullgraph=True)``.

    Returns:
        ``(N, *S)`` for "none", else a scalar; float32, or float64 for float64 logits.  Sums are
        taken in float64 and in the same order every time.  Under autocast logits are taken as they
        are.

    Raises:
        ValueError: shapes or devices that do not fit, an argument out of its range, or an id that
            is no class; the text names the first one.
        TypeError: dtypes other than those above.

    Limits: one value a pixel is kept, so that a gradient's relative error may be an ulp of the
    pixel's largest logit.  Gradients of gradients are computed in plain PyTorch.  Within
    ``torch.func`` and forward-mode differentiation the reference runs.
    """
    op = "weighted_cross_entropy"
    check_tensor(op, "logits", logits, floating=True)
    if logits.dim() not in (3, 4, 5) or logits.shape[1] == 0:
        raise wrong(op, "logits", "(N, C, *S) with one to three spatial axes", tuple(logits.shape))
    size = (logits.shape[0], *logits.shape[2:])
    weight_map, class_weight, ignore_index = checked_loss(
        op,
        "logits",
        logits,
        target,
        size,
        weight_map=weight_map,
        class_weight=class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        validate=validate,
    )
    if runs_reference(op, logits):
        return _reference(
            logits,
            target,
            weight_map=weight_map,
            class_weight=class_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    result: Tensor = torch.ops.segfuse.weighted_cross_entropy(
        logits,
        target,
        weight_map,
        class_weight,
        ignore_index,
        REDUCTIONS.index(reduction),
        label_smoothing,
    )[0]
    return result


def _fake(  # noqa: PLR0917  (as the schema has it)
    logits: Tensor,
    target: Tensor,
    weight_map: Tensor | None,  # noqa: ARG001
    class_weight: Tensor | None,  # noqa: ARG001
    ignore_index: int | None,  # noqa: ARG001
    reduction: int,
    label_smoothing: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    each = logits.new_empty(target.shape, dtype=wide(logits.dtype))
    one = logits.new_empty((), dtype=wide(logits.dtype))
    return (torch.empty_like(each) if reduction == 0 else one), each, torch.empty_like(one)


def _fake_backward(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:  # noqa: ARG001
    return torch.empty_like(logits)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, weight_map, class_weight, *ctx.options = inputs
    _, log_sums, denominator = output
    ctx.mark_non_differentiable(log_sums, denominator)
    ctx.save_for_backward(logits, target, weight_map, class_weight, log_sums, denominator)


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.segfuse.weighted_cross_entropy_backward(
        grad, *ctx.saved_tensors, *ctx.options
    )
    return (gradient, *[None] * 6)


def _setup_context_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _backward_backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    """In plain PyTorch, from ``grad_logits[k] = g m (a p[k] - b[k])`` and ``dp[k] / dx[j]``."""
    grad, logits, target, weight_map, class_weight, _, denominator = ctx.saved_tensors
    ignore_index, reduction, smoothing = ctx.options
    dtype, classes = wide(logits.dtype), logits.shape[1]
    ids = target.long()
    ignored = torch.zeros_like(ids, dtype=torch.bool)
    if ignore_index is not None:
        ignored = ids == ignore_index
    kinds = (1, classes, *[1] * (logits.dim() - 2))
    c = logits.new_ones(classes, dtype=dtype) if class_weight is None else class_weight.to(dtype)
    c = c.reshape(kinds)
    hot = ids[:, None] == torch.arange(classes, device=ids.device).reshape(kinds)
    b = (1 - smoothing) * c * hot + smoothing / classes * c  # (N, C, *S)
    m = torch.ones_like(ids, dtype=dtype) if weight_map is None else weight_map.to(dtype)
    if REDUCTIONS[reduction] == "mean":
        m = m * torch.where(denominator == 0, 0, 1 / denominator)
    m = m.masked_fill(ignored, 0)[:, None]
    p = logits.to(dtype).softmax(1).masked_fill(ignored[:, None], 0)
    a, v = b.sum(1, keepdim=True), v.to(dtype)
    of_grad = (v * m * (a * p - b)).sum(1)
    of_grad = of_grad if reduction == 0 else of_grad.sum()
    g = grad[:, None] if reduction == 0 else grad
    of_logits = g * m * a * p * (v - (v * p).sum(1, keepdim=True))
    return (of_grad, of_logits.to(logits.dtype), *[None] * 8)


def _target(make: Make, *size: int, classes: int, ignore: int | None = 255) -> Tensor:
    ids = (make(*size).double().abs() * 1000).long() % (classes + (ignore is not None))
    return ids if ignore is None else ids.masked_fill(ids == classes, ignore)


def _samples(make: Make) -> Iterator[Sample]:
    def case(name: str, *size: int, dtype: torch.dtype = torch.int64, **options: Any) -> Sample:
        batch, classes, *spatial = size
        ignore = options.get("ignore_index", 255)
        if options.pop("mapped", False):
            options["weight_map"] = make(batch, *spatial).abs()
        if options.pop("weighted", False):
            options["class_weight"] = make(classes).abs()
        target = _target(make, batch, *spatial, classes=classes, ignore=ignore)
        return Sample((make(*size), target.to(dtype)), options, name)

    yield case("mean", 2, 3, 5, 7, mapped=True)
    yield case("no map", 2, 4, 6, 6, dtype=torch.uint8)
    yield case("each", 2, 5, 4, 6, mapped=True, weighted=True, reduction="none")
    yield case("sum", 2, 3, 7, 5, mapped=True, weighted=True, reduction="sum", dtype=torch.int32)
    yield case("smoothed", 2, 4, 5, 5, mapped=True, weighted=True, label_smoothing=0.1)
    yield case("smoothed alone", 1, 3, 4, 9, label_smoothing=0.3, reduction="none")
    yield case("all smooth", 1, 3, 4, 3, label_smoothing=1.0)
    yield case("none ignored", 1, 3, 4, 5, ignore_index=None)
    yield case("a class ignored", 1, 3, 4, 5, ignore_index=1, dtype=torch.int16)
    yield case("one class", 2, 1, 3, 3, mapped=True)
    yield case("vectors", 2, 21, 9, 33, mapped=True, dtype=torch.uint8)
    yield case("a tile's worth of classes", 1, 300, 3, 23, weighted=True, ignore_index=None)
    yield case("more than a tile of classes", 1, 1030, 1, 9, label_smoothing=0.1, ignore_index=None)
    yield case("signal", 2, 3, 19, mapped=True)
    yield case("volume", 1, 2, 3, 4, 5, mapped=True, reduction="none")
    yield case("pieces", 1, 2, 90, 100, mapped=True)
    yield case("one pixel", 1, 2, 1, 1)
    yield case("all ignored", 1, 1, 2, 2, ignore_index=0)
    yield case("empty batch", 0, 3, 4, 4, mapped=True)
    yield case("no pixels", 2, 3, 0, 4, reduction="none")


def _failures(make: Make) -> Iterator[tuple[Sample, type[Exception], str]]:
    logits = make(2, 3, 4, 5)
    target = torch.zeros(2, 4, 5, dtype=torch.uint8, device=logits.device)
    other = torch.float64 if logits.dtype != torch.float64 else torch.float16

    def call(*args: Any, **kwargs: Any) -> Sample:
        return Sample(args, kwargs)

    yield call(1, target), TypeError, "logits: expected a torch.Tensor, got int"
    yield call(target, target), TypeError, "logits: expected float64, float32, float16 or"
    yield call(logits, target.float()), TypeError, "target: expected uint8, int8, int16, int32 or"
    yield call(logits[0, 0], target), ValueError, "logits: expected (N, C, *S) with one to three"
    yield call(logits[:, :0], target), ValueError, "logits: expected (N, C, *S) with one to three"
    yield call(logits, target[:1]), ValueError, "target: expected shape (2, 4, 5), got (1, 4, 5)"
    yield call(logits, target.to("meta")), ValueError, "target: expected logits' device"
    mixed = logits.to(other)[:, 0]
    yield call(logits, target, weight_map=mixed), TypeError, "weight_map: expected logits' dtype"
    yield call(logits, target, weight_map=make(2, 5, 4)), ValueError, "weight_map: expected shape"
    yield call(logits, target, class_weight=make(4)), ValueError, "class_weight: expected shape (3"
    yield call(logits, target, ignore_index="a"), TypeError, "ignore_index: expected an integer"
    yield call(logits, target, reduction="all"), ValueError, "reduction: expected 'none', 'mean' or"
    yield call(logits, target, label_smoothing="a"), TypeError, "label_smoothing: expected a number"
    yield call(logits, target, label_smoothing=2.0), ValueError, "label_smoothing: expected 0 to 1"
    beyond = target.clone()
    beyond[1, 2, 3] = 3
    text = "target: expected class ids 0 to 2 or ignore_index 255, got 3 at (1, 2, 3)"
    yield call(logits, beyond, validate=True), ValueError, text


def _benchmarks(make: Make) -> Iterator[Benchmark]:
    cases = [
        ("(1, 21, 512, 512)", (1, 21, 512, 512), torch.contiguous_format),
        ("(1, 21, 512, 512) channels_last", (1, 21, 512, 512), torch.channels_last),
        ("(1, 2, 388, 388)", (1, 2, 388, 388), torch.contiguous_format),
        ("(1, 150, 256, 256)", (1, 150, 256, 256), torch.contiguous_format),
    ]
    for name, size, memory_format in cases:
        batch, classes, *spatial = size
        logits = make(*size).contiguous(memory_format=memory_format).requires_grad_()
        target = _target(make, batch, *spatial, classes=classes)
        weight_map = make(batch, *spatial).abs()

        def ours(logits: Any = logits, target: Any = target, weight_map: Any = weight_map) -> Any:
            loss = weighted_cross_entropy(logits, target, weight_map=weight_map, reduction="sum")
            return torch.autograd.grad(loss, logits)

        def peer(logits: Any = logits, target: Any = target, weight_map: Any = weight_map) -> Any:
            each = cross_entropy(logits, target, ignore_index=255, reduction="none")
            return torch.autograd.grad((each * weight_map).sum(), logits)

        for memory in ("reused", "fresh"):
            yield Benchmark(
                f"{name}, forward + backward, {memory}",
                ours=ours,
                peer=peer,
                bytes_moved=3 * logits.numel() * logits.element_size(),
            )


register(
    OpSpec(
        function=weighted_cross_entropy,
        kernels=(
            Kernel("weighted_cross_entropy", _fake, _backward, _setup_context),
            Kernel(
                "weighted_cross_entropy_backward",
                _fake_backward,
                _backward_backward,
                _setup_context_backward,
            ),
        ),
        samples=_samples,
        failures=_failures,
        benchmarks=_benchmarks,
    )
)
