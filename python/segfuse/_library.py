"""Loads the compiled libraries; what they hold is in ``torch.ops.segfuse`` afterwards."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import torch

OLDEST_TORCH = (2, 11)


def _require_torch() -> None:
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found is None or (int(found[1]), int(found[2])) < OLDEST_TORCH:
        raise ImportError(
            f"segfuse needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, "
            f"and torch {torch.__version__} is installed: pip install -U torch"
        )


_require_torch()

try:
    _C = import_module("segfuse._C")
except ModuleNotFoundError as error:
    raise ImportError(
        "segfuse's compiled module is not there: it must be built, by pip install"
    ) from error
except ImportError as error:
    raise ImportError(f"segfuse's compiled module did not load: {error}") from error

FOLDER = Path(str(_C.__file__)).parent
"""Where the compiled libraries are; an editable install keeps them apart from the sources."""


def _load_cuda() -> str:
    """Load the CUDA kernels; the reason why not, or "" where they are loaded."""
    if not _C.cuda_architectures:
        return "segfuse was built without CUDA kernels (no fitting nvcc, or SEGFUSE_CUDA=OFF)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    try:
        torch.ops.load_library(str(FOLDER / "_cuda.so"))
    except OSError as error:
        return f"segfuse's CUDA library did not load: {error}"
    return ""


cuda_missing = _load_cuda()
"""Why the CUDA kernels are not loaded; "" where they are."""

_reasons: dict[tuple[int, int], str] = {}


def why_not_on(gpu: torch.device | int | None = None) -> str:
    """Why the kernels cannot run on a GPU that torch can use; "" where they can."""
    if cuda_missing or torch.compiler.is_compiling():
        return cuda_missing
    capability = torch.cuda.get_device_capability(gpu)
    if capability not in _reasons:
        built = _C.cuda_architectures
        words = f"it is sm_{capability[0]}{capability[1]}, and built were {built}"
        _reasons[capability] = "" if runs_on(capability, built) else words
    return _reasons[capability]


def runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Whether code for ``architectures`` (as CMake writes them, "80-real 90") runs on a GPU.

    Machine code runs on the same major version from its minor version on; PTX ("90", unless it is
    "90-real") is compiled by the driver for anything newer; what ends in "a" runs where it was made
    for.  CMake's "native" and "all" are taken to fit.
    """
    for name in architectures.split():
        found = re.fullmatch(r"(\d+)(\d)(a?)\w?(-\w+)?", name)
        if found is None:
            return True
        built = int(found[1]), int(found[2])
        if found[3]:
            if built == capability:
                return True
            continue
        if found[4] != "-virtual" and built[0] == capability[0] and built <= capability:
            return True
        if found[4] != "-real" and built <= capability:
            return True
    return False
