"""Costs counted against the real modules, and the budget held to the parameter by every way of choosing widths."""

import random

import pytest
import torch

from comcat_diffusion.compression import Settings, allocate, compress, cost
from comcat_diffusion.compression.compress import replaced
from comcat_diffusion.compression.cost import Unit
from comcat_diffusion.compression.planning import count
from tests.compression_models import batches, built, out, pictures
from tests.slow import mostly

KINDS = ["vit", "vit-nobias", "deit", "deit-nobias", "clip"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_matrix", [False, True])
def test_a_unit_costs_what_its_modules_hold_at_every_width(kind, per_matrix):
    model = built(kind)
    units = cost.units(model, per_matrix=per_matrix)
    assert cost.parameters(units, dict.fromkeys([u.name for u in units])) == sum(u.dense for u in units)
    for unit in units[: 4 if per_matrix else 3] + units[-1:]:
        for width in (1 + unit.key_bias, 4, unit.full):
            chosen = {**dict.fromkeys([u.name for u in units]), unit.name: width}
            assert count(replaced(model, units, {}, chosen)) == count(model) - unit.dense + unit.parameters(width)


def test_every_weight_of_a_vit_but_embeddings_and_norms_is_in_some_unit():
    model = built("deit")
    dense = sum(unit.dense for unit in cost.units(model))
    rest = sum(p.numel() for n, p in model.named_parameters() if "embeddings" in n or "layernorm" in n)
    assert dense + rest == count(model)
    parts = {unit.name: unit.part for unit in cost.units(model)}
    assert parts["cls_classifier"] == parts["distillation_classifier"] == "classifier"
    assert parts["deit.layers.1.mlp.fc2"] == "mlp" and parts["deit.layers.0.attention:vo"] == "attention"


def test_break_even_is_where_low_rank_stops_to_pay():
    for unit in cost.units(built("vit")):
        assert unit.parameters(unit.break_even) >= unit.dense > unit.parameters(unit.break_even - 1)
        *widths, dense = unit.options()
        assert dense is None and all(unit.parameters(width) < unit.dense for width in widths)
    paper = Unit("fc1", "fc1", "linear", "mlp", 1, 384, 0, 384 + 1536, 1536, 384 * 1536 + 1536)
    assert paper.break_even == 308  # DeiT-small's FFN pays up to 307: PAPER section 4, fault 5


def test_multiply_adds_are_counted_with_the_real_ranks():
    dense = built("vit")
    inputs = {"pixel_values": pictures(2)}
    n, c, m, images = 5, 24, 40, 2
    per_layer = images * (4 * n * c * c + 2 * n * n * c + 2 * n * c * m)
    patches, head = images * 4 * c * 3 * 16, images * c * 5
    assert cost.multiply_adds(dense, inputs) == 2 * per_layer + patches + head
    units = cost.units(dense)
    widths = {unit.name: {"qk": 4, "vo": 2, "linear": None}[unit.product] for unit in units}
    low = replaced(dense, units, {}, widths)
    qk = images * n * 3 * (c * 3 + c * 4)  # a column of keys is the key bias
    vo, mixing = images * n * 3 * (c * 2 + c * 2), images * n * n * 3 * (4 + 2)
    assert cost.multiply_adds(low, inputs) == 2 * (qk + vo + mixing + images * 2 * n * c * m) + patches + head


@pytest.mark.parametrize("method", ["energy", "uniform", "matrix"])
@pytest.mark.parametrize("kind", mostly(["vit", "deit-nobias"], "deit-nobias"))
def test_the_budget_holds_to_the_parameter(method, kind):
    model, seen = built(kind), set()
    for reduction in (0.05, 0.2, 1 / 3, 0.44, 0.61):
        low, plan = compress(model, reduction, settings=Settings(method=method))
        assert count(low) == plan.parameters_after <= (1 - reduction) * plan.parameters_before
        assert plan.parameters_before == count(model)
        seen.add(plan.parameters_after)
    assert len(seen) == 5
    if method == "energy":  # and what room there is, is used: less than one more column of the smallest unit is left
        least = min(unit.per_width for unit in cost.units(model) if plan.widths[unit.name] is not None)
        assert (1 - 0.61) * count(model) - plan.parameters_after < least


def random_units(rng):
    made = []
    for number in range(rng.randint(1, 8)):
        into, outof, heads, bias = rng.randint(2, 40), rng.randint(2, 40), rng.randint(1, 4), rng.randint(0, 1)
        full = rng.randint(1 + bias, 20)
        dense = heads * full * (into + outof) + rng.randint(0, 30)
        fixed = -bias * heads * into
        made.append(Unit(f"u{number}", "", "qk", "attention", heads, full, bias, heads * (into + outof), fixed, dense))
    return made


@pytest.mark.parametrize("seed", range(60))
def test_no_allocation_ever_exceeds_the_budget(seed):
    """Over random units, energies, budgets, multiples and starts."""
    rng = random.Random(seed)
    units, multiple = random_units(rng), rng.choice([1, 1, 2, 8])
    generator = torch.Generator().manual_seed(seed)
    energies = {}
    for unit in units:
        kept = torch.rand(unit.full, generator=generator).sort(descending=True).values.cumsum(0)
        energies[unit.name] = torch.cat([torch.zeros(1), kept / kept[-1]])
    dense = sum(unit.dense for unit in units)
    least = sum(unit.parameters(unit.options(multiple)[0]) for unit in units)
    budget = rng.randint(least, dense)
    start = {unit.name: rng.choice(unit.options(1)) for unit in units}
    by_energy = allocate.by_energy(units, energies, budget, multiple)
    projected = allocate.project(units, energies, start, budget, multiple)
    for widths in (by_energy, projected, allocate.uniform(units, budget, multiple)):
        assert cost.parameters(units, widths) <= budget
        for unit in units:
            width = widths[unit.name]
            assert width is None or (1 + unit.key_bias <= width <= unit.full and width % multiple == 0)
            assert width is None or unit.parameters(width) < unit.dense
    for unit in units:  # nothing that fits and keeps more was left undone
        options = allocate.options_of(unit, energies[unit.name], multiple)
        here = next(option for option in options if option.width == by_energy[unit.name])
        room = budget - cost.parameters(units, by_energy)
        assert not [o for o in options if 0 < o.cost - here.cost <= room and o.energy > here.energy + 1e-9]


def test_the_energy_allocation_is_the_best_there_is_up_to_one_column():
    """Against every combination of widths of three small units."""
    units = [Unit(f"u{n}", "", "qk", "attention", 1, 5, 0, size, 0, 6 * size) for n, size in enumerate((3, 4, 7))]
    generator = torch.Generator().manual_seed(0)
    energies = {}
    for unit in units:
        kept = torch.rand(5, generator=generator).sort(descending=True).values.cumsum(0)
        energies[unit.name] = torch.cat([torch.zeros(1), 0.98 * kept / kept[-1]])
    kept = lambda widths: sum(1.0 if w is None else float(energies[name][w]) for name, w in widths.items())
    for budget in range(14, 85):
        combinations = (
            {"u0": a, "u1": b, "u2": c}
            for a in units[0].options()
            for b in units[1].options()
            for c in units[2].options()
        )
        best = max(kept(w) for w in combinations if cost.parameters(units, w) <= budget)
        found = kept(allocate.by_energy(units, energies, budget))
        step = max(float((e[1:] - e[:-1])[1:].max()) for e in energies.values())  # beyond the first, which all have
        assert best - step <= found <= best + 1e-6


def test_a_layer_that_low_rank_does_not_pay_for_is_kept_dense():
    flat = Unit("flat", "", "linear", "mlp", 1, 10, 0, 20, 0, 100)  # all ranks alike: break-even at 5 keeps half
    steep = Unit("steep", "", "linear", "mlp", 1, 10, 0, 20, 0, 100)
    energies = {
        "flat": torch.linspace(0, 1, 11),
        "steep": torch.cat([torch.zeros(1), torch.ones(10)]),
    }
    widths = allocate.by_energy([flat, steep], energies, 120)
    assert widths == {"flat": None, "steep": 1}


def test_projecting_changes_nothing_that_fits_exactly_and_lowers_what_hurts_least():
    units = [Unit(name, "", "linear", "mlp", 1, 10, 0, 20, 0, 200) for name in ("a", "b")]
    energies = {
        "a": torch.linspace(0, 1, 11),
        "b": torch.tensor([0, 0.5, 0.9, 0.98, 0.99, 0.995, 0.996, 0.997, 0.998, 0.999, 1.0]),
    }
    fits = {"a": 3, "b": 4}
    assert allocate.project(units, energies, fits, 140) == fits
    assert allocate.project(units, energies, fits, 120) == {"a": 3, "b": 3}
    assert allocate.project(units, energies, fits, 160) == {"a": 4, "b": 4}


def test_multiples_of_eight_are_multiples_of_eight():
    model = built("vit", hidden_size=48, intermediate_size=64, num_attention_heads=3)
    for method in ("energy", "uniform"):
        low, plan = compress(model, 0.3, batches(2), settings=Settings(method=method, multiple=8))
        assert all(width is None or width % 8 == 0 for width in plan.widths.values())
        assert any(width is not None for width in plan.widths.values())
        assert count(low) <= 0.7 * count(model)


@pytest.mark.parametrize("method", ["energy", "uniform", "matrix"])
def test_calibration_makes_the_compressed_model_more_alike(method):
    dense = built("vit")
    seen = batches(8, 16)
    errors = []
    for calibration in (None, seen):
        low, _ = compress(dense, 0.4, calibration, settings=Settings(method=method))
        error = sum((out(low, b["pixel_values"]) - out(dense, b["pixel_values"])).square().mean() for b in seen)
        errors.append(float(error))
    assert errors[1] < 0.7 * errors[0]


def test_a_fraction_of_the_parts_counts_the_parts():
    model = built("vit")
    settings = Settings(parts=("attention",), counted="parts")
    for reduction in (0.2, 0.8):
        low, plan = compress(model, reduction, settings=settings)
        units = cost.units(model, ("attention",))
        attention = sum(unit.dense for unit in units)
        assert count(model) - count(low) >= reduction * attention
        assert all(name.endswith((":qk", ":vo")) for name in plan.widths) and len(plan.widths) == 4
        assert torch.equal(low.vit.layers[0].mlp.fc1.weight, model.vit.layers[0].mlp.fc1.weight)
