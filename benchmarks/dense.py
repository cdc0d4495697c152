"""Times a classifier run on a whole image at once against window by window.

    python benchmarks/dense.py --threads 2 --json benchmarks/results/dense-local.json
    python benchmarks/dense.py --device cuda --only alexnet

Long, Shelhamer and Darrell (CVPR 2015, Section 3.1): AlexNet takes 22 ms for the 10 x 10 grid of a
500 x 500 image, and 1.2 ms a window.  Here too a grid of 10 x 10 windows at steps of 32 pixels, of
an image of 500 x 500: windows of 224 pixels then take 512, those of 227 take 515, for which it is
mirrored at its end, for both ways alike.  (In Caffe, whose poolings round up, the last windows of
AlexNet hang over the image.)  SqueezeNet's map has a stride of 16, of which every other cell is of
the grid; it computes the others too.  Weights are random.

The whole image is timed at batch 1; the windows one by one, and in batches of all sizes that were
asked for, of which the fastest counts.  Cutting them out is not timed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

from segfuse.models import convolutionalize
from segfuse.models.backbones import BACKBONES, backbone

SIDE, GRID, STEP = 500, 10, 32


def main() -> None:
    """Run what was asked for."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--batches", type=int, nargs="+", default=[5, 10, 25, 50])
    options.add_argument("--device", default="cpu")
    options.add_argument(
        "--only", nargs="+", default=["alexnet", "vgg16", "googlenet", "squeezenet1_0"],
        choices=BACKBONES,
    )  # fmt: skip
    options.add_argument("--json", type=Path)
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    found: dict[str, Any] = {"torch": torch.__version__, "device": asked.device}
    found |= {"threads": asked.threads} if asked.device == "cpu" else {}
    image = torch.rand(1, 3, SIDE, SIDE)
    for name in asked.only:
        found[name] = measure(name, image, asked)
        print(name, json.dumps(found[name], indent=1), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def measure(name: str, image: torch.Tensor, asked: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of one backbone, and how many times the windows take."""
    classifier = backbone(name).eval().to(asked.device)
    native = classifier.native
    network = convolutionalize(classifier, native)
    size = native + (GRID - 1) * STEP
    image = F.pad(image, (0, size - SIDE) * 2, mode="reflect").to(asked.device)
    corners = [STEP * i for i in range(GRID)]
    windows = torch.cat(
        [image[..., y : y + native, x : x + native] for y in corners for x in corners]
    )
    with torch.no_grad():
        cells = network(image).shape[2:]
    if any(n != GRID and n != 2 * GRID - 1 for n in cells):
        raise RuntimeError(f"{name}: expected a grid of {GRID} x {GRID}, got {tuple(cells)}")

    def each(batch: int) -> Callable[[], Any]:
        return lambda: [classifier(some) for some in windows.split(batch)]

    calls = {"whole image": lambda: network(image)}
    calls |= {f"windows, {batch} at a time": each(batch) for batch in (1, *asked.batches)}
    with torch.inference_mode():
        times = in_turns(calls, asked.repeats, asked.device)
    whole, single, *batched = times.values()
    fastest = min(single, *batched) if batched else single
    return {
        "image": [size, size],
        "window": native,
        "cells": list(cells),
        "milliseconds": times,
        "a window": round(single / GRID**2, 2),
        "one by one / whole": round(single / whole, 2),
        "fastest batch / whole": round(fastest / whole, 2),
    }


def in_turns(calls: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, float]:
    """Median milliseconds of calls that take turns, after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if device != "cpu":
                torch.accelerator.synchronize()
            if turn:
                times[name].append(1000 * (time.perf_counter() - begin))
    return {name: round(median(each), 2) for name, each in times.items()}


if __name__ == "__main__":
    main()
