"""What an inspection finds, and that it lists what is wrong instead of stopping at it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("imagecodecs")
tifffile = pytest.importorskip("tifffile")
pytest.importorskip("skimage")
Image = pytest.importorskip("PIL.Image")

from numpy.typing import NDArray  # noqa: E402

from segfuse.data import inspect, write_labels  # noqa: E402
from segfuse.data.inspection import _touching  # noqa: E402
from segfuse.errors import UserError  # noqa: E402

DATA = Path(__file__).parents[2] / "shared/data"
H, W = 12, 20


def noise(*shape: int, top: int = 200) -> NDArray[np.uint8]:
    return np.random.default_rng(shape).integers(3, top, shape).astype(np.uint8)


def save(folder: Path, pictures: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, picture in pictures.items():
        if isinstance(picture, bytes):
            (folder / name).write_bytes(picture)
        else:
            Image.fromarray(picture).save(folder / name)
    return folder


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("ignore", [None, 3])
def test_touching_pairs_against_the_definition(seed: int, ignore: int | None) -> None:
    labels = np.random.default_rng(seed).integers(0, 4 + seed // 4, (6, 7)) * (seed % 3 + 1)
    pairs = set()
    for y, x in np.ndindex(labels.shape):
        around = labels[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
        pairs |= {frozenset((int(labels[y, x]), int(other))) for other in around.ravel()}
    expected = sum(len(pair) == 2 and not pair & {0, ignore} for pair in pairs)
    assert _touching(labels, ignore) == expected
    assert _touching(labels[:1, :1], ignore) == 0


def test_images_alone(tmp_path: Path) -> None:
    save(tmp_path, {"a.png": noise(H, W), "b.png": noise(W, H), "c.png": noise(W, H, top=90)})
    stack = noise(5, W, H)
    tifffile.imwrite(tmp_path / "d.tif", stack, photometric="minisblack")
    found = inspect(tmp_path)
    assert (found.files, found.pages, found.sampled) == (4, 8, 8)
    assert found.sizes == {(W, H): 7, (H, W): 1}
    assert (found.channels, found.dtypes) == ({1: 8}, {"uint8": 8})
    assert found.problems == ()
    assert found.grey is not None
    assert found.grey[0] == 3
    assert list(found.grey) == sorted(found.grey)
    assert (found.coding, found.label_files) == (None, 0)
    assert found.lines()[:2] == [
        "images: 4 files, 8 pages",
        f"rows x columns: {W} x {H} (7 pages), {H} x {W} (1 page)",
    ]


def test_classes(tmp_path: Path) -> None:
    labels = np.zeros((H, W), np.uint8)
    labels[:3], labels[3:6], labels[-1] = 1, 2, 255
    images = save(tmp_path / "x", {"a.png": noise(H, W, 3)})
    found = inspect(images, save(tmp_path / "y", {"a.png": labels}))
    assert found.coding is not None
    assert (found.coding.kind, found.coding.classes) == ("classes", 3)
    assert found.shares == pytest.approx((5 / 11, 3 / 11, 3 / 11))
    assert found.void == pytest.approx(1 / 12)
    assert (found.instances, found.touching, found.problems) == (None, None, ())
    assert "  2: 27.27%" in found.lines()
    two = inspect(images, tmp_path / "y", kind="classes", ignore=2, classes=256 - 1, names=None)
    assert two.coding is None
    assert "id 255" in two.problems[0]


def test_instances(tmp_path: Path) -> None:
    grid = np.kron(np.arange(1, 13).reshape(3, 4), np.ones((4, 5), int)).astype(np.uint8)
    apart = grid.copy()
    apart[::4], apart[:, ::5] = 0, 0
    few = np.where(apart > 4, 0, apart).astype(np.uint8)
    images = save(tmp_path / "x", {f"{name}.png": noise(H, W) for name in "abc"})
    labels = save(tmp_path / "y", {"a.png": grid, "b.png": apart, "c.png": few})
    found = inspect(images, labels)
    assert found.coding is not None
    assert found.coding.kind == "instances"
    assert found.instances == (4, 12, 12)
    assert found.touching == 3 * 3 + 2 * 4 + 2 * 6  # across, down, and at corners
    assert found.shares[1] == pytest.approx(np.mean([grid > 0, apart > 0, few > 0]))
    assert "instances a page: 4 to 12, median 12" in found.lines()


def test_what_is_wrong_is_listed(tmp_path: Path) -> None:
    mask = (noise(H, W) > 100) * np.uint8(255)
    images = save(
        tmp_path / "x",
        {
            "a.png": noise(H, W),
            "flat.png": np.full((H, W), 7, np.uint8),
            "colour.png": noise(H, W, 3),
            "deep.png": noise(H, W).astype(np.uint16),
            "empty.png": b"",
            "lonely.png": noise(H, W),
            "size.png": noise(H, W),
            "text.png": b"text",
        },
    )
    good = ("a.png", "flat.png", "colour.png", "deep.png", "empty.png", "text.png")
    labels = save(
        tmp_path / "y",
        dict.fromkeys(good, mask)
        | {"flat.png": mask * np.uint8(0), "size.png": mask.T, "stranger.png": mask},
    )
    cut = (labels / "colour.png").read_bytes()
    (labels / "colour.png").write_bytes(cut[: len(cut) // 2])
    found = inspect(images, labels)
    problems = "\n".join(found.problems)
    assert (found.files, found.pages, found.label_files, found.label_pages) == (8, 6, 7, 6)
    assert found.coding is not None
    assert found.coding.kind == "binary"
    assert len(found.problems) == len(set(found.problems)) == 10
    for problem in (
        "empty.png is empty",
        "text.png is not a PNG",
        "images differ in number of channels: 1 (5 pages), 3 (1 page)",
        "images differ in dtype: uint8 (5 pages), uint16 (1 page)",
        "1 page of images with one value: flat.png",
        "1 of 8 images lack labels: lonely.png",
        "1 of 8 labels lack images: stranger.png",
        f"size.png is {H} x {W} pixels",
        "colour.png: image file is truncated",
        "1 page of labels with background alone: flat.png",
    ):
        assert problem in problems


def test_links_to_no_file_are_told(tmp_path: Path) -> None:
    sides = [save(tmp_path / side, {"a.png": noise(H, W) % 2}) for side in "xy"]
    for side in sides:
        (side / "b.png").symlink_to("gone")
        (side / "c.txt").symlink_to("gone")
    found = inspect(*sides)
    assert found.files == found.label_files == 1
    assert found.problems == tuple(f"1 broken link in {side}: b.png" for side in sides)


def test_classes_without_pixels_are_told(tmp_path: Path) -> None:
    images = save(tmp_path / "x", {"a.png": noise(H, W)})
    mask = np.array([0, 128, 255], np.uint8)[noise(H, W) % 3]
    masks = save(tmp_path / "y", {"a.png": mask})
    (problem,) = inspect(images, masks).problems
    assert problem.startswith("labels are read as 129 classes, of which 2 have pixels: set the")
    for options in ({"classes": 129}, {"kind": "binary"}):
        assert inspect(images, masks, **options).problems == ()  # type: ignore[arg-type]


def test_nothing_can_be_read(tmp_path: Path) -> None:
    images = save(tmp_path / "x", {"a.png": b""})
    found = inspect(images, save(tmp_path / "y", {"a.png": b"", "b.png": b""}))
    assert (found.files, found.pages, found.grey, found.coding) == (1, 0, None, None)
    assert found.lines()[0] == "images: 1 file, 0 pages"
    assert len(found.problems) == 3
    with pytest.raises(UserError, match="cannot read folder"):
        inspect(tmp_path / "z")


def test_a_sample_or_everything(tmp_path: Path) -> None:
    images = save(tmp_path / "x", {f"{i}.png": noise(H, W) for i in range(40)})
    pages = [np.full((H, W), i % 3) for i in range(40)]
    pages[1][0, 0] = 9
    labels = tmp_path / "y"
    labels.mkdir()
    for index, page in enumerate(pages):
        write_labels(labels / f"{index}.png", page[None].astype(np.uint8))
    sample, whole = inspect(images, labels), inspect(images, labels, everything=True)
    assert (sample.sampled, sample.label_pages, sample.pages) == (32, 32, 40)
    assert (whole.sampled, whole.label_pages) == (40, 40)
    assert whole.coding is not None
    assert whole.coding.classes == 10
    stack = tmp_path / "stack.tif"
    write_labels(stack, np.stack(pages).astype(np.uint8))
    assert inspect(stack).sampled == 32
    assert inspect(stack, everything=True).sampled == 40


def test_real_data_in_a_few_seconds() -> None:
    if not DATA.is_dir():
        pytest.skip("needs shared/data")
    began = time.perf_counter()
    nuclei = inspect(DATA / "nuclei/images", DATA / "nuclei/labels")
    assert time.perf_counter() - began < 10
    assert (nuclei.pages, nuclei.problems) == (432, ())
    cells = inspect(DATA / "cells/images", DATA / "cells/labels")
    assert cells.instances is not None
    assert (cells.instances[0], cells.instances[2]) == (38, 114)
    assert cells.touching
    voc = inspect(DATA / "voc_mini/images", DATA / "voc_mini/labels")
    assert voc.coding is not None
    assert voc.coding.palette is not None
    assert 0 < voc.void < 0.1
