"""What compression costs in accuracy and brings in speed, on a ViT of DeiT-tiny's shape that is trained here.

    python -m benchmarks.compression                  # an hour or more of training on a CPU, minutes on a GPU
    python -m benchmarks.compression --quick          # a few steps on a shallow model: shows that it runs
    python -m benchmarks.compression --data digits    # scikit-learn's handwritten digits instead of drawn scenes
    python -m benchmarks.compression --show F         # the tables of an earlier run

Four parts:

- attention: top-1 without fine-tuning with 20/40/60/80 % of the attentions' parameters removed (the paper's Table 1):
  head by head, matrix by matrix, both also whitened, and whole heads pruned by magnitude.
- model: top-1 with 44 % and 61 % of all parameters removed, after fine-tuning by self-distillation: ranks by energy, by
  the paper's search, and uniform.
- speed: images a second, compressed against dense, of DeiT-small's and DeiT-base's architectures (random weights).
- time: seconds and peak memory of compressing DeiT-base's architecture by energy, calibrated on 256 pictures.
"""

import argparse
import copy
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from benchmarks import circumstances as shared
from benchmarks import classify
from benchmarks.compression_report import ATTENTION, PARTS, plot, tables
from comcat_diffusion.compression import SearchSettings, Settings, compress, cost, search_ranks
from comcat_diffusion.compression.compress import count
from comcat_diffusion.compression.finetune import Distillation, Finetune

METHODS = ("energy", "search", "uniform")
SHAPES = {"DeiT-base": (768, 12), "DeiT-small": (384, 6)}


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    layers: int
    train_pictures: int
    test_pictures: int
    steps: int  # of training the dense model
    batch: int
    finetune_steps: int
    search_steps: int
    calibration: int  # batches
    rounds: int
    speed_batch: int
    pictures_timed: int  # calibration pictures of the part `time`
    shapes: tuple[str, ...]  # of the part `speed`; the first one is that of `time`


FULL = Scale(12, 40_000, 7_200, 6_000, 128, 2_000, 600, 16, 7, 8, 256, tuple(SHAPES))
QUICK = Scale(2, 720, 144, 30, 48, 5, 10, 4, 2, 1, 8, ("DeiT-small",))


def main(arguments: list[str] | None = None) -> None:
    """Measure, write the JSON and the plot, print the tables."""
    parser = command_line()
    flags = parser.parse_args(arguments)
    if flags.show:
        print(tables(json.loads(flags.show.read_text())))
        return
    shared.use_threads(flags.threads)
    device, scale = torch.device(flags.device), QUICK if flags.quick else FULL
    name = f"compression-{flags.data}" + ("-quick" if flags.quick else "")
    path = flags.output or shared.results_path(name, device)
    report = measure(flags, scale, device)
    shared.write_json(path, report)
    plot(report, path.with_suffix(".png"))
    print(tables(report))
    print(f"\nWritten to {path}")


def command_line() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compression",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", choices=("scenes", "digits"), default="scenes", help="task (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device: cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as many as torch finds)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--quick", action="store_true", help="small and short: shows that it runs, not what it costs")
    parser.add_argument(
        "--dense", type=Path, help="file of the trained dense model: taken if it is there, else written"
    )
    parser.add_argument(
        "--output", type=Path, help="the JSON (default: benchmarks/results/compression-DATA-DEVICE.json)"
    )
    parser.add_argument("--show", type=Path, metavar="JSON", help="print the tables of an earlier run and stop")
    return parser


def measure(flags: argparse.Namespace, scale: Scale, device: torch.device) -> dict[str, object]:
    """Everything asked for, as the JSON holds it."""
    report = {"circumstances": shared.circumstances(device, torch.float32), "data": flags.data, "rows": []}
    if "time" in flags.parts:  # in a process of its own, before this one is large
        report["rows"].append(
            shared.in_fresh_process(time_row, scale.shapes[0], scale.pictures_timed, flags.threads, flags.device)
        )
    if {"attention", "model"} & set(flags.parts):
        data = classify.task(flags.data, scale.train_pictures, scale.test_pictures)
        dense = classify.trained(data, scale.layers, scale.steps, scale.batch, device, flags.dense)
        report["classes"], report["dense_top1"] = data.classes, classify.top1(dense, data, device)
        if "attention" in flags.parts:
            report["rows"] += attention_rows(dense, data, scale, device)
        if "model" in flags.parts:
            report["rows"] += model_rows(dense, data, scale, device)
    if "speed" in flags.parts:
        report["rows"] += speed_rows(scale, device)
    return report


def attention_rows(dense: nn.Module, data: classify.Task, scale: Scale, device: torch.device) -> list[dict]:
    """Attention only, no fine-tuning: the shape of the paper's Table 1."""
    seen, rows = classify.batches(data, scale.calibration, scale.batch, device), []
    for removed in (0.2, 0.4, 0.6, 0.8):
        for kind in ATTENTION:
            if kind == "head_pruning":
                small, gone = pruned(dense, removed)
            else:
                method = "matrix" if kind.startswith("matrix") else "energy"
                settings = Settings(method=method, parts=("attention",), counted="parts")
                small, plan = compress(dense, removed, seen if kind.endswith("whitened") else None, settings=settings)
                attention = sum(unit.dense for unit in cost.units(dense, ("attention",)))
                gone = (plan.parameters_before - plan.parameters_after) / attention
            top1 = classify.top1(small, data, device)
            rows.append(
                {"part": "attention", "removed": removed, "variant": kind, "removed_really": gone, "top1": top1}
            )
    return rows


def pruned(dense: nn.Module, removed: float) -> tuple[nn.Module, float]:
    """The model without the heads of least weight: their outputs are zero, which is what leaving them out gives."""
    small, norms = copy.deepcopy(dense), {}
    attentions = [layer.attention for layer in small.vit.layers]
    for number, attention in enumerate(attentions):
        for head in range(attention.num_attention_heads):
            rows = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
            weights = [p.weight[rows] for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
            weights.append(attention.o_proj.weight[:, rows])
            norms[number, head] = sum(w.detach().square().sum().item() for w in weights)
    gone = sorted(norms, key=norms.get)[: math.ceil(removed * len(norms))]
    with torch.no_grad():
        for number, head in gone:
            width = attentions[number].head_dim
            attentions[number].o_proj.weight[:, head * width : (head + 1) * width] = 0
            attentions[number].v_proj.bias[head * width : (head + 1) * width] = 0
    return small, len(gone) / len(norms)


def model_rows(dense: nn.Module, data: classify.Task, scale: Scale, device: torch.device) -> list[dict]:
    """The whole model, before and after fine-tuning by self-distillation."""
    seen, rows = classify.batches(data, scale.calibration, scale.batch, device), []
    for removed in (0.44, 0.61):
        for method in METHODS:
            started = time.perf_counter()
            if method == "search":
                search = SearchSettings(steps=scale.search_steps)
                plan = search_ranks(dense, seen, removed, search=search)
                small, plan = compress(dense, plan=plan, calibration=seen)
            else:
                small, plan = compress(dense, removed, seen, settings=Settings(method=method))
            seconds, before = time.perf_counter() - started, classify.top1(small, data, device)
            small = finetuned(small, dense, data, scale, device)
            row = {"part": "model", "removed": removed, "variant": method, "seconds": seconds, "top1_before": before}
            really = 1 - plan.parameters_after / plan.parameters_before
            rows.append(row | {"removed_really": really, "top1": classify.top1(small, data, device)})
            rows[-1]["widths"] = plan.widths
    return rows


def finetuned(small: nn.Module, dense: nn.Module, data: classify.Task, scale: Scale, device: torch.device) -> nn.Module:
    """The student after the fine-tuning steps: labels and the dense model's classes, half and half, as the paper."""
    steps = scale.finetune_steps
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-4, weight_decay=0.005)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-6)
    accelerator = Accelerator(cpu=device.type == "cpu")
    small, optimizer, schedule = accelerator.prepare(small, optimizer, schedule)
    batches = classify.batches(data, min(steps, 400), scale.batch, device, seed=5)
    distillation = Distillation(labels=0.5, hard=0.5)
    for _ in Finetune(small, dense, batches, distillation, optimizer, schedule, accelerator).steps(steps):
        pass
    return accelerator.unwrap_model(small)


def speed_rows(scale: Scale, device: torch.device) -> list[dict]:
    """Images a second of compressed and dense models, side by side in this process."""
    rows = []
    for shape in scale.shapes:
        dense = classify.deit(*SHAPES[shape], classes=1000, pixels=224, patch=16).to(device)
        inputs = {"pixel_values": torch.randn(scale.speed_batch, 3, 224, 224, device=device)}
        models = {"dense": dense}
        for removed in (0.50, 0.61):
            for method in ("energy", "uniform"):
                settings = Settings(method=method, multiple=8)
                models[f"{method} {removed:.0%}"] = compress(dense, removed, settings=settings)[0].eval()
        cases = {name: torch.inference_mode()(lambda m=model, i=inputs: m(**i)) for name, model in models.items()}
        work = {name: cost.multiply_adds(model, inputs) for name, model in models.items()}
        for name, timing in shared.interleaved(cases, scale.rounds, device).items():
            row = {"part": "speed", "shape": shape, "variant": name, "parameters": count(models[name])}
            more = {"multiply_adds": work[name] / scale.speed_batch, "work_ratio": work[name] / work["dense"]}
            rows.append(row | timing.row() | more | {"images_a_second": scale.speed_batch / timing.row()["seconds"]})
    return rows


def time_row(shape: str, pictures: int, threads: int | None, device: str) -> dict:
    """The closed form on a DeiT's architecture, in a process of its own for its peak memory."""
    shared.use_threads(threads)
    dense = classify.deit(*SHAPES[shape], classes=1000, pixels=224, patch=16).to(device)
    before, started = shared.peak_memory_mib(torch.device(device)), time.perf_counter()
    compress(dense, 0.5)
    plain = time.perf_counter() - started
    made = torch.Generator().manual_seed(0)
    seen = (torch.randn(8, 3, 224, 224, generator=made) for _ in range(pictures // 8))
    started = time.perf_counter()
    compress(dense, 0.5, seen)
    row = {"part": "time", "shape": shape, "pictures": pictures, "seconds": plain}
    row["seconds_calibrated"] = time.perf_counter() - started
    after = shared.peak_memory_mib(torch.device(device))
    return row | {"model_mib": 4 * count(dense) / shared.MIB, "peak_before_mib": before, "peak_mib": after}


if __name__ == "__main__":
    main()
