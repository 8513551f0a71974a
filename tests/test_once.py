"""Keys and values of a text that are computed once for all steps of a picture."""

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import inject_adapter_in_model
from PIL import Image

from comcat_diffusion import bases, set_regions
from comcat_diffusion.adapters.call import here
from comcat_diffusion.adapters.config import ComcatConfig
from comcat_diffusion.adapters.once import text_once
from comcat_diffusion.generation.pictures import Drawing, Sampling, draw
from tests.slow import mostly

KINDS = {"free": {}, "foldable": {"foldable": True}, "tied": {"foldable": True, "tied": True}}


@pytest.fixture(params=mostly(KINDS, "free", "tied"))
def unet(request, tiny_unet, randomize):
    """With an adapter of each kind on all attentions, self-attentions too."""
    model = tiny_unet(torch.float64)
    inject_adapter_in_model(ComcatConfig(r=2, target_modules=["attn1", "attn2"], **KINDS[request.param]), model, "dog")
    return randomize(model, "dog")


def called(model, part="k_down"):
    """A list that grows at every use of a cross-attention's factor."""
    calls = []
    for name, module in model.named_modules():
        if name.endswith(f"attn2.comcat.comcat_{part}.dog"):
            module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def steps(model, tiny, contexts, block):
    """Outputs for the same latents at timesteps of their own, with these texts."""
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in tiny.inputs().items()}
    outputs = []
    with torch.no_grad(), block:
        for number, context in enumerate(contexts):
            more = {"timestep": torch.tensor(900 - 100 * number), "encoder_hidden_states": context}
            outputs.append(model(**inputs | more)[0])
    return outputs


def test_the_same_text_is_read_once_and_another_one_anew(unet, tiny_unet):
    first = tiny_unet.inputs()["encoder_hidden_states"].double()
    texts = [first, first, first, first + 1, first + 1, first]
    texts[4] = texts[3]
    expected = steps(unet, tiny_unet, texts, nullcontext())
    for part in ("k_down", "v_down"):
        calls = called(unet, part)
        found = steps(unet, tiny_unet, texts, text_once())
        assert len(calls) == 3 * 4  # three texts, four cross-attentions
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_after_the_block_everything_is_as_before_also_after_an_error(unet, tiny_unet, randomize):
    text = tiny_unet.inputs()["encoder_hidden_states"].double()
    (before,) = steps(unet, tiny_unet, [text], text_once())
    with pytest.raises(ValueError, match="stopped"), text_once():
        raise ValueError("stopped")
    assert here.texts is None
    randomize(unet, "dog", seed=7)
    (after,) = steps(unet, tiny_unet, [text], nullcontext())
    assert not torch.allclose(before, after)
    assert torch.equal(steps(unet, tiny_unet, [text], text_once())[0], after)


def test_a_copy_made_inside_is_independent(unet, tiny_unet, randomize):
    text = tiny_unet.inputs()["encoder_hidden_states"].double()
    with text_once():
        steps(unet, tiny_unet, [text], nullcontext())
        other = copy.deepcopy(unet)
    randomize(other, "dog", seed=7)
    assert not torch.allclose(
        *steps(unet, tiny_unet, [text], nullcontext()), *steps(other, tiny_unet, [text], nullcontext())
    )


@pytest.mark.parametrize("regions", mostly([False, True], True))
def test_pictures_are_the_same_and_their_prompts_read_once(monkeypatch, randomize, regions):
    pipe = bases.load_base("embedded")
    pipe.set_progress_bar_config(disable=True)
    for name in ("dog", "cat"):
        pipe.unet.add_adapter(ComcatConfig(r=2, foldable=True, target_modules=["attn2"]), name)
        randomize(pipe.unet, name, std=0.05)
    pipe.unet.set_adapter(["dog", "cat"])
    if regions:
        half = Image.new("L", (64, 64))
        half.paste(255, (0, 0, 32, 64))
        set_regions(pipe, {"dog": half})
    drawings, sampling = [Drawing("a big dog on the left, red background", seed) for seed in (0, 1)], Sampling(3, 2.0)

    def drawn() -> list[bytes]:
        return [picture.tobytes() for picture in draw(pipe, drawings, sampling)]

    calls = called(pipe.unet)
    once = drawn()
    count = len(calls)
    monkeypatch.setattr("comcat_diffusion.generation.pictures.text_once", nullcontext)
    assert drawn() == once and len(calls) - count == 3 * count  # three steps
