"""What a budget counts, and how much of it the units of all sites may have together."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from comcat_diffusion.compression import allocate
from comcat_diffusion.compression.choices import Cost, parameters_of
from comcat_diffusion.compression.cost import Unit
from comcat_diffusion.compression.plan import Settings
from comcat_diffusion.compression.planning import counted


@dataclass(frozen=True)
class Budget:
    """How much the units of all sites may cost together, and what one costs at a width."""

    amount: float
    cost: Cost


def of(model: nn.Module, sites: Sequence[Sequence[Sequence[Unit]]], reduction: float, settings: Settings) -> Budget:
    """The budget that a reduction leaves. Raises ValueError if it cannot be reached; the message says what can."""
    first = [unit for site in sites for unit in site[0]]
    amount = allocate.budget_of(first, reduction, counted(model, first, settings), settings.multiple)
    return Budget(amount, parameters_of)
