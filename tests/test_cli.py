"""The command line: what it says, and with which exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from segfuse import cli, demo, info

testing = pytest.importorskip("typer.testing")
needs_demo = pytest.mark.skipif(
    any(demo.find_spec(name) is None for name in demo.PACKAGES), reason="needs segfuse[demo]"
)


def segfuse(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command."""
    result = testing.CliRunner().invoke(cli.application(), arguments)
    if not isinstance(result.exception, (SystemExit, type(None))):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_help() -> None:
    code, out, _ = segfuse("--help")
    assert code == 0
    assert "info" in out
    assert "demo" in out

    code, out, _ = segfuse("demo", "--help")
    assert code == 0
    assert "segfuse[demo]" in out
    for option in ("--output", "-o", "--seed", "--steps", "--time", "--threads", "--overwrite"):
        assert option in out


def test_info_is_plain_lines_without_a_terminal() -> None:
    code, out, err = segfuse("info")
    assert code == 0
    assert out.splitlines() == [f"{name}: {sentence}" for name, sentence in info.describe()]
    assert not err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--seed", "-1"),
        ("--seed", str(2**63)),
        ("--steps", "0"),
        ("--steps", "many"),
        ("--time", "0"),
        ("--time", "nan"),
        ("--time", "inf"),
        ("--threads", "0"),
    ],
)
def test_bad_values_get_one_line(tmp_path: Path, option: str, value: str) -> None:
    code, out, err = segfuse("demo", "-o", str(tmp_path / "new"), option, value)
    assert code == 2
    assert not out
    assert len(err.splitlines()) == 1
    assert option in err
    assert not (tmp_path / "new").exists()


def test_demo_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda _: None)
    code, _, err = segfuse("demo", "-o", str(tmp_path / "new"))
    assert code == 1
    assert len(err.splitlines()) == 1
    assert ", ".join(demo.PACKAGES) in err
    assert "pip install 'segfuse[demo]'" in err
    assert not (tmp_path / "new").exists()


@needs_demo
def test_demo_leaves_other_files_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    code, _, err = segfuse("demo", "-o", str(tmp_path))
    assert code == 1
    assert len(err.splitlines()) == 1
    assert "thesis.txt" in err
    assert "--overwrite" in err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@needs_demo
def test_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = segfuse("demo", "--steps", "1000", "--time", "1")
    assert code == 0
    assert not err
    assert "The time was up after" in out
    assert "of 1000 steps" in out
    assert "0.767" in out  # Otsu's foreground IU
    written = [tmp_path / "segfuse-demo" / name for name in demo.FILES]
    assert sorted(tmp_path.rglob("[!.]*.*")) == sorted(written)
    assert all(str(path) in out for path in written)


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_command_line_packages(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # import then says it is not there
    with pytest.raises(SystemExit, match=r"pip install 'segfuse\[cli\]'") as stop:
        cli.main()
    assert package in str(stop.value)


def test_importing_the_package_is_light() -> None:
    heavy = ("lightning", "matplotlib", "rich", "skimage", "stardist", "tifffile", "typer")
    code = f"import segfuse, sys; sys.exit(any(name in sys.modules for name in {heavy}))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_module_is_the_command() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-m", "segfuse", "info"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "torch: " in run.stdout
