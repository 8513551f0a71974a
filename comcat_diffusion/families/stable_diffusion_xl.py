"""Stable Diffusion XL: two CLIPs side by side, the second one's pooled text, and what size a picture was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from comcat_diffusion.families.family import Condition
from comcat_diffusion.families.stable_diffusion import StableDiffusion

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import nn


class StableDiffusionXL(StableDiffusion):
    """See the module's docstring."""

    name = "Stable Diffusion XL"
    pipelines = ("StableDiffusionXLPipeline",)
    text_encoders = ("text_encoder", "text_encoder_2")

    def is_of(self, denoiser: Mapping) -> bool:
        """Every U-Net that takes pooled text and sizes."""
        return denoiser.get("addition_embed_type") == "text_time" and denoiser.get("encoder_hid_dim_type") is None

    def encode(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        """States (B, M, E) of both encoders, and the pooled text (B, E') of the second."""
        states, _, pooled, _ = pipe.encode_prompt(
            prompt=list(prompts),
            device=self.device_of_text(pipe),
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return {"states": states, "pooled": pooled}

    def predict(
        self,
        denoiser: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        condition: Condition,
        frames: torch.Tensor,
    ) -> torch.Tensor:
        """See `Family`; the micro-conditioning is the frame."""
        pooled = condition["pooled"]
        added = {"text_embeds": pooled, "time_ids": frames.to(pooled.dtype)}
        return denoiser(noisy, timesteps, condition["states"], added_cond_kwargs=added, return_dict=False)[0]

    def zeros(self, pipe: DiffusionPipeline) -> bool:
        """Whether its pipeline subtracts zeros where there is nothing to subtract."""
        return getattr(pipe.config, "force_zeros_for_empty_prompt", False)

    def conditions(self, pipe: DiffusionPipeline, condition: Condition) -> dict[str, torch.Tensor]:
        """As the pipeline: no text at all may be zeros and not the states of an empty prompt."""
        states, pooled = condition["states"], condition["pooled"]
        kept = not self.zeros(pipe)
        return {
            "prompt_embeds": states[:1],
            "negative_prompt_embeds": states[1:] * kept,
            "pooled_prompt_embeds": pooled[:1],
            "negative_pooled_prompt_embeds": pooled[1:] * kept,
        }
