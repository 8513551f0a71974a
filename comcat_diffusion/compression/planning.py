"""What a plan is made of: the parts and units that are meant, how many parameters count, and the plan itself."""

from collections.abc import Sequence

from torch import nn

from comcat_diffusion.compression import cost, hosts
from comcat_diffusion.compression.config import BY_OUTPUT
from comcat_diffusion.compression.cost import Unit
from comcat_diffusion.compression.plan import Plan, Settings, layout_of, library_versions, sketch_of


def parts_of(model: nn.Module, settings: Settings) -> tuple[str, ...]:
    """The parts that the settings choose, or the default for this kind of model and method."""
    by_default = cost.BLOCK_PARTS if settings.method == BY_OUTPUT else cost.PARTS
    return settings.parts or (("attention",) if hosts.is_diffusers(model) else by_default)


def units_of(model: nn.Module, plan: Plan) -> list[Unit]:
    """The units that a plan speaks of, as this model has them."""
    if plan.method == BY_OUTPUT:
        return cost.named(model, plan.parts, plan.widths)
    return cost.units(model, plan.parts, plan.per_matrix)


def counted(model: nn.Module, units: Sequence[Unit], settings: Settings) -> int:
    """Of how many parameters the reduction is a fraction."""
    return sum(u.dense for u in units) if settings.counted == "parts" else count(model)


def count(model: nn.Module) -> int:
    """Parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def plan_of(model: nn.Module, units: Sequence[Unit], widths: cost.Widths, reduction: float, settings: Settings) -> Plan:
    """The widths with everything that a plan says of its model."""
    before, parts = count(model), parts_of(model, settings)
    return Plan(
        widths=dict(widths),
        model_class=type(model).__name__,
        layout=layout_of(units),
        sketch=sketch_of(model, units),
        method=settings.method,
        parts=tuple(parts),
        reduction=reduction,
        parameters_before=before,
        parameters_after=before - sum(u.dense for u in units) + cost.parameters(units, widths),
        budget=settings.budget,
        model_id=settings.model_id,
        skipped=cost.skipped(model, parts),
        versions=library_versions(),
    )
