"""Which width every unit gets under a budget of parameters: one global threshold on energy per parameter.

The energy of a unit at a width is the part of its (whitened) squared singular values that the width keeps, 1 when
dense. Raising the width that brings the most energy per parameter, again and again, is the optimum under a threshold;
an option further up (in the end: keep dense) is taken in one leap when the return would first fall and then rise.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from comcat_diffusion.compression.cost import Unit

NOTHING = 1e-12  # energy; rounding of what a rank that is not there would bring
Energies = dict[str, torch.Tensor]  # by unit: kept energy at the widths 0, 1, ..., full


@dataclass(frozen=True)
class Option:
    """One choice for one unit."""

    width: int | None
    cost: int
    energy: float


def options_of(unit: Unit, energy: torch.Tensor, multiple: int = 1) -> list[Option]:
    """The unit's choices by ascending cost; the dense layer comes last and keeps everything."""
    kept = energy.tolist()
    return [
        Option(width, unit.parameters(width), 1.0 if width is None else kept[width]) for width in unit.options(multiple)
    ]


def budget_of(units: Sequence[Unit], reduction: float, total: int, multiple: int = 1) -> int:
    """How many parameters the units may have together, so that `reduction` of `total` parameters go.

    Raises ValueError if the reduction is no fraction or cannot be reached; the message says what can.
    """
    if not 0 < reduction < 1:
        raise ValueError(
            f"The reduction must lie between 0 and 1 (0.44 removes 44 % of the parameters), not {reduction}."
        )
    dense = sum(unit.dense for unit in units)
    least = sum(unit.parameters(unit.options(multiple)[0]) for unit in units)
    budget = dense - _ceil(reduction * total)
    if budget < least:
        limit = int((dense - least) / total * 1e4) / 1e4
        raise ValueError(
            f"A reduction of {reduction} cannot be reached: the parts hold {dense / total:.1%} of the parameters "
            f"counted, and at the smallest ranks {limit} of these go; ask for at most {limit}, or choose more parts."
        )
    return budget


def _ceil(value: float) -> int:
    # 0.4 * 1000 is 400.00000000000006 or the like in floating point: not one parameter more for that.
    return int(-(-round(value, 6) // 1))


def by_energy(units: Sequence[Unit], energies: Energies, budget: int, multiple: int = 1) -> dict[str, int | None]:
    """Widths that keep the most energy with at most `budget` parameters, from the smallest upwards."""
    choices = {unit.name: options_of(unit, energies[unit.name], multiple) for unit in units}
    return _widths(choices, _raise(choices, dict.fromkeys(choices, 0), budget))


def project(
    units: Sequence[Unit], energies: Energies, widths: dict[str, int | None], budget: int, multiple: int = 1
) -> dict[str, int | None]:
    """The widths changed as little as need be: lowered until they fit the budget, then raised where room is left."""
    choices = {unit.name: options_of(unit, energies[unit.name], multiple) for unit in units}
    start = {}
    for name, options in choices.items():
        place = max((i for i, o in enumerate(options) if _no_wider(o.width, widths[name])), default=0)
        # Columns that keep nothing are given up at once: others may need the room.
        start[name] = next(i for i, o in enumerate(options) if o.energy > options[place].energy - NOTHING)
    return _widths(choices, _raise(choices, _lower(choices, start, budget), budget))


def uniform(units: Sequence[Unit], budget: int, multiple: int = 1) -> dict[str, int | None]:
    """The same fraction of the dense parameters for every unit, the largest fraction that fits."""
    choices = {unit.name: unit.options(multiple)[:-1] or [None] for unit in units}

    def at(fraction: float) -> dict[str, int | None]:
        return {
            unit.name: max(
                (w for w in choices[unit.name] if unit.parameters(w) <= fraction * unit.dense),
                key=unit.parameters,
                default=choices[unit.name][0],
            )
            for unit in units
        }

    low, high = 0.0, 1.0
    for _ in range(40):  # bisection: the cost of `at` rises with the fraction
        middle = (low + high) / 2
        fits = sum(unit.parameters(at(middle)[unit.name]) for unit in units) <= budget
        low, high = (middle, high) if fits else (low, middle)
    return at(low)


def _no_wider(width: int | None, wanted: int | None) -> bool:
    return wanted is None or (width is not None and width <= wanted)


def _widths(choices: dict[str, list[Option]], places: dict[str, int]) -> dict[str, int | None]:
    return {name: choices[name][place].width for name, place in places.items()}


def _spent(choices: dict[str, list[Option]], places: dict[str, int]) -> int:
    return sum(choices[name][place].cost for name, place in places.items())


def _raise(choices: dict[str, list[Option]], places: dict[str, int], budget: int) -> dict[str, int]:
    """Best return first, until nothing more fits."""
    places, left = dict(places), budget - _spent(choices, places)

    def best(name: str) -> tuple[float, str, int] | None:
        here, options = choices[name][places[name]], choices[name]
        steps = [
            (-(option.energy - here.energy) / (option.cost - here.cost), name, place)
            for place, option in enumerate(options[places[name] + 1 :], places[name] + 1)
            if 0 < option.cost - here.cost <= left and option.energy - here.energy > NOTHING
        ]
        return min(steps, default=None)

    heap = [step for step in map(best, choices) if step is not None]
    heapq.heapify(heap)
    while heap:
        _, name, place = heapq.heappop(heap)
        price = choices[name][place].cost - choices[name][places[name]].cost
        if price <= left:
            places[name], left = place, left - price
        step = best(name)
        if step is not None:
            heapq.heappush(heap, step)
    return places


def _lower(choices: dict[str, list[Option]], places: dict[str, int], budget: int) -> dict[str, int]:
    """Smallest loss first, until it fits."""
    places, over = dict(places), _spent(choices, places) - budget

    def cheapest(name: str) -> tuple[float, str, int] | None:
        here, options = choices[name][places[name]], choices[name]
        steps = [
            ((here.energy - option.energy) / (here.cost - option.cost), name, place)
            for place, option in enumerate(options[: places[name]])
            if option.cost < here.cost
        ]
        return min(steps, default=None)

    heap = [step for step in map(cheapest, choices) if step is not None]
    heapq.heapify(heap)
    while over > 0 and heap:
        _, name, place = heapq.heappop(heap)
        over -= choices[name][places[name]].cost - choices[name][place].cost
        places[name] = place
        step = cheapest(name)
        if step is not None:
            heapq.heappush(heap, step)
    return places
