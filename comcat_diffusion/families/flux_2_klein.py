"""FLUX.2 [klein]: joint attention whose queries and keys are rotated by place, over states of a Qwen3 in a chat.

Of a text's states those at a quarter, a half and three quarters of the Qwen3's layers stand side by side. Four
neighbouring latents are one token, with four times the channels, by the statistics of the autoencoder's batch norm.
Adapters change the text's keys and values in the blocks of two streams. The blocks of one stream, whose projections are
one with those of their feed-forward, are left alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from comcat_diffusion.families.family import Condition, Family, Flow, Native, Reading, Segment

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_TOKENS = 512  # of a prompt in its chat, unless the tokenizer says fewer
_TIMES = 1000  # of the scheduler, by which the transformer multiplies what it is given
_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


class Flux2Klein(Family):
    """See the module's docstring."""

    name = "FLUX.2 [klein]"
    pipelines = ("Flux2KleinPipeline",)
    denoisers = ("Flux2Transformer2DModel",)
    heavy = ("text_encoder",)
    guidance = 4.0
    precisions = ("fp32", "bf16")  # in half precision its blocks cut off what overflows
    flow = Flow(times="none")
    flow_samplers = ("FlowMatchEulerDiscreteScheduler",)
    packing = 2
    states_at = (0,)  # the negative prompt's are made in a call of their own
    architecture = "flux-2-klein"

    def native(self, denoiser: Mapping, vae: Mapping) -> int:
        """As the autoencoder says; the transformer has places for any size."""
        return vae["sample_size"]

    def size(self, call: Mapping[str, object]) -> tuple[int, int]:
        """By the places of the tokens, (B, N, 4) or (N, 4): time, row, column, number."""
        _, row, column, _ = call["img_ids"].flatten(0, -2).amax(0).tolist()
        return int(row) + 1, int(column) + 1

    def is_of(self, denoiser: Mapping) -> bool:
        """FLUX.2 [dev], which is told its guidance, reads by another model."""
        return not denoiser.get("guidance_embeds", False)

    def encode(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        """States (B, M, E) of three layers."""
        states, _ = pipe.encode_prompt(list(prompts), device=self.device_of_text(pipe), **self.drawing(pipe))
        return {"states": states}

    def reading(self, pipe: DiffusionPipeline) -> Reading:
        """As what a user says in a chat."""
        known = weakref.ref(pipe.tokenizer)  # which holds what is returned here
        before, behind = _chat(pipe.tokenizer, _MARK).split(_MARK)
        return Reading((Segment(pipe.tokenizer),), lambda text: _chat(known(), text), around=(before, behind))

    def most_tokens(self, tokenizer: PreTrainedTokenizerBase, pipeline: str) -> int:
        """What the chat leaves."""
        return self.states(tokenizer, pipeline) - len(tokenizer(_chat(tokenizer, "")).input_ids)

    def states(self, tokenizer: PreTrainedTokenizerBase, pipeline: str) -> int:
        """See `Family`."""
        return min(_TOKENS, tokenizer.model_max_length)

    def remarks(self, pipe: DiffusionPipeline) -> Sequence[str]:
        """A distilled base."""
        if not pipe.config.is_distilled:
            return ()
        return (
            "This base is distilled to draw in a few steps and without guidance: draw with --num_inference_steps 4, "
            "and train on the base that it was made from, whose adapters fit both.",
        )

    def drawing(self, pipe: DiffusionPipeline) -> Mapping[str, object]:
        """How much of a prompt is read, and which layers of its reader are kept: of a Qwen3 of 36, 9, 18 and 27."""
        said = {"max_sequence_length": self.states(pipe.tokenizer, "")}
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

    def predict(
        self,
        denoiser: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        condition: Condition,
        frames: torch.Tensor,
    ) -> torch.Tensor:
        """See `Family`: places are rows and columns, words are numbered."""
        import torch

        states, (high, wide) = condition["states"], noisy.shape[-2:]
        nothing = [torch.arange(1, device=noisy.device)]
        rows, columns = (torch.arange(count, device=noisy.device) for count in (high, wide))
        words = torch.arange(states.shape[1], device=noisy.device)
        answer = denoiser(
            noisy.flatten(2).mT,
            encoder_hidden_states=states,
            timestep=timesteps / _TIMES,
            img_ids=torch.cartesian_prod(*nothing, rows, columns, *nothing),
            txt_ids=torch.cartesian_prod(*nothing * 3, words),
            return_dict=False,
        )[0]
        return answer.mT.unflatten(-1, (high, wide))

    def lora_projections(self, attention: str) -> tuple[str, str]:
        """Those of the text."""
        return "add_k_proj", "add_v_proj"

    def native_weight(self, projection: str) -> Native:
        """Queries, keys and values are one Linear, one for the picture, one for the text."""
        _, block, _, name = projection.split(".")
        return Native(f"double_blocks.{block}.txt_attn.qkv", "qkv".index(name.removesuffix("_proj")[-1]), 3)


def _chat(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """What the pipeline has its Qwen3 read."""
    said = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, enable_thinking=False)
