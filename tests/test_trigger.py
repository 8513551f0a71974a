"""Adapters that wait for their trigger: the base without it, from the trigger on with it, and never a guess."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from torch.testing import assert_close

from comcat_diffusion import ComcatConfig, bases, listen, load_adapter, merge_adapters, save_adapter, unload_adapters
from comcat_diffusion.adapters.combine import combine
from comcat_diffusion.adapters.gate import Gate
from comcat_diffusion.adapters.header import AdapterFileError, read_adapter
from comcat_diffusion.adapters.model import adapted_layers
from comcat_diffusion.adapters.regions import set_regions
from comcat_diffusion.adapters.shrink import shrink
from comcat_diffusion.adapters.token import put_token, start_vectors
from comcat_diffusion.export.checkpoint import merge_to_folder
from comcat_diffusion.export.lora import export_adapter
from tests import tiny_bases
from tests.reference import FoldableFactors, FreeFactors, attention

KINDS = {
    "free": {},
    "foldable": {"foldable": True},
    "tied": {"foldable": True, "tied": True},
}
WITHOUT, WITH = "a photo of a big teddy, red background", "a photo of a big sks teddy, red background"


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(scope="module")
def embedded():
    """A fresh copy of the embedded base at every call."""
    loaded = bases.load_base("embedded")
    loaded.set_progress_bar_config(disable=True)

    def build() -> StableDiffusionPipeline:
        parts = {**loaded.components, "unet": copy.deepcopy(loaded.unet)}
        pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


@pytest.fixture
def waiting(embedded, randomize):
    """`waiting(trigger, name, **config)` is the embedded base with a strong random adapter that waits."""

    def build(trigger="sks", name="dog", pipe=None, **options):
        pipe = pipe or embedded()
        pipe.unet.add_adapter(ComcatConfig(r=2, trigger=[trigger], **options), name)
        randomize(pipe.unet, name, seed=ord(trigger[0]), std=0.2)
        listen(pipe)
        return pipe

    return build


def drawn(pipe, prompts, steps=2, **more) -> np.ndarray:
    """(P, 64, 64, 3) in 0 to 1."""
    count = (1 if isinstance(prompts, str) else len(prompts)) * more.get("num_images_per_prompt", 1)
    generators = [torch.Generator().manual_seed(0) for _ in range(count)]
    return pipe(prompts, num_inference_steps=steps, generator=generators, output_type="np", **more).images


def far(one, other) -> float:
    return float(np.abs(one - other).max())


# What is computed


@torch.no_grad()
def test_the_term_acts_on_the_tokens_from_the_trigger_on(tiny_unet, randomize, kind):
    unet = tiny_unet(torch.float64)
    unet.add_adapter(ComcatConfig(r=3, alpha=4.5, target_modules=["attn2"], trigger=["sks"], **kind), "dog")
    randomize(unet, "dog")
    name, layer = next(iter(adapted_layers(unet).items()))
    host = unet.get_submodule(name)
    x, context = torch.randn(2, 6, host.to_q.in_features).double(), torch.randn(2, 5, 24).double()

    class Told:
        """Stands for a gate: the trigger is the third token of the first prompt, and not in the second."""

        def tokens(self, trigger):
            assert trigger == ("sks",)
            return torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]).unsqueeze(-1)

    layer.gate = Told()
    named = {
        part.removeprefix("comcat_"): getattr(layer, part)["dog"].weight
        for part in layer.adapter_layer_names
        if "dog" in getattr(layer, part)
    }
    for text in ("k_down", "v_down"):
        named[text] = named[text].repeat(layer.heads * 3 // len(named[text]), 1)
    factors = (FoldableFactors if "q_core" in named else FreeFactors)(scale=1.5, **named)
    heard = dataclasses.replace(factors, tokens=Told().tokens(("sks",)))
    got = host(x, encoder_hidden_states=context)
    projections = layer.style.projections(host)
    assert_close(got, attention(x, context, projections, layer.heads, (heard,)), rtol=0, atol=1e-11)
    assert (got - attention(x, context, projections, layer.heads, (factors,)))[0].abs().max() > 0.1
    assert_close(got[1], attention(x, context, projections, layer.heads)[1], rtol=0, atol=1e-11)


def test_a_gate_finds_the_trigger_as_the_tokenizer_reads_it(embedded):
    pipe = embedded()
    gate, states = Gate(pipe.tokenizer), torch.zeros(1, 12, 4)

    def acts(prompt, *trigger):
        gate.tell(states, [prompt])
        return gate.tokens(trigger).flatten().tolist()

    assert acts("a sks teddy", "sks") == [0, 0] + [1] * 10  # after the token that begins every prompt
    assert acts("a SKS, teddy", "sks") == [0, 0] + [1] * 10
    assert acts("a red sks teddy and a sks cat", "sks") == [0, 0, 0] + [1] * 9
    assert acts("a red teddy", "sks") == [0] * 12
    assert acts("sk ss sksy", "sks") == [0] * 12
    assert acts("a zwx cat and a sks teddy", "sks", "zwx") == [0, 0] + [1] * 10
    several = pipe.tokenizer("blorp", add_special_tokens=False).input_ids
    assert len(several) > 1 and acts("a blorp teddy", "blorp") == [0, 0] + [1] * 10
    assert acts("a teddy blor", "blorp") == [0] * 12
    assert acts("a b c d e f g h i j k l m n sks", "sks") == [0] * 12  # cut off: the text encoder never saw it


def test_a_learned_word_of_several_embeddings_is_a_trigger(embedded):
    pipe = copy.deepcopy(embedded())
    put_token(pipe, "<my-cat>", start_vectors(pipe, "cat", 3))
    gate = Gate(pipe.tokenizer)
    gate.tell(torch.zeros(1, 12, 4), ["a photo of <my-cat> on red"])
    assert gate.tokens(("<my-cat>",)).flatten().tolist() == [0] * 4 + [1] * 8


# Pictures


def test_a_prompt_without_the_trigger_is_the_bases_own(embedded, waiting, kind):
    base, pipe = embedded(), waiting(**kind)
    apart = far(drawn(pipe, WITHOUT), drawn(base, WITHOUT))
    # A free adapter's heads are wider, so the same sums come in another order.
    assert apart == 0 if kind else apart < 1e-4
    assert far(drawn(pipe, WITH), drawn(base, WITH)) > 0.1


def test_a_self_attention_waits_for_prompts_with_the_trigger(embedded, waiting):
    base, pipe = embedded(), waiting(foldable=True, target_modules=["attn1"])
    mixed = drawn(pipe, [WITH, WITHOUT])
    assert far(mixed[1:], drawn(base, WITHOUT)) < 1e-3 and far(mixed[:1], drawn(base, WITH)) > 0.05
    assert far(drawn(pipe, WITHOUT), drawn(base, WITHOUT)) == 0


def test_prompts_do_not_hear_each_other(embedded, waiting):
    base, pipe = embedded(), waiting(foldable=True, tied=True)
    mixed = drawn(pipe, [WITH, WITHOUT, WITH], negative_prompt=["", "sks", "blue"])
    assert far(mixed[1:2], drawn(pipe, WITHOUT, negative_prompt="sks")) < 1e-3
    assert far(mixed[1:2], drawn(base, WITHOUT, negative_prompt="sks")) > 0.05  # a trigger to avoid is heard as well
    assert far(mixed[:1], drawn(pipe, WITH)) < 1e-3
    assert far(mixed[2:], drawn(pipe, WITH, negative_prompt="blue")) < 1e-3


def test_repeated_stacked_and_given_states_are_known_again(waiting):
    pipe = waiting(foldable=True)
    alone = drawn(pipe, WITH)
    assert far(drawn(pipe, WITH, num_images_per_prompt=2), alone.repeat(2, axis=0)) < 1e-3
    states, negative = pipe.encode_prompt(WITH, "cpu", 1, True)
    generator = torch.Generator().manual_seed(0)
    given = pipe(
        prompt_embeds=states,
        negative_prompt_embeds=negative,
        num_inference_steps=2,
        generator=generator,
        output_type="np",
    ).images
    assert far(given, alone) < 1e-3
    without_guidance = drawn(pipe, WITH, guidance_scale=1.0)
    assert far(without_guidance, drawn(pipe, WITHOUT, guidance_scale=1.0)) > 0.05


def test_text_states_of_no_known_prompt_are_refused(waiting):
    pipe = waiting(foldable=True)
    states, negative = pipe.encode_prompt(WITH, "cpu", 1, True)
    with pytest.raises(ValueError, match="waits for 'sks', but these text states are of no prompt"):
        pipe(prompt_embeds=states * 1.1, negative_prompt_embeds=negative, num_inference_steps=1)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    picture = torch.zeros(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"comcat_diffusion\.listen"):
        other("a photo of sks thing", picture, num_inference_steps=2)
    listen(other)
    assert other("a photo of sks thing", picture, num_inference_steps=2).images


def test_without_listening_the_way_out_is_named(embedded):
    pipe = embedded()
    pipe.unet.add_adapter(ComcatConfig(r=2, trigger=["sks"]), "dog")
    with pytest.raises(ValueError, match=r"waits for 'sks': call comcat_diffusion\.listen\(pipe\)"):
        drawn(pipe, WITH)
    with pytest.raises(ValueError, match="needs a pipeline that encodes prompts"):
        listen(pipe.unet)


def test_two_adapters_wait_for_their_own_words(embedded, waiting):
    pipe = waiting(foldable=True)
    dog = drawn(pipe, WITH)
    waiting("zwx", "cat", pipe, foldable=True, tied=True)
    pipe.set_adapters(["dog", "cat"])
    assert far(drawn(pipe, WITH), dog) == 0
    assert far(drawn(pipe, WITHOUT), drawn(embedded(), WITHOUT)) == 0
    cat = drawn(pipe, WITH.replace("sks", "zwx"))
    pipe.set_adapters(["cat"])
    assert far(drawn(pipe, WITH.replace("sks", "zwx")), cat) == 0 and far(cat, dog) > 0.05


def test_a_region_and_a_trigger_go_together(embedded, waiting):
    pipe = waiting(foldable=True)
    everywhere = drawn(pipe, WITH)
    set_regions(pipe, {"dog": torch.zeros(8, 8)})
    assert far(drawn(pipe, WITH), drawn(embedded(), WITH)) < 1e-4
    set_regions(pipe, {"dog": torch.ones(8, 8)})
    assert far(drawn(pipe, WITH), everywhere) < 1e-4


@torch.no_grad()
def test_a_copy_of_the_denoiser_hears_for_itself(waiting):
    pipe = waiting(foldable=True)
    alone = drawn(pipe, WITH)
    other = StableDiffusionPipeline(
        **{**pipe.components, "unet": copy.deepcopy(pipe.unet)}, requires_safety_checker=False
    )
    other.set_progress_bar_config(disable=True)
    listen(other)
    assert other.comcat_gate is not pipe.comcat_gate
    assert far(drawn(other, WITH), alone) == 0


def test_unloading_leaves_no_ear(embedded, waiting):
    pipe = waiting(foldable=True)
    drawn(pipe, WITH)
    unload_adapters(pipe)
    assert not pipe.unet._forward_pre_hooks and not hasattr(pipe, "comcat_gate") and "encode_prompt" not in vars(pipe)
    assert far(drawn(pipe, WITH), drawn(embedded(), WITH)) == 0


def test_sdxl_hears_its_trigger(tmp_path, randomize):
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_bases.sdxl(tmp_path))
    pipe.set_progress_bar_config(disable=True)

    def once(prompt):
        return drawn(pipe, prompt, height=64, width=64)

    base = once("a photo of a dog"), once("a photo of a sks dog")
    pipe.unet.add_adapter(ComcatConfig(r=2, foldable=True, tied=True, trigger=["sks"]), "dog")
    randomize(pipe.unet, "dog", std=1.0)
    listen(pipe)
    assert far(once("a photo of a dog"), base[0]) == 0 and far(once("a photo of a sks dog"), base[1]) > 1e-3


# Files, and what cannot be


def test_a_file_keeps_its_trigger_through_load_shrink_and_combine(embedded, waiting, tmp_path, kind):
    pipe = waiting(**kind)
    picture = drawn(pipe, WITH)
    save_adapter(pipe, tmp_path / "dog.safetensors", "dog", "embedded", dtype=torch.float32)
    shrink(tmp_path / "dog.safetensors", tmp_path / "small.safetensors", 1_000_000)
    combine([(tmp_path / "dog.safetensors", 1.0)], tmp_path / "one.safetensors")
    for name in ("dog", "small", "one"):
        fresh = embedded()
        load_adapter(fresh, tmp_path / f"{name}.safetensors", "dog")
        assert far(drawn(fresh, WITH), picture) < 1e-3, name
        assert far(drawn(fresh, WITHOUT), drawn(embedded(), WITHOUT)) < 1e-4
    both = combine(
        [(tmp_path / "dog.safetensors", 0.5), (tmp_path / "dog.safetensors", 0.5)], tmp_path / "b.safetensors"
    )
    assert both.rank == 4
    load_adapter(fresh := embedded(), tmp_path / "b.safetensors")
    assert far(drawn(fresh, WITH), picture) < 1e-3


def test_a_tied_file_is_four_tensors(waiting, tmp_path):
    pipe = waiting(foldable=True, tied=True)
    save_adapter(pipe, tmp_path / "dog.safetensors", "dog", "embedded", dtype=torch.float16)
    with safe_open(tmp_path / "dog.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    width = sum(layer._plain()[1].out_features for layer in adapted_layers(pipe.unet).values())
    assert shapes == {
        "unet.tied.k_down": (2, 128),
        "unet.tied.v_down": (2, 128),
        "unet.tied.q_core": (2, width),
        "unet.tied.out_core": (2, width),
    }


def test_files_without_a_trigger_say_nothing_of_it(tiny_unet, randomize, tmp_path):
    unet = tiny_unet()
    unet.add_adapter(ComcatConfig(r=2), "dog")
    randomize(unet, "dog")
    save_adapter(unet, tmp_path / "dog.safetensors", "dog")
    assert not {"trigger", "tied"} & set(read_adapter(tmp_path / "dog.safetensors").config["unet"])


def test_what_acts_on_all_tokens_is_refused_to_an_adapter_that_waits(waiting, tmp_path):
    pipe = waiting(foldable=True)
    with pytest.raises(ValueError, match="'dog' acts from its trigger on, which merged weights cannot tell"):
        merge_adapters(pipe)
    assert not any(layer.merged for layer in adapted_layers(pipe.unet).values())
    save_adapter(pipe, tmp_path / "dog.safetensors", "dog", "embedded")
    for refused in (
        lambda: export_adapter(tmp_path / "dog.safetensors", tmp_path / "lora.safetensors"),
        lambda: merge_to_folder(pipe, [(tmp_path / "dog.safetensors", 1.0)], tmp_path / "merged"),
    ):
        with pytest.raises(AdapterFileError, match=r"acts from 'sks' on, which weights cannot tell.*--everywhere"):
            refused()
    other = waiting("zwx", foldable=True)
    save_adapter(other, tmp_path / "cat.safetensors", "dog", "embedded")
    with pytest.raises(ValueError, match="wait for different triggers"):
        combine([(tmp_path / "dog.safetensors", 1.0), (tmp_path / "cat.safetensors", 1.0)], tmp_path / "b.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"dog.safetensors", "cat.safetensors"}


def test_a_tied_adapter_is_not_written_as_a_lora(embedded, randomize, tmp_path):
    pipe = embedded()
    pipe.unet.add_adapter(ComcatConfig(r=2, foldable=True, tied=True), "dog")
    randomize(pipe.unet, "dog")
    save_adapter(pipe, tmp_path / "dog.safetensors", "dog", "embedded")
    with pytest.raises(AdapterFileError, match="is tied, of which no LoRA is written.*--kind foldable"):
        export_adapter(tmp_path / "dog.safetensors", tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trigger": []}, "trigger must be a list of words"),
        ({"trigger": ["sks", " "]}, "trigger must be a list of words"),
        ({"tied": True}, "A tied adapter is foldable"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ComcatConfig(**options)
