"""Evaluation: what files and arrays of labels mean, and the figures that come of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

for package in ("tifffile", "imagecodecs", "PIL", "skimage"):
    pytest.importorskip(package, reason="needs segfuse[cli]")

from segfuse.data import LabelCoding, write_labels  # noqa: E402
from segfuse.errors import UserError  # noqa: E402
from segfuse.evaluation import Evaluation, evaluate  # noqa: E402
from segfuse.metrics import semantic_scores  # noqa: E402

DATA = Path(__file__).parents[2] / "shared/data"
Labels = NDArray[np.integer]


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write {name: (H, W) or (P, H, W)} to a folder."""

    def write(folder: str, pictures: dict[str, Labels], **options: Any) -> Path:
        (tmp_path / folder).mkdir()
        for name, picture in pictures.items():
            pages = picture if picture.ndim == 3 else picture[None]
            write_labels(tmp_path / folder / name, pages, **options)
        return tmp_path / folder

    return write


def random_labels(classes: int, seed: int, shape: tuple[int, ...] = (20, 30)) -> Labels:
    labels = np.random.default_rng(seed).integers(0, classes, shape).astype(np.uint8)
    labels.flat[:classes] = range(classes)
    return labels


def noisy(labels: Labels, classes: int, seed: int = 7) -> Labels:
    other = random_labels(classes, seed, labels.shape)
    return np.where(np.random.default_rng(seed).random(labels.shape) < 0.7, labels, other)


def counted(prediction: Labels, target: Labels, classes: int) -> torch.Tensor:
    """Confusion matrix by definition."""
    pairs = [[((target == i) & (prediction == j)).sum() for j in range(classes)]
             for i in range(classes)]  # fmt: skip
    return torch.tensor(np.array(pairs))


# Figures


def test_arrays_and_files_of_many_classes_agree(save: Callable[..., Path]) -> None:
    true = {f"{i}.png": random_labels(5, i, (20 + i, 30)) for i in range(3)}
    predicted = {name: noisy(labels, 5) for name, labels in true.items()}
    true["1.png"][:4] = 255
    by_file = evaluate(save("predicted", predicted), save("true", true))
    by_array = evaluate(list(predicted.values()), list(true.values()))
    matrix = sum(counted(predicted[name], true[name], 5) for name in true)
    assert torch.equal(by_file.matrix, matrix)
    assert torch.equal(by_array.matrix, matrix)
    assert by_file.scores == by_array.scores == semantic_scores(by_file.matrix)
    assert by_file.void == by_array.void == 4 * 30
    assert by_file.scores.pixels == sum(labels.size for labels in true.values()) - by_file.void
    assert by_file.names == ("0", "1", "2", "3", "4")
    assert (by_file.coding.kind, by_file.prediction_coding.kind) == ("classes", "classes")


def test_files_come_worst_first(save: Callable[..., Path]) -> None:
    true = {f"{i}.png": random_labels(3, i) for i in range(4)}
    predicted = dict(true)
    predicted["2.png"] = noisy(true["2.png"], 3)
    predicted["1.png"] = (true["1.png"] + 1) % 3
    true["3.png"] = np.full_like(true["3.png"], 255)
    result = evaluate(save("predicted", predicted), save("true", true))
    assert [file.name for file in result.files] == ["1", "2", "0", "3"]
    assert [file.mean_iu for file in result.files[::2]] == [0, 1]
    assert math.isnan(result.files[3].mean_iu)
    assert [file.pixels for file in result.files] == [600, 600, 600, 0]
    of_2 = semantic_scores(counted(predicted["2.png"], true["2.png"], 3))
    assert result.files[1].mean_iu == of_2.mean_iu
    assert result.files[1].pixel_accuracy == of_2.pixel_accuracy


def test_stacks_go_page_by_page(save: Callable[..., Path]) -> None:
    true = random_labels(3, 0, (4, 12, 9))
    predicted = true.copy()
    predicted[2] = noisy(true[2], 3)
    result = evaluate(save("predicted", {"a.tif": predicted}), save("true", {"a.tif": true}))
    assert result.files[0].name == "a:2"
    assert [file.mean_iu for file in result.files[1:]] == [1, 1, 1]
    assert torch.equal(result.matrix, counted(predicted, true, 3))


def test_table_and_dictionary() -> None:
    true, predicted = np.array([[0, 0, 0, 1, 255]]), np.array([[0, 0, 1, 1, 0]])
    result = evaluate(predicted, true, names=("sky", "tree", "never"))
    assert result.table() == [
        ("class", "pixels", "IU", "accuracy"),
        ("sky", "75.00%", "0.6667", "0.6667"),
        ("tree", "25.00%", "0.5000", "1.0000"),
        ("never", "0.00%", "-", "-"),
    ]
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["mean_iu"] == pytest.approx(7 / 12)
    assert plain["pixel_accuracy"] == 0.75
    assert plain["void_pixels"] == 1
    assert plain["pixels"] == 4
    assert plain["confusion_matrix"] == result.matrix.tolist()
    assert plain["classes"][2] == {
        "name": "never", "pixels": 0, "share": 0, "iu": None, "accuracy": None,
    }  # fmt: skip
    assert plain["files"] == [
        {"name": "0", "pixels": 4, "pixel_accuracy": 0.75, "mean_iu": pytest.approx(7 / 12)}
    ]


def test_nothing_to_count() -> None:
    result = evaluate(np.zeros((2, 2), int), np.full((2, 2), 255), ignore=255)
    assert result.scores.pixels == 0
    assert "NaN" not in json.dumps(result.to_dict())
    assert result.table()[1:] == [(name, "-", "-", "-") for name in result.names]


def test_pictures_are_read_one_at_a_time(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from segfuse import evaluation

    true = {f"{i}.png": random_labels(3, i) for i in range(5)}
    alive: list[int] = []

    class Counted(np.ndarray):  # type: ignore[type-arg]
        def __del__(self) -> None:
            if self.base is None or not isinstance(self.base, Counted):
                alive[-1] -= 1

    def read(path: Path) -> Labels:
        alive.append((alive[-1] if alive else 0) + 1)
        from segfuse.data import read_labels

        return read_labels(path).view(Counted)

    monkeypatch.setattr(evaluation, "read_labels", read)
    evaluate(save("predicted", true), save("true", true))
    assert len(alive) == 10
    assert max(alive) <= 4


# What files mean


def cells(seed: int = 0) -> Labels:
    """Twelve squares, each of its own id, some touching."""
    ids = np.arange(1, 13, dtype=np.uint16).reshape(3, 4)
    labels = np.kron(ids, np.ones((8, 8), np.uint16))
    labels[:, ::16] = 0
    return labels[seed:]


def foreground(result: Evaluation) -> list[list[int]]:
    assert result.matrix.shape == (2, 2)
    return result.matrix.tolist()


@pytest.mark.parametrize("value", [1, 7, 255])
@pytest.mark.parametrize("true", ["instances", "binary", "classes"])
def test_masks_against_anything_of_two_classes(
    save: Callable[..., Path], true: str, value: int
) -> None:
    labels = {"a.png": cells(), "b.png": cells(3)}
    mask = {name: (ids > 0).astype(np.uint8) for name, ids in labels.items()}
    mask["a.png"][:2] = 0
    lost = int((cells()[:2] > 0).sum())
    if true != "instances":
        scale = 255 if true == "binary" else 1
        labels = {name: np.uint8(scale) * (ids > 0) for name, ids in labels.items()}
    result = evaluate(
        save("predicted", {name: np.uint8(value) * m for name, m in mask.items()}),
        save("true", labels),
    )
    background = sum(int((ids == 0).sum()) for ids in labels.values())
    hits = sum(int(m.sum()) for m in mask.values())
    assert foreground(result) == [[background, 0], [lost, hits]]
    assert result.coding.kind == true


def test_predicted_instances_against_instances(save: Callable[..., Path]) -> None:
    shuffled = (cells() * 5 % 13).astype(np.uint16)
    result = evaluate(save("predicted", {"a.png": shuffled}), save("true", {"a.png": cells()}))
    assert result.scores.mean_iu == 1
    assert result.names == ("background", "foreground")


@pytest.mark.parametrize("swapped", [False, True])
def test_a_side_with_a_single_class_is_read_as_the_other(
    save: Callable[..., Path], *, swapped: bool
) -> None:
    # Alone it looks binary: {0, 3}.
    many = random_labels(5, 0)
    few = np.where(many == 3, many, 0).astype(np.uint8)
    sides = save("many", {"a.png": many}), save("few", {"a.png": few})
    result = evaluate(*(sides if swapped else sides[::-1]))
    expected = counted(few, many, 5)
    assert torch.equal(result.matrix, expected.T if swapped else expected)
    nothing = evaluate(save("nothing", {"a.png": few * 0}), sides[0])
    assert torch.equal(nothing.matrix, counted(few * 0, many, 5))


def test_masks_against_many_classes_are_refused(save: Callable[..., Path]) -> None:
    many = save("many", {"a.png": random_labels(5, 0)})
    mask = save("mask", {"a.png": random_labels(2, 0) * np.uint8(255)})
    with pytest.raises(UserError, match=r"mask/a\.png: row \d+, column \d+ is void, where the"):
        evaluate(mask, many)
    with pytest.raises(UserError, match=r"mask/a\.png: id 255, row \d+, column"):
        evaluate(many, mask)
    for sides in [(mask, many), (many, mask)]:
        assert evaluate(*sides, kind="binary").scores.pixels == 600


def test_instances_against_many_classes_are_refused(save: Callable[..., Path]) -> None:
    many, ids = save("many", {"a.png": random_labels(5, 0, (24, 32))}), {"a.png": cells()}
    with pytest.raises(UserError, match="predictions look like classes, labels like instances"):
        evaluate(many, save("ids", ids))
    assert evaluate(many, many.parent / "ids", kind="instances").matrix.shape == (2, 2)
    assert evaluate(many, many.parent / "ids", kind="classes").matrix.shape == (13, 13)


def test_classes_that_no_sampled_file_shows(save: Callable[..., Path]) -> None:
    true = {f"{i}.png": random_labels(3, i) for i in range(70)}
    true["1.png"][0, 0] = 6  # among 70 files 1 is not looked at
    folder = save("true", true)
    result = evaluate(folder, save("predicted", true))
    assert result.matrix.shape == (7, 7)
    assert result.names == tuple("0123456")
    with pytest.raises(UserError, match=r"1\.png: id 6, row 0, column 0: expected 0 to 2"):
        evaluate(folder, folder.parent / "predicted", classes=3)


def test_options(save: Callable[..., Path]) -> None:
    labels = random_labels(4, 0)
    true = save("true", {"a.png": labels})
    predicted = save("predicted", {"a.png": np.where(labels == 3, 0, labels).astype(np.uint8)})
    result = evaluate(predicted, true, ignore=3, names=["x", "y", "z"])
    assert result.names == ("x", "y", "z")
    assert result.void == (labels == 3).sum()
    assert result.scores.mean_iu == 1
    coding = LabelCoding("classes", 6, ignore=3)
    assert evaluate(predicted, true, coding=coding).matrix.shape == (6, 6)


def test_ignored_class_may_be_predicted(save: Callable[..., Path]) -> None:
    """As in labels that mark some pixels only, all others being 0."""
    labels, prediction = random_labels(3, 0), random_labels(3, 1)
    for sides in [
        (prediction, labels),
        (save("predicted", {"a.png": prediction}), save("true", {"a.png": labels})),
    ]:
        result = evaluate(*sides, ignore=0)
        assert result.void == (labels == 0).sum()
        expected = counted(prediction, labels, 3)
        expected[0] = 0
        assert torch.equal(result.matrix, expected)


@pytest.mark.parametrize(("ours", "theirs"), [("_mask", ""), ("", "_pred")])
def test_names_may_add_words_on_either_side(
    save: Callable[..., Path], ours: str, theirs: str
) -> None:
    labels = random_labels(3, 0)
    result = evaluate(
        save("predicted", {f"a{theirs}.png": labels, f"b{theirs}.png": noisy(labels, 3)}),
        save("true", {f"a{ours}.png": labels, f"b{ours}.png": labels}),
    )
    assert torch.equal(
        result.matrix, counted(labels, labels, 3) + counted(noisy(labels, 3), labels, 3)
    )


# What is refused


def test_files_that_do_not_fit(save: Callable[..., Path]) -> None:
    labels = random_labels(3, 0)
    true = save("true", {"a.png": labels, "b.png": labels})
    with pytest.raises(UserError, match=r"1 of 2 labels lack predictions: b\.png"):
        evaluate(save("one", {"a.png": labels}), true)
    with pytest.raises(UserError, match=r"wide/b\.png is 20 x 29"):
        evaluate(save("wide", {"a.png": labels, "b.png": labels[:, 1:]}), true)
    with pytest.raises(UserError, match=r"(?i)no such"):
        evaluate(true / "nowhere", true)
    (true / "b.png").write_bytes((true / "b.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"true/b\.png"):
        evaluate(save("whole", {"a.png": labels, "b.png": labels}), true)


def test_arrays_that_do_not_fit(tmp_path: Path) -> None:
    good = np.zeros((3, 4), int)
    for bad, error, text in [
        ([good, good], ValueError, "a prediction for each of 1 labels, got 2"),
        ([good[:, 1:]], UserError, r"prediction 0 has the shape \(3, 3\), its labels"),
        ([good * 1.0], ValueError, "prediction: expected integers"),
        ([good[0]], ValueError, "prediction: expected integers"),
        ([], ValueError, "expected one picture at least"),
        (good + np.array([0, 3, 300, 0]), UserError, "prediction 0: id 300"),
        (tmp_path, TypeError, "both paths or both arrays"),
    ]:
        with pytest.raises(error, match=text):
            evaluate(bad, [good])


def test_arrays_of_masks_and_tensors() -> None:
    mask = random_labels(2, 0)
    assert evaluate(mask * 255, mask == 1).scores.mean_iu == 1
    assert evaluate(cells() > 0, cells()).names == ("background", "foreground")
    tensors = evaluate(torch.from_numpy(mask), torch.from_numpy(mask).long())
    assert tensors.scores.mean_iu == 1


# Real data


@pytest.mark.skipif(not DATA.is_dir(), reason="needs shared data")
@pytest.mark.parametrize(
    ("name", "kind", "classes", "options"),
    [
        ("em", "binary", 2, {}),
        ("cells", "instances", 2, {}),
        ("voc_mini", "classes", 21, {"classes": 21}),
    ],
)
def test_labels_against_themselves(
    tmp_path: Path, name: str, kind: str, classes: int, options: dict[str, Any]
) -> None:
    (tmp_path / "copy").mkdir()
    for file in list((DATA / name / "labels").iterdir())[:4]:
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "again").mkdir()
    for file in (tmp_path / "copy").iterdir():
        (tmp_path / "again" / file.name).write_bytes(file.read_bytes())
    result = evaluate(tmp_path / "copy", tmp_path / "again", **options)
    assert result.coding.kind == kind
    assert result.matrix.shape == (classes, classes)
    assert result.scores.mean_iu == 1
    assert (result.void > 0) == (name == "voc_mini")
