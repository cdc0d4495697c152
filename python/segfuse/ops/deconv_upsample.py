"""Upsample by a depthwise transposed convolution, crop and add a skip, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.functional import conv_transpose2d, interpolate, pad

from ..registry import (
    AUTOCAST_KEYS,
    Benchmark,
    Kernel,
    Make,
    OpSpec,
    Sample,
    defined_by,
    register,
    runs_reference,
)
from ._checks import as_integer, autocasts, check_apart, check_out, check_tensor, wrong
from ._tiles import wide
from ._upsampling import as_factor, as_kernel_size, as_pair, kernel_of


def bilinear_kernel(factor: int, size: int | None = None) -> Tensor:
    """Make the filter by which a transposed convolution interpolates bilinearly.

    With ``f = (k + 1) // 2`` and ``c = f - 1`` for an odd k, ``f - 0.5`` for an even one:
    ``(1 - |y - c| / f) (1 - |x - c| / f)``, from which FCN's upsampling starts (Long, Shelhamer,
    Darrell 2015, section 3.3, and its released code).

    Args:
        factor: of the upsampling, from 1 on.
        size: k, taps along an axis; ``2 factor - factor % 2`` by default.

    Returns:
        ``(k, k)``, float32, on the CPU.

    Raises:
        ValueError: a factor below 1, a size out of 1 to 1024.
        TypeError: what is no integer.
    """
    return kernel_of(
        as_kernel_size("bilinear_kernel", "size", as_factor("bilinear_kernel", factor), size)
    )


def _reference(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    factor: int,
    kernel_size: int | None = None,
    offset: int | Sequence[int] = 0,
    size: int | Sequence[int] | None = None,
    skip: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    x, weight, skip, kernel_size, offset, size = _checked(
        x, weight, skip, factor, kernel_size, offset, size
    )
    if weight is None:
        weight = kernel_of(kernel_size, x).expand(x.shape[1], -1, -1)
    kind = x.device.type
    with torch.autocast(kind if kind in AUTOCAST_KEYS else "cpu", enabled=False):
        if x.numel():
            dtype = wide(x.dtype)
            full = conv_transpose2d(
                x.to(dtype), weight.to(dtype)[:, None], stride=factor, groups=x.shape[1]
            )
            (top, left), (height, width) = offset, size
            result = full[:, :, top : top + height, left : left + width]
        else:
            result = x.new_zeros(*x.shape[:2], *size) + 0 * (x.sum() + weight.sum())
        if skip is not None:
            result = result + skip
    if out is not None:
        return out.copy_(result)
    return result.to(x.dtype).clone(memory_format=torch.contiguous_format)


@defined_by(_reference)
def deconv_upsample(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    factor: int,
    kernel_size: int | None = None,
    offset: int | Sequence[int] = 0,
    size: int | Sequence[int] | None = None,
    skip: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Upsample every channel by its own filter, crop, and add ``skip``, in one pass.

    FCN's upsampling (Long, Shelhamer, Darrell 2015, section 3.3): with
    ``full = conv_transpose2d(x, weight[:, None], stride=factor, groups=C)``, of size
    ``(n - 1) factor + k`` an axis, ``full[offset : offset + size] + skip``.  Only what is asked for
    is computed, and only the result is stored.  Without a weight the filter is
    ``bilinear_kernel(factor, kernel_size)``, in the arithmetic's precision, and works along one
    axis after the other.

    Sums are taken in float32 (float64 for float64).  Gradients to ``x``, ``weight`` and ``skip``
    are the same bits every time.  Under autocast ``x`` is taken as it is, and ``skip`` in its
    dtype, like a ``weight`` that is not float32.

    Args:
        x: coarse features or scores, ``(N, C, H, W)``, floating; H and W from 1 on.
        weight: ``(C, k, k)`` on the device of ``x``, of its dtype or float32; None: bilinear.
        factor: the stride of the transposed convolution, from 1 on.
        kernel_size: k; by default the weight's, without one ``2 factor - factor % 2``.
        offset: elements to crop from the start, a number or one an axis.
        size: of the result, a number or one an axis; None: that of ``skip``, without one all that
            follows the offset.
        skip: what to add, of exactly the result's shape, ``x``'s dtype and device; any strides: in
            the published nets it is a view, cropped by 5 or 9.
        out: where to write the result, of exactly its shape, dtype and device; any strides, but its
            span of memory must not meet that of an input.  No gradients then.

    Returns:
        ``(N, C, *size)``, contiguous, whatever ``x`` is.

    Raises:
        ValueError: shapes or devices that do not fit, numbers out of their ranges, such as a crop
            that reaches beyond the full result, or an ``out`` that cannot be written to.
        TypeError: dtypes that differ, or are not floating; what is no integer.

    Limits: two spatial axes; kernels of at most 1024 taps an axis.  The gradients copy an upstream
    one whose rows are not dense, such as a channels_last one or that of a sum, and a weight of half
    precision is converted as a whole.  On CUDA each thread computes elements by themselves, the
    bilinear filter's too, and a tap's gradient is one thread's sum.  Within ``torch.func`` and
    forward-mode differentiation the reference runs.
    """
    companions = {"weight": weight, "skip": skip}
    x, weight, skip, kernel_size, offset, size = _checked(
        x, weight, skip, factor, kernel_size, offset, size
    )
    if out is not None:
        inputs = {"x": x, "weight": weight, "skip": skip}
        given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        check_out("deconv_upsample", out, (*x.shape[:2], *size), x, **given)
        check_apart("deconv_upsample", out, **companions)  # under autocast the kernel sees copies
    if runs_reference("deconv_upsample", x):
        return _reference(
            x,
            weight,
            factor=factor,
            kernel_size=kernel_size,
            offset=offset,
            size=size,
            skip=skip,
            out=out,
        )
    factor = int(factor)
    if out is not None:
        torch.ops.segfuse.deconv_upsample_out(x, weight, skip, factor, kernel_size, offset, out)
        increment_version(out)
        return out
    result: Tensor = torch.ops.segfuse.deconv_upsample(
        x, weight, skip, factor, kernel_size, offset, size
    )
    return result


def _checked(  # noqa: PLR0917
    x: Tensor,
    weight: Tensor | None,
    skip: Tensor | None,
    factor: int,
    kernel_size: int | None,
    offset: int | Sequence[int],
    size: int | Sequence[int] | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, int, tuple[int, int], tuple[int, int]]:
    """The arguments, checked, what is None filled in, and under autocast in x's dtype."""
    op = "deconv_upsample"
    check_tensor(op, "x", x, floating=True)
    if x.dim() != 4 or 0 in x.shape[2:]:  # noqa: PLR2004
        raise wrong(op, "x", "(N, C, H, W), H and W at least 1", tuple(x.shape))
    factor = as_factor(op, factor)
    weight = _companion(x, "weight", weight)
    skip = _companion(x, "skip", skip)
    if weight is not None:
        channels, k = x.shape[1], weight.shape[-1] if weight.dim() else 0
        if tuple(weight.shape) != (channels, k, k):
            raise wrong(op, "weight", f"({channels}, k, k)", tuple(weight.shape))
        if kernel_size is not None and as_integer(op, "kernel_size", kernel_size) != k:
            raise wrong(op, "kernel_size", f"weight's {k}", kernel_size)
        kernel_size = k
    kernel = as_kernel_size(op, "kernel_size", factor, kernel_size)
    if skip is not None and skip.dim() != 4:  # noqa: PLR2004
        raise wrong(op, "skip", "(N, C, *size)", tuple(skip.shape))
    whole = [(n - 1) * factor + kernel for n in x.shape[2:]]
    starts = as_pair(op, "offset", offset)
    rest = (whole[0] - starts[0], whole[1] - starts[1]) if skip is None else skip.shape[2:]
    lengths = as_pair(op, "size", rest if size is None else size)
    for axis, (start, length, most) in enumerate(zip(starts, lengths, whole, strict=True), 2):
        if start < 0 or length < 0 or start + length > most:
            expected = f"a range within the {most} elements of axis {axis}"
            raise wrong(op, "offset and size", expected, f"{start} and {length}")
    if skip is not None and tuple(skip.shape) != (*x.shape[:2], *lengths):
        raise wrong(op, "skip", f"shape {(*x.shape[:2], *lengths)}", tuple(skip.shape))
    return x, weight, skip, kernel, starts, lengths


def _companion(x: Tensor, name: str, tensor: Tensor | None) -> Tensor | None:
    """What goes beside x, on its device and in a dtype that may."""
    if tensor is None:
        return None
    op = "deconv_upsample"
    check_tensor(op, name, tensor, floating=True)
    if tensor.device != x.device:
        raise wrong(op, name, f"x's device {x.device}", tensor.device)
    also = " or float32" if name == "weight" else ""
    if tensor.dtype == x.dtype or (also and tensor.dtype == torch.float32):
        return tensor
    if not autocasts(x.device):
        raise TypeError(f"{op}: {name}: expected x's dtype {x.dtype}{also}, got {tensor.dtype}")
    return tensor.to(x.dtype)


def _autocast(x: Tensor, weight: Tensor | None, skip: Tensor | None, *rest: Any) -> tuple[Any, ...]:
    if weight is not None and weight.dtype != torch.float32:
        weight = weight.to(x.dtype)
    return x, weight, None if skip is None else skip.to(x.dtype), *rest


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(*x.shape[:2], *arguments[-1])  # the size comes last


def _fake_out(*_: Any) -> None:
    pass


def _fake_backward_weight(grad: Tensor, x: Tensor, *arguments: Any) -> Tensor:  # noqa: ARG001
    _, kernel, _, dtype = arguments
    return x.new_empty(x.shape[1], kernel, kernel, dtype=dtype)


# The result is linear in x and in the weight, so that the three kernels are each other's gradients.


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, weight, _, ctx.factor, ctx.kernel_size, ctx.offset, _ = inputs
    ctx.size = x.shape[2:]
    ctx.weight_dtype = None if weight is None else weight.dtype
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    place = ctx.factor, ctx.kernel_size, ctx.offset
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.segfuse.deconv_upsample_backward_x(grad, weight, *place, ctx.size)
    if ctx.needs_input_grad[1]:
        grad_weight = torch.ops.segfuse.deconv_upsample_backward_weight(
            grad, x, *place, ctx.weight_dtype
        )
    return grad_x, grad_weight, grad if ctx.needs_input_grad[2] else None, None, None, None, None


def _setup_context_x(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    grad, weight, ctx.factor, ctx.kernel_size, ctx.offset, _ = inputs
    ctx.size = grad.shape[2:]
    ctx.weight_dtype = None if weight is None else weight.dtype
    ctx.save_for_backward(grad if ctx.needs_input_grad[1] else None, weight)


def _backward_x(ctx: Any, second: Tensor) -> tuple[Tensor | None, ...]:
    grad, weight = ctx.saved_tensors
    place = ctx.factor, ctx.kernel_size, ctx.offset
    of_grad = of_weight = None
    if ctx.needs_input_grad[0]:
        of_grad = torch.ops.segfuse.deconv_upsample(second, weight, None, *place, ctx.size)
    if ctx.needs_input_grad[1]:
        of_weight = torch.ops.segfuse.deconv_upsample_backward_weight(
            grad, second, *place, ctx.weight_dtype
        )
    return of_grad, of_weight, None, None, None, None


def _setup_context_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    grad, x, ctx.factor, ctx.kernel_size, ctx.offset, _ = inputs
    ctx.save_for_backward(grad, x)


def _backward_weight(ctx: Any, second: Tensor) -> tuple[Tensor | None, ...]:
    grad, x = ctx.saved_tensors
    place = ctx.factor, ctx.kernel_size, ctx.offset
    of_grad = of_x = None
    if ctx.needs_input_grad[0]:
        of_grad = torch.ops.segfuse.deconv_upsample(x, second, None, *place, grad.shape[2:])
    if ctx.needs_input_grad[1]:
        of_x = torch.ops.segfuse.deconv_upsample_backward_x(grad, second, *place, x.shape[2:])
    return of_grad, of_x, None, None, None, None


def _samples(make: Make) -> Iterator[Sample]:
    def sample(name: str, *args: Any, **kwargs: Any) -> Sample:
        return Sample(args, kwargs, name)

    crop = {"factor": 2, "offset": 1, "size": (5, 6)}
    yield sample("learned", make(2, 3, 3, 4), make(3, 4, 4), **crop)
    yield sample("fixed", make(2, 3, 3, 4), **crop)
    yield sample("skip", make(2, 3, 3, 4), make(3, 4, 4), skip=make(2, 3, 5, 6), **crop)
    yield sample("odd_factor", make(1, 2, 3, 3), make(2, 5, 5), factor=3)
    yield sample("odd_factor_fixed", make(1, 2, 3, 5), factor=3, offset=(2, 0))
    yield sample("one_pixel", make(1, 1, 1, 1), make(1, 2, 2), factor=1)
    yield sample("one_pixel_fixed", make(1, 2, 1, 1), factor=2, skip=make(1, 2, 4, 4))
    yield sample("four", make(1, 2, 5, 9), make(2, 8, 8), factor=4, offset=2, size=(20, 30))
    yield sample("four_fixed", make(1, 2, 5, 9), factor=4, offset=2, size=(20, 30))
    yield sample("odd_kernel", make(1, 2, 4, 3), make(2, 7, 7), factor=4, offset=(3, 1))
    yield sample("odd_kernel_fixed", make(1, 2, 4, 3), factor=4, kernel_size=7, offset=3, size=9)
    yield sample("gaps", make(1, 2, 3, 3), make(2, 2, 2), factor=5)
    yield sample("gaps_fixed", make(1, 2, 3, 3), factor=5, kernel_size=3, offset=(4, 0))
    yield sample("many_taps", make(1, 2, 4, 5), make(2, 9, 9), factor=2, offset=3)
    yield sample("many_taps_fixed", make(1, 2, 4, 5), factor=2, kernel_size=9)
    yield sample("by_one", make(1, 2, 4, 5), make(2, 3, 3), factor=1, offset=1, size=(4, 5))
    yield sample("FCN-8s", make(1, 2, 9, 10), make(2, 16, 16), factor=8, offset=5, size=(66, 71))
    yield sample("FCN-8s_fixed", make(1, 2, 9, 10), factor=8, offset=31, size=(40, 41))
    # Parts, since float64 sums of 63 x 63 terms in another order differ by more than a few ulps.
    alexnet = {"factor": 32, "offset": 18}
    yield sample("FCN-AlexNet", make(1, 2, 4, 3), make(2, 63, 63), size=(9, 70), **alexnet)
    yield sample("FCN-AlexNet_fixed", make(1, 2, 4, 3), kernel_size=63, size=(70, 9), **alexnet)
    yield sample("long_rows_fixed", make(1, 1, 2, 41), factor=32, offset=(7, 19), size=(3, 1290))
    yield sample("long_rows", make(1, 1, 2, 600), make(1, 4, 4), factor=2, offset=1, size=(3, 1200))
    yield sample("one_element", make(2, 2, 5, 5), make(2, 8, 8), factor=4, offset=(11, 3), size=1)
    yield sample("of_no_sources", make(1, 2, 3, 4), make(2, 4, 4), factor=2, offset=(5, 6), size=2)
    yield sample("many_channels", make(1, 40, 2, 2), factor=2)
    yield sample("empty_batch", make(0, 2, 3, 3), make(2, 4, 4), factor=2)
    yield sample("no_channels", make(2, 0, 3, 3), factor=2)
    yield sample("nothing_asked", make(1, 2, 3, 3), make(2, 4, 4), factor=2, size=(0, 4))


def _failures(make: Make) -> Iterator[tuple[Sample, type[Exception], str]]:
    x, weight = make(2, 3, 4, 5), make(3, 4, 4)

    def call(*args: Any, **kwargs: Any) -> Sample:
        return Sample(args, {"factor": 2, **kwargs})

    op = "deconv_upsample: "
    yield call([1]), TypeError, op + "x: expected a torch.Tensor, got list"
    yield call(x.long()), TypeError, "x: expected float64, float32, float16 or bfloat16"
    yield call(x[0]), ValueError, "x: expected (N, C, H, W)"
    yield call(x[:, :, :0]), ValueError, "x: expected (N, C, H, W), H and W at least 1"
    yield call(x, factor=0), ValueError, "factor: expected 1 to 2147483647, got 0"
    yield call(x, factor=2**31), ValueError, "factor: expected 1 to 2147483647, got 2147483648"
    yield call(x, factor=1.5), TypeError, "factor: expected an integer, got 1.5"
    yield call(x, weight[:2]), ValueError, "weight: expected (3, k, k), got (2, 4, 4)"
    yield call(x, weight[:, :3]), ValueError, "weight: expected (3, k, k), got (3, 3, 4)"
    yield call(x, weight.to("meta")), ValueError, "weight: expected x's device"
    other = torch.float64 if x.dtype != torch.float64 else torch.float16
    yield call(x, weight.to(other)), TypeError, f"weight: expected x's dtype {x.dtype} or float32"
    yield call(x, weight, kernel_size=3), ValueError, "kernel_size: expected weight's 4, got 3"
    yield call(x, kernel_size=0), ValueError, "kernel_size: expected 1 to 1024, got 0"
    yield call(x, kernel_size=1025), ValueError, "kernel_size: expected 1 to 1024, got 1025"
    yield call(x, offset=-1), ValueError, "offset and size: expected a range within the 10 elements"
    yield call(x, offset=3, size=(8, 2)), ValueError, "of axis 2, got 3 and 8"
    yield call(x, size=(2, 2, 2)), ValueError, "size: expected a number or one for each of 2 axes"
    yield call(x, skip=make(2, 3, 9)), ValueError, "skip: expected (N, C, *size), got (2, 3, 9)"
    yield call(x, skip=make(2, 4, 9, 9)), ValueError, "skip: expected shape (2, 3, 9, 9)"
    yield call(x, skip=make(2, 3, 9, 9), size=8), ValueError, "skip: expected shape (2, 3, 8, 8)"
    yield call(x, skip=make(2, 3, 9, 9).to(other)), TypeError, f"skip: expected x's dtype {x.dtype}"
    yield call(x, out=make(2, 3, 9, 12)), ValueError, "out: expected shape (2, 3, 10, 12)"
    yield call(x, out=make(2, 3, 10, 12).to(other)), TypeError, "out: expected dtype"
    shared = make(2, 3, 10, 12)
    yield call(x, skip=shared, out=shared), ValueError, "out: expected memory apart from skip's"
    inside = shared[:, :, :4, :5]
    yield call(inside, out=shared), ValueError, "out: expected memory apart from x's"
    asking = x.detach().requires_grad_()
    yield call(asking, out=make(2, 3, 10, 12)), ValueError, "x: expected no gradient"


def _benchmarks(make: Make) -> Iterator[Benchmark]:
    for batch in (1, 2):
        for factor, channels, side in ((8, 21, 66), (32, 21, 18), (2, 21, 34), (4, 64, 66)):
            x, weight = make(batch, channels, side, side), make(channels, 2 * factor, 2 * factor)
            name = f"{batch} x {channels} x {side}^2, factor {factor}"
            yield from _compare(name, x, weight, factor)


def _compare(name: str, x: Tensor, weight: Tensor, factor: int) -> Iterator[Benchmark]:
    """With a learned weight and with the fixed filter; the peer knows no other than a weight."""
    channels, kernel = weight.shape[:2]
    filters = {"learned": weight, "fixed": kernel_of(kernel, x).to(x.dtype).repeat(channels, 1, 1)}
    size = [n * factor for n in x.shape[2:]]
    out, inner = deconv_upsample(x, factor=factor), x.new_empty(*x.shape[:2], *size)
    upstream = out / kernel**2
    held, start = pad(x, (1, 1, 1, 1), mode="replicate"), factor + factor // 2
    bytes_moved = (x.numel() + out.numel()) * x.element_size()

    def ours(x: Tensor, weight: Tensor, kind: str, out: Tensor | None = None) -> Tensor:
        return deconv_upsample(x, weight if kind == "learned" else None, factor=factor, out=out)

    def peer(x: Tensor, weight: Tensor) -> Tensor:
        return conv_transpose2d(x, weight[:, None], stride=factor, groups=channels)

    def both(kind: str, upsample: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """Gradients of x, and of a weight that is learned."""
        leaves = [
            t.detach().requires_grad_(t is x or kind == "learned") for t in (x, filters[kind])
        ]
        result = upsample(*leaves)
        return torch.autograd.grad(result, [t for t in leaves if t.requires_grad], upstream)

    for kind, used in filters.items():
        yield Benchmark(
            f"{name}, {kind}, out=",
            ours=partial(ours, x, used, kind, out=out),
            peer=partial(peer, x, used),
            bytes_moved=bytes_moved,
        )
        yield Benchmark(
            f"{name}, {kind}, forward and backward, fresh",
            ours=partial(both, kind, partial(ours, kind=kind)),
            peer=partial(both, kind, peer),
            bytes_moved=None,
        )
    yield Benchmark(
        f"{name}, fixed, against F.interpolate, out=",
        ours=lambda: deconv_upsample(held, factor=factor, offset=start, size=size, out=inner),
        peer=lambda: interpolate(x, scale_factor=factor, mode="bilinear"),
        bytes_moved=bytes_moved,
    )


register(
    OpSpec(
        function=deconv_upsample,
        kernels=(
            Kernel("deconv_upsample", _fake, _backward, _setup_context, _autocast),
            Kernel("deconv_upsample_out", _fake_out),
            Kernel("deconv_upsample_backward_x", _fake, _backward_x, _setup_context_x),
            Kernel(
                "deconv_upsample_backward_weight",
                _fake_backward_weight,
                _backward_weight,
                _setup_context_weight,
            ),
        ),
        samples=_samples,
        failures=_failures,
        benchmarks=_benchmarks,
        takes_out=True,
    )
)
