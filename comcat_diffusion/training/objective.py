"""What a denoiser is asked to predict, and how its answer is judged. Both follow from the scheduler's own config."""

from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr

from comcat_diffusion.families.known import family_of
from comcat_diffusion.training.flow import FlowObjective


def objective_of(
    pipe: DiffusionPipeline, snr_gamma: float | None = None, noise_offset: float = 0.0
) -> "Objective | FlowObjective":
    """What a base is asked, as its family and its scheduler say."""
    flow = family_of(pipe).flow
    if flow:
        return FlowObjective(FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config), flow)
    return Objective(DDPMScheduler.from_config(pipe.scheduler.config), snr_gamma, noise_offset)


@dataclass(frozen=True)
class Objective:
    """The noise process of a base, the target in it, and the weight of each timestep."""

    scheduler: DDPMScheduler
    snr_gamma: float | None = None
    noise_offset: float = 0.0

    def draw(self, clean: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise (C, h, w) and a timestep () for one sample's clean latents."""
        noise = torch.randn(clean.shape, generator=generator)
        if self.noise_offset:
            noise = noise + self.noise_offset * torch.randn(len(clean), 1, 1, generator=generator)
        return noise, torch.randint(self.scheduler.config.num_train_timesteps, (), generator=generator)

    def noisy(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Latents on their way to noise, (B, C, h, w)."""
        return self.scheduler.add_noise(clean, noise, timesteps)

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the denoiser should answer: the noise, the velocity (arXiv 2202.00512) or the clean latents."""
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            return self.scheduler.get_velocity(clean, noise, timesteps)
        if kind == "sample":
            return clean
        raise ValueError(f"The base predicts '{kind}', which is not supported (epsilon, v_prediction, sample).")

    def loss(
        self,
        predicted: torch.Tensor,
        target: torch.Tensor,
        timesteps: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean squared error of every sample, (B,): places weighted by (B, 1, h, w), timesteps by min-SNR-gamma
        (arXiv 2303.09556, eq. 4) if asked."""
        error = (predicted.float() - target.float()).square()
        error = (error if weights is None else error * weights).mean(dim=(1, 2, 3))
        if self.snr_gamma is None:
            return error
        snr = compute_snr(self.scheduler, timesteps)
        weight = snr.clamp(max=self.snr_gamma)  # the weight of an x0 prediction
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            weight = weight / snr.clamp(min=1e-8)
        elif kind == "v_prediction":
            weight = weight / (snr + 1)
        return error * weight.to(error.device)
