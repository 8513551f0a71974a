"""Transformers whose picture and text share one softmax keep backgrounds by where they look at a subject's words."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close

from comcat_diffusion import ComcatConfig, bases, keep_background, listen
from comcat_diffusion.adapters import focus
from comcat_diffusion.adapters.call import here
from comcat_diffusion.adapters.focus import Focus, placeable
from comcat_diffusion.adapters.looking import spread, that_look, watched, weights_of
from comcat_diffusion.adapters.parts import denoiser
from comcat_diffusion.adapters.placing import add_adapter, set_adapters
from comcat_diffusion.adapters.texts import texts_of
from comcat_diffusion.families.known import family_of
from comcat_diffusion.training.objective import objective_of
from comcat_diffusion.training.outline import Outliner, can_outline
from comcat_diffusion.words import Subject
from tests import tiny_families
from tests.slow import mostly

WITH, WITHOUT = "a photo of sks teddy on a green table", "a photo of a red ball on a green table"
BARE = "a photo of sks teddy"
WORDS = {"dog": ["sks teddy", "sks"]}
FAMILIES = mostly(["sd35", "klein", "flux1", "z_image", "qwen_image", "chroma"], "sd35", "klein", "z_image")
PICTURE_FIRST = ("sd35", "z_image")  # in their attentions; in the others words come before


@pytest.fixture(scope="module", params=FAMILIES)
def base(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    pipe = bases.load_base(str(getattr(tiny_families, request.param)(folder)))
    pipe.set_progress_bar_config(disable=True)
    pipe.tiny = request.param
    return pipe


@pytest.fixture
def pipe(base, randomize):
    """The base with an adapter, which goes again."""
    yield with_adapters(base, randomize, "dog")
    base.transformer.delete_adapters(list(base.transformer.peft_config))


def with_adapters(pipe, randomize, *names, **triggers):
    for name in names:
        trigger = triggers.get(name, ["sks"])
        targets = family_of(pipe).usual_targets("tied")
        add_adapter(denoiser(pipe), ComcatConfig(r=2, foldable=True, trigger=trigger, target_modules=targets), name)
        randomize(denoiser(pipe), name, std=0.5)
    listen(pipe)
    set_adapters(pipe, names, [1.0] * len(names))
    return pipe


def stepped(pipe, call: Callable, prompt, monkeypatch) -> list[torch.Tensor]:
    """Latents after each step, of all times that a pipeline is called: of tokens (B, N, C), or (B, C, h, w)."""
    seen, family, own = [], family_of(pipe), type(pipe.scheduler).step

    def step(self, *args, **kwargs):
        made = own(self, *args, **kwargs)
        seen.append(made[0].clone())
        return made

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(type(pipe.scheduler), "step", step)
        away = {} if family.nothing is None else {"negative_prompt": family.nothing}
        how = {**family.drawing(pipe), **family.guided(3.0), **away, "num_inference_steps": 3, "output_type": "latent"}
        side = bases.native_resolution(pipe)
        call(prompt=prompt, generator=torch.Generator().manual_seed(0), height=side, width=side, **how)
    return seen


def places_of(latents: torch.Tensor, outside: torch.Tensor) -> torch.Tensor:
    """What latents are at places of the tokens' grid, (h, w) of bool."""
    if latents.ndim == 3:
        return latents[:, outside.flatten()]
    factor = latents.shape[-1] // outside.shape[-1]
    return latents[..., outside.repeat_interleave(factor, 0).repeat_interleave(factor, 1)]


def test_at_every_step_latents_around_the_subject_are_those_of_the_bases_own_picture(pipe, monkeypatch):
    """To the bit, whatever passes its pipeline takes; where the subject is, they are others."""

    def left(at, grown):
        assert grown and at.amin() == 0 and at.amax() == 1
        made = torch.zeros_like(at)
        made[..., : at.shape[-1] // 2] = 1
        return made

    set_adapters(pipe, ["dog"], [0.0])
    before = stepped(pipe, pipe, WITH, monkeypatch)
    set_adapters(pipe, ["dog"], [1.0])
    free = stepped(pipe, pipe, WITH, monkeypatch)
    monkeypatch.setattr(focus, "weights_of", left)
    twice = stepped(pipe, partial(keep_background, pipe, WORDS), WITH, monkeypatch)
    alone, placed = twice[:3], twice[3:]
    side = 8 if before[0].ndim == 3 else 4
    outside = torch.zeros(side, side, dtype=torch.bool)
    outside[:, side // 2 :] = True
    for step, own in enumerate(before):
        assert torch.equal(alone[step], own) and len(placed) == 3
        assert torch.equal(places_of(placed[step], outside), places_of(own, outside))
    assert torch.equal(places_of(placed[0], ~outside), places_of(free[0], ~outside))
    assert (places_of(placed[-1], ~outside) - places_of(before[-1], ~outside)).abs().max() > 1e-3
    assert here.focus is None and here.latent is None


def test_what_names_nobody_or_nothing_else_is_drawn_once(pipe, monkeypatch):
    call = partial(keep_background, pipe, WORDS)
    for prompt in (WITHOUT, BARE):
        once, own = stepped(pipe, call, prompt, monkeypatch), stepped(pipe, pipe, prompt, monkeypatch)
        assert len(once) == 3 and torch.equal(once[-1], own[-1])


@torch.no_grad()
def test_how_much_a_place_looks_is_the_hosts_own_softmax_over_the_text(base, monkeypatch):
    """Against logits in float64 of the queries and keys that the attention's kernel is given, behind norms and all."""
    model, family = base.transformer, family_of(base)
    condition = family.encode(base, [WITHOUT, WITH])
    texts = texts_of(base.tokenizer, family.reading(base))
    said = [texts.read(text, len(own)) for text, own in zip([WITHOUT, WITH], condition["states"], strict=True)]
    of_words = pad_sequence([one.within(WORDS["dog"]) for one in said], batch_first=True).double()
    side = 16 if base.tiny == "z_image" else 8
    latents = torch.randn(2, model.config.in_channels, side, side, generator=torch.Generator().manual_seed(1))
    call = model, latents, torch.tensor([500.0, 500.0]), condition, None
    layers, running, given = that_look(model), [], []

    def kernel(query, key, value, attn_mask=None, **more):
        if running:
            given.append((query.double(), key.double(), attn_mask))
        return scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **more)

    hooks = [own.register_forward_pre_hook(lambda *_: running.append(1)) for own in layers]
    hooks += [own.register_forward_hook(lambda *_: running.clear()) for own in layers]
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", kernel)
        plain = family.predict(*call)
    for hook in hooks:
        hook.remove()
    with watched(model, of_words) as seen:
        assert torch.equal(family.predict(*call), plain)  # whoever looks on changes nothing
    assert len(seen) == len(layers) == len(given) and not any(own._forward_pre_hooks for own in layers)
    for (query, key, mask), found in zip(given, seen, strict=True):
        logits = query @ key.mT * query.shape[-1] ** -0.5  # B, H, N, N
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else logits + mask
        shares, count = logits.softmax(-1), found[0].numel()
        words, text = torch.zeros(2, 1, 1, logits.shape[-1]).double(), torch.ones(logits.shape[-1]).double()
        begin = count if base.tiny in PICTURE_FIRST else 0
        picture = slice(0, count) if begin else slice(-count, None)
        words[..., begin : begin + of_words.shape[1]], text[picture] = of_words[:, None, None], 0
        looked = (shares * words).sum(-1) / (shares * text).sum(-1)  # B, H, N
        assert_close(found.double().flatten(1), looked.mean(1)[:, picture], rtol=1e-4, atol=1e-6)
        assert not found[0].any() and found[1].min() > 0


@torch.no_grad()
def test_two_subjects_share_each_place_and_words_have_the_mean(base, randomize, monkeypatch):
    pipe = with_adapters(base, randomize, "dog", "cat", cat=["table"])
    shares, found = Focus.shares, []

    def keep(self, layer, live, args, kwargs, masked):
        found.append((self._at is not None, layer, shares(self, layer, live, args, kwargs, masked)))
        return found[-1][-1]

    monkeypatch.setattr(Focus, "shares", keep)
    words = {"dog": ["sks teddy"], "cat": ["table"]}
    stepped(pipe, partial(keep_background, pipe, words), WITH, monkeypatch)
    placed = [(layer, own) for at, layer, own in found if at]
    assert placed and len(placed) < len(found)
    for layer, own in placed:
        assert_close(own["dog"] + own["cat"], torch.ones_like(own["dog"]))
        assert own["dog"].std() > 0
        around = own["dog"].shape[1] - 64
        if layer.style.stream and around:
            picture = own["dog"][:, :64] if base.tiny in PICTURE_FIRST else own["dog"][:, around:]
            others = own["dog"][:, 64:] if base.tiny in PICTURE_FIRST else own["dog"][:, :around]
            assert_close(others, picture.mean(1, keepdim=True).expand_as(others))
    base.transformer.delete_adapters(["dog", "cat"])


def test_predictions_are_put_together_by_place():
    """Of tokens, of latents as large or twice as large as the tokens, and of films of one frame."""
    weights = torch.tensor([[0.0, 0.5], [1.0, 0.25]]).view(1, 1, 2, 2)
    tokens = spread(torch.zeros(1, 4, 3), torch.ones(1, 4, 3), weights)
    assert_close(tokens[0, :, 0], torch.tensor([0.0, 0.5, 1.0, 0.25]))
    twice = spread(torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4), weights)
    assert_close(twice[0, 0], torch.tensor([[0.0, 0, 0.5, 0.5]] * 2 + [[1.0, 1, 0.25, 0.25]] * 2))
    (film,) = spread([torch.zeros(3, 1, 4, 4)], [torch.ones(3, 1, 4, 4)], weights)
    assert torch.equal(film[:, 0], twice[0])
    with pytest.raises(ValueError, match="has other places than the picture"):
        spread(torch.zeros(1, 8, 3), torch.ones(1, 8, 3), weights)  # a picture to start from beside


def test_an_edge_of_tokens_counts_as_the_subjects():
    seen = torch.zeros(1, 1, 5, 5)
    seen[..., 2, 2], seen[..., 0, 0] = 0.35, 0.19
    found = weights_of(seen, True)[0, 0]
    wanted = torch.zeros(5, 5)
    wanted[1:4, 2] = wanted[2, 1:4] = 0.5
    assert_close(found, wanted)


@pytest.fixture(scope="module")
def trained():
    pipe = bases.load_base("embedded-flow")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_trained_base_keeps_its_background_and_draws_the_subject_there(trained, randomize):
    prompt, words = "a photo of a big sks teddy on the left, red background", {"dog": ["sks teddy"]}

    def drawn(call) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        how = {**family_of(trained).drawing(trained), "num_inference_steps": 4, "guidance_scale": 2.0}
        return call(prompt=prompt, generator=generator, output_type="np", height=64, width=64, **how).images[0]

    before = drawn(trained)
    with_adapters(trained, randomize, "dog")
    assert placeable(trained, words) == words
    free, kept = drawn(trained), drawn(partial(keep_background, trained, words))
    trained.transformer.delete_adapters("dog")
    right = np.s_[:, 52:]
    assert np.abs(kept - before)[right].mean() < np.abs(free - before)[right].mean() / 3
    assert np.abs(kept - before)[16:48, :32].mean() > 0.05


def test_a_trained_base_finds_the_subject_in_pictures(trained):
    """Known or not; the tokens around what is found count as the subject's."""
    from comcat_diffusion.training.encode import posterior
    from tests.test_outline import drawn, pictures

    outliner = Outliner(trained, objective_of(trained))
    assert can_outline(trained)
    for class_word in ("teddy", "blorp"):
        for picture in pictures():
            mean = posterior(trained, picture)["mean"]
            share = outliner.share(mean, Subject("sks", class_word), (64, 64, 0, 0, 64, 64))
            thing = drawn(picture, mean.shape[-2:])
            assert share.shape == thing.shape and (share * thing).sum() > 0.9 * thing.sum()
            if class_word == "teddy":
                near = torch.nn.functional.max_pool2d((thing > 0).float(), 3, 1, 1)
                assert ((1 - near) * share).sum() < 0.1 * share.sum()


def test_a_base_that_reads_by_cross_attention_alone_shows_no_place(tmp_path):
    pipe = bases.load_base(str(tiny_families.pixart(tmp_path)))
    assert not can_outline(pipe)
    add_adapter(pipe.transformer, ComcatConfig(r=2, trigger=["sks"]), "dog")
    assert not placeable(pipe, {"dog": ["sks"]})
    with pytest.raises(ValueError, match="on no attention that shows from where a word is looked at"):
        keep_background(pipe, {"dog": ["sks"]}, WITH)
