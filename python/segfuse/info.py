"""What was built, and what this machine can run of it: ``segfuse info``."""

from __future__ import annotations

import platform
import re
from importlib.metadata import version

import torch

from . import _C, _library


def describe() -> list[tuple[str, str]]:
    """Pairs of a name and a sentence, for people; nothing is started on the GPU."""
    isas = ", ".join(_C.isas())
    return [
        ("segfuse", f"{version('segfuse')}, built against torch {_C.torch_version}"),
        ("torch", f"{torch.__version__} (any from {_C.torch_target} on works)"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("cpu", f"{_C.isa()} kernels on {torch.get_num_threads()} threads; has {isas}"),
        ("cuda", cuda_sentence()),
    ]


def cuda_sentence() -> str:
    """Whether the CUDA kernels can run here, and if not, why."""
    if _library.cuda_missing:
        return f"cannot run: {_library.cuda_missing}"
    if not torch.cuda.is_available():
        return (
            f"cannot run: the kernels are loaded, but torch {torch.__version__} finds no GPU that "
            f"it can use (none there, no driver, or one too old for CUDA {torch.version.cuda})"
        )
    gpu, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    built = _C.cuda_architectures
    if not runs_on(capability, built):
        return f"cannot run: {gpu} is sm_{capability[0]}{capability[1]}, built were {built}"
    return f"runs on {gpu} (kernels for {built}, CUDA {_C.cuda_version})"


def runs_on(capability: tuple[int, int], architectures: str) -> bool:
    """Whether code for ``architectures`` (as CMake writes them, "80-real 90") runs on a GPU.

    Machine code runs on the same major version from its minor version on; PTX ("90", unless it is
    "90-real") is compiled by the driver for anything newer.
    """
    for major, minor, kind in re.findall(r"(\d+)(\d)[a-z]*(-\w+)?", architectures):
        built = int(major), int(minor)
        if kind != "-virtual" and built[0] == capability[0] and built <= capability:
            return True
        if kind != "-real" and built <= capability:
            return True
    return False
