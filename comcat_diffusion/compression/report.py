"""What a compression has brought: numbers with their circumstances, as JSON, as a table and as a page of markdown."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from comcat_diffusion import timing
from comcat_diffusion.compression.plan import Plan
from comcat_diffusion.markdown import table, text


@dataclass(frozen=True)
class Quality:
    """How good both models are; what was not measured is None."""

    top1_before: float | None = None  # percent
    top1_after: float | None = None
    cosine_first: float | None = None  # of an extractor's first token (the class token) to the dense model's
    cosine_rest: float | None = None  # of its other tokens (the patches)
    drift: float | None = None  # of a U-Net's output, relative to its norm
    judged_on: str | None = None


@dataclass(frozen=True)
class Size:
    """What a model is and does."""

    parameters: int
    multiply_adds: int  # of one sample: a picture, or a latent through a U-Net
    samples_a_second: float


@dataclass(frozen=True)
class Finetuning:
    """What the fine-tuning did."""

    steps: int
    first_loss: float
    last_loss: float


@dataclass(frozen=True)
class Report:
    """Everything that a run says of its result."""

    folder: Path
    plan: Plan
    sample: str  # what is counted a second: "picture" or "latent"
    counted: int  # parameters that the reduction is a fraction of
    calibrated_on: str
    before: Size
    after: Size
    speedup: float  # median over rounds in which both were timed
    quality: Quality
    seconds: Mapping[str, float]  # by stage
    finetuning: Finetuning | None = None
    circumstances: Mapping[str, object] = field(default_factory=dict)

    @property
    def removed(self) -> float:
        """Fraction of the counted parameters that are gone."""
        return (self.before.parameters - self.after.parameters) / self.counted

    def to_json(self) -> str:
        """As text, the plan's ranks included; the folder is where the text will be."""
        content = {name: value for name, value in asdict(self).items() if name not in ("folder", "plan")}
        about = {"model": self.plan.model_id, "model_class": self.plan.model_class, "method": self.plan.method}
        wanted = {"reduction": self.plan.reduction, "budget": self.plan.budget, "removed": self.removed}
        more = {"widths": self.plan.widths, "skipped": self.plan.skipped, "versions": self.plan.versions}
        return json.dumps(about | wanted | content | more, indent=1) + "\n"

    def table(self) -> str:
        """Before and after, as markdown that reads well as plain text."""
        before, after, quality = self.before, self.after, self.quality
        rows = [
            ("", "before", "after", "change"),
            ("parameters", *_counts(before.parameters, after.parameters)),
            (f"multiply-adds a {self.sample}", *_counts(before.multiply_adds, after.multiply_adds)),
            (
                f"{self.sample}s a second",
                *(f"{rate:,.2f}" for rate in (before.samples_a_second, after.samples_a_second)),
                f"{self.speedup:.2f}x",
            ),
        ]
        if quality.top1_before is not None:
            lost = quality.top1_after - quality.top1_before
            rows.append(("top-1, %", f"{quality.top1_before:.2f}", f"{quality.top1_after:.2f}", f"{lost:+.2f}"))
        for what, cosine in (("first token", quality.cosine_first), ("other tokens", quality.cosine_rest)):
            if cosine is not None:
                rows.append((f"cosine of the features, {what}", "1", f"{cosine:.4f}", f"{cosine - 1:+.4f}"))
        if quality.drift is not None:
            rows.append(("drift of the U-Net's output", "0 %", f"{quality.drift:.2%}", ""))
        return table(rows)

    def page(self, usage: str, pictures: Mapping[str, str]) -> str:
        """The whole report as markdown; `usage` is Python, `pictures` are files by caption."""
        facts = [
            f"Widths: method {self.plan.method}, calibrated on {self.calibrated_on}. Asked for a reduction of "
            f"{self.plan.reduction} of the {self.plan.budget}; {self.removed:.2%} of {self.counted:,} parameters went.",
            *([f"Quality was measured on {self.quality.judged_on}."] if self.quality.judged_on else []),
            *([_told(self.finetuning)] if self.finetuning else []),
            "Seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items()) + ".",
            text("Circumstances: " + ", ".join(f"{name} {value}" for name, value in self.circumstances.items()) + "."),
            *(text(f"Left as it is: {name} ({reason}).") for name, reason in self.plan.skipped.items()),
        ]
        shown = [f"![{caption}]({file})" for caption, file in pictures.items()]
        code = f"```python\n{usage}\n```"
        return "\n\n".join([f"# {text(self.plan.model_id)}, compressed", self.table(), *facts, code, *shown]) + "\n"


def circumstances_of(inputs: Mapping[str, torch.Tensor], batch: int, rounds: int) -> dict[str, object]:
    """What a speed depends on, beside the libraries' versions, which a plan has."""
    tensor = next(iter(inputs.values()))
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {
        "device": f"{tensor.device.type} ({timing.device_name(tensor.device)})", "precision": dtype, "batch": batch,
        "rounds": rounds, "threads": torch.get_num_threads(),
    }  # fmt: skip


def _counts(before: int, after: int) -> tuple[str, str, str]:
    return f"{before:,}", f"{after:,}", f"{after / before - 1:+.1%}"


def _told(done: Finetuning) -> str:
    losses = f"{done.first_loss:.4g} to {done.last_loss:.4g}"
    return f"Fine-tuned for {done.steps:,} steps; the loss of a step went from {losses}."
