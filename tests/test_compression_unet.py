"""Compression of diffusers' attentions: narrower stock Linears, so that all that worked goes on working."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from peft import LoraConfig
from torch.testing import assert_close

from comcat_diffusion import ComcatConfig
from comcat_diffusion.compression import Settings, compress, cost, load_compressed, save_compressed
from comcat_diffusion.compression.calibrate import calibrate
from comcat_diffusion.compression.compress import replaced
from comcat_diffusion.compression.planning import count

PARTS = Settings(counted="parts")
SINGLE = {"rtol": 0.0, "atol": 2e-5}


@pytest.fixture
def calibration(tiny_unet):
    def made(number):
        noise = torch.Generator().manual_seed(number)
        inputs = {name: value.clone() for name, value in tiny_unet.inputs().items()}
        inputs["sample"] = torch.randn(inputs["sample"].shape, generator=noise, dtype=torch.float64)
        inputs["encoder_hidden_states"] = torch.randn(2, 7, 24, generator=noise, dtype=torch.float64)
        return inputs

    return [made(number) for number in range(3)]


def whole(model, moments=None):
    units = cost.units(model, ("attention",))
    return replaced(model, units, moments or {}, {unit.name: unit.full for unit in units})


def test_full_rank_equals_the_dense_unet(tiny_unet, calibration):
    unet = tiny_unet(torch.float64)
    units = cost.units(unet, ("attention",))
    assert len(units) == 8 and {unit.product for unit in units} == {"both"}
    assert_close(tiny_unet.run(whole(unet)), tiny_unet.run(unet), rtol=0, atol=1e-10)
    moments = calibrate(unet, units, calibration)
    assert_close(tiny_unet.run(whole(unet, moments)), tiny_unet.run(unet), rtol=0, atol=1e-10)


def test_text_and_image_sides_are_calibrated_apart(tiny_unet, calibration):
    unet = tiny_unet(torch.float64)
    moments = calibrate(unet, cost.units(unet, ("attention",)), calibration)
    cross = next(name for name in moments if name.endswith("attn2.to_k"))
    texts = torch.cat([batch["encoder_hidden_states"].flatten(0, 1) for batch in calibration])
    assert_close(moments[cross].mean, texts.mean(0), rtol=0, atol=1e-12)
    assert moments[cross].tokens == 42 and moments[cross.replace("to_k", "to_q")].tokens == 384


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_budget_holds_and_calibration_helps(tiny_unet, calibration, calibrated):
    unet = tiny_unet(torch.float64)
    units = cost.units(unet, ("attention",))
    dense = sum(unit.dense for unit in units)
    small, plan = compress(unet, 0.4, calibration if calibrated else None, settings=PARTS)
    assert plan.parameters_after == count(small) <= count(unet) - 0.4 * dense
    assert count(small) > count(unet) - 0.6 * dense and plan.parts == ("attention",)
    error = (tiny_unet.run(small) - tiny_unet.run(unet)).abs().mean()
    assert 1e-4 < error < 0.2


def test_every_processor_gives_the_same_picture(tiny_unet):
    small, _ = compress(tiny_unet(), 0.4, settings=PARTS)
    wanted = tiny_unet.run(small)
    for processor in (AttnProcessor(), AttnProcessor2_0(), SlicedAttnProcessor(1)):
        small.set_attn_processor(processor)
        assert_close(tiny_unet.run(small), wanted, **SINGLE)
    small.set_attn_processor(AttnProcessor2_0())
    small.fuse_qkv_projections()
    assert_close(tiny_unet.run(small), wanted, **SINGLE)


def test_lora_and_comcat_adapters_attach_to_a_compressed_unet(tiny_unet, randomize):
    small, _ = compress(tiny_unet(), 0.4, settings=PARTS)
    wanted = tiny_unet.run(small)
    small.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"]), "style")
    assert_close(tiny_unet.run(small), wanted, **SINGLE)
    small.delete_adapters("style")
    other = copy.deepcopy(compress(tiny_unet(), 0.4, settings=PARTS)[0])
    other.add_adapter(ComcatConfig(r=2, target_modules=["attn1", "attn2"]), "dog")
    assert_close(tiny_unet.run(other), wanted, **SINGLE)
    randomize(other, "dog")
    assert (tiny_unet.run(other) - wanted).abs().max() > 1e-2


def test_an_autoencoders_attention_keeps_its_biases_and_every_processor_agrees(tiny_vae):
    vae = tiny_vae(torch.float64)
    (unit,) = [u for u in cost.units(vae, ("attention",)) if u.module.startswith("encoder")]
    assert unit.key_bias == 1
    for width in (unit.full - 1, 3):
        units = [unit]
        small = replaced(vae, units, {}, {unit.name: width})
        assert count(vae) - unit.dense + unit.parameters(width) == count(small)
        small.set_attn_processor(AttnProcessor())
        one = tiny_vae.run(small)
        small.set_attn_processor(AttnProcessor2_0())
        assert_close(tiny_vae.run(small), one, rtol=0, atol=1e-6)  # the first one takes its softmax in float32
    # A rank below the full one still keeps the key bias whole: with queries of zero nothing else is left.
    attention, before = small.get_submodule(unit.module), vae.get_submodule(unit.module)
    attention.to_v, attention.to_out = before.to_v, before.to_out  # so that only the logits differ
    x = torch.randn(1, 6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = slice(None, 2)
    attention.to_q.weight.zero_()
    before.to_q.weight.zero_()
    heads, wide = attention.heads, attention.to_k.out_features // attention.heads
    logits = attention.to_q(x) @ attention.to_k(x).mT * wide**-0.5
    dense = before.to_q(x) @ before.to_k(x).mT * (before.to_k.out_features // heads) ** -0.5
    assert_close(logits.softmax(-1)[:, rows], dense.softmax(-1)[:, rows], rtol=0, atol=1e-10)
    assert dense.softmax(-1).std() > 1e-3


def test_a_compressed_unet_comes_back_bit_for_bit(tiny_unet, tmp_path):
    small, plan = compress(tiny_unet(), 0.4, settings=PARTS)
    save_compressed(small, plan, tmp_path / "small")
    again, read = load_compressed(tmp_path / "small")
    assert read == plan and torch.equal(tiny_unet.run(again), tiny_unet.run(small))
    again.set_attn_processor(AttnProcessor())  # which reads the scale, not the width
    assert_close(tiny_unet.run(again), tiny_unet.run(small), **SINGLE)


def test_what_does_not_go_on_working_is_refused_by_name(tiny_unet):
    unet = tiny_unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    with pytest.raises(ValueError, match="attn1.*unload or merge"):
        compress(unet, 0.4, settings=PARTS)
    unet = tiny_unet()
    unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        compress(unet, 0.4, settings=PARTS)
    with pytest.raises(ValueError, match=r"parts=\('attention',\)"):
        compress(tiny_unet(), 0.4, settings=Settings(parts=("attention", "mlp")))
    small, _ = compress(tiny_unet(), 0.4, settings=PARTS)
    with pytest.raises(ValueError, match="compressed already"):
        compress(small, 0.4, settings=PARTS)


def test_attentions_that_cannot_be_compressed_stay_and_are_named_in_the_plan(tiny_unet):
    unet = tiny_unet()
    first = next(name for name, module in unet.named_modules() if name.endswith("attn1"))
    unet.get_submodule(first).norm_q = torch.nn.LayerNorm(8)
    small, plan = compress(unet, 0.3, settings=PARTS)
    assert list(plan.skipped) == [first] and "norm_q" in plan.skipped[first]
    assert torch.equal(small.get_submodule(first).to_q.weight, unet.get_submodule(first).to_q.weight)
    assert len(plan.widths) == 7
