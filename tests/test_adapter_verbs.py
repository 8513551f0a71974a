"""The words people know from PEFT, diffusers and transformers, said to our adapter; and what is refused by name."""

import copy
import warnings

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import Attention
from peft import LoraConfig, PeftConfig, PeftType, inject_adapter_in_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn
from torch.testing import assert_close
from transformers import CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPAttention

from comcat_diffusion.adapters import peft_type
from comcat_diffusion.adapters.config import ComcatConfig
from comcat_diffusion.adapters.model import ComcatModel, adapted_layers, default_targets, factors, register

SAME = {"rtol": 0.0, "atol": 1e-10}
CLEAR = 0.01  # an effect on the output this large cannot be rounding


def distance(left: torch.Tensor, right: torch.Tensor) -> float:
    return (left - right).abs().max().item()


@pytest.fixture
def live(tiny_unet, randomize):
    """`live(*names)` gives a float64 UNet with a random adapter of each name, all active."""

    def build(*names: str, foldable: bool = False, dtype: torch.dtype = torch.float64) -> nn.Module:
        unet = tiny_unet(dtype)
        for seed, name in enumerate(names):
            with warnings.catch_warnings():  # PEFT warns of every second adapter, diffusers' way of adding one
                warnings.simplefilter("ignore")
                unet.add_adapter(ComcatConfig(r=3, target_modules=["attn2"], foldable=foldable), name)
            randomize(unet, name, seed)
        unet.set_adapters(list(names))
        return unet

    return build


@pytest.fixture
def pipe(live, tiny_vae, tiny_clip):
    """A pipeline around a live UNet; it needs no tokenizer, since prompts come as embeddings."""
    parts = {"vae": tiny_vae(torch.float64), "text_encoder": tiny_clip(torch.float64), "tokenizer": None}
    parts |= {"scheduler": DDIMScheduler(), "safety_checker": None, "feature_extractor": None}
    made = StableDiffusionPipeline(unet=live("dog"), **parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def latents(pipe: StableDiffusionPipeline, **more) -> torch.Tensor:
    prompt, negative, start = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed, shape in enumerate([(1, 7, 24), (1, 7, 24), (1, 4, 8, 8)])
    )
    embeddings = {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "latents": start}
    return pipe(**embeddings, num_inference_steps=2, output_type="latent", **more).images


# diffusers, transformers and PEFT


@torch.no_grad()
def test_the_pipelines_verbs_reach_the_adapter(pipe, live, tiny_unet):
    bare = StableDiffusionPipeline(**pipe.components | {"unet": tiny_unet(torch.float64)})
    bare.set_progress_bar_config(disable=True)
    strong, base = latents(pipe), latents(bare)
    assert distance(strong, base) > CLEAR
    assert pipe.get_list_adapters() == {"unet": ["dog"]} and pipe.get_active_adapters() == ["dog"]

    pipe.set_adapters(["dog"], [0.5])
    half = latents(pipe)
    assert distance(half, strong) > CLEAR and distance(half, base) > CLEAR
    pipe.set_adapters(["dog"], [1.0])
    assert torch.equal(latents(pipe, cross_attention_kwargs={"scale": 0.5}), half)
    assert torch.equal(latents(pipe), strong)

    pipe.enable_attention_slicing()
    assert_close(latents(pipe), strong, **SAME)
    pipe.disable_attention_slicing()
    pipe.disable_lora()
    assert torch.equal(latents(pipe), base)
    pipe.enable_lora()
    pipe.fuse_lora(components=["unet"])
    assert_close(latents(pipe), strong, **SAME)
    pipe.unfuse_lora(components=["unet"])
    assert torch.equal(latents(pipe), strong)
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe), base)


@torch.no_grad()
def test_unload_lora_removes_the_adapter_and_another_can_follow(live, tiny_unet, randomize):
    unet = live("dog")
    output, base = tiny_unet.run(unet), tiny_unet.run(tiny_unet(torch.float64))
    unet.unload_lora()
    assert torch.equal(tiny_unet.run(unet), base)
    assert list(unet.state_dict()) == list(tiny_unet().state_dict()) and not adapted_layers(unet)
    unet.add_adapter(ComcatConfig(r=3, target_modules=["attn2"]), "dog")
    assert torch.equal(tiny_unet.run(randomize(unet, "dog")), output)
    assert distance(output, base) > CLEAR


@torch.no_grad()
def test_unload_lora_after_fusing_keeps_the_fused_weights(live, tiny_unet):
    unet = live("dog")
    output = tiny_unet.run(unet)
    unet.fuse_lora()
    unet.unload_lora()
    assert not adapted_layers(unet)
    assert_close(tiny_unet.run(unet), output, **SAME)


@torch.no_grad()
def test_a_weight_per_block_scales_only_that_block(live, tiny_unet):
    unet = live("dog")
    unet.set_adapters(["dog"], [{"down": 0.0, "mid": 0.25}])
    scales = {name: layer.scaling["dog"] for name, layer in adapted_layers(unet).items()}
    assert {name.partition("_")[0]: scale for name, scale in scales.items()} == {"down": 0.0, "mid": 0.25, "up": 1.0}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_adapters_on_different_attentions_keep_to_their_own(live, tiny_unet, randomize):
    unet, alone = live("dog"), live("dog")
    unet.add_adapter(ComcatConfig(r=2, target_modules=["attn1"]), "kitten")
    randomize(unet, "kitten", seed=1)
    unet.set_adapters(["dog", "kitten"], [0.5, -0.3])
    both = tiny_unet.run(unet)
    unet.set_adapters(["dog"])
    assert torch.equal(tiny_unet.run(unet), tiny_unet.run(alone))
    unet.set_adapters(["kitten"])
    assert distance(tiny_unet.run(unet), tiny_unet.run(alone)) > CLEAR and distance(tiny_unet.run(unet), both) > CLEAR


@torch.no_grad()
def test_transformers_saves_and_loads_the_adapter_under_any_name(tiny_clip, randomize, tmp_path):
    clip = tiny_clip()
    clip.add_adapter(ComcatConfig(r=3, target_modules=["self_attn"]), "kitten")
    output = tiny_clip.run(randomize(clip, "kitten"))
    assert distance(output, tiny_clip.run(tiny_clip())) > CLEAR
    clip.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "README.md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    for name in ("kitten", "cat"):  # "cat" is part of the prefix "comcat_", which must not matter
        loaded = tiny_clip()
        loaded.load_adapter(str(tmp_path), adapter_name=name)
        assert torch.equal(tiny_clip.run(loaded), output)


def test_a_saved_configuration_is_read_back_without_a_complaint(tmp_path):
    config = ComcatConfig(r=3, alpha=1.5, foldable=True, target_modules={"attn2", "attn1"}, rank_pattern={"mid": 1})
    config.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert PeftConfig.from_pretrained(tmp_path) == config


def test_peft_knows_the_method_by_its_name():
    """Fails if PEFT or the enum module changes what the registration relies on."""
    assert PeftType("COMCAT") is PeftType["COMCAT"] is PeftType.COMCAT is peft_type.COMCAT
    assert PeftType.COMCAT in list(PeftType) and isinstance(PeftType.COMCAT, PeftType) and PeftType.COMCAT == "COMCAT"
    assert copy.deepcopy(PeftType.COMCAT) is PeftType.COMCAT and PeftType.COMCAT.value.lower() == "comcat"
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.COMCAT] is ComcatConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["COMCAT"] is ComcatModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.COMCAT] == "comcat_"
    members = list(PeftType)
    register()
    assert peft_type._extended("COMCAT") is PeftType.COMCAT and list(PeftType) == members


@torch.no_grad()
def test_injection_by_the_names_in_a_file_finds_the_same_attentions(live, tiny_unet):
    source, target = live("dog"), tiny_unet(torch.float64)
    names = {key.replace(".dog.", ".") for key in source.state_dict() if ".comcat." in key}
    config = ComcatConfig(r=3, target_modules=["attn1"])  # overruled by the file's names
    with warnings.catch_warnings():  # PEFT says so
        warnings.simplefilter("ignore")
        inject_adapter_in_model(config, target, "dog", state_dict=dict.fromkeys(names, torch.empty(0)))
    assert list(adapted_layers(target)) == list(adapted_layers(source))


def test_ranks_and_strengths_can_differ_by_module(tiny_unet):
    unet = tiny_unet()
    config = ComcatConfig(r=2, rank_pattern={r"mid_block.*": 5}, alpha_pattern={r"mid_block.*": 10.0})
    unet.add_adapter(config, "dog")
    found = {name.partition("_")[0]: (x.r["dog"], x.scaling["dog"]) for name, x in adapted_layers(unet).items()}
    assert found == {"down": (2, 1.0), "mid": (5, 2.0), "up": (2, 1.0)}


def test_the_default_targets_are_cross_attention_else_every_attention(tiny_unet, tiny_clip, tiny_vit, tiny_vae):
    assert default_targets(tiny_unet()) == ["attn2"]
    assert default_targets(tiny_clip()) == ["self_attn"]
    assert default_targets(tiny_vit()) == ["attention"]
    assert default_targets(tiny_vae()) == [f"{part}.mid_block.attentions.0" for part in ("decoder", "encoder")]
    with pytest.raises(ValueError, match="Linear has no attention that can be adapted"):
        default_targets(nn.Linear(2, 2))


@torch.no_grad()
def test_an_attention_over_pictures_with_norm_and_residual_is_adapted(tiny_vae, randomize):
    vae, base = tiny_vae(torch.float64), tiny_vae.run(tiny_vae(torch.float64))
    vae.add_adapter(ComcatConfig(r=3), "dog")
    assert_close(tiny_vae.run(vae), base, **SAME)
    output = tiny_vae.run(randomize(vae, "dog"))
    assert distance(output, base) > CLEAR
    for layer in adapted_layers(vae).values():
        layer.merge()
    assert_close(tiny_vae.run(vae), output, **SAME)


# Merging, and what happens to the model while merged


@torch.no_grad()
def test_a_model_moved_while_merged_unmerges_where_it_is(live, tiny_unet):
    unet = live("dog", dtype=torch.float32)
    unet.fuse_lora()
    unet.to(torch.float64)  # stands for a move to another device as well
    unet.unfuse_lora()
    still = live("dog", dtype=torch.float32).to(torch.float64)
    assert torch.equal(tiny_unet.run(unet), tiny_unet.run(still))


@torch.no_grad()
def test_an_adapter_added_while_another_is_merged_fits_the_base(live, tiny_unet, randomize):
    unet, alone = live("dog"), live("kitten", foldable=True)
    unet.fuse_lora()
    unet.add_adapter(ComcatConfig(r=3, target_modules=["attn2"], foldable=True), "kitten")
    unet.unfuse_lora()
    unet.set_adapters(["kitten"])
    assert torch.equal(tiny_unet.run(randomize(unet, "kitten")), tiny_unet.run(alone))


@torch.no_grad()
def test_a_failed_merge_changes_nothing(live, tiny_unet):
    unet = live("dog", "bad")
    next(iter(factors(unet, "bad").values())).fill_(float("nan"))
    unet.set_adapters(["dog"])
    unet.fuse_lora()
    before = {name: parameter.data_ptr() for name, parameter in unet.named_parameters()}
    with pytest.raises(ValueError, match=r"NaN or infinity.*nothing changed"):
        unet.fuse_lora(adapter_names=["bad"], safe_fusing=True)
    assert {name: parameter.data_ptr() for name, parameter in unet.named_parameters()} == before
    assert all(layer.merged_adapters == ["dog"] for layer in adapted_layers(unet).values())


@torch.no_grad()
def test_after_a_merged_adapter_is_deleted_another_can_be_merged(live, tiny_unet):
    unet, alone = live("dog", "kitten"), live("dog", "kitten")
    alone.set_adapters(["kitten"])
    unet.set_adapters(["dog"])
    unet.fuse_lora()
    assert distance(tiny_unet.run(unet), tiny_unet.run(alone)) > CLEAR
    unet.delete_adapters("dog")
    unet.set_adapters(["kitten"])
    unet.fuse_lora()
    assert_close(tiny_unet.run(unet), tiny_unet.run(alone), **SAME)
    unet.unfuse_lora()
    assert torch.equal(tiny_unet.run(unet), tiny_unet.run(alone))


@torch.no_grad()
def test_unmerging_never_drops_a_lora_that_came_after_the_merge(live):
    unet = live("dog")
    unet.fuse_lora()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), "style")
    with pytest.raises(ValueError, match="another adapter"):
        unet.unfuse_lora()
    assert [name for name, _ in unet.named_parameters() if "lora_" in name]


# Refusals


class QuantizedLinear(nn.Linear):
    """As bitsandbytes has them: a Linear's subclass with a weight and a forward of its own."""


def with_lora(unet: nn.Module) -> None:
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), "style")
    unet.set_adapters(["dog", "style"])


def with_quantized_keys(unet: nn.Module) -> None:
    for name in adapted_layers(unet):
        unet.get_submodule(name).to_k.__class__ = QuantizedLinear


@pytest.mark.parametrize(
    "prepare, message",
    [
        (with_lora, "of type Linear: it is quantized or wrapped by another adapter"),
        (with_quantized_keys, "of type QuantizedLinear: it is quantized or wrapped"),
        (lambda unet: unet.fuse_qkv_projections(), r"unfuse_qkv_projections\(\) before merging"),
    ],
    ids=["lora", "quantized", "fused projections"],
)
@torch.no_grad()
def test_a_merge_that_cannot_be_exact_is_refused(live, tiny_unet, prepare, message):
    unet = live("dog")
    prepare(unet)
    before = tiny_unet.run(unet)  # the live adapter does work there
    with pytest.raises(ValueError, match=message):
        for layer in adapted_layers(unet).values():
            layer.merge()
    assert torch.equal(tiny_unet.run(unet), before)


def attention(**changes) -> nn.ModuleDict:
    options = {"query_dim": 16, "cross_attention_dim": 24, "heads": 2, "dim_head": 8} | changes
    return nn.ModuleDict({"attn2": Attention(**options)})


class Rotated(CLIPAttention):
    """Stands for the many models whose attentions rotate queries and keys by their position."""

    def forward(self, hidden_states: torch.Tensor, position_embeddings: tuple) -> torch.Tensor:
        raise NotImplementedError


def rotated() -> nn.ModuleDict:
    return nn.ModuleDict({"attention": Rotated(CLIPTextConfig(hidden_size=16, num_attention_heads=2))})


def hooked() -> nn.ModuleDict:
    model = attention()
    add_hook_to_module(model["attn2"], ModelHook())
    return model


@pytest.mark.parametrize(
    "model, target, message",
    [
        (lambda: attention(qk_norm="layer_norm"), "attn2", r"'attn2' \(Attention\).*normalized \(norm_q\)"),
        (lambda: attention(added_kv_proj_dim=8), "attn2", r"added key and value projections \(add_k_proj\)"),
        (lambda: attention(heads=4, kv_heads=2), "attn2", "grouped queries"),
        (lambda: attention(scale_qk=False), "attn2", "scale_qk"),
        (rotated, "attention", r"rotated by position \(position_embeddings\)"),
        (attention, "to_q", r"'attn2.to_q' \(Linear\): it is not an attention"),
        (hooked, "attn2", "before offloading hooks are installed"),
    ],
    ids=["qk-norm", "added kv", "grouped queries", "no logit scale", "rotary", "no attention", "offload hook"],
)
def test_an_attention_that_cannot_be_adapted_is_refused_by_name(model, target, message):
    with pytest.raises(ValueError, match=message):
        inject_adapter_in_model(ComcatConfig(target_modules=[target]), model(), "dog")


def test_a_refused_injection_leaves_the_model_as_it_was(tiny_unet):
    unet = tiny_unet()
    keys = list(unet.state_dict())
    with pytest.raises(ValueError, match=r"'conv_out' \(Conv2d\)"):
        unet.add_adapter(ComcatConfig(target_modules=["attn2", "conv_out"]), "dog")
    assert list(unet.state_dict()) == keys and not adapted_layers(unet)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, "rank must be a whole number of at least 1, not 0"),
        ({"r": -2}, "not -2"),
        ({"r": 2.5}, "not 2.5"),
        ({"r": True}, "not True"),
        ({"rank_pattern": {"mid": 0}}, "not 0"),
        ({"alpha": float("nan")}, "alpha must be a finite number, not nan"),
        ({"alpha": float("inf")}, "not inf"),
        ({"alpha_pattern": {"mid": float("inf")}}, "not inf"),
    ],
)
def test_a_configuration_without_meaning_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ComcatConfig(**options)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(live, tiny_unet, scale):
    unet = live("dog")
    with pytest.raises(ValueError, match="scale of an adapter must be a finite number"):
        unet.set_adapters(["dog"], [scale])
    with pytest.raises(ValueError, match="scale of an adapter must be a finite number"):
        tiny_unet.run(unet, cross_attention_kwargs={"scale": scale})


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_second_adapter_of_the_same_name_is_refused(live):
    unet = live("dog")
    before = factors(unet, "dog")
    with pytest.raises(ValueError, match="dog already exists"):
        unet.add_adapter(ComcatConfig(target_modules=["attn2"]), "dog")
    # PEFT's function says nothing, so the layer must: factors of two kinds under one name mean nothing.
    with pytest.raises(ValueError, match="dog"):
        inject_adapter_in_model(ComcatConfig(target_modules=["attn2"], foldable=True), unet, "dog")
    assert factors(unet, "dog").keys() == before.keys()
