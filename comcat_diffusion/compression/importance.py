"""How much a model's output depends on what each block gives: the weights by which errors of tokens and channels count.

An error at the first (class) token of a late block can cost the output hundreds of times what it costs at one of the
patches; counted alike, it would hardly count at all. To second order, 1 - cosine of the output is |J e|^2 for a small
error e of the stream. A token's weight is the mean square of J^T u over random directions u across the output
(Hutchinson), the metric of channels their second moment: a backward pass over a few pictures.

Letters: B pictures, N tokens, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from comcat_diffusion.compression.chain import Call, outputs

PICTURES = 16  # spread evenly over those that calibrate
ALIKE = 0.1  # of the metric, as if all channels were: what few pictures show of directions is not to be trusted further
LEAST = 0.1  # of the first token's weight that all others have together: where the output does not depend on them


@dataclass(frozen=True)
class Weights:
    """Of the first token of a block, and of each other."""

    first: float = 1.0
    rest: float = 1.0
    root: torch.Tensor | None = None  # C, C: L of the metric L L^T, by which channels count; None: all alike

    def of(self, tokens: int) -> torch.Tensor:
        """(N,), of mean 1."""
        weights = torch.full((tokens,), self.rest)
        weights[0] = self.first
        return weights / weights.mean()


def measured(model: nn.Module, blocks: Sequence[nn.Module], calls: Sequence[Call], seed: int = 0) -> list[Weights]:
    """Of what every block gives, in the model's order. The global random numbers are left alone."""
    streams: list[torch.Tensor] = []

    def keep(_: nn.Module, __: tuple, output: torch.Tensor) -> torch.Tensor:
        streams.append(output if output.requires_grad else output.detach().requires_grad_())
        return streams[-1]

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        with torch.enable_grad():
            gradients = torch.autograd.grad(_across(model, _few(calls), seed), streams)
    finally:
        for handle in handles:
            handle.remove()
    return [_weights(gradient.double()) for gradient in gradients]


def _few(calls: Sequence[Call]) -> dict[str, torch.Tensor]:
    """A batch of some of the pictures."""
    rows = [(call, row) for call in calls for row in range(len(call.hidden))]
    places = torch.linspace(0, len(rows) - 1, min(PICTURES, len(rows))).round().long().tolist()
    return {n: torch.cat([rows[p][0].batch[n][rows[p][1]].unsqueeze(0) for p in places]) for n in calls[0].batch}


def _across(model: nn.Module, batch: dict[str, torch.Tensor], seed: int) -> torch.Tensor:
    """The output along a random direction; its gradient's square is in the mean that of the change (losses.change)."""
    found = outputs(model, batch)
    if found.ndim == 2:
        found = (found - found.mean(-1, True)).unsqueeze(1)
    length = found.detach().norm(dim=-1, keepdim=True)
    unit = found.detach() / length
    chance = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed)).to(found)
    chance = chance - (chance * unit).sum(-1, keepdim=True) * unit
    tokens = found.shape[1]
    share = Weights(1.0, 1.0 / max(tokens - 1, 1)).of(tokens).to(found).unsqueeze(-1)  # the first token counts half
    return (chance * found / length * share.sqrt()).sum()


def _weights(gradient: torch.Tensor) -> Weights:
    """From a gradient (B, N, C)."""
    size = gradient.square().sum(-1).mean(0)  # N
    others = max(len(size) - 1, 1)
    first, rest = float(size[0]), float(size[1:].sum()) / others
    metric = (gradient.flatten(0, 1).mT @ gradient.flatten(0, 1)).cpu()
    trace = metric.diagonal().mean()
    if not trace > 0:  # nothing that comes after depends on this block
        return Weights()
    metric = (1 - ALIKE) * metric / trace + ALIKE * torch.eye(len(metric), dtype=metric.dtype)
    return Weights(first, max(rest, LEAST * first / others), torch.linalg.cholesky(metric))
