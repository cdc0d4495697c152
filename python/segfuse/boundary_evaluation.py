"""Comparing maps of boundaries, as of cells' membranes: ``segfuse evaluate --boundaries``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import UserError
from .evaluation import pages_of, shown, text, without_nan
from .metrics import (
    ForegroundScores,
    Overlaps,
    PixelErrors,
    RandScores,
    adapted_rand,
    foreground_scores,
    overlaps,
    pixel_error,
    warping_error,
)
from .objects import instances

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BoundaryEvaluation", "BoundaryFileScore", "evaluate_boundaries"]


@dataclass(frozen=True)
class BoundaryFileScore:
    """How well the boundaries of one picture, or page of a stack, were found.

    Attributes:
        name: of the file without suffix, with ":" and the index for a page of a stack.
        pixel_error: fraction of its pixels that is wrong.
        warping_error: fraction that is wrong after boundaries were moved.
        rand: V^Rand, 1 = agreement.
    """

    name: str
    pixel_error: float
    warping_error: float
    rand: float


@dataclass(frozen=True)
class BoundaryEvaluation:
    """What `evaluate_boundaries` found, of the whole set; nan where there was nothing to count.

    Attributes:
        pixels: wrong, and all.
        warping: wrong after boundaries were moved, and all.
        rand: adapted Rand error, precision and recall of the cells.
        foreground: V^Rand and V^Info of the cells.
        files: each picture's, that of the lowest V^Rand first.
        cells: in the truth: components of what is no boundary.
        predicted_cells: in the predictions.
    """

    pixels: PixelErrors
    warping: PixelErrors
    rand: RandScores
    foreground: ForegroundScores
    files: list[BoundaryFileScore]
    cells: int
    predicted_cells: int

    def figures(self) -> dict[str, float]:
        """Return the figures of the set by their names."""
        return {
            "pixel_error": self.pixels.error,
            "warping_error": self.warping.error,
            "adapted_rand_error": self.rand.error,
            "adapted_rand_precision": self.rand.precision,
            "adapted_rand_recall": self.rand.recall,
            "v_rand": self.foreground.rand,
            "v_rand_split": self.foreground.rand_split,
            "v_rand_merge": self.foreground.rand_merge,
            "v_info": self.foreground.information,
            "v_info_split": self.foreground.information_split,
            "v_info_merge": self.foreground.information_merge,
        }

    def table(self) -> list[tuple[str, ...]]:
        """Return a head and rows: V^Rand and V^Info, and what of them splits and mergers cost."""
        f = self.foreground
        return [
            ("1 = agreement", "score", "split", "merge"),
            ("V^Rand", *map(text, (f.rand, f.rand_split, f.rand_merge))),
            ("V^Info", *map(text, (f.information, f.information_split, f.information_merge))),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON, with None for nan."""
        plain: dict[str, Any] = {
            **self.figures(),
            "pixels": self.pixels.pixels,
            "wrong_pixels": self.pixels.wrong,
            "wrong_pixels_after_warping": self.warping.wrong,
            "cells": self.cells,
            "predicted_cells": self.predicted_cells,
            "files": [asdict(file) for file in self.files],
        }
        result: dict[str, Any] = without_nan(plain)
        return result


def evaluate_boundaries(
    predictions: Any, labels: Any, *, progress: bool = False
) -> BoundaryEvaluation:
    """Compare maps of boundaries with the true ones, a picture at a time, as ISBI 2012 did.

    Pixel error; warping error (Jain et al., CVPR 2010), which forgives moved boundaries; and of the
    cells, the 4-connected components of what is no boundary, the adapted Rand error, V^Rand and
    V^Info (Arganda-Carreras et al., Frontiers in Neuroanatomy 9, 2015). Figures are of sums over
    the set. The challenge's tables hold the best of several thresholds on probabilities, with
    borders thinned, and means over sections; see `segfuse.metrics`.

    Args:
        predictions: a folder or file of pictures, or an array (H, W) or a sequence of them: 0 is
            boundary, any other number the inside of a cell.
        labels: the true ones, of the same sort, matched as by `segfuse.evaluate`.
        progress: show a bar on a terminal; needs rich.

    Raises:
        UserError: files that cannot be read or matched or differ in size, negative ids, cells of
            different ids without a boundary between.
        ValueError: arrays that do not fit each other.
        TypeError: files compared with arrays.
    """
    count, pages, _ = pages_of(predictions, labels)
    tables: list[Overlaps] = []
    files: list[BoundaryFileScore] = []
    pixels, warping = PixelErrors(0, 0), PixelErrors(0, 0)
    for name, (predicted, source), (true, true_source) in shown(pages, count, progress=progress):
        if predicted.shape != true.shape:
            raise UserError(f"{source} has the shape {predicted.shape}, its labels {true.shape}")
        inside, truly = _inside(predicted, source), _inside(true, true_source)
        wrong, warped = pixel_error(inside, truly), warping_error(inside, truly)
        pixels, warping = pixels + wrong, warping + warped
        table = overlaps(instances(inside, holes=0), instances(truly, holes=0))
        tables.append(table)
        rand = foreground_scores(table).rand
        files.append(BoundaryFileScore(name, wrong.error, warped.error, rand))
    whole = Overlaps.join(tables)
    return BoundaryEvaluation(
        pixels=pixels,
        warping=warping,
        rand=adapted_rand(whole),
        foreground=foreground_scores(whole),
        files=sorted(files, key=lambda file: (math.isnan(file.rand), file.rand)),
        cells=whole.target_objects,
        predicted_cells=whole.prediction_objects,
    )


def _inside(ids: NDArray[Any], source: str) -> NDArray[np.bool_]:
    """Return where cells are; refuse what would merge cells that the ids tell apart."""
    if ids.dtype.kind == "i" and ids.min() < 0:
        raise UserError(f"{source}: id {ids.min()}: expected 0 for boundaries, else 1 or above")
    for axis in range(ids.ndim):
        one, other = np.moveaxis(ids, axis, 0)[1:], np.moveaxis(ids, axis, 0)[:-1]
        if ((one != other) & (one != 0) & (other != 0)).any():
            raise UserError(
                f"{source}: numbers other than 0 touch: expected 0 for boundaries and the same "
                "number within a cell; compare objects with --instances"
            )
    inside: NDArray[np.bool_] = ids != 0
    return inside
