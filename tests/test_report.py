"""The pictures: that what they show is what they were given, and that nothing is cut off."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="needs segfuse[cli]")

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from segfuse import report

VOID = report.VOID


def texts(figure: Figure) -> list[str]:
    """Every number in a cell, row by row."""
    return [text.get_text() for text in figure.axes[0].texts]


def check_nothing_is_cut_off(figure: Figure) -> None:
    """Draw, and see that every text lies within the picture."""
    figure.savefig(io.BytesIO(), format="png")
    for shown in [*figure.axes, *figure.legends]:
        box = shown.get_tightbbox()
        assert box is not None
        assert figure.bbox.padded(1).containsx(box.x0)
        assert figure.bbox.padded(1).containsx(box.x1)
        assert figure.bbox.padded(1).containsy(box.y0)
        assert figure.bbox.padded(1).containsy(box.y1)


# Colours


@pytest.mark.parametrize("classes", [1, 2, 8, 21, 60])
def test_colours_are_distinct(classes: int) -> None:
    colours = report.class_colours(classes)
    assert colours.shape == (classes + 1, 3)
    apart = np.linalg.norm(colours[:, None] - colours, axis=-1) + np.eye(classes + 1)
    assert apart.min() > 0.15
    longer = report.class_colours(classes + 5)
    assert np.array_equal(longer[:classes], colours[:classes])
    assert np.array_equal(longer[-1], colours[-1])  # void


def test_colours_of_a_palette() -> None:
    palette = list(range(256)) * 3
    colours = report.class_colours(21, palette)
    assert np.array_equal(np.rint(colours * 255), np.reshape(palette, (256, 3))[[*range(21), 255]])
    assert report.class_colours(3, [255, 0, 0]).tolist() == [[1, 0, 0], [0] * 3, [0] * 3, [0] * 3]


# Overlays


def item(
    shape: tuple[int, int], classes: int, *, channels: int | None = 1, name: str = "some"
) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    image = random.normal(size=shape if channels is None else (channels, *shape))
    truth, prediction = random.integers(0, classes, (2, *shape)).astype(np.uint8)
    truth[: shape[0] // 4] = VOID
    return name, image, truth, prediction


@pytest.mark.parametrize("channels", [None, 1, 2, 3, 5])
@pytest.mark.parametrize("classes", [2, 21])
def test_overlays(classes: int, channels: int | None) -> None:
    items = [item(shape, classes, channels=channels) for shape in [(40, 60), (90, 20), (3, 50)]]
    names = [f"class {i}" for i in range(classes)]
    figure = report.overlays(items, names)
    assert len(figure.axes) == 4 * len(items)
    colours = report.class_colours(classes)
    for row, (_, _, truth, prediction) in enumerate(items):
        _, of_truth, of_prediction, of_errors = (
            np.asarray(axes.images[0].get_array()) for axes in figure.axes[4 * row : 4 * row + 4]
        )
        assert np.array_equal(of_truth[truth != VOID], colours[truth[truth != VOID]])
        assert np.array_equal(of_prediction, colours[prediction])
        void = to_rgb(report.VOID_COLOUR)
        assert (of_truth[truth == VOID] == np.float32(void)).all()
        assert (of_errors[truth == VOID] == np.float32(void)).all()
        wrong = (prediction != truth) & (truth != VOID)
        kinds = [report.WRONG] if classes > 2 else [report.FALSE_POSITIVE, report.FALSE_NEGATIVE]
        painted = [(of_errors == np.float32(to_rgb(kind))).all(-1) for kind in kinds]
        assert np.array_equal(np.logical_or.reduce(painted), wrong)
        percent = f"{wrong.sum() / (truth != VOID).sum():.1%}"
        assert percent in figure.axes[4 * row + 3].get_title()
    check_nothing_is_cut_off(figure)


def test_overlays_of_what_is_flat_void_large_or_has_a_long_name() -> None:
    flat = np.zeros((30, 30), np.uint8)
    void = np.full_like(flat, VOID)
    items = [("flat", flat, flat, flat), ("x" * 200, flat, void, flat), item((3000, 9), 2)]
    figure = report.overlays(items, ["background", "f" * 60])
    assert max(axes.images[0].get_array().shape[0] for axes in figure.axes) <= report.MOST_PIXELS
    check_nothing_is_cut_off(figure)


def test_photographs_keep_their_colours() -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 5, 6), np.uint8)
    assert np.allclose(report._photograph(image), image.transpose(1, 2, 0) / 255)


# Confusion matrix


@pytest.mark.parametrize("classes", [1, 2, 5, 11, 21, 40, 255])
def test_confusion_picture(classes: int) -> None:
    random = np.random.default_rng(classes)
    matrix = random.integers(0, 2_000_000, (classes, classes)) + np.eye(classes, dtype=int) * 10**7
    names = [f"quite a long name {i}" for i in range(classes)]
    figure = report.confusion_picture(torch.from_numpy(matrix), names)
    axes, shown = figure.axes[0], texts(figure)
    share = matrix / matrix.sum(1, keepdims=True)
    assert np.allclose(np.asarray(axes.images[0].get_array()), share)
    if classes <= 11:
        assert shown == [f"{p:.1%}\n{n:,}" for p, n in zip(share.flat, matrix.flat, strict=True)]
    elif classes <= 21:
        assert shown == [f"{100 * p:.0f}" for p in share.flat]
    else:
        assert not shown
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == names if classes <= 40 else 20 < len(labels) < 255
    if classes <= 21:  # above, constrained layout takes seconds
        check_nothing_is_cut_off(figure)
    assert max(figure.get_size_inches()) < 15


def test_confusion_picture_of_a_class_without_pixels() -> None:
    assert texts(report.confusion_picture([[3, 1], [0, 0]], ["a", "b"])) == [
        "75.0%\n3", "25.0%\n1", "", "",
    ]  # fmt: skip


# Curves


def log(path: Path, rows: list[dict[str, Any]]) -> Path:
    names = dict.fromkeys(name for row in rows for name in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(names))
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("steps", [1, 40, 3000])
def test_curves(tmp_path: Path, steps: int) -> None:
    rows: list[dict[str, Any]] = [
        {"step": i, "seconds": i / 2, "loss": 1 / i, "learning_rate": 1e-3}
        for i in range(1, steps + 1)
    ]
    rows[-1] |= {"validation_loss": 0.3, "validation_mean_iu": 0.5, "validation_accuracy": 1}
    figure = report.curves(log(tmp_path / "metrics.csv", rows))
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "validation", "learning rate"]
    curve = figure.axes[0].lines[0]
    assert np.array_equal(curve.get_xdata(), [row["step"] for row in rows])
    assert np.array_equal(curve.get_ydata(), [row["loss"] for row in rows])
    legend = figure.axes[1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["mean IU", "accuracy"]
    assert figure.axes[2].get_xlabel() == f"step ({steps / 2:.0f} s in all)"
    check_nothing_is_cut_off(figure)


def test_curves_without_validation_and_without_rows(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 1.0, "mean_iu": ""}, {"step": 2, "loss": 0.5, "mean_iu": ""}]
    figure = report.curves(log(tmp_path / "metrics.csv", rows))
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss"]
    (tmp_path / "empty.csv").write_text("step,loss\n")
    check_nothing_is_cut_off(report.curves(tmp_path / "empty.csv"))


def test_names_with_dollars_are_no_formulas() -> None:
    names = [r"$a_0$$\x$", "$b$"]
    pixels = np.eye(9, dtype=np.uint8)
    for figure in (
        report.overlays([(names[0], pixels, pixels, 1 - pixels)], names),
        report.confusion_picture(np.eye(2), names),
    ):
        figure.savefig(io.BytesIO(), format="png")
        shown = {text.get_text() for text in figure.findobj(Text)}
        assert set(names) <= shown
