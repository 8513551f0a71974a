"""Tied adapters: one side for all attentions that read the text, one for the heads of each self-attention."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from comcat_diffusion import ComcatConfig, load_adapter, save_adapter
from comcat_diffusion.adapters.combine import combine
from comcat_diffusion.adapters.model import adapted_layers
from comcat_diffusion.adapters.shrink import least_bytes, shrink
from comcat_diffusion.adapters.store import expected_shapes
from comcat_diffusion.adapters.terms import read_contents

TIED = {"foldable": True, "tied": True, "target_modules": ["attn1", "attn2"]}


@pytest.mark.parametrize("pattern", [{"rank_pattern": {"attn2": 3}}, {"alpha_pattern": {"attn2": 1.0}}])
def test_attentions_that_share_the_text_side_have_one_rank_and_one_strength(tiny_unet, pattern):
    unet = tiny_unet()
    with pytest.raises(ValueError, match="must all read the same one, at the rank and alpha of the whole"):
        unet.add_adapter(ComcatConfig(r=2, **TIED, **pattern), "dog")
    assert not adapted_layers(unet)


def test_attentions_that_read_other_texts_cannot_be_tied():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=(24, 24, 24, 48), block_out_channels=(32, 32, 32, 32))
    with pytest.raises(ValueError, match="must all read the same one"):
        expected_shapes(unet, ComcatConfig(r=2, **TIED | {"target_modules": ["attn2"]}))


def test_a_self_attention_has_a_side_of_its_own_that_its_heads_share(tiny_unet, randomize, tmp_path):
    unet = tiny_unet()
    unet.add_adapter(ComcatConfig(r=3, rank_pattern={"attn1": 1}, alpha_pattern={"attn1": 1.0}, **TIED), "dog")
    randomize(unet, "dog")
    save_adapter(unet, tmp_path / "dog.safetensors", "dog")
    with safe_open(tmp_path / "dog.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    own = {name: m for name, m in unet.named_modules() if name.endswith("attn1")}
    assert len(shapes) == 4 + 4 * len(own) and shapes["unet.tied.k_down"] == (3, 24)
    for name, attention in own.items():
        channels = attention.to_k.in_features
        assert {shapes[f"unet.{name}.{factor}"] for factor in ("k_down", "q_core", "v_down", "out_core")} == {
            (1, channels)
        }
    fresh = tiny_unet()
    load_adapter(fresh, tmp_path / "dog.safetensors")
    assert torch.equal(tiny_unet.run(fresh), tiny_unet.run(unet))
    assert not torch.equal(tiny_unet.run(unet), tiny_unet.run(tiny_unet()))


@torch.no_grad()
def test_a_tied_adapter_shrinks_side_by_side(tiny_unet, randomize, tmp_path):
    unet, base = tiny_unet(), tiny_unet.run(tiny_unet())
    unet.add_adapter(ComcatConfig(r=3, rank_pattern={"attn1": 1}, **TIED), "dog")
    randomize(unet, "dog")
    save_adapter(unet, tmp_path / "dog.safetensors", "dog")
    whole, errors = (tmp_path / "dog.safetensors").stat().st_size, []
    least = least_bytes(read_contents(tmp_path / "dog.safetensors"))
    for size in (whole, (whole + least) // 2, least):
        made = shrink(tmp_path / "dog.safetensors", tmp_path / "small.safetensors", size)
        assert made.bytes <= size and (tmp_path / "small.safetensors").stat().st_size == made.bytes
        fresh = tiny_unet()
        load_adapter(fresh, tmp_path / "small.safetensors")
        effect = (tiny_unet.run(unet) - base).norm()
        errors.append(float((tiny_unet.run(fresh) - tiny_unet.run(unet)).norm() / effect))
        again = shrink(tmp_path / "small.safetensors", tmp_path / "again.safetensors", size)
        assert again.bytes <= size and 1 - again.energy_kept < 1.5 * (1 - made.energy_kept) + 1e-5
    assert errors[0] < 0.03 and errors == sorted(errors) and 0.1 < errors[2] < 1.5


def test_tied_adapters_of_one_shape_combine_and_of_two_do_not(tiny_unet, randomize, tmp_path):
    files = {}
    for name, targets in (("dog", ["attn1", "attn2"]), ("cat", ["attn1", "attn2"]), ("text", ["attn2"])):
        unet = tiny_unet()
        unet.add_adapter(ComcatConfig(r=2, **TIED | {"target_modules": targets}), "one")
        randomize(unet, "one", len(files))
        files[name] = tmp_path / f"{name}.safetensors"
        save_adapter(unet, files[name], "one")
    both = combine([(files["dog"], 0.5), (files["cat"], 2.0)], tmp_path / "both.safetensors")
    load_adapter(fresh := tiny_unet(), tmp_path / "both.safetensors")
    side_by_side = tiny_unet()
    load_adapter(side_by_side, files["dog"], "dog")
    load_adapter(side_by_side, files["cat"], "cat")
    side_by_side.set_adapters(["dog", "cat"], [0.5, 2.0])
    assert both.rank == 4
    torch.testing.assert_close(tiny_unet.run(fresh), tiny_unet.run(side_by_side), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="are tied and adapt different attentions"):
        combine([(files["dog"], 1.0), (files["text"], 1.0)], tmp_path / "mixed.safetensors")
    unet = tiny_unet()
    unet.add_adapter(ComcatConfig(r=2, target_modules=["attn2"]), "one")
    randomize(unet, "one")
    save_adapter(unet, tmp_path / "free.safetensors", "one")
    with pytest.raises(ValueError, match="are of different kinds, tied and free"):
        combine([(files["dog"], 1.0), (tmp_path / "free.safetensors", 1.0)], tmp_path / "mixed.safetensors")
    assert not (tmp_path / "mixed.safetensors").exists()


@torch.no_grad()
@pytest.mark.parametrize("light", [False, True])
def test_what_peft_saves_has_the_text_side_once(light, tiny_unet, randomize, tmp_path):
    """A folder that has it once for each attention, as they were, loads as well."""
    model = get_peft_model(tiny_unet(), ComcatConfig(r=3, **TIED))
    wanted = tiny_unet.run(randomize(model, "default"))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    crossed = len([name for name, _ in tiny_unet().named_modules() if name.endswith("attn2")])
    assert sum(".attn2.comcat.comcat_k_down" in name for name in saved) == 1
    assert sum(".attn2.comcat.comcat_q_core" in name for name in saved) == crossed > 1
    assert torch.equal(tiny_unet.run(PeftModel.from_pretrained(tiny_unet(), tmp_path, low_cpu_mem_usage=light)), wanted)
    layers = adapted_layers(model)
    for name, layer in layers.items():
        for factor in ("k_down", "v_down"):
            key = f"base_model.model.{name.removeprefix('base_model.model.')}.comcat.comcat_{factor}.weight"
            saved[key] = getattr(layer, f"comcat_{factor}")["default"].weight.clone()
    assert sum(".attn2.comcat.comcat_k_down" in name for name in saved) == crossed
    save_file(saved, tmp_path / "adapter_model.safetensors")
    assert torch.equal(tiny_unet.run(PeftModel.from_pretrained(tiny_unet(), tmp_path, low_cpu_mem_usage=light)), wanted)
