"""What the generated tests of the confusion matrix cannot say."""

from __future__ import annotations

import math

import pytest
import torch
from backends import BACKENDS, device_of, running

from segfuse.ops import confusion_matrix

on_backends = pytest.mark.parametrize("backend", BACKENDS)


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_ties_and_nan_are_as_in_argmax(backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    scores = torch.randint(-2, 3, (2, 6, 16, 17)).to(dtype)
    scores[torch.rand(scores.shape) < 0.1] = math.nan
    scores[torch.rand(scores.shape) < 0.1] = math.inf
    scores[torch.rand(scores.shape) < 0.1] = -math.inf
    scores = scores.to(device_of(backend))
    target = torch.randint(0, 6, (2, 16, 17), device=scores.device)
    for layout in (torch.contiguous_format, torch.channels_last):
        with running(backend):
            got = confusion_matrix(scores.contiguous(memory_format=layout), target, 6)
        assert torch.equal(got, confusion_matrix.reference(scores.argmax(1), target, 6))


@on_backends
@pytest.mark.parametrize("classes", [1, 2, 110, 111, 700])
def test_few_and_many_classes(backend: str, classes: int) -> None:
    """Counters in shared memory, and beyond."""
    torch.manual_seed(0)
    device = device_of(backend)
    prediction = torch.randint(0, classes, (1, 40, 50), device=device)
    target = torch.randint(0, classes, (1, 40, 50), device=device)
    with running(backend):
        got = confusion_matrix(prediction, target, classes, ignore_index=None)
    assert torch.equal(
        got, confusion_matrix.reference(prediction, target, classes, ignore_index=None)
    )
    assert got.sum() == prediction.numel()


def test_the_cpu_names_the_first_id_out_of_range() -> None:
    ids = torch.zeros(1, 3, 4, dtype=torch.uint8)
    wrong = ids.clone()
    wrong[0, 1, 2] = 9
    with pytest.raises(
        ValueError, match=r"target: expected class ids 0 to 1 or ignore_index 255, "
    ):
        confusion_matrix(ids, wrong, 2)
    with pytest.raises(ValueError, match=r"prediction: expected .* 0 to 1, got 9 at \(0, 1, 2\)"):
        confusion_matrix(wrong, ids, 2)


def test_the_reference_is_as_strict() -> None:
    ids, wrong = torch.zeros(1, 1, 2, dtype=torch.uint8), torch.tensor([[[3, 0]]])
    with pytest.raises(ValueError, match="prediction: expected class ids 0 to 2, got 3"):
        confusion_matrix.reference(wrong, ids, 3)
    want = torch.tensor([[2, 0], [0, 0]])  # 256 is no value of uint8, and must not become 0
    for function in (confusion_matrix, confusion_matrix.reference):
        assert torch.equal(function(ids, ids, 2, ignore_index=256), want)


def test_a_prediction_may_be_anything_where_the_target_is_ignored() -> None:
    target = torch.tensor([[[0, 255, 1]]], dtype=torch.uint8)
    prediction = torch.tensor([[[0, -7, 1]]])
    want = torch.eye(2, dtype=torch.int64)
    assert torch.equal(confusion_matrix(prediction, target, 2), want)
    assert torch.equal(confusion_matrix(prediction, target, 2, validate=True), want)


def test_matrices_of_parts_add_up() -> None:
    torch.manual_seed(0)
    scores, target = torch.randn(3, 4, 33, 65), torch.randint(0, 4, (3, 33, 65))
    parts = [confusion_matrix(s[None], t[None], 4) for s, t in zip(scores, target, strict=True)]
    assert torch.equal(torch.stack(parts).sum(0), confusion_matrix(scores, target, 4))


def test_more_than_two_to_the_31_pixels_of_one_class() -> None:
    """Expanded, so that it needs no memory; counters of 32 bits would overflow."""
    target = torch.zeros(1, 1, dtype=torch.uint8).expand(1, 2**31 + 3)
    assert confusion_matrix(target, target, 1).item() == 2**31 + 3
