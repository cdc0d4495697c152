"""The classes of the largest scores, at full resolution, from coarse scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.functional import interpolate

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
from ._checks import check_apart, check_out, label_dtype, wrong
from ._tiles import wide
from ._upsampling import Upsampling

Labels = Tensor | tuple[Tensor, Tensor]


def _reference(
    scores: Tensor,
    *,
    size: int | Sequence[int],
    factor: int | None = None,
    offset: int | Sequence[int] = 0,
    kernel_size: int | None = None,
    weight: Tensor | None = None,
    align_corners: bool = False,
    return_confidence: bool = False,
    out: Labels | None = None,
) -> Labels:
    op = "upsample_argmax"
    how = Upsampling.checked(op, scores, weight, size, factor, kernel_size, offset, align_corners)
    full = how.reference(scores.detach(), None if weight is None else weight.detach())
    if out is not None:
        check_apart(op, out, scores=scores, weight=weight)
    labels = full.argmax(1).to(label_dtype(scores.shape[1]))
    if not return_confidence:
        return labels if out is None else out.copy_(labels)  # type: ignore[union-attr]
    confidence = full.softmax(1).amax(1)
    if out is None:
        return labels, confidence
    return out[0].copy_(labels), out[1].copy_(confidence)


@defined_by(_reference)
def upsample_argmax(
    scores: Tensor,
    *,
    size: int | Sequence[int],
    factor: int | None = None,
    offset: int | Sequence[int] = 0,
    kernel_size: int | None = None,
    weight: Tensor | None = None,
    align_corners: bool = False,
    return_confidence: bool = False,
    out: Labels | None = None,
) -> Labels:
    """Upsample scores and take each pixel's class, without storing the upsampled scores.

    Without a factor the labels are those of
    ``F.interpolate(scores, size, mode="bilinear", align_corners=align_corners).argmax(1)``; with
    one, of ``deconv_upsample(scores, weight, factor=factor, kernel_size=kernel_size,
    offset=offset, size=size)``: FCN's upsampling (Long, Shelhamer, Darrell 2015, section 3.3), zero
    beyond the border.  Of equal scores the lowest class wins, and a NaN before everything, as in
    ``torch.argmax``.  Scores are computed in float32 (float64 for float64); where two classes are
    nearer to each other than such a sum's rounding, either may win.

    Args:
        scores: ``(N, C, H, W)``, floating, of any strides.
        size: of the result, a number or one an axis.
        factor: None: interpolate; else the stride of the transposed convolution.
        offset: with a factor: elements to crop from the start, a number or one an axis.
        kernel_size: with a factor: of its filter; by default the weight's, without one
            ``2 factor - factor % 2``.
        weight: with a factor: ``(C, k, k)``, of the dtype of ``scores`` or float32; None: bilinear.
        align_corners: of the interpolation.
        return_confidence: also return the largest softmax probability.
        out: where to write the labels, or ``(labels, confidence)``, of exactly their shape, dtype
            and device; any strides, but their spans of memory must not meet that of an input.

    Returns:
        Labels ``(N, *size)``: uint8 to 256 classes, int16 to 32768, else int32.  With
        ``return_confidence`` those and a tensor of the same shape, float32, float64 for float64.

    Raises:
        ValueError: shapes or devices that do not fit, numbers out of their ranges, a crop that
            reaches beyond the full result, or an ``out`` that cannot be written to.
        TypeError: dtypes other than those above; what is no integer.

    Limits: two spatial axes; kernels of at most 1024 taps an axis.  Not differentiable.  A learned
    ``weight`` takes far longer than the bilinear one, since its sums do not go along one axis after
    the other.  It and scores of half precision are converted as a whole, at the coarse size.  Under
    autocast scores are taken as they are.  Within ``torch.func`` and forward-mode differentiation
    the reference runs.
    """
    op = "upsample_argmax"
    how = Upsampling.checked(op, scores, weight, size, factor, kernel_size, offset, align_corners)
    if out is not None:
        _check_out(scores, weight, how.size, out, confidence=return_confidence)
    if runs_reference(op, scores):
        return _reference(
            scores,
            size=how.size,
            factor=factor,
            offset=how.offset,
            kernel_size=kernel_size,
            weight=weight,
            align_corners=align_corners,
            return_confidence=return_confidence,
            out=out,
        )
    ops = torch.ops.segfuse
    scores = scores.detach()
    weight = None if weight is None else weight.detach()
    arguments = (scores, weight, *how.arguments)
    if out is None:
        labels, confidence = ops.upsample_argmax(*arguments, how.size, return_confidence)
        return (labels, confidence) if return_confidence else labels
    labels, confidence = out if return_confidence else (out, None)
    ops.upsample_argmax_out(*arguments, labels, confidence)
    increment_version(labels)
    if confidence is not None:
        increment_version(confidence)
    return out


def _check_out(
    scores: Tensor,
    weight: Tensor | None,
    size: Sequence[int],
    out: Labels,
    *,
    confidence: bool,
) -> None:
    op = "upsample_argmax"
    inputs = {"scores": scores} if weight is None else {"scores": scores, "weight": weight}
    inputs = {name: tensor.detach() for name, tensor in inputs.items()}  # no gradient is lost
    if isinstance(out, Tensor) is confidence or (confidence and len(out) != 2):  # noqa: PLR2004
        expected = "a pair, labels and confidence" if confidence else "a tensor"
        raise wrong(op, "out", expected, "a tensor" if isinstance(out, Tensor) else "a sequence")
    shape = (scores.shape[0], *size)
    dtypes = (label_dtype(scores.shape[1]), wide(scores.dtype))
    for tensor, dtype in zip((out,) if isinstance(out, Tensor) else out, dtypes, strict=False):
        check_out(op, tensor, shape, scores.new_empty(0, dtype=dtype), **inputs)
    if confidence:
        check_apart(op, out[0], labels=out[1])


def _fake(scores: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    size, confidence = arguments[-2:]
    labels = scores.new_empty(scores.shape[0], *size, dtype=label_dtype(scores.shape[1]))
    shape = labels.shape if confidence else (0,)
    return labels, scores.new_empty(shape, dtype=wide(scores.dtype))


def _fake_out(*_: Any) -> None:
    pass


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG001
    ctx.mark_non_differentiable(*output)


def _backward(ctx: Any, *_: Any) -> tuple[None, ...]:  # noqa: ARG001
    return (None,) * 8


def _samples(make: Make) -> Iterator[Sample]:
    def sample(name: str, *size: int, **kwargs: Any) -> Sample:
        return Sample((make(*size),), kwargs, name)

    yield sample("interpolated", 2, 3, 4, 5, size=(16, 20))
    yield sample("crop", 2, 3, 3, 4, factor=2, offset=1, size=(5, 6))
    yield sample("odd ratio", 1, 5, 4, 6, size=(13, 17))
    yield sample("corners", 2, 4, 5, 7, size=(12, 21), align_corners=True)
    yield Sample((make(2, 3, 3, 4),), {"factor": 2, "size": 6, "weight": make(3, 4, 4)}, "learned")
    yield sample("confidence", 2, 3, 4, 5, size=(9, 20), return_confidence=True)
    yield sample("FCN-8s", 1, 21, 9, 10, factor=8, offset=31, size=(33, 39))
    yield sample("odd kernel", 1, 2, 4, 5, factor=4, kernel_size=7, offset=(3, 1), size=(9, 15))
    yield sample("many taps", 1, 2, 4, 5, factor=2, kernel_size=9, offset=3, size=(7, 9))
    yield sample("gaps", 1, 2, 3, 3, factor=5, kernel_size=3, size=13)
    yield sample("one class", 2, 1, 3, 3, size=(5, 4))
    yield sample("one pixel", 1, 4, 1, 1, size=(7, 3))
    yield sample("to one pixel", 1, 4, 5, 6, size=1)
    yield sample("to one pixel, corners", 1, 4, 5, 6, size=1, align_corners=True)
    yield sample("to fewer", 1, 3, 11, 13, size=(5, 3))
    yield sample("to much fewer", 1, 3, 7, 90, size=(3, 2), align_corners=True)
    yield sample("the same", 1, 3, 5, 6, size=(5, 6))
    yield sample("along one axis", 1, 3, 2, 40, size=(2, 170), return_confidence=True)
    yield sample("far", 1, 3, 2, 3, size=(64, 96))
    yield sample("300 classes", 1, 300, 2, 3, size=(5, 9))
    yield sample("1000 classes", 1, 1000, 2, 2, size=4, return_confidence=True)
    yield sample("empty batch", 0, 3, 4, 4, size=8)
    yield sample("nothing asked", 1, 3, 4, 4, factor=2, size=(0, 3), return_confidence=True)


def _failures(make: Make) -> Iterator[tuple[Sample, type[Exception], str]]:
    scores = make(2, 3, 4, 5)

    def call(*args: Any, **kwargs: Any) -> Sample:
        return Sample(args, {"size": (8, 10), **kwargs})

    yield call(1), TypeError, "scores: expected a torch.Tensor, got int"
    yield call(scores.long()), TypeError, "scores: expected float64, float32, float16 or bfloat16"
    yield call(scores[0]), ValueError, "scores: expected (N, C, H, W), C, H and W at least 1"
    yield call(scores[:, :0]), ValueError, "scores: expected (N, C, H, W), C, H and W at least 1"
    yield call(scores, size=(1, 2, 3)), ValueError, "size: expected a number or one for each of 2"
    yield call(scores, size=-1), ValueError, "size: expected 0 or more, got (-1, -1)"
    yield call(scores, size=2.5), TypeError, "size: expected an integer, got 2.5"
    yield call(scores, offset=1), ValueError, "offset: expected 0 without a factor, got 1"
    yield call(scores, kernel_size=4), ValueError, "kernel_size: expected None without a factor"
    yield call(scores, weight=make(3, 4, 4)), ValueError, "weight: expected None without a factor"
    yield call(scores, factor=0), ValueError, "factor: expected 1 to 2147483647, got 0"
    yield call(scores, factor=2, align_corners=True), ValueError, "align_corners: expected False"
    yield call(scores, factor=2, size=11), ValueError, "offset and size: expected a range within"
    weight = make(3, 4, 4)
    other = torch.float64 if scores.dtype != torch.float64 else torch.float16
    yield call(scores, factor=2, weight=weight[:2]), ValueError, "weight: expected (3, k, k)"
    yield call(scores, factor=2, weight=weight.to(other)), TypeError, "weight: expected scores' dt"
    yield call(scores, factor=2, weight=weight.to("meta")), ValueError, "weight: expected scores' d"
    yield call(scores, factor=2, weight=weight, kernel_size=3), ValueError, "expected weight's 4"
    labels = torch.zeros(2, 8, 10, dtype=torch.uint8, device=scores.device)
    yield call(scores, out=labels[:1]), ValueError, "out: expected shape (2, 8, 10)"
    yield call(scores, out=labels.int()), TypeError, "out: expected dtype torch.uint8"
    yield call(scores, out=(labels, scores)), ValueError, "out: expected a tensor, got a sequence"
    yield call(scores, out=labels[:, :1].expand_as(labels)), ValueError, "out: expected distinct"
    asked = {"return_confidence": True}
    yield call(scores, out=labels, **asked), ValueError, "out: expected a pair, labels and"
    beside = scores.new_zeros(2, 8, 10, dtype=wide(scores.dtype))
    shared = beside.view(torch.uint8).flatten()[:160].view(2, 8, 10)
    yield call(scores, out=(shared, beside), **asked), ValueError, "out: expected memory apart from"


def _comparable(sample: Sample, result: Any) -> tuple[Tensor, ...]:
    """Where the two best are nearer than rounding the best of the reference; and the confidence.

    Of labels it is how much lower their score is than the largest, beyond rounding.
    """
    labels, *rest = result if isinstance(result, tuple) else (result,)
    scores, kwargs = sample.args[0], sample.kwargs
    how = Upsampling.checked(
        "upsample_argmax",
        scores,
        *(kwargs.get("weight"), kwargs["size"], kwargs.get("factor"), kwargs.get("kernel_size")),
        *(kwargs.get("offset", 0), kwargs.get("align_corners", False)),
    )
    full = how.reference(scores, kwargs.get("weight"))
    if not full.numel():
        return (labels, *rest)
    best = full.amax(1)
    chosen = full.gather(1, labels.long()[:, None])[:, 0]
    rounding = 8 * torch.finfo(full.dtype).eps * scores.abs().max()
    return (best - chosen > rounding, *rest)


def _benchmarks(make: Make) -> Iterator[Benchmark]:
    cases = [((1, 150, 128, 128), 4), ((1, 150, 64, 64), 8), ((1, 150, 256, 256), 2)]
    cases += [((1, 21, 64, 64), 8), ((1, 21, 16, 16), 32), ((1, 1000, 64, 64), 4)]
    for shape, factor in cases:
        scores = make(*shape)
        size = (shape[2] * factor, shape[3] * factor)
        out = upsample_argmax(scores, size=size)
        assert isinstance(out, Tensor)  # noqa: S101  (no confidence was asked for)
        bytes_moved = scores.numel() * scores.element_size() + out.numel() * out.element_size()

        def peer(scores: Tensor = scores, size: Any = size, out: Tensor = out) -> Tensor:
            return interpolate(scores, size, mode="bilinear").argmax(1).to(out.dtype)

        for memory, to in (("out=", out), ("fresh", None)):
            yield Benchmark(
                f"{shape}, factor {factor}, {memory}",
                ours=partial(upsample_argmax, scores, size=size, out=to),
                peer=peer,
                bytes_moved=bytes_moved,
            )


register(
    OpSpec(
        function=upsample_argmax,
        kernels=(
            Kernel("upsample_argmax", _fake, _backward, _setup_context),
            Kernel("upsample_argmax_out", _fake_out),
        ),
        samples=_samples,
        failures=_failures,
        benchmarks=_benchmarks,
        takes_out=True,
        differentiable=False,
        comparable=_comparable,
    )
)
