"""Adapters that wait for their trigger: the base without it, from the trigger on with it, and never a guess."""

import copy
import dataclasses
import gc

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from torch.testing import assert_close

from comcat_diffusion import (
    ComcatConfig,
    bases,
    listen,
    load_adapter,
    merge_adapters,
    remember_prompts,
    save_adapter,
    unload_adapters,
)
from comcat_diffusion.adapters.combine import combine
from comcat_diffusion.adapters.header import AdapterFileError, read_adapter
from comcat_diffusion.adapters.model import adapted_layers
from comcat_diffusion.adapters.regions import set_regions
from comcat_diffusion.adapters.shrink import shrink
from comcat_diffusion.adapters.texts import texts_of
from comcat_diffusion.adapters.token import put_token, start_vectors
from comcat_diffusion.export.checkpoint import merge_to_folder
from comcat_diffusion.export.lora import export_adapter
from comcat_diffusion.generation.config import GenerateConfig
from comcat_diffusion.generation.generate import generate
from tests import tiny_bases
from tests.copies import Copies
from tests.reference import FoldableFactors, FreeFactors, attention
from tests.slow import mostly, slow

KINDS = {
    "free": {},
    "foldable": {"foldable": True},
    "tied": {"foldable": True, "tied": True},
}
WITHOUT, WITH = "a photo of a big teddy, red background", "a photo of a big sks teddy, red background"


@pytest.fixture(params=mostly(KINDS, "free", "tied"))
def kind(request):
    return KINDS[request.param]


@pytest.fixture(scope="module")
def embedded():
    """A fresh copy of the embedded base at every call."""
    loaded = bases.load_base("embedded")
    loaded.set_progress_bar_config(disable=True)

    own = {name: Copies(getattr(loaded, name)) for name in ("unet", "text_encoder", "tokenizer")}

    def build() -> StableDiffusionPipeline:
        parts = {**loaded.components, **{name: copies() for name, copies in own.items()}}
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

        def calls(self, trigger):
            return True

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


def acting(pipe, prompt, *trigger):
    """One for each of twelve tokens that an adapter acts on, else zero."""
    return texts_of(pipe.tokenizer).read(prompt, 12).acts(trigger).int().tolist()


@pytest.mark.parametrize(
    ("prompt", "trigger", "before"),
    [
        ("a sks teddy", "sks", 2),  # after the token that begins every prompt
        ("a SKS, teddy", "sks", 2),
        ("a red sks teddy and a sks cat", "sks", 3),
        ("a red teddy", "sks", 12),
        ("sk ss sksy", "sks", 12),
        ("a zwx cat and a sks teddy", "sks zwx", 2),
        ("a blorp teddy", "blorp", 2),  # several tokens
        ("a teddy blor", "blorp", 12),
        ("a b c d e f g h i j k l m n sks", "sks", 12),  # cut off: the text encoder never saw it
        ("a,sks,b", "sks", 3),
        ("[sks]", "sks", 2),
        ("(sks:1.2) cat", "sks", 2),
        ("a sks's cat", "sks", 2),
        ("sks-teddy", "sks", 1),
        ("two  \n sks cats", "sks", 2),
        ("café sks", "café", 1),
        ("cafe\u0301 sks", "café", 1),  # in another Unicode form
        ("a masks", "sks", 12),
        ("a tusks on desks", "sks", 12),
        ("sks10", "sks1", 12),
        ("sks10", "sks", 12),
        ("sks1", "sks1", 1),
        ("a tiktok", "tok", 12),
    ],
)
def test_the_trigger_is_found_as_a_word_among_the_tokens(embedded, prompt, trigger, before):
    assert acting(embedded(), prompt, *trigger.split()) == [0] * before + [1] * (12 - before)


def test_a_learned_word_of_several_embeddings_is_a_trigger(embedded):
    pipe = copy.deepcopy(embedded())
    put_token(pipe, "<my-cat>", start_vectors(pipe, "cat", 3))
    assert acting(pipe, "a photo of <my-cat> on red", "<my-cat>") == [0] * 4 + [1] * 8


# Pictures


def test_a_prompt_without_the_trigger_is_the_bases_own(embedded, waiting, kind):
    base, pipe = embedded(), waiting(**kind)
    apart = far(drawn(pipe, WITHOUT), drawn(base, WITHOUT))
    assert apart == 0
    assert far(drawn(pipe, WITH), drawn(base, WITH)) > 0.1


@pytest.mark.slow
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
    assert far(given(pipe, *pipe.encode_prompt(WITH, "cpu", 1, True)), alone) < 1e-3
    without_guidance = drawn(pipe, WITH, guidance_scale=1.0)
    assert far(without_guidance, drawn(pipe, WITHOUT, guidance_scale=1.0)) > 0.05


def given(pipe, states, negative) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    more = {"num_inference_steps": 2, "generator": generator, "output_type": "np"}
    return pipe(prompt_embeds=states, negative_prompt_embeds=negative, **more).images


def test_states_made_by_the_text_encoder_itself_are_known(waiting):
    pipe = waiting(foldable=True)

    def states(text):
        ids = pipe.tokenizer(text, padding="max_length", return_tensors="pt", truncation=True).input_ids
        return pipe.text_encoder(ids)[0].detach()

    plain, negative = states(WITH), states("")
    assert far(given(pipe, plain, negative), drawn(pipe, WITH)) == 0
    weighted = plain.clone()
    weighted[:, 4:6] *= 1.3
    assert far(given(pipe, weighted, negative), given(pipe, plain, negative)) > 1e-3
    pipe.unet.set_adapter([])
    bare = given(pipe, weighted, negative)
    pipe.unet.set_adapter("dog")
    assert far(given(pipe, weighted, negative), bare) > 0.05
    for dtype in (torch.bfloat16, torch.float16):
        assert far(given(pipe, plain.to(dtype).float(), negative.to(dtype).float()), drawn(pipe, WITH)) < 0.1


@pytest.mark.slow
def test_states_made_in_several_runs_of_the_text_encoder_are_known(embedded, waiting):
    """As programs read a prompt that is too long for one, or says BREAK: each run by itself, side by side."""
    pipe, base = waiting(foldable=True), embedded()

    def states(*texts):
        more = {"padding": "max_length", "return_tensors": "pt", "truncation": True}
        return pipe.text_encoder(pipe.tokenizer(list(texts), **more).input_ids)[0].detach().flatten(0, 1)[None]

    def moved(*texts, negative=("", "")):
        both = states(*texts), states(*negative)
        return far(given(pipe, *both), given(base, *both))

    assert moved(WITHOUT, "a blue room") == 0
    assert moved(WITH, "a blue room") > 0.05
    assert moved("a blue room", "sks teddy") > 0.05
    assert moved("a blue room", WITHOUT, negative=("", WITH)) > 0.05
    said = texts_of(pipe.tokenizer).known(states("a blue room", "a sks teddy", "red"))[0]
    length = pipe.tokenizer.model_max_length
    assert said.acts(["sks"]).nonzero().flatten().tolist() == list(range(length + 2, 2 * length))
    assert said.within(["sks teddy", "blue"]).nonzero().flatten().tolist() == [2, length + 2, length + 3]
    padded = torch.cat([states(WITH), torch.zeros_like(states(WITH))], dim=1)  # with zeros, as some fill up
    assert far(given(pipe, padded, states("", "")), given(base, padded, states("", ""))) > 0.05
    with pytest.raises(ValueError, match="of no prompt that its pipeline has encoded"):
        given(pipe, torch.cat([states(WITH), states(WITH) + 1], dim=1), states("", ""))


def test_states_of_no_known_prompt_are_refused_until_somebody_says_what_they_are(embedded, waiting):
    pipe = waiting(foldable=True)
    one, negative = pipe.encode_prompt(WITH, "cpu", 1, True)
    between = torch.lerp(one, pipe.encode_prompt(WITH.replace("big", "small"), "cpu", 1, False)[0], 0.5)
    with pytest.raises(ValueError, match="waits for 'sks', but these text states.*remember_prompts"):
        given(pipe, between, negative)
    remember_prompts(pipe, between, WITH)
    heard = given(pipe, between, negative)
    assert far(heard, given(embedded(), between, negative)) > 0.05
    remember_prompts(pipe, between, [WITHOUT])
    assert far(given(pipe, between, negative), given(embedded(), between, negative)) == 0
    with pytest.raises(ValueError, match="give one \\(M, E\\) block of text states for each prompt"):
        remember_prompts(pipe, between, [WITH, WITHOUT])


def test_another_pipeline_of_the_same_parts_hears_through_the_text_encoder(waiting):
    pipe = waiting(foldable=True)
    other, picture = StableDiffusionImg2ImgPipeline.from_pipe(pipe), torch.zeros(1, 3, 64, 64)

    def once(prompt):
        generator = torch.Generator().manual_seed(0)
        return other(prompt, picture, num_inference_steps=2, generator=generator, output_type="np").images

    before = once("a photo of sks thing")
    pipe.unet.set_adapter([])
    assert far(once("a photo of sks thing"), before) > 0.01
    pipe.unet.set_adapter("dog")
    listen(other)
    assert far(once("a photo of sks thing"), before) == 0


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


@pytest.mark.slow
def test_two_adapters_that_wait_for_one_word_are_told_of(embedded, waiting, tmp_path):
    for name, word in (("dog", "sks"), ("cat", "SKS"), ("bird", "zwx")):
        save_adapter(waiting(word, name, foldable=True), tmp_path / f"{name}.safetensors", name, "embedded")
    files = {name: tmp_path / f"{name}.safetensors" for name in ("dog", "cat", "bird")}
    pipe = embedded()
    load_adapter(pipe, files["bird"], "bird")
    load_adapter(pipe, files["dog"], "dog")
    with pytest.warns(UserWarning, match=r"'dog' and 'cat' both act from 'sks' on.*another word.*set_regions"):
        load_adapter(pipe, files["cat"], "cat")

    def told(*names, **settings) -> list[str]:
        notes = []
        adapters = [str(files[name]) for name in names]
        more = {"num_images": 1, "num_inference_steps": 1, "any_prompt": True, **settings}
        generate(
            GenerateConfig(adapter=adapters, prompt=["a dog"], output_dir=str(tmp_path), **more), note=notes.append
        )
        return notes

    assert [note for note in told("dog", "cat", "bird") if "dog.safetensors and cat.safetensors both act" in note]
    assert not told("dog", "bird")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    assert not told("dog", "cat", region=[f"{name}={tmp_path / 'mask.png'}" for name in ("dog", "cat")])
    save_adapter(waiting("sks", "dog", foldable=True), tmp_path / "third.safetensors", "dog", "embedded")
    both = combine([(files["dog"], 1.0), (tmp_path / "third.safetensors", 1.0)], tmp_path / "both.safetensors")
    assert both.doubts == (
        "dog.safetensors and third.safetensors both act from 'sks' on, so their subjects mix: this word will call the "
        "sum of both.",
    )


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
    assert deaf(pipe) and far(drawn(pipe, WITH), drawn(embedded(), WITH)) == 0


def deaf(pipe) -> bool:
    gc.collect()  # a U-Net refers to itself, and those of other tests share the text encoder
    hooks = (h for m in (pipe.unet, pipe.text_encoder) for h in (m._forward_pre_hooks, m._forward_hooks))
    marks = (pipe.unet._forward_pre_hooks_with_kwargs, pipe.unet._forward_hooks_always_called)
    return not any(hooks) and not any(marks) and not {"comcat_gate", "encode_prompt"} & set(vars(pipe))


@pytest.mark.parametrize("verb", [slow("unload_lora_weights"), slow("delete_adapters"), slow("unload"), "new U-Net"])
def test_no_verb_of_others_leaves_an_ear(embedded, waiting, verb):
    pipe = waiting(foldable=True)
    set_regions(pipe, {"dog": torch.ones(8, 8)})
    drawn(pipe, WITH)
    if verb == "new U-Net":
        old, pipe.unet = pipe.unet, embedded().unet
        del old
    elif verb == "unload":
        unload_adapters(pipe)
    else:
        getattr(pipe, verb)(*["dog"] * (verb == "delete_adapters"))
    assert deaf(pipe)
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


def test_sdxls_states_are_known_by_what_its_first_encoder_made(tmp_path, randomize):
    """As programs make them: the last but one of both encoders side by side, one run of each behind the other."""
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_bases.sdxl(tmp_path))
    pipe.unet.add_adapter(ComcatConfig(r=2, foldable=True, tied=True, trigger=["sks"]), "dog")
    randomize(pipe.unet, "dog", std=1.0)
    listen(pipe)

    def run(text):
        more = {"padding": "max_length", "return_tensors": "pt", "truncation": True}
        ids = [tokenizer(text, **more).input_ids for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)]
        made = zip((pipe.text_encoder, pipe.text_encoder_2), ids, strict=True)
        return torch.cat([encoder(own, output_hidden_states=True).hidden_states[-2] for encoder, own in made], dim=-1)

    texts, length = texts_of(pipe.tokenizer), pipe.tokenizer.model_max_length
    states = run("a photo of a sks dog")
    own = list(range(5, length))
    assert texts.known(states)[0].acts(["sks"]).nonzero().flatten().tolist() == own
    acts = texts.known(torch.cat([run("a red room"), states], dim=1))[0].acts(["sks"])
    assert acts.nonzero().flatten().tolist() == [length + place for place in own]
    assert texts.known(states.flip(-1)) is None and texts.known(states + 1) is None
    assert texts.known(torch.zeros_like(states))[0].text == ""


# Files, and what cannot be


@pytest.mark.slow
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


def test_what_acts_on_all_tokens_is_refused_to_an_adapter_that_waits(waiting, embedded, tmp_path):
    pipe = waiting(foldable=True)
    with pytest.raises(ValueError, match="'dog' acts from its trigger on, which merged weights cannot tell"):
        merge_adapters(pipe)
    assert not any(layer.merged for layer in adapted_layers(pipe.unet).values())
    save_adapter(pipe, tmp_path / "dog.safetensors", "dog", "embedded")
    for refused in (
        lambda: export_adapter(tmp_path / "dog.safetensors", tmp_path / "lora.safetensors"),
        lambda: merge_to_folder(pipe, [(tmp_path / "dog.safetensors", 1.0)], tmp_path / "merged"),
    ):
        with pytest.raises(AdapterFileError, match=r"acts from 'sks' on, which weights cannot tell.*--as lora"):
            refused()
    other = embedded()
    other.unet.add_adapter(ComcatConfig(r=2, foldable=True), "dog")
    save_adapter(other, tmp_path / "cat.safetensors", "dog", "embedded")
    with pytest.raises(ValueError, match=r"cat.safetensors acts everywhere and .*dog.safetensors from its trigger on"):
        combine([(tmp_path / "dog.safetensors", 1.0), (tmp_path / "cat.safetensors", 1.0)], tmp_path / "b.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"dog.safetensors", "cat.safetensors"}


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
