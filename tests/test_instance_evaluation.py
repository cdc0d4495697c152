"""Evaluation of objects and of boundaries: what pictures mean, and the figures of a set."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for package in ("tifffile", "imagecodecs", "PIL", "skimage"):
    pytest.importorskip(package, reason="needs segfuse[cli]")

from segfuse import evaluate_boundaries, evaluate_instances, instances, metrics  # noqa: E402
from segfuse.data import write_labels  # noqa: E402
from segfuse.errors import UserError  # noqa: E402


def objects(seed: int, shape: tuple[int, int] = (40, 50)) -> np.ndarray[Any, np.dtype[Any]]:
    """Squares of 8 pixels with gaps, some left out."""
    cells = np.random.default_rng(seed).random((shape[0] // 10, shape[1] // 10)) < 0.8
    mask = np.kron(cells, np.pad(np.ones((8, 8), bool), 1))
    return instances(mask).astype(np.uint16)


def damaged(labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Two objects merged, one lost, one added."""
    found = labels.copy()
    found[found == 2] = 1
    found[found == 3] = 0
    found[0, 0] = 60000
    return found


def save(folder: Path, pictures: list[np.ndarray[Any, Any]]) -> Path:
    folder.mkdir()
    for i, picture in enumerate(pictures):
        write_labels(folder / f"{i}.png", picture[None])
    return folder


def test_figures_are_of_the_sets_table(tmp_path: Path) -> None:
    true = [objects(i) for i in range(3)]
    predicted = [damaged(true[0]), true[1], damaged(true[2])]
    found = evaluate_instances(save(tmp_path / "p", predicted), save(tmp_path / "t", true))
    by_array = evaluate_instances(predicted, true)
    assert found == by_array
    table = metrics.Overlaps.join(list(map(metrics.overlaps, predicted, true)))
    half = metrics.detection_scores(table)
    assert not found.components
    assert found.detection[0] == half
    assert found.mean_average_precision == pytest.approx(metrics.mean_average_precision(table))
    assert found.panoptic == metrics.panoptic_quality(table)
    assert found.seg == metrics.seg_score(table)
    assert found.rand == metrics.adapted_rand(table)
    assert found.information == metrics.variation_of_information(table, foreground=True)
    assert found.objects == table.target_objects
    assert [file.name for file in found.files][2] == "1"
    assert found.files[2].panoptic_quality == found.files[2].average_precision == 1
    plain = found.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert plain["average_precision_50"] == half.average_precision
    head, *rows = found.table()
    assert [row[0] for row in rows] == ["0.50", "0.75", "0.90"]
    assert all(len(row) == len(head) for row in rows)


def test_binary_predictions_are_taken_apart() -> None:
    true = [objects(0), objects(1)]
    found = evaluate_instances([(labels != 0).astype(np.uint8) * 255 for labels in true], true)
    assert found.components
    assert found.figures()["average_precision_50"] == found.panoptic.pq == 1
    one = np.zeros((9, 9), np.uint8)
    one[1, 1] = one[7, 7] = 1  # of one id, which is two pieces
    split = instances(one)
    assert evaluate_instances([one], [split]).predicted_objects == 2
    assert evaluate_instances([one], [split], kind="instances").predicted_objects == 1
    assert evaluate_instances([split], [split], kind="binary").components


def test_labels_that_are_masks_are_refused() -> None:
    ids, mask = objects(0), (objects(0) != 0).astype(np.uint8)
    for scattered in (mask, 255 * mask):
        with pytest.raises(UserError, match="besides 0: expected an id for each object"):
            evaluate_instances([ids], [scattered])
    single = (ids == 1).astype(np.uint8)
    assert evaluate_instances([ids], [single]).objects == 1
    assert evaluate_instances([ids], [255 * mask], kind="instances").objects == 1


def test_ignored_pixels_do_not_count() -> None:
    true = objects(0).astype(np.int32)
    predicted = true.copy()
    true[:10] = -1
    with pytest.raises(UserError, match=r"labels 0: id -1: expected 0 or above; set the id to ign"):
        evaluate_instances([predicted], [true])
    found = evaluate_instances([predicted], [true], ignore=-1)
    assert found.void == 10 * 50
    assert found.panoptic.pq == 1
    with pytest.raises(UserError, match="prediction 0: id -1"):
        evaluate_instances([true], [predicted])
    huge = predicted.astype(np.uint64) + np.uint64(2**63)
    with pytest.raises(UserError, match="labels 0: id 9223372036854775815: expected ids below"):
        evaluate_instances([predicted], [huge - np.uint64(predicted.max() - 7)])


def test_nothing_to_find() -> None:
    empty, some = np.zeros((6, 7), np.uint8), objects(0)[:6, :7]
    found = evaluate_instances([empty], [empty])
    assert math.isnan(found.panoptic.pq)
    assert found.to_dict()["seg"] is None
    assert found.table()[1][1] == "-"
    found = evaluate_instances([empty, some], [empty, some])
    assert [file.name for file in found.files] == ["1", "0"]  # what cannot be judged comes last
    assert evaluate_instances([some], [empty]).panoptic.pq == 0
    assert evaluate_boundaries([empty], [empty]).pixels.error == 0
    assert evaluate_boundaries([empty], [1 + empty]).cells == 1


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    ids = objects(0)
    for compare in (evaluate_instances, evaluate_boundaries):
        with pytest.raises(TypeError, match="both paths or both arrays"):
            compare(tmp_path, [ids])
        with pytest.raises(UserError, match=r"has the shape \(40, 49\), its labels \(40, 50\)"):
            compare([ids[:, 1:]], [ids])
        with pytest.raises(ValueError, match="expected integers"):
            compare([ids.astype(float)], [ids])
        narrow = save(tmp_path / f"narrow_{compare.__name__}", [ids[:, 1:]])
        whole = save(tmp_path / f"whole_{compare.__name__}", [ids])
        with pytest.raises(UserError, match="40 x 49"):
            compare(narrow, whole)
    with pytest.raises(ValueError, match="kind: expected auto, binary or instances, got 'classes'"):
        evaluate_instances([ids], [ids], kind="classes")  # type: ignore[arg-type]


def test_boundaries() -> None:
    true = np.full((40, 60), 255, np.uint8)
    true[:, [20, 40]] = 0
    moved, merged = np.full_like(true, 1), true.copy()
    moved[:, [21, 40]] = 0
    merged[18:20, 20] = 255
    found = evaluate_boundaries([moved, merged], [true, true])
    assert found.cells == 6
    assert found.predicted_cells == 5
    assert found.pixels == metrics.PixelErrors(82, 2 * 2400)
    assert found.warping == metrics.warping_error(merged != 0, true != 0) + metrics.PixelErrors(
        0, 2400
    )
    assert found.warping.wrong > 0
    tables = [
        metrics.overlaps(instances(p, holes=0), instances(true, holes=0)) for p in (moved, merged)
    ]
    both = metrics.Overlaps.join(tables)
    assert found.foreground == metrics.foreground_scores(both)
    assert found.rand == metrics.adapted_rand(both)
    assert [file.name for file in found.files] == ["1", "0"]
    plain = found.to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert [row[0] for row in found.table()[1:]] == ["V^Rand", "V^Info"]


def test_cells_that_touch_are_no_map_of_boundaries() -> None:
    ids = np.repeat(np.array([[1, 1, 2, 2]], np.uint8), 4, axis=0)
    with pytest.raises(UserError, match="labels 0: numbers other than 0 touch"):
        evaluate_boundaries([ids > 1], [ids])
    with pytest.raises(UserError, match="labels 0: id -1: expected 0 for boundaries"):
        evaluate_boundaries([ids > 0], [ids.astype(np.int8) * 0 - 1])
