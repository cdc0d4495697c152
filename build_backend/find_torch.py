"""Where is the torch to build against?  Shared by the build backend and by CMake.

The Stable ABI makes any torch from OLDEST on good enough: what is built against one loads into
the others.  Run as a program, it prints the folder of the torch package, or nothing.
"""

from __future__ import annotations

import importlib.util
import re
import site
import sysconfig
from collections.abc import Iterator
from pathlib import Path

OLDEST = (2, 11)


def candidates() -> Iterator[Path]:
    """The importable torch, then that of the environment which a build isolation hides."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        yield from map(Path, spec.submodule_search_locations)
    for folder in (*map(sysconfig.get_path, ("purelib", "platlib")), site.getusersitepackages()):
        yield Path(folder) / "torch"


def version(torch: Path) -> tuple[int, int] | None:
    """The version that a torch folder's headers state, None where there are no headers."""
    header = torch / "include" / "torch" / "headeronly" / "version.h"
    if not header.is_file():
        return None
    parts = dict(re.findall(r"define TORCH_VERSION_(MAJOR|MINOR) (\d+)", header.read_text()))
    return int(parts["MAJOR"]), int(parts["MINOR"])


def find() -> Path | None:
    """The first torch that is new enough, None where there is none."""
    for folder in candidates():
        found = version(folder)
        if found is not None and found >= OLDEST:
            return folder.resolve()
    return None


if __name__ == "__main__":
    print(find() or "", end="")
