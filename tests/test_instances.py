"""Objects of class maps: components, small ones, holes, and the gaps between them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

ndimage = pytest.importorskip("scipy.ndimage", reason="needs segfuse[cli]")

from segfuse import instances, ops  # noqa: E402


def picture(text: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Digits are ids; dots are background."""
    rows = text.replace(".", "0").split()
    return np.array([[int(letter) for letter in row] for row in rows], np.uint8)


def test_components_are_numbered_in_order() -> None:
    found = instances(picture("1..2 1..2 .3.."))
    assert found.dtype == np.int32
    assert np.array_equal(found, picture("1..2 1..2 .3.."))
    assert instances(picture("1..2 1..2 .3.."), connectivity=2).max() == 2  # 1 and 3 meet


def test_foreground_is_a_class_or_all_that_is_not_background() -> None:
    classes = picture("11.22 11.22 ...22")
    assert np.array_equal(instances(classes, foreground=2), picture("...11 ...11 ...11"))
    assert np.array_equal(instances(classes), classes)
    assert np.array_equal(instances(255 * (classes != 0)), classes)
    assert instances(classes, foreground=7).max() == 0


def test_small_objects_are_dropped_and_the_rest_numbered_anew() -> None:
    classes = picture("1.11. ..11. .1.1.")
    assert np.array_equal(instances(classes, smallest=2), picture("..11. ..11. ...1."))
    assert np.array_equal(instances(classes, smallest=1), instances(classes, smallest=0))
    assert instances(classes, smallest=6).max() == 0


def test_holes_of_one_object_are_filled() -> None:
    ring = picture("11111 1...1 1.1.1 1...1 11111")
    assert np.array_equal(instances(ring), picture("11111 1...1 1.2.1 1...1 11111"))  # not alone
    assert (instances(ring, smallest=2) == 1).all()
    assert np.array_equal(
        instances(ring, smallest=2, holes=8), instances(ring > 0, smallest=2, holes=0)
    )
    assert (instances(ring, smallest=2, holes=9) == 1).all()
    open_ = picture("11111 1...1 1...1 1...1 11.11")
    assert np.array_equal(instances(open_), open_)


@pytest.mark.parametrize("connectivity", [1, 2])
def test_holes_as_scipy_fills_them_object_by_object(connectivity: int) -> None:
    mask = np.random.default_rng(connectivity).random((60, 70)) < 0.6
    structure = ndimage.generate_binary_structure(2, connectivity)
    around = ndimage.generate_binary_structure(2, 3 - connectivity)
    labels, count = ndimage.label(mask, structure)
    expected = labels.copy()
    for i in range(1, count + 1):
        filled = ndimage.binary_fill_holes(labels == i, around)
        pieces, number = ndimage.label(filled & (labels != i), around)
        for piece in (pieces == j for j in range(1, number + 1)):
            if not labels[piece].any():
                expected[piece] = i
    found = instances(mask, connectivity=connectivity)
    assert (found != labels).sum() > 20
    assert np.array_equal(found, expected)


def test_growing_into_gaps_undoes_what_separating_opened() -> None:
    rows, columns = np.mgrid[:60, :90]
    true = np.zeros((60, 90), np.int32)
    for i, (y, x) in enumerate([(20, 20), (22, 45), (44, 33), (40, 75)], 1):
        true[(np.hypot(rows - y, columns - x) < 14) & (true == 0)] = i
    cut = ops.separate_touching(torch.from_numpy(true)).numpy()
    assert instances(true).max() == 2
    gaps, everywhere = (instances(cut, grow=grow) for grow in ("gaps", "everywhere"))
    assert instances(cut).max() == gaps.max() == everywhere.max() == 4
    opened = (true != 0) & (cut == 0)
    assert opened.sum() > 20
    assert (gaps[opened] != 0).mean() > 0.9
    assert ((gaps != 0) & (true == 0)).sum() <= 12  # where a contact opens to the background
    assert ((everywhere != 0) & (true == 0)).sum() > 100
    assert np.array_equal(gaps[cut != 0], instances(cut)[cut != 0])


def test_growing_is_by_exact_distance() -> None:
    classes = np.zeros((9, 11), np.uint8)
    classes[4, 3] = 1
    distance = np.hypot(*(np.mgrid[:9, :11] - np.array([4, 3])[:, None, None]))
    for reach in (1, 1.5, 2.9, 100):
        assert np.array_equal(instances(classes, grow="everywhere", reach=reach), distance <= reach)
        assert (
            instances(classes, grow="gaps", reach=reach).sum() == 1
        )  # of one object there is none
    assert not instances(0 * classes, grow="everywhere").any()
    pair = picture("1..2 ....")
    assert np.array_equal(instances(pair, grow="gaps", reach=2), picture("1122 ...."))
    assert np.array_equal(instances(pair, grow="gaps", reach=1.9), pair)


def test_volumes() -> None:
    volume = np.zeros((5, 6, 7), np.int64)
    volume[:, :5, :3] = 1
    volume[2, 2, 1] = 0
    volume[1:3, 1:3, 4:] = 9
    found = instances(torch.from_numpy(volume), grow="gaps", reach=1)
    assert found.shape == volume.shape
    assert found.max() == 2
    assert found[2, 2, 1] == 1
    assert (found[1:3, 1:3, 3] != 0).all()
    assert not found[4, :, 3:].any()


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0, 4), (1, 1), (1, 1, 1), (1, 9)])
@pytest.mark.parametrize("grow", [None, "gaps", "everywhere"])
def test_empty_and_tiny_pictures(shape: tuple[int, ...], grow: Any) -> None:
    for value in (0, 1):
        found = instances(np.full(shape, value, bool), grow=grow, smallest=1)
        assert found.dtype == np.int32
        assert np.array_equal(found, np.full(shape, value))
        assert not instances(np.full(shape, value), smallest=100, grow=grow).any()


def test_more_objects_than_uint16_holds() -> None:
    mask = np.zeros((520, 520), bool)
    mask[::2, ::2] = True
    assert instances(mask).max() == 260 * 260 > 65535


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"labels": [[1]]}, TypeError, "labels: expected a NumPy array"),
        ({"labels": np.zeros((2, 2))}, TypeError, "labels: expected an integer dtype"),
        ({"labels": np.zeros(3, int)}, ValueError, r"labels: expected shape \(H, W\)"),
        ({"labels": np.full((2, 2), -1)}, ValueError, "labels: expected ids >= 0, got -1"),
        ({"foreground": -1}, ValueError, "foreground: expected 0 or more, got -1"),
        ({"foreground": "cell"}, TypeError, "foreground: expected an integer"),
        ({"smallest": -1}, ValueError, "smallest: expected 0 or more, got -1"),
        ({"smallest": 1.5}, TypeError, "smallest: expected an integer, got 1.5"),
        ({"smallest": None}, TypeError, "smallest: expected an integer"),
        ({"holes": True}, TypeError, "holes: expected an integer, got True"),
        ({"connectivity": 3}, ValueError, "connectivity: expected 1 to 2, got 3"),
        ({"grow": "wide"}, ValueError, "grow: expected gaps, everywhere or None, got 'wide'"),
        ({"grow": "gaps", "reach": 0}, ValueError, "reach: expected a finite number above 0"),
        ({"reach": float("nan")}, ValueError, "reach: expected a finite number above 0"),
        ({"reach": "far"}, TypeError, "reach: expected a number, got 'far'"),
    ],
)
def test_refusals(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=f"^instances: {text}"):
        instances(options.pop("labels", np.zeros((2, 2), int)), **options)
