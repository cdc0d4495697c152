"""Images read by bands of rows: arrays, tensors, memory maps, TIFF, zarr, dask, other pictures.

Rows run along the first spatial axis: y in 2-D, z in 3-D.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import UserError

__all__ = ["Source", "sources", "zarr_module"]

_LETTERS, _SPATIAL, _CHANNEL = "NTZYXCS", "ZYX", "CS"
_PLAIN = {torch.float16, torch.float32, torch.float64}  # floating dtypes that NumPy has
_GRID, _PATCH = 8, 32  # patches along an axis and pixels along a patch, of `identity`
_ZARR_FILES = ("zarr.json", ".zarray", ".zgroup")

Index = tuple[slice, ...]
Fetch = Callable[[Index], NDArray[Any]]
Role = str  # of an axis: "batch", "channel", or a letter of _SPATIAL


class Source(Protocol):
    """One image (C, *S), read by one thread at a time."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]  # of the machine's byte order; bool is given as uint8
    direct: bool  # `read` gives views and costs nothing

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows from `start` up to `stop`: (C, stop - start, *S[1:]), any strides, native bytes.

        A view where pixels lie in memory: not to be written to. What is stored by chunks is read
        by whole rows of chunks, of which those that hold the rows are kept: rows in rising order
        are decoded once.

        Raises:
            ValueError: rows that are not there.
            UserError: a file that cannot be read.
        """

    def identity(self) -> str:
        """Hex digest of shape, dtype, place (path, size and time of the files) and sample pixels.

        It changes when a file is written anew. The sample is a grid of patches, so that a change
        of single pixels in memory may go unseen.
        """


def sources(
    image: Any, *, axes: str | None, channels: int | None, dims: int
) -> tuple[list[Source], bool]:
    """Open an image, or each one of a stack.

    Args:
        image: array or anything with `shape`, `dtype` and slices (NumPy, memory map, zarr, dask,
            h5py), tensor on any device, or the path of a TIFF, a zarr array, an OME-Zarr image
            (its largest level) or another picture.
        axes: a letter an axis, of either case. The last `dims` of Z, Y, X are spatial, C and S
            channels, all others count images. None: what a file's metadata say; else tensors are
            (*S), (C, *S) or (N, C, *S), and arrays (*S) or (*S, C).
        channels: that the model takes; None: any number.
        dims: number of spatial axes, 1 to 3.

    Returns:
        The images, in the order of their axes, and whether results have an axis that counts them.
        Where `axes` is None, axes of length one of a file's metadata count nothing.

    Raises:
        ValueError: a shape that the axes or the channels do not fit or that can be read in two
            ways; an axis of length zero.
        TypeError: no image; complex numbers or other dtypes that are no pixels.
        UserError: a file that cannot be read, or whose axes or channels do not fit.

    Limits:
        A file is read lazily where it is stored by tiles, strips or chunks or without compression.
        Else (PNG, JPEG, on Python 3.10 compressed TIFF too) it is held in memory whole. TIFF with
        a palette is refused.
    """
    if axes is not None:
        axes = _checked(axes, dims)
    opened = _opened(image)
    first = opened[0]
    if not first.shape:
        raise first.wrong("expected an array with axes, got a single number")
    roles = _roles(first, axes, channels, dims)
    found: list[Source] = []
    for pixels in opened:
        lengths = [n if role == "batch" else 1 for n, role in zip(pixels.shape, roles, strict=True)]
        found += [_Source(pixels, roles, at) for at in product(*map(range, lengths))]
    counted = axes is not None or not first.named
    batch = len(found) > 1 or (counted and "batch" in roles)
    return found, batch


def resized(images: Sequence[Source], resize: Any) -> list[Source]:
    """Read images (C, H, W) whole, and resize them.

    Args:
        images: of one shape.
        resize: a `segfuse.data.Resize`.
    """
    small = np.stack([resize.image(np.asarray(image.read(0, image.shape[1]))) for image in images])
    opened, _ = sources(small, axes="NCYX", channels=small.shape[1], dims=2)
    return opened


def zarr_module(wanted: str) -> Any:
    """Import zarr 3.

    Raises:
        UserError: it is not there; the text begins with `wanted`, what needs it.
    """
    try:
        zarr: Any = import_module("zarr")
    except ImportError:
        zarr = None
    if zarr is None or int(zarr.__version__.split(".")[0]) < 3:  # noqa: PLR2004
        how = (
            "pip install 'segfuse[cli]'" if sys.version_info >= (3, 11) else "Python 3.11 or newer"
        )
        raise UserError(f"{wanted} needs zarr 3: {how}")
    return zarr


@dataclass(frozen=True)
class _Pixels:
    """What is sliced, and how."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]  # of what `fetch` gives
    fetch: Fetch
    chunks: tuple[Any, ...] | None = None  # as zarr and dask say them
    named: str | None = None  # a letter an axis, from metadata; not only those of _LETTERS
    tensor: bool = False
    direct: bool = False  # `fetch` copies nothing
    path: Path | None = None  # of what was opened here: for errors
    files: Callable[[], list[Path]] = list  # where it lies

    def wrong(self, problem: str) -> ValueError:
        if self.path is not None:
            return UserError(f"{self.path}: {problem}")
        return ValueError(f"predict: image: {problem}")


class _Source:
    """One image of `_Pixels`."""

    def __init__(self, pixels: _Pixels, roles: Sequence[Role], at: Sequence[int]) -> None:
        """Take the image whose index along the axes of role "batch" is in `at`, 0 elsewhere."""
        self._pixels, self._roles, self._at = pixels, roles, tuple(at)
        spatial = [roles.index(letter) for letter in _SPATIAL if letter in roles]
        self._spatial = spatial
        self._channels = [axis for axis, role in enumerate(roles) if role == "channel"]
        count = prod(pixels.shape[axis] for axis in self._channels)
        self.shape = (count, *(pixels.shape[axis] for axis in spatial))
        self.dtype = _native(pixels.dtype)
        self.direct = pixels.direct and len(self._channels) < 2 and pixels.dtype.isnative  # noqa: PLR2004
        self._edges = None  # of chunks, along each spatial axis
        if pixels.chunks is not None:
            self._edges = [_edges(pixels.shape[axis], pixels.chunks[axis]) for axis in spatial]
        self._kept: NDArray[Any] | None = None  # whole rows of chunks
        self._first = 0  # row of `_kept`

    def read(self, start: int, stop: int) -> NDArray[Any]:
        rows = self.shape[1]
        if not 0 <= start <= stop <= rows:
            raise ValueError(f"read: expected rows within 0 to {rows}, got {start} to {stop}")
        rest = tuple(map(_full, self.shape[2:]))
        if self._edges is None or start == stop:
            return self._piece((slice(start, stop), *rest))
        edges = self._edges[0]
        begin = int(edges[np.searchsorted(edges, start, "right") - 1])
        end = int(edges[np.searchsorted(edges, stop)])
        kept = self._kept
        held = self._first + (0 if kept is None else kept.shape[1])
        if kept is None or not self._first <= begin < held:
            kept = self._piece((slice(begin, end), *rest))
        elif held < end:
            grown = np.empty((self.shape[0], end - begin, *self.shape[2:]), self.dtype)
            grown[:, : held - begin] = kept[:, begin - self._first :]
            self._kept = None
            grown[:, held - begin :] = self._piece((slice(held, end), *rest))
            kept = grown
        else:
            begin = self._first
        self._kept, self._first = kept, begin
        return kept[:, start - begin : stop - begin]

    def identity(self) -> str:
        digest = hashlib.sha256()
        files = []
        for file in self._pixels.files():
            state = file.stat()
            files.append([str(file), state.st_size, state.st_mtime_ns])
        head = [list(self.shape), self.dtype.str, list(self._at), files]
        digest.update(json.dumps(head).encode())
        for patch in self._sample():
            digest.update(np.ascontiguousarray(patch).tobytes())
        return digest.hexdigest()

    def _sample(self) -> Iterator[NDArray[Any]]:
        """Patches on a grid that takes in the corners, by rising rows."""
        first, *rest = self.shape[1:]
        high = 1 if len(rest) > 1 else _PATCH
        starts = _spread(first, high)
        # A few large chunks are decoded once for all patches of a row; of many, those alone are
        # decoded that a patch touches.
        few = self._edges is not None and prod(len(e) - 1 for e in self._edges[1:]) <= _GRID
        for number, start in enumerate(starts):
            rows = slice(start, min(start + high, first))
            band = self.read(rows.start, rows.stop) if few else None
            ends = number in {0, len(starts) - 1}
            for place in _places([_spread(n, _PATCH) for n in rest], number, corners=ends):
                where = tuple(
                    slice(p, min(p + _PATCH, n)) for p, n in zip(place, rest, strict=True)
                )
                yield (
                    self._piece((rows, *where))
                    if band is None
                    else band[(slice(None), slice(None), *where)]
                )

    def _piece(self, where: Index) -> NDArray[Any]:
        """(C, *sizes of `where`), in the machine's byte order."""
        pixels = self._pixels
        index = [
            slice(i, i + 1) if role == "batch" else _full(n)
            for i, n, role in zip(self._at, pixels.shape, self._roles, strict=True)
        ]
        for axis, part in zip(self._spatial, where, strict=True):
            index[axis] = part
        with nullcontext() if pixels.path is None else _readable(pixels.path):
            piece = pixels.fetch(tuple(index))
        batch = [axis for axis, role in enumerate(self._roles) if role == "batch"]
        piece = piece.transpose(batch + self._channels + self._spatial)[(0,) * len(batch)]
        piece = piece.reshape(self.shape[0], *piece.shape[len(self._channels) :])
        flags = piece.dtype == np.bool_
        result: NDArray[Any] = (
            piece.view(np.uint8) if flags else piece.astype(self.dtype, copy=False)
        )
        return result


def _full(length: int) -> slice:
    return slice(0, length)


def _native(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.uint8) if dtype == np.bool_ else dtype.newbyteorder("=")


def _spread(length: int, size: int) -> list[int]:
    """Starts of at most _GRID pieces of `size`, from the first to the last."""
    last = max(length - size, 0)
    return sorted({last * i // (_GRID - 1) for i in range(_GRID)})


def _places(
    starts: Sequence[Sequence[int]], number: int, *, corners: bool
) -> Iterator[tuple[int, ...]]:
    """Where patches start along the axes after the rows: one axis through all, two as a diagonal.

    The diagonal turns with the number of the row; at the ends, the corners come too.
    """
    if len(starts) == 2:  # noqa: PLR2004
        ys, xs = starts
        if corners:
            yield from sorted({(y, x) for y in (ys[0], ys[-1]) for x in (xs[0], xs[-1])})
        for i, x in enumerate(xs):
            yield ys[(3 * i + number) % len(ys)], x
    else:
        yield from product(*starts)


def _edges(length: int, chunk: int | Sequence[int]) -> NDArray[np.int64]:
    """Where chunks begin, and the end; zarr gives one length of all, dask that of each."""
    if isinstance(chunk, int):
        return np.append(np.arange(0, length, chunk), length)
    return np.cumsum([0, *chunk])


# What the axes mean.


def _checked(axes: str, dims: int) -> str:
    letters = axes.upper() if isinstance(axes, str) else ""
    spatial = _SPATIAL[3 - dims :]
    if (
        not letters
        or len(set(letters)) != len(letters)
        or not set(spatial) <= set(letters) <= set(_LETTERS)
    ):
        raise ValueError(
            f"predict: axes: expected distinct letters of N, T, Z, Y, X, C, S with "
            f"{', '.join(spatial)} among them, got {axes!r}"
        )
    return letters


def _roles(pixels: _Pixels, axes: str | None, channels: int | None, dims: int) -> list[Role]:
    """Say what each axis is; refuse what does not fit."""
    shape = pixels.shape
    if any(not isinstance(n, int) for n in shape):
        raise pixels.wrong(f"expected a shape of whole numbers, got {shape}")
    if 0 in shape:
        raise pixels.wrong(f"expected axes of one pixel or more, got shape {shape}")
    spatial = _SPATIAL[3 - dims :]
    if axes is not None:
        if len(axes) != len(shape):
            raise pixels.wrong(
                f"expected an axis for each letter of axes={axes!r}, got shape {shape}"
            )
    elif pixels.named is not None:
        axes = _from_metadata(pixels, spatial)
    else:
        axes = _by_convention(pixels, channels, spatial)
    roles = [
        letter if letter in spatial else "channel" if letter in _CHANNEL else "batch"
        for letter in axes
    ]
    count = prod(n for n, role in zip(shape, roles, strict=True) if role == "channel")
    if channels is not None and count != channels:
        raise pixels.wrong(
            f"expected {channels} channels, as the model takes, got {count} (shape {shape}, axes "
            f"{axes})"
        )
    return roles


def _from_metadata(pixels: _Pixels, spatial: str) -> str:
    axes = str(pixels.named)
    unnamed = [letter for letter in axes if letter not in _LETTERS]
    if spatial == _SPATIAL and "Z" not in axes and len(unnamed) == 1:
        axes = axes.replace(unnamed[0], "Z")  # pages that say no more: only the planes are wanting
    if any(axes.count(letter) != 1 for letter in spatial):
        raise pixels.wrong(
            f"expected axes {', '.join(spatial)}, got {axes} (shape {pixels.shape}): say which "
            "they are with axes="
        )
    return axes


def _by_convention(pixels: _Pixels, channels: int | None, spatial: str) -> str:
    shape, dims = pixels.shape, len(spatial)
    grey = channels in {None, 1}
    if pixels.tensor:
        kinds, fits = {dims + 1: "C" + spatial, dims + 2: "NC" + spatial}, True
    else:
        kinds = {dims + 1: spatial + "C"}
        fits = bool(shape) and (
            channels is None or (shape[-1] == channels and shape[0] != channels)
        )
    if grey:
        kinds[dims] = spatial
        fits = fits or len(shape) == dims
    axes = kinds.get(len(shape))
    if axes is None or not fits:
        count = "C" if channels is None else str(channels)
        wanted = " or ".join(
            f"({', '.join(count if letter == 'C' else letter for letter in kinds[n])})"
            for n in sorted(kinds)
        )
        raise pixels.wrong(
            f"expected {'a tensor' if pixels.tensor else 'an array'} {wanted}, got shape {shape}; "
            f"for another order say what the axes are, for example axes="
            f'"{_example(shape, channels, spatial)}"'
        )
    return axes


def _example(shape: tuple[int, ...], channels: int | None, spatial: str) -> str:
    stack = "Z" if "Z" not in spatial else "N"
    if len(shape) == len(spatial) + 1:
        return ("C" if shape[0] == channels else stack) + spatial
    last = channels is None or shape[-1] == channels
    return stack + spatial + "C" if last else stack + "C" + spatial


# What can be opened.


def _opened(image: Any) -> list[_Pixels]:
    """Open an image: more than one where a TIFF holds more than one series, all of one layout."""
    if isinstance(image, (str, os.PathLike)):
        return _from_path(Path(image))
    if isinstance(image, Tensor):
        return [_from_tensor(image)]
    zarr = sys.modules.get("zarr")
    if zarr is not None and isinstance(image, zarr.abc.store.Store):  # as tifffile's aszarr gives
        image = zarr.open(image, mode="r")
    if zarr is not None and isinstance(image, (zarr.Array, zarr.Group)):
        return [_from_zarr(image, None)]
    if not all(hasattr(image, name) for name in ("shape", "dtype", "__getitem__")):
        raise TypeError(
            f"predict: image: expected a path, a tensor or an array, got {type(image).__name__}"
        )
    files = _mapped(image)
    chunks = getattr(image, "chunks", None)
    return [
        _Pixels(
            tuple(image.shape),
            _numbers(image.dtype, None),
            lambda index: np.asarray(image[index]),
            chunks if isinstance(chunks, tuple) else None,
            direct=isinstance(image, np.ndarray),
            files=lambda: files,
        )
    ]


def _numbers(dtype: Any, path: Path | None) -> np.dtype[Any]:
    try:
        found: np.dtype[Any] = np.dtype(dtype)
    except TypeError:
        found = np.dtype(object)
    if found.kind in "buif" and found.itemsize <= 8:  # noqa: PLR2004
        return found
    problem = f"expected integers or floating numbers, got {dtype}"
    raise (
        TypeError(f"predict: image: {problem}") if path is None else UserError(f"{path}: {problem}")
    )


def _mapped(image: Any) -> list[Path]:
    """Files of a memory map, or of what it is a view of."""
    while isinstance(image, np.ndarray):
        if isinstance(image, np.memmap) and image.filename is not None:
            return [Path(image.filename).resolve()]
        image = image.base
    return []


def _from_tensor(image: Tensor) -> _Pixels:
    image = image.detach()
    if image.is_complex():
        raise TypeError(f"predict: image: expected integers or floating numbers, got {image.dtype}")
    foreign = image.is_floating_point() and image.dtype not in _PLAIN

    def fetch(index: Index) -> NDArray[Any]:
        part = image[index]
        return np.asarray((part.float() if foreign else part).cpu().numpy())

    return _Pixels(
        tuple(image.shape),
        torch.empty(0, dtype=torch.float32 if foreign else image.dtype).numpy().dtype,
        fetch,
        tensor=True,
        direct=image.device.type == "cpu" and not foreign,
    )


def _from_path(path: Path) -> list[_Pixels]:
    if path.is_dir():
        if not any((path / name).exists() for name in _ZARR_FILES):
            raise UserError(f"{path}: expected an image, got a folder that is no zarr")
        zarr = zarr_module(f"{path}: zarr")
        with _readable(path):
            opened = zarr.open(path, mode="r")
        return [_from_zarr(opened, path)]
    from ..data.files import _TIFF, image_header, read_image  # noqa: PLC0415 - needs more than torch

    image_header(path)  # says what is wrong with the file
    with path.open("rb") as file:
        if file.read(4) in _TIFF:
            return _from_tiff(path)
    pages = read_image(path)
    return [
        _Pixels(
            pages.shape,
            pages.dtype,
            pages.__getitem__,
            named="NCYX",
            direct=True,
            path=path,
            files=lambda: [path.resolve()],
        )
    ]


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Say in one line what readers raise of damaged files: anything."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"cannot read {path}: {why}") from error


def _from_tiff(path: Path) -> list[_Pixels]:
    """Open each series: its largest level, mapped where it lies in one piece, else by zarr."""
    from tifffile import PHOTOMETRIC, TiffFile  # noqa: PLC0415

    from ..data.files import _alphas, _Tiff, _unharmed  # noqa: PLC0415

    tiff = TiffFile(path, _multifile=False, is_mmstack=False)
    try:
        with _readable(path), _unharmed(path):
            picture = _Tiff(path, tiff)
            for series in picture.series:
                picture._check_complete(series)  # noqa: SLF001
    except UserError:
        tiff.close()
        raise
    weakref.finalize(picture, tiff.close)
    first = picture.first
    if first.photometric == PHOTOMETRIC.PALETTE:
        raise UserError(f"{path} has a palette: save as grey or RGB")
    found = []
    for series in picture.series:
        dtype = _numbers(series.dtype, path)
        slices, chunks = _tiff_slices(picture, series)
        fetch, grey = slices, dtype
        if first.photometric == PHOTOMETRIC.MINISWHITE and dtype.kind in "bu":
            white = dtype.type(2**first.bitspersample - 1)
            fetch = partial(_inverted, slices, white)
        if dtype == np.bool_:  # as read_image gives
            fetch, grey = partial(_stretched, fetch), np.dtype(np.uint8)
        shape = list(series.shape)
        if alphas := _alphas(series):
            shape[series.axes.index("S")] -= alphas
        found.append(
            _Pixels(
                tuple(shape),
                grey,
                fetch,
                chunks,
                named=series.axes,
                direct=chunks is None and fetch is slices,
                path=path,
                files=lambda: [path.resolve()],
            )
        )
    return found


def _inverted(fetch: Fetch, white: np.generic, index: Index) -> NDArray[Any]:
    return np.asarray(fetch(index) ^ white)


def _stretched(fetch: Fetch, index: Index) -> NDArray[Any]:
    return fetch(index) * np.uint8(255)


def _tiff_slices(picture: Any, series: Any) -> tuple[Fetch, tuple[int, ...] | None]:
    """Give what slices a series, and its chunks, None where it is mapped into memory.

    The file is open as long as `picture` lives.
    """
    tiff, page = series.parent, series.keyframe
    if series.dataoffset is not None and page.is_memmappable:
        mapped = mmap.mmap(tiff.filehandle.fileno(), 0, access=mmap.ACCESS_READ)
        dtype = page.dtype.newbyteorder(tiff.byteorder)
        pixels = np.ndarray(series.shape, dtype, mapped, series.dataoffset)

        def view(index: Index) -> NDArray[Any]:
            mapped.madvise(mmap.MADV_DONTNEED)  # or all rows read so far would stay resident
            return pixels[index]

        return view, None
    try:
        zarr = zarr_module("compressed TIFF")
    except UserError:
        zarr = None
    # tifffile's view by zarr fails on some images one pixel wide.
    if zarr is None or series.shape[series.axes.index("X")] == 1:
        return series.asarray().__getitem__, None
    array = zarr.open(series.aszarr(level=0), mode="r")

    def decoded(index: Index, _: Any = picture) -> NDArray[Any]:
        return np.asarray(array[index])

    return decoded, array.chunks


def _from_zarr(opened: Any, path: Path | None) -> _Pixels:
    """An array, or the largest level of a group with OME-Zarr's multiscales."""
    named: list[Any] | None = None
    if not hasattr(opened, "shape"):
        attributes = opened.attrs.asdict()
        scales = attributes.get("ome", attributes).get("multiscales")
        if not scales:
            problem = "expected a zarr array or an OME-Zarr image, got a group without multiscales"
            raise (
                UserError(f"{path}: {problem}")
                if path
                else ValueError(f"predict: image: {problem}")
            )
        with nullcontext() if path is None else _readable(path):
            opened = opened[scales[0]["datasets"][0]["path"]]
        # Before version 0.3 all five axes were always there, and none was named.
        named = scales[0].get("axes", list("tczyx"))
    else:
        named = getattr(opened.metadata, "dimension_names", None)
        named = named or opened.attrs.get("_ARRAY_DIMENSIONS")
    root = getattr(opened.store, "root", None)  # of a local store
    return _Pixels(
        tuple(opened.shape),
        _numbers(opened.dtype, path),
        lambda index: np.asarray(opened[index]),
        opened.chunks,
        named=_letters(named or []) if len(named or []) == opened.ndim else None,
        path=path,
        files=lambda: _all_files(Path(root, opened.path)) if root is not None else [],
    )


def _letters(names: Sequence[Any]) -> str | None:
    """A letter an axis, of OME's axes or plain names; None where one says nothing."""
    letters = ""
    for name in names:
        text = str(name.get("name") if isinstance(name, dict) else name).upper()
        text = {"TIME": "T", "CHANNEL": "C"}.get(text, text)
        if text not in _LETTERS or len(text) != 1:
            return None
        letters += text
    return letters


def _all_files(folder: Path) -> list[Path]:
    return sorted(Path(at, name).resolve() for at, _, names in os.walk(folder) for name in names)
