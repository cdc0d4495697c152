"""What label numbers mean, which files belong together, what is held out, normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("imagecodecs")
pytest.importorskip("tifffile")
pytest.importorskip("skimage")
Image = pytest.importorskip("PIL.Image")

from numpy.typing import NDArray  # noqa: E402

from segfuse.data import (  # noqa: E402
    LabelCoding,
    Normalisation,
    Pair,
    detect,
    find_images,
    pair,
    split,
    write_labels,
)
from segfuse.data.normalise import thinned  # noqa: E402
from segfuse.errors import UserError  # noqa: E402

Array = NDArray[Any]
DATA = Path(__file__).parents[2] / "shared/data"
VOID = LabelCoding.VOID
PALETTE = np.random.default_rng(0).integers(0, 256, 768).tolist()


def save(folder: Path, pictures: dict[str, Array], **options: Any) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name, picture in pictures.items():
        pages = np.asarray(picture)
        write_labels(folder / name, pages if pages.ndim == 3 else pages[None], **options)
    return [folder / name for name in pictures]


def cells(seed: int, count: int = 12) -> Array:
    """A grid of squares, some touching, each with an id of its own."""
    ids = np.zeros((4, 4), np.uint16)
    ids.flat[:count] = 1 + np.random.default_rng(seed).permutation(count)
    return np.kron(ids, np.ones((8, 8), np.uint16))


def street(seed: int, classes: int = 11) -> Array:
    """Many pieces of few classes."""
    small = np.random.default_rng(seed).integers(0, classes, (12, 12)).astype(np.uint8)
    return np.kron(small, np.ones((3, 3), np.uint8))


# Coding


CODINGS = [
    LabelCoding("binary", 2),
    LabelCoding("instances", 2),
    LabelCoding("classes", 3),
    LabelCoding("classes", 3, ignore=7, names=("sky", "road", "tree"), palette=tuple(PALETTE)),
    LabelCoding("classes", 255),
]


@pytest.mark.parametrize("coding", CODINGS)
def test_coding_comes_back(coding: LabelCoding) -> None:
    target = np.random.default_rng(0).integers(0, coding.classes, (2, 9, 9)).astype(np.uint8)
    files = coding.decode(target)
    assert files.dtype == np.uint8
    assert np.array_equal(coding.encode(files, "a"), target)
    assert LabelCoding.from_dict(coding.to_dict()) == coding
    assert None not in coding.to_dict().values()  # TOML has none


def test_ids_become_classes() -> None:
    ids = np.array([[0, 2], [255, 1]])
    for kind, classes, ignore, expected in [
        ("classes", 3, None, [[0, 2], [VOID, 1]]),
        ("classes", 3, 255, [[0, 2], [VOID, 1]]),
        ("binary", 2, None, [[0, 1], [1, 1]]),
        ("binary", 2, 255, [[0, 1], [VOID, 1]]),
        ("instances", 2, 2, [[0, VOID], [1, 1]]),
    ]:
        for dtype in (np.uint8, np.uint16, np.int32, np.int64):
            target = LabelCoding(kind, classes, ignore).encode(ids.astype(dtype), "a")  # type: ignore[arg-type]
            assert target.dtype == np.uint8
            assert target.tolist() == expected
    signed = np.array([[-1, 1]], np.int16)
    assert LabelCoding("classes", 2, -1).encode(signed, "a").tolist() == [[VOID, 1]]


def test_ids_out_of_range() -> None:
    ids = np.zeros((2, 5, 5), np.int32)
    ids[1, 2, 3] = 9
    with pytest.raises(UserError, match=r"a.png: id 9, page 1, row 2, column 3: expected 0 to 2"):
        LabelCoding("classes", 3).encode(ids, "a.png")
    with pytest.raises(UserError, match=r"a.png: id 9, row 2, column 3: expected 0 to 2, or 255"):
        LabelCoding("classes", 3).encode(ids[1], "a.png")
    with pytest.raises(UserError, match=r"id -9.*expected 0 or above"):
        LabelCoding("binary", 2).encode(-ids, "a.png")


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "other", "classes": 2},
        {"kind": "binary", "classes": 3},
        {"kind": "classes", "classes": 0},
        {"kind": "classes", "classes": 256},
        {"kind": "classes", "classes": 3, "names": ["a", "b"]},
        {"kind": "classes", "classes": 3, "palette": [0, 0, 0]},
        {"kind": "classes", "classes": 3, "colour": 1},
        {"kind": "classes"},
    ],
)
def test_codings_that_make_no_sense(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        LabelCoding.from_dict(values)


# Detection


def found(coding: LabelCoding) -> tuple[str, int, int | None]:
    return coding.kind, coding.classes, coding.ignore


def rare(top: int) -> Array:
    picture = street(0, 3)
    picture[5, 5] = top
    return picture


FOUND: list[tuple[dict[str, Array], dict[str, Any], tuple[str, int, int | None]]] = [
    ({"a.png": (street(0) > 5) * 255}, {}, ("binary", 2, None)),
    ({"a.png": street(0) > 5}, {}, ("classes", 2, 255)),
    ({"a.png": np.full((9, 9), 255)}, {}, ("binary", 2, None)),
    ({"a.png": np.zeros((9, 9), int)}, {}, ("binary", 2, None)),
    ({"a.png": (street(0) > 5) * 255}, {"kind": "instances"}, ("instances", 2, None)),
    ({"a.png": (street(0) > 5) * 5}, {"kind": "classes"}, ("classes", 6, 255)),
    ({"a.png": (street(0) > 5) * 5}, {"ignore": 5}, ("binary", 2, 5)),
    ({"a.png": cells(0), "b.tif": cells(1, 3)}, {}, ("instances", 2, None)),
    ({"a.tif": np.stack([cells(0), cells(1)])}, {}, ("instances", 2, None)),
    ({"a.tif": np.stack([cells(0, 1) * i for i in range(20)])}, {}, ("instances", 2, None)),
    ({"a.png": cells(0)}, {"kind": "classes"}, ("classes", 13, 255)),
    ({"a.png": cells(0)}, {"classes": 13}, ("classes", 13, 255)),
    ({"a.png": cells(0, 7)}, {}, ("classes", 8, 255)),
    ({"a.png": street(0)}, {}, ("classes", 11, 255)),
    ({"a.png": street(0), "b.png": street(1, 2)}, {"ignore": 10}, ("classes", 10, 10)),
    ({"a.png": street(0)}, {"classes": 20}, ("classes", 20, 255)),
    ({"a.png": street(0, 3)}, {"names": ["a", "b", "c", "d"]}, ("classes", 4, 255)),
    ({"a.png": rare(255)}, {}, ("classes", 3, 255)),
    ({"a.png": rare(253)}, {}, ("classes", 254, 255)),
    ({"a.png": rare(254)}, {}, ("classes", 255, 255)),
    ({"a.tif": rare(2).astype(np.int16) - 1}, {}, ("classes", 2, -1)),
    ({"a.tif": rare(2).astype(np.int16) - 1}, {"ignore": -1}, ("classes", 2, -1)),
]


@pytest.mark.parametrize(("pictures", "options", "expected"), FOUND)
def test_coding_is_found(
    tmp_path: Path,
    pictures: dict[str, Array],
    options: dict[str, Any],
    expected: tuple[str, int, int | None],
) -> None:
    assert found(detect(save(tmp_path, pictures), **options)) == expected


def test_crumbs_leave_an_object_one(tmp_path: Path) -> None:
    picture = cells(0)
    for number in range(1, 13):
        picture[::8, 24:][picture[::8, 24:] == 0] = number  # as drawn by hand
    assert detect(save(tmp_path, {"a.png": cells(0), "b.png": picture})).kind == "instances"


def test_palettes_are_of_classes(tmp_path: Path) -> None:
    coloured = save(tmp_path / "a", {"a.png": cells(0), "b.png": cells(1)}, palette=PALETTE)
    coding = detect(coloured)
    assert found(coding) == ("classes", 13, 255)
    assert coding.palette == tuple(PALETTE)
    assert found(detect(coloured, kind="instances")) == ("instances", 2, None)
    one = save(tmp_path / "b", {"a.png": (street(0) > 5) * 7}, palette=PALETTE)
    assert found(detect(one)) == ("classes", 8, 255)
    mask = (street(0) > 5) * 255
    assert detect(save(tmp_path / "c", {"a.png": mask}, palette=PALETTE)).kind == "binary"
    ramp = [index for index in range(256) for _ in range(3)]
    grey = detect(save(tmp_path / "d", {"a.png": cells(0)}, palette=ramp))
    assert (grey.kind, grey.palette) == ("instances", None)


def test_names_go_with_classes(tmp_path: Path) -> None:
    paths = save(tmp_path, {"a.png": (street(0) > 5) * 255})
    assert detect(paths).names == ("background", "foreground")
    assert detect(paths, names=["no", "yes"]).names == ("no", "yes")
    assert detect(save(tmp_path, {"b.png": street(0, 3)})).names == ("0", "1", "2")


@pytest.mark.parametrize(
    ("picture", "options", "reason"),
    [
        (street(0), {"classes": 10}, "a.tif: id 10: expected 0 to 9, or 255 for void"),
        (street(0), {"classes": 3, "names": ["a", "b"]}, "expected names 3 of them"),
        (street(0).astype(np.uint16) * 300, {}, "id 3000: expected at most 255 classes"),
        (street(0), {"classes": 256}, "expected classes 1 to 255"),
        (street(0), {"classes": 0}, "expected classes 1 to 255"),
        (street(0) > 5, {"classes": -1}, "expected classes 1 to 255"),
        (street(0), {"kind": "binary", "classes": 3}, "expected 2 classes, got 3"),
        (street(0), {"kind": "instances", "names": ["a"]}, "expected 2 classes, got 1"),
        (street(0).astype(np.int16) - 2, {}, "id -2"),
    ],
)
def test_options_that_do_not_fit(
    tmp_path: Path, picture: Array, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        detect(save(tmp_path, {"a.tif": picture}), **options)


def test_arguments_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind"):
        detect(save(tmp_path, {"a.png": street(0)}), kind="cells")
    with pytest.raises(ValueError, match="paths"):
        detect([])


@pytest.mark.parametrize(
    ("folder", "options", "expected"),
    [
        ("em/labels", {}, ("binary", 2, None)),
        ("nuclei/labels", {}, ("instances", 2, None)),
        ("cells/labels", {}, ("instances", 2, None)),
        ("camvid/labels/val", {}, ("classes", 12, 255)),
        ("camvid/labels/val", {"ignore": 11}, ("classes", 11, 11)),
        ("voc_mini/labels", {}, ("classes", 19, 255)),
    ],
)
def test_real_codings_are_found(
    folder: str, options: dict[str, Any], expected: tuple[str, int, int | None]
) -> None:
    if not DATA.is_dir():
        pytest.skip("needs shared/data")
    coding = detect(find_images(DATA / folder), **options)
    assert found(coding) == expected
    assert (coding.palette is not None) == folder.startswith("voc")


# Pairs


SQUARE = np.ones((4, 5), np.uint8)


def pictures(folder: Path, *names: str, picture: Array = SQUARE) -> Path:
    save(folder, dict.fromkeys(names, picture))
    return folder


def test_pictures_in_natural_order(tmp_path: Path) -> None:
    pictures(tmp_path, "a10.png", "a2.png", "B1.PNG", "a2b.tif", "a.ome.tif", ".hidden.png")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "folder.png").mkdir()
    names = [path.name for path in find_images(tmp_path)]
    assert names == ["a.ome.tif", "a2.png", "a2b.tif", "a10.png", "B1.PNG"]
    assert find_images(str(tmp_path / "a2.png")) == [tmp_path / "a2.png"]


def test_folders_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="holds no pictures"):
        find_images(tmp_path)
    with pytest.raises(UserError, match=r"cannot read folder .*none: No such file"):
        find_images(tmp_path / "none")


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (["a.png", "b.png"], ["a.tif", "b.png"]),
        (["a.png", "b.png"], ["a_mask.png", "b_mask.tif"]),
        (["a1.png", "a11.png"], ["a1-seg.png", "a11 labels.png"]),
        (["a.ome.tif", "b.tif"], ["a.tif", "b_gt.ome.tif"]),
        (["a.png", "a_b.png"], ["a_cp_masks.png", "a_b_cp_masks.png"]),
        (["a.png", "a_b.png"], ["a_masks.png", "a_b.png"]),
        (["a_1.png", "a_2.png"], ["a_1_manual1.png", "a_2_manual1.png"]),
        (["000_img.png", "001_img.png"], ["000_masks.png", "001_masks.png"]),
        (["000_img.png", "001_img.png"], ["000_img_masks.png", "001.png"]),
        (["case1_0000.tif", "case2_0000.tif"], ["case1.tif", "case2.tif"]),
    ],
)
def test_labels_are_found_by_name(tmp_path: Path, images: list[str], labels: list[str]) -> None:
    result = pair(pictures(tmp_path / "x", *images), pictures(tmp_path / "y", *labels))
    assert [p.image.name for p in result] == images
    assert [p.labels.name for p in result] == labels


@pytest.mark.parametrize(
    ("images", "labels", "reason"),
    [
        (["a.png", "b.png", "c.png"], ["a.png"], r"2 of 3 images lack labels: b.png, c.png"),
        (["a.png"], ["a.png", "b.png"], r"1 of 2 labels lack images: b.png"),
        (["a.png"], ["a_mask.png", "a_seg.png"], r"2 labels fit image a: a_mask.png, a_seg.png"),
        (["a.png", "a.tif"], ["a.png"], r"2 images have the name a: a.png, a.tif"),
        (["a1.png"], ["a10.png"], r"1 of 1 images lack labels: a1.png; 1 of 1 labels lack images"),
    ],
)
def test_names_that_do_not_match(
    tmp_path: Path, images: list[str], labels: list[str], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        pair(pictures(tmp_path / "x", *images), pictures(tmp_path / "y", *labels))


def test_accents_match_in_either_form(tmp_path: Path) -> None:
    images = pictures(tmp_path / "x", "e\u03011.png", "a.png")
    labels = pictures(tmp_path / "y", "\u00e91_mask.png", "a.png")
    pairs = pair(images, labels)
    assert [p.name for p in pairs] == ["a", "\u00e91"]
    for name in ("\u00e91", "e\u03011.png"):
        (tmp_path / "list.txt").write_text(name)
        (tmp_path / "list.csv").write_text(f"id,split\n{name},val\na,train\n")
        for file in ("list.txt", "list.csv"):
            assert names(split(pairs, tmp_path / file, 0, 0)[1]) == ["\u00e91"]


def test_an_exact_name_goes_before_one_with_words(tmp_path: Path) -> None:
    labels = pictures(tmp_path / "y", "a.png", "a_weights.png")
    (only,) = pair(pictures(tmp_path / "x", "a.png"), labels)
    assert only.labels.name == "a.png"


def test_one_folder_for_both_is_refused(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "a_mask.png")
    with pytest.raises(UserError, match="images and labels are both"):
        pair(tmp_path, str(tmp_path))


def test_pages_are_pairs(tmp_path: Path) -> None:
    stack = np.stack([SQUARE] * 3)
    pictures(tmp_path / "x", "train-volume.tif", picture=stack)
    pictures(tmp_path / "y", "train-labels.tif", picture=stack)
    image, labels = tmp_path / "x/train-volume.tif", tmp_path / "y/train-labels.tif"
    assert pair(image, labels) == [
        Pair(f"train-volume:{page}", image, labels, page) for page in range(3)
    ]


def test_sizes_that_differ(tmp_path: Path) -> None:
    images = pictures(tmp_path / "x", *(f"{i}.png" for i in range(5)))
    labels = pictures(tmp_path / "y", *(f"{i}.png" for i in range(5)), picture=SQUARE.T)
    with pytest.raises(UserError, match=r"0.png is 4 x 5 pixels.* is 5 x 4;.*and 2 more") as error:
        pair(images, labels)
    assert "\n" not in str(error.value)
    pictures(tmp_path / "z", *(f"{i}.tif" for i in range(5)), picture=np.stack([SQUARE] * 2))
    with pytest.raises(UserError, match=r"0.png has 1 page, .*0.tif has 2.*ImageJ or OME"):
        pair(images, tmp_path / "z")


# Splits


def made(*pages: int) -> list[Pair]:
    """Pairs of files with so many pages."""
    return [
        Pair(f"{i}:{page}" if count > 1 else f"{i}", Path(f"x/{i}.png"), Path(f"y/{i}.png"), page)
        for i, count in enumerate(pages)
        for page in range(count)
    ]


@pytest.mark.parametrize("how", ["file", "block"])
@pytest.mark.parametrize("pages", [[1] * 10, [10], [1] * 2, [3, 3, 3, 3], [2]])
@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_split_is_a_partition(how: str, pages: list[int], fraction: float, seed: int) -> None:
    pairs = made(*pages)
    train, validation = sides = split(pairs, how, fraction, seed)
    assert sides == split(pairs, how, fraction, seed)
    assert train
    assert validation
    assert sorted(train + validation, key=pairs.index) == pairs
    for side in sides:
        assert side == sorted(side, key=pairs.index)
    if how == "block":
        assert pairs == train + validation
    if how == "file" and len(pages) > 1:
        assert {p.image for p in train}.isdisjoint(p.image for p in validation)
    groups = len(pairs) if how == "block" or len(pages) == 1 else len(pages)
    size = len(validation) * groups / len(pairs)
    assert size == min(max(round(fraction * groups), 1), groups - 1)


def test_random_files_are_random() -> None:
    pairs = made(*[1] * 100)
    held = [[p.name for p in split(pairs, "file", 0.2, seed)[1]] for seed in range(3)]
    assert len({tuple(names) for names in held}) == 3
    assert all(len(names) == 20 for names in held)


def test_none_is_held_out() -> None:
    assert split(made(1, 1), "file", 0, 0) == (made(1, 1), [])
    assert split(made(1), "block", 0, 0) == (made(1), [])


def test_one_picture_is_split_by_rows(tmp_path: Path) -> None:
    (tall,) = save(tmp_path, {"a.png": np.ones((50, 3), np.uint8)})
    only = Pair("a", tall, tall)
    for fraction, cut in [(0.2, 40), (0.001, 49), (0.999, 1)]:
        (upper,), (lower,) = split([only], "block", fraction, 0)
        assert (upper.rows, lower.rows) == ((0, cut), (cut, 50))
        assert upper.image == lower.image == tall
    (flat,) = save(tmp_path, {"b.png": np.ones((1, 30), np.uint8)})
    with pytest.raises(UserError, match="one row"):
        split([Pair("b", flat, flat)], "block", 0.2, 0)
    with pytest.raises(UserError, match="split it by block"):
        split([only], "file", 0.2, 0)


@pytest.mark.parametrize("bad", [-0.1, 1, 2, float("nan")])
def test_fractions_out_of_range(bad: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        split(made(1, 1), "file", bad, 0)


def names(side: Sequence[Pair]) -> list[str]:
    return [p.name for p in side]


def test_split_by_a_list(tmp_path: Path) -> None:
    path = tmp_path / "val.txt"
    path.write_text("# held out\n1\n\n  3.png \nimages/2.png\n")
    train, validation = split(made(1, 1, 1, 1, 1), path, 0.2, 0)
    assert (names(train), names(validation)) == (["0", "4"], ["1", "2", "3"])
    path.write_text("0\n1:1\n")
    train, validation = split(made(2, 2), str(path), 0.2, 0)
    assert (names(train), names(validation)) == (["1:0"], ["0:0", "0:1", "1:1"])


@pytest.mark.parametrize("column", ["id", "Name", "file", "image"])
def test_split_by_a_table(tmp_path: Path, column: str) -> None:
    path = tmp_path / "split.csv"
    rows = ["0,train", "1.png,VAL", "2,valid", "x/3.png,validation", "4,test", "9,test"]
    path.write_text("\ufeff" + f"{column},split\n" + "\n".join(rows), encoding="utf-8")
    train, validation = split(made(1, 1, 1, 1, 1, 1), path, 0.2, 0)
    assert (names(train), names(validation)) == (["0"], ["1", "2", "3"])


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("a.txt", "0\n7\n8\n", "2 names that no image has: 7, 8"),
        ("a.txt", "", "no images for validation"),
        ("a.txt", "0\n1\n", "no images for training"),
        ("a.csv", "id,split\n0,train\n", "no images for validation"),
        ("a.csv", "id,split\n0,val\n", "no images for training"),
        ("a.csv", "id,split\n0,train\n7,val\n", "1 name that no image has: 7"),
        ("a.csv", "id,split\n0,train\n0.png,val\n1,val\n", "puts 0 on both sides"),
        ("a.csv", "id,part\n0,train\n", "expected columns split and one of id"),
        ("a.csv", "", "got none"),
        ("a.txt", "\xff", "is no text"),
    ],
)
def test_lists_that_do_not_fit(tmp_path: Path, name: str, text: str, reason: str) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=reason):
        split(made(1, 1), tmp_path / name, 0.2, 0)


def test_a_list_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected file, block or a list of names, cannot read fil"):
        split(made(1, 1), "fil", 0.2, 0)


def test_real_split() -> None:
    if not DATA.is_dir():
        pytest.skip("needs shared/data")
    index = DATA / "nuclei/index.csv"
    train, validation = split(pair(DATA / "nuclei/images", DATA / "nuclei/labels"), index, 0.2, 0)
    assert (len(train), len(validation)) == (379, 53)


# Normalisation


def image(seed: int, dtype: Any = np.uint16, channels: int = 2) -> Array:
    values = np.random.default_rng(seed).gamma(2, 30, (channels, 40, 50))
    return (values + 100 * np.arange(channels)[:, None, None]).astype(dtype)


@pytest.mark.parametrize("scope", ["image", "set"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_normalised_images_have_the_range_they_should(scope: Any, dtype: Any) -> None:
    pixels = image(0, dtype)
    before = pixels.copy()
    percentile = Normalisation("percentile", scope=scope).fit([pixels])(pixels)
    meanstd = Normalisation("meanstd", scope=scope).fit([pixels])(pixels)
    for result in (percentile, meanstd):
        assert result.dtype == np.float32
        assert result.shape == pixels.shape
    assert np.allclose(
        np.percentile(percentile, [1, 99.8], axis=(1, 2)), [[0, 0], [1, 1]], atol=1e-5
    )
    assert percentile.max() > 1  # not clipped
    assert np.allclose(meanstd.mean((1, 2)), 0, atol=1e-5)
    assert np.allclose(meanstd.std((1, 2)), 1, atol=1e-5)
    assert np.array_equal(pixels, before)


@pytest.mark.parametrize("method", ["percentile", "meanstd"])
def test_brightness_does_not_matter(method: Any) -> None:
    normalise, pixels = Normalisation(method), image(0, np.float32)
    assert np.allclose(normalise(pixels * 3 + 7), normalise(pixels), atol=1e-4)


@pytest.mark.parametrize("method", ["percentile", "meanstd"])
@pytest.mark.parametrize("scope", ["image", "set"])
@pytest.mark.parametrize("value", [0, 0.1, 255, 1e30])
def test_flat_images_become_zero(method: Any, scope: Any, value: float) -> None:
    flat = np.full((1, 30, 30), value, np.float32)
    assert not Normalisation(method, scope=scope).fit([flat])(flat).any()


def test_a_few_bright_pixels_are_kept() -> None:
    """Though both percentiles are 0."""
    sparse = np.zeros((1, 100, 100), np.uint8)
    sparse[0, 3, 3:5] = 50, 200
    assert Normalisation()(sparse)[0, 3, 3:5].tolist() == [0.25, 1]


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint32, np.float32])
def test_none_leaves_numbers_that_files_give_as_float32(dtype: Any) -> None:
    image = np.array([[[0, 1000]]], dtype)
    assert Normalisation("none")(image).tolist() == [[[0, 1000]]]


@pytest.mark.parametrize("method", ["percentile", "meanstd"])
def test_spans_beyond_float32_are_refused(method: Any) -> None:
    image = np.array([[[-3e38, 0, 3e38]]], np.float32)
    with pytest.raises(ValueError, match="image: expected values whose span float32 holds"):
        Normalisation(method)(image)
    assert np.isfinite(Normalisation(method)(image / 2)).all()


@pytest.mark.parametrize("shape", [(1, 1024, 1024), (2, 700, 900), (1, 3, 2**18), (1, 2**18, 1)])
def test_thinned_images_show_all_columns_alike(shape: tuple[int, ...]) -> None:
    columns = np.broadcast_to(np.arange(shape[-1]), shape)
    sample = thinned(columns)
    assert 2**14 < sample.shape[1] <= 2**16
    counts = np.bincount(sample[0], minlength=shape[-1])
    assert counts.max() - counts.min() <= 1


def test_none_divides_integers() -> None:
    none = Normalisation("none")
    assert none(np.full((1, 2, 2), 255, np.uint8)).tolist() == [[[1, 1], [1, 1]]]
    assert none(np.full((1, 2, 2), 65535, np.uint16)).max() == 1
    assert none(np.full((1, 2, 2), 7, np.float32)).max() == 7
    assert none.fit([]) is none


@pytest.mark.parametrize("method", ["percentile", "meanstd"])
def test_a_set_is_normalised_as_one(method: Any) -> None:
    images = [image(seed) * np.uint16(seed + 1) for seed in range(4)]
    fitted = Normalisation(method, scope="set").fit(iter(images))
    together = Normalisation(method)(np.concatenate(images, axis=2))
    assert np.allclose(np.concatenate([*map(fitted, images)], axis=2), together, atol=1e-5)


def test_large_images_are_thinned() -> None:
    large = np.random.default_rng(0).normal(size=(1, 500, 500)).astype(np.float32)
    fitted = Normalisation(scope="set").fit([large])
    assert np.allclose(fitted(large), Normalisation()(large), atol=0.05)


@pytest.mark.parametrize("method", ["percentile", "meanstd", "none"])
@pytest.mark.parametrize("scope", ["image", "set"])
def test_normalisation_comes_back(method: Any, scope: Any) -> None:
    fitted = Normalisation(method, 2, 98, scope=scope).fit([image(0)])
    assert Normalisation.from_dict(fitted.to_dict()) == fitted
    assert None not in fitted.to_dict().values()


@pytest.mark.parametrize(
    "values",
    [
        {"method": "max"},
        {"scope": "file"},
        {"low": 5, "high": 5},
        {"low": -1},
        {"high": 101},
        {"scale": [1.0]},
        {"offset": [1.0], "scale": [0.0]},
        {"colour": 1},
    ],
)
def test_normalisations_that_make_no_sense(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Normalisation.from_dict(values)


def test_arguments_of_normalisation() -> None:
    over = Normalisation(scope="set")
    with pytest.raises(ValueError, match="fit it first"):
        over(image(0))
    with pytest.raises(ValueError, match="expected 2 channels, got 3"):
        over.fit([image(0)])(image(0, channels=3))
    with pytest.raises(ValueError, match="same number of channels"):
        over.fit([image(0), image(0, channels=3)])
    with pytest.raises(ValueError, match="expected one at least"):
        over.fit([])
