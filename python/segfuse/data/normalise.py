"""Grey values brought to the range that networks like."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from math import gcd
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

__all__ = ["Normalisation", "thinned"]

Method = Literal["percentile", "meanstd", "none"]
Scope = Literal["image", "set"]
SAMPLE = 2**16  # pixels of an image and channel that stand for it in a set
_HIGHEST = {"uint8": 255.0, "uint16": 65535.0}


@dataclass(frozen=True)
class Normalisation:
    """(image - offset) / scale, channel by channel.

    Attributes:
        method: "percentile" takes the percentiles `low` and `high` to 0 and 1 and clips nothing;
            "meanstd" takes the mean to 0 and the standard deviation to 1; "none" divides uint8 by
            255 and uint16 by 65535, and leaves all other numbers as they are, which files give as
            float32.
        low: percentile, 0 to 100.
        high: percentile, above `low`, to 100.
        scope: "image": of each image on its own; "set": of all images given to `fit`.
        offset: a channel, for scope "set" after `fit`.
        scale: a channel, likewise.

    An image or channel of one value becomes 0. Where the percentiles coincide though the values
    differ, the extremes take their place.

    Raises:
        ValueError: attributes out of their ranges.
    """

    method: Method = "percentile"
    low: float = 1.0
    high: float = 99.8
    scope: Scope = "image"
    offset: tuple[float, ...] | None = None
    scale: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name, value, expected, good in [
            ("method", self.method, get_args(Method), self.method in get_args(Method)),
            ("scope", self.scope, get_args(Scope), self.scope in get_args(Scope)),
            ("low", self.low, f"0 to below {self.high}", 0 <= self.low < self.high),
            ("high", self.high, "at most 100", self.high <= 100),  # noqa: PLR2004
            (
                "scale",
                self.scale,
                f"one for each of {self.offset}, above 0",
                len(self.scale or ()) == len(self.offset or ()) and min(self.scale or (1,)) > 0,
            ),
        ]:
            if not good:
                raise ValueError(f"{name}: expected {expected}, got {value!r}")

    def fit(self, images: Iterable[NDArray[Any]]) -> Normalisation:
        """Find offset and scale of a set; with scope "image", or method "none", nothing is to find.

        Args:
            images: (C, H, W) each, of one C; of large ones every n-th pixel is taken, such that
                each gives at most 65,536.

        Raises:
            ValueError: no images, or channels that differ in number.
        """
        if self.scope == "image" or self.method == "none":
            return self
        sample = [thinned(image) for image in images]
        if len({len(pixels) for pixels in sample}) != 1:
            raise ValueError("images: expected one at least, all with the same number of channels")
        offset, scale = self._found(np.concatenate(sample, axis=1))
        return replace(self, offset=tuple(offset.tolist()), scale=tuple(scale.tolist()))

    def __call__(self, image: NDArray[Any]) -> NDArray[np.float32]:
        """Normalise an image (C, H, W).

        Returns:
            (C, H, W), float32, an array of its own.

        Raises:
            ValueError: scope "set" before `fit`, another number of channels, or values whose span
                float32 does not hold.
        """
        offset, scale = self.terms(image.reshape(len(image), -1))
        result = image.astype(np.float32)
        result -= offset[:, None, None].astype(np.float32)
        result /= scale[:, None, None].astype(np.float32)
        return result

    def terms(self, pixels: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Offset and scale, a channel, of an image that is known by its pixels, or by some of them.

        Args:
            pixels: (C, n), of the image's dtype.

        Raises:
            ValueError: as in `__call__`.
        """
        if self.method == "none":
            highest = _HIGHEST.get(pixels.dtype.name, 1.0)
            return np.zeros(len(pixels)), np.full(len(pixels), highest)
        if self.scope == "image":
            return self._found(pixels)
        if self.offset is None or self.scale is None:
            raise ValueError("normalisation over a set: fit it first")
        offset, scale = np.array(self.offset), np.array(self.scale)
        if len(offset) != len(pixels):
            raise ValueError(f"image: expected {len(offset)} channels, got {len(pixels)}")
        return offset, scale

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for TOML; what is None is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Normalisation:
        """Undo `to_dict`.

        Raises:
            ValueError: values of unknown names or out of their ranges.
        """
        known = {field.name for field in fields(cls)}
        if not values.keys() <= known:
            raise ValueError(f"expected of {sorted(known)}, got {list(values)}")
        lists: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**lists)

    def _found(self, pixels: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Offset and scale of pixels (C, n)."""
        least = pixels.min(axis=1).astype(np.float64)
        most = pixels.max(axis=1).astype(np.float64)
        if (most - least > np.finfo(np.float32).max).any():
            raise ValueError(
                f"image: expected values whose span float32 holds, got {least.min():g} to "
                f"{most.max():g}"
            )
        if self.method == "percentile":
            low, high = np.percentile(pixels, [self.low, self.high], axis=1).astype(np.float64)
            close = high <= low
            offset = np.where(close, least, low)
            scale = np.where(close, most, high) - offset
        else:
            offset = pixels.mean(axis=1, dtype=np.float64)
            scale = pixels.std(axis=1, dtype=np.float64)
        flat = most <= least
        return np.where(flat, least, offset), np.where(flat, 1.0, scale)


def thinned(image: NDArray[Any]) -> NDArray[Any]:
    """Every n-th pixel (C, at most SAMPLE), of all columns alike."""
    pixels = image.reshape(len(image), -1)
    step = -(-pixels.shape[1] // SAMPLE)
    while gcd(step, image.shape[-1]) > 1:
        step += 1
    return pixels[:, ::step]
