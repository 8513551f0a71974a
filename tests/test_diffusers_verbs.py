"""What diffusers does with whole pipelines: everything of ours comes and goes with it, or says what to call."""

import copy
import inspect
import io
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from PIL import Image
from torch import nn
from torch.testing import assert_close

from comcat_diffusion import (
    ComcatConfig,
    bases,
    load_adapter,
    lora_layers,
    merge_adapters,
    read_adapter,
    save_adapter,
    set_regions,
    unload_adapters,
)
from comcat_diffusion.adapters.model import adapted_layers, factors
from comcat_diffusion.adapters.token import start_vectors, words_of
from tests.adapter_cases import CLEAR, distance
from tests.copies import Copies
from tests.slow import mostly

SAME = {"rtol": 0.0, "atol": 1e-10}
KINDS = {"free": {}, "foldable": {"foldable": True}, "tied": {"foldable": True, "tied": True}}


@pytest.fixture(params=mostly(KINDS, "free", "tied"))
def kind(request) -> dict:
    return KINDS[request.param]


@pytest.fixture
def live(tiny_unet, randomize, kind):
    """A U-Net in which a random adapter named dog acts; `live(dtype, **config)`."""

    def build(dtype=torch.float64, **more) -> nn.Module:
        unet = tiny_unet(dtype)
        unet.add_adapter(ComcatConfig(**{"r": 3, "alpha": 4.5, "target_modules": ["attn2"]} | kind | more), "dog")
        return randomize(unet, "dog")

    return build


# Learned words


@pytest.fixture(scope="module")
def loaded_base():
    pipe = bases.load_base("embedded")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def embedded(loaded_base):
    """Fresh copies of what adapters touch of the embedded base, at every call."""
    own = {name: Copies(getattr(loaded_base, name)) for name in ("unet", "text_encoder", "tokenizer")}

    def build() -> StableDiffusionPipeline:
        touched = {name: copies() for name, copies in own.items()}
        pipe = StableDiffusionPipeline(**{**loaded_base.components, **touched}, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


@pytest.fixture
def toy(embedded, randomize, tmp_path):
    """A file of an adapter of U-Net and text encoder that brings the word <toy>, of two embeddings."""
    pipe = embedded()
    for model in (pipe.unet, pipe.text_encoder):
        model.add_adapter(ComcatConfig(r=2, foldable=True), "toy")
        randomize(model, "toy")
    vectors = {name: 1.5 * rows for name, rows in start_vectors(pipe, "cat", 2).items()}
    save_adapter(pipe, tmp_path / "toy.safetensors", "toy", "embedded", tokens={"<toy>": vectors})
    return tmp_path / "toy.safetensors"


def words(pipe: StableDiffusionPipeline) -> tuple:
    """All that a learned word changes. (That PEFT freezes a model for good is another matter.)"""
    table = pipe.text_encoder.get_input_embeddings()
    state = {name: value.clone() for name, value in pipe.text_encoder.state_dict().items() if ".comcat." not in name}
    tokenizer = json.loads(pipe.tokenizer._tokenizer.to_str())
    del tokenizer["truncation"], tokenizer["padding"]  # as it was last called
    known = tokenizer, len(pipe.tokenizer), pipe.text_encoder.config.vocab_size
    return known, table.num_embeddings, table.training, state


def same_words(one: tuple, other: tuple) -> bool:
    values = one[-1].keys() == other[-1].keys() and all(torch.equal(one[-1][key], other[-1][key]) for key in one[-1])
    return one[:-1] == other[:-1] and values


def delete_one_by_one(pipe: StableDiffusionPipeline) -> None:
    pipe.unet.delete_adapters("toy")
    assert words_of(pipe) == ["<toy>"]  # the text encoder still has the adapter that it was learned with
    pipe.text_encoder.delete_adapter("toy")


def fuse_and_unfuse(pipe: StableDiffusionPipeline) -> None:
    pipe.fuse_lora()
    pipe.unfuse_lora()
    pipe.unload_lora_weights()


LEAVING = {
    "delete_adapters": lambda pipe: pipe.delete_adapters("toy"),
    "unload_lora_weights": lambda pipe: pipe.unload_lora_weights(),
    "unload_adapters": unload_adapters,
    "one by one": delete_one_by_one,
    "unfused first": fuse_and_unfuse,
    "another pipeline's": lambda pipe: unload_adapters(
        StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("verb", mostly(LEAVING, "unload_lora_weights", "another pipeline's"))
def test_a_learned_word_leaves_with_its_adapter(embedded, toy, tmp_path, verb):
    pipe = embedded()
    before = words(pipe)
    for turn in range(2):
        load_adapter(pipe, toy, "toy")
        assert words_of(pipe) == ["<toy>"] and not same_words(words(pipe), before), turn
        LEAVING[verb](pipe)
        assert words_of(pipe) == [] and same_words(words(pipe), before), turn
    pipe.save_pretrained(tmp_path / "base")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    assert same_words(words(again), before)


@torch.no_grad()
def test_the_word_of_one_adapter_stays_when_another_leaves(embedded, toy, randomize, tmp_path):
    pipe = embedded()
    pipe.unet.add_adapter(ComcatConfig(r=2, foldable=True), "bird")
    randomize(pipe.unet, "bird")
    tokens = {"<bird>": start_vectors(pipe, "cat", 1)}
    save_adapter(pipe, tmp_path / "bird.safetensors", "bird", "embedded", tokens=tokens)
    unload_adapters(pipe)
    before = words(pipe)
    load_adapter(pipe, toy, "toy")
    load_adapter(pipe, tmp_path / "bird.safetensors", "bird")
    pipe.delete_adapters("toy")
    assert words_of(pipe) == ["<bird>"] and list(pipe.unet.peft_config) == ["bird"]
    only_bird = embedded()
    load_adapter(only_bird, tmp_path / "bird.safetensors", "bird")
    assert same_words(words(pipe), words(only_bird))
    load_adapter(pipe, toy, "toy")
    pipe.unload_lora_weights()
    assert same_words(words(pipe), before)


@torch.no_grad()
def test_fused_weights_keep_the_word_that_they_were_learned_with(embedded, toy):
    pipe = embedded()
    load_adapter(pipe, toy, "toy")
    live = words(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert words_of(pipe) == ["<toy>"] and words(pipe)[0] == live[0]
    assert not adapted_layers(pipe.unet) and not adapted_layers(pipe.text_encoder)


def test_a_word_that_somebody_took_away_by_hand_is_not_missed(embedded, toy):
    pipe = embedded()
    before = words(pipe)
    load_adapter(pipe, toy, "toy")
    pipe.unload_textual_inversion()
    assert words_of(pipe) == []
    pipe.delete_adapters("toy")
    assert words(pipe)[0][:2] == before[0][:2]


def test_an_adapter_that_is_saved_again_keeps_its_words(embedded, toy, tmp_path):
    pipe = embedded()
    load_adapter(pipe, toy, "toy")
    save_adapter(pipe, tmp_path / "again.safetensors", "toy", "embedded")
    assert read_adapter(tmp_path / "again.safetensors").tokens == ["<toy>"]
    assert (tmp_path / "again.safetensors").read_bytes() == toy.read_bytes()
    save_adapter(pipe, tmp_path / "without.safetensors", "toy", "embedded", tokens={})
    assert read_adapter(tmp_path / "without.safetensors").tokens == []


def test_a_failed_loading_leaves_no_word(embedded, toy):
    pipe = embedded()
    before = words(pipe)
    attention = pipe.text_encoder.get_submodule(next(n for n, _ in pipe.text_encoder.named_modules() if "attn" in n))
    attention.forward = attention.forward  # as an offloading hook replaces it
    with pytest.raises(ValueError, match="offloading hooks"):
        load_adapter(pipe, toy, "toy")
    assert same_words(words(pipe), before)


# Hooks and attributes


@torch.no_grad()
@pytest.mark.parametrize("verb", ["unload_lora", "PEFT's unload", "unload_adapters"])
def test_a_model_without_adapters_is_what_it_was(tiny_unet, live, randomize, kind, verb):
    fresh = tiny_unet(torch.float64)
    if verb == "PEFT's unload":
        unet = randomize(get_peft_model(tiny_unet(torch.float64), ComcatConfig(r=3, **kind), "dog"), "dog").unload()
    else:
        unet = live()
        unet.unload_lora() if verb == "unload_lora" else unload_adapters(unet)
    for name, module in unet.named_modules():
        other = fresh.get_submodule(name)
        assert type(module) is type(other)
        left = vars(module).keys() ^ vars(other).keys()
        assert left <= {"_hf_peft_config_loaded"}, (name, left)  # diffusers' own
        for hooks in ("_forward_pre_hooks", "_forward_hooks", "_state_dict_hooks"):
            assert not getattr(module, hooks)
    assert torch.equal(tiny_unet.run(unet), tiny_unet.run(fresh))


@torch.no_grad()
@pytest.mark.parametrize("verb", ["delete_adapters", "unload_lora_weights"])
def test_a_region_leaves_with_its_adapter(embedded, toy, verb, tmp_path, randomize):
    pipe = embedded()
    pipe.unet.add_adapter(ComcatConfig(r=2), "dog")
    randomize(pipe.unet, "dog")
    hooks = len(pipe.unet._forward_pre_hooks)
    left = Image.new("L", (64, 64))
    left.paste(255, (0, 0, 32, 64))
    set_regions(pipe, {"dog": left})
    assert len(pipe.unet._forward_pre_hooks) == hooks + 1
    pipe.delete_adapters("dog") if verb == "delete_adapters" else pipe.unload_lora_weights()
    assert len(pipe.unet._forward_pre_hooks) == hooks
    pipe("a cat", num_inference_steps=1, height=32, width=64, output_type="latent")  # which the mask would not fit
    pipe.unet.add_adapter(ComcatConfig(r=2), "dog")
    assert all(layer.regions is None for layer in adapted_layers(pipe.unet).values())


def test_one_region_goes_and_the_other_stays(tiny_unet, randomize):
    unet = tiny_unet()
    for name in ("dog", "cat"):
        unet.add_adapter(ComcatConfig(r=2), name)
    mask = torch.ones(8, 8)
    set_regions(unet, {"dog": mask, "cat": mask})
    unet.delete_adapters("dog")
    regions = next(iter(adapted_layers(unet).values())).regions
    assert list(regions.masks) == ["cat"] and len(unet._forward_pre_hooks) == 1
    unet.delete_adapters("cat")
    assert not unet._forward_pre_hooks


# Saving the model


@torch.no_grad()
@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["conv_out"]}], ids=["", "with a whole module"])
def test_a_model_that_carries_adapters_saves_its_base(tiny_unet, live, tmp_path, more):
    unet = live(torch.float32, **more)
    output, keys = tiny_unet.run(unet), list(unet.state_dict())
    unet.save_pretrained(tmp_path)
    loaded, report = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(tiny_unet.run(loaded.eval()), tiny_unet.run(tiny_unet()))
    assert list(unet.state_dict()) == keys and torch.equal(tiny_unet.run(unet), output)


@torch.no_grad()
def test_a_pipeline_that_carries_adapters_is_saved_as_its_base(embedded, randomize, kind, tmp_path):
    pipe = embedded()
    for model in (pipe.unet, pipe.text_encoder):
        model.add_adapter(ComcatConfig(r=2, **kind), "dog")
        randomize(model, "dog")
    parameters = inspect.signature(type(pipe.unet).save_pretrained).parameters
    assert list(inspect.signature(pipe.unet.save_pretrained).parameters) == list(parameters)[1:]
    pipe.save_pretrained(tmp_path, variant="fp16", max_shard_size="4MB")
    again = StableDiffusionPipeline.from_pretrained(tmp_path, variant="fp16")
    base = embedded()
    for part in ("unet", "text_encoder"):
        state, expected = getattr(again, part).state_dict(), getattr(base, part).state_dict()
        assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
        assert not adapted_layers(getattr(again, part))
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1  # what the pipeline asked for was heard


@torch.no_grad()
@pytest.mark.parametrize("unloaded", [False, True], ids=["fused", "unloaded"])
def test_what_is_fused_is_saved_where_a_stock_model_can_say_it(tiny_unet, live, kind, unloaded, tmp_path):
    unet = live(torch.float32)
    output = tiny_unet.run(unet)
    unet.fuse_lora()
    if unloaded:
        unet.unload_lora()
    if not kind:
        with pytest.raises(ValueError, match=r"heads are wider than its configuration can say.*save_adapter"):
            unet.save_pretrained(tmp_path)
        assert list(tmp_path.iterdir()) == []
        return
    unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    assert_close(tiny_unet.run(loaded), output, rtol=0, atol=1e-5)
    assert distance(output, tiny_unet.run(tiny_unet())) > CLEAR


@torch.no_grad()
def test_wider_heads_of_transformers_are_not_saved_either(tiny_vit, randomize, tmp_path):
    model = get_peft_model(tiny_vit(), ComcatConfig(r=2), "dog")
    merged = randomize(model, "dog").merge_and_unload()
    with pytest.raises(ValueError, match="heads are wider than its configuration can say"):
        merged.save_pretrained(tmp_path)
    back = get_peft_model(tiny_vit(), ComcatConfig(r=2), "dog").unload()
    back.save_pretrained(tmp_path)
    assert torch.equal(tiny_vit.run(type(back).from_pretrained(tmp_path, add_pooling_layer=False)), tiny_vit.run(back))


@torch.no_grad()
@pytest.mark.parametrize("tiny", ["tiny_unet", "tiny_vit"])
def test_a_merged_model_is_pickled_without_a_word_of_ours(request, randomize, tiny):
    tiny = request.getfixturevalue(tiny)
    merged = randomize(get_peft_model(tiny(), ComcatConfig(r=2), "dog"), "dog").merge_and_unload().eval()
    buffer = io.BytesIO()
    torch.save(merged, buffer)
    assert b"comcat_diffusion" not in buffer.getvalue()
    loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert torch.equal(tiny.run(loaded), tiny.run(merged))
    with pytest.raises(ValueError, match="heads are wider"):
        copy.deepcopy(merged).save_pretrained("nowhere")


@torch.no_grad()
def test_an_unfused_model_saves_its_base_again(tiny_unet, live, tmp_path):
    unet = live(torch.float32)
    unet.fuse_lora()
    unet.unfuse_lora()
    unet.unload_lora()
    unet.save_pretrained(tmp_path)
    assert torch.equal(tiny_unet.run(UNet2DConditionModel.from_pretrained(tmp_path)), tiny_unet.run(tiny_unet()))


@torch.no_grad()
def test_a_copy_saves_itself_and_not_what_it_is_a_copy_of(tiny_unet, live, randomize, tmp_path):
    unet = live(torch.float32)
    twin = copy.deepcopy(unet)
    twin.conv_out.weight += 1
    twin.save_pretrained(tmp_path)
    assert torch.equal(UNet2DConditionModel.from_pretrained(tmp_path).conv_out.weight, twin.conv_out.weight)
    twin.unload_lora()
    assert "save_pretrained" in vars(unet) and "save_pretrained" not in vars(twin)
    block = copy.deepcopy(unet.mid_block)  # copies no more than itself
    assert all(layer.belongings.model is None for layer in adapted_layers(block).values())


# IP-Adapters


def picture_weights(unet: nn.Module) -> dict:
    shapes = {"proj.weight": (96, 12), "proj.bias": (96,), "norm.weight": (24,), "norm.bias": (24,)}
    cross = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    keys = {
        f"{2 * i + 1}.to_{part}_ip.weight": torch.randn(module.inner_dim, 24, dtype=unet.dtype)
        for i, module in enumerate(cross)
        for part in "kv"
    }
    return {"image_proj": {n: torch.zeros(*shape, dtype=unet.dtype) for n, shape in shapes.items()}, "ip_adapter": keys}


@torch.no_grad()
@pytest.mark.parametrize("order", ["pictures first", "merged first", "merged and unloaded first"])
def test_an_ip_adapter_meets_no_heads_that_do_not_fit(tiny_unet, live, kind, order):
    unet, run = live(), lambda m: tiny_unet.run(m, added_cond_kwargs={"image_embeds": [torch.ones(2, 1, 12).double()]})
    weights = picture_weights(unet)
    both = live()
    both._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)
    expected = run(both.double())

    def meet() -> None:
        if order == "pictures first":
            unet._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)
            unet.double()
            merge_adapters(unet)
        else:
            merge_adapters(unet)
            if "unloaded" in order:
                unet.unload_lora()
            unet._load_ip_adapter_weights([weights], low_cpu_mem_usage=False)
            unet.double()

    if kind:
        meet()
        assert_close(run(unet), expected, **SAME)
        return
    with pytest.raises(ValueError, match=r"IP-Adapter.*keep it live"):
        meet()
    if order == "pictures first":
        assert_close(run(unet), expected, **SAME)  # it still acts
    else:
        before = tiny_unet.run(unet)
        with pytest.raises(ValueError, match=r"IP-Adapter.*keep it live"):
            unet.set_attn_processor(
                {
                    name: IPAdapterAttnProcessor2_0(16, 24) if "attn2" in name else processor
                    for name, processor in unet.attn_processors.items()
                }
            )
        assert torch.equal(tiny_unet.run(unet), before)
        unet.set_default_attn_processor()
        assert_close(tiny_unet.run(unet), before, **SAME)


@torch.no_grad()
def test_an_ip_adapter_goes_with_wider_self_attentions(tiny_unet, live):
    unet = live(target_modules=["attn1"])
    merge_adapters(unet)
    unet._load_ip_adapter_weights([picture_weights(unet)], low_cpu_mem_usage=False)
    tiny_unet.run(unet.double(), added_cond_kwargs={"image_embeds": [torch.ones(2, 1, 12).double()]})


# LoRA files


@torch.no_grad()
def test_save_lora_adapter_writes_the_lora_that_a_foldable_adapter_is(tiny_unet, live, kind, tmp_path):
    unet = live(torch.float32, target_modules=["attn1", "attn2"])
    output = tiny_unet.run(unet)
    if not kind:
        with pytest.raises(ValueError, match="'dog' is a free adapter, which no LoRA can express"):
            unet.save_lora_adapter(tmp_path, "dog")
        assert list(tmp_path.iterdir()) == []
        return
    unet.set_adapters(["dog"], [0.3])  # of today; the file has the trained strength
    unet.save_lora_adapter(tmp_path, "dog", weight_name="dog.safetensors")
    fresh = tiny_unet()
    fresh.load_lora_adapter(tmp_path, prefix=None, adapter_name="style", weight_name="dog.safetensors")
    assert_close(tiny_unet.run(fresh), output, rtol=0, atol=1e-5)
    assert distance(output, tiny_unet.run(tiny_unet())) > CLEAR
    ranks = {module.r["style"] for module in fresh.modules() if hasattr(module, "lora_A")}
    assert ranks == ({3} if kind.get("tied") else {6})


@torch.no_grad()
def test_save_lora_weights_writes_lora_layers(embedded, randomize, kind, tmp_path):
    pipe = embedded()
    for model in (pipe.unet, pipe.text_encoder):
        model.add_adapter(ComcatConfig(r=2, **kind), "dog")
        randomize(model, "dog")
    if not kind:
        with pytest.raises(ValueError, match="free adapter"):
            lora_layers(pipe.unet, "dog")
        return
    layers = {"unet_lora_layers": lora_layers(pipe.unet, "dog")}
    layers["text_encoder_lora_layers"] = lora_layers(pipe.text_encoder, "dog")
    StableDiffusionPipeline.save_lora_weights(tmp_path, **layers)
    fresh = embedded()
    fresh.load_lora_weights(tmp_path, adapter_name="style")

    def drawn(some: StableDiffusionPipeline) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(some("a red cat", num_inference_steps=2, generator=generator, output_type="np").images)

    assert_close(drawn(fresh), drawn(pipe), rtol=0, atol=1e-3)
    assert distance(drawn(pipe), drawn(embedded())) > 0.05


def test_factors_are_not_written_as_a_lora(live, tmp_path):
    unet = live()
    for state in (get_peft_model_state_dict(unet, adapter_name="dog"), unet):
        with pytest.raises(ValueError, match=r"factors of a COMCAT adapter.*lora_layers\(model, name\)"):
            StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=state)
    assert list(tmp_path.iterdir()) == []
    assert list(inspect.signature(LoraBaseMixin.pack_weights).parameters) == ["layers", "prefix"]


def test_no_lora_waits_for_a_word(live):
    with pytest.raises(ValueError, match="'dog' acts from 'sks' on, which no LoRA can"):
        lora_layers(live(trigger=["sks"]), "dog")
    with pytest.raises(ValueError, match="no COMCAT adapter 'cat' in this UNet2DConditionModel"):
        lora_layers(live(), "cat")


@torch.no_grad()
def test_a_lora_is_saved_as_ever_beside_our_adapter(tiny_unet, live, tmp_path):
    unet = live(torch.float32)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    unet.set_adapters(["style"])
    styled = tiny_unet.run(unet)
    unet.save_lora_adapter(tmp_path, "style")
    fresh = tiny_unet()
    fresh.load_lora_adapter(tmp_path, prefix=None, adapter_name="s", weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(tiny_unet.run(fresh), styled)


# Devices


def test_set_lora_device_moves_one_adapter_and_leaves_the_other(embedded, kind):
    pipe = embedded()
    for name in ("dog", "cat"):
        pipe.unet.add_adapter(ComcatConfig(r=2, target_modules=["attn1", "attn2"], **kind), name)
    pipe.set_lora_device(["dog"], "meta")  # stands for a GPU
    assert {factor.device.type for factor in factors(pipe.unet, "dog").values()} == {"meta"}
    assert {factor.device.type for factor in factors(pipe.unet, "cat").values()} == {"cpu"}
    assert {parameter.device.type for n, parameter in pipe.unet.named_parameters() if ".dog." not in n} == {"cpu"}
    pipe.set_lora_device(["cat", "nobody"], "cpu")


def test_an_adapter_in_a_part_that_no_file_holds_is_not_dropped(embedded, tmp_path):
    pipe = embedded()
    pipe.unet.add_adapter(ComcatConfig(r=2), "dog")
    pipe.vae.add_adapter(ComcatConfig(r=2), "dog")
    try:
        with pytest.raises(ValueError, match="'dog' also adapts the vae, which an adapter file does not hold"):
            save_adapter(pipe, tmp_path / "dog.safetensors", "dog")
    finally:
        pipe.vae.unload_lora()
    save_adapter(pipe, tmp_path / "dog.safetensors", "dog")
