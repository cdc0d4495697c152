"""scikit-build-core, and two things more.

torch is a build requirement only where none is found, and where the machine cannot build, the
message says what works.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from typing import Any

from scikit_build_core import build as _backend
from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

import find_torch

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

SUPPORTED = ("Linux on x86-64 or aarch64", {"x86_64", "aarch64"})


def _refuse_what_cannot_be_built() -> None:
    words, machines = SUPPORTED
    here = f"{platform.system()} on {platform.machine()}"
    if platform.system() != "Linux" or platform.machine() not in machines:
        sys.exit(f"segfuse: building on {here} is not supported; {words} works.")
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    if not any(shutil.which(name.split()[0]) for name in compilers if name.strip()):
        sys.exit(
            "segfuse: no C++ compiler was found; g++ 11 or newer works "
            "(Debian, Ubuntu: apt install g++), or name another with CXX=..."
        )


def _with_torch(requirements: list[str]) -> list[str]:
    _refuse_what_cannot_be_built()
    if find_torch.find() is None:
        major, minor = find_torch.OLDEST
        requirements.append(f"torch>={major}.{minor}")
    return requirements


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return _with_torch(_backend.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return _with_torch(_backend.get_requires_for_build_editable(config_settings))
