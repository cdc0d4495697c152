"""``segfuse evaluate``: its options, and what it prints."""
# ruff: noqa: PLC0415, what is heavy is imported when it is needed

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from .files import check_free, whole
from .terminal import (
    Classes,
    ClassNames,
    Kind,
    Overwrite,
    auto,
    option,
    say,
    tabulate,
)

if TYPE_CHECKING:
    from .boundary_evaluation import BoundaryEvaluation
    from .evaluation import Evaluation
    from .instance_evaluation import InstanceEvaluation, PredictionKind

__all__ = ["evaluate"]

_WORST = 5  # pictures that are named


def evaluate(
    predictions: Annotated[
        Path, typer.Argument(help="Folder of label pictures, or one.", show_default=False)
    ],
    labels: Annotated[
        Path, typer.Argument(help="The true ones, matched by name.", show_default=False)
    ],
    *,
    instances: Annotated[
        bool,
        option(
            "Figures",
            "--instances",
            help="Compare objects, page by page: numbers are their ids; of binary predictions, "
            "components.",
        ),
    ] = False,
    boundaries: Annotated[
        bool,
        option(
            "Figures",
            "--boundaries",
            help="Compare maps of boundaries: 0 on a boundary, another number within a cell.",
        ),
    ] = False,
    kind: Kind = "auto",
    classes: Classes = None,
    ignore: Annotated[
        int | None,
        auto(
            "Data",
            "Id of pixels that do not count.",
            "255 if that is no class; with --instances none",
        ),
    ] = None,
    class_names: ClassNames = None,
    write_json: Annotated[
        Path | None, option("Output", "--json", help="Write all figures to this file.")
    ] = None,
    picture: Annotated[
        Path | None,
        option("Output", help="Draw the confusion matrix to this file (.png, .pdf, .svg)."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare predicted with true label pictures: accuracies and intersection over union.

    With --instances, objects: average precision and F1 (Data Science Bowl 2018, StarDist), panoptic
    quality (Kirillov 2019), SEG (Cell Tracking Challenge), adapted Rand error (SNEMI3D), variation
    of information (Meila 2007). With --boundaries, ISBI 2012's: pixel error, warping error (Jain
    2010), adapted Rand error, V^Rand and V^Info (Arganda-Carreras 2015). All are of the whole set.
    """
    if instances or boundaries:
        others = {"--classes": classes, "--class-names": class_names, "--picture": picture}
        others["--kind classes" if instances else "--kind"] = (
            None if kind == "auto" or (instances and kind != "classes") else kind
        )
        if boundaries:
            others |= {"--instances": instances or None, "--ignore": ignore}
        _alone("--boundaries" if boundaries else "--instances", others)
    for file, suffixes in [(write_json, None), (picture, (".png", ".pdf", ".svg"))]:
        check_free(file, suffixes, overwrite=overwrite)
    found: Evaluation | InstanceEvaluation | BoundaryEvaluation
    if instances:
        from .instance_evaluation import evaluate_instances

        of = cast("PredictionKind", kind)
        found = evaluate_instances(predictions, labels, kind=of, ignore=ignore, progress=True)
        _say_instances(found)
    elif boundaries:
        from .boundary_evaluation import evaluate_boundaries

        found = evaluate_boundaries(predictions, labels, progress=True)
        _say_boundaries(found)
    else:
        from .evaluation import evaluate as compare

        if picture is not None:
            from .report import confusion_picture
        found = compare(
            predictions,
            labels,
            kind=kind,
            classes=classes,
            ignore=ignore,
            names=class_names,
            progress=True,
        )
        _say_classes(found)
        if picture is not None:
            with whole(picture) as path:
                confusion_picture(found.matrix, found.names).savefig(path, dpi=150)
    if write_json is not None:
        with whole(write_json) as path:
            path.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    written = [str(file) for file in (write_json, picture) if file is not None]
    if written:
        say(f"written: {', '.join(written)}")


def _alone(name: str, others: dict[str, Any]) -> None:
    """Refuse options that do not go with one."""
    if chosen := [other for other, value in others.items() if value is not None]:
        raise typer.BadParameter(f"does not go with {', '.join(chosen)}", param_hint=name)


def _say_classes(found: Evaluation) -> None:
    from .data.pairs import number

    say(
        f"{number(len(found.files), 'picture')}, {found.scores.pixels:,} pixels that count, "
        f"{found.void:,} that do not",
        f"labels read as {found.coding.kind}, predictions as {found.prediction_coding.kind}",
    )
    _tables(
        found,
        ("worst pictures", "mean IU", "pixel accuracy"),
        ((f.name, f"{f.mean_iu:.4f}", f"{f.pixel_accuracy:.4f}") for f in found.files),
    )


def _say_instances(found: InstanceEvaluation) -> None:
    from .data.pairs import number

    what = "binary, objects are its components" if found.components else "ids of objects"
    void = f"; {found.void:,} pixels that do not count" if found.void else ""
    say(
        f"{number(len(found.files), 'picture')}, {number(found.objects, 'object')}, "
        f"{found.predicted_objects:,} predicted{void}",
        f"predictions read as {what}",
    )
    _tables(
        found,
        ("worst pictures", "PQ", "AP 0.5", "objects", "predicted"),
        (
            (
                file.name,
                f"{file.panoptic_quality:.4f}",
                f"{file.average_precision:.4f}",
                f"{file.objects:,}",
                f"{file.predicted_objects:,}",
            )
            for file in found.files
        ),
    )


def _say_boundaries(found: BoundaryEvaluation) -> None:
    from .data.pairs import number

    say(
        f"{number(len(found.files), 'picture')}, {found.pixels.pixels:,} pixels, "
        f"{number(found.cells, 'cell')}, {found.predicted_cells:,} predicted"
    )
    _tables(
        found,
        ("worst pictures", "V^Rand", "pixel error", "warping error"),
        (
            (f.name, f"{f.rand:.4f}", f"{f.pixel_error:.4f}", f"{f.warping_error:.6f}")
            for f in found.files
        ),
    )


def _tables(
    found: Evaluation | InstanceEvaluation | BoundaryEvaluation,
    head: Sequence[str],
    pictures: Iterable[Sequence[str]],
) -> None:
    """Print the table, the figures of the set, and of several pictures the worst."""
    first, *rows = found.table()
    tabulate(rows, first)
    tabulate(
        (_spelt(name), f"{value:.6f}" if name == "warping_error" else f"{value:.4f}")
        for name, value in found.figures().items()
    )
    if len(found.files) > 1:
        tabulate(list(pictures)[:_WORST], head)


def _spelt(name: str) -> str:
    """Say mean IU, average precision at 0.5, V^Rand, SEG."""
    for old, new in [("_50", "_at_0.5"), ("_75", "_at_0.75"), ("v_rand", "V^Rand")]:
        name = name.replace(old, new)
    name = name.replace("v_info", "V^Info").replace("f1", "F1").replace("_", " ")
    return "SEG" if name == "seg" else name.replace(" iu", " IU").replace("rand ", "Rand ")
