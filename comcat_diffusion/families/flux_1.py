"""FLUX.1 [dev] and [schnell]: joint attention whose queries and keys are rotated by place, over a T5's states.

A CLIP's pooled text stands beside. Four neighbouring latents are one token, with four times the channels. [dev] is told
the strength of its guidance and subtracts nothing; [schnell] has none. Adapters change the text's keys and values in
the blocks of two streams, and if asked, keys and values in those of one stream, where words come before the picture;
what heads give there is projected outside of the attention, so a free adapter has no place in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from comcat_diffusion.families.family import Condition, Family, Flow, Native, Reading, Segment

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_TOKENS = 512  # of a prompt, at most
STREAM = "single_transformer_blocks."
_TIMES = 1000  # of the scheduler, by which the transformer multiplies what it is given


class Flux1(Family):
    """See the module's docstring."""

    name = "FLUX.1"
    pipelines = ("FluxPipeline",)
    denoisers = ("FluxTransformer2DModel",)
    text_encoders = ("text_encoder", "text_encoder_2")
    tokenizer = "tokenizer_2"
    heavy = ("text_encoder_2",)
    guidance = 3.5
    precisions = ("fp32", "bf16")  # in half precision its blocks cut off what overflows, and a T5 does not
    flow = Flow(times="none")
    flow_samplers = ("FlowMatchEulerDiscreteScheduler",)
    packing = 2
    states_at = (0,)  # the negative prompt's are made in a call of their own
    architecture = "flux-1-dev"
    feed_forwards = r"single_transformer_blocks\.\d+\.proj_(mlp|out)"
    stream_rows = 7  # of the native Linear that a block of one stream begins with, in heights of its queries

    def native(self, denoiser: Mapping, vae: Mapping) -> int:
        """As the autoencoder says; the transformer has places for any size."""
        return vae["sample_size"]

    def size(self, call: Mapping[str, object]) -> tuple[int, int]:
        """By the places of the tokens, (..., N, 3) or, with a number behind, (..., N, 4): time, row, column."""
        row, column = call["img_ids"][..., 1:3].flatten(0, -2).amax(0).tolist()
        return int(row) + 1, int(column) + 1

    def encode(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        """States (B, M, E) of the T5, and the CLIP's pooled text (B, E')."""
        states, pooled, _ = pipe.encode_prompt(
            list(prompts), None, device=self.device_of_text(pipe), **self.drawing(pipe)
        )
        return {"states": states, "pooled": pooled}

    def reading(self, pipe: DiffusionPipeline) -> Reading:
        """By the tokenizer of what makes the states."""
        return Reading((Segment(getattr(pipe, self.tokenizer)),))

    def said(self, pipe: DiffusionPipeline, prompt: str, asked: Mapping[str, object], negative: bool) -> str:
        """The prompt of both its text encoders. The T5 may be given one of its own, whose words are then not known."""
        if asked.get("prompt_2") not in (None, asked.get("prompt")):
            raise ValueError("An adapter waits for its trigger in `prompt`: leave `prompt_2` out while one is loaded.")
        return super().said(pipe, prompt, asked, negative)

    def most_tokens(self, tokenizer: PreTrainedTokenizerBase, pipeline: str, denoiser: Mapping) -> int:
        """[schnell], which is told no guidance, reads half as many."""
        return min(_TOKENS if denoiser.get("guidance_embeds") else _TOKENS // 2, tokenizer.model_max_length)

    def drawing(self, pipe: DiffusionPipeline) -> Mapping[str, object]:
        """How much of a prompt is read."""
        tokenizer, kind = getattr(pipe, self.tokenizer), type(pipe).__name__
        return {"max_sequence_length": self.states(tokenizer, kind, pipe.transformer.config)}

    def negative(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Mapping[str, object]:
        """Raises ValueError."""
        raise ValueError(f"--negative_prompt: {self.name} is drawn without subtracting anything; leave it out.")

    def guidance_of(self, pipe: DiffusionPipeline) -> float:
        """None where it has not learned of it."""
        return self.guidance if pipe.transformer.config.guidance_embeds else 0.0

    def remarks(self, pipe: DiffusionPipeline) -> Sequence[str]:
        """A base of few steps."""
        if pipe.transformer.config.guidance_embeds:
            return ()
        return ("This base is distilled to draw in a few steps: draw with --num_inference_steps 4.",)

    def posterior(self, vae: nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Squares of four as one, with four times the channels: C first, then row and column."""
        from torch.nn.functional import pixel_unshuffle

        found = super().posterior(vae, pixels)
        return {name: pixel_unshuffle(latents, self.packing) for name, latents in found.items()}

    def decoded(self, vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
        """The pipeline leaves tokens, (B, N, 4 C), of a picture that must be a square."""
        from torch.nn.functional import pixel_shuffle

        side = math.isqrt(latents.shape[1])
        return super().decoded(vae, pixel_shuffle(latents.mT.unflatten(-1, (side, side)), self.packing))

    def predict(
        self,
        denoiser: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        condition: Condition,
        frames: torch.Tensor,
    ) -> torch.Tensor:
        """See `Family`."""
        states, size = condition["states"], noisy.shape[-2:]
        answer = denoiser(
            noisy.flatten(2).mT,
            encoder_hidden_states=states,
            timestep=timesteps / _TIMES,
            img_ids=self.places(noisy.device, *size),
            txt_ids=self.places(noisy.device, 1, 1, states.shape[1]),
            return_dict=False,
            **self.told(denoiser, noisy, condition),
        )[0]
        return answer.mT.unflatten(-1, tuple(size))

    def places(self, device: torch.device, rows: int, columns: int, words: int = 1) -> torch.Tensor:
        """Of tokens, (N, 3): nothing, row and column. Words are all at one place."""
        import torch

        high, wide = (torch.arange(count, device=device) for count in (rows, columns))
        return torch.cartesian_prod(high.new_zeros(1), high, wide).repeat(words, 1)

    def told(self, denoiser: nn.Module, noisy: torch.Tensor, condition: Condition) -> dict[str, torch.Tensor | None]:
        """What the denoiser hears beside places, times and states: the strength at which [dev] is drawn, too."""
        strength = noisy.new_full((len(noisy),), self.guidance) if denoiser.config.guidance_embeds else None
        return {"pooled_projections": condition["pooled"], "guidance": strength}

    def conditions(self, pipe: DiffusionPipeline, condition: Condition) -> dict[str, torch.Tensor]:
        """Those of the picture alone."""
        return {"prompt_embeds": condition["states"][:1], "pooled_prompt_embeds": condition["pooled"][:1]}

    def lora_projections(self, attention: str) -> tuple[str, str]:
        """Those of the text, and in blocks of one stream the only ones."""
        return ("to_k", "to_v") if attention.startswith(STREAM) else ("add_k_proj", "add_v_proj")

    def native_weight(self, projection: str) -> Native:
        """Queries, keys and values are one Linear, one for the picture, one for the text; in one stream, all is one."""
        _, block, *_, name = projection.split(".")
        if projection.startswith(STREAM):
            return self._native_of_stream(f"single_blocks.{block}", name)
        return Native(f"double_blocks.{block}.txt_attn.qkv", "qkv".index(name.removesuffix("_proj")[-1]), 3)

    def _native_of_stream(self, block: str, name: str) -> Native:
        """The first Linear holds all that is made of a block's tokens, and the last one reads it."""
        first = f"{block}.linear1"
        if name.endswith("_out"):
            return Native(f"{block}.linear2", 0, 1)
        if name == "to_qkv_mlp_proj":  # diffusers' FLUX.2 has it as it is
            return Native(first, 0, 1)
        if name == "proj_mlp":
            return Native(first, 3, self.stream_rows, self.stream_rows - 3)
        return Native(first, "qkv".index(name[-1]), self.stream_rows)
