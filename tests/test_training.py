"""Training: patches, budgets, and runs that end as they should however often they are killed."""

from __future__ import annotations

import csv
import errno
import functools
import itertools
import logging
import math
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

for package in ("lightning", "matplotlib", "rich", "safetensors", "tifffile", "tomli_w"):
    pytest.importorskip(package)

from PIL import Image  # noqa: E402
from runs import TINY, one_thread, write_pictures  # noqa: E402, F401
from safetensors.torch import load_file  # noqa: E402

from segfuse import course, loop, pictures, preparation, solvers, training  # noqa: E402
from segfuse import run as folder  # noqa: E402
from segfuse.course import Budget, Course  # noqa: E402
from segfuse.data.labels import LabelCoding, detect  # noqa: E402
from segfuse.data.normalise import Normalisation  # noqa: E402
from segfuse.data.pairs import Pair  # noqa: E402
from segfuse.data.patches import Patches, Picture  # noqa: E402
from segfuse.errors import UserError  # noqa: E402
from segfuse.prediction_files import predict_files  # noqa: E402
from segfuse.run import Run  # noqa: E402
from segfuse.training import fit, resume  # noqa: E402

SMALL: dict[str, Any] = {**TINY, "patch": 24, "batch": 2, "steps": 12}
SMALL |= {"threads": 1, "precision": "32"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_pictures(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return fit(**data, output=tmp_path_factory.mktemp("undisturbed") / "run", **SMALL)


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the time of pictures that no one looks at."""
    monkeypatch.setattr(training, "_draw", lambda *_: None)


def rows(run: Run) -> list[dict[str, str]]:
    """Read ``metrics.csv``, without the time, which differs."""
    with (run.path / folder.METRICS).open() as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file)]


def same(run: Run, other: Run) -> bool:
    """Whether two runs have the same weights, to the bit, and the same figures."""
    a, b = (load_file(r.path / folder.WEIGHTS) for r in (run, other))
    c, d = (checkpoint(r)["state_dict"] for r in (run, other))
    weights = all(torch.equal(a[name], b[name]) for name in a)
    last = all(torch.equal(c[name], d[name]) for name in c)
    return weights and last and rows(run) == rows(other)


def checkpoint(run: Run, name: str = folder.LAST) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(run.path / name, weights_only=True)
    return state


# Patches


def labelled(height: int, width: int, classes: int = 2, void: float = 0.0) -> Picture:
    random = np.random.default_rng(height)
    target = random.integers(0, classes, (height, width)).astype(np.uint8)
    target[random.random((height, width)) < void] = 255
    return Picture(target.astype(np.float32)[None], target)


def test_patches() -> None:
    patches = Patches([labelled(40, 50)], size=24, margin=30, seed=3)
    for index in range(20):
        image, target = patches[index]
        assert image.shape == (1, 84, 84)
        assert image.dtype == torch.float32
        assert target.shape == (24, 24)
        assert target.dtype == torch.uint8
        centre = image[0, 30:-30, 30:-30]
        # One grey value for each class: image and target moved together.
        assert centre[target == 0].unique().numel() == centre[target == 1].unique().numel() == 1
        # The margin is mirrored content, so of the same two values.
        assert image.unique().numel() == 2
    assert torch.equal(patches[5][0], patches[5][0])
    assert not torch.equal(patches[5][0], patches[6][0])
    with pytest.raises(IndexError):
        patches[-1]


def test_patches_reach_every_pixel_in_every_pose() -> None:
    target = np.arange(9, dtype=np.uint8).reshape(3, 3)
    patches = Patches([Picture(target[None].astype(np.float32), target)], size=2, margin=1)
    seen = {tuple(patches[i][1].flatten().tolist()) for i in range(300)}
    assert {label for patch in seen for label in patch} == set(range(9))
    assert len(seen) == 4 * 8  # places, and the square's symmetries


def test_patches_mirror_what_is_beyond_the_border() -> None:
    picture = labelled(5, 3)
    for size, margin in [(2, 9), (4, 0), (16, 1)]:
        patches = Patches([picture], size=size, margin=margin, gain=0, shift=0)
        mirrored = np.pad(picture.target, 32, mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(mirrored, (size + 2 * margin,) * 2)
        known = {
            np.rot90(window, k)[::flip].tobytes()
            for window in windows.reshape(-1, *windows.shape[2:])
            for k, flip in itertools.product(range(4), (1, -1))
        }
        for i in range(20):
            assert patches[i][0][0].numpy().astype(np.uint8).tobytes() in known
    one = Patches([labelled(1, 1)], size=4, margin=2)[0]
    assert one[0].unique().numel() == one[1].unique().numel() == 1


def test_patches_of_several_pictures() -> None:
    pictures = [Picture(np.full((1, 8, 8 * n), n, np.float32), np.full((8, 8 * n), n, np.uint8))
                for n in (1, 3)]  # fmt: skip
    drawn = np.array([int(Patches(pictures, size=4)[i][1][0, 0]) for i in range(400)])
    assert 0.68 < (drawn == 3).mean() < 0.82  # by area: 3/4


def test_patches_show_something_to_learn() -> None:
    target = np.full((40, 40), 255, np.uint8)
    target[:4] = 1
    void = np.full((9, 9), 255, np.uint8)
    pictures = [Picture(np.zeros((2, *t.shape), np.float32), t) for t in (target, void)]
    patches = Patches(pictures, size=4)
    assert all((patches[i][1] != 255).any() for i in range(50))
    for bad in ([], pictures[1:]):
        with pytest.raises(ValueError, match="expected one with a pixel that is not void"):
            Patches(bad, size=4)


@pytest.mark.parametrize("shape", [(400, 300), (400, 3)])
def test_patches_find_the_few_pixels_that_count(shape: tuple[int, int]) -> None:
    target = np.full(shape, 255, np.uint8)
    target[0, 0], target[-1, -1], target[150, 1] = 0, 1, 2
    image = np.where(target == 255, 9, target)[None].astype(np.float32)
    patches = Patches([Picture(image, target)], size=8, margin=3, gain=0, shift=0)
    seen = set()
    for i in range(40):
        wide, patch = patches[i]
        assert (patch != 255).any()
        assert torch.equal(wide[0, 3:-3, 3:-3], torch.where(patch == 255, 9, patch).float())
        seen |= set(patch.unique().tolist())
    assert {0, 1, 2} <= seen


@pytest.mark.parametrize("bad", ["size", "margin", "seed", "gain", "shift"])
def test_patches_out_of_range(bad: str) -> None:
    with pytest.raises(ValueError, match=f"{bad}: expected at least"):
        Patches([labelled(9, 9)], **{"size": 4, bad: -1})
    other = Picture(np.zeros((3, 9, 9), np.float32), np.zeros((9, 9), np.uint8))
    with pytest.raises(ValueError, match="of one C"):
        Patches([labelled(9, 9), other], size=4)


# Solvers


def test_modern_schedule_warms_up_and_ends_at_zero() -> None:
    factors = [solvers.SOLVERS["modern"].schedule(x) for x in np.linspace(0, 1, 1001)]
    top = int(np.argmax(factors))
    assert max(factors) == pytest.approx(1)
    assert 0 < factors[0] <= 0.1
    assert (np.diff(factors[: top + 1]) > 0).all()
    assert (np.diff(factors[top:]) < 0).all()
    assert factors[-1] == pytest.approx(0, abs=1e-9)


def test_paper_solver() -> None:
    solver = solvers.SOLVERS["unet-paper"]
    optimizer = solver([nn.Parameter(torch.zeros(1))], 0.5)
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["momentum"], optimizer.defaults["lr"]) == (0.99, 0.5)
    assert {solver.schedule(x) for x in (0, 0.5, 1)} == {1}
    row = solvers.defaults("unet-paper", torch.device("cpu"))
    assert (row["padding"], row["norm"], row["dropout"]) == ("valid", None, 0.5)
    assert (row["base"], row["depth"], row["batch"]) == (64, 4, 1)


# What a run holds


def test_run_folder(undisturbed: Run, data: dict[str, Path]) -> None:
    run = undisturbed
    names = {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}
    figures = {folder.CURVES, folder.OVERLAYS}
    checkpoints = {folder.LAST, folder.BEST}
    assert names == {folder.CONFIG, folder.WEIGHTS, folder.METRICS, *figures, *checkpoints}
    for name in figures:
        with Image.open(run.path / name) as picture:
            assert min(picture.size) > 100
    config = run.config
    assert config["model"] == {"name": "unet", "in_channels": 1, "classes": 2, "up": "deconv",
                               **TINY}  # fmt: skip
    assert len(config["data"]["train"]) == 4
    assert len(config["data"]["validation"]) == 1
    assert config["data"]["images"] == str(data["images"])
    options = {name: config["training"][name] for name in SMALL if name not in TINY}
    assert options == {name: SMALL[name] for name in options}
    assert config["result"]["steps"] == 12
    assert config["result"]["ended"] == "steps"
    assert run.coding.kind == "binary"

    table = rows(run)
    assert [int(row["step"]) for row in table] == list(range(1, 13))
    scored = [row for row in table if row["validation_mean_iu"]]
    assert len(scored) == 10
    assert int(scored[-1]["step"]) == 12
    best = max(float(row["validation_mean_iu"]) for row in scored)
    assert config["result"]["best"]["validation_mean_iu"] == best
    assert checkpoint(run, folder.BEST)["global_step"] == config["result"]["best"]["step"]
    saved = load_file(run.path / folder.WEIGHTS)
    best_state = checkpoint(run, folder.BEST)["state_dict"]
    assert all(torch.equal(best_state[f"model.{name}"], saved[name]) for name in saved)


def test_learns(data: dict[str, Path], tmp_path: Path) -> None:
    """Disks in noise, which no threshold of single pixels finds so well."""
    run = fit(**data, output=tmp_path / "run", steps=150, base=4, depth=2, patch=32, threads=1)
    assert run.config["result"]["best"]["validation_mean_iu"] > 0.9
    written = predict_files(run, data["images"], tmp_path / "out")
    for path in written:
        predicted, truth = (np.asarray(Image.open(p)) for p in (path, data["labels"] / path.name))
        assert (predicted == truth).mean() > 0.95


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_same_seed_same_weights(undisturbed: Run, data: dict[str, Path], tmp_path: Path) -> None:
    torch.set_num_threads(2)
    state = torch.get_rng_state()
    torch.rand(1)
    assert same(fit(**data, output=tmp_path / "a", **SMALL, workers=1), undisturbed)
    other = fit(**data, output=tmp_path / "b", **SMALL, seed=1)
    assert not same(other, undisturbed)
    torch.set_rng_state(state)
    fit(**data, output=tmp_path / "c", **{**SMALL, "steps": 1})
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == 2


def test_config_is_enough_to_repeat(
    undisturbed: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(undisturbed.path / folder.CONFIG, tmp_path)
    again = resume(tmp_path)
    assert "starting from the beginning" in caplog.text
    assert same(again, undisturbed)
    caplog.clear()
    resume(tmp_path)
    assert "finished, after 12 steps (steps): nothing to do" in caplog.text


def test_epochs(data: dict[str, Path], tmp_path: Path) -> None:
    # 4 pictures of 48 x 48, 2 patches of 24 x 24 a step: 8 steps show as many pixels.
    run = fit(**data, output=tmp_path / "a", **{**SMALL, "steps": None, "epochs": 1.5})
    assert run.config["result"]["steps"] == 12
    run = fit(**data, output=tmp_path / "b", **{**SMALL, "steps": 3, "epochs": 1.5})
    assert run.config["result"]["steps"] == 3


def test_without_validation_the_last_weights_are_kept(
    data: dict[str, Path], tmp_path: Path
) -> None:
    run = fit(**data, output=tmp_path / "run", **SMALL, validation=0)
    assert len(run.config["data"]["train"]) == 5
    last = checkpoint(run)["state_dict"]
    saved = load_file(run.path / folder.WEIGHTS)
    assert all(torch.equal(last[f"model.{name}"], saved[name]) for name in saved)
    assert not any(row["validation_mean_iu"] for row in rows(run))


def test_labels_are_read_alike_whatever_the_seed(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def record(files: list[Path], **options: Any) -> Any:
        asked.append([file.name for file in files])
        return detect(files, **options)

    monkeypatch.setattr(preparation, "detect", record)
    for seed in (0, 2):
        fit(**data, output=tmp_path / f"{seed}", **{**SMALL, "steps": 1}, seed=seed)
    assert asked == [[f"{i}.png" for i in range(5)]] * 2


def test_what_the_caller_has_set_is_of_no_effect(
    undisturbed: Run, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A training is one process, whatever a batch system says of tasks.
    slurm = {"NTASKS": "2", "JOB_ID": "1", "JOB_NAME": "job", "PROCID": "0", "LOCALID": "0"}
    for name, value in {**slurm, "NODEID": "0", "NODELIST": "n1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode():
            run = fit(**data, output=tmp_path / "run", **SMALL)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(run, undisturbed)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16"},
        {"solver": "unet-paper", "padding": "valid", "patch": 20, "dropout": 0.5},
        {"up": "unpool", "norm": "none"},
        {"normalise": "meanstd", "split": "block"},
    ],
    ids=["bf16", "paper", "unpool", "block"],
)
def test_variants(data: dict[str, Path], tmp_path: Path, options: dict[str, Any]) -> None:
    run = fit(**data, output=tmp_path / "run", **{**SMALL, "steps": 2, **options})
    assert all(torch.isfinite(value).all() for value in run.model().state_dict().values())
    given = {**run.config["model"], **run.config["training"], "norm": "none"}
    asked = {name: options[name] for name in options.keys() & given}
    assert {name: given[name] for name in asked} == asked
    assert len(predict_files(run, data["images"], tmp_path / "out")) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["32", "bf16", "16"])
def test_on_a_gpu(data: dict[str, Path], tmp_path: Path, precision: str) -> None:
    options = {**SMALL, "precision": precision, "device": "cuda", "workers": 1}
    runs = [fit(**data, output=tmp_path / name, **options) for name in "ab"]
    assert same(*runs)
    for device in ("cuda", "cpu"):
        written = predict_files(runs[0], data["images"], tmp_path / device, device=device)
        assert len(written) == 5


def test_single_picture_is_split_by_rows(data: dict[str, Path], tmp_path: Path) -> None:
    files = {name: path / "0.png" for name, path in data.items()}
    run = fit(**files, output=tmp_path / "run", **{**SMALL, "steps": 2}, split="block")
    assert run.config["data"]["train"][0]["rows"] == [0, 38]
    assert run.config["data"]["validation"][0]["rows"] == [38, 48]
    shutil.copy(run.path / folder.CONFIG, tmp_path)
    assert same(resume(tmp_path), run)


def test_classes_colour_and_void(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for i in range(4):
        labels = random.integers(0, 3, (8, 9)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
        image = np.stack([80 * labels, 255 - 80 * labels, labels], -1)
        labels[:4] = 255
        for kind, values in [("images", image), ("labels", labels)]:
            Image.fromarray(values).save(tmp_path / kind / f"{i}.png")
    run = fit(tmp_path / "images", tmp_path / "labels", tmp_path / "run", **{**SMALL, "steps": 4})
    assert run.coding.classes == 3
    assert run.coding.ignore == 255
    assert run.config["model"]["in_channels"] == 3


# Budgets


class Clock:
    """Stands for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


class Costly:
    """Stands for a validation that takes `cost` seconds a pixel."""

    def __init__(self, clock: Clock, pixels: int, cost: float) -> None:
        self.clock, self.price = clock, cost
        self.pixels: float = pixels
        self.spent: list[float] = []

    def cost(self, _: Any) -> float:
        return self.price

    def limit(self, pixels: float) -> None:
        self.pixels = min(self.pixels, pixels)

    def __call__(self, _: Any) -> Any:
        self.spent.append(self.pixels * self.price)
        self.clock.now += self.spent[-1]
        return dict.fromkeys(course.FIGURES, 0.5), [0.5, 0.5]


def drive(followed: Course, step: Callable[[], None]) -> list[float]:
    """Call a course as Lightning does, and return the rates of the steps."""
    group: dict[str, float] = {}
    trainer = SimpleNamespace(
        global_step=0, optimizers=[SimpleNamespace(param_groups=[group])], should_stop=False
    )
    module, rates = SimpleNamespace(model=nn.Identity()), []
    followed.on_train_start(trainer, module)  # type: ignore[arg-type]
    while not trainer.should_stop:
        followed.on_train_batch_start(trainer)  # type: ignore[arg-type]
        rates.append(group["lr"])
        step()
        trainer.global_step += 1
        followed.on_train_batch_end(trainer, module, {"loss": torch.ones(())})  # type: ignore[arg-type]
    return rates


@pytest.mark.parametrize("step", [0.01, 0.3, 1.7])
@pytest.mark.parametrize("validation", [0.001, 0.4, 3.0, 40.0])
def test_time_holds_all(monkeypatch: pytest.MonkeyPatch, step: float, validation: float) -> None:
    clock = Clock()
    monkeypatch.setattr(course, "time", clock)
    costly: Any = Costly(clock, 10**6, validation / 10**6)
    followed = Course(
        Budget(seconds=20),
        rate=1.0,
        schedule=solvers.SOLVERS["modern"].schedule,
        seed=0,
        validation=costly,
    )
    rates = drive(followed, lambda: setattr(clock, "now", clock.now + step))
    assert followed.ended == "time"
    last = costly.spent[-1]  # the pictures drawn take as long again
    assert 20 - 2 * step <= clock.now - 1000 + last <= 20 + step
    assert sum(costly.spent) <= 2.01
    assert 4 <= len(costly.spent) <= 10
    assert len({row["step"] for row in followed.rows}) == len(followed.rows)
    assert max(rates) > 0.9
    assert rates[-1] < 0.01 + (2 * step / 20) ** 2 * 3
    assert len(rates) == followed.rows[-1]["step"]


@pytest.mark.parametrize("reading", [1.0, 5.0, 19.0, 30.0])
def test_reading_is_no_part_of_the_schedule(
    monkeypatch: pytest.MonkeyPatch, reading: float
) -> None:
    clock = Clock()
    monkeypatch.setattr(course, "time", clock)
    schedule = solvers.SOLVERS["modern"].schedule
    followed = Course(
        Budget(seconds=20), rate=1.0, schedule=schedule, seed=0, began=clock.now - reading
    )
    rates = drive(followed, lambda: setattr(clock, "now", clock.now + 0.01))
    assert rates[0] == pytest.approx(0.1)
    assert followed.ended == "time"
    if reading > 20:
        assert len(rates) == 1
    else:
        assert clock.now - 1000 == pytest.approx(20 - reading, abs=0.02)
        assert max(rates) > 0.99
        assert rates[-1] < 0.01


def test_time_for_a_step_alone_is_told(
    data: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = fit(**data, output=tmp_path / "run", **{**SMALL, "steps": None, "time": 0.01})
    assert run.result["steps"] == 1
    assert float(rows(run)[0]["learning_rate"]) > 0
    assert "the time sufficed for 1 step: train for longer" in caplog.text


def test_first_of_two_budgets_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    for steps, seconds, ended, taken in [(5, 100, "steps", 5), (100, 5, "time", 5)]:
        clock = Clock()
        monkeypatch.setattr(course, "time", clock)
        schedule = solvers.SOLVERS["modern"].schedule
        followed = Course(Budget(steps, seconds), rate=1.0, schedule=schedule, seed=0)
        rates = drive(followed, lambda clock=clock: setattr(clock, "now", clock.now + 1))  # type: ignore[misc]
        assert (followed.ended, len(rates)) == (ended, taken)


def test_clock_is_of_no_effect_where_steps_end_first(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule, rates = solvers.SOLVERS["modern"].schedule, []
    for seconds, cost in [(None, 1.0), (110.0, 1.0), (500.0, 0.1)]:
        clock = Clock()
        monkeypatch.setattr(course, "time", clock)
        followed = Course(Budget(100, seconds), rate=1.0, schedule=schedule, seed=0)
        clock.now += 5
        rates.append(
            drive(followed, lambda clock=clock, cost=cost: setattr(clock, "now", clock.now + cost))  # type: ignore[misc]
        )
        assert followed.ended == "steps"
    assert rates[0] == rates[1] == rates[2]


def test_time_on_the_clock(data: dict[str, Path], tmp_path: Path) -> None:
    began = time.perf_counter()
    run = fit(**data, output=tmp_path / "run", **{**SMALL, "steps": None, "time": 2})
    assert 1.5 < time.perf_counter() - began < 4
    assert run.config["result"]["ended"] == "time"
    assert float(rows(run)[-1]["learning_rate"]) < 0.02 * run.config["training"]["learning_rate"]


def test_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(course, "time", clock)
    validation: Any = Costly(clock, 1, 0)
    followed = Course(
        Budget(100), rate=1.0, schedule=lambda _: 1.0, seed=0, validation=validation, patience=3
    )
    assert len(drive(followed, lambda: None)) == 40  # the first is the best, three are no better
    assert followed.ended == "patience"
    assert followed.best["step"] == 10


def test_course_is_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(course, "time", clock)
    validation: Any = Costly(clock, 1, 1)
    options: dict[str, Any] = {"rate": 1.0, "schedule": lambda _: 1.0, "seed": 0, "patience": 3}
    first = Course(Budget(100, 1000.0), validation=validation, **options)
    drive(first, lambda: setattr(clock, "now", clock.now + 30))
    clock.now += 12345
    later = Course(Budget(100, 1000.0), validation=validation, **options)
    later.load_state_dict(first.state_dict())
    assert later.state_dict() == first.state_dict()
    differing = {"validation", "budget", "schedule", "_saved", "_step_began", "spent", "loss"}
    for name, value in vars(first).items():
        assert name in differing or vars(later)[name] == value


# Killed and taken up again


def scenario(  # noqa: C901
    moment: tuple[str, Any], go: Callable[..., Any], arguments: dict[str, Any]
) -> None:
    """Train in a process of its own, and kill it with SIGKILL at a moment."""
    training._draw = lambda *_: None  # type: ignore[assignment]
    kind, count = moment
    calls = itertools.count(1)
    begin, save, replace = Course.on_train_batch_start, torch.save, Path.replace

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def step(self: Course, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == count:
            kill()
        begin(self, trainer, *rest)

    def write_half(state: Any, file: Any) -> None:
        save(state, file)
        if next(calls) == count:
            file.truncate(file.tell() // 2)
            file.flush()
            kill()

    def rename(self: Path, target: Any) -> Path:
        result = replace(self, target)
        if next(calls) == count:
            kill()
        return result

    course.CHECKPOINT_SECONDS = 0  # a checkpoint a step
    if kind == "step":  # before it, no checkpoint having been written
        course.CHECKPOINT_SECONDS, course.VALIDATIONS = 1e9, 1
        Course.on_train_batch_start = step  # type: ignore[method-assign]
    elif kind == "write":  # half of a checkpoint
        torch.save = write_half
    elif kind == "rename":  # of any file, before anything else
        Path.replace = rename  # type: ignore[method-assign]
    go(**arguments)


def killed(moment: tuple[str, Any], go: Callable[..., Any], **arguments: Any) -> bool:
    """Whether the process of `scenario` was killed before it ended."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["segfuse.training", "segfuse.report"])
    process = processes.Process(target=scenario, args=(moment, go, arguments))
    process.start()
    process.join(moment[1] if moment[0] == "seconds" else 100)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


MOMENTS = [
    *[("step", count) for count in (0, 7)],
    *[("write", count) for count in (1, 2, 9, 12)],
    # One file after the other: config, then a checkpoint and the metrics a step, and, where it is
    # the best yet, best.ckpt and the weights.
    *[("rename", count) for count in (3, 4, 5, 6, 7, 8, 9, 20, 33)],
]
BEFORE_A_CHECKPOINT = [("step", 0), ("step", 7), ("write", 1), ("rename", 3), ("rename", 4)]


@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: f"{moment[0]}{moment[1]}")
def test_killed_and_resumed(
    moment: tuple[str, Any],
    undisturbed: Run,
    data: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "run"
    assert killed(moment, fit, **data, output=path, **SMALL)
    assert (path / folder.CONFIG).exists()
    begun = (path / folder.LAST).exists()
    assert begun == (moment not in BEFORE_A_CHECKPOINT)
    run = resume(path)
    assert ("starting from the beginning" in caplog.text) != begun
    assert same(run, undisturbed)
    assert checkpoint(run, folder.BEST)["global_step"] == run.config["result"]["best"]["step"]
    assert not list(path.rglob("*partial*"))


@pytest.mark.parametrize("seed", range(2))
def test_killed_again_and_again(
    seed: int, undisturbed: Run, data: dict[str, Path], tmp_path: Path
) -> None:
    path, random = tmp_path / "run", np.random.default_rng(seed)
    killed(("seconds", random.uniform(0.1, 0.5)), fit, **data, output=path, **SMALL)
    for _ in range(3):
        if (path / folder.CONFIG).exists():
            killed(("seconds", random.uniform(0.1, 0.5)), resume, path=path)
    if not (path / folder.CONFIG).exists():
        fit(**data, output=path, **SMALL, overwrite=True)
    assert same(resume(path), undisturbed)


def test_killed_in_mixed_precision(data: dict[str, Path], tmp_path: Path) -> None:
    options = {**SMALL, "precision": "bf16"}
    expected = fit(**data, output=tmp_path / "a", **options)
    assert killed(("write", 5), fit, **data, output=tmp_path / "b", **options)
    assert same(resume(tmp_path / "b"), expected)


def test_early_stop_survives(data: dict[str, Path], tmp_path: Path) -> None:
    # At this rate weights go astray at once, so that the first validations stay the best.
    options = {**SMALL, "steps": 100, "patience": 2, "learning_rate": 3.0, "seed": 1}
    expected = fit(**data, output=tmp_path / "a", **options)
    assert expected.config["result"]["ended"] == "patience"
    step = expected.config["result"]["steps"]
    assert step < 100
    assert killed(("write", step - 1), fit, **data, output=tmp_path / "b", **options)
    run = resume(tmp_path / "b")
    assert same(run, expected)
    assert run.config["result"]["ended"] == "patience"


def test_full_disk(
    undisturbed: Run, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = torch.save, itertools.count()

    def fill(state: Any, file: Any) -> None:
        if next(calls) == 3:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(state, file)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", fill)
        with pytest.raises(UserError, match=r"cannot write .*last\.ckpt: No space left on device"):
            fit(**data, output=tmp_path / "run", **SMALL)
    assert not list(tmp_path.rglob("*partial*"))
    assert same(resume(tmp_path / "run"), undisturbed)


def test_file_that_the_system_cuts_short(data: dict[str, Path], tmp_path: Path) -> None:
    """Of a size at which torch itself raises another error as it closes the archive."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*last\.ckpt: File too large"):
            fit(**data, output=tmp_path / "run", **{**SMALL, "steps": 1, "base": 16})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.rglob("*partial*"))


def test_terminated(
    undisturbed: Run, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = loop.Segmentation.training_step, itertools.count()

    @functools.wraps(step)
    def terminate(*arguments: Any) -> Any:
        if next(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched:
        patched.setattr(loop.Segmentation, "training_step", terminate)
        with pytest.raises(SystemExit) as end:
            fit(**data, output=tmp_path / "run", **SMALL)
    assert end.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert same(resume(tmp_path / "run"), undisturbed)


def test_interrupt_before_the_first_step(
    data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Segmentation, "configure_optimizers", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(**data, output=tmp_path / "run", **SMALL, progress=True)


def test_two_do_not_train_into_one_folder(
    undisturbed: Run, data: dict[str, Path], tmp_path: Path
) -> None:
    path = shutil.copytree(undisturbed.path, tmp_path / "run")
    (path / folder.CURVES).unlink()
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with folder.locked(path):
        for go in (
            lambda: resume(path),
            lambda: fit(**data, output=path, **SMALL, overwrite=True),
        ):
            with pytest.raises(UserError, match="is being trained by another process"):
                go()
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_lost_weights_are_written_again(
    undisturbed: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = shutil.copytree(undisturbed.path, tmp_path / "run")
    (path / folder.WEIGHTS).unlink()
    run = resume(path)
    assert "lost its weights: written from its best checkpoint" in caplog.text
    assert "nothing to do" in caplog.text
    assert same(run, undisturbed)


def test_interrupt_is_passed_on(
    undisturbed: Run, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls, handler = loop.Segmentation.training_step, itertools.count(), signal.SIGINT

    @functools.wraps(step)  # Lightning looks at its parameters
    def interrupt(*arguments: Any) -> Any:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return step(*arguments)

    before = signal.getsignal(handler)
    with monkeypatch.context() as patched:
        patched.setattr(loop.Segmentation, "training_step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(**data, output=tmp_path / "run", **SMALL)
    assert signal.getsignal(handler) is before
    assert same(resume(tmp_path / "run"), undisturbed)


# What cannot be worked with


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 25}, "patch: this network takes 24 or 28, not 25"),
        ({"padding": "valid", "patch": 22}, "patch: this network takes 20 or 24, not 22"),
        ({"patch": 0}, "patch: expected 1 to"),
        ({"batch": 0}, "batch: expected 1 to 4096, got 0"),
        (
            {"batch": 1, "patch": 4},
            "batch, patch: the network does not take 1 of 4 .*more than 1 value per channel",
        ),
        ({"steps": 3.5}, r"steps: expected an integer, got 3\.5"),
        ({"steps": "3"}, "steps: expected an integer, got '3'"),
        ({"batch": 1.5}, "batch: expected an integer"),
        ({"patch": 24.0}, "patch: expected an integer"),
        ({"seed": 1.5}, "seed: expected an integer"),
        ({"threads": 1.5}, "threads: expected an integer"),
        ({"workers": 0.5}, "workers: expected an integer"),
        ({"patience": 1.5}, "patience: expected an integer"),
        ({"time": "3"}, "time: expected a number, got '3'"),
        ({"patience": 1, "validation": 0}, "patience: expected pictures held out"),
        ({"steps": 0}, "steps: expected 1 to"),
        ({"time": -1.0}, "time: expected"),
        ({"time": math.nan}, "time: expected"),
        ({"epochs": 0}, "epochs: expected"),
        ({"learning_rate": 0.0}, "learning_rate: expected"),
        ({"seed": -1}, "seed: expected 0 to"),
        ({"patience": 0}, "patience: expected"),
        ({"threads": 0}, "threads: expected 1 to 1024, got 0"),
        ({"workers": -1}, "workers: expected"),
        ({"validation": 1.0}, "fraction: expected 0 to below 1"),
        ({"model": "vnet"}, "model: expected one of .*unet, unpoolnet, got 'vnet'"),
        (
            {"solver": "lbfgs"},
            "solver: expected one of modern, unet-paper, fcn-paper, .*, got 'lbfgs'",
        ),
        ({"precision": "16", "device": "cpu"}, "16 runs on CUDA only"),
        ({"precision": "64"}, "precision: expected auto, 32, bf16 or 16"),
        ({"device": "tpu"}, "device: expected auto"),
        ({"device": "cuda:77"}, "cuda:77 is not there"),
        ({"depth": 0}, "depth"),
        ({"dropout": 2.0}, "dropout"),
        ({"norm": "group"}, "norm"),
        ({"normalise": "magic"}, "method: expected"),
        ({"kind": "magic"}, "magic"),
        ({"classes": 1, "kind": "classes"}, "expected two classes at least, found one"),
        ({"split": "nowhere.txt"}, "nowhere.txt"),
        ({"images": "nowhere"}, "nowhere"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_bad_options(
    data: dict[str, Path], tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        fit(**{**data, "output": tmp_path / "run", **SMALL, **options})
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_output_that_holds_files(undisturbed: Run, data: dict[str, Path], tmp_path: Path) -> None:
    path = shutil.copytree(undisturbed.path, tmp_path / "run")
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="holds files"):
        fit(**data, output=path, **SMALL)
    with pytest.raises(UserError, match="patch"):
        fit(**data, output=path, **{**SMALL, "patch": 1}, overwrite=True)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    run = fit(**data, output=path, **{**SMALL, "steps": 1}, overwrite=True)
    assert run.config["result"]["steps"] == 1
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write into"):
        fit(**data, output=tmp_path / "file" / "run", **SMALL)


def test_names_that_a_config_cannot_hold(
    undisturbed: Run, data: dict[str, Path], tmp_path: Path
) -> None:
    path = shutil.copytree(undisturbed.path, tmp_path / "run")
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    folders = [shutil.copytree(data[name], tmp_path / name) for name in ("images", "labels")]
    try:
        for side in folders:
            (side / "0.png").rename(side / os.fsdecode(b"caf\xe9.png"))
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    with pytest.raises(UserError, match=r"expected names in UTF-8, rename .*caf.udce9"):
        fit(*folders, path, **SMALL, overwrite=True)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


def test_place_of_a_wrong_id_is_that_in_the_file(data: dict[str, Path], tmp_path: Path) -> None:
    image, labels = data["images"] / "0.png", np.zeros((48, 48), np.uint8)
    labels[40, 7] = 9
    Image.fromarray(labels).save(tmp_path / "0.png")
    block = Pair("0", image, tmp_path / "0.png", rows=(38, 48))
    with pytest.raises(UserError, match="id 9, row 40, column 7"):
        pictures.read([block], LabelCoding("classes", 2), Normalisation())
    (picture,) = pictures.read([block], LabelCoding("classes", 10), Normalisation())
    assert picture.image.shape[1:] == picture.target.shape == (10, 48)
    assert picture.target[2, 7] == 9


def test_images_that_do_not_go_together(data: dict[str, Path], tmp_path: Path) -> None:
    images = shutil.copytree(data["images"], tmp_path / "images")
    labels = shutil.copytree(data["labels"], tmp_path / "labels")
    Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save(images / "3.png")
    with pytest.raises(UserError, match=r"3\.png: expected 1 channels, as .*\.png has, got 3"):
        fit(images, labels, tmp_path / "run", **SMALL, validation=0)
    shutil.copy(data["images"] / "3.png", images)
    (labels / "none").write_text("4\n")
    for path in labels.glob("[0-3].png"):
        Image.fromarray(np.full((48, 48), 255, np.uint8)).save(path)
    options = {**SMALL, "kind": "classes", "classes": 2, "ignore": 255}
    Image.fromarray(np.eye(48, dtype=np.uint8)).save(labels / "4.png")
    with pytest.raises(UserError, match="to train on have no pixel that counts"):
        fit(images, labels, tmp_path / "run", **options, split=labels / "none")
    Image.fromarray(np.eye(48, dtype=np.uint8)).save(labels / "0.png")
    Image.fromarray(np.full((48, 48), 255, np.uint8)).save(labels / "4.png")
    with pytest.raises(UserError, match="to validate with have no pixel that counts"):
        fit(images, labels, tmp_path / "run", **options, split=labels / "none")
    assert not (tmp_path / "run").exists()


def test_loss_that_is_not_finite(data: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step.*lower learning rate"):
        fit(**data, output=tmp_path / "run", **{**SMALL, "norm": "none"}, learning_rate=900.0)


def test_resume_of_what_cannot_be_resumed(
    undisturbed: Run, data: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        resume(tmp_path)
    path = tmp_path / "run"
    shutil.copytree(undisturbed.path, path)
    for name in (folder.WEIGHTS, folder.BEST):
        (path / name).unlink()
    text = (path / folder.CONFIG).read_text()

    checkpoint = path / folder.LAST
    whole = checkpoint.read_bytes()
    for content, message in [
        (whole[:1000], r"last\.ckpt is damaged"),
        (torch.zeros(3), r"last\.ckpt is damaged: no 'global_step'"),
        ({"global_step": 1}, r"last\.ckpt is damaged: no 'pytorch-lightning_version'"),
    ]:
        if isinstance(content, bytes):
            checkpoint.write_bytes(content)
        else:
            torch.save(content, checkpoint)
        with pytest.raises(UserError, match=message) as error:
            resume(path)
        assert "\n" not in str(error.value)
    checkpoint.write_bytes(whole)

    for old, new, message in [
        ('solver = "modern"', 'solver = "lbfgs"', "solver"),
        ("batch = 2", "batch = 0", "batch"),
        ("batch = 2\n", "", "batch"),
        ("checksum", "sum", "no 'checksum'"),
        ("base = 2", "base = 3", r"last\.ckpt is of another network than config\.toml says"),
        ('device = "cpu"', 'device = "cuda:77"', "cuda:77 is not there"),
        ("/labels/0.png", "/labels/none.png", r"none\.png"),
    ]:
        assert old in text
        (path / folder.CONFIG).write_text(text.replace(old, new))
        with pytest.raises(UserError, match=message) as error:
            resume(path)
        assert "\n" not in str(error.value)

    shutil.copy(undisturbed.path / folder.WEIGHTS, path)
    (path / folder.CONFIG).write_text(text.replace('ended = "steps"\n', ""))
    with pytest.raises(UserError, match=r"config\.toml is damaged: no 'ended'"):
        resume(path)
    (path / folder.WEIGHTS).unlink()

    moved = write_pictures(tmp_path / "data")
    (path / folder.CONFIG).write_text(
        text.replace(str(data["images"].parent), str(tmp_path / "data"))
    )
    Image.fromarray(np.zeros((48, 48), np.uint8)).save(moved["images"] / "0.png")
    with pytest.raises(UserError, match="have changed since"):
        resume(path)


def test_resume_on_another_device(undisturbed: Run, tmp_path: Path) -> None:
    text = (undisturbed.path / folder.CONFIG).read_text().replace('"cpu"', '"cuda:77"')
    (tmp_path / folder.CONFIG).write_text(text)
    with pytest.raises(UserError, match="device: expected auto"):
        resume(tmp_path, device="tpu")
    assert same(resume(tmp_path, device="cpu"), undisturbed)


def test_says_little(
    data: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    fit(**data, output=tmp_path / "a", **{**SMALL, "steps": 2})
    assert capfd.readouterr() == ("", "")
    fit(**data, output=tmp_path / "b", **{**SMALL, "steps": 2}, progress=True)
    assert capfd.readouterr() == ("", ""), "this is no terminal"
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # tells rich that it is one
    fit(**data, output=tmp_path / "c", **{**SMALL, "steps": 2}, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "training" in err
    assert "mean IU" in err


def test_refuses_labels_that_show_one_class(data: dict[str, Path], tmp_path: Path) -> None:
    """As where three names make 255, the foreground of these masks, void."""
    with pytest.raises(UserError, match="show no class but a: see how the labels were read"):
        fit(**data, output=tmp_path / "a", **SMALL, names=("a", "b", "c"))
    assert not (tmp_path / "a").exists()
