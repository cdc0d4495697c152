"""Transposed convolution and crop-and-concatenate in one: U-Net's way up, a level at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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
from ._checks import check_alike, check_tensor, wrong
from .crop_concat import _cropped, _empty, _memory_format, _promote

_CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    3: F.conv_transpose1d,
    4: F.conv_transpose2d,
    5: F.conv_transpose3d,
}


def _reference(skip: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    up = _CONV_TRANSPOSE[x.dim()](x, weight, bias, stride=weight.shape[2])
    result = torch.cat([_cropped(skip, up.shape[2:]), up], dim=1)
    return result.contiguous(memory_format=_memory_format(x))


@defined_by(_reference)
def upconv_concat(skip: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Up-convolve ``x``, and put ``skip``, centre-cropped to the result's size, before it.

    ``crop_concat(skip, conv_transposeNd(x, weight, bias, stride=k))``, the step up of U-Net
    (Ronneberger, Fischer, Brox 2015, section 2: k = 2), without the upsampled map.  Since the
    kernel is as large as its stride, that is a matrix product, which goes a band of ``x``'s rows at
    a time through torch's BLAS; so does its gradient.

    Args:
        skip: features of the encoder, ``(N, Cs, *S)``, one to three spatial axes, with ``S >= k s``
            along each.
        x: features of the decoder, ``(N, Cin, *s)``, float64, float32, float16 or bfloat16.
        weight: ``(Cin, Cout, k, ..., k)``, as of ``torch.nn.ConvTransposeNd``; k from 1 on.
        bias: ``(Cout,)``, or None.

        All have ``x``'s dtype and device.  Under autocast ``x``, ``weight`` and ``bias`` are cast
        as by torch's transposed convolution; then all are promoted as by ``torch.cat``.

    Returns:
        ``(N, Cs + Cout, *(k s))``; channels_last if ``x`` is so and is not also contiguous.

    Raises:
        ValueError: shapes or devices that do not fit.
        TypeError: dtypes that differ or are not floating.

    Limits: an ``x`` whose spatial axes do not follow each other in memory (a cropped view) is
    copied.  Half-precision products are rounded before the bias is added.  On CUDA products of
    float32 use TF32 where ``torch.backends.cuda.matmul`` allows it, which is not its default, and
    not where convolutions may.  ``torch.utils.flop_counter`` does not count them.  The gradient of
    a ``skip`` that is not cropped is a view.  Within ``torch.func`` and forward-mode
    differentiation the reference runs.
    """
    _check(skip, x, weight, bias)
    if runs_reference("upconv_concat", x):
        return _reference(skip, x, weight, bias)
    result: Tensor = torch.ops.segfuse.upconv_concat(skip, x, weight, bias)
    return result


def _check(skip: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    op = "upconv_concat"
    given = {"skip": skip, "weight": weight, **({} if bias is None else {"bias": bias})}
    check_tensor(op, "x", x, floating=True)
    if x.dim() not in _CONV_TRANSPOSE:
        raise wrong(op, "x", "3 to 5 dimensions (N, C, *S)", tuple(x.shape))
    for name, tensor in given.items():
        check_tensor(op, name, tensor, floating=True)
        promotes = name == "skip" or _casts(tensor) == _casts(x)
        check_alike(op, "x", x, name, tensor, promotes=promotes)
        if name != "bias" and tensor.dim() != x.dim():
            raise wrong(op, name, f"{x.dim()} dimensions", tuple(tensor.shape))
    _check_weight(op, x, weight, bias)
    if skip.shape[0] != x.shape[0]:
        raise wrong(op, "skip", f"batch size {x.shape[0]}", skip.shape[0])
    size = tuple(weight.shape[2] * small for small in x.shape[2:])
    if any(large < small for large, small in zip(skip.shape[2:], size, strict=True)):
        raise wrong(op, "skip", f"a spatial size of at least {size}", tuple(skip.shape[2:]))


def _check_weight(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.shape[0] != x.shape[1]:
        raise wrong(op, "weight", f"x's {x.shape[1]} channels first", tuple(weight.shape))
    if 0 in weight.shape[:2]:  # which torch refuses, too
        raise wrong(op, "weight", "at least one channel in and out", tuple(weight.shape))
    k = weight.shape[2]
    if k < 1 or any(size != k for size in weight.shape[2:]):
        raise wrong(op, "weight", "a kernel of one size, 1 or more", tuple(weight.shape))
    if bias is not None and tuple(bias.shape) != (weight.shape[1],):
        raise wrong(op, "bias", f"shape ({weight.shape[1]},)", tuple(bias.shape))


def _casts(tensor: Tensor) -> bool:
    """Whether autocast would cast a tensor: not of float64."""
    return tensor.dtype != torch.float64


def _fake(skip: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    size = (weight.shape[2] * n for n in x.shape[2:])
    return _empty(x, (x.shape[0], skip.shape[1] + weight.shape[1], *size))


def _fake_backward(
    grad: Tensor,  # noqa: ARG001
    x: Tensor,
    weight: Tensor,
    *wanted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    for_x, for_weight, for_bias = wanted
    return (
        _empty(x, x.shape) if for_x else x.new_empty(0),
        _empty(x, weight.shape) if for_weight else x.new_empty(0),
        x.new_empty(weight.shape[1] if for_bias else 0),
    )


Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


def _setup_context(ctx: Any, inputs: Inputs, output: Tensor) -> None:  # noqa: ARG001
    skip, x, weight, _ = inputs
    ctx.skip_size = skip.shape
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    for_skip, *wanted = ctx.needs_input_grad
    x, weight = ctx.saved_tensors
    grad_skip = None
    if for_skip and ctx.skip_size[2:] == grad.shape[2:]:
        grad_skip = grad[:, : ctx.skip_size[1]]
    elif for_skip:
        grad_skip = torch.ops.segfuse.crop_concat_backward(grad, ctx.skip_size)
    return grad_skip, *_gradients(grad, x, weight, wanted)


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Those of x, the weight and the bias that are wanted."""
    if not any(wanted):
        return [None] * 3
    found = torch.ops.segfuse.upconv_concat_backward(grad, x, weight, *wanted)
    return [g if asked else None for g, asked in zip(found, wanted, strict=True)]


def _setup_context_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:3])
    ctx.wanted = inputs[3:]


def _backward_backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    """Each gradient is linear in grad and one other, so these are the two passes once more."""
    grad, x, weight = ctx.saved_tensors
    of_x, of_weight, of_bias = (
        g if asked else None for g, asked in zip(upstream, ctx.wanted, strict=True)
    )
    for_grad, for_x, for_weight, *_ = ctx.needs_input_grad
    grad_grad = None
    if for_grad:
        channels = grad.shape[1] - weight.shape[1]
        zeros = grad.new_zeros(grad.shape[0], channels, *grad.shape[2:])
        at = torch.zeros_like(x) if of_x is None else of_x
        grad_grad = torch.ops.segfuse.upconv_concat(zeros, at, weight, of_bias)
        if of_weight is not None:
            grad_grad = grad_grad + torch.ops.segfuse.upconv_concat(zeros, x, of_weight, None)
    grad_x, grad_weight, _ = _gradients(
        grad,
        x if of_x is None else of_x,
        weight if of_weight is None else of_weight,
        (for_x and of_weight is not None, for_weight and of_x is not None, False),
    )
    return grad_grad, grad_x, grad_weight, None, None, None


def _autocast(skip: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Inputs:
    """To autocast's dtype, save float64, as torch's convolutions; then with ``skip`` as cat."""
    width = torch.get_autocast_dtype(x.device.type)
    x, weight = (t.to(width) if _casts(t) else t for t in (x, weight))
    if bias is not None and _casts(bias):
        bias = bias.to(width)
    skip, x = _promote(skip, x)
    return skip, x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)


def _samples(make: Make) -> Iterator[Sample]:
    def of(skip: Sequence[int], x: Sequence[int], cout: int, k: int, *, bias: bool = True) -> Any:
        kernel = (k,) * (len(x) - 2)
        weight = make(x[1], cout, *kernel) / max(x[1], 1) ** 0.5
        return make(*skip), make(*x), weight, *((make(cout),) if bias else ())

    yield Sample(of((2, 3, 10, 12), (2, 4, 4, 5), 3, 2), name="even")
    yield Sample(of((1, 2, 9, 15), (1, 3, 4, 7), 2, 2), name="odd_difference")
    yield Sample(of((1, 2, 14, 13), (1, 3, 4, 3), 2, 3, bias=False), name="kernel_of_3")
    yield Sample(of((2, 2, 6, 4), (2, 3, 3, 2), 4, 2), name="no_crop")
    yield Sample(of((2, 2, 19), (2, 3, 8), 4, 2), name="signal")
    yield Sample(of((1, 2, 6, 8, 10), (1, 3, 2, 3, 4), 2, 2), name="volume")
    yield Sample(of((1, 1, 2, 2), (1, 1, 1, 1), 1, 2), name="one_pixel")
    yield Sample(of((1, 2, 7, 6), (1, 3, 5, 6), 4, 1), name="kernel_of_1")
    yield Sample(of((1, 2, 22, 26), (1, 5, 5, 6), 3, 4), name="kernel_of_4")
    yield Sample(of((2, 1, 40, 70), (2, 17, 19, 33), 5, 2), name="odd_channels")
    yield Sample(of((1, 1, 2, 301), (1, 2, 1, 150), 3, 2), name="one_row")
    yield Sample(of((2, 2, 6, 6, 7), (2, 3, 2, 2, 2), 2, 3, bias=False), name="volume_of_3")
    yield Sample(of((0, 2, 5, 5), (0, 3, 2, 2), 2, 2), name="empty_batch")
    yield Sample(of((2, 0, 5, 5), (2, 3, 2, 2), 2, 2), name="no_skip_channels")


def _failures(make: Make) -> Iterator[tuple[Sample, type[Exception], str]]:
    skip, x, weight, bias = make(2, 3, 8, 8), make(2, 4, 3, 3), make(4, 5, 2, 2), make(5)

    def call(*args: Any) -> Sample:
        return Sample(args)

    yield call(skip, [1], weight), TypeError, "x: expected a torch.Tensor, got list"
    yield call(skip, x, weight.to_sparse()), TypeError, "weight: expected a dense tensor"
    yield call(skip, x.long(), weight), TypeError, "x: expected float64, float32, float16 or"
    yield call(skip, x, weight, bias.double()), TypeError, "bias: expected x's dtype torch.float32"
    yield call(skip.half(), x, weight), TypeError, "skip: expected x's dtype torch.float32"
    yield call(skip, x, weight.to("meta")), ValueError, "weight: expected x's device"
    yield call(skip, x[0, 0], weight), ValueError, "x: expected 3 to 5 dimensions"
    yield call(skip[0], x, weight), ValueError, "skip: expected 4 dimensions, got (3, 8, 8)"
    yield call(skip, x, weight[0]), ValueError, "weight: expected 4 dimensions, got (5, 2, 2)"
    yield call(skip, x, weight[1:]), ValueError, "weight: expected x's 4 channels first"
    yield call(skip, x, weight[:, :0]), ValueError, "weight: expected at least one channel in"
    yield call(skip, x, weight[..., :1]), ValueError, "weight: expected a kernel of one size"
    yield call(skip, x, weight[..., :0, :0]), ValueError, "weight: expected a kernel of one size"
    yield call(skip, x, weight, bias[1:]), ValueError, "bias: expected shape (5,), got (4,)"
    yield call(skip[:1], x, weight), ValueError, "skip: expected batch size 2, got 1"
    yield call(skip[..., :5], x, weight), ValueError, "skip: expected a spatial size of at least"


def _benchmarks(make: Make) -> Iterator[Benchmark]:
    shapes = {
        "U-Net level 1": ((1, 64, 568, 568), (1, 128, 196, 196)),
        "U-Net level 2": ((1, 128, 280, 280), (1, 256, 100, 100)),
        "U-Net level 3": ((1, 256, 136, 136), (1, 512, 52, 52)),
        "U-Net level 4": ((1, 512, 64, 64), (1, 1024, 28, 28)),
    }
    for name, (skip_size, x_size) in shapes.items():
        channels = skip_size[1]
        weight = make(2 * channels, channels, 2, 2) / (2 * channels) ** 0.5
        inputs = make(*skip_size), make(*x_size), weight, make(channels)
        yield from _compare(name, *(t.requires_grad_() for t in inputs))


def _compare(name: str, *inputs: Tensor) -> Iterator[Benchmark]:
    """Forward; and forward and backward, for all gradients."""
    with torch.no_grad():
        weight = torch.randn_like(upconv_concat(*inputs)) / 8

    def run(function: Callable[..., Tensor], *, backward: bool) -> Tensor:
        if not backward:
            with torch.no_grad():
                return function(*inputs)
        result = function(*inputs)
        _, grad_x, *_ = torch.autograd.grad(result, inputs, weight)
        return grad_x

    for what, backward in (("forward, fresh", False), ("and backward, fresh", True)):
        yield Benchmark(
            f"{name}, {what}",
            ours=lambda backward=backward: run(upconv_concat, backward=backward),  # type: ignore[misc]
            peer=lambda backward=backward: run(_plain, backward=backward),  # type: ignore[misc]
            bytes_moved=None,
        )


def _plain(skip: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What one would write."""
    up = F.conv_transpose2d(x, weight, bias, stride=2)
    return torch.cat([_cropped(skip, up.shape[2:]), up], 1)


register(
    OpSpec(
        function=upconv_concat,
        kernels=(
            Kernel("upconv_concat", _fake, _backward, _setup_context, _autocast),
            Kernel(
                "upconv_concat_backward",
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
