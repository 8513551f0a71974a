"""Prompts as what a user says in a chat, which families with a Qwen3 for a text encoder read."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from comcat_diffusion.families.family import Reading, Segment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


def chat_reading(tokenizer: PreTrainedTokenizerBase, family: str, thinking: bool) -> Reading:
    """How a family reads a prompt: as one user's words, answered by somebody who thinks, or thinks not.

    Raises ValueError for a tokenizer that knows no chat, or in whose chat such words are not found again.
    """
    known = weakref.ref(tokenizer)  # which holds what is returned here
    around = chat_around(tokenizer, family, thinking)
    return Reading((Segment(tokenizer),), lambda text: _chat(known(), text, family, thinking), around=around)


def chat_around(tokenizer: PreTrainedTokenizerBase, family: str, thinking: bool) -> tuple[str, str]:
    """What stands before and behind what a user says. Raises ValueError as `chat_reading` does."""
    parts = _chat(tokenizer, _MARK, family, thinking).split(_MARK)
    if len(parts) != 2:
        raise ValueError("The chat template of this base's tokenizer does not say once what a user says.")
    return parts[0], parts[1]


def _chat(tokenizer: PreTrainedTokenizerBase, text: str, family: str, thinking: bool) -> str:
    """What the pipeline has its Qwen3 read."""
    if not tokenizer.chat_template:
        raise ValueError(f"This base's tokenizer has no chat template, by which {family} reads its prompts.")
    said = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
