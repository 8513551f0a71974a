"""PixArt-alpha and PixArt-Sigma: a transformer whose cross-attentions read a T5's states under a mask.

It was trained to answer with a variance as well, so the first half of its channels are the noise. diffusers gives
neither its transformer nor its pipelines the verbs for adapters; PEFT's own stand in (adapters/placing.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from comcat_diffusion.families.family import Condition, Family, Native, Reading, Segment

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from diffusers import DiffusionPipeline
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_TOKENS = {"PixArtAlphaPipeline": 120}  # of a prompt; Sigma's are 300


class PixArt(Family):
    """See the module's docstring."""

    name = "PixArt-alpha and PixArt-Sigma"
    pipelines = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    denoisers = ("PixArtTransformer2DModel",)
    heavy = ("text_encoder",)
    guidance = 4.5
    states_at = (0, 2)
    architecture = "pixart"
    has_node = False
    lora_prefix = "base_model.model"  # PEFT's, which ComfyUI reads as well: the pipelines load no LoRA

    def encode(self, pipe: DiffusionPipeline, prompts: Sequence[str]) -> Condition:
        """States (B, M, E), and the mask (B, M) of those that are no padding."""
        where = self.device_of_text(pipe)
        states, mask, *_ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False, device=where)
        return {"states": states, "mask": mask}

    def reading(self, pipe: DiffusionPipeline) -> Reading:
        """Small letters."""
        return Reading((Segment(pipe.tokenizer),), lambda prompt: prompt.lower().strip())

    def said(self, pipe: DiffusionPipeline, prompt: str, asked: Mapping[str, object], negative: bool) -> str:
        """Captions may be cleaned before they are read."""
        return pipe._text_preprocessing(prompt, clean_caption=bool(asked.get("clean_caption")))[0]

    def drawing(self, pipe: DiffusionPipeline) -> Mapping[str, object]:
        """Pictures of the size that is asked for, and prompts as training reads them."""
        return {"clean_caption": False, "use_resolution_binning": False}

    def most_tokens(self, tokenizer: PreTrainedTokenizerBase, pipeline: str, denoiser: Mapping) -> int:
        """See `Family`."""
        return _TOKENS.get(pipeline, 300)

    def predict(
        self,
        denoiser: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        condition: Condition,
        frames: torch.Tensor,
    ) -> torch.Tensor:
        """See `Family`. Alpha at 1024 pixels also hears height and width, and their ratio."""
        added = {"resolution": None, "aspect_ratio": None}
        if denoiser.use_additional_conditions:
            size = frames[:, 4:].to(noisy.dtype)
            added = {"resolution": size, "aspect_ratio": size[:, :1] / size[:, 1:]}
        answer = denoiser(
            noisy,
            encoder_hidden_states=condition["states"],
            encoder_attention_mask=condition["mask"],
            timestep=timesteps,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return answer.chunk(2, dim=1)[0] if answer.shape[1] == 2 * noisy.shape[1] else answer

    def conditions(self, pipe: DiffusionPipeline, condition: Condition) -> dict[str, torch.Tensor | None]:
        """With their masks, and without the empty negative prompt that the pipelines assume."""
        mask = condition["mask"]
        masks = {"prompt_attention_mask": mask[:1], "negative_prompt_attention_mask": mask[1:]}
        return super().conditions(pipe, condition) | masks | {"negative_prompt": None}

    def native_weight(self, projection: str) -> Native:
        """Queries, keys and values are one Linear where an attention reads the picture, keys and values of the text."""
        block, attention, name = re.fullmatch(r"transformer_blocks\.(\d+)\.attn([12])\.to_([kv])", projection).groups()
        if attention == "1":
            return Native(f"blocks.{block}.attn.qkv", "qkv".index(name), 3)
        return Native(f"blocks.{block}.cross_attn.kv_linear", "kv".index(name), 2)
