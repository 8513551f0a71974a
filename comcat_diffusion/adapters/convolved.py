"""The side-car of one convolution, see separable.py for what its terms add and beside.py for when.

Letters: B batch, C channels that come in, O that go out, R rank.
"""

import re

import torch
from torch import nn

from comcat_diffusion.adapters.beside import BesideLayer
from comcat_diffusion.adapters.beside_kinds import CONVOLUTIONS
from comcat_diffusion.adapters.separable import SIDE, TAPS, across, around, first_taps, kernel_of

FACTORS = CONVOLUTIONS.factors
_HOSTS = re.compile(r"(down|up|mid)_blocks?\..*resnets\.\d+\.conv[12]")  # of a U-Net of diffusers


class Across(nn.Linear):
    """A factor of 1 x 1; a module that is called, so that whoever offloads modules one by one brings its weight."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, R, h, w)."""
        return across(hidden, self.weight.to(hidden.dtype))


class Around(nn.Linear):
    """A factor of 3 x 3 taps for each rank by itself, strided and padded as it is told that the host is."""

    def forward(
        self, hidden: torch.Tensor, stride: tuple[int, int], padding: tuple[int, int], mode: str
    ) -> torch.Tensor:
        """(B, R, h, w) -> (B, R, h', w')."""
        return around(hidden, self.weight.to(hidden.dtype), stride, padding, mode)


class ConvolvedLayer(BesideLayer):
    """All adapters of one convolution."""

    kind = CONVOLUTIONS
    nowhere = "Terms beside convolutions are for U-Nets, and this is a {}: set convolutions=0."
    adapter_layer_names = tuple(f"comcat_{name}" for name in FACTORS)

    @classmethod
    def can_stand(cls, model: nn.Module, name: str) -> bool:
        """The convolutions of residual blocks."""
        return _HOSTS.fullmatch(name) is not None

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        """See `BesideLayer`."""
        if not isinstance(module, nn.Conv2d):
            return "it is no convolution of PyTorch's"
        if module.kernel_size != (SIDE, SIDE) or module.groups != 1 or module.dilation != (1, 1):
            return "its kernel is not of 3 x 3 places and all channels"
        if isinstance(module.padding, str):
            return f"it is padded by a rule ({module.padding})"
        return None

    @staticmethod
    def shapes(host: nn.Conv2d, rank: int) -> dict[str, tuple[int, int]]:
        """See `BesideLayer`."""
        return {"conv_down": (rank, host.in_channels), "conv_taps": (rank, TAPS), "conv_up": (host.out_channels, rank)}

    def _new(self, name: str, into: int, outof: int, drawn: bool) -> nn.Linear:
        made = self._factor(Around if name == "conv_taps" else Across, into, outof, drawn, zero=name == "conv_up")
        if name == "conv_taps" and drawn and not made.weight.is_meta:
            with torch.no_grad():
                made.weight.copy_(first_taps(outof))
        return made

    def term(self, name: str, hidden: torch.Tensor, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
        """What an adapter makes of (B, C, h, w), its ranks (B, R, h', w') times a weight: (B, O, h', w')."""
        (down, taps, up), host = self.held(name), self.owner
        return up(weight * taps(down(hidden), host.stride, host.padding, host.padding_mode))

    def _laid(self, by_token: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """As (B, R, h', w')."""
        turned = by_token.mT  # B, R, h'*w' or 1
        return turned.unsqueeze(-1) if turned.shape[2] == 1 else turned.unflatten(2, like.shape[2:])

    def _shares(self, live: list[str], made: torch.Tensor) -> dict[str, torch.Tensor]:
        places = made.flatten(2).mT  # B, h'*w', O
        return self._focused(live, places, self._masked(live, places.shape[1]))

    def _change(self, name: str) -> torch.Tensor:
        return kernel_of(*self.factors(name))

    def _refuse_quantized(self) -> None:
        if not self.weight.dtype.is_floating_point or self.weight.shape[2:] != (SIDE, SIDE):
            raise ValueError("Cannot merge into a quantized convolution: keep the COMCAT adapter live.")
