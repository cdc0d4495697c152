"""What the generated tests of the loss cannot say."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from backends import BACKENDS, device_of, running
from torch.nn.functional import cross_entropy

from segfuse.nn import WeightedCrossEntropy
from segfuse.ops import weighted_cross_entropy

on_backends = pytest.mark.parametrize("backend", BACKENDS)


@on_backends
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_without_a_map_it_is_torchs(backend: str, reduction: str, smoothing: float) -> None:
    torch.manual_seed(0)
    device = device_of(backend)
    logits, weight = torch.randn(2, 5, 7, 9, device=device), torch.rand(5, device=device)
    target = torch.randint(0, 5, (2, 7, 9), device=device)
    target[0, :3] = 255
    options = {"reduction": reduction, "label_smoothing": smoothing}
    with running(backend):
        ours = weighted_cross_entropy(logits, target, class_weight=weight, **options)
    theirs = cross_entropy(logits, target, weight=weight, ignore_index=255, **options)
    torch.testing.assert_close(ours, theirs)


@on_backends
def test_nothing_counted_gives_zero_and_no_gradient(backend: str) -> None:
    device = device_of(backend)
    logits = torch.randn(1, 3, 4, 5, device=device, requires_grad=True)
    ignored = torch.full((1, 4, 5), 255, device=device)
    weightless = torch.zeros(1, 4, 5, device=device)
    for target, weight_map in ((ignored, None), (torch.zeros_like(ignored), weightless)):
        for function in (weighted_cross_entropy, weighted_cross_entropy.reference):
            with running(backend):
                loss = function(logits, target, weight_map=weight_map)
                (grad,) = torch.autograd.grad(loss, logits)
            assert loss == 0
            assert (grad == 0).all()


@on_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_extreme_logits(backend: str, dtype: torch.dtype) -> None:
    """As plain PyTorch has it: masks of -inf, large values, NaN and inf."""
    device = device_of(backend)
    inf = math.inf
    columns = [
        [0.0, -inf, 1.0],
        [-inf, -inf, 3.0],
        [1e4, -1e4, 0.0],
        [-1e4, -1e4, -1e4],
        [3e4, 3e4, -inf],
        [math.nan, 0.0, 0.0],
        [inf, 0.0, 0.0],
        [-inf, -inf, -inf],
        [-300.0, -200.0, -100.0],
    ]
    logits = torch.tensor(columns, dtype=dtype, device=device).T[None].contiguous()
    for target_class in range(3):
        target = torch.full((1, len(columns)), target_class, device=device)
        outcomes = []
        for function in (weighted_cross_entropy, weighted_cross_entropy.reference):
            leaf = logits.clone().requires_grad_()
            with running(backend):
                loss = function(leaf, target, reduction="none")
                finite = loss.isfinite()
                (grad,) = torch.autograd.grad(loss[finite].sum(), leaf)
            outcomes.append((loss, grad[:, :, finite[0]]))
        torch.testing.assert_close(*(loss for loss, _ in outcomes), equal_nan=True)
        largest = 3e4 * torch.finfo(torch.float32).eps  # an ulp of the largest logit
        torch.testing.assert_close(*(grad for _, grad in outcomes), rtol=largest, atol=1e-6)


@on_backends
def test_ignored_pixels_are_not_looked_at(backend: str) -> None:
    device = device_of(backend)
    logits = torch.full((1, 2, 1, 3), math.nan, device=device, requires_grad=True)
    target = torch.full((1, 1, 3), 255, device=device)
    with running(backend):
        loss = weighted_cross_entropy(logits, target)
        (grad,) = torch.autograd.grad(loss, logits)
    assert loss == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_the_cpu_names_the_first_id_out_of_range(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 3, 4, 5)
    target = torch.zeros(2, 4, 5, dtype=dtype)
    target[0, 0, 0] = 100
    target[1, 2, 3] = 77
    target[1, 3, 0] = 78
    text = r"target: expected class ids 0 to 2 or ignore_index 100, got 77 at \(1, 2, 3\)"
    with pytest.raises(ValueError, match=text):
        weighted_cross_entropy(logits, target, ignore_index=100)
    if dtype != torch.uint8:
        target[1, 0, 0] = -1
        with pytest.raises(ValueError, match=r"got -1 at \(1, 0, 0\)"):
            weighted_cross_entropy(logits, target, ignore_index=100)


def test_an_ignored_id_that_the_dtype_lacks_ignores_nothing() -> None:
    """256 must not become 0 in uint8, nor 255 become -1 in int8."""
    logits = torch.randn(1, 2, 1, 2)
    target = torch.zeros(1, 1, 2, dtype=torch.uint8)
    want = cross_entropy(logits, target.long())
    torch.testing.assert_close(weighted_cross_entropy(logits, target, ignore_index=256), want)
    with pytest.raises(ValueError, match="got -1"):
        weighted_cross_entropy(logits, target.to(torch.int8) - 1, ignore_index=255)


def test_the_map_may_have_a_channel_and_another_dtype() -> None:
    logits = torch.randn(2, 3, 4, 5, dtype=torch.bfloat16)
    target, weight_map = torch.randint(0, 3, (2, 4, 5)), torch.rand(2, 1, 4, 5)
    want = weighted_cross_entropy(logits, target, weight_map=weight_map[:, 0])
    assert torch.equal(weighted_cross_entropy(logits, target, weight_map=weight_map), want)
    assert want.dtype == torch.float32


def test_the_module_is_the_function() -> None:
    logits, target = torch.randn(1, 3, 4, 5), torch.randint(0, 3, (1, 4, 5))
    weight, weight_map = torch.tensor([1.0, 2.0, 0.5]), torch.rand(1, 4, 5)
    module = WeightedCrossEntropy(class_weight=weight, label_smoothing=0.1)
    want = weighted_cross_entropy(
        logits, target, weight_map=weight_map, class_weight=weight, label_smoothing=0.1
    )
    assert torch.equal(module(logits, target, weight_map), want)
    assert "label_smoothing=0.1" in repr(module)
    assert list(module.state_dict()) == ["class_weight"]
    assert not list(WeightedCrossEntropy().state_dict())


def test_training_steps_go_down() -> None:
    torch.manual_seed(0)
    logits = torch.zeros(1, 3, 8, 8, requires_grad=True)
    target = torch.randint(0, 3, (1, 8, 8), dtype=torch.uint8)
    before = weighted_cross_entropy(logits, target)
    before.backward()
    assert logits.grad is not None
    assert weighted_cross_entropy(logits - logits.grad, target) < before
    assert before.item() == pytest.approx(math.log(3))


@on_backends
@pytest.mark.parametrize("classes", [12, 1100])
def test_nan_is_kept_from_one_block_of_classes_to_the_next(backend: str, classes: int) -> None:
    logits = torch.zeros(1, classes, 1, 16, device=device_of(backend))
    logits[:, : classes - 4] = math.nan
    target = torch.full((1, 1, 16), classes - 1, device=logits.device)
    with running(backend):
        assert weighted_cross_entropy(logits, target, ignore_index=None).isnan()


def test_third_derivatives() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (1, 2, 2))

    def third(function: Callable[..., torch.Tensor]) -> torch.Tensor:
        (first,) = torch.autograd.grad(function(logits, target), logits, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), logits, create_graph=True)
        (result,) = torch.autograd.grad((second**2).sum(), logits)
        return result

    torch.testing.assert_close(third(weighted_cross_entropy), third(cross_entropy))


@pytest.mark.parametrize("bad", [-1, 3, -100])
def test_the_reference_refuses_ids_too(bad: int) -> None:
    target = torch.tensor([[[0, bad]]])
    with pytest.raises(IndexError):
        weighted_cross_entropy.reference(torch.randn(1, 3, 1, 2), target)


def test_the_module_refuses_an_unknown_reduction() -> None:
    with pytest.raises(ValueError, match="reduction: expected one of"):
        WeightedCrossEntropy(reduction="all")
