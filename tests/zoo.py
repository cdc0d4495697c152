"""Small networks of many kinds, to hold what is derived of them against what they do."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from segfuse import models

C = 4  # channels

Conv, Deconv = nn.Conv2d, nn.ConvTranspose2d


def seq(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def centre(x: Tensor, like: Tensor) -> Tensor:
    dy, dx = ((a - b) // 2 for a, b in zip(x.shape[2:], like.shape[2:], strict=True))
    return x[:, :, dy : dy + like.shape[2], dx : dx + like.shape[3]]


class Block(nn.Sequential):
    def __init__(self, i: int, o: int, padding: int, mode: str = "zeros") -> None:
        super().__init__(
            Conv(i, o, 3, padding=padding, padding_mode=mode),
            nn.BatchNorm2d(o),
            nn.ReLU(inplace=True),
            Conv(o, o, 3, padding=padding, padding_mode=mode),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    """A U-Net in plain torch: how it pads, pools, enlarges and fits skips can be chosen."""

    def __init__(
        self,
        padding: int = 1,
        *,
        up: str = "deconv",
        fit: str = "crop",
        mode: str = "zeros",
        pool: nn.Module | None = None,
        depth: int = 2,
    ) -> None:
        super().__init__()
        self.padding, self.up, self.fit, self.depth = padding, up, fit, depth
        width = [C * 2**i for i in range(depth + 1)]
        self.pool = pool or nn.MaxPool2d(2)
        self.down = nn.ModuleList(
            Block(i, o, padding, mode) for i, o in zip([1, *width], width, strict=False)
        )
        self.ups = nn.ModuleList(self._up(2 * c, c) for c in width[:-1])
        self.merge = nn.ModuleList(Block(2 * c, c, padding, mode) for c in width[:-1])
        self.head = Conv(C, 2, 1)

    def _up(self, i: int, o: int) -> nn.Module:
        made: dict[str, Callable[[], nn.Module]] = {
            "deconv": lambda: Deconv(i, o, 2, 2),
            "deconv3": lambda: Deconv(i, o, 3, 2, padding=1, output_padding=1),
            "deconv4": lambda: Deconv(i, o, 4, 2, padding=1),
            "shuffle": lambda: seq(Conv(i, 4 * o, 1), nn.PixelShuffle(2)),
        }
        if self.up in made:
            return made[self.up]()
        name, _, corners = self.up.partition("+")
        if name.startswith("size-"):
            return Conv(i, o, 1)
        options: dict[str, Any] = {} if "nearest" in name else {"align_corners": bool(corners)}
        return seq(Conv(i, o, 1), nn.Upsample(scale_factor=2, mode=name, **options))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, block in enumerate(self.down):
            x = block(x)
            if level < self.depth:
                skips.append(x)
                x = self.pool(x)
        for level in reversed(range(self.depth)):
            skip, x = skips[level], self.ups[level](x)
            if self.up.startswith("size-"):
                x = F.interpolate(x, size=skip.shape[2:], mode=self.up.removeprefix("size-"))
            if self.fit == "pad":
                dy, dx = (a - b for a, b in zip(skip.shape[2:], x.shape[2:], strict=True))
                x = F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
            elif self.fit == "cut":
                x = x[:, :, : skip.shape[2], : skip.shape[3]]
            else:
                skip = centre(skip, x)
            x = self.merge[level](torch.cat([skip, x], 1))
        logits: Tensor = self.head(x)
        return logits


class FCN8(nn.Module):
    """FCN-8s as released: padding of 100, pooling that rounds up, typed crop offsets."""

    def __init__(self) -> None:
        super().__init__()
        blocks, channels = [], 1
        for block, count in enumerate((2, 2, 3, 3, 3)):
            layers: list[nn.Module] = []
            for k in range(count):
                layers += [Conv(channels, C, 3, padding=1 if block or k else 100), nn.ReLU()]
                channels = C
            blocks.append(seq(*layers, nn.MaxPool2d(2, 2, ceil_mode=True)))
        self.blocks = nn.ModuleList(blocks)
        self.fc = seq(Conv(C, C, 7), nn.ReLU(), Conv(C, C, 1), nn.ReLU())
        self.score, self.score4, self.score3 = (Conv(C, 2, 1) for _ in range(3))
        self.up2, self.up4 = (Deconv(2, 2, 4, 2, bias=False) for _ in range(2))
        self.up8 = Deconv(2, 2, 16, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        def crop(t: Tensor, offset: int, like: Tensor) -> Tensor:
            h, w = like.shape[2:]
            return t[:, :, offset : offset + h, offset : offset + w]

        maps, h = [], x
        for block in self.blocks:
            h = block(h)
            maps.append(h)
        y = self.up2(self.score(self.fc(h)))
        y = y + crop(self.score4(maps[3]), 5, y)
        y = self.up4(y)
        y = y + crop(self.score3(maps[2]), 9, y)
        return crop(self.up8(y), 31, x)


class ConvNeXt(nn.Module):
    """A patch stem, a depthwise convolution, layer norm and linear layers over channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Conv(1, C, 4, 4)
        self.depthwise = Conv(C, C, 7, padding=3, groups=C)
        self.norm = nn.LayerNorm(C)
        self.wide, self.narrow = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)
        self.gamma = nn.Parameter(torch.ones(C))
        self.out = Conv(C, 32, 1)
        self.up = nn.PixelShuffle(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.narrow(F.gelu(self.wide(self.norm(y)))) * self.gamma
        shuffled: Tensor = self.up(self.out(x + y.permute(0, 3, 1, 2)))
        return shuffled


class HandMadeShuffle(nn.Module):
    """Pixel shuffle and its inverse, by view and permute."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.head = Conv(1, C, 3), Conv(4 * C, 4 * C, 3), Conv(C, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        x = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4)
        x = self.middle(x.reshape(n, 4 * c, h // 2, w // 2))
        h, w = x.shape[2:]
        x = x.view(n, c, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c, 2 * h, 2 * w)
        out: Tensor = self.head(x)
        return out


class SegNet(nn.Module):
    """Two levels of max-unpooling."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (Conv(i, C, 3, padding=1) for i in (1, C, C, C))
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x, first = self.pool(self.a(x))
        x, second = self.pool(self.b(x))
        x = self.c(self.unpool(x, second))
        out: Tensor = self.d(self.unpool(x, first))
        return out


class Masked(nn.Module):
    """Normalises by how many pixels a kernel saw: padding counts as none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv(1, 1, 5, padding=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x) / self.conv(torch.ones_like(x))
        return out


class SliceWise(nn.Module):
    """Convolves and resizes each slice of a volume by itself, then across slices."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = Conv(1, C, 3, 2, 1), nn.Conv3d(C, 2, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, x: Tensor) -> Tensor:
        n, c, d, h, w = x.shape
        x = x.transpose(1, 2).reshape(n * d, c, h, w)
        x = F.interpolate(self.inner(x).relu(), scale_factor=2, mode="bilinear")
        out: Tensor = self.outer(x.view(n, d, C, *x.shape[2:]).transpose(1, 2))
        return out


class Lambda(nn.Module):
    """A convolution, then any function of its result, or of it and of the image."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        super().__init__()
        self.conv = Conv(1, C, 3, padding=1, **options)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.conv(x))


class Branches(nn.Module):
    """Stacked, maximised and averaged branches, channels split, chosen and put together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Conv(1, C, 3, padding=1), Conv(1, C, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        both = torch.stack([a, b])
        most = both.max(0)[0]
        left, right = both.mean(0).chunk(2, 1)
        swapped = most[:, [2, 1, 0, 3]] * F.normalize(a) + b.flip(1)
        return torch.cat([swapped, left, torch.sigmoid(right), torch.zeros_like(left)], 1)


class Slices(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 1::2, 3:-2:3]


def stem() -> nn.Module:
    return seq(
        *(Conv(1, C, 7, 2, 3), nn.BatchNorm2d(C), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        *(Conv(C, C, 3, 1, 1), nn.PReLU(C), Conv(C, 2 * C, 3, 2, 1), nn.ReLU()),
        *(Conv(2 * C, 2 * C, 3, padding=2, dilation=2), nn.ReLU()),
        *(Deconv(2 * C, C, 4, 2, 1), nn.ReLU(), Deconv(C, C, 4, 2, 1), nn.ReLU()),
        Deconv(C, 2, 5, 2, 2, output_padding=1),
    )


def dilated(*, padded: bool) -> nn.Module:
    layers: list[nn.Module] = []
    for i, d in enumerate((1, 2, 4, 8, 1)):
        layers += [Conv(C if i else 1, C, 3, dilation=d, padding=d * padded), nn.ReLU()]
    return seq(*layers, Conv(C, 2, 1))


def up(scale: float, mode: str, step: int | None = None, **options: Any) -> nn.Module:
    step = int(step or scale)
    return seq(
        Conv(1, C, step, stride=step),
        Conv(C, C, 3, padding=1),
        nn.Upsample(scale_factor=scale, mode=mode, **options),
        Conv(C, 2, 3, padding=1),
    )


def monai(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        nets = pytest.importorskip("monai.networks.nets")
        given: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
        net: nn.Module = getattr(nets, name)(**given | options)
        return net

    return make


BASIC = {"features": (4, 4, 6, 6, 6, 4), "norm": "batch"}


def ours(**options: Any) -> Callable[[], nn.Module]:
    return lambda: models.UNet(1, 2, **{"base": 2, "depth": 3, **options})


# Name to (how to make it, a shape that leaves something sound, what size may be varied by).
ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "ours, as published": (ours(depth=4), (252, 252), (0,)),
    "ours, batch norm": (ours(norm="batch"), (124, 124), (0,)),
    "ours, padded": (ours(padding="same"), (112, 112), (0,)),
    "ours, padded, bilinear": (ours(padding="same", up="bilinear"), (128, 128), (0,)),
    "ours, bilinear": (ours(up="bilinear"), (156, 156), (0,)),
    "ours, unpooling": (ours(padding="same", up="unpool"), (112, 112), (0,)),
    "ours, 1-D": (ours(dims=1), (172,), (0,)),
    "ours, 1-D, bilinear": (ours(dims=1, padding="same", up="bilinear"), (128,), (0,)),
    "ours, 1-D, unpooling": (ours(dims=1, padding="same", up="unpool"), (112,), (0,)),
    "ours, 3-D": (ours(dims=3, depth=1, padding="same", norm="batch"), (24, 24, 24), (0,)),
    "ours, 3-D, unpooling": (
        ours(dims=3, depth=1, padding="same", up="unpool"),
        (24, 24, 24),
        (0,),
    ),
    "valid, centre crop": (lambda: UNet(0), (76, 76), (0, 1, 2, 3)),
    "deconvolution 3": (lambda: UNet(up="deconv3"), (64, 64), (0,)),
    "deconvolution 4": (lambda: UNet(up="deconv4"), (64, 64), (0,)),
    "nearest": (lambda: UNet(up="nearest"), (64, 64), (0,)),
    "nearest-exact": (lambda: UNet(up="nearest-exact"), (64, 64), (0,)),
    "bilinear": (lambda: UNet(up="bilinear"), (72, 72), (0,)),
    "bicubic": (lambda: UNet(up="bicubic"), (88, 88), (0,)),
    "pixel shuffle": (lambda: UNet(up="shuffle"), (64, 64), (0,)),
    "odd sizes, padded to the skip": (lambda: UNet(fit="pad"), (72, 72), (0, 1, 2, 3)),
    "odd sizes, cut to the skip": (
        lambda: UNet(fit="cut", pool=nn.MaxPool2d(2, ceil_mode=True)),
        (72, 72),
        (0, 1, 2, 3),
    ),
    "sized to the skip, nearest": (lambda: UNet(up="size-nearest"), (72, 72), (0,)),
    "sized to the skip, bilinear": (lambda: UNet(up="size-bilinear"), (80, 80), (0,)),
    "reflected": (lambda: UNet(mode="reflect"), (64, 64), (0,)),
    "replicated": (lambda: UNet(mode="replicate"), (64, 64), (0,)),
    "mean pooling": (
        lambda: UNet(up="deconv3", pool=nn.AvgPool2d(3, 2, 1)),
        (72, 72),
        (0,),
    ),
    "mean pooling, padding not counted": (
        lambda: UNet(up="deconv3", pool=nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
        (72, 72),
        (0,),
    ),
    "dilated": (lambda: dilated(padded=True), (51, 48), (0, 1)),
    "dilated, valid": (lambda: dilated(padded=False), (51, 48), (0, 1)),
    "strided stem": (stem, (104, 104), (0, 1, 3, 5)),
    "FCN-8s": (FCN8, (449, 481), (0,)),
    "rounding up": (
        lambda: seq(
            *(Conv(1, C, 3, padding=1), nn.MaxPool2d(3, 2, ceil_mode=True)),
            *(Conv(C, C, 3, padding=1), nn.AvgPool2d(3, 2, padding=1, ceil_mode=True)),
            Conv(C, 2, 3, padding=1),
        ),
        (51, 48),
        (0, 1, 2, 3),
    ),
    "even kernels": (
        lambda: seq(
            *(Conv(1, C, 4, padding="same"), nn.ReLU(), Conv(C, C, 2, padding="same", dilation=3)),
            *(nn.ReLU(), Conv(C, 2, 6, padding="same")),
        ),
        (31, 32),
        (0, 1),
    ),
    "asymmetric": (
        lambda: seq(
            *(nn.ZeroPad2d((1, 2, 0, 3)), Conv(1, C, 4), nn.ReLU(), nn.MaxPool2d(2, 1)),
            *(nn.ZeroPad2d((1, 0, 1, 0)), Conv(C, 2, 3, padding=1)),
        ),
        (31, 32),
        (0, 1),
    ),
    "cropped by padding": (
        lambda: seq(Conv(1, C, 5, padding=6), nn.ZeroPad2d((-3, 1, -1, -4)), Conv(C, 2, 3)),
        (31, 32),
        (0, 1),
    ),
    "reflected in front": (
        lambda: seq(nn.ReflectionPad2d(6), Conv(1, C, 7), nn.ReLU(), Conv(C, C, 7)),
        (41, 42),
        (0, 1),
    ),
    "every second element": (
        lambda: seq(Conv(1, C, 3), Slices(), Conv(C, 2, 3, padding=1)),
        (40, 41),
        (0, 1, 2, 3),
    ),
    "nearest by 3": (lambda: up(3, "nearest"), (42, 42), (0, 1, 2)),
    "halved, bilinear": (lambda: up(0.5, "bilinear", 1), (41, 40), (0, 1)),
    "by a third, bicubic": (lambda: up(1 / 3, "bicubic", 1), (45, 48), (0, 1, 2)),
    "by a quarter, bicubic": (lambda: up(1 / 4, "bicubic", 1), (52, 48), (0, 1, 2)),
    "by a third, nearest": (lambda: up(1 / 3, "nearest", 1), (45, 48), (0, 1)),
    "by a quarter, nearest-exact": (lambda: up(1 / 4, "nearest-exact", 1), (52, 48), (0, 1)),
    "ConvNeXt": (ConvNeXt, (48, 52), (0, 1, 2, 3)),
    "shuffled by hand": (HandMadeShuffle, (34, 38), (0,)),
    "SegNet": (SegNet, (48, 52), (0,)),
    "masked": (Masked, (25, 26), (0,)),
    "branches": (Branches, (20, 21), (0,)),
    "slice by slice": (SliceWise, (8, 20, 22), (0,)),
    "anisotropic": (
        lambda: seq(
            nn.Conv3d(1, C, (1, 3, 3), padding=(0, 1, 1)),
            nn.MaxPool3d((1, 2, 2)),
            nn.Conv3d(C, C, (3, 3, 3), padding=(1, 1, 0)),
            nn.Upsample(scale_factor=(1, 2, 2), mode="trilinear"),
            nn.Conv3d(C, 2, (3, 1, 3), padding=(1, 0, 1)),
        ),
        (12, 28, 32),
        (0,),
    ),
    "1-D": (
        lambda: seq(
            *(nn.Conv1d(1, C, 9, 2, 4), nn.ReLU(), nn.MaxPool1d(3, 2, 1)),
            *(nn.Conv1d(C, C, 3, padding=3, dilation=3), nn.ReLU()),
            *(nn.ConvTranspose1d(C, C, 4, 2, 1), nn.Upsample(scale_factor=2, mode="linear")),
            nn.AvgPool1d(3, 1, 1),
        ),
        (96,),
        (0, 1, 2, 3),
    ),
    "MONAI BasicUNet": (monai("BasicUNet", **BASIC), (224, 221), (0,)),
    "MONAI BasicUNet, shuffled": (
        monai("BasicUNet", **BASIC | {"features": (4,) * 6}, upsample="pixelshuffle"),
        (304, 304),
        (0,),
    ),
    "MONAI UNet": (
        monai("UNet", channels=(4, 6, 6), strides=(2, 2), num_res_units=2, norm="batch"),
        (72, 72),
        (0,),
    ),
    "MONAI DynUNet": (
        monai(
            "DynUNet",
            kernel_size=[3, 3, 3],
            strides=[1, 2, 2],
            upsample_kernel_size=[2, 2],
            norm_name="batch",
            filters=[4, 6, 6],
        ),
        (72, 72),
        (0,),
    ),
    "MONAI BasicUNetPlusPlus": (monai("BasicUNetPlusPlus", **BASIC), (224, 224), (0,)),
}


# Those whose interpolations sample at positions of the whole image, with a shape.
POSITIONED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "corners aligned": (lambda: UNet(up="bilinear+corners"), (88, 92)),
    "corners aligned, cubic": (lambda: UNet(up="bicubic+corners"), (112, 108)),
    "sized to odd skips, bilinear": (lambda: UNet(up="size-bilinear"), (91, 93)),
    "sized to odd skips, nearest": (lambda: UNet(up="size-nearest"), (89, 94)),
    "sized to odd skips, nearest-exact": (lambda: UNet(up="size-nearest-exact"), (89, 94)),
    "sized to odd skips, bicubic": (lambda: UNet(up="size-bicubic"), (115, 113)),
    "by 3, bilinear": (lambda: up(3, "bilinear"), (60, 66)),
    "by 5, bicubic": (lambda: up(5, "bicubic"), (90, 95)),
    "by 3/2, bilinear": (lambda: up(1.5, "bilinear", 1), (32, 33)),
    "by 5/2, nearest": (lambda: up(2.5, "nearest", 1), (32, 31)),
    "by 3, corners, 1-D": (
        lambda: seq(
            nn.Conv1d(1, C, 3, padding=1),
            nn.Upsample(scale_factor=3, mode="linear", align_corners=True),
            nn.Conv1d(C, 2, 3, padding=1),
        ),
        (40,),
    ),
    "anisotropic, corners": (
        lambda: seq(
            nn.Conv3d(1, C, 3, padding=1),
            nn.Upsample(scale_factor=(1, 2, 3), mode="trilinear", align_corners=True),
            nn.Conv3d(C, 2, 3, padding=1),
        ),
        (12, 16, 20),
    ),
    "MONAI BasicUNet, nontrainable": (
        monai("BasicUNet", **BASIC, upsample="nontrainable"),
        (288, 304),
    ),
}


# Networks that look everywhere, with the layer to be named: of a `Lambda` the operation's own name.


class PositionalEmbedding(Lambda):
    def __init__(self) -> None:
        super().__init__(lambda x: x + self.embedding)
        self.embedding = nn.Parameter(torch.randn(1, C, 64, 64))


class Cached(Lambda):
    """Keeps a table that it makes for the first size that it sees."""

    def __init__(self) -> None:
        super().__init__(lambda x: x)
        self.register_buffer("table", None)

    def forward(self, x: Tensor) -> Any:
        self.table = torch.arange(x.shape[2])
        return super().forward(x) + self.table


class Coordinates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Conv(2, C, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        ramp = torch.linspace(-1, 1, x.shape[3]).expand_as(x)
        out: Tensor = self.conv(torch.cat([x, ramp], 1))
        return out


def attention(x: Tensor) -> Tensor:
    q = x.flatten(2)
    mixed = torch.softmax(q.transpose(1, 2) @ q, -1) @ q.transpose(1, 2)
    return mixed.transpose(1, 2).reshape(x.shape)


def write_border(x: Tensor) -> Tensor:
    x = x * 2
    x[:, :, 0] = 0
    return x + 1


def write_view(x: Tensor) -> Tensor:
    x = x * 2
    x[:, :2].mul_(F.avg_pool2d(x[:, :2], 5, 1, 2))
    return x + 1


def write_flat(x: Tensor) -> Tensor:
    x = x * 2
    x.view(*x.shape[:2], -1).add_(F.avg_pool2d(x, 5, 1, 2).flatten(2))  # no map to be followed
    return x + 1


def write_wide(x: Tensor) -> Tensor:
    x = x * 2
    F.dropout(x, 0.5, training=False).mul_(F.avg_pool2d(x, 5, 1, 2))
    return x


def write_constant(x: Tensor) -> Tensor:
    zeros = torch.zeros(x.shape[2:])
    zeros[0] = 1
    return x + zeros


def pooled_positions(x: Tensor) -> Tensor:
    most, where = F.max_pool2d(x, 2, return_indices=True)
    return most + where


def outer(x: Tensor) -> Tensor:
    return x.mean(2, keepdim=True) * x


def lam(function: Callable[..., Any]) -> Callable[[], nn.Module]:
    return lambda: Lambda(function)


def two(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: seq(Conv(1, C, 3, padding=1), *layers)


EVERYWHERE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "instance norm": (two(nn.InstanceNorm2d(C)), "1"),
    "group norm": (two(nn.GroupNorm(2, C)), "1"),
    "batch norm of its own": (two(nn.BatchNorm2d(C, track_running_stats=False)), "1"),
    "layer norm over space": (two(nn.LayerNorm((64, 64))), "1"),
    "softmax over space": (two(nn.Softmax(3)), "1"),
    "circular padding": (lambda: seq(Conv(1, C, 3, padding=1, padding_mode="circular")), "0"),
    "flatten": (two(nn.Flatten(), nn.Linear(C * 64 * 64, 3)), "1"),
    "adaptive pooling": (two(nn.AdaptiveAvgPool2d(8)), "1"),
    "table of its own": (Cached, "add"),
    "positional embedding": (PositionalEmbedding, "add"),
    "coordinates": (Coordinates, "cat"),
    "squeeze and excite": (lam(lambda x: x * x.mean((2, 3), keepdim=True).sigmoid()), "mean"),
    "pooled to one": (
        lam(lambda x: x * F.adaptive_avg_pool2d(x, 1).sigmoid()),
        "adaptive_avg_pool2d",
    ),
    "window as large as the map": (lam(lambda x: x + F.avg_pool2d(x, x.shape[2:])), "add"),
    "attention": (lam(attention), "flatten"),
    "scaled dot product": (
        lam(lambda x: F.scaled_dot_product_attention(x, x, x)),
        "scaled_dot_product_attention",
    ),
    "flip": (lam(lambda x: x + x.flip(-1)), "flip"),
    "roll": (lam(lambda x: x + x.roll(1, 2)), "roll"),
    "normalised by its own mean": (lam(lambda x: (x - x.mean()) / x.std()), "mean"),
    "largest value": (lam(lambda x: x / x.amax()), "amax"),
    "sorted": (lam(lambda x: x.sort(3)[0]), "sort"),
    "cumulative": (lam(lambda x: x.cumsum(2)), "cumsum"),
    "transposed": (lam(lambda x: x + x.transpose(2, 3)), "add"),
    "over the other axis": (lam(outer), "mean"),
    "by the other's channels": (lam(lambda x: x.unsqueeze(-1) + x.unsqueeze(-2)), "add"),
    "gathered": (lam(lambda x: x[:, :, torch.arange(64) // 2]), "index"),
    "unfolded": (
        lam(lambda x: F.fold(F.unfold(x, 3, padding=1), (64, 64), 3, padding=1)),
        "im2col",
    ),
    "antialiased": (
        lam(lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True)),
        "_upsample_bilinear2d_aa",
    ),
    "resized by its size": (lam(lambda x: F.interpolate(x, size=(24, 24))), "upsample_nearest2d"),
    "grid sample": (
        lam(lambda x: F.grid_sample(x, torch.zeros(1, 64, 64, 2), align_corners=False)),
        "grid_sampler",
    ),
    "Fourier": (lam(lambda x: torch.fft.ifft2(torch.fft.fft2(x)).real), "fft_fft2"),
    "complex": (lam(lambda x: torch.view_as_real(torch.complex(x, x))[..., 0]), "complex_1"),
    "einsum along space": (lam(lambda x: torch.einsum("nchw,nchv->nchw", x, x)), "einsum"),
    "matrix product along space": (lam(lambda x: x @ torch.ones(64, 64)), "matmul"),
    "weights of each row": (
        lam(lambda x: (x.permute(0, 2, 3, 1) @ torch.rand(64, C, C)).permute(0, 3, 1, 2)),
        "matmul",
    ),
    "kernel of the image": (
        lam(lambda x: F.conv2d(torch.ones(1, 1, 64, 64), x[0, :, None])),
        "conv2d_1",
    ),
    "batch norm over rows": (
        lam(lambda x: F.batch_norm(x.transpose(1, 2), torch.rand(64), torch.rand(64) + 1)),
        "batch_norm",
    ),
    "mirrored halves": (lam(lambda x: sum(x.chunk(2, 2))), "chunk"),
    "side by side": (lam(lambda x: torch.cat([x, x], 2)[:, :, ::2]), "cat"),
    "repeated": (lam(lambda x: x.tile(1, 1, 2, 1)[:, :, ::2]), "tile"),
    "one row": (lam(lambda x: x + x[:, :, 0:1]), "add"),
    "first row": (lam(lambda x: x + x[:, :, 0].unsqueeze(2)), "select"),
    "border written": (lam(write_border), "fill_"),
    "view written": (lam(write_view), "mul_"),
    "view without axes written": (lam(write_flat), "view"),
    "copy that is none written": (lam(write_wide), "mul_"),
    "constant written": (lam(write_constant), "add"),
    "positions of maxima": (lam(pooled_positions), "add"),
    "noise": (lam(lambda x: x + torch.randn_like(x)), "randn_like"),
    "dropout that stays on": (lam(lambda x: F.dropout(x, 0.5, training=True)), "dropout"),
    "random scale": (lam(lambda x: x * torch.rand(1)), "rand"),
    "random mask": (lam(lambda x: x * torch.rand(x.shape[2:])), "rand"),
    "padded by counting": (
        lam(lambda x: x / F.conv2d(torch.ones(1, 1, 64, 64), torch.ones(1, 1, 3, 3), padding=1)),
        "div",
    ),
    "branch on the mean": (
        lam(lambda x: torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t - 1, (x,))),
        "sum_1",
    ),
    "MONAI SegResNet": (monai("SegResNet", init_filters=8), "down_layers.0.1.norm1"),
    "MONAI BasicUNet": (
        monai("BasicUNet", features=(6, 6, 8, 8, 8, 6)),
        "conv_0.conv_0.adn.N",
    ),
    "MONAI AttentionUnet": (
        monai("AttentionUnet", channels=(8, 16), strides=(2,)),
        "model.1.merge.adn.N",
    ),
}

# Networks that do other things at other sizes, without looking everywhere at one.
SIZED: dict[str, Callable[[], nn.Module]] = {
    "divided by its width": lam(lambda x: x / x.shape[-1]),
    "divided by a tensor of its width": lam(lambda x: x / torch.tensor(x.shape[2])),
    "divided by how many there are": lam(lambda x: x / torch.ones(x.shape[2:]).sum()),
    "filled with its width": lam(lambda x: x + torch.full((1, 1, *x.shape[2:]), 1 / x.shape[2])),
    "mean of its coordinates": lam(lambda x: x * torch.arange(x.shape[2]).float().mean()),
    "length of its coordinates": lam(lambda x: x * torch.linspace(0, 1, x.shape[2])[1]),
    "dilated by its size": lam(lambda x: F.max_pool2d(x, 3, 1, 1 if x.shape[2] > 64 else 0)),
    "another layer when large": lam(lambda x: x.relu() if x.shape[2] > 64 else x.sigmoid()),
    "cut to a fixed size": lam(lambda x: x[:, :, :32]),
    "the last rows": lam(lambda x: x[:, :, -32:]),
    "half of it": lam(lambda x: x[:, :, : x.shape[2] // 2]),
    "padded to a fixed size": lam(lambda x: F.pad(x, (0, 100 - x.shape[3]))),
    "resized to a fixed size": lam(
        lambda x: F.interpolate(F.interpolate(x, size=(32, 32)), size=x.shape[2:])
    ),
    "unfolded in two": lam(lambda x: x.view(1, C, 2, 32, -1).mean(3) if x.shape[2] == 64 else x),
}


class Branch(Lambda):
    def __init__(self) -> None:
        super().__init__(lambda x: x + 1 if x.sum() > 0 else x - 1)


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


UNREADABLE: dict[str, Callable[[], nn.Module]] = {
    "branch on values": Branch,
    "loop on values": lam(lambda x: x * int(x.abs().max())),
    "NumPy": lam(lambda x: torch.from_numpy(x.numpy() * 2)),
    "two inputs": TwoInputs,
    "no map": lam(lambda x: x.mean((2, 3))),
    "an axis turned": lam(lambda x: x.transpose(2, 3)),
    "channels last": lam(lambda x: x.permute(0, 2, 3, 1)),
    "a constant": lam(lambda x: torch.ones(1, 2, 64, 64)),
    "positions": lam(lambda x: F.max_pool2d(x, 2, return_indices=True)[1]),
    "nothing": lam(lambda x: None),
    "fails": lam(lambda x: x.view(3, 5)),
}


def autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = x * 2
    return x.float()


def in_place(x: Tensor) -> Tensor:
    y = x.mul_(2)
    y += 1
    return y.relu_().clamp_(0, 1)


# A convolution, and after it what changes nothing in where its elements come from.
HARMLESS: dict[str, Callable[[], nn.Module]] = {
    "zeros joined": lam(lambda x: torch.cat([x, x.new_zeros(1, 2, *x.shape[2:])], 1)),
    "ones joined": lam(lambda x: torch.cat([x, torch.ones(1, 2, *x.shape[2:]) * 0.5 + 1], 1)),
    "a constant in the map's shape": lam(
        lambda x: x * torch.tensor([1.0, 2, 3, 4]).view(1, C, 1, 1).type_as(x).expand_as(x)
    ),
    "a constant a channel": lam(
        lambda x: x + torch.tensor([1.0, 2, 3, 4]).view(1, C, 1, 1).expand(-1, -1, *x.shape[2:])
    ),
    "channels chosen": lam(lambda x: x[:, [2, 1, 0]]),
    "channels turned": lam(lambda x: x.flip(1).roll(1, 1)),
    "channels reduced": lam(lambda x: x.max(1, keepdim=True)[0] + x.mean(1, keepdim=True)),
    "labels": lam(lambda x: x.argmax(1)),
    "softmax": lam(lambda x: x.softmax(1).log_softmax(1)),
    "normalised": lam(F.normalize),
    "response normalised": lam(lambda x: F.local_response_norm(x, 2)),
    "stacked": lam(lambda x: torch.stack([x, x * 2]).mean(0)),
    "split": lam(lambda x: sum(x.unbind(1))),
    "gated": lam(lambda x: F.glu(x, 1)),
    "masked": lam(lambda x: torch.where(x > 0, x, torch.zeros_like(x)).masked_fill(x < 1, 0.5)),
    "larger of two": lam(lambda x: torch.max(x, x * 2)),
    "typed as another": lam(lambda x: x.type_as(F.max_pool2d(x, 2)).to(x[:, :, 1:])),
    "compiled": lambda: torch.compile(Lambda(torch.relu), backend="eager"),  # type: ignore[dict-item]
    "autocast": lam(autocast),
    "in place": lam(in_place),
    "a constant through dropout": lam(
        lambda x: x + F.dropout(torch.tensor([1.0, 2, 3, 4]), 0.5, False).view(1, C, 1, 1)
    ),
    "dropout that is off": two(nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout(), nn.RReLU()),
    "shuffled channels": two(nn.ChannelShuffle(2)),
    "learned slopes": two(nn.PReLU(C)),
    "instance norm that tracks": two(nn.InstanceNorm2d(C, track_running_stats=True)),
    "norm over channels": lam(lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (C,)).movedim(-1, 1)),
    "a class beside the map": lam(lambda x: (x, x.mean((2, 3)), F.adaptive_max_pool2d(x, 1))),
    "several outputs": lam(lambda x: {"out": x, "twice": x * 2}),
    "identity": two(nn.Identity(), nn.Upsample(scale_factor=1, mode="bilinear")),
    "checkpointed": lam(
        lambda x: torch.utils.checkpoint.checkpoint(torch.relu, x, use_reentrant=False)
    ),
}


# Random networks


class Step(nn.Module):
    """A random layer of one or two dimensions, with sizes of its own along each."""

    KINDS = (
        *("conv", "conv", "conv", "stride", "max", "mean", "deconv", "nearest", "linear", "cubic"),
        *("pad", "crop", "halve", "fit", "sum"),
    )

    def __init__(self, draw: random.Random, channels: int, rank: int) -> None:
        super().__init__()
        self.rank, self.kind = rank, draw.choice(self.KINDS)

        def each(choose: Callable[[], int]) -> tuple[int, ...]:
            return tuple(choose() for _ in range(rank))

        k, d = each(lambda: draw.randint(1, 5)), each(lambda: draw.choice((1, 1, 2, 3)))
        s = each(lambda: draw.choice((1, 2, 2, 3)))
        p = tuple(draw.randint(0, a * (b - 1)) for a, b in zip(d, k, strict=True))
        wide = tuple(max(2, n) for n in k)
        within = tuple(draw.randint(0, n // 2) for n in wide)
        ceil, counted = draw.random() < 0.5, draw.random() < 0.5
        border = draw.choice(("zeros", "zeros", "reflect", "replicate"))
        rest, less = tuple(draw.randint(0, n - 1) for n in s), each(lambda: draw.randint(0, 1))
        conv, up, most, mean = (
            (nn.Conv1d, nn.ConvTranspose1d, nn.MaxPool1d, nn.AvgPool1d)
            if rank == 1
            else (nn.Conv2d, nn.ConvTranspose2d, nn.MaxPool2d, nn.AvgPool2d)
        )
        made: dict[str, Callable[[], nn.Module]] = {
            "conv": lambda: conv(channels, channels, k, 1, p, d, padding_mode=border),
            "stride": lambda: conv(channels, channels, k, s, p, d),
            "max": lambda: most(wide, s, within, 1, False, ceil),
            "mean": lambda: mean(wide, s, within, ceil, counted),
            "deconv": lambda: up(channels, channels, wide, s, less, rest),
        }
        self.inner = made.get(self.kind, nn.Identity)()
        self.factor = draw.choice((2, 2, 3, 4))
        self.widths = [draw.randint(0, 4) for _ in range(2 * rank)]
        self.border = draw.choice(("constant", "reflect", "replicate"))
        self.mode = draw.choice(("nearest", "linear"))

    def forward(self, x: Tensor) -> Tensor:
        sizes = x.shape[2:]
        if self.kind in {"nearest", "linear", "cubic"}:
            x = self._resized(x, self.kind, scale_factor=self.factor)
        elif self.kind == "halve":
            x = self._resized(x, self.mode, scale_factor=1 / self.factor)
        elif self.kind == "pad":
            x = F.pad(x, self.widths, mode=self.border)
        elif self.kind == "crop":
            for k in range(self.rank):
                a, b = self.widths[2 * k : 2 * k + 2]
                x = x.narrow(2 + k, a, x.shape[2 + k] - a - b)
        elif self.kind == "fit":
            x = F.max_pool1d(x, 2) if self.rank == 1 else F.max_pool2d(x, 2)
            x = self._resized(x, self.mode, size=sizes)
        elif self.kind == "sum":
            x = x + F.relu(x)
        else:
            x = self.inner(x)
        return x

    def _resized(self, x: Tensor, mode: str, **where: Any) -> Tensor:
        if self.rank == 1:
            mode = "nearest" if mode == "cubic" else mode
        else:
            mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
        return F.interpolate(x, mode=mode, **where)


class Random(nn.Module):
    """Random layers; now and then an earlier map is cropped to the newest one, and joined."""

    def __init__(self, draw: random.Random, rank: int) -> None:
        super().__init__()
        conv = nn.Conv1d if rank == 1 else nn.Conv2d
        self.first = conv(1, 3, 3, padding=1)
        self.steps = nn.ModuleList(Step(draw, 3, rank) for _ in range(draw.randint(2, 6)))
        self.joins = [draw.random() < 0.5 for _ in self.steps]
        self.mix = conv(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.first(x)]
        for step, joins in zip(self.steps, self.joins, strict=True):
            y = torch.relu(step(maps[-1]))
            skip = next((old for old in reversed(maps[:-1]) if fits(old, y)), None)
            if joins and skip is not None:
                for k, n in enumerate(y.shape[2:], 2):
                    skip = skip.narrow(k, (skip.shape[k] - n) // 2, n)
                y = self.mix(torch.cat([skip, y], 1))
            maps.append(y)
        return maps[-1]


def fits(skip: Tensor, y: Tensor) -> bool:
    return all(0 <= a - b <= 9 for a, b in zip(skip.shape[2:], y.shape[2:], strict=True))
