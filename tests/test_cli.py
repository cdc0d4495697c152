"""The command line: what it says, and with which exit code."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

testing = pytest.importorskip("typer.testing")
for package in ("imagecodecs", "lightning", "matplotlib", "safetensors", "skimage", "tifffile"):
    pytest.importorskip(package, reason="needs segfuse[cli]")

import tifffile  # noqa: E402

from segfuse import (  # noqa: E402
    cli,
    demo,
    info,
    instances,
    ops,
    predict_command,
    prediction_files,
    terminal,
    train_command,
    training,
)
from segfuse.data import Normalisation, image_header, read_labels, write_labels  # noqa: E402
from segfuse.models import MODELS  # noqa: E402
from segfuse.models.backbones import BACKBONES  # noqa: E402
from segfuse.solvers import SOLVERS  # noqa: E402

COMMANDS = ("train", "predict", "evaluate", "weights", "anatomy", "inspect", "info", "demo")
needs_demo = pytest.mark.skipif(
    any(demo.find_spec(name) is None for name in demo.PACKAGES), reason="needs segfuse[demo]"
)


def segfuse(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command."""
    result = testing.CliRunner().invoke(cli.application(), arguments)
    if not isinstance(result.exception, (SystemExit, type(None))):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def refused(code: int, *arguments: str | Path) -> str:
    """The one line that a command answers with, instead of anything else."""
    got, out, err = segfuse(*map(str, arguments))
    assert got == code, err
    assert not out
    assert err.startswith("segfuse: ")
    assert len(err.splitlines()) == 1
    return err


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help(arguments: tuple[str, ...]) -> None:
    code, out, _ = segfuse(*arguments)
    assert code == 0
    for command in COMMANDS:
        assert command in out

    code, out, _ = segfuse("demo", "--help")
    assert code == 0
    assert "segfuse[demo]" in out
    for option in ("--output", "-o", "--seed", "--steps", "--time", "--threads", "--overwrite"):
        assert option in out


def test_version() -> None:
    assert segfuse("--version") == (0, f"{info.version('segfuse')}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command: str) -> None:
    code, out, _ = segfuse(command, "--help")
    assert code == 0
    assert "--help" in out


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
    assert "segfuse: " not in err
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


# Usage


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_options_get_one_line(command: str) -> None:
    assert "--nonsense" in refused(2, command, "--nonsense")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--nonsense"], "--nonsense"),
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["train"], "Missing --images, --labels, --output, or --resume"),
        (["train", "--images", "x", "-o", "y"], "Missing --labels, or --resume"),
        (["train", "--steps"], "--steps"),
        (["train", "--steps", "0"], "--steps"),
        (["train", "--kind", "colours"], "'classes', 'binary', 'instances'"),
        (["train", "--validation", "1"], "--validation"),
        (["train", "--class-names", "a,a"], "--class-names"),
        (["train", "--resume", "x", "--steps", "3"], "--resume: goes alone"),
        (["train", "--resume", "x", "--class-names", "a,b"], "got --class-names too"),
        (["predict"], "Missing argument"),
        (["predict", "run"], "Missing argument"),
        (["predict", "run", "images"], "--output"),
        (["predict", "run", "images", "-o", "a", "--tile", "512x"], "pixels such as 512, or 512x7"),
        (
            ["predict", "run", "images", "-o", "a", "--overlap", "1.5"],
            "a share below 1 such as 0.5",
        ),
        (["predict", "run", "images", "-o", "a", "--batch", "0"], "--batch"),
        (["predict", "run", "images", "-o", "a", "--blend", "linear"], "'gaussian', 'hann'"),
        (["evaluate", "a"], "Missing argument"),
        (["evaluate", "a", "b", "c"], "unexpected extra argument"),
        (["evaluate", "a", "b", "--classes", "256"], "--classes"),
        (["evaluate", "a", "b", "--instances", "--boundaries"], "does not go with --instances"),
        (["evaluate", "a", "b", "--instances", "--picture=c.png"], "does not go with --picture"),
        (["evaluate", "a", "b", "--instances", "--kind=classes"], "not go with --kind classes"),
        (["evaluate", "a", "b", "--boundaries", "--ignore=0"], "does not go with --ignore"),
        (["evaluate", "a", "b", "--boundaries", "--kind=binary"], "does not go with --kind"),
        (["predict", "run", "images", "-o", "a", "--smallest", "0"], "--smallest"),
        (["predict", "run", "images", "-o", "a", "--grow", "up"], "'gaps', 'everywhere'"),
        (["weights", "a"], "--output"),
        (["inspect"], "--images"),
        (["info", "more"], "unexpected extra argument"),
    ],
)
def test_wrong_usage_gets_one_line(arguments: list[str], text: str) -> None:
    assert text in refused(2, *arguments)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("300s", 300), ("5m", 300), ("1h", 3600), ("1.5h", 5400), (".5m", 30)],
)
def test_durations(text: str, seconds: float) -> None:
    assert terminal.duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "1d", "5 m", "nan", "inf", "1e3", "9999999h", "h"])
def test_what_is_no_duration(text: str) -> None:
    assert "expected a duration like 90, 300s" in refused(2, "train", f"--time={text}")


def test_class_names(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("sky\npotted plant\n\n")
    assert terminal.class_names("a, b,c") == ["a", "b", "c"]
    assert terminal.class_names(str(tmp_path / "names.txt")) == ["sky", "potted plant"]
    assert terminal.class_names(None) is None


def test_train_takes_what_fit_takes() -> None:
    ours, theirs = (
        dict(inspect.signature(function).parameters)
        for function in (train_command.train, training.fit)
    )
    ours["names"] = ours.pop("class_names")
    assert set(ours) - {"ctx", "resume", "stages"} == set(theirs) - {"progress"}
    for name in set(ours) & set(theirs) - {"images", "labels", "output"}:
        assert ours[name].default == theirs[name].default, name
    hints = get_type_hints(train_command.train)
    assert get_args(hints["solver"]) == tuple(SOLVERS)
    assert get_args(hints["model"]) == tuple(MODELS)
    (method, _) = get_args(hints["normalise"])  # and None
    assert method == get_type_hints(Normalisation)["method"]
    assert get_args(get_args(hints["backbone"])[0]) == tuple(sorted(BACKBONES))


# From images to figures


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `images` and `labels`: six pictures of bright squares."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for i in range(6):
        mask = np.kron(random.integers(0, 2, (3, 4)), np.ones((12, 12))).astype(np.uint8)
        image = (100 * mask + random.integers(0, 100, mask.shape)).astype(np.uint8)
        write_labels(folder / f"images/{i}.png", image[None])
        write_labels(folder / f"labels/{i}.png", 255 * mask[None])
    return folder


def train(data: Path, output: Path, *options: str | Path) -> tuple[str | Path, ...]:
    small = [
        "--steps=2",
        "--base=2",
        "--depth=1",
        "--batch=1",
        "--patch=16",
        "--threads=1",
        "--device=cpu",
    ]
    folders = ("--images", data / "images", "--labels", data / "labels", "-o", output)
    return ("train", *folders, *small, *options)


@pytest.fixture(scope="module")
def trained(data: Path) -> tuple[Path, str]:
    """A run folder, and what was printed as it was made."""
    code, out, err = segfuse(*map(str, train(data, data / "run", "--split", "block")))
    assert code == 0, err
    return data / "run", out


def test_train(trained: tuple[Path, str]) -> None:
    run, out = trained
    for text in (
        "images: 6 files",
        "36 x 48",
        "coding: binary, 2 classes",
        "pages: 5 to train on, 1 held out for validation",
        "model: unet,",
        "parameters; base 2, depth 1",
        "training: modern, 2 steps, 1 patches a step, learning rate 0.003, precision",
        "2 steps in",
        "validation, best at step",
        f"run folder {run}: checkpoints",
    ):
        assert text in out
    foreground = re.search(r"foreground: ([\d.]+)%", out)
    assert foreground is not None
    shares = [read_labels(file).astype(bool).mean() for file in (run.parent / "labels").iterdir()]
    assert float(foreground[1]) == pytest.approx(100 * np.mean(shares), abs=0.01)
    assert (run / "model.safetensors").exists()


def test_predict_takes_what_predict_files_takes() -> None:
    ours, theirs = (
        dict(inspect.signature(function).parameters)
        for function in (predict_command.predict, prediction_files.predict_files)
    )
    assert set(ours) == set(theirs) - {"progress"}
    for name in set(ours) - {"run", "images", "output"}:
        assert ours[name].default == theirs[name].default, name
    ours, theirs = map(get_type_hints, (predict_command.predict, prediction_files.predict_files))
    assert all(ours[name] == theirs[name] for name in ("border", "blend", "augment", "grow"))


def test_predict_and_evaluate(trained: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = trained
    images, out = run.parent / "images", tmp_path / "out"
    predict = ("predict", str(run), str(images), "-o", str(out), "--probabilities", "--threads=1")
    code, said, _ = segfuse(*predict)
    assert code == 0
    assert f"to predict: 6 files, {6 * 36 * 48 / 1e6:.3g} Mpx; 6 whole; on cpu" in said
    assert f"12 files written to {out}: {6 * 36 * 48 / 1e6:.3g} Mpx in" in said
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert len(before) == 12
    assert "0.png exists" in refused(1, *predict)
    for file in out.glob("*_probabilities.tif"):
        assert image_header(file)[1:4] == (2, 36, 48)  # which `evaluate` leaves aside

    files = "--json", str(tmp_path / "all.json"), "--picture", str(tmp_path / "matrix.png")
    evaluate = ("evaluate", str(out), str(run.parent / "labels"), *files)
    code, said, _ = segfuse(*evaluate, "--class-names", "[dark],bright")
    assert code == 0
    assert f"6 pictures, {6 * 36 * 48:,} pixels that count, 0 that do not" in said
    assert "labels read as binary, predictions as binary" in said
    rows = [line.split() for line in said.splitlines()]
    assert ["class", "pixels", "IU", "accuracy"] in rows
    figures = json.loads((tmp_path / "all.json").read_text())
    assert ["mean", "IU", f"{figures['mean_iu']:.4f}"] in rows
    assert "[dark]" in {row[0] for row in rows}
    assert [figures["files"][0]["name"], *(f"{figures['files'][0][k]:.4f}" for k in
            ("mean_iu", "pixel_accuracy"))] in rows  # fmt: skip
    assert (tmp_path / "matrix.png").stat().st_size > 5000

    assert "all.json exists" in refused(1, *evaluate)
    assert segfuse(*evaluate, "--overwrite")[0] == 0


def test_predict_and_evaluate_objects(trained: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = trained
    images, out = run.parent / "images", tmp_path / "out"
    predict = ("predict", str(run), str(images), "-o", str(out), "--instances", "--smallest=3")
    code, _, err = segfuse(*predict)
    assert code == 0, err
    assert all(np.bincount(read_labels(f).ravel())[1:].min(initial=3) >= 3 for f in out.iterdir())
    assert segfuse(*predict, "--grow=gaps", "--overwrite")[0] == 0

    ids = tmp_path / "ids"
    ids.mkdir()
    for file in (run.parent / "labels").iterdir():
        write_labels(ids / file.name, instances(read_labels(file)[0])[None])
    objects = sum(int(read_labels(file).max()) for file in ids.iterdir())
    evaluate = ("evaluate", str(run.parent / "labels"), str(ids), "--instances")
    code, said, err = segfuse(*evaluate, "--json", str(tmp_path / "all.json"))
    assert code == 0, err
    assert f"6 pictures, {objects} objects, {objects} predicted" in said
    assert "predictions read as binary, objects are its components" in said
    rows = [line.split() for line in said.splitlines()]
    assert ["0.50", *["1.0000"] * 4] in [row[:5] for row in rows]
    assert ["panoptic", "quality", "1.0000"] in rows
    assert json.loads((tmp_path / "all.json").read_text())["mean_average_precision"] == 1
    assert "expected an id for each object" in refused(1, "evaluate", ids, run.parent / "labels",
                                                       "--instances")  # fmt: skip

    boundaries = ("evaluate", str(run.parent / "labels"), str(ids), "--boundaries")
    code, said, err = segfuse(*boundaries)
    assert code == 0, err
    assert ["pixel", "error", "0.0000"] in [line.split() for line in said.splitlines()]
    assert ["V^Rand", "1.0000"] in [line.split() for line in said.splitlines()]


def test_weights(data: Path, tmp_path: Path) -> None:
    ids = np.zeros((1, 12, 16), np.uint8)
    ids[0, 2:10, 2:8], ids[0, 2:10, 8:14] = 1, 2
    write_labels(tmp_path / "cells.png", ids)
    out = tmp_path / "maps"
    code, said, err = segfuse("weights", str(tmp_path / "cells.png"), "-o", str(out), "--picture")
    assert code == 0, err
    assert f"2 files written to {out}: weights " in said
    assert "each number was taken for the id of a cell; they could be classes" in said  # being two
    cut = ops.separate_touching(torch.from_numpy(ids))
    assert np.array_equal(tifffile.imread(out / "cells.tif"), ops.unet_weight_map(cut)[0])
    assert tifffile.imread(out / "cells.tif").dtype == np.float32
    assert (out / "cells.png").stat().st_size > 3000
    assert "cells.tif exists" in refused(1, "weights", tmp_path / "cells.png", "-o", out)

    one = ("weights", str(tmp_path / "cells.png"), "-o", str(tmp_path / "one.tif"), "--w0=3")
    assert segfuse(*one, "--no-separate", "--sigma=2", "--ignore=2")[0] == 0
    expected = ops.unet_weight_map(torch.from_numpy(ids), w0=3, sigma=2, ignore_index=2)[0]
    assert np.array_equal(tifffile.imread(tmp_path / "one.tif"), expected)
    assert segfuse(*one, "--overwrite", "--ignore=70000")[0] == 0
    assert segfuse("weights", str(tmp_path / "cells.png"), "-o", str(tmp_path / "a.pdf"))[0] == 0

    code, said, _ = segfuse("weights", str(data / "labels"), "-o", str(out))
    assert code == 0
    assert "6 files read as binary, cells are its components" in said
    mask = read_labels(data / "labels/0.png")[0]
    cut = ops.separate_touching(torch.from_numpy(instances(mask, holes=0)))
    assert np.array_equal(tifffile.imread(out / "0.tif"), ops.unet_weight_map(cut))

    for arguments, text in [
        ((data / "labels", "-o", tmp_path / "b.tif"), "b.tif is to hold 6 weight maps"),
        ((tmp_path / "cells.png", "-o", tmp_path / "cells.png"), "is one of the labels"),
        ((tmp_path / "cells.png", "-o", tmp_path / "c.tif", "--sigma=0"), "sigma: expected a fin"),
        ((tmp_path / "cells.png", "-o", tmp_path / "c.tif", "--w0=nan"), "w0: expected a finite"),
        ((tmp_path / "cells.png", "-o", tmp_path / "cells.png/d"), "cannot write into"),
        ((tmp_path / "gone", "-o", tmp_path / "d"), "gone"),
    ]:
        assert text in refused(1, "weights", *arguments)
    assert not (tmp_path / "c.tif").exists()


def test_predict_by_tiles(trained: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = trained
    image = str(run.parent / "images/0.png")
    options = ["--tile=24x32", "--memory=100MB", "--batch=2", "--precision=32", "--border=edge"]
    predict = ("predict", str(run), image, "-o", str(tmp_path / "a.tif"), *options)
    code, said, err = segfuse(*predict)
    assert code == 0, err
    assert re.search(r"; 1 by \d+ tiles of \d+ x \d+, \d+\.\d% of the work is overlap; on", said)
    assert f"1 file written to {tmp_path / 'a.tif'}: 0.00173 Mpx in" in said
    assert "a.tif exists" in refused(1, *predict)
    blend = ("--blend=hann", "--tile=32", "--overlap=0.5", "--augment=d4", "--scores")
    code, said, err = segfuse("predict", str(run), image, "-o", str(tmp_path / "b"), *blend)
    assert code == 0, err
    assert "8 turned and mirrored copies of each; 2 passes" in said
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["0.png", "0_scores.tif"]


def test_predict_that_was_interrupted(
    trained: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = trained
    write, left = prediction_files.write_labels, iter(range(2))

    def interrupted(*arguments: Any, **options: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(*arguments, **options)

    out = tmp_path / "out"
    predict = ("predict", str(run), str(run.parent / "images"), "-o", str(out), "--device=cpu")
    monkeypatch.setattr(prediction_files, "write_labels", interrupted)
    code, _, err = segfuse(*predict)
    assert (code, err) == (130, "segfuse: interrupted; go on with --resume\n")
    monkeypatch.setattr(prediction_files, "write_labels", write)
    assert "(--resume), or begin anew (--overwrite)" in refused(1, *predict)
    assert "border: was" in refused(1, *predict, "--resume", "--border=edge")
    code, said, err = segfuse(*predict, "--resume")
    assert code == 0, err
    assert "to predict: 4 files, 0.00691 Mpx, 2 finished before; 4 whole" in said
    assert f"4 files written to {out}, 2 files kept: 0.00691 Mpx in" in said
    assert len(list(out.iterdir())) == 6


def test_resume_of_a_finished_run_leaves_it_alone(trained: tuple[Path, str]) -> None:
    (trained[0] / "notes.txt").write_text("mine")
    before = {file: file.read_bytes() for file in trained[0].rglob("*") if file.is_file()}
    code, out, _ = segfuse("train", "--resume", str(trained[0]), "--device", "cpu")
    assert code == 0
    assert "2 steps in" in out
    assert "model.safetensors" in out
    assert "notes.txt" not in out
    assert before == {file: file.read_bytes() for file in trained[0].rglob("*") if file.is_file()}


def test_inspect(data: Path, tmp_path: Path) -> None:
    folders = "--images", str(data / "images"), "--labels", str(data / "labels")
    code, out, err = segfuse("inspect", *folders, "--everything")
    assert (code, err) == (0, "")
    assert "coding: binary, 2 classes" in out
    assert "problem" not in out
    (tmp_path / "0.png").write_bytes(b"no picture")
    code, out, err = segfuse("inspect", "--images", str(tmp_path))
    assert (code, err) == (1, "")
    assert re.search(r"^problem: .*0\.png", out, re.MULTILINE)


def test_tables_on_a_terminal(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(terminal, "is_terminal", lambda: True)
    (tmp_path / "copy").mkdir()
    for file in (data / "labels").iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    arguments = str(data / "labels"), str(tmp_path / "copy"), "--class-names", "[b],[red]"
    code, out, _ = segfuse("evaluate", *arguments)
    assert code == 0
    assert "[red]" in out
    assert "1.0000" in out


# What goes wrong


def test_bad_data_gets_one_line_and_writes_nothing(
    trained: tuple[Path, str], data: Path, tmp_path: Path
) -> None:
    made, _ = trained
    run, empty = tmp_path / "run", tmp_path / "empty"
    empty.mkdir()
    images, labels = data / "images", data / "labels"
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    for file in labels.iterdir():
        write_labels(narrow / file.name, read_labels(file)[..., 1:])

    def trains(images: Path, labels: Path, *more: str) -> tuple[str | Path, ...]:
        return ("train", "--images", images, "--labels", labels, "-o", run, *more)

    for arguments, text in [
        (trains(empty, labels), str(empty)),
        (trains(images, tmp_path / "gone"), "gone"),
        (trains(images, narrow), "36 x 47"),
        (trains(images, labels, "--split", "list.txt"), "list.txt"),
        (trains(images, labels, "--device", "tpu"), "tpu"),
        (trains(images, labels, "--up", "unpool", "--padding", "valid"), "padding"),
        (("train", "--resume", empty), "is not a run folder"),
        (("predict", empty, images, "-o", run), "is not a run folder"),
        (("predict", made, images, "-o", run, "--memory=much"), "--memory: expected bytes or a"),
        (
            ("predict", made, images, "-o", run, "--memory=1"),
            "segfuse: --memory: expected at least",
        ),
        (("predict", made, images, "-o", run, "--overlap=8"), "--overlap: expected blend with it"),
        (("predict", made, images, "-o", run, "--grow=gaps"), "grow goes with instances only"),
        (("predict", made, images, "-o", run, "--instances", "--reach=2"), "reach goes with grow"),
        (
            ("predict", made, images, "-o", run, "--instances", "--grow=gaps", "--reach=0"),
            "--reach: expected a finite number above 0",
        ),
        (("evaluate", labels, narrow, "--json", run), "36 x 47"),
        (("evaluate", labels, narrow, "--picture", run / "a.gif"), "a.gif"),
        (("evaluate", labels, narrow, "--json", run / "a.json"), "is no folder"),
        (("evaluate", labels, empty), str(empty)),
        (("inspect", "--images", empty), str(empty)),
    ]:
        assert text in refused(1, *arguments)
        assert not run.exists()


def test_train_leaves_other_files_alone(data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert "thesis.txt" in refused(1, *train(data, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(143), 143, "terminated"),
        (MemoryError(), 1, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), 1, "out of memory"),
        (ModuleNotFoundError("No module", name="lightning.x"), 1, "pip install 'segfuse[cli]'"),
    ],
)
def test_what_stops_a_training(
    *,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    text: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run/config.toml").touch()
        raise error

    monkeypatch.setattr(training, "fit", fail)
    got, _, err = segfuse(*map(str, train(data, tmp_path / "run")))
    assert got == code
    assert text in err
    assert len(err.splitlines()) == 1
    assert ("--resume" in err) == (code > 128)


def test_bugs_are_not_hidden(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(training, "fit", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        segfuse(*map(str, train(data, tmp_path / "run")))
