"""Comparing predicted label pictures with the true ones: ``segfuse evaluate``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .data.files import read_labels
from .data.labels import MOST_CLASSES, SAMPLE, LabelCoding, PageIds, decide, detect, evenly
from .data.pairs import Pair, pair
from .errors import UserError
from .metrics import ConfusionMatrix, Scores, semantic_scores

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "Evaluation",
    "FileScore",
    "Page",
    "evaluate",
    "pages_of",
    "shown",
    "text",
    "without_nan",
]

_Ids = tuple["NDArray[Any]", str]  # (H, W) as they are in the file, and what to call them
Page = tuple[str, _Ids, _Ids]  # name, prediction, labels
_Codings = tuple[LabelCoding, LabelCoding]  # of predictions, of labels
_TWO = 2  # classes, beyond which background and foreground will not do


@dataclass(frozen=True)
class FileScore:
    """How well one picture, or page of a stack, was predicted.

    Attributes:
        name: of the file without suffix, with ":" and the index for a page of a stack.
        pixels: that count.
        pixel_accuracy: fraction of them that is right.
        mean_iu: over the classes that are in it or in its prediction.
    """

    name: str
    pixels: int
    pixel_accuracy: float
    mean_iu: float


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; figures are nan where there was nothing to count.

    Attributes:
        matrix: (K, K) int64, pixels of all pictures together, rows = truth.
        scores: of the matrix, so of the whole set and not a mean over pictures.
        names: of the classes.
        files: each picture's, that of the lowest mean IU first.
        void: pixels that do not count.
        coding: how the true labels were read.
        prediction_coding: how the predictions were.
    """

    matrix: Tensor
    scores: Scores
    names: tuple[str, ...]
    files: list[FileScore]
    void: int
    coding: LabelCoding
    prediction_coding: LabelCoding

    def figures(self) -> dict[str, float]:
        """Return FCN's four by their names."""
        names = ("pixel_accuracy", "mean_accuracy", "mean_iu", "frequency_weighted_iu")
        return {name: getattr(self.scores, name) for name in names}

    def table(self) -> list[tuple[str, str, str, str]]:
        """Return a head and a row a class: name, share of the true pixels, IU, accuracy."""
        rows = zip(self.names, self._shares(), self.scores.iu, self.scores.accuracy, strict=True)
        return [
            ("class", "pixels", "IU", "accuracy"),
            *((name, text(share, ".2%"), text(iu), text(acc)) for name, share, iu, acc in rows),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON, with None for nan."""
        rows = zip(
            self.names,
            self.matrix.sum(1).tolist(),
            self._shares(),
            self.scores.iu,
            self.scores.accuracy,
            strict=True,
        )
        keys = ("name", "pixels", "share", "iu", "accuracy")
        plain: dict[str, Any] = {
            **self.figures(),
            "pixels": self.scores.pixels,
            "void_pixels": self.void,
            "labels_read_as": self.coding.kind,
            "predictions_read_as": self.prediction_coding.kind,
            "classes": [dict(zip(keys, row, strict=True)) for row in rows],
            "confusion_matrix": self.matrix.tolist(),
            "files": [asdict(file) for file in self.files],
        }
        result: dict[str, Any] = without_nan(plain)
        return result

    def _shares(self) -> list[float]:
        counts: list[float] = (self.matrix.sum(1) / self.scores.pixels).tolist()
        return counts


def evaluate(
    predictions: Any,
    labels: Any,
    *,
    coding: LabelCoding | None = None,
    kind: str = "auto",
    classes: int | None = None,
    ignore: int | None = None,
    names: Sequence[str] | None = None,
    progress: bool = False,
) -> Evaluation:
    """Compare predictions with the true labels, a picture at a time.

    What the numbers in files mean is found out for predictions and for labels apart, so that 0 and
    255 can be compared with ids of cells; but where one side holds more than two classes, both are
    read as classes. Options hold for both sides, `ignore` for the labels: where it is the id of a
    class too, as 0 of labels that mark some pixels only, predictions of it count, as errors.

    Args:
        predictions: a folder or file, matched with `labels` by `segfuse.data.pair`, either side's
            names adding words; or an array (H, W) of ids, or a sequence of them.
        labels: of the same sort.
        coding: how both are coded; the options after it are then of no effect.
        kind: "auto", "classes", "binary" or "instances" (the foreground is compared).
        classes: number of classes; None finds it.
        ignore: id of pixels in the labels that do not count; None finds it.
        names: of the classes.
        progress: show a bar on a terminal; needs rich.

    Raises:
        UserError: files that cannot be read or matched or differ in size, ids out of range, pixels
            that count and for which no class was predicted, two sides that cannot be compared.
        ValueError: options or arrays that do not fit each other.
        TypeError: files compared with arrays.
    """
    options: dict[str, Any] = {"kind": kind, "classes": classes, "ignore": ignore, "names": names}
    count, pages, look = pages_of(predictions, labels)
    codings = (coding, coding) if coding else _agree(look(options), ignore)
    if ignore is not None and codings[0].kind == "classes" and 0 <= ignore < codings[0].classes:
        # As of labels whose 0 is void: a network has an output for it, and may choose it.
        codings = replace(codings[0], ignore=-1), codings[1]
    fixed = coding or classes or names
    theirs, ours = codings if fixed else (_wide(codings[0]), _wide(codings[1]))
    metric = ConfusionMatrix(MOST_CLASSES)
    files, void = [], 0
    for name, prediction, true in shown(pages, count, progress=progress):
        target = ours.encode(*true)
        predicted = _complete(theirs.encode(*prediction), target, prediction[1])
        matrix = metric(torch.from_numpy(predicted)[None], torch.from_numpy(target)[None])
        scores = semantic_scores(matrix)
        files.append(FileScore(name, scores.pixels, scores.pixel_accuracy, scores.mean_iu))
        void += target.size - scores.pixels
    whole = metric.compute()
    found = (whole.sum(0) + whole.sum(1)).nonzero().flatten().tolist()
    size = max(codings[0].classes, codings[1].classes, *(i + 1 for i in found))
    names = max((c.names for c in reversed(codings)), key=len)
    return Evaluation(
        matrix=whole[:size, :size].clone(),
        scores=semantic_scores(whole[:size, :size]),
        names=(*names, *map(str, range(len(names), size))),
        files=sorted(files, key=lambda file: (math.isnan(file.mean_iu), file.mean_iu)),
        void=void,
        coding=codings[1],
        prediction_coding=codings[0],
    )


def pages_of(
    predictions: Any, labels: Any
) -> tuple[int, Iterator[Page], Callable[[dict[str, Any]], _Codings]]:
    """Match predictions with labels, both paths or both arrays, as `evaluate` takes them.

    Returns:
        the number of pages, the pages, and what finds both codings by the options of `detect`.

    Raises:
        UserError, ValueError, TypeError: as `evaluate`.
    """
    paths = [isinstance(side, (str, Path)) for side in (predictions, labels)]
    if any(paths) != all(paths):
        raise TypeError("evaluate: expected predictions and labels to be both paths or both arrays")
    return _files(predictions, labels) if any(paths) else _arrays(predictions, labels)


def _match(predictions: str | Path, labels: str | Path) -> list[Pair]:
    """Pair files by name, the labels' adding words to the predictions' or the other way round."""
    try:
        return pair(predictions, labels)
    except UserError as error:
        try:
            swapped = pair(labels, predictions)
        except UserError:
            # `pair` speaks of images, which here are the predictions.
            said = re.sub(r"\bimages( lack labels| and labels are)", r"predictions\1", str(error))
            raise UserError(re.sub(r"(labels lack) images", r"\1 predictions", said)) from error
        return [replace(p, image=p.labels, labels=p.image) for p in swapped]


def _files(
    predictions: str | Path, labels: str | Path
) -> tuple[int, Iterator[Page], Callable[[dict[str, Any]], _Codings]]:
    """Return the number of pages, the pages, and what finds both codings by `detect`'s options."""
    pairs = _match(predictions, labels)

    def read() -> Iterator[Page]:
        for files, pages in groupby(pairs, lambda pair: (pair.image, pair.labels)):
            predicted, true = map(read_labels, files)  # of a stack all pages
            for page in pages:
                i = page.page
                yield page.name, (predicted[i], str(files[0])), (true[i], str(files[1]))

    def look(options: dict[str, Any]) -> _Codings:
        theirs = dict.fromkeys(pair.image for pair in pairs)
        ours = dict.fromkeys(pair.labels for pair in pairs)
        return detect(list(theirs), **options), detect(list(ours), **options)

    return len(pairs), read(), look


def _arrays(
    predictions: Any, labels: Any
) -> tuple[int, Iterator[Page], Callable[[dict[str, Any]], _Codings]]:
    """Return the same for arrays."""
    theirs, ours = _listed(predictions, "prediction"), _listed(labels, "labels")
    if len(theirs) != len(ours):
        raise ValueError(
            f"evaluate: expected a prediction for each of {len(ours)} labels, got {len(theirs)}"
        )

    def find(side: list[_Ids], options: dict[str, Any]) -> LabelCoding:
        sample = [side[i] for i in evenly(len(side), SAMPLE)]
        return decide([PageIds.of(name, ids) for ids, name in sample], **options)

    pages = ((str(i), *both) for i, both in enumerate(zip(theirs, ours, strict=True)))
    return len(theirs), pages, lambda options: (find(theirs, options), find(ours, options))


def _listed(side: Any, what: str) -> list[_Ids]:
    """Return an array (H, W), or a sequence of them, as integers with names."""
    arrays = [np.asarray(side)] if getattr(side, "ndim", 0) == _TWO else list(map(np.asarray, side))
    for array in arrays:
        if array.ndim != _TWO or array.dtype.kind not in "bui" or not array.size:
            raise ValueError(
                f"evaluate: {what}: expected integers (H, W), got {array.dtype} {array.shape}"
            )
    if not arrays:
        raise ValueError(f"evaluate: {what}: expected one picture at least")
    return [(array, f"{what} {i}") for i, array in enumerate(arrays)]


def _agree(codings: _Codings, ignore: int | None) -> _Codings:
    """Make ids of predictions and labels mean the same, where one side has more than two."""
    theirs, ours = codings
    most = max(codings, key=lambda coding: (coding.kind == "classes", coding.classes))
    if most.classes <= _TWO or theirs.kind == ours.kind:
        return codings
    if "instances" in {theirs.kind, ours.kind}:
        raise UserError(
            f"predictions look like {theirs.kind}, labels like {ours.kind}: say of which kind both "
            "are"
        )
    # The other side has one number besides 0. It may be any class; void it must be told to be.
    return most, replace(most, ignore=-1 if ignore is None else ignore) if most is theirs else most


def _wide(coding: LabelCoding) -> LabelCoding:
    """Allow for classes in files that `detect` did not look at."""
    return replace(coding, classes=MOST_CLASSES, names=()) if coding.kind == "classes" else coding


def _complete(
    prediction: NDArray[np.uint8], target: NDArray[np.uint8], source: str
) -> NDArray[np.uint8]:
    """Make sure that each pixel that counts has a predicted class; give the others one."""
    if prediction.shape != target.shape:
        raise UserError(f"{source} has the shape {prediction.shape}, its labels {target.shape}")
    missing = (prediction == LabelCoding.VOID) & (target != LabelCoding.VOID)
    if missing.any():
        row, column = (int(i) for i in np.unravel_index(missing.argmax(), missing.shape))
        raise UserError(
            f"{source}: row {row}, column {column} is void, where the labels say class "
            f"{target[row, column]}: expected a class for every pixel that counts; if these are "
            "masks of 0 and 255, say that the kind is binary"
        )
    return np.where(target == LabelCoding.VOID, np.uint8(0), prediction)


def shown(pages: Iterator[Page], count: int, *, progress: bool) -> Iterable[Page]:
    """Show a bar on a terminal while pages are taken, if asked to."""
    if not progress:
        return pages
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import track  # noqa: PLC0415

    console = Console(stderr=True)
    if not console.is_terminal:
        return pages
    return track(pages, "comparing", total=count, console=console, transient=True)


def text(value: float, form: str = ".4f") -> str:
    """Say a figure, "-" for nan."""
    return "-" if math.isnan(value) else format(value, form)


def without_nan(value: Any) -> Any:
    """Replace nan by None in plain values."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
