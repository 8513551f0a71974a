"""Convolutions of a U-Net of ComfyUI while adapters have terms beside them, see adapters/separable.py.

Letters: B batch, N places, R rank.
"""

from collections.abc import Mapping

import torch
from torch import nn

from comcat_diffusion.adapters.separable import separable
from comcat_diffusion.comfy.beside import Beside


class Convolved(Beside):
    """See `Beside`."""

    def places(
        self, live: list[str], options: Mapping, latent: tuple[int, int], made: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """See `Beside`."""
        return self.shares(live, options, latent, tuple(made.shape[2:]), made)

    def laid(self, by_token: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """As (B, R, h', w')."""
        turned = by_token.mT  # B, R, h'*w' or 1
        return turned.unsqueeze(-1) if turned.shape[2] == 1 else turned.unflatten(2, like.shape[2:])

    def term(self, factors: Mapping[str, nn.Linear], hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, O, h', w')."""
        down, taps, up = (factors[f"conv_{name}"].weight.to(hidden) for name in ("down", "taps", "up"))
        host = self.host
        return separable(hidden, down, taps, up, host.stride, host.padding, host.padding_mode, weight)
