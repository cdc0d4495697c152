"""Trains FCN in stages on CamVid, from weights of ImageNet and from scratch, for the same time.

    python benchmarks/camvid.py camvid squeezenet10.npz --seconds 120 --seeds 3 --json camvid.json

Does each finer stride give a higher mean IU, and what do the weights give?  A finer stage comes of
more time, too; --control trains FCN-32s alone for as long as all stages together.

FOLDER holds `images/train`, `images/val`, `labels/train` and `labels/val` as in the SegNet
tutorial: 367 and 101 frames of 480 x 360, eleven classes, 11 being void.  The stages are trained on
the first and compared by the second.

CamVid: Brostow, Fauqueur, Cipolla, Semantic object classes in video, Pattern Recognition Letters 30
(2009).  Figures alone may be passed on, no pictures.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import segfuse
from segfuse.stages import judged

NAMES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian",
    "bicyclist",
)  # fmt: skip
WAYS = ("pretrained", "scratch")
FIGURES = ("pixel_accuracy", "mean_accuracy", "mean_iu", "frequency_weighted_iu")


def main() -> None:
    """Run what was asked for."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("folder", type=Path)
    options.add_argument("weights", type=Path, help="of the backbone, trained on ImageNet")
    options.add_argument("--seconds", type=float, default=120, help="of each stage")
    options.add_argument("--seeds", type=int, default=1)
    options.add_argument("--size", type=int, nargs=2, default=(180, 240), help="rows, columns")
    options.add_argument("--model", default="fcn8s", help="the last stage: fcn16s or fcn8s")
    options.add_argument("--backbone", default="squeezenet1_0")
    options.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    options.add_argument("--control", action="store_true", help="FCN-32s for all of the time, too")
    options.add_argument("--threads", type=int)
    options.add_argument("--device", default="auto")
    options.add_argument("--fit", type=json.loads, default={}, help="more of segfuse.fit, as JSON")
    options.add_argument("--keep", type=Path, help="a folder for the runs")
    options.add_argument("--json", type=Path)
    asked = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = compare(asked, asked.keep or Path(temporary))
    print(table(found))
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def compare(asked: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Train each way with each seed; return the figures of each stage, their mean and spread."""
    images, labels, split = arranged(asked.folder, work)
    runs: dict[str, dict[str, list[dict[str, float]]]] = {way: {} for way in asked.ways}
    chosen: dict[str, Any] = {}
    for seed in range(asked.seeds):
        for way in asked.ways:
            given = {
                "images": images,
                "labels": labels,
                "backbone": asked.backbone,
                "pretrained": asked.weights if way == "pretrained" else None,
                "resize": list(asked.size),
                "split": split,
                "kind": "classes",
                "ignore": len(NAMES),
                "names": list(NAMES),
                "seed": seed,
                "threads": asked.threads,
                "device": asked.device,
                "overwrite": True,
                **asked.fit,
            }
            stages = segfuse.fit_stages(
                **given, output=work / f"{way}-{seed}", model=asked.model, time=asked.seconds
            )
            for stage, figures in stages.figures().items():
                runs[way].setdefault(stage, []).append(figures)
            print(way, seed, *("  ".join(row) for row in stages.table()), sep="\n", flush=True)
            if asked.control:
                total = asked.seconds * len(stages.names)
                output = work / f"{way}-{seed}-control"
                run = segfuse.fit(**given, output=output, model="fcn32s", time=total)
                figures = control(run)
                runs[way].setdefault(f"fcn32s alone, {total:g} s", []).append(figures)
                print(f"control {figures}", flush=True)
            chosen = stages.runs()[0].config["training"]
    wanted = ("patch", "batch", "learning_rate", "encoder_rate", "threads", "precision", "device")
    return {
        "data": "CamVid, 367 frames to learn from, 101 held out; Brostow, Fauqueur, Cipolla 2009",
        "torch": torch.__version__,
        "model": asked.model,
        "backbone": asked.backbone,
        "size": list(asked.size),
        "seconds a stage": asked.seconds,
        "training": {name: chosen[name] for name in wanted},
        "ways": {
            way: {stage: summary(figures) for stage, figures in stages.items()}
            for way, stages in runs.items()
        },
    }


def control(run: segfuse.Run) -> dict[str, float]:
    """A single run's figures of all the held-out pictures, as stages have them."""
    figures = {name: run.result[name] for name in ("steps", "seconds")}
    return {**figures, **judged(run)}


def arranged(folder: Path, work: Path) -> tuple[Path, Path, Path]:
    """Link frames of both parts into one folder each, and list what is held out."""
    split = work / "held-out.txt"
    for side in ("images", "labels"):
        (work / side).mkdir(parents=True, exist_ok=True)
        for part in ("train", "val"):
            for file in (folder / side / part).iterdir():
                link = work / side / file.name
                if not link.is_symlink():
                    link.symlink_to(file.resolve())
    held_out = sorted(file.name for file in (folder / "images" / "val").iterdir())
    split.write_text("\n".join(held_out) + "\n", encoding="utf-8")
    return work / "images", work / "labels", split


def summary(runs: list[dict[str, float]]) -> dict[str, Any]:
    """All seeds' figures of a stage, and of more than one mean and standard deviation."""
    found: dict[str, Any] = {"runs": runs}
    for figure in FIGURES:
        values = [run[figure] for run in runs]
        found[f"{figure}, mean"] = round(mean(values), 4)
        if len(values) > 1:
            found[f"{figure}, sd"] = round(stdev(values), 4)
    return found


def table(found: dict[str, Any]) -> str:
    """A Markdown table of the means, a row a stage."""
    head = ["", "stage", "pixel accuracy", "mean accuracy", "mean IU", "f.w. IU"]
    rows = [head, ["---"] * len(head)]
    for way, stages in found["ways"].items():
        for stage, figures in stages.items():
            cells = [
                f"{figures[f'{f}, mean']:.3f}"
                + (f" ± {figures[f'{f}, sd']:.3f}" if f"{f}, sd" in figures else "")
                for f in FIGURES
            ]
            rows.append([way, stage, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
