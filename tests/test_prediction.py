"""Prediction: of any size, without a seam at the border, and to files like those learned from."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from segfuse.models import UNet
from segfuse.prediction import predict

SEED = 3


def unet(padding: Any, channels: int = 1, classes: int = 3, **options: Any) -> UNet:
    torch.manual_seed(SEED)
    options = {"base": 4, "depth": 2, "norm": "batch", **options}
    return UNet(channels, classes, padding=padding, **options).eval()


def noise(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(SEED).random(shape, np.float32)


class Pointwise(nn.Module):
    """Needs no context, and says nothing of sizes."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, 1 - x), 1)


# One image


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (2, 3), (13, 5), (40, 44), (57, 61)])
def test_any_size_goes_in(padding: str, size: tuple[int, int]) -> None:
    model, image = unet(padding), noise(*size)
    scores = predict(model, image, output="scores")
    assert scores.shape == (3, *size)
    assert scores.dtype == np.float32
    assert np.isfinite(scores).all()
    labels = predict(model, image)
    assert labels.shape == size
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, scores.argmax(0))
    probabilities = predict(model, image, output="probabilities")
    assert np.allclose(probabilities.sum(0), 1, atol=1e-6)
    assert np.array_equal(probabilities.argmax(0), labels)


@pytest.mark.parametrize("dims", [1, 3])
def test_one_and_three_dimensions(dims: Any) -> None:
    size = (9, 10, 11)[:dims]
    assert predict(unet("same", dims=dims), noise(*size)).shape == size


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("up", ["deconv", "bilinear"])
def test_interior_does_not_depend_on_how_much_is_around(padding: str, up: str) -> None:
    model, image = unet(padding, up=up), noise(144, 152)
    reach = unet("valid").margin + 4 * model.stride  # of an output's surroundings, and more
    whole = predict(model, image, output="scores")
    top, left = 5 * model.stride, 7 * model.stride  # by whole strides, so that poolings coincide
    part = predict(model, image[top:-3, left:-5], output="scores")
    inner = np.s_[:, reach:-reach, reach:-reach]
    expected = whole[:, top:-3, left:-5][inner]
    assert expected.size
    np.testing.assert_allclose(part[inner], expected, rtol=0, atol=1e-5)


def test_valid_network_sees_the_mirrored_image() -> None:
    model, image = unet("valid"), noise(48, 48)
    assert model.fits(48 + 2 * model.margin)
    mirrored = np.pad(image, model.margin, mode="reflect")
    with torch.inference_mode():
        expected = model(torch.from_numpy(mirrored)[None, None])[0]
    np.testing.assert_allclose(predict(model, image, output="scores"), expected, atol=1e-5)


def test_layouts_agree() -> None:
    model, image = unet("same", channels=3), noise(3, 20, 24)
    expected = predict(model, torch.from_numpy(image), output="scores")
    last = np.moveaxis(image, 0, -1)
    assert np.array_equal(predict(model, last, output="scores"), expected)
    assert np.array_equal(predict(model, last.astype(">f4"), output="scores"), expected)
    grey = unet("same")
    for form in (image[0], image[0][..., None], torch.from_numpy(image[:1])):
        assert np.array_equal(predict(grey, form), predict(grey, torch.from_numpy(image[0])))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((20, 24), np.float32),
        np.zeros((3, 20, 24), np.float32),  # an array's channels come last
        torch.zeros(20, 24, 3),  # a tensor's first
        np.zeros((1, 20, 24, 3), np.float32),
        np.zeros((20, 0, 3), np.float32),
        np.zeros((), np.float32),
    ],
)
def test_layouts_that_are_refused(image: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"image: expected (an array \(Y, X, 3\)|3 channels, as the model takes|axes of one|"
        r"an array with axes)",
    ):
        predict(unet("same", channels=3), image)


def test_model_that_says_nothing_of_sizes() -> None:
    image = noise(5, 6)
    assert np.array_equal(predict(Pointwise(), image, output="scores"), [image, 1 - image])
    assert np.array_equal(predict(Pointwise(), image), image < 0.5)
    pooled = nn.Sequential(Pointwise(), nn.MaxPool2d(2))
    with pytest.raises(ValueError, match=r"scores of the image's size, got \(2, 3\)"):
        predict(pooled, image)


def test_leaves_the_model_as_it_was() -> None:
    model = unet("same")
    model.train()
    model.down[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    assert np.array_equal(predict(model, noise(8, 8)), predict(model, noise(8, 8)))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_precision() -> None:
    model, image = unet("same"), noise(32, 32)
    exact = predict(model, image, output="scores")
    rough = predict(model, image, output="scores", precision="bf16")
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() < 0.1 * np.abs(exact).max()
    double = predict(model.double(), image.astype(np.float64), output="scores")
    np.testing.assert_allclose(double, exact, atol=1e-5)
    with pytest.raises(ValueError, match="16 runs on CUDA only"):
        predict(model, image, precision="16")
    with pytest.raises(ValueError, match="32, bf16 or 16, got '8'"):
        predict(model, image, precision="8")


def test_arguments_that_are_refused() -> None:
    with pytest.raises(ValueError, match="output: expected one of labels"):
        predict(Pointwise(), noise(2, 2), output="classes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device: expected auto, cpu"):
        predict(Pointwise(), noise(2, 2), device="tpu")
    with pytest.raises(ValueError, match="cuda:99 is not there"):
        predict(Pointwise(), noise(2, 2), device="cuda:99")


# Files

for package in ("imagecodecs", "PIL", "safetensors", "skimage", "tifffile", "tomli_w"):
    pytest.importorskip(package)

import tifffile  # noqa: E402
from PIL import Image  # noqa: E402
from runs import one_thread, write_run  # noqa: E402, F401

from segfuse import instances, journal  # noqa: E402
from segfuse import prediction_files as files_module  # noqa: E402
from segfuse import run as folder  # noqa: E402
from segfuse.data import (  # noqa: E402
    LabelCoding,
    palette_of,
    read_image,
    read_labels,
    write_labels,
)
from segfuse.errors import UserError  # noqa: E402
from segfuse.prediction_files import predict_files  # noqa: E402
from segfuse.tiling.job import Job  # noqa: E402


def grey(path: Path, *shape: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    values = np.random.default_rng(len(path.name)).integers(0, 255, shape).astype(np.uint8)
    if path.suffix.startswith(".tif"):
        tifffile.imwrite(path, values, photometric="minisblack", ome=False)
    else:
        Image.fromarray(values).save(path)
    return path


def test_run_normalises_as_its_training_did(tmp_path: Path) -> None:
    run, image = write_run(tmp_path / "run"), (1000 * noise(20, 30)).astype(np.uint16)
    expected = predict(run.model(), torch.from_numpy(run.normalisation(image[None])))
    for form in (run, run.path, str(run.path)):
        assert np.array_equal(predict(form, image), expected)


@pytest.mark.parametrize(
    "coding",
    [
        LabelCoding("binary", 2, None),
        LabelCoding("instances", 2, None),
        LabelCoding("classes", 4, 255, palette=tuple(range(256)) * 3),
        LabelCoding("classes", 4, 9),
    ],
    ids=["binary", "instances", "palette", "classes"],
)
def test_files_are_written_as_labels_are(tmp_path: Path, coding: LabelCoding) -> None:
    run = write_run(tmp_path / "run", coding)
    images = tmp_path / "images"
    files = [grey(images / name, 20, 30) for name in ("a.png", "b.jpg", "c.tif", "d.ome.tif")]
    stack = grey(images / "e.tiff", 3, 20, 30)
    names = ["a.png", "b.png", "c.tif", "d.tif", "e.tiff"]
    written = predict_files(run.path, images, tmp_path / "out" / "here", threads=1)
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "out" / "here").iterdir()) == names
    for file, target in zip([*files, stack], written, strict=True):
        expected = np.stack([predict(run, page.transpose(1, 2, 0)) for page in read_image(file)])
        values = coding.decode(expected)
        assert np.array_equal(read_labels(target), values)
        if coding.kind != "classes":
            assert set(np.unique(values)) <= {0, 255}
    if coding.palette:
        assert palette_of(written[0]) == list(coding.palette)


def test_probabilities(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", channels=3)
    image = grey(tmp_path / "images" / "a.png", 20, 30, 3)
    labels, probabilities = predict_files(run, [image], tmp_path / "out", probabilities=True)
    assert probabilities.name == "a_probabilities.tif"
    values = tifffile.imread(probabilities)
    assert values.shape == (2, 20, 30)
    assert values.dtype == np.float32
    expected = predict(run, read_image(image)[0].transpose(1, 2, 0), output="probabilities")
    np.testing.assert_allclose(values, expected, atol=1e-6)
    assert np.array_equal(read_labels(labels)[0] == 255, values.argmax(0) == 1)


def test_instances(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    images = tmp_path / "images"
    pictures = [grey(images / name, 40, 50) for name in ("a.png", "b.jpg")]
    grey(images / "c.tif", 3, 40, 50)
    options: dict[str, Any] = {"smallest": 2, "holes": 3, "grow": "gaps", "reach": 2.0}
    written = predict_files(run, images, tmp_path / "out", instances=True, **options)
    assert [path.name for path in written] == ["a.png", "b.png", "c.tif"]
    for file, target in zip([*pictures, images / "c.tif"], written, strict=True):
        masks = [predict(run, page.transpose(1, 2, 0)) for page in read_image(file)]
        ids = read_labels(target)
        assert ids.dtype == np.uint16
        assert np.array_equal(ids, [instances(mask, **options) for mask in masks])
        assert ids.max() > 1
    plain, scores = predict_files(run, pictures[0], tmp_path / "both", instances=True, scores=True)
    mask = tifffile.imread(scores).argmax(0)
    assert np.array_equal(read_labels(plain)[0], instances(mask))

    run.config["training"] = {"objective": "touching"}
    (closed,) = predict_files(run, pictures[0], tmp_path / "closed", instances=True)
    assert np.array_equal(read_labels(closed)[0], instances(mask, grow="gaps"))
    (open_,) = predict_files(run, pictures[0], tmp_path / "open", instances=True, grow="none")
    assert np.array_equal(read_labels(open_)[0], instances(mask))


def test_instances_beyond_uint16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    image = grey(tmp_path / "images" / "a.png", 40, 50)
    monkeypatch.setattr(files_module, "_MOST_SHORT", 1)
    with pytest.raises(UserError, match=r"a\.png: \d+ objects, where a PNG holds 1: drop small"):
        predict_files(run, image, tmp_path / "out", instances=True)
    assert not list((tmp_path / "out").glob("*.png"))
    (written,) = predict_files(run, image, tmp_path / "a.tif", instances=True)
    assert np.array_equal(read_labels(written)[0], instances(predict(run, read_image(image)[0, 0])))


def test_instances_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "out"
    image = grey(tmp_path / "images" / "a.tif", 20, 30)
    many = write_run(tmp_path / "many", LabelCoding("classes", 3, 255))
    with pytest.raises(UserError, match="many tells 3 classes apart: expected 2 for instances"):
        predict_files(many, image, out, instances=True)
    options: list[dict[str, Any]] = [{name: 2} for name in ("smallest", "holes", "reach")]
    options.append({"grow": "gaps"})
    for option in options:
        with pytest.raises(UserError, match=f"{next(iter(option))} goes with instances only"):
            predict_files(run, image, out, **option)
    with pytest.raises(ValueError, match="instances: grow: expected gaps, everywhere or None"):
        predict_files(run, image, out, instances=True, grow="up")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"a\.tif would be predicted by bands.* whole label map"):
        predict_files(run, image, tmp_path / "a.zarr", instances=True)
    monkeypatch.setattr(files_module, "_LARGE", 0)
    with pytest.raises(UserError, match=r"a\.tif would be predicted by bands.* whole label map"):
        predict_files(run, image, out, instances=True)
    assert not out.exists()


def test_resuming_notices_other_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, out = write_run(tmp_path / "run"), tmp_path / "out"
    images = grey(tmp_path / "images" / "a.png", 20, 30).parent
    grey(images / "b.png", 20, 30)
    write, left = files_module.write_labels, iter(range(1))

    def interrupted(*arguments: Any, **more: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(*arguments, **more)

    monkeypatch.setattr(files_module, "write_labels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict_files(run, images, out, instances=True)
    monkeypatch.setattr(files_module, "write_labels", write)
    for options in ({}, {"instances": True, "smallest": 5}, {"instances": True, "grow": "gaps"}):
        with pytest.raises(UserError, match="instances: was"):
            predict_files(run, images, out, resume=True, **options)  # type: ignore[arg-type]
    assert len(predict_files(run, images, out, resume=True, instances=True)) == 2


def test_overwrite(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    images = grey(tmp_path / "images" / "a.png", 20, 30).parent
    grey(images / "b.png", 20, 30)
    (written, _) = predict_files(run, images, tmp_path / "out")
    (tmp_path / "out" / "b.png").unlink()
    written.write_text("old")
    with pytest.raises(UserError, match=r"a\.png exists"):
        predict_files(run, images, tmp_path / "out")
    assert written.read_text() == "old"
    assert not (tmp_path / "out" / "b.png").exists()
    predict_files(run, images, tmp_path / "out", overwrite=True)
    assert read_labels(written).shape == (1, 20, 30)
    with pytest.raises(UserError, match="is an image to predict"):
        predict_files(run, images, images, overwrite=True)


def test_nothing_is_written_before_all_is_checked(tmp_path: Path) -> None:
    run, images, out = write_run(tmp_path / "run"), tmp_path / "images", tmp_path / "out"
    good = grey(images / "a.png", 20, 30)
    (tmp_path / "file").touch()
    cut = write_run(tmp_path / "cut").path
    (cut / folder.WEIGHTS).write_bytes(b"cut short")
    (images / "text.tif").write_text("no picture")
    colour, text = grey(tmp_path / "c.png", 20, 30, 3), images / "text.tif"
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ([good, grey(images / "a.jpg", 9, 9)], {}, r"a\.png and .*a\.jpg would both"),
        ([good, colour], {}, r"c\.png: expected 1 channels.*got 3"),
        ([good, text], {}, r"text\.tif"),
        ([good, tmp_path / "none"], {}, "none"),
        ([], {}, "images: expected"),
        (good, {"threads": 0}, "threads: expected 1 to 1024, got 0"),
        (good, {"device": "cuda:99"}, "cuda:99 is not there"),
        (good, {"run": tmp_path}, "is not a run folder"),
        (good, {"run": cut}, r"model\.safetensors is damaged"),
        (good, {"output": tmp_path / "file"}, "cannot write into"),
    ]
    for files, options, message in cases:
        with pytest.raises(UserError, match=message) as error:
            predict_files(**{"run": run, "images": files, "output": out, **options})
        assert "\n" not in str(error.value)
        assert not out.exists()


# Large files

CLASSES = LabelCoding("classes", 3, 255)
JOURNAL = f".{files_module.JOURNAL}"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> folder.Run:
    """A run whose network is read, and traced at a size, once for all tests."""
    return write_run(tmp_path_factory.mktemp("shared") / "run", CLASSES)


@pytest.fixture
def all_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every file be read and written by bands."""
    monkeypatch.setattr(files_module, "_LARGE", 0)


def untouched(path: Path) -> tuple[int, int]:
    """What changes when a file is written anew."""
    state = path.stat()
    return state.st_ino, state.st_mtime_ns


def tree(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def written_tiffs(folder: Path) -> list[tuple[Path, int]]:
    """Images of all kinds that are read, and their channels."""
    folder.mkdir()
    random = np.random.default_rng(0)
    bytes_, colours = (random.integers(0, 255, s).astype(np.uint8) for s in [(40, 50), (40, 50, 3)])
    table = random.integers(0, 2**16, (3, 256)).astype(np.uint16)
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "grey": (bytes_, {"tile": (16, 32)}),
        "zlib": (bytes_, {"compression": "zlib", "rowsperstrip": 7}),
        "white": (bytes_, {"photometric": "miniswhite"}),
        "flags": (bytes_ > 99, {}),
        "stack": (random.integers(0, 2**16, (3, 40, 50)).astype(np.uint16), {}),
        "signed": ((random.random((40, 50)) * 1000 - 500).astype(np.int16), {}),
        "double": (random.random((40, 50)), {}),
        "rgb": (colours, {"photometric": "rgb"}),
        "rgba": (np.dstack([colours, bytes_]), {"photometric": "rgb", "extrasamples": [2]}),
        "palette": (bytes_, {"photometric": "palette", "colormap": table}),
    }
    for name, (pixels, options) in kinds.items():
        plain = {"photometric": "minisblack", **options}
        tifffile.imwrite(folder / f"{name}.tif", pixels, **plain)
    Image.fromarray(colours).save(folder / "colours.png")
    return [(file, read_image(file).shape[1]) for file in sorted(folder.iterdir())]


def test_large_files_are_predicted_as_small_ones(
    shared: folder.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {1: shared, 3: write_run(tmp_path / "run", CLASSES, 3)}
    small, large = tmp_path / "small", tmp_path / "large"
    images = written_tiffs(tmp_path / "images")
    assert len(images) == 11
    more = {"scores": True, "probabilities": True, "precision": "32"}
    for limit, output in [(2**28, small), (0, large)]:
        monkeypatch.setattr(files_module, "_LARGE", limit)
        for channels, run in runs.items():
            files = [file for file, number in images if number == channels]
            predict_files(run, files, output, **more)
    assert {f.stem for f in small.iterdir()} == {f.stem for f in large.iterdir()}
    for file in large.iterdir():
        one, other = (read_image(f) for f in (next(small.glob(f"{file.stem}.*")), file))
        if "_" in file.stem:
            np.testing.assert_allclose(other.reshape(one.shape), one, rtol=0, atol=1e-6)
        else:
            assert other.dtype == one.dtype == np.uint8
            assert np.array_equal(other, one)
            assert len(np.unique(other)) > 1


@pytest.mark.usefixtures("all_are_large")
def test_large_files_hold_finite_numbers(shared: folder.Run, tmp_path: Path) -> None:
    image = np.ones((40, 50), np.float32)
    image[7, 7] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", image)
    with pytest.raises(UserError, match=r"a\.tif holds NaN"):
        predict_files(shared, tmp_path / "a.tif", tmp_path / "out")


@pytest.mark.parametrize("limit", [0, 2**28])
@pytest.mark.parametrize(
    "options",
    [{}, {"augment": "d4"}, {"blend": "gaussian", "tile": 32, "overlap": 0.5}],
    ids=["whole", "turned", "blended"],
)
def test_all_results_are_those_of_predict(
    shared: folder.Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    options: dict[str, Any],
) -> None:
    monkeypatch.setattr(files_module, "_LARGE", limit)
    image = grey(tmp_path / "images" / "a.tif", 48, 56)
    wanted = ("labels", "scores", "probabilities")
    more = {"scores": True, "probabilities": True}
    written = predict_files(shared, image, tmp_path / "out", **options, **more)
    assert [file.name for file in written] == ["a.tif", "a_scores.tif", "a_probabilities.tif"]
    for kind, file in zip(wanted, written, strict=True):
        expected = predict(shared, read_image(image)[0, 0], output=kind, **options, progress=False)
        got = tifffile.imread(file)
        assert got.dtype == expected.dtype
        if kind == "labels":
            assert np.array_equal(got, expected)
        else:
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("limit", [0, 2**28])
def test_tiles_are_the_whole(
    shared: folder.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(files_module, "_LARGE", limit)
    image = grey(tmp_path / "images" / "a.tif", 141, 157)
    whole = predict(shared, read_image(image)[0, 0], output="scores", progress=False)
    options: dict[str, Any] = {"tile": (96, 104), "batch": 2, "scores": True}
    labels, scores = predict_files(shared, image, tmp_path / "out", **options)
    np.testing.assert_allclose(tifffile.imread(scores), whole, rtol=0, atol=1e-5)
    first, second = np.sort(whole, axis=0)[:-3:-1]
    clear = first - second > 1e-5
    assert clear.mean() > 0.9
    assert np.array_equal(tifffile.imread(labels)[clear], whole.argmax(0)[clear])


def test_zarr(shared: folder.Run, tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr", minversion="3")
    images = tmp_path / "images"
    picture = grey(images / "b10.png", 40, 50)
    values = np.random.default_rng(0).integers(0, 255, (2, 40, 50)).astype(np.uint8)
    named = zarr.create_array(
        images / "b2.zarr", shape=values.shape, dtype="u1", chunks=(1, 16, 16), zarr_format=3,
        dimension_names=["z", "y", "x"],
    )  # fmt: skip
    named[...] = values
    group = zarr.create_group(images / "c.ome.zarr", zarr_format=3)
    axes = [{"name": n, "type": "space"} for n in "yx"]
    group.attrs["ome"] = {"multiscales": [{"axes": axes, "datasets": [{"path": "s"}]}]}
    group.create_array("s", data=values[1])
    out = tmp_path / "out"
    written = predict_files(shared, images, out, scores=True)
    names = ["b2.zarr", "b2_scores.zarr", "b10.png", "b10_scores.tif", "c.zarr", "c_scores.zarr"]
    assert [path.name for path in written] == names
    assert {path.name for path in out.iterdir()} == set(names)
    expected = [predict(shared, page, progress=False) for page in values]
    assert np.array_equal(zarr.open(out / "b2.zarr")["0"][...], expected)
    assert np.array_equal(zarr.open(out / "c.zarr")["0"][...], expected[1])
    scores = zarr.open(out / "b2_scores.zarr")["0"][...]
    assert np.array_equal(scores.argmax(1), expected)

    (one,) = predict_files(shared, picture, tmp_path / "one.zarr")
    expected_one = predict(shared, read_image(picture)[0, 0], progress=False)
    assert np.array_equal(zarr.open(one)["0"][...], expected_one)
    (two,) = predict_files(shared, images / "b2.zarr", tmp_path / "two.TIF")
    assert np.array_equal(read_labels(two), expected)
    with pytest.raises(UserError, match=r"one\.zarr exists"):
        predict_files(shared, picture, one)
    zarr.create_array(tmp_path / "more" / "c.zarr", data=values[0])
    with pytest.raises(UserError, match=r"c\.zarr and .*c\.ome\.zarr would both"):
        predict_files(shared, [tmp_path / "more", images], tmp_path / "other")


def test_a_file_for_one_image(shared: folder.Run, tmp_path: Path) -> None:
    images = tmp_path / "images"
    image = grey(images / "a.png", 20, 30)
    written = predict_files(shared, images, tmp_path / "b.png", probabilities=True)
    assert written == [tmp_path / "b.png", tmp_path / "b_probabilities.tif"]
    assert read_labels(written[0]).shape == (1, 20, 30)
    stack = grey(images / "e.tif", 3, 20, 30)
    for files, output, message in [
        (images, tmp_path / "c.tif", "is to hold 2 images: name a folder"),
        (stack, tmp_path / "c.png", "too large for a PNG: name a .tif"),
        (image, tmp_path / "b.png", r"b\.png exists"),
        (image, image, "is an image to predict"),
        (image, tmp_path / "b.png" / "c.tif", "cannot write"),
    ]:
        with pytest.raises(UserError, match=message):
            predict_files(shared, files, output)
    (named,) = predict_files(shared, stack, tmp_path / "new" / "c.tiff")
    assert read_labels(named).shape == (3, 20, 30)
    (tmp_path / "folder.tif").mkdir()
    assert predict_files(shared, image, tmp_path / "folder.tif") == [
        tmp_path / "folder.tif" / "a.png"
    ]
    assert not list(tmp_path.rglob(f"*{files_module.JOURNAL}"))


def test_an_image_named_twice_is_predicted_once(shared: folder.Run, tmp_path: Path) -> None:
    image = grey(tmp_path / "images" / "a.png", 20, 30)
    twice = [image, image.parent, image.parent / ".." / "images" / "a.png"]
    assert predict_files(shared, twice, tmp_path / "out") == [tmp_path / "out" / "a.png"]


def test_one_plan_serves_many_pictures(
    shared: folder.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    for i in range(50):
        grey(images / f"{i}.png", 20 + i % 3, 30 - i % 5)
    planned: list[tuple[int, ...]] = []
    prepare = Job.prepare

    def counted(job: Job, found: Any, **options: Any) -> Any:
        planned.append(found[0].shape)
        return prepare(job, found, **options)

    monkeypatch.setattr(Job, "prepare", counted)
    assert len(predict_files(shared, images, tmp_path / "out")) == 50
    assert len(planned) == len(set(planned)) == 15  # a size
    planned.clear()
    tiled = [grey(tmp_path / "larger" / f"{i}.png", 110, 90) for i in range(3)]
    predict_files(shared, tiled, tmp_path / "tiled", tile=96)
    assert planned == [(1, 110, 90)]


# Killed and resumed

KILLED = """
import os, signal, sys
from segfuse import journal, prediction_files as files
from segfuse.tiling import targets

files._LARGE, journal._PAUSE = 40_000, 0.0
left = int(sys.argv[4])

def deadly(function):
    def called(*arguments, **options):
        global left
        function(*arguments, **options)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return called

files.write_labels = deadly(files.write_labels)
targets._Stage.save = deadly(targets._Stage.save)
files.predict_files(*sys.argv[1:4], tile=128, threads=1, device="cpu")
"""


def test_killed_and_resumed(
    shared: folder.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = tmp_path / "images"
    small = [grey(images / name, 20, 30) for name in ("0.png", "1.png", "2.png", "4.png")]
    large = grey(images / "3.tif", 1300, 40)
    outputs = {3: tmp_path / "early", 3 + 1 + 2: tmp_path / "late"}  # in 2.png; 1024 rows of 3.tif
    dying = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, *map(str, [shared.path, images, out, left])]
        )
        for left, out in outputs.items()
    ]
    monkeypatch.setattr(files_module, "_LARGE", 40_000)
    whole = {
        path.name: path.read_bytes()
        for path in predict_files(shared, images, tmp_path / "whole", tile=128)
    }
    assert sorted(whole) == ["0.png", "1.png", "2.png", "3.tif", "4.png"]
    assert [process.wait() for process in dying] == [-signal.SIGKILL] * 2
    starts: list[int] = []
    write = files_module._Targets.write

    def spied(targets: Any, start: int, band: Any) -> None:
        starts.append(start)
        write(targets, start, band)

    monkeypatch.setattr(files_module._Targets, "write", spied)
    for out, counted, first in [(tmp_path / "early", 2, 0), (tmp_path / "late", 3, 1024)]:
        journal = json.loads((out / JOURNAL).read_text())
        finished = [out / Path(file).name for file in journal["finished"]]
        assert finished == [out / file.name for file in small[:counted]]
        assert (out / "2.png").exists()
        before = {path: untouched(path) for path in finished}
        (out / ".partial-1-4.png").touch()  # left by a killed writer
        (out / ".partial-1-thesis.tif").touch()  # another's
        with pytest.raises(UserError, match=r"interrupted prediction left: go on .*\(--resume\)"):
            predict_files(shared, images, out, tile=128)
        written = predict_files(shared, images, out, tile=128, resume=True)
        assert [path.name for path in written] == sorted(whole)
        assert all(untouched(path) == state for path, state in before.items())
        assert {path.name for path in out.iterdir()} == {*whole, ".partial-1-thesis.tif"}
        assert {path.name: path.read_bytes() for path in written} == whole
        assert min(starts) == first
        starts.clear()
    assert large.exists()


class StopError(Exception):
    """Raised where a test stops a prediction."""


def interrupted(
    monkeypatch: pytest.MonkeyPatch, count: int, *arguments: Any, **options: Any
) -> None:
    """Predict files, but only so many."""
    left = iter(range(count))

    def failing(*given: Any, **more: Any) -> None:
        if next(left, None) is None:
            raise StopError
        write_labels(*given, **more)

    monkeypatch.setattr(files_module, "write_labels", failing)
    with pytest.raises(StopError):
        predict_files(*arguments, **options)
    monkeypatch.setattr(files_module, "write_labels", write_labels)


def test_what_changed_is_not_gone_on_with(
    shared: folder.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    for i in range(4):
        grey(images / f"{i}.png", 20, 30)
    interrupted(monkeypatch, 2, shared, images, out, probabilities=True)
    assert {path.name for path in out.iterdir()} == {
        *(f"{i}{ending}" for i in range(2) for ending in (".png", "_probabilities.tif")), JOURNAL,
    }  # fmt: skip
    before = tree(out)
    other = write_run(tmp_path / "other", base=4)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"run": other}, "begun otherwise: the model has changed: undo that, or begin anew"),
        ({"augment": "d4"}, 'augment: was null, is "d4"'),
        ({"probabilities": False}, r'results: was \["labels", "probabilities"\], is \["labels"\]'),
        ({"tile": (32, 64), "border": "edge"}, r'border: was "mirror".*tile: was "auto", is \[32'),
        ({"resume": False}, "interrupted prediction left"),
    ]
    same: dict[str, Any] = {"run": shared, "images": images, "output": out, "probabilities": True}
    for options, message in cases:
        with pytest.raises(UserError, match=message) as error:
            predict_files(**{**same, "resume": True, **options})
        assert "\n" not in str(error.value)
        assert tree(out) == before
    kept = (images / "1.png").read_bytes()
    grey(images / "1.png", 21, 30)
    with pytest.raises(UserError, match=r"1\.png has changed since it was predicted"):
        predict_files(**same, resume=True)
    assert tree(out) == before
    predict_files(**same, resume=True, overwrite=True)  # what has changed is predicted again
    assert read_labels(out / "1.png").shape == (1, 21, 30)
    assert JOURNAL not in tree(out)
    with pytest.raises(UserError, match=r"0\.png exists, and nothing says that it is of this"):
        predict_files(**same, resume=True)
    (images / "1.png").write_bytes(kept)
    interrupted(monkeypatch, 1, **same, overwrite=True)
    assert predict_files(**{**same, "run": other}, overwrite=True)  # begun anew
    expected = predict(other, read_image(images / "0.png")[0, 0], progress=False)
    assert np.array_equal(read_labels(out / "0.png")[0] == 255, expected == 1)


def test_resuming_what_overwrote_or_lost_its_results(
    shared: folder.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    for i in range(3):
        grey(images / f"{i}.png", 20, 30)
    predict_files(shared, images, out)
    expected = tree(out)
    (out / "2.png").write_text("old")
    interrupted(monkeypatch, 1, shared, images, out, overwrite=True)
    (out / "0.png").unlink()
    (out / JOURNAL).write_text((text := (out / JOURNAL).read_text())[:-9])
    with pytest.raises(UserError, match=r"segfuse-predict\.json is damaged: begin anew"):
        predict_files(shared, images, out, resume=True)
    (out / JOURNAL).write_text(text)
    predict_files(shared, images, out, resume=True)
    assert tree(out) == expected


@pytest.mark.usefixtures("all_are_large")
def test_resuming_large_files(shared: folder.Run, tmp_path: Path) -> None:
    image = grey(tmp_path / "images" / "a.tif", 40, 50)
    out = tmp_path / "out"
    (result,) = predict_files(shared, image, out, resume=True)  # nothing was begun: it begins
    before = untouched(result)
    assert predict_files(shared, image, out, resume=True) == [result]  # which says whose it is
    assert untouched(result) == before
    with pytest.raises(UserError, match=r"a\.tif exists and is of another model, image or plan"):
        predict_files(write_run(tmp_path / "other", base=4), image, out, resume=True)
    assert untouched(result) == before
    (out / "a.tif.partial").mkdir()
    with pytest.raises(UserError, match=r"a\.tif\.partial holds what an interrupted"):
        predict_files(shared, image, out)


def test_one_process_predicts_into_a_folder(shared: folder.Run, tmp_path: Path) -> None:
    image = grey(tmp_path / "images" / "a.png", 20, 30)
    (tmp_path / "out").mkdir()
    with (
        journal._locked(tmp_path / "out"),
        pytest.raises(UserError, match="another process predicts into"),
    ):
        predict_files(shared, image, tmp_path / "out")
    predict_files(shared, image, tmp_path / "out")
