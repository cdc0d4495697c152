"""The U-Net paper's ways to train: elastic deformation, and touching cells kept apart."""

from __future__ import annotations

import csv
import inspect
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

for package in ("lightning", "matplotlib", "rich", "safetensors", "tifffile", "tomli_w"):
    pytest.importorskip(package)

import tifffile  # noqa: E402
from runs import TINY, one_thread, write_pictures  # noqa: E402, F401
from safetensors.torch import load_file  # noqa: E402
from skimage.measure import label  # noqa: E402

from segfuse import course, training  # noqa: E402
from segfuse import run as folder  # noqa: E402
from segfuse.course import Course  # noqa: E402
from segfuse.data import LabelCoding  # noqa: E402
from segfuse.data.augment import Deform  # noqa: E402
from segfuse.data.patches import Patches, Picture  # noqa: E402
from segfuse.errors import UserError  # noqa: E402
from segfuse.nn import TouchingCrossEntropy  # noqa: E402
from segfuse.ops import separate_touching, unet_weight_map  # noqa: E402
from segfuse.options import fill  # noqa: E402
from segfuse.run import Run  # noqa: E402
from segfuse.training import fit, resume  # noqa: E402

SMALL: dict[str, Any] = {**TINY, "patch": 24, "batch": 2, "steps": 6}
SMALL |= {"threads": 1, "precision": "32", "deform": 3.0, "rotate": 20.0, "scale": 1.2}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the time of pictures that no one looks at."""
    monkeypatch.setattr(training, "_draw", lambda *_: None)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pictures of discs in a row, that touch or overlap."""
    path = tmp_path_factory.mktemp("cells")
    random = np.random.default_rng(0)
    for name in ("images", "labels"):
        (path / name).mkdir()
    for i in range(4):
        ids = touching_discs(64)
        ids = np.rot90(ids, i).copy()
        edge = separate_touching(torch.from_numpy(ids)).numpy() == 0
        image = (200.0 * (ids > 0) - 90 * (edge & (ids > 0))) + random.normal(0, 8, ids.shape)
        tifffile.imwrite(path / f"images/{i}.tif", (image + 50).clip(0, 255).astype(np.uint8))
        tifffile.imwrite(path / f"labels/{i}.tif", ids.astype(np.uint16))
    return {"images": path / "images", "labels": path / "labels"}


def touching_discs(side: int, radius: int = 7) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Pairs of discs that share a straight edge."""
    rows, columns = np.mgrid[:side, :side]
    ids = np.zeros((side, side), np.int32)
    number = itertools.count(1)
    for y, x in itertools.product(range(9, side - 8, 18), range(9, side - 20, 28)):
        for middle, left in ((x, True), (x + 10, False)):
            near = np.hypot(rows - y, columns - middle) < radius
            ids[near & ((columns <= x + 5) == left)] = next(number)
    return ids


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.path / folder.WEIGHTS)


def same(run: Run, other: Run) -> bool:
    a, b = weights(run), weights(other)
    return all(torch.equal(a[name], b[name]) for name in a)


# Deformation


@pytest.mark.parametrize("margin", [0, 13])
@pytest.mark.parametrize("size", [(48, 48), (37, 50), (1, 3)])
def test_deform_keeps_image_and_labels_one(size: tuple[int, int], margin: int) -> None:
    height, width = (side + 2 * margin for side in size)
    coarse = torch.rand(3, 1, 5, 6, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    labels = (smooth[:, 0] > 0.5).to(torch.uint8)
    deform = Deform(std=3, rotation=30, scale=1.3, margin=margin, seed=1)
    image, target = deform(smooth, labels, 0)
    assert image.shape == smooth.shape
    assert target.shape == (3, *size)
    assert (image.dtype, target.dtype) == (torch.float32, torch.uint8)
    inner = image[:, 0, margin : height - margin, margin : width - margin]
    clear = (inner - 0.5).abs() > 0.12  # elsewhere the nearest pixel may lie on the other side
    assert torch.equal(target.bool()[clear], (inner > 0.5)[clear])
    if min(size) > 9:
        assert clear.float().mean() > 0.4
        assert not torch.equal(image, smooth)


def test_deform_with_margin_shows_what_lies_in_it() -> None:
    """The target takes labels from the margin, not from a mirror or a fill at its own border."""
    labels = torch.zeros(8, 40, 40, dtype=torch.int32)
    labels[:, :10] = 7
    image = labels[:, None].float()
    moved, target = Deform(std=8, margin=10)(image, labels, 3)
    inner = moved[:, 0, 10:-10, 10:-10]
    assert (target == 7).any()
    for value in (0, 7):
        assert torch.equal(
            (inner - value).abs() < 1e-4, (target == value) & ((inner - value).abs() < 1e-4)
        )
    assert set(target.unique().tolist()) == {0, 7}


def test_deform_is_a_function_of_seed_and_step() -> None:
    image, labels = torch.rand(2, 1, 30, 30), torch.randint(0, 9, (2, 30, 30))
    deform = Deform(seed=5)
    state = torch.get_rng_state()
    first = deform(image, labels, 4)
    assert torch.equal(torch.get_rng_state(), state)
    for again in (Deform(seed=5)(image, labels, 4), deform(image, labels, 4)):
        assert all(map(torch.equal, first, again))
    for other in (deform(image, labels, 5), Deform(seed=4)(image, labels, 5)):
        assert not torch.equal(first[0], other[0])
    assert not torch.equal(*deform(image[:1].expand(2, -1, -1, -1), labels, 4)[0])


def test_deform_of_nothing_changes_nothing() -> None:
    image, labels = torch.rand(2, 3, 30, 31), torch.randint(0, 9, (2, 30, 31))
    same_image, same_labels = Deform(std=0, margin=2)(image, labels, 0)
    torch.testing.assert_close(same_image, image)
    assert torch.equal(same_labels, labels[:, 2:-2, 2:-2])


def test_void_stays_void() -> None:
    labels = torch.zeros(4, 40, 40, dtype=torch.uint8)
    labels[:, 10:20, 10:30] = 255
    _, target = Deform()(torch.rand(4, 1, 40, 40), labels, 0)
    assert set(target.unique().tolist()) == {0, 255}


@pytest.mark.parametrize(
    ("option", "value"),
    [("std", -1), ("std", float("nan")), ("rotation", -1), ("scale", 0.5), ("margin", -1),
     ("seed", -1)],
)  # fmt: skip
def test_deform_out_of_range(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"Deform: {option}: expected at least"):
        Deform(**{option: value})


def test_deform_of_what_has_nothing_inside() -> None:
    with pytest.raises(ValueError, match="expected more than 20 pixels a side"):
        Deform(margin=10)(torch.rand(1, 1, 20, 30), torch.zeros(1, 20, 30, dtype=torch.uint8), 0)


# Patches


def test_wide_patches_label_the_margin() -> None:
    random = np.random.default_rng(0)
    target = random.integers(0, 3, (40, 50)).astype(np.uint8)
    picture = Picture(target[None].astype(np.float32), target)
    narrow, wide = (
        Patches([picture], size=24, margin=30, seed=3, gain=0, shift=0, wide=w) for w in (0, 1)
    )
    for i in range(20):
        image, labels = wide[i]
        assert labels.shape == image.shape[1:] == (84, 84)
        assert torch.equal(image[0], labels.float())
        assert torch.equal(image, narrow[i][0])
        assert torch.equal(labels[30:-30, 30:-30], narrow[i][1])


def test_patches_hand_on_instances() -> None:
    ids = np.arange(-1, 899, dtype=np.int32).reshape(30, 30)
    target = np.where(ids < 0, 255, ids > 0).astype(np.uint8)
    picture = Picture(ids[None].astype(np.float32), target, ids=ids)
    image, labels = Patches([picture], size=8, margin=2, gain=0, shift=0)[0]
    assert labels.dtype == torch.int32
    assert torch.equal(image[0, 2:-2, 2:-2], labels.float())
    with pytest.raises(ValueError, match="ids of instances in all, or in none"):
        Patches([picture, picture._replace(ids=None)], size=8)
    with pytest.raises(ValueError, match="of one C"):
        Patches([picture._replace(ids=ids[1:])], size=8)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_ids_of_instances(dtype: type) -> None:
    labels = np.array([[0, 255, 7], [200, 7, 0]], dtype)
    found = LabelCoding("instances", 2).instances(labels)
    assert found.dtype == np.int32
    assert found.tolist() == [[0, 3, 1], [2, 1, 0]]
    found = LabelCoding("instances", 2, ignore=200).instances(labels)
    assert found.tolist() == [[0, 2, 1], [-1, 1, 0]]
    assert LabelCoding("instances", 2, ignore=0).instances(labels).min() == -1
    assert LabelCoding("instances", 2).instances(labels[:0]).shape == (0, 3)


# The objective


def test_touching_target() -> None:
    ids = torch.from_numpy(touching_discs(64))[None].repeat(2, 1, 1)
    ids[1, :8] = -1
    ids[1, 8:12, 5] = 255  # an id like any other
    target, weight_map = TouchingCrossEntropy().target(ids)
    assert target.dtype == torch.uint8
    assert label(target[0].numpy()).max() == ids[0].max()
    assert label(ids[0].numpy() > 0).max() == ids[0].max() // 2
    assert torch.equal(target == 255, ids == -1)
    assert torch.equal(weight_map == 0, ids == -1)
    gaps = (target[0] == 0) & (ids[0] > 0)
    assert weight_map[0][gaps].min() > 9
    assert weight_map[0, 0, 0] < 1
    expected = unet_weight_map(separate_touching(ids[0]))
    assert torch.equal(weight_map[0], expected)
    # What is beside void is no gap.
    assert torch.equal(target[1, 8, 6:], target[0, 8, 6:])


@pytest.mark.parametrize("case", ["none", "all void", "one pixel each", "one cell"])
def test_touching_of_few_cells(case: str) -> None:
    ids = torch.zeros(2, 9, 10, dtype=torch.int32)
    if case == "all void":
        ids -= 1
    elif case == "one pixel each":
        ids = torch.arange(180, dtype=torch.int32).view(2, 9, 10)
    elif case == "one cell":
        ids += 3
    logits = torch.randn(2, 2, 9, 10, requires_grad=True)
    loss = TouchingCrossEntropy(class_weight=(0.7, 2.0))(logits, ids)
    loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    assert (loss == 0) == (case == "all void")


def test_touching_loss_is_the_weighted_mean() -> None:
    ids = torch.from_numpy(touching_discs(40))[None]
    logits = torch.randn(1, 2, 40, 40)
    module = TouchingCrossEntropy(w0=4, sigma=3, class_weight=(0.5, 3))
    target, weight_map = module.target(ids)
    each = F.cross_entropy(logits, target.long(), reduction="none")
    expected = (each * weight_map).sum() / weight_map.sum()
    torch.testing.assert_close(module(logits, ids), expected)
    assert "sigma=3" in repr(module)
    with pytest.raises(ValueError, match="void: expected a negative number, got 255"):
        TouchingCrossEntropy(void=255)


# In the program


class Killed(Exception):  # noqa: N818
    """Stands for a kill."""


@pytest.mark.parametrize(
    "options",
    [{"objective": "touching"}, {"solver": "unet-paper", "padding": "valid", "patch": 20}],
    ids=["touching", "margin"],
)
def test_resume_gives_the_same_weights(
    cells: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    options = {**SMALL, **options, "kind": "instances", "validation": 0}
    undisturbed = fit(**cells, output=tmp_path / "a", **options)
    still = fit(**cells, output=tmp_path / "b", **options | {"deform": 0, "rotate": 0, "scale": 1})
    assert not same(undisturbed, still)
    save = Course._save

    def killed(self: Course, trainer: Any, *rest: Any, **more: Any) -> None:
        save(self, trainer, *rest, **more)
        if trainer.global_step == 3:
            raise Killed

    monkeypatch.setattr(course.Course, "_save", killed)
    with pytest.raises(Killed):
        fit(**cells, output=tmp_path / "c", **options)
    monkeypatch.undo()
    monkeypatch.setattr(training, "_draw", lambda *_: None)
    assert same(resume(tmp_path / "c"), undisturbed)
    (tmp_path / "d").mkdir()
    shutil.copy(undisturbed.path / folder.CONFIG, tmp_path / "d")
    assert same(resume(tmp_path / "d"), undisturbed)


def test_touching_cells_are_told_apart(cells: dict[str, Path], tmp_path: Path) -> None:
    run = fit(
        **cells, output=tmp_path / "run", objective="touching", kind="instances", steps=120,
        base=4, depth=2, patch=48, batch=4, threads=1, precision="32", dropout=0, validation=0.25,
        deform=1, rotate=10, learning_rate=1e-2,
    )  # fmt: skip
    assert run.config["training"]["objective"] == "touching"
    ids = tifffile.imread(cells["labels"] / "0.tif")
    image = run.normalisation(tifffile.imread(cells["images"] / "0.tif")[None])
    with torch.no_grad():
        found = run.model()(torch.from_numpy(image)[None])[0].argmax(0).numpy()
    assert label(found, connectivity=1).max() == ids.max()
    best = run.config["result"]["best"]
    assert best["validation_mean_iu"] > 0.85
    with (run.path / folder.METRICS).open() as table:
        qualities = [row["validation_panoptic_quality"] for row in csv.DictReader(table)]
    assert best["validation_panoptic_quality"] == max(float(q) for q in qualities if q) > 0.5


def test_touching_needs_instances(
    cells: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = write_pictures(tmp_path / "masks")
    for files, kind in [(masks, "auto"), (cells, "classes"), (cells, "binary")]:
        read_as = "binary" if kind == "auto" else kind
        with pytest.raises(UserError, match=f"read as {read_as}: if their numbers .* instances;"):
            fit(**files, output=tmp_path / "run", **SMALL, objective="touching", kind=kind)
    with pytest.raises(UserError, match="objective: expected classes or touching, got 'cells'"):
        fit(**cells, output=tmp_path / "run", **SMALL, objective="cells")
    assert not (tmp_path / "run").exists()


def test_touching_needs_two_cells(tmp_path: Path) -> None:
    masks = write_pictures(tmp_path / "masks")
    with pytest.raises(UserError, match="no picture to train on has two ids, by which objective"):
        fit(**masks, output=tmp_path / "run", **SMALL, objective="touching", kind="instances")


@pytest.mark.parametrize("objective", ["classes", "touching"])
def test_class_weight(objective: str) -> None:
    ids = np.zeros((8, 9), np.int32)
    ids[2:6, 1:4], ids[2:6, 4:7], ids[0] = 1, 2, -1
    target = np.where(ids < 0, 255, ids > 0).astype(np.uint8)
    pictures = [Picture(np.zeros((1, 8, 9), np.float32), target, ids=ids)] * 2
    given = {name: p.default for name, p in inspect.signature(fit).parameters.items()}
    given |= {"solver": "unet-paper", "objective": objective}
    assert fill(given)[1].class_weight == ("balanced" if objective == "touching" else "none")
    with pytest.raises(UserError, match="class_weight: expected none or balanced, got 'half'"):
        fill(given | {"class_weight": "half"})
    (_, plain), (_, balanced) = (fill(given | {"class_weight": w}) for w in ("none", "balanced"))
    assert training._loss(plain, pictures, 2).class_weight is None
    cells = 20 if objective == "touching" else 24  # without the gap
    expected = [63 / (2 * (63 - cells)), 63 / (2 * cells)]
    assert list(training._loss(balanced, pictures, 2).class_weight) == pytest.approx(expected)
    if objective == "classes":  # of three, of which one is not there
        weights = training._loss(balanced, pictures, 3).class_weight
        assert list(weights) == pytest.approx([*expected, 1])


def test_ids_that_changed_are_noticed(cells: dict[str, Path], tmp_path: Path) -> None:
    files = {name: shutil.copytree(path, tmp_path / name) for name, path in cells.items()}
    options = {**SMALL, "steps": 1, "objective": "touching", "kind": "instances"}
    run = fit(**files, output=tmp_path / "run", **options, validation=0)
    (run.path / folder.WEIGHTS).unlink()
    (run.path / folder.BEST).unlink()
    ids = tifffile.imread(files["labels"] / "0.tif")
    tifffile.imwrite(files["labels"] / "0.tif", np.minimum(ids, 1))  # the same foreground
    with pytest.raises(UserError, match="have changed since"):
        resume(run.path)


@pytest.mark.parametrize(
    ("option", "value"),
    [("deform", -1), ("deform", "far"), ("rotate", 181), ("scale", 0.5), ("scale", float("nan"))],
)
def test_options_out_of_range(
    cells: dict[str, Path], tmp_path: Path, option: str, value: Any
) -> None:
    with pytest.raises(UserError, match=f"{option}: expected"):
        fit(**cells, output=tmp_path / "run", **{**SMALL, option: value})


def test_defaults_and_older_configs(cells: dict[str, Path], tmp_path: Path) -> None:
    options = {**SMALL, "steps": 1, "kind": "instances", "deform": None}
    run = fit(**cells, output=tmp_path / "a", **options)
    assert run.config["training"]["deform"] == 0
    paper = fit(**cells, output=tmp_path / "b", **options | {"patch": None}, solver="unet-paper")
    assert paper.config["training"]["deform"] == 10
    touching = fit(**cells, output=tmp_path / "e", **options, objective="touching")
    assert touching.config["training"]["deform"] == round(SMALL["patch"] / 12, 1)
    assert touching.config["training"]["class_weight"] == "none"
    plain = fit(**cells, output=tmp_path / "c", **options | {"rotate": 0.0, "scale": 1.0})
    config = dict(plain.config)
    del config["result"]
    config["training"] = {
        name: value
        for name, value in config["training"].items()
        if name not in {"objective", "class_weight", "deform", "rotate", "scale"}
    }
    (tmp_path / "d").mkdir()
    folder.write_config(tmp_path / "d", config)
    assert same(resume(tmp_path / "d"), plain)
