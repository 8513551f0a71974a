"""Chroma: FLUX.1 without its CLIP and its guidance, over a T5's states under a mask; prompts are subtracted again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from comcat_diffusion.families.family import Condition, Family
from comcat_diffusion.families.flux_1 import Flux1

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_TOKENS = 512  # of a prompt, at most


class Chroma(Flux1):
    """See the module's docstring."""

    name = "Chroma"
    pipelines = ("ChromaPipeline",)
    denoisers = ("ChromaTransformer2DModel",)
    text_encoders = ("text_encoder",)
    tokenizer = "tokenizer"
    heavy = ("text_encoder",)
    guidance = 5.0
    states_at = (0, 3)
    architecture = "chroma"
    said, negative = Family.said, Family.negative
    guidance_of, remarks = Family.guidance_of, Family.remarks

    def most_tokens(self, tokenizer: PreTrainedTokenizerBase, pipeline: str, denoiser: Mapping) -> int:
        """See `Family`."""
        return min(_TOKENS, tokenizer.model_max_length)

    def encode(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        """States (B, M, E), and the mask (B, M) of those that are no padding, and of one more."""
        where = self.device_of_text(pipe)
        states, _, mask, *_ = pipe.encode_prompt(
            list(prompts), device=where, do_classifier_free_guidance=False, **self.drawing(pipe)
        )
        return {"states": states, "mask": mask}

    def told(self, denoiser: nn.Module, noisy: torch.Tensor, condition: Condition) -> dict[str, torch.Tensor]:
        """A mask over the text and then the picture."""
        import torch

        mask = condition["mask"]
        return {"attention_mask": torch.cat([mask, mask.new_ones(len(noisy), noisy[0, 0].numel())], dim=1)}

    def conditions(self, pipe: DiffusionPipeline, condition: Condition) -> dict[str, torch.Tensor]:
        """With their masks."""
        mask = condition["mask"]
        masks = {"prompt_attention_mask": mask[:1], "negative_prompt_attention_mask": mask[1:]}
        return Family.conditions(self, pipe, condition) | masks
