"""What a denoiser is asked that matches a flow: the way from clean latents to noise (arXiv 2403.03206, section 3.1).

    noisy = (1 - sigma) clean + sigma noise        answer = noise - clean

It has the shape of `Objective`, with times between 0 and the scheduler's number of timesteps, after its shift.

Letters: B batch, C latent channels, h x w latent size.
"""

from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from comcat_diffusion.families.family import Flow


@dataclass(frozen=True)
class FlowObjective:
    """The times of a base, as its family draws them and its scheduler shifts them, and their weights."""

    scheduler: FlowMatchEulerDiscreteScheduler
    flow: Flow

    def draw(self, clean: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise (C, h, w) and a timestep () for one sample's clean latents."""
        noise = torch.randn(clean.shape, generator=generator)
        flow = self.flow
        share = compute_density_for_timestep_sampling(flow.times, 1, flow.mean, flow.std, generator=generator)[0]
        return noise, self.scheduler.timesteps[(share * self.scheduler.config.num_train_timesteps).long()]

    def noisy(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Latents on their way to noise, (B, C, h, w)."""
        sigmas = self._sigmas(timesteps).view(-1, 1, 1, 1).to(clean)
        return (1 - sigmas) * clean + sigmas * noise

    def target(self, clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the denoiser should answer."""
        return noise - clean

    def loss(
        self,
        predicted: torch.Tensor,
        target: torch.Tensor,
        timesteps: torch.Tensor,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean squared error of every sample, (B,), places weighted by (B, 1, h, w).

        Where the family compares clean latents, noisy - sigma answer, that is sigma^2 times the error of the answers.
        """
        error = (predicted.float() - target.float()).square()
        error = (error if weights is None else error * weights).mean(dim=(1, 2, 3))
        return error * self._sigmas(timesteps).square().to(error) if self.flow.preconditioned else error

    def _sigmas(self, timesteps: torch.Tensor) -> torch.Tensor:
        """(B,) shares of noise."""
        return timesteps / self.scheduler.config.num_train_timesteps
