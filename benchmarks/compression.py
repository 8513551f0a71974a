"""What compression costs in accuracy and brings in speed, on a ViT of DeiT-tiny's shape that is trained here.

    python -m benchmarks.compression                  # an hour or more of training on a CPU, minutes on a GPU
    python -m benchmarks.compression --quick          # a few steps on a shallow model: shows that it runs
    python -m benchmarks.compression --data digits --parts attention model    # scikit-learn's handwritten digits
    python -m benchmarks.compression --data dinov2    # a real model on photographs: benchmarks/features.py
    python -m benchmarks.compression --parts speed search time                # what needs no trained model
    python -m benchmarks.compression --show F G       # the tables of earlier runs

Five parts:

- attention: top-1 without fine-tuning with 20/40/60/80 % of the attentions' parameters removed (the paper's Table 1):
  head by head, matrix by matrix, both also whitened, and whole heads pruned by magnitude.
- model: top-1 with 44 % and 61 % of all parameters removed, after fine-tuning by self-distillation: ranks by energy, by
  the paper's search, and uniform.
- speed: images a second, compressed against dense, of DeiT-small's and DeiT-base's architectures (random weights).
- search: seconds of a step of the rank search against those of a step that trains the dense model.
- time: seconds and peak memory of compressing the same by energy, calibrated on 256 pictures.
"""

import argparse
import copy
import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from benchmarks import circumstances as shared
from benchmarks import classify, features
from benchmarks.compression_report import ATTENTION, PARTS, plot, tables
from comcat_diffusion.compression import SearchSettings, Settings, allocate, compress, cost, search_ranks
from comcat_diffusion.compression.finetune import Distillation, Finetune
from comcat_diffusion.compression.planning import count, plan_of
from comcat_diffusion.compression.rank_search import RankSearch

METHODS = ("energy", "search", "uniform")
REMOVED = (0.2, 0.4, 0.6, 0.8)  # shares of the attentions' parameters
AT_ONCE = 4  # pictures of a calibration batch in the part time
FINETUNE_RATE = 3e-4  # peak; three times the default, for the few steps that there is time for
SHAPES = {"DeiT-small": (384, 6), "DeiT-base": (768, 12)}


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    course: classify.Course  # of the dense model
    train_pictures: int
    test_pictures: int
    finetune_steps: int
    search_steps: int
    calibration: int  # batches
    rounds: int
    speed_batch: int
    pictures_timed: int  # calibration pictures of the part `time`
    shapes: tuple[str, ...]  # of the parts `speed`, `search` and `time`


QUICK = Scale(classify.Course(layers=2, steps=30), 720, 144, 5, 10, 4, 2, 1, 8, ("DeiT-small",))


def full(data: str) -> Scale:
    """What the results in benchmarks/results were made with."""
    finetune, search = {"scenes": (300, 200), "digits": (100, 100)}[data]
    return Scale(classify.COURSES[data], 40_000, 3_600, finetune, search, 16, 7, 8, 256, tuple(SHAPES))


def main(arguments: list[str] | None = None) -> None:
    """Measure, write the JSON and the plot, print the tables."""
    flags = command_line().parse_args(arguments)
    if flags.show:
        print("\n\n".join(tables(json.loads(path.read_text())) for path in flags.show))
        return
    if flags.data == "dinov2":
        features.main(of_features(flags))
        return
    shared.use_threads(flags.threads)
    device, scale = torch.device(flags.device), QUICK if flags.quick else full(flags.data)
    scale = replace(scale, shapes=flags.shapes or scale.shapes, rounds=flags.rounds or scale.rounds)
    about = flags.data if {"attention", "model"} & set(flags.parts) else "cost"
    name = f"compression-{about}" + ("-quick" if flags.quick else "")
    path = flags.output or shared.results_path(name, device)
    report = {"circumstances": shared.circumstances(device, torch.float32), "rows": []}
    for row in measured(flags, scale, device, report):
        report["rows"].append(row)
        shared.write_json(path, report)  # what is measured stays, whatever happens to the rest
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
    parser.add_argument("--data", choices=(*classify.COURSES, "dinov2"), default="scenes", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="torch device: cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as many as torch finds)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), help="of speed, search and time (default: all)")
    parser.add_argument("--removed", nargs="+", type=float, default=REMOVED, help="shares, of the part attention")
    parser.add_argument("--rounds", type=int, help="of speed and search (default: seven)")
    parser.add_argument("--quick", action="store_true", help="small and short: shows that it runs, not what it costs")
    parser.add_argument("--dense", type=Path, help="the trained dense model; written if it is not there")
    parser.add_argument("--output", type=Path, help="the JSON (default: one in benchmarks/results)")
    parser.add_argument("--show", type=Path, nargs="+", metavar="JSON", help="print the tables of earlier runs")
    return parser


def of_features(flags: argparse.Namespace) -> list[str]:
    """The same wishes for benchmarks/features.py, which judges a model without classes."""
    parts = [part for part in ("attention", "model") if part in flags.parts]
    more = {"--device": flags.device, "--threads": flags.threads, "--output": flags.output}
    given = [str(word) for flag, value in more.items() if value is not None for word in (flag, value)]
    return ["--parts", *parts, *given]


def measured(flags: argparse.Namespace, scale: Scale, device: torch.device, report: dict) -> Iterator[dict]:
    """Every row asked for; what is said of the dense model goes into the report."""
    for shape in scale.shapes if "time" in flags.parts else ():  # in processes of their own, for the peak of memory
        yield shared.in_fresh_process(time_row, shape, scale.pictures_timed, flags.threads, flags.device)
    if "speed" in flags.parts:
        yield from speed_rows(scale, device)
    if "search" in flags.parts:
        yield from search_rows(scale, device)
    if {"attention", "model"} & set(flags.parts):
        data = classify.task(flags.data, scale.train_pictures, scale.test_pictures)
        state = flags.dense or shared.ROOT / "runs" / "vit" / f"{flags.data}{'-quick' * flags.quick}.safetensors"
        dense, training = classify.trained(data, scale.course, device, state)
        report |= {"data": flags.data, "classes": data.classes, "training": training}
        report |= {"test_pictures": len(data.test), "dense_top1": classify.top1(dense, data, device)}
        if "attention" in flags.parts:
            yield from attention_rows(dense, data, scale, device, flags.removed)
        if "model" in flags.parts:
            yield from model_rows(dense, data, scale, device)


def attention_rows(
    dense: nn.Module, data: classify.Task, scale: Scale, device: torch.device, shares: Iterable[float]
) -> Iterator[dict]:
    """Attention only, no fine-tuning: the shape of the paper's Table 1."""
    seen = classify.Batches(data, scale.calibration, scale.course.batch, device)
    for removed in shares:
        for kind in ATTENTION:
            if kind == "head_pruning":
                small, gone = pruned(dense, removed)
            else:
                method = "matrix" if kind.startswith("matrix") else "energy"
                settings = Settings(method=method, parts=("attention",), counted="parts")
                small, plan = compress(dense, removed, seen if kind.endswith("whitened") else None, settings=settings)
                attention = sum(unit.dense for unit in cost.units(dense, ("attention",)))
                gone = (plan.parameters_before - plan.parameters_after) / attention
            row = {"part": "attention", "removed": removed, "variant": kind, "removed_really": gone}
            yield row | {"top1": classify.top1(small, data, device)}


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


def model_rows(dense: nn.Module, data: classify.Task, scale: Scale, device: torch.device) -> Iterator[dict]:
    """The whole model, before and after fine-tuning by self-distillation; the dense one trained on as a control."""
    top1 = finetuned(copy.deepcopy(dense), dense, data, scale, device)
    yield {"part": "model", "removed": 0.0, "variant": "dense", "removed_really": 0.0, "seconds": 0.0} | top1
    seen = classify.Batches(data, scale.calibration, scale.course.batch, device)
    for removed in (0.44, 0.61):
        for method in METHODS:
            started = time.perf_counter()
            if method == "search":
                search = SearchSettings(steps=scale.search_steps)
                plan = search_ranks(dense, seen, removed, search=search)
                small, plan = compress(dense, plan=plan, calibration=seen)
            else:
                small, plan = compress(dense, removed, seen, settings=Settings(method=method))
            row = {"part": "model", "removed": removed, "variant": method, "seconds": time.perf_counter() - started}
            row["removed_really"] = 1 - plan.parameters_after / plan.parameters_before
            yield row | finetuned(small, dense, data, scale, device) | {"widths": plan.widths}


def finetuned(
    small: nn.Module, dense: nn.Module, data: classify.Task, scale: Scale, device: torch.device
) -> dict[str, float]:
    """Top-1 before and after the fine-tuning: labels and the dense model's classes, half and half, as the paper."""
    before, steps = classify.top1(small, data, device), scale.finetune_steps
    optimizer = torch.optim.AdamW(small.parameters(), lr=FINETUNE_RATE, weight_decay=0.005)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-6)
    accelerator = Accelerator(cpu=device.type == "cpu")
    small, optimizer, schedule = accelerator.prepare(small, optimizer, schedule)
    batches = classify.Batches(data, steps, scale.course.batch, device, seed=5)
    distillation = Distillation(labels=0.5, hard=0.5)
    started = time.perf_counter()
    for _ in Finetune(small, dense, batches, distillation, optimizer, schedule, accelerator).steps(steps):
        pass
    seconds, after = time.perf_counter() - started, classify.top1(accelerator.unwrap_model(small), data, device)
    return {"top1_before": before, "top1": after, "finetune_steps": steps, "finetune_seconds": seconds}


def speed_rows(scale: Scale, device: torch.device) -> Iterator[dict]:
    """Images a second of compressed and dense models, side by side in this process."""
    for shape in scale.shapes:
        dense = classify.deit(*SHAPES[shape], classes=1000, pixels=224, patch=16).to(device)
        inputs = {"pixel_values": torch.randn(scale.speed_batch, 3, 224, 224, device=device)}
        models = {"dense": dense}
        for removed in (0.44, 0.61):
            settings = Settings(method="energy", multiple=8)
            models[f"energy {removed:.0%}"] = compress(dense, removed, settings=settings)[0].eval()
            models[f"narrower {removed:.0%}"] = narrower(dense, removed).eval()
        cases = {name: torch.inference_mode()(lambda m=model, i=inputs: m(**i)) for name, model in models.items()}
        work = {name: cost.multiply_adds(model, inputs) for name, model in models.items()}
        for name, timing in shared.interleaved(cases, scale.rounds).items():
            row = {"part": "speed", "shape": shape, "variant": name, "parameters": count(models[name])}
            more = {"multiply_adds": work[name] / scale.speed_batch, "work_ratio": work[name] / work["dense"]}
            more |= {"images_a_second": scale.speed_batch / timing.row()["seconds"], "profile": profiled(cases[name])}
            yield row | timing.row() | more


def narrower(dense: nn.Module, removed: float) -> nn.Module:
    """Heads and MLPs narrower by one fraction, plain Linears all: the shape of what `output` makes."""
    units = [unit for site in cost.sites(dense) for unit in site[0] if unit.part in cost.BLOCK_PARTS]
    widths = allocate.uniform(units, allocate.budget_of(units, removed, count(dense), 8), 8)
    settings = Settings(method="output", parts=cost.BLOCK_PARTS, multiple=8)
    return compress(dense, plan=plan_of(dense, units, widths, removed, settings))[0]


def profiled(case: Callable[[], object]) -> dict[str, float]:
    """Parts of the time: matrix products of the Linears, attention, everything else (norms, GELU, sums, copies)."""
    with torch.profiler.profile() as profile:
        case()
    seconds = {"linear": 0.0, "attention": 0.0, "other": 0.0}
    for event in profile.key_averages():
        kinds = {"linear": ("addmm", "::mm", "::linear"), "attention": ("attention", "bmm", "softmax")}
        kind = next((k for k, words in kinds.items() if any(word in event.key for word in words)), "other")
        seconds[kind] += event.self_cpu_time_total + event.self_device_time_total
    return {kind: part / sum(seconds.values()) for kind, part in seconds.items()}


def search_rows(scale: Scale, device: torch.device) -> Iterator[dict]:
    """Seconds of a search step and of a step that trains the dense model; without labels the dense one is asked."""
    for shape in scale.shapes:
        dense = classify.deit(*SHAPES[shape], classes=1000, pixels=224, patch=16).to(device)
        batch = {"pixel_values": torch.randn(scale.speed_batch, 3, 224, 224, device=device)}
        batch["labels"] = torch.zeros(scale.speed_batch, dtype=torch.long, device=device)
        units, search = cost.units(dense), SearchSettings(steps=1_000)
        running = RankSearch(dense, units, {}, count(dense) // 2, search, 1)
        optimizer, accelerator = torch.optim.AdamW(dense.parameters()), Accelerator(cpu=device.type == "cpu")

        def trains(model: nn.Module = dense, optimizer: torch.optim.Optimizer = optimizer, batch: dict = batch) -> None:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        def steps(distillation: Distillation, running=running, batch=batch, accelerator=accelerator) -> None:
            next(running.steps([batch], 1, accelerator, distillation))

        cases = {"dense step": trains}
        cases["search step, by labels"] = functools.partial(steps, Distillation(labels=1.0, hard=0.0))
        cases["search step, by the dense model's classes"] = functools.partial(steps, Distillation())
        for name, timing in shared.interleaved(cases, scale.rounds).items():
            yield {"part": "search", "shape": shape, "variant": name, "batch": scale.speed_batch} | timing.row()


def time_row(shape: str, pictures: int, threads: int | None, device: str) -> dict:
    """The closed form on a DeiT's architecture, in a process of its own for its peak memory."""
    shared.use_threads(threads)
    dense = classify.deit(*SHAPES[shape], classes=1000, pixels=224, patch=16).to(device)
    made = torch.Generator().manual_seed(0)
    with torch.inference_mode():  # a first pass, after which the libraries hold their buffers
        dense(torch.randn(1, 3, 224, 224, generator=made).to(device))
    bare = shared.memory_mib(torch.device(device))  # interpreter, libraries and the dense model
    seen = (torch.randn(AT_ONCE, 3, 224, 224, generator=made) for _ in range(pictures // AT_ONCE))
    started = time.perf_counter()
    compress(dense, 0.5, seen)
    row = {"part": "time", "shape": shape, "pictures": pictures, "seconds_calibrated": time.perf_counter() - started}
    more = shared.peak_memory_mib(torch.device(device)) - bare
    row |= {"model_mib": 4 * count(dense) / shared.MIB, "bare_mib": bare, "more_mib": more}
    started = time.perf_counter()
    compress(dense, 0.5)
    row["seconds"], started = time.perf_counter() - started, time.perf_counter()
    with torch.inference_mode():
        for _ in range(8):
            dense(torch.randn(AT_ONCE, 3, 224, 224, generator=made).to(device))
    return row | {"seconds_of_passes": (time.perf_counter() - started) / (8 * AT_ONCE) * pictures}


if __name__ == "__main__":
    main()
