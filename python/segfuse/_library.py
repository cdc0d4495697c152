"""Loads the compiled libraries; what they hold is in ``torch.ops.segfuse`` afterwards."""

from __future__ import annotations

import re
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
    from . import _C
except ImportError as error:
    raise ImportError(f"segfuse's compiled module did not load: {error}") from error

FOLDER = Path(_C.__file__).parent
"""Where the compiled libraries are; an editable install keeps them apart from the sources."""


def _load_cuda() -> str:
    """Load the CUDA kernels; the reason why not, or "" where they are loaded."""
    if not _C.cuda_architectures:
        return "segfuse was built without CUDA kernels, since no nvcc was found at build time"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    try:
        torch.ops.load_library(str(FOLDER / "_cuda.so"))
    except OSError as error:
        return f"segfuse's CUDA library did not load: {error}"
    return ""


cuda_missing = _load_cuda()
"""Why the CUDA kernels are not loaded; "" where they are."""
