"""The demo: its figures, its files, and that training never sees the held-out part."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from segfuse import demo
from segfuse.errors import UserError
from segfuse.metrics import detection_scores, overlaps, panoptic_quality
from segfuse.models import UNet
from segfuse.prediction import predict

for package in demo.PACKAGES:
    if demo.find_spec(package) is None:
        pytest.skip("needs segfuse[demo]", allow_module_level=True)

import tifffile  # noqa: E402
from matplotlib.image import imread  # noqa: E402
from scipy import ndimage  # noqa: E402

from segfuse import report  # noqa: E402


def weights(result: demo.Result) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(result.weights)["state_dict"]
    return state


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> demo.Result:
    return demo.run(tmp_path_factory.mktemp("demo") / "new", steps=1, threads=1)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the time of a picture that no one looks at."""
    monkeypatch.setattr(demo, "_draw", lambda path, *_: path.touch())


# What it measures


def test_scores(result: demo.Result) -> None:
    truth = demo._load()[1][demo.HELD_OUT] > 0
    assert result.steps == 1
    assert result.background == demo.Score(1 - truth.mean(), 0, 0, 0)
    assert result.otsu.iu == pytest.approx(0.767, abs=1e-3)
    assert result.otsu.accuracy == pytest.approx(0.954, abs=1e-3)
    mask = tifffile.imread(result.prediction)
    assert mask.dtype == np.uint8
    assert set(np.unique(mask)) <= {0, 255}
    assert result.unet.accuracy == np.mean((mask == 255) == truth)


def test_instances(result: demo.Result) -> None:
    mask, found = tifffile.imread(result.prediction), tifffile.imread(result.instances)
    assert found.dtype == np.uint16
    sizes = np.bincount(found.ravel())[1:]
    assert (sizes >= demo.SMALLEST).all()
    table = overlaps(found, demo._load()[1][demo.HELD_OUT])
    assert result.unet.average_precision == detection_scores(table).average_precision
    assert result.unet.panoptic_quality == panoptic_quality(table).pq
    kept = ndimage.label(mask)[0][(mask != 0) & (found == 0)]  # of specks alone
    assert (np.bincount(ndimage.label(mask)[0].ravel())[np.unique(kept)] < demo.SMALLEST).all()
    assert result.otsu.average_precision > 0.4


def test_score() -> None:
    prediction, ids = np.array([[1, 1, 0, 0, 0]]), np.array([[7, 0, 9, 0, 0]])
    score = demo._score(prediction == 1, prediction, ids)
    assert score == demo.Score(3 / 5, 1 / 3, average_precision=1 / 2, panoptic_quality=0)


def test_parts_share_no_pixel() -> None:
    image, truth = demo._load()
    assert image.shape == truth.shape == (512, 512)
    seen = np.zeros(image.shape, int)
    seen[demo.TRAINING] += 1
    seen[demo.HELD_OUT] += 1
    assert (seen == 1).all()


@pytest.mark.usefixtures("undrawn")
def test_weights_depend_on_the_seed_and_the_training_part_alone(
    result: demo.Result, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image, truth = demo._load()
    image[demo.HELD_OUT] = image[demo.HELD_OUT][::-1]
    truth[demo.HELD_OUT] = truth[demo.HELD_OUT][:, ::-1]
    monkeypatch.setattr(demo, "_load", lambda: (image, truth))
    again = demo.run(tmp_path / "again", steps=1, threads=1)
    assert equal(weights(again), weights(result))
    assert again.otsu != result.otsu

    other = demo.run(tmp_path / "other", steps=1, threads=1, seed=1)
    assert not equal(weights(other), weights(result))


def test_weights_file_is_enough_to_predict_again(result: demo.Result) -> None:
    saved = torch.load(result.weights)
    model = UNet(**saved["architecture"])
    model.load_state_dict(saved["state_dict"])
    low, high = saved["grey_range"]
    image = (demo._load()[0][demo.HELD_OUT].astype(np.float32) - low) / (high - low)
    mask = tifffile.imread(result.prediction) == 255
    assert (predict(model, image.astype(np.float32)) == mask).mean() > 0.9999


@pytest.mark.usefixtures("undrawn")
def test_stops_when_the_time_is_up(tmp_path: Path) -> None:
    assert demo.run(tmp_path, steps=3, seconds=1e-6, threads=1).steps == 1


@pytest.mark.usefixtures("undrawn")
def test_leaves_torch_as_it_was(tmp_path: Path) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    demo.run(tmp_path, steps=1, threads=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


# What it writes


def test_overlay(result: demo.Result) -> None:
    picture = imread(result.overlay)[..., :3]
    assert picture.shape[0] >= 1024
    assert len(np.unique(picture[..., 0])) > 100
    for colour in (report.FALSE_POSITIVE, report.FALSE_NEGATIVE):
        red_green_blue = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (np.abs(picture - red_green_blue) < 1 / 255).all(-1).sum() > 1000


@pytest.mark.parametrize("empty", [False, True])
def test_comparison_of_uniform_masks(tmp_path: Path, *, empty: bool) -> None:
    image = np.full((60, 80), 7)
    held_out = np.s_[10:50, 0:30]
    mask = np.full((40, 30), empty)
    report.comparison(image, held_out, mask, {"same": mask}, title="").savefig(tmp_path / "a.png")


def test_error_overlay() -> None:
    grey = np.full((1, 4), 0.5, np.float32)
    truth, prediction = np.array([[0, 0, 1, 1]]) == 1, np.array([[0, 1, 0, 1]]) == 1
    background, positive, negative, hit = report.error_overlay(grey, truth, prediction)[0]
    assert (background == 0.5).all()
    assert (hit == 0.5).all()
    assert positive[0] > positive[2]  # orange
    assert negative[2] > negative[0]  # blue


def test_object_overlay() -> None:
    grey = np.full((1, 5), 0.5, np.float32)
    picture = report.object_overlay(grey, np.array([[0, 1, 1, 2, 60000]]))[0]
    assert (picture[0] == 0.5).all()
    assert np.array_equal(picture[1], picture[2])
    assert len(np.unique(picture[1:], axis=0)) == 3
    assert picture.min() >= 0
    assert picture.max() <= 1


def test_directory(tmp_path: Path) -> None:
    demo._claim(tmp_path / "deep" / "new", overwrite=False)
    demo._claim(tmp_path / "deep" / "new", overwrite=False)  # an earlier demo's

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / demo.WEIGHTS).touch()  # of that name, and yet not the demo's
    with pytest.raises(demo.DemoError, match=r"weights\.pt"):
        demo._claim(tmp_path / "mine", overwrite=False)
    demo._claim(tmp_path / "mine", overwrite=True)

    (tmp_path / "file").touch()
    with pytest.raises(demo.DemoError, match="cannot write into"):
        demo._claim(tmp_path / "file", overwrite=True)


@pytest.mark.usefixtures("undrawn")
def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / demo.MARKER).touch()
    (tmp_path / demo.PREDICTION).write_text("old")

    def fail_halfway(path: Path, _: Any) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tifffile, "imwrite", fail_halfway)
    with pytest.raises(UserError, match=r"cannot write .*prediction\.tif: No space left"):
        demo.run(tmp_path, steps=1, threads=1)
    assert (tmp_path / demo.PREDICTION).read_text() == "old"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {demo.MARKER, demo.OVERLAY, demo.PREDICTION, demo.WEIGHTS}


@pytest.mark.parametrize(
    "bad",
    [
        {"seed": -1},
        {"seed": 2**63},
        {"steps": 0},
        {"seconds": 0},
        {"seconds": float("inf")},
        {"threads": 0},
    ],
)
def test_values_out_of_range(tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        demo.run(tmp_path / "new", **bad)
    assert not (tmp_path / "new").exists()


def test_result_is_data(result: demo.Result) -> None:
    assert dataclasses.replace(result) == result
    assert result.seconds > 0
