"""Cut tiles out of an image, with what lies beyond its border made up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import increment_version

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
from ._borders import BORDERS, INTEGERS, Border, check_border, check_fill, source
from ._checks import check_out, check_tensor, wrong
from ._tiles import MOST_AXES, Corners, as_corners, as_size, wide

PerChannel: TypeAlias = float | Sequence[float] | Tensor


def _reference(
    image: Tensor,
    corners: Corners,
    size: Sequence[int],
    *,
    border: Border = "mirror",
    fill: float = 0,
    dtype: torch.dtype | None = None,
    scale: PerChannel | None = None,
    shift: PerChannel | None = None,
    out: Tensor | None = None,
) -> Tensor:
    dims, dtype = image.dim() - 1, dtype or image.dtype
    corners = as_corners("gather_tiles", corners, dims, image.device)
    values = image
    if dtype != image.dtype or scale is not None or shift is not None:
        values = values.to(wide(dtype))
        if scale is not None:
            values = values * _a_channel("scale", scale, image, dtype).view(-1, *[1] * dims)
        if shift is not None:
            values = values + _a_channel("shift", shift, image, dtype).view(-1, *[1] * dims)
        values = values.to(dtype)
    filled = torch.full((), fill, dtype=dtype, device=image.device)
    index: list[slice | Tensor] = [slice(None)]
    inside = torch.ones((), dtype=torch.bool, device=image.device)
    for axis, (length, n) in enumerate(zip(size, image.shape[1:], strict=True)):
        place = corners[:, axis, None] + torch.arange(length, device=image.device)
        place = place.view(corners.shape[0], *[1] * axis, length, *[1] * (dims - 1 - axis))
        inside = inside & (place >= 0) & (place < n)
        index.append(source(place, n, border))
    if 0 in image.shape[1:]:
        result = filled.expand(corners.shape[0], image.shape[0], *size)
    else:
        result = values[tuple(index)].transpose(0, 1)
        if border == "constant":
            result = torch.where(inside[:, None], result, filled)
    if out is not None:
        return out.copy_(result)
    return result.clone(memory_format=torch.contiguous_format)


@defined_by(_reference)
def gather_tiles(
    image: Tensor,
    corners: Corners,
    size: Sequence[int],
    *,
    border: Border = "mirror",
    fill: float = 0,
    dtype: torch.dtype | None = None,
    scale: PerChannel | None = None,
    shift: PerChannel | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Cut tiles out of an image, anywhere, and convert them in the same pass.

    The overlap-tile strategy of Ronneberger, Fischer, Brox 2015, section 2: what lies beyond the
    image is made up from it, and no padded image is stored.  :func:`segfuse.ops.stitch_tiles` puts
    tiles together again.

    Args:
        image: ``(C, *S)``, one to three spatial axes, floating, integer or bool; of any strides,
            so that a permuted ``(H, W, C)`` will do, but fastest where the last axis is dense.
        corners: the tiles' first elements, ``(T, D)`` int64, on the CPU or the image's device, in
            the order of the axes; or a sequence of sequences of ints.  Negative ones and any beyond
            the image are allowed, up to 2^60 in size.
        size: of a tile, one length an axis.
        border: "mirror", which does not repeat the border's elements (numpy's "reflect"), again
            and again where the image is smaller than the tile's reach; "symmetric", which does;
            "edge", "wrap" or "constant".
        fill: what "constant" puts beyond the border: a value of the result, not scaled or shifted.
            For integer results an integer that they hold, and that float64 does.
        dtype: of the result: the image's, or a floating one.
        scale: the result is ``image * scale + shift``, computed in float32 (float64 where the
            result is so) and rounded at the end.  A number, or one a channel as a sequence or a
            tensor ``(C,)`` of the result's or image's dtype or float32.  It needs a floating result
            and gets no gradient.
        shift: likewise.
        out: where to write the result, of exactly its shape, dtype and device; any strides, but its
            span of memory must not meet that of ``image``.  No gradients then.

    Returns:
        ``(T, C, *size)``, contiguous.  Without a conversion every bit is kept.

    Raises:
        ValueError: shapes, devices, options that do not fit, an ``image`` without elements along an
            axis (save for "constant"), or an ``out`` that cannot be written to.
        TypeError: dtypes other than those above.

    Limits: the gradient's time grows with the image's rows times the tiles, over those that a row
    meets.  Within ``torch.func`` and forward-mode differentiation the reference runs.
    """
    op = "gather_tiles"
    dims = _check_image(image)
    dtype = _check_dtype(image, dtype, converts=scale is not None or shift is not None)
    lengths = as_size(op, size, dims)
    check_border(op, border)
    if border != "constant" and 0 in image.shape[1:]:
        raise wrong(op, "image", "elements along each spatial axis", tuple(image.shape))
    check_fill(op, fill, dtype)
    corners = as_corners(op, corners, dims, image.device)
    scale = None if scale is None else _a_channel("scale", scale, image, dtype)
    shift = None if shift is None else _a_channel("shift", shift, image, dtype)
    if out is not None:
        shape = (corners.shape[0], image.shape[0], *lengths)
        like = image if dtype == image.dtype else image.new_empty(0, dtype=dtype)
        check_out(op, out, shape, like, image=image)
    if runs_reference(op, image):
        return _reference(
            image,
            corners,
            lengths,
            border=border,
            fill=fill,
            dtype=dtype,
            scale=scale,
            shift=shift,
            out=out,
        )
    number = BORDERS.index(border)
    if out is not None:
        torch.ops.segfuse.gather_tiles_out(image, corners, number, float(fill), scale, shift, out)
        increment_version(out)
        return out
    result: Tensor = torch.ops.segfuse.gather_tiles(
        image, corners, lengths, number, float(fill), dtype, scale, shift
    )
    return result


def _check_image(image: Tensor) -> int:
    """The number of spatial axes."""
    op = "gather_tiles"
    check_tensor(op, "image", image)
    if image.dtype not in FLOATING + INTEGERS:
        raise TypeError(
            f"{op}: image: expected a floating, integer or bool dtype, got {image.dtype}"
        )
    if not 1 <= image.dim() - 1 <= MOST_AXES:
        raise wrong(op, "image", "(C, *S) with one to three spatial axes", tuple(image.shape))
    return image.dim() - 1


def _check_dtype(image: Tensor, dtype: torch.dtype | None, *, converts: bool) -> torch.dtype:
    """The result's dtype."""
    op, dtype = "gather_tiles", image.dtype if dtype is None else dtype
    if converts and dtype not in FLOATING:
        expected = "a floating result for scale and shift"
        raise TypeError(f"{op}: dtype: expected {expected}, got {dtype}")
    if dtype != image.dtype and dtype not in FLOATING:
        raise TypeError(f"{op}: dtype: expected a floating one or {image.dtype}, got {dtype}")
    return dtype


def _a_channel(name: str, value: PerChannel, image: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers as the kernel reads them: few, so that a copy costs nothing."""
    op, channels = "gather_tiles", image.shape[0]
    if isinstance(value, Tensor):
        check_tensor(op, name, value)
        if value.dtype not in (dtype, image.dtype, torch.float32) or value.dtype not in FLOATING:
            expected = f"the result's dtype {dtype}, the image's or torch.float32"
            raise TypeError(f"{op}: {name}: expected {expected}, got {value.dtype}")
        if value.device != image.device:
            raise wrong(op, name, f"image's device {image.device}", value.device)
        if tuple(value.shape) != (channels,):
            raise wrong(op, name, f"shape {(channels,)}", tuple(value.shape))
        return value.detach().to(wide(dtype)).contiguous()
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != channels:
            raise wrong(op, name, f"{channels} numbers", len(value))
        return torch.tensor(value, dtype=wide(dtype), device=image.device)
    if not isinstance(value, (int, float, torch.SymFloat)):
        expected = "a number, a sequence or a tensor"
        raise TypeError(f"{op}: {name}: expected {expected}, got {type(value).__name__}")
    return torch.full((channels,), value, dtype=wide(dtype), device=image.device)


def _fake(  # noqa: PLR0917  (as the schema has it)
    image: Tensor,
    corners: Tensor,
    size: Sequence[int],
    border: int,  # noqa: ARG001
    fill: float,  # noqa: ARG001
    dtype: torch.dtype,
    scale: Tensor | None,  # noqa: ARG001
    shift: Tensor | None,  # noqa: ARG001
) -> Tensor:
    return image.new_empty((corners.shape[0], image.shape[0], *size), dtype=dtype)


def _fake_out(*_: Any) -> None:
    pass


def _fake_backward(grad: Tensor, corners: Tensor, size: Sequence[int], *_: Any) -> Tensor:  # noqa: ARG001
    return grad.new_empty((grad.shape[1], *size))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    image, corners, _, ctx.border, _, _, scale, _ = inputs
    ctx.save_for_backward(corners, scale)
    ctx.size, ctx.dtype = image.shape[1:], image.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.needs_input_grad[0]:
        return (None,) * 8
    corners, scale = ctx.saved_tensors
    dtype = torch.promote_types(grad.dtype, ctx.dtype)
    scale = None if scale is None else scale.to(wide(dtype))
    of_image = torch.ops.segfuse.gather_tiles_backward(
        grad.to(dtype), corners, ctx.size, ctx.border, scale
    )
    return (of_image.to(ctx.dtype), *[None] * 7)


def _setup_context_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    grad, corners, _, ctx.border, scale = inputs
    ctx.save_for_backward(corners, scale)
    ctx.size = grad.shape[2:]


def _backward_backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    corners, scale = ctx.saved_tensors
    of_grad = torch.ops.segfuse.gather_tiles(
        v, corners, ctx.size, ctx.border, 0.0, v.dtype, scale, None
    )
    return (of_grad, *[None] * 4)


def _samples(make: Make) -> Iterator[Sample]:
    floats = make(0).is_floating_point()
    result = make(0).dtype if floats else torch.float32

    def case(
        name: str, image: Tensor, size: tuple[int, ...], *corners: tuple[int, ...], **options: Any
    ) -> Sample:
        at = torch.tensor(corners, dtype=torch.int64, device=image.device).view(-1, len(size))
        # Rounded to another dtype, its truth in float64 is no truth.
        smooth = image.is_floating_point() and options.get("dtype", image.dtype) == image.dtype
        smooth = smooth and 0 not in image.shape[1:]
        return Sample((image, at, size), options, name, differentiable=smooth)

    around = ((-3, -2), (2, 3), (0, 0), (4, 6))
    yield case("mirror", make(2, 7, 9), (5, 6), *around)
    yield case("scaled", make(3, 6, 7), (4, 5), *around, dtype=result, scale=0.5, shift=[1, 2, 3])
    yield case("constant", make(2, 5, 6), (6, 7), *around, border="constant", fill=1)
    yield case("symmetric", make(1, 5, 6), (4, 9), *around, border="symmetric")
    yield case("edge", make(2, 5, 6), (4, 9), *around, border="edge")
    yield case("wrap", make(2, 5, 6), (4, 9), *around, border="wrap")
    numbers: tuple[Any, ...] = ([0.5, 1, 2, -3, 0.1], range(5))
    if floats:
        numbers = (make(5), make(5).float())
    for border in BORDERS:
        options = {"border": border, "fill": 1}
        yield case(f"far, {border}", make(2, 3, 2), (7, 9), (-20, 3), (40, -31), **options)
        yield case(f"one pixel, {border}", make(1, 1, 1), (3, 4), (-1, -2), (7, 0), **options)
        yield case(f"signal, {border}", make(2, 13), (37,), (-50,), (-7,), (12,), **options)
    converted = {"dtype": result, "scale": numbers[0], "shift": numbers[1]}
    yield case("volume", make(2, 3, 4, 5), (4, 3, 7), (-1, 2, -2), (0, 0, 0))
    yield case(
        "volume, converted", make(5, 3, 4, 5), (2, 5, 6), (2, -2, -1), (1, 0, 0), **converted
    )
    yield case(
        "inside, converted", make(5, 9, 40), (7, 33), (1, 2), (2, 7), dtype=result, shift=2.5
    )
    yield case("to half", make(2, 9, 8), (7, 7), (1, -1), dtype=torch.float16, scale=0.25)
    yield case("to float64", make(2, 9, 8), (7, 7), (1, -1), dtype=torch.float64, shift=(1, -1))
    picture = (make(3, 20, 30) * 100).to(torch.uint8)
    yield case("picture", picture, (9, 17), *around, dtype=torch.float32, scale=1 / 255, shift=-0.5)
    yield case("labels", picture.to(torch.int32), (9, 17), *around, border="edge")
    yield case(
        "more than a thread's share", make(2, 90, 130), (70, 70), (-8, -8), (54, -8), (54, 67)
    )
    yield case("no tiles", make(2, 5, 5), (3, 3))
    yield case("no channels", make(0, 5, 5), (3, 3), (1, 1))
    yield case("empty tiles", make(2, 5, 5), (0, 3), (1, 1))
    yield case("empty image", make(2, 0, 5), (2, 3), (1, 1), border="constant", fill=1)


def _failures(make: Make) -> Iterator[tuple[Sample, type[Exception], str]]:
    image = make(2, 6, 7)
    corners = torch.tensor([[0, 0], [3, -1]], device=image.device)
    bytes_ = image.to(torch.uint8)

    def call(*args: Any, **kwargs: Any) -> Sample:
        return Sample(args, kwargs)

    def on(size: Any = (3, 4), **kwargs: Any) -> Sample:
        return Sample((image, corners, size), kwargs)

    yield call([1], corners, (3, 4)), TypeError, "image: expected a torch.Tensor, got list"
    yield (
        call(image.to(torch.complex64), corners, (3, 4)),
        TypeError,
        "image: expected a floating, integer",
    )
    yield call(image[0, 0], corners, (3, 4)), ValueError, "image: expected (C, *S) with one to"
    yield call(image, corners.int(), (3, 4)), TypeError, "corners: expected int64, got torch.int32"
    yield call(image, corners[:, :1], (3, 4)), ValueError, "corners: expected shape (T, 2), got (2"
    yield call(image, corners.to("meta"), (3, 4)), ValueError, "corners: expected device"
    yield call(image, [(0, 0), (1,)], (3, 4)), ValueError, "corners: expected 2 numbers a tile, got"
    yield call(image, [(0, 0.5)], (3, 4)), TypeError, "corners: expected an integer, got 0.5"
    yield call(image, 7, (3, 4)), TypeError, "corners: expected a tensor or a sequence of corners"
    yield call(image, corners, 3), TypeError, "size: expected 2 integers, got 3"
    yield on((3,)), ValueError, "size: expected 2 lengths, none below 0, got (3,)"
    yield on((3, -1)), ValueError, "size: expected 2 lengths, none below 0, got (3, -1)"
    yield on((3, 1.5)), TypeError, "size: expected an integer, got 1.5"
    yield on(border="reflect"), ValueError, "border: expected one of mirror, symmetric, edge, wrap"
    yield call(image[:, :0], corners, (3, 4)), ValueError, "image: expected elements along each"
    yield on(fill="a"), TypeError, "fill: expected a number, got 'a'"
    yield (
        call(bytes_, corners, (3, 4), fill=256),
        ValueError,
        "fill: expected an integer that torch",
    )
    yield (
        call(bytes_, corners, (3, 4), fill=0.5),
        ValueError,
        "fill: expected an integer that torch",
    )
    yield on(dtype=torch.uint8), TypeError, "dtype: expected a floating one or torch.float32, got"
    yield call(bytes_, corners, (3, 4), scale=2.0), TypeError, "dtype: expected a floating result"
    yield on(scale=[1.0]), ValueError, "scale: expected 2 numbers, got 1"
    yield on(shift=make(3)), ValueError, "shift: expected shape (2,), got (3,)"
    yield on(shift=make(2).double()), TypeError, "shift: expected the result's dtype torch.float32"
    yield on(scale=make(2).to("meta")), ValueError, "scale: expected image's device"
    yield on(scale="a"), TypeError, "scale: expected a number, a sequence or a tensor, got str"
    yield on(out=make(2, 2, 3, 5)), ValueError, "out: expected shape (2, 2, 3, 4), got"
    yield on(out=make(2, 2, 3, 4).double()), TypeError, "out: expected dtype torch.float32"
    overlapping = make(1, 2, 3, 4).expand(2, 2, 3, 4)
    yield on(out=overlapping), ValueError, "out: expected distinct elements"
    shared = make(2, 2, 6, 7)
    call_shared = call(shared[0], corners, (6, 7), out=shared)
    yield call_shared, ValueError, "out: expected memory apart from image's"
    asking = call(image.detach().requires_grad_(), corners, (3, 4), out=make(2, 2, 3, 4))
    yield asking, ValueError, "image: expected no gradient asked for"


def _benchmarks(make: Make) -> Iterator[Benchmark]:
    side, tile, margin = 4096, 512, 92
    step = tile - 2 * margin
    starts = range(-margin, side - margin, step)
    corners = torch.tensor([(y, x) for y in starts for x in starts])
    end = max(starts) + tile - side

    def sliced(image: Tensor) -> list[Tensor]:
        """From a mirrored copy, which torch makes of floats and NumPy of bytes."""
        if image.is_floating_point():
            padded = torch.nn.functional.pad(image, (margin, end, margin, end), "reflect")
        else:
            pad = ((0, 0), (margin, end), (margin, end))
            padded = torch.from_numpy(np.pad(image.cpu().numpy(), pad, "reflect")).to(image.device)
        places = (corners + margin).tolist()
        return [padded[:, y : y + tile, x : x + tile] for y, x in places]

    def compare(name: str, image: Tensor, **options: Any) -> Iterator[Benchmark]:
        def converted() -> Tensor:
            return image.to(options["dtype"]) * 0.0039 - 0.5 if options else image

        result = torch.stack(sliced(converted()))
        moved = result.numel() * (result.element_size() + image.element_size())
        yield Benchmark(
            f"{side}^2 {name} to {tile}^2, margin {margin}, out=",
            ours=lambda: gather_tiles(image, at, size, out=result, **options),
            peer=lambda: torch.stack(sliced(converted()), out=result),
            bytes_moved=moved,
        )
        yield Benchmark(
            f"{side}^2 {name} to {tile}^2, margin {margin}, fresh",
            ours=lambda: gather_tiles(image, at, size, **options),
            peer=lambda: torch.stack(sliced(converted())),
            bytes_moved=moved,
        )

    image = make(1, side, side)
    pictures = (image * 50).to(torch.uint8)
    at, size = corners.to(image.device), (tile, tile)
    yield from compare(str(image.dtype).removeprefix("torch."), image)
    if image.is_floating_point():
        yield from compare("uint8", pictures)
        yield from compare("uint8, scaled,", pictures, dtype=image.dtype, scale=0.0039, shift=-0.5)


register(
    OpSpec(
        function=gather_tiles,
        kernels=(
            Kernel("gather_tiles", _fake, _backward, _setup_context),
            Kernel("gather_tiles_out", _fake_out),
            Kernel(
                "gather_tiles_backward", _fake_backward, _backward_backward, _setup_context_backward
            ),
        ),
        samples=_samples,
        failures=_failures,
        benchmarks=_benchmarks,
        dtypes=(*FLOATING, torch.uint8, torch.bool, torch.uint16, torch.int16, torch.int64),
        takes_out=True,
    )
)
