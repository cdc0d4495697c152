"""Trains the same network in two ways on real pictures, for the same time, and compares what comes.

    python benchmarks/training.py nuclei FOLDER --seconds 240 --seeds 3 --json touching.json
    python benchmarks/training.py membranes FOLDER --seconds 300 --json membranes.json

nuclei: U-Net's strategy for touching cells, gaps between them and the weight map, against plain
classes.  membranes: with and without elastic deformation, each predicted once and as the mean of
eight turned and mirrored copies.  FOLDER holds `images` and `labels`; what is held out, index.csv
(columns id and split) or, without one, the last four files.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from segfuse.data import read_image, read_labels
from segfuse.ops import separate_touching
from segfuse.report import object_overlay, visible

WINDOW = 160  # pixels a side of what is drawn


class Way(NamedTuple):
    """How to train, and under which name to predict how."""

    train: tuple[str, ...]
    predict: dict[str, tuple[str, ...]]


class Comparison(NamedTuple):
    """Ways, and how to evaluate what they give."""

    ways: tuple[Way, ...]
    evaluate: str
    figures: tuple[str, ...]


OBJECTS = ("--instances", "--smallest", "20")
COMPARISONS = {
    "nuclei": Comparison(
        tuple(
            Way((*train.split(), "--deform", "0"), {name: OBJECTS})
            for name, train in (
                ("classes", "--objective classes"),
                ("touching", "--objective touching"),
            )
        ),
        "--instances",
        ("mean_average_precision", "average_precision_50", "panoptic_quality"),
    ),
    "membranes": Comparison(
        tuple(
            Way(("--deform", pixels), {name: (), f"{name}, d4": ("--augment", "d4")})
            for name, pixels in (("plain", "0"), ("deformed", "10"))
        ),
        "--boundaries",
        ("pixel_error", "warping_error", "adapted_rand_error"),
    ),
}


def main() -> None:
    """Run what was asked for."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("comparison", choices=COMPARISONS)
    options.add_argument("folder", type=Path)
    options.add_argument("--seconds", type=int, default=240, help="of each training")
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--train", default="", help="more options, in one string")
    options.add_argument("--keep", type=Path, help="a folder for runs and predictions")
    options.add_argument("--json", type=Path)
    options.add_argument("--picture", type=Path, help="of nuclei: draw where most of them touch")
    asked = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.keep or Path(temporary)
        found = compare(asked, work)
        if asked.picture:
            draw(asked.picture, asked.folder, {name: work / f"{name}-0" for name in found})
    found = {"comparison": asked.comparison, "seconds": asked.seconds, "ways": found}
    print(json.dumps(found, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def compare(asked: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Each seed's figures, their mean and their standard deviation, by way."""
    comparison = COMPARISONS[asked.comparison]
    images, labels = asked.folder / "images", asked.folder / "labels"
    split = work / "held-out.txt"
    held_out = names_held_out(asked.folder)
    work.mkdir(parents=True, exist_ok=True)
    split.write_text("\n".join(held_out) + "\n", encoding="utf-8")
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in range(asked.seeds):
        for way in comparison.ways:
            run = work / f"{'-'.join(way.train).strip('-')}-{seed}"
            segfuse(
                "train", "--images", images, "--labels", labels, "--split", split, "-o", run,
                "--time", f"{asked.seconds}s", "--seed", seed, *way.train, *asked.train.split(),
            )  # fmt: skip
            for name, how in way.predict.items():
                to, scores = work / f"{name}-{seed}", work / f"{name}-{seed}.json"
                pictures = [picture(images, each) for each in held_out]
                truth = work / "truth"
                truth.mkdir(exist_ok=True)
                for each in held_out:
                    true, link = picture(labels, each), truth / picture(labels, each).name
                    if not link.exists():
                        link.symlink_to(true.resolve())
                segfuse("predict", run, *pictures, "-o", to, *how)
                segfuse("evaluate", to, truth, comparison.evaluate, "--json", scores)
                figures = json.loads(scores.read_text(encoding="utf-8"))
                runs.setdefault(name, []).append({k: figures[k] for k in comparison.figures})
                print(name, seed, runs[name][-1], flush=True)
    return {
        name: {"runs": each}
        | {f"{k}, mean": round(mean(r[k] for r in each), 4) for k in comparison.figures}
        | {f"{k}, sd": round(stdev(r[k] for r in each), 4) for k in comparison.figures if each[1:]}
        for name, each in runs.items()
    }


def draw(path: Path, folder: Path, ways: dict[str, Path]) -> None:
    """The window of the held-out pictures in which most pixels touch, and its objects each way."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    best = (0.0, "", 0, 0)
    for name in names_held_out(folder):
        ids = torch.from_numpy(read_labels(picture(folder / "labels", name)).astype(np.int32))
        touching = F.avg_pool2d((separate_touching(ids) != ids).float(), WINDOW, WINDOW // 8)
        if touching.numel() and touching.max() > best[0]:
            at = divmod(int(touching.argmax()), touching.shape[-1])
            best = (float(touching.max()), name, *(WINDOW // 8 * i for i in at))
    _, name, y, x = best
    window = slice(y, y + WINDOW), slice(x, x + WINDOW)
    truth = read_labels(picture(folder / "labels", name))[0][window]
    grey = visible(read_image(picture(folder / "images", name))[0, 0])[window]
    figure, axes = plt.subplots(1, 2 + len(ways), figsize=(13, 3.9), layout="constrained")
    shown = {f"{name}, {WINDOW}²": None, "truth": truth}
    shown |= {way: read_labels(picture(at, name))[0][window] for way, at in ways.items()}
    for axis, (title, ids) in zip(axes, shown.items(), strict=True):
        drawn = np.repeat(grey[..., None], 3, -1) if ids is None else object_overlay(grey, ids)
        axis.imshow(drawn, interpolation="nearest")
        count = "" if ids is None else f": {len(np.unique(ids[ids != 0]))} nuclei"
        axis.set_title(f"{title}{count}", fontsize=10)
        axis.set_axis_off()
    figure.savefig(path, dpi=90, pil_kwargs={"optimize": True})


def names_held_out(folder: Path) -> list[str]:
    """Without suffix."""
    index = folder / "index.csv"
    if not index.exists():
        return sorted(each.stem for each in (folder / "images").iterdir())[-4:]
    with index.open(encoding="utf-8") as lines:
        return [row["id"] for row in csv.DictReader(lines) if row["split"] == "val"]


def picture(folder: Path, name: str) -> Path:
    """The file of a name."""
    return next(folder.glob(f"{name}.*"))


def segfuse(*arguments: object) -> None:
    """Run the program."""
    words = [sys.executable, "-m", "segfuse", *map(str, arguments)]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)  # noqa: S603


if __name__ == "__main__":
    main()
