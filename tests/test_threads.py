"""Threads that share a denoiser, a pipeline and a scheduler each: every picture is as its thread draws it alone."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch.testing import assert_close

from comcat_diffusion import ComcatConfig, bases, listen, remember_prompts, set_regions
from comcat_diffusion.adapters.call import here
from comcat_diffusion.adapters.gate import Gate
from comcat_diffusion.adapters.model import adapted_layers
from comcat_diffusion.adapters.once import text_once
from tests.slow import mostly, slow

PROMPTS = [
    "a photo of a big sks teddy on the left, red background",
    "a photo of a big dog on the right, blue background",
    "a small zwx dog, green background",
    "a photo of zwx cat beside sks teddy",
]
SEEDS = range(2)
KINDS = {
    "free": {"convolutions": 2},  # terms beside convolutions as well
    "foldable": {"foldable": True},
    "tied": {"foldable": True, "tied": True},
}


@pytest.fixture(scope="module")
def shared():
    """The embedded base with two adapters that wait, one of each word."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe = bases.load_base("embedded")
        for name, trigger, kind in (("dog", "sks", "tied"), ("cat", "zwx", "free")):
            pipe.unet.add_adapter(ComcatConfig(r=4, trigger=[trigger], **KINDS[kind]), name)
        pipe.unet.set_adapters(["dog", "cat"], [0.9, 0.7])
        for name, weight in pipe.unet.named_parameters():
            if "comcat" in name:
                torch.nn.init.normal_(weight, std=0.2)
    return pipe


def pipeline_of(shared) -> StableDiffusionPipeline:
    """One of a thread's own over the shared parts, the tokenizer among them."""
    parts = {**shared.components, "scheduler": copy.deepcopy(shared.scheduler)}
    pipe = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    listen(pipe)
    return pipe


def picture(pipe, prompt, seed) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    with text_once():
        return pipe(prompt, num_inference_steps=2, guidance_scale=2.0, output_type="np", generator=generator).images[0]


@pytest.mark.parametrize(("count", "by_place"), [(2, True), slow(2, False), slow(4, False), slow(4, True)])
def test_every_thread_draws_what_it_draws_alone(shared, count, by_place):
    pipes = {prompt: pipeline_of(shared) for prompt in PROMPTS[:count]}
    half = torch.zeros(16, 16)
    half[:, :8] = 1
    set_regions(shared, {"cat": half} if by_place else {})
    alone = {prompt: [picture(pipe, prompt, seed) for seed in SEEDS] for prompt, pipe in pipes.items()}
    assert all(np.abs(alone[one][0] - alone[other][0]).max() > 0.05 for one in pipes for other in pipes if one != other)
    start = threading.Barrier(count)

    def work(prompt):
        start.wait()
        drawn = [picture(pipes[prompt], prompt, seed) for seed in SEEDS]
        assert here.heard is None and here.latent is None and here.texts is None
        return drawn

    with ThreadPoolExecutor(count) as pool:
        together = dict(zip(pipes, pool.map(work, pipes), strict=True))
    for prompt in pipes:
        assert all(np.array_equal(one, other) for one, other in zip(together[prompt], alone[prompt], strict=True))


def test_after_a_pass_that_fails_nothing_is_known_of_it(shared):
    pipe = pipeline_of(shared)
    set_regions(shared, {"cat": torch.ones(16, 16)})
    broken = shared.unet.conv_out.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        picture(pipe, PROMPTS[0], 0)
    broken.remove()
    assert here.heard is None and here.latent is None and here.texts is None


@pytest.mark.parametrize("reentrant", mostly([False, True], False))
def test_gradient_checkpointing_runs_blocks_again_in_the_call_that_they_were_of(shared, reentrant):
    """On a GPU they run again in a thread of autograd's; here one that is as ignorant is made by hand."""
    unet = copy.deepcopy(shared.unet)
    pipe = StableDiffusionPipeline(**{**shared.components, "unet": unet}, requires_safety_checker=False)
    listen(pipe)
    set_regions(pipe, {"cat": torch.ones(16, 16)})
    states = pipe.encode_prompt(PROMPTS[3], "cpu", 1, False)[0].detach()
    remember_prompts(pipe, states, PROMPTS[3])
    unet.requires_grad_(False)
    factors = [p.requires_grad_(True) for name, p in unet.named_parameters() if "comcat" in name]
    latents = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_(reentrant)

    def gradients() -> list[torch.Tensor]:
        loss = unet.train()(latents, 500, states).sample.square().mean()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(loss.backward).result()
        found = [p.grad.clone() for p in factors]
        for p in factors:
            p.grad = None
        return found

    plain = gradients()
    assert any(gradient.abs().max() > 0 for gradient in plain)
    run = torch.utils.checkpoint.checkpoint
    unet.enable_gradient_checkpointing(lambda block, *args: run(block, *args, use_reentrant=reentrant))
    for _ in range(2):
        for again, once in zip(gradients(), plain, strict=True):  # whose sums come in another order
            assert_close(again, once, rtol=1e-4, atol=1e-5 * float(once.abs().max()))


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_denoiser_hears_every_prompt(shared, tiny_unet, randomize):
    unet = tiny_unet(torch.float64)
    unet.add_adapter(ComcatConfig(r=2, trigger=["sks"]), "dog")
    layers = list(adapted_layers(randomize(unet, "dog")).values())
    gate = Gate(shared.tokenizer)
    gate.follow(unet, layers)
    for layer in layers:
        layer.gate = gate
    inputs = tiny_unet.inputs()

    def predicted() -> list[torch.Tensor]:
        found = []
        for prompt in ("a sks dog", "a dog", "masks", "sks"):
            gate.tell(inputs["encoder_hidden_states"], [prompt] * len(inputs["sample"]))
            found.append(unet(**inputs).sample)
        return found

    plain = predicted()
    assert (plain[0] - plain[1]).abs().max() > 1e-3
    unet.compile(backend="eager")
    for _ in range(2):
        for compiled, eager in zip(predicted(), plain, strict=True):
            assert_close(compiled, eager)
