"""FLUX.2 [klein]: joint attention whose queries and keys are rotated by place, over states of a Qwen3 in a chat.

Of a text's states those at a quarter, a half and three quarters of the Qwen3's layers stand side by side. Four
neighbouring latents are one token, with four times the channels, by the statistics of the autoencoder's batch norm.
Adapters change the text's keys and values in the blocks of two streams, and if asked, in those of one stream, whose
projections are one with those of their feed-forward, the text's from the trigger on and the picture's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from comcat_diffusion.families.chat import chat_around, chat_reading
from comcat_diffusion.families.family import STREAM_ROWS, Condition, Family, Native, Reading
from comcat_diffusion.families.flux_1 import STREAM, Flux1

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_TOKENS = 512  # of a prompt in its chat, at most


class Flux2Klein(Flux1):
    """See the module's docstring."""

    name = "FLUX.2 [klein]"
    pipelines = ("Flux2KleinPipeline",)
    denoisers = ("Flux2Transformer2DModel",)
    text_encoders = ("text_encoder",)
    tokenizer = "tokenizer"
    heavy = ("text_encoder",)
    guidance = 4.0
    architecture = "flux-2-klein"
    feed_forwards = r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    stream_rows = STREAM_ROWS
    said, conditions = Family.said, Family.conditions

    def is_of(self, denoiser: Mapping) -> bool:
        """FLUX.2 [dev], which is told its guidance, reads by another model."""
        return not denoiser.get("guidance_embeds", False)

    def usual_targets(self, kind: str, beside: bool = False) -> list[str] | None:
        """The blocks of one stream too: the text's keys and values alone carry no subject; docs/log.md, 2026-11-29.

        With terms beside feed-forwards these carry it there; docs/log.md, 2026-11-30.
        """
        return None if beside else ["attn"]

    def encode(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        """States (B, M, E) of three layers."""
        states, _ = pipe.encode_prompt(list(prompts), device=self.device_of_text(pipe), **self.drawing(pipe))
        return {"states": states}

    def reading(self, pipe: DiffusionPipeline) -> Reading:
        """As what a user says in a chat."""
        return chat_reading(pipe.tokenizer, self.name, thinking=False)

    def most_tokens(self, tokenizer: PreTrainedTokenizerBase, pipeline: str, denoiser: Mapping) -> int:
        """What the chat leaves; its end is cut off first."""
        before, _ = chat_around(tokenizer, self.name, thinking=False)
        return self.states(tokenizer, pipeline, denoiser) - len(tokenizer(before).input_ids)

    def states(self, tokenizer: PreTrainedTokenizerBase, pipeline: str, denoiser: Mapping) -> int:
        """See `Family`."""
        return min(_TOKENS, tokenizer.model_max_length)

    def remarks(self, pipe: DiffusionPipeline) -> Sequence[str]:
        """A distilled base."""
        if not pipe.config.is_distilled:
            return ()
        return (
            "This base is distilled to draw in a few steps and without guidance: draw with --num_inference_steps 4, "
            "and train on the base that it was made from, whose adapters work here with --any_weights.",
        )

    def drawing(self, pipe: DiffusionPipeline) -> Mapping[str, object]:
        """How much of a prompt is read, and which layers of its reader are kept: of a Qwen3 of 36, 9, 18 and 27."""
        said = dict(super().drawing(pipe))
        if pipe.text_encoder is not None:  # else it has read all prompts already
            depth = pipe.text_encoder.config.num_hidden_layers
            said["text_encoder_out_layers"] = tuple(depth * quarter // 4 for quarter in (1, 2, 3))
        return said

    def negative(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Mapping[str, object]:
        """The pipeline takes them as states alone."""
        states, _ = pipe.encode_prompt(list(prompts), **self.drawing(pipe))
        return {"negative_prompt_embeds": states}

    def guidance_of(self, pipe: DiffusionPipeline) -> float:
        """None, where it is distilled."""
        return 1.0 if pipe.config.is_distilled else self.guidance

    def posterior(self, vae: nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of a picture its mode alone is learned, so the std is zero."""
        from torch.nn.functional import pixel_unshuffle

        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode().float()  # 1, C, h, w
        packed = pixel_unshuffle(latents, 2)  # 1, 4 C, h / 2, w / 2
        mean, var = (one.float().view(1, -1, 1, 1) for one in (vae.bn.running_mean, vae.bn.running_var))
        packed = ((packed - mean) / (var + vae.config.batch_norm_eps).sqrt())[0].cpu()
        return {"mean": packed, "std": packed.new_zeros(packed.shape)}

    def decoded(self, vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
        """The pipeline leaves them as the autoencoder has them."""
        return vae.decode(latents.to(vae.dtype)).sample

    def places(self, device: torch.device, rows: int, columns: int, words: int = 1) -> torch.Tensor:
        """Of tokens, (N, 4): nothing, row and column, and which word it is."""
        import torch

        zero, *others = (torch.arange(count, device=device) for count in (1, rows, columns, words))
        return torch.cartesian_prod(zero, *others)

    def held_by(self, projection: str) -> Native | None:
        """In a block of one stream all that is made of its tokens is one Linear."""
        block, _, name = projection.rpartition(".")
        if not projection.startswith(STREAM) or name not in ("to_q", "to_k", "to_v"):
            return None
        return Native(f"{block}.to_qkv_mlp_proj", "qkv".index(name[-1]), STREAM_ROWS)

    def told(self, denoiser: nn.Module, noisy: torch.Tensor, condition: Condition) -> dict[str, torch.Tensor]:
        """Nothing."""
        return {}
