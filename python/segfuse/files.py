"""Writing files so that nothing is lost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError

__all__ = ["sync", "whole"]


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Lend a temporary name beside `path` that becomes `path` once its file is whole.

    The temporary name keeps the suffixes of `path`. If the block raises, it is removed and `path`
    is left as it was.

    Raises:
        UserError: the file system refuses.
    """
    # The end of the name has the suffixes, and room for what stands before it.
    partial = path.with_name(f".partial-{os.getpid()}-{path.name[-40:]}")
    try:
        yield partial
        partial.replace(path)
    except OSError as error:
        why = error.strerror or f"{error} (is the disk full?)"  # as NumPy says of a short write
        raise UserError(f"cannot write {path}: {why}") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
