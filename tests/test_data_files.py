"""Reading and writing pictures: whatever is read is what was meant, or is refused in one line."""

from __future__ import annotations

import logging
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("imagecodecs")
tifffile = pytest.importorskip("tifffile")
Image = pytest.importorskip("PIL.Image")

import imagecodecs  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from PIL import ImageOps  # noqa: E402

from segfuse.data import (  # noqa: E402
    files,
    image_header,
    palette_of,
    read_image,
    read_labels,
    write_labels,
    write_scores,
)
from segfuse.errors import UserError  # noqa: E402

Array = NDArray[Any]
H, W = 24, 35


def numbers(*shape: int, dtype: Any = np.uint8) -> Array:
    return np.random.default_rng(shape).integers(0, 256, shape).astype(dtype)


GREY, COLOUR, STACK = numbers(H, W), numbers(H, W, 3), numbers(4, H, W)
DEEP = numbers(2, 3, 2, H, W, dtype=np.uint16) * np.uint16(257)
BITS = GREY > 128
COLOURMAP = numbers(3, 256, dtype=np.uint16) << 8


def planes(image: Array) -> Array:
    """(H, W) or (H, W, C) as (1, C, H, W)."""
    return np.atleast_3d(image).transpose(2, 0, 1)[None]


def png(path: Path, depth: int, colour: int, rows: Array) -> None:
    """A PNG of packed rows (H, bytes), as it stands in the standard."""
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", W, H, depth, colour, 0, 0, 0),
        b"IDAT": zlib.compress(raw),
        b"IEND": b"",
    }
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks.items()
        )
    )


def tiff(data: Array, **options: Any) -> Callable[[Path], None]:
    options = {"photometric": "minisblack"} | options
    return lambda path: tifffile.imwrite(path, data, **options)


def pillow(image: Array, mode: str | None = None, **options: Any) -> Callable[[Path], None]:
    picture = Image.fromarray(image)
    return lambda path: (picture.convert(mode) if mode else picture).save(path, **options)


def encoded(image: Array) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(imagecodecs.png_encode(image)) and None


def pages_by_pillow(path: Path) -> None:
    first, *more = (Image.fromarray(page) for page in STACK)
    first.save(path, save_all=True, append_images=more, compression="tiff_adobe_deflate")


def three_writes(path: Path) -> None:
    with tifffile.TiffWriter(path) as writer:
        for page in STACK:
            writer.write(page)


def pyramid(path: Path) -> None:
    with tifffile.TiffWriter(path) as writer:
        writer.write(GREY, subifds=1, metadata=None)
        writer.write(GREY[::2, ::2], subfiletype=1)
        writer.write(GREY[::4, ::4], subfiletype=1, metadata=None)  # a thumbnail beside it


alpha = numbers(H, W)
MEANT: dict[str, tuple[Callable[[Path], None], Array]] = {
    "stack.tif": (tiff(STACK), STACK[:, None]),
    "plain.tif": (tiff(STACK, metadata=None), STACK[:, None]),
    "big.tif": (tiff(STACK, bigtiff=True), STACK[:, None]),
    "motorola.tif": (tiff(DEEP[0, :, 0], byteorder=">"), DEEP[0, :, 0, None]),
    "imagej.tif": (
        tiff(DEEP, imagej=True, metadata={"axes": "TZCYX"}, photometric=None),
        DEEP.reshape(6, 2, H, W),
    ),
    "ome.ome.tif": (
        tiff(DEEP.transpose(0, 2, 1, 3, 4), metadata={"axes": "TCZYX"}),
        DEEP.reshape(6, 2, H, W),
    ),
    "channels.tif": (tiff(STACK, metadata={"axes": "CYX"}), STACK[None]),
    "samples.tif": (
        tiff(numbers(H, W, 5), planarconfig="contig"),
        planes(numbers(H, W, 5)),
    ),
    "rgb.tif": (tiff(COLOUR, photometric="rgb"), planes(COLOUR)),
    "planar.tif": (
        tiff(planes(COLOUR)[0], photometric="rgb", planarconfig="separate"),
        planes(COLOUR),
    ),
    "alpha.tif": (
        tiff(np.dstack([COLOUR, alpha]), photometric="rgb", extrasamples=["unassalpha"]),
        planes(COLOUR),
    ),
    "colours.tif": (
        tiff(numbers(5, H, W, 3), photometric="rgb", compression="zlib"),
        numbers(5, H, W, 3).transpose(0, 3, 1, 2),
    ),
    "lzw.tif": (tiff(STACK, compression="lzw", tile=(16, 16), predictor=True), STACK[:, None]),
    "zstd.tif": (tiff(STACK, compression="zstd"), STACK[:, None]),
    "palette.tif": (
        tiff(GREY, photometric="palette", colormap=COLOURMAP),
        (COLOURMAP >> 8).astype(np.uint8)[:, GREY][None],
    ),
    "white.tif": (tiff(GREY, photometric="miniswhite"), 255 - planes(GREY)),
    "white16.tif": (
        tiff(DEEP[0, 0, 0], photometric="miniswhite"),
        65535 - planes(DEEP[0, 0, 0]),
    ),
    "bits.tif": (tiff(BITS), planes(BITS) * np.uint8(255)),
    "packbits.tif": (pillow(BITS, compression="packbits"), planes(BITS) * np.uint8(255)),
    "half.tif": (tiff(GREY.astype(np.float16) / 8), planes(GREY) / np.float32(8)),
    "double.tif": (tiff(GREY / 8), planes(GREY) / np.float32(8)),
    "signed.tif": (tiff(GREY.astype(np.int16) - 99), planes(GREY).astype(np.float32) - 99),
    "long.tif": (tiff(GREY.astype(np.uint32)), planes(GREY).astype(np.float32)),
    "pillow.tif": (pages_by_pillow, STACK[:, None]),
    "series.tif": (three_writes, STACK[:, None]),
    "pyramid.tif": (pyramid, planes(GREY)),
    "png-by-name.tif": (lambda path: Image.fromarray(GREY).save(path, "PNG"), planes(GREY)),
    "grey.png": (pillow(GREY), planes(GREY)),
    "grey16.png": (pillow(DEEP[0, 0, 0]), planes(DEEP[0, 0, 0])),
    "rgb.png": (pillow(COLOUR), planes(COLOUR)),
    "rgba.png": (pillow(np.dstack([COLOUR, alpha])), planes(COLOUR)),
    "la.png": (pillow(np.dstack([GREY, alpha])), planes(GREY)),
    "bits.png": (pillow(BITS), planes(BITS) * np.uint8(255)),
    "palette.png": (
        pillow(GREY // 64 * 64, "P"),  # a palette of greys
        planes(np.dstack([GREY // 64 * 64] * 3)),
    ),
    "rgb16.png": (
        encoded(numbers(H, W, 3, dtype=np.uint16) * np.uint16(250)),
        planes(numbers(H, W, 3, dtype=np.uint16) * np.uint16(250)),
    ),
    "la16.png": (
        encoded(numbers(H, W, 2, dtype=np.uint16) * np.uint16(250)),
        planes(numbers(H, W, 2, dtype=np.uint16)[..., 0] * np.uint16(250)),
    ),
    "rgba16.png": (
        encoded(numbers(H, W, 4, dtype=np.uint16) * np.uint16(250)),
        planes(numbers(H, W, 4, dtype=np.uint16)[..., :3] * np.uint16(250)),
    ),
    "large.jpeg": (pillow(GREY, quality=100), planes(GREY)),
}


@pytest.mark.parametrize("name", MEANT)
def test_images_are_what_was_meant(tmp_path: Path, name: str) -> None:
    write, meant = MEANT[name]
    path = tmp_path / name
    write(path)
    image = read_image(path)
    assert image.shape == meant.shape
    assert image.dtype == (np.float32 if meant.dtype == np.float64 else meant.dtype)
    assert image.dtype.isnative
    assert image.flags.writeable
    difference = np.abs(image.astype(float) - meant.astype(float)).max()
    assert difference <= (16 if name.endswith("jpeg") else 0)
    assert image_header(path) == (*image.shape, image.dtype.name)


def test_colours_by_jpeg(tmp_path: Path) -> None:
    """Lossy, but in RGB, whichever colours the file keeps."""
    smooth = np.stack(np.broadcast_arrays(*np.ogrid[:128, :128], 40), -1).astype(np.uint8)
    jpeg = {"compression": "jpeg", "photometric": "rgb", "tile": (64, 64)}
    writers: dict[str, Callable[[Path], None]] = {
        "tiled.tif": tiff(smooth, **jpeg),
        "rgb.jpg": pillow(smooth, quality=95),
        "cmyk.jpg": pillow(smooth, "CMYK", quality=95),
    }
    for name, write in writers.items():
        write(tmp_path / name)
        image = read_image(tmp_path / name)
        assert image_header(tmp_path / name) == (1, 3, 128, 128, "uint8") == (*image.shape, "uint8")
        assert np.abs(image[0].astype(int) - planes(smooth)[0]).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_images_lie_as_they_are_seen(tmp_path: Path, suffix: str, orientation: int) -> None:
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    pillow(COLOUR, exif=exif)(path)
    with Image.open(path) as picture:
        seen = np.asarray(ImageOps.exif_transpose(picture))
    assert np.array_equal(read_image(path), planes(seen))
    assert image_header(path) == (1, 3, *seen.shape[:2], "uint8")
    if suffix == "png":
        pillow(GREY, exif=exif)(path)
        assert read_labels(path).shape == (1, *seen.shape[:2])


def test_damaged_exif_does_no_harm(tmp_path: Path) -> None:
    pillow(COLOUR, exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")(tmp_path / "a.jpg")
    assert read_image(tmp_path / "a.jpg").shape == (1, 3, H, W)


def test_large_pictures_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for name in ("a.png", "a.jpg"):
        pillow(COLOUR)(tmp_path / name)
        assert read_image(tmp_path / name).shape == (1, 3, H, W)


CUT = ["stack.tif", "plain.tif", "big.tif", "imagej.tif", "ome.ome.tif", "lzw.tif", "pillow.tif"]
CUT += ["grey.png", "rgb16.png", "palette.png", "large.jpeg"]


@pytest.mark.parametrize("name", CUT)
def test_what_is_cut_short_is_refused(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Any beginning of a file is refused, or holds all pixels: none are made up."""
    path = tmp_path / name
    MEANT[name][0](path)
    whole, pixels = path.read_bytes(), read_image(path)
    refusals = []
    for length in range(0, len(whole), max(len(whole) // 80, 1)):
        path.write_bytes(whole[:length])
        try:
            assert np.array_equal(read_image(path), pixels)
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > 60
    assert all(str(path) in refusal and "\n" not in refusal for refusal in refusals)
    assert capfd.readouterr() == ("", "")


def test_a_page_that_is_missing_from_ome_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, STACK, photometric="minisblack", metadata={"axes": "ZYX"})
    path.write_bytes(path.read_bytes().replace(b'SizeZ="4"', b'SizeZ="5"'))
    with pytest.raises(UserError, match="cut short"):
        read_image(path)


def test_a_file_of_an_ome_set_gives_its_own_pages(tmp_path: Path) -> None:
    uuids = [f"urn:uuid:00000000-0000-0000-0000-00000000000{index}" for index in range(2)]
    planes_ = "".join(
        f'<TiffData FirstZ="{index}" IFD="0" PlaneCount="1"><UUID FileName="{index}.ome.tif">'
        f"{uuid}</UUID></TiffData>"
        for index, uuid in enumerate(uuids)
    )
    for index, uuid in enumerate(uuids):
        xml = (
            f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{uuid}"><Image '
            f'ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint8" SizeX="{W}" '
            f'SizeY="{H}" SizeZ="2" SizeC="1" SizeT="1"><Channel ID="Channel:0:0" '
            f'SamplesPerPixel="1"/>{planes_}</Pixels></Image></OME>'
        )
        tifffile.imwrite(
            tmp_path / f"{index}.ome.tif", STACK[index], description=xml, metadata=None, ome=False
        )
    for index in range(2):
        assert np.array_equal(read_image(tmp_path / f"{index}.ome.tif"), STACK[index][None, None])


def mixed(path: Path) -> None:
    with tifffile.TiffWriter(path) as writer:
        writer.write(GREY)
        writer.write(GREY[:9])


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty.png": (lambda path: path.write_bytes(b""), "is empty"),
    "text.png": (lambda path: path.write_text("no picture"), "not a PNG, JPEG or TIFF picture"),
    "folder.tif": (lambda path: path.mkdir(), "Is a directory"),
    "missing.tif": (lambda path: None, "No such file"),
    "mixed.tif": (mixed, r"found 1 x 9 x 35, uint8; 1 x 24 x 35, uint8"),
    "complex.tif": (tiff(GREY.astype(np.complex64)), "complex64"),
    "ycbcr.tif": (pillow(COLOUR, "YCbCr"), "YCBCR"),
    "cmyk.tif": (pillow(COLOUR, "CMYK"), "SEPARATED"),
    "nan.tif": (tiff(np.where(BITS, np.nan, GREY)), "NaN"),
    "infinite.tif": (tiff(np.where(BITS, np.inf, GREY).astype(np.float32)), "infinity"),
    "beyond.tif": (tiff(GREY * 1e300), "beyond float32"),
    "flat.png": (lambda path: png(path, 8, 0, np.zeros((0, W), np.uint8)), "truncated"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(tmp_path: Path, name: str) -> None:
    write, reason = REFUSED[name]
    path = tmp_path / name
    write(path)
    with pytest.raises(UserError, match=reason) as error:
        read_image(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_warnings_of_tifffile_reach_those_who_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.tif"
    tiff(STACK, metadata=None)(path)
    path.write_bytes(path.read_bytes()[:-600])
    before = list(tifffile.logger().handlers)
    with caplog.at_level(logging.ERROR, "tifffile"), pytest.raises(UserError):
        read_image(path)
    assert tifffile.logger().handlers == before


# Labels


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_ids_of_few_bits(tmp_path: Path, depth: int) -> None:
    """Pillow would spread them over 0 to 255."""
    ids = GREY & np.uint8(2**depth - 1)
    bits = np.unpackbits(ids[..., None], axis=2)[..., 8 - depth :].reshape(H, -1)
    png(tmp_path / "a.png", depth, 0, np.packbits(bits, axis=1))
    assert np.array_equal(read_labels(tmp_path / "a.png"), ids[None])
    assert read_image(tmp_path / "a.png").max() == 255


IDS: dict[str, tuple[Callable[[Path], None], Array]] = {
    "grey.png": (pillow(GREY), GREY),
    "grey16.png": (pillow(DEEP[0, 0, 0]), DEEP[0, 0, 0]),
    "alpha.png": (pillow(np.dstack([GREY, alpha])), GREY),
    "rgb.png": (pillow(np.dstack([GREY] * 3)), GREY),
    "bits.png": (pillow(BITS), BITS.astype(np.uint8)),
    "bits.tif": (tiff(BITS, photometric="miniswhite"), BITS.astype(np.uint8)),
    "white.tif": (tiff(GREY, photometric="miniswhite"), GREY),
    "palette.tif": (tiff(GREY, photometric="palette", colormap=COLOURMAP), GREY),
    "float.tif": (tiff(GREY.astype(np.float32)), GREY.astype(np.int32)),
    "half.tif": (tiff(GREY.astype(np.float16)), GREY.astype(np.int32)),
    "signed.tif": (tiff(GREY.astype(np.int16) - 9), GREY.astype(np.int16) - 9),
    "long.tif": (tiff(GREY.astype(np.uint32) << 20), GREY.astype(np.uint32) << 20),
    "motorola.tif": (tiff(DEEP[0, 0, 0], byteorder=">"), DEEP[0, 0, 0]),
}


@pytest.mark.parametrize("name", IDS)
def test_labels_are_the_numbers_in_the_file(tmp_path: Path, name: str) -> None:
    write, ids = IDS[name]
    write(tmp_path / name)
    labels = read_labels(tmp_path / name)
    assert labels.dtype == ids.dtype
    assert np.array_equal(labels, ids[None])


@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        ("a.jpg", pillow(GREY), "JPEG, whose compression changes ids"),
        (
            "a.tif",
            tiff(
                np.kron(COLOUR, np.ones((4, 4, 1), np.uint8)), photometric="rgb", compression="jpeg"
            ),
            "JPEG, whose compression changes ids",
        ),
        ("a.png", pillow(COLOUR), "colours, not ids"),
        ("half.tif", tiff(GREY / 2), "no ids"),
        ("nan.tif", tiff(np.full((H, W), np.nan)), "no ids"),
        ("far.tif", tiff(np.full((H, W), 1e12)), "no ids"),
    ],
)
def test_labels_refused(
    tmp_path: Path, name: str, write: Callable[[Path], None], reason: str
) -> None:
    write(tmp_path / name)
    with pytest.raises(UserError, match=reason):
        read_labels(tmp_path / name)


# Writing


@pytest.mark.parametrize("pages", [1, 3, 4])
@pytest.mark.parametrize(
    ("dtype", "top", "back"),
    [
        (np.bool_, 1, np.uint8),
        (np.uint8, 255, np.uint8),
        (np.uint16, 255, np.uint16),
        (np.int64, 255, np.uint8),
        (np.int64, 65535, np.uint16),
        (np.int32, 70000, np.uint32),
    ],
)
def test_labels_come_back(tmp_path: Path, pages: int, dtype: Any, top: int, back: Any) -> None:
    labels = (numbers(pages, H, W, dtype=np.int64) * top // 255).astype(dtype)
    labels.flat[0] = top
    for suffix in ("tif", "png") if pages == 1 and top < 2**16 else ("tif",):
        path = tmp_path / f"a.{suffix}"
        write_labels(path, labels)
        result = read_labels(path)
        assert result.dtype == back
        assert np.array_equal(result, labels)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with tifffile.TiffFile(tmp_path / "a.tif") as written:
        assert len(written.pages) == pages  # what ImageJ takes for a stack
        assert written.pages.first.compression == tifffile.COMPRESSION.ADOBE_DEFLATE


def test_negative_labels_come_back(tmp_path: Path) -> None:
    labels = numbers(1, H, W, dtype=np.int16) - 5
    write_labels(tmp_path / "a.tif", labels)
    assert np.array_equal(read_labels(tmp_path / "a.tif"), labels)


def test_palettes_come_back(tmp_path: Path) -> None:
    palette = numbers(768).tolist()
    labels = numbers(1, H, W, dtype=np.int64)
    write_labels(tmp_path / "a.png", labels, palette=palette)
    assert palette_of(tmp_path / "a.png") == palette
    assert np.array_equal(read_labels(tmp_path / "a.png"), labels)
    assert image_header(tmp_path / "a.png") == (1, 3, H, W, "uint8")
    write_labels(tmp_path / "b.png", labels % 2, palette=palette[:6])
    assert palette_of(tmp_path / "b.png") == palette[:6] + [0] * 762
    write_labels(tmp_path / "c.png", labels)
    write_labels(tmp_path / "d.tif", labels)
    assert palette_of(tmp_path / "c.png") is palette_of(tmp_path / "d.tif") is None


@pytest.mark.parametrize("pages", [1, 2])
@pytest.mark.parametrize("classes", [1, 2, 3, 5])
@pytest.mark.parametrize("big", [False, True])
def test_scores_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages: int, classes: int, big: bool
) -> None:
    if big:
        monkeypatch.setattr(files, "_IMAGEJ_LIMIT", 0)
    scores = np.random.default_rng(0).normal(size=(pages, classes, H, W)).astype(np.float32)
    write_scores(tmp_path / "a.tif", scores)
    assert np.array_equal(read_image(tmp_path / "a.tif"), scores)
    with tifffile.TiffFile(tmp_path / "a.tif") as written:
        assert written.is_bigtiff == big
        assert written.is_imagej != big


@pytest.mark.parametrize(
    ("name", "labels", "options", "reason"),
    [
        ("a.png", STACK, {}, "one page"),
        ("a.png", np.full((1, 2, 2), 65536), {}, "0 to 65535"),
        ("a.png", np.full((1, 2, 2), -1), {}, "0 to 65535"),
        ("a.png", np.full((1, 2, 2), 256), {"palette": [0] * 768}, "0 to 255"),
        ("a.tif", GREY, {}, r"expected integers \(P, H, W\)"),
        ("a.tif", STACK.astype(float), {}, "expected integers"),
        ("a.bmp", STACK, {}, ".png or .tif"),
    ],
)
def test_labels_that_cannot_be_written(
    tmp_path: Path, name: str, labels: Array, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        write_labels(tmp_path / name, labels, **options)
    assert list(tmp_path.iterdir()) == []


def test_scores_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected float32"):
        write_scores(tmp_path / "a.tif", np.zeros((1, 2, 3, 4)))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cannot write"):
        write_scores(tmp_path / "no" / "a.tif", np.zeros((1, 2, 3, 4), np.float32))
