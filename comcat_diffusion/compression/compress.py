"""The story of a compression: what there is, what the data uses of it, which widths fit, the smaller model."""

import copy
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from comcat_diffusion.attentions import DIFFUSERS, style_of
from comcat_diffusion.compression import allocate, cost, hosts, modules
from comcat_diffusion.compression.calibrate import Batch, Seen, calibrate, inputs_of
from comcat_diffusion.compression.cost import Unit
from comcat_diffusion.compression.factor import Product, linear_product, qk_product, vo_product
from comcat_diffusion.compression.plan import (
    Plan,
    Settings,
    layout_of,
    library_versions,
    refuse_bad_weights,
    refuse_other_model,
    sketch_of,
)
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
    parts, per_matrix = (
        (plan.parts, plan.per_matrix) if plan else (parts_of(model, settings), settings.method == "matrix")
    )
    # What there is
    units = cost.units(model, parts, per_matrix)
    if plan is not None:
        refuse_other_model(plan, model, units)
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


def parts_of(model: nn.Module, settings: Settings) -> tuple[str, ...]:
    """The parts that the settings choose, or the default for this kind of model."""
    return settings.parts or (("attention",) if hosts.is_diffusers(model) else cost.PARTS)


def refuse_unfit(model: nn.Module) -> None:
    """Raises ValueError if the model is compressed already or has a weight that is no number."""
    if any(modules.is_compressed(module) for module in model.modules()):
        raise ValueError(f"This {type(model).__name__} is compressed already; start from the dense model.")
    refuse_bad_weights(model)


def counted(model: nn.Module, units: Sequence[Unit], settings: Settings) -> int:
    """Of how many parameters the reduction is a fraction."""
    return sum(u.dense for u in units) if settings.counted == "parts" else count(model)


def count(model: nn.Module) -> int:
    """Parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def planned(model: nn.Module, units: Sequence[Unit], moments: Seen, reduction: float, settings: Settings) -> Plan:
    """The closed-form plan: by energy under one global threshold, or the same fraction for every unit."""
    budget = allocate.budget_of(units, reduction, counted(model, units, settings), settings.multiple)
    if settings.method == "uniform":
        widths = allocate.uniform(units, budget, settings.multiple)
    else:
        energies = energies_of(model, units, moments)
        widths = allocate.by_energy(units, energies, budget, settings.multiple)
    return plan_of(model, units, widths, reduction, settings)


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
        model_id=settings.model_id,
        skipped=cost.skipped(model, parts),
        versions=library_versions(),
    )


def products_of(model: nn.Module, unit: Unit, moments: Seen) -> tuple[Product, ...]:
    """The decomposition of a unit, of both products if they share their width."""
    seen = [moments.get(path) for path in inputs_of(model, unit)]
    module = model.get_submodule(unit.module)
    if unit.product == "linear":
        return (linear_product(*_weights(module), seen[0]),)
    style = style_of(module)
    q, k, v, out = style.projections(module)
    query, context = seen[0], seen[-1]
    qk = qk_product(*_weights(q), _weights(k)[0], unit.heads, query, context) if unit.product != "vo" else None
    vo = vo_product(*_weights(v), *_weights(out), unit.heads, context) if unit.product != "qk" else None
    return tuple(product for product in (qk, vo) if product is not None)


def _weights(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    bias = None if linear.bias is None else linear.bias.detach().cpu().double()
    return linear.weight.detach().cpu().double(), bias


def energies_of(model: nn.Module, units: Sequence[Unit], moments: Seen) -> allocate.Energies:
    """The kept energy of every unit, with no more memory held than one decomposition takes."""
    energies = {}
    for unit in units:
        energies[unit.name] = energy_of(model, unit, moments)
        give_back()
    return energies


def energy_of(model: nn.Module, unit: Unit, moments: Seen) -> torch.Tensor:
    """(full + 1,): kept energy by width; the column of a key bias keeps nothing that is counted."""
    energies = [product.energy for product in products_of(model, unit, moments)]
    for place, product in enumerate(energies):
        if unit.key_bias and place == 0:
            energies[0] = torch.cat([product.new_zeros(1), product])
    return torch.stack([energy[: unit.full + 1] for energy in energies]).mean(0)


def replaced(
    model: nn.Module, units: Sequence[Unit], moments: Seen, widths: cost.Widths, folded: bool = True
) -> nn.Module:
    """A copy of the model with the planned layers replaced; weights that are replaced are not copied before.

    What a layer has seen is taken out of `moments` after its last use: the smaller model grows as they go.
    """
    uses = Counter(path for unit in units for path in inputs_of(model, unit))
    chosen = [unit for unit in units if widths[unit.name] is not None]
    gone = [p for unit in chosen for linear in linears_of(model, unit) for p in linear.parameters()]
    smaller = copy.deepcopy(model, memo={id(parameter): parameter for parameter in gone})
    with torch.no_grad():
        for unit in chosen:
            replace(smaller, unit, products_of(model, unit, moments), widths[unit.name], folded)
            for path in inputs_of(model, unit):
                uses[path] -= 1
                if not uses[path]:
                    moments.pop(path, None)
            give_back()
    return smaller


def linears_of(model: nn.Module, unit: Unit) -> tuple[nn.Linear, ...]:
    """The dense layers that the unit stands for."""
    module = model.get_submodule(unit.module)
    if unit.product == "linear":
        return (module,)
    projections = style_of(module).projections(module)
    return {"qk": projections[:2], "vo": projections[2:], "both": projections}[unit.product]


def replace(model: nn.Module, unit: Unit, products: tuple[Product, ...], width: int, folded: bool = True) -> None:
    """Put a unit's factors of this width in the place of its layers."""
    attention = model.get_submodule(unit.module)
    if unit.product == "linear":
        modules.replace_linear(model, unit.module, products[0].truncated(width), folded)
    elif unit.product == "qk":
        modules.replace_qk(attention, products[0].truncated(width - unit.key_bias), folded)
    elif unit.product == "vo":
        modules.replace_vo(attention, products[0].truncated(width), folded)
    else:
        qk, vo = products[0].truncated(width - unit.key_bias), products[1].truncated(width)
        dense = DIFFUSERS.projections(attention)[0].out_features // unit.heads
        modules.replace_both(attention, qk, vo, dense, folded)


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
