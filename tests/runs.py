"""Small pictures and run folders for tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from segfuse import models
from segfuse import run as folder
from segfuse.data import LabelCoding, Normalisation

TINY: dict[str, Any] = {"base": 2, "depth": 2, "padding": "same", "norm": "batch", "dropout": 0.3}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Let small networks run as fast on a busy machine as on an idle one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_pictures(path: Path, count: int = 5, side: int = 48) -> dict[str, Path]:
    """Write noisy pictures of disks and labels, 0 and 255; return the first arguments of `fit`."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side]
    for name in ("images", "labels"):
        (path / name).mkdir(parents=True)
    for i in range(count):
        y, x = random.integers(side // 4, 3 * side // 4, 2)
        inside = np.hypot(rows - y, columns - x) < side / 4
        image = 90 + 70 * inside + random.normal(0, 25, inside.shape)
        for name, values in [("images", image.clip(0, 255)), ("labels", 255 * inside)]:
            Image.fromarray(values.astype(np.uint8)).save(path / name / f"{i}.png")
    return {"images": path / "images", "labels": path / "labels"}


def write_run(
    path: Path, coding: LabelCoding | None = None, channels: int = 1, **options: Any
) -> folder.Run:
    """Make a run folder with random weights."""
    coding = coding or LabelCoding("binary", 2, None)
    network = {"name": "unet", "in_channels": channels, "classes": coding.classes}
    config = {
        "format": folder.FORMAT,
        "model": {**network, **TINY, **options},
        "data": {"coding": coding.to_dict(), "normalisation": Normalisation().to_dict()},
    }
    folder.claim(path, overwrite=False)
    folder.write_config(path, config)
    torch.manual_seed(0)
    folder.save_weights(path / folder.WEIGHTS, models.build(**config["model"]))
    return folder.Run.open(path)
