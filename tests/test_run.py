"""The run folder: what is in it, and what is said when it is not as it should be."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("safetensors", "tomli_w", "skimage"):
    pytest.importorskip(package)

from runs import one_thread, write_run  # noqa: E402, F401

from segfuse import run as folder  # noqa: E402
from segfuse.data import LabelCoding  # noqa: E402
from segfuse.errors import UserError  # noqa: E402
from segfuse.files import whole  # noqa: E402
from segfuse.models import UNet  # noqa: E402
from segfuse.run import Run  # noqa: E402


def said(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_weights_come_back(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", LabelCoding("classes", 3, 7, ("a", "b", "c")), channels=3)
    again = Run.open(str(tmp_path / "run"))
    assert again == run
    assert again.coding == LabelCoding("classes", 3, 7, ("a", "b", "c"))
    assert again.channels == 3
    before = torch.get_rng_state()
    model = again.model()
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    torch.manual_seed(0)
    expected = UNet(3, 3, base=2, depth=2, padding="same", norm="batch").state_dict()
    assert all(torch.equal(expected[name], value) for name, value in model.state_dict().items())


def test_network_is_laid_out_for_speed_and_kept(tmp_path: Path) -> None:
    run, cpu = write_run(tmp_path / "run"), torch.device("cpu")
    network: Any = run.network(cpu)
    assert network.bottom.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert run.network(cpu) is network
    assert run.model() is not network


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format = 1", "format = 2", "format 2.*update segfuse"),
        ("format = 1", 'format = "x"', "no format number"),
        ("format = 1", "", "no format number"),
        ("format = 1", "format =", "config.toml is damaged"),
        ("[data.", "[date.", "config.toml is damaged: no 'data'"),
        ("[model]", "[models]", "config.toml is damaged: no 'model'"),
        ('kind = "binary"', 'kind = "trinary"', "config.toml is damaged.*kind"),
        ('method = "percentile"', 'method = "magic"', "config.toml is damaged.*method"),
        ("in_channels = 1\nclasses = 2", "in_channels = 1\nclasses = 3", "3 classes.*labels 2"),
    ],
)
def test_config_that_does_not_fit(tmp_path: Path, old: str, new: str, message: str) -> None:
    write_run(tmp_path)
    edit(tmp_path / folder.CONFIG, old, new)
    with pytest.raises(UserError, match=message) as error:
        Run.open(tmp_path)
    assert str(tmp_path) in said(error)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('name = "unet"', 'name = "vnet"', "expected one of.*unet"),
        ("base = 2", "base = 0", "base"),
        ("base = 2", "basis = 2", "basis"),
        ("base = 2", "base = 3", r"model.safetensors is of another network.*expected shape"),
    ],
)
def test_network_that_cannot_be_built(tmp_path: Path, old: str, new: str, message: str) -> None:
    write_run(tmp_path)
    edit(tmp_path / folder.CONFIG, old, new)
    with pytest.raises(UserError, match=message) as error:
        Run.open(tmp_path).model()
    assert str(tmp_path) in said(error)


def test_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run folder: it has no config\.toml"):
        Run.open(tmp_path / "missing")
    (tmp_path / folder.CONFIG).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is damaged") as error:
        Run.open(tmp_path)
    said(error)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_weights_that_are_cut_short(tmp_path: Path, kept: int) -> None:
    weights = write_run(tmp_path).path / folder.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged") as error:
        Run.open(tmp_path).model()
    said(error)


def test_weights_that_are_missing(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / folder.WEIGHTS).unlink()
    with pytest.raises(UserError, match="before its first validation; resume it"):
        Run.open(tmp_path).model()


def test_results_that_are_missing(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    with pytest.raises(UserError, match=r"config\.toml is damaged: no 'result'") as error:
        _ = run.result
    said(error)


# Folders to write into


def test_claim(tmp_path: Path) -> None:
    folder.claim(tmp_path / "a" / "b", overwrite=False)
    assert [path.name for path in (tmp_path / "a" / "b").rglob("*")] == ["checkpoints"]
    with pytest.raises(UserError, match=r"holds files \(checkpoints\)"):
        folder.claim(tmp_path / "a" / "b", overwrite=False)

    run = write_run(tmp_path / "run")
    (run.path / "notes.txt").write_text("mine")
    (run.path / folder.LAST).touch()
    with pytest.raises(UserError, match="choose another folder, resume"):
        folder.claim(run.path, overwrite=False)
    assert Run.open(run.path) == run
    folder.claim(run.path, overwrite=True)
    left = sorted(path.name for path in run.path.rglob("*"))
    assert left == ["checkpoints", "notes.txt"]

    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="cannot write into"):
            folder.claim(path, overwrite=True)


def test_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for call in ("mkdir", "touch"):
        with monkeypatch.context() as patched:
            patched.setattr(Path, call, refuse)
            with pytest.raises(UserError, match=r"cannot write.*Read-only file system"):
                folder.claim(tmp_path / call, overwrite=False)


def test_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, _: Path(path) != tmp_path)
    with pytest.raises(UserError, match=f"cannot write into {tmp_path}: no permission"):
        folder.check_free(tmp_path / "a" / "b", overwrite=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no permission"):
        folder.check_free(Path("a"), overwrite=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_lock(tmp_path: Path) -> None:
    def refused() -> None:
        with (
            pytest.raises(UserError, match="is being trained by another process"),
            folder.locked(tmp_path),
        ):
            pass

    with folder.locked(tmp_path):
        refused()
        child = os.fork()
        if not child:  # a worker, which must not keep the lock of a parent that was killed
            os._exit(len(folder._locks))
        assert os.waitpid(child, 0)[1] == 0
        refused()
    assert not list(tmp_path.iterdir())
    with folder.locked(tmp_path):
        pass


def test_names_of_any_length(tmp_path: Path) -> None:
    long = tmp_path / ("é" * 125 + ".toml")
    with whole(long) as partial:
        assert partial.suffix == ".toml"
        partial.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == [long.name]
    for path in (tmp_path / ("x" * 256), long / "x"):
        with pytest.raises(UserError, match="cannot write"), whole(path) as partial:
            partial.write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == [long.name]


def test_full_disk_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    def fill(path: Path, data: Any, **_: Any) -> None:
        path.open("wb").close()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", fill)
    monkeypatch.setattr(Path, "write_text", fill)
    with pytest.raises(UserError, match=r"cannot write .*model\.safetensors: No space left"):
        folder.save_weights(tmp_path / folder.WEIGHTS, UNet(1, 2, base=2))
    with pytest.raises(UserError, match=r"cannot write .*config\.toml: No space left"):
        folder.write_config(tmp_path, run.config)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_config_without_nothing(tmp_path: Path) -> None:
    config = {"format": 1, "a": None, "b": {"c": None, "d": (1, 2)}, "e": [{"f": None}]}
    folder.write_config(tmp_path, config)
    assert folder.read_config(tmp_path) == {"format": 1, "b": {"d": [1, 2]}, "e": [{}]}
