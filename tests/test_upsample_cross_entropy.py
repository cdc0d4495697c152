"""What the generated tests of upsample_cross_entropy cannot say; and the module over it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import BACKENDS, device_of, running
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from upsampled import IN_ONE_ORDER, Case, assert_near, cases, extremes

from segfuse.nn import TouchingCrossEntropy, UpsampleCrossEntropy, WeightedCrossEntropy
from segfuse.ops import upsample_cross_entropy, weighted_cross_entropy

README = Path(__file__).parents[1] / "README.md"

on_backends = pytest.mark.parametrize("backend", BACKENDS)
in_one_order = pytest.mark.parametrize("backend", IN_ONE_ORDER)
few = settings(max_examples=25, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Loss:
    """A case, its target (N, *size), and the loss's options."""

    case: Case
    target: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Loss:
        options = {
            name: value.to(device, dtype) if isinstance(value, Tensor) else value
            for name, value in self.options.items()
        }
        return Loss(self.case.to(device, dtype), self.target.to(device), options)

    def of(
        self,
        function: Callable[..., Tensor] = upsample_cross_entropy,
        upstream: Tensor | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """The loss, and the gradients of scores and of the weight where there is one."""
        case = self.case.asking()
        loss = function(case.scores, self.target, **case.how, **{**self.options, **options})
        inputs = [case.scores, *([] if case.weight is None else [case.weight])]
        upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss)
        return [loss.detach(), *torch.autograd.grad(loss, inputs, upstream)]

    def plainly(self, **how: Any) -> list[Tensor]:
        """The same by the reference."""
        return self.of(upsample_cross_entropy.reference, **how)


def compare(backend: str, loss: Loss, **how: Any) -> None:
    """Loss and gradients are near those of float64, as near as the reference's are."""
    with running(backend):
        ours = loss.of(**how)
    plain, truth = loss.plainly(**how), loss.to(torch.float64, device_of(backend)).plainly(**how)
    largest = loss.case.largest
    for got, want, true in zip(ours, plain, truth, strict=True):
        assert_near(got, want, true, largest=largest)


@st.composite
def losses(draw: st.DrawFn) -> Loss:
    case = draw(cases())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    shape = (case.scores.shape[0], *case.size)
    target = torch.randint(0, case.classes, shape, generator=generator)
    options: dict[str, Any] = {
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1, 1.0])),
        "ignore_index": draw(st.sampled_from([255, None, -1, 0])),
    }
    if options["ignore_index"] in {255, -1}:
        ignored = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
        target[ignored] = options["ignore_index"]
    if draw(st.booleans()):
        options["weight_map"] = torch.rand(shape, generator=generator)
    if draw(st.booleans()):
        options["class_weight"] = torch.rand(case.classes, generator=generator)
    narrow = draw(st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]))
    if narrow == torch.uint8 and options["ignore_index"] == -1:
        narrow = torch.int8
    return Loss(case, target.to(narrow), options)


# The operator


@on_backends
@few
@given(loss=losses())
def test_it_is_upsampling_and_the_weighted_loss(backend: str, loss: Loss) -> None:
    upstream = torch.rand(loss.target.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    if loss.options["reduction"] != "none":
        upstream = upstream.mean() + 1
    for dtype in (torch.float32, torch.bfloat16):
        compare(backend, loss.to(dtype, device_of(backend)), upstream=upstream)


@in_one_order
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("corners", [False, True])
def test_it_is_torchs(backend: str, corners: bool, reduction: str, smoothing: float) -> None:
    """Loss and gradient of F.interpolate and F.cross_entropy, without the package's own words."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 5, 7, 9, generator=generator).to(device_of(backend)).requires_grad_()
    weight = torch.rand(5, generator=generator).to(scores.device)
    target = torch.randint(0, 5, (2, 25, 18), generator=generator).to(scores.device)
    target[0, :3] = 255
    options = {"reduction": reduction, "label_smoothing": smoothing}
    with running(backend):
        loss = upsample_cross_entropy(
            scores, target, class_weight=weight, align_corners=corners, **options
        )
        upstream = torch.rand(loss.shape, generator=generator).to(loss)
        (ours,) = torch.autograd.grad(loss, scores, upstream)
    full = F.interpolate(scores, (25, 18), mode="bilinear", align_corners=corners)
    wanted = F.cross_entropy(full, target, weight=weight, ignore_index=255, **options)
    (theirs,) = torch.autograd.grad(wanted, scores, upstream)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(ours, theirs)


def _loss(case: Case, **options: Any) -> Loss:
    generator = torch.Generator().manual_seed(1)
    shape = (case.scores.shape[0], *case.size)
    target = torch.randint(0, case.classes, shape, generator=generator).to(case.scores.device)
    return Loss(case, target, options)


@in_one_order
@pytest.mark.parametrize("offset", [0.0, 100.0, 1000.0])
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_smoothing_of_scores_far_from_zero(backend: str, smoothing: float, offset: float) -> None:
    """Where all scores are large, the loss is as exact as that of plain PyTorch."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 150, 8, 8, generator=generator) + offset
    target = torch.randint(0, 150, (1, 32, 32), generator=generator)
    options: dict[str, Any] = {"label_smoothing": smoothing, "reduction": "none"}

    def plain(scores: Tensor) -> Tensor:
        full = F.interpolate(scores, (32, 32), mode="bilinear")
        return F.cross_entropy(full, target, **options)

    truth = plain(scores.double())
    least = 4 * torch.finfo(torch.float32).eps * truth.max()
    device = device_of(backend)
    full = F.interpolate(scores.double(), (32, 32), mode="bilinear").float()
    with running(backend):
        ours = upsample_cross_entropy(scores.to(device), target.to(device), **options)
        whole = weighted_cross_entropy(full.to(device), target.to(device), **options)
    error = (plain(scores) - truth).abs().max()
    assert (ours.cpu() - truth).abs().max() <= 2 * error + least
    wanted = F.cross_entropy(full.double(), target, **options)
    error = (F.cross_entropy(full, target, **options) - wanted).abs().max()
    assert (whole.cpu() - wanted).abs().max() <= 2 * error + least


@in_one_order
@pytest.mark.parametrize("kernel", [3, 4])
def test_gradients_of_a_learned_kernel(backend: str, kernel: int) -> None:
    """By differences, of the kernel alone and together with the scores'."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 3, 4, generator=generator, dtype=torch.float64)
    weight = torch.rand(3, kernel, kernel, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 3, (2, 5, 6), generator=generator)
    target[0, 0] = 255
    scores, weight, target = (t.to(device_of(backend)) for t in (scores, weight, target))

    def loss(scores: Tensor, weight: Tensor) -> Tensor:
        return upsample_cross_entropy(
            scores, target, factor=2, offset=1, kernel_size=kernel, weight=weight
        )

    with running(backend):
        assert torch.autograd.gradcheck(loss, (scores, weight.requires_grad_()))
        assert torch.autograd.gradcheck(loss, (scores.requires_grad_(), weight))


@in_one_order
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_extreme_scores(backend: str, smoothing: float) -> None:
    """The reference says where a loss is infinite and where NaN, as `F.interpolate` gives NaN where
    it multiplies an infinite score by zero.  Elsewhere gradients are compared: a pixel whose loss
    is not finite is ignored there, and must then leave the gradient finite."""
    for case in extremes():
        loss = _loss(case.to(device_of(backend)), reduction="none", label_smoothing=smoothing)
        with running(backend):
            (got, *_) = loss.of()
        (plain, *_), (truth, *_) = loss.plainly(), loss.to(torch.float64, got.device.type).plainly()
        assert_near(got, plain, truth, largest=case.largest)
        counted = replace(loss, target=loss.target.masked_fill(~plain.isfinite(), 255))
        with running(backend):
            (got, *ours) = counted.of()
        assert torch.equal(got == 0, counted.plainly()[0] == 0)
        _, *theirs = counted.plainly()
        _, *true = counted.to(torch.float64, got.device.type).plainly()
        assert ours[0].isfinite().all(), case.name
        for of, (grad, want, exact) in enumerate(zip(ours, theirs, true, strict=True)):
            # Of a filter's gradient it is of no matter whether zero times an infinite score is
            # added, as the reference does.
            assert_near(grad, want, exact, largest=case.largest, somewhere=of == 1)


@in_one_order
def test_what_is_not_a_number_spoils_the_gradient_of_what_it_reaches(backend: str) -> None:
    """All classes of the cells that a pixel without a loss is made of; and no others.

    The reference spoils those too that it multiplies by zero, where either is right.
    """
    for case in extremes():
        loss = _loss(case.to(device_of(backend)), reduction="sum")
        _, theirs, *_ = loss.plainly()
        if theirs.isfinite().all():
            continue
        with running(backend):
            _, ours, *_ = loss.of()
        bad = replace(loss, options={"reduction": "none"}).plainly()[0].isnan()
        weights = replace(case, scores=torch.ones_like(case.scores)).to(ours.device).asking()
        full = weights.upsampled()
        (reached,) = torch.autograd.grad(
            full, weights.scores, bad[:, None].expand_as(full).to(full)
        )
        assert ours.isnan()[reached != 0].all(), case.name
        assert theirs.isnan()[ours.isnan()].all(), case.name


@in_one_order
def test_ignored_pixels_are_not_looked_at(backend: str) -> None:
    for how in ({}, {"align_corners": True}, {"factor": 3, "offset": 1}):
        for reduction in ("none", "mean", "sum"):
            scores = torch.full((2, 3, 3, 4), math.nan, device=device_of(backend))
            target = torch.full((2, 7, 8), 255, device=scores.device)
            loss = Loss(Case(scores, (7, 8), how), target, {"reduction": reduction})
            with running(backend):
                got, grad = loss.of()
            assert not got.any()
            assert not grad.any()


@in_one_order
def test_nothing_that_weighs_gives_zero_and_no_gradient(backend: str) -> None:
    scores = torch.randn(1, 3, 3, 4, device=device_of(backend))
    target = torch.zeros(1, 6, 8, dtype=torch.uint8, device=scores.device)
    nothing = {"weight_map": torch.zeros(1, 1, 6, 8, device=scores.device)}
    for options in (nothing, {"class_weight": torch.zeros(3, device=scores.device)}):
        with running(backend):
            got, grad = Loss(Case(scores, (6, 8)), target, options).of()
        assert got == 0
        assert not grad.any()


@in_one_order
@pytest.mark.parametrize("classes", [256, 1000])
def test_many_classes(backend: str, classes: int) -> None:
    """Where 255 is a class like any other, unless it is ignored."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, classes, 3, 4, generator=generator).to(device_of(backend))
    target = torch.randint(0, classes, (1, 9, 11), generator=generator).short()
    target[0, :4] = 255
    target = target.to(scores.device)
    for how in ({}, {"factor": 4, "offset": 2}):
        loss = Loss(Case(scores, (9, 11), how), target, {"reduction": "none"})
        compare(backend, replace(loss, options={"ignore_index": None}))
        with running(backend):
            assert not loss.of()[0][0, :4].any()
            assert (loss.of(ignore_index=None)[0] > 0).all()


def test_a_target_that_is_no_class_is_told() -> None:
    scores, target = torch.randn(1, 3, 2, 2), torch.zeros(1, 4, 4, dtype=torch.int16)
    with pytest.raises(TypeError, match="target: expected uint8"):
        upsample_cross_entropy(scores, target.float())
    target[0, 1, 2] = 255
    upsample_cross_entropy(scores, target)
    with pytest.raises(ValueError, match=r"got 255 at \(0, 1, 2\)"):
        upsample_cross_entropy(scores, target, ignore_index=None, validate=True)


@pytest.mark.parametrize("learned", [False, True])
def test_the_same_bits_every_time(learned: bool) -> None:
    """Of loss and gradients, for one thread and for two."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 21, 12, 20, generator=generator)
    how: dict[str, Any] = {}
    if learned:
        how = {"factor": 4, "offset": 2, "weight": torch.randn(21, 8, 8, generator=generator)}
    loss = _loss(Case(scores, (48, 80), how))
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for first, second in zip(loss.of(), loss.of(), strict=True):
            assert torch.equal(first, second)
    torch.set_num_threads(before)


# The module


def test_the_module_is_the_function() -> None:
    case = Case(torch.randn(2, 3, 4, 5), (11, 14))
    target, weight_map = torch.randint(0, 3, (2, 11, 14)), torch.rand(2, 1, 11, 14)
    options = {"class_weight": torch.tensor([1.0, 2.0, 0.5]), "label_smoothing": 0.1}
    learned = torch.randn(3, 6, 6, requires_grad=True)
    for how in ({}, {"align_corners": True}, {"factor": 3, "kernel_size": 6, "offset": (1, 2)}):
        module = UpsampleCrossEntropy(**how, **options)
        weights = {} if "factor" not in how else {"weight": learned}
        wanted = upsample_cross_entropy(
            case.scores, target, weight_map=weight_map, **how, **weights, **options
        )
        loss = module(case.scores, target, weight_map, **weights)
        assert torch.equal(loss, wanted)
        if weights:
            loss.backward()
            assert learned.grad is not None
    text = "factor=3, kernel_size=6, offset=(1, 2), ignore_index=255, reduction='mean'"
    assert text in repr(module)
    assert "align_corners=True, ignore_index=None" in repr(
        UpsampleCrossEntropy(align_corners=True, ignore_index=None)
    )
    assert list(module.state_dict()) == ["class_weight"]
    with pytest.raises(ValueError, match="UpsampleCrossEntropy: reduction: expected one of"):
        UpsampleCrossEntropy(reduction="all")  # type: ignore[arg-type]


def test_losses_take_coarse_scores() -> None:
    """`of_coarse` is the loss of the upsampled scores, whatever makes target and weights."""
    generator = torch.Generator().manual_seed(0)
    for case in (
        Case(torch.randn(1, 2, 6, 7, generator=generator), (24, 28)),
        Case(torch.randn(1, 2, 6, 7, generator=generator), (20, 25), {"factor": 4, "offset": 2}),
    ):
        ids = torch.zeros(1, *case.size, dtype=torch.int32)
        ids[0, 4:10, 4:10], ids[0, 4:10, 10:18], ids[0, :2] = 1, 2, -1
        touching = TouchingCrossEntropy()
        wanted = touching(case.upsampled(), ids)
        torch.testing.assert_close(touching.of_coarse(case.scores, ids, **case.how), wanted)
        classes = WeightedCrossEntropy(class_weight=torch.tensor([1.0, 3.0]), label_smoothing=0.1)
        target, weight_map = touching.target(ids)
        wanted = classes(case.upsampled(), target, weight_map)
        coarse = classes.of_coarse(case.scores, target, weight_map, **case.how)
        torch.testing.assert_close(coarse, wanted)


def test_the_example_of_the_readme() -> None:
    """It runs, and gives what the lines that it replaces give."""
    (example,) = (
        block.split("```")[0]
        for block in README.read_text(encoding="utf-8").split("```python\n")[1:]
        if "UpsampleCrossEntropy" in block.split("```")[0]
    )
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    exec(example, found)  # noqa: S102
    head, scores, target = (found[name] for name in ("head", "scores", "target"))
    grads = [p.grad.clone() for p in head.parameters()]
    (before,) = re.findall("(# full = .*\n# loss = .*\n)", example)
    head.zero_grad()
    found["scores"] = head(found["features"])
    exec(before.replace("# full", "full").replace("# loss", "loss"), found)  # noqa: S102
    torch.testing.assert_close(found["criterion"](scores, target), found["loss"])
    found["loss"].backward()
    for ours, p in zip(grads, head.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-3, atol=1e-6)
    chosen = found["full"].gather(1, found["labels"].long()[:, None])[:, 0]
    assert (found["full"].amax(1) - chosen).max() <= 1e-5
