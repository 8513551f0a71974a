"""What COMCAT costs in use, and how that grows: parts of benchmarks.speed.

- use: an adapter file loaded into a ready U-Net, and one of twenty loaded adapters switched to;
- bytes: the size of an adapter on every base;
- growth: one self-attention layer with an adapter over the bare one, as rank, adapters, resolution and batch grow;
- processes: a training step of the embedded base with one process and with two, on one thread each.

The goal for loading is 50 ms.
"""

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
from diffusers import UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer

from benchmarks import circumstances as shared
from benchmarks import variants
from benchmarks.attention import Settings, kinds
from comcat_diffusion.adapters.config import ComcatConfig
from comcat_diffusion.adapters.merge import unload_adapters
from comcat_diffusion.adapters.store import expected_shapes, load_adapter, save_adapter

LOADED = 20  # adapters at once
KINDS = ("bare", "comcat", "comcat_foldable", "lora")
PROCESSES = (1, 2)
RANKS = (1, 2, 4, 8)
ADAPTER_BYTES = 2  # a parameter in the file's default precision, float16


@dataclass(frozen=True)
class Layer:
    """One self-attention layer and what goes through it."""

    rank: int
    resolution: int  # pixels of the picture
    adapters: int = 1
    batch: int = 1


def growth_of(settings: Settings) -> dict[str, list[Layer]]:
    """What grows -> the layers to measure: all else as it is at half the resolution."""
    usual, whole = Layer(settings.rank, settings.resolution // 2), settings.resolution
    values = {"rank": (1, 2, 4, 8, 16), "adapters": (1, 2, 4, 8), "batch": (1, 2, 4)}
    values["resolution"] = (whole // 2, whole * 5 // 8, whole * 3 // 4, whole)
    return {name: [replace(usual, **{name: value}) for value in found] for name, found in values.items()}


def use_rows(settings: Settings) -> Iterator[dict]:
    """Seconds to load an adapter into a ready U-Net and to switch between many, for every target and kind."""
    unet = variants.bare_unet(settings.device, settings.dtype, settings.base)
    for targets in settings.targets:
        for kind in kinds(("comcat", "comcat_foldable"), targets):
            config = ComcatConfig(r=settings.rank, target_modules=variants.ATTENTIONS[targets], **variants.COMCAT[kind])
            for what, seconds in _seconds_in_use(unet, config, settings.rounds).items():
                yield {"part": "use", "what": what, "targets": targets, "variant": kind, "seconds": seconds}


def _seconds_in_use(unet: torch.nn.Module, config: ComcatConfig, rounds: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.safetensors"
        unet.add_adapter(config, "first")
        save_adapter(unet, file, "first", dtype=torch.float16)
        unload_adapters(unet)
        loads = [_seconds(load_adapter, unet, file) for _ in _unloading(unet, rounds)]
        for number in range(LOADED):
            load_adapter(unet, file, f"adapter_{number}")
    names = [f"adapter_{number % LOADED}" for number in range(LOADED * rounds)]
    switches = [_seconds(unet.set_adapters, [name]) for name in names]
    unload_adapters(unet)
    return {"load": loads, "switch": switches}


def _unloading(unet: torch.nn.Module, rounds: int) -> Iterator[int]:
    for number in range(rounds):
        yield number
        unload_adapters(unet)


def _seconds(action: Callable, *arguments: object) -> float:
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


def byte_rows(settings: Settings) -> Iterator[dict]:
    """Sizes of adapters on every base; nothing is computed, so the U-Nets have no weights."""
    for base in variants.BASES.values():
        with torch.device("meta"):
            unet = UNet2DConditionModel(**base.unet)
        for targets, pattern in variants.ATTENTIONS.items():
            for kind in [k for k in variants.COMCAT if k in kinds(("comcat", "comcat_foldable"), targets)]:
                for rank in RANKS:
                    config = ComcatConfig(r=rank, target_modules=pattern, **variants.COMCAT[kind])
                    row = {"part": "bytes", "architecture": base.name, "targets": targets, "rank": rank}
                    size = adapter_size(unet, config)
                    yield row | {"variant": kind, "attentions": len(variants.attentions_of(unet, pattern))} | size


def adapter_size(unet: UNet2DConditionModel, config: ComcatConfig) -> dict[str, int]:
    """Parameters and the bytes of the factors; the header of the file comes on top."""
    parameters = sum(high * wide for high, wide in expected_shapes(unet, config).values())
    return {"parameters": parameters, "bytes": parameters * ADAPTER_BYTES}


def growth_rows(settings: Settings) -> Iterator[dict]:
    """A layer's forward and backward with each kind of adapter over the bare one, as one thing grows."""
    base = variants.bare_attention(False, settings.device, settings.dtype, settings.base)
    for grows, layers in growth_of(settings).items():
        for layer in layers:
            tokens = (layer.resolution // settings.base.pixels) ** 2
            hidden = settings.random(layer.batch, tokens, settings.base.channels).requires_grad_()
            cases = {kind: _step(_adapted(base, kind, layer), hidden) for kind in KINDS}
            timings = shared.interleaved(cases, settings.rounds, settings.least_seconds)
            for kind, timing in timings.items():
                told = {"part": "growth", "grows": grows, "value": getattr(layer, grows), "tokens": tokens}
                yield told | {"variant": kind} | timing.row()


def _adapted(base: torch.nn.Module, kind: str, layer: Layer) -> torch.nn.Module:
    """The layer with several adapters of one kind, all active."""
    model = variants.variant(kind, base, "attn", layer.rank)
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
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            done = [sys.executable, *launch, *script] if count > 1 else [sys.executable, *script]
            subprocess.run(done, check=True, env=environment, capture_output=True, cwd=shared.ROOT)
            lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        seconds = [line["seconds"] for line in lines if "seconds" in line]
        yield {"part": "processes", "value": count, "seconds": statistics.median(seconds[1:]), "steps": len(seconds)}


def tables(report: dict) -> str:
    """The report as markdown."""
    about = {"base": "SD 1.5", "rank": 2} | report["settings"]  # results older than other bases do not name them
    makers = {"bytes": _byte_table, "growth": _growth_tables, "processes": _process_table}
    makers["use"] = lambda rows: _use_table(rows, f"{about['base']}, rank {about['rank']}")
    parts = {part: [row for row in report["rows"] if row["part"] == part] for part in makers}
    made = [makers[part](rows) for part, rows in parts.items() if rows]
    return "\n\n".join([*made, shared.circumstances_text(report["circumstances"])])


def _use_table(rows: list[dict], title: str) -> str:
    cells = [
        (
            f"{row['what']}, {row['targets']}",
            row["variant"],
            f"{1000 * statistics.median(row['seconds']):.1f}",
            len(row["seconds"]),
        )
        for row in rows
    ]
    return shared.markdown_table((title, "variant", "ms, median", "of"), cells)


def _byte_table(rows: list[dict]) -> str:
    """Parameters and kB of the float16 factors, a column a rank."""
    lines: dict[tuple, list[str]] = {}
    for row in rows:
        key = (f"{row['architecture']}, {row['attentions']} attentions ({row['targets']})", row["variant"])
        lines.setdefault(key, []).append(f"{row['parameters']:,} / {row['bytes'] / 1000:,.0f} kB")
    columns = ("parameters / float16 factors in the file", "variant", *(f"rank {rank}" for rank in RANKS))
    return shared.markdown_table(columns, [(*key, *sizes) for key, sizes in lines.items()])


def _growth_tables(rows: list[dict]) -> str:
    made = []
    for grows in dict.fromkeys(row["grows"] for row in rows):
        found = [row for row in rows if row["grows"] == grows]
        values = list(dict.fromkeys(row["value"] for row in found))
        cells = [
            (kind, *(f"{row['ratio']:.2f}" for row in found if row["variant"] == kind))
            for kind in KINDS
            if kind != "bare"
        ]
        head = f"a layer's step over the bare one, {grows} of"
        made.append(shared.markdown_table((head, *map(str, values)), cells))
    return "\n\n".join(made)


def _pace(row: dict) -> float:
    """Pictures a second: four for every process and step."""
    return 4 * row["value"] / row["seconds"]


def _process_table(rows: list[dict]) -> str:
    cells = [(row["value"], f"{row['seconds']:.3f}", f"{_pace(row):.1f}") for row in rows]
    return shared.markdown_table(("processes", "seconds a step", "pictures a second"), cells)


def plot_processes(report: dict, path: Path) -> None:
    """How many pictures a second are learned, over the number of processes."""
    counts = [row["value"] for row in report["rows"]]
    pace = [_pace(row) for row in report["rows"]]
    shared.line_plot(path, {"embedded base": (counts, pace)}, xlabel="processes", ylabel="pictures a second")


def plot_growth(report: dict, path: Path) -> None:
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
