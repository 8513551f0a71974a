"""Z-Image: one stream of a picture's tokens and then of the words', rotated by place, over states of a Qwen3 in a chat.

Of a text those states alone are heard that it has, the last but one of the Qwen3's. Both kinds of tokens are filled up
to multiples of 32. The answer is the way from noise to latents, so it is negated. Adapters change keys and values in
the blocks of one stream: the picture's, and the words' from the trigger on. The blocks before, which see the picture or
the words alone, carry none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from comcat_diffusion.families.chat import chat_around, chat_reading
from comcat_diffusion.families.family import Condition, Family, Flow, Native, Reading

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_TOKENS = 512  # of a prompt in its chat, at most
_TIMES = 1000  # of the scheduler, which the transformer counts from noise
_FILLED = 32  # up to multiples of which tokens are filled


class ZImage(Family):
    """See the module's docstring."""

    name = "Z-Image"
    pipelines = ("ZImagePipeline",)
    denoisers = ("ZImageTransformer2DModel",)
    heavy = ("text_encoder",)
    carries = r"layers\.\d+\.attention"
    guidance = 4.0
    precisions = ("fp32", "bf16")  # in half precision its blocks overflow
    flow = Flow(times="none")
    flow_samplers = ("FlowMatchEulerDiscreteScheduler",)
    architecture = "z-image"
    feed_forwards = r"layers\.\d+\.feed_forward\.w[123]"

    def native(self, denoiser: Mapping, vae: Mapping) -> int:
        """As the autoencoder says; the transformer has places for many sizes."""
        return vae["sample_size"]

    def grain(self, denoiser: Mapping, factor: int) -> int:
        """See `Family`."""
        return denoiser["all_patch_size"][0] * factor

    def largest(self, denoiser: Mapping, factor: int) -> int:
        """As many places as it has rotations for."""
        return min(denoiser["axes_lens"][1:]) * self.grain(denoiser, factor)

    def size(self, call: Mapping[str, object]) -> tuple[int, int]:
        """In tokens; all pictures are of one size."""
        side = call.get("patch_size", 2)
        return tuple(places // side for places in call["x"][0].shape[-2:])

    def heard(self, call: Mapping[str, object]) -> list[torch.Tensor]:
        """See `Family`."""
        return call["cap_feats"]

    def time(self, call: Mapping[str, object]) -> torch.Tensor:
        """See `Family`."""
        return call["t"]

    def words_at(self, call: Mapping[str, object]) -> tuple[int, ...]:
        """Behind the tokens of the picture, filled up."""
        square = call.get("patch_size", 2) ** 2
        return tuple(_filled(math.prod(one.shape[-2:]) // square) for one in call["x"])

    def is_of(self, denoiser: Mapping) -> bool:
        """The one that also looks at pictures (Omni) is called otherwise."""
        return denoiser.get("siglip_feat_dim") is None

    def encode(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        """States, a list of (M, E)."""
        asked = {"do_classifier_free_guidance": False, **self.drawing(pipe)}
        states, _ = pipe.encode_prompt(list(prompts), device=self.device_of_text(pipe), **asked)
        return {"states": states}

    def together(self, conditions: Sequence[Condition]) -> Condition:
        """A list, again."""
        return {"states": [one["states"] for one in conditions]}

    def reading(self, pipe: DiffusionPipeline) -> Reading:
        """As what a user says in a chat with somebody who thinks."""
        return chat_reading(pipe.tokenizer, self.name, thinking=True)

    def most_tokens(self, tokenizer: PreTrainedTokenizerBase, pipeline: str, denoiser: Mapping) -> int:
        """What the chat leaves; its end is cut off first."""
        before, _ = chat_around(tokenizer, self.name, thinking=True)
        return self.states(tokenizer, pipeline, denoiser) - len(tokenizer(before).input_ids)

    def states(self, tokenizer: PreTrainedTokenizerBase, pipeline: str, denoiser: Mapping) -> int:
        """At most."""
        return min(_TOKENS, tokenizer.model_max_length)

    def remarks(self, pipe: DiffusionPipeline) -> Sequence[str]:
        """A distilled base."""
        if not _is_turbo(pipe):
            return ()
        return (
            "This base is distilled to draw in a few steps and without guidance: draw with --num_inference_steps 9, "
            "and train on Z-Image itself, whose adapters work here with --any_weights.",
        )

    def drawing(self, pipe: DiffusionPipeline) -> Mapping[str, object]:
        """How much of a prompt is read."""
        return {"max_sequence_length": self.states(pipe.tokenizer, type(pipe).__name__, pipe.transformer.config)}

    def guidance_of(self, pipe: DiffusionPipeline) -> float:
        """None, where it is distilled. Here it is what is added, so that zero is none."""
        return 0.0 if _is_turbo(pipe) else self.guidance

    def posterior(self, vae: nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of a picture its mode alone is learned, so the std is zero."""
        mean = super().posterior(vae, pixels)["mean"]
        return {"mean": mean, "std": mean.new_zeros(mean.shape)}

    def predict(
        self,
        denoiser: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        condition: Condition,
        frames: torch.Tensor,
    ) -> torch.Tensor:
        """See `Family`. Pictures are films of one frame, one by one."""
        import torch

        films = list(noisy.unsqueeze(2).unbind())
        answer = denoiser(films, (_TIMES - timesteps) / _TIMES, condition["states"], return_dict=False)[0]
        return -torch.stack(answer).squeeze(2)

    def native_weight(self, projection: str) -> Native | None:
        """Queries, keys and values are one Linear."""
        attention, _, name = projection.rpartition(".")
        if not attention.endswith(".attention"):
            return None
        return Native(f"{attention}.qkv", "qkv".index(name[-1]), 3)


def _filled(tokens: int) -> int:
    return -(-tokens // _FILLED) * _FILLED


def _is_turbo(pipe: DiffusionPipeline) -> bool:
    """By its name: nothing else in a folder tells."""
    return "turbo" in str(getattr(pipe.config, "_name_or_path", "")).lower()
