"""Classifiers made fully convolutional: the same scores, maps of them, and what is refused."""

from __future__ import annotations

import importlib
import itertools
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from segfuse import geometry
from segfuse.models import convolutionalize
from segfuse.models.backbones import BACKBONES, SqueezeNet, backbone

DATA = Path(__file__).parents[2] / "shared/data"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def image(*size: int) -> Tensor:
    return torch.rand(*size, dtype=torch.float64)


def lively(net: nn.Module) -> nn.Module:
    """In float64, with statistics and weights of which none is 0 or 1."""
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.is_floating_point() and tensor.dim() == 1:
            nn.init.uniform_(tensor, 0.5, 1.5)
    return net.double().eval()


def assert_equals_windows(net: nn.Module, dense: nn.Module, n: tuple[int, int], x: Tensor) -> None:
    """Every cell of the map is the classifier's on its window."""
    found = dense(x)
    stride = [int(axis.scale) for axis in geometry.of(dense, (1, x.shape[1], *n)).output]
    rows, columns = found.shape[2:]
    assert rows * columns > 1
    for i, j in itertools.product(range(rows), range(columns)):
        top, left = i * stride[0], j * stride[1]
        window = x[:, :, top : top + n[0], left : left + n[1]]
        torch.testing.assert_close(found[:, :, i, j], net(window))


# The networks of the package


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones(name: str) -> None:
    net: Any = lively(BACKBONES[name](classes=5, width=1 / 32))
    dense = convolutionalize(net, net.native)
    x = image(2, 3, net.native, net.native)
    with torch.no_grad():
        torch.testing.assert_close(dense(x), net(x)[:, :, None, None])
        stride = 16 if isinstance(net, SqueezeNet) else 32
        larger = image(1, 3, net.native + stride, net.native + 3 * stride)
        assert dense(larger).shape == (1, 5, 2, 4)
    assert not [m for m in dense.modules() if isinstance(m, (nn.Linear, nn.Flatten))]
    assert not [m for m in dense.modules() if "Adaptive" in type(m).__name__]


def test_parameters_are_the_classifiers() -> None:
    net: Any = BACKBONES["vgg16_bn"](classes=5, width=1 / 32)
    net.features[1].eval()  # normalisation that is held fast
    before = {k: (str(m), m.training) for k, m in net.named_modules()}
    dense = convolutionalize(net, 224)
    assert {k: (str(m), m.training) for k, m in net.named_modules()} == before
    modes = {k: m.training for k, m in dense.named_modules()}
    assert modes == {k: before[k][1] for k in modes}
    assert dense.training
    assert not modes["features.1"]
    assert [k for k in dense.state_dict() if "scaling" not in k] == [*net.state_dict()]
    known = dict(net.named_parameters())
    for name, parameter in dense.named_parameters():
        if parameter is not known[name]:
            assert name.startswith("classifier.")
            assert parameter.data_ptr() == known[name].data_ptr()
    assert any(isinstance(m, nn.Dropout) for m in dense.modules())  # which training wants


@pytest.mark.parametrize("name", BACKBONES)
def test_torchvisions(name: str) -> None:
    try:
        models = importlib.import_module("torchvision.models")
    except Exception as error:  # noqa: BLE001 - of another torch it raises a RuntimeError
        pytest.skip(f"torchvision cannot be imported: {error}")
    options: dict[str, Any] = {}
    if name == "googlenet":  # in full: with auxiliary classifiers, and images transformed
        options = {"init_weights": False, "transform_input": True}
    net = models.get_model(name, weights=None, **options).eval()
    dense = convolutionalize(net, 224)
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(dense(x).flatten(1), net(x), rtol=1e-4, atol=1e-5)
        assert dense(torch.rand(1, 3, 288, 320)).shape[2:] == ((5, 7) if "sq" in name else (3, 4))


def test_map_over_a_photo() -> None:
    """The macaw's probability is high on the macaw, and low on what is not."""
    if not DATA.is_dir():
        pytest.skip("no shared/data")
    net = backbone("squeezenet1_0", weights=DATA / "squeezenet/squeezenet10.npz").eval()
    photo = np.array(Image.open(DATA / "photos/parrot.jpg").convert("RGB"))  # (929, 512, 3)
    pixels = torch.from_numpy(photo).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        macaw = convolutionalize(net, 227)(pixels).softmax(1)[0, 88]
    assert macaw.shape == (45, 19)
    assert macaw.max() > 0.99
    assert macaw[-8:, :4].max() < 0.1


# Networks of one's own


CHANNELS = 2


def random_network(chance: random.Random, n: tuple[int, int]) -> nn.Module:
    """Without padding: convolutions and poolings, then one of several ways to classify."""
    layers: list[nn.Module] = []
    channels, (h, w) = CHANNELS, n
    for _ in range(chance.randint(1, 5)):
        kernel = (chance.randint(1, 4), chance.randint(1, 4))
        stride, dilation = chance.randint(1, 2), chance.randint(1, 2)
        if min(h, w) < 8:
            break
        kind, out = chance.choice(["conv", "conv", "max", "avg"]), chance.randint(1, 4)
        if kind == "conv":
            layers += [nn.Conv2d(channels, out, kernel, stride, dilation=dilation), nn.Tanh()]
            layers += [nn.BatchNorm2d(out)] * chance.randint(0, 1)
            channels = out
        elif kind == "max":
            layers.append(nn.MaxPool2d(kernel, stride, dilation=dilation))
        else:
            layers.append(nn.AvgPool2d(kernel, stride))
        h, w = nn.Sequential(*layers)(torch.rand(2, CHANNELS, *n)).shape[2:]
    hidden = chance.randint(1, 5)
    flat = [nn.Flatten(), nn.Linear(channels * h * w, hidden), nn.BatchNorm1d(hidden)]
    flat += [nn.PReLU(hidden), nn.Dropout(), nn.Linear(hidden, 3)]
    heads = {
        "flat": flat,
        "identity": [nn.AdaptiveAvgPool2d((h, w)), *flat, nn.LogSoftmax(dim=-1)],
        "global": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)],
        "max": [nn.AdaptiveMaxPool2d(1), nn.Flatten(1), nn.Linear(channels, 3)],
        "score": [nn.Conv2d(channels, 3, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
    }
    return lively(nn.Sequential(*layers, *heads[chance.choice([*heads])]))


@pytest.mark.parametrize("seed", range(16))
def test_every_cell_is_the_classifier_on_its_window(seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311
    n = chance.randint(12, 20), chance.randint(12, 20)
    net = random_network(chance, n)
    x = image(2, CHANNELS, n[0] + chance.randint(8, 12), n[1] + chance.randint(0, 9))
    with torch.no_grad():
        assert_equals_windows(net, convolutionalize(net, (CHANNELS, *n)), n, x)


class Own(nn.Module):
    """Features, and a function of them that ends in scores."""

    def __init__(self, classify: Callable[[Any, Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.classify = classify
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.layers, self.features(x))


WAYS: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[nn.Module, ...]]] = {
    "view": (lambda m, x: m[0](x.view(x.size(0), -1)), (nn.Linear(50, 3),)),
    "reshape": (lambda m, x: m[0](x.reshape(-1, 50)), (nn.Linear(50, 3),)),
    "shape": (lambda m, x: m[0](x.view(x.shape[0], -1)), (nn.Linear(50, 3),)),
    "functions": (
        lambda m, x: F.log_softmax(m[1](F.relu(m[0](torch.flatten(x, start_dim=1)))), dim=1),
        (nn.Linear(50, 4), nn.Linear(4, 3)),
    ),
    "residual": (
        lambda m, x: m[1](y := m[0](x.flatten(1))) + torch.sigmoid(y) * 2,
        (nn.Linear(50, 3), nn.Linear(3, 3)),
    ),
    "mean": (lambda m, x: m[0](x.mean((2, 3))), (nn.Linear(2, 3),)),
    "mean, kept": (
        lambda m, x: m[0](x.mean(dim=[-2, -1], keepdim=True).squeeze(-1).squeeze(-1)),
        (nn.Linear(2, 3),),
    ),
    "pooled function": (
        lambda m, x: m[0](F.adaptive_avg_pool2d(x, (1, 1)).flatten(1)),
        (nn.Linear(2, 3),),
    ),
    "one pooling, twice": (
        lambda m, x: m[1](torch.cat([m[0](x).flatten(1), m[0](m[2](x)).flatten(1)], 1)),
        (nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3), nn.ReLU()),
    ),
    "joined": (
        lambda m, x: m[0](torch.cat([x.flatten(1), torch.tanh(x).flatten(1)], dim=1)),
        (nn.Linear(100, 3),),
    ),
    "there and back": (
        lambda m, x: m[0](m[1](x.flatten(1).view(-1, 2, 5, 5)).flatten(1)),
        (nn.Linear(18, 3), nn.Conv2d(2, 2, 3)),
    ),
    "unflattened scores": (
        lambda m, x: m[1](m[0](x.flatten(1)).unflatten(1, (4, 1, 1))).flatten(1),
        (nn.Linear(50, 4), nn.Conv2d(4, 3, 1)),
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_to_write_it(way: str) -> None:
    classify, layers = WAYS[way]
    net = lively(Own(classify, *layers))
    x = image(2, 1, 17, 15)
    with torch.no_grad():
        assert_equals_windows(net, convolutionalize(net, 12), (12, 12), x)


def test_adaptive_pooling_that_divides() -> None:
    layers = nn.AdaptiveAvgPool2d(5), nn.Flatten(), nn.Linear(50, 3)
    net = lively(Own(lambda m, x: m[2](m[1](m[0](x))), *layers))
    with torch.no_grad():
        dense = convolutionalize(net, 22)  # of maps of 10 x 10
        assert_equals_windows(net, dense, (22, 22), image(1, 1, 30, 26))


def test_gradients_and_modes() -> None:
    net = Own(lambda m, x: m[1](m[0](x.flatten(1))), nn.Linear(50, 3), nn.Dropout(0.5)).eval()
    dense = convolutionalize(net, 12)
    assert not dense.training
    dense(torch.rand(1, 1, 20, 20)).sum().backward()
    assert net.features[0].weight.grad is not None
    torch.manual_seed(0)
    x = torch.rand(1, 1, 12, 12)
    assert not torch.equal(dense.train()(x), dense(x))
    assert not net.training


def test_on_shapes_alone() -> None:
    with torch.device("meta"):
        net = BACKBONES["vgg16"]()
    dense = convolutionalize(net, 224)
    assert dense(torch.empty(1, 3, 500, 500, device="meta")).shape == (1, 1000, 9, 9)


# What is refused


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, 4, 3)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.features(x).flatten(2).transpose(1, 2)
        return self.head(self.attention(tokens, tokens, tokens)[0].mean(1))


class Excited(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, 2, 3)
        self.pool, self.score = nn.AdaptiveAvgPool2d(1), nn.Conv2d(2, 2, 1)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = x * torch.sigmoid(self.score(self.pool(x)))
        return self.head(self.pool(x).flatten(1))


class Choosing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = -x
        return self.head(x.flatten(1))


class Hidden(nn.Module):
    """Does something that torch.fx does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(144, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x.flatten(1))
        return 2 * y if type(x) is Tensor else y


def own(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), *layers)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (own(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(18, 3)), "2 (AdaptiveAvgPool2d): "),
        (own(nn.GroupNorm(2, 2), nn.Flatten(), nn.Linear(50, 3)), "2 (group_norm): "),
        (own(nn.InstanceNorm2d(2), nn.Flatten(), nn.Linear(50, 3)), "2 (instance_norm): "),
        (own(nn.Softmax2d(), nn.Flatten(2), nn.Linear(25, 3)), "expected scores (N, classes) of"),
        (own(nn.Flatten(2), nn.Linear(25, 3), nn.Flatten()), "2 (Flatten): makes (2, 2, 25) of "),
        (own(nn.Flatten(), nn.BatchNorm1d(50), nn.Linear(50, 3)), "all 5x5 places of the map al"),
        (own(nn.Flatten(), nn.LayerNorm(50), nn.Linear(50, 3)), "3 (LayerNorm): is given what"),
        (own(nn.Flatten(), nn.Linear(50, 6), nn.LayerNorm(6), nn.Linear(6, 3)), "4 (LayerNorm)"),
        (own(nn.Flatten(), nn.Softmax(1), nn.Linear(50, 3)), "all 5x5 places of the map alike"),
        (own(nn.Flatten()), "expected scores of a fully connected layer, or pooled over space"),
        (own(), "expected scores (N, classes) of it, got (1, 2, 5, 5)"),
        (own(nn.Flatten(), nn.Linear(9, 3)), "does not run on (1, 12, 12): "),
        (
            Own(
                lambda m, x: m[1](F.batch_norm(m[0](x.flatten(1)), None, None, training=True)),
                *(nn.Linear(50, 4), nn.Linear(4, 3)),
            ),
            "does not run on (1, 12, 12): Expected more than 1 value",
        ),
        (Own(lambda m, x: m[0](x.view(1, -1)), nn.Linear(50, 3)), "does not run on several im"),
        (
            Own(lambda m, x: m[0](x.permute(0, 2, 3, 1).flatten(1)), nn.Linear(50, 3)),
            "layers.0 (conv2d): treats a spatial axis as channels",
        ),
        (
            Own(lambda m, x: F.linear(x.flatten(1), m[0].weight), nn.Linear(50, 3)),
            "linear: expected torch.nn.Linear in place of the function",
        ),
        (
            Own(lambda m, x: m[0](x.flatten(1) * m[1].weight), nn.Linear(50, 3), nn.Linear(50, 1)),
            "mul: joins what was flattened with what is not like it",
        ),
        (Attention(), "flatten: makes (2, 4, 100) of (2, 4, 10, 10), expected (2, 400)"),
        (
            Own(
                lambda m, x: m[1](m[0](x)[0].flatten(1)),
                *(nn.AdaptiveMaxPool2d(1, return_indices=True), nn.Linear(2, 3)),
            ),
            "layers.0 (AdaptiveMaxPool2d): gives positions too",
        ),
        (Excited(), "spreads one element over the map"),
        (Choosing(), "cannot be read by torch.fx: symbolically traced variables cannot be used"),
        (Hidden(), "does other things than torch.fx can read: scores differ by "),
    ],
    ids=lambda value: re.sub(r"\W+", " ", value)[:30] if isinstance(value, str) else "",
)
def test_refuses(net: nn.Module, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        convolutionalize(net.eval(), (1, 12, 12))
    assert str(caught.value).startswith("convolutionalize: classifier: ")


def test_refuses_arguments() -> None:
    with pytest.raises(TypeError, match=r"classifier: expected a torch.nn.Module, got int"):
        convolutionalize(3, 12)  # type: ignore[arg-type]
    for size in ((1, 2, 3, 4), 0, (12, -1)):
        with pytest.raises(ValueError, match=r"input_size: expected pixels a side, .H, W. or"):
            convolutionalize(nn.Flatten(), size)
