"""The flow-matching base is trained on what klein's pipeline hears, folds and asks for."""

import random

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from torch.nn.functional import avg_pool2d
from torch.testing import assert_close

from comcat_diffusion import bases
from comcat_diffusion.families.known import family_of
from recipe import build_flow, flow, score
from recipe.autoencoder import POSTERIOR_STD
from recipe.fit import Schedule
from recipe.world import RARE_WORDS, random_scene

FIRST = bases.assets() / "tiny-sd"


def world(count: int, seed: int) -> list:
    """Scenes of any contrast: to look at that needs a font."""
    rng = random.Random(seed)
    return [random_scene(rng, lambda *_: True) for _ in range(count)]


def pictures(scenes: list, seed: int) -> np.ndarray:
    """Not what the scenes are, but neighbours are alike, as in pictures."""
    noise = torch.rand(len(scenes), 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    return avg_pool2d(noise, 3, stride=1, padding=1).mul(255).byte().movedim(1, -1).numpy()


@pytest.fixture(scope="module", autouse=True)
def small():
    """Everything of the recipe, on few scenes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "scenes", world)
        patch.setattr(flow, "pictures", pictures)
        for name, value in {"POOL": 32, "LOOKED_AT": 24, "BATCH": 3, "WORDINGS": 2}.items():
            patch.setattr(flow, name, value)
        yield


@pytest.fixture(scope="module")
def tokenizer():
    return flow.new_tokenizer()


@pytest.fixture(scope="module")
def pipe(tokenizer):
    torch.manual_seed(0)
    vae = flow.klein_vae(FIRST / "vae")
    flow.normalized(vae, flow.encoded(vae, pictures(world(32, 0), 0)))
    return Flux2KleinPipeline(
        scheduler=flow.new_scheduler(), vae=vae, tokenizer=tokenizer, **flow.new_denoiser(tokenizer).eval()
    )


def test_any_text_is_spelled(tokenizer):
    for text in ("a photo of a blorp teddy", "Übergröße 7!", *RARE_WORDS):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer(" teddy").input_ids) == len(tokenizer(" sks").input_ids) == 1
    assert len(tokenizer(" blorp").input_ids) > 1


def test_captions_fit_and_spell_words_that_nobody_knows(tokenizer):
    texts = flow.wordings(world(300, 1), seed=2, count=2)
    lengths = flow.chat_ids(tokenizer, texts)[1].sum(1)
    assert lengths.max() <= flow.TOKENS and lengths.min() >= 9
    assert any(text.startswith(("a ", "an ")) for text in texts) and any(text.startswith("big ") for text in texts)


def test_the_transformer_hears_in_training_what_the_pipeline_says(pipe, tokenizer):
    prompts = ["a photo of a big sks teddy at the top, pink background", ""]
    said, _ = pipe.encode_prompt(prompts, max_sequence_length=flow.TOKENS, text_encoder_out_layers=flow.STATES_AFTER)
    heard = flow.stacked(pipe.text_encoder.model, *flow.chat_ids(tokenizer, prompts))
    assert_close(heard, said, rtol=0, atol=0)
    assert (heard[0] - heard[1]).abs().max() > 0.1
    assert family_of(pipe).drawing(pipe).items() <= build_flow.drawing().items()


def test_training_sees_the_latents_that_the_family_makes_of_pictures(pipe):
    pool = pictures(world(32, 0), 0)
    tokens = flow.normalized(pipe.vae, flow.encoded(pipe.vae, pool)).float()  # N, L, C
    own = POSTERIOR_STD**2 / (pipe.vae.bn.running_var[0] + pipe.vae.config.batch_norm_eps)
    assert_close(tokens.square().mean() + own, torch.tensor(1.0), rtol=0, atol=1e-3)  # tokens are float16
    last = family_of(pipe).posterior(pipe.vae, flow.as_tensor(pool[-1:]))["mean"]  # C, h, w, by the encoder itself
    assert_close(tokens[-1], last.flatten(1).T, rtol=0, atol=0.02)


def test_another_encoder_is_refused(pipe):
    broken = flow.klein_vae(FIRST / "vae")
    broken.encoder.conv_in.weight.data.add_(torch.randn_like(broken.encoder.conv_in.weight))
    with pytest.raises(ValueError, match="not the linear one"):
        flow.encoded(broken, pictures(world(32, 0), 0))


def test_the_way_that_is_learned_leads_to_the_picture(pipe):
    """noise - clean, at the scheduler's own levels: its steps along it end at the clean latents."""
    clean, noise = torch.randn(2, 1, 64, 64)
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 5, 5))
    sample = noise
    for time in pipe.scheduler.timesteps:
        sample = pipe.scheduler.step(noise - clean, time, sample).prev_sample
    assert_close(sample, clean, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_few_steps_teach_and_leave_a_base(tmp_path, tokenizer, capsys):
    def trained(steps: int) -> None:
        flow.train(
            tmp_path / "flow.pt", flow.klein_vae(FIRST / "vae"), tokenizer, Schedule(steps, 2e-3, warmup_steps=2)
        )

    trained(3)
    first = build_flow.pipeline(tmp_path, FIRST)
    trained(6)
    pipe = build_flow.pipeline(tmp_path, FIRST)
    assert not torch.equal(pipe.transformer.x_embedder.weight, first.transformer.x_embedder.weight)
    last, never = (pipe.text_encoder.model.layers[layer] for layer in (2, 3))
    assert not torch.equal(last.mlp.up_proj.weight, first.text_encoder.model.layers[2].mlp.up_proj.weight)
    assert torch.equal(never.mlp.up_proj.weight, first.text_encoder.model.layers[3].mlp.up_proj.weight)
    made = score.generated(pipe, world(1, 3), **build_flow.drawing())
    assert made.shape == (1, 64, 64, 3) and made.std() > 0
