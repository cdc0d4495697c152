"""Pictures of a segmentation beside its truth, for people to judge.

Colours are of Okabe and Ito's palette, told apart by colour-blind readers too. Every figure is one
of its own, unknown to pyplot; save it with ``savefig``.
"""
# ruff: noqa: PLR2004, sizes, shades and counts of a drawing

from __future__ import annotations

import csv
import math
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.colors import hsv_to_rgb, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

__all__ = [
    "class_colours",
    "comparison",
    "confusion_picture",
    "curves",
    "error_overlay",
    "object_overlay",
    "overlays",
    "scenes",
    "visible",
    "weights_picture",
]

TRUTH = "#F0E442"  # yellow
PREDICTION = "#D55E00"  # vermillion
FALSE_POSITIVE = "#E69F00"  # orange
FALSE_NEGATIVE = "#56B4E9"  # sky blue

OKABE_ITO = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
VOID = 255  # in targets: pixels that do not count
VOID_COLOUR = "0.75"
WRONG = "#FF2020"  # on grey; classes have colours of their own

SCALE_BAR = 50  # pixels
LETTER = 0.62 / 72  # inches that a letter is wide, for a point of size
MOST_PIXELS = 1024  # along a side of a picture in `overlays`

P = ParamSpec("P")


def _literal(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Let dollars in names be dollars, which would enclose formulas."""

    @wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context({"text.parse_math": False}):
            return draw(*args, **kwargs)

    return drawn


def visible(image: NDArray[Any]) -> NDArray[np.float32]:
    """Stretch grey values for the eye: percentiles 1 to 99.8 to 0 to 1, square root.

    Args:
        image: (H, W), any real dtype.

    Returns:
        (H, W) float32 in 0 to 1; all zero where the image is flat.
    """
    return np.sqrt(_stretched(image))


def _stretched(image: NDArray[Any]) -> NDArray[np.float32]:
    low, high = np.percentile(image, [1, 99.8])
    stretched = (image - low) / max(high - low, np.finfo(np.float32).tiny)
    return np.asarray(np.clip(stretched, 0, 1), dtype=np.float32)


def error_overlay(
    grey: NDArray[np.float32], truth: NDArray[np.bool_], prediction: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Paint false positives orange and false negatives sky blue over a grey image.

    Args:
        grey: (H, W) in 0 to 1.
        truth: (H, W), True in the foreground.
        prediction: (H, W), True where foreground is predicted.

    Returns:
        (H, W, 3), red, green and blue in 0 to 1.
    """
    picture = np.repeat(grey[..., None], 3, axis=-1)
    picture[prediction & ~truth] = to_rgb(FALSE_POSITIVE)
    picture[truth & ~prediction] = to_rgb(FALSE_NEGATIVE)
    return picture


def object_overlay(grey: NDArray[np.float32], labels: NDArray[Any]) -> NDArray[np.float32]:
    """Tint each object of a grey image in a hue of its own; neighbouring ids are far apart.

    Args:
        grey: (H, W) in 0 to 1.
        labels: (H, W) ids, 0 = background.

    Returns:
        (H, W, 3), red, green and blue in 0 to 1.
    """
    picture = np.repeat(grey[..., None], 3, axis=-1)
    inside = labels != 0
    ids = labels[inside].astype(np.float64)
    hues = np.mod(ids * (math.sqrt(5) - 1) / 2, 1)  # the golden ratio spreads them
    brightness = 0.45 + 0.55 * grey[inside]
    picture[inside] = hsv_to_rgb(np.stack([hues, np.full_like(hues, 0.7), brightness], -1))
    return picture


def comparison(
    image: NDArray[Any],
    held_out: tuple[slice, slice],
    truth: NDArray[np.bool_],
    predictions: Mapping[str, NDArray[np.bool_]],
    *,
    title: str,
    objects: tuple[str, NDArray[Any]] | None = None,
) -> Figure:
    """Draw an image, its held-out part with outlines, and there each prediction's errors.

    Args:
        image: (H, W), grey values.
        held_out: rows and columns of the held-out part, each with start and stop.
        truth: of the held-out part's size, True in the foreground.
        predictions: panel titles and masks of truth's size; the first is outlined beside truth.
        title: of the whole figure.
        objects: panel title and ids of truth's size, 0 = background, to be coloured one by one.
    """
    grey = visible(image)
    part = grey[held_out]
    figure, (whole, outlined, *wrong) = _row(
        [grey.shape, *[part.shape] * (1 + len(predictions) + (objects is not None))]
    )

    _show(whole, grey, "whole image; dashed: the held-out part")
    rows, columns = held_out
    corner, height, width = (columns.start - 0.5, rows.start - 0.5), *part.shape
    whole.add_patch(
        Rectangle(corner, width, height, fill=False, color="white", linestyle="--", linewidth=2)
    )

    _show(outlined, part, "held-out part, outlines")
    _outline(outlined, truth, TRUTH, 2.0)
    _outline(outlined, next(iter(predictions.values())), PREDICTION, 0.8)

    if objects is not None:
        _show(wrong.pop(0), object_overlay(part, objects[1]), objects[0])
    for axes, (name, prediction) in zip(wrong, predictions.items(), strict=True):
        _show(axes, error_overlay(part, truth, prediction), name)

    figure.suptitle(title, fontsize=12, y=1 - 0.1 / figure.get_figheight(), va="top")
    figure.legend(
        handles=[
            Line2D([], [], color=TRUTH, label="outline: truth"),
            Line2D([], [], color=PREDICTION, label="outline: prediction"),
            Patch(color=FALSE_POSITIVE, label="false positive"),
            Patch(color=FALSE_NEGATIVE, label="false negative"),
        ],
        loc="lower center",
        ncols=4,
        facecolor="0.25",
        labelcolor="white",
    )
    return figure


def _row(shapes: list[tuple[int, ...]]) -> tuple[Figure, list[Axes]]:
    """Place panels for pictures (H, W) side by side, all at one scale, with room for text."""
    inch, gap, above, below = 100, 0.15, 0.95, 0.6  # pixels; inches
    width = sum(columns / inch + gap for _, columns in shapes) + gap
    height = max(rows for rows, _ in shapes) / inch + above + below
    figure = Figure(figsize=(width, height))
    axes, left = [], gap
    for rows, columns in shapes:
        panel = (left, height - above - rows / inch, columns / inch, rows / inch)
        axes.append(figure.add_axes(tuple(np.divide(panel, (width, height) * 2))))
        left += columns / inch + gap
    return figure, axes


def _show(axes: Axes, picture: NDArray[np.float32], title: str) -> None:
    height = picture.shape[0]
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.autoscale(enable=False)  # what is drawn on top must not change the scale
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()
    left, bottom = 0.04 * height, 0.96 * height
    axes.plot([left, left + SCALE_BAR], [bottom, bottom], color="white", linewidth=3, zorder=3)
    axes.text(
        left, bottom - 0.015 * height, f"{SCALE_BAR} pixels", color="white", fontsize=8, zorder=3
    )


def _outline(axes: Axes, mask: NDArray[np.bool_], colour: str, width: float) -> None:
    if mask.any() and not mask.all():  # else there is no outline, and matplotlib warns
        axes.contour(mask, levels=[0.5], colors=colour, linewidths=width)


def class_colours(classes: int, palette: Sequence[int] | None = None) -> NDArray[np.float32]:
    """Choose a colour for each class id: the palette's, else Okabe and Ito's eight, then others.

    Args:
        classes: number of them.
        palette: red, green and blue of ids 0, 1, ..., each 0 to 255, as palette PNGs hold them.

    Returns:
        (classes + 1, 3) in 0 to 1; the last is the colour of void.
    """
    if palette is not None:
        table = np.zeros((VOID + 1, 3), np.float32)
        table.reshape(-1)[: len(palette)] = np.asarray(palette[: table.size]) / 255
        return np.concatenate([table[:classes], table[VOID:]])
    chosen = np.array([to_rgb(colour) for colour in (*OKABE_ITO, VOID_COLOUR)])
    grid = np.stack(np.meshgrid(*[np.linspace(0.1, 1, 8)] * 3), -1).reshape(-1, 3)
    while len(chosen) <= classes:  # the colour farthest from all before; void's is among them
        nearest = np.linalg.norm(grid[:, None] - chosen, axis=-1).min(1)
        chosen = np.insert(chosen, -1, grid[nearest.argmax()], axis=0)
    return np.concatenate([chosen[:classes], chosen[-1:]]).astype(np.float32)


@_literal
def overlays(
    items: Sequence[tuple[str, NDArray[Any], NDArray[Any], NDArray[Any]]],
    names: Sequence[str],
    *,
    palette: Sequence[int] | None = None,
) -> Figure:
    """Draw a row for each picture: image, truth, prediction, and where they differ.

    With two classes errors are told apart as in `error_overlay`. Large pictures are thinned out.

    Args:
        items: name, image, truth and prediction of each picture: image (C, H, W) or (H, W), any
            real dtype, three channels being red, green and blue; truth and prediction (H, W) class
            ids, 255 in the truth where pixels do not count. At least one.
        names: of the classes.
        palette: see `class_colours`.
    """
    colours = class_colours(len(names), palette)
    kinds = {"wrong class": WRONG}
    if len(names) == 2:
        kinds = {"false positive": FALSE_POSITIVE, "false negative": FALSE_NEGATIVE}
    return _grid(
        [_panels(item, colours) for item in items],
        [item[2].shape for item in items],
        _classes_of([labels for item in items for labels in item[2:]], names, colours),
        [Patch(color=colour, label=kind) for kind, colour in kinds.items()],
    )


@_literal
def scenes(
    items: Sequence[tuple[str, NDArray[Any], NDArray[Any], Sequence[NDArray[Any]]]],
    names: Sequence[str],
    titles: Sequence[str],
    *,
    palette: Sequence[int] | None = None,
) -> Figure:
    """Draw a row for each picture: image, what each of several networks predicted, truth.

    Large pictures are thinned out.

    Args:
        items: name, image, truth and predictions of each picture, as `overlays` takes them. At
            least one.
        names: of the classes.
        titles: of the predictions.
        palette: see `class_colours`.
    """
    colours = class_colours(len(names), palette)
    rows = []
    for name, image, truth, predictions in items:
        step = -(-max(truth.shape) // MOST_PIXELS)
        thin = np.s_[..., ::step, ::step]
        painted = [_painted(labels[thin], colours) for labels in (*predictions, truth)]
        panels = [_photograph(image[thin]), *painted]
        rows.append(list(zip((name, *titles, "truth"), panels, strict=True)))
    return _grid(
        rows,
        [item[2].shape for item in items],
        _classes_of([labels for *_, t, p in items for labels in (t, *p)], names, colours),
    )


def _classes_of(
    labels: Sequence[NDArray[Any]], names: Sequence[str], colours: NDArray[np.float32]
) -> list[Patch]:
    """Make a legend of the classes that are in some of the labels."""
    present = sorted({int(i) for ids in labels for i in np.unique(ids)})
    return [
        Patch(
            facecolor=colours[min(i, len(names))],
            edgecolor="0.5",
            label=names[i] if i < len(names) else "not counted",
        )
        for i in present
    ]


def _grid(
    rows: Sequence[Sequence[tuple[str, NDArray[np.float32]]]],
    shapes: Sequence[tuple[int, ...]],
    classes: Sequence[Patch],
    last: Sequence[Patch] = (),
) -> Figure:
    """Place titles and pictures (h, w, 3), a row an item, all panels of one width.

    Args:
        rows: panels of each item.
        shapes: of the items' pictures before they were thinned out.
        classes: legend on the left.
        last: legend below the last panel.
    """
    side, gap, above, line = 3.0, 0.12, 0.3, 0.22  # inches; `line`: of a legend
    panels, widest = len(rows[0]), max(len(str(patch.get_label())) for patch in classes)
    columns = max(1, int((panels - bool(last)) * side / (0.75 + 0.085 * widest)))
    below = 0.1 + line * max(-(-len(classes) // columns), len(last))
    heights = [float(np.clip(side * h / w, 0.3, 2 * side)) for h, w in shapes]
    size = panels * (side + gap) + gap, sum(heights) + (above + gap) * len(rows) + below
    figure = Figure(figsize=size)
    top = size[1]
    for row, height in zip(rows, heights, strict=True):
        top -= above + height
        for i, (title, picture) in enumerate(row):
            box = np.divide((gap + i * (side + gap), top, side, height), size * 2)
            axes = figure.add_axes(tuple(box))
            axes.imshow(picture)
            axes.set_title(_short(title, 40), fontsize=9, pad=3)
            axes.set_axis_off()
        top -= gap
    for handles, left, most in [
        (classes, gap, min(columns, len(classes))),
        (last, gap + (panels - 1) * (side + gap), 1),
    ]:
        if handles:
            figure.legend(
                handles=list(handles),
                loc="upper left",
                bbox_to_anchor=(left / size[0], (below - 0.05) / size[1]),
                ncols=most,
                fontsize=9,
                frameon=False,
                borderpad=0,
                borderaxespad=0,
            )
    return figure


def _panels(
    item: tuple[str, NDArray[Any], NDArray[Any], NDArray[Any]], colours: NDArray[np.float32]
) -> list[tuple[str, NDArray[np.float32]]]:
    """Make the titles and pictures (h, w, 3) of a row of `overlays`."""
    name, image, truth, prediction = item
    step = -(-max(truth.shape) // MOST_PIXELS)
    counted = truth != VOID
    fraction = ((prediction != truth) & counted).sum() / max(counted.sum(), 1)
    image, truth, prediction = (a[..., ::step, ::step] for a in (image, truth, prediction))
    wrong = _errors(image, truth, prediction, len(colours) - 1)
    return [
        (name, _photograph(image)),
        ("truth", _painted(truth, colours)),
        ("prediction", _painted(prediction, colours)),
        (f"errors: {fraction:.1%} of the pixels", wrong),
    ]


def _photograph(image: NDArray[Any]) -> NDArray[np.float32]:
    """Show (C, H, W) or (H, W) as (H, W, 3): in colour if C is 3, else grey, brightened if dark."""
    if image.ndim == 3 and len(image) == 3:
        plain = image.dtype == np.uint8
        colours = (image / 255).astype(np.float32) if plain else _stretched(image)
        return colours.transpose(1, 2, 0)
    grey = _stretched(image.mean(0) if image.ndim == 3 else image)
    if np.median(grey) < 0.15:
        grey = np.sqrt(grey)
    return np.repeat(grey[..., None], 3, axis=-1)


def _painted(labels: NDArray[Any], colours: NDArray[np.float32]) -> NDArray[np.float32]:
    painted: NDArray[np.float32] = colours[np.minimum(labels, len(colours) - 1)]
    return painted


def _errors(
    image: NDArray[Any], truth: NDArray[Any], prediction: NDArray[Any], classes: int
) -> NDArray[np.float32]:
    """Paint what is wrong, and what does not count, over the image in grey."""
    grey = _photograph(image).mean(-1)
    if classes == 2:
        picture = error_overlay(grey, truth == 1, prediction == 1)
    else:
        picture = np.repeat(grey[..., None], 3, axis=-1)
        picture[prediction != truth] = to_rgb(WRONG)
    picture[truth == VOID] = to_rgb(VOID_COLOUR)
    return picture


@_literal
def curves(metrics: Path) -> Figure:
    """Draw what a training run logged: losses, validation figures and learning rate by step.

    Args:
        metrics: a CSV file with the column "step" and any others of numbers; cells may be empty.
            "seconds" is told on the axis; columns with "loss" in their names share a panel, as do
            all others but "learning_rate".
    """
    with metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {
        name: np.array([(float(row["step"]), float(row[name])) for row in rows if row[name]])
        for name in (rows[0] if rows else ())
    }
    columns = {name: values for name, values in columns.items() if len(values)}
    seconds = columns.pop("seconds", np.zeros((1, 2)))[-1, 1]
    columns.pop("step", None)
    losses = [name for name in columns if "loss" in name]
    figures = [name for name in columns if name not in (*losses, "learning_rate")]
    panels = {"loss": losses, "validation": figures, "learning rate": ["learning_rate"]}
    panels = {title: names for title, names in panels.items() if any(n in columns for n in names)}
    figure = Figure(figsize=(8, 1 + 2 * max(len(panels), 1)), layout="constrained")
    shared = figure.subplots(max(len(panels), 1), sharex=True, squeeze=False)[:, 0]
    for axes, (title, names) in zip(shared, panels.items(), strict=False):
        for name, colour in zip(names, class_colours(len(names) + 1)[1:], strict=False):
            label = name if title == "loss" else name.removeprefix("validation_")
            _curve(axes, columns[name], label.replace("_", " ").replace(" iu", " IU"), colour)
        axes.set_ylabel(title)
        axes.grid(color="0.9")
        if len(names) > 1 or title == "validation":
            axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
    shared[-1].set_xlabel(f"step ({seconds:.0f} s in all)" if seconds else "step")
    return figure


def _curve(
    axes: Axes, values: NDArray[np.floating], name: str, colour: NDArray[np.float32]
) -> None:
    """Plot (n, 2) steps and values; many are drawn thin, with their running mean over them."""
    few = len(values) <= 100 or name == "learning rate"
    style: dict[str, Any] = {"marker": "o", "markersize": 3} if len(values) <= 30 else {}
    axes.plot(*values.T, color=colour, alpha=1 if few else 0.3, label=name, **style)
    if not few:
        window = len(values) // 25
        kernel = np.full(window, 1 / window)
        mean = [np.convolve(column, kernel, mode="valid") for column in values.T]
        axes.plot(*mean, color=colour, linewidth=2, label=f"{name}, mean of {window}")


@_literal
def confusion_picture(matrix: Any, names: Sequence[str]) -> Figure:
    """Draw a confusion matrix: of each class's pixels, the percentage predicted as each class.

    Numbers stand where they can be read: counts to about 12 classes, percentages to about 30.

    Args:
        matrix: (K, K) counts, rows = target; an array or a CPU tensor.
        names: K names.
    """
    counts = np.asarray(matrix, dtype=np.float64)
    classes, total = len(counts), counts.sum(1, keepdims=True)
    share = np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)
    cell = float(np.interp(classes, [6, 12, 21, 40], [0.95, 0.72, 0.42, 0.22]))  # inches
    cell = min(cell, 10 / classes)
    labels = [_short(name, 24) for name in names]
    font, longest = float(np.clip(22 * cell, 4.5, 10)), max(map(len, labels))  # in points; letters
    side = max(classes * cell, 2.2) + 0.6 + longest * font * LETTER
    figure = Figure(figsize=(side, side + 0.3), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    every = np.s_[:: math.ceil(font / 60 / cell)]
    rotation = "vertical" if longest * font * LETTER > 0.9 * cell else "horizontal"
    axes.set_xticks(range(classes)[every], labels[every], fontsize=font, rotation=rotation)
    axes.set_yticks(range(classes)[every], labels[every], fontsize=font)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title("% of the pixels of each true class", fontsize=10)

    widest = len(f"{counts.max(initial=0):,.0f}")
    small = min(9.0, 0.9 * cell / LETTER / widest)
    with_counts = small > 4.5 and cell > 0.6
    for (i, j), count in np.ndenumerate(counts) if cell > 0.3 else ():
        text = f"{share[i, j]:.1%}\n{count:,.0f}" if with_counts else f"{100 * share[i, j]:.0f}"
        colour = "0.6" if not count else "white" if share[i, j] > 0.6 else "black"
        axes.text(
            j,
            i,
            text if total[i] else "",
            ha="center",
            va="center",
            color=colour,
            fontsize=small if with_counts else 0.85 * font,
        )
    return figure


def weights_picture(weights: NDArray[np.float32]) -> Figure:
    """Draw a weight map (H, W) in false colours with a bar, as figure 3d of the U-Net paper is."""
    height, width = weights.shape
    scale = 5 / max(weights.shape)
    tall, wide = max(1.6, scale * height), max(1.6, scale * width)
    figure = Figure(figsize=(wide + 1.1, tall + 0.3), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.imshow(weights, cmap="viridis", vmin=0, interpolation="nearest")
    axes.set_axis_off()
    figure.colorbar(drawn, ax=axes, label="weight", fraction=0.05, pad=0.02)
    return figure


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
