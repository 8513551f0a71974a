"""Sana 1.x: linear self-attention, text cross-attention over a Gemma's states, latents of a deep autoencoder.

A long instruction stands before every prompt but the negative one; of its states the first is kept. Adapters are on the
cross-attentions alone: linear attention has no logits. Sprint's norms over all heads together are not carried.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from comcat_diffusion.families.family import Condition, Flow, Reading, Segment
from comcat_diffusion.families.pixart import PixArt

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from diffusers import DiffusionPipeline
    from torch import nn

_INSTRUCTION = "complex_human_instruction"


class Sana(PixArt):
    """See the module's docstring."""

    name = "Sana 1.x"
    pipelines = ("SanaPipeline",)
    denoisers = ("SanaTransformer2DModel",)
    precisions = ("fp32", "bf16")  # Gemma and the autoencoder overflow in half precision
    flow = Flow(times="none")
    architecture = "sana"
    lora_prefix = ""

    def factor(self, vae: Mapping) -> int:
        """See `Family`."""
        return 2 ** (len(vae["encoder_block_out_channels"]) - 1)

    def grain(self, denoiser: Mapping, factor: int) -> int:
        """The pipeline takes no other multiples."""
        return max(32, super().grain(denoiser, factor))

    def encode(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        """As the pipeline reads them: an empty prompt, which guidance subtracts, without the instruction."""
        import torch

        where, asked = self.device_of_text(pipe), {True: _instruction(pipe), False: None}
        made = [
            pipe.encode_prompt([one], False, device=where, **{_INSTRUCTION: asked[bool(one)]})[:2] for one in prompts
        ]
        states, masks = (torch.cat(parts) for parts in zip(*made, strict=True))
        return {"states": states, "mask": masks}

    def reading(self, pipe: DiffusionPipeline) -> Reading:
        """In small letters, behind the instruction."""
        prefix = "\n".join(_instruction(pipe))
        pipe.tokenizer.padding_side = "right"  # as the pipeline has it, from the first prompt on
        return Reading((Segment(pipe.tokenizer),), lambda text: text and prefix + text.lower().strip(), prefix)

    def said(self, pipe: DiffusionPipeline, prompt: str, asked: Mapping[str, object], negative: bool) -> str:
        """Raises ValueError for an instruction of somebody's own, behind which no prompt is found."""
        text, given = super().said(pipe, prompt, asked, negative), asked.get(_INSTRUCTION)
        if negative or not given:
            return text
        if list(given) != _instruction(pipe):
            raise ValueError(f"An adapter waits for its trigger: leave {_INSTRUCTION} as it is, or give None.")
        return "\n".join(given) + text

    def predict(
        self,
        denoiser: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        condition: Condition,
        frames: torch.Tensor,
    ) -> torch.Tensor:
        """See `Family`."""
        return denoiser(
            noisy,
            encoder_hidden_states=condition["states"],
            encoder_attention_mask=condition["mask"],
            timestep=timesteps * denoiser.config.timestep_scale,
            return_dict=False,
        )[0]

    def posterior(self, vae: nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """This autoencoder knows no doubt: the std is zero."""
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent[0].float().cpu() * vae.config.scaling_factor
        return {"mean": latents, "std": latents.new_zeros(latents.shape)}


def _instruction(pipe: DiffusionPipeline) -> list[str]:
    """What the pipeline sets before a prompt by itself."""
    return list(inspect.signature(type(pipe).__call__).parameters[_INSTRUCTION].default)
