"""A model inside of torch.compile, of PEFT's get_peft_model or of both is the model that it is."""

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from comcat_diffusion import (
    ComcatConfig,
    load_adapter,
    merge_adapters,
    read_adapter,
    save_adapter,
    unload_adapters,
    unmerge_adapters,
)
from comcat_diffusion.adapters.model import adapted_layers, factors
from comcat_diffusion.adapters.parts import bare
from tests.adapter_cases import CLEAR, distance


def pipeline(unet: nn.Module, text_encoder: nn.Module | None = None) -> StableDiffusionPipeline:
    parts = dict.fromkeys(("vae", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler()
    return StableDiffusionPipeline(
        unet=unet, text_encoder=text_encoder, scheduler=scheduler, **parts, requires_safety_checker=False
    )


@pytest.fixture(autouse=True)
def _forget_compiled():
    yield
    torch._dynamo.reset()
    gc.collect()


KINDS = {"free": {}, "foldable": {"foldable": True}, "tied": {"foldable": True, "tied": True}}


@pytest.fixture(params=KINDS)
def kind(request) -> dict:
    return KINDS[request.param]


@pytest.fixture
def config(kind) -> Callable[[], ComcatConfig]:
    """Whose targets and ranks name attentions in full, as a compiled block would change them."""
    targets = r"(down|mid|up)_block.*\.attn2"
    patterns = {} if kind.get("tied") else {"rank_pattern": {r"^mid_block\..*": 4}}
    return lambda: ComcatConfig(r=2, alpha=3.0, target_modules=targets, **patterns, **kind)


@pytest.fixture
def trained(tiny_unet, randomize, config) -> nn.Module:
    unet = tiny_unet()
    unet.add_adapter(config(), "dog")
    return randomize(unet, "dog")


@pytest.fixture
def file(trained, tmp_path):
    save_adapter(pipeline(trained), tmp_path / "dog.safetensors", "dog", "somebody/base")
    return tmp_path / "dog.safetensors"


# Compiled


def in_place(unet: nn.Module) -> nn.Module:
    unet.compile(backend="eager")
    return unet


def blocks_in_place(unet: nn.Module) -> nn.Module:
    unet.compile_repeated_blocks(backend="eager")
    return unet


def as_a_whole(unet: nn.Module) -> nn.Module:
    return torch.compile(unet, backend="eager")


def by_block(unet: nn.Module) -> nn.Module:
    unet.mid_block = torch.compile(unet.mid_block, backend="eager")
    unet.up_blocks[1] = torch.compile(unet.up_blocks[1], backend="eager")
    return unet


def by_attention(unet: nn.Module) -> nn.Module:
    for block in (unet.mid_block, unet.down_blocks[0]):
        layer = block.attentions[0].transformer_blocks[0]
        layer.attn2 = torch.compile(layer.attn2, backend="eager")
    return unet


WAYS = [("tied", in_place), ("free", blocks_in_place), ("tied", as_a_whole), ("free", by_block), ("tied", by_attention)]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind, compiled", WAYS, indirect=["kind"], ids=lambda way: getattr(way, "__name__", way))
def test_a_compiled_unet_is_no_other_model(tiny_unet, trained, file, compiled, tmp_path):
    want, base = tiny_unet.run(trained), tiny_unet.run(tiny_unet())
    pipe = pipeline(compiled(tiny_unet()))
    load_adapter(pipe, file, "dog")
    assert list(adapted_layers(pipe.unet)) == list(adapted_layers(trained))
    assert torch.equal(tiny_unet.run(pipe.unet), want) and distance(want, base) > CLEAR
    save_adapter(pipe, tmp_path / "again.safetensors", "dog", "somebody/base")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
    unload_adapters(pipe)
    assert not adapted_layers(pipe.unet) and not [m for m in pipe.unet.modules() if hasattr(type(m), "host")]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", ["tied"], indirect=True)
def test_what_is_compiled_already_is_compiled_again_for_every_verb(tiny_unet, trained, file):
    want, base = tiny_unet.run(trained), tiny_unet.run(tiny_unet())
    unet = by_attention(tiny_unet())
    assert torch.equal(tiny_unet.run(unet), base)  # before there are adapters
    load_adapter(unet, file, "dog")
    assert torch.equal(tiny_unet.run(unet), want)
    merge_adapters(unet)
    torch.testing.assert_close(tiny_unet.run(unet), want, rtol=0, atol=1e-5)
    unmerge_adapters(unet)
    unet.set_adapters(["dog"], [0.0])
    assert torch.equal(tiny_unet.run(unet), base)
    unload_adapters(unet)
    assert torch.equal(tiny_unet.run(unet), base)


def test_a_compiled_pipeline_is_saved_as_its_base(tiny_unet, file, tmp_path):
    pipe = pipeline(as_a_whole(tiny_unet()))
    load_adapter(pipe, file, "dog")
    pipe.save_pretrained(tmp_path / "base")
    _, report = UNet2DConditionModel.from_pretrained(tmp_path / "base" / "unet", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["free"], indirect=True)
def test_adapters_are_added_to_a_compiled_model(tiny_unet, randomize, config, trained):
    unet = by_block(tiny_unet())
    unet.add_adapter(config(), "dog")
    assert {name: layer.r for name, layer in adapted_layers(randomize(unet, "dog")).items()} == {
        name: layer.r for name, layer in adapted_layers(trained).items()
    }
    with torch.no_grad():
        assert torch.equal(tiny_unet.run(unet), tiny_unet.run(trained))


# Inside of a PeftModel


@torch.no_grad()
def test_what_a_peft_model_saves_a_pipeline_loads(tiny_unet, randomize, config, trained, file, tmp_path):
    pipe = pipeline(tiny_unet())
    pipe.unet = get_peft_model(pipe.unet, config(), "dog").eval()
    randomize(pipe.unet, "dog")
    save_adapter(pipe, tmp_path / "peft.safetensors", "dog", "somebody/base")
    assert (tmp_path / "peft.safetensors").read_bytes() == file.read_bytes()
    assert read_adapter(tmp_path / "peft.safetensors").fingerprint["class"] == "UNet2DConditionModel"
    fresh = pipeline(tiny_unet())
    load_adapter(fresh, tmp_path / "peft.safetensors")
    assert torch.equal(tiny_unet.run(fresh.unet), tiny_unet.run(trained))


@torch.no_grad()
def test_a_file_is_loaded_onto_a_peft_model(tiny_unet, config, trained, file):
    unet, want = tiny_unet(), tiny_unet.run(trained)
    model = get_peft_model(unet, config(), "other").eval()
    pipe = pipeline(model)
    load_adapter(pipe, file, "dog")
    assert model.active_adapters == ["other", "dog"] and list(model.peft_config) == ["other", "dog"]
    # A new adapter adds zero, in free heads as more columns: the same sums in another order.
    torch.testing.assert_close(tiny_unet.run(pipe.unet), want, rtol=0, atol=1e-5)
    model.set_adapter("dog")
    assert torch.equal(tiny_unet.run(pipe.unet), want)
    with model.disable_adapter():
        assert torch.equal(tiny_unet.run(pipe.unet), tiny_unet.run(tiny_unet()))
    model.delete_adapter("other")
    assert torch.equal(tiny_unet.run(pipe.unet), want)
    merge_adapters(pipe)
    torch.testing.assert_close(tiny_unet.run(pipe.unet), want, rtol=0, atol=1e-5)
    unmerge_adapters(pipe)
    unload_adapters(pipe)
    assert pipe.unet is unet and torch.equal(tiny_unet.run(pipe.unet), tiny_unet.run(tiny_unet()))
    load_adapter(pipe, file, "dog")
    assert torch.equal(tiny_unet.run(pipe.unet), want)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["tied"], indirect=True)
def test_a_file_is_loaded_onto_a_peft_model_that_is_compiled_or_holds_what_is(tiny_unet, config, trained, file):
    for unet, outside in ((as_a_whole(tiny_unet()), False), (tiny_unet(), True)):
        model = get_peft_model(unet, config(), "other").eval()
        pipe = pipeline(as_a_whole(model) if outside else model)
        load_adapter(pipe, file, "dog")
        bare(pipe.unet).set_adapters(["dog"])
        assert torch.equal(tiny_unet.run(bare(pipe.unet)), tiny_unet.run(trained))
        unload_adapters(pipe)
        assert pipe.unet is unet


def test_a_file_is_loaded_onto_a_model_by_itself(tiny_unet, config, trained, file):
    model = get_peft_model(tiny_unet(), config(), "other")
    load_adapter(model, file, "dog")
    assert factors(model, "dog").keys() == {f"base_model.model.{name}" for name in factors(trained, "dog")}


def test_what_was_trained_before_is_trained_after_loading(tiny_unet, config, file):
    model = get_peft_model(tiny_unet(), config(), "other")
    load_adapter(model, file, "dog")
    assert all(factor.requires_grad for factor in factors(model, "other").values())
    assert not any(factor.requires_grad for factor in factors(model, "dog").values())
    assert {n for n, p in model.named_parameters() if p.requires_grad} <= {
        f"{n}.weight" for n in _names(model, "other")
    }


def _names(model: nn.Module, adapter: str) -> set[str]:
    return {name for name, _ in model.named_modules() if name.endswith(f".{adapter}")}


def test_a_peft_model_of_loras_says_how_both_go_together(tiny_unet, file):
    unet = tiny_unet()
    pipe = pipeline(get_peft_model(unet, LoraConfig(r=2, target_modules=["to_q"])))
    keys = list(pipe.unet.state_dict())
    with pytest.raises(ValueError, match="inside of a PeftModel of LORA, which takes no adapter of another kind"):
        load_adapter(pipe, file, "dog")
    assert list(pipe.unet.state_dict()) == keys
    pipe.unet = pipe.unet.unload()
    load_adapter(pipe, file, "dog")


def test_the_model_inside_is_found(tiny_unet):
    unet = tiny_unet()
    model = get_peft_model(unet, ComcatConfig(target_modules=["attn2"]))
    for wrapped in (unet, model, as_a_whole(unet), as_a_whole(model), get_peft_model(as_a_whole(tiny_unet()), _lora())):
        assert isinstance(bare(wrapped), UNet2DConditionModel)
    assert isinstance(model, PeftModel) and bare(model) is unet


def _lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["to_q"])


# What is refused leaves nothing


@torch.no_grad()
def test_a_loading_that_fails_half_way_leaves_the_pipeline_as_it_was(tiny_unet, tiny_clip, randomize, tmp_path):
    source = pipeline(tiny_unet(), tiny_clip())
    for model in (source.unet, source.text_encoder):
        model.add_adapter(ComcatConfig(r=2), "dog")
        randomize(model, "dog")
    save_adapter(source, tmp_path / "dog.safetensors", "dog")

    pipe = pipeline(tiny_unet(), tiny_clip())
    pipe.unet.add_adapter(ComcatConfig(r=2, target_modules=["attn1"]), "earlier")
    randomize(pipe.unet, "earlier")
    before, keys = tiny_unet.run(pipe.unet), list(pipe.unet.state_dict())
    attention = pipe.text_encoder.get_submodule("encoder.layers.0.self_attn")
    attention.forward = attention.forward  # as an offloading hook replaces it
    with pytest.raises(ValueError, match="attach adapters before offloading hooks are installed"):
        load_adapter(pipe, tmp_path / "dog.safetensors", "dog")
    assert list(pipe.unet.state_dict()) == keys and torch.equal(tiny_unet.run(pipe.unet), before)
    assert pipe.unet.active_adapters() == ["earlier"] and not adapted_layers(pipe.text_encoder)
    del attention.forward
    load_adapter(pipe, tmp_path / "dog.safetensors", "dog")
    assert pipe.unet.active_adapters() == ["earlier", "dog"]
    assert torch.equal(tiny_clip.run(pipe.text_encoder), tiny_clip.run(source.text_encoder))


REFUSED = {
    "a dot in the name": (lambda unet: unet.add_adapter(ComcatConfig(r=2), "dog.v1"), "cannot have a dot"),
    "no such target": (lambda unet: unet.add_adapter(ComcatConfig(target_modules=["x"]), "dog"), "not found"),
    "no attention": (lambda unet: unet.add_adapter(ComcatConfig(target_modules=["conv_out"]), "dog"), "conv_out"),
    "no module to train whole": (
        lambda unet: unet.add_adapter(ComcatConfig(modules_to_save=["down_blocks"]), "dog"),
        "ModuleList",
    ),
}


@pytest.mark.parametrize("how", REFUSED)
@pytest.mark.parametrize("earlier", [False, True], ids=["bare", "with another"])
def test_a_refused_adapter_does_not_bar_the_next(tiny_unet, randomize, how, earlier):
    unet = tiny_unet()
    if earlier:
        unet.add_adapter(ComcatConfig(r=2, target_modules=["attn1"]), "earlier")
        randomize(unet, "earlier")
    with torch.no_grad():
        before = tiny_unet.run(unet)
    state = {name: copy.copy(vars(module)) for name, module in unet.named_modules()}
    add, message = REFUSED[how]
    with pytest.raises((ValueError, TypeError), match=message):
        add(unet)
    assert list(getattr(unet, "peft_config", {})) == (["earlier"] if earlier else [])
    assert state.keys() == {name for name, _ in unet.named_modules()}
    with torch.no_grad():
        assert torch.equal(tiny_unet.run(unet), before)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "style")
    unet.add_adapter(ComcatConfig(r=2), "dog")
    assert set(unet.peft_config) == {"style", "dog"} | ({"earlier"} if earlier else set())


def test_a_bad_name_is_refused_before_the_pipeline_is_touched(tiny_unet, file):
    pipe = pipeline(tiny_unet())
    with pytest.raises(ValueError, match="call 'dog.v1' for instance 'dog_v1'"):
        load_adapter(pipe, file, "dog.v1")
    assert not hasattr(pipe.unet, "peft_config") and not pipe.unet._hf_peft_config_loaded
    pipe.unet.add_adapter(_lora(), "style")
    load_adapter(pipe, file, "dog_v1")
