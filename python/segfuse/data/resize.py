"""Images and labels brought to another size before they are learnt from or predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn import functional as F

__all__ = ["Resize"]

_LARGEST = 2**15  # pixels a side, and factor


@dataclass(frozen=True)
class Resize:
    """The size that a network sees of images of another.

    Attributes:
        factor: on both sides; or
        size: rows and columns of every image, whatever it had.

    Raises:
        ValueError: not one of the two, or one that is out of its range.
    """

    factor: float | None = None
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if (self.factor is None) == (self.size is None):
            raise ValueError("resize: expected a factor, or rows and columns")
        if self.factor is not None and not 1 / _LARGEST <= self.factor <= _LARGEST:
            raise ValueError(f"resize: expected a factor above 0, got {self.factor}")
        if self.size is not None and not (
            len(self.size) == 2  # noqa: PLR2004
            and all(isinstance(n, int) and 1 <= n <= _LARGEST for n in self.size)
        ):
            raise ValueError(f"resize: expected rows and columns from 1 on, got {self.size}")

    @classmethod
    def of(cls, value: Any) -> Resize | None:
        """Make it of a factor or of (rows, columns), as `plain` gives them; None of None."""
        if value is None:
            return None
        if isinstance(value, (int, float)):
            return cls(factor=float(value))
        return cls(size=tuple(value))

    def plain(self) -> float | list[int]:
        """Undo `of`, for TOML."""
        return self.factor if self.factor is not None else list(self.size or ())

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns that become of an image's."""
        if self.size is not None:
            return self.size
        factor = self.factor or 1.0
        return max(1, round(height * factor)), max(1, round(width * factor))

    def image(self, image: NDArray[Any]) -> NDArray[Any]:
        """Resize an image (C, H, W): bilinear, and averaged over where it is made smaller.

        Returns:
            (C, h, w) of its dtype, which is uint8, uint16 or float32; integers are rounded.
        """
        rows, columns = self.target(*image.shape[1:])
        channels = [
            np.asarray(
                Image.fromarray(channel.astype(np.float32)).resize(
                    (columns, rows), Image.Resampling.BILINEAR
                )
            )
            for channel in image
        ]
        resized = np.stack(channels)
        return (np.rint(resized) if image.dtype.kind in "bui" else resized).astype(image.dtype)

    def labels(self, labels: NDArray[Any]) -> NDArray[Any]:
        """Resize labels (..., H, W): of each new pixel the nearest, so that ids stay ids."""
        return nearest(labels, self.target(*labels.shape[-2:]))

    def rows(self, rows: slice, height: int, width: int) -> slice:
        """Rows of the resized image that a block of an image's rows becomes."""
        factor = self.target(height, width)[0] / height
        ends = (end if end is None else round(end * factor) for end in (rows.start, rows.stop))
        return slice(*ends)


def nearest(labels: NDArray[Any], size: tuple[int, ...]) -> NDArray[Any]:
    """Take the pixel of (..., H, W) in which the middle of each of (..., *size) lies."""
    rows, columns = (
        ((2 * np.arange(new) + 1) * old // (2 * new))
        for new, old in zip(size, labels.shape[-2:], strict=True)
    )
    taken: NDArray[Any] = labels.take(rows, -2).take(columns, -1)
    return taken


def restored(values: NDArray[Any], size: tuple[int, ...], *, scores: bool) -> NDArray[Any]:
    """Bring results back to the image's size: class ids (..., H, W), or scores (..., K, H, W).

    Returns:
        ids of the nearest pixel; scores interpolated bilinearly.
    """
    if not scores:
        return nearest(values, size)
    flat = torch.from_numpy(np.ascontiguousarray(values)).reshape(-1, *values.shape[-3:])
    large = F.interpolate(flat, size, mode="bilinear", align_corners=False)
    return np.asarray(large.reshape(*values.shape[:-2], *size).numpy())
