"""Put tiles together to an image, or to the classes of its largest scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

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
from ._borders import CONSTANT
from ._checks import check_out, check_tensor, label_dtype, wrong
from ._tiles import MOST_AXES, Corners, as_corners, as_size, wide


def _reference(
    tiles: Tensor,
    corners: Corners,
    size: Sequence[int],
    *,
    window: Tensor | None = None,
    argmax: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    shape = (tiles.shape[1], *size)
    at = as_corners("stitch_tiles", corners, len(size), tiles.device).tolist()
    covered = torch.zeros(tuple(size), dtype=torch.bool, device=tiles.device)
    total = torch.zeros(shape, dtype=tiles.dtype, device=tiles.device)
    weights = covered.to(wide(tiles.dtype))
    if window is not None:
        total, window = total.to(wide(tiles.dtype)), window.detach().to(wide(tiles.dtype))
    for tile, corner in zip(tiles, at, strict=True):
        place, part = [], []  # of the image, and of the tile, where they meet
        for begin, length, end in zip(corner, tile.shape[1:], size, strict=True):
            first, last = max(begin, 0), min(begin + length, end)
            place.append(slice(first, max(first, last)))
            part.append(slice(first - begin, max(first, last) - begin))
        covered[tuple(place)] = True
        own = tile[(slice(None), *part)]
        # Not in place, so that function transforms reach it.
        if window is not None:
            weights[tuple(place)] += window[tuple(part)]
            own = total[(slice(None), *place)] + window[tuple(part)] * own
        total = total.index_put(_index(place, total), own)
    if window is not None:
        total = torch.where(weights == 0, 0, total / torch.where(weights == 0, 1, weights))
    result = total.argmax(0).to(label_dtype(shape[0])) if argmax else total.to(tiles.dtype)
    if argmax:
        result = torch.where(covered, result, 0)
    if out is not None:
        return out.copy_(torch.where(covered, result, out))
    return result.contiguous()


def _index(place: Sequence[slice], total: Tensor) -> tuple[Tensor, ...]:
    """A box of an image with all its channels, as indices."""
    sizes = [slice(0, total.shape[0]), *place]
    return tuple(
        torch.meshgrid(
            *(torch.arange(s.start, s.stop, device=total.device) for s in sizes), indexing="ij"
        )
    )


@defined_by(_reference)
def stitch_tiles(
    tiles: Tensor,
    corners: Corners,
    size: Sequence[int],
    *,
    window: Tensor | None = None,
    argmax: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Put tiles together to an image, or to the classes of its largest scores.

    The counterpart of :func:`segfuse.ops.gather_tiles`.  Where tiles overlap the later one wins;
    with a ``window`` they are blended, to ``sum w t / sum w``, added in the order of the tiles in
    float32 (float64 for float64) and rounded at the end.  What falls outside of the image is
    dropped.  A call sees only its own tiles: to blend an image in bands, pass every tile that
    touches the band.

    Args:
        tiles: ``(T, C, *s)``, one to three spatial axes, of any strides, as cropped views have
            them.  Any plain dtype; floating with ``window`` or ``argmax``.
        corners: where the tiles' first elements go, ``(T, D)`` int64, on the CPU or the tiles'
            device, in the order of the axes; or a sequence of sequences of ints.  Negative ones and
            any beyond the image are allowed, up to 2^60 in size.
        size: of the image, one length an axis.
        window: weights ``(*s)`` of a tile's elements, of the tiles' dtype or float32.  No gradient.
        argmax: return class ids: of the scores, or, with a window, of their unrounded means.  Of
            equal scores the lowest class wins, and a NaN before everything, as in ``torch.argmax``.
            Scores of the image are stored nowhere.  Not differentiable.
        out: where to write the result, of exactly its shape, dtype and device; any strides, but its
            span of memory must not meet that of ``tiles``.  What no tile covers is left as it is.
            No gradients then.

    Returns:
        ``(C, *size)`` of the dtype of ``tiles``; with ``argmax`` ``(*size)``, uint8 to 256 classes,
        int16 to 32768, else int32.  0 where no tile covers, or where the weights add up to 0.

    Raises:
        ValueError: shapes or devices that do not fit, or an ``out`` that cannot be written to.
        TypeError: dtypes other than those above.

    Limits: each row of the image looks at all corners, so that a call should have hundreds of tiles
    rather than many thousands.  The gradient keeps maps of the tiles' size.  Within ``torch.func``
    and forward-mode differentiation the reference runs.
    """
    op = "stitch_tiles"
    dims = _check_tiles(tiles, floating=argmax or window is not None)
    lengths = as_size(op, size, dims)
    corners = as_corners(op, corners, dims, tiles.device)
    if corners.shape[0] != tiles.shape[0]:
        raise wrong(op, "corners", f"one a tile, {tiles.shape[0]}", corners.shape[0])
    if window is not None:
        window = _checked_window(window, tiles)
    dtype = tiles.dtype
    if argmax:
        if tiles.shape[1] == 0:
            raise wrong(op, "tiles", "at least one class", tuple(tiles.shape))
        dtype = label_dtype(tiles.shape[1])
    if out is not None:
        shape = lengths if argmax else (tiles.shape[1], *lengths)
        like = tiles if dtype == tiles.dtype else tiles.new_empty(0, dtype=dtype)
        check_out(op, out, shape, like, tiles=tiles)
    if runs_reference(op, tiles):
        return _reference(tiles, corners, lengths, window=window, argmax=argmax, out=out)
    kernels = torch.ops.segfuse
    if out is not None:
        into = kernels.stitch_tiles_argmax_out if argmax else kernels.stitch_tiles_out
        into(tiles, corners, window, out)
        increment_version(out)
        return out
    if argmax:
        labels: Tensor = kernels.stitch_tiles_argmax(tiles.detach(), corners, lengths, window)
        return labels
    result: Tensor = kernels.stitch_tiles(tiles, corners, lengths, window)
    return result


def _check_tiles(tiles: Tensor, *, floating: bool) -> int:
    """The number of spatial axes."""
    op = "stitch_tiles"
    check_tensor(op, "tiles", tiles, floating=floating)
    if not 1 <= tiles.dim() - 2 <= MOST_AXES:
        raise wrong(op, "tiles", "(T, C, *s) with one to three spatial axes", tuple(tiles.shape))
    return tiles.dim() - 2


def _checked_window(window: Tensor, tiles: Tensor) -> Tensor:
    """The window as the kernel reads it: small, so that a copy costs little."""
    op = "stitch_tiles"
    check_tensor(op, "window", window)
    if window.dtype not in (tiles.dtype, torch.float32):
        expected = f"tiles' dtype {tiles.dtype} or torch.float32"
        raise TypeError(f"{op}: window: expected {expected}, got {window.dtype}")
    if window.device != tiles.device:
        raise wrong(op, "window", f"tiles' device {tiles.device}", window.device)
    if window.shape != tiles.shape[2:]:
        raise wrong(op, "window", f"a tile's size {tuple(tiles.shape[2:])}", tuple(window.shape))
    return window.detach().to(wide(tiles.dtype)).contiguous()


def _fake(tiles: Tensor, corners: Tensor, size: Sequence[int], window: Tensor | None) -> Tensor:  # noqa: ARG001
    return tiles.new_empty((tiles.shape[1], *size))


def _fake_argmax(
    tiles: Tensor,
    corners: Tensor,  # noqa: ARG001
    size: Sequence[int],
    window: Tensor | None,  # noqa: ARG001
) -> Tensor:
    return tiles.new_empty(tuple(size), dtype=label_dtype(tiles.shape[1]))


def _fake_out(*_: Any) -> None:
    pass


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    tiles, corners, ctx.size, window = inputs
    ctx.save_for_backward(corners, window)
    ctx.tile_size = tiles.shape[2:]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """To the tile on top, or ``grad / sum w``, gathered, times ``w``; differentiable again."""
    corners, window = ctx.saved_tensors
    count, ones = corners.shape[0], [1] * corners.shape[1]

    def gather(image: Tensor, fill: float = 0.0) -> Tensor:
        tiles: Tensor = torch.ops.segfuse.gather_tiles(
            image, corners, ctx.tile_size, CONSTANT, fill, image.dtype, None, None
        )
        return tiles

    if window is None:
        ids = torch.arange(count, dtype=torch.int32, device=grad.device)
        each = ids.view(count, 1, *ones)
        of_tiles = each.expand(count, 1, *ctx.tile_size)
        on_top = torch.ops.segfuse.stitch_tiles(of_tiles, corners, ctx.size, None)
        wins = gather(on_top, -1.0) == each
        return torch.where(wins, gather(grad), 0), None, None, None
    of_tiles = window.expand(count, 1, *ctx.tile_size)
    weights = torch.ops.segfuse.gather_tiles_backward(of_tiles, corners, ctx.size, CONSTANT, None)
    inverse = torch.where(weights == 0, 0, 1 / weights)  # apart from grad: 0 / 0 has no derivative
    share = grad.to(window.dtype) * inverse
    return (gather(share) * window).to(grad.dtype), None, None, None


def _samples(make: Make) -> Iterator[Sample]:
    floats = make(0).is_floating_point()

    def case(
        name: str,
        tiles: Tensor,
        size: tuple[int, ...],
        *corners: tuple[int, ...],
        weighted: bool = False,
        **options: Any,
    ) -> Sample:
        if weighted:
            options["window"] = make(*tiles.shape[2:]).abs() + 0.125
        at = torch.tensor(corners, dtype=torch.int64, device=tiles.device).view(-1, len(size))
        smooth = "argmax" not in options and tiles.numel() > 0
        return Sample((tiles, at, size), options, name, differentiable=smooth)

    grid = tuple(product((0, 3), (0, 4)))
    around = ((-2, -3), (1, 2), (0, 0), (5, 5))
    yield case("grid", make(4, 2, 4, 5), (7, 9), *grid)
    if floats:
        yield case("blended", make(4, 2, 4, 5), (7, 9), *grid, weighted=True)
        yield case("labels", make(4, 3, 4, 5), (7, 9), *grid, argmax=True)
        yield case("blended labels", make(4, 3, 4, 5), (7, 9), *grid, weighted=True, argmax=True)
    yield case("around", make(4, 2, 4, 5), (7, 8), *around)
    yield case("inside a later", make(3, 1, 5, 9), (5, 30), (0, 1), (0, 12), (0, 4))
    yield case("far", make(3, 2, 2, 3), (4, 5), (-90, 1), (1, 10**15), (-(10**15), 0))
    yield case("signal", make(4, 2, 9), (25,), (-4,), (3,), (15,), (20,))
    yield case("volume", make(3, 2, 3, 2, 5), (4, 3, 9), (-1, 0, 0), (1, 1, 3), (2, -1, 6))
    yield case("one pixel", make(2, 1, 1, 1), (1, 1), (0, 0), (0, 0))
    yield case("no tiles", make(0, 2, 3, 3), (4, 4))
    yield case("no channels", make(1, 0, 3, 3), (4, 4), (0, 0))
    yield case("no pixels", make(1, 2, 3, 3), (0, 4), (0, 0))
    yield case("empty tiles", make(1, 2, 0, 3), (4, 4), (0, 0))
    places = tuple(product((0, 60), (-8, 60)))
    yield case("more than a thread's share", make(4, 2, 70, 70), (125, 129), *places)
    if not floats:
        return
    for options in ({"weighted": True}, {"argmax": True}, {"weighted": True, "argmax": True}):
        name = ", ".join(options)
        yield case(f"around, {name}", make(4, 2, 4, 5), (7, 8), *around, **options)
        yield case(f"rows, {name}", make(3, 5, 2, 40), (2, 77), (0, 0), (0, 20), (0, 37), **options)
        volume = ((-1, 0, 0), (1, 1, 3), (2, -1, 6))
        yield case(f"volume, {name}", make(3, 2, 3, 2, 5), (4, 3, 9), *volume, **options)
        yield case(f"signal, {name}", make(3, 3, 9), (25,), (-4,), (3,), (15,), **options)
        yield case(f"no tiles, {name}", make(0, 2, 3, 3), (4, 4), **options)
        sized = make(4, 2, 70, 70)
        yield case(f"more than a thread's share, {name}", sized, (125, 129), *places, **options)
    yield case("ties", make(2, 3, 4, 4).round(), (4, 6), (0, 0), (0, 2), argmax=True)
    yield case("300 classes", make(2, 300, 2, 3), (2, 4), (0, 0), (0, 1), argmax=True)
    zero = torch.zeros(3, 4, device=make(0).device)
    yield case("weights of 0", make(2, 2, 3, 4), (3, 6), (0, 0), (0, 1), window=zero)


def _failures(make: Make) -> Iterator[tuple[Sample, type[Exception], str]]:
    tiles, size = make(2, 3, 4, 5), (6, 7)
    corners = torch.tensor([[0, 0], [2, -1]], device=tiles.device)

    def call(*args: Any, **kwargs: Any) -> Sample:
        return Sample(args, kwargs)

    def on(**kwargs: Any) -> Sample:
        return Sample((tiles, corners, size), kwargs)

    yield call([1], corners, size), TypeError, "tiles: expected a torch.Tensor, got list"
    yield call(tiles[0, 0], corners, size), ValueError, "tiles: expected (T, C, *s) with one to"
    yield call(tiles, corners[:1], size), ValueError, "corners: expected one a tile, 2, got 1"
    yield call(tiles, corners.int(), size), TypeError, "corners: expected int64, got torch.int32"
    yield call(tiles, [(0,), (1,)], size), ValueError, "corners: expected 2 numbers a tile, got (0,"
    yield call(tiles, corners, (6,)), ValueError, "size: expected 2 lengths, none below 0, got (6,)"
    yield call(tiles, corners, (6, -1)), ValueError, "size: expected 2 lengths, none below 0"
    yield on(window=[1]), TypeError, "window: expected a torch.Tensor, got list"
    yield on(window=make(4, 6)), ValueError, "window: expected a tile's size (4, 5), got (4, 6)"
    yield on(window=make(4, 5).double()), TypeError, "window: expected tiles' dtype torch.float32"
    yield on(window=make(4, 5).to("meta")), ValueError, "window: expected tiles' device"
    ids = tiles.to(torch.int32)
    floats_only = "tiles: expected float64, float32, float16 or bfloat16, got torch.int32"
    yield call(ids, corners, size, argmax=True), TypeError, floats_only
    yield call(ids, corners, size, window=make(4, 5)), TypeError, floats_only
    yield call(tiles[:, :0], corners, size, argmax=True), ValueError, "tiles: expected at least one"
    yield on(out=make(3, 6, 8)), ValueError, "out: expected shape (3, 6, 7), got (3, 6, 8)"
    yield on(out=make(3, 6, 7), argmax=True), ValueError, "out: expected shape (6, 7), got"
    yield on(out=make(6, 7), argmax=True), TypeError, "out: expected dtype torch.uint8, got"
    yield on(out=make(3, 6, 7).double()), TypeError, "out: expected dtype torch.float32, got"
    yield on(out=make(1, 6, 7).expand(3, 6, 7)), ValueError, "out: expected distinct elements"
    shared = make(2, 3, 6, 7)
    inside = call(shared[:, :, :4, :5], corners, size, out=shared[1])
    yield inside, ValueError, "out: expected memory apart from tiles'"
    asking = call(tiles.detach().requires_grad_(), corners, size, out=make(3, 6, 7))
    yield asking, ValueError, "tiles: expected no gradient asked for"


def _benchmarks(make: Make) -> Iterator[Benchmark]:
    side, tile, margin = 4096, 512, 92
    step = tile - 2 * margin
    starts = [min(start, side - step) for start in range(0, side, step)]
    inner = [(y, x) for y in starts for x in starts]
    size = (side, side)

    def placed(tiles: Tensor, places: list[tuple[int, int]], result: Tensor) -> Tensor:
        for part, (y, x) in zip(tiles, places, strict=True):
            result[..., y : y + part.shape[-2], x : x + part.shape[-1]] = part
        return result

    tiles = make(len(inner), 2, tile, tile)[..., margin:-margin, margin:-margin]
    corners = torch.tensor(inner, device=tiles.device)
    result = tiles.new_zeros(2, *size)
    moved = 2 * result.numel() * result.element_size()
    yield Benchmark(
        f"2 x {side}^2 of cropped tiles, out=",
        ours=lambda: stitch_tiles(tiles, corners, size, out=result),
        peer=lambda: placed(tiles, inner, result),
        bytes_moved=moved,
    )
    yield Benchmark(
        f"2 x {side}^2 of cropped tiles, fresh",
        ours=lambda: stitch_tiles(tiles, corners, size),
        peer=lambda: placed(tiles, inner, tiles.new_zeros(2, *size)),
        bytes_moved=moved,
    )
    if not tiles.is_floating_point():
        return
    yield from _blended(make)
    yield from _labelled(make)


def _blended(make: Make) -> Iterator[Benchmark]:
    """Against MONAI's way, which adds weighted tiles and their weights, and divides."""
    side, tile = 2048, 512
    places = [(y, x) for y in range(0, side - 255, 256) for x in range(0, side - 255, 256)]
    places = [(min(y, side - tile), min(x, side - tile)) for y, x in places]
    tiles = make(len(places), 2, tile, tile)
    ramp = torch.linspace(-2, 2, tile, dtype=tiles.dtype, device=tiles.device).square().neg().exp()
    window, corners = ramp[:, None] * ramp, torch.tensor(places, device=tiles.device)

    def peer() -> Tensor:
        total, weights = tiles.new_zeros(2, side, side), tiles.new_zeros(1, side, side)
        for part, (y, x) in zip(tiles, places, strict=True):
            total[:, y : y + tile, x : x + tile] += part * window
            weights[:, y : y + tile, x : x + tile] += window
        return total.div_(weights)

    yield Benchmark(
        f"2 x {side}^2 blended, half overlapping, fresh",
        ours=lambda: stitch_tiles(tiles, corners, (side, side), window=window),
        peer=peer,
        bytes_moved=(tiles.numel() + 2 * side**2) * tiles.element_size(),
    )


def _labelled(make: Make) -> Iterator[Benchmark]:
    side, tile, classes = 1024, 256, 21
    places = [(y, x) for y in range(0, side, tile) for x in range(0, side, tile)]
    tiles, corners = make(len(places), classes, tile, tile), torch.tensor(places)
    corners = corners.to(tiles.device)

    yield Benchmark(
        f"{classes} classes, {side}^2, argmax, fresh",
        ours=lambda: stitch_tiles(tiles, corners, (side, side), argmax=True),
        peer=lambda: stitch_tiles(tiles, corners, (side, side)).argmax(0).to(torch.uint8),
        bytes_moved=tiles.numel() * tiles.element_size() + side**2,
    )


register(
    OpSpec(
        function=stitch_tiles,
        kernels=(
            Kernel("stitch_tiles", _fake, _backward, _setup_context),
            Kernel("stitch_tiles_out", _fake_out),
            Kernel("stitch_tiles_argmax", _fake_argmax),
            Kernel("stitch_tiles_argmax_out", _fake_out),
        ),
        samples=_samples,
        failures=_failures,
        benchmarks=_benchmarks,
        dtypes=(*FLOATING, torch.uint8, torch.bool, torch.int64),
        takes_out=True,
    )
)
