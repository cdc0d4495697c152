"""Weights of backbones, from files and from the hubs of torchvision and timm."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ...geometry.glance import line
from .base import Backbone
from .scaling import Scaling

__all__ = ["Weights", "fill", "read_weights"]

State = dict[str, Tensor]


class Weights(NamedTuple):
    """A state dict in torchvision's names, and what else the network was trained as."""

    state: State
    scaling: Scaling | None = None
    options: Mapping[str, Any] = {}


def read_weights(name: str, source: str | Path) -> Weights:
    """Read what `backbone` documents.

    Raises:
        UserError: no such file, one that cannot be read, a hub that cannot be reached.
    """
    state = _HUBS[str(source)](name) if source in _HUBS else _read(Path(source))
    if name == "googlenet":  # its auxiliary classifiers, which serve the training from scratch
        state = {k: t for k, t in state.items() if not k.startswith(("aux1.", "aux2."))}
    return _from_caffe(name, state) if _is_caffe(name, state) else Weights(state)


def fill(net: Backbone, name: str, source: str | Path, state: State) -> None:
    """Give a network, which may be on the meta device, these tensors for its own, as float32.

    Raises:
        UserError: names or shapes that are not the network's.
    """
    expected = {**net.state_dict(), **net.scaling.state_dict(prefix="scaling.")}
    # Files of before torch 0.4.1 do not count the batches that normalisation has seen.
    counts = {k: torch.tensor(0) for k in expected if k.endswith(".num_batches_tracked")}
    state = counts | net.scaling.state_dict(prefix="scaling.") | state
    missing, more = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or more:
        raise UserError(
            f"{source}: expected the weights of {name}, got other names: "
            f"{_some('no', missing)}{' and ' * bool(missing and more)}{_some('a', more)}"
        )
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            raise UserError(
                f"{source}: expected {key} of shape {tuple(expected[key].shape)} for {name} "
                f"with {net.classes} classes, got {tuple(tensor.shape)}"
            )
        if expected[key].is_floating_point():
            if not tensor.is_floating_point():
                raise UserError(f"{source}: expected {key} to be floating, got {tensor.dtype}")
            state[key] = tensor.float()
    net.load_state_dict(state, assign=True)


def _some(what: str, names: list[str]) -> str:
    if not names:
        return ""
    rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{what} {names[0]!r}{rest}"


# Files


def _read(path: Path) -> State:
    if path.suffix not in _READERS:
        raise UserError(
            f"weights: expected a file {', '.join(_READERS)}, or one of "
            f"{', '.join(map(repr, _HUBS))}, got {str(path)!r}"
        )
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        state: Any = _READERS[path.suffix](path)
    except ImportError:
        raise
    except pickle.UnpicklingError as error:  # of which torch says how to read it all the same
        what = "it is damaged, or holds more than tensors"
        raise UserError(f"{path}: cannot be read as {path.suffix}: {what}") from error
    except Exception as error:  # of all kinds: zip's, RuntimeError, safetensors' own
        raise UserError(f"{path}: cannot be read as {path.suffix}: {line(error)}") from error
    for key in ("state_dict", "model"):  # a checkpoint that holds more than the weights
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(t, Tensor) for k, t in state.items()
    ):
        raise UserError(f"{path}: expected a state dict of tensors, got {type(state).__name__}")
    if state and all(name.startswith("module.") for name in state):  # of DataParallel
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return dict(state)


def _torch(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def _safetensors(path: Path) -> Any:
    try:
        reader = import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError(f"{path}: to read it, pip install safetensors") from error
    return reader.load_file(path)


def _numpy(path: Path) -> Any:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


_READERS: dict[str, Callable[[Path], Any]] = {
    ".pth": _torch,
    ".pt": _torch,
    ".safetensors": _safetensors,
    ".npz": _numpy,
}


# Hubs


def _torchvision(name: str) -> State:
    models = _hub("torchvision", "torchvision.models")
    return _fetched(
        "torchvision",
        lambda: models.get_model_weights(name)["IMAGENET1K_V1"].get_state_dict(progress=False),
    )


def _timm(name: str) -> State:
    if not name.startswith("vgg16"):
        raise UserError(f"timm: expected vgg16 or vgg16_bn, the backbones that it has, got {name}")
    timm = _hub("timm", "timm")
    model = f"{name}.tv_in1k"
    state = _fetched("timm", lambda: timm.create_model(model, pretrained=True).state_dict())
    # timm has VGG's fully connected layers as convolutions.
    layers = {"pre_logits.fc1": 0, "pre_logits.fc2": 3, "head.fc": 6}
    for layer, index in layers.items():
        weight, bias = state.pop(f"{layer}.weight"), state.pop(f"{layer}.bias")
        state[f"classifier.{index}.weight"] = weight.flatten(1)
        state[f"classifier.{index}.bias"] = bias
    return state


_HUBS: dict[str, Callable[[str], State]] = {"torchvision": _torchvision, "timm": _timm}


def _hub(library: str, module: str) -> Any:
    try:
        return import_module(module)
    except Exception as error:  # torchvision for another torch fails with a RuntimeError
        raise UserError(
            f"weights: {library} cannot be imported ({line(error)}): install it, or give a file"
        ) from error


def _fetched(library: str, fetch: Callable[[], Any]) -> State:
    try:
        return dict(fetch())
    except Exception as error:  # whatever the hub and the layers below it raise without a network
        raise UserError(
            f"weights: {library} cannot fetch them ({line(error)}): without a network, give a file"
        ) from error


# Caffe

_CAFFE_SQUEEZENET = {"conv1": "features.0", "conv10": "classifier.1"} | {
    f"fire{n}.{part}": f"features.{i}.{part}"
    for n, i in enumerate((3, 4, 5, 7, 8, 9, 10, 12), 2)
    for part in ("squeeze", "expand1x1", "expand3x3")
}
_CAFFE_VGG16 = {"fc6": "classifier.0", "fc7": "classifier.3", "fc8": "classifier.6"} | {
    f"conv{block}_{k}": f"features.{first + 2 * (k - 1)}"
    for block, first, count in ((1, 0, 2), (2, 5, 2), (3, 10, 3), (4, 17, 3), (5, 24, 3))
    for k in range(1, count + 1)
}


class _Caffe(NamedTuple):
    """A network of Caffe's that has ours as its twin: layers by its names, and its own ways."""

    layers: dict[str, str]
    mean: tuple[float, float, float]
    options: Mapping[str, Any] = {}


_CAFFE = {
    # conv10 pads by one element: its average is of a border of zeros too.
    "squeezenet1_0": _Caffe(_CAFFE_SQUEEZENET, (104, 117, 123), {"border": 1}),
    "vgg16": _Caffe(_CAFFE_VGG16, (103.939, 116.779, 123.68)),
}


def _is_caffe(name: str, state: State) -> bool:
    layers = {key.rpartition(".")[0] for key in state}
    return name in _CAFFE and layers == _CAFFE[name].layers.keys()


def _from_caffe(name: str, state: State) -> Weights:
    caffe = _CAFFE[name]
    renamed = {}
    for key, tensor in state.items():
        layer, _, kind = key.rpartition(".")
        renamed[f"{caffe.layers[layer]}.{kind}"] = tensor
    return Weights(renamed, Scaling.caffe(caffe.mean), caffe.options)
