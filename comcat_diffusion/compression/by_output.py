"""Compression by what the output loses: choices measured, one Lagrangian allocation, and a fit block by block."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from comcat_diffusion.compression import budgets, chain, choices, cost, hosts, importance, losses
from comcat_diffusion.compression.calibrate import Batch
from comcat_diffusion.compression.chain import Call
from comcat_diffusion.compression.config import BY_OUTPUT
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
    if plan is not None:
        refuse_other_model(plan, model, units_of(model, plan))
        return Measured(model, batches, plan.parts).fitted(plan), plan
    parts = settings.parts or cost.BLOCK_PARTS
    budgets.refuse_unreachable(model, cost.sites(model, parts), reduction, settings)
    measured = Measured(model, batches, parts)
    plan = measured.plan(reduction, settings)
    return measured.fitted(plan), plan


class Measured:
    """A model with its calibration pictures: what has been measured once serves every budget.

    Raises ValueError if the model is no chain of blocks or the pictures are too few.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], parts: Sequence[str] = cost.BLOCK_PARTS) -> None:
        self.model, self.parts = model, tuple(parts)
        self.units = every_unit(cost.sites(model, parts))
        found = chain.blocks_of(model, self.units)
        if found is None:
            raise ValueError(
                f"The layers of this {type(model).__name__} do not lie in one list of blocks, so what its output loses "
                "is not measured block by block: choose the method energy."
            )
        self.blocks = found[1]
        with evaluating(model):
            self.calls = chain.recorded(model, self.blocks, batches)
            _refuse_few(self.calls)
            self.groups = losses.groups_of(self.calls, GROUPS)
            self.weights = importance.measured(model, self.blocks, self.calls)

    @functools.cached_property
    def curves(self) -> dict[str, torch.Tensor]:
        """What the output loses by unit and width."""
        with evaluating(self.model):
            return losses.curves(self.model, self.blocks, self.units, self.calls, self.groups)

    def plan(self, reduction: float, settings: Settings) -> Plan:
        """The choices that lose least. `settings` may name fewer parts than were measured."""
        parts = settings.parts or self.parts
        sites = cost.sites(self.model, parts)
        with evaluating(self.model):
            budget = budgets.of(self.model, self.blocks, sites, reduction, settings, self.calls[0])
        options = [choices.choices_of(site, self.curves, budget.cost, settings.multiple) for site in sites]
        widths = choices.chosen(options, budget.amount)
        settings = dataclasses.replace(settings, method=BY_OUTPUT, parts=tuple(parts))
        return plan_of(self.model, cost.named(self.model, parts, widths), widths, reduction, settings)

    def fitted(self, plan: Plan) -> nn.Module:
        """A copy of the model that follows the plan."""
        with evaluating(self.model):
            units = units_of(self.model, plan)
            small = fitted(self.model, self.blocks, units, plan.widths, self.calls, self.groups, self.weights)
        return small.train(self.model.training)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Meanwhile the model is in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _refuse_few(calls: Sequence[Call]) -> None:
    seen = sum(len(call.hidden) for call in calls)
    if seen < FEWEST:
        raise ValueError(
            f"{seen} calibration pictures are too few for a least-squares solution that others can check: give at "
            f"least {FEWEST}, better hundreds, or choose the method energy."
        )
