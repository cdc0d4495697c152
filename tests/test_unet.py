"""U-Net: the published numbers, the size arithmetic, and equality with plain PyTorch."""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfuse.models import UNet
from segfuse.nn import upsampling
from segfuse.ops import upconv_concat

Padding = Literal["valid", "same"]
Up = Literal["deconv", "bilinear", "unpool"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Every (skip, joined) of a forward pass, deepest first."""
    seen: list[tuple[Tensor, Tensor]] = []

    def spy(skip: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        seen.append((skip, upconv_concat(skip, x, weight, bias)))
        return seen[-1][1]

    monkeypatch.setattr(upsampling, "upconv_concat", spy)
    return seen


def meta(*args: Any, **options: Any) -> UNet:
    with torch.device("meta"):
        return UNet(*args, **options)


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


# As published


def test_parameters_of_the_paper() -> None:
    net = meta(1, 2)
    assert count(net) == 31_030_658
    convolutions = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))]
    assert len(convolutions) == 23


def test_parameters_of_the_2015_release() -> None:
    # Its last up-convolution keeps 128 channels, so that the block above it takes 64 + 128.
    net = meta(1, 2)
    last, first = net.upsample[0], net.get_submodule("merge.0.conv1")
    released = nn.ConvTranspose2d(128, 128, 2, 2), nn.Conv2d(192, 64, 3)
    assert count(net) - count(last) - count(first) + sum(map(count, released)) == 31_100_354


def test_sizes_and_crops_of_the_paper(joins: list[tuple[Tensor, Tensor]]) -> None:
    net = UNet(1, 2, base=1).eval()
    with torch.no_grad():
        assert net(torch.randn(1, 1, 572, 572)).shape == (1, 2, 388, 388)
    assert [joined.shape[2] for _, joined in joins] == [56, 104, 200, 392]
    assert [skip.shape[2] for skip, _ in joins] == [64, 136, 280, 568]
    crops = [(skip.shape[2] - joined.shape[2]) / 2 for skip, joined in joins]
    assert crops == [4, 16, 40, 88]
    assert net.output_size(572) == 388
    assert (net.margin, net.stride, net.min_size) == (92, 16, 188)


def test_smallest_size_of_the_paper() -> None:
    net = UNet(1, 2, base=1).eval()
    with torch.no_grad():
        assert net(torch.randn(1, 1, 188, 204)).shape == (1, 2, 4, 20)


def test_names_of_the_parameters() -> None:
    assert list(meta(1, 2, depth=1).state_dict()) == [
        *("down.0.conv1.weight", "down.0.conv1.bias", "down.0.conv2.weight", "down.0.conv2.bias"),
        *("bottom.conv1.weight", "bottom.conv1.bias", "bottom.conv2.weight", "bottom.conv2.bias"),
        *("upsample.0.weight", "upsample.0.bias"),
        *("merge.0.conv1.weight", "merge.0.conv1.bias"),
        *("merge.0.conv2.weight", "merge.0.conv2.bias"),
        *("head.weight", "head.bias"),
    ]
    normed = [name for name in meta(1, 2, depth=1, norm="batch").state_dict() if "down" in name]
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert normed == [
        *("down.0.conv1.weight", *(f"down.0.norm1.{n}" for n in norm)),
        *("down.0.conv2.weight", *(f"down.0.norm2.{n}" for n in norm)),
    ]


# Weights


@pytest.mark.parametrize(
    ("options", "taps"),
    [
        ({}, {"conv1": 9, "conv2": 9, "upsample": 1, "head": 1}),
        ({"up": "bilinear"}, {"conv1": 9, "conv2": 9, "upsample": 1, "head": 1}),
        ({"dims": 1}, {"conv1": 3, "conv2": 3, "upsample": 1, "head": 1}),
        ({"dims": 3}, {"conv1": 27, "conv2": 27, "upsample": 1, "head": 1}),
    ],
)
def test_initial_weights(options: dict[str, Any], taps: dict[str, int]) -> None:
    base, in_channels = 16, 4
    net = UNet(in_channels, 8, base=base, depth=2, **options)
    for name, value in net.named_parameters():
        if name.endswith("bias"):
            assert not value.any(), name
            continue
        place, level, *rest = name.split(".")
        width = base * 2 ** (int(level) if level.isdigit() else 2 if place == "bottom" else 0)
        layer = next(part for part in (place, level, *rest) if part in taps)
        inputs = {"conv1": width // 2, "conv2": width, "upsample": 2 * width, "head": base}[layer]
        if name == "down.0.conv1.weight":
            inputs = in_channels
        elif place == "merge" and layer == "conv1":
            inputs = 2 * width
        std, n = math.sqrt(2 / (taps[layer] * inputs)), value.numel()
        assert abs(value.mean().item()) < 5 * std / math.sqrt(n), name
        assert abs(value.std().item() / std - 1) < 5 / math.sqrt(2 * n), name


def test_weights_are_drawn_anew() -> None:
    net = UNet(1, 2, base=2, depth=1, norm="batch")
    torch.manual_seed(7)
    net.reset_parameters()
    first = {name: value.clone() for name, value in net.state_dict().items()}
    net(torch.randn(2, 1, 20, 20))
    with torch.no_grad():
        for value in net.parameters():
            value.add_(1)
    torch.manual_seed(7)
    net.reset_parameters()
    for name, value in net.state_dict().items():
        assert torch.equal(value, first[name]), name


# Dropout


def test_dropout_ends_the_contracting_path(joins: list[tuple[Tensor, Tensor]]) -> None:
    net = UNet(1, 2, base=8, depth=2)
    dropouts = {name: m for name, m in net.named_modules() if isinstance(m, nn.Dropout)}
    assert list(dropouts) == ["down.1.dropout", "bottom.dropout"]
    assert all(m.p == 0.5 for m in dropouts.values())
    for name in ("down.1", "bottom"):
        assert [part for part, _ in net.get_submodule(name).named_children()][-1] == "dropout"

    given: dict[str, Tensor] = {}
    taken: dict[str, Tensor] = {}
    for name, module in dropouts.items():
        module.register_forward_hook(lambda _, __, y, name=name: given.update({name: y}))
    pooled: list[Tensor] = []
    net.pool.register_forward_pre_hook(lambda _, x: pooled.append(x[0]))
    net.upsample[1].register_forward_pre_hook(lambda _, x: taken.update({"upsample.1": x[0]}))
    net(torch.randn(1, 1, 60, 60))
    assert given["down.1.dropout"] is pooled[1]
    assert given["down.1.dropout"] is joins[0][0]
    assert given["bottom.dropout"] is taken["upsample.1"]


def test_dropout_drops_elements_and_only_in_training() -> None:
    net = UNet(1, 2, base=8, depth=1, dropout=0.25)
    x = torch.ones(1, 8, 50, 50)
    dropped = net.down[0].get_submodule("dropout")(x).eq(0).double().mean(dim=(0, 2, 3))
    assert (dropped - 0.25).abs().max() < 0.05  # in every channel alike
    x = torch.randn(1, 1, 28, 28)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))
    without = UNet(1, 2, base=8, depth=1, dropout=0)
    without.load_state_dict(net.state_dict())
    assert torch.equal(without(x), net(x))


# Sizes


def walk(size: int, depth: int, *, padding: str) -> int | None:
    """The output size by going through the layers one by one; None if a layer cannot go on."""
    loss = {"valid": 2, "same": 0}[padding]
    layers = "ccp" * depth + "cc" + "ucc" * depth
    for layer in layers:
        if layer == "c":
            size -= loss
        elif layer == "u":
            size *= 2
        elif size % 2:
            return None
        else:
            size //= 2
        if size < 1:
            return None
    return size


def test_the_sizes_that_fit_the_paper() -> None:
    net = meta(1, 2)
    assert [s for s in range(-20, 1000) if net.fits(s)] == [16 * k + 60 for k in range(8, 59)]


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_size_helpers_agree_with_the_layers(depth: int, padding: Padding) -> None:
    net = meta(1, 2, base=1, depth=depth, padding=padding)
    sizes = range(1200)
    outputs = [walk(size, depth, padding=padding) for size in sizes]
    fitting = [size for size in sizes if outputs[size] is not None]
    assert [size for size in sizes if net.fits(size)] == fitting
    assert net.min_size == fitting[0]
    assert {b - a for a, b in itertools.pairwise(fitting)} == {net.stride}
    for size in range(fitting[-1]):
        smaller, larger = net.nearest_sizes(size)
        assert smaller == max((s for s in fitting if s <= size), default=None)
        assert larger == min(s for s in fitting if s >= size)
        if outputs[size] is None:
            with pytest.raises(ValueError, match=rf"got {size} \(nearest: .*\b{larger}\)"):
                net.output_size(size)
        else:
            assert net.output_size(size) == outputs[size] == size - 2 * net.margin


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("depth", [1, 2])
def test_forward_takes_the_sizes_that_fit_and_no_other(depth: int, padding: Padding) -> None:
    net = UNet(1, 3, base=1, depth=depth, padding=padding, dims=1).eval()
    for size in range(80):
        x = torch.randn(1, 1, size)
        if net.fits(size):
            assert net(x).shape == (1, 3, net.output_size(size))
        else:
            with pytest.raises(ValueError, match=rf"axis 2: {size} \(nearest: "):
                net(x)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [
        ((187, 572), r"axis 2: 187 \(nearest: 188\)$"),
        ((572, 189), r"axis 3: 189 \(nearest: 188 and 204\)$"),
        (
            (570, 573),
            r"axis 2: 570 \(nearest: 556 and 572\); axis 3: 573 \(nearest: 572 and 588\)$",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_told_the_nearest(size: tuple[int, int], nearest: str) -> None:
    x = torch.zeros(1, 1, *size, device="meta")
    with pytest.raises(
        ValueError, match=r"^UNet: expected a size out of 188, 204, 220, .*" + nearest
    ):
        meta(1, 2)(x)


def test_sizes_for_same_padding_are_multiples() -> None:
    net = meta(1, 2, padding="same")
    assert (net.margin, net.stride, net.min_size) == (0, 16, 16)
    with pytest.raises(ValueError, match=r"16, 32, 48, .* got 100 \(nearest: 96 and 112\)$"):
        net.output_size(100)


# Arguments


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *[
            (name, value, "an integer >= 1")
            for name in ("in_channels", "classes", "base", "depth")
            for value in (0, -1, 1.0, True, "1", None)
        ],
        *[("padding", value, "'valid' or 'same'") for value in ("reflect", 1, None)],
        *[("norm", value, "None or 'batch'") for value in ("instance", True)],
        *[
            ("dropout", value, r"a number in \[0, 1\)")
            for value in (1.0, -0.1, math.nan, "0.5", None, False)
        ],
        *[("up", value, "'deconv', 'bilinear' or 'unpool'") for value in ("nearest", None)],
        *[("dims", value, "1, 2 or 3") for value in (0, 4, 2.0, True, "2", None)],
    ],
)
def test_bad_arguments(name: str, value: object, expected: str) -> None:
    arguments: dict[str, Any] = {"in_channels": 1, "classes": 2, name: value}
    with pytest.raises(ValueError, match=f"^UNet: expected {name} to be {expected}, got "):
        UNet(**arguments)


def test_unpooling_wants_same_padding() -> None:
    with pytest.raises(ValueError, match=r"padding to be 'same' with up='unpool'.* got 'valid'"):
        UNet(1, 2, up="unpool")


@pytest.mark.parametrize(
    ("dims", "shape", "expected"),
    [
        (2, (1, 188, 188), r"\(N, 3, H, W\), got \(1, 188, 188\)"),
        (2, (1, 3, 1, 188, 188), r"\(N, 3, H, W\), got \(1, 3, 1, 188, 188\)"),
        (2, (1, 1, 188, 188), r"\(N, 3, H, W\), got \(1, 1, 188, 188\)"),
        (1, (3, 188), r"\(N, 3, W\), got \(3, 188\)"),
        (3, (1, 3, 188, 188), r"\(N, 3, D, H, W\), got \(1, 3, 188, 188\)"),
    ],
)
def test_bad_inputs(dims: Literal[1, 2, 3], shape: tuple[int, ...], expected: str) -> None:
    with pytest.raises(ValueError, match=f"^UNet: expected x of shape {expected}$"):
        meta(3, 2, base=1, dims=dims)(torch.zeros(shape, device="meta"))


# Every variant


def variants() -> list[dict[str, Any]]:
    found = []
    for dims, depth, norm, padding, up in itertools.product(
        (1, 2, 3), (1, 2), (None, "batch"), ("valid", "same"), ("deconv", "bilinear", "unpool")
    ):
        if (padding, up) != ("valid", "unpool"):
            found.append({"dims": dims, "depth": depth, "norm": norm, "padding": padding, "up": up})
    return found


def name_of(options: dict[str, Any]) -> str:
    return "-".join(str(value) for value in options.values())


def sample(net: UNet, *, batch: int = 2) -> Tensor:
    """Random images of the smallest sizes; the last axis one stride longer."""
    sizes = [net.min_size] * (net.dims - 1) + [net.min_size + net.stride]
    return torch.randn(batch, net.in_channels, *sizes, dtype=next(net.parameters()).dtype)


@pytest.mark.parametrize("options", variants(), ids=name_of)
def test_variants_run_and_learn(options: dict[str, Any]) -> None:
    net = UNet(2, 3, base=4, **options)
    x = sample(net).requires_grad_()
    logits = net(x)
    assert logits.shape == (2, 3, *(net.output_size(size) for size in x.shape[2:]))
    logits.square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
        assert parameter.grad.isfinite().all(), name
    assert x.grad is not None
    assert x.grad.any()


def plain(net: UNet, x: Tensor) -> Tensor:
    """Compute the same in evaluation mode with nothing but torch's functions."""
    state = net.state_dict()
    d = net.dims
    conv: Any = (F.conv1d, F.conv2d, F.conv3d)[d - 1]
    deconv: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[d - 1]
    pool: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[d - 1]

    def block(x: Tensor, name: str) -> Tensor:
        for i in "12":
            if net.padding == "same":
                x = F.pad(x, [1, 1] * d)
            x = conv(x, state[f"{name}.conv{i}.weight"], state.get(f"{name}.conv{i}.bias"))
            if net.norm == "batch":
                mean, var, weight, bias = (
                    state[f"{name}.norm{i}.{part}"].view(-1, *[1] * d)
                    for part in ("running_mean", "running_var", "weight", "bias")
                )
                x = (x - mean) / (var + 1e-5).sqrt() * weight + bias
            x = x.clamp(min=0)
        return x

    levels, places = [], []
    for level in range(net.depth):
        x = block(x, f"down.{level}")
        levels.append(x)
        x, place = pool(x, 2, return_indices=True)
        places.append(place)
    x = block(x, "bottom")
    for level in range(net.depth - 1, -1, -1):
        weight, bias = state[f"upsample.{level}.weight"], state[f"upsample.{level}.bias"]
        skip = levels[level]
        if net.up == "deconv":
            x = deconv(x, weight, bias, stride=2)
        elif net.up == "bilinear":  # in the order of the description: interpolate, then convolve
            mode = ("linear", "bilinear", "trilinear")[d - 1]
            x = conv(F.interpolate(x, scale_factor=2, mode=mode), weight, bias)
        else:
            x = conv(x, weight, bias)
            flat = x.new_zeros(skip.shape).flatten(2)
            x = flat.scatter(2, places[level].flatten(2), x.flatten(2)).view(skip.shape)
        for axis in range(2, 2 + d):
            rest = skip.shape[axis] - x.shape[axis]
            index = torch.arange(rest // 2, rest // 2 + x.shape[axis])
            skip = skip.index_select(axis, index)
        x = block(torch.cat([skip, x], 1), f"merge.{level}")
    return conv(x, state["head.weight"], state["head.bias"])  # type: ignore[no-any-return]


def trained(net: UNet) -> UNet:
    """`net` in float64 and evaluation mode, with biases and statistics that are not trivial."""
    with torch.no_grad():
        for name, value in net.double().state_dict().items():
            if name.endswith("bias") or "mean" in name:
                value.normal_(std=0.1)
            elif "norm" in name and value.is_floating_point():
                value.uniform_(0.5, 1.5)
    return net.eval()


@pytest.mark.parametrize("options", variants(), ids=name_of)
@torch.no_grad()
def test_variants_equal_plain_torch(options: dict[str, Any]) -> None:
    net = trained(UNet(2, 3, base=2, **options))
    x = sample(net, batch=1)
    torch.testing.assert_close(net(x), plain(net, x), rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_published_depth_equals_plain_torch() -> None:
    net = trained(UNet(1, 2, base=4))
    x = sample(net, batch=1)
    torch.testing.assert_close(net(x), plain(net, x), rtol=0, atol=1e-12)


# Properties


@torch.no_grad()
def test_shift_by_the_stride_shifts_the_output() -> None:
    net = trained(UNet(1, 2, base=2))
    x = torch.randn(1, 1, 236, 236, dtype=torch.float64)
    whole = net(x)  # 52 pixels an axis
    for dy, dx in [(16, 0), (0, 16), (16, 32)]:
        part = net(x[..., dy:, dx:])
        torch.testing.assert_close(part, whole[..., dy:, dx:], rtol=0, atol=1e-12)
    # Shifts between leave the grid of the poolings: the output is another one.
    part = net(x[..., 8:-8, :])
    assert (part - whole[..., 8:-8, :]).abs().max() > 1e-3


@pytest.mark.parametrize("up", ["deconv", "bilinear", "unpool"])
@torch.no_grad()
def test_channels_last(up: Up) -> None:
    net = trained(UNet(3, 2, base=4, depth=2, padding="same", up=up))
    x = sample(net)
    y = net(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, plain(net, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("up", ["deconv", "bilinear", "unpool"])
def test_autocast(up: Up) -> None:
    net = UNet(1, 2, base=4, depth=2, padding="same", up=up, dropout=0)
    x = sample(net)
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(x)
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())
    if up != "unpool":  # there rounding moves maxima
        torch.testing.assert_close(logits.float(), net(x), rtol=0.1, atol=0.2)


@pytest.mark.parametrize(
    ("up", "dynamic"),
    [("deconv", False), ("deconv", True), ("bilinear", False), ("unpool", False)],
)
def test_compile_makes_one_graph(up: Up, *, dynamic: bool) -> None:
    torch.compiler.reset()
    net = UNet(1, 2, base=2, depth=1, padding="same", up=up, dropout=0)
    compiled = torch.compile(net, fullgraph=True, backend="eager", dynamic=dynamic)
    for size in ((8, 8), (12, 14)):
        x = torch.randn(1, 1, *size)
        torch.testing.assert_close(compiled(x), net(x))


def test_compile_of_valid_padding() -> None:
    torch.compiler.reset()
    net = UNet(1, 2, base=2, depth=2, dropout=0)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    x = sample(net)
    torch.testing.assert_close(compiled(x), net(x))
