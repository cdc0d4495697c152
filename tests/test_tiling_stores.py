"""Images read and results written by bands of rows."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from random import Random, uniform
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torch import nn

import segfuse
from segfuse.data.files import read_image
from segfuse.errors import UserError
from segfuse.tiling import sources as sources_module
from segfuse.tiling.sources import Source, sources
from segfuse.tiling.targets import ArrayTarget, Target, open_target

zarr = pytest.importorskip("zarr", minversion="3.0.8")
da = pytest.importorskip("dask.array")

Shape = tuple[int, ...]


def numbers(shape: Shape, dtype: Any = np.uint16) -> NDArray[Any]:
    return np.random.default_rng(0).integers(0, 250, shape).astype(dtype)


def only(image: Any, **options: Any) -> Source:
    found, batch = sources(image, **{"axes": None, "channels": None, "dims": 2} | options)
    assert len(found) == 1
    assert not batch
    return found[0]


def in_bands(source: Source, height: int, overlap: int) -> NDArray[Any]:
    """The whole image from bands that overlap, as tiles' do."""
    rows = source.shape[1]
    parts = []
    for start in range(0, rows, height):
        first, stop = max(0, start - overlap), min(rows, start + height)
        band = source.read(first, stop)
        assert band.shape == (source.shape[0], stop - first, *source.shape[2:])
        assert band.dtype == source.dtype
        assert band.dtype.isnative
        parts.append(band[:, start - first :].copy())
    return np.concatenate(parts, axis=1)


def zarr_array(folder: Path, pixels: NDArray[Any], chunks: Shape, **options: Any) -> Any:
    array = zarr.create_array(
        folder, shape=pixels.shape, dtype=pixels.dtype, chunks=chunks, **options
    )
    array[...] = pixels
    return array


def as_memmap(pixels: NDArray[Any], folder: Path) -> Any:
    np.save(folder / "image.npy", pixels)
    return np.load(folder / "image.npy", mmap_mode="r")


def as_tiff(pixels: NDArray[Any], folder: Path, **options: Any) -> Path:
    path = folder / "image.tif"
    options = {"photometric": "minisblack", "metadata": {"axes": "YXC"}} | options
    if options["metadata"]["axes"] == "YXC":
        pixels, options["metadata"] = np.moveaxis(pixels, -1, 0), {"axes": "CYX"}
    tifffile.imwrite(path, pixels, **options)
    return path


def ome_zarr(pixels: NDArray[Any], folder: Path, version: str = "0.5") -> Path:
    path = folder / "image.zarr"
    group = zarr.create_group(path, zarr_format=3 if version == "0.5" else 2)
    array = group.create_array("full", shape=pixels.shape, dtype=pixels.dtype, chunks=(16, 8, 3))
    array[...] = pixels
    scales = [
        {
            "axes": [{"name": "y"}, {"name": "x"}, {"name": "channel", "type": "channel"}],
            "datasets": [{"path": "full"}],
        }
    ]
    group.attrs.update(
        {"ome": {"multiscales": scales}} if version == "0.5" else {"multiscales": scales}
    )
    return path


def aszarr(pixels: NDArray[Any], folder: Path) -> Any:
    return tifffile.imread(as_tiff(pixels, folder, tile=(16, 32), compression="zlib"), aszarr=True)


KINDS: dict[str, Callable[[NDArray[Any], Path], Any]] = {
    "numpy": lambda pixels, _: pixels,
    "strided": lambda pixels, _: np.repeat(pixels, 2, axis=1)[::-1, ::2][::-1],
    "memmap": as_memmap,
    "tensor": lambda pixels, _: torch.from_numpy(np.moveaxis(pixels, -1, 0).copy()),
    "zarr array": lambda pixels, folder: zarr_array(folder / "a.zarr", pixels, (16, 16, 1)),
    "zarr path": lambda pixels, folder: (
        zarr_array(folder / "a.zarr", pixels, (16, 16, 1)) and folder / "a.zarr"
    ),
    "sharded": lambda pixels, folder: zarr_array(
        folder / "a.zarr", pixels, (16, 16, 1), shards=(32, 32, 3)
    ),
    "dimension names": lambda pixels, folder: zarr_array(
        folder / "a.zarr", np.moveaxis(pixels, -1, 0), (1, 16, 16), dimension_names=("c", "y", "x")
    ),
    "OME-Zarr 0.4": lambda pixels, folder: ome_zarr(pixels, folder, "0.4"),
    "OME-Zarr 0.5": ome_zarr,
    "dask": lambda pixels, _: da.from_array(pixels, chunks=((10, 30, 10, 3), 20, 2)),
    "tiles": lambda pixels, folder: as_tiff(pixels, folder, tile=(16, 32), compression="zlib"),
    "strips": lambda pixels, folder: as_tiff(pixels, folder, rowsperstrip=7, compression="zlib"),
    "one strip": lambda pixels, folder: as_tiff(
        pixels, folder, rowsperstrip=10**6, compression="zlib"
    ),
    "mapped": as_tiff,
    "mapped, big-endian": lambda pixels, folder: as_tiff(pixels, folder, byteorder=">"),
    "aszarr": lambda pixels, folder: zarr.open(aszarr(pixels, folder), mode="r"),
    "aszarr store": aszarr,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "overlap"), [(8, 11), (20, 0), (53, 0)])
def test_every_source_reads_what_numpy_does(
    kind: str, height: int, overlap: int, tmp_path: Path
) -> None:
    pixels = numbers((53, 47, 3))
    image = KINDS[kind](pixels, tmp_path)
    source = only(image, channels=3)
    assert source.shape == (3, 53, 47)
    assert source.dtype == np.uint16
    want = np.moveaxis(pixels, -1, 0)
    assert (in_bands(source, height, overlap) == want).all()
    assert source.identity() == only(image, channels=3).identity()
    assert (in_bands(source, height, overlap) == want).all()  # from the top again
    with pytest.raises(ValueError, match="within 0 to 53, got 50 to 54"):
        source.read(50, 54)
    if "aszarr" in kind:  # tifffile leaves it to whoever opened it
        getattr(image, "store", image).close()


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_bands_of_any_kind_by_any_axes(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 3))
    spatial = "ZYX"[3 - dims :]
    others = data.draw(st.lists(st.sampled_from("NTCS"), unique=True, max_size=3))
    axes = "".join(data.draw(st.permutations([*spatial, *others])))
    shape = tuple(data.draw(st.integers(1, 9)) for _ in axes)
    pixels = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    chunks = tuple(data.draw(st.integers(1, n)) for n in shape)
    image = data.draw(
        st.sampled_from([pixels, torch.from_numpy(pixels), da.from_array(pixels, chunks=chunks)])
    )
    found, batch = sources(image, axes=axes.lower(), channels=None, dims=dims)
    assert batch == bool(set(axes) & set("NT"))
    counting = [a for a in axes if a in "NT"]
    channel = [a for a in axes if a in "CS"]
    order = [*counting, *channel, *spatial]
    want = pixels.transpose([axes.index(a) for a in order])
    size = want.shape[len(want.shape) - dims :]
    want = want.reshape(len(found), -1, *size)
    for source, image_ in zip(found, want, strict=True):
        assert source.shape == image_.shape
        for _ in range(4):
            start = data.draw(st.integers(0, size[0]))
            stop = data.draw(st.integers(start, size[0]))
            assert (source.read(start, stop) == image_[:, start:stop]).all()
    if isinstance(image, np.ndarray):
        assert len({source.identity() for source in found}) == len(found)


def test_views_are_given_where_nothing_need_be_copied(tmp_path: Path) -> None:
    pixels = numbers((9, 8, 3))
    for image in (pixels, torch.from_numpy(pixels), as_memmap(pixels, tmp_path)):
        source = only(image, axes="YXC")
        assert source.direct
        assert np.shares_memory(source.read(2, 5), np.asarray(image))
    assert only(as_tiff(pixels, tmp_path)).direct
    assert not only(pixels.astype(">u2")).direct
    assert not only(da.from_array(pixels)).direct


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint32", "int64", "float16", "float64", ">f4"])
def test_dtypes_are_passed_on_in_native_order(dtype: str, tmp_path: Path) -> None:
    pixels = numbers((7, 8), dtype)
    for image in (pixels, zarr_array(tmp_path / "a", pixels, (2, 8)), da.from_array(pixels)):
        source = only(image)
        assert source.dtype == np.dtype(dtype).newbyteorder("=")
        assert source.read(1, 4).dtype == source.dtype
        assert (source.read(1, 4) == pixels[None, 1:4]).all()


def test_flags_become_numbers_and_odd_floats_float32() -> None:
    flags = numbers((7, 8)) > 100
    for image in (flags, torch.from_numpy(flags), da.from_array(flags)):
        source = only(image)
        assert source.dtype == source.read(0, 7).dtype == np.uint8
        assert (source.read(0, 7) == flags).all()
    halves = torch.from_numpy(numbers((7, 8), np.float32)).bfloat16()
    assert (only(halves).read(0, 7) == halves.float().numpy()).all()
    assert only(halves).dtype == np.float32


@pytest.mark.parametrize(
    ("image", "options", "error", "message"),
    [
        ([[1]], {}, TypeError, "expected a path, a tensor or an array, got list"),
        (np.ones((3, 4), complex), {}, TypeError, "floating numbers, got complex128"),
        (torch.ones(3, 4, dtype=torch.complex64), {}, TypeError, "got torch.complex64"),
        (np.ones((3, 4), "M8[s]"), {}, TypeError, "floating numbers, got datetime64"),
        (np.ones((3, 0)), {}, ValueError, r"of one pixel or more, got shape \(3, 0\)"),
        (
            np.ones((3, 5, 6)),
            {"channels": 3},
            ValueError,
            r"an array \(Y, X, 3\), got shape \(3, 5, 6\); .* axes=\"CYX\"",
        ),
        (np.ones((3, 5, 3)), {"channels": 3}, ValueError, r'axes="CYX"'),
        (np.ones((9, 5, 6)), {"channels": 1}, ValueError, r'\(Y, X\) or \(Y, X, 1\).*axes="ZYX"'),
        (np.ones((9, 5)), {"channels": 3}, ValueError, r"array \(Y, X, 3\), got shape \(9, 5\)"),
        (np.ones((9, 5, 6, 3)), {"channels": 3}, ValueError, r'axes="ZYXC"'),
        (np.ones((9, 3, 6, 5)), {"channels": 3}, ValueError, r'axes="ZCYX"'),
        (np.ones((9, 5, 6, 5)), {"channels": 1, "dims": 3}, ValueError, r'axes="NZYX"'),
        (torch.ones(9, 5), {"channels": 3}, ValueError, r"tensor \(3, Y, X\) or \(N, 3, Y, X\)"),
        (torch.ones(2, 9, 5), {"channels": 3}, ValueError, r"3 channels, .*, got 2"),
        (np.ones((9, 5)), {"axes": "YXC"}, ValueError, "an axis for each letter of axes='YXC'"),
        (np.ones((9, 5)), {"axes": "YY"}, ValueError, "axes: expected distinct letters"),
        (np.ones((9, 5)), {"axes": "YZ"}, ValueError, "with Y, X among them, got 'YZ'"),
        (np.ones((9, 5)), {"axes": "YQ"}, ValueError, "letters of N, T, Z, Y, X, C, S"),
        (np.ones((9, 5)), {"axes": "", "dims": 1}, ValueError, "with X among them"),
        (np.ones((4, 9, 5)), {"axes": "CYX", "channels": 3}, ValueError, "3 channels, .*, got 4"),
        (da.from_array(np.ones(9)).reshape(3, 3)[[0], :][:, :0], {}, ValueError, "one pixel"),
    ],
)
def test_images_that_do_not_fit_are_refused(
    image: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"predict: .*{message}"):
        sources(image, **{"axes": None, "channels": None, "dims": 2} | options)


@pytest.mark.parametrize("channels", [None, 1])
def test_tensors_and_arrays_by_convention(channels: int | None) -> None:
    pixels = numbers((6, 7, 8))
    for image, options, count, shape, counted in (
        (pixels, {"dims": 3}, 1, (1, 6, 7, 8), False),
        (pixels[0], {}, 1, (1, 7, 8), False),
        (pixels[0, :, :, None], {}, 1, (1, 7, 8), False),
        (torch.from_numpy(pixels[:, None]), {}, 6, (1, 7, 8), True),
        (torch.from_numpy(pixels[:1, None]), {}, 1, (1, 7, 8), True),
        (torch.from_numpy(pixels[:1]), {}, 1, (1, 7, 8), False),
        (torch.from_numpy(pixels), {"dims": 3}, 1, (1, 6, 7, 8), False),
    ):
        found, batch = sources(image, **{"axes": None, "channels": channels, "dims": 2} | options)
        assert (len(found), found[0].shape, batch) == (count, shape, counted)


def patched(pixels: NDArray[Any], at: Shape) -> NDArray[Any]:
    changed = pixels.copy()
    changed[at] += 1
    return changed


def test_identity_tells_shape_dtype_pixels_and_files(tmp_path: Path) -> None:
    pixels = numbers((300, 400))
    of = {"same": only(pixels).identity()}
    assert only(torch.from_numpy(pixels)).identity() == of["same"]
    assert only(da.from_array(pixels, chunks=(50, 60))).identity() == of["same"]
    of["dtype"] = only(pixels.astype(np.int16)).identity()
    of["shape"] = only(pixels.reshape(200, 600)).identity()
    for at in ((0, 0), (0, 399), (299, 0), (299, 399), (40, 60), (77, 110)):
        of[str(at)] = only(patched(pixels, at)).identity()
    tiff, store = as_tiff(pixels[..., None], tmp_path), tmp_path / "a.zarr"
    zarr_array(store, pixels, (64, 64))
    of |= {"tiff": only(tiff).identity(), "zarr": only(store).identity()}
    assert only(zarr.open(store)).identity() == of["zarr"]
    os.utime(tiff, ns=(0, 1))
    os.utime(store / "c" / "1" / "1", ns=(0, 1))
    of |= {"tiff later": only(tiff).identity(), "zarr later": only(store).identity()}
    assert len(set(of.values())) == len(of)


def test_identity_of_volumes_takes_in_the_corners() -> None:
    pixels = numbers((20, 100, 90))
    found = {only(pixels, dims=3).identity()}
    for z in (0, 19):
        for y in (0, 99):
            for x in (0, 89):
                found.add(only(patched(pixels, (z, y, x)), dims=3).identity())
    assert len(found) == 9


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((21, 22), {"photometric": "miniswhite"}),
        ((21, 22), {"photometric": "miniswhite", "compression": "zlib"}),
        ((21, 22, 4), {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
        ((21, 22, 3), {"photometric": "rgb", "tile": (16, 16), "compression": "zlib"}),
        ((3, 21, 22), {"photometric": "rgb", "planarconfig": "separate", "compression": "zlib"}),
        ((4, 21, 22), {"photometric": "minisblack"}),
        ((4, 21, 22), {"photometric": "minisblack", "metadata": None}),
        ((4, 2, 21, 22), {"photometric": "minisblack", "imagej": True}),
        ((2, 4, 3, 21, 22), {"photometric": "minisblack", "metadata": {"axes": "TZCYX"}}),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_tiff_is_read_as_for_training(
    shape: Shape, options: dict[str, Any], dtype: Any, tmp_path: Path
) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, numbers(shape, dtype), **options)
    want = read_image(path)
    found, batch = sources(path, axes=None, channels=want.shape[1], dims=2)
    assert batch == (len(want) > 1)
    assert (np.stack([source.read(0, 21) for source in found]) == want).all()
    assert found[0].dtype == want.dtype


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_tiff_of_bits_is_read_as_for_training(photometric: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, numbers((21, 22)) > 100, photometric=photometric)
    source = only(path)
    assert source.dtype == np.uint8
    assert (source.read(2, 21) == read_image(path)[0, :, 2:]).all()


def test_several_series_are_pages_and_pyramids_give_the_largest(tmp_path: Path) -> None:
    pixels = numbers((2, 64, 65))
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for page in pixels:
            tiff.write(page, photometric="minisblack", compression="zlib")
    with tifffile.TiffWriter(tmp_path / "b.tif") as tiff:
        tiff.write(pixels[0], photometric="minisblack", subifds=1, tile=(16, 16))
        tiff.write(pixels[0, ::2, ::2], photometric="minisblack", subfiletype=1, tile=(16, 16))
    found, batch = sources(tmp_path / "a.tif", axes=None, channels=1, dims=2)
    assert batch
    first = found.pop(0).read(0, 64)
    assert (first == pixels[:1]).all()
    assert (found[0].read(5, 60) == pixels[1:, 5:60]).all()  # the file stays open
    assert (only(tmp_path / "b.tif").read(3, 64) == pixels[:1, 3:]).all()


def test_axes_of_files_for_volumes(tmp_path: Path) -> None:
    pixels = numbers((5, 21, 22))
    path = tmp_path / "a.tif"
    for axes in ("ZYX", "QYX"):
        tifffile.imwrite(path, pixels, photometric="minisblack", metadata={"axes": axes})
        assert (only(path, dims=3).read(1, 3) == pixels[None, 1:3]).all()
    tifffile.imwrite(path, pixels, photometric="minisblack", metadata={"axes": "TYX"})
    with pytest.raises(UserError, match=r"a.tif: expected axes Z, Y, X, got TYX .* axes="):
        only(path, dims=3)
    assert (only(path, dims=3, axes="ZYX").read(1, 3) == pixels[None, 1:3]).all()
    with pytest.raises(UserError, match=r"a.tif: expected 3 channels, .*, got 1"):
        sources(path, axes=None, channels=3, dims=2)


def test_axes_of_ome_zarr_of_length_one_count_nothing(tmp_path: Path) -> None:
    pixels = numbers((1, 2, 1, 21, 22))
    group = zarr.create_group(tmp_path / "a.zarr")
    group.create_array("s0", data=pixels, chunks=(1, 1, 1, 8, 8))
    names = [{"name": n} for n in ("t", "c", "z", "y", "x")]
    scale = {"axes": names, "datasets": [{"path": "s0"}]}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [scale]}
    for image in (tmp_path / "a.zarr", group):
        assert (only(image, channels=2).read(3, 9) == pixels[0, :, 0, 3:9]).all()
    assert only(tmp_path / "a.zarr", dims=3).shape == (2, 1, 21, 22)


def test_other_pictures_are_read_whole(tmp_path: Path) -> None:
    pixels = numbers((21, 22, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    source = only(tmp_path / "a.png", channels=3)
    assert (source.read(4, 9) == np.moveaxis(pixels, -1, 0)[:, 4:9]).all()
    assert source.identity() == only(str(tmp_path / "a.png")).identity()


def test_files_that_cannot_be_read_are_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.tif").write_text("text")
    zarr.create_group(tmp_path / "group.zarr")
    Image.fromarray(numbers((9, 9), np.uint8)).convert("P").save(tmp_path / "palette.tif")
    tiles = as_tiff(numbers((90, 90, 1)), tmp_path, tile=(16, 16), compression="zlib")
    (tmp_path / "cut.tif").write_bytes(tiles.read_bytes()[:-20])
    zarr_array(tmp_path / "complex.zarr", np.ones((3, 4), complex), (3, 4))
    for name, message in (
        ("missing.tif", "cannot read .*missing.tif: No such file"),
        ("missing.zarr", "cannot read .*missing.zarr: No such file"),
        ("folder", "expected an image, got a folder that is no zarr"),
        ("text.tif", "not a PNG, JPEG or TIFF"),
        ("group.zarr", "or an OME-Zarr image, got a group without multiscales"),
        ("palette.tif", "palette.tif has a palette"),
        ("cut.tif", "cut.tif is "),
        ("complex.zarr", "complex.zarr: expected integers or floating"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            only(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_damaged_chunks_are_said_in_one_line(tmp_path: Path) -> None:
    path = as_tiff(numbers((90, 90, 1)), tmp_path, tile=(16, 16), compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages.first.dataoffsets[-1]
    content = bytearray(path.read_bytes())
    content[offset : offset + 8] = b"\xff" * 8
    path.write_bytes(content)
    source = only(path)
    source.read(0, 80)
    with pytest.raises(UserError, match=r"cannot read .*image\.tif: "):
        source.read(80, 90)


def test_without_zarr_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = numbers((21, 22, 1))
    path = as_tiff(pixels, tmp_path, compression="zlib")
    monkeypatch.setattr(zarr, "__version__", "2.18.3")
    assert (only(path).read(3, 9) == pixels[None, 3:9, :, 0]).all()  # read whole
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / ".zarray").touch()
    with pytest.raises(UserError, match=r"a\.zarr: zarr needs zarr 3: pip install"):
        only(tmp_path / "a.zarr")
    with pytest.raises(UserError, match=r"cannot write .*b\.tif: .* needs zarr 3"):
        begin(tmp_path / "b.tif", numbers((3, 4)))
    monkeypatch.setattr(sources_module.sys, "version_info", (3, 10))
    with pytest.raises(UserError, match=r"Python 3\.11 or newer"):
        begin(tmp_path / "b.tif", numbers((3, 4)))


# Targets.


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """Spare the disk: what is flushed when has a test of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


def begin(
    path: Path, result: NDArray[Any], *, axes: str = "YX", plan: Any = None, **options: Any
) -> Target:
    return open_target(
        path,
        shape=result.shape,
        dtype=result.dtype,
        axes=axes,
        plan={"model": "f" * 64, "tile": 512} if plan is None else plan,
        **{"chunk": 32} | options,
    )


def images(result: NDArray[Any], axes: str, dims: int) -> list[NDArray[Any]]:
    """Each image's labels (*S) or scores (K, *S)."""
    own = dims + ("C" in axes)
    return list(result.reshape(-1, *result.shape[len(axes) - own :]))


def fill(
    target: Target, result: NDArray[Any], axes: str, dims: int, heights: Iterator[int]
) -> Iterator[int]:
    """Write all rows that are not done, in bands of `heights`, giving `done` after each."""
    for number, image in enumerate(images(result, axes, dims)):
        part, by_row = target.part(number), np.moveaxis(image, "C" in axes, 0)
        start = part.done
        while start < len(by_row):
            stop = min(start + next(heights), len(by_row))
            part.write(start, np.moveaxis(by_row[start:stop], 0, "C" in axes))
            start = stop
            yield target.done


def write(target: Target, result: NDArray[Any], axes: str = "YX", height: int = 13) -> None:
    dims = len(set(axes) & set("ZYX"))
    for _ in fill(target, result, axes, dims, repeat(height)):
        pass
    target.finish()
    target.close()


def content(path: Path) -> dict[str, bytes | None]:
    """Everything in a folder, a file or a folder of files."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {str(f.relative_to(path)): None if f.is_dir() else f.read_bytes() for f in files}


def entries(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


LAYOUTS = [("YX", 2), ("CYX", 2), ("NYX", 2), ("NCYX", 2), ("TZYX", 2), ("ZYX", 3), ("CZYX", 3)]


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_results_are_the_same_however_they_are_cut(data: st.DataObject) -> None:
    axes, dims = data.draw(st.sampled_from([*LAYOUTS, ("NCZYX", 3)]))
    small, sides = st.integers(1, 2), st.integers(1, 70)
    shape = tuple(data.draw(sides if letter in "YX" else small) for letter in axes)
    dtype = data.draw(
        st.sampled_from([np.float32, np.float16] if "C" in axes else [np.uint8, ">i2"])
    )
    result = numbers(shape, dtype)
    result[..., : shape[-1] // 2] = 0  # chunks of zeros too
    suffix = data.draw(st.sampled_from([".zarr", ".tif"]))
    with TemporaryDirectory() as folder:
        kept = []
        for name in ("a", "b"):
            path = Path(folder, name, f"result{suffix}")
            path.parent.mkdir()
            target = begin(path, result, axes=axes, dims=dims)
            heights = iter(lambda: data.draw(st.integers(1, 40)), None)
            for _ in fill(target, result, axes, dims, heights):
                pass
            target.finish()
            kept.append(content(path.parent))
        assert kept[0] == kept[1]
        found, _ = sources(path, axes=None, channels=None, dims=dims)
        for source, image in zip(found, images(result, axes, dims), strict=True):
            whole = source.read(0, source.shape[1])
            assert (whole == image.reshape(source.shape)).all()
            assert source.dtype == np.dtype(dtype).newbyteorder("=")


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_arrays_take_results(data: st.DataObject) -> None:
    axes, dims = data.draw(st.sampled_from([*LAYOUTS, ("X", 1), ("CX", 1)]))
    shape = tuple(data.draw(st.integers(1, 9)) for _ in axes)
    given_as, kept_as = data.draw(
        st.sampled_from(
            [("f4", "f4"), ("f4", "f2"), ("f4", "f8")]
            if "C" in axes
            else [("u1", "u1"), ("u1", "i2"), ("i2", "i4"), ("i8", "i8"), ("u1", "u4")]
        )
    )
    result = numbers(shape, given_as)
    chunks = tuple(data.draw(st.integers(1, n)) for n in shape)
    out = data.draw(
        st.sampled_from(
            [
                np.zeros(shape, kept_as),
                np.zeros(shape[::-1], kept_as).T,
                torch.from_numpy(np.zeros(shape, kept_as)),
                zarr.create_array({}, shape=shape, dtype=kept_as, chunks=chunks),
            ]
        )
    )
    target = ArrayTarget(out, shape=shape, dtype=given_as, axes=axes, dims=dims)
    heights = iter(lambda: data.draw(st.integers(1, 5)), None)
    for done in fill(target, result, axes, dims, heights):
        assert done == 0
    target.finish()
    target.close()
    assert (np.asarray(out[...]) == result).all()
    for number, image in enumerate(images(result, axes, dims)):
        room = target.part(number).room(0, 1)
        assert (room is not None) == (given_as == kept_as and not isinstance(out, zarr.Array))
        if room is not None:
            room += 1
            assert (room.numpy() == image.take([0], axis=int("C" in axes)) + 1).all()
    assert isinstance(out, zarr.Array) or given_as != kept_as or (np.asarray(out) != result).any()


@pytest.mark.parametrize(
    ("out", "options", "error", "message"),
    [
        ([0], {}, TypeError, "expected an array, a tensor or a path, got list"),
        (da.zeros((4, 5), dtype="u1"), {}, TypeError, "what stores, as zarr does, got a dask"),
        (np.zeros((5, 4), "u1"), {}, ValueError, r"expected shape \(4, 5\), got \(5, 4\)"),
        (np.zeros((4, 5), "i1"), {}, ValueError, "uint8 or a wider integer dtype, got int8"),
        (np.zeros((4, 5), "f4"), {}, ValueError, "uint8 or a wider integer dtype, got float32"),
        (torch.zeros(4, 5), {}, ValueError, "wider integer dtype, got torch.float32"),
        (
            torch.zeros(1, 4, 5, dtype=torch.bfloat16),
            {"shape": (1, 4, 5), "dtype": "f4", "axes": "CYX"},
            ValueError,
            "float16, 32 or 64, got torch.bfloat16",
        ),
        (np.broadcast_to(np.zeros(5, "u1"), (4, 5)), {}, ValueError, "got read-only"),
        (np.zeros((4, 5), "u1"), {"axes": "XY"}, ValueError, "axes such as YX, CYX"),
        (np.zeros((4, 5), "u1"), {"axes": "CYX"}, ValueError, "got CYX of shape"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    out: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"predict: out: .*{message}"):
        ArrayTarget(out, **{"shape": (4, 5), "dtype": "u1", "axes": "YX"} | options)


def test_memory_maps_take_results(tmp_path: Path) -> None:
    result = numbers((21, 22), np.uint8)
    out = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.uint8, result.shape)
    write(ArrayTarget(out, shape=result.shape, dtype=np.uint8, axes="YX"), result)
    assert (np.load(tmp_path / "a.npy") == result).all()


def test_rows_out_of_order_are_refused(tmp_path: Path) -> None:
    result = numbers((3, 50, 22))
    target = begin(tmp_path / "a.zarr", result, axes="NYX")
    target.write(0, result[0, :20])
    for start, band, message in (
        (10, result[0, 10:20], "rows from 20 on, got from 10"),
        (20, result[0, 20:30, :20], r"of one image, \(50, 22\) at most, got \(10, 20\)"),
        (20, np.concatenate(result)[20:60], r"of one image, .* got \(40, 22\) at row 20"),
        (20, result[0], r"of one image, .* got \(50, 22\) at row 20"),
    ):
        with pytest.raises(ValueError, match=message):
            target.write(start, band)
    with pytest.raises(ValueError, match="finish: expected 150 rows, got 0"):
        target.finish()
    target.close()


@pytest.mark.parametrize("suffix", [".zarr", ".tif"])
@pytest.mark.parametrize(("axes", "dims"), LAYOUTS)
def test_going_on_at_every_row(suffix: str, axes: str, dims: int, tmp_path: Path) -> None:
    shape = tuple(70 if letter in "YX" else 3 for letter in axes)
    result = numbers(shape, np.float32 if "C" in axes else np.uint16)
    (tmp_path / "whole").mkdir()
    undisturbed, path = tmp_path / "whole" / f"a{suffix}", tmp_path / f"a{suffix}"
    target = begin(undisturbed, result, axes=axes, dims=dims)
    for _ in fill(target, result, axes, dims, repeat(11)):
        pass
    target.finish()
    height, rows, total = (32 if dims == 2 else 2), shape[-dims], len(images(result, axes, dims))
    done = 0
    while done < rows * total:
        target = begin(path, result, axes=axes, dims=dims, resume=True)
        assert target.done == done
        assert [target.part(i).done for i in range(total)] == [
            min(max(done - i * rows, 0), rows) for i in range(total)
        ]
        for now in fill(target, result, axes, dims, repeat(9)):
            assert now % rows % height == 0
            if now > done:
                break
        done = target.done
        target.close()
    begin(path, result, axes=axes, dims=dims, resume=True).finish()
    assert content(path) == content(undisturbed)
    target = begin(path, result, axes=axes, dims=dims, resume=True)
    assert target.done == rows * total
    assert content(path) == content(undisturbed)


# Killed writers.

SHAPE = (2, 130, 70)
HEIGHT = 9


def stub_result() -> NDArray[Any]:
    result = numbers(SHAPE, np.uint16)
    result[:, 32:64] = 0
    return result


def writer(path: Path, options: dict[str, Any], kill_at: int, pause: float, count: Path) -> None:
    """Write a result in a process of its own, dying before its `kill_at`-th call about files.

    A file `count` gets the number of calls, if it lives.
    """
    calls = 0
    counting = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}

    def hook(event: str, _: Any) -> None:
        nonlocal calls
        if event in counting:
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = lambda _: None
    sys.addaudithook(hook)
    target = begin(path, stub_result(), axes="NYX", **options)
    for _ in fill(target, stub_result(), "NYX", 2, repeat(HEIGHT)):
        time.sleep(pause)
    target.finish()
    target.close()
    count.write_text(str(calls))


@pytest.fixture(scope="module")
def run() -> Callable[..., int | None]:
    """Run `writer` in a process; give its exit code. Modules are imported once for all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            *("dask.array", "hypothesis", "PIL.Image", "pytest", "segfuse.tiling.targets", "zarr"),
            *("segfuse.data.files", "segfuse.prediction", "tifffile", "torch.export"),
            "torch._dynamo",
        ]
    )

    def run(
        path: Path,
        count: Path,
        *,
        kill_at: int = 0,
        kill_after: float | None = None,
        pause: float = 0,
        **options: Any,
    ) -> int | None:
        process = context.Process(target=writer, args=(path, options, kill_at, pause, count))
        process.start()
        if kill_after is not None:
            ready = time.monotonic() + 60
            stage = path.with_name(f"{path.name}.partial")
            while process.is_alive() and not stage.exists() and time.monotonic() < ready:
                time.sleep(0.002)
            time.sleep(kill_after)
            process.kill()
        process.join(60)
        code = process.exitcode
        process.close()
        return code

    return run


@pytest.fixture(scope="module", params=[".zarr", ".tif"])
def undisturbed(
    request: pytest.FixtureRequest, run: Callable[..., int | None], tmp_path_factory: Any
) -> tuple[str, dict[str, bytes | None], int]:
    """Suffix, content, and number of calls about files."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "result").mkdir()
    path = folder / "result" / f"a{request.param}"
    assert run(path, folder / "count") == 0
    assert content(path.parent).keys() >= {path.name}
    return request.param, content(path), int((folder / "count").read_text())


def check(path: Path, want: dict[str, bytes | None]) -> None:
    """The result is as undisturbed, and nothing else is left."""
    assert content(path) == want
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_before_any_call_it_goes_on_to_the_same(
    undisturbed: tuple[str, dict[str, bytes | None], int],
    run: Callable[..., int | None],
    overwrite: bool,
    tmp_path: Path,
) -> None:
    suffix, want, calls = undisturbed
    random = Random(suffix)  # noqa: S311
    (tmp_path / "result").mkdir()
    path = tmp_path / "result" / f"a{suffix}"
    old = None
    if overwrite:
        write(begin(path, stub_result() + 1, axes="NYX", plan={}), stub_result() + 1, "NYX")
        old = content(path)
    kills = done = 0
    options: dict[str, Any] = {"overwrite": True} if overwrite else {}
    while run(path, tmp_path / "count", kill_at=random.randint(5, calls // 2), **options) != 0:
        kills += 1
        assert kills < 30
        stage = tmp_path / "result" / f"a{suffix}.partial"
        manifest = stage / "manifest.json"
        options = {"resume": True}
        if manifest.exists():
            now = json.loads(manifest.read_text())["rows"]
            assert now >= done
            assert now % SHAPE[1] % 32 == 0
            done = now
        elif not stage.exists() or not path.exists() or content(path) == old:
            options |= {"overwrite": overwrite}  # killed before it had begun
        if old is not None:
            kept = path if path.exists() else stage / "old"
            assert content(kept) in (old, want)
    assert kills >= 2
    check(path, want)


def test_killed_at_random_moments_it_goes_on_to_the_same(
    undisturbed: tuple[str, dict[str, bytes | None], int],
    run: Callable[..., int | None],
    tmp_path: Path,
) -> None:
    suffix, want, _ = undisturbed
    path = tmp_path / f"a{suffix}"
    (tmp_path / "count").mkdir()
    count = tmp_path / "count" / "count"
    for _ in range(5):
        run(path, count, kill_after=uniform(0, 0.2), pause=0.005, resume=True)  # noqa: S311
    assert run(path, count, resume=True) == 0
    assert content(path) == want
    assert {file.name for file in tmp_path.iterdir()} == {"count", path.name}


def predictor(path: Path, ready: Path) -> None:
    """Predict in a process of its own; a file `ready` appears when the work begins."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 5, padding=2))
    image = numbers((2100, 90), np.uint8)
    ready.touch()
    segfuse.predict(net, image, out=path, tile=48, output="scores", resume=True, progress=False)


@pytest.mark.parametrize("suffix", [".zarr", ".tif"])
def test_prediction_killed_at_ten_random_moments_is_as_undisturbed(
    suffix: str, run: Callable[..., int | None], tmp_path: Path
) -> None:
    context = multiprocessing.get_context("forkserver")

    def predict(path: Path, kill_after: float | None = None) -> tuple[int | None, float]:
        path.parent.mkdir(exist_ok=True)
        ready = tmp_path / "ready"
        process = context.Process(target=predictor, args=(path, ready))
        process.start()
        while process.is_alive() and not ready.exists():
            time.sleep(0.001)
        began = time.monotonic()
        if kill_after is not None:
            process.join(kill_after)
            process.kill()
        process.join(120)
        ready.unlink()
        return process.exitcode, time.monotonic() - began

    whole = tmp_path / "whole" / f"a{suffix}"
    code, seconds = predict(whole)
    assert code == 0
    kills = begun = 0
    while kills < 10:
        path = tmp_path / "killed" / f"a{suffix}"
        code, _ = predict(path, uniform(0, seconds))  # noqa: S311
        stage = path.with_name(f"{path.name}.partial")
        kills += code == -signal.SIGKILL
        begun += stage.exists()
        if code == 0 or kills % 3 == 0:  # others go on with what two or three left
            assert predict(path)[0] == 0
            check(path, content(whole))
            shutil.rmtree(path.parent)
    assert begun
    path = tmp_path / "killed" / f"a{suffix}"
    assert predict(path)[0] == 0
    check(path, content(whole))


# What is refused, and what is kept.


def half(path: Path, result: NDArray[Any], **options: Any) -> None:
    """Leave a stage with its first row of chunks done."""
    target = begin(path, result, **options)
    target.write(0, result[:40])
    assert target.done == 32
    target.close()


@pytest.mark.parametrize("suffix", [".zarr", ".tif"])
def test_what_is_there_is_not_written_over_unasked(suffix: str, tmp_path: Path) -> None:
    result, path = numbers((70, 60)), tmp_path / f"a{suffix}"
    half(path, result)
    with pytest.raises(UserError, match=rf"a{suffix}\.partial holds what an interrupted run left"):
        begin(path, result)
    write(begin(path, result, overwrite=True), result)
    first = content(path)
    with pytest.raises(UserError, match=rf"a{suffix} exists: overwrite it, or choose"):
        begin(path, result)
    other = {"model": "e" * 64}
    with pytest.raises(UserError, match=rf"a{suffix} exists and is of another model, image or"):
        begin(path, result, plan=other, resume=True)
    assert entries(tmp_path) == {path.name}
    half(path, result, plan=other, overwrite=True)
    assert content(path) == first  # until the new one is whole
    with pytest.raises(UserError, match=rf"a{suffix}\.partial holds what"):
        begin(path, result, plan=other)
    target = begin(path, result, plan=other, resume=True)  # which remembers that it may overwrite
    assert target.done == 32
    target.write(32, result[32:])
    target.finish()
    assert content(path) != first
    assert entries(tmp_path) == {path.name}


@pytest.mark.parametrize("suffix", [".zarr", ".tif"])
def test_a_result_that_came_meanwhile_is_kept(suffix: str, tmp_path: Path) -> None:
    result, path = numbers((70, 60)), tmp_path / f"a{suffix}"
    target = begin(path, result)
    target.write(0, result)
    path.write_text("of another program")
    with pytest.raises(UserError, match="exists and is of another"):
        target.finish()
    target.close()
    with pytest.raises(UserError, match="exists and is of another"):
        begin(path, result, resume=True)
    assert path.read_text() == "of another program"
    begin(path, result, resume=True, overwrite=True).finish()
    assert (only(path).read(0, 70) == result).all()


def test_changed_plans_are_named(tmp_path: Path) -> None:
    result, path = numbers((70, 60)), tmp_path / "a.zarr"
    plan = {"model": "a" * 64, "image": "b" * 64, "tile": 512, "border": "mirror", "size": (1, 2)}
    half(path, result, plan=plan)
    for change, message in (
        ({"model": "c" * 64}, "the model has changed: undo"),
        ({"image": "c" * 64, "model": "d" * 64}, "the image has changed; the model has changed"),
        ({"tile": 640, "border": None}, 'border: was "mirror", is null; tile: was 512, is 640'),
        ({"more": 1}, "more: was null, is 1"),
    ):
        with pytest.raises(UserError, match=message):
            begin(path, result, plan=plan | change, resume=True)
    with pytest.raises(UserError, match="chunk: was 32, is 64"):
        begin(path, result, plan=plan, resume=True, chunk=64)
    with pytest.raises(UserError, match=r"result: was .*70, 60.*, is .*69, 60"):
        begin(path, result[:69], plan=plan, resume=True)
    target = begin(path, result, plan=plan, resume=True)
    assert target.done == 32  # refusals took nothing away
    target.close()
    target = begin(path, result, plan=plan | {"tile": 640}, resume=True, overwrite=True)
    assert target.done == 0
    target.close()


def test_one_process_writes(tmp_path: Path) -> None:
    result, path = numbers((70, 60)), tmp_path / "a.zarr"
    target = begin(path, result)
    for options in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(UserError, match=r"a\.zarr is being written by another process"):
            begin(path, result, **options)
    script = (
        "import fcntl, os, sys; lock = os.open(sys.argv[1], os.O_RDWR);"
        "fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)"
    )
    lock = str(tmp_path / "a.zarr.partial" / "lock")
    command = [sys.executable, "-c", script, lock]
    assert b"BlockingIOError" in subprocess.run(command, capture_output=True, check=False).stderr
    target.write(0, result)
    target.finish()
    assert (only(path).read(0, 70) == result).all()


def attempt(target: Target, rest: NDArray[Any], start: int) -> str | None:
    """Write the last rows; say what the user is told if it fails."""
    try:
        if len(rest):
            target.write(start, rest)
        target.finish()
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("suffix", [".zarr", ".tif"])
def test_a_full_disk_is_said_and_what_was_done_is_kept(suffix: str, tmp_path: Path) -> None:
    result, path = numbers((100, 60)), tmp_path / f"a{suffix}"
    target, room = begin(path, result), 0

    def full(_: int) -> None:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    done = failures = 0
    while not path.exists():
        target.close()
        target = begin(path, result, resume=True)
        assert target.done >= done
        done, room = target.done, 3 * failures
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", full)
            said = attempt(target, result[done:], done)
        if said is not None:
            failures += 1
            assert f"cannot write {path}: No space left on device" in said
            assert "\n" not in said
    target.close()
    assert failures > 3
    assert begin(path, result, resume=True).done == 100
    assert entries(tmp_path) == {path.name}
    assert (only(path).read(0, 100) == result).all()


def test_chunks_are_flushed_before_they_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, path = numbers((2, 100, 60)), tmp_path / "a.zarr"
    stage, flushed, counted = tmp_path / "a.zarr.partial", set(), []
    replace = Path.replace

    def flush(file: int) -> None:
        flushed.add(str(Path(f"/proc/self/fd/{file}").readlink()))

    def counting(new: Path, name: Path) -> Path:
        if name.name == "manifest.json":
            assert str(new) in flushed
            written = {str(file) for file in (stage / "data").rglob("*")}
            assert written <= flushed
            counted.append(json.loads(new.read_text())["rows"])
            flushed.discard(str(new))
        return replace(new, name)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "replace", counting)
    write(begin(path, result, axes="NYX"), result, "NYX")
    assert counted == [0, 32, 64, 96, 100, 132, 164, 196, 200]
    assert str(tmp_path) in flushed


def test_places_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = numbers((70, 60))
    (tmp_path / "folder.zarr").mkdir()
    (tmp_path / "folder.tif").mkdir()
    (tmp_path / "mine.tif.partial").mkdir()
    (tmp_path / "mine.tif.partial" / "thesis.doc").touch()
    for name, message in (
        ("missing/a.tif", "cannot write .*a.tif: there is no folder .*missing"),
        ("folder.zarr", "folder.zarr is a folder that holds no zarr 3"),
        ("folder.tif", "folder.tif is a folder that holds no zarr 3"),
        ("mine.tif", "mine.tif.partial is in the way"),
    ):
        for options in ({}, {"overwrite": True}, {"resume": True}):
            with pytest.raises(UserError, match=message):
                begin(tmp_path / name, result, **options)
    before = content(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(UserError, match=r"a\.tif: Permission denied"):
            begin(tmp_path / "a.tif", result)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.png", {}, "a name with .zarr, .tif or .tiff, got .*a.png"),
        ("a.tif", {"chunk": 48}, "a multiple of 32, got 2, uint16 and 48"),
        ("a.tif", {"axes": "XY"}, "axes such as YX, CYX"),
        ("a.tif", {"dtype": "c8"}, "integers or floating numbers"),
        ("a.tif", {"axes": "CX", "dims": 1}, "2 or 3 spatial axes"),
    ],
)
def test_files_that_cannot_be_are_refused(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    options = {"shape": (7, 6), "dtype": "u2", "axes": "YX", "plan": {}} | options
    with pytest.raises(ValueError, match=f"predict: out: .*{message}"):
        open_target(tmp_path / name, **options)
    assert not entries(tmp_path)


def test_what_files_say_of_themselves(tmp_path: Path) -> None:
    result = numbers((2, 70, 60), np.float32)
    for name in ("a.zarr", "a.tif"):
        write(begin(tmp_path / name, result, axes="CYX"), result, "CYX")
    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    assert group.attrs["ome"]["version"] == "0.5"
    (image,) = group.attrs["ome"]["multiscales"]
    assert [(axis["name"], axis["type"]) for axis in image["axes"]] == [
        ("c", "channel"),
        ("y", "space"),
        ("x", "space"),
    ]
    assert image["datasets"][0]["path"] == "0"
    assert group["0"].chunks == (1, 32, 32)
    assert group["0"].metadata.dimension_names == ("c", "y", "x")
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert tiff.is_bigtiff
        assert tiff.series[0].axes == "CYX"
        page = tiff.pages.first
        assert (page.tile, page.compression.name) == ((32, 32), "ADOBE_DEFLATE")
        assert "DateTime" not in page.tags
