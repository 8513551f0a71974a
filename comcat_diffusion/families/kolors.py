"""Kolors: Stable Diffusion XL's U-Net over a ChatGLM's states, which it first makes narrower.

Its tokenizer, of diffusers' own Python over sentencepiece, does not say where tokens end; sentencepiece does. Shorter
prompts are filled up in front. What is filled in sees all of the prompt, so it counts as after a trigger.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

from comcat_diffusion.families.family import Reading, Segment
from comcat_diffusion.families.stable_diffusion_xl import StableDiffusionXL

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from sentencepiece import SentencePieceProcessor
    from transformers import PreTrainedTokenizerBase

_TOKENS = 256  # of a prompt, two of them set before it


class Kolors(StableDiffusionXL):
    """See the module's docstring."""

    name = "Kolors"
    pipelines = ("KolorsPipeline",)
    text_encoders = heavy = ("text_encoder",)
    trains_text = same_text = False  # every step makes the states narrower anew
    guidance = 5.0
    nothing = ""  # where its pipeline is to subtract zeros, it fails
    architecture = "kolors"
    has_node = False

    def is_of(self, denoiser: Mapping) -> bool:
        """Every U-Net that makes text states narrower and takes pooled text; an adapter's file tells the first."""
        narrower = denoiser.get("encoder_hid_dim_type") == "text_proj"
        return narrower and denoiser.get("addition_embed_type", "text_time") == "text_time"

    def reading(self, pipe: DiffusionPipeline) -> Reading:
        """By sentencepiece's own offsets."""
        known = weakref.ref(pipe.tokenizer)  # which holds what is returned here
        return Reading((Segment(pipe.tokenizer),), ends=lambda text, most: ends(known(), text, most), ahead=True)

    def most_tokens(self, tokenizer: PreTrainedTokenizerBase, pipeline: str, denoiser: Mapping) -> int:
        """See `Family`."""
        return _TOKENS

    def zeros(self, pipe: DiffusionPipeline) -> bool:
        """See `nothing`."""
        return False


def ends(tokenizer: PreTrainedTokenizerBase, text: str, most: int) -> list[int]:
    """Where in a text each of its `most` first tokens ends; 0 of those that are set before it.

    Raises ValueError for a text in which the tokenizer finds tokens of its own, which are no pieces of sentencepiece.
    """
    found = [(number, 0) for number in tokenizer.get_prefix_tokens()] + _pieces(tokenizer.tokenizer.sp_model, text)
    read = tokenizer(text, max_length=most, truncation=True).input_ids
    if [number for number, _ in found[: len(read)]] != read:
        raise ValueError(f"The tokenizer of this base has tokens of its own in '{text[:60]}': write it without them.")
    return [end for _, end in found[: len(read)]]


def _pieces(reader: SentencePieceProcessor, text: str) -> list[tuple[int, int]]:
    """The pieces of a text by their numbers, and where each ends; a letter of several is all of them."""
    if hasattr(reader, "encode_as_offset_mapping"):
        told = reader.encode_as_offset_mapping(text)
        pieces = [(number, *place) for number, place in zip(told["ids"], told["offsets"], strict=True)]
    else:  # before sentencepiece 0.2.2
        pieces = [(piece.id, piece.begin, piece.end) for piece in reader.encode_as_immutable_proto(text).pieces]
    found, following = [], len(text)
    for number, begin, end in reversed(pieces):
        following = end if end > begin else following  # the last piece of a letter has its length
        found.append((number, following))
    return found[::-1]
