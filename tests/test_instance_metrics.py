"""Figures of instances against their definitions, StarDist's and scikit-image's."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import astuple
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.extra import numpy as hnp  # noqa: E402

from segfuse.metrics import (  # noqa: E402
    IU_THRESHOLDS,
    Overlaps,
    adapted_rand,
    detection_scores,
    foreground_scores,
    mean_average_precision,
    overlaps,
    panoptic_quality,
    seg_score,
    variation_of_information,
)

Labels = NDArray[Any]
FIGURES = (
    adapted_rand,
    detection_scores,
    foreground_scores,
    mean_average_precision,
    panoptic_quality,
    seg_score,
    variation_of_information,
)


def blobs(seed: int, shape: tuple[int, ...] = (60, 70), objects: int = 25) -> Labels:
    """Boxes over each other on background."""
    random = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int64)
    for k in range(1, objects + 1):
        corner = [random.integers(0, n) for n in shape]
        labels[tuple(slice(c, c + random.integers(4, 16)) for c in corner)] = k
    return labels


def disturbed(labels: Labels, seed: int) -> Labels:
    """Move, merge, lose and split some objects."""
    random = np.random.default_rng(seed)
    other = np.roll(labels, random.integers(0, 2, labels.ndim), range(labels.ndim))
    ids = 1 + random.permutation(labels.max() + 1)
    ids[0] = 0
    ids[random.integers(0, ids.size, 3)] = 0
    ids[random.integers(0, ids.size, 3)] = ids[1]
    other = ids[other]
    other[: labels.shape[0] // 3][other[: labels.shape[0] // 3] == 2] = ids.size + 5
    return other


def pictures(sides: int = 6, labels: int = 4) -> st.SearchStrategy[tuple[Labels, Labels]]:
    """Pairs of small pictures of few labels."""
    shapes = hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=sides)
    ids = st.integers(0, labels)
    return shapes.flatmap(lambda shape: st.tuples(*[hnp.arrays(np.int64, shape, elements=ids)] * 2))


def plain(figure: Any) -> tuple[float, ...]:
    return (figure,) if isinstance(figure, float) else astuple(figure)


def same(one: Any, other: Any) -> bool:
    """Whether figures are equal, nan to nan."""
    return plain(one) == pytest.approx(plain(other), nan_ok=True, rel=1e-9, abs=1e-12)


# The table


@given(pictures())
@settings(max_examples=200, deadline=None)
def test_table_is_the_count_of_pairs(pair: tuple[Labels, Labels]) -> None:
    prediction, target = pair
    table = overlaps(prediction, target)
    found = {
        (int(table.target_ids[i]), int(table.prediction_ids[j])): int(n)
        for i, j, n in zip(table.target, table.prediction, table.pixels, strict=True)
    }
    expected: dict[tuple[int, int], int] = {}
    for key in zip(target.ravel().tolist(), prediction.ravel().tolist(), strict=True):
        expected[key] = expected.get(key, 0) + 1
    assert found == expected
    assert table.target_pixels.tolist() == [(target == i).sum() for i in table.target_ids]
    assert table.prediction_pixels.tolist() == [
        (prediction == i).sum() for i in table.prediction_ids
    ]
    assert table.target_objects == len(set(target.ravel()) - {0})
    assert table.prediction_objects == len(set(prediction.ravel()) - {0})
    assert not table.image.any()
    assert {a.dtype for a in vars(table).values()} == {np.dtype(np.int64)}


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int8", ">u2", "int16", "uint32", "int64", "uint64"]
)
def test_dtype_layout_and_library_do_not_matter(dtype: str) -> None:
    target = blobs(1) % 100
    prediction = disturbed(target, 2) % 100
    if dtype == "bool":
        target, prediction = target > 0, prediction > 0
    expected = overlaps(prediction.astype(np.int64), target.astype(np.int64))
    one, other = prediction.astype(dtype), target.astype(dtype)
    forms = [(one, other), (one.copy("F"), other), (one[::-1].copy()[::-1], other.T.copy().T)]
    if dtype != ">u2":
        forms.append((torch.from_numpy(one), torch.from_numpy(other.T.copy()).T))
        forms.append((torch.from_numpy(one), other))
    before = one.copy(), other.copy()
    for form in forms:
        table = overlaps(*form)
        assert all(
            np.array_equal(vars(table)[name], value) for name, value in vars(expected).items()
        )
    assert np.array_equal(one, before[0])
    assert np.array_equal(other, before[1])


def test_large_ids_and_many_segments_are_cheap() -> None:
    ids = np.random.default_rng(0).integers(2**40, 2**62, 250_000).reshape(500, 500)
    table = overlaps(ids, ids)
    assert table.pixels.size == len(np.unique(ids)) == table.target_ids.size
    scores = detection_scores(table)
    assert (scores.average_precision, scores.mean_matched_iu) == (1, 1)
    assert variation_of_information(table).total == 0
    assert overlaps(ids.astype(np.uint64), ids).pixels.size == table.pixels.size


def test_a_set_is_the_sum_of_its_pictures() -> None:
    targets = [blobs(seed) for seed in range(4)]
    made = [overlaps(disturbed(t, 9), t) for t in targets]
    whole = Overlaps.join(made)
    assert whole.image.max() == 3
    together = sum(made)
    assert isinstance(together, Overlaps)
    for other in (made[0] + made[1] + made[2] + made[3], together, sum(made, Overlaps.join([]))):
        assert all(np.array_equal(vars(whole)[k], v) for k, v in vars(other).items())
    one_by_one = [detection_scores(table) for table in made]
    scores = detection_scores(whole)
    for name in ("true_positives", "false_positives", "false_negatives"):
        assert getattr(scores, name) == sum(getattr(s, name) for s in one_by_one)
    tp = [s.true_positives for s in one_by_one]
    ious = [s.mean_matched_iu for s in one_by_one]
    assert scores.mean_matched_iu == pytest.approx(np.average(ious, weights=tp))
    objects = [table.target_objects for table in made]
    assert seg_score(whole) == pytest.approx(
        np.average([seg_score(table) for table in made], weights=objects)
    )
    bits = [variation_of_information(table).split for table in made]
    assert variation_of_information(whole).split == pytest.approx(np.mean(bits))
    for figure in FIGURES:  # of one picture twice, they are the picture's
        assert same(figure(made[0] + made[0]), figure(made[0])) or figure is detection_scores \
            or figure is panoptic_quality  # fmt: skip
    with pytest.raises(TypeError):
        made[0] + 1
    with pytest.raises(TypeError):
        1 + made[0]


def test_empty_pictures_add_nothing() -> None:
    empty = np.zeros((0, 5), np.int64)
    target = blobs(3)
    table = overlaps(disturbed(target, 1), target)
    for figure in FIGURES:
        assert same(figure(overlaps(empty, empty) + table), figure(table))


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("shape", [(0, 4), (5, 4)])
def test_nothing_to_count_is_nan(figure: Any, shape: tuple[int, int]) -> None:
    nothing = np.zeros(shape, np.int64)
    values = plain(figure(overlaps(nothing, nothing)))
    if figure is variation_of_information and nothing.size:
        assert values == (0, 0, 0)  # one segment, which both agree on
    else:
        counts = {0.5, 0}  # the threshold, and how many objects there are
        assert all(math.isnan(v) or v in counts for v in values)
        assert math.isnan(min(values, key=lambda v: v in counts))


def test_objects_in_one_of_the_two_alone() -> None:
    nothing, something = np.zeros((6, 6), np.int64), np.eye(6, dtype=np.int64)
    missed = overlaps(nothing, something)
    scores = detection_scores(missed)
    assert (scores.average_precision, scores.recall, scores.f1) == (0, 0, 0)
    assert math.isnan(scores.precision)
    assert (panoptic_quality(missed).pq, seg_score(missed)) == (0, 0)
    assert math.isnan(panoptic_quality(missed).sq)
    assert adapted_rand(missed).recall == 1  # scikit-image's: background is a segment
    assert foreground_scores(missed).rand_split == pytest.approx(6 / 36)  # each with itself
    invented = overlaps(something, nothing)
    scores = detection_scores(invented)
    assert (scores.average_precision, scores.precision, scores.f1) == (0, 0, 0)
    assert math.isnan(scores.recall)
    assert math.isnan(seg_score(invented))
    assert math.isnan(adapted_rand(invented).error)


@pytest.mark.parametrize(
    ("prediction", "target", "error", "message"),
    [
        (np.zeros((2, 3)), np.zeros((2, 3), int), TypeError,
         "overlaps: prediction: expected an integer dtype or bool, got float64"),
        (np.zeros(3, int), torch.tensor([0, float("nan"), 1]), TypeError,
         "target: expected an integer dtype or bool, got float32"),
        (np.zeros(3, int), torch.zeros(3, dtype=torch.bfloat16), TypeError, "got bfloat16"),
        (np.zeros(3, complex), np.zeros(3, int), TypeError, "got complex128"),
        (np.zeros(3, object), np.zeros(3, int), TypeError, "got object"),
        (np.zeros(3, "M8[s]"), np.zeros(3, int), TypeError, r"got datetime64\[s\]"),
        ([[0, 1]], np.zeros((1, 2), int), TypeError,
         "prediction: expected a NumPy array or a dense torch tensor, got list"),
        (np.ma.zeros(3, int), np.zeros(3, int), TypeError, "got MaskedArray"),
        (torch.zeros(3, dtype=torch.int64).to_sparse(), np.zeros(3, int), TypeError, "got Tensor"),
        (np.zeros((2, 3), int), np.zeros((3, 2), int), ValueError,
         r"overlaps: prediction: expected target's shape \(3, 2\), got \(2, 3\)"),
        (np.zeros((1, 3), int), np.zeros(3, int), ValueError, "expected target's shape"),
        (np.array([1, -3]), np.array([0, 0]), ValueError,
         "overlaps: prediction: expected ids >= 0, got -3"),
        (np.array([1, 2]), np.array([0, 2**63], np.uint64), ValueError,
         r"target: expected ids below 2\^63, got 9223372036854775808"),
    ],
)  # fmt: skip
def test_refused(prediction: Any, target: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        overlaps(prediction, target)


# Detection


def test_detection_by_hand() -> None:
    target = np.array([[1, 1, 1, 1, 0, 2, 2, 0, 3, 3]])
    prediction = np.array([[7, 7, 7, 0, 0, 8, 8, 8, 0, 0]])
    table = overlaps(prediction, target)
    scores = detection_scores(table, 0.7)
    assert astuple(scores) == pytest.approx(
        (0.7, 1 / (1 + 1 + 2), 1 / 2, 1 / 3, 2 / 5, 3 / 4, 1, 1, 2)
    )
    assert mean_average_precision(table, [0.5, 0.7]) == pytest.approx((2 / 3 + 1 / 4) / 2)
    iu = 3 / 4 + 2 / 3
    assert astuple(panoptic_quality(table)) == pytest.approx((iu / 2.5, iu / 2, 2 / 2.5, 2, 0, 1))
    assert seg_score(table) == pytest.approx(iu / 3)


def test_half_counts_for_detection_and_not_for_panoptic_quality() -> None:
    target, prediction = np.array([1, 1, 2, 2]), np.array([1, 0, 3, 4])
    table = overlaps(prediction, target)
    assert detection_scores(table).true_positives == 2  # of 2's halves one
    assert panoptic_quality(table).true_positives == 0
    assert seg_score(table) == 0  # not more than half of an object


def test_two_poor_matches_outweigh_a_good_one() -> None:
    pytest.importorskip("scipy")
    target, prediction = np.repeat([2, 1], [2, 20]), np.repeat([1, 2], [20, 2])
    table = overlaps(prediction, target)
    assert detection_scores(table, 0.2).mean_matched_iu == pytest.approx(18 / 22)
    scores = detection_scores(table, 0.1)
    assert (scores.true_positives, scores.mean_matched_iu) == (2, 0.1)


def test_thresholds_are_met_to_the_last_bit() -> None:
    for threshold in IU_THRESHOLDS:
        whole = np.ones(20, np.int64)
        part = (np.arange(20) < round(20 * threshold)).astype(np.int64)
        assert detection_scores(overlaps(part, whole), threshold).true_positives == 1


@given(pictures(labels=5), st.sampled_from([0.05, 0.2, 1 / 3, 0.5, 0.7]))
@settings(max_examples=150, deadline=None)
def test_matching_is_the_largest_then_the_best(
    pair: tuple[Labels, Labels], threshold: float
) -> None:
    pytest.importorskip("scipy")
    prediction, target = pair
    of_target = [i for i in np.unique(target) if i]
    of_prediction = [j for j in np.unique(prediction) if j]
    iu = np.zeros((len(of_target), max(len(of_prediction), len(of_target))))
    for a, i in enumerate(of_target):
        for b, j in enumerate(of_prediction):
            one, other = target == i, prediction == j
            iu[a, b] = (one & other).sum() / (one | other).sum()
    best = (0, 0.0)
    for chosen in permutations(range(iu.shape[1]), len(of_target)):
        matched = iu[range(len(of_target)), list(chosen)]
        matched = matched[matched >= threshold]
        best = max(best, (matched.size, round(float(matched.sum()), 12)))
    scores = detection_scores(overlaps(prediction, target), threshold)
    assert scores.true_positives == best[0]
    total = scores.mean_matched_iu * best[0] if best[0] else 0
    assert total == pytest.approx(best[1])


@pytest.mark.parametrize("threshold", [0, -0.5, 1.01, math.nan, None, "0.5"])
def test_threshold_out_of_range(threshold: Any) -> None:
    table = overlaps(np.ones(3, int), np.ones(3, int))
    with pytest.raises(ValueError, match="detection_scores: threshold: expected a number above 0"):
        detection_scores(table, threshold)


NAMES = {
    "average_precision": "accuracy",
    "precision": "precision",
    "recall": "recall",
    "f1": "f1",
    "mean_matched_iu": "mean_matched_score",
    "true_positives": "tp",
    "false_positives": "fp",
    "false_negatives": "fn",
}


@pytest.mark.parametrize("threshold", [0.1, 0.3, *IU_THRESHOLDS])
@pytest.mark.parametrize("shape", [(60, 70), (20, 21, 22)])
def test_detection_is_stardists(threshold: float, shape: tuple[int, ...]) -> None:
    matching = pytest.importorskip("stardist.matching", exc_type=ImportError)
    targets = [blobs(seed, shape) for seed in range(5)]
    predictions = [disturbed(target, 50 + k) for k, target in enumerate(targets)]
    tables = [overlaps(p, t) for p, t in zip(predictions, targets, strict=True)]
    theirs = [matching.matching(t, p, threshold)
              for p, t in zip(predictions, targets, strict=True)]  # fmt: skip
    tables.append(Overlaps.join(tables))
    theirs.append(matching.matching_dataset(targets, predictions, threshold, show_progress=False))
    for table, their in zip(tables, theirs, strict=True):
        ours = detection_scores(table, threshold)
        for name, their_name in NAMES.items():
            value = getattr(ours, name)
            expected = 0 if math.isnan(value) else value  # what they make of 0 / 0
            assert expected == pytest.approx(getattr(their, their_name)), name
        if threshold == 0.55:
            above = matching.matching(targets[0], predictions[0], 0.5 + 1e-6)  # theirs are float32
            assert panoptic_quality(tables[0]).pq == pytest.approx(above.panoptic_quality)


def test_seg_by_definition() -> None:
    for seed in range(10):
        target = blobs(seed)
        prediction = disturbed(target, seed)
        found = []
        for i in set(np.unique(target)) - {0}:
            ids, counts = np.unique(prediction[target == i], return_counts=True)
            j = ids[counts.argmax()]
            covered = j != 0 and 2 * counts.max() > (target == i).sum()
            union = ((target == i) | (prediction == j)).sum()
            found.append(counts.max() / union if covered else 0)
        assert seg_score(overlaps(prediction, target)) == pytest.approx(np.mean(found))


# Clustering


@pytest.mark.parametrize("seed", range(10))
def test_rand_and_information_are_scikit_images(seed: int) -> None:
    metrics = pytest.importorskip("skimage.metrics")
    target = blobs(seed, (20, 30, 10) if seed % 2 else (60, 70))
    prediction = disturbed(target, seed + 1)
    table = overlaps(prediction, target)
    ours = adapted_rand(table)
    error, of_truth, of_prediction = metrics.adapted_rand_error(target, prediction)
    assert ours.error == pytest.approx(error)
    # scikit-image 0.26 returns the two in the other order than its docstring says.
    assert (ours.precision, ours.recall) == pytest.approx((of_prediction, of_truth))
    bits = variation_of_information(table)
    assert (bits.split, bits.merge) == pytest.approx(
        metrics.variation_of_information(target, prediction)
    )
    assert bits.total == bits.split + bits.merge
    bits = variation_of_information(table, foreground=True)
    assert (bits.split, bits.merge) == pytest.approx(
        metrics.variation_of_information(target, prediction, ignore_labels=(0,))
    )


def test_splits_lower_recall_and_mergers_precision() -> None:
    whole, halves = np.ones((4, 4), np.int64), np.repeat([1, 1, 2, 2], 4).reshape(4, 4)
    split, merged = overlaps(halves, whole), overlaps(whole, halves)
    of_pairs = 2 * 8 * 7 / (16 * 15)
    assert astuple(adapted_rand(split)) == pytest.approx((1 - 2 * of_pairs / (1 + of_pairs), 1,
                                                          of_pairs))  # fmt: skip
    assert adapted_rand(merged).precision == pytest.approx(of_pairs)
    assert astuple(variation_of_information(split)) == (1, 1, 0)
    assert astuple(variation_of_information(merged)) == (1, 0, 1)
    scores = foreground_scores(split)
    assert (scores.rand_split, scores.rand_merge, scores.information_split) == (0.5, 1, 0)
    assert math.isnan(scores.information_merge)
    assert foreground_scores(overlaps(halves, halves)) == foreground_scores(
        overlaps(halves + 4, halves)
    )
    assert set(astuple(foreground_scores(overlaps(halves, halves)))) == {1.0}


def by_definition(prediction: Labels, target: Labels) -> NDArray[np.float64]:
    """The sums behind V^Rand and V^Info, from the dense table: S, T, both; H(S), H(T), I."""
    inside = target != 0
    s, t = prediction[inside].copy(), target[inside]
    s[s == 0] = 10**6 + np.arange((s == 0).sum())  # each on its own
    p = np.array([[((s == i) & (t == j)).sum() for j in np.unique(t)] for i in np.unique(s)])
    p = p / t.size
    entropies = [-(q[q > 0] * np.log2(q[q > 0])).sum() for q in (p.sum(1), p.sum(0), p)]
    squares = [(q**2).sum() * t.size**2 for q in (p.sum(1), p.sum(0), p)]
    information = [t.size * h for h in (*entropies[:2], entropies[0] + entropies[1] - entropies[2])]
    return np.array([*squares, *information])


def test_foreground_scores_by_definition() -> None:
    targets = [blobs(seed, (30, 25 + seed)) for seed in range(4)]
    predictions = [disturbed(target, seed) for seed, target in enumerate(targets)]
    pairs = list(zip(predictions, targets, strict=True))
    sums = [by_definition(*pair) for pair in pairs]
    tables = [overlaps(*pair) for pair in pairs]
    for table, each in [*zip(tables, sums, strict=True), (Overlaps.join(tables), sum(sums))]:
        s, t, both, bits_s, bits_t, shared = each
        assert astuple(foreground_scores(table)) == pytest.approx(
            (2 * both / (s + t), both / t, both / s,
             2 * shared / (bits_s + bits_t), shared / bits_s, shared / bits_t)
        )  # fmt: skip


@given(pictures())
@settings(max_examples=200, deadline=None)
def test_figures_stay_in_range_and_ids_do_not_matter(pair: tuple[Labels, Labels]) -> None:
    pytest.importorskip("scipy")
    prediction, target = pair
    table = overlaps(prediction, target)
    renamed = overlaps(np.where(prediction, 2**40 - prediction, 0), target * 7)
    for figure in FIGURES:
        assert same(figure(table), figure(renamed))
        ratios = [v for v in plain(figure(table)) if isinstance(v, float)]
        largest = math.log2(max(target.size, 2)) * 2 if figure is variation_of_information else 1
        assert all(math.isnan(v) or 0 <= v <= largest + 1e-12 for v in ratios)
        perfect = plain(figure(overlaps(target, target)))
        if figure not in {variation_of_information, adapted_rand, panoptic_quality}:
            assert all(math.isnan(v) or v in {0.5, 1.0, 0} or isinstance(v, int) for v in perfect)
    whole = overlaps(target, target)
    assert variation_of_information(whole).total == 0 or not target.size
    if target.any():
        assert (seg_score(whole), panoptic_quality(whole).pq, mean_average_precision(whole)) == \
            (1, 1, 1)  # fmt: skip


def test_needs_no_scipy_nor_scikit_image() -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(["scipy", "skimage"]))  # importing either fails
import numpy as np
from segfuse import metrics as m
t = np.repeat([0, 1, 2, 3], 4).reshape(4, 4)
table = m.overlaps(t, t)
assert m.mean_average_precision(table) == m.panoptic_quality(table).pq == m.seg_score(table) == 1
assert m.warping_error(t, t).wrong == m.adapted_rand(table).error == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True)
