"""Times what U-Net's training on touching cells takes: weight maps, distances, deformations.

    python benchmarks/labels.py --threads 2 --json benchmarks/results/labels-local.json
    python benchmarks/labels.py --labels nuclei.png

Against one Euclidean distance transform of the whole picture (`edt`, the fastest known), one a
label (SciPy, what weight-map code does), and, for deformations, torch's grid_sample with its grid
built, SciPy's map_coordinates, and elasticdeform where it is installed.  ``pip install edt scipy``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from predict import keep_memory
from torch import Tensor
from torch.nn import functional as F

from segfuse.ops import (
    elastic_deform,
    label_distances,
    random_deformation,
    separate_touching,
    unet_weight_map,
)
from segfuse.ops.label_distances import discs

Call = Callable[[], Any]
SIDE = 2048


def main() -> None:
    """Run what was asked for."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--repeats", type=int, default=9)
    options.add_argument("--only", choices=("pictures", "labels", "pixels", "cells", "deform"))
    options.add_argument("--labels", type=Path, help="a picture of instances, for cells")
    options.add_argument("--json", type=Path)
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    keep_memory()
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "edt": import_module("importlib.metadata").version("edt"),
        "threads": asked.threads,
    }
    parts: dict[str, Callable[[], Any]] = {
        "pictures": lambda: {
            name: against_edt(labels, asked) for name, labels in pictures().items()
        },
        "labels": lambda: {
            str(n): against_edt(discs(SIDE, n), asked) for n in (1, 10, 100, 1000, 10_000)
        },
        "pixels": lambda: {
            str(n): against_edt(discs(n, n * n // 4096), asked) for n in (512, 1024, 2048, 4096)
        },
        "cells": lambda: cells(asked),
        "deform": lambda: deform(asked.repeats),
    }
    for name, part in parts.items():
        if asked.only in (None, name) and (name != "cells" or asked.labels):
            found[name] = part()
            print(name, json.dumps(found[name], indent=1), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def in_turns(calls: dict[str, Call], repeats: int) -> dict[str, float]:
    """Median milliseconds of calls that take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if turn:  # the first warms up
                times[name].append(1000 * (time.perf_counter() - begin))
    return {name: round(median(each), 2) for name, each in times.items()}


def pictures() -> dict[str, Tensor]:
    """Of kinds that are hard for one method or another."""
    empty = torch.zeros(SIDE, SIDE, dtype=torch.int32)
    each = torch.arange(1, SIDE * SIDE + 1, dtype=torch.int32).view(SIDE, SIDE)
    corner, bottom = empty.clone(), empty.clone()
    corner[0, 0] = 1
    bottom[-1] = each[0]
    chance = torch.rand(SIDE, SIDE)
    stripe = torch.arange(SIDE) // 16
    return {
        "10 discs": discs(SIDE, 10),
        "1,000 discs": discs(SIDE, 1000),
        "10,000 discs": discs(SIDE, 10_000),
        "one pixel in a corner": corner,
        "bottom row, a label a pixel": bottom,
        "noise 1 %, a label a pixel": each * (chance < 0.01),  # noqa: PLR2004
        "noise 50 %, a label a pixel": each * (chance < 0.5),  # noqa: PLR2004
        "stripes of 16": (stripe * (stripe % 2)).int().expand(SIDE, SIDE).contiguous(),
    }


def against_edt(labels: Tensor, asked: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of ours, and times one `edt` pass."""
    edt = import_module("edt")
    picture = labels.numpy().astype(np.uint32)
    out = torch.empty(labels.shape)
    times = in_turns(
        {
            "edt": lambda: edt.edt(picture, parallel=asked.threads),
            "label_distances": lambda: label_distances(labels),
            "unet_weight_map": lambda: unet_weight_map(labels, out=out),
            "separate_touching": lambda: separate_touching(labels),
        },
        asked.repeats,
    )
    for name in ("label_distances", "unet_weight_map"):
        times[f"{name} / edt"] = round(times[name] / times["edt"], 2)
    return times


def cells(asked: argparse.Namespace) -> dict[str, Any]:
    """A real picture, with SciPy's transform a cell and a running minimum beside it."""
    ndimage = import_module("scipy.ndimage")
    files = import_module("segfuse.data.files")
    labels = torch.from_numpy(files.read_labels(asked.labels).astype(np.int32)).squeeze()
    picture = labels.numpy()
    times: dict[str, Any] = against_edt(labels, asked)

    def loop() -> None:
        first = np.full(picture.shape, np.inf)
        second = first
        for label in np.unique(picture)[1:]:
            own = ndimage.distance_transform_edt(picture != label)
            second = np.minimum(second, np.maximum(first, own))
            first = np.minimum(first, own)
        np.exp(-((first + second) ** 2) / 50)

    begin = time.perf_counter()
    loop()
    times["SciPy, a transform a cell"] = round(1000 * (time.perf_counter() - begin), 1)
    times["SciPy / unet_weight_map"] = round(
        times["SciPy, a transform a cell"] / times["unet_weight_map"]
    )
    times["size"], times["cells"] = list(picture.shape), len(np.unique(picture)) - 1
    return times


def deform(repeats: int) -> dict[str, Any]:
    """1024 x 1024, float32, one channel, with labels."""
    side = 1024
    image = torch.rand(1, 1, side, side)
    labels = torch.randint(0, 200, (1, side, side), dtype=torch.int32)
    grid, _ = random_deformation(1)
    out = torch.empty_like(image), torch.empty_like(labels)

    def torchs() -> None:
        field = F.interpolate(grid, (side, side), mode="bicubic", align_corners=True)
        place = torch.arange(side, dtype=torch.float32)
        y, x = place[:, None] + field[:, 0], place + field[:, 1]
        at = torch.stack([x, y], -1) * (2 / (side - 1)) - 1
        reflected: dict[str, Any] = {"padding_mode": "reflection", "align_corners": True}
        F.grid_sample(image, at, mode="bicubic", **reflected)
        F.grid_sample(labels[:, None].float(), at, mode="nearest", **reflected)

    ndimage = import_module("scipy.ndimage")
    field = F.interpolate(grid, (side, side), mode="bicubic", align_corners=True)[0].numpy()
    coordinates = np.mgrid[:side, :side] + field

    def scipys() -> None:
        ndimage.map_coordinates(image[0, 0].numpy(), coordinates, order=3, mode="mirror")
        ndimage.map_coordinates(labels[0].numpy(), coordinates, order=0, mode="mirror")

    calls: dict[str, Call] = {
        "ours, out=": lambda: elastic_deform(image, grid, labels=labels, out=out),
        "ours, fresh": lambda: elastic_deform(image, grid, labels=labels),
        "torch": torchs,
        "SciPy": scipys,
    }
    try:
        peer = import_module("elasticdeform")
    except ImportError:
        pass
    else:
        both = [image[0, 0].numpy(), labels[0].numpy()]
        displacement = grid[0].numpy().astype(np.float64)
        calls["elasticdeform"] = lambda: peer.deform_grid(
            both, displacement, order=[3, 0], mode="mirror"
        )
    times: dict[str, Any] = in_turns(calls, repeats)
    for name in list(times):
        if not name.startswith("ours"):
            times[f"{name} / ours, out="] = round(times[name] / times["ours, out="], 1)
    return times


if __name__ == "__main__":
    main()
