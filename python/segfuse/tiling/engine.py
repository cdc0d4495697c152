"""Tiles through a network, a band of the image at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import ops
from ..devices import autocast, channels_last
from ..geometry.glance import evaluating, first_tensor
from ..ops._checks import label_dtype
from ..ops._upsampling import as_pair
from .absolute import AbsolutePositions
from .plan import Cut, Plan

__all__ = ["Engine", "Sink", "TooLarge", "empty", "rows_needed"]

_RIGHT_ANGLES = 4
_LAST_TWO = (-2, -1)
_SIGMA = 1 / 8  # of a tile's size, as nnU-Net's and MONAI's Gaussian


Layout = Callable[[Tensor], Tensor]


class Sink(Protocol):
    """Where bands of results go, in order of their rows."""

    def room(self, start: int, stop: int) -> Tensor | None:
        """Memory in which rows can be written in place, (rows, *) or (K, rows, *); else None."""

    def write(self, start: int, band: NDArray[Any]) -> None:
        """Take rows; called by one thread, not the one that computes."""


class Reader(Protocol):
    """An image (C, *S), of which rows are read."""

    shape: tuple[int, ...]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows (C, stop - start, *S[1:])."""


class TooLarge(Exception):  # noqa: N818 - no error of the user's: a smaller plan follows
    """One tile alone does not fit into the device's memory; `done` rows have been written."""

    def __init__(self, done: int) -> None:
        super().__init__(done)
        self.done = done


@dataclass(frozen=True)
class Engine:
    """A network and how it is to be run.

    Attributes:
        model: maps (N, C, *S) to scores.
        device: where.
        dtype: of what it is given.
        precision: as in `segfuse.devices.autocast`.
        output: "labels", "probabilities" or "scores".
        border: how the image is continued.
        turned: average the softmax (of scores, the scores) over the eight turned and mirrored
            copies of each tile.
        batch: tiles that are computed together.
        scale: with `shift`, what the image is multiplied by, a channel.
        shift: added then.
        say: takes a sentence for the user.
        advance: takes pixels that were done.
    """

    model: nn.Module
    device: torch.device
    dtype: torch.dtype
    precision: str = "32"
    output: str = "labels"
    border: Any = "mirror"
    turned: bool = False
    batch: int = 1
    scale: tuple[float, ...] | None = None
    shift: tuple[float, ...] | None = None
    say: Callable[[str], None] = lambda _: None
    advance: Callable[[int], None] = lambda _: None

    def run(self, plan: Plan, reader: Reader, sink: Sink, done: int = 0) -> None:
        """Predict an image from row `done` on.

        While one band is computed, the next is read and the last is written.

        Raises:
            TooLarge: the device's memory does not hold one tile.
            ValueError: the network's output has another size than the plan expects.
        """
        bands = plan.bands(done)
        if not bands:
            return
        with (
            ThreadPoolExecutor(1) as readers,
            ThreadPoolExecutor(1) as writers,
            evaluating(self.model),
            torch.inference_mode(),
        ):
            coming = readers.submit(self._read, reader, plan, bands[0])
            going: Future[None] | None = None
            computed = _blended if plan.blend else _exact
            state: dict[str, Any] = {"done": done}
            for band, following in zip(bands, [*bands[1:], None], strict=True):
                rows, first = coming.result()
                if following is not None:
                    coming = readers.submit(self._read, reader, plan, following)
                try:
                    ready = computed(self, _Band(plan, band, self._image(rows), first, sink, state))
                except TooLarge:
                    if going is not None:
                        going.result()
                    raise TooLarge(band.to) from None
                if going is not None:
                    going.result()  # a full disk stops the work here
                    going = None
                if ready is not None:
                    start, result = ready
                    going = writers.submit(sink.write, start, result.cpu().numpy())
            if going is not None:
                going.result()

    def _read(self, reader: Reader, plan: Plan, band: Cut) -> tuple[NDArray[Any], int]:
        """The rows (C, rows, *) that a band of tiles reads, and which the first is."""
        first, stop = rows_needed(band.start, plan.tile[0], plan.size[0], self.border)
        return reader.read(first, stop), first

    def _image(self, rows: NDArray[Any]) -> Tensor:
        if not rows.flags.writeable or any(stride < 0 for stride in rows.strides):
            rows = rows.copy()  # torch takes neither
        return torch.from_numpy(rows).to(self.device)

    def tiles(
        self,
        plan: Plan,
        image: Tensor,
        corners: Sequence[Sequence[int]],
        starts: Sequence[Any],
        kept: dict[str, Any],
    ) -> Tensor:
        """Compute the maps (T, K, *out) of tiles whose corners lie at `corners` of a band.

        The network is given copies, since it may write into them, in memory that is kept for the
        next tiles unless it returns that; channels last, unless it fails so, such as by a view that
        maps in that layout do not have.
        """
        buffer: Tensor | None = kept.pop("input", None)
        x = ops.gather_tiles(
            image,
            torch.tensor(corners, dtype=torch.int64),
            plan.tile,
            border=self.border,
            dtype=self.dtype,
            scale=self.scale,
            shift=self.shift,
            out=buffer if buffer is not None and len(buffer) == len(corners) else None,
        )
        layout = kept.setdefault("layout", channels_last)
        try:
            if plan.resizes is None:
                maps = self._scores(layout, x, plan, None)
            else:
                parts = zip(x.split(1), starts, strict=True)
                maps = torch.cat([self._scores(layout, part, plan, at) for part, at in parts])
        except RuntimeError as error:
            if layout is not channels_last or _out_of_memory(error):
                raise
            kept["layout"] = Tensor.contiguous
            return self.tiles(plan, image, corners, starts, kept)
        if maps.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
            kept["input"] = x
        return maps

    def _scores(self, layout: Layout, x: Tensor, plan: Plan, start: Sequence[int] | None) -> Tensor:
        """The network's maps, as wanted; `start`: of the one tile, where that is of account."""
        if not self.turned:
            return self._network(layout(x), plan, start, turned=False)
        total = torch.zeros((), dtype=x.dtype, device=x.device)
        for turns, mirrored in product(range(_RIGHT_ANGLES), (False, True)):
            copy = (x.flip(-1) if mirrored else x).rot90(turns, _LAST_TWO)
            begin = start
            if start is not None and plan.resizes is not None:
                whole = plan.resizes[0].whole.input_size
                left = [n - t for n, t in zip(whole, plan.tile, strict=True)]
                begin = _turned_start(start, left, turns, mirrored=mirrored)
            y = self._network(layout(copy), plan, begin, turned=turns % 2 == 1).rot90(
                -turns, _LAST_TWO
            )
            y = y.flip(-1) if mirrored else y
            total = total + y if total.dim() == 0 else total.add_(y)
        return total.div_(2 * _RIGHT_ANGLES)

    def _network(
        self, x: Tensor, plan: Plan, start: Sequence[int] | None, *, turned: bool
    ) -> Tensor:
        model: Any = self.model
        absolute: AbsolutePositions | nullcontext[None] = nullcontext()
        if plan.resizes is not None and start is not None:
            absolute = AbsolutePositions(plan.resizes[turned], start)
        with autocast(self.device, self.precision), absolute:
            y = first_tensor(model.coarse_scores(x) if plan.coarse else model(x))
        if y.dim() != x.dim():
            raise ValueError(
                f"predict: model: expected scores (N, K, *S), got shape {tuple(y.shape)}"
            )
        if y.dtype in {torch.float16, torch.bfloat16}:
            y = y.float()
        soft = self.output == "probabilities" or (self.turned and self.output == "labels")
        return y.softmax(1) if soft else y


def _turned_start(
    start: Sequence[int], left: Sequence[int], turns: int, *, mirrored: bool
) -> tuple[int, ...]:
    """Where a tile of an image starts in the image mirrored, then turned as `rot90` does.

    `left`: the largest start along each axis.
    """
    *rest, y, x = start
    free_y, free_x = left[-2:]
    if mirrored:
        x = free_x - x
    for _ in range(turns):
        y, x, free_y, free_x = free_x - x, y, free_x, free_y
    return (*rest, y, x)


@dataclass(frozen=True)
class _Band:
    """A row of tiles to compute.

    Attributes:
        plan: of which it is.
        cut: its tiles' rows.
        image: the rows of the image that they read, (C, rows, *), on the device.
        first: the first of those rows.
        sink: where the result goes.
        state: what bands hand on to the next one.
    """

    plan: Plan
    cut: Cut
    image: Tensor
    first: int
    sink: Sink
    state: dict[str, Any]


def _exact(engine: Engine, work: _Band) -> tuple[int, Tensor] | None:
    """Compute one band: its first row and its rows; None if they were written in place."""
    plan, band, image, state = work.plan, work.cut, work.image, work.state
    start, stop = band.to, band.to + band.last - band.first
    region = (stop - start, *plan.size[1:])
    room = work.sink.room(start, stop)
    into = room if room is not None and room.device == image.device else None
    labels = engine.output == "labels"
    cells = list(product([band], *plan.cuts[1:]))
    batch = state.setdefault("batch", engine.batch)
    at = 0
    while at < len(cells):
        some = cells[at : at + batch]
        corners = [(c[0].start - work.first, *(cut.start for cut in c[1:])) for c in some]
        begun = [
            tuple(cut.start - cuts[0].start for cut, cuts in zip(c, plan.cuts, strict=True))
            for c in some
        ]
        try:
            maps = engine.tiles(plan, image, corners, begun, state)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _out_of_memory(error):
                raise
            if len(some) == 1:
                raise TooLarge(start) from error
            batch = state["batch"] = max(1, len(some) // 2)
            engine.say(f"out of memory: going on with {batch} tiles at a time")
            continue
        if not plan.coarse:
            _check_size(maps, some, plan)
        for one, cell in zip(maps, some, strict=True):
            if into is None:
                into = _fresh(state, region, one, labels=labels)
            if plan.coarse:
                _label(engine.model, one[None], plan, cell, into)
                continue
            kept = one[(slice(None), *(slice(cut.first, cut.last) for cut in cell))]
            corner = torch.tensor([[0, *(cut.to for cut in cell[1:])]])
            ops.stitch_tiles(kept[None], corner, region, argmax=labels, out=into)
        at += len(some)
        engine.advance(sum(prod(cut.last - cut.first for cut in cell) for cell in some))
    if into is None or into is room:
        return None
    return start, into


def _label(model: Any, coarse: Tensor, plan: Plan, cell: Sequence[Cut], band: Tensor) -> None:
    """Write the classes of what is kept of a tile, from its coarse scores (1, K, h, w).

    A filter computes that alone; interpolation, which depends on the tile's size, all of the tile.
    """
    how = dict(model.upsampling)
    _, columns = cell
    size = [cut.last - cut.first for cut in cell]
    into = band[None, :, columns.to : columns.to + size[1]]
    first = [cut.first for cut in cell]
    if how.get("factor") is not None:
        offset = as_pair("predict", "upsampling's offset", how.get("offset", 0))
        how["offset"] = [a + b for a, b in zip(offset, first, strict=True)]
        ops.upsample_argmax(coarse, size=size, out=into, **how)
    else:
        labels: Any = ops.upsample_argmax(coarse, size=plan.tile, **how)
        (top, left), (height, width) = first, size
        into.copy_(labels[:, top : top + height, left : left + width])


def _fresh(state: dict[str, Any], region: Sequence[int], like: Tensor, *, labels: bool) -> Tensor:
    """Memory for a band: two take turns, as one is written while the other is filled."""
    turn = state["turn"] = not state.get("turn", False)
    shape = tuple(region) if labels else (len(like), *region)
    kept: Tensor | None = state.get(f"band {turn}")
    if kept is None or kept.numel() < prod(shape):
        dtype = label_dtype(len(like)) if labels else like.dtype
        kept = state[f"band {turn}"] = empty(shape, dtype, like.device)
    return kept.flatten()[: prod(shape)].view(shape)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Memory; on a CPU by NumPy, which asks for large pages: those are faster to get."""
    if device is not None and device.type != "cpu":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    return torch.from_numpy(np.empty(tuple(shape), torch.empty(0, dtype=dtype).numpy().dtype))


def _check_size(maps: Tensor, cells: Sequence[Sequence[Cut]], plan: Plan) -> None:
    for size, cuts in zip(maps.shape[2:], zip(*cells, strict=True), strict=True):
        if size < max(cut.last for cut in cuts):
            raise ValueError(
                f"predict: model: expected scores of the image's size, got {tuple(maps.shape[2:])} "
                f"for an input of {plan.tile}"
            )


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _blended(engine: Engine, work: _Band) -> tuple[int, Tensor] | None:
    """Compute a row of tiles; give the rows that no later tile reaches."""
    plan, band, image, state = work.plan, work.cut, work.image, work.state
    if "window" not in state:
        state["window"] = window(plan.blend, plan.tile, engine.device)
        state["tiles"] = []
        state["emitted"] = max(band.to, state["done"])
    starts = [cut.to for cut in plan.cuts[0]] + [plan.size[0]]
    following = starts[starts.index(band.to) + 1]
    for cell in product([band], *plan.cuts[1:]):
        corners = [(cell[0].start - work.first, *(cut.start for cut in cell[1:]))]
        try:
            maps = engine.tiles(plan, image, corners, [], state)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            raise TooLarge(band.to) if _out_of_memory(error) else error from error
        # copied: a network may write its next result into the same memory
        state["tiles"].append((tuple(cut.to for cut in cell), maps.clone()))
        engine.advance(prod(b - a for a, b in _fresh_part(cell, plan)))
    begin = state["emitted"]
    touching = [(c, m) for c, m in state["tiles"] if c[0] + plan.tile[0] > begin]
    places = torch.tensor([[c[0] - begin, *c[1:]] for c, _ in touching])
    region = (following - begin, *plan.size[1:])
    labels = engine.output == "labels"
    result = ops.stitch_tiles(
        torch.cat([m for _, m in touching]),
        places,
        region,
        window=state["window"],
        argmax=labels,
    )
    state["emitted"] = following
    state["tiles"] = [(c, m) for c, m in touching if c[0] + plan.tile[0] > following]
    return begin, result


def _fresh_part(cell: Sequence[Cut], plan: Plan) -> list[tuple[int, int]]:
    """The pixels of a blended tile that no earlier one of its axis has."""
    parts = []
    for cut, cuts in zip(cell, plan.cuts, strict=True):
        at = next(i for i, other in enumerate(cuts) if other.to == cut.to)
        end = cut.to + cut.last
        parts.append((cuts[at - 1].to + cuts[at - 1].last if at else 0, end))
    return parts


def window(kind: str, size: Sequence[int], device: torch.device) -> Tensor:
    """Weights of a blended tile: "gaussian" of an eighth of its size, or "hann"."""
    result = torch.ones((), device=device)
    for k, n in enumerate(size):
        at = torch.arange(n, dtype=torch.float64, device=device)
        if kind == "hann":
            line = torch.sin(torch.pi * (at + 0.5) / n) ** 2
        else:
            line = torch.exp(-0.5 * ((at - (n - 1) / 2) / (n * _SIGMA)) ** 2)
        result = result * line.float().view([-1 if d == k else 1 for d in range(len(size))])
    return result.clamp(min=torch.finfo(torch.float32).tiny)


def rows_needed(start: int, length: int, size: int, border: str) -> tuple[int, int]:
    """Rows [first, stop) of an image of `size` rows that a tile reads, its border continued.

    They are such that continuing them in the same way is continuing the image.
    """
    first, stop = max(0, start), min(size, start + length)
    if border == "constant":
        return first, max(stop, first + 1)
    before, after = max(0, -start), max(0, start + length - size)
    if before >= size or after >= size:
        return 0, size
    if before:
        stop = max(stop, min(size, before + 1))
    if after:
        first = min(first, max(0, size - after - 1))
    return first, stop
