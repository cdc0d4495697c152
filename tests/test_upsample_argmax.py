"""What the generated tests of upsample_argmax cannot say."""

from __future__ import annotations

import pytest
import torch
from backends import BACKENDS, device_of, running
from hypothesis import given, settings
from torch import Tensor
from upsampled import IN_ONE_ORDER, ULPS, Case, assert_near, cases, extremes

from segfuse.ops import upsample_argmax

on_backends = pytest.mark.parametrize("backend", BACKENDS)
in_one_order = pytest.mark.parametrize("backend", IN_ONE_ORDER)


def assert_labels(case: Case, labels: Tensor) -> None:
    """Those of plain PyTorch, but where the two best are nearer than its rounding."""
    plain, truth = case.upsampled(), case.to(torch.float64).upsampled()
    wanted = plain.argmax(1)
    different = labels != wanted
    best, chosen = (truth.gather(1, ids.long()[:, None])[:, 0] for ids in (wanted, labels))
    finite = plain.isfinite() & truth.isfinite()
    error = (plain.double() - truth)[finite].abs().max() if finite.any() else 0.0
    rounding = 2 * error + ULPS * case.largest * torch.finfo(plain.dtype).eps
    # A difference from NaN or to infinity is not small, so that there all must be the same.
    assert ((best - chosen)[different] <= rounding).all(), case.name


@on_backends
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(case=cases())
def test_it_is_upsampling_and_argmax(backend: str, case: Case) -> None:
    case = case.to(device_of(backend))
    for dtype in (torch.float32, torch.bfloat16):
        rounded = case.to(dtype)
        with running(backend):
            labels = upsample_argmax(rounded.scores, size=case.size, **rounded.how)
            again, confidence = upsample_argmax(
                rounded.scores, size=case.size, return_confidence=True, **rounded.how
            )
        assert labels.dtype == torch.uint8
        assert torch.equal(labels, again)
        assert_labels(rounded, labels)
        plain, truth = (
            c.upsampled().softmax(1).amax(1) for c in (rounded, rounded.to(torch.float64))
        )
        assert_near(confidence, plain, truth, largest=case.largest)


@in_one_order
def test_extreme_scores(backend: str) -> None:
    for case in (case.to(device_of(backend)) for case in extremes()):
        with running(backend):
            labels, confidence = upsample_argmax(
                case.scores, size=case.size, return_confidence=True, **case.how
            )
        assert_labels(case, labels)
        plain, truth = (c.upsampled().softmax(1).amax(1) for c in (case, case.to(torch.float64)))
        assert_near(confidence, plain, truth, largest=case.largest)


@in_one_order
def test_of_equal_scores_the_lowest_class_wins(backend: str) -> None:
    """Of whole numbers, and by positions that are exact, so that all arithmetic gives the same."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(-2, 3, (2, 21, 5, 6), generator=generator).float()
    for size, how in (
        ((20, 24), {}),
        ((9, 11), {"align_corners": True}),
        ((19, 21), {"factor": 4, "offset": (1, 2)}),
    ):
        case = Case(scores.to(device_of(backend)), size, how)
        with running(backend):
            labels = upsample_argmax(case.scores, size=size, **how)
            constant = upsample_argmax(torch.ones_like(case.scores), size=size, **how)
        full = case.upsampled()
        ties = full == full.amax(1, keepdim=True)
        assert (ties.sum(1) > 1).any()
        assert torch.equal(labels.long(), ties.int().argmax(1))
        assert not constant.any()


@in_one_order
def test_the_first_nan_wins(backend: str) -> None:
    scores = torch.ones(1, 20, 3, 3, device=device_of(backend))
    scores[0, 17, 1, 1] = scores[0, 19, 1, 1] = float("nan")
    scores[0, 3] = float("inf")
    with running(backend):
        labels, confidence = upsample_argmax(scores, size=3, factor=1, return_confidence=True)
    wanted = torch.full((1, 3, 3), 3, device=scores.device)
    wanted[0, 1, 1] = 17
    assert torch.equal(labels.long(), wanted)
    assert confidence.isnan().all()  # inf - inf, as softmax has it


@in_one_order
@pytest.mark.parametrize(
    ("classes", "dtype"),
    [
        (256, torch.uint8),
        (257, torch.int16),
        (1000, torch.int16),
        (32768, torch.int16),
        (32769, torch.int32),
    ],
)
def test_labels_are_as_narrow_as_classes_allow(
    backend: str, classes: int, dtype: torch.dtype
) -> None:
    scores = torch.zeros(1, classes, 1, 2, device=device_of(backend))
    scores[0, -1, 0, 0] = scores[0, classes // 2, 0, 1] = 1
    with running(backend):
        labels = upsample_argmax(scores, size=(1, 4))
    assert labels.dtype == dtype
    assert labels.flatten().tolist() == [classes - 1] * 2 + [classes // 2] * 2


@in_one_order
def test_a_crop_is_a_part_of_the_whole(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 5, 6, 7, generator=generator).to(device_of(backend))
    weight = torch.randn(5, 6, 6, generator=generator).to(scores.device)
    for given_weight in (None, weight):
        how = {"factor": 3, "kernel_size": 6, "weight": given_weight}
        with running(backend):
            whole = upsample_argmax(scores, size=(21, 24), **how)
            part = upsample_argmax(scores, size=(11, 17), offset=(4, 5), **how)
            each = [upsample_argmax(s, size=(21, 24), **how) for s in scores.split(1)]
        assert torch.equal(part, whole[:, 4:15, 5:22])
        assert torch.equal(torch.cat(each), whole)


def test_the_same_bits_every_time() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 21, 24, 40, generator=generator)
    before, found = torch.get_num_threads(), []
    for threads in (1, 1, 2, 2):
        torch.set_num_threads(threads)
        found.append(upsample_argmax(scores, size=(96, 160), return_confidence=True))
    torch.set_num_threads(before)
    for labels, confidence in found[1:]:
        assert torch.equal(labels, found[0][0])
        assert torch.equal(confidence, found[0][1])


def test_gradients_are_not_asked_for() -> None:
    """Scores under training give labels all the same."""
    scores = torch.randn(1, 3, 4, 5, requires_grad=True)
    labels, confidence = upsample_argmax(scores, size=(8, 10), return_confidence=True)
    assert not labels.requires_grad
    assert not confidence.requires_grad
