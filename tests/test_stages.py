"""FCN trained from coarse to fine; its solvers; weights that a training starts from."""

from __future__ import annotations

import csv
import functools
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for package in ("lightning", "matplotlib", "rich", "safetensors", "tifffile", "tomli_w"):
    pytest.importorskip(package)

from runs import one_thread, write_pictures  # noqa: E402, F401
from typer.testing import CliRunner  # noqa: E402

import segfuse  # noqa: E402
from segfuse import loop, models, preparation, solvers, stages, training  # noqa: E402
from segfuse import run as folder  # noqa: E402
from segfuse.commands import app  # noqa: E402
from segfuse.data import palette_of, read_labels, write_labels  # noqa: E402
from segfuse.errors import UserError  # noqa: E402
from segfuse.models import fcn  # noqa: E402
from segfuse.models.backbones import backbone  # noqa: E402
from segfuse.run import Run  # noqa: E402
from segfuse.stages import Stages, fit_stages, resume  # noqa: E402
from segfuse.training import fit  # noqa: E402

TINY: dict[str, Any] = {"backbone": "squeezenet1_0", "width": 1 / 16, "patch": 32, "batch": 2}
TINY |= {"steps": 3, "threads": 1, "precision": "32", "device": "cpu"}
NAMES = ("fcn32s", "fcn16s", "fcn8s")


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Spare the time of pictures of single runs, and of reading the same encoder again."""
    known: dict[str, Any] = {}
    read = fcn._axes

    def read_once(encoder: Any) -> Any:
        layers = str(encoder)
        if layers not in known:
            known[layers] = read(encoder)
        return known[layers]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(fcn, "_axes", read_once)
        patched.setattr(training, "_draw", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return fit_stages(**data, output=tmp_path_factory.mktemp("trained") / "run", **TINY)


def start_of(run: Run) -> Any:
    """The network as it was before its first step."""
    return preparation.begun(run.config).state_dict()


def test_each_stage_starts_from_the_one_before(trained: Stages) -> None:
    runs = trained.runs()
    assert [run.path.name for run in runs] == list(NAMES)
    assert [run.config["model"]["name"] for run in runs] == list(NAMES)
    for coarse, fine in itertools.pairwise(runs):
        before, after = coarse.model().state_dict(), start_of(fine)
        assert before.keys() < after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert fine.config["data"]["validation"] == coarse.config["data"]["validation"]
        assert fine.result["steps"] == TINY["steps"]


def test_what_a_folder_of_stages_holds(trained: Stages) -> None:
    with (trained.path / folder.TABLE).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows] == list(NAMES)
    assert all(0 <= float(row["mean_iu"]) <= 1 for row in rows)
    assert (trained.path / folder.SCENES).stat().st_size > 1000
    assert [row[0] for row in trained.table()] == ["stage", *NAMES]
    assert Stages.open(trained.path).arguments == trained.arguments


def test_a_folder_of_stages_predicts_as_its_finest(trained: Stages, data: dict[str, Path]) -> None:
    assert Run.open(trained.path).path.name == "fcn8s"
    image = np.zeros((40, 56), np.uint8)
    a, b = (segfuse.predict(Run.open(p), image) for p in (trained.path, trained.path / "fcn8s"))
    assert np.array_equal(a, b)
    assert a.shape == (40, 56)


def test_stages_that_were_stopped_go_on(
    trained: Stages, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same weights; a stage that is finished is left."""
    monkeypatch.setattr(stages.Stages, "_draw", lambda *_: None)
    begun = Stages.begin(**data, output=tmp_path / "run", model="fcn8s", **TINY)
    training_of = begun.train()
    next(training_of)
    training_of.close()  # as a kill after the first stage
    written = (tmp_path / "run" / "fcn32s" / folder.WEIGHTS).stat().st_mtime_ns
    ended = resume(tmp_path / "run")
    assert isinstance(ended, Stages)
    assert (tmp_path / "run" / "fcn32s" / folder.WEIGHTS).stat().st_mtime_ns == written
    for run, other in zip(ended.runs(), trained.runs(), strict=True):
        ours, theirs = run.model().state_dict(), other.model().state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("steps", [4, 8])  # the first of the second stage, the second of the third
def test_stages_that_were_killed_go_on(
    trained: Stages,
    data: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
) -> None:
    """In the middle of a stage, or before its first checkpoint, wherever the folder is by then."""
    monkeypatch.setattr(stages.Stages, "_draw", lambda *_: None)
    step, calls = loop.Segmentation.training_step, itertools.count(1)

    @functools.wraps(step)
    def killed(*arguments: Any) -> Any:
        if next(calls) == steps:
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(loop.Segmentation, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            fit_stages(**data, output=tmp_path / "run", **TINY)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    ended = resume(moved)
    assert isinstance(ended, Stages)
    assert ended.figures().keys() == set(NAMES)
    for run, other in zip(ended.runs(), trained.runs(), strict=True):
        ours, theirs = run.model().state_dict(), other.model().state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_finished_stages_are_left_as_they_are(trained: Stages) -> None:
    before = {file: file.stat().st_mtime_ns for file in trained.path.rglob("*") if file.is_file()}
    list(trained.train())
    resume(trained.path)
    after = {file: file.stat().st_mtime_ns for file in trained.path.rglob("*") if file.is_file()}
    assert after == before


def test_overwritten_stages_are_trained_anew(
    trained: Stages, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.Stages, "_draw", lambda *_: None)
    run = shutil.copytree(trained.path, tmp_path / "run")
    given = {**data, "output": run, "model": "fcn16s", **TINY, "steps": 1}
    with pytest.raises(UserError, match="holds files"):
        fit_stages(**given)
    assert Run.open(run).path == run / "fcn8s"
    again = fit_stages(**given, overwrite=True)
    assert [stage.result["steps"] for stage in again.runs()] == [1, 1]
    assert Run.open(run).path == run / "fcn16s"
    assert not (run / "fcn8s" / folder.CONFIG).exists()
    fit(**{**given, "model": "fcn32s"}, overwrite=True)
    assert Run.open(run).path == run  # and no stage


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"fcn32s"', '"fcn64s"', "fcn64s is unknown"),
        ("steps", "stpes", "stpes is unknown"),
        ("images", "seed", "images, labels or stages are missing|Cannot overwrite"),
        ("stages = ", "stage = ", "stages"),
        ("format = 1", "format = 9", "of format 9"),
        ("[arguments]", "[others]", "no 'arguments'"),
    ],
)
def test_damaged_stages(trained: Stages, tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (trained.path / folder.STAGES).read_text()
    (tmp_path / folder.STAGES).write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        Stages.open(tmp_path)


def test_words_are_no_files(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for word in ("file", "torchvision"):
        Path(word).mkdir()
    given: dict[str, Any] = {**data, "output": "run", "model": "fcn8s"}
    begun = Stages.begin(**given, split="file", pretrained="torchvision")
    assert (begun.arguments["split"], begun.arguments["pretrained"]) == ("file", "torchvision")


def test_pictures_that_changed_between_stages(data: dict[str, Path], tmp_path: Path) -> None:
    copies = write_pictures(tmp_path / "data")
    begun = Stages.begin(**copies, output=tmp_path / "run", model="fcn16s", **TINY)
    training_of = begun.train()
    next(training_of)
    file = min(copies["images"].iterdir())
    file.write_bytes(sorted(copies["images"].iterdir())[1].read_bytes())
    with pytest.raises(UserError, match="have changed since"):
        next(training_of)


def test_unfinished_stages_are_no_run(data: dict[str, Path], tmp_path: Path) -> None:
    begun = Stages.begin(**data, output=tmp_path / "run", model="fcn16s", **TINY)
    begun.path.mkdir()
    begun._claim()
    with pytest.raises(UserError, match="of which none is finished: resume it"):
        Run.open(tmp_path / "run")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "fcn32s"}, "model: expected fcn16s or fcn8s for stages, got fcn32s"),
        ({"model": "unet"}, "model: expected fcn16s or fcn8s for stages, got unet"),
        ({"at_once": True}, "at_once: does not go with stages"),
        ({"validation": 0.0}, "validation: stages are compared by pictures held out"),
        ({"backbone": "resnet"}, "backbone"),
        ({"base": 4}, "base: fcn32s has no such option"),
        ({"normalise": "percentile", "pretrained": "torchvision"}, "normalise: expected none"),
        ({"pretrained": "missing.pth"}, "cannot read .*missing.pth"),
        ({"solver": "unet-paper"}, "solver: expected one of modern, fcn-paper, fcn-released"),
    ],
)
def test_what_is_refused(
    given: dict[str, Any], message: str, data: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        fit_stages(**data, output=tmp_path / "run", **{**TINY, **given})
    assert not (tmp_path / "run").exists()


def test_an_option_that_there_is_not(data: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="fit_stages: got an unexpected keyword argument 'stpes'"):
        fit_stages(**data, output=tmp_path / "run", stpes=3)


def test_the_command(data: dict[str, Path], tmp_path: Path) -> None:
    """Ends with the table; goes on where it was stopped; is evaluated by its folder."""
    arguments = ["train", "--images", data["images"], "--labels", data["labels"]]
    arguments += ["-o", tmp_path / "run", "--model", "fcn16s", "--stages", "--steps", 2]
    arguments += ["--width", 1 / 16, "--patch", 32, "--batch", 1, "--threads", 1]
    told = CliRunner().invoke(app, list(map(str, [*arguments, "--device", "cpu"])))
    assert told.exit_code == 0, told.output
    for word in ("fcn32s", "fcn16s", "mean IU", "stages.csv", "stages.png"):
        assert word in told.output
    again = CliRunner().invoke(app, ["train", "--resume", str(tmp_path / "run")])
    assert again.exit_code == 0, again.output
    assert "fcn16s" in again.output
    predicted = ["predict", tmp_path / "run", data["images"], "-o", tmp_path / "predicted"]
    told = CliRunner().invoke(app, list(map(str, [*predicted, "--device", "cpu"])))
    assert told.exit_code == 0, told.output
    assert f"stage: {tmp_path / 'run' / 'fcn16s'}, the finest that is finished" in told.output


def test_the_command_that_was_interrupted(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    run = tmp_path / "run"
    arguments = ["train", "--images", data["images"], "--labels", data["labels"], "-o", run]
    arguments += ["--model", "fcn8s", "--stages", "--width", 1 / 16, "--device", "cpu"]
    told = CliRunner().invoke(app, list(map(str, arguments)))
    assert told.exit_code == 130
    assert f"interrupted; go on with --resume {run}" in told.output


# Where a training starts


def test_pretrained_weights_are_of_no_need_later(data: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(1)
    weights = tmp_path / "weights.pth"
    torch.save(backbone("squeezenet1_0", width=1 / 16).state_dict(), weights)
    output = tmp_path / "run"
    run = fit(**data, output=output, model="fcn32s", pretrained=weights, **TINY)
    assert run.config["start"]["pretrained"] == str(weights)
    start = start_of(run)
    assert torch.equal(start["encoder.to8.0.weight"], torch.load(weights)["features.0.weight"])
    weights.unlink()
    assert run.model()
    assert segfuse.resume(run.path)


def test_pretrained_weights_that_changed(data: dict[str, Path], tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(backbone("squeezenet1_0", width=1 / 16).state_dict(), weights)
    run = fit(**data, output=tmp_path / "run", model="fcn32s", pretrained=weights, **TINY)
    torch.save(backbone("squeezenet1_0", width=1 / 16).state_dict(), weights)
    with pytest.raises(UserError, match="has changed since the training was begun"):
        preparation.begun(run.config)


def test_a_run_of_another_stride(trained: Stages, data: dict[str, Path], tmp_path: Path) -> None:
    coarser = trained.path / "fcn32s"
    with pytest.raises(UserError, match="coarser: expected a run of fcn16s for fcn8s, got fcn32s"):
        fit(**data, output=tmp_path / "run", model="fcn8s", coarser=coarser, **TINY)


@pytest.mark.parametrize("normalise", ["percentile", "meanstd"])
def test_weights_want_the_colours_that_they_know(
    normalise: str, trained: Stages, data: dict[str, Path], tmp_path: Path
) -> None:
    given: dict[str, Any] = {**data, "output": tmp_path / "run", "normalise": normalise, **TINY}
    with pytest.raises(UserError, match=f"normalise: expected none, got {normalise}: pretrained"):
        fit(**given, model="fcn32s", pretrained="torchvision")
    coarser = trained.path / "fcn32s"
    with pytest.raises(UserError, match=f"normalise: expected none, as .* has, got {normalise}"):
        fit(**given, model="fcn16s", coarser=coarser)
    assert not (tmp_path / "run").exists()


def test_colours_go_with_a_run(tmp_path: Path) -> None:
    """To its pictures and to the palettes of what it predicts."""
    pictures = write_pictures(tmp_path)
    for file in pictures["labels"].iterdir():
        write_labels(file, read_labels(file) // 255)
    colours = tmp_path / "colours.txt"
    colours.write_text("10 20 30 ground\n#ff0001 disk\n")
    given: dict[str, Any] = {**pictures, "output": tmp_path / "run", "kind": "classes", **TINY}
    run = fit(**given, model="fcn32s", colours=colours)
    written = segfuse.predict_files(run, pictures["images"], tmp_path / "predicted")
    palette = palette_of(written[0])
    assert palette is not None
    assert palette[:6] == [10, 20, 30, 255, 0, 1]
    assert Run.open(run.path).coding.palette == tuple(palette)
    with pytest.raises(UserError, match="colours: go with labels that are classes"):
        fit(**{**given, "kind": "binary"}, model="fcn32s", colours=colours, overwrite=True)


# Solvers


def test_published_solvers_treat_biases_apart() -> None:
    net = models.FCN(backbone("squeezenet1_0", width=1 / 16), 3)
    for name, momentum, decay in (("fcn-paper", 0.9, 5e-4), ("fcn-released", 0.99, 0.0)):
        solver = solvers.SOLVERS[name]
        groups = solver(solver.groups(net), 1e-3).param_groups
        weights, biases = groups
        assert {len(p.shape) for p in biases["params"]} == {1}
        assert (weights["scale"], biases["scale"]) == (1.0, 2.0)
        assert weights["momentum"] == momentum
        assert weights["weight_decay"] == 5e-4
        assert biases["weight_decay"] == decay
        assert sum(len(g["params"]) for g in groups) == len(list(net.parameters()))
        assert solver.schedule(0) == solver.schedule(1) == 1
    assert solvers.SOLVERS["fcn-released"].reduction == "sum"


def test_the_encoder_may_learn_slower() -> None:
    net = models.FCN(backbone("squeezenet1_0", width=1 / 16), 3)
    solver = solvers.SOLVERS["modern"]
    head, encoder = solver(solver.groups(net, 0.1), 1e-3).param_groups
    assert (head["scale"], encoder["scale"]) == (1.0, 0.1)
    inside = {id(p) for p in net.encoder.parameters()}
    assert {id(p) for p in encoder["params"]} == inside


@pytest.mark.parametrize(
    ("solver", "name", "stride", "coarser", "rate"),
    [
        ("fcn-paper", "alexnet", 32, False, 1e-3),
        ("fcn-paper", "vgg16", 32, False, 1e-4),
        ("fcn-paper", "googlenet", 32, False, 5e-5),
        ("fcn-paper", "vgg16", 16, True, 1e-6),
        ("fcn-released", "vgg16", 32, False, 1e-10),
        ("fcn-released", "vgg16", 16, True, 1e-12),
        ("fcn-released", "vgg16", 8, True, 1e-14),
    ],
)
def test_published_rates(solver: str, name: str, stride: int, coarser: bool, rate: float) -> None:
    found = solvers.rate_of_fcn(solver, name, stride, coarser=coarser)
    assert found == pytest.approx(rate)


def test_the_released_solver_takes_an_image_a_step(data: dict[str, Path], tmp_path: Path) -> None:
    given = {name: TINY[name] for name in TINY if name not in {"patch", "batch"}}
    run = fit(**data, output=tmp_path / "run", model="fcn32s", solver="fcn-released", **given)
    options = run.config["training"]
    assert options["batch"] == 1
    assert options["patch"] == 48  # of the pictures
    assert options["learning_rate"] == 1e-10
    assert run.config["model"]["upsample"] == "fixed"
    assert run.config["model"]["layout"] == "published"


def test_photographs_are_mirrored_but_not_turned() -> None:
    target = np.arange(12, dtype=np.uint8).reshape(3, 4)
    picture = segfuse.data.patches.Picture(target[None].astype(np.float32), target)
    for symmetry, poses in (("mirror", 2), ("none", 1)):
        patches = segfuse.data.patches.Patches([picture], size=3, symmetry=symmetry)  # type: ignore[arg-type]
        seen = {tuple(patches[i][1].flatten().tolist()) for i in range(60)}
        assert len(seen) == 2 * poses  # places
        assert all(patch[3] - patch[0] == 4 for patch in seen)  # rows stay rows
