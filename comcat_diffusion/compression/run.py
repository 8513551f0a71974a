"""The story behind `comcat compress`: a model in; a folder with the smaller one, a report and pictures out."""

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from comcat_diffusion import atomic
from comcat_diffusion.bases import public_name
from comcat_diffusion.compression import allocate, cost
from comcat_diffusion.compression.compress import compress, refuse_other_functions, refuse_unfit, resolved
from comcat_diffusion.compression.config import BY_OUTPUT, PARAMETERS, VISION, CompressConfig
from comcat_diffusion.compression.diffusion import Diffusion
from comcat_diffusion.compression.finetune import Distillation, Step
from comcat_diffusion.compression.learning import learned, refuse_other
from comcat_diffusion.compression.plan import Plan, Settings
from comcat_diffusion.compression.planning import count, counted, parts_of, units_of
from comcat_diffusion.compression.rank_search import SearchSettings, search_ranks
from comcat_diffusion.compression.ranks import picture_of_ranks
from comcat_diffusion.compression.report import Finetuning, Quality, Report, Size, circumstances_of
from comcat_diffusion.compression.speed import rates
from comcat_diffusion.compression.store import save_compressed
from comcat_diffusion.compression.vision import Vision
from comcat_diffusion.config import to_toml
from comcat_diffusion.generation.pictures import save_png

Note = Callable[[str], None]


class Task(Protocol):
    """A model with the data that it is calibrated on, learns from and is judged by: Vision or Diffusion."""

    model: nn.Module
    others: dict[str, object]  # what `leave` writes beside it, by folder
    sample: str
    counted: str
    parts: tuple[str, ...] | None
    distillation: Distillation
    usual_rate: float
    calibration: Callable[[], tuple[Sequence | None, str]]
    search_batches: Callable[[], Sequence]
    training: Callable[[], Sequence]
    timed: Callable[[], dict[str, torch.Tensor]]
    judge: Callable[[nn.Module, Note], Quality]
    leave: Callable[[Path], None]
    usage: Callable[[str], str]


@dataclass
class _Clock:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> object:
        started = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - started


def run(config: CompressConfig, note: Note = lambda text: None) -> Report:
    """Compress a model and say what that brought; the folder of the result appears whole or not at all.

    Raises ValueError or OSError for bad input, before anything long begins wherever that can be known.
    """
    with atomic.whole_folder(config.output_dir) as folder:
        report = _run(config, folder, note)
    for stage in ("search", "finetune"):
        beside(config, stage).unlink(missing_ok=True)
    return replace(report, folder=Path(config.output_dir).expanduser())


def _run(config: CompressConfig, folder: Path, note: Note) -> Report:
    # The model and its data; that the reduction can be had is known before anything long begins.
    clock = _Clock()
    with clock("load"):
        task = Vision(config) if config.part == VISION else Diffusion(config)
    dense, name = task.model, public_name(config.model)
    settings = Settings(config.method, task.parts, task.counted, config.multiple, name, config.budget)
    settings = resolved(dense, settings, bool(getattr(task, "seen", ())))
    total = _refuse_unplanable(dense, config.reduction, settings)
    _refuse_other_state(config, task)

    # What the data use of the weights, and the ranks that follow from it.
    with clock("compress"):
        note("Gathering the calibration data.")
        seen, calibrated_on = task.calibration()
        alone = " (by the weights alone: name a --calibration_dir for better ones)" if seen is None else ""
        note(f"Choosing ranks, calibrated on {calibrated_on}{alone}.")
        small, plan = _smaller(config, task, seen, settings, note)

    # The smaller model learns from the dense one what it has lost.
    done = None
    if config.finetune_epochs:
        with clock("finetune"):
            small, done = finetuned(small, task, config, note)

    # Both side by side.
    with clock("measure"):
        note("Measuring both models.")
        measured = _measured(task, small, note)
    report = Report(
        folder=folder,
        plan=plan,
        sample=task.sample,
        counted=total,
        calibrated_on=calibrated_on,
        seconds=clock.seconds,
        finetuning=done,
        **measured,
    )
    _write(config, task, small, units_of(dense, plan), report)
    return report


def _measured(task: Task, small: nn.Module, note: Note) -> dict[str, object]:
    """What a report says of both models and of how it was found out."""
    quality, inputs = task.judge(small, note), task.timed()
    samples = len(next(iter(inputs.values())))
    timed = rates(task.model, small, inputs, samples)
    before, after = (
        Size(count(model), cost.multiply_adds(model, inputs) // samples, rate)
        for model, rate in ((task.model, timed.before), (small, timed.after))
    )
    around = circumstances_of(inputs, samples, timed.rounds)
    found = {"before": before, "after": after, "speedup": timed.speedup}
    return found | {"quality": quality, "circumstances": around}


def _refuse_unplanable(model: nn.Module, reduction: float, settings: Settings) -> int:
    """Of how many parameters the reduction is a fraction.

    Raises ValueError if the model is unfit or the reduction cannot be reached.
    """
    refuse_unfit(model)
    parts = parts_of(model, settings)
    if settings.method == BY_OUTPUT:
        units = [unit for site in cost.sites(model, parts) for unit in site[0]]
    else:
        units = cost.units(model, parts, settings.method == "matrix")
    total = counted(model, units, settings)
    if settings.budget == PARAMETERS:
        allocate.budget_of(units, reduction, total, settings.multiple)
    refuse_other_functions(model, units)
    return total


def _refuse_other_state(config: CompressConfig, task: Task) -> None:
    """Raises ValueError if a fine-tuning was cut, but not one of these steps, this rate and seed."""
    state = beside(config, "finetune")
    if config.finetune_epochs and state.exists():  # a U-Net's steps are those of its drawings, not made yet
        refuse_other(state, rate_of(config, task), config.seed, len(task.training()) or None)


def _smaller(
    config: CompressConfig, task: Task, seen: Sequence | None, settings: Settings, note: Note
) -> tuple[nn.Module, Plan]:
    if config.method != "search":
        return compress(task.model, config.reduction, seen, settings=settings)
    state = beside(config, "search")
    if state.exists():
        note(f"Going on with the search that was cut ({state}).")
    state.parent.mkdir(parents=True, exist_ok=True)
    search = SearchSettings(steps=config.search_steps, seed=config.seed, state_path=str(state))
    plan = search_ranks(task.model, task.search_batches(), config.reduction, settings, search)
    return compress(task.model, calibration=seen, plan=plan)


def beside(config: CompressConfig, stage: str) -> Path:
    """Where a stage keeps what it needs to go on: beside the folder to be, named by the settings it belongs to."""
    folder, settings = Path(config.output_dir).expanduser().absolute(), replace(config, output_dir="")
    mark = hashlib.sha256(to_toml(settings).encode()).hexdigest()[:8]
    return folder.with_name(f".{folder.name}.{stage}-{mark}.safetensors")


def rate_of(config: CompressConfig, task: Task) -> float:
    """Learning rate of the fine-tuning."""
    return config.learning_rate or task.usual_rate


def finetuned(small: nn.Module, task: Task, config: CompressConfig, note: Note) -> tuple[nn.Module, Finetuning]:
    """The smaller model after the passes asked for; a fine-tuning that was cut goes on, and one that harms is told.

    Raises ValueError at a loss or gradient that is no number.
    """
    batches, state = task.training(), beside(config, "finetune")
    if state.exists():
        note(f"Going on with the fine-tuning that was cut ({state}).")
    state.parent.mkdir(parents=True, exist_ok=True)
    each, losses = len(batches) // config.finetune_epochs, []

    def told(step: Step) -> None:
        losses.append(step.loss)
        if step.step % each == 0:
            mean = sum(losses[-each:]) / len(losses[-each:])
            note(f"Fine-tuning: pass {step.step // each} of {config.finetune_epochs}, mean loss {mean:.4g}.")

    rate, seed = rate_of(config, task), config.seed
    small, every = learned(small, task.model, batches, task.distillation, rate, seed, state, told)
    later = every[len(every) // 2 :]
    if (mean := sum(later) / len(later)) > every[0]:
        note(
            f"The fine-tuning has made the model worse: its loss was {every[0]:.4g} and is {mean:.4g}. Do it again "
            f"with a --learning_rate far below {rate:g}, or with --finetune_epochs 0."
        )
    return small, Finetuning(len(every), every[0], every[-1])


def _write(config: CompressConfig, task: Task, small: nn.Module, units: list[cost.Unit], report: Report) -> None:
    """The model first, then what is said of it."""
    folder, plan = report.folder, report.plan
    needed = atomic.bytes_of([small, *task.others.values()])
    with atomic.writing(Path(config.output_dir).expanduser(), needed, folder):
        save_compressed(small, plan, folder)
        task.leave(folder)
        _tell(config, task, units, report)


def _tell(config: CompressConfig, task: Task, units: list[cost.Unit], report: Report) -> None:
    """What is said of the model, for people and for programs."""
    folder, plan = report.folder, report.plan
    whose = "the" if task.counted == "model" else "the attentions'"
    title = f"{plan.model_id}: {report.removed:.1%} of {whose} parameters removed, method {plan.method}"
    about = {"model": plan.model_id, "reduction": plan.reduction, "method": plan.method}
    save_png(picture_of_ranks(units, plan.widths, title), folder / "ranks.png", about)
    shown = {"Ranks kept": "ranks.png"}
    if (folder / "sheet.png").exists():
        shown["Before and after"] = "sheet.png"
    usage = task.usage(Path(config.output_dir).name)
    atomic.write_bytes(folder / "run.toml", to_toml(config).encode())
    atomic.write_bytes(folder / "report.json", report.to_json().encode())
    atomic.write_bytes(folder / "report.md", report.page(usage, shown).encode())
