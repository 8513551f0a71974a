"""Linears of feed-forwards of ComfyUI's transformers while adapters have terms beside them, see adapters/fed.py.

The host may keep its weight in few bits: its own forward makes what it makes, and the term is added.

Letters: B batch, N tokens, C channels that come in, O that go out, R rank.
"""

import re
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn.functional import linear

from comcat_diffusion.comfy.beside import Beside
from comcat_diffusion.comfy.blocks import FluxSingle, ZImageAttention

# Hosts in blocks of one stream, and the attentions that know where its picture begins; others see pictures alone.
_STREAMS = ((r"single_blocks\.\d+\.linear[12]", FluxSingle), (r"layers\.\d+\.feed_forward\.w[123]", ZImageAttention))


def _at_once(tokens: int, places: int, words: int) -> int:
    return 0


class Fed(Beside):
    """See `Beside`."""

    def places(
        self, live: list[str], options: Mapping, latent: tuple[int, int], made: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """See `Beside`; words in a stream, and pictures to look at, have the mean of the picture's."""
        begin = next((kind.begin for pattern, kind in _STREAMS if re.search(pattern, self.name)), _at_once)
        return self.shares_of_tokens(live, options, made, begin)

    def laid(self, by_token: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """As they are."""
        return by_token

    def term(self, factors: Mapping[str, nn.Linear], hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, N, O)."""
        down, up = (factors[f"feed_{name}"].weight.to(hidden) for name in ("down", "up"))
        return linear(weight * linear(hidden, down), up)
