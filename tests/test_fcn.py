"""FCN and the decoder with unpooling: crops, sizes, stages, and tiles equal to the whole image."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import segfuse
from segfuse import geometry, models
from segfuse.geometry import Axis
from segfuse.geometry.layers import ALEXNET, VGG16, Conv, chain
from segfuse.models import FCN, UnpoolNet
from segfuse.models.backbones import BACKBONES, Backbone, Scaling
from segfuse.models.fcn import align
from segfuse.nn import DeconvUpsample, depthwise_weight, max_pool, max_unpool
from segfuse.ops import bilinear_kernel, deconv_upsample
from segfuse.tiling.plan import Wish, exact

STRIDES = (32, 16, 8)
LAYOUTS = ("published", "aligned")
WIDTHS = {"vgg16": 1 / 32, "alexnet": 1 / 32, "squeezenet1_0": 1 / 16, "googlenet": 1 / 16}
SLOW = ("googlenet", "aligned")  # and like SqueezeNet's


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _encoders_are_read_once() -> Iterator[None]:
    """Of encoders of the same layers, to the last padding: to read one takes longest of all."""
    known: dict[str, dict[int, Axis]] = {}
    read = models.fcn._axes

    def reading(encoder: nn.Module) -> dict[int, Axis]:
        if str(encoder) not in known:
            known[str(encoder)] = read(encoder)
        return known[str(encoder)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.fcn, "_axes", reading)
        yield


def backbone(name: str = "vgg16") -> Backbone:
    return BACKBONES[name](1, width=WIDTHS[name])


def fcn(name: str = "vgg16", classes: int = 3, *, trained: bool = False, **options: Any) -> FCN:
    net = FCN(backbone(name), classes, **options).eval()
    return randomised(net) if trained else net


def randomised(net: nn.Module) -> Any:
    """With weights such as training could lead to: none are zero, none are symmetric."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.startswith(("score", "up")):
                p.add_(0.3 * torch.randn_like(p))
    return net


# Crops


@pytest.mark.parametrize(
    ("stride", "crops"),
    [
        (32, {"up": 19}),
        (16, {"score16": 5, "up": 27}),
        (8, {"score16": 5, "score8": 9, "up": 31}),
    ],
)
def test_crops_of_the_release(stride: Any, crops: dict[str, int]) -> None:
    net = fcn(stride=stride)
    assert net.crops == crops
    filters = {name: m.kernel_size for name, m in net.named_modules() if name.startswith("up")}
    assert filters == {"up": 2 * stride} | {f"up{s}": 4 for s in (16, 8) if s >= stride}


def test_crops_of_the_released_alexnet() -> None:
    assert fcn("alexnet", stride=32).crops == {"up": 18}  # torchvision's windows add up to Caffe's
    axes = chain(ALEXNET | {"conv1": Conv(11, 4, padding=100)}, 500)
    kernel, full = align(axes["fc7"], axes["data"], 32)
    assert (kernel, full.offset(axes["data"])) == (63, 18)
    axes = chain(VGG16 | {"conv1_1": Conv(3, padding=100)}, 500)
    kernel, full = align(axes["fc7"], axes["data"], 32)
    assert (kernel, full.offset(axes["data"])) == (64, 19)


@given(st.integers(1, 16), st.integers(-40, 40), st.integers(-40, 40))
def test_alignment(factor: int, coarse: int, fine: int) -> None:
    """On a grid of half elements every shift can be met by one of two filters."""
    unit = Fraction(1, 2)
    target = Axis(0, 9, shift=fine * unit)
    source = Axis(0, 9, scale=Fraction(factor), shift=coarse * unit)
    kernel, full = align(source, target, factor)
    assert kernel in {2 * factor, 2 * factor - 1}
    assert full.scale == 1
    assert full.offset(target).denominator == 1
    assert full.position(Fraction(kernel - 1, 2)) == source.position(0)
    with pytest.raises(ValueError, match="whole elements or halves"):
        align(source, Axis(0, 9, shift=Fraction(1, 3)), factor)


@pytest.mark.parametrize(
    ("name", "layout", "upsample"),
    [
        ("vgg16", "published", "learned"),
        ("vgg16", "aligned", "bilinear"),
        ("alexnet", "published", "bilinear"),
        ("alexnet", "aligned", "learned"),
        ("squeezenet1_0", "aligned", "fixed"),
    ],
)
def test_maps_of_positions_give_each_pixel_its_own(name: str, layout: Any, upsample: Any) -> None:
    """Scores that are their elements' coordinates, summed over strides, are those of the pixels."""
    net = fcn(name, 2, stride=8, layout=layout, upsample=upsample)
    stages = dict(
        zip((8, 16, 32), (net.encoder.to8, net.encoder.to16, net.encoder.head), strict=True)
    )

    def places(axis: Axis) -> Any:
        def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            y, x = (
                float(axis.shift) + float(axis.scale) * torch.arange(n, dtype=torch.float64)
                for n in out.shape[2:]
            )
            made = torch.zeros_like(out)
            made[:, 0], made[:, 1] = y[:, None], x
            return made

        return hook

    for stride, stage in stages.items():
        stage.register_forward_hook(places(net._axes[stride]))
        score = net.get_submodule(f"score{stride}")
        with torch.no_grad():
            score.weight[:, :2, 0, 0] = torch.eye(2)
    found = net.double()(torch.zeros(1, 3, 131, 157, dtype=torch.float64))[0] / len(STRIDES)
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in (131, 157))
    inner = (slice(64, -64), slice(64, -64))  # the rim of an aligned map has no neighbour outside
    assert torch.allclose(found[0][inner], rows[:, None].expand(131, 157)[inner], atol=1e-9)
    assert torch.allclose(found[1][inner], columns.expand(131, 157)[inner], atol=1e-9)


def test_written_out_as_released() -> None:
    """FCN-8s with its offsets typed in, dense filters and all."""
    net = fcn(classes=4, stride=8, trained=True).double()
    images = torch.rand(1, 3, 61, 83, dtype=torch.float64)

    def deconvolve(x: Tensor, weight: Tensor, stride: int) -> Tensor:
        dense = torch.diag_embed(weight.movedim(0, -1), dim1=0, dim2=1)
        return F.conv_transpose2d(x, dense, stride=stride)

    with torch.no_grad():
        pool3, pool4, fc7 = net.encoder(net.scaling(images))
        up = deconvolve(net.score32(fc7), net.up16.weight, 2)
        h, w = up.shape[2:]
        up = deconvolve(up + net.score16(pool4)[:, :, 5 : 5 + h, 5 : 5 + w], net.up8.weight, 2)
        h, w = up.shape[2:]
        up = up + net.score8(pool3)[:, :, 9 : 9 + h, 9 : 9 + w]
        up = deconvolve(up, bilinear_kernel(8).double().expand(4, -1, -1), 8)
        assert torch.allclose(net(images), up[:, :, 31:92, 31:114], rtol=0, atol=1e-12)


# Sizes


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name in WIDTHS for layout in LAYOUTS if (name, layout) != SLOW],
)
def test_the_output_has_the_images_size(name: str, layout: Any, monkeypatch: Any) -> None:
    nets = [fcn(name, layout=layout)]
    nets += [FCN.from_coarser(nets[0], stride=8)]
    nets += [fcn(name, layout=layout, upsample="bilinear", stride=8)] * (name == "vgg16")
    # Nothing but the held rim is padded: the coarse map covers the image.
    monkeypatch.setattr("segfuse.models.fcn.F.pad", _only_rims)
    step = {"alexnet": 1, "googlenet": 12}.get(name, 5)
    residues = [(n, (7 * n) % 71 + 1) for n in range(1, 34, step)]
    for net in nets:
        for h, w in residues:
            assert net(torch.zeros(1, 3, h, w)).shape == (1, 3, h, w)


def _only_rims(x: Tensor, pad: Any, mode: str = "constant", value: Any = None) -> Tensor:
    assert mode == "constant" or tuple(pad) == (1, 1, 1, 1)
    assert mode == "replicate" or len(set(pad)) > 1, "only AlexNet's 6x6 pads by 2 and 3"
    return torch._C._nn.pad(x, pad, mode, value)


@pytest.mark.parametrize("upsample", ["learned", "bilinear"])
def test_a_map_that_ends_early_is_continued(upsample: Any) -> None:
    """An encoder of windows that do not pad leaves pixels behind its last element."""
    net = fcn("alexnet", 2, layout="aligned", upsample=upsample, trained=True).double()
    images = torch.rand(1, 3, 250, 230, dtype=torch.float64)
    whole = net(images)
    net.encoder.to32.register_forward_hook(lambda module, args, out: out[:, :, :-3, :-4])
    short = net(images)
    assert short.shape == whole.shape
    assert torch.isfinite(short).all()
    if upsample == "bilinear":  # the last element goes on, sideways
        for d in (2, 3):
            assert short.narrow(d, -60 + short.shape[d], 60).diff(dim=d).abs().max() < 1e-12
    else:
        assert not short[..., -60:, :].any()
        assert not short[..., :, -60:].any()
        assert short[..., :32, :32].any()


# Upsampling


@pytest.mark.parametrize("stride", STRIDES)
def test_bilinear_is_what_torch_interpolates(stride: Any) -> None:
    """Where the layers' windows are even and the grid fits, to the border."""
    net = fcn(stride=stride, layout="aligned", upsample="bilinear", trained=True).double()
    images = torch.rand(2, 3, 96, 64, dtype=torch.float64)
    at8, at16, head = net.encoder(net.scaling(images))

    def enlarged(x: Tensor, factor: int) -> Tensor:
        return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)

    expected = net.score32(head)
    for finer, features in ((16, at16), (8, at8)):
        if finer >= stride:
            expected = enlarged(expected, 2) + net.get_submodule(f"score{finer}")(features)
    assert torch.allclose(net(images), enlarged(expected, stride), rtol=0, atol=1e-12)


def test_what_is_learned() -> None:
    names = {
        upsample: {n for n, _ in fcn(stride=8, upsample=upsample).named_parameters() if "up" in n}
        for upsample in ("learned", "fixed", "bilinear")
    }
    assert names == {"learned": {"up16.weight", "up8.weight"}, "fixed": set(), "bilinear": set()}
    learned = fcn("vgg16", stride=8, upsample="learned")
    assert torch.equal(learned.up8.weight, bilinear_kernel(2).expand(3, -1, -1))
    fixed = fcn(stride=8, upsample="fixed")
    fixed.load_state_dict(learned.state_dict(), strict=False)
    images = torch.rand(1, 3, 40, 50)
    randomised(learned.score32), randomised(fixed.score32)
    for net in (learned, fixed):
        nn.init.ones_(net.score32.weight)
    assert torch.allclose(learned(images), fixed(images), atol=1e-6)


@pytest.mark.parametrize("stride", STRIDES)
def test_scores_are_zero_until_something_is_learned(stride: Any) -> None:
    net = fcn(stride=stride).train()
    scores = net(torch.rand(1, 3, 45, 70))
    assert not scores.any()
    (scores * torch.randn_like(scores)).sum().backward()
    assert net.score32.weight.grad is not None
    assert net.score32.weight.grad.any()


def test_every_parameter_has_a_gradient() -> None:
    net = randomised(FCN(BACKBONES["alexnet"](1, width=1 / 8), 3, stride=8)).eval()
    scores = net(torch.rand(1, 3, 45, 70))
    (scores * torch.randn_like(scores)).sum().backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any(), name


def test_all_at_once() -> None:
    """The published factors, and nothing else."""
    net = fcn(stride=8, trained=True, at_once=True).double()
    same = fcn(stride=8).double()
    same.load_state_dict(net.state_dict())
    with torch.no_grad():
        same.score16.weight.mul_(0.01)
        same.score8.weight.mul_(0.0001)
    images = torch.rand(1, 3, 33, 47, dtype=torch.float64)
    assert torch.allclose(net(images), same(images), rtol=0, atol=1e-12)


# Stages


def test_a_finer_net_starts_as_the_coarser() -> None:
    coarse = fcn("alexnet", layout="aligned", trained=True, upsample="fixed").double()
    before = deepcopy(coarse.state_dict())
    images = torch.rand(1, 3, 150, 120, dtype=torch.float64)
    for stride in (16, 8):
        fine = FCN.from_coarser(coarse, stride=stride)
        assert (fine.stride, coarse.stride) == (stride, 32)
        assert (
            fine.state_dict().keys()
            == fcn("alexnet", layout="aligned", stride=stride, upsample="fixed").state_dict().keys()
        )
        assert not fine.score16.weight.any()
        # All filters are odd, so two steps are one, but for what the finer map has no room for.
        inner = (..., slice(0, -32), slice(0, -32))
        assert torch.allclose(fine(images)[inner], coarse(images)[inner], rtol=0, atol=1e-12)
        with torch.no_grad():
            for p in fine.parameters():
                p.zero_()
    assert all(torch.equal(before[name], value) for name, value in coarse.state_dict().items())
    step = FCN.from_coarser(FCN.from_coarser(coarse, stride=16), stride=8)
    once = FCN.from_coarser(coarse, stride=8)
    assert step.crops == once.crops == fcn("alexnet", layout="aligned", stride=8).crops
    assert torch.equal(step(images), once(images))
    with pytest.raises(ValueError, match="stride to be 8, got 16"):
        FCN.from_coarser(FCN.from_coarser(coarse, stride=16), stride=16)
    with pytest.raises(ValueError, match="a coarser network than of stride 8"):
        FCN.from_coarser(once, stride=8)


def test_two_steps_with_even_filters_cut_kinks_off() -> None:
    coarse = fcn(layout="aligned", upsample="bilinear", trained=True, classes=2).double()
    images = torch.rand(1, 3, 32 * 5, 32 * 6, dtype=torch.float64)
    scores = coarse.score32(coarse.encoder(coarse.scaling(images))[2])
    off = (FCN.from_coarser(coarse, stride=16)(images) - coarse(images)).abs()
    held = F.pad(scores, (1, 1, 1, 1), mode="replicate")
    bound = sum(held.diff(2, dim=d).abs().max() for d in (2, 3)) / 8
    assert 0 < off.max() <= bound
    # Elements lie at 32 i + 15.5, and finer ones 8 pixels to either side; between these all agree.
    far = [torch.arange(n) for n in (160, 192)]
    between = [((p - 15.5).remainder(32) - 16).abs() < 8 for p in far]
    assert between[0].double().mean() == 0.5
    assert off[:, :, between[0]][:, :, :, between[1]].max() < 1e-12


# What belongs to the weights


def test_names_of_the_parameters() -> None:
    with torch.device("meta"):
        names = fcn("squeezenet1_0", stride=8).state_dict().keys()
    parts = {name.partition(".")[0] for name in names}
    assert parts == {"scaling", "encoder", "score32", "score16", "score8", "up16", "up8"}
    assert {name for name in names if name.startswith("scaling")} == {
        *("scaling.mean", "scaling.std", "scaling.bgr"),
    }


def test_scaling_goes_with_the_weights() -> None:
    net = backbone()
    net.scaling = Scaling.caffe()
    net = randomised(FCN(net, 2))
    images = torch.rand(1, 1, 40, 40)
    colours = torch.rand(1, 3, 40, 40)
    other = fcn(classes=2).train()
    assert not torch.equal(randomised(other)(colours), net(colours))
    other.load_state_dict(net.state_dict())
    net.eval(), other.eval()
    assert torch.equal(other(colours), net(colours))
    assert not torch.allclose(net(colours.flip(1)), net(colours))
    assert torch.equal(net(images), net(images.expand(-1, 3, -1, -1)))


def test_parameters_are_the_backbones() -> None:
    classifier = backbone("squeezenet1_0")
    net = FCN(classifier, 2)
    mine, its = ({id(p) for p in m.parameters()} for m in (net.encoder, classifier))
    assert mine < its
    assert its - mine == {id(p) for p in classifier.classifier.parameters()}


def test_training_an_fcn_trains_its_classifier() -> None:
    classifier = backbone("alexnet")
    net = randomised(FCN(classifier, 2, layout="aligned"))
    before = deepcopy(classifier.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(torch.rand(1, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    after = classifier.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert {"features.0.weight", "classifier.1.weight", "classifier.4.bias"} <= changed
    assert not changed & {"classifier.6.weight", "classifier.6.bias"}
    head = next(m for m in net.encoder.head if isinstance(m, nn.Conv2d))
    assert torch.equal(head.weight.flatten(1), after["classifier.1.weight"])
    assert net.encoder.head[-1].p == 0.5


def test_numbers_of_the_published_net() -> None:
    with torch.device("meta"):
        net = FCN("vgg16", 21)
        assert sum(p.numel() for p in net.parameters()) == 134_346_581
        assert net(torch.empty(1, 3, 500, 375)).shape == (1, 21, 500, 375)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"classes": 0}, "classes to be an integer >= 1, got 0"),
        ({"stride": 4}, "stride to be 32, 16 or 8, got 4"),
        ({"upsample": "nearest"}, "upsample to be 'learned', 'fixed' or 'bilinear'"),
        ({"layout": "same"}, "layout: expected 'published' or 'aligned', got 'same'"),
        ({"backbone": "lenet"}, "backbone: expected one of"),
    ],
)
def test_refusals(options: dict[str, Any], text: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=text):
        FCN(**{"backbone": backbone("alexnet"), "classes": 2} | options)


def test_encoders_of_other_strides_are_refused() -> None:
    class Shallow(Backbone):
        def _stages(self) -> Any:
            convolutions = [nn.Conv2d(a, 2, 3, 2, 1) for a in (3, 2, 2)]
            return tuple(convolutions)

        def _head(self, *, aligned: bool) -> nn.Module:
            return nn.Dropout()

    with pytest.raises(ValueError, match="a map of stride 8"):
        FCN(Shallow(1, (2, 2, 2)), 2)


def test_building_by_name() -> None:
    with torch.device("meta"):
        for stride in STRIDES:
            net = models.build(
                f"fcn{stride}s", 1, 5, backbone="alexnet", width=1 / 32, layout="aligned"
            )
            assert isinstance(net, FCN)
            assert (net.stride, net.in_channels, net.classes, net.layout) == (
                stride,
                1,
                5,
                "aligned",
            )
        with pytest.raises(ValueError, match="in_channels to be 1 or 3, got 2"):
            models.build("fcn8s", 2, 5)
        with pytest.raises(ValueError, match="in_channels to be 1 or 3, got 2"):
            models.build("unpoolnet", 2, 5)
        with pytest.raises(TypeError, match="depth"):
            models.build("fcn8s", 3, 5, depth=3)


# Modules


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_dense_weights_that_mix_nothing(channels: int, kernel: int, n: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(channels, kernel, kernel, dtype=torch.float64)
    dense = torch.diag_embed(weight.movedim(0, -1), dim1=0, dim2=1)
    assert torch.equal(depthwise_weight(dense), weight)
    assert torch.equal(depthwise_weight(weight[:, None]), weight)
    up = DeconvUpsample(channels, 2, kernel_size=kernel).double()
    up.weight = nn.Parameter(weight)
    x = torch.randn(2, channels, n, n + 1, dtype=torch.float64)
    made = up(x)
    assert made.shape[2:] == (up.full_size(n), up.full_size(n + 1))
    expected = F.conv_transpose2d(x, dense, stride=2)
    assert torch.allclose(made, expected, rtol=0, atol=1e-12)
    if channels > 1:
        dense[1, 0, -1, -1] = 1e-9
        with pytest.raises(ValueError, match="a filter from channel 1 to 0"):
            depthwise_weight(dense)
    with pytest.raises(ValueError, match=r"expected \(C, C, k, k\)"):
        depthwise_weight(weight)


def test_upsampling_module() -> None:
    up = DeconvUpsample(2, 3)
    assert up.weight is not None
    assert torch.equal(up.weight, bilinear_kernel(3).expand(2, -1, -1))
    assert repr(up) == "DeconvUpsample(2, 3, kernel_size=5, learned=True)"
    fixed = DeconvUpsample(2, 3, learned=False)
    assert not fixed.state_dict()
    x, skip = torch.rand(1, 2, 4, 5), torch.rand(1, 2, 7, 6)
    expected = up(x)[:, :, 2:9, 1:7] + skip
    assert torch.allclose(fixed(x, offset=(2, 1), skip=skip), expected, atol=1e-6)
    with torch.no_grad():
        up.weight.zero_()
    up.reset_parameters()
    assert torch.allclose(up(x), fixed(x), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(1, 4), st.integers(0, 99))
def test_unpooling_puts_maxima_where_they_were(size: list[int], kernel: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.rand(2, 3, *size) + 0.1
    pooled, positions = max_pool(x, kernel)
    assert pooled.shape[2:] == tuple(-(-n // kernel) for n in size)
    back = max_unpool(pooled, positions)
    assert back.shape == x.shape
    kept = back != 0
    assert torch.equal(back[kept], x[kept])
    assert kept.sum() == pooled.numel()
    assert torch.equal(max_pool(back, kernel)[0], pooled)
    with pytest.raises(ValueError, match="expected the pooled map's shape"):
        max_unpool(pooled[:1], positions)
    with pytest.raises(ValueError, match="kernel_size: expected 1 or more"):
        max_pool(x, 0)
    with pytest.raises(ValueError, match=r"expected \(N, C, \*S\)"):
        max_pool(x[0, 0, 0], 2)


# The decoder with unpooling

UPS = ("unpool", "bilinear", "deconv")


@pytest.mark.parametrize("up", UPS)
def test_unpoolnet(up: Any) -> None:
    classifier = BACKBONES["vgg16_bn"](1, width=1 / 32)
    net = UnpoolNet(classifier, 4, up=up).eval()
    for size in ((1, 1), (2, 3), (33, 31), (64, 97)):
        assert net(torch.rand(1, 3, *size)).shape == (1, 4, *size)
    mine, its = ({id(p) for p in m.parameters()} for m in (net.down, classifier.features))
    assert mine == its
    assert len(net.upsample) == (0 if up == "unpool" else 5)
    learned = {n for n, _ in net.named_parameters() if n.startswith("upsample")}
    assert learned == {f"upsample.{i}.weight" for i in range(5) if up == "deconv"}


def test_unpoolnets_bilinear_step_is_torchs() -> None:
    net = UnpoolNet(backbone(), 2, up="bilinear")
    seen: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, args: Any, options: Any, out: Tensor) -> None:
        seen.append((args[0][:, :, 1:-1, 1:-1], out))

    for step in net.upsample:
        step.register_forward_hook(note, with_kwargs=True)
    net.eval()(torch.rand(1, 3, 64, 96))
    assert len(seen) == 5
    for before, after in seen:
        expected = F.interpolate(before, scale_factor=2, mode="bilinear", align_corners=False)
        assert torch.allclose(after, expected, atol=1e-5)


def test_unpoolnet_refuses() -> None:
    for name in ("alexnet", "squeezenet1_0", "googlenet"):
        with pytest.raises(ValueError, match="2x2 poolings alone, such as vgg16, got"):
            UnpoolNet(backbone(name), 2)
    with pytest.raises(ValueError, match="up to be one of unpool, bilinear, deconv, got 'skip'"):
        UnpoolNet(backbone(), 2, up="skip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="classes to be an integer >= 1, got True"):
        UnpoolNet(backbone(), True)


# Tiles


def wide(net: nn.Module) -> nn.Module:
    """In float64, with batch statistics such as training leaves, and scores that are not zero."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean)
    return randomised(net).double().eval()


@pytest.mark.parametrize(
    ("layout", "stride", "upsample"),
    [
        ("published", 32, "fixed"),
        ("published", 16, "bilinear"),
        ("published", 8, "learned"),
        ("aligned", 32, "bilinear"),
        ("aligned", 16, "learned"),
        ("aligned", 8, "bilinear"),
    ],
)
def test_tiles_equal_the_whole(layout: Any, stride: Any, upsample: Any) -> None:
    net = wide(FCN(backbone("alexnet"), 2, stride=stride, layout=layout, upsample=upsample))
    assert_seamless(net, (601 + stride // 2, 37))


@pytest.mark.parametrize(("name", "layout"), [("vgg16", "aligned"), ("squeezenet1_0", "published")])
def test_tiles_of_other_backbones(name: str, layout: Any) -> None:
    net = wide(FCN(backbone(name), 2, stride=8, layout=layout))
    assert_seamless(net, (17, 653))


@pytest.mark.parametrize("up", ["unpool", "bilinear"])
def test_tiles_of_unpoolnet(up: Any) -> None:
    net = wide(UnpoolNet(backbone(), 2, up=up))
    assert_seamless(net, (423, 33))


def assert_seamless(net: nn.Module, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).random((*size, 3))
    options: Any = {"output": "scores", "progress": False}
    whole = segfuse.predict(net, pixels, memory="8GB", **options)
    with torch.no_grad():
        given = net(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0].numpy()
    tiled = segfuse.predict(net, pixels, tile=1, **options)
    for other in (given, tiled):
        assert np.abs(other - whole).max() <= 1e-12 * np.abs(whole).max()
    assert max(len(cuts) for cuts in exact(net, (1, 3, *size), Wish(tile=(1, 1))).cuts) > 2
    found = geometry.network.trace(net, (1, 3, *size))
    assert not found.misaligned
    assert found.stride == (32, 32)


# The operator's geometry


class Up(nn.Module):
    """Pools, and upsamples again with a crop and a skip: by the operator, or in its parts."""

    def __init__(self, data: st.DataObject, *, skip: bool) -> None:
        super().__init__()
        self.factor = data.draw(st.integers(1, 4), "factor")
        kernel = data.draw(st.integers(1, 9), "kernel")
        self.first = nn.Conv2d(1, 2, 3, padding=1)
        self.pool = nn.MaxPool2d(self.factor + 1, self.factor, ceil_mode=True)
        self.weight = nn.Parameter(torch.rand(2, kernel, kernel) + 0.1)
        self.offset = tuple(data.draw(st.integers(0, 6), "offset") for _ in range(2))
        self.cut = data.draw(st.integers(0, 3), "cut")
        self.skip = skip
        self.whole = True

    def forward(self, x: Tensor) -> Tensor:
        skip = self.first(x)
        x = self.pool(skip)
        made: Tensor = F.conv_transpose2d(x, self.weight[:, None], stride=self.factor, groups=2)
        size = [
            min(n - o, m) - self.cut
            for n, o, m in zip(made.shape[2:], self.offset, skip.shape[2:], strict=True)
        ]
        skip = skip[:, :, : size[0], : size[1]]
        if self.whole:
            return deconv_upsample(
                x,
                self.weight,
                factor=self.factor,
                offset=self.offset,
                size=size,
                skip=skip if self.skip else None,
            )
        (top, left), (h, w) = self.offset, size
        made = made[:, :, top : top + h, left : left + w]
        return made + skip if self.skip else made


@settings(max_examples=8, deadline=None)
@given(st.data(), st.booleans())
def test_the_operator_is_followed_as_its_parts(data: st.DataObject, skip: bool) -> None:
    net = Up(data, skip=skip)
    shape = (1, 1, 29, 33)
    found = geometry.network.trace(net, shape)
    net.whole = False
    parts = geometry.network.trace(net, shape)
    assert found.output == parts.output
    assert [by for _, by in found.misaligned] == [by for _, by in parts.misaligned]
    assert found.parameters == parts.parameters
    assert (found.everywhere, parts.everywhere) == ((), ())


def test_what_no_tile_can_upsample() -> None:
    constant = torch.arange(64.0).reshape(1, 1, 8, 8).expand(-1, 4, -1, -1)

    def constant_skip(x: Tensor) -> Tensor:
        return deconv_upsample(x, factor=1, skip=constant)

    def constant_map(x: Tensor) -> Tensor:
        return deconv_upsample(constant, factor=1, skip=x)

    def sideways(x: Tensor) -> Tensor:
        return deconv_upsample(x.permute(0, 2, 1, 3), factor=1).permute(0, 2, 1, 3)

    for make, reason in [
        (constant_skip, "varies over space by itself"),
        (constant_map, "varies over space by itself"),
        (sideways, "treats a spatial axis as channels"),
    ]:
        (finding,) = geometry.network.trace(zoo.Lambda(make), (1, 1, 8, 8)).everywhere
        assert reason in finding.reason
