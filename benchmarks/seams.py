r"""Draws the seams of blended tiles beside those of exact ones: the picture in the README.

    segfuse train --images nuclei/images --labels nuclei/labels --split nuclei/index.csv \
        -o run --time 4m
    python benchmarks/seams.py run nuclei/images/ID.png -o benchmarks/results/seams.png

A network segments a picture as a whole, by MONAI's sliding window (its default overlap of a
quarter) and by segfuse's tiles of the same size, all in float32. Below is drawn by how much the
probabilities differ from the whole image's. MONAI must be installed:
``pip install 'segfuse[bench,demo]'``.
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import segfuse
from segfuse.data import read_image
from segfuse.run import Run

TILE = 256  # pixels, margins included
SCALE = 1e-2  # differences of probability at the brightest colour


def main() -> None:
    """Predict three ways and draw."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("run", type=Path, help="of a network that keeps sizes")
    options.add_argument("picture", type=Path, help="that training never saw, one channel")
    options.add_argument("-o", "--output", type=Path, default=Path("seams.png"))
    asked = options.parse_args()
    run = Run.open(asked.run)
    image = read_image(asked.picture)[0, 0]
    shown: dict[str, Any] = {"progress": False, "output": "probabilities", "device": "cpu"}
    shown["precision"] = "32"
    whole = segfuse.predict(run, image, memory="64GB", **shown)
    exact = segfuse.predict(run, image, tile=TILE, **shown)
    draw(asked.output, image, whole, {"blended": blended(run, image), "exact": exact})


def blended(run: Run, image: NDArray[Any]) -> NDArray[Any]:
    """MONAI's sliding window with its default overlap, averaged alike, on the same input."""
    monai = import_module("monai.inferers")

    network = run.network(torch.device("cpu")).eval()
    offset, scale = run.normalisation.terms(image.reshape(1, -1))
    x = torch.from_numpy((image - offset) / scale).float()[None, None]
    with torch.inference_mode():
        scores = monai.sliding_window_inference(x, (TILE, TILE), 1, network, overlap=0.25)
        found: NDArray[Any] = scores[0].softmax(0).numpy()
    return found


def draw(
    path: Path, image: NDArray[Any], whole: NDArray[Any], others: dict[str, NDArray[Any]]
) -> None:
    """Image and predictions above, the whole's and differences to it below, of one scale."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    titles = {
        "blended": f"tiles of {TILE}, overlap ¼, averaged (MONAI)",
        "exact": f"tiles of {TILE}, exact (segfuse)",
    }
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.6), layout="constrained")
    low, high = np.percentile(image, (1, 99.7))
    axes[0, 0].imshow(image, cmap="gray", vmin=low, vmax=high)
    axes[0, 0].set_title(f"image, {image.shape[1]} x {image.shape[0]}", fontsize=10)
    axes[1, 0].imshow(whole[1:].sum(0), cmap="gray", vmin=0, vmax=1)
    axes[1, 0].set_title("probability of nucleus, whole image at once", fontsize=10)
    for column, (name, y) in zip(axes.T[1:], others.items(), strict=True):
        column[0].imshow(y[1:].sum(0), cmap="gray", vmin=0, vmax=1)
        column[0].set_title(titles[name], fontsize=10)
        differs = np.abs(y - whole).max(0)
        flipped = int((y.argmax(0) != whole.argmax(0)).sum())
        drawn = column[1].imshow(differs, cmap="magma", vmin=0, vmax=SCALE)
        line = f"at most {differs.max():.1e}, {flipped:,} pixels of another class"
        column[1].set_title(f"difference to the whole:\n{line}", fontsize=10)
        print(f"{name}: {line}")
    for axis in axes.flat:
        axis.set_axis_off()
    figure.colorbar(drawn, ax=axes, shrink=0.5, label="difference of probability")
    figure.savefig(path, dpi=90, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
