"""What the registry cannot say of gather_tiles and stitch_tiles."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from backends import BACKENDS, maker, running
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from segfuse.ops import gather_tiles, stitch_tiles

NUMPY = {
    "mirror": "reflect",
    "symmetric": "symmetric",
    "edge": "edge",
    "wrap": "wrap",
    "constant": "constant",
}
RAN = [name for name in BACKENDS if name != "cuda"]
on_backends = pytest.mark.parametrize("backend", RAN)
few = settings(max_examples=60, deadline=None)

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=3)


@st.composite
def gathered(draw: st.DrawFn) -> tuple[Tensor, list[list[int]], list[int], str]:
    """An image, corners near and far, a tile's size, a border."""
    image_size = draw(sizes)
    dims = len(image_size)
    size = draw(st.lists(st.integers(0, 12), min_size=dims, max_size=dims))
    corner = st.lists(st.integers(-40, 40), min_size=dims, max_size=dims)
    corners = draw(st.lists(corner, max_size=4))
    image = torch.arange(1, 2 * int(np.prod(image_size)) + 1, dtype=torch.int32)
    return image.view(2, *image_size), corners, size, draw(st.sampled_from(list(NUMPY)))


@given(gathered(), st.sampled_from(RAN))
@few
def test_borders_are_numpys(
    case: tuple[Tensor, list[list[int]], list[int], str], backend: str
) -> None:
    image, corners, size, border = case
    with running(backend):
        tiles = gather_tiles(image, corners, size, border=border, fill=-7)
    assert tiles.shape == (len(corners), 2, *size)
    assert torch.equal(tiles, gather_tiles.reference(image, corners, size, border=border, fill=-7))
    options: Any = {"constant_values": -7} if border == "constant" else {}
    for tile, corner in zip(tiles, corners, strict=True):
        reach = [
            (max(0, -c), max(0, c + s - n))
            for c, s, n in zip(corner, size, image.shape[1:], strict=True)
        ]
        padded = np.pad(image.numpy(), [(0, 0), *reach], mode=NUMPY[border], **options)
        box = tuple(
            slice(c + before, c + before + s)
            for c, (before, _), s in zip(corner, reach, size, strict=True)
        )
        assert np.array_equal(tile.numpy(), padded[(slice(None), *box)])


@given(gathered(), st.sampled_from(RAN))
@few
def test_the_gradient_counts_who_reads(
    case: tuple[Tensor, list[list[int]], list[int], str], backend: str
) -> None:
    """Of a sum: as often as each element occurs in the tiles."""
    ids, corners, size, border = case
    image = torch.zeros(ids.shape, requires_grad=True)
    with running(backend):
        gather_tiles(image, corners, size, border=border).sum().backward()
    read = gather_tiles.reference(ids, corners, size, border=border, fill=0).flatten()
    counts = torch.bincount(read, minlength=ids.numel() + 1)[1:]
    assert torch.equal(image.grad.flatten(), counts.float())


@st.composite
def plans(draw: st.DrawFn) -> tuple[list[int], list[int], list[list[int]]]:
    """An image's size, a tile's, and corners whose tiles cover the image, in any order."""
    image_size = draw(sizes)
    size = [draw(st.integers(1, n + 3)) for n in image_size]
    starts = []
    for n, s in zip(image_size, size, strict=True):
        step, first = draw(st.integers(1, s)), -draw(st.integers(0, s - 1))
        starts.append(range(first, n, step))
    return image_size, size, draw(st.permutations([list(c) for c in product(*starts)]))


@given(plans(), st.sampled_from(RAN), st.booleans())
@few
def test_stitching_what_was_gathered_gives_the_image(
    plan: tuple[list[int], list[int], list[list[int]]],
    backend: str,
    weighted: bool,
) -> None:
    image_size, size, corners = plan
    image = torch.randint(-50, 50, (2, *image_size)).float()  # so that weighted sums are exact
    window = torch.randint(1, 9, size).float() if weighted else None
    with running(backend):
        tiles = gather_tiles(image, corners, size)
        assert torch.equal(stitch_tiles(tiles, corners, image_size, window=window), image)
        labels = stitch_tiles(tiles, corners, image_size, window=window, argmax=True)
    assert torch.equal(labels, image.argmax(0).to(torch.uint8))


@given(gathered(), st.sampled_from(RAN), st.booleans(), st.booleans())
@few
def test_stitching_is_its_reference(
    case: tuple[Tensor, list[list[int]], list[int], str],
    backend: str,
    weighted: bool,
    argmax: bool,
) -> None:
    """Of tiles in any place; and what none covers is left as it is."""
    image, corners, size, _ = case
    tiles = torch.randint(-4, 5, (len(corners), 3, *size)).float()
    window = torch.rand(size).sub(0.2).clamp(min=0) if weighted else None
    options: Any = {"window": window, "argmax": argmax}
    whole = image.shape[1:]
    with running(backend):
        got = stitch_tiles(tiles, corners, whole, **options)
        out = stitch_tiles(tiles, corners, whole, **options, out=torch.full_like(got, 3))
    assert torch.equal(got, stitch_tiles.reference(tiles, corners, whole, **options))
    want = torch.full_like(got, 3)
    stitch_tiles.reference(tiles, corners, whole, **options, out=want)
    assert torch.equal(out, want)


@on_backends
def test_every_bit_is_kept(backend: str) -> None:
    """NaN and its payload, where nothing is computed."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        image = maker("cpu", dtype, bits=True)(3, 33, 50)
        corners = [(-3, -5), (2, 11), (20, 30)]
        with running(backend):
            tiles = gather_tiles(image, corners, (19, 41))
            again = stitch_tiles(tiles, corners, (33, 50))
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        want = gather_tiles.reference(image.view(bits), corners, (19, 41))
        assert torch.equal(tiles.view(bits), want)
        assert torch.equal(again.view(bits), stitch_tiles.reference(want, corners, (33, 50)))


@on_backends
def test_nan_wins_and_then_the_lowest_class(backend: str) -> None:
    tiles = torch.randint(0, 3, (3, 5, 7, 40)).float()
    tiles[torch.rand(tiles.shape) < 0.1] = torch.nan
    corners = [(0, 0), (0, 30), (5, 10)]
    with running(backend):
        labels = stitch_tiles(tiles, corners, (12, 70), argmax=True)
    assert torch.equal(labels, stitch_tiles(tiles, corners, (12, 70)).argmax(0).to(torch.uint8))


@on_backends
@pytest.mark.parametrize(("classes", "dtype"), [(256, torch.uint8), (257, torch.int16)])
def test_labels_are_as_narrow_as_can_be(backend: str, classes: int, dtype: torch.dtype) -> None:
    scores = torch.zeros(1, classes, 2, 3)
    scores[:, -1] = 1
    with running(backend):
        labels = stitch_tiles(scores, [(0, 0)], (2, 3), argmax=True)
    assert labels.dtype == dtype
    assert (labels == classes - 1).all()


@on_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "source",
    [
        *(torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32),
        *(torch.uint64, torch.int64, torch.bool, torch.float16, torch.bfloat16),
        *(torch.float32, torch.float64),
    ],
)
def test_converts_from_every_dtype(source: torch.dtype, dtype: torch.dtype, backend: str) -> None:
    image = (torch.rand(3, 11, 37) * 100).to(source)
    options: Any = {"dtype": dtype, "scale": (0.5, 0.1, -3), "shift": 0.7, "fill": 0.1}
    for view in (image, image.permute(0, 2, 1).contiguous().permute(0, 2, 1)):
        for border in ("mirror", "constant"):
            calls: Any = (view, [(-2, -3), (1, 2), (5, 9)], (8, 31))
            with running(backend):
                got = gather_tiles(*calls, border=border, **options)
            want = gather_tiles.reference(*calls, border=border, **options)
            assert torch.equal(got, want)


@on_backends
@pytest.mark.parametrize("of_image", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("of_tiles", [torch.bfloat16, torch.float32, torch.float64])
def test_gradients_through_a_conversion(
    of_image: torch.dtype, of_tiles: torch.dtype, backend: str
) -> None:
    image = torch.randn(2, 6, 7).to(of_image).requires_grad_()
    upstream = torch.randint(-4, 5, (2, 2, 5, 5)).to(of_tiles)
    corners = [(-2, 1), (3, 4)]
    with running(backend):
        tiles = gather_tiles(image, corners, (5, 5), dtype=of_tiles, scale=0.5, shift=1.0)
        (got,) = torch.autograd.grad(tiles, image, upstream)
    exact = torch.zeros(2, 6, 7, dtype=torch.float64, requires_grad=True)
    tiles = gather_tiles.reference(exact, corners, (5, 5), scale=0.5)
    (want,) = torch.autograd.grad(tiles, exact, upstream.double())
    assert got.dtype == of_image
    assert torch.equal(got, want.to(of_image))


@on_backends
def test_pictures_with_the_channels_last(backend: str) -> None:
    """An (H, W, C) array, without a copy, and into one."""
    picture = torch.randint(0, 256, (30, 40, 3), dtype=torch.uint8)
    image, corners, size = picture.permute(2, 0, 1), [(-4, -4), (8, 16)], (12, 20)
    out = torch.empty(2, *size, 3).permute(0, 3, 1, 2)
    with running(backend):
        gather_tiles(image, corners, size, dtype=torch.float32, scale=1 / 255, out=out)
    want = gather_tiles.reference(image, corners, size, dtype=torch.float32, scale=1 / 255)
    assert torch.equal(out, want)
    target = torch.zeros(30, 40, 3)
    with running(backend):
        stitch_tiles(out, corners, (30, 40), out=target.permute(2, 0, 1))
    assert torch.equal(target.permute(2, 0, 1), stitch_tiles.reference(want, corners, (30, 40)))


def test_gradients_of_nothing_have_the_shape() -> None:
    image = torch.zeros(2, 0, 5, requires_grad=True)
    gather_tiles(image, [(0, 0)], (2, 3), border="constant").sum().backward()
    assert image.grad.shape == image.shape
    tiles = torch.zeros(0, 2, 3, 3, requires_grad=True)
    stitch_tiles(tiles, [], (4, 4)).sum().backward()
    assert tiles.grad.shape == tiles.shape


def test_labels_have_no_gradient() -> None:
    scores = torch.randn(1, 3, 4, 4, requires_grad=True)
    assert not stitch_tiles(scores, [(0, 0)], (4, 4), argmax=True).requires_grad


def test_what_no_tile_covers_is_not_even_written() -> None:
    """So that tiles may be put into memory that others write to."""
    shared = np.zeros((8, 8), dtype=np.float32)
    shared.flags.writeable = True
    out = torch.from_numpy(shared)[None]
    stitch_tiles(torch.ones(1, 1, 2, 3), [(3, 4)], (8, 8), out=out)
    assert shared.sum() == 6
    assert (shared[3:5, 4:7] == 1).all()


def test_corners_as_far_as_int64_reaches_do_no_harm() -> None:
    ends = torch.iinfo(torch.int64)
    corners = torch.tensor([[ends.min, ends.max], [ends.max, ends.min]])
    image = torch.rand(2, 5, 6)
    for border in NUMPY:
        tiles = gather_tiles(image, corners, (3, 4), border=border, fill=-1)
        assert ((tiles >= -1) & (tiles < 1)).all()
    assert stitch_tiles(image.expand(2, 2, 5, 6), corners, (9, 9)).sum() == 0


def test_the_raw_operators_check_for_themselves() -> None:
    """``torch.ops.segfuse`` is within reach too, and must not read out of bounds."""
    op = torch.ops.segfuse
    image, tiles = torch.zeros(2, 6, 7), torch.zeros(1, 2, 3, 4)
    corners, size, f32 = torch.zeros(1, 2, dtype=torch.int64), [3, 4], torch.float32
    for call in (
        lambda: op.gather_tiles(image, corners.int(), size, 0, 0.0, f32, None, None),
        lambda: op.gather_tiles(image, corners[:, :1], size, 0, 0.0, f32, None, None),
        lambda: op.gather_tiles(image, corners, [3], 0, 0.0, f32, None, None),
        lambda: op.gather_tiles(image, corners, [3, -4], 0, 0.0, f32, None, None),
        lambda: op.gather_tiles(image, corners, size, 5, 0.0, f32, None, None),
        lambda: op.gather_tiles(image, corners, size, 0, 0.0, torch.int32, None, None),
        lambda: op.gather_tiles(image, corners, size, 0, 0.0, f32, torch.ones(3), None),
        lambda: op.gather_tiles(image[:, :0], corners, size, 0, 0.0, f32, None, None),
        lambda: op.gather_tiles(image[0, 0], corners, size, 0, 0.0, f32, None, None),
        lambda: op.gather_tiles_out(image, corners, 0, 0.0, None, None, image),
        lambda: op.gather_tiles_out(image, corners, 0, 0.0, None, None, tiles[:, :1]),
        lambda: op.gather_tiles_backward(tiles, corners, [6], 0, None),
        lambda: op.gather_tiles_backward(tiles, corners.expand(2, 2), [6, 7], 0, None),
        lambda: op.stitch_tiles(tiles, corners.expand(2, 2), [6, 7], None),
        lambda: op.stitch_tiles(tiles, corners, [6, 7, 8], None),
        lambda: op.stitch_tiles(tiles, corners, [6, 7], torch.ones(3, 5)),
        lambda: op.stitch_tiles(tiles, corners, [6, 7], torch.ones(3, 4).double()),
        lambda: op.stitch_tiles_out(tiles, corners, None, image[:1]),
        lambda: op.stitch_tiles_argmax(tiles[:, :0], corners, [6, 7], None),
        lambda: op.stitch_tiles_argmax_out(tiles, corners, None, image[0]),
    ):
        with pytest.raises(ValueError, match=r"^(gather|stitch)_tiles"):
            call()
