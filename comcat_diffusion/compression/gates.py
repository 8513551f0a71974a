"""Gates: the relaxed choice of a width, and the mask on the singular values that it amounts to.

sum_a p_a U_:ra S_:ra V_:ra = U diag(s m) V with m_j = sum over the candidates with r_a > j of p_a (PAPER section 2):
one masked product stands for a product per candidate.
"""

from collections.abc import Sequence

import torch
from torch import nn

from comcat_diffusion.compression.cost import Unit


def candidate_widths(unit: Unit, number: int, multiple: int = 1) -> list[int | None]:
    """Widths spread evenly up to break-even, and None for dense; for any width of model."""
    *widths, dense = unit.options(multiple)
    if len(widths) <= number:
        return [*widths, dense]
    places = {round((place + 1) * len(widths) / number) - 1 for place in range(number)}
    return [*(widths[place] for place in sorted(places)), dense]


class Gate(nn.Module):
    """Which width a unit gets: one parameter per candidate, relaxed to a mask on the singular values."""

    def __init__(self, unit: Unit, widths: Sequence[int | None]) -> None:
        super().__init__()
        self.unit, self.widths = unit, tuple(widths)
        self.alpha = nn.Parameter(torch.zeros(len(widths)))
        columns = torch.arange(unit.full)
        kept = [columns < (unit.full if width is None else width) for width in widths]
        self.register_buffer("kept", torch.stack(kept).float())  # candidates, full
        self.register_buffer("costs", torch.tensor([float(unit.parameters(width)) for width in widths]))
        self.chosen = torch.softmax(self.alpha.detach(), 0)  # p of this step

    def draw(self, temperature: float, generator: torch.Generator) -> None:
        """p = softmax((alpha + Gumbel noise) / temperature), with its graph."""
        uniform = torch.rand(len(self.alpha), generator=generator).clamp(1e-7, 1 - 1e-7)
        noise = -(-uniform.log()).log()
        self.chosen = torch.softmax((self.alpha + noise.to(self.alpha.device)) / temperature, 0)

    def mask(self, hidden: int = 0) -> torch.Tensor:
        """m (full - hidden,); `hidden` leading columns, the key bias, are no singular values."""
        return (self.chosen @ self.kept)[hidden:]

    @property
    def expected_cost(self) -> torch.Tensor:
        """sum_a p_a C_a, Eq. 5: parameters."""
        return self.chosen @ self.costs

    @property
    def width(self) -> int | None:
        """The likeliest candidate."""
        return self.widths[int(self.alpha.argmax())]


class Masked(nn.Module):
    """A first factor whose columns are masked head by head; `gate` belongs to somebody else."""

    def __init__(self, inner: nn.Linear, gate: Gate, hidden: int = 0) -> None:
        super().__init__()
        self.inner, self._gate, self.hidden = inner, (gate,), hidden
        self.in_features, self.out_features = inner.in_features, inner.out_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, N, H*W)."""
        mask = self._gate[0].mask(self.hidden)
        heads = self.out_features // len(mask)
        return self.inner(features) * mask.to(features.dtype).repeat(heads)
