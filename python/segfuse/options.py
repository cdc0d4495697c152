"""What a training can be asked for: filled in with defaults, and checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import models
from .data.patches import Picture
from .devices import check_precision, choose
from .errors import UserError
from .solvers import SOLVERS, defaults

__all__ = ["NETWORK", "Options", "fill", "fit_together"]

NETWORK = ("base", "depth", "padding", "norm", "dropout", "up")  # options of the network
_FILLED = ("batch", "patch", "learning_rate", "gain", "shift")
_BUDGET = ("steps", "epochs", "time")
_FRACTIONS = ("learning_rate", "epochs", "time")  # the other numbers are integers
_YEAR = 366 * 86400.0


@dataclass(frozen=True)
class Options:
    """The table [training] of ``config.toml``: arguments of `training.fit`, without gaps.

    Raises:
        UserError: a value out of its range, or no number.
    """

    solver: str
    batch: int
    patch: int
    learning_rate: float
    gain: float
    shift: float
    precision: str
    device: str
    seed: int
    threads: int
    workers: int
    steps: int | None = None
    epochs: float | None = None
    time: float | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in [
            ("batch", 1, 4096),
            ("patch", 1, 16384),
            ("learning_rate", 1e-12, 1e3),
            ("seed", 0, 2**63 - 1),
            ("threads", 1, 1024),
            ("workers", 0, 256),
            ("steps", 1, 2**40),
            ("epochs", 1e-6, 1e9),
            ("time", 1e-3, _YEAR),
            ("patience", 1, 2**31),
        ]:
            value = getattr(self, name)
            if value is None:
                continue
            kind = (int, float) if name in _FRACTIONS else int
            if not isinstance(value, kind):
                number = "a number" if name in _FRACTIONS else "an integer"
                raise UserError(f"{name}: expected {number}, got {value!r}")
            if not low <= value <= high:
                raise UserError(f"{name}: expected {low} to {high}, got {value}")
        if self.solver not in SOLVERS:
            raise UserError(f"solver: expected one of {', '.join(SOLVERS)}, got {self.solver!r}")


def fill(given: dict[str, Any]) -> tuple[dict[str, Any], Options]:
    """Fill in what is None in arguments of `training.fit`: options of the network, and the rest.

    Raises:
        UserError: see `Options`; a device that is not there, or does not have the precision.
        ValueError: an unknown solver.
    """
    device = choose(given["device"])
    precision = check_precision(given["precision"], device)
    row = defaults(given["solver"], device)
    filled = {
        name: row[name] if given.get(name) is None else given[name] for name in NETWORK + _FILLED
    }
    network = {name: filled.pop(name) for name in NETWORK}
    if network["norm"] == "none":
        network["norm"] = None
    budget = {name: given[name] for name in _BUDGET}
    if all(value is None for value in budget.values()):
        budget["steps"] = row["steps"]
    threads, workers = given["threads"], given["workers"]
    if workers is None:
        workers = 0 if device.type == "cpu" else min(4, len(os.sched_getaffinity(0)) - 1)
    return network, Options(
        **filled,
        **budget,
        **{name: given[name] for name in ("solver", "seed", "patience")},
        precision=precision,
        device=str(device),
        threads=torch.get_num_threads() if threads is None else threads,
        workers=workers,
    )


def fit_together(
    options: Options, network: dict[str, Any], pictures: Sequence[Picture], *, exact: bool
) -> Options:
    """Turn epochs into steps, and see that patches go through the network.

    Args:
        options: `patch` is raised to the next that fits the network, and `steps` found.
        network: arguments of `models.build`.
        pictures: to train on.
        exact: a patch that does not fit is an error.

    Raises:
        UserError: see `exact`; the network takes no batch of these patches.
        ValueError: the network cannot be built.
    """
    with torch.device("meta"):
        model = models.build(**network)
    margin: int = getattr(model, "margin", 0)
    side = options.patch + 2 * margin
    if isinstance(model, models.UNet):
        smaller, side = model.nearest_sizes(side)
        if exact and side != options.patch + 2 * margin:
            fits = " or ".join(str(n - 2 * margin) for n in (smaller, side) if n)
            raise UserError(f"patch: this network takes {fits}, not {options.patch}")
    try:
        model(torch.empty(options.batch, network["in_channels"], side, side, device="meta"))
    except ValueError as error:  # such as batch normalisation's of a single value
        raise UserError(
            f"batch, patch: the network does not take {options.batch} of {options.patch} pixels a "
            f"side, take more or larger ones: {error}"
        ) from error
    patch, steps = side - 2 * margin, options.steps
    if options.epochs is not None:
        pixels = sum(picture.target.size for picture in pictures)
        in_epochs = max(1, round(options.epochs * pixels / (options.batch * patch**2)))
        steps = min(in_epochs, steps or in_epochs)
    return replace(options, patch=patch, steps=steps)
