"""The loop: which pictures a step sees, that accumulation equals a larger batch, and that a broken step is caught."""

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler

from comcat_diffusion import ComcatConfig
from comcat_diffusion.adapters.model import factors
from comcat_diffusion.training.encode import Encoded
from comcat_diffusion.training.loop import Batching, Loop, NotFinite
from comcat_diffusion.training.objective import Objective


def data(count=4):
    noise = torch.Generator().manual_seed(3)
    mean = torch.randn(count, 4, 8, 8, generator=noise)
    context = torch.randn(1, 7, 24, generator=noise).expand(count, -1, -1)
    return Encoded(mean, torch.full_like(mean, 0.1), context, tuple(f"{n}.png" for n in range(count)))


def loop(unet, batch_size=2, accumulate=1, pictures=None, rate=1e-2):
    unet.add_adapter(ComcatConfig(r=2), "dog")
    with torch.no_grad():  # not the random start of the process: every loop of a test starts the same
        for number, factor in enumerate(factors(unet, "dog").values()):
            factor.copy_(torch.randn(factor.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
    optimizer = torch.optim.SGD([p for p in unet.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    unet, optimizer, schedule = accelerator.prepare(unet, optimizer, schedule)
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    batching = Batching(7, batch_size)
    return Loop(unet, pictures or data(), Objective(scheduler), batching, optimizer, schedule, accelerator, 1e9)


def test_every_picture_comes_once_per_pass_in_an_order_of_its_own():
    batching = Batching(seed=5, batch_size=2)
    seen = [index for number in range(9) for index in batching.pictures(6, number, 0, 1).tolist()]
    passes = [seen[0:6], seen[6:12], seen[12:18]]
    assert all(sorted(one) == list(range(6)) for one in passes) and len({tuple(one) for one in passes}) == 3


def test_processes_share_a_pass_between_them():
    batching = Batching(seed=5, batch_size=1)
    alone = [batching.pictures(4, number, 0, 1).item() for number in range(8)]
    shared = [batching.pictures(4, number, process, 2).item() for number in range(4) for process in range(2)]
    assert alone == shared


def test_noise_belongs_to_the_seed_the_step_and_the_process():
    draw = lambda seed, *key: torch.rand(3, generator=Batching(seed, 1).generator(*key)).tolist()
    assert draw(0, 1, 0) == draw(0, 1, 0)
    assert len({tuple(draw(*key)) for key in ((0, 1, 0), (0, 2, 0), (0, 1, 1), (1, 1, 0))}) == 4


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
    pictures.mean[2] = float("nan")
    unet = tiny_unet()
    broken = loop(unet, batch_size=4, pictures=pictures)
    start = {name: factor.detach().clone() for name, factor in factors(unet, "dog").items()}
    with pytest.raises(NotFinite, match=r"The loss of step 1 .*2\.png.*timesteps \[.*precision no"):
        list(broken.steps(2))
    assert all(torch.equal(start[name], factor) for name, factor in factors(unet, "dog").items())


def test_a_gradient_that_is_no_number_stops_too(tiny_unet):
    unet = tiny_unet()
    training = loop(unet)
    next(iter(factors(unet, "dog").values())).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NotFinite, match="The gradient of step 1"):
        list(training.steps(1))
