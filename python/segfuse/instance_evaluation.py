"""Comparing predicted objects with the true ones: ``segfuse evaluate --instances``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from .data.labels import PageIds
from .errors import UserError
from .evaluation import Page, pages_of, shown, text, without_nan
from .metrics import (
    IU_THRESHOLDS,
    DetectionScores,
    Overlaps,
    PanopticQuality,
    RandScores,
    VariationOfInformation,
    adapted_rand,
    detection_scores,
    overlaps,
    panoptic_quality,
    seg_score,
    variation_of_information,
)
from .objects import instances

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["InstanceEvaluation", "InstanceFileScore", "PredictionKind", "evaluate_instances"]

PredictionKind = Literal["auto", "binary", "instances"]
_MOST = 2**63 - 1  # an id, as ids are kept in int64
_SHOWN = (0.5, 0.75, 0.9)  # thresholds in the table


@dataclass(frozen=True)
class InstanceFileScore:
    """How well the objects of one picture, or page of a stack, were found.

    Attributes:
        name: of the file without suffix, with ":" and the index for a page of a stack.
        objects: in the truth.
        predicted_objects: in the prediction.
        average_precision: at an intersection over union of 0.5.
        panoptic_quality: of the picture alone.
    """

    name: str
    objects: int
    predicted_objects: int
    average_precision: float
    panoptic_quality: float


@dataclass(frozen=True)
class InstanceEvaluation:
    """What `evaluate_instances` found, of the whole set; nan where there was nothing to count.

    Attributes:
        detection: matches at each of 0.5, 0.55 ... 0.95, of the set's objects together.
        mean_average_precision: mean of their average precisions.
        panoptic: panoptic, segmentation and recognition quality.
        seg: of the Cell Tracking Challenge.
        rand: adapted Rand error, precision and recall, over the truth's objects.
        information: variation of information in bits a pixel, over the truth's objects.
        files: each picture's, that of the lowest panoptic quality first.
        objects: in the truth.
        predicted_objects: in the predictions.
        components: whether predictions were binary, their objects being connected components.
        void: pixels that do not count.
    """

    detection: tuple[DetectionScores, ...]
    mean_average_precision: float
    panoptic: PanopticQuality
    seg: float
    rand: RandScores
    information: VariationOfInformation
    files: list[InstanceFileScore]
    objects: int
    predicted_objects: int
    components: bool
    void: int

    def figures(self) -> dict[str, float]:
        """Return the figures of the set by their names."""
        of = {score.threshold: score for score in self.detection}
        return {
            "average_precision_50": of[0.5].average_precision,
            "average_precision_75": of[0.75].average_precision,
            "mean_average_precision": self.mean_average_precision,
            "f1_50": of[0.5].f1,
            "panoptic_quality": self.panoptic.pq,
            "segmentation_quality": self.panoptic.sq,
            "recognition_quality": self.panoptic.rq,
            "seg": self.seg,
            "adapted_rand_error": self.rand.error,
            "adapted_rand_precision": self.rand.precision,
            "adapted_rand_recall": self.rand.recall,
            "variation_of_information": self.information.total,
            "variation_of_information_split": self.information.split,
            "variation_of_information_merge": self.information.merge,
        }

    def table(self) -> list[tuple[str, ...]]:
        """Return a head and rows: what is found, missed and made up at each threshold."""
        rows = [score for score in self.detection if score.threshold in _SHOWN]
        return [
            ("least IU", "average precision", "F1", "precision", "recall", "found", "missed",
             "made up"),
            *(
                (
                    f"{score.threshold:.2f}",
                    *map(text, (score.average_precision, score.f1, score.precision, score.recall)),
                    f"{score.true_positives:,}",
                    f"{score.false_negatives:,}",
                    f"{score.false_positives:,}",
                )
                for score in rows
            ),
        ]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON, with None for nan."""
        plain: dict[str, Any] = {
            **self.figures(),
            "objects": self.objects,
            "predicted_objects": self.predicted_objects,
            "predictions_read_as": "binary" if self.components else "instances",
            "void_pixels": self.void,
            "detection": [asdict(score) for score in self.detection],
            "files": [asdict(file) for file in self.files],
        }
        result: dict[str, Any] = without_nan(plain)
        return result


def evaluate_instances(
    predictions: Any,
    labels: Any,
    *,
    kind: PredictionKind = "auto",
    ignore: int | None = None,
    progress: bool = False,
) -> InstanceEvaluation:
    """Compare predicted objects with the true ones, a picture at a time.

    Figures are of sums over the set, not means over pictures: average precision as of StarDist
    (Schmidt et al., MICCAI 2018) and the Data Science Bowl 2018 (Caicedo et al., Nature Methods 16,
    2019), panoptic quality (Kirillov et al., CVPR 2019), SEG of the Cell Tracking Challenge (Maska
    et al., Bioinformatics 30, 2014), the adapted Rand error (Arganda-Carreras et al., Frontiers in
    Neuroanatomy 9, 2015) and variation of information (Meila, Journal of Multivariate Analysis 98,
    2007), the last two over the truth's objects. `segfuse.metrics` has them one by one.

    Args:
        predictions: a folder or file of pictures, or an array (H, W) or a sequence of them: ids of
            objects, 0 = background; or binary, one number besides 0 in all of them, then objects
            are the 4-connected components.
        labels: the true ids, of the same sort, matched as by `segfuse.evaluate`.
        kind: of the predictions, "binary" or "instances"; "auto" finds it out. With "instances" the
            labels are not asked whether they are binary either.
        ignore: id in the labels of pixels that do not count; what is predicted there alone is no
            object, and one that is there in part keeps the rest (Kirillov et al. drop what is
            mostly there).
        progress: show a bar on a terminal; needs rich.

    Raises:
        UserError: files that cannot be read or matched or differ in size, negative ids, labels that
            are a mask and not ids.
        ValueError: another kind, or arrays that do not fit each other.
        TypeError: files compared with arrays.

    Limits:
        A stack's pages are compared one by one; of a volume `segfuse.metrics.overlaps` makes one
        table.
    """
    if kind not in get_args(PredictionKind):
        raise ValueError(
            f"evaluate_instances: kind: expected auto, binary or instances, got {kind!r}"
        )
    count, pages, _ = pages_of(predictions, labels)
    components = kind == "binary"
    if kind != "instances":
        theirs, ours, scattered = _ids(pages, ignore)
        components = components or len(theirs) == 1
        if len(ours) == 1 and (scattered or max(ours) > 1):
            raise UserError(
                f"labels hold {max(ours)} alone besides 0: expected an id for each object, as a "
                "mask does not tell objects that touch apart; if that is one object, say that the "
                "kind is instances"
            )
        pages = pages_of(predictions, labels)[1]
    tables, files, void = [], [], 0
    for name, (predicted, source), (true, true_source) in shown(pages, count, progress=progress):
        if predicted.shape != true.shape:
            raise UserError(f"{source} has the shape {predicted.shape}, its labels {true.shape}")
        counts = np.ones(true.shape, np.bool_) if ignore is None else true != ignore
        if components:
            predicted = instances(predicted != 0, holes=0)  # noqa: PLW2901
        _check_ids(predicted, source)
        _check_ids(true[counts], true_source)
        table = overlaps(predicted[counts], true[counts])
        tables.append(table)
        files.append(
            InstanceFileScore(
                name,
                table.target_objects,
                table.prediction_objects,
                detection_scores(table).average_precision,
                panoptic_quality(table).pq,
            )
        )
        void += int(true.size - np.count_nonzero(counts))
    whole = Overlaps.join(tables)
    detection = tuple(detection_scores(whole, threshold) for threshold in IU_THRESHOLDS)
    return InstanceEvaluation(
        detection=detection,
        mean_average_precision=math.fsum(s.average_precision for s in detection) / len(detection),
        panoptic=panoptic_quality(whole),
        seg=seg_score(whole),
        rand=adapted_rand(whole),
        information=variation_of_information(whole, foreground=True),
        files=sorted(
            files, key=lambda file: (math.isnan(file.panoptic_quality), file.panoptic_quality)
        ),
        objects=whole.target_objects,
        predicted_objects=whole.prediction_objects,
        components=components,
        void=void,
    )


def _ids(pages: Iterable[Page], ignore: int | None) -> tuple[set[int], set[int], bool]:
    """Return up to two ids of predictions and labels, 0 left out, as many pages as that takes.

    And of labels with a single id, whether on some page it is not one object.
    """
    theirs, ours, scattered = set[int](), set[int](), False
    for _, (predicted, _), (true, name) in pages:
        for side, ids in ((theirs, predicted), (ours, true)):
            void = {0} if side is theirs or ignore is None else {0, ignore}
            if len(side) <= 1:
                side.update([i for i in np.unique(ids).tolist() if i not in void][:2])
        if ours == {1} and not scattered:
            scattered = (
                PageIds.of(name, (true == 1).astype(np.uint8)).objects == 0 < (true == 1).sum()
            )
        if len(theirs) > 1 and len(ours) > 1:
            break
    return theirs, ours, scattered


def _check_ids(ids: NDArray[Any], source: str) -> None:
    if not ids.size:
        return
    least, most = int(ids.min()), int(ids.max())
    if least < 0:
        raise UserError(
            f"{source}: id {least}: expected 0 or above; set the id to ignore, if it is that"
        )
    if most > _MOST:
        raise UserError(f"{source}: id {most}: expected ids below 2^63")
