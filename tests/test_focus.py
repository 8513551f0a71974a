"""Adapters that act where the model itself looks at their words: the rest of a picture stays the base's."""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch.testing import assert_close

from comcat_diffusion import ComcatConfig, bases, keep_background, listen, save_adapter, set_regions
from comcat_diffusion.adapters import focus
from comcat_diffusion.adapters.call import here
from comcat_diffusion.adapters.focus import Focus, placeable
from comcat_diffusion.adapters.looking import HIGH, LOW, divided, looks, places, watched, weights_of
from comcat_diffusion.adapters.model import adapted_layers
from comcat_diffusion.adapters.texts import texts_of
from comcat_diffusion.generation.config import GenerateConfig
from comcat_diffusion.generation.generate import generate
from comcat_diffusion.generation.pictures import use_sampler
from tests.slow import mostly, slow

WITH, WITHOUT = "a photo of a big sks teddy on the left, red background", "a big teddy on the left, red background"
BARE = "a photo of a big sks teddy"
WORDS = {"dog": ["sks teddy", "sks"]}
KINDS = {"free": {}, "tied": {"foldable": True, "tied": True}}


@pytest.fixture(scope="module")
def loaded():
    return bases.load_base("embedded")


@pytest.fixture
def base(loaded):
    pipe = StableDiffusionPipeline(**loaded.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=mostly(KINDS, "tied"))
def pipe(request, loaded, randomize):
    parts = {**loaded.components, "unet": copy.deepcopy(loaded.unet)}
    own = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    own.unet.add_adapter(ComcatConfig(r=4, trigger=["sks"], **KINDS[request.param]), "dog")
    randomize(own.unet, "dog", std=0.2)
    listen(own)
    return own


def drawn(pipe, prompt=WITH, steps=4, **more) -> np.ndarray:
    """(64, 64, 3) in 0 to 1, of a pipeline or of what is called like one."""
    more = {"num_inference_steps": steps, "guidance_scale": 2.0, "output_type": "np"} | more
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **more).images[0]


def keeping(pipe, words=None) -> Callable:
    """What draws as the pipeline does, with the background kept."""
    return partial(keep_background, pipe, words or WORDS)


def far(one, other) -> float:
    return float(np.abs(one - other).max())


def test_around_the_subject_every_pixel_is_the_bases_and_the_subject_changes(base, pipe):
    before, everywhere, placed = drawn(base), drawn(pipe), drawn(keeping(pipe))
    right = np.s_[:, 48:]  # the teddy is on the left
    moved, kept = (np.abs(one - before)[right].mean() for one in (everywhere, placed))
    assert kept < moved / 3 and far(placed, before) > 0.05


def latents_of(call, prompt, scheduler=None, **more) -> list[torch.Tensor]:
    """Those after each step, of all times that a pipeline is called."""
    seen = []
    more = {"num_inference_steps": 4, "guidance_scale": 2.0, "output_type": "latent"} | more
    more["callback_on_step_end"] = lambda pipe, step, time, given: seen.append(given["latents"]) or given
    call(prompt, generator=torch.Generator().manual_seed(0), **more)
    return seen


@pytest.mark.parametrize("sampler", [None, "EulerAncestralDiscreteScheduler", slow("DPMSolverMultistepScheduler")])
def test_at_every_step_latents_around_the_subject_are_those_of_the_bases_own_picture(base, pipe, monkeypatch, sampler):
    """To the bit, also where a sampler adds noise or remembers steps: its noise is the same both times."""
    for one in (base, pipe):
        use_sampler(one, sampler)
    kept = []
    monkeypatch.setattr(focus, "weights_of", lambda at, grown: kept.append(weights_of(at, grown)) or kept[-1])
    before, (alone, placed) = latents_of(base, WITH), np.split(np.array(latents_of(keeping(pipe), WITH)), 2)
    outside = (kept[0] == 0)[0, 0].numpy()
    assert 60 < outside.sum() < 250  # of 256
    for step, own in enumerate(before):
        assert np.array_equal(alone[step], own)
        assert np.array_equal(placed[step][0, :, outside], own.numpy()[0, :, outside])
    assert np.abs(placed[-1] - before[-1].numpy()).max() > 0.1


@torch.no_grad()
def test_a_prediction_is_the_adapters_where_the_base_looks_at_the_words_and_the_bases_around(base, pipe):
    """Against both predictions, put together by hand, of prompts with and without the words in any order."""
    prompts, generator = [WITHOUT, WITH, WITHOUT, WITH], torch.Generator().manual_seed(0)
    noise = torch.randn(4, 16, 16, 16, generator=generator)
    text = pipe.encode_prompt(prompts, "cpu", 1, False)[0]
    call = {"sample": noise, "timestep": torch.tensor(500), "encoder_hidden_states": text}
    read = [texts_of(pipe.tokenizer).read(said, text.shape[1]) for said in prompts]
    of_words = torch.stack([said.within(WORDS["dog"]) for said in read])
    with watched(base.unet, of_words) as seen:
        alone = base.unet(**call).sample
    everywhere = pipe.unet(**call).sample
    made = [keep_background(Called(pipe, {**call, "return_dict": told}), WORDS)[0] for told in (True, False)]
    looked = torch.stack(seen).mean(0)
    least, most = looked.amin((1, 2, 3), keepdim=True), looked.amax((1, 2, 3), keepdim=True)
    share = ((((looked - least) / (most - least).clamp(min=1e-8)) - LOW) / (HIGH - LOW)).clamp(0, 1)
    assert_close(made[0], share * everywhere + (1 - share) * alone)
    assert torch.equal(made[0][::2], alone[::2]) and torch.equal(*made)
    assert (made[0] - alone).abs().max() > 0.01 and (made[0] - everywhere).abs().max() > 0.01


class Called:
    """A pipeline that takes one step of its denoiser, and returns what that predicts."""

    def __init__(self, pipe, call):
        self.unet, self.device, self.call = pipe.unet, pipe.device, call

    def __call__(self, **_):
        return (self.unet(**self.call)[0],)


def test_prompts_without_the_trigger_are_the_bases_and_nothing_is_drawn_twice(base, pipe):
    passes = []
    pipe.unet.conv_in.register_forward_hook(lambda *_: passes.append(1))
    assert far(drawn(keeping(pipe), WITHOUT), drawn(base, WITHOUT)) == 0
    assert len(passes) == 4
    drawn(keeping(pipe))
    assert len(passes) == 12


def test_a_prompt_that_names_the_subject_alone_has_no_background_to_keep(pipe):
    """Also beside one that has: each picture of a batch goes by its own prompt."""
    both, alone, placed = [BARE, WITH], drawn(pipe, BARE, 2), drawn(keeping(pipe), steps=2)
    assert far(drawn(keeping(pipe), BARE, 2), alone) == 0
    seeds = [torch.Generator().manual_seed(0) for _ in both]
    more = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np", "generator": seeds}
    batch = keep_background(pipe, WORDS, both, **more).images
    assert far(batch[0], alone) < 1e-4 and far(batch[1], placed) < 1e-4  # of float32, in a batch of another size


def test_without_guidance_and_without_a_generator_it_draws_from_the_same_noise_twice(pipe):
    """Then noise is the process's own, of which both drawings take the same."""
    call = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "np"}
    torch.manual_seed(0)
    made = keep_background(pipe, WORDS, WITH, **call).images[0]
    seeded = keep_background(pipe, WORDS, WITH, **call, generator=torch.Generator().manual_seed(0)).images[0]
    assert far(made, seeded) == 0


def test_a_sampler_that_takes_other_steps_with_the_adapter_is_refused(pipe, monkeypatch):
    times = iter([2, 3])
    own = type(pipe).__call__
    monkeypatch.setattr(
        type(pipe), "__call__", lambda self, *a, **kw: own(self, *a, **kw | {"num_inference_steps": next(times)})
    )
    with pytest.raises(ValueError, match="takes other steps than without"):
        drawn(keeping(pipe))


@pytest.mark.slow
def test_pictures_one_after_the_other_know_nothing_of_each_other(pipe):
    alone = drawn(keeping(pipe))
    drawn(keeping(pipe), "a small sks teddy on the right, blue background")
    assert far(drawn(keeping(pipe)), alone) == 0


def test_afterwards_nothing_is_left_also_after_an_error(pipe):
    before, hooks = drawn(pipe), len(pipe.unet._forward_pre_hooks)

    def fail(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        drawn(keeping(pipe), callback_on_step_end=fail)
    assert here.focus is None and len(pipe.unet._forward_pre_hooks) == hooks
    assert far(drawn(pipe), before) == 0


@pytest.mark.slow
def test_another_thread_draws_as_ever(pipe):
    before, placed, others = drawn(pipe), drawn(keeping(pipe)), []

    def beside(own, step, time, given):
        with ThreadPoolExecutor(1) as pool:
            others.append(pool.submit(drawn, pipe).result())
        return given

    assert far(drawn(keeping(pipe), steps=4, callback_on_step_end=beside), placed) == 0
    assert len(others) == 8 and all(far(other, before) == 0 for other in others)


@pytest.mark.slow
def test_a_compiled_denoiser_keeps_the_same_background(pipe):
    placed = drawn(keeping(pipe))
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    torch.compiler.reset()
    assert far(drawn(keeping(pipe)), placed) == 0


@pytest.mark.slow
def test_a_mask_bounds_what_is_found(base, pipe):
    set_regions(pipe, {"dog": torch.zeros(16, 16)})
    assert far(drawn(keeping(pipe)), drawn(base)) < 1e-5
    set_regions(pipe, {})
    free = drawn(keeping(pipe))
    set_regions(pipe, {"dog": torch.ones(16, 16)})
    assert far(drawn(keeping(pipe)), free) == 0


@torch.no_grad()
@pytest.mark.parametrize(("high", "wide"), [(8, 8), (4, 16)])
def test_how_much_a_place_looks_is_the_bases_own_attention_to_the_words(pipe, high, wide):
    """Against loops in float64."""
    unet = pipe.unet.double()
    layer = next(found for name, found in adapted_layers(unet).items() if name.startswith("up_blocks"))
    attn, generator = layer.owner, torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 16, attn.to_q.in_features, generator=generator).double()
    text = torch.randn(2, 32, attn.to_k.in_features, generator=generator).double()
    said = [texts_of(pipe.tokenizer).read(prompt, 32) for prompt in (WITH, WITHOUT)]
    of_words = torch.stack([one.within(WORDS["dog"]) for one in said])
    found = looks(attn, hidden, text, of_words, (high, wide))
    assert found.shape == (2, 1, high, wide) and not found[1].any()
    weights = weights_of(places([[found[0]], []], torch.zeros(2, dtype=torch.bool)))
    tokens = [6, 7]  # begin, a, photo, of, a, big, sks, teddy
    q, k = (made.unflatten(-1, (layer.heads, -1)) for made in (attn.to_q(hidden)[0], attn.to_k(text)[0]))
    looked = torch.zeros(16).double()
    for head in range(layer.heads):
        for place in range(16):
            logits = torch.stack([(q[place, head] * k[token, head]).sum() for token in range(32)])
            looked[place] += (logits / (q.shape[-1] ** 0.5)).softmax(0)[tokens].sum() / layer.heads
    looked = looked.view(1, 1, high // 2, wide // 2).float()
    grid = torch.nn.functional.interpolate(looked, size=(high, wide), mode="bilinear")
    assert_close(found[:1], grid)
    wanted = (((grid - grid.min()) / (grid.max() - grid.min()) - LOW) / (HIGH - LOW)).clamp(0, 1)
    assert_close(weights[:1], wanted)
    assert 0 < weights[0].max() <= 1 and not weights[1].any()


def test_places_are_divided_among_adapters_by_how_much_is_looked_for_each():
    """One place: three quarters of the most that was looked for the dog, a quarter for the cat."""
    seen = {"dog": torch.tensor([0.75, 1.0]).view(1, 1, 1, 2), "cat": torch.tensor([0.25, 1.0]).view(1, 1, 1, 2)}
    shares = {"dog": torch.tensor([[[0.75], [0.5]]]), "cat": torch.tensor([[[0.25], [0.5]]])}
    assert_close(divided(seen, (1, 2)), shares)


@torch.no_grad()
def test_where_one_adapter_is_alone_in_an_attention_it_leaves_the_others_their_places(pipe, randomize, monkeypatch):
    """Both are told of; the second is on cross-attention alone, as files of before are, the first on both."""
    pipe.unet.add_adapter(ComcatConfig(r=2, trigger=["zwx"], target_modules=["attn2"]), "cat")
    pipe.unet.add_adapter(ComcatConfig(r=2, trigger=["sks"], target_modules=["attn1", "attn2"]), "bear")
    pipe.unet.set_adapter(["bear", "cat"])
    for name in ("bear", "cat"):
        randomize(pipe.unet, name, std=0.2)
    listen(pipe)
    found, shares = [], Focus.shares

    def keep(self, layer, live, *args):
        found.append((list(live), self._at is not None, shares(self, layer, live, *args)))
        return found[-1][-1]

    monkeypatch.setattr(Focus, "shares", keep)
    both_words = {"bear": ["sks teddy"], "cat": ["zwx cat"]}
    drawn(keeping(pipe, both_words), "sks teddy on the left, zwx cat on the right", steps=1)
    alone = [own["bear"] for live, placed, own in found if placed and live == ["bear"]]
    both = [own for live, placed, own in found if placed and len(live) == 2]
    assert len(alone) == len(both) == 7  # block by block
    for one, own in zip(alone, both, strict=True):
        assert torch.equal(one, own["bear"]) and 0.2 < one.mean() < 0.8
        assert_close(own["bear"] + own["cat"], torch.ones_like(one))


@torch.no_grad()
def test_an_adapter_that_waits_for_a_word_that_is_there_has_no_place_by_words_that_are_not(pipe, monkeypatch):
    """Its trigger stands in the prompt, and what its subject is called by does not: nothing of it is seen."""
    shares, found = Focus.shares, []

    def keep(self, layer, live, *args):
        found.append((self._at is not None, live, shares(self, layer, live, *args)))
        return found[-1][-1]

    pipe.unet.add_adapter(ComcatConfig(r=2, trigger=["zwx"], target_modules=["attn2"]), "cat")
    pipe.unet.add_adapter(ComcatConfig(r=2, trigger=["qqq"], target_modules=["attn2"]), "bear")
    pipe.unet.set_adapter(["dog", "cat", "bear"])
    listen(pipe)
    monkeypatch.setattr(Focus, "shares", keep)
    words = {"dog": ["sks house"], "cat": ["zwx cat"], "bear": ["qqq bear"]}
    drawn(keeping(pipe, words), "sks teddy, zwx cat on the right, qqq bear on the left", steps=1)
    placed = [own for placed, live, own in found if placed and len(live) == 3]
    assert placed and not any(own["dog"].any() for own in placed)
    assert all(own["cat"].any() and own["bear"].any() for own in placed)


def test_where_was_looked_is_the_mean_of_the_steps_between_least_and_most():
    first, second = torch.tensor([3.0, 1.0, 2.0]).view(1, 1, 3), torch.tensor([1.0, 1.0, 4.0]).view(1, 1, 3)
    found = places([[first, second], [], [first]], torch.tensor([False, False, True]))
    assert_close(found.flatten(1), torch.tensor([[0.5, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    assert not places([[torch.ones(1, 1, 3)], []], torch.zeros(2, dtype=torch.bool)).any()  # looked at alike: nowhere


def test_what_has_no_words_or_looks_nowhere_is_refused(pipe, loaded):
    with pytest.raises(ValueError, match="'cat' is no adapter here that waits for a trigger"):
        keep_background(pipe, {"cat": ["x"]}, WITH)
    unet = copy.deepcopy(loaded.unet)
    unet.add_adapter(ComcatConfig(r=2, trigger=["sks"], target_modules=r"down_blocks\..*attn2"), "dog")
    other = StableDiffusionPipeline(**{**loaded.components, "unet": unet}, requires_safety_checker=False)
    with pytest.raises(ValueError, match="on no attention that shows"):
        keep_background(other, WORDS, WITH)


@pytest.mark.slow
def test_the_command_keeps_the_background_and_says_so(pipe, tmp_path):
    save_adapter(pipe, tmp_path / "dog.safetensors", "dog", "embedded")
    settings = {"adapter": [str(tmp_path / "dog.safetensors")], "prompt": [WITH], "num_images": 1, "any_prompt": True}
    settings |= {"num_inference_steps": 8, "guidance_scale": 2.0}
    plain, kept = (
        generate(GenerateConfig(**settings, keep_background=keep, output_dir=str(tmp_path / str(keep)))).files[0]
        for keep in (False, True)
    )
    assert Image.open(plain).tobytes() != Image.open(kept).tobytes()
    assert '"keep_background": true' in Image.open(kept).text["comcat"]
    assert "keep_background" not in Image.open(plain).text["comcat"]


def test_what_waits_for_no_word_is_drawn_as_ever(pipe, tmp_path):
    """The default keeps backgrounds; an adapter that acts everywhere has no words to look for."""
    assert placeable(pipe, WORDS) == WORDS and placeable(pipe, {"dog": []}) == {}
    pipe.unet.delete_adapters("dog")
    pipe.unet.add_adapter(ComcatConfig(r=2, target_modules=["attn2"]), "dog")
    assert placeable(pipe, WORDS) == {}
