"""Heads that are there once for each part of a picture in which other adapters act, so that one attention computes all.

ComfyUI's transformers attend in the middle of a block's forward, where a part of a picture cannot be attended to by
itself. So the terms of adapters/blend.py stand side by side as more heads, and what they give is weighed by the places'
shares behind the projection out of them:

    out = sum_t m_t project(heads of term t)

Letters: B batch, N tokens, M context tokens, H heads, C channels, T terms.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import nn

from comcat_diffusion.adapters.proportions import refuse_other_shape
from comcat_diffusion.adapters.regions import beside_words, shares_of
from comcat_diffusion.adapters.wide import WideHeads

PICTURE = "comcat_picture"  # key in the options of a pass of a transformer: its `Picture`


@dataclass(frozen=True)
class Picture:
    """What a transformer draws in one pass."""

    grid: tuple[int, int]  # of its tokens
    words: int  # M, of the text
    shares: Mapping[str, torch.Tensor] = field(default_factory=lambda: MappingProxyType({}))  # see `masked_shares`


def masked_shares(
    masks: Mapping[str, torch.Tensor], latent: tuple[int, int], grid: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """See `shares_of`. Raises ValueError for a mask of other proportions than the latents."""
    for name, mask in masks.items():
        refuse_other_shape(name, mask, *latent)
    return shares_of(masks, grid)


class SharedHeads(WideHeads):
    """T times H heads, those of each term beside those of the next."""

    def __init__(self, shares: Sequence[torch.Tensor], terms: Sequence[WideHeads]) -> None:
        """Shares are of the picture's places, or, in a stream, of all tokens: (N, 1) or (B, N, 1)."""
        self.shares, self.terms, first = shares, terms, terms[0]
        self.wide = max(term.wide for term in terms)
        for term in terms:
            term.fill(self.wide)
        self.heads, self.width, self.inner = len(terms) * first.heads, first.width, first.inner
        self.gain, self.norm_gain = first.gain, first.norm_gain

    @property
    def as_the_host(self) -> bool:
        """See `WideHeads`."""
        return False

    def query(self, project: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, N, T*H*wide)."""
        return self._each(project, hidden, WideHeads.query)

    def key(self, project: nn.Module, context: torch.Tensor) -> torch.Tensor:
        """(B, M, C) -> (B, M, T*H*wide)."""
        return self._each(project, context, WideHeads.key)

    def value(self, project: nn.Module, context: torch.Tensor) -> torch.Tensor:
        """(B, M, C) -> (B, M, T*H*wide)."""
        return self._each(project, context, WideHeads.value)

    def foreign_key(self, project: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """See `WideHeads`."""
        return self._each(project, tokens, WideHeads.foreign_key)

    def foreign_value(self, project: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        """See `WideHeads`."""
        return self._each(project, tokens, WideHeads.foreign_value)

    def output(self, project: nn.Module, mixed: torch.Tensor) -> torch.Tensor:
        """(B, N, T*H*wide) -> (B, N, C), each place by its shares; pictures to look at behind it have their mean."""
        behind = mixed.shape[1] - self.shares[0].shape[-2]
        return sum(
            beside_words(share, 0, behind) * term.output(project, own)
            for share, term, own in zip(self.shares, self.terms, self._apart(mixed), strict=True)
        )

    def foreign_output(self, project: nn.Module, mixed: torch.Tensor) -> torch.Tensor:
        """(B, M, T*H*wide) -> (B, M, C) of a text, which has no place: mixed by the shares' means."""
        return sum(
            share.mean(dim=-2, keepdim=True) * term.foreign_output(project, own)
            for share, term, own in zip(self.shares, self.terms, self._apart(mixed), strict=True)
        )

    def _each(self, project: nn.Module, tokens: torch.Tensor, widened: Callable) -> torch.Tensor:
        own = project(tokens)
        return torch.cat([widened(term, lambda _: own, tokens) for term in self.terms], dim=-1)

    def _apart(self, mixed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return mixed.chunk(len(self.terms), dim=-1)
