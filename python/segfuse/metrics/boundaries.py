"""Figures of boundary maps: pixel error, and the warping error that forgives moved boundaries.

Jain et al.: Boundary Learning by Optimization with Topological Constraints, CVPR 2010.
The warping error of a prediction T against the truth L* is the least disagreement

    D(T || L*) = min over warpings L of L* of (pixels where L and T differ) / pixels

where a warping is what flips of simple points make of L*: pixels whose flip leaves the topology as
it was.  So a boundary that is elsewhere costs nothing, while a merged, split, missing or added cell
or hole costs pixels: a merger the membrane that is missing, a cut its width, a lost cell one pixel,
an added cell or a hole within one all of its own.

As in Fiji's Trainable Segmentation, the challenge's own code, cells are 4-connected and boundaries,
with what lies around the picture, 8-connected.  The least disagreement is looked for greedily, as
there: simple points that differ are flipped until none is left, and none that agrees is ever
flipped.  What is found depends on the order of flips, so it is an upper bound.  Here all boundaries
move at one pace; Fiji begins where the predicted probabilities are surest.

A pixel's simplicity depends on its 8 neighbours alone.  Pixels of which both coordinates are equal
modulo 2 are not each other's neighbours, so that flipping these together is flipping them one after
another: four such sublattices take turns, and a pixel is looked at again only after a neighbour has
been flipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ._arrays import as_ids, as_pair, wrong

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["PixelErrors", "pixel_error", "warp", "warping_error"]


@dataclass(frozen=True)
class PixelErrors:
    """Pixels that are wrong; ``a + b`` and ``sum(...)`` are those of a set.

    Attributes:
        wrong: pixels.
        pixels: of the pictures.
    """

    wrong: int
    pixels: int

    @property
    def error(self) -> float:
        """Fraction of the pixels that is wrong, in 0 to 1; nan without pixels."""
        return self.wrong / self.pixels if self.pixels else float("nan")

    def __add__(self, other: PixelErrors) -> PixelErrors:
        if not isinstance(other, PixelErrors):
            return NotImplemented
        return PixelErrors(self.wrong + other.wrong, self.pixels + other.pixels)

    def __radd__(self, other: int) -> PixelErrors:  # where sum() starts
        return self if isinstance(other, int) and other == 0 else NotImplemented


def pixel_error(prediction: NDArray[Any] | Tensor, target: NDArray[Any] | Tensor) -> PixelErrors:
    """Count the pixels that are cell in one map and boundary in the other.

    On maps of 0 and 1 this fraction is also the mean squared difference.  ISBI 2012 gave as pixel
    error this, or 1 - the best F score over thresholds; which of them a published figure is, its
    source must say.

    Args:
        prediction: map of any shape, bool or integer: 0 = boundary, anything else = inside of a
            cell, so that instance labels will do.  Compare probabilities with a threshold first.
        target: the truth, of the same shape.

    Raises:
        TypeError: no array or tensor, or one that is neither integer nor bool.
        ValueError: shapes that differ, or a negative number.
    """
    one, other = as_pair("pixel_error", prediction, target)
    return PixelErrors(int(np.count_nonzero((one != 0) != (other != 0))), one.size)


def warping_error(
    prediction: NDArray[Any] | Tensor,
    target: NDArray[Any] | Tensor,
    *,
    mask: NDArray[Any] | Tensor | None = None,
) -> PixelErrors:
    """Count the pixels in which the prediction differs from the truth warped towards it.

    This is the paper's figure.  The ISBI 2012 challenge's tables, U-Net's 0.000353 among them, hold
    a smaller one under the same name: only splits and mergers count, at the best of several
    thresholds (Arganda-Carreras et al.: Crowdsourcing the creation of image segmentation algorithms
    for connectomics, Frontiers in Neuroanatomy 9:142, 2015).

    Takes and raises what `warp` does.  Of a stack all sections count together.  Pixels outside of
    `mask` count too.
    """
    warped, predicted = _warped("warping_error", prediction, target, mask)
    return PixelErrors(int(np.count_nonzero(warped != predicted)), warped.size)


def warp(
    prediction: NDArray[Any] | Tensor,
    target: NDArray[Any] | Tensor,
    *,
    mask: NDArray[Any] | Tensor | None = None,
) -> NDArray[np.bool_]:
    """Move the truth's boundaries towards those of a prediction, keeping its topology.

    Args:
        prediction: (H, W) or (N, H, W) bool or integer: 0 = boundary, anything else = inside of a
            cell.  The N sections are warped one by one.
        target: the truth, of the same shape.
        mask: of the same shape, not 0 where pixels may be flipped, such as within some distance of
            the truth's boundaries; None = everywhere.

    Returns:
        The shape of `target`, True = inside of a cell: its cells and holes are as many as the
        target's, and where it still differs from the prediction, within `mask`, no single flip
        would leave them so.

    Raises:
        TypeError: no array or tensor, or one that is neither integer nor bool.
        ValueError: other dimensions, shapes that differ, or a negative number.
    """
    return _warped("warp", prediction, target, mask)[0]


def _warped(
    function: str, prediction: object, target: object, mask: object
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return what `warp` does, and the prediction as bool; raise in the name of a function."""
    one, other = (array != 0 for array in as_pair(function, prediction, target))
    if other.ndim not in {2, 3}:
        raise wrong(function, "target", "shape (H, W) or (N, H, W)", other.shape)
    free = np.ones_like(other) if mask is None else as_ids(function, "mask", mask) != 0
    if free.shape != other.shape:
        raise wrong(function, "mask", f"target's shape {other.shape}", free.shape)
    if other.ndim == 2:  # noqa: PLR2004
        return _warp_section(one, other, free), one
    sections = [_warp_section(*section) for section in zip(one, other, free, strict=True)]
    return (np.stack(sections) if sections else other), one


def _simple_points() -> NDArray[np.bool_]:
    """Return (256,): whether a pixel is simple, by its neighbours as bits, from east around.

    The 4-connectivity number of Yokoi, Toriwaki, Fukumura: An analysis of topological properties of
    digitized binary pictures using local features, Computer Graphics and Image Processing 4, 1975,
    counts the cells around the pixel that touch its sides, if not all 8 neighbours are cell.
    """
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    sides, corners = bits[:, ::2], bits[:, 1::2]
    both_sides = sides * np.roll(sides, -1, axis=1)  # of each corner
    simple: NDArray[np.bool_] = (sides.sum(1) - (both_sides * corners).sum(1)) == 1
    return simple


_SIMPLE = _simple_points()


def _warp_section(
    prediction: NDArray[np.bool_], target: NDArray[np.bool_], mask: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Warp one picture (H, W)."""
    padded = np.pad(target, 1)  # with boundary, which is never flipped
    width = padded.shape[1]
    cell = padded.ravel()
    differs = np.pad((prediction != target) & mask, 1).ravel()
    around = np.array([1, 1 - width, -width, -1 - width, -1, width - 1, width, width + 1])
    pending = np.flatnonzero(differs)
    while pending.size:
        row, column = np.divmod(pending, width)
        sublattice = row % 2 * 2 + column % 2
        flipped = []
        for turn in range(4):
            pixels = pending[sublattice == turn]
            neighbours = np.packbits(cell[pixels[:, None] + around], axis=1)[:, 0]
            pixels = pixels[_SIMPLE[neighbours]]
            cell[pixels] ^= True
            differs[pixels] = False
            flipped.append(pixels)
        near = (np.concatenate(flipped)[:, None] + around).ravel()
        pending = np.unique(near[differs[near]])
    return cell.reshape(padded.shape)[1:-1, 1:-1].copy()
