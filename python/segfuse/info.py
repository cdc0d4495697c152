"""What was built, and what this machine can run of it: ``segfuse info``."""

from __future__ import annotations

import platform
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
    gpu, reason = torch.cuda.get_device_name(), _library.why_not_on()
    if reason:
        return f"cannot run on {gpu}: {reason}"
    return f"runs on {gpu} (kernels for {_C.cuda_architectures}, CUDA {_C.cuda_version})"
