"""What is known of a network after its graph was read."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch

from .axis import Axis

__all__ = ["Feature", "Finding", "GeometryError", "Resize", "Trace"]


class GeometryError(ValueError):
    """Where a network's output comes from cannot be derived."""


@dataclass(frozen=True)
class Finding:
    """A layer, and what is to be said of it."""

    layer: str
    operation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.layer} ({self.operation}): {self.reason}"


@dataclass(frozen=True)
class Feature:
    """A tensor inside the network: what made it, and its spatial axes.

    Attributes:
        layer: as in ``named_modules()``.
        operation: torch's name of it.
        shape: of the tensor.
        axes: its spatial ones.
        dtype: of the tensor.
        parameters: numbers that this operation is the first to use.
        multiply_adds: that it takes for one image, see `cost`.
        depth: convolutions on the longest way from the input to here, this one included.
    """

    layer: str
    operation: str
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    dtype: torch.dtype
    parameters: int = 0
    multiply_adds: int = 0
    depth: int = 0


@dataclass(frozen=True)
class Resize:
    """An interpolation that a tile must sample at positions of the whole image.

    Either these positions depend on the size of the whole map, or torch's float32 rounds them
    differently at other places.  The axes count with positions of the whole: a margin derived
    from them holds for a tile that samples so.

    Attributes:
        layer: where it stands.
        number: which of the network's interpolations it is, from 0, all of them counted.
        before: axes of the map that it reads.
        after: of the one that it makes.
    """

    layer: str
    number: int
    before: tuple[Axis, ...]
    after: tuple[Axis, ...]


@dataclass
class Trace:
    """What a walk through a graph found.

    Attributes:
        features: every tensor with spatial axes, in the order in which they are computed.
        outputs: those that the network returns.
        everywhere: layers that look at the whole image, or at where in it they are, and that the
            first output needs.
        misaligned: joins of tensors whose elements lie at different places, with the distance.
        rules: every operation (layer, name, ...) without its sizes: equal at two sizes if the
            network does the same at both.
        sound: (axis of the input, elements, of which needed) for paddings that repeat what a tile
            must have, if it is cut along that axis.
        resizes: interpolations that must sample at positions of the whole image.
        interpolations: how many there were so far.
        parameters: numbers that all operations use, on maps or not.
        multiply_adds: of all operations.
        depth: convolutions on the longest way through the network.
    """

    features: list[Feature] = field(default_factory=list)
    outputs: list[Feature] = field(default_factory=list)
    everywhere: list[Finding] = field(default_factory=list)
    misaligned: list[tuple[Finding, Fraction]] = field(default_factory=list)
    rules: list[tuple[Any, ...]] = field(default_factory=list)
    sound: list[tuple[int, int, int]] = field(default_factory=list)
    resizes: list[Resize] = field(default_factory=list)
    interpolations: int = 0
    parameters: int = 0
    multiply_adds: int = 0
    depth: int = 0
