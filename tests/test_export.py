"""Adapters that leave home: LoRA files that diffusers loads by its own means, and stock checkpoints without a trace."""

import json
import os

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from comcat_diffusion import ComcatConfig, bases, load_adapter, save_adapter
from comcat_diffusion.adapters.combine import combine
from comcat_diffusion.adapters.header import AdapterFileError, Notes
from comcat_diffusion.adapters.shrink import shrink
from comcat_diffusion.adapters.terms import read_contents
from comcat_diffusion.export.checkpoint import merge_to_folder
from comcat_diffusion.export.lora import FORMATS, as_loras, export_adapter
from comcat_diffusion.families.stable_diffusion import StableDiffusion
from tests.slow import mostly
from tests.test_adapter_file import pipeline
from tests.tiny_models import _built

CLEAR = 0.01  # an effect on the output this large cannot be rounding
CLOSE = {"rtol": 0.0, "atol": 2e-5}  # float32: the same sums in another order
NOTES = Notes("sks", "a photo of sks dog", "dog", {"resolution": 64, "steps": 3, "seed": 0})


def written(pipe, path, randomize, dtype=None, text=True, foldable=True, **options):
    """A random adapter on a pipeline's U-Net and text encoder, saved; the pipeline keeps it live."""
    pipe.unet.add_adapter(ComcatConfig(r=2, alpha=3.0, foldable=foldable, **options), "dog")
    randomize(pipe.unet, "dog", 1)
    if text:
        pipe.text_encoder.add_adapter(ComcatConfig(r=1, alpha=0.7, foldable=foldable), "dog")
        randomize(pipe.text_encoder, "dog", 2)
    save_adapter(pipe, path, "dog", "somebody/base", NOTES, dtype)
    return path


@pytest.fixture
def live(tiny_unet, tiny_clip):
    return pipeline(tiny_unet(), tiny_clip())


@pytest.fixture
def file(live, randomize, tmp_path):
    """A foldable adapter whose ranks and strengths differ by module, on self- and cross-attention and on the text."""
    targets = {
        "target_modules": ["attn1", "attn2"],
        "rank_pattern": {"mid_block.*": 3},
        "alpha_pattern": {"attn1": 1.0},
    }
    return written(live, tmp_path / "dog.safetensors", randomize, **targets)


@pytest.mark.parametrize("format", mostly(FORMATS, "kohya"))
def test_diffusers_loads_the_lora_by_itself_and_it_does_what_the_adapter_does(
    live, file, tiny_unet, tiny_clip, tmp_path, format
):
    export_adapter(file, tmp_path / "lora.safetensors", format)
    fresh = pipeline(tiny_unet(), tiny_clip())
    base = tiny_unet.run(fresh.unet), tiny_clip.run(fresh.text_encoder)
    fresh.load_lora_weights(str(tmp_path / "lora.safetensors"))
    for tiny, part, before in ((tiny_unet, "unet", base[0]), (tiny_clip, "text_encoder", base[1])):
        output = tiny.run(getattr(live, part))
        assert_close(tiny.run(getattr(fresh, part)), output, **CLOSE)
        assert (output - before).abs().max() > CLEAR


def test_the_lora_is_the_change_of_the_weights_in_float64(file):
    """Against the slow formula of DESIGN section 1, head by head."""
    terms = read_contents(file).terms
    for term in terms:
        k, v = as_loras(term, StableDiffusion())
        for lora, down, core in ((k, "k_down", "q_core"), (v, "v_down", "out_core")):
            expected = []
            for head in range(term.heads):
                rows = slice(head * term.rank, (head + 1) * term.rank)
                a, g = (term.factors[name].double()[rows] for name in (down, core))
                expected.append(term.scale * g.T @ a)  # D, C
            assert_close(lora.up @ lora.down, torch.cat(expected), rtol=0, atol=1e-12)
            assert lora.rank == term.heads * term.rank and lora.up.abs().max() > CLEAR


def test_the_kohya_file_names_what_those_tools_look_for(file, tmp_path):
    metadata = export_adapter(file, tmp_path / "sks-dog.safetensors", "kohya").metadata
    with safetensors.safe_open(tmp_path / "sks-dog.safetensors", framework="pt") as opened:
        assert opened.metadata() == metadata
    tensors = safetensors.torch.load_file(tmp_path / "sks-dog.safetensors")
    unet = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    text = "lora_te_text_model_encoder_layers_0_self_attn_v_proj"
    assert {f"{name}.{end}" for name in (unet, text) for end in ("lora_down.weight", "lora_up.weight", "alpha")} <= set(
        tensors
    )
    assert all(name.startswith(("lora_unet_", "lora_te_text_model_")) for name in tensors)
    assert {tensor.item() for name, tensor in tensors.items() if name.endswith(".alpha")} == {4.0}
    assert metadata["ss_network_module"] == "networks.lora" and metadata["ss_network_dim"] == "Dynamic"
    assert json.loads(metadata["ss_tag_frequency"]) == {"1_sks dog": {"sks dog": 1}}
    assert metadata["modelspec.architecture"].endswith("/lora") and metadata["modelspec.trigger_phrase"] == "sks"
    assert (metadata["ss_resolution"], metadata["ss_steps"], metadata["ss_seed"]) == ("(64, 64)", "3", "0")
    assert metadata["ss_sd_model_name"] == "somebody/base" and "comcat" not in metadata


def test_same_inputs_same_bytes_and_a_smaller_precision_is_smaller(file, tmp_path):
    made = []
    for dtype in (torch.float32, torch.float32, torch.float16):
        export_adapter(file, tmp_path / "lora.safetensors", "kohya", dtype)
        made.append((tmp_path / "lora.safetensors").read_bytes())
    assert made[0] == made[1] and len(made[2]) < len(made[0])


@pytest.mark.parametrize("format", mostly(FORMATS, "kohya"))
def test_a_shrunk_adapter_exports_to_a_smaller_lora(file, tiny_unet, tiny_clip, tmp_path, format):
    """Directions and heads that were cut are not exported as zeros."""
    shrink(file, tmp_path / "small.safetensors", 3_700)
    live = pipeline(tiny_unet(), tiny_clip())
    base = tiny_unet.run(live.unet)
    load_adapter(live, tmp_path / "small.safetensors")
    export_adapter(tmp_path / "small.safetensors", tmp_path / "lora.safetensors", format)
    fresh = pipeline(tiny_unet(), tiny_clip())
    fresh.load_lora_weights(str(tmp_path / "lora.safetensors"))
    output = tiny_unet.run(live.unet)
    assert_close(tiny_unet.run(fresh.unet), output, **CLOSE)
    assert (output - base).abs().max() > CLEAR
    export_adapter(file, tmp_path / "whole.safetensors", format)
    assert (tmp_path / "lora.safetensors").stat().st_size < 0.7 * (tmp_path / "whole.safetensors").stat().st_size


# SDXL: two text encoders, and kohya names the U-Net's blocks as the original code does


def build_tiny_xl():
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=2048,
        attention_head_dim=(1, 2, 2),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


@pytest.fixture(scope="module")
def build_xl(tiny_clip):
    """An SDXL pipeline of random weights; calling it gives a fresh copy."""

    def second():
        config = CLIPTextConfig(
            vocab_size=99,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=16,
            max_position_embeddings=16,
            bos_token_id=97,
            eos_token_id=98,
            initializer_factor=3.0,
        )
        return CLIPTextModelWithProjection(config)

    def build():
        parts = dict.fromkeys(("vae", "tokenizer", "tokenizer_2", "image_encoder", "feature_extractor"))
        encoders = {"text_encoder": tiny_clip(), "text_encoder_2": _built(second, 6)}
        return StableDiffusionXLPipeline(unet=_built(build_tiny_xl, 5), scheduler=DDIMScheduler(), **encoders, **parts)

    return build


@torch.no_grad()
def outputs_of(pipe):
    """What the three parts of a tiny SDXL give on inputs that are always the same."""
    noise = lambda seed, *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    added = {"text_embeds": noise(3, 1, 16), "time_ids": torch.arange(6.0).unsqueeze(0)}
    unet = pipe.unet(noise(1, 1, 4, 8, 8), 10, noise(2, 1, 7, 2048), added_cond_kwargs=added)[0]
    ids = torch.arange(9).unsqueeze(0)
    return [unet, pipe.text_encoder(ids)[0], pipe.text_encoder_2(ids).text_embeds]


@pytest.mark.parametrize("format", mostly(FORMATS, "kohya"))
def test_sdxl_with_both_text_encoders(build_xl, randomize, tmp_path, format):
    live, fresh = build_xl(), build_xl()
    live.text_encoder_2.add_adapter(ComcatConfig(r=1, foldable=True), "dog")
    randomize(live.text_encoder_2, "dog", 3)
    file = written(live, tmp_path / "dog.safetensors", randomize)
    export_adapter(file, tmp_path / "lora.safetensors", format)
    before = outputs_of(fresh)
    fresh.load_lora_weights(str(tmp_path / "lora.safetensors"))
    for output, expected, base in zip(outputs_of(fresh), outputs_of(live), before, strict=True):
        assert_close(output, expected, rtol=0, atol=1e-4)  # text states of width 2048 make longer sums
        assert (expected - base).abs().max() > CLEAR
    if format == "kohya":
        names = {name.partition(".")[0] for name in safetensors.torch.load_file(tmp_path / "lora.safetensors")}
        assert {
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
            "lora_unet_middle_block_1_transformer_blocks_1_attn2_to_v",
            "lora_unet_output_blocks_5_1_transformer_blocks_0_attn2_to_k",
            "lora_te1_text_model_encoder_layers_1_self_attn_k_proj",
            "lora_te2_text_model_encoder_layers_1_self_attn_v_proj",
        } <= names
        assert not any("down_blocks" in name for name in names)


# Refusals


def test_what_no_lora_can_express_is_refused_by_name(live, tiny_clip, randomize, tmp_path):
    target = tmp_path / "lora.safetensors"
    free = written(live, tmp_path / "free.safetensors", randomize, foldable=False)
    with pytest.raises(AdapterFileError, match=r"free\.safetensors is a free adapter.*--as lora"):
        export_adapter(free, target)
    with pytest.raises(ValueError, match="one of diffusers-lora, kohya, not 'a1111'"):
        export_adapter(free, target, "a1111")
    alone = tiny_clip()
    alone.add_adapter(ComcatConfig(foldable=True), "dog")
    save_adapter(randomize(alone, "dog"), tmp_path / "clip.safetensors", "dog")
    with pytest.raises(AdapterFileError, match="is for a CLIPTextModel"):
        export_adapter(tmp_path / "clip.safetensors", target)
    assert not target.exists()


def test_an_adapter_that_does_nothing_is_not_exported(live, tmp_path):
    live.unet.add_adapter(ComcatConfig(foldable=True), "dog")
    save_adapter(live, tmp_path / "dog.safetensors", "dog")
    with pytest.raises(AdapterFileError, match="adds nothing"):
        export_adapter(tmp_path / "dog.safetensors", tmp_path / "lora.safetensors")
    with pytest.raises(AdapterFileError, match="no adapter file"):
        export_adapter(tmp_path / "nobody.safetensors", tmp_path / "lora.safetensors")


# The embedded base: pictures


@pytest.fixture(scope="module")
def embedded(tmp_path_factory, randomize):
    """A strong random foldable adapter of the embedded base, and the pictures that it makes."""
    file = tmp_path_factory.mktemp("embedded") / "dog.safetensors"
    pipe = bases.load_base("embedded")
    for part in (pipe.unet, pipe.text_encoder):
        part.add_adapter(ComcatConfig(r=2, foldable=True), "dog")
        randomize(part, "dog", 1, std=0.15)
    save_adapter(pipe, file, "dog", "embedded", NOTES)
    return file, pictures(bases.load_base("embedded")), pictures(pipe)


def pictures(pipe, prompts=("a photo of sks teddy", "a red ball")):
    """Two pictures of 64x64 pixels, 0 to 255, always from the same noise."""
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        list(prompts),
        num_inference_steps=3,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        output_type="np",
    )
    return (made.images * 255).round().astype(int)


@pytest.mark.slow
def test_a_merged_checkpoint_draws_the_same_pictures_without_this_package(embedded, tmp_path):
    file, base, live = embedded
    headers = merge_to_folder(bases.load_base("embedded"), [(file, 1.0)], tmp_path / "merged")
    assert headers[0].notes.trigger == "sks"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    told = "".join(path.read_text() for path in (tmp_path / "merged").rglob("*.json"))
    assert "StableDiffusionPipeline" in told and str(bases.assets()) not in told
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "merged")
    modules = [module for part in (stock.unet, stock.text_encoder) for module in part.modules()]
    assert not any("comcat" in type(module).__module__ or hasattr(module, "comcat") for module in modules)
    assert np.abs(pictures(stock) - live).max() <= 1
    assert np.abs(live - base).max() > 50
    before = bases.load_base("embedded").unet.state_dict()
    after = stock.unet.state_dict()
    assert {name: tensor.shape for name, tensor in after.items()} == {n: tensor.shape for n, tensor in before.items()}
    changed = {name.rpartition("attn2.")[2] for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"to_k.weight", "to_v.weight"}


@pytest.mark.parametrize("format", mostly(FORMATS, "kohya"))
def test_an_exported_lora_draws_the_same_pictures(embedded, tmp_path, format):
    file, base, live = embedded
    export_adapter(file, tmp_path / "lora.safetensors", format)
    stock = DiffusionPipeline.from_pretrained(bases.assets() / "tiny-sd", torch_dtype=torch.float32)
    stock.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert np.abs(pictures(stock) - live).max() <= 1
    assert np.abs(live - base).max() > 50


@pytest.fixture(scope="module")
def with_word(tmp_path_factory, randomize):
    """An adapter that brings a new word of two embeddings, and the pictures that it makes when the word is used."""
    file = tmp_path_factory.mktemp("word") / "dog.safetensors"
    pipe = bases.load_base("embedded")
    pipe.unet.add_adapter(ComcatConfig(r=2, foldable=True), "dog")
    randomize(pipe.unet, "dog", 1, std=0.1)
    width = pipe.text_encoder.config.hidden_size
    vectors = torch.randn(2, width, generator=torch.Generator().manual_seed(4))
    save_adapter(pipe, file, "dog", "embedded", NOTES, tokens={"<dog>": {"text_encoder": vectors}})
    live = bases.load_base("embedded")
    load_adapter(live, file)
    return file, pictures(live, WORD)


WORD = ["a photo of <dog> on the left", "<dog>, red background"]


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_a_new_word_goes_with_a_lora_as_a_textual_inversion(with_word, tmp_path, format):
    file, live = with_word
    made = export_adapter(file, tmp_path / "lora.safetensors", format)
    assert [path.name for path in made.files] == ["lora.safetensors", "lora_emb.safetensors"]
    stock = DiffusionPipeline.from_pretrained(bases.assets() / "tiny-sd", torch_dtype=torch.float32)
    stock.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    assert np.abs(pictures(stock, WORD) - live).max() > 20  # without its word
    stock.load_textual_inversion(tmp_path, weight_name="lora_emb.safetensors", token="<dog>")
    assert np.abs(pictures(stock, WORD) - live).max() <= 1


def test_a_new_word_is_in_the_merged_checkpoint_and_in_shrunk_and_combined_files(with_word, tmp_path):
    file, live = with_word
    merge_to_folder(bases.load_base("embedded"), [(file, 1.0)], tmp_path / "merged")
    assert np.abs(pictures(StableDiffusionPipeline.from_pretrained(tmp_path / "merged"), WORD) - live).max() <= 1
    shrink(file, tmp_path / "small.safetensors", 1 << 20)
    combine([(file, 0.5), (file, 0.5)], tmp_path / "both.safetensors")
    for name, accuracy in (("small", 2e-3), ("both", 0.0)):
        kept = read_contents(tmp_path / f"{name}.safetensors")
        assert kept.header.tokens == ["<dog>"]
        assert_close(kept.tokens, read_contents(file).tokens, rtol=0, atol=accuracy, check_dtype=False)
    both = bases.load_base("embedded")
    load_adapter(both, tmp_path / "both.safetensors")
    assert np.abs(pictures(both, WORD) - live).max() <= 1


def test_two_meanings_of_a_new_word_are_not_combined(with_word, tmp_path):
    tensors = safetensors.torch.load_file(with_word[0])
    with safetensors.safe_open(with_word[0], framework="pt") as opened:
        metadata = opened.metadata()
    tensors["token.0.text_encoder"] += 1
    safetensors.torch.save_file(tensors, tmp_path / "other.safetensors", metadata)
    with pytest.raises(ValueError, match="new word '<dog>' with different meanings"):
        combine([(with_word[0], 0.5), (tmp_path / "other.safetensors", 0.5)], tmp_path / "both.safetensors")


def test_several_adapters_merge_at_their_weights(live, file, tiny_unet, tiny_clip, randomize, tmp_path):
    other = written(pipeline(tiny_unet(), tiny_clip()), tmp_path / "cat.safetensors", randomize, text=False)
    pipe = pipeline(tiny_unet(), tiny_clip())
    merge_to_folder(pipe, [(file, 0.5), (other, -0.25)], tmp_path / "merged")
    expected = pipeline(tiny_unet(), tiny_clip())
    load_adapter(expected, file, "one")
    load_adapter(expected, other, "two")
    expected.unet.set_adapters(["one", "two"], [0.5, -0.25])
    merged = UNet2DConditionModel.from_pretrained(tmp_path / "merged" / "unet")
    assert_close(tiny_unet.run(merged), tiny_unet.run(expected.unet), rtol=0, atol=1e-4)
    assert (tiny_unet.run(merged) - tiny_unet.run(live.unet)).abs().max() > CLEAR
    assert torch.equal(tiny_unet.run(pipe.unet), tiny_unet.run(merged)) and not hasattr(pipe.unet, "peft_config")


def test_a_merge_that_cannot_be_leaves_no_folder_and_the_base_as_it_was(
    live, tiny_unet, tiny_clip, randomize, tmp_path
):
    free = written(pipeline(tiny_unet(), tiny_clip()), tmp_path / "free.safetensors", randomize, foldable=False)
    good = written(live, tmp_path / "good.safetensors", randomize)
    target, pipe = tmp_path / "merged", pipeline(tiny_unet(), tiny_clip())
    before = tiny_unet.run(pipe.unet)
    with pytest.raises(AdapterFileError, match=r"free adapter \(text_encoder, unet\)"):
        merge_to_folder(pipe, [(good, 1.0), (free, 1.0)], target)
    with pytest.raises(ValueError, match="finite"):
        merge_to_folder(pipe, [(good, float("nan"))], target)
    with pytest.raises(ValueError, match="at least one"):
        merge_to_folder(pipe, [], target)
    with pytest.raises(ValueError, match="carries adapters already"):
        merge_to_folder(live, [(good, 1.0)], target)
    spoken = pipeline(tiny_unet(), tiny_clip())
    spoken.text_encoder.add_adapter(ComcatConfig(foldable=True), "dog")  # transformers would save the adapter alone
    with pytest.raises(ValueError, match="carries adapters already"):
        merge_to_folder(spoken, [(good, 1.0)], target)
    other = pipeline(tiny_unet(), tiny_clip())
    for parameter in other.unet.parameters():
        parameter.data *= 1.3
    with pytest.raises(AdapterFileError, match="other weights"):
        merge_to_folder(other, [(good, 1.0)], target)
    target.mkdir()
    (target / "precious").touch()
    with pytest.raises(FileExistsError, match="holds something already"):
        merge_to_folder(pipe, [(good, 1.0)], target)
    assert torch.equal(tiny_unet.run(pipe.unet), before) and os.listdir(target) == ["precious"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["free.safetensors", "good.safetensors", "merged"]


def test_a_write_that_fails_leaves_nothing_behind(live, tiny_unet, tiny_clip, randomize, tmp_path):
    import resource

    good = written(live, tmp_path / "good.safetensors", randomize)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limit[1]))  # a real write error after 2000 bytes
    try:
        with pytest.raises(OSError):
            merge_to_folder(pipeline(tiny_unet(), tiny_clip()), [(good, 1.0)], tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in tmp_path.iterdir()] == ["good.safetensors"]


def test_an_empty_folder_is_filled(live, tiny_unet, tiny_clip, randomize, tmp_path):
    good = written(live, tmp_path / "good.safetensors", randomize)
    (tmp_path / "merged").mkdir()
    merge_to_folder(pipeline(tiny_unet(), tiny_clip()), [(good, 1.0)], tmp_path / "merged")
    assert (tmp_path / "merged" / "model_index.json").is_file()
