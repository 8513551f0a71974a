"""Timing things side by side, and the name of what computed."""

import platform
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

Cases = Mapping[str, Callable[[], object]]


def rounds(
    cases: Cases, prepare: Callable[[str], object] = lambda name: None, least_seconds: float = 0.0
) -> Iterator[dict[str, float]]:
    """Seconds of every case, round after round, A B C, A B C, ..., for as long as the caller asks.

    Load from elsewhere, turbo clocks and heat drift over minutes; within a round they are nearly the same for all. A
    case that is shorter than `least_seconds` is repeated within a sample. Every case runs untimed beforehand, since its
    first call plans kernels and allocates. `prepare` is told, untimed, which case comes next.
    """
    repeats = {}
    for name, case in cases.items():
        prepare(name)
        warm = seconds(case)
        repeats[name] = 1 if warm >= least_seconds else max(1, round(least_seconds / seconds(case)))
    while True:
        found = {}
        for name, case in cases.items():
            prepare(name)
            found[name] = seconds(case, repeats[name])
        yield found


def seconds(case: Callable[[], object], repeats: int = 1) -> float:
    """Seconds of one call: the mean of several, the accelerator's work included."""
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        case()
    wait()
    return (time.perf_counter() - started) / repeats


def wait() -> None:
    """Until the accelerator, if there is one, has done what it was told."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def device_name(device: torch.device) -> str:
    """The name its maker gave the processor that computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")  # of Linux
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
