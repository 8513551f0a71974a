"""Stable Diffusion 1.x and 2.x: a U-Net that reads one CLIP's text states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from comcat_diffusion.families.family import UNET, Condition, Family

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import nn


class StableDiffusion(Family):
    """See the module's docstring."""

    name = "Stable Diffusion 1.x and 2.x"
    pipelines = ("StableDiffusionPipeline",)
    denoisers = ("UNet2DConditionModel",)
    part, noun = UNET, "U-Net"
    trains_text = same_text = True

    def is_of(self, denoiser: Mapping) -> bool:
        """Every U-Net that takes no pooled text."""
        return denoiser.get("addition_embed_type") is None and denoiser.get("encoder_hid_dim_type") is None

    def usual_targets(self, kind: str, beside: bool = False) -> list[str] | None:
        """A free one on self-attention too, which carries shapes far from the base's own; docs/log.md, 2026-11-29.

        Convolutions carry them better.
        """
        return ["attn1", "attn2"] if kind == "free" and not beside else None

    def usual_convolutions(self, kind: str) -> int:
        """A free one has them: eyes, wheels and round outlines are theirs; docs/log.md, 2026-11-30."""
        return 16 if kind == "free" else 0

    def grain(self, denoiser: Mapping, factor: int) -> int:
        """Every level of the U-Net but the last halves the latents."""
        return factor * 2 ** (len(denoiser["block_out_channels"]) - 1)

    def encode(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        """States (B, M, E)."""
        states, *_ = pipe.encode_prompt(
            prompt=list(prompts),
            device=self.device_of_text(pipe),
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        return {"states": states}

    def predict(
        self,
        denoiser: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        condition: Condition,
        frames: torch.Tensor,
    ) -> torch.Tensor:
        """See `Family`."""
        return denoiser(noisy, timesteps, condition["states"], return_dict=False)[0]
