"""At which sizes a network runs, and how an image is continued to one of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import floor

from torch import nn

from .findings import GeometryError
from .glance import checked_shape, output_size
from .network import Geometry, trace

_SPREAD = (*range(257), 512, 1024)  # pixels by which sizes are enlarged to find a valid one

__all__ = ["Frame", "input_frame", "valid_sizes"]


def valid_sizes(
    model: nn.Module, shape: Sequence[int], axis: int, sizes: Iterable[int]
) -> tuple[list[int], list[int]]:
    """Find the sizes that a network takes along one axis.

    A centre-cropping U-Net runs at every size, but at a wrong residue its skips lie a part of a
    pixel beside the maps that they are joined with.

    Args:
        model: as in `of`.
        shape: (N, C, *S), valid on the other axes.
        axis: which spatial axis, from 0.
        sizes: candidates.

    Returns:
        The sizes at which it runs, and those of them at which every join is aligned, or as nearly
        as at any of them: some networks' never are.
    """
    at = 2 + axis
    shape = checked_shape(shape)
    trials = [(*shape[:at], n, *shape[at + 1 :]) for n in sizes]
    runs = [t for t in trials if output_size(model, t)]
    skews = [_skew(trace(model, t)) for t in runs]
    aligned = [t[at] for t, skew in zip(runs, skews, strict=True) if skew == min(skews)]
    return [t[at] for t in runs], aligned


@dataclass(frozen=True)
class Frame:
    """How an image is continued along one axis, so that the network runs and covers it.

    Attributes:
        before: pixels to add in front.
        after: pixels to add behind.
        skip: output elements before the one that belongs to the image's first pixel.
    """

    before: int
    after: int
    skip: int


def input_frame(
    model: nn.Module, shape: Sequence[int], *, symmetric: bool = False
) -> tuple[Frame, ...]:
    """Find the context that an image needs, an axis.

    An image at which the network runs and gives its own size is taken as it is.  Else it gets as
    many pixels in front as the network eats there, and behind as many as lead to the next size at
    which the network runs, is aligned as well as it can be, and covers the image.

    Args:
        model: as in `of`.
        shape: of the image, (N, C, *S).
        symmetric: have at least as much context at either end as at the other (for turned copies).

    Raises:
        GeometryError: there is no such size near, or the output has another resolution.
    """
    shape = checked_shape(shape)
    out = output_size(model, shape)
    if out == shape[2:]:
        return tuple(Frame(0, 0, 0) for _ in out)
    base = trace(model, _valid_near(model, shape))
    coarse = next((a.scale for a in base.output if a.scale != 1), None)
    if coarse is not None:
        raise GeometryError(
            f"the output has one element for {coarse} pixels: expected the image's resolution"
        )
    return tuple(_frame(model, base, k, n, symmetric=symmetric) for k, n in enumerate(shape[2:]))


def _frame(model: nn.Module, base: Geometry, k: int, n: int, *, symmetric: bool) -> Frame:
    """The frame of one axis of n pixels; `base` is valid on the others."""
    at, step = 2 + k, base.stride[k]
    eaten = base.input_size[k] - base.output[k].size  # both ends together; other sizes may differ
    least = n + max(0, eaten - step)
    most = n + 2 * max(0, eaten) + 3 * step
    trials = [(*base.shape[:at], size, *base.shape[at + 1 :]) for size in range(least, most)]
    for trial in trials:
        out = output_size(model, trial)
        if not out or out[k] < n:
            continue
        found = trace(model, trial)
        total, axis = trial[at], found.output[k]
        shift, lost = floor(axis.shift), max(0, total - axis.size)
        before = max(0, shift) if lost else 0
        after = lost - before
        if symmetric:
            before = after = max(before, after)
        skip = before - shift
        fits = total >= before + n + after and 0 <= skip <= axis.size - n
        if fits and _skew(found) <= _skew(base):
            return Frame(before, total - n - before, skip)
    raise GeometryError(f"the network covers {n} pixels at no size from {least} to {most - 1}")


def _valid_near(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape, not smaller, at which the network runs and is aligned as well as can be.

    All axes are equal, since nearly all networks take squares.
    """
    rank, least = len(shape) - 2, max(shape[2:])
    trials = [(*shape[:2], *(least + more,) * rank) for more in _SPREAD]
    found: list[Geometry] = []
    for trial in trials:
        if found and trial[2] >= found[0].shape[2] + max(found[0].stride):
            break  # every residue was seen
        if output_size(model, trial):
            found.append(trace(model, trial))
            if not found[-1].misaligned:
                break
    if not found:
        raise GeometryError(
            f"the network runs at no size from {least} to {least + _SPREAD[-1]} an axis"
        )
    return min(found, key=_skew).shape


def _skew(found: Geometry) -> Fraction:
    """Pixels, all joins together, by which maps lie beside those that they are joined with."""
    return sum((abs(by) for _, by in found.misaligned), Fraction(0))
