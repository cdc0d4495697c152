"""The algebra of one axis: where the elements of a tensor come from, in exact fractions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil

__all__ = ["Axis"]

_HALF = Fraction(1, 2)


@dataclass(frozen=True)
class Axis:
    """One axis of one tensor, seen from the axis of the input that it runs along.

    Element ``i`` is centred on the input coordinate ``scale * i + shift`` and depends on no input
    outside ``[scale * i + lo, scale * i + hi]``.  Pixel ``p`` of the input is centred on ``p``.

    Where the input is a tile cut out of an image, elements near a cut end differ from the whole
    image's, since they saw padding in place of pixels.  They are the first `bad_lo` and the last
    `bad_hi` elements.  This is a count of its own, and not half the receptive field: padding that a
    stride skips, or that a crop takes off again, harms nothing.

    Attributes:
        axis: the input's spatial axis, from 0.
        size: number of elements.
        scale: input pixels from one element to the next.
        shift: input coordinate of element 0.
        lo: first input coordinate that element 0 may depend on.
        hi: last one.
        bad_lo: contaminated elements at the low end, if a tile is cut there.
        bad_hi: the same at the high end.
    """

    axis: int
    size: int
    scale: Fraction = Fraction(1)
    shift: Fraction = Fraction(0)
    lo: Fraction = Fraction(0)
    hi: Fraction = Fraction(0)
    bad_lo: int = 0
    bad_hi: int = 0

    @property
    def reach(self) -> Fraction:
        """Input pixels that one element may depend on: its receptive field."""
        return self.hi - self.lo + 1

    def position(self, element: Fraction | int) -> Fraction:
        """Input coordinate on which an element is centred."""
        return self.scale * element + self.shift

    def offset(self, other: Axis) -> Fraction:
        """Elements before the one that lies where another axis begins: what aligning it crops."""
        return (other.shift - self.shift) / self.scale

    def window(
        self, size: int, kernel: int, stride: int = 1, dilation: int = 1, padding: int = 0
    ) -> Axis:
        """Convolution or pooling.

        Element ``i`` reads elements ``stride i - padding + dilation (0 ... kernel - 1)``.
        """
        span = dilation * (kernel - 1)
        first_bad = ceil(Fraction(self.size - self.bad_hi + padding - span, stride))
        return replace(
            self,
            size=size,
            scale=self.scale * stride,
            shift=self.shift + self.scale * (Fraction(span, 2) - padding),
            lo=self.lo - self.scale * padding,
            hi=self.hi + self.scale * (span - padding),
            bad_lo=min(size, max(0, ceil(Fraction(self.bad_lo + padding, stride)))),
            bad_hi=min(size, max(0, size - first_bad)),
        )

    def scatter(
        self, size: int, kernel: int, stride: int = 1, dilation: int = 1, padding: int = 0
    ) -> Axis:
        """Transposed convolution.

        Element ``i`` adds to elements ``stride i - padding + dilation (0 ... kernel - 1)``.
        """
        span = dilation * (kernel - 1)
        first_bad = stride * (self.size - self.bad_hi) - padding
        return replace(
            self,
            size=size,
            scale=self.scale / stride,
            shift=self.shift + self.scale * (padding - Fraction(span, 2)) / stride,
            lo=self.lo + self.scale * Fraction(padding - span, stride),
            hi=self.hi + self.scale * Fraction(padding, stride),
            bad_lo=min(size, max(0, stride * (self.bad_lo - 1) - padding + span + 1)),
            bad_hi=min(size, max(0, size - first_bad)),
        )

    def interpolate(
        self, size: int, factor: Fraction, reach: int, drift: Fraction = Fraction(0)
    ) -> Axis:
        """Interpolation.

        Element ``i`` reads `reach` elements either side of position ``(i + 1/2) / factor - 1/2``.
        Where positions depend on the size of the whole axis, they are up to `drift` elements away
        from there.
        """
        # Element i is sound if for the position u that it samples
        # floor(u) - reach + 1 >= bad_lo and floor(u) + reach <= size - 1 - bad_hi.
        first = factor * (self.bad_lo + reach - _HALF + drift) - _HALF
        first_bad = factor * (self.size - self.bad_hi - reach + _HALF - drift) - _HALF
        centre = self.scale * (_HALF / factor - _HALF)
        wide = self.scale * (reach + drift - _HALF / factor.numerator)
        return replace(
            self,
            size=size,
            scale=self.scale / factor,
            shift=self.shift + centre,
            lo=self.lo + centre - wide,
            hi=self.hi + centre + wide,
            bad_lo=min(size, max(0, ceil(first))),
            bad_hi=min(size, max(0, size - ceil(first_bad))),
        )

    def padded(self, before: int, after: int) -> Axis:
        """Elements added at both ends; negative numbers crop."""
        size = self.size + before + after
        return replace(
            self,
            size=size,
            shift=self.shift - self.scale * before,
            lo=self.lo - self.scale * before,
            hi=self.hi - self.scale * before,
            bad_lo=min(size, max(0, self.bad_lo + before)),
            bad_hi=min(size, max(0, self.bad_hi + after)),
        )

    def joined(self, other: Axis) -> Axis:
        """Element by element with an axis of the same size and scale."""
        return replace(
            self,
            lo=min(self.lo, other.lo),
            hi=max(self.hi, other.hi),
            bad_lo=max(self.bad_lo, other.bad_lo),
            bad_hi=max(self.bad_hi, other.bad_hi),
        )
