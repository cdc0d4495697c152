"""Training from coarse scores gives what training from those of the images' size gives."""

from __future__ import annotations

import csv
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

for package in ("lightning", "matplotlib", "rich", "safetensors", "tifffile", "tomli_w"):
    pytest.importorskip(package)

from runs import one_thread, write_pictures  # noqa: E402, F401
from torch import Tensor, nn  # noqa: E402

from segfuse import loop, ops, training  # noqa: E402
from segfuse.loop import Segmentation  # noqa: E402
from segfuse.models import FCN  # noqa: E402
from segfuse.models.backbones import BACKBONES  # noqa: E402
from segfuse.nn import TouchingCrossEntropy, WeightedCrossEntropy  # noqa: E402
from segfuse.solvers import SOLVERS  # noqa: E402

STEPS, SIZE, CLASSES = 6, (64, 72), 5
# Relative, of a loss. In float32 the two ways differed by up to 3e-7 and float64's by 3.3e-6, of
# both layouts, learned and bilinear, at rates of 0.01 and 0.1; in bfloat16 the two by up to 5e-4.
ROUNDING = {torch.float32: 5e-6, torch.bfloat16: 5e-3}


@cache
def _fcn(upsample: Any, classes: int) -> FCN:
    torch.manual_seed(0)
    vgg = BACKBONES["vgg16"](1, width=1 / 32)
    net = FCN(vgg, classes, stride=8, layout="aligned", upsample=upsample)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.startswith(("score", "up")):
                p.add_(0.3 * torch.randn_like(p))
    return net.eval()  # without dropout


def fcn(upsample: str = "learned", classes: int = CLASSES) -> FCN:
    """FCN-8s on a narrow VGG, its scoring layers and filters drawn at random."""
    return deepcopy(_fcn(upsample, classes))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Noise and labels of no meaning, some of them void."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, CLASSES, (2, *SIZE), generator=generator, dtype=torch.uint8)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    return torch.rand(2, 3, *SIZE, generator=generator), labels


def plain(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(net(images).float(), labels.long(), ignore_index=255)


def fused(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    module = Segmentation(net, WeightedCrossEntropy(), SOLVERS["modern"], 0.0)
    return module.training_step((images, labels))


def curve(net: nn.Module, loss: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
    """The losses of some steps of SGD; in another dtype than float32 under autocast."""
    solver = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    losses = []
    for step in range(STEPS):
        solver.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            losses.append(loss(net, *batch(step)))
        losses[-1].backward()
        solver.step()
    return torch.stack(losses).detach()


@pytest.mark.parametrize("upsample", ["learned", "bilinear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_curve_is_that_of_plain_pytorch(upsample: str, dtype: torch.dtype) -> None:
    theirs, ours = (curve(fcn(upsample), loss, dtype) for loss in (plain, fused))
    assert ours.dtype == torch.float32
    assert ours[-1] < 0.7 * ours[0]
    torch.testing.assert_close(ours, theirs, rtol=ROUNDING[dtype], atol=0)


def test_a_step_in_mixed_precision() -> None:
    net = fcn()
    with torch.autocast("cpu", torch.bfloat16):
        assert net.coarse_scores(batch(0)[0]).dtype == torch.bfloat16
        loss = fused(net, *batch(0))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


@pytest.mark.parametrize(
    "loss",
    [
        WeightedCrossEntropy(
            class_weight=torch.tensor([1.0, 2.0, 3.0, 0.5, 0.0]),
            ignore_index=1,
            reduction="sum",
            label_smoothing=0.1,
        ),
        TouchingCrossEntropy(),
        nn.CrossEntropyLoss(ignore_index=255),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_losses_are_the_same_with_all_their_options(loss: nn.Module) -> None:
    """Fused where they take coarse scores, as any other module is called where they do not."""
    net, (images, labels) = fcn(), batch(0)
    if isinstance(loss, TouchingCrossEntropy):
        net, labels = fcn(classes=2), torch.zeros(2, *SIZE, dtype=torch.int32)
        labels[:, 10:30, 10:30], labels[:, 10:30, 30:50], labels[:, :5] = 1, 2, -1
    elif isinstance(loss, WeightedCrossEntropy):
        labels = labels.masked_fill(labels == 255, 1)
    else:
        labels = labels.long()
    (ours, g), (theirs, h) = (
        (value, torch.autograd.grad(value, list(net.parameters())))
        for value in (
            Segmentation(net, loss, SOLVERS["modern"], 0.0).training_step((images, labels)),
            loss(net(images), labels),
        )
    )
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-5 * max(1.0, ours.item()))


def test_scores_of_the_images_size_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(FCN, "forward", refuse)
    assert fused(fcn(), *batch(0)).isfinite()
    with pytest.raises(AssertionError):
        plain(fcn(), *batch(0))


class LossAndLabels(nn.Module):
    """Of an FCN's coarse scores."""

    def __init__(self, net: FCN) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        coarse, how = self.net.coarse_scores(images), self.net.upsampling
        size = (images.shape[2], images.shape[3])
        loss = ops.upsample_cross_entropy(coarse, labels, **how)
        return loss, ops.upsample_argmax(coarse, size=size, **how)


@pytest.mark.parametrize(
    ("upsample", "way"),
    [
        ("learned", "compile"),
        ("bilinear", "compile"),
        ("learned", "compile, any size"),
        ("bilinear", "export"),
        ("learned", "export"),
    ],
)
def test_one_graph(upsample: str, way: str) -> None:
    """Loss, labels and gradients of a whole network, compiled or exported."""
    torch.compiler.reset()
    module, (images, labels) = LossAndLabels(fcn(upsample)), batch(0)
    parameters = list(module.parameters())
    if way == "export":
        program: Any = torch.export.export(module, (images, labels)).module()
        for (ours, p), (theirs, q) in zip(
            program.named_parameters(), module.named_parameters(), strict=True
        ):
            assert ours == theirs
            assert torch.equal(p, q)
        parameters = list(program.parameters())
    else:
        program = torch.compile(
            module, fullgraph=True, backend="aot_eager", dynamic=way != "compile"
        )
    (loss, found), (wanted, expected) = program(images, labels), module(images, labels)
    assert torch.equal(found, expected)
    torch.testing.assert_close(loss, wanted)
    ours = torch.autograd.grad(loss, parameters)
    theirs = torch.autograd.grad(wanted, list(module.parameters()))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_run_has_the_same_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_pictures(tmp_path)
    tiny = {"model": "fcn8s", "backbone": "squeezenet1_0", "width": 1 / 16, "patch": 32, "batch": 2}
    tiny |= {"steps": 4, "threads": 1, "precision": "32", "device": "cpu", "validation": 0}
    monkeypatch.setattr(training, "_draw", lambda *_: None)
    curves = []
    for name in ("fused", "plain"):
        run = training.fit(**data, output=tmp_path / name, class_weight="balanced", **tiny)
        with (run.path / "metrics.csv").open() as file:
            curves.append([float(row["loss"]) for row in csv.DictReader(file)])
        monkeypatch.setattr(loop, "coarse_scores", lambda _: None)
    assert len(curves[0]) == tiny["steps"]
    assert curves[0] == pytest.approx(curves[1], rel=ROUNDING[torch.float32])
