"""What is predicted and how it is judged, held against diffusers' schedulers and the formulas of the papers."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from comcat_diffusion.training.objective import Objective

KINDS = ("epsilon", "v_prediction", "sample")


def scheduler(kind):
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind)


def batch(objective, size=3):
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(size, 4, 8, 8, generator=generator)
    noise, timesteps = map(torch.stack, zip(*(objective.draw(one, generator) for one in clean), strict=True))
    return clean, noise, timesteps


@pytest.mark.parametrize("kind", KINDS)
def test_answering_the_target_lets_the_sampler_find_the_clean_latents(kind):
    """The scheduler's own step turns the target back into the clean latents, whatever it predicts."""
    objective = Objective(scheduler(kind))
    clean, noise, timesteps = batch(objective)
    noisy = objective.scheduler.add_noise(clean, noise, timesteps)
    target = objective.target(clean, noise, timesteps)
    sampler = DDIMScheduler.from_config(objective.scheduler.config, clip_sample=False)
    sampler.set_timesteps(1000)
    for index, timestep in enumerate(timesteps):
        found = sampler.step(target[index], timestep, noisy[index]).pred_original_sample
        torch.testing.assert_close(found, clean[index], rtol=1e-3, atol=1e-3)  # float32 divided by sqrt(alpha) ~ 0.07


def test_targets_differ():
    clean, noise, timesteps = batch(Objective(scheduler("epsilon")))
    targets = [Objective(scheduler(kind)).target(clean, noise, timesteps) for kind in KINDS]
    assert all((a - b).abs().max() > 0.1 for a, b in zip(targets, targets[1:] + targets[:1], strict=True))


def test_an_unknown_prediction_type_is_refused_by_name():
    objective = Objective(scheduler("epsilon"))
    objective.scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="'flow'"):
        objective.target(*batch(objective))


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weights_are_those_of_the_paper(kind):
    """arXiv 2303.09556: min(SNR, gamma) for x0, over SNR for epsilon, over SNR + 1 for v."""
    objective = Objective(scheduler(kind), snr_gamma=5.0)
    timesteps = torch.tensor([10, 300, 900])
    alpha = objective.scheduler.alphas_cumprod[timesteps]
    snr = alpha / (1 - alpha)
    expected = torch.minimum(snr, torch.tensor(5.0)) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[kind]
    ones = torch.ones(3, 4, 8, 8)
    torch.testing.assert_close(objective.loss(ones, torch.zeros_like(ones), timesteps), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(Objective(scheduler(kind)).loss(ones, torch.zeros_like(ones), timesteps), torch.ones(3))


def test_noise_offset_shifts_whole_channels():
    clean = torch.zeros(256, 8, 8)
    draw = lambda offset: Objective(scheduler("epsilon"), noise_offset=offset).draw(
        clean, torch.Generator().manual_seed(0)
    )[0]
    plain, shifted = draw(0.0), draw(0.5)
    difference = shifted - plain
    assert torch.allclose(difference.std(dim=(1, 2)), torch.zeros(256), atol=1e-6)
    assert abs(difference.mean(dim=(1, 2)).std().item() - 0.5) < 0.1


def test_weights_count_places_and_what_has_none_gets_no_gradient():
    objective = Objective(scheduler("epsilon"))
    predicted = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target, timesteps = torch.zeros(2, 4, 8, 8), torch.tensor([10, 900])
    weights = torch.ones(2, 1, 8, 8)
    assert torch.equal(
        objective.loss(predicted, target, timesteps, weights), objective.loss(predicted, target, timesteps)
    )
    weights[:, :, :4] = 0
    objective.loss(predicted, target, timesteps, weights).sum().backward()
    assert predicted.grad[:, :, :4].abs().max() == 0 and predicted.grad[:, :, 4:].abs().min() > 0
