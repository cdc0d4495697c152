"""How a network is optimised: the published ways, and one of today; and what each takes by default.

"modern" is AdamW (Loshchilov, Hutter, ICLR 2019), its rate rising linearly over the first 5 % of
the budget, as reading leaves it, and falling along a cosine to zero.

"unet-paper" is Ronneberger, Fischer, Brox, MICCAI 2015, Section 3: stochastic gradient descent with
momentum 0.99 on one large tile a step, at a constant rate. The paper gives no rate; ours is for a
mean over the tile's pixels.

"fcn-paper" is Long, Shelhamer, Darrell, CVPR 2015, Section 4.3: stochastic gradient descent with
momentum 0.9 and 20 images a step; constant rates by backbone; biases learn twice as fast; a net
that starts from a coarser one has a hundredth of the rate. Of the paper's two weight decays, 5e-4
and 2e-4, it is the first. The rates are taken for a mean over the pixels of a step.

"fcn-released" is how its authors trained the nets that they released: one image a step, momentum
0.99, the loss summed and not averaged, weight decay 5e-4 but none on biases, which learn twice as
fast; rates 1e-10, 1e-12 and 1e-14 from stride 32 to 8, each starting from the one before. A net
that starts from none, whatever its stride, has the first.

Both of FCN's take whole images. Here steps are of square patches of one size: by default of the
longest side of the pictures, up to `FCN_SIDE`, so that one covers a picture, which is mirrored
where it is shorter, its labels too; larger pictures give crops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import cos, pi
from typing import Any, Literal

import torch
from torch import nn

__all__ = ["DEFAULTS", "FAMILIES", "SOLVERS", "Solver", "defaults", "family", "rate_of_fcn"]

ELASTIC = 10.0  # pixels, the paper's standard deviation of displacements (section 3.1)
FCN_SIDE = 512  # pixels; PASCAL VOC's pictures, on which FCN was trained whole, have up to 500
ENCODER = "encoder."  # how names of parameters begin that an FCN has from its backbone
_WARM_UP = 0.05
_FCN_RATES = {"alexnet": 1e-3, "squeezenet1_0": 1e-3, "vgg16": 1e-4, "vgg16_bn": 1e-4,
              "googlenet": 5e-5}  # fmt: skip
# SqueezeNet, of AlexNet's accuracy, and batch normalisation are not the paper's.


@dataclass(frozen=True)
class Solver:
    """An optimizer and how its learning rate changes.

    Attributes:
        optimizer: makes the optimizer of parameters; takes ``lr``.
        schedule: factor on the learning rate when a fraction 0 to 1 of the budget is spent, 0 at
            the first step, whatever time was spent before it.
        biases: options of the optimizer that hold for biases; "scale" is a factor on the rate.
        reduction: of the loss over pixels.
    """

    optimizer: Callable[..., torch.optim.Optimizer]
    schedule: Callable[[float], float]
    biases: Mapping[str, float] = field(default_factory=dict)
    reduction: Literal["mean", "sum"] = "mean"

    def __call__(self, parameters: Iterable[Any], rate: float) -> torch.optim.Optimizer:
        """Make the optimizer of parameters, or of `groups`."""
        return self.optimizer(parameters, lr=rate)

    def groups(self, model: nn.Module, encoder: float = 1.0) -> list[Any]:
        """Part a network's parameters by how they learn.

        Args:
            model: the network.
            encoder: factor on the rate of the parameters of its backbone.

        Returns:
            the parameters, or groups of them as torch's optimizers take them, in which "scale" is
            the factor on the learning rate; it is 1 in the first.
        """
        found: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            bias = bool(self.biases) and name.rpartition(".")[2] == "bias"
            key = encoder != 1 and name.startswith(ENCODER), bias
            found.setdefault(key, []).append(parameter)
        if list(found) in ([], [(False, False)]):
            return list(model.parameters())
        groups: list[dict[str, Any]] = []
        for (slow, bias), parameters in sorted(found.items(), key=lambda item: item[0]):
            options = {"scale": 1.0, **(self.biases if bias else {})}
            options["scale"] *= encoder if slow else 1.0
            groups.append({"params": parameters, **options})
        return groups


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
    "fcn-paper": Solver(
        partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4), _constant, {"scale": 2.0}
    ),
    "fcn-released": Solver(
        partial(torch.optim.SGD, momentum=0.99, weight_decay=5e-4),
        _constant,
        {"scale": 2.0, "weight_decay": 0.0},
        reduction="sum",
    ),
}

# What `training.fit` takes where its caller says nothing, by family of networks, solver and kind of
# device: options of the network; patch, pixels a side that a patch labels, of an FCN no more than
# the pictures have; batch, patches a step; learning_rate, the highest; gain, shift and symmetry of
# `data.patches.Patches`; deform, std of `data.augment.Deform`; normalise; steps, where no budget is
# given at all.
FAMILIES = {
    "unet": ("base", "depth", "padding", "norm", "dropout", "up"),
    "fcn": ("backbone", "width", "layout", "upsample", "at_once"),
    "unpoolnet": ("backbone", "width", "up"),
}
_UNET = {"normalise": "percentile", "symmetry": "d4", "gain": 0.2, "shift": 0.1, "up": "deconv"}
_MODERN_UNET = {**_UNET, "padding": "same", "norm": "batch", "dropout": 0.1, "deform": 0.0}
_PAPER_UNET = {
    **_UNET,
    "base": 64,
    "depth": 4,
    "padding": "valid",
    "norm": None,
    "dropout": 0.5,
    "patch": 388,
    "batch": 1,
    "learning_rate": 1e-3,
    "deform": ELASTIC,
}
_FCN = {"normalise": "none", "deform": 0.0, "backbone": "vgg16", "width": 1.0, "at_once": False}
_PHOTOS = {"symmetry": "mirror", "gain": 0.2, "shift": 0.1}
_MODERN_FCN = {**_FCN, **_PHOTOS, "layout": "aligned", "upsample": "bilinear"}
_UNPOOLNET = {**_FCN, **_PHOTOS, "backbone": "vgg16_bn", "up": "unpool"}
_PAPER_FCN = {
    **_FCN,
    "layout": "published",
    "patch": FCN_SIDE,
    "symmetry": "none",  # the paper saw no gain by mirroring
    "gain": 0.0,
    "shift": 0.0,
}
DEFAULTS: dict[tuple[str, str, str], dict[str, Any]] = {
    ("unet", "modern", "cpu"): {
        **_MODERN_UNET,
        "base": 16,
        "depth": 3,
        "patch": 128,
        "batch": 4,
        "learning_rate": 3e-3,
        "steps": 1000,
    },
    ("unet", "modern", "cuda"): {
        **_MODERN_UNET,
        "base": 32,
        "depth": 4,
        "patch": 256,
        "batch": 8,
        "learning_rate": 2e-3,
        "steps": 5000,
    },
    ("unet", "unet-paper", "cpu"): {**_PAPER_UNET, "steps": 200},
    ("unet", "unet-paper", "cuda"): {**_PAPER_UNET, "steps": 20_000},
    ("fcn", "modern", "cpu"): {
        **_MODERN_FCN,
        "backbone": "squeezenet1_0",
        "patch": 192,
        "batch": 6,
        "learning_rate": 5e-4,
        "steps": 1000,
    },
    ("fcn", "modern", "cuda"): {
        **_MODERN_FCN,
        "patch": 384,
        "batch": 8,
        "learning_rate": 1e-4,
        "steps": 5000,
    },
    ("unpoolnet", "modern", "cpu"): {
        **_UNPOOLNET,
        "patch": 192,
        "batch": 4,
        "learning_rate": 1e-3,
        "steps": 1000,
    },
    ("unpoolnet", "modern", "cuda"): {
        **_UNPOOLNET,
        "patch": 384,
        "batch": 8,
        "learning_rate": 1e-3,
        "steps": 5000,
    },
    ("fcn", "fcn-paper", "cpu"): {**_PAPER_FCN, "upsample": "learned", "batch": 20, "steps": 200},
    ("fcn", "fcn-paper", "cuda"): {
        **_PAPER_FCN, "upsample": "learned", "batch": 20, "steps": 20_000,
    },
    ("fcn", "fcn-released", "cpu"): {**_PAPER_FCN, "upsample": "fixed", "batch": 1, "steps": 200},
    ("fcn", "fcn-released", "cuda"): {
        **_PAPER_FCN, "upsample": "fixed", "batch": 1, "steps": 100_000,
    },
}  # fmt: skip


def family(model: str) -> str:
    """Return the family of a network of `models.MODELS`, by which its options go."""
    return "fcn" if model.startswith("fcn") else model


def defaults(solver: str, device: torch.device, model: str = "unet") -> dict[str, Any]:
    """Return the row of `DEFAULTS` for a solver, a device and a network, as a copy.

    Raises:
        ValueError: an unknown solver, or one of another network; the text lists the known.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver: expected one of {', '.join(SOLVERS)}, got {solver!r}")
    row = DEFAULTS.get((family(model), solver, device.type))
    if row is None:
        known = [name for kind, name, _ in DEFAULTS if kind == family(model)]
        raise ValueError(
            f"solver: expected one of {', '.join(dict.fromkeys(known))} for {model}, got {solver!r}"
        )
    return dict(row)


def rate_of_fcn(solver: str, backbone: str, stride: int, *, coarser: bool) -> float:
    """Return the learning rate of an FCN by one of its papers' solvers.

    Args:
        solver: "fcn-paper" or "fcn-released".
        backbone: its name.
        stride: 32, 16 or 8.
        coarser: whether the net starts from a coarser one.
    """
    if solver == "fcn-paper":
        return _FCN_RATES.get(backbone, 1e-4) * (0.01 if coarser else 1)
    return {32: 1e-10, 16: 1e-12, 8: 1e-14}[stride if coarser else 32]
