"""What every adapter must do, for each kind on each family of attentions (STYLE point 10)."""

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.testing import assert_close

from comcat_diffusion.adapters.layer import ComcatLayer
from comcat_diffusion.adapters.model import adapted_layers, factors
from tests.adapter_cases import ALPHA, CLEAR, RANK, distance
from tests.reference import FoldableFactors, FreeFactors, attention, of_cores


def set_scales(model: nn.Module, **scales: float) -> None:
    for layer in adapted_layers(model).values():
        for name, scale in scales.items():
            layer.set_scale(name, scale)


def multiply(model: nn.Module, name: str, gain: float, parts: tuple[str, ...]) -> None:
    with torch.no_grad():
        for key, parameter in factors(model, name).items():
            if key.rpartition(".")[2] in parts:
                parameter.mul_(gain)


def weights_of(layer: ComcatLayer, name: str) -> FreeFactors | FoldableFactors:
    """One adapter's factors as the slow formula takes them; the strength is spelled out here, not read off."""
    named = {
        part.removeprefix("comcat_"): getattr(layer, part)[name].weight.detach()
        for part in layer.adapter_layer_names
        if name in getattr(layer, part)
    }
    if "k_mix" in named:
        mixes = named["k_mix"], named["v_mix"]
        return of_cores(layer._plain()[1:3], layer.heads, ALPHA / RANK, mixes, layer.sets[name])
    for text in ("k_down", "v_down"):
        if len(named[text]) == RANK:  # tied: every head has the same
            named[text] = named[text].repeat(layer.heads, 1)
    return (FoldableFactors if "q_core" in named else FreeFactors)(scale=ALPHA / RANK, **named)


@torch.no_grad()
def test_a_new_adapter_changes_nothing(case):
    model = get_peft_model(case.tiny(), case.config(), adapter_name="dog").eval()
    if case.foldable:
        assert torch.equal(case.run(model), case.base(torch.float32))
    else:  # wider heads: the same sums in another order, and in a UNet the rounding of one factor on the keys
        assert_close(case.run(model), case.base(torch.float32), rtol=1e-6, atol=1e-6)
    case.randomize(model, "dog")
    assert distance(case.run(model), case.base(torch.float32)) > CLEAR


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True], ids=["bare", "masked"])
def test_one_attention_matches_the_slow_formula(case, masked):
    model = case.adapted("dog", "cat")
    name, layer = next(iter(adapted_layers(model).items()))
    host = model.get_submodule(name)
    generator = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    projections = layer.style.projections(host)
    for projection in projections[:3]:  # a UNet's have none: diffusers' Attention(bias=True) does
        if projection.bias is None:
            projection.bias = nn.Parameter(noise(projection.out_features))
    q, k, _, _ = projections
    x = noise(2, 6, q.in_features)  # B N C
    context = noise(2, 5, k.in_features) if case.target == "attn2" else x  # B M C
    mask = noise(2, 1, 1, context.shape[1]) if masked else None  # B 1 1 M
    if case.target.startswith("attn"):
        flat = mask[:, :, 0] if masked else None
        got = host(x, encoder_hidden_states=context, attention_mask=flat)
    else:
        got = host(x, attention_mask=mask.expand(-1, 1, 6, -1) if masked else None)[0]
    adapters = tuple(weights_of(layer, adapter) for adapter in ("dog", "cat"))
    assert_close(got, attention(x, context, projections, layer.heads, adapters, mask), rtol=0, atol=1e-11)
    assert distance(got, attention(x, context, projections, layer.heads, adapters[:1], mask)) > 0.1
    assert distance(got, attention(x, context, projections, layer.heads, (), mask)) > 0.1


@torch.no_grad()
def test_unload_gives_back_the_very_model(case):
    base = case.tiny()
    classes = {name: type(module) for name, module in base.named_modules()}
    before = dict(base.named_parameters())
    values = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    output = case.run(base)
    model = get_peft_model(base, case.config(), adapter_name="dog").eval()
    assert distance(case.run(case.randomize(model, "dog")), output) > CLEAR
    assert [n for n, m in base.named_modules() if type(m) is not classes.get(n)]

    back = model.unload()

    assert back is base
    assert {name: type(module) for name, module in back.named_modules()} == classes
    assert all(before[name] is parameter for name, parameter in back.named_parameters())
    assert list(back.state_dict()) == list(values)
    assert all(torch.equal(values[name], tensor) for name, tensor in back.state_dict().items())
    assert torch.equal(case.run(back), output)


def test_training_moves_the_factors_and_nothing_else(case):
    model = get_peft_model(case.tiny(), case.config(), adapter_name="dog").train(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = dict(factors(model, "dog"))
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained.values()}
    optimizer = torch.optim.AdamW({id(p): p for p in trained.values()}.values(), lr=0.02, weight_decay=0.1)
    losses = []
    for _ in range(3):
        loss = (case.run(model) - 1).square().mean()
        loss.backward()
        optimizer.step()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    ids = {id(parameter) for parameter in trained.values()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in ids), name


@torch.no_grad()
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"])
def test_merged_equals_live_and_unmerge_gives_back_the_very_tensors(case, dtype, atol):
    model = case.adapted("dog", "cat", dtype=dtype)
    set_scales(model, dog=0.8, cat=-0.3)
    base = case.base(dtype)
    live = case.run(model)
    before = {name: parameter for name, parameter in model.named_parameters()}
    values = {name: parameter.clone() for name, parameter in before.items()}
    assert distance(live, base) > CLEAR

    model.merge_adapter()
    assert all(layer.merged and not layer.live for layer in adapted_layers(model).values())
    assert_close(case.run(model), live, rtol=0, atol=atol)
    shapes = [parameter.shape for name, parameter in model.named_parameters() if "comcat" not in name]
    assert case.foldable == (shapes == [p.shape for n, p in before.items() if "comcat" not in n])

    model.unmerge_adapter()
    assert list(before) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert parameter is before[name] and torch.equal(parameter, values[name]), name
    assert torch.equal(case.run(model), live)


@torch.no_grad()
def test_merge_and_unload_leaves_a_plain_model_with_the_same_output(case):
    model = case.adapted("dog")
    live = case.run(model)
    merged = model.merge_and_unload()
    assert not adapted_layers(merged) and not [n for n in merged.state_dict() if "comcat" in n]
    assert {type(module) for module in merged.modules()} == {type(module) for module in case.tiny().modules()}
    assert_close(case.run(merged), live, rtol=0, atol=1e-10)
    assert distance(live, case.base()) > CLEAR


@torch.no_grad()
def test_merging_one_adapter_after_another_equals_both_live(case):
    model = case.adapted("dog", "cat")
    live = case.run(model)
    model.merge_adapter(["dog"])
    assert distance(case.run(model), live) > CLEAR
    model.merge_adapter(["cat"])
    assert_close(case.run(model), live, rtol=0, atol=1e-10)


@torch.no_grad()
def test_disabling_a_merged_adapter_gives_the_base_and_enabling_it_gives_it_back(case):
    model = case.adapted("dog")
    live = case.run(model)
    model.merge_adapter()
    with model.disable_adapter():  # as PEFT's own layers, which unmerge
        assert_close(case.run(model), case.base(), rtol=0, atol=1e-10)
    assert_close(case.run(model), live, rtol=0, atol=1e-10)
    assert distance(live, case.base()) > CLEAR


@torch.no_grad()
def test_a_scale_of_zero_is_the_base_bit_for_bit(case):
    model = case.adapted("dog", "cat", dtype=torch.float32)
    assert distance(case.run(model), case.base(torch.float32)) > CLEAR
    set_scales(model, dog=0.0, cat=0.0)
    assert torch.equal(case.run(model), case.base(torch.float32))


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.3, -1.7])
def test_the_scale_is_linear_in_the_deltas(case, scale):
    scaled, multiplied = case.adapted("dog"), case.adapted("dog")
    set_scales(scaled, dog=scale)
    # One factor of each of the two products.
    multiply(multiplied, "dog", scale, ("q_core", "out_core", "k_mix", "v_mix", "q_down", "out_up"))
    assert_close(case.run(scaled), case.run(multiplied), rtol=0, atol=case.close)
    assert distance(case.run(scaled), case.run(case.adapted("dog"))) > CLEAR


@torch.no_grad()
def test_the_strength_is_alpha_over_rank(case):
    by_alpha, by_scale = case.adapted("dog", alpha=2.0 * RANK), case.adapted("dog", alpha=None)
    assert distance(case.run(by_alpha), case.run(by_scale)) > CLEAR
    set_scales(by_scale, dog=2.0)
    assert torch.equal(case.run(by_alpha), case.run(by_scale))


@torch.no_grad()
def test_two_adapters_equal_their_concatenated_ranks(case):
    if case.kind == "cores":
        pytest.skip("a larger core stands between more directions")
    both = case.adapted("dog", "cat")
    set_scales(both, dog=0.8, cat=-0.3)
    one = case.adapted("dog", r=2 * RANK, alpha=2.0 * RANK)  # strength 1: the two strengths go into its factors
    for name, layer in adapted_layers(one).items():
        parts = adapted_layers(both)[name]
        for factor in layer.adapter_layer_names:
            if "dog" not in getattr(layer, factor):
                continue
            pieces = [getattr(parts, factor)[adapter].weight for adapter in ("dog", "cat")]
            if factor in ("comcat_k_down", "comcat_v_down"):
                pieces = [weight * scale * ALPHA / RANK for weight, scale in zip(pieces, (0.8, -0.3), strict=True)]
            axis = 1 if factor == "comcat_out_up" else 0  # where H*R stands
            per_head = [weight.unflatten(axis, (-1, RANK)) for weight in pieces]  # of a tied text side, one for all
            getattr(layer, factor)["dog"].weight.copy_(torch.cat(per_head, dim=axis + 1).flatten(axis, axis + 1))
    assert_close(case.run(one), case.run(both), rtol=0, atol=1e-10)
    assert distance(case.run(case.adapted("dog")), case.run(both)) > CLEAR


@torch.no_grad()
def test_set_disable_enable_and_delete_are_exact(case):
    model = case.adapted("dog", "cat")
    base, both = case.base(), case.run(model)
    alone = {}
    for name in ("dog", "cat"):
        model.set_adapter(name)
        alone[name] = case.run(model)
    outputs = [base, both, *alone.values()]
    assert all(distance(a, b) > CLEAR for i, a in enumerate(outputs) for b in outputs[:i])
    assert torch.equal(alone["dog"], case.run(case.adapted("dog")))

    model.base_model.set_adapter(["dog", "cat"])
    assert torch.equal(case.run(model), both)
    with model.disable_adapter():
        assert torch.equal(case.run(model), base)
    assert torch.equal(case.run(model), both)
    model.delete_adapter("cat")
    assert torch.equal(case.run(model), alone["dog"])
    assert not [key for key in model.state_dict() if ".cat." in key]
    model.delete_adapter("dog")
    assert torch.equal(case.run(model.base_model.model), base)  # a PeftModel itself wants at least one adapter


@torch.no_grad()
def test_factors_saved_from_one_model_and_set_on_another_are_exact(case):
    source, other = case.adapted("dog"), case.adapted("kitten", r=RANK)
    case.randomize(other, "kitten", seed=9)
    saved = get_peft_model_state_dict(source, adapter_name="dog")
    own = set(factors(source, "dog").values())  # each once, however many attentions share it
    assert len(saved) == len(own) and not [key for key in saved if "lora" in key or "dog" in key]
    assert distance(case.run(other), case.run(source)) > CLEAR
    result = set_peft_model_state_dict(other, saved, adapter_name="kitten")
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "comcat" in key]
    assert torch.equal(case.run(other), case.run(source))


@torch.no_grad()
def test_a_saved_peft_model_loads_exactly(case, tmp_path):
    source = case.adapted("dog", dtype=torch.float32)
    source.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.tiny(), tmp_path / "dog").eval()
    config = loaded.peft_config["default"]
    assert (config.r, config.alpha, config.foldable, config.tied) == (RANK, ALPHA, case.foldable, case.kind == "tied")
    assert torch.equal(case.run(loaded), case.run(source))
    assert distance(case.run(loaded), case.base(torch.float32)) > CLEAR
