"""How an image is cut into tiles, so that together they are the whole image's prediction.

A tile is the image with whole strides taken out: it starts on a multiple of the network's stride,
and its size is congruent to the image's.  Then all sizes inside the network shrink by the same
stretch of input, whatever is derived from sizes agrees, and the tile's output differs from the
whole image's only near ends that were really cut, over as many elements as `segfuse.geometry`
counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import product
from math import ceil, lcm, prod

from torch import nn

from ..geometry import Frame, GeometryError, input_frame, output_size
from ..geometry.axis import Axis
from ..geometry.glance import glance
from ..geometry.network import Geometry, check_same, stated, trace

__all__ = ["Cut", "Plan", "Resizes", "Traffic", "Wish", "blended", "exact"]

_DOUBLINGS = 5  # of the stride, where a network pads itself to more than its layers need
_CANDIDATES = 64  # tile sizes an axis among which the cheapest is sought
_TWO = 2  # axes that are turned


@dataclass(frozen=True)
class Cut:
    """One tile along one axis.

    Attributes:
        start: first pixel, before the image's first where context is mirrored in.
        first: first element of the network's output to keep.
        last: the one behind the last.
        to: pixel of the image on which `first` belongs.
    """

    start: int
    first: int
    last: int
    to: int


@dataclass(frozen=True)
class Resizes:
    """Sizes that interpolations need which must sample where the whole image did.

    Attributes:
        tile: geometry of a tile.
        whole: geometry of the image.
    """

    tile: Geometry
    whole: Geometry


@dataclass(frozen=True)
class Plan:
    """Tiles of one shape.

    Attributes:
        size: the image's, an axis.
        tile: the network's input, an axis.
        cuts: the tiles of each axis, in rising order; together they make a grid.
        peak: bytes of a tile's maps within the network; 0 where that is not known.
        wasted: share of the computed pixels that would not be computed on the whole image at once.
        resizes: of a tile, and of one turned by a right angle; None where tiles can be computed as
            they are.
        blend: "gaussian" or "hann" where tiles overlap and are averaged; "" for exact tiles.
        coarse: labels are made of the tiles' coarse scores, `segfuse.nn.CoarseScores`.
    """

    size: tuple[int, ...]
    tile: tuple[int, ...]
    cuts: tuple[tuple[Cut, ...], ...]
    peak: int = 0
    wasted: float = 0.0
    resizes: tuple[Resizes, ...] | None = None
    blend: str = ""
    coarse: bool = False

    @property
    def count(self) -> int:
        """Number of tiles."""
        return prod(map(len, self.cuts))

    def bands(self, done: int = 0) -> list[Cut]:
        """Cuts of the first axis that give the rows from `done` on."""
        if self.blend:
            return [c for c in self.cuts[0] if c.to + c.last > done]
        return [
            Cut(c.start, c.first + skip, c.last, c.to + skip)
            for c in self.cuts[0]
            if (skip := max(0, done - c.to)) < c.last - c.first
        ]


@dataclass(frozen=True)
class Traffic:
    """Bytes that prediction needs beside the network's maps.

    Attributes:
        workspace: what the maps' bytes are multiplied by, for the libraries' own memory.
        pixel: a pixel of a tile: what is gathered, and what comes out.
        row: a row of the image, of one pixel: bands that are read, computed and written.
    """

    workspace: float = 1.0
    pixel: int = 0
    row: int = 0

    def bytes(self, peak: int, lengths: Sequence[int]) -> int:
        """In all, for a tile whose maps have `peak` bytes; bands run along axis 0."""
        return ceil(peak * self.workspace) + self.pixel * prod(lengths) + self.row * lengths[0]


@dataclass(frozen=True)
class Wish:
    """What a plan is to keep to.

    Attributes:
        tile: least size of a tile, an axis, margins included; None: as memory allows.
        memory: bytes; None: as many as it takes.
        most: bytes that a network may take which looks everywhere, since no tile serves it.
        traffic: what is needed beside the network's maps.
        strict: refuse if not even the smallest tile fits into `memory`; else take that.
        turned: let the plan hold for tiles turned by right angles and mirrored, in the last two
            axes.
        margin: the user's word, as in `segfuse.geometry.of`.
        stride: with `margin`.
        method: of the model, whose maps are to fit; tiles are cut by all that the model does.
    """

    tile: Sequence[int] | None = None
    memory: int | None = None
    most: int = 0
    traffic: Traffic = field(default_factory=Traffic)
    strict: bool = True
    turned: bool = False
    margin: int | Sequence[int] | None = None
    stride: int | Sequence[int] = 1
    method: str = "__call__"


def exact(model: nn.Module, shape: Sequence[int], wish: Wish | None = None) -> Plan:
    """Cut an image so that tiles equal the whole image.

    Args:
        model: maps (N, C, *S) to scores of the image's resolution.
        shape: of the image, (1, C, *S).
        wish: by default the image at once.

    Raises:
        GeometryError: the network cannot be tiled exactly, and the image does not fit as a whole;
            or it gives no output of the image's resolution.
        ValueError: not even the smallest tile fits into the memory.
    """
    wish = wish or Wish()
    size = tuple(shape[2:])
    try:
        frames = input_frame(model, shape)
        opaque = False
    except GeometryError:  # shapes do not tell what the network does: it is taken as it is
        if wish.margin is None and (wish.tile is not None or wish.strict):
            raise
        frames = (Frame(0, 0, 0),) * len(size)
        opaque = wish.margin is None
    image = _Framed(model, shape[1], size, frames, wish)
    if wish.turned and any(frame != Frame(0, 0, 0) for frame in frames):
        _check_turned(image.look(image.total))
    if opaque or image.at_once:
        return image.whole()
    peak = image.peak(image.total)
    if peak and image.fits(peak):
        return image.whole(peak)
    try:
        whole = image.look(image.total)
    except GeometryError:
        if wish.tile is not None or wish.strict:
            raise
        return image.whole()
    peak = peak or whole.peak
    if image.fits(peak, wish.most if whole.everywhere else 0):
        return image.whole(peak)
    _check_tileable(whole)
    return image.tiled(whole, peak)


def _check_tileable(whole: Geometry) -> None:
    if whole.everywhere:
        listed = "; ".join(map(str, whole.everywhere[:3]))
        raise GeometryError(f"tiles cannot equal the whole image: {listed}")
    if any(a.scale != 1 for a in whole.output):
        raise GeometryError("the network's output has another resolution than the image")


@dataclass(frozen=True)
class _Framed:
    """An image with the context that its network needs."""

    model: nn.Module
    channels: int
    size: tuple[int, ...]
    frames: tuple[Frame, ...]
    wish: Wish

    @property
    def total(self) -> tuple[int, ...]:
        """Size with the context."""
        return tuple(n + f.before + f.after for n, f in zip(self.size, self.frames, strict=True))

    @property
    def at_once(self) -> bool:
        """Whether that is what was asked for."""
        tile = self.wish.tile
        if tile is None:
            return self.wish.memory is None
        return all(t >= n for t, n in zip(tile, self.total, strict=True))

    def look(self, lengths: Sequence[int]) -> Geometry:
        """The network's geometry on an input of this size."""
        shape = (1, self.channels, *lengths)
        if self.wish.margin is not None:
            return stated(self.model, shape, self.wish.margin, self.wish.stride)
        return trace(self.model, shape)

    def peak(self, lengths: Sequence[int]) -> int:
        """Bytes of the maps of an input of this size; 0 where shapes do not tell."""
        seen = glance(self.model, (1, self.channels, *lengths), self.wish.method)
        return seen.peak if seen else 0

    def fits(self, peak: int, most: int = 0) -> bool:
        """Whether the image can be computed at once, by maps of `peak` bytes."""
        if self.wish.tile is not None:
            return False
        need = self.wish.traffic.bytes(peak, self.total)
        return self.wish.memory is None or need <= max(self.wish.memory, most)

    def whole(self, peak: int = 0) -> Plan:
        """The image at once."""
        cuts = tuple(
            (Cut(-f.before, f.skip, f.skip + n, 0),)
            for n, f in zip(self.size, self.frames, strict=True)
        )
        return Plan(self.size, self.total, cuts, peak)

    def sides(self, lengths: tuple[int, ...]) -> list[tuple[int, ...]]:
        """A tile's, and those of one turned by a right angle."""
        return [lengths, _swapped(lengths)] if self.wish.turned else [lengths]

    def tiled(self, whole: Geometry, peak: int) -> Plan:
        """Choose tiles that do what the whole does: on its grid, or on a coarser one.

        `peak`: bytes of the maps of the whole.

        A network may pad itself to a larger multiple than its layers need.
        """
        views = [self.look(n) for n in self.sides(self.total)]
        if self.wish.turned and views[1].output_size != _swapped(whole.output_size):
            raise GeometryError("the network treats a turned image in another way")
        rims = [_rim(views, k, turned=self.wish.turned) for k in range(len(self.size))]
        lost = tuple(
            n - a.size + sum(rim) for n, a, rim in zip(self.total, whole.output, rims, strict=True)
        )
        problems: list[GeometryError] = []
        for doubling in range(_DOUBLINGS):
            steps = _merged([v.stride for v in views], 2**doubling, turned=self.wish.turned)
            lengths = self._chosen(list(zip(self.total, steps, lost, strict=True)), peak)
            try:
                for sides, view in zip(self.sides(lengths), views, strict=True):
                    check_same(self.look(sides), view)
            except GeometryError as error:
                problems.append(error)
                continue
            lengths = self._sound(lengths, steps)
            axes = list(zip(self.total, steps, lost, strict=True))
            return self._plan(lengths, axes, rims, views)
        raise problems[0]

    def _chosen(self, axes: Sequence[tuple[int, int, int]], peak: int) -> tuple[int, ...]:
        """Tile size: what was asked for, or the one with the least to compute that fits."""
        wish = self.wish
        if wish.tile is not None:
            return tuple(_allowed(t, *axis) for t, axis in zip(wish.tile, axes, strict=True))
        best: tuple[int, ...] | None = None
        smallest, least, cost = self.total, float("inf"), float("inf")
        per_pixel = Fraction(peak, prod(self.total))
        for lengths in product(*(_candidates(*axis) for axis in axes)):
            need = wish.traffic.bytes(int(per_pixel * prod(lengths)), lengths)
            if need < least:
                smallest, least = lengths, need
            work = prod(n * _count(n, *axis) for n, axis in zip(lengths, axes, strict=True))
            if need <= (wish.memory or need) and work < cost:
                best, cost = lengths, work
        if best is None and wish.strict:
            raise ValueError(
                f"predict: memory: expected at least {ceil(least / 2**20)} MiB, for the smallest "
                f"tile, got {(wish.memory or 0) // 2**20} MiB"
            )
        return best or smallest

    def _sound(self, lengths: tuple[int, ...], steps: Sequence[int]) -> tuple[int, ...]:
        """Lengthen a tile until its border paddings repeat nothing contaminated.

        Axes that are not cut have nothing contaminated.
        """
        while any(
            have < need and sides[k] < total[k]
            for sides, total in zip(self.sides(lengths), self.sides(self.total), strict=True)
            for k, have, need in self.look(sides).sound
        ):
            axes = zip(self.total, lengths, steps, strict=True)
            lengths = tuple(min(n, t + s) for n, t, s in axes)
        return lengths

    def _plan(
        self,
        lengths: tuple[int, ...],
        axes: Sequence[tuple[int, int, int]],
        rims: Sequence[tuple[int, int]],
        views: Sequence[Geometry],
    ) -> Plan:
        parts = [self.look(sides) for sides in self.sides(lengths)]
        cuts = tuple(
            _cuts(n, length, axis, rim, out.size - axis[0] + length, frame)
            for n, length, axis, rim, out, frame in zip(
                self.size, lengths, axes, rims, views[0].output, self.frames, strict=True
            )
        )
        computed = prod(len(c) * length for c, length in zip(cuts, lengths, strict=True))
        return Plan(
            self.size,
            lengths,
            cuts,
            self.peak(lengths) or parts[0].peak,
            max(0.0, 1 - prod(self.total) / computed),
            tuple(map(Resizes, parts, views)) if parts[0].resizes else None,
        )


def blended(
    model: nn.Module,
    shape: Sequence[int],
    tile: Sequence[int],
    overlap: Sequence[int],
    window: str = "gaussian",
) -> Plan:
    """Cut an image into tiles that overlap and are averaged: a guess where exact tiles are not.

    Args:
        model: gives scores of the tile's size.
        shape: of the image, (1, C, *S).
        tile: size, an axis; an image smaller than that is continued by mirroring.
        overlap: pixels, an axis, below `tile`.
        window: "gaussian" or "hann".

    Raises:
        GeometryError: the network does not run at this size, or its output is smaller or larger.
    """
    size, tile = tuple(shape[2:]), tuple(tile)
    cuts: list[tuple[Cut, ...]] = []
    out = output_size(model, (1, shape[1], *tile))
    if out != tile:
        raise GeometryError(
            f"blending needs scores of the tile's size {tile}, got {out or 'an error'}: take "
            "another tile"
        )
    for n, length, shared in zip(size, tile, overlap, strict=True):
        if n <= length:
            cuts.append((Cut(0, 0, n, 0),))
            continue
        count = ceil((n - length) / (length - shared)) + 1
        starts = [i * (length - shared) for i in range(count - 1)] + [n - length]
        cuts.append(tuple(Cut(s, 0, length, s) for s in starts))
    computed = prod(len(c) * length for c, length in zip(cuts, tile, strict=True))
    wasted = max(0.0, 1 - prod(size) / computed)
    return Plan(size, tile, tuple(cuts), wasted=wasted, blend=window)


def _check_turned(whole: Geometry) -> None:
    """Refuse turned copies of an image with context whose outputs would not lie on each other."""
    for n, a in zip(whole.input_size[-2:], whole.output[-2:], strict=True):
        if 2 * a.shift != n - a.size:
            raise GeometryError(
                "turned copies do not lie on each other at this size: the output reaches from "
                f"{a.shift} to {a.shift + a.size} of {n} pixels"
            )


def _swapped(lengths: Sequence[int]) -> tuple[int, ...]:
    return (*lengths[:-2], lengths[-1], lengths[-2])


def _merged(strides: Sequence[Sequence[int]], times: int, *, turned: bool) -> tuple[int, ...]:
    steps = [lcm(*each) * times for each in zip(*strides, strict=True)]
    if turned:
        steps[-2:] = [lcm(*steps[-2:])] * _TWO
    return tuple(steps)


def _rim(views: Sequence[Geometry], axis: int, *, turned: bool) -> tuple[int, int]:
    """Contaminated elements at the low and the high end of an axis, in every view of it."""
    if not turned:
        a = views[0].output[axis]
        return a.bad_lo, a.bad_hi
    axes: list[Axis] = []
    for view in views:
        axes += view.output[-2:] if axis >= len(view.output) - 2 else [view.output[axis]]
    most = max(max(a.bad_lo, a.bad_hi) for a in axes)
    return most, most


def _step(length: int, step: int, lost: int) -> int:
    """From one tile to the next: whole strides, of what a tile gives that is cut at both ends."""
    return (length - lost) // step * step


def _count(length: int, total: int, step: int, lost: int) -> int:
    """Tiles of this length that cover an axis."""
    return 1 if length >= total else 1 + ceil((total - length) / _step(length, step, lost))


def _allowed(tile: int, total: int, step: int, lost: int) -> int:
    """The least length from `tile` on that is congruent and leaves a stride; at most the whole."""
    least = max(tile, lost + step)
    return min(total, least + (total - least) % step)


def _candidates(total: int, step: int, lost: int) -> list[int]:
    """For each number of tiles the least length; of many, those that span the range evenly."""
    found = [total]
    length = _allowed(1, total, step, lost)
    lengths = []
    while length < total:
        lengths.append(length)
        length += step
    count = 0
    for length in reversed(lengths):  # the last, so smallest, of each count stays
        if _count(length, total, step, lost) == count:
            found[-1] = length
        else:
            count = _count(length, total, step, lost)
            found.append(length)
    if len(found) > _CANDIDATES:
        thin = len(found) / _CANDIDATES
        found = [*(found[int(i * thin)] for i in range(_CANDIDATES)), found[-1]]
    return found


def _cuts(  # noqa: PLR0917
    size: int,
    length: int,
    axis: tuple[int, int, int],
    rim: tuple[int, int],
    out: int,
    frame: Frame,
) -> tuple[Cut, ...]:
    """Tiles of one axis; `axis`: its total, step and loss; `out`: elements that come out of one."""
    total, step, lost = axis
    starts = [0]
    if length < total:
        starts = [*range(0, total - length, _step(length, step, lost)), total - length]
    cuts = []
    done = 0  # pixels of the image that have been given
    for start in starts:
        begin = start + (rim[0] if start else 0)  # kept outputs, counted in the whole output
        end = start + out - (rim[1] if start + length < total else 0)
        begin, end = max(begin, frame.skip + done), min(end, frame.skip + size)
        if begin < end:
            cuts.append(Cut(start - frame.before, begin - start, end - start, begin - frame.skip))
            done = end - frame.skip
    return tuple(cuts)
