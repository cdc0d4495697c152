"""The emulator of CUDA on the host: its self-test, compiled plainly and with sanitizers."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "emulator_selftest.cpp"
COMPILER = shlex.split(os.environ.get("CXX", "")) or ["c++"]
FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-O1", "-g", "-pthread"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

pytestmark = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C++ compiler")


def build(folder: Path, *flags: str) -> Path:
    """Compile the self-test into folder."""
    program = folder / "selftest"
    command = [*COMPILER, *FLAGS, *flags, str(SOURCE), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


def run(program: Path, *arguments: str, seed: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the self-test, without what an environment may preload or ask of sanitizers."""
    hidden = ("LD_PRELOAD", "ASAN_OPTIONS", "UBSAN_OPTIONS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment["SEGFUSE_EMULATOR_SEED"] = str(seed)
    return subprocess.run(
        [str(program), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=300,
    )


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the self-test as it is."""
    return build(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the self-test with AddressSanitizer and UndefinedBehaviorSanitizer."""
    return build(tmp_path_factory.mktemp("sanitized"), *SANITIZE)


@pytest.mark.parametrize("variant", ["plain", "sanitized"])
def test_selftest(variant: str, request: pytest.FixtureRequest) -> None:
    """Every check holds, and no sanitizer complains of the emulator itself."""
    done = run(request.getfixturevalue(variant))
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_environment_sets_the_seed(plain: Path) -> None:
    """The same seed gives a race the same outcome, another seed another."""
    zero, one, again, two = (run(plain, "race", seed=seed).stdout for seed in (0, 1, 1, 2))
    assert one == again
    assert zero != one != two != zero


@pytest.mark.parametrize(
    ("kind", "report"),
    [
        ("overrun-dynamic", "AddressSanitizer: heap-buffer-overflow"),
        ("overrun-static", "index 64 out of bounds"),
    ],
)
def test_overrun_is_reported(sanitized: Path, kind: str, report: str) -> None:
    """The sanitizers see a kernel reach past its shared memory."""
    done = run(sanitized, kind)
    assert done.returncode != 0
    assert report in done.stderr
