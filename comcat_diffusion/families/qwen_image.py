"""Qwen-Image: joint attention whose queries and keys are rotated by place, over states of a Qwen2.5-VL in a chat.

A template stands around every prompt, of whose states the first 34 are dropped; those of shorter prompts are filled up
with zeros, under a mask. Latents are those of an autoencoder of films, by a mean and a std for each channel; four
neighbours are one token, with four times the channels. A negative prompt is subtracted in a pass of its own, and
without one there is no guidance. Adapters change the text's keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from comcat_diffusion.families.family import Condition, Family, Flow, Reading, Segment

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_TOKENS = 512  # of a prompt, at most
_TIMES = 1000  # of the scheduler, by which the transformer multiplies what it is given
_SIDE = 128  # of its latents, where its configuration does not say


class QwenImage(Family):
    """See the module's docstring."""

    name = "Qwen-Image"
    pipelines = ("QwenImagePipeline",)
    denoisers = ("QwenImageTransformer2DModel",)
    heavy = ("text_encoder",)
    guidance = 4.0
    nothing = ""
    fewest_steps = 2  # its scheduler stretches times between the first and the last
    precisions = ("fp32", "bf16")  # in half precision its blocks cut off what overflows
    flow = Flow(times="none")
    flow_samplers = ("FlowMatchEulerDiscreteScheduler",)
    packing = 2
    states_at = (0,)  # the negative prompt's are made in a call of their own
    architecture = "qwen-image"
    feed_forwards = r"transformer_blocks\.\d+\.img_mlp\.net\.(0\.proj|2)"

    def factor(self, vae: Mapping) -> int:
        """See `Family`."""
        return 2 ** len(vae["temperal_downsample"])

    def native(self, denoiser: Mapping, vae: Mapping) -> int:
        """The pipeline's own."""
        return denoiser.get("sample_size", _SIDE) * self.factor(vae)

    def grain(self, denoiser: Mapping, factor: int) -> int:
        """See `Family`; here the size of a patch counts the packing."""
        return denoiser["patch_size"] * factor

    def size(self, call: Mapping[str, object]) -> tuple[int, int]:
        """In tokens; all pictures are of one size."""
        first = call["img_shapes"][0]
        return tuple((first[0] if isinstance(first, list) else first)[1:])

    def channels(self, vae: Mapping) -> int:
        """See `Family`."""
        return vae["z_dim"]

    def encode(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        """States (B, M, E) of the longest prompt's length, and a mask (B, M) of those that are no filling."""
        asked = {"device": self.device_of_text(pipe), **self.drawing(pipe)}
        states, mask = pipe.encode_prompt(list(prompts), **asked)
        return {"states": states, "mask": states.new_ones(states.shape[:2]) if mask is None else mask}

    def together(self, conditions: Sequence[Condition]) -> Condition:
        """Filled up with zeros."""
        from torch.nn.utils.rnn import pad_sequence

        return {name: pad_sequence([one[name] for one in conditions], batch_first=True) for name in conditions[0]}

    def reading(self, pipe: DiffusionPipeline) -> Reading:
        """As what a user says who wants a picture described."""
        template, dropped = pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx
        around = tuple(template.split("{}"))
        return Reading((Segment(pipe.tokenizer),), template.format, around=around, dropped=dropped, filled=True)

    def most_tokens(self, tokenizer: PreTrainedTokenizerBase, pipeline: str, denoiser: Mapping) -> int:
        """What is dropped of the template is what stands before the prompt."""
        return _TOKENS

    def drawing(self, pipe: DiffusionPipeline) -> Mapping[str, object]:
        """How much of a prompt is read."""
        return {"max_sequence_length": _TOKENS}

    def guided(self, strength: float) -> Mapping[str, object]:
        """By a negative prompt, and not by what the transformer is told."""
        return {"true_cfg_scale": strength}

    def posterior(self, vae: nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of a film of one frame. Squares of four are one, of four times the channels: C first, then row and column."""
        from torch.nn.functional import pixel_unshuffle

        found = vae.encode(pixels.to(vae.device, vae.dtype).unsqueeze(2)).latent_dist  # 1, C, 1, h, w
        middle, spread = _statistics(vae)
        mean, std = (found.mean.float().cpu() - middle) / spread, found.std.float().cpu() / spread
        return {name: pixel_unshuffle(one[0, :, 0], self.packing) for name, one in (("mean", mean), ("std", std))}

    def decoded(self, vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
        """The pipeline leaves tokens, (B, N, 4 C), of a picture that must be a square."""
        from torch.nn.functional import pixel_shuffle

        side = math.isqrt(latents.shape[1])
        films = pixel_shuffle(latents.mT.unflatten(-1, (side, side)), self.packing).unsqueeze(2)
        middle, spread = (one.to(films) for one in _statistics(vae))
        return vae.decode((films * spread + middle).to(vae.dtype)).sample[:, :, 0]

    def predict(
        self,
        denoiser: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        condition: Condition,
        frames: torch.Tensor,
    ) -> torch.Tensor:
        """See `Family`."""
        size, mask = tuple(noisy.shape[-2:]), condition["mask"].bool()
        answer = denoiser(
            noisy.flatten(2).mT,
            encoder_hidden_states=condition["states"],
            encoder_hidden_states_mask=None if mask.all() else mask,
            timestep=timesteps / _TIMES,
            img_shapes=[[(1, *size)]] * len(noisy),
            return_dict=False,
        )[0]
        return answer.mT.unflatten(-1, size)

    def conditions(self, pipe: DiffusionPipeline, condition: Condition) -> dict[str, torch.Tensor]:
        """With their masks."""
        mask = condition["mask"]
        masks = {"prompt_embeds_mask": mask[:1], "negative_prompt_embeds_mask": mask[1:]}
        return super().conditions(pipe, condition) | masks

    def lora_projections(self, attention: str) -> tuple[str, str]:
        """Those of the text. Native weights are named and cut as diffusers' are."""
        return "add_k_proj", "add_v_proj"


def _statistics(vae: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std of every channel of the latents, (C, 1, 1, 1)."""
    import torch

    mean, std = (torch.tensor(one).view(-1, 1, 1, 1) for one in (vae.config.latents_mean, vae.config.latents_std))
    return mean, std
