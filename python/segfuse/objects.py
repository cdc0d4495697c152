"""Objects of a class map: connected components, cleaned, with the gaps between them given back."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from .metrics._arrays import as_ids, wrong
from .ops import label_distances

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["REACH", "Grow", "instances"]

Grow: TypeAlias = Literal["gaps", "everywhere"]

REACH = 1.5  # pixels
"""More than the diagonal of a pixel, less than 2: what `ops.separate_touching` opens at a contact.

It takes pixels with another label among their 8 neighbours.  At a straight contact these lie at
distance 1 from both objects, at a diagonal one at 1 and the square root of 2.
"""


def instances(
    labels: NDArray[Any] | Tensor,
    *,
    foreground: int | None = None,
    smallest: int = 1,
    holes: int | None = None,
    grow: Grow | None = None,
    reach: float = REACH,
    connectivity: int = 1,
) -> NDArray[np.int32]:
    """Number the objects of a class map.

    Objects are the connected components of the foreground.  Small ones are dropped, then holes are
    filled, then objects grow, if they are to: a network that learnt from labels whose contacts
    `segfuse.ops.separate_touching` had opened leaves gaps, which ``grow="gaps"`` closes.  It gives
    a background pixel to the nearest object where two are within `reach`, so that outlines on open
    background stay as they are (the distances d1 and d2 of Ronneberger, Fischer, Brox 2015,
    equation 2, by `segfuse.ops.label_distances`).  Objects that are truly that close apart come to
    touch, but stay two; of a pixel that is as near to both, which one gets it says nothing.

    Args:
        labels: class ids of 0 or more, (H, W) or (Z, Y, X), any integer dtype or bool.
        foreground: the class whose objects are looked for; None: all that is not 0 is foreground.
        smallest: objects of fewer pixels are dropped; counted before holes are filled.
        holes: background that one object encloses is given to it where it has at most so many
            pixels; None: whatever its size. 0 leaves holes. What encloses another object, or
            reaches the picture's border, is no hole.
        grow: "gaps"; or "everywhere": all background within `reach` goes to the nearest object;
            None: objects stay.
        reach: Euclidean distance between centres of pixels, above 0. In three dimensions diagonals
            are longer: there 1.8 closes what 1.5 does in two.
        connectivity: axes along which neighbours may differ: 1 (4 neighbours, in three dimensions
            6), so that objects that meet in a corner are two, up to the number of axes (8, 26).

    Returns:
        int32 of the same shape, on the CPU: 0 is background, objects are 1, 2, ... n in the order
        of their first pixels before they grow. A volume's objects go through its planes.

    Raises:
        ValueError: a shape or number out of range.
        TypeError: no array or tensor, or one that is neither integer nor bool; a number of another
            type.
        ImportError: SciPy is absent (``pip install 'segfuse[cli]'``).
    """
    ids = as_ids("instances", "labels", labels)
    if ids.ndim not in {2, 3}:
        raise wrong("instances", "labels", "shape (H, W) or (Z, Y, X)", ids.shape)
    _check("foreground", foreground, 0)
    _check("smallest", smallest, 0, optional=False)
    _check("holes", holes, 0)
    _check("connectivity", connectivity, 1, ids.ndim, optional=False)
    if grow is not None and grow not in get_args(Grow):
        raise wrong("instances", "grow", "gaps, everywhere or None", repr(grow))
    if not isinstance(reach, Real) or isinstance(reach, bool):
        raise TypeError(f"instances: reach: expected a number, got {reach!r}")
    if not 0 < reach < math.inf:
        raise wrong("instances", "reach", "a finite number above 0", reach)
    found = _components(ids != 0 if foreground is None else ids == foreground, connectivity)
    found = _without_small(found, smallest)
    if holes != 0:
        found = _filled(found, holes, connectivity)
    return found if grow is None else _grown(found, reach, gaps=grow == "gaps")


def _check(
    name: str, value: object, least: int, most: int | None = None, *, optional: bool = True
) -> None:
    """See that an argument is an integer in a range, or None if that is an option."""
    if optional and value is None:
        return
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"instances: {name}: expected an integer, got {value!r}")
    if not least <= int(value) <= (int(value) if most is None else most):
        expected = f"{least} or more" if most is None else f"{least} to {most}"
        raise wrong("instances", name, expected, value)


def _components(mask: NDArray[np.bool_], connectivity: int) -> NDArray[np.int32]:
    from scipy import ndimage  # noqa: PLC0415  (so that segfuse needs no SciPy)

    found = np.zeros(mask.shape, np.int32)
    if mask.size:
        structure = ndimage.generate_binary_structure(mask.ndim, connectivity)
        ndimage.label(mask, structure, output=found)
    return found


def _without_small(labels: NDArray[np.int32], smallest: int) -> NDArray[np.int32]:
    """Drop objects of fewer pixels, and number the others anew."""
    if smallest <= 1:
        return labels
    kept = np.bincount(labels.ravel()) >= smallest
    kept[:1] = False
    numbers = np.where(kept, np.cumsum(kept), 0).astype(np.int32)
    return numbers[labels] if numbers.size else labels


def _filled(labels: NDArray[np.int32], most: int | None, connectivity: int) -> NDArray[np.int32]:
    """Give each piece of background to the object around it, if it touches that alone.

    Objects that are joined by sides need background that is joined by corners too, and the other
    way round; then neighbours along the axes show all objects that a piece touches.
    """
    pieces = _components(labels == 0, labels.ndim if connectivity == 1 else 1)
    count = int(pieces.max(initial=0)) + 1
    first, last = np.full(count, np.iinfo(np.int32).max), np.zeros(count, np.int64)
    enclosed = np.ones(count, np.bool_)
    for axis in range(labels.ndim):
        piece, label = (np.moveaxis(array, axis, 0) for array in (pieces, labels))
        for end in (np.s_[:1], np.s_[-1:]):
            enclosed[piece[end]] = False
        for here, there in ((np.s_[:-1], np.s_[1:]), (np.s_[1:], np.s_[:-1])):
            touching = (piece[here] != 0) & (label[there] != 0)
            at, neighbour = piece[here][touching], label[there][touching]
            np.minimum.at(first, at, neighbour)
            np.maximum.at(last, at, neighbour)
    enclosed &= first == last
    if most is not None:
        enclosed &= np.bincount(pieces.ravel(), minlength=count) <= most
    enclosed[0] = False  # what is no background
    given = np.where(enclosed, last, 0).astype(np.int32)
    return labels + given[pieces]


def _grown(labels: NDArray[np.int32], reach: float, *, gaps: bool) -> NDArray[np.int32]:
    """Give background within reach of an object, or for gaps of two, to the nearest."""
    distances, ids = label_distances(torch.from_numpy(labels), dims=labels.ndim)
    near = distances[1 if gaps else 0] <= reach  # the second is the farther
    return np.where((labels == 0) & near.numpy(), ids[0].numpy(), labels)
