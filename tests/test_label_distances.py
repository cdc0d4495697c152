"""Nearest labels, weight maps and gaps against SciPy, on pictures made up and real."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from segfuse.ops import label_distances, separate_touching, unet_weight_map

DATA = Path(__file__).parents[2] / "shared/data"
ULP = 2.0**-23


def transforms(labels: NDArray[np.int64], spacing: tuple[float, ...]) -> NDArray[np.float64]:
    """The two least distances, one Euclidean transform a label."""
    least = np.full((2, *labels.shape), np.inf)
    for label in np.unique(labels[labels != 0]):
        own = ndimage.distance_transform_edt(labels != label, spacing)
        least[1] = np.minimum(least[1], np.maximum(least[0], own))
        least[0] = np.minimum(least[0], own)
    return least


def agrees(labels: NDArray[np.int64], spacing: tuple[float, ...]) -> None:
    truth = transforms(labels, spacing)
    distances, ids = label_distances(torch.from_numpy(labels), spacing=spacing, dims=labels.ndim)
    got = distances.double().numpy()
    finite = np.isfinite(truth)
    assert (np.isfinite(got) == finite).all()
    assert (np.abs(got[finite] - truth[finite]) <= ULP * truth[finite]).all()
    found = ids.numpy()
    assert ((found != 0) == finite).all()
    assert not ((found[0] == found[1]) & (found[0] != 0)).any()
    for label in np.unique(labels[labels != 0]):
        own = ndimage.distance_transform_edt(labels != label, spacing)
        for k in (0, 1):
            there = found[k] == label
            assert (np.abs(got[k][there] - own[there]) <= ULP * own[there]).all()


@st.composite
def pictures(draw: st.DrawFn) -> NDArray[np.int64]:
    """None to hundreds of labels: pixels, lines, rings, discs, noise, regions that touch."""
    height = draw(st.integers(1, 30))
    width = draw(st.integers(1, 150))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    labels = np.zeros((height, width), np.int64)
    y, x = np.mgrid[:height, :width]
    kind = draw(st.sampled_from(["pixels", "noise", "lines", "rings", "discs", "regions", "mix"]))
    count = draw(st.integers(0, 30))
    if kind in ("noise", "mix"):
        share = draw(st.sampled_from([0.01, 0.2, 1.0]))
        many = draw(st.sampled_from([1, 2, 5, 500]))
        noise = rng.integers(1, many + 1, labels.shape)
        labels = np.where(rng.random(labels.shape) < share, noise, labels)
    if kind == "regions" and count:
        seeds = rng.random((count, 2)) * (height, width)
        away = (y[..., None] - seeds[:, 0]) ** 2 + (x[..., None] - seeds[:, 1]) ** 2
        return away.argmin(-1) + draw(st.integers(0, 1))
    for label in range(1, count + 1):
        cy, cx = rng.random(2) * (height, width)
        if kind in ("pixels", "mix"):
            labels[int(cy), int(cx)] = label
        elif kind == "lines":
            labels[(int(cy), slice(None)) if label % 2 else (slice(None), int(cx))] = label
        elif kind in ("rings", "discs"):
            away, radius = np.hypot(y - cy, x - cx), rng.random() * 12
            inner = radius - 1.5 if kind == "rings" else -1
            labels[(away <= radius) & (away > inner)] = label
    return labels


@settings(max_examples=200, deadline=None)
@given(pictures(), st.sampled_from([(1.0, 1.0), (0.5, 0.5), (0.5, 2.0), (1.0, 0.3), (7.0, 1.0)]))
def test_equals_one_transform_a_label(
    labels: NDArray[np.int64], spacing: tuple[float, float]
) -> None:
    agrees(labels, spacing)


@settings(max_examples=60, deadline=None)
@given(pictures(), st.integers(1, 7), st.sampled_from([(1.0, 1.0, 1.0), (2.0, 0.5, 1.0)]))
def test_equals_one_transform_a_label_in_volumes(
    picture: NDArray[np.int64], depth: int, spacing: tuple[float, float, float]
) -> None:
    sections = [np.roll(picture, 3 * z, axis=1)[:12, :16] * (z % 3 != 1) for z in range(depth)]
    agrees(np.stack(sections), spacing)


@settings(max_examples=60, deadline=None)
@given(pictures(), st.sampled_from([1.0, 0.5, 3.0]))
def test_weight_map_is_made_of_those_distances(labels: NDArray[np.int64], sigma: float) -> None:
    least = transforms(labels, (1, 1))
    border = 10 * np.exp(-(least.sum(0) ** 2) / (2 * sigma**2))
    want = 1 + np.where(labels == 0, border, 0)
    got = unet_weight_map(torch.from_numpy(labels), sigma=sigma, class_weight=None)
    assert np.abs(got.numpy() - want).max() <= 16 * ULP


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int16, torch.uint16, torch.uint32, torch.uint64]
)
def test_dtypes_that_the_generated_tests_leave_out(dtype: torch.dtype) -> None:
    labels = torch.randint(0, 3, (20, 30), generator=torch.Generator().manual_seed(0))
    same = labels.to(dtype)
    distances, ids = label_distances(labels)
    assert torch.equal(label_distances(same)[0], distances)
    assert torch.equal(label_distances(same)[1].to(torch.int64), ids)
    assert torch.equal(unet_weight_map(same), unet_weight_map(labels))
    assert torch.equal(separate_touching(same).to(torch.int64), separate_touching(labels))


def test_large_ids_stay_distinct() -> None:
    labels = torch.zeros(3, 8, dtype=torch.int64)
    labels[1, 1], labels[1, 6] = 2**33 + 1, 1  # alike in 32 bits
    distances, ids = label_distances(labels)
    assert ids[:, 1, 2].tolist() == [2**33 + 1, 1]
    assert distances[:, 1, 2].tolist() == [1, 4]
    negative = torch.tensor([[-5, 0, 0, 7]], dtype=torch.int8)
    assert label_distances(negative)[1][:, 0, 1].tolist() == [-5, 7]


def test_sizes_beyond_16_bits() -> None:
    """Where offsets and squares need more than 16 and 32 bits."""
    labels = torch.zeros(1, 70_001, dtype=torch.int32)
    labels[0, 0], labels[0, -1] = 4, 9
    for picture in (labels, labels.T):
        distances, ids = label_distances(picture)
        place = torch.arange(70_001).view(picture.shape)
        near = torch.minimum(place, 70_000 - place)
        assert torch.equal(distances[0].long(), near)
        assert torch.equal(distances[1].long(), 70_000 - near)
        assert torch.equal(ids[0] == 4, place < 35_000) or ids[0].view(-1)[35_000] == 4


@settings(max_examples=60, deadline=None)
@given(pictures())
def test_no_two_labels_stay_neighbours(labels: NDArray[np.int64]) -> None:
    apart = separate_touching(torch.from_numpy(labels)).numpy()
    assert (apart[apart != labels] == 0).all()
    lone = (
        ndimage.maximum_filter(apart, 3),
        ndimage.minimum_filter(np.where(apart == 0, apart.max() + 1, apart), 3, mode="nearest"),
    )
    assert ((lone[0] == lone[1]) | (apart == 0)).all()
    for turn in range(4):
        turned = separate_touching(torch.from_numpy(np.rot90(labels, turn).copy())).numpy()
        assert (np.rot90(apart, turn) == turned).all()


@pytest.mark.skipif(not DATA.is_dir(), reason="needs shared data")
def test_equals_scipy_on_real_images() -> None:
    from segfuse.data.files import read_labels

    paths = sorted(p for kind in ("nuclei", "cells") for p in DATA.glob(f"{kind}/labels/*"))
    few = 0
    for path in paths:
        labels = np.asarray(read_labels(path)).astype(np.int64).squeeze()
        if labels.size * len(np.unique(labels)) < 2**21:  # the rest takes minutes
            agrees(labels, (1.0, 1.0))
            few += 1
    assert few >= 10
