"""Compression by what the output loses: choices measured, one Lagrangian allocation, and a fit block by block."""

from collections.abc import Sequence

from torch import nn

from comcat_diffusion.compression import budgets, chain, choices, cost, hosts, losses
from comcat_diffusion.compression.calibrate import Batch
from comcat_diffusion.compression.chain import Call
from comcat_diffusion.compression.cost import Unit
from comcat_diffusion.compression.plan import Plan, Settings, refuse_other_model
from comcat_diffusion.compression.planning import plan_of, units_of
from comcat_diffusion.compression.sequential import fitted

GROUPS = 4  # of similar pictures; each is left out once to choose a ridge, and the last when losses are measured
FEWEST = 8  # pictures: with fewer, no group says anything of the others


def fits(model: nn.Module, settings: Settings) -> bool:
    """Whether a model can be compressed like this: its layers lie in one list of blocks."""
    if hosts.is_diffusers(model) or "classifier" in (settings.parts or ()):
        return False
    try:
        return chain.blocks_of(model, every_unit(cost.sites(model, settings.parts or cost.BLOCK_PARTS))) is not None
    except ValueError:  # there is nothing to compress; whoever compresses says so
        return False


def every_unit(sites: Sequence[Sequence[Sequence[Unit]]]) -> list[Unit]:
    """Of all alternatives."""
    return [unit for site in sites for units in site for unit in units]


def compressed(
    model: nn.Module, reduction: float | None, batches: Sequence[Batch], plan: Plan | None, settings: Settings
) -> tuple[nn.Module, Plan]:
    """A smaller copy of the model and its plan, as `compress` gives them.

    Raises ValueError if the model is no chain of blocks, if the pictures are too few, or the budget cannot be reached.
    """
    parts = plan.parts if plan else settings.parts or cost.BLOCK_PARTS
    sites = cost.sites(model, parts)
    found = chain.blocks_of(model, every_unit(sites))
    if found is None:
        raise ValueError(
            f"The layers of this {type(model).__name__} do not lie in one list of blocks, so what its output loses is "
            "not measured block by block: choose the method energy."
        )
    if plan is not None:
        refuse_other_model(plan, model, units_of(model, plan))
    budget = None if plan else budgets.of(model, sites, reduction, settings, batches)
    training = model.training
    model.eval()
    try:
        calls = chain.recorded(model, found[1], batches)
        _refuse_few(calls)
        groups = losses.groups_of(calls, GROUPS)
        if plan is None:
            curves = losses.curves(model, found[1], every_unit(sites), calls, groups)
            options = [choices.choices_of(site, curves, budget.cost, settings.multiple) for site in sites]
            widths = choices.chosen(options, budget.amount)
            units = cost.named(model, parts, widths)
            plan = plan_of(model, units, widths, reduction, settings)
        small = fitted(model, found[1], units_of(model, plan), plan.widths, calls, groups)
    finally:
        model.train(training)
    return small.train(training), plan


def _refuse_few(calls: Sequence[Call]) -> None:
    seen = sum(len(call.hidden) for call in calls)
    if seen < FEWEST:
        raise ValueError(
            f"{seen} calibration pictures are too few for a least-squares solution that others can check: give at "
            f"least {FEWEST}, better hundreds, or choose the method energy."
        )
