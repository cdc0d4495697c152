"""How a network is optimised: the published way, and one of today; and what each takes by default.

"unet-paper" is Ronneberger, Fischer, Brox, MICCAI 2015, Section 3: stochastic gradient descent with
momentum 0.99 on one large tile a step, at a constant rate. The paper gives no rate; ours is for a
mean over the tile's pixels.

"modern" is AdamW (Loshchilov, Hutter, ICLR 2019), its rate rising linearly over the first 5 % of
the budget, as reading leaves it, and falling along a cosine to zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from math import cos, pi
from typing import Any

import torch
from torch import nn

__all__ = ["DEFAULTS", "SOLVERS", "Solver", "defaults"]

ELASTIC = 10.0  # pixels, the paper's standard deviation of displacements (section 3.1)
_WARM_UP = 0.05


@dataclass(frozen=True)
class Solver:
    """An optimizer and how its learning rate changes.

    Attributes:
        optimizer: makes the optimizer of parameters; takes ``lr``.
        schedule: factor on the learning rate when a fraction 0 to 1 of the budget is spent, 0 at
            the first step, whatever time was spent before it.
    """

    optimizer: Callable[..., torch.optim.Optimizer]
    schedule: Callable[[float], float]

    def __call__(self, parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Optimizer:
        """Make the optimizer."""
        return self.optimizer(parameters, lr=rate)


def _constant(_: float) -> float:
    return 1.0


def _cosine(fraction: float) -> float:
    if fraction < _WARM_UP:
        # The first step has a rate above zero, so that the shortest budgets learn too.
        return 0.1 + 0.9 * fraction / _WARM_UP
    return (1 + cos(pi * min(1.0, (fraction - _WARM_UP) / (1 - _WARM_UP)))) / 2


SOLVERS = {
    "modern": Solver(partial(torch.optim.AdamW, weight_decay=0.01, fused=True), _cosine),
    "unet-paper": Solver(partial(torch.optim.SGD, momentum=0.99), _constant),
}

# What `training.fit` takes where its caller says nothing, by solver and kind of device: options of
# the network; patch, pixels a side that a patch labels; batch, patches a step; learning_rate, the
# highest; gain and shift of `data.patches.Patches`; deform, std of `data.augment.Deform`; steps,
# where no budget is given at all.
_MODERN = {
    "padding": "same",
    "norm": "batch",
    "dropout": 0.1,
    "up": "deconv",
    "gain": 0.2,
    "shift": 0.1,
    "deform": 0.0,
}
_PAPER = {
    "base": 64,
    "depth": 4,
    "padding": "valid",
    "norm": None,
    "dropout": 0.5,
    "up": "deconv",
    "patch": 388,
    "batch": 1,
    "learning_rate": 1e-3,
    "gain": 0.2,
    "shift": 0.1,
    "deform": ELASTIC,
}
DEFAULTS: dict[tuple[str, str], dict[str, Any]] = {
    ("modern", "cpu"): {
        **_MODERN,
        "base": 16,
        "depth": 3,
        "patch": 128,
        "batch": 4,
        "learning_rate": 3e-3,
        "steps": 1000,
    },
    ("modern", "cuda"): {
        **_MODERN,
        "base": 32,
        "depth": 4,
        "patch": 256,
        "batch": 8,
        "learning_rate": 2e-3,
        "steps": 5000,
    },
    ("unet-paper", "cpu"): {**_PAPER, "steps": 200},
    ("unet-paper", "cuda"): {**_PAPER, "steps": 20_000},
}


def defaults(solver: str, device: torch.device) -> dict[str, Any]:
    """Return the row of `DEFAULTS` for a solver and a device, as a copy.

    Raises:
        ValueError: an unknown solver; the text lists the known.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
    return dict(DEFAULTS[solver, device.type])
