"""``segfuse demo``: a U-Net trained and judged on a real microscopy image, in about a minute.

The image shows fluorescent cell nuclei. It is of the 2018 Data Science Bowl (Caicedo et al.,
Nature Methods 16, 2019) and comes inside the ``stardist`` package (BSD-3-Clause), whose files are
read here and whose code is not.

The left half is the training part, the right half is held out. Training sees none of the right
half's pixels, neither as labels nor as the surroundings of labelled pixels: either half is mirrored
at its own border, and grey values are normalised by the training part's percentiles. A nucleus
across the border is cut in two, one piece for each half.

The nuclei of the held-out half come out as instances: connected components of the foreground, holes
filled and specks dropped. Figures are of the pixels, and of the nuclei found.

The figures compare the U-Net with two that need no training: Otsu's threshold, found on the
held-out part itself, and calling every pixel background.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .devices import threads as use_threads
from .errors import UserError
from .files import whole
from .models import UNet
from .objects import instances
from .prediction import predict

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DemoError", "Result", "Score", "run"]

FILES = ("overlay.png", "prediction.tif", "instances.tif", "weights.pt")
OVERLAY, PREDICTION, INSTANCES, WEIGHTS = FILES
MARKER = ".segfuse-demo"  # in a directory: the demo's files there are the demo's own
PACKAGES = (
    "stardist",
    "imagecodecs",
    "lightning",
    "matplotlib",
    "PIL",
    "rich",
    "safetensors",
    "skimage",
    "tifffile",
    "tomli_w",
)

TRAINING = np.s_[0:512, 0:256]
HELD_OUT = np.s_[0:512, 256:512]

ARCHITECTURE: dict[str, Any] = {
    "in_channels": 1,
    "classes": 2,
    "base": 16,
    "depth": 3,
    "norm": "batch",
}
PATCH = 92  # pixels a side that one training patch labels; the network sees `margin` more
BATCH = 4
RATE = 4e-3
GAIN, SHIFT = 0.4, 0.06  # of grey values, see `data.patches.Patches`
SMALLEST = 20  # pixels of a nucleus; what is smaller is a speck
STEPS = 200
SECONDS = 100.0
DAY = 86400.0
MOST_STEPS = 1_000_000
MOST_THREADS = 1024


class DemoError(UserError):
    """The demo cannot run as things are; the text says in one line why, and what to do."""


@dataclass(frozen=True)
class Score:
    """How well a mask agrees with the truth.

    Attributes:
        accuracy: fraction of pixels that agree.
        iu: foreground intersection over union.
        average_precision: of its components as nuclei, at an intersection over union of 0.5.
        panoptic_quality: of the same.
    """

    accuracy: float
    iu: float
    average_precision: float
    panoptic_quality: float


@dataclass(frozen=True)
class Result:
    """What the demo measured on the held-out part, and where it wrote.

    Attributes:
        unet: score of the trained U-Net.
        otsu: score of Otsu's threshold, found on the held-out part itself.
        background: score of the trivial guess that all is background.
        threshold: Otsu's threshold, in grey values of the image.
        steps: training steps taken: fewer than asked for when the time was up.
        seconds: that `run` took in all.
        overlay: the picture (PNG).
        prediction: the U-Net's mask of the held-out part (TIFF, uint8: 0 and 255).
        instances: the nuclei in it by their ids (TIFF, uint16).
        weights: what ``torch.load`` gives back as a dictionary: "state_dict"; "architecture", the
            arguments of `segfuse.models.UNet`; "grey_range", the grey values that the network
            takes as 0 and 1.
    """

    unet: Score
    otsu: Score
    background: Score
    threshold: float
    steps: int
    seconds: float
    overlay: Path
    prediction: Path
    instances: Path
    weights: Path


def run(
    output: Path,
    *,
    seed: int = 0,
    steps: int = STEPS,
    seconds: float = SECONDS,
    threads: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> Result:
    """Train a small U-Net on half of a real image, judge it on the other half, draw the outcome.

    The network runs on the CPU, so that the same seed and number of threads give the same result.

    Args:
        output: directory for the files; made if missing.
        seed: of the initial weights, the patches and the dropout; 0 to 2**63 - 1.
        steps: training steps, of four patches each; 1 to a million.
        seconds: after which training stops, the learning rate having come down; above 0, at most a
            day. One step is taken in any case.
        threads: CPU threads, 1 to 1024; None leaves torch's setting.
        overwrite: write into `output` even if it holds files that no demo wrote; they stay, unless
            named as the demo's.
        progress: show a progress bar; needs rich.

    Raises:
        ValueError: an argument out of its range.
        UserError: a package is missing (`DemoError`), or `output` holds other files or cannot be
            written to.
    """
    threads_fit = threads is None or 1 <= threads <= MOST_THREADS
    for name, value, expected, good in [
        ("seed", seed, "0 to 2**63 - 1", 0 <= seed < 2**63),
        ("steps", steps, f"1 to {MOST_STEPS}", 1 <= steps <= MOST_STEPS),
        ("seconds", seconds, f"above 0, at most {DAY}", 0 < seconds <= DAY),
        ("threads", threads, f"1 to {MOST_THREADS}", threads_fit),
    ]:
        if not good:
            raise ValueError(f"demo: expected {name} {expected}, got {value}")
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise DemoError(f"the demo needs {', '.join(missing)}: pip install 'segfuse[demo]'")
    _claim(output, overwrite=overwrite)
    began = time.perf_counter()

    import tifffile
    from skimage.filters import threshold_otsu

    from .data.files import write_labels
    from .data.normalise import Normalisation

    image, nuclei = _load()
    truth = nuclei > 0
    normalisation = Normalisation(scope="set").fit([image[TRAINING][None]])
    normalised = normalisation(image[None])  # (1, H, W)
    with use_threads(threads), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = UNet(**ARCHITECTURE)
        taken = _train(
            model,
            normalised[(slice(None), *TRAINING)],
            truth[TRAINING],
            steps=steps,
            seconds=seconds,
            seed=seed,
            progress=progress,
        )
        predicted = _predict(model, normalised[(slice(None), *HELD_OUT)])

    image_held_out, nuclei_held_out = image[HELD_OUT], nuclei[HELD_OUT]
    threshold = float(threshold_otsu(image_held_out))  # type: ignore[no-untyped-call]
    bright = image_held_out > threshold
    found = instances(predicted, smallest=SMALLEST)
    unet = _score(predicted, found, nuclei_held_out)
    otsu = _score(bright, instances(bright, smallest=SMALLEST), nuclei_held_out)
    nothing = np.zeros_like(predicted)

    (low,), (extent,) = normalisation.offset or (0.0,), normalisation.scale or (1.0,)
    with whole(output / WEIGHTS) as path, path.open("wb") as file:
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        saved = {"architecture": ARCHITECTURE, "state_dict": state}
        torch.save({**saved, "grey_range": (low, low + extent)}, file)
    with whole(output / OVERLAY) as path:
        methods = {"U-Net": (predicted, unet), "Otsu": (bright, otsu)}
        _draw(path, image, nuclei_held_out > 0, methods, found)
    with whole(output / PREDICTION) as path:
        tifffile.imwrite(path, np.uint8(255) * predicted)
    write_labels(output / INSTANCES, found[None].astype(np.uint16))
    return Result(
        unet=unet,
        otsu=otsu,
        background=_score(nothing, nothing, nuclei_held_out),
        threshold=threshold,
        steps=taken,
        seconds=time.perf_counter() - began,
        overlay=output / OVERLAY,
        prediction=output / PREDICTION,
        instances=output / INSTANCES,
        weights=output / WEIGHTS,
    )


def _claim(output: Path, *, overwrite: bool) -> None:
    """Make the directory, or make sure that it is a demo's own or empty; and can be written to."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in output.iterdir())
        if names and MARKER not in names and not overwrite:
            raise DemoError(
                f"{output} holds files that are not the demo's ({names[0]}): "
                "choose another directory with -o, or write into this one with --overwrite"
            )
        (output / MARKER).touch()
    except OSError as error:
        raise DemoError(f"cannot write into {output}: {error.strerror}") from error


def _load() -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Read the image (H, W) and its truth (H, W), ids of nuclei."""
    import tifffile

    spec = find_spec("stardist")
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        image, labels = (
            Path(folder, "data", "images", name) for name in ("img2d.tif", "mask2d.tif")
        )
        if image.is_file() and labels.is_file():
            return tifffile.imread(image), tifffile.imread(labels)
    raise DemoError("the installed stardist package lacks its image: pip install 'segfuse[demo]'")


def _train(
    model: UNet,
    image: NDArray[np.float32],
    truth: NDArray[np.bool_],
    *,
    steps: int,
    seconds: float,
    seed: int,
    progress: bool,
) -> int:
    """Train on an image (1, H, W) and its truth (H, W); return the steps taken."""
    from .course import Budget, Course
    from .data.patches import Patches, Picture
    from .loop import learn
    from .nn import WeightedCrossEntropy
    from .solvers import SOLVERS

    patches = Patches(
        [Picture(image, truth.astype(np.uint8))],
        size=PATCH,
        margin=model.margin,
        seed=seed,
        gain=GAIN,
        shift=SHIFT,
    )
    solver = SOLVERS["modern"]
    course = Course(Budget(steps, seconds), rate=RATE, schedule=solver.schedule, seed=seed)
    return learn(
        model,
        patches,
        WeightedCrossEntropy(),
        course,
        batch=BATCH,
        solver=solver,
        device=torch.device("cpu"),
        progress=progress,
    )


def _predict(model: UNet, image: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Predict the foreground (H, W) of a normalised image (1, H, W), mirrored at its border."""
    return np.asarray(predict(model, torch.from_numpy(image), progress=False) == 1)


def _score(prediction: NDArray[Any], found: NDArray[Any], nuclei: NDArray[Any]) -> Score:
    """Judge a mask, and the objects found in it, by the true ids of nuclei."""
    from .metrics import ConfusionMatrix, detection_scores, overlaps, panoptic_quality

    matrix = ConfusionMatrix(2, ignore_index=None)
    pair = (prediction, nuclei > 0)
    matrix.update(*(torch.from_numpy(mask.astype(np.uint8))[None] for mask in pair))
    scores, table = matrix.scores(), overlaps(found, nuclei)
    return Score(
        accuracy=scores.pixel_accuracy,
        iu=scores.iu[1],
        average_precision=detection_scores(table).average_precision,
        panoptic_quality=panoptic_quality(table).pq,
    )


def _draw(
    path: Path,
    image: NDArray[np.uint16],
    truth: NDArray[np.bool_],
    methods: dict[str, tuple[NDArray[np.bool_], Score]],
    found: NDArray[np.int32],
) -> None:
    from .report import comparison

    panels = {
        f"{name}, errors:\npixel accuracy {score.accuracy:.3f}\nforeground IU {score.iu:.3f}": mask
        for name, (mask, score) in methods.items()
    }
    title = (
        "Nuclei, fluorescence (2018 Data Science Bowl): U-Net trained on the left half, "
        "judged on the right; square root of the grey values shown"
    )
    of = next(iter(methods.values()))[1]
    name = (
        f"U-Net, {found.max()} objects:\naverage precision (IU 0.5) {of.average_precision:.3f}\n"
        f"panoptic quality {of.panoptic_quality:.3f}"
    )
    drawn = comparison(image, HELD_OUT, truth, panels, title=title, objects=(name, found))
    drawn.savefig(path, dpi=200)
