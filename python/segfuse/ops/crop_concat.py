"""Centre-crop the encoder's features and put them before the decoder's, in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.functional import conv2d

from ..registry import (
    FLOATING,
    Benchmark,
    Kernel,
    Make,
    OpSpec,
    Sample,
    defined_by,
    register,
    runs_reference,
)
from ._checks import autocasts, check_alike, check_out, check_tensor, wrong


def _cropped(skip: Tensor, size: Sequence[int]) -> Tensor:
    """A view of ``skip``: its centre, of the given spatial size."""
    for axis, length in enumerate(size, start=2):
        skip = skip.narrow(axis, (skip.shape[axis] - length) // 2, length)
    return skip


def _reference(skip: Tensor, up: Tensor, *, out: Tensor | None = None) -> Tensor:
    result = torch.cat([_cropped(skip, up.shape[2:]), up], dim=1)
    if out is not None:
        return out.copy_(result)
    return result.contiguous(memory_format=_memory_format(up))


@defined_by(_reference)
def crop_concat(skip: Tensor, up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Concatenate ``skip``, centre-cropped to the size of ``up``, and ``up`` along the channels.

    U-Net's crop-and-concatenate (Ronneberger, Fischer, Brox 2015, section 2) without the cropped
    copy.  Along each spatial axis the crop begins at ``(S - s) // 2``, so that at an odd difference
    the larger part is cut at the end.  Nothing is computed: floating, integer, boolean and complex
    dtypes work, and every bit is kept.  The gradient of ``up`` is a view of the result's, and so is
    that of ``skip`` where nothing was cropped.

    Args:
        skip: features of the encoder, ``(N, Cs, *S)``, one to three spatial axes.
        up: features of the decoder, ``(N, Cu, *s)``, with ``s <= S`` along each axis; the dtype and
            device of ``skip``.  Under autocast both are promoted, as by ``torch.cat``.
        out: where to write the result, of exactly its shape, dtype and device; any strides, but its
            span of memory must not meet that of ``skip`` or ``up``.  No gradients then.

    Returns:
        ``(N, Cs + Cu, *s)``; channels_last if ``up`` is so and is not also contiguous.

    Raises:
        ValueError: shapes or devices that do not fit, or an ``out`` that cannot be written to.
        TypeError: dtypes that differ.

    Limits: a ``skip`` or ``up`` whose innermost axis is not that of the result (a channels_last
    ``skip`` with a contiguous ``up``) is read element by element.  Within ``torch.func`` and
    forward-mode differentiation the reference runs.
    """
    size = _check(skip, up)
    if out is not None:
        if autocasts(up.device):
            skip, up = _promote(skip, up)
        check_out("crop_concat", out, size, up, skip=skip, up=up)
    if runs_reference("crop_concat", up):
        return _reference(skip, up, out=out)
    if out is not None:
        torch.ops.segfuse.crop_concat_out(skip, up, out)
        increment_version(out)
        return out
    result: Tensor = torch.ops.segfuse.crop_concat(skip, up)
    return result


def _check(skip: Tensor, up: Tensor) -> tuple[int, ...]:
    """The size of the result."""
    op = "crop_concat"
    check_tensor(op, "skip", skip)
    check_tensor(op, "up", up)
    if up.dim() not in (3, 4, 5):
        raise wrong(op, "up", "3 to 5 dimensions (N, C, *S)", tuple(up.shape))
    if skip.dim() != up.dim():
        raise wrong(op, "skip", f"{up.dim()} dimensions", tuple(skip.shape))
    check_alike(op, "skip", skip, "up", up, promotes=True)
    if skip.shape[0] != up.shape[0]:
        raise wrong(op, "up", f"batch size {skip.shape[0]}", up.shape[0])
    if any(large < small for large, small in zip(skip.shape[2:], up.shape[2:], strict=True)):
        size = f"a spatial size of at least up's {tuple(up.shape[2:])}"
        raise wrong(op, "skip", size, tuple(skip.shape[2:]))
    return (up.shape[0], skip.shape[1] + up.shape[1], *up.shape[2:])


def _memory_format(like: Tensor) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    channels_last = formats.get(like.dim())
    if channels_last is None or like.is_contiguous():
        return torch.contiguous_format
    if like.is_contiguous(memory_format=channels_last):
        return channels_last
    return torch.contiguous_format


def _empty(like: Tensor, size: Sequence[int]) -> Tensor:
    return torch.empty(
        size, dtype=like.dtype, device=like.device, memory_format=_memory_format(like)
    )


def _fake(skip: Tensor, up: Tensor) -> Tensor:
    return _empty(up, (up.shape[0], skip.shape[1] + up.shape[1], *up.shape[2:]))


def _fake_out(skip: Tensor, up: Tensor, out: Tensor) -> None:
    pass


def _fake_backward(grad: Tensor, skip_size: Sequence[int]) -> Tensor:
    return _empty(grad, skip_size)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:  # noqa: ARG001
    ctx.skip_size = inputs[0].shape


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    channels = ctx.skip_size[1]
    grad_skip = grad_up = None
    if ctx.needs_input_grad[0]:
        if ctx.skip_size[2:] == grad.shape[2:]:
            grad_skip = grad[:, :channels]
        else:
            grad_skip = torch.ops.segfuse.crop_concat_backward(grad, ctx.skip_size)
    if ctx.needs_input_grad[1]:
        grad_up = grad[:, channels:]
    return grad_skip, grad_up


def _setup_context_backward(ctx: Any, inputs: tuple[Tensor, Any], output: Tensor) -> None:  # noqa: ARG001
    ctx.size = inputs[0].shape


def _backward_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    batch, channels, *size = ctx.size
    zeros = grad.new_zeros(batch, channels - grad.shape[1], *size)
    return torch.ops.segfuse.crop_concat(grad, zeros), None


def _promote(skip: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Autocast's rule for ``torch.cat``: to the widest, which is at least autocast's own.

    float64 and what is not floating take no part in the latter.
    """
    if skip.dtype == up.dtype:
        return skip, up
    width = torch.get_autocast_dtype(up.device.type)
    taking_part = [t for t in (skip, up) if t.is_floating_point() and t.dtype != torch.float64]
    for tensor in taking_part:
        width = torch.promote_types(width, tensor.dtype)
    dtype = torch.promote_types(
        *(width if any(t is part for part in taking_part) else t.dtype for t in (skip, up))
    )
    return skip.to(dtype), up.to(dtype)


def _samples(make: Make) -> Iterator[Sample]:
    yield Sample((make(2, 3, 8, 10), make(2, 4, 4, 6)), name="even")
    yield Sample((make(1, 1, 7, 5), make(1, 2, 4, 4)), name="odd_difference")
    yield Sample((make(2, 2, 9, 37), make(2, 3, 8, 33)), name="odd_rows")
    yield Sample((make(2, 2, 4, 4), make(2, 3, 4, 4)), name="no_crop")
    yield Sample((make(1, 2, 9, 4), make(1, 1, 5, 4)), name="crop_of_rows")
    yield Sample((make(1, 2, 4, 9), make(1, 1, 4, 5)), name="crop_of_columns")
    yield Sample((make(1, 1, 1, 1), make(1, 1, 1, 1)), name="one_pixel")
    yield Sample((make(2, 1, 40, 70), make(2, 1, 33, 61)), name="one_channel")
    yield Sample((make(1, 5, 3, 3), make(1, 17, 1, 1)), name="to_one_pixel")
    yield Sample((make(2, 3, 19), make(2, 2, 12)), name="signal")
    yield Sample((make(1, 2, 6, 7, 9), make(1, 3, 3, 4, 6)), name="volume")
    yield Sample((make(2, 2, 3, 4, 5), make(2, 3, 3, 4, 5)), name="volume_no_crop")
    yield Sample((make(1, 2, 140, 150), make(1, 2, 131, 141)), name="more_than_a_threads_share")
    yield Sample((make(2, 5, 1, 1), make(2, 4, 1, 1)), name="vectors")
    yield Sample((make(0, 2, 5, 5), make(0, 3, 4, 4)), name="empty_batch")
    yield Sample((make(2, 0, 5, 5), make(2, 3, 4, 4)), name="no_skip_channels")
    yield Sample((make(2, 2, 5, 5), make(2, 0, 4, 4)), name="no_up_channels")
    yield Sample((make(2, 2, 5, 5), make(2, 3, 0, 4)), name="no_pixels")


def _failures(make: Make) -> Iterator[tuple[Sample, type[Exception], str]]:
    skip, up = make(2, 3, 6, 6), make(2, 4, 4, 4)

    def call(*args: Any, **kwargs: Any) -> Sample:
        return Sample(args, kwargs)

    other = torch.int16 if up.dtype != torch.int16 else torch.int32
    yield call([1], up), TypeError, "crop_concat: skip: expected a torch.Tensor, got list"
    yield call(skip, up.to_sparse()), TypeError, "up: expected a dense tensor"
    yield call(skip, up.to(other)), TypeError, f"up: expected skip's dtype {skip.dtype}, got"
    yield call(skip, up.to("meta")), ValueError, "up: expected skip's device"
    yield call(make(3, 4), make(3, 4)), ValueError, "up: expected 3 to 5 dimensions"
    yield call(make(2, 3, 6), up), ValueError, "skip: expected 4 dimensions, got"
    yield call(make(1, 3, 6, 6), up), ValueError, "up: expected batch size 1, got 2"
    yield call(make(2, 3, 6, 3), up), ValueError, "skip: expected a spatial size of at least"
    yield call(skip, up, out=make(2, 7, 4, 5)), ValueError, "out: expected shape (2, 7, 4, 4)"
    yield call(skip, up, out=make(2, 7, 4, 4).to(other)), TypeError, "out: expected dtype"
    yield call(skip, up, out=make(2, 7, 4, 4).to("meta")), ValueError, "out: expected device"
    overlapping = make(1, 7, 4, 4).expand(2, 7, 4, 4)
    yield call(skip, up, out=overlapping), ValueError, "out: expected distinct elements"
    shared = make(2, 7, 4, 4)
    yield call(skip, shared[:, 3:], out=shared), ValueError, "out: expected memory apart from up's"
    if up.is_floating_point():
        asking = skip.detach().requires_grad_()
        out = make(2, 7, 4, 4)
        yield call(asking, up, out=out), ValueError, "skip: expected no gradient"


def _benchmarks(make: Make) -> Iterator[Benchmark]:
    shapes = {
        "64+64 x 512^2": ((1, 64, 528, 528), (1, 64, 512, 512)),
        "U-Net level 1": ((1, 64, 568, 568), (1, 64, 392, 392)),
        "U-Net level 2": ((1, 128, 280, 280), (1, 128, 200, 200)),
        "U-Net level 3": ((1, 256, 136, 136), (1, 256, 104, 104)),
        "U-Net level 4": ((1, 512, 64, 64), (1, 512, 56, 56)),
        "no crop, batch 4": ((4, 64, 256, 256), (4, 64, 256, 256)),
    }
    for name, (skip_size, up_size) in shapes.items():
        yield from _compare(name, make(*skip_size), make(*up_size))
    if make(0).is_floating_point():
        # What is streamed past the cache has to be read again by the convolution that follows.
        for name, features in (("U-Net level 1", 64), ("U-Net level 2", 128)):
            skip_size, up_size = shapes[name]
            weight = make(features, 2 * features, 3, 3)
            yield from _compare(f"{name} + conv 3x3", make(*skip_size), make(*up_size), weight)


def _compare(
    name: str, skip: Tensor, up: Tensor, weight: Tensor | None = None
) -> Iterator[Benchmark]:
    """In memory that is reused and in fresh; with a weight, and the convolution of the result."""
    view = _cropped(skip, up.shape[2:])
    out = torch.cat([view, up], 1)

    def then(result: Tensor) -> Tensor:
        return result if weight is None else conv2d(result, weight)

    moved = 2 * out.numel() * out.element_size() if weight is None else None
    yield Benchmark(
        f"{name}, out=",
        ours=lambda: then(crop_concat(skip, up, out=out)),
        peer=lambda: then(torch.cat([view, up], 1, out=out)),
        bytes_moved=moved,
    )
    yield Benchmark(
        f"{name}, fresh",
        ours=lambda: then(crop_concat(skip, up)),
        peer=lambda: then(torch.cat([view, up], 1)),
        bytes_moved=moved,
    )


register(
    OpSpec(
        function=crop_concat,
        kernels=(
            Kernel("crop_concat", _fake, _backward, _setup_context, _promote),
            Kernel("crop_concat_out", _fake_out),
            Kernel(
                "crop_concat_backward", _fake_backward, _backward_backward, _setup_context_backward
            ),
        ),
        samples=_samples,
        failures=_failures,
        benchmarks=_benchmarks,
        dtypes=(*FLOATING, torch.uint8, torch.bool, torch.int64, torch.complex64, torch.complex128),
        exact=True,
        takes_out=True,
    )
)
