"""What COMCAT costs in use, and how that grows.

    python -m benchmarks.speed            # two minutes on two quiet CPU cores
    python -m benchmarks.speed --quick    # shows that it runs, not what it costs
    python -m benchmarks.speed --show F   # the tables of an earlier run

Parts, on SD 1.5's architecture with random weights unless it is said otherwise:

- use: an adapter file loaded into a ready U-Net, and one of twenty loaded adapters switched to;
- growth: one self-attention layer with an adapter over the bare one, as rank, adapters, resolution and batch grow; and
  a training step of the embedded base with one process and with two, on one thread each.

Whole training steps and generation are measured by benchmarks.attention. The goal for loading is 50 ms.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from benchmarks import circumstances as shared
from benchmarks import variants
from comcat_diffusion.adapters.config import ComcatConfig
from comcat_diffusion.adapters.merge import unload_adapters
from comcat_diffusion.adapters.store import load_adapter, save_adapter

LOADED = 20  # adapters at once
KINDS = ("bare", "comcat", "comcat_foldable", "lora")
PROCESSES = (1, 2)


@dataclass(frozen=True)
class Settings:
    """What is measured and how often."""

    device: torch.device
    dtype: torch.dtype
    threads: int | None
    rounds: int
    side: int  # of the latent image at the smallest resolution; tokens are its square
    steps: int  # of the training runs with one and with two processes


@dataclass(frozen=True)
class Layer:
    """One self-attention layer and what goes through it."""

    rank: int = 2
    adapters: int = 1
    scale: int = 1  # of the latent side
    batch: int = 1


# What grows -> the layers to measure
GROWTH = {
    "rank": [Layer(rank=rank) for rank in (1, 2, 4, 8, 16)],
    "adapters": [Layer(adapters=count) for count in (1, 2, 4, 8)],
    "scale": [Layer(scale=scale) for scale in (1, 2)],
    "batch": [Layer(batch=batch) for batch in (1, 2, 4)],
}


def use_rows(settings: Settings) -> Iterator[dict]:
    """Seconds to load an adapter into a ready U-Net and to switch between many, self- and cross-attention, rank 2."""
    unet = variants.bare_unet(settings.device, settings.dtype)
    for foldable in (False, True):
        kind = "comcat_foldable" if foldable else "comcat"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "adapter.safetensors"
            unet.add_adapter(ComcatConfig(r=2, target_modules=["attn1", "attn2"], foldable=foldable), "first")
            save_adapter(unet, file, "first", dtype=torch.float16)
            unload_adapters(unet)
            loads = [_seconds(load_adapter, unet, file) for _ in _unloading(unet, settings.rounds)]
            yield {"part": "use", "what": "load", "variant": kind, "seconds": loads, "bytes": file.stat().st_size}
            for number in range(LOADED):
                load_adapter(unet, file, f"adapter_{number}")
        names = [f"adapter_{number % LOADED}" for number in range(LOADED * settings.rounds)]
        switches = [_seconds(unet.set_adapters, [name]) for name in names]
        yield {"part": "use", "what": "switch", "variant": kind, "seconds": switches}
        unload_adapters(unet)


def _unloading(unet: torch.nn.Module, rounds: int) -> Iterator[int]:
    for number in range(rounds):
        yield number
        unload_adapters(unet)


def _seconds(action: Callable, *arguments: object) -> float:
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


def growth_rows(settings: Settings) -> Iterator[dict]:
    """A layer's forward and backward with each kind of adapter over the bare one, as one thing grows."""
    base = variants.bare_attention(False, settings.device, settings.dtype)
    for grows, layers in GROWTH.items():
        for layer in layers:
            tokens = (settings.side * layer.scale) ** 2
            generator = torch.Generator(settings.device).manual_seed(7)
            hidden = torch.randn(layer.batch, tokens, 320, generator=generator, device=settings.device)
            hidden = hidden.to(settings.dtype).requires_grad_()
            cases = {kind: _step(_adapted(base, kind, layer), hidden) for kind in KINDS}
            for kind, timing in shared.interleaved(cases, settings.rounds, settings.device).items():
                told = {"part": "growth", "grows": grows, "value": getattr(layer, grows), "tokens": tokens}
                yield told | {"variant": kind} | timing.row()


def _adapted(base: torch.nn.Module, kind: str, layer: Layer) -> torch.nn.Module:
    """The layer with several adapters of one kind, all active."""
    model = variants.variant(kind, base, ("attn",), layer.rank)
    if kind == "bare" or layer.adapters == 1:
        return model
    names = [variants.NAME, *(f"{variants.NAME}_{number}" for number in range(1, layer.adapters))]
    for name in names[1:]:
        variants.add_adapter(model, kind, ["attn"], layer.rank, name)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(names)
    return model


def _step(model: torch.nn.Module, hidden: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        model["attn"](hidden).float().square().mean().backward()
        hidden.grad = None
        for parameter in model.parameters():
            parameter.grad = None

    return step


def process_rows(settings: Settings) -> Iterator[dict]:
    """Median seconds of a training step of the embedded base, four pictures for every process, a thread each."""
    for count in PROCESSES:
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--output_dir", folder, "--max_train_steps", str(settings.steps), "--skip_final_inference"]
            launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(count), "--num_machines", "1"]
            launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
            script = [str(shared.ROOT / "train_customize.py"), *flags]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = [sys.executable, *launch, *script] if count > 1 else [sys.executable, *script]
            subprocess.run(done, check=True, env=environment, capture_output=True, cwd=shared.ROOT)
            lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        seconds = [line["seconds"] for line in lines if "seconds" in line]
        yield {"part": "processes", "value": count, "seconds": statistics.median(seconds[1:]), "steps": len(seconds)}


def measure(settings: Settings) -> dict:
    """Everything, as the JSON holds it."""
    taken = shared.circumstances(settings.device, settings.dtype)
    rows = [*use_rows(settings), *growth_rows(settings), *process_rows(settings)]
    return {"circumstances": taken, "settings": {"rounds": settings.rounds, "latent_side": settings.side}, "rows": rows}


def tables(report: dict) -> str:
    """The report as markdown."""
    rows = report["rows"]
    use = [
        (row["what"], row["variant"], f"{1000 * statistics.median(row['seconds']):.1f}", len(row["seconds"]))
        for row in rows
        if row["part"] == "use"
    ]
    text = [shared.markdown_table(("SD 1.5, self- and cross-attention, rank 2", "variant", "ms, median", "of"), use)]
    for grows in dict.fromkeys(row["grows"] for row in rows if row["part"] == "growth"):
        found = [row for row in rows if row.get("grows") == grows]
        values = list(dict.fromkeys(row["value"] for row in found))
        cells = [
            (kind, *(f"{row['ratio']:.2f}" for row in found if row["variant"] == kind))
            for kind in KINDS
            if kind != "bare"
        ]
        head = f"a layer's step over the bare one, {grows} of"
        text.append(shared.markdown_table((head, *map(str, values)), cells))
    steps = [(row["value"], f"{row['seconds']:.3f}", f"{4 * row['value'] / row['seconds']:.1f}")
             for row in rows if row["part"] == "processes"]  # fmt: skip
    text.append(shared.markdown_table(("processes", "seconds a step", "pictures a second"), steps))
    return "\n\n".join([*text, shared.circumstances_text(report["circumstances"])])


def plot(report: dict, path: Path) -> None:
    """How the cost of a layer's step grows, a panel each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in report["rows"] if row["part"] == "growth"]
    panels = list(dict.fromkeys(row["grows"] for row in rows))
    figure, grid = pyplot.subplots(1, len(panels), figsize=(3.2 * len(panels), 3), layout="constrained", sharey=True)
    for axes, grows in zip(grid, panels, strict=True):
        for kind in KINDS[1:]:
            found = [row for row in rows if row["grows"] == grows and row["variant"] == kind]
            axes.plot([row["value"] for row in found], [row["ratio"] for row in found], marker="o", label=kind)
        axes.axhline(1, color="0.7", linewidth=1)
        axes.set(xlabel=grows)
    grid[0].set(ylabel="step over the bare layer's")
    grid[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Measure, write the JSON and the plot, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="torch device: cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--dtype", choices=shared.DTYPES, default="float32", help="precision (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as many as torch finds)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small and short: shows that it runs, not what it costs")
    parser.add_argument("--output", type=Path, help="the JSON (default: benchmarks/results/speed-DEVICE.json)")
    parser.add_argument("--show", type=Path, metavar="JSON", help="print the tables of an earlier run and stop")
    asked = parser.parse_args(arguments)
    if asked.show:
        print(tables(json.loads(asked.show.read_text())))
        return
    shared.use_threads(asked.threads)
    device = torch.device(asked.device)
    settings = Settings(device, shared.DTYPES[asked.dtype], asked.threads, asked.rounds, 32, 40)
    if asked.quick:
        settings = replace(settings, rounds=1, side=8, steps=3)
    path = asked.output or shared.results_path("speed-quick" if asked.quick else "speed", device)
    report = measure(settings)
    shared.write_json(path, report)
    plot(report, path.with_suffix(".png"))
    print(tables(report))


if __name__ == "__main__":
    main()
