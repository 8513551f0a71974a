"""The story of a compression: what there is, what the data uses of it, which widths fit, the smaller model."""

import copy
import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from comcat_diffusion.attentions import style_of
from comcat_diffusion.compression import allocate, by_output, cost, modules
from comcat_diffusion.compression.calibrate import Batch, Seen, calibrate, inputs_of
from comcat_diffusion.compression.config import BY_OUTPUT, PARAMETERS
from comcat_diffusion.compression.cost import Unit
from comcat_diffusion.compression.decompose import decomposed, lost, put, watched
from comcat_diffusion.compression.plan import Plan, Settings, refuse_bad_weights, refuse_other_model
from comcat_diffusion.compression.planning import counted, parts_of, plan_of, units_of
from comcat_diffusion.memory import give_back

DEFAULT = Settings()


def compress(
    model: nn.Module,
    reduction: float | None = None,
    calibration: Iterable[Batch] | None = None,
    plan: Plan | None = None,
    settings: Settings = DEFAULT,
) -> tuple[nn.Module, Plan]:
    """A smaller copy of the model, and the plan it follows; the model itself stays as it is.

    Give either the `reduction`, the fraction of parameters to remove at least, or a `plan` that was made before (on
    this model or another of the same layout). `calibration` batches whiten the products (see factor.py).
    Raises ValueError if the reduction cannot be reached, if there is nothing to compress, if the plan is for another
    layout, if a weight or an activation is not finite.
    """
    if (reduction is None) == (plan is None):
        raise ValueError("Give either a reduction or a plan.")
    refuse_unfit(model)
    settings = resolved(model, settings, calibration is not None)
    if (plan.method if plan else settings.method) == BY_OUTPUT and calibration is not None:
        parts = plan.parts if plan else parts_of(model, settings)
        refuse_other_functions(model, by_output.every_unit(cost.sites(model, parts)))
        return by_output.compressed(model, reduction, list(calibration), plan, settings)
    # What there is
    matrices = settings.method == "matrix"
    units = units_of(model, plan) if plan else cost.units(model, parts_of(model, settings), matrices)
    if plan is not None:
        refuse_other_model(plan, model, units)
    elif settings.method == BY_OUTPUT:
        raise ValueError("What the output loses can only be measured on pictures: give calibration batches.")
    elif settings.method == "search":
        raise ValueError("A search needs training batches: call search_ranks, and compress with the plan it gives.")
    else:  # before the calibration, so that nobody waits for a refusal
        allocate.budget_of(units, reduction, counted(model, units, settings), settings.multiple)
    refuse_other_functions(model, units)
    # What the data uses of it
    moments = {} if calibration is None else calibrate(model, units, calibration)
    # Which widths fit the budget
    if plan is None:
        plan = planned(model, units, moments, reduction, settings)
    # The smaller model
    return replaced(model, units, moments, plan.widths), plan


def resolved(model: nn.Module, settings: Settings, calibrated: bool) -> Settings:
    """The settings with the method that suits the model and the data, if none was asked for."""
    if settings.method is not None:
        return settings
    if settings.budget != PARAMETERS:
        return dataclasses.replace(settings, method=BY_OUTPUT)
    return dataclasses.replace(
        settings, method=BY_OUTPUT if calibrated and by_output.fits(model, settings) else "energy"
    )


def refuse_unfit(model: nn.Module) -> None:
    """Raises ValueError if the model is compressed already or has a weight that is no number."""
    if any(modules.is_compressed(module) for module in model.modules()):
        raise ValueError(f"This {type(model).__name__} is compressed already; start from the dense model.")
    refuse_bad_weights(model)


def planned(model: nn.Module, units: Sequence[Unit], moments: Seen, reduction: float, settings: Settings) -> Plan:
    """The closed-form plan: by energy under one global threshold, or the same fraction for every unit."""
    budget = allocate.budget_of(units, reduction, counted(model, units, settings), settings.multiple)
    if settings.method == "uniform":
        widths = allocate.uniform(units, budget, settings.multiple)
    else:
        energies = energies_of(model, units, moments)
        widths = allocate.by_energy(units, energies, budget, settings.multiple)
    return plan_of(model, units, widths, reduction, settings)


def energies_of(model: nn.Module, units: Sequence[Unit], moments: Seen) -> allocate.Energies:
    """The kept energy of every unit, with no more memory held than one decomposition takes."""
    energies = {}
    for unit in units:
        energies[unit.name] = energy_of(model, unit, moments)
        give_back()
    return energies


def energy_of(model: nn.Module, unit: Unit, moments: Seen) -> torch.Tensor:
    """(full + 1,): kept energy by width."""
    return 1 - lost(unit, decomposed(model, unit, of_unit(model, unit, moments)))


def of_unit(model: nn.Module, unit: Unit, moments: Seen) -> dict:
    """What the layers of one unit have seen, as decompose.py wants it."""
    return {key: moments[key[0]] for key in watched(model, unit) if key[0] in moments}


def replaced(
    model: nn.Module, units: Sequence[Unit], moments: Seen, widths: cost.Widths, folded: bool = True
) -> nn.Module:
    """A copy of the model with the planned layers replaced; weights that are replaced are not copied before.

    What a layer has seen is taken out of `moments` after its last use: the smaller model grows as they go.
    """
    uses = Counter(path for unit in units for path in inputs_of(model, unit))
    chosen = [unit for unit in units if widths[unit.name] is not None]
    gone = [p for unit in chosen for linear in cost.linears_of(model, unit) for p in linear.parameters()]
    smaller = copy.deepcopy(model, memo={id(parameter): parameter for parameter in gone})
    with torch.no_grad():
        for unit in chosen:
            found = decomposed(model, unit, of_unit(model, unit, moments))
            put(smaller, unit, found, widths[unit.name], folded)
            for path in inputs_of(model, unit):
                uses[path] -= 1
                if not uses[path]:
                    moments.pop(path, None)
            give_back()
    return smaller


def refuse_other_functions(model: nn.Module, units: Sequence[Unit]) -> None:
    """Raises ValueError if an attention, run as LowRankAttention, is not the function that it was.

    Structure can deceive (a subclass with a forward of its own), so one attention of every class is tried.
    """
    tried = set()
    for unit in units:
        host = model.get_submodule(unit.module)
        if unit.product != "qk" or type(host) in tried:
            continue
        tried.add(type(host))
        ours = copy.deepcopy(host).eval()
        weight = style_of(host).projections(host)[0].weight
        x = torch.linspace(-1, 1, 3 * weight.shape[1], device=weight.device).sin().to(weight.dtype)
        x = x.view(1, 3, -1)  # B, N, C
        with torch.no_grad():
            before = ours(x)[0]
            modules.become_low_rank(ours)
            if not torch.equal(ours(x)[0], before):
                raise ValueError(
                    f"'{unit.module}' computes something else than attention as {type(host).__name__} does."
                )
