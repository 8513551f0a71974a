"""Adapters that act where the model itself looks at their words: the rest of a picture stays the base's."""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch.testing import assert_close

from comcat_diffusion import ComcatConfig, bases, keep_background, listen, save_adapter, set_regions
from comcat_diffusion.adapters.call import here
from comcat_diffusion.adapters.focus import Focus, placeable
from comcat_diffusion.adapters.looking import HIGH, LOW, Course, divided, looks, placing, watched, weights_of
from comcat_diffusion.adapters.model import adapted_layers
from comcat_diffusion.adapters.texts import texts_of
from comcat_diffusion.generation.config import GenerateConfig
from comcat_diffusion.generation.generate import generate

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


@pytest.fixture(params=KINDS)
def pipe(request, loaded, randomize):
    parts = {**loaded.components, "unet": copy.deepcopy(loaded.unet)}
    own = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    own.unet.add_adapter(ComcatConfig(r=4, trigger=["sks"], **KINDS[request.param]), "dog")
    randomize(own.unet, "dog", std=0.2)
    listen(own)
    return own


def drawn(pipe, prompt=WITH, steps=4) -> np.ndarray:
    """(64, 64, 3) in 0 to 1."""
    more = {"num_inference_steps": steps, "guidance_scale": 2.0, "output_type": "np"}
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **more).images[0]


def far(one, other) -> float:
    return float(np.abs(one - other).max())


def test_the_background_moves_less_and_the_subject_still_changes(base, pipe):
    before, everywhere = drawn(base), drawn(pipe)
    with keep_background(pipe, WORDS):
        placed = drawn(pipe)
    right = np.s_[:, 44:]  # the teddy is on the left
    moved, kept = (np.abs(one - before)[right].mean() for one in (everywhere, placed))
    assert moved > 1.3 * kept and far(placed, before) > 0.05


def test_each_step_is_the_bases_and_then_one_of_the_pictures_that_have_the_words(base, pipe):
    rows = []
    pipe.unet.conv_in.register_forward_hook(lambda module, args, made: rows.append(len(made)))
    before, everywhere = drawn(base, steps=1), drawn(pipe, steps=1)
    rows.clear()
    with keep_background(pipe, WORDS):
        placed = drawn(pipe, steps=1)
    assert rows == [2, 1]  # without guidance there is nothing to spare
    assert far(placed, before) > 0.05 and far(placed, everywhere) > 0.005


@torch.no_grad()
def test_a_prediction_is_the_adapters_where_the_base_looks_at_the_words_and_the_bases_around(base, pipe):
    """Against both predictions, put together by hand, of prompts with and without the words in any order."""
    prompts, generator = [WITHOUT, WITH, WITHOUT, WITH], torch.Generator().manual_seed(0)
    noise = torch.randn(4, 16, 16, 16, generator=generator)
    text = pipe.encode_prompt(prompts, "cpu", 1, False)[0]
    call = {"sample": noise, "timestep": torch.tensor(500), "encoder_hidden_states": text}
    of_words = torch.stack(
        [placing(texts_of(pipe.tokenizer).read(said, text.shape[1]), WORDS["dog"]) for said in prompts]
    )
    with watched(base.unet, of_words, (16, 16)) as seen:
        alone = base.unet(**call).sample
    everywhere = pipe.unet(**call).sample
    with keep_background(pipe, WORDS):
        placed, told = pipe.unet(**call).sample, pipe.unet(**call, return_dict=False)
    looked = torch.stack(seen).mean(0)
    share = ((looked / looked.amax((1, 2, 3), keepdim=True).clamp(min=1e-8) - LOW) / (HIGH - LOW)).clamp(0, 1)
    assert_close(placed, share * everywhere + (1 - share) * alone)
    assert torch.equal(placed[::2], alone[::2]) and torch.equal(placed, told[0])
    assert (placed - alone).abs().max() > 0.01 and (placed - everywhere).abs().max() > 0.01


def test_prompts_without_the_trigger_are_the_bases_and_nothing_is_looked_for(base, pipe):
    passes = []
    pipe.unet.conv_in.register_forward_hook(lambda *_: passes.append(1))
    with keep_background(pipe, WORDS):
        assert far(drawn(pipe, WITHOUT), drawn(base, WITHOUT)) == 0
    assert len(passes) == 4


def test_a_prompt_that_names_the_subject_alone_has_no_background_to_keep(pipe):
    """Also beside one that has: each picture of a batch goes by its own prompt."""
    both, alone = [BARE, WITH], drawn(pipe, BARE)
    with keep_background(pipe, WORDS):
        placed = drawn(pipe)
        assert far(drawn(pipe, BARE), alone) < 1e-4  # of float32, as weights of one are multiplied with
        seeds = [torch.Generator().manual_seed(0) for _ in both]
        batch = pipe(both, num_inference_steps=4, guidance_scale=2.0, output_type="np", generator=seeds).images
    assert far(batch[0], alone) < 1e-4 and far(batch[1], placed) < 1e-4


def test_pictures_one_after_the_other_know_nothing_of_each_other(pipe):
    with keep_background(pipe, WORDS):
        alone = drawn(pipe)
    with keep_background(pipe, WORDS):
        drawn(pipe, "a small sks teddy on the right, blue background")
        assert far(drawn(pipe), alone) == 0


def test_after_the_block_nothing_is_left_also_after_an_error(pipe):
    before, hooks = drawn(pipe), len(pipe.unet._forward_pre_hooks)
    with pytest.raises(ZeroDivisionError), keep_background(pipe, WORDS):
        drawn(pipe)
        raise ZeroDivisionError
    assert here.focus is None and len(pipe.unet._forward_pre_hooks) == hooks
    assert far(drawn(pipe), before) == 0


def test_another_thread_draws_as_ever(pipe):
    before = drawn(pipe)
    with keep_background(pipe, WORDS), ThreadPoolExecutor(1) as pool:
        placed = drawn(pipe)
        other = pool.submit(drawn, pipe)
        assert far(drawn(pipe), placed) == 0
        assert far(other.result(), before) == 0


def test_a_mask_bounds_what_is_found(base, pipe):
    set_regions(pipe, {"dog": torch.zeros(16, 16)})
    with keep_background(pipe, WORDS):
        assert far(drawn(pipe), drawn(base)) < 1e-5
    set_regions(pipe, {})
    with keep_background(pipe, WORDS):
        free = drawn(pipe)
    set_regions(pipe, {"dog": torch.ones(16, 16)})
    with keep_background(pipe, WORDS):
        assert far(drawn(pipe), free) == 0


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
    of_words = torch.stack([placing(one, WORDS["dog"]) for one in said])
    found = looks(attn, hidden, text, of_words, (high, wide))
    assert found.shape == (2, 1, high, wide) and not found[1].any()
    (share,) = Course().step(500, {"dog": found}).values()
    weights = weights_of(share)
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
    wanted = ((grid / grid.max() - LOW) / (HIGH - LOW)).clamp(0, 1)
    assert_close(weights[:1], wanted)
    assert 0 < weights[0].max() <= 1 and not weights[1].any()


def test_places_are_divided_among_adapters_by_how_much_is_looked_for_each():
    """One place: three quarters of the most that was looked for the dog, a quarter for the cat, who has a mask."""
    seen = {"dog": torch.tensor([0.75, 1.0]).view(1, 1, 1, 2), "cat": torch.tensor([0.25, 1.0]).view(1, 1, 1, 2)}
    assert_close(
        divided(seen, (1, 2), {"cat": torch.tensor([[0.5], [1.0]])}),
        {"dog": torch.tensor([[[0.75], [0.5]]]), "cat": torch.tensor([[[0.125], [0.5]]])},
    )


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
        found.append((list(live), self._seen is None, shares(self, layer, live, *args)))
        return found[-1][-1]

    monkeypatch.setattr(Focus, "shares", keep)
    with keep_background(pipe, {"bear": ["sks teddy"], "cat": ["zwx cat"]}):
        drawn(pipe, "sks teddy on the left, zwx cat on the right", steps=1)
    alone = [own["bear"] for live, placed, own in found if placed and live == ["bear"]]
    both = [own for live, placed, own in found if placed and len(live) == 2]
    assert len(alone) == len(both) == 7  # block by block
    for one, own in zip(alone, both, strict=True):
        assert torch.equal(one, own["bear"]) and one.max() < 1
        assert_close(own["bear"] + own["cat"], torch.ones_like(one))


def test_where_was_looked_is_a_mean_over_the_steps_of_one_drawing():
    first, second = torch.tensor([2.0, 1.0]).view(1, 1, 1, 2), torch.tensor([0.0, 4.0]).view(1, 1, 1, 2)
    course = Course()
    assert_close(course.step(900, {"dog": first})["dog"].flatten(), torch.tensor([1.0, 0.5]))
    assert_close(course.step(500, {"dog": second})["dog"].flatten(), torch.tensor([0.5, 0.75]))
    assert_close(course.step(100, {"dog": second})["dog"].flatten(), torch.tensor([1 / 3, 2.5 / 3]))
    for noise in (900, 900, None):  # another drawing begins; who does not tell begins anew each time
        assert_close(course.step(noise, {"dog": second})["dog"].flatten(), torch.tensor([0.0, 1.0]))
    wide = torch.ones(1, 1, 1, 3)
    assert_close(course.step(800, {"dog": wide})["dog"], wide)


def test_what_has_no_words_or_looks_nowhere_is_refused(pipe, loaded):
    def enter(own, words):
        with keep_background(own, words):
            pass

    with pytest.raises(ValueError, match="'cat' is no adapter here that waits for a trigger"):
        enter(pipe, {"cat": ["x"]})
    unet = copy.deepcopy(loaded.unet)
    unet.add_adapter(ComcatConfig(r=2, trigger=["sks"], target_modules=r"down_blocks\..*attn2"), "dog")
    other = StableDiffusionPipeline(**{**loaded.components, "unet": unet}, requires_safety_checker=False)
    with pytest.raises(ValueError, match="on no cross-attention of a U-Net's way up"):
        enter(other, WORDS)


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
