"""Backbones: torchvision's layouts, the scaling of images, encoders, files of weights."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from segfuse.errors import UserError
from segfuse.geometry import network
from segfuse.geometry.layers import VGG16, Conv, chain
from segfuse.models.backbones import (
    BACKBONES,
    VGG,
    Backbone,
    GoogLeNet,
    Scaling,
    SqueezeNet,
    backbone,
)

DATA = Path(__file__).parents[2] / "shared/data"
NARROW: dict[str, Any] = {"classes": 5, "width": 1 / 32}
NATIVE = {"squeezenet1_0": 227}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def meta(name: str, **options: Any) -> Backbone:
    with torch.device("meta"):
        return BACKBONES[name](**options)


def same(a: nn.Module, b: nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# Layouts


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("alexnet", 61_100_840, "features.0.weight", "classifier.6.bias"),
        ("googlenet", 6_624_904, "conv1.conv.weight", "fc.bias"),
        ("squeezenet1_0", 1_248_424, "features.0.weight", "classifier.1.bias"),
        ("vgg16", 138_357_544, "features.0.weight", "classifier.6.bias"),
        ("vgg16_bn", 138_365_992, "features.0.weight", "classifier.6.bias"),
    ],
)
def test_parameters_of_torchvision(name: str, count: int, first: str, last: str) -> None:
    net = meta(name)
    assert sum(p.numel() for p in net.parameters()) == count
    assert next(iter(net.state_dict())) == first
    assert [*net.state_dict()][-1] == last
    assert net.native == NATIVE.get(name, 224)


def torchvisions(name: str) -> Any:
    try:
        models = importlib.import_module("torchvision.models")
    except Exception as error:  # noqa: BLE001 - of another torch it raises a RuntimeError
        pytest.skip(f"torchvision cannot be imported: {error}")
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    torch.manual_seed(0)
    return models.get_model(name, weights=None, **options).eval()


@pytest.mark.parametrize("name", BACKBONES)
def test_equals_torchvision(name: str) -> None:
    """Strictly, both ways, with the same scores: the same operations on the same numbers."""
    theirs = torchvisions(name)
    ours = meta(name).eval()
    assert [*ours.state_dict()] == [*theirs.state_dict()]
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    ours.scaling = ours.default_scaling()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for side in (ours.native, 256):
        images = torch.rand(1, 3, side, side)
        with torch.no_grad():
            assert torch.equal(ours(images), theirs(ours.scaling(images)))


def test_googlenets_scaling_is_what_torchvision_arrives_at() -> None:
    theirs = torchvisions("googlenet")
    ours = GoogLeNet().eval()
    ours.load_state_dict(theirs.state_dict())
    theirs.transform_input = True
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(Scaling.imagenet()(images)))


@pytest.mark.parametrize("name", BACKBONES)
def test_any_size_that_the_layers_take_and_grey(name: str) -> None:
    net = BACKBONES[name](**NARROW).eval()
    with torch.no_grad():
        assert net(torch.rand(2, 3, 97, 65)).shape == (2, 5)
        grey = torch.rand(1, 1, 64, 64)
        assert torch.equal(net(grey), net(grey.expand(-1, 3, -1, -1)))


# Scaling


def test_scalings() -> None:
    images = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torchs = (images - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(Scaling.imagenet()(images), torchs)
    caffes = images[:, [2, 1, 0]] * 255 - torch.tensor(
        [[[104.00699]], [[116.66877]], [[122.67892]]]
    )
    torch.testing.assert_close(Scaling.caffe()(images), caffes, atol=1e-4, rtol=1e-6)
    assert torch.equal(Scaling()(images), images)
    assert Scaling.caffe()(images.float()).dtype == torch.float32


def test_scaling_is_saved_with_its_order() -> None:
    images = torch.rand(1, 3, 4, 5)
    other = nn.ModuleDict({"scaling": Scaling.imagenet()})
    other.load_state_dict(nn.ModuleDict({"scaling": Scaling.caffe((1, 2, 3))}).state_dict())
    assert torch.equal(other["scaling"](images), Scaling.caffe((1, 2, 3))(images))
    with torch.device("meta"):
        empty = Scaling.imagenet()
    empty.load_state_dict(Scaling.caffe().state_dict(), assign=True)
    assert torch.equal(empty(images), Scaling.caffe()(images))
    assert "bgr" in repr(empty)


def test_scaling_refuses() -> None:
    with pytest.raises(ValueError, match="mean: expected three numbers, got"):
        Scaling((1, 2))
    with pytest.raises(ValueError, match="std: expected three numbers above 0, got"):
        Scaling((1, 2, 3), (1, 0, 1))
    with pytest.raises(ValueError, match="order: expected 'rgb' or 'bgr', got 'gbr'"):
        Scaling(order="gbr")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\) or .*, got \(1, 4, 8, 8\)"):
        Scaling()(torch.zeros(1, 4, 8, 8))
    with pytest.raises(TypeError, match=r"floating tensor of 0..1, got torch.uint8"):
        Scaling()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_backbones_state_has_torchvisions_names_alone() -> None:
    net = SqueezeNet(**NARROW)
    net.scaling = Scaling.caffe()
    holder = nn.ModuleDict({"net": net})
    assert not [k for k in (*net.state_dict(), *holder.state_dict()) if "scaling" in k]
    before = net.scaling.state_dict()
    assert not [*net.load_state_dict(net.state_dict()).missing_keys]
    holder.load_state_dict(holder.state_dict())
    assert all(torch.equal(before[k], t) for k, t in net.scaling.state_dict().items())


# Encoders


@pytest.mark.parametrize("layout", ["published", "aligned"])
@pytest.mark.parametrize("name", BACKBONES)
def test_encoders_share_parameters(name: str, layout: Any) -> None:
    net = BACKBONES[name](**NARROW)
    before = {k: str(m) for k, m in net.named_modules()}
    encoder = net.encoder(layout)
    assert before == {k: str(m) for k, m in net.named_modules()}  # the classifier is as it was
    own = {id(t) for t in (*net.parameters(), *net.buffers())}
    memory = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    for key, tensor in (*encoder.named_parameters(), *encoder.named_buffers()):
        assert id(tensor) in own or key.startswith("head.")
        assert tensor.untyped_storage().data_ptr() in memory
    with torch.no_grad():
        assert [t.shape[1] for t in encoder(torch.rand(1, 3, 64, 64))] == [*encoder.channels]


@pytest.mark.parametrize("name", BACKBONES)
def test_aligned_maps_cover_the_image_and_nothing_else(name: str) -> None:
    encoder = meta(name, **NARROW).encoder("aligned").eval()
    for height in (*range(1, 10), 16, 17, 31, 32, 33, 65):
        width = 2 * height + 1
        maps = encoder(torch.empty(1, 3, height, width, device="meta"))
        for at, stride in zip(maps, (8, 16, 32), strict=True):
            assert at.shape[2:] == (-(-height // stride), -(-width // stride)), height


@pytest.mark.parametrize("name", BACKBONES)
def test_aligned_cells_stand_within_their_pixels(name: str) -> None:
    encoder = BACKBONES[name](**NARROW).encoder("aligned")
    for at in network.trace(encoder, (1, 3, 64, 96)).outputs:
        for axis in at.axes:
            assert 0 <= axis.shift < axis.scale


def test_published_vgg_is_that_of_the_release() -> None:
    encoder = meta("vgg16", **NARROW).encoder("published").eval()
    for size in (1, 31, 224, 375, 500):
        axes = chain(VGG16 | {"conv1_1": Conv(3, padding=100)}, size)
        maps = encoder(torch.empty(1, 3, size, size, device="meta"))
        for at, layer in zip(maps, ("pool3", "pool4", "fc7"), strict=True):
            assert at.shape[2:] == (axes[layer].size,) * 2, (size, layer)


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn", "alexnet"])
def test_head_is_the_classifier_without_its_last_layer(name: str) -> None:
    net = BACKBONES[name](**NARROW).double().eval()
    side, head = net.avgpool.output_size, net.encoder("published").eval().head
    at = torch.rand(2, net.channels[1], *side, dtype=torch.float64)
    if name == "alexnet":
        at = torch.rand(2, net.features[-3].out_channels, *side, dtype=torch.float64)
    expected = net.classifier[:-1](at.flatten(1))
    torch.testing.assert_close(head(at).flatten(1), expected)
    padded = net.encoder("aligned").eval().head(at)
    assert padded.shape[2:] == at.shape[2:]
    before = (side[0] - 1) // 2  # the one cell whose window is the whole map
    torch.testing.assert_close(padded[:, :, before, before], expected)


def test_unknown_layout() -> None:
    with pytest.raises(ValueError, match="layout: expected 'published' or 'aligned', got 'same'"):
        meta("vgg16", **NARROW).encoder("same")  # type: ignore[arg-type]


# Files


def write(path: Path, state: dict[str, Tensor]) -> Path:
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()})
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors", ".npz"])
@pytest.mark.parametrize("name", BACKBONES)
def test_reads_what_was_saved(name: str, suffix: str, tmp_path: Path) -> None:
    net = BACKBONES[name](**NARROW)
    path = write(tmp_path / f"weights{suffix}", net.state_dict())
    again = backbone(name, weights=path, **NARROW)
    assert same(net, again)
    assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))
    assert all(p.requires_grad for p in again.parameters())
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(net.eval()(images), again.eval()(images))


def test_reads_checkpoints_halves_and_old_normalisation(tmp_path: Path) -> None:
    net = VGG(batch_norm=True, **NARROW)
    state = {f"module.{k}": t.half() for k, t in net.state_dict().items() if "num_b" not in k}
    path = write(tmp_path / "checkpoint.pth", {"epoch": 3, "model": state})  # type: ignore[dict-item]
    again = backbone("vgg16_bn", weights=path, **NARROW)
    assert same(net.half().float(), again)


def test_leaves_out_auxiliary_classifiers(tmp_path: Path) -> None:
    net = GoogLeNet(**NARROW)
    more = {"aux1.fc1.weight": torch.zeros(2), "aux2.conv.bn.num_batches_tracked": torch.tensor(1)}
    path = write(tmp_path / "aux.pth", net.state_dict() | more)
    assert same(net, backbone("googlenet", weights=path, **NARROW))


def test_caffes_names_mean_caffes_network(tmp_path: Path) -> None:
    net = VGG(**NARROW)
    layers = [f"conv{b}_{k}" for b, n in enumerate((2, 2, 3, 3, 3), 1) for k in range(1, n + 1)]
    layers += ["fc6", "fc7", "fc8"]
    kinds = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    state = dict(zip(kinds, net.state_dict().values(), strict=True))
    again = backbone("vgg16", weights=write(tmp_path / "caffe.npz", state), **NARROW)
    assert same(net, again)
    assert again.scaling.order == "bgr"
    given = Scaling.caffe((1, 2, 3))
    path = tmp_path / "caffe.npz"
    assert backbone("vgg16", weights=path, scaling=given, **NARROW).scaling is given


def test_refuses_files(tmp_path: Path) -> None:
    path = write(tmp_path / "vgg.pth", VGG(**NARROW).state_dict())
    with pytest.raises(UserError, match=r"vgg.pth: expected the weights of alexnet, got other na"):
        backbone("alexnet", weights=path, **NARROW)
    with pytest.raises(UserError, match=r"expected classifier.6.weight of shape \(6, 128\) for vg"):
        backbone("vgg16", weights=path, **NARROW | {"classes": 6})
    with pytest.raises(UserError, match=r"none.pth: no such file"):
        backbone("vgg16", weights=tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"expected a file .pth, .pt, .safetensors, .npz, or one o"):
        backbone("vgg16", weights="hub")
    for suffix in (".pth", ".npz", ".safetensors"):
        broken = tmp_path / f"broken{suffix}"
        broken.write_bytes(b"none of these")
        with pytest.raises(UserError, match=rf"broken{suffix}: cannot be read as {suffix}: ."):
            backbone("vgg16", weights=broken)
    for what, text in [
        ([torch.zeros(1)], "expected a state dict of tensors, got list"),
        ({1: torch.zeros(1)}, "expected a state dict of tensors, got dict"),
        (nn.ReLU(), r"cannot be read as .pth: it is damaged, or holds more than tensors$"),
    ]:
        torch.save(what, path)
        with pytest.raises(UserError, match=text):
            backbone("vgg16", weights=path)
    state = VGG(**NARROW).state_dict()
    for key, tensor, text in [
        ("features.0.bias", torch.zeros(2, dtype=torch.int64), "to be floating, got torch.int64"),
        ("features.0.bias", torch.zeros(2) + 0j, "to be floating, got torch.complex64"),
        ("scaling.mean", torch.zeros(4), r"scaling.mean of shape \(3,\) .*, got \(4,\)"),
        ("scaling.gain", torch.zeros(3), "got other names: a 'scaling.gain'"),
    ]:
        torch.save(state | {key: tensor}, path)
        with pytest.raises(UserError, match=text):
            backbone("vgg16", weights=path, **NARROW)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot be read as .pth: EOFError"):
        backbone("vgg16", weights=path)
    with pytest.raises(UserError, match=r"timm: expected vgg16 or vgg16_bn, .*, got alexnet"):
        backbone("alexnet", weights="timm")
    with pytest.raises(ValueError, match=r"expected one of alexnet, .*vgg16_bn, got 'resnet'"):
        backbone("resnet")


@pytest.mark.parametrize("hub", ["torchvision", "timm"])
def test_hubs_that_are_not_there(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, hub, None)
    monkeypatch.delitem(sys.modules, f"{hub}.models", raising=False)
    with pytest.raises(UserError, match=rf"{hub} cannot be imported .*: install it, or give a"):
        backbone("vgg16", weights=hub)


# The real weights


PHOTOS = {  # ids of ImageNet that are right
    "cat_720p": {281, 282, 285},  # tabby, tiger, Egyptian cat
    "dragonfly": {319},
    "hot_dog": {934},
    "parrot": {88},  # macaw
    "sunflower": {985},  # daisy; ImageNet's 1000 have no sunflower
}


@pytest.fixture(scope="module")
def trained() -> Backbone:
    if not DATA.is_dir():
        pytest.skip("no shared/data")
    return backbone("squeezenet1_0", weights=DATA / "squeezenet/squeezenet10.npz").eval()


@pytest.mark.parametrize("photo", PHOTOS)
def test_photos_get_their_class(photo: str, trained: Backbone) -> None:
    image = Image.open(DATA / f"photos/{photo}.jpg").convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR
    )
    left, top = (image.width - 227) // 2, (image.height - 227) // 2
    image = image.crop((left, top, left + 227, top + 227))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        scores = trained(pixels)
    assert int(scores.argmax()) in PHOTOS[photo]
    if photo == "parrot":  # the figure that the weights' own notes give
        assert abs(float(scores.softmax(1)[0, 88]) - 0.92) < 0.01
