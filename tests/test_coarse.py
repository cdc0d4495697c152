"""Labels straight from coarse scores: those of the full scores, tile by tile or at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

import segfuse
from segfuse import models, ops
from segfuse.geometry.glance import glance
from segfuse.models import FCN
from segfuse.models.backbones import BACKBONES
from segfuse.nn import CoarseScores, coarse_scores
from segfuse.tiling.job import Job, Work
from segfuse.tiling.options import Asked
from segfuse.tiling.sources import sources

ROUNDING = 1e-5  # of the largest score


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def upsampled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pixels of each call by which labels were made of coarse scores."""
    calls: list[int] = []

    def counted(scores: Tensor, **options: Any) -> Any:
        labels: Any = ops.upsample_argmax(scores, **options)
        calls.append(labels.numel())
        return labels

    watched = type("Watched", (), {**vars(ops), "upsample_argmax": staticmethod(counted)})
    monkeypatch.setattr("segfuse.tiling.engine.ops", watched)
    return calls


def fcn(stride: Any = 8, classes: int = 3, **options: Any) -> FCN:
    net = FCN(BACKBONES["alexnet"](1, width=1 / 32), classes, stride=stride, **options).eval()
    return balanced(net, [m for n, m in net.named_modules() if n.startswith("score")], 3)


def balanced(net: Any, scoring: list[Any], channels: int) -> Any:
    """With weights by which every class is somewhere the best."""
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=(2 / p[0].numel()) ** 0.5)
        for _ in range(2):
            scores = net.eval()(torch.from_numpy(pixels(1, channels, 600, 40)))
            spread = scores.std((0, 2, 3))
            scoring[0].bias -= scores.mean((0, 2, 3))
            for layer in scoring:
                layer.bias /= spread
                layer.weight /= spread[:, None, None, None]
    return net


def pixels(*shape: int) -> NDArray[np.float32]:
    """Noise, and blocks of 16 pixels, along the last two axes."""
    random, (h, w) = np.random.default_rng(0), (-(-n // 16) for n in shape[-2:])
    blocks = random.random((*shape[:-2], h, w), np.float32).repeat(16, -2).repeat(16, -1)
    image: NDArray[np.float32] = blocks[..., : shape[-2], : shape[-1]]
    return 2 * image + random.random(shape, np.float32) / 2


class Head(nn.Module):
    """Someone's own network that ends in an interpolation, as SegFormer's heads do."""

    def __init__(self, classes: int = 5, stride: int = 4, **upsampling: Any) -> None:
        super().__init__()
        self.upsampling = upsampling
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 6, 7, stride, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU()
        )
        self.classifier = nn.Conv2d(6, classes, 1)
        balanced(self, [self.classifier], 1)

    def coarse_scores(self, images: Tensor) -> Tensor:
        scores: Tensor = self.classifier(self.backbone(images))
        return scores

    def forward(self, images: Tensor) -> Tensor:
        scores = self.coarse_scores(images)
        return F.interpolate(scores, images.shape[2:], mode="bilinear", **self.upsampling)


def predict(model: Any, image: Any, **options: Any) -> Any:
    return segfuse.predict(model, image, **{"progress": False} | options)


def assert_best(labels: Any, scores: Any, rounding: float = ROUNDING) -> None:
    """Each label's score is the pixel's largest, up to rounding."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    assert labels.shape == (*scores.shape[:-3], *scores.shape[-2:])
    chosen = np.take_along_axis(scores, np.expand_dims(labels, -3).astype(int), -3)
    best = scores.max(-3, keepdims=True)
    assert labels.size < 100**2 or len(np.unique(labels)) > 2  # there is something to see
    assert (best - chosen).max() <= rounding * np.abs(scores).max()


# What a network says of itself


@pytest.mark.parametrize("stride", [32, 16, 8])
@pytest.mark.parametrize("upsample", ["learned", "fixed", "bilinear"])
@pytest.mark.parametrize("layout", ["published", "aligned"])
def test_coarse_scores_of_fcn(
    stride: Any, upsample: Any, layout: Any, upsampled: list[int]
) -> None:
    net = fcn(stride, upsample=upsample, layout=layout)
    assert isinstance(net, CoarseScores)
    for size in ((37, 64), (65, 33), (1, 40)):
        images = torch.from_numpy(pixels(2, 3, *size))
        with torch.no_grad():
            coarse, full = net.coarse_scores(images), net(images)
        assert coarse.shape[:2] == full.shape[:2]
        assert torch.equal(ops.deconv_upsample(coarse, size=size, **net.upsampling), full)
        target = full.argmax(1)
        loss = ops.upsample_cross_entropy(coarse, target, **net.upsampling)
        torch.testing.assert_close(loss, F.cross_entropy(full, target), rtol=1e-4, atol=1e-5)
        assert_best(predict(net, images), full)
    assert upsampled == [37 * 64, 37 * 64, 65 * 33, 65 * 33, 40, 40]


def test_who_offers_coarse_scores() -> None:
    class Masked(Head):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * images

    class Other(Masked):
        def coarse_scores(self, images: Tensor) -> Tensor:
            return super().coarse_scores(images)

    class Named(Head):
        pass

    for model in (Head(), Named(), Other(), fcn()):
        assert coarse_scores(model) is model
    hooked, early, replaced = Head(), Head(), Head()
    hooked.register_forward_hook(lambda _module, _args, scores: -scores)
    early.register_forward_pre_hook(lambda _module, args: args)
    replaced.forward = lambda images: -images  # type: ignore[method-assign]
    backward, before = Head(), Head()
    backward.register_full_backward_hook(lambda *_: None)
    before.register_full_backward_pre_hook(lambda *_: None)
    others = [Masked(), hooked, early, replaced, backward, before, nn.Sequential(Head())]
    for model in (*others, models.UNet(1, 2, base=2), torch.compile(Head())):
        assert coarse_scores(model) is None
    of_all = register_module_forward_hook(lambda *_: None)
    assert coarse_scores(Head()) is None
    of_all.remove()
    assert coarse_scores(Head()) is not None


def test_whose_coarse_scores_are_not_taken(upsampled: list[int]) -> None:
    hooked, image = Head(), pixels(40, 48)
    hooked.register_forward_hook(lambda _module, _args, scores: -scores)
    assert_best(predict(hooked, image), predict(hooked, image, output="scores"))
    for options in ({"augment": "d4"}, {"blend": "hann", "tile": 32, "overlap": 0.5}):
        predict(Head(), image, **options)
    for output in ("scores", "probabilities"):
        predict(Head(), image, output=output)
    assert not upsampled

    class Cropped(Head):  # whose scores are not of the image's size
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images)[:, :, 4:-4, 4:-4]

        def coarse_scores(self, images: Tensor) -> Tensor:
            return super().coarse_scores(images)

    net = Cropped()
    assert_best(predict(net, image), predict(net, image, output="scores"))
    assert not upsampled


# Labels


HEADS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "interpolated": (Head, (208, 336)),
    "interpolated, odd": (Head, (101, 203)),
    "by 8": (lambda: Head(stride=8), (168, 240)),
    "corners aligned": (lambda: Head(align_corners=True), (121, 161)),
}


@pytest.mark.parametrize("name", HEADS)
def test_labels_of_a_head(name: str, upsampled: list[int]) -> None:
    make, size = HEADS[name]
    net, image = make().eval(), pixels(*size)
    scores = predict(net, image, output="scores", memory="8GB")
    assert not upsampled
    assert_best(predict(net, image, memory="8GB"), scores)
    assert upsampled == [size[0] * size[1]]
    assert_best(predict(net, image, tile=64), scores)
    resampled = name in {"interpolated, odd", "corners aligned"}  # tiles at the whole's positions
    assert (len(upsampled) > 4) is not resampled


@pytest.mark.parametrize(
    ("stride", "layout", "upsample"),
    [(32, "published", "learned"), (16, "aligned", "fixed"), (8, "published", "bilinear")],
)
def test_tiles_of_fcn_equal_the_whole(
    stride: Any, layout: Any, upsample: Any, upsampled: list[int]
) -> None:
    net = fcn(stride, 21, layout=layout, upsample=upsample)
    image = torch.from_numpy(pixels(3, 601 + stride // 2, 37))
    scores = predict(net, image, output="scores", memory="8GB")
    whole = predict(net, image, memory="8GB")
    assert_best(whole, scores)
    tiled = predict(net, image, tile=1, batch=2)
    assert len(upsampled) > 2
    assert sum(upsampled) == 2 * whole.numel()  # none of what is cut off a tile
    assert_best(tiled, scores)
    assert (
        tiled != whole
    ).float().mean() < 1e-3  # where two classes score the same but for rounding


def test_memory_of_the_caller(tmp_path: Path) -> None:
    net, image = Head(300), pixels(90, 70)
    labels = predict(net, image)
    assert labels.dtype == np.int16
    out = np.full((90, 140), -1, np.int16)
    predict(net, image, out=out[:, ::2], tile=48)
    assert np.array_equal(out[:, ::2], labels)
    assert (out[:, 1::2] == -1).all()
    batch = np.stack([image, image[::-1]])
    both = predict(net, batch, axes="NYX", tile=48)
    assert np.array_equal(both, [labels, predict(net, image[::-1])])
    pytest.importorskip("tifffile")
    path = predict(net, image, out=tmp_path / "labels.tif", tile=48)
    assert np.array_equal(sources(path, axes=None, channels=1, dims=2)[0][0].read(0, 90)[0], labels)


def test_precision(upsampled: list[int]) -> None:
    """Scores of half precision are upsampled in float32."""
    net, image = fcn(8), pixels(1, 3, 70, 90)
    images = torch.from_numpy(image)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        coarse = net.coarse_scores(images)
    assert coarse.dtype == torch.bfloat16
    full = ops.deconv_upsample(coarse.float(), size=(70, 90), **net.upsampling)
    assert_best(predict(net, images, precision="bf16"), full, 0.02)
    double = net.double()
    scores = predict(double, images.double(), output="scores")
    assert_best(predict(double, images.double()), scores, 1e-12)
    assert len(upsampled) == 2


def test_runs_that_resize(tmp_path: Path, upsampled: list[int]) -> None:
    for package in ("PIL", "safetensors", "tomli_w"):
        pytest.importorskip(package)
    from segfuse import run as folder
    from segfuse.data import LabelCoding, Normalisation

    network = {"name": "fcn16s", "in_channels": 3, "classes": 4}
    network |= {"backbone": "alexnet", "width": 1 / 32, "layout": "aligned"}
    coding = LabelCoding("classes", 4, None).to_dict()
    data = {"coding": coding, "normalisation": Normalisation().to_dict(), "resize": 0.5}
    folder.claim(tmp_path / "run", overwrite=False)
    folder.write_config(tmp_path / "run", {"format": folder.FORMAT, "model": network, "data": data})
    net = models.build(**network)
    net.load_state_dict(fcn(16, 4, layout="aligned").state_dict())
    folder.save_weights(tmp_path / "run" / folder.WEIGHTS, net)
    image = (255 * pixels(3, 101, 75)).astype(np.uint8)
    labels = predict(tmp_path / "run", torch.from_numpy(image)).numpy()
    assert upsampled == [50 * 38]
    assert labels.shape == (101, 75)
    scores = predict(tmp_path / "run", torch.from_numpy(image), output="scores").numpy()
    assert (labels == scores.argmax(0)).mean() > 0.8  # scores are interpolated, labels the nearest


# Memory


def work(model: nn.Module, image: NDArray[Any], **options: Any) -> Work:
    images, batched = sources(image, axes=None, channels=1, dims=2)
    return Job.of(model, Asked(**options)).prepare(images, batched=batched)


def test_plans_know_that_full_scores_are_not_there() -> None:
    net, image = Head(150), np.zeros((512, 512), np.float32)
    shape = (1, 1, 512, 512)
    full, coarse = glance(net, shape), glance(net, shape, "coarse_scores")
    assert full
    assert coarse
    assert coarse.peak < full.peak / 4
    budget = work(net, image, memory="8GB").memory_for(coarse.peak)
    assert budget < work(net, image, memory="8GB", output="scores").memory_for(full.peak) / 8
    plan = work(net, image, memory=budget).plan
    assert (plan.coarse, plan.count, plan.peak) == (True, 1, coarse.peak)
    plan = work(net, image, memory=budget // 2).plan
    assert plan.coarse
    plain = Head(150)
    plain.register_forward_hook(lambda *_: None)
    other = work(plain, image, memory=2 * budget).plan
    assert not other.coarse
    assert 1 < plan.count < other.count
