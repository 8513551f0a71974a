"""What a budget counts: parameters, multiply-adds of one picture, or seconds that are measured on this machine."""

import copy
import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from comcat_diffusion import timing
from comcat_diffusion.compression import allocate, cost
from comcat_diffusion.compression.chain import Call, outputs, run
from comcat_diffusion.compression.choices import Cost
from comcat_diffusion.compression.config import LATENCY, PARAMETERS
from comcat_diffusion.compression.cost import Unit
from comcat_diffusion.compression.decompose import decomposed, put
from comcat_diffusion.compression.plan import Settings
from comcat_diffusion.compression.planning import counted

PICTURES, ROUNDS = 8, 5  # that a layer is timed on, and how often
TIMED = (0.02, 0.35, 0.7, 1.0)  # of the widths that are cheaper than dense; between them time is a straight line
Sites = Sequence[Sequence[Sequence[Unit]]]


@dataclass(frozen=True)
class Budget:
    """How much the units of all sites may cost together, and what one costs at a width."""

    amount: float
    cost: Cost


def refuse_unreachable(model: nn.Module, sites: Sites, reduction: float, settings: Settings) -> None:
    """Raises ValueError if a reduction of parameters cannot be reached, before anything long begins."""
    if settings.budget == PARAMETERS:
        parameters(model, sites, reduction, settings)


def of(
    model: nn.Module, blocks: Sequence[nn.Module], sites: Sites, reduction: float, settings: Settings, call: Call
) -> Budget:
    """The budget that a reduction leaves. Raises ValueError if it cannot be reached; the message says what can."""
    if settings.budget == PARAMETERS:
        return parameters(model, sites, reduction, settings)
    if settings.budget == LATENCY:
        price, whole = seconds(model, blocks, sites, call)
    else:
        tokens = call.hidden.shape[1]
        one = {name: value[:1] for name, value in call.batch.items()}
        price, whole = (lambda unit, width: cost.work(model, unit, width, tokens)), cost.multiply_adds(model, one)
    dense = sum(price(unit, None) for site in sites for unit in site[0])
    total = dense if settings.counted == "parts" and settings.budget != LATENCY else whole
    least = sum(min(_least(units, price, settings.multiple) for units in site) for site in sites)
    if least > dense - reduction * total:
        most = int((dense - least) / total * 1e4) / 1e4
        raise ValueError(
            f"A reduction of {reduction} of the {settings.budget} cannot be reached: what is not compressed, and the "
            f"layers at their smallest, take {1 - most:.1%}; ask for at most {most}, or choose more parts."
        )
    return Budget(dense - reduction * total, price)


def parameters(model: nn.Module, sites: Sites, reduction: float, settings: Settings) -> Budget:
    """The budget of parameters; to one of them, it is guaranteed."""
    first = [unit for site in sites for unit in site[0]]
    amount = allocate.budget_of(first, reduction, counted(model, first, settings), settings.multiple)
    return Budget(amount, lambda unit, width: unit.parameters(width))


def _least(units: Sequence[Unit], price: Cost, multiple: int) -> float:
    return sum(min(price(unit, unit.options(multiple)[0]), price(unit, None)) for unit in units)


@torch.no_grad()
def seconds(model: nn.Module, blocks: Sequence[nn.Module], sites: Sites, call: Call) -> tuple[Cost, float]:
    """What a unit at a width adds to the time of a dense pass (less than zero: it saves), and that pass's seconds.

    Blocks are alike, so each layer is timed once: the first block with that layer narrower, against the dense block.
    """
    rows = slice(0, PICTURES)
    hidden = call.hidden[rows]
    batch = {name: value[rows] for name, value in call.batch.items()}
    names = [next(name for name, module in model.named_modules() if module is block) for block in blocks]
    table: dict[tuple, list[tuple[int, float]]] = {}
    for site in sites:
        for unit in (unit for units in site for unit in units):
            name, block = next((n, b) for n, b in zip(names, blocks, strict=True) if unit.name.startswith(f"{n}."))
            key = _alike(unit, name)
            if key not in table:
                table[key] = _timed(model, block, name, unit, lambda b: run(b, call, hidden))

    def price(unit: Unit, width: int | None) -> float:
        if width is None:
            return 0.0
        name = next(n for n in names if unit.name.startswith(f"{n}."))
        return _between(table[_alike(unit, name)], width)

    rounds = timing.rounds({"model": lambda: outputs(model, batch)})
    return price, statistics.median(found["model"] for found in itertools.islice(rounds, ROUNDS))


def _alike(unit: Unit, block: str) -> tuple:
    return unit.name.removeprefix(block), unit.heads, unit.full, unit.per_width, unit.dense


def _timed(
    model: nn.Module, block: nn.Module, name: str, unit: Unit, runs: Callable[[nn.Module], object]
) -> list[tuple[int, float]]:
    """(width, seconds more than the dense block's), ascending; weights do not matter to it."""
    widths = [width for width in unit.options() if width is not None]
    parts, parent = decomposed(model, unit, {}), model.get_submodule(name.rpartition(".")[0])
    timed = []
    for width in sorted({widths[round(share * (len(widths) - 1))] for share in TIMED}):
        narrow = copy.deepcopy(block)
        setattr(parent, name.rpartition(".")[2], narrow)
        try:
            put(model, unit, parts, width)
        finally:
            setattr(parent, name.rpartition(".")[2], block)
        rounds = timing.rounds({"narrow": functools.partial(runs, narrow), "dense": functools.partial(runs, block)})
        more = [found["narrow"] - found["dense"] for found in itertools.islice(rounds, ROUNDS)]
        timed.append((width, statistics.median(more)))
    return timed


def _between(points: list[tuple[int, float]], width: int) -> float:
    for (low, before), (high, after) in itertools.pairwise(points):
        if width <= high:
            return before + (after - before) * (width - low) / (high - low)
    return points[-1][1]
