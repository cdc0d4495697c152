"""How the segments of a prediction overlap those of the truth: the table behind all figures.

Of the n x m pairs of segments only those that share a pixel are kept, so thousands of segments cost
little, and ids may be as large as they like.  Pixels are first gathered into runs of one pair along
the last axis, then runs are sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ._arrays import as_pair

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Overlaps", "overlaps"]


@dataclass(frozen=True, eq=False)
class Overlaps:
    """Pairs of segments that share pixels, of one picture or of a set.

    ``a + b`` and ``sum(tables)`` are the table of a set: segments of different pictures are
    different segments, whatever their ids, and the background of each picture is a segment of its
    own.  Every figure of such a table is thereby one of sums over the set.  `join` does the same
    for many tables in one pass.

    Attributes:
        target_ids: (n,) int64, id of each segment of the truth, 0 = background.
        prediction_ids: (m,) int64, the same of the prediction.
        target: (k,) int64, the pair's segment of the truth, an index into `target_ids`.
        prediction: (k,) int64, its segment of the prediction.
        pixels: (k,) int64 >= 1, that the two share.
        image: (k,) int64, index of the pair's picture in the set.
    """

    target_ids: NDArray[np.int64]
    prediction_ids: NDArray[np.int64]
    target: NDArray[np.int64]
    prediction: NDArray[np.int64]
    pixels: NDArray[np.int64]
    image: NDArray[np.int64]

    @property
    def target_pixels(self) -> NDArray[np.int64]:
        """(n,) pixels of each segment of the truth."""
        return _sums(self.target, self.pixels, self.target_ids.size)

    @property
    def prediction_pixels(self) -> NDArray[np.int64]:
        """(m,) pixels of each segment of the prediction."""
        return _sums(self.prediction, self.pixels, self.prediction_ids.size)

    @property
    def target_objects(self) -> int:
        """Objects in the truth: its segments without background."""
        return int(np.count_nonzero(self.target_ids))

    @property
    def prediction_objects(self) -> int:
        """Objects in the prediction."""
        return int(np.count_nonzero(self.prediction_ids))

    def foreground(self) -> Overlaps:
        """Return the table of the pixels that are of an object in the truth."""
        return self._kept(self.target_ids[self.target] != 0)

    def objects(self) -> tuple[Overlaps, NDArray[np.float64]]:
        """Return the pairs of two objects, and the intersection over union of each.

        The union is of whole objects, with what of them overlaps background.
        """
        target, prediction = self.target_pixels, self.prediction_pixels
        union = target[self.target] + prediction[self.prediction] - self.pixels
        of_two = (self.target_ids[self.target] != 0) & (self.prediction_ids[self.prediction] != 0)
        return self._kept(of_two), (self.pixels / union)[of_two]

    def _kept(self, chosen: NDArray[np.bool_]) -> Overlaps:
        """Return the table with some of its pairs, and all of its segments."""
        return Overlaps(
            self.target_ids,
            self.prediction_ids,
            *(a[chosen] for a in (self.target, self.prediction, self.pixels, self.image)),
        )

    @staticmethod
    def join(tables: Sequence[Overlaps]) -> Overlaps:
        """Return the table of the set of all these tables' pictures."""
        rows = _starts([table.target_ids.size for table in tables])
        columns = _starts([table.prediction_ids.size for table in tables])
        images = _starts([int(table.image.max(initial=-1)) + 1 for table in tables])
        return Overlaps(
            _joined([table.target_ids for table in tables]),
            _joined([table.prediction_ids for table in tables]),
            _joined([table.target + row for table, row in zip(tables, rows, strict=True)]),
            _joined([table.prediction + c for table, c in zip(tables, columns, strict=True)]),
            _joined([table.pixels for table in tables]),
            _joined([table.image + image for table, image in zip(tables, images, strict=True)]),
        )

    def __add__(self, other: Overlaps) -> Overlaps:
        return Overlaps.join([self, other]) if isinstance(other, Overlaps) else NotImplemented

    def __radd__(self, other: int) -> Overlaps:  # where sum() starts
        return self if isinstance(other, int) and other == 0 else NotImplemented


def overlaps(prediction: NDArray[Any] | Tensor, target: NDArray[Any] | Tensor) -> Overlaps:
    """Count the pixels that each segment of a prediction shares with each of the truth.

    Args:
        prediction: label picture of any shape, such as (H, W) or (D, H, W): ids >= 0, 0 =
            background; any integer dtype or bool, NumPy or torch, on any device.  The whole array
            is one picture: give the pictures of a batch one by one, and add.
        target: the truth, of the same shape; its dtype may differ.

    Raises:
        TypeError: no array or tensor, a masked one, or one that is neither integer nor bool.
        ValueError: shapes that differ, a negative id, an id of 2^63 or more.
    """
    columns, rows = (array.ravel() for array in as_pair("overlaps", prediction, target))
    changes = (rows[1:] != rows[:-1]) | (columns[1:] != columns[:-1])
    starts = np.flatnonzero(np.concatenate([np.full(min(rows.size, 1), fill_value=True), changes]))
    lengths = np.diff(starts, append=rows.size)
    target_ids, row = np.unique(rows[starts], return_inverse=True)
    prediction_ids, column = np.unique(columns[starts], return_inverse=True)
    pairs, pair = np.unique(row * prediction_ids.size + column, return_inverse=True)
    return Overlaps(
        target_ids.astype(np.int64),
        prediction_ids.astype(np.int64),
        pairs // max(prediction_ids.size, 1),
        pairs % max(prediction_ids.size, 1),
        _sums(pair, lengths, pairs.size),
        np.zeros(pairs.size, np.int64),
    )


def _sums(index: NDArray[np.int64], values: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Return the sum of the values of each index, exact below 2^53."""
    return np.bincount(index, values, size).astype(np.int64)


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *accumulate(sizes)][:-1]


def _joined(arrays: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, np.int64), *arrays])
