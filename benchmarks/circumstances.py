"""What every benchmark shares: the circumstances of a number, interleaved timing, peak memory, JSON and tables.

A number without its circumstances cannot be repeated, so both stay in one JSON file, and tables are made from
that file only.
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path

import torch

from comcat_diffusion import timing

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LIBRARIES = ("torch", "diffusers", "transformers", "peft", "accelerate")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MIB = 2**20
STATUS = Path("/proc/self/status")  # of Linux


@dataclass(frozen=True)
class Timing:
    """One variant's seconds, and its ratios to the first variant, a ratio a round."""

    seconds: list[float]
    ratios: list[float]

    def row(self) -> dict[str, float | int]:
        """What goes into the JSON; the single ratios stay in it, so that other statistics can be made later."""
        return {
            "seconds": statistics.median(self.seconds),
            "ratio": statistics.median(self.ratios),
            "ratio_min": min(self.ratios),
            "ratio_max": max(self.ratios),
            "rounds": len(self.ratios),
            "ratios": self.ratios,
        }


def interleaved(cases: dict[str, Callable[[], object]], rounds: int, least_seconds: float = 0.2) -> dict[str, Timing]:
    """Time A B C D A B C D ... and compare every case with the first one of the same round (timing.rounds)."""
    if rounds < 1:
        raise ValueError(f"There must be at least one round, not {rounds}.")
    samples = list(islice(timing.rounds(cases, least_seconds=least_seconds), rounds))
    first = next(iter(cases))
    return {n: Timing([s[n] for s in samples], [s[n] / s[first] for s in samples]) for n in cases}


def peak_memory_mib(device: torch.device) -> float:
    """Most memory this process has held so far: allocated by tensors on a GPU, resident in all on a CPU.

    Neither falls again, so measure each variant `in_fresh_process`.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    if STATUS.exists():
        return _status_mib("VmHWM:")  # not ru_maxrss: on Linux a child inherits its parent's through fork and exec
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MIB if sys.platform == "darwin" else 1024)


def memory_mib(device: torch.device) -> float:
    """Memory that this process holds now; where only the peak can be had, that."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / MIB
    return _status_mib("VmRSS:") if STATUS.exists() else peak_memory_mib(device)


def _status_mib(name: str) -> float:
    return int(next(line for line in STATUS.read_text().splitlines() if line.startswith(name)).split()[1]) / 1024


def in_fresh_process(function: Callable, *arguments: object) -> object:
    """The result of a module-level function, run in a process of its own that has computed nothing before."""
    with ProcessPoolExecutor(max_workers=1, mp_context=_fresh([function.__module__])) as pool:
        return pool.submit(function, *arguments).result()


def _fresh(modules: Iterable[str]) -> BaseContext:
    """How new processes start: from a server that has imported these once and computed nothing, where there is one.

    With a GPU each imports for itself: libraries look for one when they are imported, and CUDA survives no fork.
    """
    server = "forkserver" in get_all_start_methods() and not torch.cuda.is_available()
    context = get_context("forkserver" if server else "spawn")
    context.set_forkserver_preload(list(modules))
    return context


def taking_turns(jobs: dict[str, tuple], modules: Iterable[str]) -> dict[str, object]:
    """Run long jobs side by side, each in a fresh process and only one at a time; returns their results by name.

    A job is a module-level function and its arguments. Before these the function gets another one, `turn`, to call
    wherever the next job may go on; it returns when the turn comes round. What is slow for a while (load from
    elsewhere, heat) is then slow for all, and each process has its own peak of memory. `modules` are those that take
    long to import. Raises RuntimeError if a job fails.
    """
    context = _fresh(modules)
    pipes, processes, results = {}, {}, {}
    try:
        for name, (function, *arguments) in jobs.items():
            pipes[name], there = context.Pipe()
            processes[name] = context.Process(target=_job, args=(there, function, arguments), daemon=True)
            processes[name].start()
            there.close()  # so that the end of the process is heard here
        for name, pipe in pipes.items():
            _heard(name, pipe)  # it has imported all it needs and waits for its first turn
        while len(results) < len(jobs):
            for name in [name for name in jobs if name not in results]:
                pipes[name].send(None)
                kind, result = _heard(name, pipes[name])
                if kind == "done":
                    results[name] = result
                    processes[name].join()
    finally:
        for process in processes.values():
            process.terminate()
            process.join()
    return results


def _job(pipe: Connection, function: Callable, arguments: list) -> None:
    def turn() -> None:
        pipe.send(("waits", None))
        pipe.recv()

    try:
        turn()
        pipe.send(("done", function(turn, *arguments)))
    except Exception:
        pipe.send(("failed", traceback.format_exc()))


def _heard(name: str, pipe: Connection) -> tuple[str, object]:
    try:
        kind, told = pipe.recv()
    except EOFError:
        raise RuntimeError(f"'{name}' ended without a word: was there not enough memory?") from None
    if kind == "failed":
        raise RuntimeError(f"'{name}' failed:\n{told}")
    return kind, told


def use_threads(threads: int | None) -> None:
    """Let torch compute on this many threads of the CPU; without a number, on as many as it finds."""
    if threads:
        torch.set_num_threads(threads)


def circumstances(device: torch.device, dtype: torch.dtype | str) -> dict[str, object]:
    """Everything beside the code that a number depends on. Take them before measuring: the load is among them."""
    commit, dirty = _git_state()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "command": " ".join(["python", "-m", *_module_and_arguments()]),
        "device": device.type,
        "device_name": timing.device_name(device),
        "threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {library: version(library) for library in LIBRARIES},
    }


def _git_state() -> tuple[str, bool | None]:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None


def _module_and_arguments() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [spec.name if spec else Path(sys.argv[0]).stem, *sys.argv[1:]]


def results_path(name: str, device: torch.device) -> Path:
    """benchmarks/results/NAME-DEVICE.json, where DEVICE is cpu or the GPU's name."""
    label = "cpu" if device.type == "cpu" else timing.device_name(device).lower().replace(" ", "-")
    return RESULTS / f"{name}-{label}.json"


def write_json(path: Path, report: dict[str, object]) -> None:
    """Write a report whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(path)


def markdown_table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table of text cells; the first column is set left, the others right."""
    columns = list(columns)
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def line_plot(path: Path, lines: dict[str, tuple[list, list]], **axes_settings: str) -> None:
    """A plot of lines, each its places across and up; the settings are matplotlib's: xlabel, ylabel, xscale, yscale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for label, (across, up) in lines.items():
        axes.plot(across, up, marker="o", markersize=3, label=label)
    axes.set(**axes_settings)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def circumstances_text(taken: dict[str, object]) -> str:
    """The circumstances as one line of markdown, to stand beside a table."""
    dirty = " with uncommitted changes" if taken["dirty"] else ""
    drawn = f"{taken['drawn']}, " if "drawn" in taken else ""
    libraries = ", ".join(f"{name} {number}" for name, number in taken["versions"].items())
    return (
        f"{taken['device_name']} ({taken['device']}), {taken['threads']} threads of {taken['cpu_count']}, load average "
        f"{taken['load_average']:.1f} at the start, {taken['dtype']}, {drawn}{libraries}, Python {taken['python']}, "
        f"commit {taken['commit'][:12]}{dirty}, {taken['date']}. `{taken['command']}`"
    )
