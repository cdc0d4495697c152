"""Pictures of images and of labels: PNG, JPEG and TIFF read into arrays, and arrays written.

What a file is, its first bytes say, not its name. A picture is a stack of P pages: P is 1 but for
TIFF, where all axes but channel, row and column, and then the series, are counted as pages, in the
order of the file.

PNG and JPEG are read by Pillow, TIFF by tifffile.  Both would rather give something than nothing;
here a file that is cut short or whose pages are missing is refused.
"""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any, Protocol

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from tifffile import COMPRESSION, EXTRASAMPLE, PHOTOMETRIC

from ..errors import UserError
from ..files import whole

__all__ = [
    "IMAGE_SUFFIXES",
    "image_header",
    "palette_of",
    "read_image",
    "read_labels",
    "write_labels",
    "write_maps",
    "write_scores",
]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")  # in any case; .ome.tif among them

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_STACK = 3  # axes (P, H, W)
_ORIENTATION, _TURNED = 0x0112, {5, 6, 7, 8}  # EXIF's tag; its values that swap rows and columns
_ALPHA = {EXTRASAMPLE.ASSOCALPHA, EXTRASAMPLE.UNASSALPHA}
_COLOURS = {
    PHOTOMETRIC.MINISWHITE,
    PHOTOMETRIC.MINISBLACK,
    PHOTOMETRIC.RGB,
    PHOTOMETRIC.PALETTE,
}
_LOSSY = "whose compression changes ids: labels are kept as PNG, or as TIFF without it"
_IMAGEJ_LIMIT = 2**32 - 2**25  # bytes that fit into ImageJ's TIFF


def read_image(path: str | Path) -> NDArray[Any]:
    """Read an image.

    Colours by palette become RGB, alpha is dropped, CMYK becomes RGB, and 0-is-white TIFF is
    inverted. An EXIF orientation is applied, so that rows and columns are those that whoever drew
    the labels saw.

    Returns:
        (P, C, H, W), writable, maybe not contiguous: C is 1 for grey, 3 for RGB, or the channels
        that the metadata of a TIFF name; uint8 (1-bit pictures as 0 and 255), uint16, or float32
        for all other numbers.

    Raises:
        UserError: the file cannot be read, is damaged, holds no pixels, NaN or infinity, or a kind
            of pixels that is none of these.
    """
    with _opened(path) as picture:
        image = _as_image(picture.image())
        if image.dtype == np.float32 and not all(np.isfinite(page).all() for page in image):
            raise UserError(f"{path} holds NaN, infinity or numbers beyond float32")
        return image


def read_labels(path: str | Path) -> NDArray[Any]:
    """Read a picture of labels: the numbers that are in the file.

    Pictures with a palette give its indices, 1-bit pictures 0 and 1, floating numbers int32. RGB
    whose channels are equal counts as grey. EXIF orientation is applied as to images.

    Returns:
        (P, H, W), an integer dtype.

    Raises:
        UserError: the file cannot be read, is damaged, or its numbers cannot be ids: colours, parts
            of integers, or JPEG, which changes them.
    """
    with _opened(path) as picture:
        return _as_labels(picture.labels(), path)


def image_header(path: str | Path) -> tuple[int, int, int, int, str]:
    """Give P, C, H, W and the name of the dtype that `read_image` would, without decoding pixels.

    Raises:
        UserError: the file cannot be read, or its first bytes already show damage.
    """
    with _opened(path) as picture:
        shape, dtype = picture.header()
        return *shape, _as_image(np.empty((0, 1, 1, 1), dtype)).dtype.name


def palette_of(path: str | Path) -> list[int] | None:
    """Give the palette of a PNG as 768 numbers, red, green, blue of index 0 to 255; None without.

    Raises:
        UserError: the file cannot be read.
    """
    with _opened(path) as picture:
        return picture.palette()


def write_labels(path: Path, labels: NDArray[Any], *, palette: Sequence[int] | None = None) -> None:
    """Write labels, as ".png" (one page, ids 0 to 65535) or as ".tif" (zlib).

    uint8 and uint16 stay what they are; of other dtypes, ids from 0 on become the narrowest that
    holds them.

    Args:
        path: its suffix says which.
        labels: (P, H, W), integers or bool.
        palette: up to 768 numbers, red, green, blue of id 0 to 255: makes a PNG with a palette; of
            no effect on TIFF.

    Raises:
        ValueError: labels or a suffix that the format cannot take.
        UserError: the file system refuses.
    """
    if labels.ndim != _STACK or labels.size == 0 or labels.dtype.kind not in "bui":
        raise ValueError(f"labels: expected integers (P, H, W), got {labels.dtype} {labels.shape}")
    least, most = int(labels.min()), int(labels.max())
    if least >= 0 and labels.dtype.name not in {"uint8", "uint16"}:
        labels = labels.astype(np.min_scalar_type(most))
    if path.suffix.lower() == ".png":
        highest = 65535 if palette is None else 255
        if len(labels) > 1 or least < 0 or most > highest:
            raise ValueError(
                f"labels: a PNG takes one page of ids 0 to {highest}, got {len(labels)} of {least} "
                f"to {most}: write .tif"
            )
        picture = Image.fromarray(labels[0] if palette is None else labels[0].astype(np.uint8))
        if palette is not None:
            picture.putpalette(_filled(palette))
        with whole(path) as partial:
            picture.save(partial, format="PNG")
    elif path.suffix.lower() in {".tif", ".tiff"}:
        _write_pages(path, labels)
    else:
        raise ValueError(f"path: expected .png or .tif, got {path.name}")


def write_scores(path: Path, scores: NDArray[np.float32]) -> None:
    """Write scores (P, K, H, W), float32, as a TIFF whose K are channels, an ImageJ hyperstack.

    Above 4 GB, where ImageJ's format ends, it becomes a BigTIFF with the same axes.

    Raises:
        ValueError: scores of another shape or dtype.
        UserError: the file system refuses.
    """
    if scores.ndim != _STACK + 1 or scores.size == 0 or scores.dtype != np.float32:
        raise ValueError(
            f"scores: expected float32 (P, K, H, W), got {scores.dtype} {scores.shape}"
        )
    imagej = scores.nbytes < _IMAGEJ_LIMIT
    with whole(path) as partial:
        tifffile.imwrite(
            partial,
            scores,
            imagej=imagej,
            bigtiff=not imagej,
            photometric="minisblack",
            metadata={"axes": "ZCYX"},
        )


def write_maps(path: Path, maps: NDArray[np.float32]) -> None:
    """Write maps (P, H, W), float32, such as weights, as a TIFF (zlib).

    Raises:
        ValueError: maps of another shape or dtype.
        UserError: the file system refuses.
    """
    if maps.ndim != _STACK or maps.size == 0 or maps.dtype != np.float32:
        raise ValueError(f"maps: expected float32 (P, H, W), got {maps.dtype} {maps.shape}")
    _write_pages(path, maps)


def _write_pages(path: Path, pages: NDArray[Any]) -> None:
    axes, pages = ("ZYX", pages) if len(pages) > 1 else ("YX", pages[0])
    with whole(path) as partial:
        tifffile.imwrite(
            partial, pages, photometric="minisblack", compression="zlib", metadata={"axes": axes}
        )


class _Picture(Protocol):
    """An open file."""

    def header(self) -> tuple[tuple[int, int, int, int], np.dtype[Any]]:
        """Shape (P, C, H, W) and dtype of `image`."""

    def image(self) -> NDArray[Any]:
        """(P, C, H, W), any dtype, as it is seen."""

    def labels(self) -> NDArray[Any]:
        """(P, C, H, W), any dtype, the numbers in the file."""

    def palette(self) -> list[int] | None:
        """As `palette_of`."""


@contextmanager
def _opened(path: str | Path) -> Iterator[_Picture]:
    """Lend the open file; whatever goes wrong in the block is said in one line."""
    try:
        with Path(path).open("rb") as file, _unharmed(path):
            yield _picture(path, file)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or _line(error)}") from error
    except Exception as error:  # damaged files make the readers raise anything
        raise UserError(f"cannot read {path}: {_line(error)}") from error


def _picture(path: str | Path, file: IO[bytes]) -> _Picture:
    head = file.read(26)
    file.seek(0)
    picture: _Picture
    if head.startswith(_TIFF):
        picture = _Tiff(path, tifffile.TiffFile(file, _multifile=False, is_mmstack=False))
    elif head.startswith((_PNG, _JPEG)):
        picture = _Plain(path, file, head)
    else:
        raise UserError(f"{path} is {'not a PNG, JPEG or TIFF picture' if head else 'empty'}")
    if 0 in picture.header()[0]:
        raise UserError(f"{path} holds no pixels")
    return picture


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def _unharmed(path: str | Path) -> Iterator[None]:
    """Make errors of what tifffile logs in the block, by this thread, and keep it off stderr."""
    found: list[str] = []

    class Errors(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.thread == threading.get_ident() and record.levelno >= logging.ERROR:
                found.append(re.sub(r"<tifffile[^>]*> *", "", record.getMessage()))

    handler = Errors()
    tifffile.logger().addHandler(handler)
    try:
        yield
    finally:
        tifffile.logger().removeHandler(handler)
    if found:
        raise UserError(f"{path} is damaged: {found[0][:200]}")


class _Plain:
    """PNG or JPEG.

    Pillow's classes are called as they are, since `PIL.Image.open` refuses large pictures.
    """

    def __init__(self, path: str | Path, file: IO[bytes], head: bytes) -> None:
        self.path, self.file = path, file
        self.png = head.startswith(_PNG)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Corrupt EXIF data")
            self.opened = PngImageFile(file) if self.png else JpegImageFile(file)
            self.orientation = _orientation(self.opened)
        depth, colour = (head[24], head[25]) if self.png else (8, 0)
        self.grey = colour in {0, 4} if self.png else self.opened.mode == "L"
        self.dtype = np.dtype(np.uint8 if depth <= 8 else np.uint16)  # noqa: PLR2004
        self.cut = self.dtype != np.uint8 and colour != 0  # Pillow makes 16-bit colours 8-bit
        self.spread = {2: 85, 4: 17}.get(depth, 1) if colour == 0 else 1  # Pillow's, over 8 bits

    def header(self) -> tuple[tuple[int, int, int, int], np.dtype[Any]]:
        width, height = self.opened.size
        if self.orientation in _TURNED:
            width, height = height, width
        return (1, 1 if self.grey else 3, height, width), self.dtype

    def image(self) -> NDArray[Any]:
        if self.opened.mode == "1":
            return self._samples(None).astype(bool)
        return self._samples("RGB" if self.opened.mode in {"P", "CMYK"} else None)

    def labels(self) -> NDArray[Any]:
        if not self.png:
            raise UserError(f"{self.path} is a JPEG, {_LOSSY}")
        ids = self._samples(None)
        return ids if self.spread == 1 else ids // self.spread

    def palette(self) -> list[int] | None:
        if self.opened.palette is None:
            return None
        return _filled(self.opened.palette.getdata()[1])

    def _samples(self, mode: str | None) -> NDArray[Any]:
        """(1, C, H, W), upright and without alpha, converted to a mode of Pillow's."""
        samples: NDArray[Any]
        if self.cut:
            self.file.seek(0)
            samples = imagecodecs.png_decode(self.file.read())
        else:
            self.opened.load()  # within `asarray` NumPy might hide what it raises
            samples = np.asarray(self.opened if mode is None else self.opened.convert(mode))
        samples = np.atleast_3d(samples)[..., : 1 if self.grey else 3]
        if self.orientation in _TURNED:
            samples = samples.swapaxes(0, 1)
        across = -1 if self.orientation in {2, 3, 6, 7} else 1
        down = -1 if self.orientation in {3, 4, 7, 8} else 1
        upright = samples[::down, ::across].transpose(2, 0, 1)[None]
        return np.array(upright, self.dtype, order="C")  # Pillow's own memory is read-only


def _filled(colours: Sequence[int]) -> list[int]:
    """768 numbers of a palette, black where it is shorter."""
    return [*colours, *[0] * (3 * 256 - len(colours))]


def _orientation(picture: Image.Image) -> int:
    """EXIF's number from 1 to 8; 1 where there is none or it is damaged."""
    if "exif" not in picture.info:  # or `getexif` would look for it in the pixels of a PNG
        return 1
    try:
        orientation = int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001 - Pillow's parser raises anything
        return 1
    return orientation if 1 <= orientation <= 8 else 1  # noqa: PLR2004


class _Tiff:
    """TIFF, its reduced pages (pyramids, thumbnails) left out.

    A file of a set that refer to each other (OME, Micro-Manager) gives its own pages, since all
    files of the set are found in the folder.
    """

    def __init__(self, path: str | Path, tiff: tifffile.TiffFile) -> None:
        self.path = path
        self.size = tiff.filehandle.size
        own = [series for series in tiff.series if not series.keyframe.is_reduced]
        self.series = own or list(tiff.series)
        layouts = {self._layout(series)[1:] for series in self.series}
        if len(layouts) != 1:
            found = "; ".join(f"{c} x {h} x {w}, {dtype}" for c, h, w, dtype in sorted(layouts))
            raise UserError(
                f"{path}: expected pages of one shape (channels x rows x columns) and dtype, found "
                f"{found or 'none'}"
            )
        self.first = self.series[0].keyframe
        self.colours: NDArray[np.uint8] | None = None  # (3, colours)
        if self.first.photometric == PHOTOMETRIC.PALETTE and self.header()[0][1] == 1:
            colours = np.asarray(self.first.colormap)
            high = colours.max() > np.iinfo(np.uint8).max  # some writers give 8 bits of the 16
            self.colours = (colours >> 8 if high else colours).astype(np.uint8)

    def header(self) -> tuple[tuple[int, int, int, int], np.dtype[Any]]:
        pages = sum(self._layout(series)[0] for series in self.series)
        _, channels, height, width, dtype = self._layout(self.series[0])
        if self.colours is not None:
            return (pages, 3, height, width), self.colours.dtype
        return (pages, channels, height, width), np.dtype(dtype)

    def image(self) -> NDArray[Any]:
        samples = self._samples()
        if self.colours is not None:
            return self.colours[:, samples[:, 0]].swapaxes(0, 1)
        if self.first.photometric == PHOTOMETRIC.MINISWHITE and samples.dtype.kind in "bu":
            samples ^= samples.dtype.type(2**self.first.bitspersample - 1)
        return samples

    def labels(self) -> NDArray[Any]:
        if self.first.compression == COMPRESSION.JPEG:
            raise UserError(f"{self.path} is compressed by JPEG, {_LOSSY}")
        return self._samples()

    def palette(self) -> list[int] | None:
        return None

    def _samples(self) -> NDArray[Any]:
        """(P, C, H, W), in the machine's byte order, without alpha."""
        parts = [self._read(series) for series in self.series]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _layout(self, series: tifffile.TiffPageSeries) -> tuple[int, int, int, int, str]:
        """Pages, channels, height, width, dtype."""
        first, axes = series.keyframe, series.axes
        colour, compression = first.photometric, first.compression
        decoded = colour == PHOTOMETRIC.YCBCR and compression == COMPRESSION.JPEG  # into RGB
        if colour not in _COLOURS and not decoded:
            raise UserError(
                f"{self.path} has TIFF colours {getattr(colour, 'name', colour)}: save as "
                "grey or RGB"
            )
        if axes.count("Y") != 1 or axes.count("X") != 1:
            raise UserError(f"{self.path}: expected axes with Y and X, found {axes}")
        sizes = dict(zip(axes, series.shape, strict=True))
        channels = sizes.pop("C", 1) * (sizes.pop("S", 1) - _alphas(series))
        height, width = sizes.pop("Y"), sizes.pop("X")
        return prod(sizes.values()), channels, height, width, np.dtype(series.dtype).name

    def _read(self, series: tifffile.TiffPageSeries) -> NDArray[Any]:
        self._check_complete(series)
        samples, axes = series.asarray(), series.axes
        if alphas := _alphas(series):
            samples = samples[(slice(None),) * axes.index("S") + (slice(-alphas),)]
        last = [axes.index(axis) for axis in "CSYX" if axis in axes]
        order = [axis for axis in range(len(axes)) if axis not in last] + last
        *shape, dtype = self._layout(series)
        return samples.transpose(order).reshape(shape).astype(dtype, copy=False)

    def _check_complete(self, series: tifffile.TiffPageSeries) -> None:
        """Refuse missing parts, for which tifffile would give zeros."""
        complete = series.dataoffset is None or series.dataoffset + series.nbytes <= self.size
        for page in series.pages:
            parts = () if page is None else (page.dataoffsets, page.databytecounts)
            complete = (
                complete
                and len(set(map(len, parts))) == 1
                and all(
                    count > 0 and offset > 0 and offset + count <= self.size
                    for offset, count in zip(*parts, strict=True)
                )
            )
        if not complete:
            raise UserError(f"{self.path} is cut short: parts of its pages are missing")


def _alphas(series: tifffile.TiffPageSeries) -> int:
    """How many of the last samples are alpha."""
    return sum(sample in _ALPHA for sample in series.keyframe.extrasamples if "S" in series.axes)


def _as_image(samples: NDArray[Any]) -> NDArray[Any]:
    """uint8, uint16 or float32."""
    dtype = samples.dtype
    if dtype == np.bool_:
        return samples * np.uint8(255)
    if dtype in {np.dtype(np.uint8), np.dtype(np.uint16)}:
        return samples
    if dtype.kind not in "iuf":
        raise TypeError(f"pixels are {dtype}, expected integers or floating numbers")
    with np.errstate(over="ignore"):
        return samples.astype(np.float32, copy=False)


def _as_labels(samples: NDArray[Any], path: str | Path) -> NDArray[Any]:
    """(P, H, W), integers."""
    labels: NDArray[Any] = samples[:, 0]
    if any((labels != samples[:, channel]).any() for channel in range(1, samples.shape[1])):
        raise UserError(
            f"{path} holds colours, not ids: labels are kept as one number a pixel, in a grey or "
            "palette picture"
        )
    if labels.dtype == np.bool_:
        return labels.astype(np.uint8)
    if labels.dtype.kind in "iu":
        return labels
    if labels.dtype.kind == "f" and (np.abs(labels.astype(np.float64)) < 2**31).all():  # no NaN
        ids = labels.astype(np.int32)
        if (ids == labels).all():
            return ids
    raise UserError(f"{path} holds {labels.dtype} numbers that are no ids: expected integers")
