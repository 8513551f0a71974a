"""The side-car of one Linear of a transformer's feed-forwards, see beside.py for when its terms act:

    out += s m U (D x)        D (R, C), U (O, R); m is one for rows whose prompt has the trigger, else zero

or, by place, its share of each token. Which Linears these are says the family. Where one Linear makes queries, keys and
values as well (FLUX.2's blocks of one stream), the term is beside all of it: heads that an adapter widens read what is
made with it. It is the weight s U D, as which it merges exactly, and a LoRA of the Linear. Ours.

Letters: B batch, N tokens, C channels that come in, O that go out, R rank.
"""

import re

import torch
from torch import nn
from torch.nn.functional import linear

from comcat_diffusion.adapters.beside import BesideLayer
from comcat_diffusion.adapters.beside_kinds import FEED_FORWARDS
from comcat_diffusion.families.known import FAMILIES, family_of_model

FACTORS = FEED_FORWARDS.factors


class Mixing(nn.Linear):
    """A factor in the precision of what it is given."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, N, R)."""
        return linear(hidden, self.weight.to(hidden.dtype))


class FedLayer(BesideLayer):
    """All adapters of one Linear."""

    kind = FEED_FORWARDS
    nowhere = (
        f"Terms beside feed-forwards are for {', '.join(own.name for own in FAMILIES if own.feed_forwards)}, and this "
        "is a {}: set feed_forwards=0."
    )
    adapter_layer_names = tuple(f"comcat_{name}" for name in FACTORS)

    @classmethod
    def can_stand(cls, model: nn.Module, name: str) -> bool:
        """Those that the family of the model names."""
        pattern = family_of_model(model).feed_forwards
        return bool(pattern) and re.fullmatch(pattern, name) is not None

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        """See `BesideLayer`."""
        return None if isinstance(module, nn.Linear) else "it is no Linear of PyTorch's"

    @staticmethod
    def shapes(host: nn.Linear, rank: int) -> dict[str, tuple[int, int]]:
        """See `BesideLayer`."""
        return {"feed_down": (rank, host.in_features), "feed_up": (host.out_features, rank)}

    def _new(self, name: str, into: int, outof: int, drawn: bool) -> nn.Linear:
        return self._factor(Mixing, into, outof, drawn, zero=name == "feed_up")

    def term(self, name: str, hidden: torch.Tensor, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
        """What an adapter makes of (B, N, C), its ranks (B, N, R) times a weight: (B, N, O)."""
        down, up = self.held(name)
        return up(weight * down(hidden))

    def _laid(self, by_token: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """As they are. Raises ValueError for tokens in another shape, of which they would weigh the wrong ones."""
        if like.ndim != 3:
            raise ValueError(f"Terms beside feed-forwards weigh tokens of (B, N, C), not of {tuple(like.shape)}.")
        return by_token

    def _shares(self, live: list[str], made: torch.Tensor) -> dict[str, torch.Tensor]:
        return self._focused(live, made, self._masked(live, made.shape[1], stream=True), stream=True)

    def _change(self, name: str) -> torch.Tensor:
        down, up = self.factors(name)
        return up @ down

    def _refuse_quantized(self) -> None:
        if type(self.owner).host is not nn.Linear or not self.weight.dtype.is_floating_point:
            raise ValueError("Cannot merge into a quantized feed-forward: keep the COMCAT adapter live.")
