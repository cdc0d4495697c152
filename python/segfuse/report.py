"""Pictures of a segmentation beside its truth, for people to judge.

Colours are of Okabe and Ito's palette, told apart by colour-blind readers too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

__all__ = ["comparison", "error_overlay", "visible"]

TRUTH = "#F0E442"  # yellow
PREDICTION = "#D55E00"  # vermillion
FALSE_POSITIVE = "#E69F00"  # orange
FALSE_NEGATIVE = "#56B4E9"  # sky blue

GAMMA = 0.5
SCALE_BAR = 50  # pixels


def visible(image: NDArray[Any]) -> NDArray[np.float32]:
    """Stretch grey values for the eye: percentiles 1 to 99.8 to 0 to 1, square root.

    Args:
        image: (H, W), any real dtype.

    Returns:
        (H, W) float32 in 0 to 1; all zero where the image is flat.
    """
    low, high = np.percentile(image, [1, 99.8])
    stretched = np.clip((image - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1)
    return np.asarray(stretched**GAMMA, dtype=np.float32)


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


def comparison(
    image: NDArray[Any],
    held_out: tuple[slice, slice],
    truth: NDArray[np.bool_],
    predictions: Mapping[str, NDArray[np.bool_]],
    *,
    title: str,
) -> Figure:
    """Draw an image, its held-out part with outlines, and there each prediction's errors.

    Args:
        image: (H, W), grey values.
        held_out: rows and columns of the held-out part, each with start and stop.
        truth: of the held-out part's size, True in the foreground.
        predictions: panel titles and masks of truth's size; the first is outlined beside truth.
        title: of the whole figure.

    Returns:
        A figure of its own, unknown to pyplot; save it with ``savefig``.
    """
    grey = visible(image)
    part = grey[held_out]
    figure, (whole, outlined, *wrong) = _row([grey.shape, *[part.shape] * (1 + len(predictions))])

    _show(whole, grey, "whole image; dashed: the held-out part")
    rows, columns = held_out
    corner, height, width = (columns.start - 0.5, rows.start - 0.5), *part.shape
    whole.add_patch(
        Rectangle(corner, width, height, fill=False, color="white", linestyle="--", linewidth=2)
    )

    _show(outlined, part, "held-out part, outlines")
    _outline(outlined, truth, TRUTH, 2.0)
    _outline(outlined, next(iter(predictions.values())), PREDICTION, 0.8)

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
