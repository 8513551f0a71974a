"""The loop: which pictures a step sees, that accumulation equals a larger batch, and that a broken step is caught."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler

from comcat_diffusion import ComcatConfig
from comcat_diffusion.adapters.model import factors
from comcat_diffusion.training.batching import Batching
from comcat_diffusion.training.encode import Crop
from comcat_diffusion.training.learner import Learner
from comcat_diffusion.training.loop import OVERFLOWS, Loop, NotFinite, held_out_loss
from comcat_diffusion.training.objective import Objective


def data(count=4, sizes=((8, 8),)):
    noise = torch.Generator().manual_seed(3)
    crops = []
    for number in range(count):
        mean = torch.randn(4, *sizes[number % len(sizes)], generator=noise)
        crops.append(Crop(mean, torch.full_like(mean, 0.1), f"prompt {number % 2}", f"{number}.png", (8,) * 6))
    return crops


def learner(unet):
    """A learner whose text states are noise of their own for every prompt."""

    def encode_prompt(prompt, **settings):
        states = [torch.randn(7, 24, generator=torch.Generator().manual_seed(len(p) + ord(p[-1]))) for p in prompt]
        return torch.stack(states), None

    encoder = SimpleNamespace(device=torch.device("cpu"), to=lambda device: None)
    pipe = SimpleNamespace(unet=unet, encode_prompt=encode_prompt, text_encoder=encoder)
    return Learner(pipe, ["prompt 0", "prompt 1"], train_text=False)


def loop(unet, batch_size=2, accumulate=1, pictures=None, rate=1e-2):
    unet.add_adapter(ComcatConfig(r=2), "dog")
    with torch.no_grad():  # not the random start of the process: every loop of a test starts the same
        for number, factor in enumerate(factors(unet, "dog").values()):
            factor.copy_(torch.randn(factor.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
    optimizer = torch.optim.SGD([p for p in unet.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    prepared, optimizer, schedule = accelerator.prepare(learner(unet), optimizer, schedule)
    objective = Objective(DDPMScheduler(prediction_type="v_prediction"))
    pictures = pictures or data()
    batching = Batching.of(pictures, 7, batch_size)
    return Loop(prepared, pictures, objective, batching, optimizer, schedule, accelerator, 1e9)


def test_every_picture_comes_once_per_pass_in_an_order_of_its_own():
    batching = Batching(5, 2, (tuple(range(6)),))
    seen = [index for number in range(9) for index in batching.chosen(number)]
    passes = [seen[0:6], seen[6:12], seen[12:18]]
    assert all(sorted(one) == list(range(6)) for one in passes) and len({tuple(one) for one in passes}) == 3


def test_buckets_are_never_mixed_and_get_their_share():
    crops = data(6, sizes=((8, 8), (4, 8), (8, 8)))  # four square ones, two wide ones
    batching = Batching.of(crops, 5, 3)
    batches = [batching.chosen(number) for number in range(12)]
    assert all(len({crops[index].mean.shape for index in batch}) == 1 for batch in batches)
    counts = [sum(batch.count(index) for batch in batches) for index in range(6)]
    assert counts == [6] * 6
    shapes = [crops[batch[0]].mean.shape for batch in batches]
    assert len(set(shapes[:3])) == 2 or len(set(shapes[:6])) == 2  # in random order


def test_repeats_make_a_picture_count_more():
    crops = [crop if n else Crop(**{**vars(crop), "repeats": 3}) for n, crop in enumerate(data(3))]
    batching = Batching.of(crops, 5, 1)
    seen = [batching.chosen(number)[0] for number in range(10)]
    assert [seen.count(index) for index in range(3)] == [6, 2, 2]


@pytest.mark.parametrize(("processes", "batch_size"), [(2, 2), (4, 1)])
def test_processes_see_what_one_with_the_larger_batch_sees(processes, batch_size):
    crops, objective = data(5), Objective(DDPMScheduler())
    alone = Batching.of(crops, 5, 4)
    shared = Batching.of(crops, 5, batch_size)
    for number in range(3):
        whole = alone.batch(crops, objective, number)
        parts = [shared.batch(crops, objective, number, process, processes) for process in range(processes)]
        assert whole.names == [name for part in parts for name in part.names]
        for field in ("noisy", "target", "timesteps", "frames"):
            assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts]))
    assert not torch.equal(whole.noisy, Batching.of(crops, 6, 4).batch(crops, objective, 2).noisy)


def test_steps_train_the_adapter_alone_and_tell_what_they_did(tiny_unet):
    unet = tiny_unet()
    base = {name: p.clone() for name, p in unet.named_parameters()}
    records = list(loop(unet).steps(3))
    assert [record.step for record in records] == [1, 2, 3]
    assert all(record.loss > 0 and record.seconds > 0 and record.gradient_norm > 0 for record in records)
    now = dict(unet.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in base.items())


def test_accumulated_gradients_equal_those_of_the_larger_batch(tiny_unet):
    """Two micro-batches of one picture, by hand from their own noise, against one accumulated step."""
    unet = tiny_unet()
    accumulating = loop(unet, batch_size=1, accumulate=2, rate=1.0)
    start = {name: factor.detach().clone() for name, factor in factors(unet, "dog").items()}
    by_hand = sum(accumulating._micro_batch(number)[0] for number in (0, 1)) / 2
    gradients = torch.autograd.grad(by_hand, list(factors(unet, "dog").values()))
    list(accumulating.steps(1))
    assert max(g.abs().max() for g in gradients) > 1e-4
    for (name, factor), gradient in zip(factors(unet, "dog").items(), gradients, strict=True):
        torch.testing.assert_close(start[name] - factor.detach(), gradient, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_no_number_stops_before_the_weights_are_touched(tiny_unet):
    pictures = data()
    pictures[2].mean[:] = float("nan")
    unet = tiny_unet()
    broken = loop(unet, batch_size=4, pictures=pictures)
    start = {name: factor.detach().clone() for name, factor in factors(unet, "dog").items()}
    with pytest.raises(NotFinite, match=r"The loss of step 1 .*2\.png.*timesteps \[.*precision no\)"):
        list(broken.steps(2))
    assert all(torch.equal(start[name], factor) for name, factor in factors(unet, "dog").items())


def test_fp16_looks_for_its_scale_and_gives_up_in_the_end(tiny_unet, monkeypatch):
    """A scaler skips steps whose gradients overflow; here nothing is skipped, so that only the counting is seen."""
    training = loop(tiny_unet())
    norms = iter([torch.tensor(math.inf), torch.tensor(1.0), *[torch.tensor(math.inf)] * 100])
    monkeypatch.setattr(training.accelerator, "scaler", object())
    monkeypatch.setattr(training.accelerator, "backward", lambda loss: loss.backward())
    monkeypatch.setattr(training.accelerator, "clip_grad_norm_", lambda *asked: next(norms))
    told = []
    with pytest.raises(NotFinite, match="The gradient of step"):
        for record in training.steps(100):
            told.append(record.gradient_norm)
    assert told == [None, 1.0, *[None] * OVERFLOWS]


def test_a_gradient_that_is_no_number_stops_too(tiny_unet):
    unet = tiny_unet()
    training = loop(unet)
    next(iter(factors(unet, "dog").values())).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NotFinite, match="The gradient of step 1"):
        list(training.steps(1))


def test_the_held_out_loss_has_fixed_noise_and_sees_what_is_learned(tiny_unet):
    unet = tiny_unet()
    training = loop(unet, rate=0.1)
    judged = lambda: held_out_loss(training.learner, data(2), training.objective, torch.device("cpu"))
    before = judged()
    assert judged() == before
    list(training.steps(3))
    assert judged() != before


def test_a_caption_is_left_out_now_and_then_and_nothing_else_changes():
    crops = [replace(crop, plain="plain") for crop in data(4)]
    batching, objective = Batching.of(crops, 0, 4, caption_dropout=0.5), Objective(DDPMScheduler())
    told, whole = ([b.batch(c, objective, n) for n in range(50)] for b, c in ((batching, crops), (batching, data(4))))
    share = sum(batch.prompts.count("plain") for batch in told) / 200
    assert 0.35 < share < 0.65  # of 200 draws, four standard deviations
    for one, other in zip(told, whole, strict=True):
        assert torch.equal(one.noisy, other.noisy) and torch.equal(one.timesteps, other.timesteps)
        assert all(a in (b, "plain") for a, b in zip(one.prompts, other.prompts, strict=True))
    never = Batching.of(crops, 0, 4)
    assert all("plain" not in never.batch(crops, objective, n).prompts for n in range(9))
