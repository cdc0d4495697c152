"""Writing files so that nothing is lost."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError

__all__ = ["check_free", "sha256", "sync", "whole"]


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


def sha256(path: Path) -> str:
    """Return the checksum of a file, in hexadecimal digits.

    Raises:
        UserError: it cannot be read.
    """
    found = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                found.update(block)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return found.hexdigest()


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def check_free(file: Path | None, suffixes: tuple[str, ...] | None, *, overwrite: bool) -> None:
    """See that a file may be written to.

    Args:
        file: None passes.
        suffixes: that its name may end in; None allows any.
        overwrite: whether a file that is there may be replaced.

    Raises:
        UserError: it may not.
    """
    if file is None:
        return
    if suffixes and file.suffix.lower() not in suffixes:
        raise UserError(f"{file}: expected a name that ends in {', '.join(suffixes)}")
    if file.exists() and not (overwrite and file.is_file()):
        raise UserError(f"{file} exists: choose another name, or say --overwrite")
    if not file.parent.is_dir():
        raise UserError(f"cannot write {file}: {file.parent} is no folder")
