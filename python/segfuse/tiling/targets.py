"""Results written by bands of rows: into arrays, or into zarr and TIFF so that a kill costs little.

Rows run along the first spatial axis. A result of several images, (N, *S) or (N, K, *S), is a
sequence of all their rows: row r of image i is row ``i * rows + r``, and a band lies in one image.

A file is staged as zarr in the folder ``<name>.partial`` beside it::

    data/          the zarr group, whose rows of chunks are written whole, once, in order
    manifest.json  the plan, and how many rows are safely on disk
    lock           held, by flock, by the one process that writes
    old            what was overwritten, while it is being replaced

A row of chunks is flushed to disk, files and folders, before the manifest counts it, and the
manifest is replaced in one step; so whenever the process dies, what the manifest counts is there.
When all rows are there, the group is moved to its name, or a TIFF is written from it and moved.
The plan's digest is part of the result, by which a later run knows that all is done.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import product, zip_longest
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError
from ..files import sync, whole
from .sources import zarr_module

__all__ = ["ArrayTarget", "Part", "Target", "open_target"]

_SPATIAL = "ZYX"
_ZARR, _TIFF = (".zarr",), (".tif", ".tiff")
_STAGED = {"data", "lock", "manifest.json", "manifest.json.new", "old"}
_SHOWN = 60  # characters of a plan's value in an error
_FORMAT = 1  # of the manifest, and of how results are laid out in files


class Target(Protocol):
    """Where a result goes."""

    done: int  # rows that are safely stored: write goes on from here

    def room(self, start: int, stop: int) -> Tensor | None:
        """Memory of rows that can be filled in place, instead of being given to `write`, or None.

        Labels (rows, *), scores (K, rows, *).
        """

    def write(self, start: int, band: NDArray[Any]) -> None:
        """Take the next rows: labels (rows, *) or scores (K, rows, *) of one image.

        Raises:
            ValueError: rows that do not follow the last, or of another shape.
            UserError: the file system refuses. What was done is kept, for `open_target` to resume.
        """

    def finish(self) -> None:
        """Make the result whole, under its name, once all rows are there.

        Raises:
            ValueError: rows are missing.
            UserError: the file system refuses. Nothing is lost.
        """

    def close(self) -> None:
        """Give up, keeping what is needed to resume; after `finish`, or again, nothing happens."""

    def part(self, image: int) -> Part:
        """One image of several, its rows counted from 0."""


@dataclass(frozen=True)
class Part:
    """One image of a target."""

    target: Target
    first: int  # its first row in the target
    rows: int

    @property
    def done(self) -> int:
        """Rows of this image that are safely stored."""
        return min(max(self.target.done - self.first, 0), self.rows)

    def room(self, start: int, stop: int) -> Tensor | None:
        """As a target's."""
        return self.target.room(self.first + start, self.first + stop)

    def write(self, start: int, band: NDArray[Any]) -> None:
        """As a target's."""
        self.target.write(self.first + start, band)


class _Layout:
    """Which axes of a result are which."""

    def __init__(self, shape: tuple[int, ...], axes: str, dims: int | None) -> None:
        self.shape, self.axes = tuple(map(int, shape)), axes.upper()
        dims = sum(letter in _SPATIAL for letter in self.axes) if dims is None else dims
        lead = len(self.axes) - dims
        if (
            len(self.shape) != len(self.axes)
            or not self.axes.endswith(_SPATIAL[3 - dims :])
            or "C" in self.axes[: max(lead - 1, 0)]
            or 0 in self.shape
        ):
            raise ValueError(
                f"predict: out: expected axes such as YX, CYX, ZYX or NCZYX, without length zero, "
                f"got {axes} of shape {shape}"
            )
        self.dims = dims
        self.scores = self.axes[:lead].endswith("C")
        self.images = self.shape[: lead - self.scores]
        self.rows = self.shape[lead]
        self.total = prod(self.images) * self.rows
        self.rest = self.shape[lead + 1 :]

    def band(self, rows: int) -> tuple[int, ...]:
        """Shape of rows of one image."""
        before = self.shape[len(self.images) : len(self.images) + self.scores]
        return (*before, rows, *self.rest)

    def place(self, start: int, stop: int) -> tuple[int | slice, ...]:
        """Where rows lie in the result, an index of basic slices."""
        image, row = divmod(start, self.rows)
        at: list[int | slice] = [int(i) for i in np.unravel_index(image, self.images or (1,))]
        at = at[: len(self.images)] + [slice(None)] * self.scores
        return (*at, slice(row, row + stop - start))

    def check(self, start: int, band: NDArray[Any]) -> int:
        """Give the row after a band, of which it says whether it may begin at `start`."""
        rows = band.shape[self.scores] if band.ndim > self.scores else 0
        if band.shape != self.band(rows) or start % self.rows + rows > self.rows:
            raise ValueError(
                f"write: expected rows of one image, {self.band(self.rows)} at most, got "
                f"{band.shape} at row {start}"
            )
        return start + rows


class _Blocks:
    """Bands cut and joined into blocks: whole rows of chunks, the last of an image shorter."""

    def __init__(self, layout: _Layout, dtype: np.dtype[Any], height: int, at: int) -> None:
        self.layout, self.dtype, self.height, self.at = layout, dtype, height, at
        self.held = 0  # rows in `buffer`
        self.buffer: NDArray[Any] | None = None

    def cut(self, start: int, band: NDArray[Any]) -> Iterator[tuple[int, NDArray[Any]]]:
        """Give the blocks that a band completes, each with its first row; valid until the next."""
        layout, axis = self.layout, int(self.layout.scores)
        if start != self.at:
            raise ValueError(f"write: expected rows from {self.at} on, got from {start}")
        stop = layout.check(start, band)
        while self.at < stop:
            row = self.at % layout.rows
            begin = row - self.held
            height = min(self.height, layout.rows - begin)
            take = min(height - self.held, stop - self.at)
            part = band[(slice(None),) * axis + (slice(self.at - start, self.at - start + take),)]
            if take < height:
                if self.buffer is None:
                    most = min(self.height, layout.rows)
                    self.buffer = np.empty(layout.band(most), self.dtype)
                block = self.buffer[(slice(None),) * axis + (slice(self.held + take),)]
                block[(slice(None),) * axis + (slice(self.held, None),)] = part
            else:
                block = part
            self.at += take
            self.held += take
            if self.held == height:
                yield self.at - height, block
                self.held = 0


class ArrayTarget:
    """A result in an array, memory map, tensor or zarr array: anything with shape and `[...] =`.

    Args:
        out: of the result's shape. Labels may be kept in a wider integer dtype, scores as float16,
            float32 or float64. zarr gets whole rows of chunks.
        shape, dtype: of the result.
        axes: a letter an axis, as "YX", "CYX", "NZYX": the last are spatial, C are scores, all
            before count images.
        dims: number of spatial axes, where axes such as "ZYX" are planes; None: all of Z, Y, X.

    Raises:
        ValueError: another shape, a dtype that does not hold the result, or memory that is
            read-only.
    """

    def __init__(
        self, out: Any, *, shape: tuple[int, ...], dtype: Any, axes: str, dims: int | None = None
    ) -> None:
        self.done = 0
        self._out, self._layout = out, _Layout(shape, axes, dims)
        self._dtype = _fitting(out, self._layout.shape, np.dtype(dtype))
        self._same = self._dtype == np.dtype(dtype)
        self._blocks: _Blocks | None = None
        chunks = getattr(out, "shards", None) or getattr(out, "chunks", None)
        if isinstance(chunks, tuple):
            height = int(chunks[len(chunks) - self._layout.dims])
            self._blocks = _Blocks(self._layout, self._dtype, height, 0)

    def room(self, start: int, stop: int) -> Tensor | None:
        """See `Target`: of tensors and arrays of the result's own dtype."""
        if not self._same or self._blocks is not None:
            return None
        if isinstance(self._out, Tensor):
            return self._out.detach()[self._layout.place(start, stop)]
        if isinstance(self._out, np.ndarray):
            with suppress(ValueError, TypeError):  # strides or bytes that tensors cannot have
                return torch.from_numpy(self._out[self._layout.place(start, stop)])
        return None

    def write(self, start: int, band: NDArray[Any]) -> None:
        """See `Target`."""
        if self._blocks is None:
            self._put(start, self._layout.check(start, band), band)
            return
        for first, block in self._blocks.cut(start, band):
            self._put(first, first + block.shape[self._layout.scores], block)

    def _put(self, start: int, stop: int, band: NDArray[Any]) -> None:
        place = self._layout.place(start, stop)
        band = band.astype(self._dtype, copy=False)
        if isinstance(self._out, Tensor):
            fit = band.flags.writeable and all(stride >= 0 for stride in band.strides)
            self._out.detach()[place] = torch.from_numpy(band if fit else band.copy()).to(
                self._out.device
            )
        else:
            self._out[place] = band

    def finish(self) -> None:
        """See `Target`: memory maps are flushed."""
        if isinstance(self._out, np.memmap):
            self._out.flush()

    def close(self) -> None:
        """See `Target`: nothing to do."""

    def part(self, image: int) -> Part:
        """See `Target`."""
        return Part(self, image * self._layout.rows, self._layout.rows)


def _fitting(out: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Give the dtype of `out`, as NumPy has it, if it takes a result."""
    if not hasattr(out, "__setitem__") or not hasattr(out, "shape") or not hasattr(out, "dtype"):
        raise TypeError(
            f"predict: out: expected an array, a tensor or a path, got {type(out).__name__}"
        )
    if hasattr(out, "dask"):
        raise TypeError("predict: out: expected what stores, as zarr does, got a dask array")
    if tuple(out.shape) != shape:
        raise ValueError(f"predict: out: expected shape {shape}, got {tuple(out.shape)}")
    try:
        kept: np.dtype[Any] = np.dtype(str(out.dtype).removeprefix("torch."))
    except TypeError:
        kept = np.dtype(object)
    if dtype.kind == "f":
        fits, wanted = kept.kind == "f" and kept.itemsize <= 8, "float16, 32 or 64"  # noqa: PLR2004
    else:
        fits = kept.kind in "iu" and np.can_cast(dtype, kept, "safe")
        wanted = f"{dtype} or a wider integer dtype"
    if not fits:
        raise ValueError(f"predict: out: expected {wanted}, got {out.dtype}")
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError("predict: out: expected memory that can be written to, got read-only")
    return kept


def open_target(
    path: str | Path,
    *,
    shape: tuple[int, ...],
    dtype: Any,
    axes: str,
    plan: Mapping[str, Any],
    resume: bool = False,
    overwrite: bool = False,
    chunk: int = 512,
    dims: int | None = None,
) -> Target:
    """Begin a result in a file, or go on with one.

    Args:
        path: its suffix says what: ".zarr", OME-Zarr 0.5 whose array is "0", compressed by zstd;
            ".tif" or ".tiff", BigTIFF by tiles, compressed by zlib, a page a plane.
        shape: of the result.
        dtype: of the result.
        axes: as of `ArrayTarget`.
        plan: what makes the result what it is (model, image, tile, ...), as for JSON. A run that
            resumes must have the same. Values that are hex digests are not shown to users.
        resume: go on with what an interrupted run left. If there is nothing, begin; if the result
            is there and of the same plan, all is done.
        overwrite: replace what is there: a stage at once, a result only when the new one is whole.
            With `resume`, only what is of another plan.
        chunk: edge of chunks and of TIFF's tiles; in 3-D chunks are (chunk / 16, chunk / 2,
            chunk / 2) and tiles chunk / 2. A multiple of 32.
        dims: as of `ArrayTarget`; 2 or 3.

    Returns:
        A target whose `done` is a multiple of the height of a chunk in an image.

    Raises:
        ValueError: a suffix, a shape, a dtype or a chunk out of these.
        UserError: zarr is not there; the folder is not, or it refuses; results or stages that are
            in the way, or of another plan; another process that writes the same.

    Limits:
        A row of chunks and, for TIFF, a row of tiles are held in memory. TIFF is first staged as
        zarr: for the time of writing, the disk holds the result twice.
    """
    path = Path(path)
    layout, dtype = _Layout(shape, axes, dims), np.dtype(dtype)
    if path.suffix.lower() not in _ZARR + _TIFF:
        raise ValueError(f"predict: out: expected a name with .zarr, .tif or .tiff, got {path}")
    if layout.dims not in {2, 3} or dtype.kind not in "iuf" or chunk < 1 or chunk % 32:
        raise ValueError(
            "predict: out: expected 2 or 3 spatial axes, integers or floating numbers and chunks "
            f"of a multiple of 32, got {layout.dims}, {dtype} and {chunk}"
        )
    zarr_module(f"cannot write {path}: a result in a file")
    record = {
        **json.loads(json.dumps(dict(plan))),
        "result": [layout.axes, list(layout.shape), dtype.name, path.suffix.lower()[:4]],
        "chunk": chunk,
        "format": _FORMAT,
    }
    stage = _Stage(path, record)
    with _said(path):
        if _in_the_way(stage, resume=resume, overwrite=overwrite):
            return _Finished(layout)
        stage.lock()
        try:
            return _begun(stage, layout, dtype, resume=resume, overwrite=overwrite)
        except BaseException:
            stage.release()
            raise


def _in_the_way(stage: _Stage, *, resume: bool, overwrite: bool) -> bool:
    """Refuse what can be refused before anything is touched; say whether the result is there."""
    path, folder = stage.path, stage.folder
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir() and not (path.suffix.lower() in _ZARR and (path / "zarr.json").exists()):
        raise UserError(f"{path} is a folder that holds no zarr 3: choose another name")
    if folder.exists() and not (folder.is_dir() and _names(folder) <= _STAGED):
        raise UserError(f"{folder} is in the way: move it, or choose another name")
    if not (resume or overwrite):
        if folder.exists():
            raise UserError(f"{folder} holds what an interrupted run left: resume or overwrite it")
        if path.exists():
            raise UserError(f"{path} exists: overwrite it, or choose another name")
    if not folder.exists() and path.exists():
        if resume and stage.published():
            return True
        if not overwrite:
            raise UserError(stage.other())
    return False


def _begun(
    stage: _Stage, layout: _Layout, dtype: np.dtype[Any], *, resume: bool, overwrite: bool
) -> Target:
    """Go on, begin, or see that all is done, with the stage locked."""
    stage.sweep()
    if resume and stage.published():  # killed before the stage was removed
        stage.remove()
        return _Finished(layout)
    manifest = stage.manifest() if resume else None
    if manifest is not None and (changed := _changes(manifest["plan"], stage.record)):
        if not overwrite:
            raise UserError(
                f"{stage.folder} was begun otherwise: {'; '.join(changed)}: undo that, or overwrite"
            )
        manifest = None
    overwrite = overwrite or (manifest is not None and manifest["overwrite"])
    if stage.path.exists() and not overwrite:
        raise UserError(stage.other())
    if manifest is None:
        stage.clear()
        _create(stage, layout, dtype)
        done = 0
    else:
        done = manifest["rows"]
    stage.overwrite = overwrite
    stage.save(done)
    return _Staged(stage, layout, dtype, done)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Say in which keys two plans differ."""
    changes = []
    for key in sorted(old.keys() | new.keys()):
        before, after = (json.dumps(plan.get(key)) for plan in (old, new))
        if before == after:
            continue
        opaque = all(re.fullmatch(r'"[0-9a-f]{16,}"', value) for value in (before, after))
        was, now = (v if len(v) <= _SHOWN else f"{v[:_SHOWN]}..." for v in (before, after))
        changes.append(f"the {key} has changed" if opaque else f"{key}: was {was}, is {now}")
    return changes


class _Stage:
    """The folder in which a file is staged. Its lock is held while anything is changed in it."""

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path, self.record = path, record
        self.folder = path.with_name(f"{path.name}.partial")
        self.data, self.old = self.folder / "data", self.folder / "old"
        self.digest = sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
        self.overwrite = False  # a result that is there may be replaced
        self._unlock: weakref.finalize[..., Any] | None = None

    def lock(self) -> None:
        """Lock the folder, made if missing.

        Raises:
            UserError: another process holds it.
        """
        file = self.folder / "lock"
        while True:
            self.folder.mkdir(exist_ok=True)
            try:
                lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:  # another process has just removed the folder
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same(lock, file):
                    break
            except BlockingIOError:
                os.close(lock)
                raise UserError(f"{self.path} is being written by another process") from None
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)
        self._unlock = weakref.finalize(self, os.close, lock)

    def release(self) -> None:
        """Unlock the folder; one without anything in it is removed."""
        if self._unlock is not None:
            with suppress(OSError):
                if _names(self.folder) == {"lock"}:
                    self._vanish()
            self._unlock()
            self._unlock = None

    def sweep(self) -> None:
        """Remove temporary files of writers that were killed: of `whole`, and of zarr's chunks."""
        temporary = re.compile(rf"\.partial-\d+-{re.escape(self.path.name)}")
        for name in filter(temporary.fullmatch, _names(self.path.parent)):
            (self.path.parent / name).unlink()
        for file in self.data.rglob("*.partial"):
            file.unlink()

    def published(self) -> bool:
        """Whether the result is there, and of this plan."""
        return self.path.exists() and _digest_of(self.path) == self.digest

    def other(self) -> str:
        return (
            f"{self.path} exists and is of another model, image or plan: overwrite it, or choose "
            "another name"
        )

    def manifest(self) -> dict[str, Any] | None:
        """What was saved last; None where there is nothing to go on from."""
        file = self.folder / "manifest.json"
        try:
            found: dict[str, Any] = json.loads(file.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(f"{file} is damaged: overwrite what was begun") from error
        return found if (self.data / "0" / "zarr.json").exists() else None

    def save(self, rows: int) -> None:
        """Count rows as stored, in one step."""
        new = self.folder / "manifest.json.new"
        manifest = {"plan": self.record, "rows": rows, "overwrite": self.overwrite}
        with new.open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.folder / "manifest.json")
        sync(self.folder)

    def clear(self) -> None:
        """Remove all but the lock; the manifest first, that none counts what is being removed.

        A result that was being replaced is put back.
        """
        (self.folder / "manifest.json").unlink(missing_ok=True)
        sync(self.folder)
        if self.old.exists() and not self.path.exists():
            self.old.rename(self.path)
        for name in _STAGED - {"lock"}:
            _remove(self.folder / name)

    def remove(self) -> None:
        """Remove the folder, when the result is there."""
        self.clear()
        self._vanish()
        self.release()

    def _vanish(self) -> None:
        (self.folder / "lock").unlink()
        with suppress(OSError):  # another process has just begun here
            self.folder.rmdir()


class _Finished:
    """A result that is whole already."""

    def __init__(self, layout: _Layout) -> None:
        self._layout, self.done = layout, layout.total

    def room(self, start: int, stop: int) -> Tensor | None:  # noqa: ARG002
        return None

    def write(self, start: int, band: NDArray[Any]) -> None:  # noqa: ARG002
        raise ValueError(f"write: expected no rows, all {self.done} are there, got from {start}")

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass

    def part(self, image: int) -> Part:
        return Part(self, image * self._layout.rows, self._layout.rows)


class _Staged:
    """A result on its way into a file."""

    def __init__(self, stage: _Stage, layout: _Layout, dtype: np.dtype[Any], done: int) -> None:
        self._stage, self._layout, self.done = stage, layout, done
        with _empty_chunks(dtype):
            self._array = zarr_module("zarr").open_array(stage.data / "0", mode="r+")
        height = self._array.chunks[len(layout.shape) - layout.dims]
        self._blocks = _Blocks(layout, dtype, height, done)

    def room(self, start: int, stop: int) -> Tensor | None:  # noqa: ARG002
        return None

    def write(self, start: int, band: NDArray[Any]) -> None:
        with _said(self._stage.path, kept=self._stage.folder):
            for first, block in self._blocks.cut(start, band):
                stop = first + block.shape[self._layout.scores]
                place = self._layout.place(first, stop)
                self._array[place] = block
                self._sync(place)
                self._stage.save(stop)
                self.done = stop

    def _sync(self, place: tuple[int | slice, ...]) -> None:
        """Flush the chunks that hold `place`, and the folders that lead to them."""
        ranges = []
        for at, length, chunk in zip_longest(place, self._array.shape, self._array.chunks):
            part = slice(None) if at is None else slice(at, at + 1) if isinstance(at, int) else at
            start, stop, _ = part.indices(length)
            ranges.append(range(start // chunk, -(-stop // chunk)))
        top = self._stage.data / "0"
        folders = {top}
        for key in product(*ranges):
            file = top.joinpath("c", *map(str, key))
            with suppress(FileNotFoundError):  # a chunk of zeros has no file
                sync(file)
                folders.update(file.parents[: len(key)])
        for folder in folders:
            sync(folder)

    def finish(self) -> None:
        if self.done != self._layout.total:
            raise ValueError(f"finish: expected {self._layout.total} rows, got {self.done}")
        stage = self._stage
        if stage.path.exists() and not stage.overwrite:  # since it was begun
            raise UserError(stage.other())
        with _said(stage.path, kept=stage.folder):
            if stage.path.suffix.lower() in _TIFF:
                with whole(stage.path) as partial:
                    _write_tiff(partial, self._array, self._layout, stage.digest)
                    sync(partial)
            else:
                if stage.path.exists():
                    _remove(stage.old)
                    stage.path.rename(stage.old)
                stage.data.rename(stage.path)
                sync(stage.folder)
            sync(stage.path.parent)
            stage.remove()

    def close(self) -> None:
        self._stage.release()

    def part(self, image: int) -> Part:
        return Part(self, image * self._layout.rows, self._layout.rows)


def _create(stage: _Stage, layout: _Layout, dtype: np.dtype[Any]) -> None:
    """Make the zarr group, its metadata complete."""
    zarr = zarr_module("zarr")
    chunk = stage.record["chunk"]
    edges = (chunk, chunk) if layout.dims == 2 else (chunk // 16, chunk // 2, chunk // 2)  # noqa: PLR2004
    kinds = {"C": "channel", "T": "time"} | dict.fromkeys(_SPATIAL, "space")
    axes = [
        {"name": letter.lower()} | ({"type": kinds[letter]} if letter in kinds else {})
        for letter in layout.axes
    ]
    scale = {"type": "scale", "scale": [1.0] * len(axes)}
    level = {"path": "0", "coordinateTransformations": [scale]}
    image = {"name": stage.path.stem, "axes": axes, "datasets": [level]}
    group = zarr.create_group(
        stage.data,
        zarr_format=3,
        attributes={
            "ome": {"version": "0.5", "multiscales": [image]},
            "segfuse": {"plan": stage.digest},
        },
    )
    group.create_array(
        "0",
        shape=layout.shape,
        dtype=dtype,
        chunks=(1,) * (len(axes) - layout.dims) + edges,
        compressors=zarr.codecs.ZstdCodec(level=3),
        fill_value=0,
        dimension_names=[axis["name"] for axis in axes],
    )
    for folder, _, names in os.walk(stage.data):
        for name in names:
            sync(Path(folder, name))
        sync(Path(folder))
    sync(stage.folder)
    sync(stage.path.parent)


def _empty_chunks(dtype: np.dtype[Any]) -> AbstractContextManager[Any]:
    """Have zarr leave out chunks of zeros, but not where a zero may be -0.0."""
    context: AbstractContextManager[Any] = zarr_module("zarr").config.set(
        {"array.write_empty_chunks": dtype.kind == "f"}
    )
    return context


def _write_tiff(path: Path, staged: Any, layout: _Layout, digest: str) -> None:
    """Write BigTIFF by tiles, a row of staged chunks at a time."""
    from tifffile import TiffWriter  # noqa: PLC0415

    high, edge = staged.chunks[-layout.dims], staged.chunks[-1]

    def tiles() -> Iterator[NDArray[Any]]:
        for lead in np.ndindex(*layout.shape[: -layout.dims]):
            for row in range(0, layout.rows, high):
                rows = staged[(*lead, slice(row, row + high))]
                for plane in rows if layout.dims == 3 else [rows]:  # noqa: PLR2004
                    height, width = plane.shape
                    for y, x in product(range(0, height, edge), range(0, width, edge)):
                        yield plane[y : y + edge, x : x + edge]

    with TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(
            # Of images one pixel wide, tifffile makes pages of the axes before.
            staged[...] if layout.rest[-1] == 1 else tiles(),
            shape=layout.shape,
            dtype=staged.dtype,
            tile=(edge, edge),
            compression="zlib",
            photometric="minisblack",
            metadata={"axes": layout.axes, "segfuse": digest},
            software="segfuse",
            buffersize=edge * layout.rest[-1] * staged.dtype.itemsize,
        )


def _digest_of(path: Path) -> str | None:
    """The plan's digest in a result of ours."""
    try:
        if path.is_dir():
            attributes = json.loads((path / "zarr.json").read_bytes())["attributes"]
            return str(attributes["segfuse"]["plan"])
        from tifffile import TiffFile  # noqa: PLC0415

        with TiffFile(path) as tiff:
            return str(json.loads(tiff.pages.first.description)["segfuse"])
    except Exception:  # noqa: BLE001 - a file of others may make readers raise anything
        return None


@contextmanager
def _said(path: Path, kept: Path | None = None) -> Iterator[None]:
    """Say in one line what the file system refuses."""
    try:
        yield
    except OSError as error:
        hint = "" if kept is None else f"; what was done is in {kept}, to resume from"
        raise UserError(f"cannot write {path}: {error.strerror or error}{hint}") from error


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _same(opened: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(opened), path.stat())
    except FileNotFoundError:
        return False
