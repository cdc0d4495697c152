"""Pixel error and warping error: topology is kept, and only topology is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

hypothesis = pytest.importorskip("hypothesis")
ndimage = pytest.importorskip("scipy.ndimage")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.extra import numpy as hnp  # noqa: E402

from segfuse.metrics import PixelErrors, pixel_error, warp, warping_error  # noqa: E402
from segfuse.metrics.boundaries import _SIMPLE  # noqa: E402

DATA = Path(__file__).parents[2] / "shared/data"
Map = NDArray[np.bool_]
FOUR, EIGHT = ndimage.generate_binary_structure(2, 1), np.ones((3, 3))
RING = [(1, 2), (0, 2), (0, 1), (0, 0), (1, 0), (2, 0), (2, 1), (2, 2)]  # from east around


def topology(cells: Map) -> tuple[int, int]:
    """Cells, and components of what is none, the picture's surroundings with them."""
    padded = np.pad(cells, 1)
    return ndimage.label(padded, FOUR)[1], ndimage.label(~padded, EIGHT)[1]


def is_simple(window: Map) -> bool:
    """Whether flipping the middle of 3 x 3 keeps topology, by the definition of Bertrand."""
    inside, outside = window.copy(), ~window
    inside[1, 1] = outside[1, 1] = False
    components, _ = ndimage.label(inside, FOUR)
    touching = set(components[[0, 1, 1, 2], [1, 0, 2, 1]]) - {0}
    return len(touching) == 1 and ndimage.label(outside, EIGHT)[1] == 1


def stuck(warped: Map, prediction: Map, mask: Map) -> bool:
    """Whether no pixel that differs may still be flipped."""
    padded = np.pad(warped, 1)
    wrong = np.argwhere((warped != prediction) & mask)
    return not any(is_simple(padded[y : y + 3, x : x + 3]) for y, x in wrong)


def one_at_a_time(prediction: Map, target: Map, mask: Map, order: np.random.Generator) -> Map:
    """The greedy search, a pixel after another in any order, as it is defined."""
    padded = np.pad(target, 1)
    flipped = True
    while flipped:
        flipped = False
        for y, x in order.permutation(np.argwhere((padded[1:-1, 1:-1] != prediction) & mask)):
            if is_simple(padded[y : y + 3, x : x + 3]):
                padded[y + 1, x + 1] ^= True
                flipped = True
    return padded[1:-1, 1:-1]


def maps(side: int = 9, count: int = 2) -> st.SearchStrategy[tuple[Map, ...]]:
    shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=side)
    return shapes.flatmap(lambda shape: st.tuples(*[hnp.arrays(np.bool_, shape)] * count))


@st.composite
def scenes(draw: st.DrawFn) -> Map:
    """Discs and rings of cell, some touching, some open."""
    y, x = np.mgrid[: draw(st.integers(12, 40)), : draw(st.integers(12, 40))]
    cells = np.zeros(y.shape, np.bool_)
    for _ in range(draw(st.integers(1, 5))):
        distance = np.hypot(y - draw(st.integers(0, 40)), x - draw(st.integers(0, 40)))
        outer = draw(st.integers(2, 12))
        cells |= (distance < outer) & (distance >= draw(st.sampled_from([0, 0, outer - 2])))
    return cells


def cell_grid() -> Map:
    """3 x 4 cells of 15 x 15, with boundaries of 3 between them."""
    cells = np.zeros((60, 80), np.bool_)
    for y in range(3):
        for x in range(4):
            cells[3 + 18 * y : 18 + 18 * y, 3 + 18 * x : 18 + 18 * x] = True
    return cells


def test_simple_points_are_those_of_the_definition() -> None:
    for code in range(256):
        window = np.zeros((3, 3), np.bool_)
        for bit, place in enumerate(RING):
            window[place] = code >> (7 - bit) & 1
        for middle in (False, True):
            window[1, 1] = middle
            assert _SIMPLE[code] == is_simple(window)


@given(maps(count=3))
@settings(max_examples=300, deadline=None)
def test_warping_keeps_topology_and_stops_when_stuck(three: tuple[Map, Map, Map]) -> None:
    prediction, target, mask = three
    for free in (None, mask):
        everywhere = np.ones_like(mask)
        warped = warp(prediction, target, mask=free)
        assert warped.shape == target.shape
        assert topology(warped) == topology(target)
        assert stuck(warped, prediction, everywhere if free is None else free)
        changed = warped != target
        assert not (changed & (warped != prediction)).any()  # all flips are towards the prediction
        assert free is None or not (changed & ~free).any()


@given(scenes(), scenes())
@settings(max_examples=50, deadline=None)
def test_warping_of_scenes(prediction: Map, target: Map) -> None:
    height, width = np.minimum(prediction.shape, target.shape)
    prediction, target = prediction[:height, :width], target[:height, :width]
    warped = warp(prediction, target)
    assert topology(warped) == topology(target)
    assert stuck(warped, prediction, np.ones_like(target))
    error = warping_error(prediction, target)
    assert error == PixelErrors(int((warped != prediction).sum()), target.size)
    assert error.wrong <= pixel_error(prediction, target).wrong
    # A flip makes or ends at most 3 cells, or 3 holes.
    cells, holes = np.subtract(topology(prediction), topology(target))
    assert 3 * error.wrong >= max(abs(cells), abs(holes))


@given(maps(), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_against_one_pixel_at_a_time(pair: tuple[Map, Map], seed: int) -> None:
    # Greedy searches in different orders may end in different places: both must be warpings of the
    # truth towards the prediction that are stuck, and one has error 0 only if topologies agree.
    prediction, target = pair
    everywhere = np.ones_like(target)
    slow = one_at_a_time(prediction, target, everywhere, np.random.default_rng(seed))
    fast = warp(prediction, target)
    for warped in (slow, fast):
        assert topology(warped) == topology(target)
        assert stuck(warped, prediction, everywhere)
        if (warped == prediction).all():
            assert topology(prediction) == topology(target)


def test_orders_agree_where_errors_are_apart() -> None:
    target = cell_grid()
    prediction = np.roll(target, (1, 2), (0, 1))
    prediction[22:25, 10:13] = True  # a bridge
    prediction[10, 30:34] = False  # a hole
    slow = one_at_a_time(prediction, target, np.ones_like(target), np.random.default_rng(0))
    assert (slow != prediction).sum() == warping_error(prediction, target).wrong


def test_moved_boundaries_cost_nothing() -> None:
    target = cell_grid()
    for shift in [(0, 1), (2, 0), (-2, -2), (0, 3)]:
        moved = np.roll(target, shift, (0, 1))
        assert pixel_error(moved, target).wrong >= 360
        assert warping_error(moved, target).wrong == 0
    for moved in (ndimage.binary_erosion(target, iterations=6), ndimage.binary_dilation(target)):
        assert warping_error(moved, target).wrong == 0
        assert warping_error(target, moved).wrong == 0


def test_each_error_of_topology_costs_its_narrowest() -> None:
    target = cell_grid()
    everything = np.ndindex(3, 4)
    for y, x in everything:
        top, left = 3 + 18 * y, 3 + 18 * x
        holed, split, extra = target.copy(), target.copy(), target.copy()
        holed[top + 4 : top + 9, left + 4 : left + 9] = False
        split[top : top + 15, left + 5 : left + 9] = False
        extra[top - 2, left - 2] = True
        lost = target.copy()
        lost[top : top + 15, left : left + 15] = False
        assert warping_error(extra, target).wrong == 1
        assert warping_error(lost, target).wrong == 1  # it shrinks to a pixel
        assert warping_error(holed, target).wrong == 25  # all of it, none being simple
        assert warping_error(split, target).wrong == 4  # the cut's width
        if x < 3:
            merged = target.copy()
            merged[top + 3 : top + 12, left + 15 : left + 18] = True
            assert warping_error(merged, target).wrong == 9  # the membrane that is missing
            assert warping_error(target, merged).wrong == 3  # the bridge that is too much


def test_diagonals_join_boundaries_and_not_cells() -> None:
    line = np.eye(8, dtype=np.bool_)
    assert topology(line)[0] == 8
    assert topology(~line)[0] == 2
    assert topology(warp(~line, np.ones_like(line)))[0] == 1


def test_mask_bounds_the_warping() -> None:
    target = cell_grid()
    moved = np.roll(target, 2, 1)
    distance = np.where(target, *map(ndimage.distance_transform_edt, (target, ~target)))
    assert warping_error(moved, target, mask=distance <= 2).wrong == 0
    near = warping_error(moved, target, mask=distance <= 1).wrong
    assert 0 < near < pixel_error(moved, target).wrong
    nowhere = np.zeros_like(target)
    assert warping_error(moved, target, mask=nowhere) == pixel_error(moved, target)


def test_sections_are_warped_one_by_one_and_add_up() -> None:
    random = np.random.default_rng(0)
    target = random.random((5, 17, 23)) < 0.6
    prediction = np.where(random.random(target.shape) < 0.2, ~target, target)
    mask = random.random(target.shape) < 0.9
    for free in (None, mask):
        each = [None] * 5 if free is None else list(free)
        errors = [
            warping_error(p, t, mask=m) for p, t, m in zip(prediction, target, each, strict=True)
        ]
        whole = warping_error(prediction, target, mask=free)
        assert whole == sum(errors)
        assert whole.error == whole.wrong / target.size
    assert sum(map(pixel_error, prediction, target)) == pixel_error(prediction, target)
    with pytest.raises(TypeError):
        pixel_error(prediction, target) + 1
    with pytest.raises(TypeError):
        1 + pixel_error(prediction, target)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0), (0, 4, 4), (2, 0, 4), (1, 1), (1, 9)])
def test_small_and_empty(shape: tuple[int, ...]) -> None:
    cells, none = np.ones(shape, np.bool_), np.zeros(shape, np.bool_)
    for prediction, target in [(cells, cells), (none, none)]:
        assert warping_error(prediction, target) == PixelErrors(0, cells.size)
    assert warping_error(none, cells).wrong == min(cells.size, 1)
    assert warping_error(cells, none).wrong == cells.size
    assert np.isnan(pixel_error(cells, none).error) == (cells.size == 0)
    assert warp(cells, none).shape == shape


def test_dtype_layout_and_library_do_not_matter() -> None:
    random = np.random.default_rng(1)
    target, prediction = random.random((2, 21, 34)) < 0.7
    expected = warping_error(prediction, target)
    before = target.copy()
    for one, other in [
        (prediction.astype(np.uint8) * 255, target.astype(np.int64) * 2**40),
        (prediction.copy("F"), target[::-1].copy()[::-1]),
        (torch.from_numpy(prediction), torch.from_numpy(target.T.copy()).T),
    ]:
        assert warping_error(one, other) == expected
        assert pixel_error(one, other).wrong == (prediction != target).sum()
    warp(prediction, target)[...] = False  # a copy
    warp(target, target)[...] = False
    assert np.array_equal(before, target)


def test_squares_are_the_pixel_error() -> None:
    target, prediction = np.random.default_rng(2).random((2, 13, 7)) < 0.5
    squares = ((prediction.astype(float) - target.astype(float)) ** 2).mean()
    assert pixel_error(prediction, target).error == pytest.approx(squares)


FLAT = np.zeros((3, 3), np.int64)


@pytest.mark.parametrize("function", [pixel_error, warping_error, warp])
@pytest.mark.parametrize(
    ("prediction", "error", "message"),
    [
        (np.full((3, 3), np.nan), TypeError, "prediction: expected an integer dtype or bool"),
        (FLAT - 1, ValueError, "prediction: expected ids >= 0, got -1"),
        (FLAT[:2], ValueError, r"prediction: expected target's shape \(3, 3\), got \(2, 3\)"),
        (None, TypeError, "prediction: expected a NumPy array or a dense torch tensor, got None"),
    ],
)
def test_refused(function: Any, prediction: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"{function.__name__}: {message}"):
        function(prediction, FLAT)


def test_refused_by_warp() -> None:
    for shape in [(4,), (1, 2, 3, 4), ()]:
        flat = np.zeros(shape, np.int64)
        with pytest.raises(ValueError, match=r"warp: target: expected shape \(H, W\) or"):
            warp(flat, flat)
    with pytest.raises(ValueError, match=r"warp: mask: expected target's shape \(3, 3\), got"):
        warp(FLAT, FLAT, mask=FLAT[:, :2])
    with pytest.raises(TypeError, match="warp: mask: expected an integer dtype or bool, got float"):
        warp(FLAT, FLAT, mask=np.ones((3, 3)))


def test_real_membranes() -> None:
    image = pytest.importorskip("PIL.Image")
    if not (DATA / "em/labels").is_dir():
        pytest.skip("needs shared/data")
    target, other = (np.asarray(image.open(DATA / f"em/labels/{n}.png")) > 0 for n in ("00", "01"))
    for prediction in (other, ndimage.binary_erosion(target, iterations=2), np.roll(target, 3, 1)):
        warped = warp(prediction, target)
        assert topology(warped) == topology(target)
        assert stuck(warped, prediction, np.ones_like(target))
        assert warping_error(prediction, target).wrong < pixel_error(prediction, target).wrong / 5
