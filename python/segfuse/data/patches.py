"""Patches to learn from, cut out of labelled pictures at random."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["Patches", "Picture", "Symmetry"]

Symmetry: TypeAlias = Literal["d4", "mirror", "none"]

_VOID = 255
_DRAWS = 100


class Picture(NamedTuple):
    """An image ready for a network, and what is to be learnt from it.

    Attributes:
        image: (C, H, W), normalised.
        target: (H, W), class ids, 255 where a pixel does not count.
        name: for people.
        ids: (H, W), of instances, where these are learnt: 0 is the background, -1 does not count.
    """

    image: NDArray[np.float32]
    target: NDArray[np.uint8]
    name: str = ""
    ids: NDArray[np.int32] | None = None


class Patches(Dataset[tuple[Tensor, Tensor]]):
    """Endless patches at random places, turned, flipped and changed in brightness.

    A picture is drawn in proportion to its pixels, a place in it uniformly; the patch is turned by
    a multiple of 90 degrees, flipped or not, as `symmetry` says, its grey values multiplied by
    exp(gain z) and shifted by shift z', with z and z' standard normal and the same for all
    channels. Beyond its border, and
    where it is smaller than a patch, a picture is mirrored, with its target. Places that show void
    alone are drawn anew; after a hundred, the patch is laid around one of the pixels that count.

    Patch i is a function of (seed, i) alone, in whichever order or process the patches are drawn.

    Args:
        pictures: of one channel count, normalised to about 0 to 1. They are kept, not copied: all
            of them have to fit into memory.
        size: side of the target patch in pixels.
        margin: pixels a side by which the image patch reaches beyond the target patch.
        seed: a non-negative integer.
        gain: standard deviation of the logarithm of the factor on grey values.
        shift: standard deviation of what is added to grey values.
        wide: give labels of the image patch's size, for `augment.Deform`, which crops them.
        symmetry: in which poses scenes are likely: "d4" turned and flipped; "mirror" left and right
            exchanged, as of photographs; "none" as they are alone.

    Items:
        Patch i, for any i >= 0: image (C, size + 2 margin, size + 2 margin) float32, and labels
        (size, size), or of the image's size: class ids uint8 or, where pictures have them, ids of
        instances int32.

    Raises:
        ValueError: an argument out of its range, pictures whose shapes differ from the above, or
            none with a pixel that counts.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        *,
        size: int,
        margin: int = 0,
        seed: int = 0,
        gain: float = 0.2,
        shift: float = 0.1,
        wide: bool = False,
        symmetry: Symmetry = "d4",
    ) -> None:
        if symmetry not in {"d4", "mirror", "none"}:
            raise ValueError(f"Patches: symmetry: expected d4, mirror or none, got {symmetry!r}")
        for name, value, least in [
            ("size", size, 1),
            ("margin", margin, 0),
            ("seed", seed, 0),
            ("gain", gain, 0),
            ("shift", shift, 0),
        ]:
            if not value >= least:
                raise ValueError(f"Patches: {name}: expected at least {least}, got {value}")
        channels = {len(picture.image) for picture in pictures}
        for image, target, name, ids in pictures:
            if (ids is None) != (pictures[0].ids is None):
                raise ValueError("Patches: pictures: expected ids of instances in all, or in none")
            if (
                image.ndim != target.ndim + 1
                or image.shape[1:] != target.shape
                or len(channels) > 1
                or (ids is not None and ids.shape != target.shape)
            ):
                raise ValueError(
                    "Patches: pictures: expected images (C, H, W) of one C with targets (H, W), "
                    f"got {image.shape} with {target.shape} {name}"
                )
        # Pictures of void alone would be drawn in vain.
        self._pictures = [picture for picture in pictures if (picture.target != _VOID).any()]
        if not self._pictures:
            raise ValueError("Patches: pictures: expected one with a pixel that is not void")
        areas = np.cumsum([picture.target.size for picture in self._pictures])
        self._shares = areas / areas[-1]
        self.size = size
        self.margin = margin
        self.seed = seed
        self.gain = gain
        self.shift = shift
        self.symmetry = symmetry
        self._reach = margin if wide else 0  # of labels beyond the target patch

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index < 0:
            raise IndexError(index)
        random = np.random.default_rng((self.seed, index))
        for _ in range(_DRAWS):
            image, target, _, ids = self._pictures[
                np.searchsorted(self._shares, random.random(), "right")
            ]
            top, left = (self._start(random, length) for length in target.shape)
            if (_cut(target, top, left, self.size) != _VOID).any():
                break
        else:
            seen = random.choice(np.flatnonzero(target != _VOID))
            places = zip(np.unravel_index(seen, target.shape), target.shape, strict=True)
            top, left = (self._around(int(place), length) for place, length in places)
        wide, patch = (
            _cut(array, top - reach, left - reach, self.size + 2 * reach)
            for array, reach in [
                (image, self.margin),
                (target if ids is None else ids, self._reach),
            ]
        )
        turns, flip = int(random.integers(4)), random.integers(2)
        if self.symmetry == "d4":
            wide, patch = np.rot90(wide, turns, (1, 2)), np.rot90(patch, turns)
            if flip:
                wide, patch = wide[:, ::-1], patch[::-1]
        elif self.symmetry == "mirror" and flip:
            wide, patch = wide[..., ::-1], patch[:, ::-1]
        gain, shift = np.exp(random.normal(0, self.gain)), random.normal(0, self.shift)
        wide = wide * np.float32(gain) + np.float32(shift)
        return torch.from_numpy(np.ascontiguousarray(wide)), torch.from_numpy(patch.copy())

    def _start(self, random: np.random.Generator, length: int) -> int:
        """Draw where the patch begins on an axis of a picture: inside, or around the whole."""
        first, last = sorted((0, length - self.size))
        return int(random.integers(first, last + 1))

    def _around(self, place: int, length: int) -> int:
        """Where the patch begins that has `place` in its middle, or as near to it as can be."""
        return min(max(place - self.size // 2, 0), max(length - self.size, 0))


def _cut(array: NDArray[Any], top: int, left: int, side: int) -> NDArray[Any]:
    """Cut a square out of (..., H, W), mirrored beyond the border about the outermost pixels."""
    rows, columns = (
        _mirrored(start, side, length)
        for start, length in zip((top, left), array.shape[-2:], strict=True)
    )
    return array.take(rows, -2).take(columns, -1)


def _mirrored(start: int, count: int, length: int) -> NDArray[np.intp]:
    """Return the indices in 0 ... length - 1 that start ... start + count - 1 mirror."""
    period = max(2 * (length - 1), 1)
    index = np.arange(start, start + count) % period
    return np.minimum(index, period - index)
