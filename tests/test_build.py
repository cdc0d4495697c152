"""What the build and the import promise, and the sentences that say when they cannot."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from segfuse import _C
from segfuse._library import runs_on
from segfuse.info import describe

BACKEND = Path(__file__).parents[1] / "build_backend"


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BACKEND))
    return importlib.import_module("segfuse_build")


def test_an_old_torch_is_refused_in_one_sentence() -> None:
    done = python("import torch; torch.__version__ = '2.10.1+cu128'; import segfuse")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "ImportError: segfuse needs torch 2.11 or newer, and torch 2.10.1+cu128 is installed: "
        "pip install -U torch"
    )


def test_a_missing_module_is_named_in_one_sentence() -> None:
    done = python("import sys; sys.modules['segfuse._C'] = None; import segfuse")
    assert done.stderr.splitlines()[-1] == (
        "ImportError: segfuse's compiled module is not there: it must be built, by pip install"
    )


@pytest.mark.parametrize("isa", _C.isas())
def test_the_environment_chooses_an_instruction_set(isa: str) -> None:
    done = python("import segfuse; print(segfuse._C.isa())", SEGFUSE_ISA=isa)
    assert done.stdout.split()[-1] == isa


def test_an_unknown_instruction_set_is_refused() -> None:
    done = python("import segfuse", SEGFUSE_ISA="mmx")
    assert "SEGFUSE_ISA: this CPU has baseline" in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].endswith("got mmx")


def test_importing_needs_torch_and_numpy_alone() -> None:
    """And leaves what the command line and the demo need unloaded."""
    done = python(
        "import sys, segfuse\n"
        "late = {'typer', 'rich', 'lightning', 'matplotlib', 'skimage', 'tifffile', 'stardist'}\n"
        "print(sorted(late & set(sys.modules)))"
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_info_says_in_one_sentence_whether_cuda_can_run() -> None:
    facts = dict(describe())
    assert facts["cuda"].startswith(("cannot run: ", "runs on "))
    assert torch.__version__ in facts["torch"]
    assert _C.isa() in facts["cpu"]


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((8, 0), "80-real 90", True),
        ((8, 6), "80-real 90", True),  # machine code runs on later minor versions
        ((7, 5), "80-real 90", False),
        ((8, 0), "86-real", False),
        ((12, 0), "80-real 90", True),  # from PTX
        ((12, 0), "90-real", False),
        ((12, 0), "90a-real 120", True),
        ((9, 0), "80-virtual", True),
        ((9, 0), "", False),
        ((9, 0), "native", True),
        ((9, 0), "90a", True),
        ((10, 0), "90a", False),
        ((12, 1), "120a-real", False),
    ],
)
def test_which_gpus_code_runs_on(
    capability: tuple[int, int], architectures: str, expected: bool
) -> None:
    assert runs_on(capability, architectures) is expected


def test_torch_is_required_to_build_only_where_there_is_none(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any("torch" in word for word in backend.get_requires_for_build_wheel())
    monkeypatch.setattr(backend.find_torch, "candidates", lambda: iter(()))
    assert "torch>=2.11" in backend.get_requires_for_build_wheel()
    assert "torch>=2.11" in backend.get_requires_for_build_editable()


def test_an_older_torch_does_not_count(backend: ModuleType, tmp_path: Path) -> None:
    header = tmp_path / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 10\n")
    assert backend.find_torch.version(tmp_path) == (2, 10)
    assert backend.find_torch.version(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    ("system", "machine"), [("Windows", "AMD64"), ("Darwin", "arm64"), ("Linux", "riscv64")]
)
def test_other_platforms_are_refused(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, system: str, machine: str
) -> None:
    monkeypatch.setattr(backend.platform, "system", lambda: system)
    monkeypatch.setattr(backend.platform, "machine", lambda: machine)
    with pytest.raises(SystemExit, match="Linux on x86-64 or aarch64 works"):
        backend.get_requires_for_build_wheel()


def test_a_missing_compiler_is_named(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend.shutil, "which", lambda _: None)
    with pytest.raises(SystemExit, match="no C\\+\\+ compiler was found; g\\+\\+ 11 or newer"):
        backend.get_requires_for_build_wheel()


def test_the_operator_in_contributing_compiles(tmp_path: Path) -> None:
    """Its Python part too; the rest of the five steps is three lines."""
    text = (BACKEND.parent / "CONTRIBUTING.md").read_text()
    blocks = re.findall(r"```(cpp|python)\n(.*?)```", text, re.DOTALL)
    kernel = next(body for language, body in blocks if language == "cpp")
    meaning = next(body for language, body in blocks if language == "python")
    compile(meaning, "blend.py", "exec")
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "blend.cpp").write_text(kernel)
    include = Path(str(torch.__file__)).parent / "include"
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-isystem", str(include)]
    target = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"
    sources = [f"-I{BACKEND.parent / 'csrc'}", str(tmp_path / "blend.cpp")]
    done = subprocess.run(
        [compiler, *flags, target, *sources], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
