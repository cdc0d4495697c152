"""Prediction: of any size, without a seam at the border, and to files like those learned from."""

from __future__ import annotations

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
    with pytest.raises(ValueError, match="predict: image: "):
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

from segfuse import run as folder  # noqa: E402
from segfuse.data import LabelCoding, palette_of, read_image, read_labels  # noqa: E402
from segfuse.errors import UserError  # noqa: E402
from segfuse.prediction import predict_files  # noqa: E402


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
