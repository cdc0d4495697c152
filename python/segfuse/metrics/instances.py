"""Figures of instance segmentation, from the table of overlaps of a picture or a set.

Two families.  Detection asks which objects were found: `detection_scores`,
`mean_average_precision`, `panoptic_quality` and `seg_score` compare objects by their intersection
over union.  Clustering asks whether pixels that belong together were left together: `adapted_rand`,
`variation_of_information` and `foreground_scores` compare pairs of pixels, or bits.

A fraction without anything to count, 0 / 0, is nan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np

from ._arrays import wrong
from .overlaps import Overlaps

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "IU_THRESHOLDS",
    "DetectionScores",
    "ForegroundScores",
    "PanopticQuality",
    "RandScores",
    "VariationOfInformation",
    "adapted_rand",
    "detection_scores",
    "foreground_scores",
    "mean_average_precision",
    "panoptic_quality",
    "seg_score",
    "variation_of_information",
]

IU_THRESHOLDS = tuple(k / 100 for k in range(50, 100, 5))
"""0.5, 0.55 ... 0.95: the thresholds of the Data Science Bowl 2018."""


# Detection


@dataclass(frozen=True)
class DetectionScores:
    """Objects found at one threshold, each figure in 0 to 1 or nan.

    Attributes:
        threshold: least intersection over union of a match.
        average_precision: TP / (TP + FP + FN).
        precision: TP / (TP + FP).
        recall: TP / (TP + FN).
        f1: TP / (TP + FP / 2 + FN / 2).
        mean_matched_iu: mean intersection over union of the matches.
        true_positives: matches.
        false_positives: objects of the prediction without a match.
        false_negatives: objects of the truth without a match.
    """

    threshold: float
    average_precision: float
    precision: float
    recall: float
    f1: float
    mean_matched_iu: float
    true_positives: int
    false_positives: int
    false_negatives: int


def detection_scores(table: Overlaps, threshold: float = 0.5) -> DetectionScores:
    """Match objects one to one, and count.

    An object of the prediction and one of the truth may match where their intersection over union
    is at least `threshold`.  Of all one-to-one matchings that with the most matches counts, and of
    those one with the largest sum of intersections over unions (the Hungarian algorithm, needed
    only where an object has several candidates: at thresholds above 0.5 none has).

    Average precision is the name this fraction got in the Data Science Bowl 2018 (Caicedo et al.:
    Nucleus segmentation across imaging experiments, Nature Methods 16, 2019) and in StarDist
    (Schmidt et al.: Cell Detection with Star-convex Polygons, MICCAI 2018); it is no
    area under a curve of precision against recall.

    Args:
        table: of a picture or a set; see `overlaps`.
        threshold: in 0 to 1, 0 excluded.

    Raises:
        ValueError: another threshold.
        ImportError: SciPy is absent and is needed.
    """
    if not (isinstance(threshold, Real) and 0 < threshold <= 1):  # nan is neither
        raise wrong("detection_scores", "threshold", "a number above 0 and up to 1", threshold)
    pairs, iu = table.objects()
    matched = iu[_matches(pairs.target, pairs.prediction, iu, iu >= threshold)]
    tp = matched.size
    fp, fn = table.prediction_objects - tp, table.target_objects - tp
    return DetectionScores(
        threshold=float(threshold),
        average_precision=_ratio(tp, tp + fp + fn),
        precision=_ratio(tp, tp + fp),
        recall=_ratio(tp, tp + fn),
        f1=_ratio(2 * tp, 2 * tp + fp + fn),
        mean_matched_iu=_ratio(matched.sum(), tp),
        true_positives=tp,
        false_positives=fp,
        false_negatives=fn,
    )


def mean_average_precision(table: Overlaps, thresholds: Sequence[float] = IU_THRESHOLDS) -> float:
    """Return the mean of `detection_scores`' average precision over thresholds.

    Of a set it is from the set's sums, as in StarDist.  The Data Science Bowl took the mean of the
    pictures' figures instead.
    """
    scores = [detection_scores(table, threshold).average_precision for threshold in thresholds]
    return _ratio(math.fsum(scores), len(scores))


@dataclass(frozen=True)
class PanopticQuality:
    """Panoptic quality and its two factors, each in 0 to 1 or nan.

    Attributes:
        pq: sum of the matches' intersections over unions / (TP + FP / 2 + FN / 2).
        sq: segmentation quality, the mean of these intersections over unions.
        rq: recognition quality, TP / (TP + FP / 2 + FN / 2).
        true_positives: matches.
        false_positives: objects of the prediction without a match.
        false_negatives: objects of the truth without a match.
    """

    pq: float
    sq: float
    rq: float
    true_positives: int
    false_positives: int
    false_negatives: int


def panoptic_quality(table: Overlaps) -> PanopticQuality:
    """Compute the panoptic quality of one class of things; of a set, from the set's sums.

    Kirillov et al.: Panoptic Segmentation, CVPR 2019, Section 4.  Objects match where their
    intersection over union is above 0.5, which makes matches unique; where it is 0.5 they do not,
    unlike in `detection_scores`.  Void and crowd regions are not known here.
    """
    _, iu = table.objects()
    matched = iu[iu > 0.5]  # noqa: PLR2004
    tp = matched.size
    fp, fn = table.prediction_objects - tp, table.target_objects - tp
    objects = tp + fp / 2 + fn / 2
    return PanopticQuality(
        pq=_ratio(matched.sum(), objects),
        sq=_ratio(matched.sum(), tp),
        rq=_ratio(tp, objects),
        true_positives=tp,
        false_positives=fp,
        false_negatives=fn,
    )


def seg_score(table: Overlaps) -> float:
    """Return SEG of the Cell Tracking Challenge, in 0 to 1, or nan without objects in the truth.

    Mean over the objects of the truth, those of a whole set together, of the intersection over
    union with that object of the prediction which covers more than half of it; 0 where none does.
    Objects of the prediction that cover no object are not punished.

    Maska et al.: A benchmark for comparison of cell tracking algorithms, Bioinformatics 30, 2014;
    Ulman et al.: An objective comparison of cell-tracking algorithms, Nature Methods
    14, 2017.
    """
    pairs, iu = table.objects()
    covers = 2 * pairs.pixels > table.target_pixels[pairs.target]
    return _ratio(iu[covers].sum(), table.target_objects)


# Clustering


@dataclass(frozen=True)
class RandScores:
    """Agreement on pairs of pixels, each figure in 0 to 1 or nan.

    Attributes:
        error: 1 - F score of precision and recall.
        precision: of the pairs that are of one segment in the prediction, the fraction that is in
            the truth; what merges objects lowers it.
        recall: of the pairs that are of one object in the truth, the fraction that is of one
            segment in the prediction; what splits objects lowers it.
    """

    error: float
    precision: float
    recall: float


def adapted_rand(table: Overlaps) -> RandScores:
    """Compute the adapted Rand error, over the pixels that are of an object in the truth.

    Arganda-Carreras et al.: Crowdsourcing the creation of image segmentation algorithms for
    connectomics, Frontiers in Neuroanatomy 9:142, 2015; SNEMI3D's figure.  Pairs are of two
    different pixels of one picture; of a set, pairs are summed.  The prediction's background is one
    segment like another, as in scikit-image's ``adapted_rand_error``, which returns recall before
    precision.  In the ISBI 2012 challenge each of its pixels was a segment of its own: that is
    1 - `foreground_scores`' ``rand``.
    """
    table = table.foreground()
    both, truth, predicted = (
        _pairs(pixels) for pixels in (table.pixels, table.target_pixels, table.prediction_pixels)
    )
    return RandScores(
        error=1 - _ratio(2 * both, truth + predicted),
        precision=_ratio(both, predicted),
        recall=_ratio(both, truth),
    )


@dataclass(frozen=True)
class VariationOfInformation:
    """Variation of information in bits a pixel, each >= 0, 0 where both agree; or nan.

    Attributes:
        total: split + merge.
        split: H(prediction | truth), of segments that the prediction splits.
        merge: H(truth | prediction), of segments that it merges.
    """

    total: float
    split: float
    merge: float


def variation_of_information(
    table: Overlaps, *, foreground: bool = False
) -> VariationOfInformation:
    """Compute the variation of information; of a set, the mean over all pixels.

    Meila: Comparing clusterings - an information based distance, Journal of Multivariate Analysis
    98, 2007.

    Args:
        table: of a picture or a set; see `overlaps`.
        foreground: only over pixels that are of an object in the truth.  Else background is a
            segment like another.  The prediction's background is so in either case.
    """
    if foreground:
        table = table.foreground()
    pixels = table.pixels
    split = (pixels * np.log2(table.target_pixels[table.target] / pixels)).sum()
    merge = (pixels * np.log2(table.prediction_pixels[table.prediction] / pixels)).sum()
    split, merge = _ratio(split, pixels.sum()), _ratio(merge, pixels.sum())
    return VariationOfInformation(total=split + merge, split=split, merge=merge)


@dataclass(frozen=True)
class ForegroundScores:
    """Foreground-restricted scores of ISBI 2012, each in 0 to 1, 1 = agreement; or nan.

    Attributes:
        rand: V^Rand, the harmonic mean of the next two.
        rand_split: lowered by splits: Rand's recall.
        rand_merge: lowered by mergers: Rand's precision.
        information: V^Info, the harmonic mean of the next two.
        information_split: I(prediction; truth) / H(prediction).
        information_merge: I(prediction; truth) / H(truth).
    """

    rand: float
    rand_split: float
    rand_merge: float
    information: float
    information_split: float
    information_merge: float


def foreground_scores(table: Overlaps) -> ForegroundScores:
    """Compute V^Rand and V^Info over the pixels that are of an object in the truth.

    Arganda-Carreras et al.: Crowdsourcing the creation of image segmentation algorithms for
    connectomics, Frontiers in Neuroanatomy 9:142, 2015, with alpha = 1/2.  Each pixel that the
    prediction calls background is a segment of its own; pairs are of any two pixels, the same one
    twice too, as probabilities make them.  Of a set, pairs and bits are summed, each within its
    picture.  Entropies are 0, and the information scores nan, where a picture is one segment.

    The challenge's tables hold the best of several thresholds on the predicted probabilities, since
    2015 after its borders were thinned to a pixel, and the mean over sections: objects are the
    4-connected components of what lies above the threshold.
    """
    table = table.foreground()
    pixels = table.pixels.astype(np.float64)
    alone = table.prediction_ids[table.prediction] == 0
    of_target = table.target_pixels[table.target].astype(np.float64)
    of_prediction = np.where(alone, 1, table.prediction_pixels[table.prediction])
    of_both = np.where(alone, 1, pixels)
    # A pixel of a segment of s pixels has s partners, and log2(pixels of its picture / s) bits.
    truth, predicted, both = ((pixels * s).sum() for s in (of_target, of_prediction, of_both))
    picture = np.bincount(table.image, pixels)[table.image]
    bits_truth, bits_predicted, bits_both = (
        (pixels * np.log2(picture / s)).sum() for s in (of_target, of_prediction, of_both)
    )
    shared = max(bits_truth + bits_predicted - bits_both, 0.0)
    return ForegroundScores(
        rand=_ratio(2 * both, truth + predicted),
        rand_split=_ratio(both, truth),
        rand_merge=_ratio(both, predicted),
        information=_ratio(2 * shared, bits_truth + bits_predicted),
        information_split=_ratio(shared, bits_predicted),
        information_merge=_ratio(shared, bits_truth),
    )


def _matches(
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
    iu: NDArray[np.float64],
    candidates: NDArray[np.bool_],
) -> NDArray[np.int64]:
    """Return which candidates make the one-to-one matching that is largest, then best."""
    chosen = np.flatnonzero(candidates)
    if not chosen.size:
        return chosen
    row, column = rows[chosen], columns[chosen]
    free = (np.bincount(row)[row] == 1) & (np.bincount(column)[column] == 1)
    found, rest = [chosen[free]], chosen[~free]
    if rest.size:
        found += [group[_assigned(rows[group], columns[group], iu[group])]
                  for group in _groups(rows[rest], columns[rest], rest)]  # fmt: skip
    return np.concatenate(found)


def _groups(
    rows: NDArray[np.int64], columns: NDArray[np.int64], pairs: NDArray[np.int64]
) -> list[NDArray[np.int64]]:
    """Part pairs into groups that share neither row nor column."""
    from scipy.sparse import coo_array  # noqa: PLC0415  (so that segfuse needs no SciPy)
    from scipy.sparse.csgraph import connected_components  # noqa: PLC0415

    first = int(rows.max()) + 1  # column
    nodes = first + int(columns.max()) + 1
    graph = coo_array((np.ones(rows.size), (rows, first + columns)), shape=(nodes, nodes))
    group = connected_components(graph, directed=False)[1][rows]
    order = np.argsort(group, kind="stable")
    return np.split(pairs[order], np.flatnonzero(np.diff(group[order])) + 1)


def _assigned(
    rows: NDArray[np.int64], columns: NDArray[np.int64], iu: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Return the indices of the pairs that the Hungarian algorithm chooses."""
    from scipy.optimize import linear_sum_assignment  # noqa: PLC0415

    row_ids, row = np.unique(rows, return_inverse=True)
    column_ids, column = np.unique(columns, return_inverse=True)
    pair = np.full((row_ids.size, column_ids.size), -1)
    gain = np.zeros(pair.shape)
    pair[row, column] = np.arange(rows.size)
    gain[row, column] = 1 + iu / (2 * min(pair.shape))  # a match outweighs all the sums
    chosen = pair[linear_sum_assignment(gain, maximize=True)]
    matched: NDArray[np.int64] = chosen[chosen >= 0]
    return matched


def _pairs(pixels: NDArray[np.int64]) -> float:
    """Return the ordered pairs of two pixels of one segment."""
    sizes = pixels.astype(np.float64)  # n^2 may leave int64
    return float((sizes * (sizes - 1)).sum()) if sizes.any() else 0.0


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan
