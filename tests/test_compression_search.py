"""The paper's search: the mixture as a mask, planted ranks found, the budget held, a run that goes on."""

import itertools
import multiprocessing
import os
import socket
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.testing import assert_close

from comcat_diffusion.compression import SearchSettings, Settings, compress, cost, search_ranks
from comcat_diffusion.compression.calibrate import calibrate
from comcat_diffusion.compression.compress import replaced
from comcat_diffusion.compression.finetune import Distillation
from comcat_diffusion.compression.gates import Gate, candidate_widths
from comcat_diffusion.compression.planning import count
from comcat_diffusion.compression.rank_search import RankSearch, split
from tests import reference_compression as slow
from tests.compression_models import batches, built, out, pictures
from tests.slow import mostly

SHORT = SearchSettings(steps=20, learning_rate=0.1)
SOFT = Distillation(hard=0, soft=1.0, temperature=1.0)
PLANTED = {"layers.0": {"qk": 3, "vo": 4, "fc1": 6, "fc2": 3}, "layers.1": {"qk": 6, "vo": 2, "fc1": 3, "fc2": 8}}


def searched(model, search, budget=0.4, moments=None):
    units = cost.units(model)
    dense = sum(unit.dense for unit in units)
    return RankSearch(model, units, moments or {}, dense - int(budget * count(model)), search, 1)


@pytest.mark.parametrize("kind", ["vit", "deit-nobias"])
@pytest.mark.parametrize("whitened", [False, True])
def test_gates_that_have_decided_are_the_truncated_model(kind, whitened):
    """A search ends as a compression begins: masks of ones and zeros are a truncation, biases and all."""
    model = built(kind)
    moments = calibrate(model, cost.units(model), batches()) if whitened else {}
    search = searched(model, SHORT, moments=moments)
    search.gates.double()
    widths = {}
    for unit, gate in zip(search.units, search.gates, strict=True):
        choice = len(gate.widths) // 2
        gate.chosen = torch.nn.functional.one_hot(torch.tensor(choice), len(gate.widths)).double()
        widths[unit.name] = gate.widths[choice]
    low = replaced(model, search.units, moments, widths)
    assert_close(out(search.model, pictures()), out(low, pictures()), rtol=0, atol=1e-10)
    assert (out(low, pictures()) - out(model, pictures())).abs().max() > 1e-2
    expected = sum(gate.expected_cost for gate in search.gates)
    assert expected == cost.parameters(search.units, widths)


def test_a_masked_head_is_the_mixture_of_the_candidates_of_that_head():
    model = built("vit")
    search = searched(model, SHORT)
    search.gates.double()
    for gate in search.gates:
        gate.draw(1.0, torch.Generator().manual_seed(3))
    number, unit = next((n, u) for n, u in enumerate(search.units) if u.product == "vo")
    gate, attention = search.gates[number], search.model.get_submodule(unit.module)
    host = model.get_submodule(unit.module)
    x = torch.eye(24, dtype=torch.float64).unsqueeze(0)
    seen = attention.v_proj(x)[0]  # 24, H*D: the masked first factors
    ranks = [8 if width is None else width for width in gate.widths]
    for head in range(3):
        columns = slice(8 * head, 8 * head + 8)
        got = seen[:, columns] @ attention.o_proj.weight[:, columns].T
        matrix = slow.vo_matrix(host.v_proj.weight, host.o_proj.weight, head, 3)
        assert_close(got, slow.mixture(matrix, ranks, gate.chosen), rtol=0, atol=1e-12)


def test_the_chances_are_gumbels():
    """Over many draws the likeliest candidate is drawn as often as softmax(alpha) says, whatever the temperature."""
    unit = cost.units(built("vit"))[0]
    gate = Gate(unit, candidate_widths(unit, 3))
    with torch.no_grad():
        gate.alpha.copy_(torch.tensor([0.0, 1.0, -1.0, 0.5]))
    generator, draws = torch.Generator().manual_seed(0), torch.zeros(4)
    for _ in range(4000):
        gate.draw(0.1, generator)
        draws[gate.chosen.argmax()] += 1
    assert_close(draws / 4000, gate.alpha.detach().softmax(0), rtol=0, atol=0.03)


def test_the_temperature_falls_from_5_to_a_tenth():
    search = SearchSettings(steps=30)
    falling = [search.temperature(step) for step in range(30)]
    assert falling[0] == 5 and falling[-1] == pytest.approx(0.1)
    ratios = [after / before for before, after in itertools.pairwise(falling)]
    assert max(ratios) == pytest.approx(min(ratios)) and max(ratios) < 1


@pytest.mark.parametrize("number", [1, 3, 8])
def test_candidates_reach_from_small_to_break_even_and_dense(number):
    for unit in cost.units(built("vit", hidden_size=48, intermediate_size=96)):
        *widths, dense = candidate_widths(unit, number)
        assert dense is None and len(widths) == min(number, len(unit.options()) - 1)
        assert widths == sorted(set(widths)) and widths[-1] == unit.options()[-2]


def planted():
    """A model whose products have the ranks of PLANTED, with equal singular values, and layers that all matter."""
    model = built("vit", num_hidden_layers=2, initializer_range=0.4)
    generator = torch.Generator().manual_seed(0)

    def low(weight, rank):
        u, _ = torch.linalg.qr(torch.randn(weight.shape[0], rank, generator=generator, dtype=torch.float64))
        v, _ = torch.linalg.qr(torch.randn(weight.shape[1], rank, generator=generator, dtype=torch.float64))
        weight.copy_(3.0 * u @ v.T)

    with torch.no_grad():
        for name, ranks in PLANTED.items():
            layer = model.vit.get_submodule(name)
            attention = layer.attention
            for head in range(3):
                rows = slice(8 * head, 8 * head + 8)
                low(attention.q_proj.weight[rows], ranks["qk"] - 1)  # a column is the key bias
                low(attention.k_proj.weight[rows], 8)
                low(attention.v_proj.weight[rows], ranks["vo"])
                low(attention.o_proj.weight[:, rows], 8)
            low(layer.mlp.fc1.weight, ranks["fc1"])
            low(layer.mlp.fc2.weight, ranks["fc2"])
    return model


@pytest.mark.slow
def test_the_search_finds_planted_ranks():
    model = planted()
    units = {unit.name: unit for unit in cost.units(model, ("attention", "mlp"))}
    wanted = {}
    for name, ranks in PLANTED.items():
        for key, width in ranks.items():
            wanted[f"vit.{name}.attention:{key}" if len(key) == 2 else f"vit.{name}.mlp.{key}"] = width
    assert wanted.keys() == units.keys()
    budget = cost.parameters(units.values(), wanted)
    reduction = (sum(unit.dense for unit in units.values()) - budget) / count(model)
    settings = Settings(method="search", parts=("attention", "mlp"))
    search = SearchSettings(steps=150, learning_rate=0.1, candidates=50, distillation=SOFT)
    plan = search_ranks(model, batches(8, 16), reduction - 1e-9, settings, search)
    assert plan.widths == wanted
    low, _ = compress(model, plan=plan)
    assert_close(out(low, pictures()), out(model, pictures()), rtol=0, atol=1e-5)
    uniform, _ = compress(model, reduction - 1e-9, settings=Settings(method="uniform", parts=settings.parts))
    assert (out(uniform, pictures()) - out(model, pictures())).abs().max() > 0.1


@pytest.mark.parametrize("kind", mostly(["vit", "deit"], "deit"))
def test_a_search_ends_on_the_budget_and_lowers_its_loss(kind):
    model = built(kind)
    plan = search_ranks(model, batches(6, labels=True), 0.44, search=SHORT)
    low, again = compress(model, plan=plan, calibration=batches())
    assert again is plan and plan.method == "search"
    assert count(low) == plan.parameters_after <= 0.56 * count(model)
    assert plan.parameters_after > 0.5 * count(model)


@pytest.mark.slow
def test_the_penalty_brings_the_expected_cost_down_to_the_budget():
    model = built("vit")
    search = searched(model, replace(SHORT, steps=80), budget=0.6)
    records = list(search.steps(batches(), 80, Accelerator(cpu=True), Distillation()))
    assert [record.step for record in records] == list(range(1, 81))
    assert records[0].expected_parameters > 1.1 * search.budget
    last = sum(record.expected_parameters for record in records[-10:]) / 10
    assert last < 1.1 * search.budget and last < 0.9 * records[0].expected_parameters


def test_only_gates_are_trained_and_the_model_stays_as_it_was():
    model = built("vit").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    search = searched(model, SHORT)
    inner = {name: tensor.clone() for name, tensor in search.model.state_dict().items()}
    list(search.steps(batches(), 3, Accelerator(cpu=True), SOFT))
    assert all(torch.equal(t, inner[n]) for n, t in search.model.state_dict().items())
    assert all(gate.alpha.abs().max() > 0.01 for gate in search.gates if len(gate.widths) > 1)
    search_ranks(model, batches(), 0.3, search=replace(SHORT, steps=2))
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_search_that_goes_on_is_the_search_that_never_stopped():
    model, accelerator = built("vit"), Accelerator(cpu=True)
    whole = searched(model, SHORT)
    records = list(whole.steps(batches(), 6, accelerator, SOFT))
    first = searched(model, SHORT)
    list(first.steps(batches(), 4, accelerator, SOFT))
    second = searched(model, SHORT)
    second.load_state_dict(first.state_dict())
    more = list(second.steps(batches(), 2, accelerator, SOFT))
    assert more == records[4:]
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in second.state_dict().items())
    other = searched(built("vit", num_hidden_layers=1), SHORT)
    with pytest.raises(ValueError, match="another model or other candidates"):
        other.load_state_dict(first.state_dict())


def test_a_state_file_is_taken_up_and_another_searchs_refused(tmp_path):
    model, path = built("vit"), tmp_path / "search.safetensors"
    search = replace(SHORT, steps=6, state_path=str(path), state_steps=4)
    plan = search_ranks(model, batches(), 0.4, search=search)
    before = path.read_bytes()
    assert search_ranks(model, batches(), 0.4, search=search) == plan  # nothing is left to do
    assert path.read_bytes() == before
    assert search_ranks(model, batches(), 0.4, search=replace(search, state_path=None)) == plan
    for other, reduction in ((model, 0.5), (built("vit", seed=1), 0.4)):
        with pytest.raises(ValueError, match="state of another search"):
            search_ranks(other, batches(), reduction, search=search)


def test_the_held_out_batches_are_not_those_that_calibrate():
    seen, held_out = split(list(range(10)), 0.3)
    assert len(held_out) == 3 and sorted(seen + held_out) == list(range(10))
    with pytest.raises(ValueError, match="too few"):
        split([1], 0.5)


def _process(rank, port, path):
    """One of two processes over the batches of both; the first one writes where the gates have come to."""
    about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in about.items()} | {"ACCELERATE_USE_CPU": "true"})
    torch.set_num_threads(1)  # a forked process has no pool of threads
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, search = Accelerator(cpu=True), searched(built("vit"), SHORT)
    records = list(search.steps(batches(6), 3, accelerator, SOFT))
    if accelerator.is_main_process:
        torch.save([search.state_dict(), [record.loss for record in records]], path)
    torch.distributed.destroy_process_group()


def test_two_processes_are_one_with_their_batches_together(tmp_path):
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [context.Process(target=_process, args=(rank, port, tmp_path / "state.pt")) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    state, losses = torch.load(tmp_path / "state.pt")
    pairs = zip(batches(6)[::2], batches(6)[1::2], strict=True)
    together = [{"pixel_values": torch.cat([one["pixel_values"] for one in pair])} for pair in pairs]
    one = searched(built("vit"), SHORT)
    records = list(one.steps(together, 3, Accelerator(cpu=True), SOFT))
    # The gates are in float32 and all of them stand in every loss: a rounding each, relative to the loss.
    rounding = sum(gate.alpha.numel() for gate in one.gates) * torch.finfo(torch.float32).eps
    assert losses == pytest.approx([record.loss for record in records], rel=rounding, abs=0)
    for name, value in one.state_dict().items():
        assert_close(state[name], value, rtol=0, atol=rounding)
    alone = searched(built("vit"), SHORT)
    list(alone.steps(batches(6), 3, Accelerator(cpu=True), SOFT))
    assert max((state[n] - v).abs().max() for n, v in alone.state_dict().items()) > 1e-3


def test_a_search_over_a_unet(tiny_unet):
    unet = tiny_unet()
    inputs = [{n: t.float() if t.is_floating_point() else t for n, t in tiny_unet.inputs().items()}] * 2
    settings = Settings(method="search", counted="parts")
    plan = search_ranks(unet, inputs, 0.4, settings, replace(SHORT, steps=4))
    small, _ = compress(unet, plan=plan, calibration=inputs)
    dense = sum(unit.dense for unit in cost.units(unet, ("attention",)))
    assert count(unet) - count(small) >= 0.4 * dense
    assert 1e-5 < (tiny_unet.run(small) - tiny_unet.run(unet)).abs().mean() < 0.2


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"held_out": 0.0}, {"held_out": 1.0}, {"last_temperature": 0.0}, {"candidates": 0}]
)
def test_search_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError):
        SearchSettings(**wrong)
