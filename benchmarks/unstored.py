"""Measures what each operator does not store: peak memory, ours against plain PyTorch.

    python benchmarks/unstored.py --threads 2 --json benchmarks/results/unstored-local.json
    python benchmarks/unstored.py --only upsample_argmax predict

Each side of each case runs in processes of its own, once at a quarter of the side length, so that
libraries and threads have what they need, and then once in full.  What counts is by how much the
peak of resident memory in that call exceeds what was resident before it, so its results and not its
inputs: the median of the repeats.  The C library has one arena, and is told to map every block
above 64 KiB and to give back what is freed, so that no call is given memory of an earlier one;
large pages are off, since they round sizes up to 2 MiB.  Linux alone counts so.

Plain PyTorch is what a user would write.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import segfuse
from segfuse import ops
from segfuse.models import FCN
from segfuse.models.backbones import BACKBONES
from segfuse.ops.label_distances import discs

MIB = 2**20
Call = Callable[[], Any]
Make = Callable[[int], tuple[Call, Call]]
CASES: dict[str, tuple[Make, str, str, tuple[int, ...]]] = {}
ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
ENVIRONMENT |= {"MALLOC_TRIM_THRESHOLD_": "0", "SEGFUSE_LARGE_PAGES": "0"}


def case(name: str, unstored: str, *counts: int) -> Callable[[Make], Make]:
    """Add what makes ours and the plain call of a case, of sides divided by a number.

    `counts`: whose product is the bytes of what is not stored.
    """

    def added(make: Make) -> Make:
        CASES[make.__name__[1:]] = make, name, unstored, counts
        return make

    return added


@case("`crop_concat`, level 1 of U-Net, and backward", "the cropped skip", 64, 392**2, 4)
def _crop_concat(by: int) -> tuple[Call, Call]:
    small, large = 392 // by, 568 // by
    both = [torch.rand(1, 64, n, n, requires_grad=True) for n in (large, small)]
    grad = torch.ones(1, 128, small, small)
    return (
        lambda: torch.autograd.grad(ops.crop_concat(*both), both, grad),
        lambda: torch.autograd.grad(torch.cat([cropped(both[0], small), both[1]], 1), both, grad),
    )


@case("`upconv_concat`, the same level", "the upsampled map", 64, 392**2, 4)
def _upconv_concat(by: int) -> tuple[Call, Call]:
    small, large = 196 // by, 568 // by
    skip, x = torch.rand(1, 64, large, large), torch.rand(1, 128, small, small)
    up = torch.rand(128, 64, 2, 2), torch.rand(64)
    return (
        lambda: ops.upconv_concat(skip, x, *up),
        lambda: torch.cat([cropped(skip, 2 * small), F.conv_transpose2d(x, *up, stride=2)], 1),
    )


@case("`deconv_upsample`, 150 classes, a skip added", "what it is added to", 150, 274**2, 4)
def _deconv_upsample(by: int) -> tuple[Call, Call]:
    side = 128 // by
    x, weight = torch.rand(1, 150, side + 8, side + 8), torch.rand(150, 1, 4, 4)
    skip = torch.rand(1, 150, 2 * side, 2 * side)
    return (
        lambda: ops.deconv_upsample(x, weight[:, 0], factor=2, offset=9, skip=skip),
        lambda: cropped(F.conv_transpose2d(x, weight, None, 2, 0, 0, 150), 2 * side) + skip,
    )


@case("`weighted_cross_entropy`, and backward", "log-probabilities", 21, 512**2, 4)
def _weighted_cross_entropy(by: int) -> tuple[Call, Call]:
    side = 512 // by
    logits = torch.rand(1, 21, side, side, requires_grad=True)
    target, weights = torch.randint(21, (1, side, side)), torch.rand(1, side, side)

    def plain() -> Any:
        loss = F.cross_entropy(logits, target, reduction="none") * weights
        return torch.autograd.grad(loss.sum() / weights.sum(), logits)

    ours = partial(ops.weighted_cross_entropy, logits, target, weight_map=weights)
    return lambda: torch.autograd.grad(ours(), logits), plain


@case("`upsample_argmax`, 128² to 512²", "full scores", 150, 512**2, 4)
def _upsample_argmax(by: int) -> tuple[Call, Call]:
    side = 128 // by
    scores, size = torch.rand(1, 150, side, side), (4 * side, 4 * side)
    return (
        lambda: ops.upsample_argmax(scores, size=size),
        lambda: F.interpolate(scores, size, mode="bilinear").argmax(1),
    )


@case("`upsample_cross_entropy`, and backward", "full scores thrice", 3, 150, 512**2, 4)
def _upsample_cross_entropy(by: int) -> tuple[Call, Call]:
    side = 128 // by
    scores = torch.rand(1, 150, side, side, requires_grad=True)
    target = torch.randint(150, (1, 4 * side, 4 * side))

    def plain() -> Any:  # stores scores, log-probabilities, gradients
        full = F.interpolate(scores, target.shape[1:], mode="bilinear")
        return torch.autograd.grad(F.cross_entropy(full, target, ignore_index=255), scores)

    return lambda: torch.autograd.grad(ops.upsample_cross_entropy(scores, target), scores), plain


@case("`gather_tiles`, 4 of an RGB image of bytes", "it as floats, padded", 3, 4280**2, 4)
def _gather_tiles(by: int) -> tuple[Call, Call]:
    side, tile, m = 4096 // by, 572 // by, 92 // by
    image = torch.randint(256, (3, side, side), dtype=torch.uint8)
    corners = [(y, x) for y in (-m, side + m - tile) for x in (-m, side + m - tile)]

    def plain() -> Tensor:
        padded = F.pad(image[None].float() / 255, (m, m, m, m), mode="reflect")[0]
        return torch.stack([padded[:, y + m :, x + m :][:, :tile, :tile] for y, x in corners])

    options: Any = {"dtype": torch.float32, "scale": 1 / 255}
    return lambda: ops.gather_tiles(image, corners, (tile, tile), **options), plain


@case("`stitch_tiles`, 16 tiles to labels", "scores of the image", 21, 1024**2, 4)
def _stitch_tiles(by: int) -> tuple[Call, Call]:
    side = 256 // by
    tiles, size = torch.rand(16, 21, side, side), (4 * side, 4 * side)
    corners = [(y, x) for y in range(0, size[0], side) for x in range(0, size[1], side)]

    def plain() -> Tensor:
        scores = torch.empty(21, *size)
        for scored, (y, x) in zip(tiles, corners, strict=True):
            scores[:, y : y + side, x : x + side] = scored
        return scores.argmax(0)

    return lambda: ops.stitch_tiles(tiles, corners, size, argmax=True), plain


@case("`elastic_deform`, 2048² and labels", "the dense field, y and x", 2, 2048**2, 4)
def _elastic_deform(by: int) -> tuple[Call, Call]:
    side = 2048 // by
    image, grid = torch.rand(1, 1, side, side), 10 * torch.randn(1, 2, 3, 3)
    labels = torch.randint(2, (1, side, side), dtype=torch.uint8)

    def plain() -> Any:
        field = F.interpolate(grid, (side, side), mode="bicubic", align_corners=True)
        at = torch.arange(side)
        place = torch.stack([at + field[:, 1], at[:, None] + field[:, 0]], -1) * (2 / (side - 1))
        place -= 1
        ids = F.grid_sample(labels[:, None].float(), place, "nearest", "reflection", True)[:, 0]  # noqa: FBT003
        deformed = F.grid_sample(image, place, "bicubic", "reflection", align_corners=True)
        return deformed, ids.to(labels.dtype)

    return lambda: ops.elastic_deform(image, grid, labels=labels), plain


@case("`unet_weight_map`, 50 cells", "a distance map a cell", 50, 512**2, 8)
def _unet_weight_map(by: int) -> tuple[Call, Call]:
    labels = discs(512 // by, 50)
    distances = import_module("scipy.ndimage").distance_transform_edt

    def plain() -> Tensor:  # the usual recipe
        picture = labels.numpy()
        maps = np.stack([distances(picture != i) for i in np.unique(picture)[1:]], -1)
        maps.sort(-1)
        border = 10 * np.exp(-((maps[..., 0] + maps[..., 1]) ** 2) / 50) * (picture == 0)
        return torch.from_numpy((1 + border).astype(np.float32))

    return lambda: ops.unet_weight_map(labels, class_weight=None), plain


@case("`confusion_matrix`, of scores", "class ids of int64", 4, 512**2, 8)
def _confusion_matrix(by: int) -> tuple[Call, Call]:
    side = 512 // by
    scores, target = torch.rand(4, 21, side, side), torch.randint(21, (4, side, side))
    return (
        lambda: ops.confusion_matrix(scores, target, 21),
        lambda: torch.bincount((target * 21 + scores.argmax(1)).flatten(), minlength=21 * 21),
    )


@case("`segfuse.predict`, a narrow FCN-8s, 1024²", "full scores", 150, 1024**2, 4)
def _predict(by: int) -> tuple[Call, Call]:
    backbone = BACKBONES["vgg16"](1, width=1 / 16)
    network = FCN(backbone, 150, stride=8, layout="aligned").eval()
    image = torch.rand(3, 1024 // by, 1024 // by)
    ours = partial(segfuse.predict, network, image, memory="64GB", progress=False)
    return ours, lambda: network(image[None]).argmax(1)


def main() -> None:
    """Run what was asked for."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    options.add_argument("--json", type=Path)
    options.add_argument("--child", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    asked = options.parse_args()
    if asked.child:
        torch.set_num_threads(asked.threads)
        print(peak(asked.child[0], int(asked.child[1])))
        return
    found: dict[str, Any] = {"torch": torch.__version__, "threads": asked.threads, "bytes": {}}
    print(
        "| operator | not stored | saved, MiB (peak plain - ours) | computed |\n|---|---|---|---|"
    )
    for name in asked.only:
        _, title, unstored, counts = CASES[name]
        ours, plain = (measured(name, side, asked) for side in (0, 1))
        found["bytes"][name] = {"ours": ours, "plain": plain, "computed": prod(counts)}
        saved = f"{(plain - ours) / MIB:.1f} ({plain / MIB:.1f} - {ours / MIB:.1f})"
        terms = " x ".join(f"{n:,}" for n in counts)
        computed = f"{terms} = {prod(counts) / MIB:.1f} MiB"
        print(f"| {title} | {unstored} | {saved} | {computed} |", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measured(name: str, side: int, asked: argparse.Namespace) -> int:
    """Median bytes of processes of their own."""
    call = [sys.executable, __file__, "--threads", str(asked.threads), "--child", name, str(side)]
    env = {**os.environ, **ENVIRONMENT}
    each = [subprocess.check_output(call, env=env) for _ in range(asked.repeats)]  # noqa: S603
    return int(median(int(said.split()[-1]) for said in each))


def peak(name: str, side: int) -> int:
    """Bytes by which one side of a case, ours or plain, exceeds what was resident before it."""
    torch.manual_seed(0)
    make = CASES[name][0]
    make(4)[side]()
    call = make(1)[side]
    backward = name in {"crop_concat", "weighted_cross_entropy", "upsample_cross_entropy"}
    gc.collect()
    with torch.set_grad_enabled(backward):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
        before = status("VmRSS")
        _result = call()
        after = status("VmHWM")
    return after - before


def cropped(x: Tensor, size: int) -> Tensor:
    """The middle of a map."""
    first = (x.shape[-1] - size) // 2
    return x[:, :, first : first + size, first : first + size]


def status(key: str) -> int:
    """Bytes that the system counts for this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
