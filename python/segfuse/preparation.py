"""What a training needs before its first step: arguments checked, files read, weights found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import nn

from . import models, pictures
from . import run as folder
from .data.labels import LabelCoding, detect, read_colours
from .data.pairs import Pair, pair
from .data.pairs import split as split_pairs
from .data.patches import Picture
from .data.resize import Resize
from .errors import UserError
from .files import sha256
from .options import STRIDES, check_objective, fill, fit_together, normalisation
from .run import Run

__all__ = ["HUBS", "Prepared", "begun", "plain", "prepare"]

HUBS = ("torchvision", "timm")  # may be named in place of a file of weights


class Prepared(NamedTuple):
    """A training that can begin.

    Attributes:
        config: what the run folder will say of it.
        sides: pictures to train on, and to validate with.
        began: what `time.perf_counter` gave when it was asked for.
        model: the network, where it has weights to start from.
    """

    config: dict[str, Any]
    sides: list[list[Picture]]
    began: float
    model: nn.Module | None


def prepare(given: dict[str, Any]) -> Prepared:
    """Check all arguments of `training.fit` but the output, and read the files.

    Raises:
        UserError: see `training.fit`; nothing is written.
    """
    began, (images, labels) = perf_counter(), (given["images"], given["labels"])
    with _told():
        network, options = fill(given)
        scaling, resize = normalisation(given), Resize.of(given["resize"])
        start = _start(given)
        pairs = pair(images, labels)
        train, held_out = split_pairs(pairs, given["split"], given["validation"], options.seed)
        if options.patience is not None and not held_out:
            raise UserError("patience: expected pictures held out for validation, got none")
        coding = _coding(given, pairs, {p.labels for p in (*train, *held_out)})
        touching = options.objective == "touching"
        sides = [
            pictures.read(side, coding, scaling, instances=touching, resize=resize)
            for side in (train, held_out)
        ]
        _check(sides, coding, labels, touching=touching)
        channels = len(sides[0][0].image)
        name, classes = given["model"], coding.classes
        network = {"name": name, "in_channels": channels, "classes": classes, **network}
        if given["coarser"] is not None:
            theirs = Run.open(given["coarser"]).config["model"]
            for key in ("in_channels", "classes"):
                if network[key] != theirs[key]:
                    raise UserError(
                        f"coarser: expected {key} {network[key]}, as of these pictures, got "
                        f"{theirs[key]}"
                    )
        options = fit_together(options, network, sides[0], exact=given["patch"] is not None)
    config = {
        "format": folder.FORMAT,
        "segfuse": version("segfuse"),
        "torch": torch.__version__,
        "model": network,
        "start": start,
        "data": {
            "images": str(Path(images).absolute()),
            "labels": str(Path(labels).absolute()),
            "split": str(given["split"]),
            "fraction": given["validation"],
            "checksum": pictures.checksum(chain(*sides)),
            "coding": coding.to_dict(),
            "normalisation": scaling.to_dict(),
            "resize": resize and resize.plain(),
            "train": [pictures.as_dict(p) for p in train],
            "validation": [pictures.as_dict(p) for p in held_out],
        },
        "training": asdict(options),
    }
    folder.encoded(config)  # refuses names that it cannot hold before anything is removed
    model = None
    if start:
        with plain():
            model = begun(config)  # refuses weights that do not fit likewise
    return Prepared(config, sides, began, model)


def _coding(given: dict[str, Any], pairs: Sequence[Pair], used: set[Path]) -> LabelCoding:
    """Find out how the labels that are used are coded."""
    # In natural order, as `inspect` samples them, whatever the split.
    files = list(dict.fromkeys(p.labels for p in pairs if p.labels in used))
    asked = {name: given[name] for name in ("kind", "classes", "ignore", "names")}
    coding = detect(files, **asked)
    check_objective(given["objective"], coding.kind, given["labels"])
    if coding.classes == 1:
        raise UserError(f"{given['labels']}: expected two classes at least, found one")
    if given["colours"] is None:
        return coding
    if coding.kind != "classes":
        raise UserError(f"colours: go with labels that are classes, and these are {coding.kind}")
    return replace(coding, palette=read_colours(given["colours"], coding.classes))


def _check(
    sides: Sequence[Sequence[Picture]], coding: LabelCoding, labels: object, *, touching: bool
) -> None:
    """See that there is something to learn in the pictures of both sides."""
    most = max((int(p.ids.max()) for p in sides[0] if p.ids is not None), default=0)
    if touching and most <= 1:
        raise UserError(
            f"{labels}: no picture to train on has two ids, by which objective touching tells "
            "cells apart: number them, as skimage.measure.label does those that do not touch, "
            "or take objective classes"
        )
    for side, name in zip(sides, ("train on", "validate with"), strict=True):
        if side and all((picture.target == coding.VOID).all() for picture in side):
            raise UserError(f"{labels}: the pictures to {name} have no pixel that counts")
    seen = np.zeros(256, np.int64)
    for picture in sides[0]:
        seen += np.bincount(picture.target.ravel(), minlength=256)
    if np.count_nonzero(seen[: coding.classes]) == 1:
        only = coding.names[int(seen[: coding.classes].argmax())]
        raise UserError(
            f"{labels}: the pictures to train on show no class but {only}: see how the labels "
            "were read (segfuse inspect), and set kind, classes or ignore"
        )


def _start(given: dict[str, Any]) -> dict[str, str] | None:
    """Name the weights that a training starts from, with the checksum of their file."""
    if given["coarser"] is not None:
        path = Run.open(given["coarser"]).path.absolute()
        weights = path / folder.WEIGHTS
        if not weights.exists():
            raise UserError(f"coarser: {path} has no weights yet: resume it")
        return {"coarser": str(path), "sha256": sha256(weights)}
    if given["pretrained"] is None:
        return None
    if given["pretrained"] in HUBS:
        return {"pretrained": given["pretrained"]}
    path = Path(given["pretrained"]).absolute()
    return {"pretrained": str(path), "sha256": sha256(path)}


def begun(config: dict[str, Any]) -> nn.Module:
    """Make the network of a run with the weights that it starts from, the others by its seed.

    Raises:
        UserError: these are gone, have changed, or do not fit.
    """
    start, network = config["start"], config["model"]
    weights = Path(start.get("pretrained") or Path(start["coarser"]) / folder.WEIGHTS)
    if "sha256" in start and sha256(weights) != start["sha256"]:
        raise UserError(f"{weights} has changed since the training was begun: train anew")
    if "coarser" in start:
        coarser = cast(models.FCN, Run.open(start["coarser"]).model().train())
        stride: Any = STRIDES[network["name"]]
        return models.FCN.from_coarser(coarser, stride=stride)
    with _told(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config["training"]["seed"])
        return models.build(**network, weights=start["pretrained"])


@contextmanager
def _told() -> Iterator[None]:
    """Tell the user what the package's parts refuse."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error


@contextmanager
def plain() -> Iterator[None]:
    """Train as ever, whatever dtype or inference mode the caller has set."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(mode=False):
            yield
    finally:
        torch.set_default_dtype(dtype)
