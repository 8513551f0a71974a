"""Stable Diffusion 3 and 3.5: joint attention over picture and text; two CLIPs, and a T5 that may be left out.

The text's states are 77 of the CLIPs, side by side in channels, and then those of the T5. Adapters change the text's
keys and values (`add_k_proj`, `add_v_proj`), which the picture and the text itself look at. 3.5's norms of queries and
keys stand behind what a foldable or tied adapter changes; of a free one's wider heads they norm the base's own columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from comcat_diffusion.families.family import Condition, Family, Flow, Native, Reading, Segment

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import nn
    from transformers import PreTrainedTokenizerBase

T5_STATES = 256  # as many as the pipeline makes


class StableDiffusion3(Family):
    """See the module's docstring."""

    name = "Stable Diffusion 3 and 3.5"
    pipelines = ("StableDiffusion3Pipeline",)
    denoisers = ("SD3Transformer2DModel",)
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    architecture = "stable-diffusion-3"
    feed_forwards = r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)"  # the picture's
    optional = ("text_encoder_3", "tokenizer_3")
    heavy = ("text_encoder_3",)
    guidance = 7.0
    flow = Flow(preconditioned=True)
    flow_samplers = ("FlowMatchEulerDiscreteScheduler",)

    def largest(self, denoiser: Mapping, factor: int) -> int:
        """As many places as it has embeddings for."""
        return denoiser["pos_embed_max_size"] * denoiser["patch_size"] * factor

    def encode(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        """States (B, M, E), and the pooled text (B, E') of the two CLIPs."""
        states, _, pooled, _ = pipe.encode_prompt(
            list(prompts), None, None, do_classifier_free_guidance=False, device=self.device_of_text(pipe)
        )
        return {"states": states, "pooled": pooled}

    def reading(self, pipe: DiffusionPipeline) -> Reading:
        """First the CLIPs, which read alike, then the T5; one that was left out says nothing."""
        heard = pipe.tokenizer_3 if pipe.text_encoder_3 is not None else None
        return Reading((Segment(pipe.tokenizer, pipe.tokenizer_max_length), Segment(heard)))

    def said(self, pipe: DiffusionPipeline, prompt: str, asked: Mapping[str, object], negative: bool) -> str:
        """The prompt of all its text encoders. The T5 may be given one of its own, whose words are then not known."""
        name = "negative_prompt" if negative else "prompt"
        if asked.get(f"{name}_3") not in (None, asked.get(name)):
            raise ValueError(f"An adapter waits for its trigger in `{name}`: leave `{name}_3` out while one is loaded.")
        return prompt

    def states(self, tokenizer: PreTrainedTokenizerBase, pipeline: str, denoiser: Mapping) -> int:
        """See `Family`."""
        return tokenizer.model_max_length + T5_STATES

    def remarks(self, pipe: DiffusionPipeline) -> Sequence[str]:
        """A T5 that is missing."""
        if pipe.text_encoder_3 is not None:
            return ()
        return ("This base has no T5 (text_encoder_3): it reads prompts by its two CLIPs alone, 77 tokens of them.",)

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
            pooled_projections=condition["pooled"],
            timestep=timesteps,
            return_dict=False,
        )[0]

    def conditions(self, pipe: DiffusionPipeline, condition: Condition) -> dict[str, torch.Tensor]:
        """With the pooled texts."""
        pooled = condition["pooled"]
        return super().conditions(pipe, condition) | {
            "pooled_prompt_embeds": pooled[:1],
            "negative_pooled_prompt_embeds": pooled[1:],
        }

    def lora_projections(self, attention: str) -> tuple[str, str]:
        """Of a joint attention the text's; 3.5 medium has self-attentions beside, which read no text."""
        return ("add_k_proj", "add_v_proj") if attention.endswith(".attn") else ("to_k", "to_v")

    def native_weight(self, projection: str) -> Native:
        """Queries, keys and values are one Linear, one for the picture, one for the text."""
        _, block, attention, name = projection.split(".", 3)
        if attention == "ff":
            return Native(f"joint_blocks.{block}.x_block.mlp.{'fc1' if name == 'net.0.proj' else 'fc2'}", 0, 1)
        half = {"attn": "context_block.attn", "attn2": "x_block.attn2"}[attention]
        return Native(f"joint_blocks.{block}.{half}.qkv", "qkv".index(name.removesuffix("_proj")[-1]), 3)
