"""FCN's four figures against their definition, torchmetrics and across processes."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from segfuse.metrics import ConfusionMatrix, Scores, semantic_scores

CLASSES, VOID = 5, 255


class Model(nn.Module):
    """A network that carries its metric along, as a LightningModule would."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 1)
        self.metric = ConfusionMatrix(CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def batches(
    count: int, *, classes: int = CLASSES, absent: int | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Random (prediction, target) with void pixels; `absent` is in neither."""
    random = torch.Generator().manual_seed(count)
    made = []
    for _ in range(count):
        prediction, target = torch.randint(classes, (2, 2, 9, 11), generator=random)
        target = torch.where(torch.rand(target.shape, generator=random) < 0.6, prediction, target)
        if absent is not None:
            prediction[prediction == absent] = 0
            target[target == absent] = 1
        target[torch.rand(target.shape, generator=random) < 0.1] = VOID
        made.append((prediction.to(torch.uint8), target.to(torch.uint8)))
    return made


def score_py(hist: np.ndarray) -> tuple[float, float, float, float]:
    """FCN's released score.py, as its lines stand."""
    with np.errstate(invalid="ignore"):
        acc = np.diag(hist).sum() / hist.sum()
        per_class = np.diag(hist) / hist.sum(1)
        iu = np.diag(hist) / (hist.sum(1) + hist.sum(0) - np.diag(hist))
        freq = hist.sum(1) / hist.sum()
    return acc, np.nanmean(per_class), np.nanmean(iu), (freq[freq > 0] * iu[freq > 0]).sum()


def four(scores: Scores) -> tuple[float, float, float, float]:
    return (
        scores.pixel_accuracy,
        scores.mean_accuracy,
        scores.mean_iu,
        scores.frequency_weighted_iu,
    )


@pytest.mark.parametrize("seed", range(20))
def test_scores_are_those_of_the_released_code(seed: int) -> None:
    random = np.random.default_rng(seed)
    hist = random.integers(0, 1000, (6, 6)) + np.diag(random.integers(0, 5000, 6))
    if seed % 3 == 0:
        hist[2] = 0  # predicted, never there: no accuracy, an IU of 0
    if seed % 4 == 0:
        hist[4] = hist[:, 4] = 0  # neither
    scores = semantic_scores(torch.from_numpy(hist))
    assert four(scores) == pytest.approx(score_py(hist), rel=1e-12)
    assert scores.pixels == hist.sum()
    assert math.isnan(scores.accuracy[2]) == (seed % 3 == 0)
    assert math.isnan(scores.iu[4]) == (seed % 4 == 0)


def test_scores_by_hand() -> None:
    scores = semantic_scores(torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]]))
    assert four(scores) == pytest.approx((9 / 12, 6 / 8, (6 / 9 + 3 / 6) / 2, 22 / 36))
    assert scores.iu[:2] == pytest.approx((6 / 9, 3 / 6))
    assert scores.accuracy[:2] == pytest.approx((6 / 8, 3 / 4))
    assert math.isnan(scores.iu[2])
    assert math.isnan(scores.accuracy[2])


def test_nothing_counted_is_nan() -> None:
    scores = semantic_scores(torch.zeros(3, 3, dtype=torch.int64))
    assert all(map(math.isnan, (*four(scores), *scores.iu, *scores.accuracy)))
    assert scores.pixels == 0


@pytest.mark.parametrize("shape", [(3,), (2, 3), (1, 2, 2)])
def test_matrix_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"matrix: expected shape \(K, K\), got"):
        semantic_scores(torch.zeros(shape))


@pytest.mark.parametrize("classes", [0, -1, 2.0])
def test_classes_that_are_none(classes: int) -> None:
    with pytest.raises(ValueError, match=r"num_classes: expected an integer >= 1"):
        ConfusionMatrix(classes)


# Over batches


@pytest.mark.parametrize("ignore", [None, VOID])
def test_counts_as_torchmetrics(ignore: int | None) -> None:
    classification = pytest.importorskip("torchmetrics.classification")
    ours = ConfusionMatrix(CLASSES, ignore_index=ignore)
    theirs = classification.MulticlassConfusionMatrix(CLASSES, ignore_index=ignore)
    for _ in range(2):
        for prediction, target in batches(3):
            if ignore is None:
                target[target == VOID] = 0
            ours.update(prediction, target)
            theirs.update(prediction.long(), target.long())
            of_batch = ours(prediction, target)
            assert torch.equal(of_batch, theirs(prediction.long(), target.long()))
        matrix = ours.compute()
        assert matrix.dtype == torch.int64
        assert torch.equal(matrix, theirs.compute())
        ours.reset()
        theirs.reset()
        assert not ours.compute().any()


def test_figures_as_torchmetrics() -> None:
    classification = pytest.importorskip("torchmetrics.classification")
    ours = ConfusionMatrix(CLASSES)
    options = {"num_classes": CLASSES, "ignore_index": VOID, "validate_args": False}
    jaccard = classification.MulticlassJaccardIndex(**options, average="none")
    accuracy = classification.MulticlassAccuracy(**options, average="none")
    weighted = classification.MulticlassJaccardIndex(**options, average="weighted")
    micro = classification.MulticlassAccuracy(**options, average="micro")
    for prediction, target in batches(4):
        ours.update(prediction, target)
        for metric in (jaccard, accuracy, weighted, micro):
            metric.update(prediction.long(), target.long())
    scores = ours.scores()
    assert scores.iu == pytest.approx(jaccard.compute().tolist())
    assert scores.accuracy == pytest.approx(accuracy.compute().tolist())
    assert scores.frequency_weighted_iu == pytest.approx(float(weighted.compute()))
    assert scores.pixel_accuracy == pytest.approx(float(micro.compute()))


def test_absent_classes_are_left_out() -> None:
    metric = ConfusionMatrix(CLASSES)
    for prediction, target in batches(3, absent=2):
        metric.update(prediction, target)
    scores = metric.scores()
    present = [iu for k, iu in enumerate(scores.iu) if k != 2]
    assert math.isnan(scores.iu[2])
    assert scores.mean_iu == pytest.approx(sum(present) / (CLASSES - 1))


def test_scores_count_as_their_argmax() -> None:
    logits = torch.randn(2, CLASSES, 9, 11)
    target = torch.randint(CLASSES, (2, 9, 11))
    metric = ConfusionMatrix(CLASSES)
    assert torch.equal(metric(logits, target), metric(logits.argmax(1), target))


def test_order_and_batches_do_not_matter() -> None:
    one, other = ConfusionMatrix(CLASSES), ConfusionMatrix(CLASSES)
    made = batches(4)
    for pair in reversed(made):
        one.update(*pair)
    other.update(torch.cat([p for p, _ in made]), torch.cat([t for _, t in made]))
    assert torch.equal(one.compute(), other.compute())


def test_is_a_module_without_state() -> None:
    model = Model()
    model.metric.update(*batches(1)[0])
    assert list(model.state_dict()) == ["head.weight", "head.bias"]
    before = model.metric.compute()
    assert before.any()
    assert model.half().metric.compute().dtype == torch.int64
    assert torch.equal(copy.deepcopy(model).metric.compute(), before)
    assert copy.deepcopy(model).to("meta").metric.compute().device.type == "meta"
    assert "ConfusionMatrix(5, ignore_index=255)" in str(model)
    before += 1  # a copy, not the state
    assert not torch.equal(model.metric.compute(), before)


def _count_a_share(rank: int, file: str, results: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    model = Model()
    wrapped, metric = DistributedDataParallel(model), model.metric
    for prediction, target in batches(5)[rank::2]:
        metric.update(prediction, target)
        wrapped(torch.ones(1, 1))  # which sends every buffer of the first process to the others
    torch.save((metric.compute(), metric.scores()), f"{results}/{rank}.pt")
    distributed.destroy_process_group()


def test_sums_across_processes(tmp_path: Path) -> None:
    arguments = (str(tmp_path / "rendezvous"), str(tmp_path))
    torch.multiprocessing.spawn(_count_a_share, arguments, nprocs=2)
    whole = ConfusionMatrix(CLASSES)
    for pair in batches(5):
        whole.update(*pair)
    for rank in range(2):
        matrix, scores = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert torch.equal(matrix, whole.compute())
        assert scores == whole.scores()
