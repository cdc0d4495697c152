"""Tiled prediction is the whole image's: on many networks, sizes and tiles."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

import segfuse
from segfuse import models
from segfuse.geometry.glance import remembered
from segfuse.tiling.absolute import resampled
from segfuse.tiling.engine import rows_needed
from segfuse.tiling.job import Job, expected
from segfuse.tiling.options import Asked
from segfuse.tiling.plan import Wish, exact
from segfuse.tiling.sources import sources

TOLERANCE = 1e-5  # of the largest score


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def predict(model: nn.Module, image: Any, **options: Any) -> Any:
    return segfuse.predict(model, image, **{"progress": False, "output": "scores"} | options)


def image(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def assert_seamless(whole: NDArray[Any], tiled: NDArray[Any]) -> None:
    scale = np.abs(whole).max()
    assert np.abs(tiled - whole).max() <= TOLERANCE * scale
    differ = tiled.argmax(0) != whole.argmax(0)
    best = np.sort(whole, 0)[-2:]
    ties = best[-1] - best[0] <= 2 * TOLERANCE * scale if len(whole) > 1 else True
    assert not (differ & ~ties).any()


# Name to (network, sizes of images, tiles). Sizes are odd and prime where the network, or the
# context that is mirrored for it, allows any; a tile of 1 is the smallest that there is.
NETWORKS: dict[str, tuple[Any, list[tuple[int, ...]], list[Any]]] = {
    "published U-Net": (
        lambda: models.UNet(1, 2, base=2),
        [(149, 163), (97, 313), (1, 1)],
        [1, 252, (300, 188)],
    ),
    "padded U-Net": (
        lambda: models.UNet(1, 2, base=2, depth=3, padding="same"),
        [(189, 211), (57, 313)],
        [1, 128, (104, 200)],
    ),
    "unpooling": (
        lambda: models.UNet(1, 2, base=2, depth=3, padding="same", up="unpool"),
        [(189, 211)],
        [1],
    ),
    "bilinear, valid": (
        lambda: models.UNet(1, 2, base=2, depth=2, up="bilinear"),
        [(201, 83)],
        [1],
    ),
    "MONAI BasicUNet": (zoo.ZOO["MONAI BasicUNet"][0], [(307, 233), (256, 271)], [1, 224]),
    "MONAI UNet": (zoo.ZOO["MONAI UNet"][0], [(152, 160), (111, 123)], [1, 72]),
    "strided, dilated": (zoo.stem, [(211, 223), (97, 200)], [1, 136]),
    "odd kernels, asymmetric padding": (zoo.ZOO["asymmetric"][0], [(61, 67)], [1, 31, 48]),
    "even kernels": (zoo.ZOO["even kernels"][0], [(61, 67)], [1, 31, 48]),
    "reflected": (zoo.ZOO["reflected"][0], [(104, 112), (101, 97)], [1, 64]),
    "reflected in front": (zoo.ZOO["reflected in front"][0], [(61, 67)], [1, 41]),
    "rounding up": (zoo.ZOO["odd sizes, cut to the skip"][0], [(111, 123)], [1, 72]),
    "corners aligned": (zoo.POSITIONED["corners aligned"][0], [(208, 192), (101, 97)], [1, 120]),
    "sized to odd skips": (
        zoo.POSITIONED["sized to odd skips, bilinear"][0],
        [(211, 123), (199, 97)],
        [1, 120],
    ),
    "by 3, bilinear": (zoo.POSITIONED["by 3, bilinear"][0], [(399, 102), (61, 67)], [120]),
    "FCN-8s": (zoo.FCN8, [(503, 297), (37, 600)], [1, 449]),
    "ConvNeXt": (zoo.ConvNeXt, [(111, 123)], [1, 60]),
    "three dimensions": (
        lambda: models.UNet(1, 2, base=2, depth=1, padding="same", dims=3),
        [(33, 30, 27), (7, 31, 34)],
        [1, (24, 20, 64)],
    ),
    "anisotropic": (zoo.ZOO["anisotropic"][0], [(12, 42, 38), (13, 33, 29)], [1, (12, 28, 32)]),
    "one dimension": (zoo.ZOO["1-D"][0], [(400,), (397,)], [1, 128]),
}
CASES = [
    (name, size, tile)
    for name, (_, sizes, tiles) in NETWORKS.items()
    for size in sizes
    for tile in tiles
]


@pytest.mark.parametrize(("name", "size", "tile"), CASES)
def test_tiles_equal_the_whole(name: str, size: tuple[int, ...], tile: Any) -> None:
    model = NETWORKS[name][0]()
    pixels = image(*size)
    if isinstance(tile, tuple):
        tile = tile[: len(size)]
    whole = predict(model, pixels, memory="8GB")
    assert whole.shape[1:] == size
    assert_seamless(whole, predict(model, pixels, tile=tile))


@pytest.mark.parametrize("name", ["MONAI BasicUNet", "ConvNeXt", "corners aligned"])
def test_the_whole_is_what_the_network_gives(name: str) -> None:
    model = NETWORKS[name][0]().eval()
    pixels = image(304, 308)
    with torch.no_grad():
        given = model(torch.from_numpy(pixels)[None, None])[0].numpy()
    assert_seamless(given, predict(model, pixels))
    assert_seamless(given, predict(model, pixels, tile=100))


def test_context_is_mirrored() -> None:
    model = models.UNet(1, 2, base=2).eval()
    pixels = image(60, 76)
    framed = np.pad(pixels, ((92, 100), (92, 100)), mode="reflect")  # to 16 k + 60
    with torch.no_grad():
        given = model(torch.from_numpy(framed)[None, None])[0, :, :60, :76].numpy()
    assert_seamless(given, predict(model, pixels))


class Drawn(nn.Module):
    """A random network whose output has the image's resolution, though not always its size."""

    def __init__(self, draw: st.DrawFn) -> None:
        super().__init__()
        pick = lambda *of: draw(st.sampled_from(of))  # noqa: E731
        self.first = self._convolution(pick, 1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for _ in range(draw(st.integers(0, 2))):
            factor = pick(2, 2, 3)
            self.down.append(self._shrink(pick, factor))
            self.up.insert(0, self._enlarge(pick, factor))
        self.join = pick("crop", "none")
        self.last = self._convolution(pick, 3, 2)

    @staticmethod
    def _convolution(pick: Any, i: int, o: int = 3) -> nn.Module:
        k, d = pick(1, 2, 3, 4, 5), pick(1, 1, 2)
        mode = pick("zeros", "zeros", "reflect", "replicate")
        return nn.Conv2d(i, o, k, padding=pick(0, d * (k - 1) // 2), dilation=d, padding_mode=mode)

    def _shrink(self, pick: Any, factor: int) -> nn.Module:
        k = pick(factor, 3)
        return nn.Sequential(
            pick(
                nn.Conv2d(3, 3, k, factor, k // 2),
                nn.MaxPool2d(k, factor, pick(0, k // 2), ceil_mode=pick(False, True)),
                nn.AvgPool2d(k, factor, pick(0, k // 2), count_include_pad=pick(False, True)),
            ),
            self._convolution(pick, 3),
            nn.ReLU(),
        )

    def _enlarge(self, pick: Any, factor: int) -> nn.Module:
        k = pick(factor, factor + 1, 2 * factor)
        return nn.Sequential(
            pick(
                nn.ConvTranspose2d(3, 3, k, factor, (k - factor) // 2),
                nn.Upsample(scale_factor=factor, mode="nearest"),
                nn.Upsample(scale_factor=factor, mode="bilinear"),
                nn.Upsample(scale_factor=factor, mode="bilinear", align_corners=True),
                nn.Sequential(nn.Conv2d(3, 3 * factor**2, 1), nn.PixelShuffle(factor)),
            ),
            self._convolution(pick, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        maps = []
        for layer in self.down:
            maps.append(x)
            x = layer(x)
        for layer in self.up:
            x, skip = layer(x), maps.pop()
            if self.join == "crop" and all(
                0 <= a - b <= 9 for a, b in zip(skip.shape[2:], x.shape[2:], strict=True)
            ):
                x = x + zoo.centre(skip, x)
        out: Tensor = self.last(x)
        return out


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_tiles_of_random_networks_equal_the_whole(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99), "weights"))
    model = Drawn(data.draw).double()
    size = data.draw(st.tuples(st.integers(30, 90), st.integers(30, 90)), "size")
    tile = data.draw(st.integers(1, 50), "tile")
    turned = data.draw(st.sampled_from([None, None, None, "d4"]), "augment")
    pixels = image(*size).astype(np.float64)
    try:
        whole = predict(model, pixels, memory="8GB", augment=turned)
        tiled = predict(model, pixels, tile=tile, augment=turned)
    except ValueError:  # it runs at no size, or joins maps of sizes of their own
        assume(False)
    assert np.abs(tiled - whole).max() <= 1e-12 * np.abs(whole).max()


def test_no_pixel_twice_and_none_left_out() -> None:
    model = models.UNet(1, 2, base=2)
    for size, tile in [((389, 401), (252, 300)), ((189, 1000), (188, 188)), ((5, 7), (1, 1))]:
        plan = exact(model, (1, 1, *size), Wish(tile=tile))
        for n, cuts in zip(size, plan.cuts, strict=True):
            places = [range(c.to, c.to + c.last - c.first) for c in cuts]
            assert [p for place in places for p in place] == list(range(n))
        for done in (0, 1, 100, size[0] - 1, size[0]):
            rows = [r for c in plan.bands(done) for r in range(c.to, c.to + c.last - c.first)]
            assert rows == list(range(min(done, size[0]), size[0]))


@pytest.mark.parametrize("border", ["reflect", "symmetric", "edge", "constant"])
@given(st.integers(1, 9), st.integers(-12, 12), st.integers(1, 20))
def test_rows_needed(border: Any, size: int, start: int, length: int) -> None:
    """Continuing the rows that are read gives what continuing the image gives."""
    assume(start < size and start + length > 0)
    name = {"reflect": "mirror"}.get(border, border)
    first, stop = rows_needed(start, length, size, name)
    assert 0 <= first < stop <= size
    line = np.arange(1, size + 1)

    def window(values: NDArray[Any], begin: int) -> NDArray[Any]:
        before, after = max(0, -begin), max(0, begin + length - len(values))
        padded = np.pad(values, (before, after), mode=border)
        return padded[begin + before : begin + before + length]

    assert (window(line, start) == window(line[first:stop], start - first)).all()


def planned(model: nn.Module, shape: tuple[int, ...], **options: Any) -> Any:
    asked = Asked(**options)
    found, batched = sources(np.zeros(shape, np.float32), axes=None, channels=1, dims=len(shape))
    return Job.of(model, asked).prepare(found, batched=batched).plan


def test_a_plan_takes_the_least_work_that_fits() -> None:
    model = models.UNet(1, 2, base=4)
    plans = [planned(model, (4096, 4096), memory=m) for m in ("8GB", "1GB", "500MB", "100MB")]
    assert plans[0].count == 1
    assert plans[0].wasted == 0
    for larger, smaller in pairwise(plans):
        assert larger.peak > smaller.peak
        assert larger.wasted < smaller.wasted
    with pytest.raises(ValueError, match=r"predict: memory: expected at least \d+ MiB"):
        planned(model, (4096, 4096), memory="1MB")


def test_sizes_of_tiles() -> None:
    model = models.UNet(1, 2, base=2)  # tiles of 16 k + 60
    assert planned(model, (1000, 1000), tile=572).tile == (572, 572)
    assert planned(model, (1000, 1000), tile=573).tile == (588, 588)
    assert planned(model, (1000, 1000), tile=1).tile == (204, 204)  # a stride of 16 is left
    assert planned(model, (300, 1000), tile=572).tile == (492, 572)  # a whole column
    assert planned(model, (300, 1000), tile=(10**6, 572)).tile == (492, 572)
    assert planned(model, (300, 400), tile=10**6).count == 1


def test_the_published_step_of_388_would_leave_the_grid() -> None:
    """Section 2 lets tiles of 572 abut at 388; poolings have stride 16, so 384 is exact."""
    plan = planned(models.UNet(1, 2, base=2), (2000, 2000), tile=572)
    starts = [cut.start for cut in plan.cuts[0]]
    assert starts[1] - starts[0] == 384


# What goes in and comes out


class Point(nn.Sequential):
    """A 1x1 network: any size, any tile."""

    def __init__(self, channels: int = 1, classes: int = 3, dims: int = 2) -> None:
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        super().__init__(conv(channels, classes, 1))


def test_arrays_and_tensors() -> None:
    model = Point(3)
    pixels = image(20, 30, 3)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    labels = predict(model, pixels, output="labels")
    assert labels.dtype == np.uint8
    assert labels.shape == (20, 30)
    scores = predict(model, pixels)
    assert scores.shape == (3, 20, 30)
    assert (predict(model, tensor).numpy() == scores).all()
    assert (predict(model, tensor, output="labels").numpy() == labels).all()
    many = predict(model, torch.stack([tensor, tensor + 1]), tile=7)
    assert many.shape == (2, 3, 20, 30)
    np.testing.assert_allclose(many[0].numpy(), scores, rtol=1e-5, atol=1e-6)
    probabilities = predict(model, pixels, output="probabilities")
    np.testing.assert_allclose(probabilities.sum(0), 1, rtol=1e-5)
    np.testing.assert_allclose(
        predict(model, pixels.transpose(2, 1, 0), axes="CYX"),
        scores.transpose(0, 2, 1),
        rtol=1e-5,
        atol=1e-6,
    )
    assert predict(model, pixels[::-1, ::-2]).shape == (3, 20, 15)
    read_only = pixels.copy()
    read_only.flags.writeable = False
    assert (predict(model, read_only, tile=7, output="labels") == labels).all()


@pytest.mark.parametrize(
    "dtype", ["uint8", "uint16", "int16", "int32", "float16", "float64", ">u2"]
)
def test_dtypes_of_images(dtype: str) -> None:
    model = Point()
    pixels = (image(20, 30) * 20 + 100).astype(dtype)
    expected_scores = predict(model, pixels.astype(np.float32))
    np.testing.assert_allclose(predict(model, pixels, tile=7), expected_scores, rtol=1e-5)


@pytest.mark.parametrize(
    ("classes", "dtype"), [(1, "uint8"), (256, "uint8"), (257, "int16"), (32769, "int32")]
)
def test_dtypes_of_labels(classes: int, dtype: str) -> None:
    assert predict(Point(1, classes), image(3, 4), output="labels").dtype == dtype


def test_float64_networks() -> None:
    assert predict(Point().double(), image(5, 6)).dtype == np.float64


def test_half_networks_give_float32() -> None:
    assert predict(Point().bfloat16(), image(5, 6)).dtype == np.float32


def test_out(tmp_path: Path) -> None:
    model = models.UNet(1, 3, base=2, padding="same", depth=2)
    pixels = image(97, 101)
    whole = predict(model, pixels)
    for out in (
        np.zeros((3, 97, 101), np.float32),
        torch.zeros(3, 97, 101),
        np.zeros((97, 101, 3), np.float32).transpose(2, 0, 1),
        np.lib.format.open_memmap(tmp_path / "a.npy", "w+", np.float32, (3, 97, 101)),
    ):
        assert predict(model, pixels, out=out, tile=64) is out
        assert_seamless(whole, np.asarray(out))
    labels = np.zeros((97, 101), np.int64)
    predict(model, pixels, out=labels, tile=64, output="labels")
    assert (labels == whole.argmax(0)).mean() > 0.999
    with pytest.raises(ValueError, match="predict: out: expected shape"):
        predict(model, pixels, out=np.zeros((3, 97, 100), np.float32))


def test_the_network_is_left_as_it_was() -> None:
    model = models.UNet(1, 2, base=2, norm="batch").train()
    model.bottom.eval()
    before = [module.training for module in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    predict(model, image(40, 50), tile=1)
    assert [module.training for module in model.modules()] == before
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


class Changing(nn.Module):
    """Can be changed in ways that its text does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2, 1, 3, 3))
        self.dilation = [1]
        self.act: Any = nn.functional.relu

    def forward(self, x: Tensor) -> Tensor:
        reach = self.weight.shape[-1] // 2 * self.dilation[0]
        y = nn.functional.conv2d(x, self.weight, padding=reach, dilation=self.dilation[0])
        return self.act(y)


def blurred(y: Tensor) -> Tensor:
    return nn.functional.avg_pool2d(y, 9, 1, 4)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net, "weight", nn.Parameter(torch.rand(2, 1, 15, 15))),
        lambda net: setattr(net, "weight", nn.Parameter(torch.rand(5, 1, 3, 3))),
        lambda net: net.dilation.__setitem__(0, 6),
        lambda net: setattr(net, "act", blurred),
        lambda net: net.register_forward_hook(lambda _, __, y: blurred(y)),
        lambda net: setattr(net, "forward", lambda x, given=net.forward: blurred(given(x))),
    ],
)
def test_a_network_that_was_changed_is_read_anew(change: Any) -> None:
    net = Changing().eval()
    x = image(90, 80)
    predict(net, x, tile=32)
    change(net)
    with torch.inference_mode():
        whole = net(torch.from_numpy(x)[None, None])[0].numpy()
    assert_seamless(whole, predict(net, x, tile=32))


@pytest.mark.parametrize("make", [lambda: models.UNet(1, 2, base=2), zoo.ConvNeXt, zoo.FCN8])
def test_a_network_is_read_once(make: Any) -> None:
    net = make().eval()
    known = remembered(net)
    known["seen"] = True
    for _ in range(5):
        predict(net, image(200, 200))
        assert remembered(net) is known
        assert "seen" in remembered(net)


class Keeping(nn.Module):
    """Returns the same memory at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.kept: dict[Any, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if y.device.type == "meta":
            return y
        return self.kept.setdefault(tuple(y.shape), torch.empty_like(y)).copy_(y)


def test_memory_that_the_network_keeps_is_not_given_away() -> None:
    net = Keeping().eval()
    x = image(300, 40)
    options: dict[str, Any]
    for options in ({}, {"tile": (16, 40), "margin": 1}):
        first = predict(net, x, **options)
        before = first.copy()
        predict(net, x + 1, **options)
        assert np.array_equal(first, before)
        assert_seamless(net.conv(torch.from_numpy(x)[None, None])[0].detach().numpy(), first)
    blended = [
        predict(n, x, blend="hann", tile=64, overlap=0.5, margin=None) for n in (net, net.conv)
    ]
    np.testing.assert_allclose(*blended, rtol=1e-5, atol=1e-6)


def test_a_network_that_cannot_be_copied_takes_the_whole_image() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1)).eval()
    net.lock = Lock()  # type: ignore[assignment]
    x = image(20, 30)
    with torch.inference_mode():
        whole = net(torch.from_numpy(x)[None, None])[0].numpy()
    np.testing.assert_allclose(predict(net, x), whole, rtol=1e-5, atol=1e-6)


class Flattening(nn.Module):
    """Takes a view that maps laid out channels last do not have."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(channels, 3, 3, padding=1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(y.view(len(y), -1).relu().view(y.shape))


@pytest.mark.parametrize("channels", [1, 3])
def test_code_that_asks_for_channels_first(channels: int) -> None:
    net = Flattening(channels).eval()
    x = torch.rand(channels, 40, 30)
    with torch.inference_mode():
        torch.testing.assert_close(predict(net, x), net(x[None])[0])


class Doubled(nn.Module):
    """Writes into its input, or into a view of it."""

    def __init__(self, *, view: bool) -> None:
        super().__init__()
        self.view = view

    def forward(self, x: Tensor) -> Tensor:
        (x[..., 1:] if self.view else x).mul_(2)
        return x


@pytest.mark.parametrize(
    "first",
    [nn.ReLU(inplace=True), nn.Identity(), Doubled(view=False), Doubled(view=True)],
)
@pytest.mark.parametrize("last", [nn.Conv2d(1, 2, 3, padding=1), nn.Identity()])
def test_the_image_is_left_as_it_was(first: nn.Module, last: nn.Module) -> None:
    net = nn.Sequential(first, last)
    x = torch.from_numpy(image(1, 20, 30))
    before = x.clone()
    plain = net(x[None].clone())[0]
    ways: list[tuple[Any, dict[str, Any]]] = [(x, {}), (x[0].numpy(), {}), (x, {"augment": "d4"})]
    if not getattr(first, "view", False):  # that cannot be tiled
        ways.append((x, {"tile": 16}))
    for one, options in ways:
        y = torch.as_tensor(predict(net, one, **options))
        assert torch.equal(x, before), options
        if "augment" not in options:
            torch.testing.assert_close(y, plain)
        y.fill_(7)
        assert torch.equal(x, before), options


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("mode", "options"),
    [("nearest", {}), ("nearest-exact", {})]
    + [(m, {"align_corners": c}) for m in ("linear", "bilinear", "bicubic") for c in (False, True)],
)
def test_samples_lie_where_torch_takes_them(
    dtype: torch.dtype, mode: str, options: dict[str, Any]
) -> None:
    flat = mode in {"bilinear", "bicubic"}
    for old, new in [(7, 23), (641, 1921), (1000, 3001), (5000, 4999), (3333, 10000)]:
        x = torch.rand(1, 1, old, *(1,) * flat, dtype=dtype)
        size = (new, *(1,) * flat)
        whole = nn.functional.interpolate(x, size, mode=mode, **options)
        at = torch.arange(new)
        ours = resampled(x, 2, at, 0, (old, new), None, mode=mode, corners=any(options.values()))
        if "nearest" in mode:
            assert torch.equal(ours, whole), (old, new)
        else:
            torch.testing.assert_close(ours, whole)


def test_several_outputs() -> None:
    class Deep(Point):
        def forward(self, x: Tensor) -> Any:
            y = super().forward(x)
            return {"out": y, "aux": y[:, :1]}

    model = Deep()
    assert predict(model, image(8, 9)).shape == (3, 8, 9)


# Turned copies


def test_d4_is_the_mean_of_eight() -> None:
    model = models.UNet(1, 3, base=2, padding="same", depth=2).eval()
    pixels = torch.from_numpy(image(60, 76))[None, None]
    total = torch.zeros(1, 3, 60, 76)
    with torch.no_grad():
        for turns in range(4):
            for mirrored in (False, True):
                x = (pixels.flip(-1) if mirrored else pixels).rot90(turns, (-2, -1))
                y = model(x).softmax(1).rot90(-turns, (-2, -1))
                total += y.flip(-1) if mirrored else y
    given = predict(model, pixels[0], augment="d4", output="probabilities")
    np.testing.assert_allclose(given.numpy(), total[0].numpy() / 8, atol=1e-6)


@pytest.mark.parametrize("name", ["published U-Net", "padded U-Net", "corners aligned"])
def test_turned_tiles_equal_the_whole(name: str) -> None:
    model = NETWORKS[name][0]()
    pixels = image(128, 192)
    whole = predict(model, pixels, augment="d4", memory="8GB")
    assert_seamless(whole, predict(model, pixels, augment="d4", tile=120))


def test_what_turns_with_the_image_turns_the_result() -> None:
    model = models.UNet(1, 2, base=2, padding="same", depth=2)
    pixels = image(64, 64)
    one = predict(model, pixels, augment="d4")
    other = predict(model, np.rot90(pixels).copy(), augment="d4")
    np.testing.assert_allclose(np.rot90(one, axes=(1, 2)), other, atol=1e-5)


# Networks that look everywhere, and that cannot be read


class Instance(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Conv2d(4, 2, 3, padding=1)
        )


def test_what_looks_everywhere_is_refused_by_name() -> None:
    pixels = image(200, 300)
    assert predict(Instance(), pixels).shape == (2, 200, 300)
    for options in ({"tile": 64}, {"memory": "2MB"}):
        with pytest.raises(ValueError, match=r"1 \(instance_norm\): .*blend='gaussian'"):
            predict(Instance(), pixels, **options)


@pytest.mark.parametrize("blend", ["gaussian", "hann"])
@pytest.mark.parametrize("overlap", [0.5, 16, (0, 40), 0.25])
def test_blending(blend: Any, overlap: Any) -> None:
    """Of a network whose tiles are exact anyway, blending gives the whole."""
    model, pixels = Point(), image(101, 150)
    whole = predict(model, pixels)
    options = {"tile": (48, 64), "blend": blend, "overlap": overlap}
    np.testing.assert_allclose(predict(model, pixels, **options), whole, rtol=1e-4, atol=1e-5)
    labels = predict(model, pixels, **options, output="labels")
    assert (labels == whole.argmax(0)).mean() > 0.999
    small = predict(Instance(), image(20, 200), tile=64, blend=blend, overlap=0.5)
    assert small.shape == (2, 20, 200)
    assert np.isfinite(small).all()


def test_the_users_word() -> None:
    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 5, padding=2)

        def forward(self, x: Tensor) -> Tensor:
            if not bool(torch.isfinite(x).all()):
                raise ValueError("no")
            out: Tensor = self.conv(x)
            return out

    pixels = image(101, 97)
    model = Opaque()
    whole = predict(model, pixels)
    with pytest.raises(ValueError, match="predict: model: "):
        predict(model, pixels, tile=32)
    assert_seamless(whole, predict(model, pixels, tile=32, margin=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "classes"}, "output: expected one of labels"),
        ({"border": "wrap"}, "border: expected"),
        ({"tile": 0}, "tile: expected 'auto' or integers"),
        ({"tile": "64"}, "tile: expected 'auto' or integers"),
        ({"tile": (64,)}, "tile: expected an integer, or 2"),
        ({"tile": 64.0}, "tile"),
        ({"batch": 0}, "batch: expected"),
        ({"memory": "much"}, "memory: expected bytes or a text"),
        ({"memory": 0}, "memory: expected bytes or a text"),
        ({"blend": "gaussian"}, "blend: expected a tile and an overlap"),
        ({"overlap": 0.5}, "overlap: expected blend"),
        ({"blend": "hann", "tile": 64, "overlap": 64}, "overlap: expected a share or pixels"),
        ({"blend": "hann", "tile": 64, "overlap": 1.0}, "overlap: expected a share or pixels"),
        ({"stride": 2}, "stride: expected a margin"),
        ({"augment": "d8"}, "augment: expected"),
        ({"resume": True}, "out: expected a path"),
        ({"axes": "XX"}, "axes"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict(Point(), image(100, 100), **options)


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (Point(2), (20, 30), "image: expected"),
        (Point(), (20, 30, 2), "image: expected"),
        (Point(), (0, 30), "image: "),
        (nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1)), (20, 30), "expected scores of the image's size"),
        (nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten()), (20, 30), "expected scores"),
    ],
)
def test_wrong_images_and_models(model: nn.Module, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predict(model, image(*shape))


def test_dims_and_channels_are_found() -> None:
    assert expected(Point(4, 2, 3)) == (4, 3)
    assert expected(models.UNet(3, 2, base=2, dims=1)) == (3, 1)
    assert expected(nn.Identity()) == (None, 2)


# Out of memory


class Greedy(Point):
    """Runs out of memory above so many elements."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > self.most and x.device.type != "meta" and not torch.compiler.is_exporting():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


def test_a_smaller_batch_then_a_smaller_tile(capsys: pytest.CaptureFixture[str]) -> None:
    pixels = image(256, 256)
    model = Greedy(3 * 32 * 32)
    whole = predict(Point(), pixels)  # of other weights: for its shape
    found = predict(model, pixels, tile=32, batch=8, progress=True)
    assert found.shape == whole.shape
    assert "out of memory: going on with 2 tiles at a time" in capsys.readouterr().err
    found = predict(model, pixels, progress=True)
    assert "out of memory: going on with tiles of" in capsys.readouterr().err
    model.most = 10**9
    assert_seamless(predict(model, pixels), found)
    model.most = 10
    with pytest.raises(ValueError, match="does not fit into the memory of cpu"):
        predict(model, pixels, tile=32)
