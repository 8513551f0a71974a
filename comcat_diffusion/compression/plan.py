"""A plan: which width every product and layer of one model gets, and the JSON that carries it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields

import torch
from torch import nn

from comcat_diffusion.compression.config import BUDGETS, BY_OUTPUT, METHODS, PARAMETERS
from comcat_diffusion.compression.cost import PARTS, Unit
from comcat_diffusion.versions import versions_with

FORMAT_VERSION = 2  # 1 knew neither the method "output" nor neurons; it is read for ever
READABLE = (1, 2)
COUNTED = ("model", "parts")
SAMPLES = 64  # weights kept to recognise a model by


@dataclass(frozen=True)
class Settings:
    """How a model is compressed."""

    # How widths are chosen; "matrix" takes every matrix by itself, without heads. None: by the output where there are
    # calibration batches and the model is a chain of blocks, else by energy.
    method: str | None = None
    parts: tuple[str, ...] | None = None  # of PARTS; None: all, of a diffusers model the attention
    counted: str = "model"  # whether the reduction is a fraction of the whole model or of the chosen parts
    multiple: int = 1  # widths are multiples of this; 8 suits the kernels of a GPU
    model_id: str = ""  # hub id or folder of the dense model, for the plan to name
    budget: str = PARAMETERS  # what the reduction is a fraction of; the others are for the method "output"

    def __post_init__(self) -> None:
        known_values = (("method", METHODS), ("counted", COUNTED), ("budget", BUDGETS))
        for name, value, known in ((name, getattr(self, name), known) for name, known in known_values):
            if value not in known and (name, value) != ("method", None):
                raise ValueError(f"The {name} of a compression is one of {', '.join(known)}, not {value!r}.")
        if self.budget != PARAMETERS and self.method not in (None, BY_OUTPUT):
            raise ValueError(
                f"A budget of {self.budget} is for the method {BY_OUTPUT}; {self.method} counts parameters."
            )
        if not isinstance(self.multiple, int) or self.multiple < 1:
            raise ValueError(f"Widths must be multiples of a whole number from 1 up, not of {self.multiple!r}.")
        if self.parts is not None and (not self.parts or set(self.parts) - set(PARTS)):
            raise ValueError(f"The parts to compress are some of {', '.join(PARTS)}, not {self.parts!r}.")


@dataclass(frozen=True)
class Plan:
    """The widths by unit, and which model they are for. A width of None keeps the unit dense."""

    widths: dict[str, int | None]
    model_class: str
    layout: str  # hash over names and shapes of the units
    sketch: list[float]  # a few of the dense weights
    method: str
    parts: tuple[str, ...]
    reduction: float  # as asked for
    parameters_before: int  # of the whole model
    parameters_after: int
    budget: str = PARAMETERS
    model_id: str = ""
    skipped: dict[str, str] = field(default_factory=dict)  # attentions that stay, with the reason
    versions: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def per_matrix(self) -> bool:
        """Whether the units are single matrices rather than products of heads."""
        return self.method == "matrix"

    def to_json(self) -> str:
        """As text; the inverse of `from_json`."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Raises ValueError if the text is no plan that this version knows."""
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"This is not a plan but broken JSON ({error}).") from error
        known = {f.name for f in fields(cls)}
        if not isinstance(content, dict) or content.get("format_version") not in READABLE:
            found = content.get("format_version") if isinstance(content, dict) else None
            raise ValueError(f"This plan has format version {found!r}, this program reads 1 and 2.")
        if content["format_version"] == 1:
            content = {"budget": PARAMETERS} | content
        for problem, names in (("unknown", content.keys() - known), ("missing", known - content.keys())):
            if names:
                raise ValueError(f"This plan has {problem} entries: {', '.join(sorted(names)[:3])}.")
        widths = content["widths"]
        if not isinstance(widths, dict) or not all(w is None or type(w) is int for w in widths.values()):
            raise ValueError("The widths of this plan are not a table of whole numbers.")
        return cls(**{**content, "parts": tuple(content["parts"])})


def layout_of(units: Sequence[Unit]) -> str:
    """What two models must share for a plan to fit both."""
    rows = [[u.name, u.product, u.heads, u.full, u.per_width, u.dense] for u in units]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def sketch_of(model: nn.Module, units: Sequence[Unit]) -> list[float]:
    """A few weights of the units' modules, spread over the model."""
    weights = [p for u in units for p in model.get_submodule(u.module).parameters() if p.ndim > 1]
    picked = []
    for index in range(SAMPLES):
        weight = weights[index * len(weights) // SAMPLES].detach().reshape(-1)
        picked.append(float(weight[index * 7919 % weight.numel()]))
    return [float(f"{value:.4g}") for value in picked]


def library_versions() -> dict[str, str]:
    """Of the libraries that a compressed model depends on."""
    return versions_with("diffusers", "torch", "transformers")


def refuse_other_model(plan: Plan, model: nn.Module, units: Sequence[Unit]) -> None:
    """Raises ValueError if the plan is for a model of another layout, or asks for widths that a unit does not have."""
    here, planned = {unit.name for unit in units}, set(plan.widths)
    if plan.model_class != type(model).__name__ or here != planned or layout_of(units) != plan.layout:
        strange = sorted(here ^ planned)
        reason = f"; for instance {strange[0]} is in only one of them" if strange else ""
        raise ValueError(
            f"This plan is for a {plan.model_class} of another layout than this {type(model).__name__}{reason}."
        )
    for unit in units:
        width = plan.widths[unit.name]
        if width is not None and not unit.key_bias < width <= unit.full:
            raise ValueError(
                f"The plan gives {unit.name} the width {width}; it can have {1 + unit.key_bias} to {unit.full}."
            )


def refuse_bad_weights(model: nn.Module) -> None:
    """Raises ValueError naming the first layer with NaN or infinity."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise ValueError(
                f"'{name}' holds NaN or infinity; compression would spread it. Get another copy of the model."
            )
