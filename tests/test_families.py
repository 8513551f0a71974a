"""Families of bases: which one a base is of, and what each one trains by, held to formulas written out here.

Letters: B batch, C latent channels, h x w latent size.
"""

import inspect

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, PixArtAlphaPipeline, SanaPipeline

from comcat_diffusion.bases import load_base
from comcat_diffusion.families.known import FAMILIES, family_of, family_of_denoiser
from comcat_diffusion.families.sana import Sana
from comcat_diffusion.training.batching import Batching
from comcat_diffusion.training.encode import Crop
from comcat_diffusion.training.learner import Learner
from comcat_diffusion.training.objective import objective_of
from tests import tiny_bases, tiny_families

PROMPTS = ["a photo of sks teddy", "a red ball"]


def crops(channels: int, side: int = 8) -> list[Crop]:
    """Made-up latents, a crop of a larger picture."""
    noise = torch.Generator().manual_seed(5)
    means = [torch.randn(channels, side, side, generator=noise) for _ in PROMPTS]
    frame = (40, 32, 3, 1, 16, 24)
    return [Crop(mean, mean.abs() / 9, text, text, frame) for mean, text in zip(means, PROMPTS, strict=True)]


def stepped(
    pipe: DiffusionPipeline, channels: int | None = None
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, ...]]]:
    """The losses of a batch as a step takes them; and clean latents, noise and time of each sample, drawn by hand."""
    learner, objective = Learner(pipe, PROMPTS, train_text=False), objective_of(pipe)
    made = crops(channels or pipe.vae.config.latent_channels)
    batching = Batching.of(made, 1, len(made))
    batch = batching.batch(made, objective, 0)
    with torch.no_grad():
        predicted = learner(batch.noisy, batch.timesteps, batch.prompts, batch.frames)
    losses, drawn = objective.loss(predicted, batch.target, batch.timesteps), []
    for place, index in enumerate(batching.chosen(0)):
        generator = batching.generator(1, place)
        mean, std = made[index].mean, made[index].std
        clean = mean + std * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        drawn.append((clean, noise, generator, made[index].prompt))
    return losses, drawn


@pytest.mark.parametrize("build", [tiny_bases.sd1, tiny_bases.sd2, tiny_bases.sdxl])
def test_a_step_on_a_u_net_is_that_of_the_paper(build, tmp_path):
    """|noise - eps(sqrt(a) x + sqrt(1 - a) noise, t)|^2, or of the velocity, with the schedule multiplied out."""
    pipe = DiffusionPipeline.from_pretrained(build(tmp_path))
    losses, drawn = stepped(pipe)
    config = DDPMScheduler.from_config(pipe.scheduler.config).config
    betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000, dtype=torch.float64).square()
    alphas, two = (1 - betas).cumprod(0), hasattr(pipe, "text_encoder_2")
    for loss, (clean, noise, generator, prompt) in zip(losses, drawn, strict=True):
        time = torch.randint(1000, (), generator=generator)
        kept, gone = alphas[time].sqrt().float(), (1 - alphas[time]).sqrt().float()
        words = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        ids = pipe.tokenizer(prompt, max_length=pipe.tokenizer.model_max_length, **words).input_ids
        with torch.no_grad():
            if two:
                read = [one(ids, output_hidden_states=True) for one in (pipe.text_encoder, pipe.text_encoder_2)]
                states = torch.cat([one.hidden_states[-2] for one in read], dim=-1)
                added = {"text_embeds": read[1].text_embeds, "time_ids": torch.tensor([[40.0, 32, 3, 1, 16, 24]])}
            else:
                states, added = pipe.text_encoder(ids)[0], None
            noisy = kept * clean + gone * noise
            answer = pipe.unet(noisy[None], time[None], states, added_cond_kwargs=added).sample[0]
        wanted = kept * noise - gone * clean if config.prediction_type == "v_prediction" else noise
        torch.testing.assert_close(loss, (answer - wanted).square().mean(), rtol=1e-4, atol=1e-6)  # float32 schedules


def test_a_step_on_kolors_is_that_of_stable_diffusion_xls_script(tmp_path):
    """|noise - eps|^2 over its 1100 times, with the last states but one of a ChatGLM and the last of the last token."""
    pipe = load_base(str(tiny_families.kolors(tmp_path)))
    losses, drawn = stepped(pipe)
    betas = torch.linspace(0.00085**0.5, 0.014**0.5, 1100, dtype=torch.float64).square()
    alphas, times = (1 - betas).cumprod(0), []
    for loss, (clean, noise, generator, prompt) in zip(losses, drawn, strict=True):
        time = torch.randint(1100, (), generator=generator)
        times.append(int(time))
        noisy = alphas[time].sqrt().float() * clean + (1 - alphas[time]).sqrt().float() * noise
        ids = [*pipe.tokenizer.get_prefix_tokens(), *pipe.tokenizer.tokenizer.encode(prompt)]
        gone = 256 - len(ids)
        mask = torch.cat([torch.zeros(1, gone), torch.ones(1, len(ids))], dim=1).long()
        places = torch.tensor([[0] * gone + list(range(len(ids)))])
        with torch.no_grad():
            read = pipe.text_encoder(torch.tensor([[0] * gone + ids]), places, mask, output_hidden_states=True)
            states, pooled = read.hidden_states[-2][:, 0][None], read.hidden_states[-1][-1]  # 1, M, E and 1, E
            added = {"text_embeds": pooled, "time_ids": torch.tensor([[40.0, 32, 3, 1, 16, 24]])}
            answer = pipe.unet(noisy[None], time[None], states, added_cond_kwargs=added).sample[0]
        torch.testing.assert_close(loss, (answer - noise).square().mean(), rtol=1e-4, atol=1e-6)
    assert len(times) == 2


@pytest.mark.parametrize("alpha", [False, True])
def test_a_step_on_a_pixart_is_that_of_its_script(alpha, tmp_path):
    """|noise - eps|^2 with eps the first half of the answer, as PixArt's own training of LoRAs has it."""
    more = {"kind": PixArtAlphaPipeline, "use_additional_conditions": True} if alpha else {}
    pipe = DiffusionPipeline.from_pretrained(tiny_families.pixart(tmp_path, **more))
    losses, drawn = stepped(pipe)
    alphas = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    added = {"resolution": torch.tensor([[16.0, 24.0]]), "aspect_ratio": torch.tensor([[16 / 24]])} if alpha else {}
    for loss, (clean, noise, generator, prompt) in zip(losses, drawn, strict=True):
        time = torch.randint(1000, (), generator=generator)
        noisy = alphas[time].sqrt().float() * clean + (1 - alphas[time]).sqrt().float() * noise
        how = {"padding": "max_length", "max_length": 120 if alpha else 300, "return_tensors": "pt"}
        read = pipe.tokenizer(prompt, **how)
        with torch.no_grad():
            states = pipe.text_encoder(read.input_ids, attention_mask=read.attention_mask)[0]
            answer = pipe.transformer(
                noisy[None], states, time[None], added or {"resolution": None, "aspect_ratio": None},
                encoder_attention_mask=read.attention_mask,
            ).sample[0]  # fmt: skip
        assert answer.shape[0] == 8
        torch.testing.assert_close(loss, (answer[:4] - noise).square().mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("build", [tiny_families.sd3, tiny_families.sd35])
def test_a_step_on_stable_diffusion_3_is_that_of_its_script(build, tmp_path):
    """The clean latents that follow from an answer, against the clean latents; times logit-normal, then shifted."""
    pipe = load_base(str(build(tmp_path)))
    losses, drawn = stepped(pipe)
    for loss, (clean, noise, generator, prompt) in zip(losses, drawn, strict=True):
        place = int(1000 * torch.sigmoid(torch.normal(0.0, 1.0, (1,), generator=generator)))
        sigma = (1000 - place) / 1000
        sigma = 3 * sigma / (1 + 2 * sigma)
        noisy = (1 - sigma) * clean + sigma * noise
        how = {"padding": "max_length", "return_tensors": "pt"}
        ids = pipe.tokenizer(prompt, max_length=pipe.tokenizer.model_max_length, **how).input_ids
        with torch.no_grad():
            read = [one(ids, output_hidden_states=True) for one in (pipe.text_encoder, pipe.text_encoder_2)]
            clips = torch.cat([one.hidden_states[-2] for one in read], dim=-1)
            t5 = torch.zeros(1, 256, clips.shape[-1])
            if pipe.text_encoder_3 is not None:
                t5 = pipe.text_encoder_3(pipe.tokenizer_3(prompt, max_length=256, **how).input_ids)[0]
            pooled = torch.cat([one.text_embeds for one in read], dim=-1)
            states, time = torch.cat([clips, t5], dim=1), torch.tensor([1000 * sigma])
            answer = pipe.transformer(noisy[None], states, pooled, time).sample[0]
        found = noisy - sigma * answer
        torch.testing.assert_close(loss, (found - clean).square().mean(), rtol=1e-4, atol=1e-6)


def test_a_step_on_sana_is_that_of_its_script(tmp_path):
    """The way from latents to noise, at uniform times; the scheduler's shift is for drawing."""
    pipe = load_base(str(tiny_families.sana(tmp_path)))
    losses, drawn = stepped(pipe)
    instruction = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    prefix = "\n".join(instruction)
    most = len(pipe.tokenizer(prefix).input_ids) + 300 - 2
    for loss, (clean, noise, generator, prompt) in zip(losses, drawn, strict=True):
        place = int(1000 * torch.rand(1, generator=generator))
        sigma = (1000 - place) / 1000
        noisy = (1 - sigma) * clean + sigma * noise
        read = pipe.tokenizer(prefix + prompt, padding="max_length", max_length=most, return_tensors="pt")
        kept = [0, *range(most - 299, most)]
        with torch.no_grad():
            states = pipe.text_encoder(read.input_ids, attention_mask=read.attention_mask)[0][:, kept]
            time, mask = torch.tensor([1000 * sigma]), read.attention_mask[:, kept]
            answer = pipe.transformer(noisy[None], states, time, encoder_attention_mask=mask).sample[0]
        torch.testing.assert_close(loss, (answer - (noise - clean)).square().mean(), rtol=1e-4, atol=1e-6)


def test_a_step_on_flux_2_klein_is_that_of_its_script(tmp_path):
    """The way from latents to noise, at uniform times; squares of four as one token, by the batch norm's statistics."""
    pipe = load_base(str(tiny_families.klein(tmp_path)))
    losses, drawn = stepped(pipe, 16)
    chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    places = torch.tensor([[0, row, column, 0] for row in range(8) for column in range(8)])
    words = torch.tensor([[0, 0, 0, number] for number in range(48)])
    for loss, (clean, noise, generator, prompt) in zip(losses, drawn, strict=True):
        place = int(1000 * torch.rand(1, generator=generator))
        sigma = (1000 - place) / 1000
        noisy = (1 - sigma) * clean + sigma * noise
        read = pipe.tokenizer(chat.format(prompt), padding="max_length", max_length=48, return_tensors="pt")
        with torch.no_grad():
            layers = pipe.text_encoder(**read, output_hidden_states=True).hidden_states
            states = torch.cat([layers[number] for number in (1, 2, 3)], dim=-1)
            tokens = noisy.permute(1, 2, 0).reshape(1, 64, 16)
            time = torch.tensor([sigma])
            answer = pipe.transformer(tokens, states, time, img_ids=places, txt_ids=words).sample[0]
        wanted = (noise - clean).permute(1, 2, 0).reshape(64, 16)
        torch.testing.assert_close(loss, (answer - wanted).square().mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["flux1", "schnell", "chroma"])
def test_a_step_on_flux_1_is_that_of_its_script(name, tmp_path):
    """The way from latents to noise, at uniform times, at the strength of 3.5 if it is told one.

    Chroma has no script; it is told a mask of the words, one token more, and of the picture.
    """
    pipe = load_base(str(getattr(tiny_families, name)(tmp_path)))
    losses, drawn = stepped(pipe, 16)
    places = torch.tensor([[0, row, column] for row in range(8) for column in range(8)])
    how = {"padding": "max_length", "max_length": 40, "return_tensors": "pt"}
    for loss, (clean, noise, generator, prompt) in zip(losses, drawn, strict=True):
        place = int(1000 * torch.rand(1, generator=generator))
        sigma = (1000 - place) / 1000
        noisy = (1 - sigma) * clean + sigma * noise
        with torch.no_grad():
            if name == "chroma":
                read = pipe.tokenizer(prompt, **how)
                states = pipe.text_encoder(**read)[0]
                mask = torch.cat([torch.ones(1, 1), read.attention_mask[:, :-1], torch.ones(1, 64)], dim=1)
                told = {"attention_mask": mask}
            else:
                states = pipe.text_encoder_2(pipe.tokenizer_2(prompt, **how).input_ids)[0]
                clip = pipe.tokenizer(prompt, **how | {"max_length": pipe.tokenizer.model_max_length}).input_ids
                told = {"pooled_projections": pipe.text_encoder(clip).pooler_output}
                told["guidance"] = torch.tensor([3.5]) if name == "flux1" else None
            tokens, time = noisy.permute(1, 2, 0).reshape(1, 64, 16), torch.tensor([sigma])
            words = torch.zeros(40, 3)
            answer = pipe.transformer(tokens, states, timestep=time, img_ids=places, txt_ids=words, **told).sample[0]
        wanted = (noise - clean).permute(1, 2, 0).reshape(64, 16)
        torch.testing.assert_close(loss, (answer - wanted).square().mean(), rtol=1e-4, atol=1e-6)


def test_a_step_on_z_image_is_that_of_its_script(tmp_path):
    """The way from latents to noise, which is the answer negated, at uniform times that the scheduler then shifts.

    Both prompts at once, of different lengths; of their states the last but one, without padding.
    """
    pipe = load_base(str(tiny_families.z_image(tmp_path)))
    losses, drawn = stepped(pipe)
    chat, films, times, texts, wanted = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", [], [], [], []
    for clean, noise, generator, prompt in drawn:
        place = int(1000 * torch.rand(1, generator=generator))
        sigma = (1000 - place) / 1000
        sigma = 3 * sigma / (1 + 2 * sigma)
        films.append(((1 - sigma) * clean + sigma * noise)[:, None])
        times.append(1 - sigma)
        wanted.append(noise - clean)
        read = pipe.tokenizer(chat.format(prompt), return_tensors="pt")
        with torch.no_grad():
            texts.append(pipe.text_encoder(**read, output_hidden_states=True).hidden_states[-2][0])
    assert len({len(text) for text in texts}) == 2
    with torch.no_grad():
        answers = pipe.transformer(films, torch.tensor(times), texts).sample
    for loss, answer, way in zip(losses, answers, wanted, strict=True):
        torch.testing.assert_close(loss, (-answer[:, 0] - way).square().mean(), rtol=1e-4, atol=1e-6)


def test_a_step_on_qwen_image_is_that_of_its_script(tmp_path):
    """The way from latents to noise, at uniform times; what stands before the user's words is not heard.

    Both prompts at once, the shorter one filled up under a mask.
    """
    pipe = load_base(str(tiny_families.qwen_image(tmp_path)))
    losses, drawn = stepped(pipe, 16)
    before = f"<|im_start|>system\n{tiny_families.DESCRIBED}<|im_end|>\n<|im_start|>user\n"
    tokens, times, texts, wanted = [], [], [], []
    for clean, noise, generator, prompt in drawn:
        place = int(1000 * torch.rand(1, generator=generator))
        sigma = (1000 - place) / 1000
        tokens.append(((1 - sigma) * clean + sigma * noise).permute(1, 2, 0).reshape(64, 16))
        times.append(sigma)
        wanted.append((noise - clean).permute(1, 2, 0).reshape(64, 16))
        read = pipe.tokenizer(f"{before}{prompt}<|im_end|>\n<|im_start|>assistant\n", return_tensors="pt")
        with torch.no_grad():
            texts.append(pipe.text_encoder(**read, output_hidden_states=True).hidden_states[-1][0, 34:])
    most = max(map(len, texts))
    assert len(texts[0]) != len(texts[1])
    mask = torch.stack([torch.arange(most) < len(text) for text in texts])
    filled = torch.stack([torch.cat([text, torch.zeros(most - len(text), text.shape[1])]) for text in texts])
    with torch.no_grad():
        answers = pipe.transformer(
            torch.stack(tokens), filled, mask, torch.tensor(times), img_shapes=[[(1, 8, 8)]] * 2
        ).sample
    for loss, answer, way in zip(losses, answers, wanted, strict=True):
        torch.testing.assert_close(loss, (answer - way).square().mean(), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_latents_of_a_film_have_a_mean_and_a_std_for_each_channel(tmp_path):
    """There and back, and in the order in which the pipeline makes tokens of them."""
    pipe = load_base(str(tiny_families.qwen_image(tmp_path)))
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    family, vae = family_of(pipe), pipe.vae
    own, made = vae.encode(pixels[:, :, None]).latent_dist, family.posterior(vae, pixels)
    middle, spread = (
        torch.tensor(one).view(1, 4, 1, 1, 1) for one in (vae.config.latents_mean, vae.config.latents_std)
    )
    for name, values in (("mean", (own.mean - middle) / spread), ("std", own.std / spread)):
        tokens = pipe._pack_latents(values.transpose(1, 2), 1, 4, 8, 8)
        torch.testing.assert_close(made[name].flatten(1).T[None], tokens)
    tokens = made["mean"].flatten(1).T[None]
    torch.testing.assert_close(family.decoded(vae, tokens), vae.decode(own.mean).sample[:, :, 0])
    how = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(1), "height": 16, "width": 16}
    left = pipe("a dog", output_type="latent", **how).images
    how["generator"] = torch.Generator().manual_seed(1)
    picture = pipe("a dog", output_type="pt", **how).images
    torch.testing.assert_close((family.decoded(vae, left) / 2 + 0.5).clamp(0, 1), picture)


@torch.no_grad()
def test_squares_of_latents_are_shifted_and_scaled_there_and_back(tmp_path):
    pipe = load_base(str(tiny_families.flux1(tmp_path)))
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    family, vae = family_of(pipe), pipe.vae
    own, made = vae.encode(pixels).latent_dist, family.posterior(vae, pixels)
    for name, values in (("mean", 1.3 * (own.mean - 0.25)), ("std", 1.3 * own.std)):
        for channel, row, column in ((0, 0, 0), (3, 1, 0), (2, 0, 1)):
            number = 4 * channel + 2 * row + column
            torch.testing.assert_close(made[name][number], values[0, channel, row::2, column::2])
    tokens = pipe._pack_latents(1.3 * (own.mean - 0.25), 1, 4, 8, 8)
    assert torch.equal(tokens, made["mean"].flatten(1).T[None])
    torch.testing.assert_close(family.decoded(vae, tokens), vae.decode(own.mean).sample)


def test_latents_are_shifted_and_scaled_there_and_back(tmp_path):
    pipe = load_base(str(tiny_families.sd35(tmp_path)))
    pixels = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    family, vae = family_of(pipe), pipe.vae
    with torch.no_grad():
        made, own = family.posterior(vae, pixels), vae.encode(pixels).latent_dist
        torch.testing.assert_close(made["mean"], 1.3 * (own.mean[0] - 0.25))
        torch.testing.assert_close(made["std"], 1.3 * own.std[0])
        torch.testing.assert_close(family.decoded(vae, made["mean"][None]), vae.decode(own.mean).sample)
        vae = tiny_families.sana_vae()
        made, own = Sana().posterior(vae, pixels), vae.encode(pixels).latent
        torch.testing.assert_close(made["mean"], 0.41 * own[0])
        assert not made["std"].any()
        torch.testing.assert_close(Sana().decoded(vae, made["mean"][None]), vae.decode(own).sample)


@torch.no_grad()
def test_squares_of_latents_are_one_by_the_statistics_of_a_batch_norm(tmp_path):
    """And what the pipeline leaves of such tokens at the end of its drawing is what the autoencoder gave."""
    pipe = load_base(str(tiny_families.klein(tmp_path)))
    pixels = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    family, vae = family_of(pipe), pipe.vae
    own, made = vae.encode(pixels).latent_dist.mode(), family.posterior(vae, pixels)
    mean, std = vae.bn.running_mean, (vae.bn.running_var + 1e-4).sqrt()
    for channel, row, column in ((0, 0, 0), (3, 1, 0), (2, 0, 1), (1, 1, 1)):
        number = 4 * channel + 2 * row + column
        one = own[0, channel, row::2, column::2]
        torch.testing.assert_close(made["mean"][number], (one - mean[number]) / std[number])
    assert made["mean"].shape == (16, 4, 6) and not made["std"].any()
    how = {"num_inference_steps": 1, "sigmas": [1e-6], "output_type": "latent", "height": 16, "width": 24}
    left = pipe(prompt="a dog", latents=made["mean"][None], **how, **family.drawing(pipe)).images
    torch.testing.assert_close(left, own, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(family.decoded(vae, left), vae.decode(left).sample)


def test_every_family_is_found_by_its_classes():
    for family in FAMILIES:
        for kind in family.pipelines:
            assert family_of(type(kind, (), {})()) is family
    xl, plain = {"addition_embed_type": "text_time"}, {"addition_embed_type": None}
    assert [family_of_denoiser("UNet2DConditionModel", config).name for config in (plain, xl)] == [
        "Stable Diffusion 1.x and 2.x",
        "Stable Diffusion XL",
    ]
    floyd = {"encoder_hid_dim_type": "text_proj", "addition_embed_type": "text"}
    assert family_of_denoiser("UNet2DConditionModel", floyd) is None
    told = {"encoder_hid_dim_type": "text_proj"}
    for config in (xl | told, told | {"cross_attention_dim": 2048}):  # of a base, and what a file says of one
        assert family_of_denoiser("UNet2DConditionModel", config).name == "Kolors"


def test_another_family_is_refused_by_its_class_beside_those_that_are_known():
    with pytest.raises(ValueError, match=r"a WanPipeline, which is of no family .*Stable Diffusion XL"):
        family_of(type("WanPipeline", (), {})())
