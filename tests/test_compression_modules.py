"""The layers of a compressed model: the dense function at full rank, the slow formula below, the host's verbs."""

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

from comcat_diffusion.compression import Settings, compress, cost
from comcat_diffusion.compression.calibrate import calibrate
from comcat_diffusion.compression.compress import replaced
from comcat_diffusion.compression.modules import LowRankAttention, LowRankLinear, is_compressed
from comcat_diffusion.compression.planning import count
from tests import reference_compression as slow
from tests.compression_models import batches, built, out, pictures
from tests.slow import mostly

EXACT = {"rtol": 0.0, "atol": 1e-10}
EAGER = {"rtol": 0.0, "atol": 1e-5}  # transformers' eager attention takes its softmax in float32
FAMILIES = ["vit", "vit-nobias", "deit", "deit-nobias", "clip", "beit"]


def at(model, widths, moments=(), folded=True):
    """The model with the widths of `widths(unit)`."""
    units = cost.units(model)
    chosen = {unit.name: widths(unit) for unit in units}
    return replaced(model, units, dict(moments), chosen, folded)


def half(unit):
    return 1 + unit.full // 2


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("folded", [True, False])
def test_full_rank_equals_the_dense_model(kind, folded):
    dense = built(kind)
    whole = at(dense, lambda unit: unit.full, folded=folded)
    assert_close(out(whole, pictures()), out(dense, pictures()), **EXACT)
    assert all(is_compressed(whole.get_submodule(unit.module)) for unit in cost.units(dense))
    low = at(dense, half)
    assert (out(low, pictures()) - out(dense, pictures())).abs().max() > 1e-2


@pytest.mark.parametrize("kind", mostly(FAMILIES, "vit", "deit-nobias", "clip"))
@pytest.mark.parametrize("folded", [True, False])
def test_full_rank_equals_the_dense_model_when_whitened(kind, folded):
    dense = built(kind)
    moments = calibrate(dense, cost.units(dense), batches(8))
    whole = at(dense, lambda unit: unit.full, moments, folded)
    assert_close(out(whole, pictures()), out(dense, pictures()), **EXACT)


@pytest.mark.parametrize("kind", ["vit", "vit-nobias"])
@pytest.mark.parametrize("qk, vo", [(3, 5), (5, 2), (None, 3), (4, None)])
def test_an_attention_with_two_widths_is_the_slow_formula(kind, qk, vo):
    dense = built(kind)
    bias = kind == "vit"
    widths = {"qk": None if qk is None else qk + bias, "vo": vo}
    low = at(dense, lambda unit: widths.get(unit.product))
    x = torch.randn(2, 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    host, attention = dense.vit.layers[0].attention, low.vit.layers[0].attention
    projections = (host.q_proj, host.k_proj, host.v_proj, host.o_proj)
    with torch.no_grad():
        wanted = slow.attention(x, x, projections, heads=3, qk_rank=qk or 8, vo_rank=vo or 8)
        assert_close(attention(x)[0], wanted, **EXACT)
        assert (attention(x)[0] - host(x)[0]).abs().max() > 1e-3
    assert isinstance(attention, LowRankAttention) and isinstance(attention, type(host))


def test_a_key_bias_holds_at_any_rank():
    """Queries that are all zero leave the key bias alone to decide, and rank 1 must not change it."""
    dense = built("vit")
    low = at(dense, lambda unit: {"qk": 2}.get(unit.product))
    x = torch.randn(2, 7, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for model in (dense, low):
        model.vit.layers[0].attention.q_proj.weight.data.zero_()
    attentions = [model.vit.layers[0].attention for model in (dense, low)]
    assert_close(*[a(x)[0] for a in attentions], **EXACT)
    attentions[1].k_proj.weight.data[1::2].zero_()
    assert (attentions[0](x)[0] - attentions[1](x)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["vit", "deit"])
def test_attention_outputs_and_hidden_states_are_as_in_the_host(kind):
    dense = built(kind)
    dense.set_attn_implementation("eager")
    dense(pictures(2), output_attentions=True)  # installs transformers' hooks before the compression
    for model in (at(dense, lambda unit: unit.full), at(dense, lambda unit: unit.full, folded=False)):
        seen, wanted = (m(pictures(2), output_attentions=True, output_hidden_states=True) for m in (model, dense))
        assert len(seen.attentions) == 2 and len(seen.hidden_states) == 3
        for name in ("attentions", "hidden_states"):
            for ours, theirs in zip(seen[name], wanted[name], strict=True):
                assert_close(ours, theirs, **EAGER)
        fresh = copy.deepcopy(model)
        assert_close(fresh(pictures(2), output_attentions=True).attentions[1], wanted.attentions[1], **EAGER)
    never_asked = at(built(kind), lambda unit: unit.full)
    never_asked.set_attn_implementation("eager")
    assert_close(never_asked(pictures(2), output_attentions=True).attentions[0], wanted.attentions[0], **EAGER)


def test_a_mask_counts_and_both_attention_functions_agree():
    dense = built("vit")
    low = at(dense, half)
    mask = torch.zeros(2, 1, 5, 5, dtype=torch.float64)
    mask[..., 3:] = -torch.inf
    x = torch.randn(2, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    attention, host = low.vit.layers[0].attention, dense.vit.layers[0].attention
    wanted = attention(x, mask)[0]
    changed = x.clone()
    changed[:, 3:] += 1.0
    assert_close(attention(changed, mask)[0][:, :3], wanted[:, :3], **EXACT)  # masked keys are not looked at
    assert (attention(changed)[0][:, :3] - attention(x)[0][:, :3]).abs().max() > 1e-3
    for model in (dense, low):
        model.set_attn_implementation("eager")
    assert_close(attention(x, mask)[0], wanted, **EAGER)
    whole = at(dense, lambda unit: unit.full).vit.layers[0].attention
    assert_close(whole(x, mask)[0], host(x, mask)[0], **EAGER)


def test_dropout_of_the_attention_weights_acts_in_training_only():
    dense = built("vit", attention_probs_dropout_prob=0.5)
    attention = at(dense, half).vit.layers[0].attention
    x = torch.ones(1, 5, 24, dtype=torch.float64)
    assert torch.equal(attention(x)[0], attention(x)[0])
    attention.train()
    with torch.random.fork_rng(devices=[]):
        assert not torch.equal(attention(x)[0], attention(x)[0])


def test_an_attention_function_that_needs_one_width_is_refused():
    attention = at(built("vit"), lambda unit: {"qk": 3, "vo": 5}.get(unit.product)).vit.layers[0].attention
    attention.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2.*sdpa"):
        attention(torch.ones(1, 5, 24, dtype=torch.float64))


def test_copies_pickles_and_precisions():
    low = at(built("vit"), half)
    wanted = out(low, pictures())
    for again in (copy.deepcopy(low), pickle.loads(pickle.dumps(low))):
        assert torch.equal(out(again, pictures()), wanted)
        assert type(again.vit.layers[0].attention) is type(low.vit.layers[0].attention)
    single = out(low.float(), pictures(dtype=torch.float32))
    assert_close(single.double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_dense_model_is_left_as_it_was():
    dense = built("deit")
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    low, plan = compress(dense, 0.3, batches())
    assert plan.parameters_after < plan.parameters_before == count(dense)
    now = dense.state_dict()
    assert before.keys() == now.keys() and all(torch.equal(now[name], tensor) for name, tensor in before.items())
    with torch.no_grad():
        for parameter in low.parameters():
            parameter.fill_(0)
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())  # nothing is shared


def test_gradients_reach_every_factor():
    low = at(built("deit"), half)
    low(pictures()).logits.square().sum().backward()
    parameters = dict(low.named_parameters())
    assert all(
        p.grad is not None and p.grad.abs().max() > 0 for n, p in parameters.items() if "_proj" in n or "mlp" in n
    )
    assert any(isinstance(module, LowRankLinear) for module in low.modules())


def test_matrix_by_matrix_leaves_the_attention_its_class():
    dense = built("vit")
    low, plan = compress(dense, 0.3, batches(), settings=Settings(method="matrix"))
    attention = low.vit.layers[0].attention
    assert type(attention) is type(dense.vit.layers[0].attention) and plan.per_matrix
    assert any(isinstance(getattr(attention, n), LowRankLinear) for n in ("q_proj", "k_proj", "v_proj", "o_proj"))
    again, _ = compress(dense, plan=plan, calibration=batches())
    assert torch.equal(out(again, pictures()), out(low, pictures()))
