"""Modules that an adapter trains whole (PEFT's modules_to_save): in its file, acting with it, gone with it."""

import warnings

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

from comcat_diffusion import load_adapter, read_adapter, save_adapter, unload_adapters
from comcat_diffusion.adapters.combine import combine
from comcat_diffusion.adapters.fingerprint import fingerprint
from comcat_diffusion.adapters.header import AdapterFileError
from comcat_diffusion.adapters.merge import bake_adapters
from comcat_diffusion.adapters.model import adapted_layers
from comcat_diffusion.adapters.shrink import shrink
from comcat_diffusion.adapters.wholes import wrappers
from comcat_diffusion.export.lora import export_adapter
from tests.adapter_cases import CLEAR, Case, distance

SAME = {"rtol": 0.0, "atol": 1e-10}


def train(model: nn.Module, adapter_name: str, by: float = 0.3) -> nn.Module:
    """Stands for training: the copy of every module that the adapter trains whole moves."""
    copies = [w.modules_to_save[adapter_name] for w in wrappers(model).values() if adapter_name in w.modules_to_save]
    assert copies
    with torch.no_grad():
        for copy in copies:
            for parameter in copy.parameters():
                parameter += by
    return model


@pytest.fixture
def case(any_case) -> Case:
    return any_case


@pytest.fixture
def wrapped(case):
    """`wrapped(*names)` is a PeftModel with random adapters that have trained a module whole, the last one active."""

    def build(*names: str, dtype: torch.dtype = torch.float64) -> PeftModel:
        model = case.tiny(dtype)
        for seed, name in enumerate(names):
            config = case.config(modules_to_save=[case.whole])
            if seed == 0:
                model = get_peft_model(model, config, adapter_name=name)
            else:
                model.add_adapter(name, config)
            train(case.randomize(model, name, seed), name, by=0.3 + 0.2 * seed)
        model.set_adapter(names[-1])
        return model.eval()

    return build


# PEFT's verbs


@torch.no_grad()
def test_unload_gives_back_the_very_module(case, wrapped):
    base, output = case.tiny(), case.base()
    original = base.get_submodule(case.whole)
    values = {name: value.clone() for name, value in original.state_dict().items()}
    model = get_peft_model(base, case.config(modules_to_save=[case.whole]), "dog").eval()
    train(case.randomize(model, "dog"), "dog")
    assert distance(case.run(model), case.base(torch.float32)) > CLEAR
    assert model.unload() is base and base.get_submodule(case.whole) is original
    assert all(torch.equal(values[name], value) for name, value in original.state_dict().items())
    assert list(base.state_dict()) == list(case.tiny().state_dict())
    assert torch.equal(case.run(wrapped("dog").unload()), output)
    assert torch.equal(case.run(wrapped("dog", "cat").unload()), output)


@torch.no_grad()
def test_merge_and_unload_keeps_what_acts(case, wrapped):
    model = wrapped("dog", "cat")
    live = case.run(model)
    merged = model.merge_and_unload()
    assert_close(case.run(merged), live, **SAME)
    assert not adapted_layers(merged) and not wrappers(merged)
    assert list(merged.state_dict()) == list(case.tiny().state_dict())
    assert distance(live, case.run(wrapped("dog"))) > CLEAR and distance(live, case.base()) > CLEAR


@torch.no_grad()
def test_what_is_saved_by_peft_is_loaded_by_peft(case, wrapped, tmp_path):
    model = wrapped("dog", "cat", dtype=torch.float32)
    outputs = {}
    for name in ("dog", "cat"):
        model.set_adapter(name)
        outputs[name] = case.run(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(case.tiny(), tmp_path / "dog", adapter_name="one").eval()
    assert torch.equal(case.run(loaded), outputs["dog"])
    loaded.load_adapter(tmp_path / "cat", "two")
    assert torch.equal(case.run(loaded), outputs["dog"])
    loaded.set_adapter("two")
    assert torch.equal(case.run(loaded), outputs["cat"])
    assert distance(outputs["dog"], outputs["cat"]) > CLEAR


@torch.no_grad()
def test_disabling_and_deleting_leave_nothing_acting(case, wrapped):
    model, alone = wrapped("dog", "cat"), wrapped("dog")
    both = case.run(model)
    with model.disable_adapter():
        assert torch.equal(case.run(model), case.base())
    assert torch.equal(case.run(model), both)
    model.delete_adapter("cat")
    model.set_adapter("dog")
    assert torch.equal(case.run(model), case.run(alone)) and not [k for k in model.state_dict() if ".cat." in k]
    model.delete_adapter("dog")
    base = model.base_model.model
    assert torch.equal(case.run(base), case.base()) and not wrappers(base)


def test_two_copies_of_one_module_do_not_act_together(case, wrapped):
    model = wrapped("dog", "cat")
    for activate in (model.base_model.set_adapter, next(iter(adapted_layers(model).values())).set_adapter):
        with pytest.raises(ValueError, match=r"[Oo]nly one"):
            activate(["dog", "cat"])
    model.set_adapter("dog")


# Our own file


@torch.no_grad()
def test_the_file_holds_what_was_trained_whole(case, tmp_path):
    source, target = case.tiny(), case.tiny()
    for model in (source, target):
        model.add_adapter(case.config(), "earlier")
    with warnings.catch_warnings():  # PEFT warns of every second adapter, diffusers' own way of adding one
        warnings.simplefilter("ignore")
        source.add_adapter(case.config(modules_to_save=[case.whole]), "dog")
    train(case.randomize(source, "dog"), "dog")
    for layer in adapted_layers(source).values():
        layer.set_adapter(["earlier", "dog"])
    output = case.run(source)
    save_adapter(source, tmp_path / "dog.safetensors", "dog")
    assert read_adapter(tmp_path / "dog.safetensors").format_version == 1
    load_adapter(target, tmp_path / "dog.safetensors", "hund")
    assert torch.equal(case.run(target), output) and distance(output, case.base(torch.float32)) > CLEAR
    assert not any(parameter.requires_grad for w in wrappers(target).values() for parameter in w.parameters())
    target.disable_adapters()
    assert torch.equal(case.run(target), case.base(torch.float32))
    target.enable_adapters()
    assert torch.equal(case.run(target), output)
    save_adapter(target, tmp_path / "again.safetensors", "hund")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "dog.safetensors").read_bytes()
    unload_adapters(target)
    assert torch.equal(case.run(target), case.base(torch.float32)) and not wrappers(target)


@pytest.fixture
def unet_case(tiny_unet, randomize) -> Case:
    return Case(tiny_unet, "attn2", "foldable", randomize)


@pytest.fixture
def file(unet_case, tmp_path):
    """A file of an adapter that has trained conv_out and the first norm of a block whole."""
    unet = unet_case.tiny()
    unet.add_adapter(unet_case.config(modules_to_save=["conv_out", "mid_block.resnets.0.norm1"]), "dog")
    train(unet_case.randomize(unet, "dog"), "dog")
    save_adapter(unet, tmp_path / "dog.safetensors", "dog")
    return tmp_path / "dog.safetensors"


def test_a_file_without_whole_modules_is_what_it_was(unet_case, tmp_path):
    unet = unet_case.tiny()
    unet.add_adapter(unet_case.config(), "dog")
    save_adapter(unet, tmp_path / "dog.safetensors", "dog")
    assert "modules_to_save" not in read_adapter(tmp_path / "dog.safetensors").config["unet"]


BROKEN = {
    "lacks: whole.unet.conv_out.bias": lambda tensors: tensors.pop("whole.unet.conv_out.bias"),
    "unknown tensors: whole.unet.conv_in.bias": lambda t: t.update({"whole.unet.conv_in.bias": torch.zeros(2)}),
    r"misshapen tensors: whole.unet.conv_out.bias \(3,\)": lambda t: t.update(
        {"whole.unet.conv_out.bias": torch.zeros(3)}
    ),
    "NaN or infinity in whole.unet.conv_out.bias": lambda t: t["whole.unet.conv_out.bias"].fill_(float("nan")),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_damaged_whole_module_is_refused_and_nothing_touched(unet_case, file, message):
    with safetensors.safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = safetensors.torch.load_file(file)
    BROKEN[message](tensors)
    safetensors.torch.save_file(tensors, file, metadata)
    unet = unet_case.tiny()
    with pytest.raises(AdapterFileError, match=message):
        load_adapter(unet, file)
    assert not adapted_layers(unet) and not wrappers(unet) and not hasattr(unet, "peft_config")


def test_what_has_no_low_rank_form_of_it_says_so(file, tmp_path):
    target = tmp_path / "out.safetensors"
    for use in (
        lambda: shrink(file, target, 10**6),
        lambda: combine([(file, 1.0)], target),
        lambda: export_adapter(file, target),
    ):
        with pytest.raises(
            AdapterFileError, match=r"whole modules \(conv_out, mid_block.resnets.0.norm1\).*load_adapter"
        ):
            use()
    assert not target.exists()


@torch.no_grad()
def test_a_second_copy_of_a_module_is_refused_and_the_first_acts_on(unet_case, file):
    unet = unet_case.tiny()
    load_adapter(unet, file, "dog")
    output = unet_case.run(unet)
    with pytest.raises(ValueError, match="Only one of dog, cat can act at a time"):
        load_adapter(unet, file, "cat")
    assert torch.equal(unet_case.run(unet), output) and list(unet.peft_config) == ["dog"]
    unet.disable_adapters()
    assert torch.equal(unet_case.run(unet), unet_case.base(torch.float32))


def test_a_trained_block_does_not_hide_the_base(unet_case, tmp_path):
    unet = unet_case.tiny()
    before = fingerprint(unet, "epsilon")
    unet.add_adapter(unet_case.config(modules_to_save=["mid_block"]), "dog")
    train(unet, "dog")
    assert fingerprint(unet, "epsilon") == before
    save_adapter(unet, tmp_path / "dog.safetensors", "dog")
    fresh = unet_case.tiny()
    load_adapter(fresh, tmp_path / "dog.safetensors", "dog")
    with torch.no_grad():
        assert torch.equal(unet_case.run(fresh), unet_case.run(unet))


# diffusers' verbs, which know layers only


@pytest.fixture
def two(unet_case):
    """A U-Net with the adapters dog, which has trained conv_out whole, and cat, which has not."""
    unet = unet_case.tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed, name in enumerate(("dog", "cat")):
            unet.add_adapter(unet_case.config(modules_to_save=["conv_out"] if name == "dog" else None), name)
            unet_case.randomize(unet, name, seed)
    train(unet, "dog")
    unet.set_adapters(["dog", "cat"])
    return unet


@torch.no_grad()
def test_whole_modules_follow_the_verbs_of_diffusers(unet_case, two):
    run, base = unet_case.run, unet_case.base(torch.float32)
    cat = unet_case.tiny()
    cat.add_adapter(unet_case.config(), "cat")
    unet_case.randomize(cat, "cat", 1)
    both = run(two)
    two.set_adapters(["cat"])
    assert torch.equal(run(two), run(cat)) and distance(both, run(cat)) > CLEAR
    two.set_adapters(["dog", "cat"])
    assert torch.equal(run(two), both)
    two.disable_lora()
    assert torch.equal(run(two), base)
    two.enable_lora()
    assert torch.equal(run(two), both)
    two.fuse_lora()
    assert_close(run(two), both, rtol=0, atol=1e-5)
    two.unfuse_lora()
    assert torch.equal(run(two), both)
    two.delete_adapters("dog")
    assert torch.equal(run(two), run(cat)) and not wrappers(two)
    two.unload_lora()
    assert torch.equal(run(two), base)


@torch.no_grad()
def test_unload_lora_takes_whole_modules_along_unless_they_are_fused(unet_case, two):
    both, original = unet_case.run(two), two.conv_out.original_module
    two.fuse_lora()
    two.unload_lora()
    assert_close(unet_case.run(two), both, rtol=0, atol=1e-5)
    assert type(two.conv_out) is type(original) and two.conv_out is not original
    assert list(two.state_dict()) == list(unet_case.tiny().state_dict())


@torch.no_grad()
def test_baking_keeps_what_was_trained_whole(unet_case, two):
    both = unet_case.run(two)
    bake_adapters(two)
    assert_close(unet_case.run(two), both, rtol=0, atol=1e-5)
    assert not wrappers(two) and not adapted_layers(two)


@torch.no_grad()
def test_a_loras_whole_module_stays_the_loras(unet_case, file):
    unet = unet_case.tiny()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["conv_in"]), "style")
    train(unet, "style")
    styled = unet_case.run(unet)
    load_adapter(unet, file, "dog")
    assert unet.conv_in.active_adapters == ["style"] and distance(unet_case.run(unet), styled) > CLEAR
    unload_adapters(unet)
    assert torch.equal(unet_case.run(unet), styled) and list(wrappers(unet)) == ["conv_in"]
