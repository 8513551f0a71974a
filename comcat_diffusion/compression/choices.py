"""Which alternative and which widths every site gets: one Lagrangian over what each choice costs and what it loses.

The losses of sites are taken to add up. Within a site the units of an alternative trade off against each other first,
so that a site has one list of choices; over all sites the choice is argmin of loss + lambda cost, with the lambda that
just fits the budget, and what room is then left is spent on what gains most.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from comcat_diffusion.compression.cost import Unit

Curves = Mapping[str, torch.Tensor]  # by unit: loss at the widths 0, 1, ..., full
Cost = Callable[[Unit, int | None], float]  # of a unit at a width
STEPS = 60  # bisections of lambda
FEW = 48  # choices of one unit at most: finer steps of a wide layer make no difference that can be measured


@dataclass(frozen=True)
class Choice:
    """Widths for all units of one alternative of a site."""

    widths: tuple[tuple[str, int | None], ...]
    cost: float
    loss: float


def choices_of(site: Sequence[Sequence[Unit]], curves: Curves, cost: Cost, multiple: int = 1) -> list[Choice]:
    """Every choice of a site that no other beats in both cost and loss, by ascending cost."""
    found = [choice for units in site for choice in _path(units, curves, cost, multiple)]
    best: list[Choice] = []
    for choice in sorted(found, key=lambda c: (c.cost, c.loss)):
        if not best or choice.loss < best[-1].loss:
            best.append(choice)
    return best


def chosen(sites: Sequence[Sequence[Choice]], budget: float) -> dict[str, int | None]:
    """Widths by unit that lose least at a total cost of at most `budget`; each site's choices ascend in cost.

    Raises ValueError if even the cheapest choices cost more.
    """
    if sum(choices[0].cost for choices in sites) > budget:
        raise ValueError("The cheapest choices of all layers together cost more than the budget.")
    low, high = 0.0, 1.0
    while sum(c.cost for c in _at(sites, high)) > budget:
        high *= 8
    for _ in range(STEPS):  # the cost falls with lambda
        middle = (low + high) / 2
        fits = sum(c.cost for c in _at(sites, middle)) <= budget
        low, high = (low, middle) if fits else (middle, high)
    taken = _filled(sites, _at(sites, high), budget)
    return {name: width for choice in taken for name, width in choice.widths}


def _at(sites: Sequence[Sequence[Choice]], price: float) -> list[Choice]:
    return [min(choices, key=lambda c: c.loss + price * c.cost) for choices in sites]


def _filled(sites: Sequence[Sequence[Choice]], taken: list[Choice], budget: float) -> list[Choice]:
    """Best return first, until nothing more fits."""
    left = budget - sum(choice.cost for choice in taken)
    while True:
        steps = [
            ((here.loss - other.loss) / (other.cost - here.cost), place, other)
            for place, (here, choices) in enumerate(zip(taken, sites, strict=True))
            for other in choices
            if 0 < other.cost - here.cost <= left and other.loss < here.loss
        ]
        if not steps:
            return taken
        _, place, other = max(steps, key=lambda step: step[:2])
        left -= other.cost - taken[place].cost
        taken[place] = other


def _path(units: Sequence[Unit], curves: Curves, cost: Cost, multiple: int) -> list[Choice]:
    """From the smallest widths of these units to dense, always the step that gains most."""
    options = {unit.name: _options(unit, curves[unit.name], cost, multiple) for unit in units}
    places = dict.fromkeys(options, 0)
    path = []
    while True:
        here = {name: options[name][place] for name, place in places.items()}
        widths = tuple((name, width) for name, (width, _, _) in here.items())
        path.append(Choice(widths, sum(c for _, c, _ in here.values()), sum(loss for *_, loss in here.values())))
        steps = [
            ((here[name][2] - loss) / (price - here[name][1]), name, place)
            for name in options
            for place, (_, price, loss) in enumerate(options[name][places[name] + 1 :], places[name] + 1)
            if price > here[name][1]
        ]
        if not steps:
            return path
        _, name, place = max(steps, key=lambda step: step[0])
        places[name] = place


def _options(unit: Unit, curve: torch.Tensor, cost: Cost, multiple: int) -> list[tuple[int | None, float, float]]:
    """(width, cost, loss) by ascending cost; wide layers in steps, narrow ones one by one."""
    *widths, dense = unit.options(multiple)
    step = max(1, -(-len(widths) // FEW))
    picked = [*widths[:1], *widths[step - 1 :: step]] if step > 1 else widths
    lost = [(width, float(cost(unit, width)), float(curve[width])) for width in dict.fromkeys(picked)]
    ascending = sorted([*lost, (dense, float(cost(unit, dense)), 0.0)], key=lambda option: option[1:])
    best = ascending[:1]
    for option in ascending:  # measured times need not rise with the width
        best += [option] if option[2] < best[-1][2] else []
    return best
