"""Images and labels of another size than their files', and colours of classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("matplotlib", "tifffile", "tomli_w", "safetensors", "skimage"):
    pytest.importorskip(package)

from PIL import Image  # noqa: E402
from runs import one_thread, write_run  # noqa: E402, F401

import segfuse  # noqa: E402
from segfuse import pictures, report  # noqa: E402
from segfuse import run as folder  # noqa: E402
from segfuse.data import LabelCoding, Normalisation, Resize, read_colours, read_labels  # noqa: E402
from segfuse.data.pairs import Pair  # noqa: E402
from segfuse.data.resize import nearest, restored  # noqa: E402
from segfuse.errors import UserError  # noqa: E402

random = np.random.default_rng(0)


@pytest.mark.parametrize("value", [0.5, 2.0, [7, 9], None])
def test_resize_comes_back_from_plain_values(value: float | list[int] | None) -> None:
    resize = Resize.of(value)
    assert (resize and resize.plain()) == value
    assert resize is None or Resize.of(resize.plain()) == resize


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), [3], [0, 3], [2.5, 3], "big"])
def test_resize_out_of_range(value: object) -> None:
    with pytest.raises((ValueError, TypeError), match=r"resize: expected|not iterable|float"):
        Resize.of(value)


def test_sizes() -> None:
    assert Resize(factor=0.5).target(360, 480) == (180, 240)
    assert Resize(factor=0.01).target(3, 480) == (1, 5)
    assert Resize(size=(7, 9)).target(360, 480) == (7, 9)
    assert Resize(factor=0.5).rows(slice(100, None), 360, 480) == slice(50, None)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (20, 31), (41, 13)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_images_keep_their_range(size: tuple[int, int], dtype: type) -> None:
    image = random.integers(3, 250, (3, 20, 31)).astype(dtype)
    resized = Resize(size=size).image(image)
    assert resized.dtype == dtype
    assert resized.shape == (3, *size)
    assert (image.min() <= resized).all()
    assert (resized <= image.max()).all()
    same = np.full_like(image, 77)
    assert (Resize(size=size).image(same) == 77).all()
    if size == image.shape[1:]:
        assert (resized == image).all()


def test_smaller_images_are_averages() -> None:
    stripes = np.tile(np.array([0, 200], np.float32), (1, 16, 16))
    inside = Resize(factor=0.25).image(stripes)[:, 1:-1, 1:-1]
    assert np.abs(inside - 100).max() < 20  # every fourth pixel would be 0 or 200


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (20, 31), (41, 13), (60, 93)])
def test_labels_are_the_nearest(size: tuple[int, int]) -> None:
    labels = random.integers(0, 300, (2, 20, 31))
    resized = Resize(size=size).labels(labels)
    peer = Image.fromarray(labels[1].astype(np.int32)).resize(size[::-1], Image.Resampling.NEAREST)
    assert (resized[1] == np.asarray(peer)).all()
    if size == (60, 93):  # what was enlarged by an odd factor comes back
        assert (nearest(resized, (20, 31)) == labels).all()


def test_restored_scores_are_interpolated() -> None:
    rows = np.linspace(0, 1, 8, dtype=np.float32)[:, None] * np.ones((2, 3, 8, 8), np.float32)
    large = restored(rows, (32, 32), scores=True)
    assert large.shape == (2, 3, 32, 32)
    assert (np.diff(large, axis=2) >= -1e-6).all()
    assert np.abs(np.diff(large, axis=2)).max() < 0.05


def test_pictures_are_resized_before_a_block_is_cut(tmp_path: Path) -> None:
    image, labels = random.integers(0, 255, (40, 30), np.uint8), np.zeros((40, 30), np.uint8)
    labels[20:] = 1
    for name, values in [("image", image), ("labels", labels)]:
        Image.fromarray(values).save(tmp_path / f"{name}.png")
    pair = Pair("a", tmp_path / "image.png", tmp_path / "labels.png", rows=(20, 40))
    coding, none = LabelCoding("classes", 2), Normalisation("none")
    (block,) = pictures.read([pair], coding, none, resize=Resize(0.5), instances=True)
    assert block.image.shape == (1, 10, 15)
    assert (block.target == 1).all()
    assert block.ids is not None
    assert block.ids.shape == (10, 15)


@pytest.mark.parametrize("resize", [0.5, [13, 11]])
def test_predictions_have_the_size_of_the_image(tmp_path: Path, resize: float | list[int]) -> None:
    run = write_run(tmp_path / "run", LabelCoding("classes", 3))
    run.config["data"]["resize"] = resize
    folder.write_config(run.path, run.config)
    image = random.integers(0, 255, (37, 26), np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(image).save(tmp_path / "images" / "a.png")
    found = segfuse.predict(run, image, device="cpu")
    small = Resize.of(resize).image(image[None])  # type: ignore[union-attr]
    network = run.network(torch.device("cpu"))
    tensor = torch.from_numpy(run.normalisation(small))
    expected = nearest(segfuse.predict(network, tensor).numpy(), image.shape)
    assert (found == expected).all()
    scores = segfuse.predict(run, torch.from_numpy(image)[None], output="scores", device="cpu")
    assert scores.shape == (3, 37, 26)
    written = segfuse.predict_files(
        run, tmp_path / "images", tmp_path / "out", scores=True, device="cpu"
    )
    assert (read_labels(written[0])[0] == found).all()
    with pytest.raises(ValueError, match="out: expected None with a run that resizes"):
        segfuse.predict(run, image, out=np.empty((37, 26), np.uint8), device="cpu")


def test_config_whose_resize_is_damaged(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    run.config["data"]["resize"] = [1, 2, 3]
    with pytest.raises(UserError, match="is damaged: resize: expected"):
        _ = run.resize


# Colours


def test_colours_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "colours.txt"
    file.write_text("#ff8000\n\n 1, 2 ,3\n4 5\t6 sky\n#0a0B0c grass\n")
    palette = read_colours(file, 4)
    assert len(palette) == 768
    assert palette[:12] == (255, 128, 0, 1, 2, 3, 4, 5, 6, 10, 11, 12)
    colours = report.class_colours(4, palette)
    assert (colours[1] * 255).round().tolist() == [1, 2, 3]
    assert colours[-1].tolist() == pytest.approx([0.75] * 3, abs=1e-2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#ff8000\n", "expected 2 colours, a line each, got 1"),
        ("#ff8000\n1 2 3\n4 5 6\n", "expected 2 colours, a line each, got 3"),
        ("1 2\n1 2 3\n", "expected #RRGGBB, or three numbers from 0 to 255, got '1 2'"),
        ("1 2 256\n1 2 3\n", "got '1 2 256'"),
        ("#ff80\n1 2 3\n", "got '#ff80'"),
        (None, "cannot read"),
    ],
)
def test_what_are_no_colours(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "colours.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_colours(tmp_path / "colours.txt", 2)
