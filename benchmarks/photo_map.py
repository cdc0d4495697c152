"""Draws where in a photo a classifier sees its class: the network run on all of it at once.

    python benchmarks/photo_map.py squeezenet10.npz parrot.jpg macaw.jpg --ids 88 --title macaw

The weights are a file for `segfuse.models.backbones.backbone`.  The photo is mirrored at its
border by half a window, so that the map covers it, and run at its own size and enlarged.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from segfuse import geometry
from segfuse.models import convolutionalize
from segfuse.models.backbones import BACKBONES, backbone

mpl.use("Agg")
from matplotlib import pyplot as plt


def main() -> None:
    """Draw what was asked for."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("weights", type=Path)
    options.add_argument("photo", type=Path)
    options.add_argument("picture", type=Path, help="what to write, PNG or JPEG")
    options.add_argument("--backbone", default="squeezenet1_0", choices=BACKBONES)
    options.add_argument("--ids", type=int, nargs="+", required=True, help="classes, added up")
    options.add_argument("--title", required=True, help="what they are")
    options.add_argument("--scales", type=float, nargs="+", default=[1, 2])
    options.add_argument("--height", type=int, default=560, help="pixels of the panels")
    asked = options.parse_args()
    classifier = backbone(asked.backbone, weights=asked.weights).eval()
    network, native = convolutionalize(classifier, classifier.native), classifier.native
    photo = np.array(Image.open(asked.photo).convert("RGB"))
    pixels = torch.from_numpy(photo).permute(2, 0, 1)[None] / 255
    shown = {f"photo, {photo.shape[1]} x {photo.shape[0]}": photo / 255}
    for scale in asked.scales:
        begin = time.perf_counter()
        chance, cells = probability(network, native, pixels, scale, asked.ids)
        seconds = time.perf_counter() - begin
        print(f"scale {scale}: {cells} cells in {seconds:.2f} s, highest {chance.max():.3f}")
        shown[f"{asked.title}, windows of {round(native / scale)}²"] = overlay(photo, chance)
    draw(asked.picture, shown, asked.height)


def probability(
    network: nn.Module, native: int, pixels: Tensor, scale: float, ids: list[int]
) -> tuple[NDArray[np.float32], str]:
    """Each pixel's probability of the classes, in the window about it; and the map's own size."""
    size = [round(scale * n) for n in pixels.shape[2:]]
    image = F.interpolate(pixels, size, mode="bilinear", antialias=scale < 1)
    half = native // 2
    image = F.pad(image, (half, half, half, half), mode="reflect")
    with torch.no_grad():
        chances = network(image).softmax(1)[:, ids].sum(1, keepdim=True)
    # Where cells lie in the scaled photo follows from the network, as they do in a window of it.
    step = float(geometry.of(network, (1, 3, native, native)).output[0].scale)
    first = (native - 1) / 2 - half
    grid = [
        ((torch.arange(n) + 0.5) * scale - 0.5 - first) / step * 2 / (cells - 1) - 1
        for n, cells in zip(pixels.shape[2:], chances.shape[2:], strict=True)
    ]
    y, x = torch.meshgrid(*grid, indexing="ij")
    at = torch.stack([x, y], -1)[None]
    whole = F.grid_sample(chances, at, padding_mode="border", align_corners=True)
    found: NDArray[np.float32] = whole[0, 0].numpy()
    return found, " x ".join(map(str, chances.shape[2:]))


def overlay(photo: NDArray[np.uint8], chance: NDArray[np.float32]) -> NDArray[np.float64]:
    """The photo in grey, the probability in colour over it."""
    grey = photo.mean(-1, keepdims=True) / 255
    colour = mpl.colormaps["inferno"](chance)[..., :3]
    blended: NDArray[np.float64] = 0.45 * grey + 0.55 * colour
    return blended


def draw(path: Path, shown: dict[str, NDArray[np.float64]], height: int) -> None:
    """Panels side by side, and the scale of colours."""
    rows, columns = next(iter(shown.values())).shape[:2]
    dpi = 100
    size = (len(shown) * height * columns / rows / dpi + 1, height / dpi + 0.4)
    figure, axes = plt.subplots(1, len(shown), figsize=size, layout="constrained")
    for axis, (title, picture) in zip(axes, shown.items(), strict=True):
        axis.imshow(picture.clip(0, 1), interpolation="antialiased")
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    colours = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), "inferno")
    figure.colorbar(colours, ax=axes, label="probability", fraction=0.03, pad=0.01)
    figure.savefig(path, dpi=dpi, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
