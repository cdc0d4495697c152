"""Times every operator against what a user would write without it.

python benchmarks/run.py --threads 2 --json benchmarks/results/local.json

README.md beside this file says how to read the result.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.util import find_spec
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

import segfuse
from segfuse import _C, registry
from segfuse.info import cuda_sentence

COPIED = 512 << 20  # bytes of the tensors that measure the copy bandwidth, far beyond any cache
FLUSHED = 1 << 30  # bytes read to empty the L2 cache: longer than the launch of what is timed
WARM_UPS = 2
FEWEST = 3  # repeats, however long they take
QUIET_DRIFT = 0.1  # a quiet machine's copy bandwidth before and after differs by less
QUIET_OTHERS = 0.02  # and its processors spend less of their time on other programs

Call = Callable[[], object]
Clock = Callable[[Call], float]
"""Runs a call and returns the seconds that it took."""
Timer = Callable[..., "list[Times]"]
"""Runs calls in turns and returns the times of each."""


@dataclass(frozen=True)
class Effort:
    """How long a case is repeated."""

    repeats: int
    seconds: float
    """Both are reached, unless that takes longer than ``patience``."""
    patience: float
    """Seconds after which the fewest repeats are enough."""

    def suffices(self, repeats: int, seconds: float) -> bool:
        """Whether so many repeats in so many seconds are enough."""
        if seconds >= self.patience:
            return repeats >= FEWEST
        return repeats >= self.repeats and seconds >= self.seconds


FULL = Effort(repeats=15, seconds=0.5, patience=20)
QUICK = Effort(repeats=5, seconds=0.05, patience=2)


@dataclass(frozen=True)
class Times:
    """Milliseconds: median and quartiles of a call's repeats."""

    median_ms: float
    q1_ms: float
    q3_ms: float
    repeats: int

    def cells(self) -> tuple[str, str]:
        """Median, and interquartile range as a part of it."""
        spread = (self.q3_ms - self.q1_ms) / self.median_ms
        return f"{self.median_ms:#.4g}".rstrip("."), f"{spread:.0%}"


@dataclass(frozen=True)
class Measured:
    """A case, ours and the peer's."""

    op: str
    dtype: str
    case: str
    ours: Times
    peer: Times
    bytes_moved: int | None

    @property
    def speedup(self) -> float:
        """How many times the peer's time is ours."""
        return self.peer.median_ms / self.ours.median_ms

    def of_copy(self, bandwidth: float) -> float | None:
        """Our share of the copy bandwidth."""
        if self.bytes_moved is None:
            return None
        return self.bytes_moved / (self.ours.median_ms / 1000) / bandwidth


@dataclass(frozen=True)
class Unmeasured:
    """What has no times, and why."""

    op: str
    dtype: str
    case: str
    reason: str
    raised: bool = True

    def __str__(self) -> str:
        """One line."""
        return f"{self.op}, {self.dtype}, {self.case}: {self.reason}"


def cpu_clock(call: Call) -> float:
    """Wall-clock time until the result is there; its release is not counted."""
    begin = time.perf_counter()
    result = call()
    end = time.perf_counter()
    del result
    return end - begin


def keep_freed_memory(keep: bool) -> None:  # noqa: FBT001
    """Let the C library reuse large blocks that were freed, or give them back to the system.

    By default it does one or the other, by size and history, so that equal calls differ.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold, m_mmap_max = -1, -3, -4
        mallopt(m_mmap_threshold, 1 << 17)
        mallopt(m_trim_threshold, (1 << 31) - 1 if keep else 1 << 17)
        mallopt(m_mmap_max, 0 if keep else 1 << 16)


class CudaClock:
    """Time on the GPU, with a cold L2 cache.

    Reading a buffer much larger than the cache evicts what the last call left there, leaves no
    lines that have yet to be written back, and keeps the GPU busy while the call is launched, so
    that its kernels are timed and not Python.
    """

    def __init__(self) -> None:
        self._flushed = torch.zeros(FLUSHED // 4, device="cuda")
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Call) -> float:
        """Return the seconds between two events on torch's current stream."""
        self._flushed.sum()
        self._begin.record()
        call()
        self._end.record()
        self._end.synchronize()
        milliseconds: float = self._begin.elapsed_time(self._end)
        return milliseconds / 1000


def interleaved(clock: Clock, effort: Effort, *calls: Call) -> list[Times]:
    """Time the calls in turns, A B A B, so that a drift of the machine meets all of them alike."""
    for call in calls * WARM_UPS:
        clock(call)
    seconds: list[list[float]] = [[] for _ in calls]
    begin = time.monotonic()
    while not effort.suffices(len(seconds[0]), time.monotonic() - begin):
        for call, times in zip(calls, seconds, strict=True):
            times.append(clock(call))
    return [summary(times) for times in seconds]


def summary(seconds: Sequence[float]) -> Times:
    """Median and quartiles."""
    q1, middle, q3 = (1000 * q for q in quantiles(seconds, method="inclusive"))
    return Times(middle, q1, q3, len(seconds))


def copy_bandwidth(timer: Timer, device: str) -> float:
    """Bytes a second, read and written together, of torch's copy between two large tensors."""
    source = torch.ones(COPIED // 4, device=device)
    target = torch.ones_like(source)
    (times,) = timer(lambda: target.copy_(source))
    return 2 * COPIED / (times.median_ms / 1000)


class Others:
    """What other programs, or the host of a virtual machine, took of the processors' time."""

    def __init__(self) -> None:
        self._begin = self._read()

    @staticmethod
    def _read() -> tuple[float, float]:
        """Seconds of all processors, and of them those that others were given."""
        user, nice, system, idle, wait, irq, soft, steal = (
            int(ticks) / os.sysconf("SC_CLK_TCK")
            for ticks in Path("/proc/stat").read_text(encoding="ascii").split()[1:9]
        )
        busy = user + nice + system + irq + soft + steal
        return busy + idle + wait, busy - sum(os.times()[:4])

    def share(self) -> float:
        """Return the part since this was made."""
        total, others = (now - then for now, then in zip(self._read(), self._begin, strict=True))
        return max(others / total, 0.0)


def maker(dtype: torch.dtype, device: str) -> registry.Make:
    """Random tensors, the same in every run."""
    torch.manual_seed(0)

    def make(*size: int) -> Tensor:
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(size, dtype=dtype, device=device)
        return torch.randint(0, 2 if dtype == torch.bool else 100, size, dtype=dtype, device=device)

    return make


def default_dtype(spec: registry.OpSpec) -> torch.dtype:
    """float32, or the first where an operator does not take it."""
    return torch.float32 if torch.float32 in spec.dtypes else spec.dtypes[0]


def measure(
    spec: registry.OpSpec, dtype: torch.dtype, device: str, wanted: str, timer: Timer
) -> Iterator[Measured | Unmeasured]:
    """Time the operator's cases whose name, or its own, contains ``wanted``."""
    op, kind = spec.name, str(dtype).removeprefix("torch.")
    if dtype not in spec.dtypes:
        if wanted in op:
            reason = "the operator does not take this dtype"
            yield Unmeasured(op, kind, "all cases", reason, raised=False)
        return
    last = "the start"
    try:
        for benchmark in spec.benchmarks(maker(dtype, device)):
            last = benchmark.name
            if wanted in op or wanted in last:
                progress(f"{op}, {kind}: {last}")
                keep_freed_memory(last.endswith("reused"))
                try:
                    ours, peer = timer(benchmark.ours, benchmark.peer)
                    yield Measured(op, kind, last, ours, peer, benchmark.bytes_moved)
                except Exception as error:  # noqa: BLE001  (reported, and the others go on)
                    yield Unmeasured(op, kind, last, in_words(error))
            del benchmark  # and with it its tensors, before the next are made
    except Exception as error:  # noqa: BLE001  (likewise)
        yield Unmeasured(op, kind, f"all after {last}", in_words(error))


def in_words(error: Exception) -> str:
    """The error's kind and the first line of its text."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def progress(text: str) -> None:
    """One line that the next overwrites, for those who wait."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def machine(device: str) -> dict[str, str | int | None]:
    """What the times depend on; nothing that names the machine or its user."""
    facts: dict[str, str | int | None] = {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isa": _C.isa(),
        "last_level_cache": read("/sys/devices/system/cpu/cpu0/cache/index3/size"),
        "huge_pages": bracketed(read("/sys/kernel/mm/transparent_hugepage/enabled")),
        "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "segfuse": segfuse.__version__,
        "commit": output("git", "--no-optional-locks", "describe", "--always", "--dirty"),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    if device == "cuda":
        driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["gpu"] = torch.cuda.get_device_name()
        facts["driver"] = driver.splitlines()[0] if driver else None
        facts["cuda"] = torch.version.cuda
        facts["kernels"] = _C.cuda_architectures
    return facts


def cpu_model() -> str:
    """The model as the system names it; some names are so general that the numbers are needed."""
    lines = (read("/proc/cpuinfo") or "").split("\n\n")[0]
    facts = dict(re.findall(r"^(\S[^\t:]*?)\s*: (.*)$", lines, re.MULTILINE))
    if "model name" not in facts:
        return platform.machine()
    return f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"


def read(path: str) -> str | None:
    """Return a file's text, None where there is no such file."""
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def bracketed(text: str | None) -> str | None:
    """Return the choice that a file of /sys marks: "madvise" of "always [madvise] never"."""
    found = re.search(r"\[(.+)\]", text or "")
    return found[1] if found else None


def output(*command: str) -> str | None:
    """What a program prints in the repository, None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    folder = Path(__file__).parent
    done = subprocess.run(  # noqa: S603  (the two commands above)
        command, cwd=folder, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None if done.returncode == 0 else None


def rows(measured: Sequence[Measured], bandwidth: float) -> list[tuple[str, ...]]:
    """The table, its head first."""
    table: list[tuple[str, ...]] = [
        ("case", "ours ms", "IQR", "peer ms", "IQR", "of copy", "peer/ours")
    ]
    for m in measured:
        share = m.of_copy(bandwidth)
        of_copy = "" if share is None else f"{share:.2f}"
        times = (*m.ours.cells(), *m.peer.cells())
        table.append((m.case, *times, of_copy, f"{m.speedup:.2f}"))
    return table


def show(title: str, table: Sequence[tuple[str, ...]]) -> None:
    """Print the table, as rich's on a terminal, else as aligned text."""
    if sys.stdout.isatty() and find_spec("rich"):
        from rich.box import SIMPLE  # noqa: PLC0415  (rich may be missing)
        from rich.console import Console  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415

        head, *body = table
        drawn = Table(head[0], title=title, box=SIMPLE)
        for name in head[1:]:
            drawn.add_column(name, justify="right")
        for row in body:
            drawn.add_row(*row)
        Console().print(drawn)
        return
    print(f"\n{title}")
    first, *others = (max(map(len, column)) for column in zip(*table, strict=True))
    for case, *cells in table:
        numbers = (cell.rjust(width) for cell, width in zip(cells, others, strict=True))
        print(case.ljust(first), *numbers, sep="  ")


def as_json(measured: Measured, bandwidth: float) -> dict[str, Any]:
    """A case as the file holds it."""
    share = measured.of_copy(bandwidth)
    rounded = {"of_copy": share and round(share, 3), "peer_over_ours": round(measured.speedup, 3)}
    times = {"ours": in_digits(measured.ours), "peer": in_digits(measured.peer)}
    return asdict(measured) | times | rounded


def in_digits(times: Times) -> dict[str, float]:
    """Times as precise as they are."""
    return {
        name: value if isinstance(value, int) else float(f"{value:.5g}")
        for name, value in asdict(times).items()
    }


def save(path: Path, content: dict[str, Any]) -> None:
    """Write the whole file or none."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked before anything is timed."""
    parser = argparse.ArgumentParser(description="Times every operator against plain PyTorch.")
    parser.add_argument("--filter", default="", help="only operators and cases that contain this")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", nargs="+", default=[], help="float32 where an operator has it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--quick", action="store_true", help="few repeats: to see that it runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    options = parser.parse_args(arguments)
    options.dtypes = [getattr(torch, name, None) for name in options.dtype]
    for name, dtype in zip(options.dtype, options.dtypes, strict=True):
        if not isinstance(dtype, torch.dtype):
            parser.error(f"--dtype: torch has no dtype {name}")
    if options.threads < 1:
        parser.error(f"--threads: expected 1 or more, got {options.threads}")
    if options.json and not options.json.resolve().parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")
    if options.device == "cuda" and cuda_sentence().startswith("cannot"):
        parser.error(f"--device cuda {cuda_sentence()}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit code: 1 if a case raised or none was measured."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    clock = CudaClock() if options.device == "cuda" else cpu_clock
    timer = partial(interleaved, clock, QUICK if options.quick else FULL)
    facts = machine(options.device)

    others = Others()
    progress("copy bandwidth")
    before = copy_bandwidth(timer, options.device)
    results = [
        result
        for spec in registry.OPS.values()
        for dtype in options.dtypes or [default_dtype(spec)]
        for result in measure(spec, dtype, options.device, options.filter, timer)
    ]
    progress("copy bandwidth")
    after = copy_bandwidth(timer, options.device)
    progress("")
    taken = others.share()

    bandwidth = max(before, after)
    measured = [r for r in results if isinstance(r, Measured)]
    unmeasured = [r for r in results if isinstance(r, Unmeasured)]
    print(*(f"{name}: {value}" for name, value in facts.items() if value is not None), sep="\n")
    print(f"copy bandwidth: {before / 1e9:.1f} GB/s before, {after / 1e9:.1f} GB/s after")
    print(f"other programs: {taken:.1%} of the processors' time")
    for (op, dtype), group in groupby(measured, key=attrgetter("op", "dtype")):
        show(f"{op}, {dtype}", rows(list(group), bandwidth))
    if taken > QUIET_OTHERS or abs(before - after) > QUIET_DRIFT * bandwidth:
        print("\nThe machine was not quiet: trust no small difference, and run it again.")
    for missing in unmeasured:
        print(f"not measured: {missing}", file=sys.stderr)
    if not results:
        print(f"not measured: no operator or case contains {options.filter!r}", file=sys.stderr)
    if options.json:
        content = {
            "machine": facts,
            "device": options.device,
            "quick": options.quick,
            "copy_gb_per_s": {"before": round(before / 1e9, 2), "after": round(after / 1e9, 2)},
            "others_share": round(taken, 3),
            "cases": [as_json(m, bandwidth) for m in measured],
            "not_measured": [asdict(u) for u in unmeasured],
        }
        save(options.json, content)
    return 0 if measured and not any(u.raised for u in unmeasured) else 1


if __name__ == "__main__":
    sys.exit(main())
