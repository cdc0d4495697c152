"""Times tiled prediction against the whole image at once and MONAI's sliding window.

    python benchmarks/predict.py --threads 2 --json benchmarks/results/predict-local.json
    python benchmarks/predict.py --only memory --data path/to/phase-contrast-images

Three questions: what do exact tiles cost a real network (seam), what does cutting and stitching
cost by itself (point), and how much memory does an image of 30,000 x 30,000 need (memory).
MONAI and zarr must be installed: ``pip install 'segfuse[bench]'``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import segfuse
from segfuse.geometry.network import trace
from segfuse.tiling.job import Job
from segfuse.tiling.options import Asked
from segfuse.tiling.sources import sources

Call = Callable[[], Any]
ROWS = (10_000, 20_000, 30_000)
WIDTH = 30_000
NETWORK_SECONDS: list[float] = []  # what `Timed` found


def main() -> None:
    """Run what was asked for."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--only", choices=("seam", "point", "memory"))
    options.add_argument("--size", type=int, default=2048, help="of the image of seam")
    options.add_argument("--data", type=Path, help="folder of images that fill the large one")
    options.add_argument("--json", type=Path)
    options.add_argument("--child", nargs=2, metavar=("IMAGE", "OUT"), help=argparse.SUPPRESS)
    asked = options.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    if asked.child:
        print(json.dumps(resident(*asked.child)))
        return
    found: dict[str, Any] = {"torch": torch.__version__, "threads": asked.threads}
    keep_memory()
    parts: dict[str, Callable[[], Any]] = {
        "seam": lambda: seam(asked.size, asked.repeats),
        "point": lambda: point(asked.repeats),
        "memory": lambda: memory(asked.data, asked.threads),
    }
    for name, part in parts.items():
        if asked.only in (None, name):
            found[name] = part()
            print(name, json.dumps(found[name], indent=1), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def keep_memory(*, keep: bool = True) -> None:
    """Let the C library keep what was freed, as `benchmarks/run.py` does, or give it back."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold, m_mmap_max = -1, -3, -4
        mallopt(m_mmap_threshold, 1 << 17)
        mallopt(m_trim_threshold, (1 << 31) - 1 if keep else 1 << 17)
        mallopt(m_mmap_max, 0 if keep else 1 << 16)


def in_turns(calls: dict[str, Call], repeats: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of calls that take turns, and what each returned last."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    results: dict[str, Any] = {}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            results.pop(name, None)
            begin = time.perf_counter()
            results[name] = call()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - begin)
    return {name: median(each) for name, each in times.items()}, results


def seam(size: int, repeats: int) -> dict[str, Any]:
    """MONAI's BasicUNet (16, batch norm): tiles within half the memory against its alternatives."""
    monai = import_module("monai.inferers")
    nets = import_module("monai.networks.nets")

    features = (16, 16, 32, 64, 128, 16)
    model: nn.Module = nets.BasicUNet(2, 1, 2, features=features, norm="batch").eval()
    x = torch.randn(1, 1, size, size)
    peak = trace(model, x.shape).peak
    half = Job.of(model, Asked(output="scores", memory="64GB")).prepare(
        sources(x[0], axes=None, channels=1, dims=2)[0], batched=False
    )
    budget = half.memory_for(peak) // 2
    plan = half.cut(budget)

    side = round((plan.tile[0] * plan.tile[1]) ** 0.5 / 16) * 16  # whose maps take as much
    roi = {"": plan.tile, ", square": (side, side)}

    def peer(overlap: float, mode: str, shape: str) -> Call:
        return lambda: monai.sliding_window_inference(
            x, roi[shape], 1, model, overlap=overlap, mode=mode
        )

    with torch.inference_mode():
        seconds, results = in_turns(
            {
                "whole": lambda: model(x),
                "segfuse": lambda: segfuse.predict(
                    model, x[0], output="scores", memory=budget, progress=False
                ),
            }
            | {
                f"MONAI {overlap} {mode}{shape}": peer(overlap, mode, shape)
                for overlap, mode in ((0.25, "constant"), (0.5, "gaussian"))
                for shape in roi
            },
            repeats,
        )
    whole = results["whole"].reshape(2, size, size)
    scale = whole.abs().max()
    return {
        "image": [size, size],
        "peak of the whole, MiB": peak >> 20,
        "budget, MiB": budget >> 20,
        "tile": list(plan.tile),
        "tiles": plan.count,
        "square tile": [side, side],
        "overlap, share of the work": round(plan.wasted, 3),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "times the whole": {n: round(v / seconds["whole"], 3) for n, v in seconds.items()},
        "times segfuse": {n: round(v / seconds["segfuse"], 3) for n, v in seconds.items()},
        "largest difference to the whole, of its largest score": {
            name: float((y.reshape(whole.shape) - whole).abs().max() / scale)
            for name, y in results.items()
        },
    }


class Timed(nn.Module):
    """A network that tells how long it ran: what is left is cutting and stitching."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        """As the network's."""
        begin = time.perf_counter()
        y = self.network(x)
        NETWORK_SECONDS.append(time.perf_counter() - begin)
        return y


def point(repeats: int) -> dict[str, Any]:
    """A 1x1 network: everything but the network itself is cutting and stitching."""
    monai = import_module("monai.inferers")

    size = 4096
    model = Timed(nn.Conv2d(1, 2, 1)).eval()
    x = torch.randn(1, 1, size, size)
    out = torch.zeros(2, size, size)
    answer: dict[str, Any] = {}
    for tile in (512, 1024, size):
        ours = partial(segfuse.predict, model, x[0], output="scores", tile=tile, progress=False)
        calls: dict[str, Call] = {
            "segfuse out=": partial(ours, out=out),
            "segfuse fresh": ours,
        }
        for overlap in (0.0, 0.25):  # a quarter is its default
            calls[f"MONAI, overlap {overlap}"] = partial(
                monai.sliding_window_inference,
                x,
                (tile, tile),
                1,
                model,
                overlap=overlap,
                mode="constant",
            )
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(repeats + 1):
            for name, call in calls.items():
                NETWORK_SECONDS.clear()
                begin = time.perf_counter()
                with torch.inference_mode():
                    result = call()
                spent = time.perf_counter() - begin - sum(NETWORK_SECONDS)
                del result
                if turn:  # the first warms up
                    times[name].append(1000 * spent)
        spare = {name: median(each) for name, each in times.items()}
        answer[f"tile {tile}"] = {
            "ms without the network": {n: round(v, 2) for n, v in spare.items()},
            "MONAI's over ours": {
                f"{m} / {n}": round(spare[m] / v, 2)
                for m in spare
                for n, v in spare.items()
                if m.startswith("MONAI") and n.startswith("segfuse")
            },
        }
    return answer


def memory(data: Path | None, threads: int) -> dict[str, Any]:
    """Resident memory, above that of importing torch, for images of one width and rising height."""
    answer: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for rows in ROWS:
            for kind in ("tif", "zarr"):
                image = Path(folder) / f"image.{kind}"
                fill(image, rows, data)
                out = Path(folder) / f"labels.{kind}"
                begin = time.perf_counter()
                child = subprocess.run(  # noqa: S603
                    [
                        *(sys.executable, __file__, "--threads", str(threads)),
                        *("--child", str(image), str(out)),
                    ],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                seen = json.loads(child.stdout.splitlines()[-1])
                seen["seconds"] = round(time.perf_counter() - begin, 1)
                answer[f"{rows} x {WIDTH} {kind}"] = seen
                print(rows, kind, seen, flush=True)
                for path in (image, out):
                    subprocess.run(["rm", "-rf", str(path)], check=True)  # noqa: S603, S607
    return answer


def fill(path: Path, rows: int, data: Path | None) -> None:
    """Write an image of uint8, tile by tile: real ones side by side, or noise."""
    import tifffile  # noqa: PLC0415
    import zarr  # noqa: PLC0415

    if data is None:
        tiles = [np.random.default_rng(0).integers(0, 255, (1024, 1024), np.uint8)]
    else:
        files = sorted(f for f in data.rglob("*") if f.suffix in {".png", ".tif"})
        read = [sources(f, axes=None, channels=1, dims=2)[0][0] for f in files]
        tiles = [s.read(0, s.shape[1])[0] for s in read]

    def band(start: int, stop: int) -> Any:
        height, width = tiles[0].shape
        parts = [
            np.concatenate(
                [
                    tiles[(row // height * 31 + i) % len(tiles)][row % height]
                    for i in range(-(-WIDTH // width))
                ]
            )[:WIDTH]
            for row in range(start, stop)
        ]
        return np.stack(parts)

    step = 512
    if path.suffix == ".zarr":
        array = zarr.create_array(str(path), shape=(rows, WIDTH), chunks=(step, step), dtype="u1")
        for start in range(0, rows, step):
            array[start : start + step] = band(start, min(rows, start + step))
        return

    def chunks() -> Any:
        for start in range(0, rows, step):
            lines = band(start, min(rows, start + step))
            for left in range(0, WIDTH, step):
                chunk = np.zeros((step, step), np.uint8)
                part = lines[:, left : left + step]
                chunk[: part.shape[0], : part.shape[1]] = part
                yield chunk

    tifffile.imwrite(
        path,
        chunks(),
        shape=(rows, WIDTH),
        dtype="u1",
        tile=(step, step),
        bigtiff=True,
        compression="zlib",
        photometric="minisblack",
    )


def resident(image: str, out: str) -> dict[str, Any]:
    """Predict with a small network and the default budget; MiB above what torch itself takes.

    The network has a stride of 4, so that reading and writing count beside it.
    """
    model = nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=4),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 2, 4, stride=4),
    ).eval()
    with torch.inference_mode():
        model(torch.zeros(1, 1, 64, 64))
    before = _status("VmRSS")
    begin = time.perf_counter()
    segfuse.predict(model, image, out=out, progress=False)
    return {
        "MiB over torch": round(_status("VmHWM") - before),
        "Mpx/s": round(
            float(np.prod(sources(image, axes=None, channels=1, dims=2)[0][0].shape))
            / 1e6
            / (time.perf_counter() - begin),
            2,
        ),
    }


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


if __name__ == "__main__":
    main()
