"""Compression by what the output loses: its maths against slow formulas, its budget, its models, its files."""

import copy
import random

import pytest
import torch
from torch.testing import assert_close

from comcat_diffusion.compression import (
    Settings,
    chain,
    choices,
    compress,
    cost,
    importance,
    load_compressed,
    losses,
    mixtures,
    neurons,
    save_compressed,
    sequential,
)
from comcat_diffusion.compression.by_output import every_unit
from comcat_diffusion.compression.modules import is_compressed
from comcat_diffusion.compression.planning import count
from comcat_diffusion.compression.regression import RIDGES, UNTESTED, WHOLE, Regression, gram
from tests import reference_compression as slow
from tests.compression_models import batches, built, out, pictures
from tests.slow import mostly

EXACT = {"rtol": 0.0, "atol": 1e-10}
KINDS = ["vit", "vit-nobias", "deit", "clip", "siglip", "beit", "dinov2", "dinov2-swiglu", "registers"]


def noise(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(groups=1, tokens=30):
    """Activations of `groups` pictures, what is wanted of them, and the sums over them."""
    x, y = noise(groups, tokens, 6) @ noise(6, 6, seed=1) + 2, noise(groups, tokens, 4, seed=2)
    y = y + x @ noise(6, 4, seed=3)
    sums = Regression(groups)
    sums.add(x[:1], y[:1], torch.zeros(1, dtype=torch.long))
    if groups > 1:
        sums.add(x[1:], y[1:], torch.arange(1, groups))
    return x.flatten(0, 1), y.flatten(0, 1), sums


@pytest.mark.parametrize("biased", [True, False])
def test_the_regression_is_the_stacked_least_squares_problem(biased):
    x, y, sums = problem()
    prior = noise(6, 4, seed=4)
    wanted = slow.ridge_regression(x, y, prior, UNTESTED, biased)
    for ours, theirs in zip(sums.solve(prior, biased), wanted, strict=True):
        assert (ours is None) is (theirs is None) is (not biased and theirs is None)
        if ours is not None:
            assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("channels", [1, WHOLE, 2 * WHOLE + 3])
def test_a_gram_matrix_of_which_half_is_computed_is_whole(channels):
    x = noise(20, channels)
    assert_close(gram(x), x.mT @ x, rtol=0, atol=1e-12)


def test_tokens_that_weigh_more_are_fitted_as_if_they_came_more_often():
    x, y, _ = problem(groups=2, tokens=12)
    counts, groups = torch.arange(12) % 3, torch.arange(2)
    weighed, repeated = Regression(2), Regression(2)
    shaped = [part.unflatten(0, (2, 12)) for part in (x, y)]
    weighed.add(*shaped, groups, counts.double())
    repeated.add(*(part.repeat_interleave(counts, 1) for part in shaped), groups)
    prior = noise(6, 4, seed=4)
    for ours, theirs in zip(weighed.solve(prior, True), repeated.solve(prior, True), strict=True):
        assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    alike = Regression(2)
    alike.add(*shaped, groups)
    assert (alike.solve(prior, True)[0] - weighed.solve(prior, True)[0]).abs().max() > 1e-2


@pytest.mark.slow
def test_weights_are_the_mean_squares_of_the_outputs_gradients():
    model, _, blocks, calls, _, _ = streams("dinov2")
    state = torch.get_rng_state()
    draws = [importance.measured(model, blocks, calls, seed) for seed in range(100)]
    assert torch.equal(torch.get_rng_state(), state)
    pixels = torch.cat([call.batch["pixel_values"] for call in calls])
    places = torch.linspace(0, len(pixels) - 1, importance.PICTURES).round().long()
    sizes, seconds = slow.token_sensitivity(model, blocks, pixels[places], draws=20, seed=1)
    for place, (size, second) in enumerate(zip(sizes, seconds, strict=True)):
        first, rest = (sum(getattr(draw[place], name) for draw in draws) / 100 for name in ("first", "rest"))
        assert first / rest == pytest.approx(float(size[0] / size[1:].mean()), rel=0.1)  # chance: 1,600 and 320 draws
        assert first / rest > 1.5
        metric = sum(draw[place].root @ draw[place].root.mT for draw in draws) / 100
        wanted = 0.9 * second / second.diagonal().mean() + 0.1 * torch.eye(len(second))
        assert (metric - wanted).norm() < 0.25 * wanted.norm()
        assert place or (wanted - torch.eye(len(second))).norm() > 0.4 * wanted.norm()


def test_tokens_that_a_classifier_does_not_look_at_still_count_a_little():
    last = streams("vit")[-1][-1]
    assert last.rest == pytest.approx(importance.LEAST * last.first / 4)
    assert last.of(5).mean() == pytest.approx(1) and last.of(5)[0] == pytest.approx(1 / 0.22, rel=1e-6)


def test_fewer_channels_and_a_basis_are_the_regression_on_what_they_give():
    x, y, sums = problem()
    kept, basis = torch.tensor([1, 4, 5]), noise(6, 3, seed=5)
    for part, features in ((sums.only(kept), x[:, kept]), (sums.through(basis), x @ basis)):
        prior = noise(3, 4, seed=6)
        wanted = slow.ridge_regression(features, y, prior, UNTESTED, True)
        for ours, theirs in zip(part.solve(prior, True), wanted, strict=True):
            assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_the_ridge_is_the_one_that_predicts_the_groups_left_out():
    x, y, sums = problem(groups=3, tokens=4)
    prior, errors = torch.zeros(6, 4, dtype=torch.float64), []
    for ridge in RIDGES:
        error = 0.0
        for group in range(3):
            out = torch.zeros(12, dtype=torch.bool)
            out[4 * group : 4 * group + 4] = True
            weight, bias = slow.ridge_regression(x[~out], y[~out], prior, ridge, True)
            error += float((y[out] - x[out] @ weight - bias).square().sum())
        errors.append(error)
    assert sums.ridge(prior, True) == RIDGES[errors.index(min(errors))]
    assert len(set(errors)) == len(RIDGES)


def test_neurons_are_picked_by_what_they_explain_of_the_output():
    factor, gains = noise(9, 9), noise(4, 9, seed=1)
    covariance = factor @ factor.T
    picked, lost = neurons.order(covariance, gains)
    wanted, left = slow.greedy_neurons(covariance, gains, neurons.RIDGE)
    assert picked.tolist() == wanted and wanted != sorted(wanted)
    assert_close(lost, torch.tensor(left, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    few, begun = neurons.order(covariance, gains, 4)
    assert torch.equal(few, picked[:4]) and torch.equal(begun, lost[:5])
    weight, root = noise(5, 9, seed=2), noise(5, 5, seed=3)
    metric = neurons.gains(weight, root)
    assert_close(metric.T @ metric, weight.T @ root @ root.T @ weight, rtol=1e-9, atol=1e-9)


def test_a_basis_of_all_mixtures_loses_nothing_and_a_narrow_one_the_least_of_its_head():
    factor, weight = noise(8, 8), noise(8, 5, seed=1)
    covariance = factor @ factor.T
    whole = mixtures.bases(covariance, weight, heads=2, width=4)
    assert_close(whole @ mixtures.onto(whole, covariance, weight), weight, rtol=0.0, atol=1e-6)  # its tiny ridge
    block = covariance[:4, :4] + mixtures.RIDGE * covariance[:4, :4].diagonal().mean() * torch.eye(4)
    narrow = mixtures.bases(covariance, weight, heads=2, width=2)[:4, :2]
    share = narrow @ torch.linalg.solve(narrow.T @ block @ narrow, narrow.T @ block @ weight[:4])
    near = slow.truncated(weight[:4], 2, left=slow.root(block, 0.0))
    assert_close(share, near, rtol=1e-8, atol=1e-8)


def streams(kind):
    model = built(kind)
    sites = cost.sites(model, cost.BLOCK_PARTS)
    blocks = chain.blocks_of(model, every_unit(sites))[1]
    calls = chain.recorded(model, blocks, batches(4))
    return model, sites, blocks, calls, losses.groups_of(calls, 4), importance.measured(model, blocks, calls)


@pytest.mark.parametrize("kind", mostly(KINDS, "vit", "siglip", "dinov2-swiglu"))
def test_a_fit_at_full_widths_is_the_dense_model(kind):
    model, sites, blocks, calls, groups, weights = streams(kind)
    for alternative in (0, -1):
        units = [unit for site in sites for unit in site[alternative]]
        full = {unit.name: unit.full for unit in units}
        whole = sequential.fitted(model, blocks, units, full, calls, groups, weights)
        assert_close(
            out(whole, pictures()), out(model, pictures()), rtol=0.0, atol=1e-5
        )  # ridges that mend singular sums
        half = {unit.name: max(1 + unit.key_bias, unit.full // 2) for unit in units}
        low = sequential.fitted(model, blocks, units, half, calls, groups, weights)
        assert (out(low, pictures()) - out(model, pictures())).abs().max() > 1e-2


@pytest.mark.parametrize("kind", mostly(KINDS, "vit", "siglip", "dinov2-swiglu"))
def test_the_budget_holds_and_the_folder_gives_the_model_back(kind, tmp_path):
    model = built(kind)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small, plan = compress(model, 0.3, batches(4))
    assert plan.method == "output" and plan.format_version == 2
    assert count(small) == plan.parameters_after <= 0.7 * count(model)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert not any(is_compressed(module) for module in model.modules())
    save_compressed(small.float(), plan, tmp_path / "low")
    again, read = load_compressed(tmp_path / "low")
    assert read == plan
    tensors = small.state_dict()
    assert again.state_dict().keys() == tensors.keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in tensors.items())
    single = pictures(dtype=torch.float32)
    assert torch.equal(out(again, single), out(small, single))


def test_random_choices_of_all_kinds_cost_what_their_plan_says():
    chance = random.Random(0)
    model, sites, blocks, calls, groups, weights = streams("dinov2-swiglu")
    for _ in range(4):
        units = [unit for site in sites for unit in chance.choice(site)]
        widths = {unit.name: chance.choice(unit.options()) for unit in units}
        low = sequential.fitted(model, blocks, units, widths, calls, groups, weights)
        fixed = count(model) - sum(unit.dense for unit in units)
        assert count(low) == fixed + cost.parameters(units, widths)


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_exceeds_the_budget_and_nothing_better_fits(seed):
    chance = random.Random(seed)
    sites = []
    for site in range(chance.randint(1, 6)):
        prices = sorted(chance.sample(range(1, 60), chance.randint(1, 8)))
        gains = sorted((chance.random() for _ in prices), reverse=True)
        sites.append([choices.Choice(((f"u{site}", p),), p, g) for p, g in zip(prices, gains, strict=True)])
    least, most = sum(s[0].cost for s in sites), sum(s[-1].cost for s in sites)
    budget = chance.randint(int(least), int(most))
    widths = choices.chosen(sites, budget)
    taken = [next(c for c in s if c.cost == widths[f"u{n}"]) for n, s in enumerate(sites)]
    left = budget - sum(c.cost for c in taken)
    assert left >= 0
    for here, site in zip(taken, sites, strict=True):
        assert not [c for c in site if here.cost < c.cost <= here.cost + left and c.loss < here.loss]


def test_what_is_fitted_to_the_smaller_blocks_is_nearer_than_what_is_only_truncated():
    model, seen = built("dinov2"), batches(8, 16)
    fitted, plan = compress(model, 0.35, seen)
    blind, _ = compress(model, plan=plan)
    one = torch.cat([batch["pixel_values"] for batch in batches(2, 16)]) * 0.9
    off = [float((out(m, one) - out(model, one)).square().mean()) for m in (fitted, blind)]
    assert off[0] < 0.5 * off[1]


def test_a_plan_of_version_1_still_loads(tmp_path):
    model = built("vit").float()
    small, plan = compress(model, 0.3, settings=Settings(method="energy"))
    save_compressed(small, plan, tmp_path / "old")
    text = (tmp_path / "old" / "plan.json").read_text()
    assert text.count('"format_version": 2') == 1
    (tmp_path / "old" / "plan.json").write_text(text.replace('"format_version": 2', '"format_version": 1'))
    again, read = load_compressed(tmp_path / "old")
    assert read.format_version == 1 and torch.equal(
        out(again, pictures(dtype=torch.float32)), out(small, pictures(dtype=torch.float32))
    )


def test_too_few_pictures_for_least_squares_are_refused():
    with pytest.raises(ValueError, match="3 calibration pictures are too few.*at least 8"):
        compress(built("vit"), 0.3, batches(1, 3))


def test_the_method_output_needs_pictures():
    with pytest.raises(ValueError, match="give calibration batches"):
        compress(built("vit"), 0.3, settings=Settings(method="output"))


@pytest.mark.parametrize("kind", mostly(["vit", "dinov2-swiglu"], "vit"))
def test_a_budget_of_multiply_adds_holds_and_every_unit_is_counted_as_it_runs(kind):
    model, one = built(kind), {"pixel_values": pictures(1)}
    whole = cost.multiply_adds(model, one)
    small, plan = compress(model, 0.3, batches(4), settings=Settings(budget="multiply-adds"))
    assert plan.budget == "multiply-adds" and cost.multiply_adds(small, one) <= 0.7 * whole
    model, sites, blocks, calls, groups, weights = streams(kind)
    units = [unit for site in sites for unit in site[0]]
    for widths in ({u.name: None for u in units}, {u.name: max(2, u.full // 2) for u in units}):
        low = sequential.fitted(model, blocks, units, widths, calls, groups, weights)
        more = sum(cost.work(model, u, widths[u.name], 5) - cost.work(model, u, None, 5) for u in units)
        assert cost.multiply_adds(low, one) == whole + more


@pytest.mark.slow
def test_a_budget_of_time_makes_a_faster_model_and_says_what_cannot_be_had():
    # So wide that products take most of the time on every processor, whatever calls cost there
    model = built("vit", hidden_size=512, intermediate_size=2048, num_hidden_layers=1).float()
    seen = batches(2, dtype=torch.float32)
    small, plan = compress(model, 0.15, seen, settings=Settings(budget="latency"))
    one = {"pixel_values": pictures(1, dtype=torch.float32)}
    assert cost.multiply_adds(small, one) < cost.multiply_adds(model, one) and plan.budget == "latency"
    few = Settings(budget="latency", parts=("mlp",))  # the attentions alone take more
    with pytest.raises(ValueError, match="0.95 of the latency cannot be reached.*ask for at most"):
        compress(built("vit", hidden_size=96).float(), 0.95, seen, settings=few)
    with pytest.raises(ValueError, match="energy counts parameters"):
        Settings(method="energy", budget="latency")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "dinov2", "beit"])
def test_an_attention_is_not_run_again_and_gives_what_it_gave(kind):
    _, _, blocks, calls, *_ = streams(kind)
    block, hidden, times = blocks[0], [call.hidden for call in calls], []
    wanted = [chain.run(block, *pair) for pair in zip(calls, hidden, strict=True)]
    layer = next(module for module in block.attention.modules() if isinstance(module, torch.nn.Linear))
    with layer.register_forward_hook(lambda *_: times.append(1)):
        with chain.recalling(block, block.attention, calls, hidden):
            assert len(times) == len(calls)
            found = [chain.run(block, *pair) for pair in zip(calls, hidden, strict=True)]
            assert len(times) == len(calls)
        chain.run(block, calls[0], hidden[0])
        assert len(times) == len(calls) + 1
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_what_keeps_its_widths_repairs_what_does_not():
    model, seen = built("dinov2"), batches(8, 16)
    settings = Settings(parts=("attention",), counted="parts")
    small, plan = compress(model, 0.5, seen, settings=settings)
    assert not any("mlp" in name for name in plan.widths)
    alone = copy.deepcopy(small)
    for ours, theirs in zip(alone.encoder.layer, model.encoder.layer, strict=True):
        ours.mlp = copy.deepcopy(theirs.mlp)
    one = torch.cat([batch["pixel_values"] for batch in batches(2, 16)]) * 0.9
    off = [float((out(m, one) - out(model, one)).square().mean()) for m in (small, alone)]
    assert off[0] < 0.9 * off[1]


@torch.no_grad()
def test_layers_read_the_dense_stream_out_of_a_noisy_one():
    model, _, blocks, calls, groups, weights = streams("dinov2")
    wanted = [call.hidden for call in calls]
    noisy = [hidden + 0.5 * noise(*hidden.shape, seed=n) for n, hidden in enumerate(wanted)]
    name = next(name for name, module in model.named_modules() if module is blocks[0])
    for have in (wanted, noisy):
        small = copy.deepcopy(model)
        block = sequential.Block(small, name, [], {}, calls, groups, weights[0])
        given = block.dense(wanted)[1]["mlp"]
        end, off = block._ends()["mlp"], []
        dense = copy.deepcopy(end.into[0])
        for _ in range(2):
            fed = [chain.inputs_to(block.small, end.into[0], *pair) for pair in zip(calls, have, strict=True)]
            pairs = [(end.into[0](x), dense(one.entered)) for x, one in zip(fed, given, strict=True)]
            off.append(float(sum((found - target).square().mean() for found, target in pairs)))
            block._denoise(end, have, given)
        assert off[1] < 1e-12 if have is wanted else 0 < off[1] < 0.8 * off[0]
