"""Networks layer by layer: the published table, costs, and the command that shows them."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfuse import geometry
from segfuse.anatomy import NETWORKS, anatomy, summary
from segfuse.errors import UserError
from segfuse.geometry.layers import ALEXNET, GOOGLENET, VGG16, chain
from segfuse.geometry.network import scaled, trace
from segfuse.models import MODELS
from segfuse.models.backbones import BACKBONES
from segfuse.models.paper import PAPER
from segfuse.nn import DeconvUpsample


@pytest.mark.parametrize(
    ("name", "depth", "millions", "field", "grid"),
    [
        ("fcn-alexnet", 8, 57, 355, "10 x 10"),
        ("fcn-vgg16", 16, 134, 404, "10 x 10"),
        ("fcn-googlenet", 22, 6, 907, "9 x 10"),
    ],
)
def test_table_1_of_the_paper(name: str, depth: int, millions: int, field: int, grid: str) -> None:
    found = anatomy(name, (500, 512))
    assert found.depth == depth
    assert round(found.parameters / 1e6) == millions
    assert found.receptive_field == (field, field)
    assert found.stride == (32, 32)
    assert not found.everywhere
    first, second = summary(found)
    assert first.startswith(f"{depth} conv layers, {scaled(found.parameters)} parameters")
    assert first.endswith(f"receptive field {field}, stride 32")
    assert second.startswith(f"500 x 512 pixels to {grid}, margin ")


@pytest.mark.parametrize(
    ("name", "layers"),
    [("fcn-alexnet", ALEXNET), ("fcn-vgg16", VGG16), ("fcn-googlenet", GOOGLENET)],
)
def test_the_papers_nets_are_their_lists_of_layers(name: str, layers: Any) -> None:
    with torch.device("meta"):
        net = PAPER[name](21)
    found = trace(net, (1, 3, 389, 401))
    for k, size in enumerate((389, 401)):
        *_, last = chain(layers, size).values()
        axis = found.output[k]
        assert (axis.size, axis.scale, axis.shift) == (last.size, last.scale, last.shift)
        assert (axis.lo, axis.hi, axis.bad_lo, axis.bad_hi) == (
            *(last.lo, last.hi, last.bad_lo, last.bad_hi),
        )


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("fcn-alexnet", 60_965_224), ("fcn-vgg16", 138_357_544), ("fcn-googlenet", 6_998_552)],
)
def test_parameters_of_the_classifiers_that_they_were(name: str, parameters: int) -> None:
    """With ImageNet's 1000 classes, as Caffe's networks have them."""
    with torch.device("meta"):
        assert sum(p.numel() for p in PAPER[name](1000).parameters()) == parameters


def test_backbones_have_the_classes_of_imagenet() -> None:
    assert anatomy("alexnet", (224, 224)).parameters == 61_100_840


@pytest.mark.parametrize(("factor", "kernel"), [(32, 63), (2, 3), (4, 8), (3, 2)])
def test_multiply_adds_of_upsampling(factor: int, kernel: int) -> None:
    """As many as a transposed convolution of the uncropped map, up to its rim."""
    up = DeconvUpsample(5, factor, kernel_size=kernel)
    full = nn.ConvTranspose2d(5, 5, kernel, factor, groups=5, bias=False)
    mine, its = (trace(net, (1, 5, 200, 200)).multiply_adds for net in (up, full))
    assert its == 5 * (200 * kernel) ** 2
    assert mine == pytest.approx(its, rel=0.02)


@pytest.mark.parametrize("name", ["unet", "fcn8s", "alexnet"])
def test_costs_add_up(name: str) -> None:
    found = anatomy(name, (524, 524), classes=5)
    assert found.parameters == sum(f.parameters for f in found.features)
    assert found.multiply_adds == sum(f.multiply_adds for f in found.features)
    with torch.device("meta"):
        if name in MODELS:
            made: nn.Module = MODELS[name](1 if name == "unet" else 3, 5)
        else:
            made = BACKBONES[name](5)
    assert found.parameters == sum(p.numel() for p in made.parameters())
    head, *rows = found.table(costs=True)
    assert head[-2:] == ("parameters", "multiply-adds")
    assert sum(int(row[-2].replace(",", "") or 0) for row in rows) == found.parameters
    assert [row[:-2] for row in found.table(costs=True) if row[:-2] in found.table()] == (
        found.table()
    )


def test_multiply_adds_by_hand() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped = nn.Conv2d(4, 6, (3, 5), stride=2, padding=1, groups=2)
            self.up = nn.ConvTranspose2d(6, 4, 4, stride=2, groups=2)
            self.mix = nn.Linear(4, 7)
            self.alone = nn.Conv2d(7, 7, 1)
            self.unused = nn.Linear(9, 9)

        def forward(self, x: Tensor) -> Tensor:
            h = F.avg_pool2d(torch.relu(self.up(self.grouped(x))), 2)
            h = self.mix(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return self.alone(self.alone(h)) + self.alone.weight.sum()

    net = Net()
    found = trace(net, (1, 4, 20, 31))
    shapes = {f.layer: f.shape for f in found.features}
    expected = {
        "grouped": prod(shapes["grouped"]) * 2 * 3 * 5,
        "up": prod(shapes["grouped"]) * 2 * 4 * 4,
        "mix": prod(shapes["mix"]) * 4,
        "alone": prod(shapes["alone"]) * 7,
    }
    assert found.multiply_adds == sum(expected.values()) + expected["alone"]  # it runs twice
    assert found.depth == 3
    used = [p for name, p in net.named_parameters() if not name.startswith("unused")]
    assert found.parameters == sum(p.numel() for p in used)  # each but once
    counted = [f.parameters for f in found.features if f.layer == "alone"]
    assert sorted(counted) == [0, 7 * 7 + 7]


def test_the_longest_way_counts() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(nn.Conv2d(2, 2, 1) for _ in range(4))
            self.up = nn.ConvTranspose2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            a, b, c, d = self.parts
            return d(self.up(c(b(x)) + a(x)))

    assert trace(Net(), (1, 2, 8, 8)).depth == 3


def test_sharing_and_meta_tensors() -> None:
    """Weights are no part of it, so there may be none; one that has two names counts once."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3, bias=False))
    net[1].weight = net[0].weight
    assert trace(net, (1, 2, 9, 9)).parameters == 2 * 2 * 9 + 2


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 k"),
        (86_037, "86.0 k"),
        (999_499, "999 k"),
        (999_500, "1.00 M"),
        (134_346_581, "134 M"),
        (15_470_264_320, "15.5 G"),
        (2_000_000_000_000, "2.00 T"),
    ],
)
def test_scaled(count: int, text: str) -> None:
    assert scaled(count) == text


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("lenet", {}, "model: expected one of unet, fcn32s"),
        ("fcn-vgg16", {"layout": "aligned"}, "fcn-vgg16: expected no layout"),
        ("fcn8s", {"backbone": "lenet"}, "fcn8s: backbone: expected one of"),
        ("unet", {"backbone": "vgg16"}, "unet: expected no backbone"),
        ("unpoolnet", {"layout": "aligned"}, "unpoolnet: expected no layout"),
        ("unet", {"size": (500, 572)}, "nearest: 492 and 508"),
        ("alexnet", {"size": (40, 40)}, "alexnet: the network"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        anatomy(name, **options)


def test_every_network_has_a_name() -> None:
    assert set(NETWORKS) == {*MODELS, *PAPER, *BACKBONES}
    assert len(set(NETWORKS)) == len(NETWORKS)


# The command


def test_command() -> None:
    pytest.importorskip("rich")
    testing = pytest.importorskip("typer.testing")
    from segfuse import cli

    def segfuse(*arguments: str) -> tuple[int, str]:
        result = testing.CliRunner().invoke(cli.application(), ["anatomy", *arguments])
        return result.exit_code, result.stdout or result.stderr

    code, out = segfuse("fcn16s", "--size", "160x131", "--backbone", "alexnet", "--classes", "3")
    assert code == 0
    head, *rows, first, second = out.splitlines()
    assert head.split() == [
        *("layer", "operation", "channels", "size", "stride", "receptive", "field", "rim"),
        *("parameters", "multiply-adds"),
    ]
    assert any(row.startswith("score32 ") for row in rows)
    assert first.startswith("8 conv layers, 57.0 M parameters, receptive field ")
    assert second.startswith("160 x 131 pixels to 160 x 131, margin ")
    assert "--layout" in segfuse("--help")[1]
    for size in ("0", "3x", "axb", "-4", "12x12x12"):
        code, out = segfuse("unet", f"--size={size}")
        assert code == 2
        assert "expected HxW like 500x375, or a number" in out
    assert segfuse("lenet") == (
        1,
        f"segfuse: model: expected one of {', '.join(NETWORKS)}, got 'lenet'\n",
    )
    found = geometry.of(MODELS["unet"](1, 2, base=2), (1, 1, 188, 188))
    assert f"{found.depth} conv layers" in summary(found)[0]
