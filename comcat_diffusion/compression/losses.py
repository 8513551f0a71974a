"""What the model's output loses by each choice, on pictures that the choice was not calibrated on.

Block by block, on the dense model's activations: each unit is truncated at a few widths, alone, and the model is run on
from there on the pictures of the group that is left out. Between those widths, and beyond, the loss follows the curve
that the unit's own decomposition predicts (singular values, or what the neurons that stay leave unexplained).
"""

import copy
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import nn

from comcat_diffusion.compression.calibrate import refuse_unseen
from comcat_diffusion.compression.chain import Call, Reached, outputs, run, starting_at
from comcat_diffusion.compression.cost import Unit
from comcat_diffusion.compression.decompose import Decomposed, Key, Seen, decomposed, lost, put, watched
from comcat_diffusion.compression.factor import Moments, Narrowing
from comcat_diffusion.compression.importance import Weights

PROBED = (0.25, 0.6)  # of the widths that are cheaper than dense
PROBED_ALONE = (0.5,)  # of a matrix by itself: there are many, and each is part of a choice only
TINY = 1e-9  # of a curve: below it nothing is left to lose
PICTURES = 8  # that losses are measured on


def change(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """1 - cosine, the mean over pictures; of features, the first token (the class token) counts half."""
    if wanted.ndim == 2:
        found, wanted = found - wanted.mean(-1, True), wanted - wanted.mean(-1, True)
    off = 1 - torch.cosine_similarity(found.double(), wanted.double(), dim=-1)
    return float(off.mean() if off.ndim == 1 or off.shape[1] == 1 else (off[:, 0].mean() + off[:, 1:].mean()) / 2)


def groups_of(calls: Sequence[Call], count: int) -> list[torch.Tensor]:
    """Which of `count` groups of similar pictures each belongs to, as one tensor (B,) a batch.

    Pictures are ordered along the main direction in which means and spreads of what enters the first block differ, and
    cut into equal parts: crops of one photograph come to lie together.
    """
    hidden = [call.hidden.detach().double().cpu() for call in calls]
    found = torch.cat([torch.cat([x.mean(1), x.std(1)], -1) for x in hidden])  # pictures, 2 C
    found = found - found.mean(0)
    along = found @ torch.linalg.svd(found, full_matrices=False)[2][0]
    count = max(1, min(count, len(found) // 2))
    group = torch.empty(len(found), dtype=torch.long)
    group[along.argsort()] = torch.arange(len(found)) * count // len(found)
    return list(group.split([len(x) for x in hidden]))


def _first(mask: torch.Tensor, count: int) -> torch.Tensor:
    """The mask with so many of its places at most, spread evenly over them."""
    places = mask.nonzero().flatten()
    thinned = torch.zeros_like(mask)
    thinned[places[torch.linspace(0, len(places) - 1, min(count, len(places))).round().long()]] = True
    return thinned


class Probe:
    """The pictures that losses are measured on: the last group's, taken out of what calibrates."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], calls: Sequence[Call], groups: list) -> None:
        self.model, self.blocks = model, blocks
        last = max(int(g.max()) for g in groups)
        self.taken = [g == last for g in groups] if last else [torch.zeros_like(g, dtype=torch.bool) for g in groups]
        fitting = [taken if last else ~taken for taken in self.taken]
        rows = list(_first(torch.cat(fitting), PICTURES).split([len(mask) for mask in fitting]))
        self.rows, self.calls = rows, calls
        self.wanted = [self._out(call, mask, 0, call.hidden) for call, mask in zip(calls, rows, strict=True)]

    def _out(self, call: Call, mask: torch.Tensor, place: int, hidden: torch.Tensor) -> torch.Tensor | None:
        if not mask.any():
            return None
        batch = {name: value[mask] for name, value in call.batch.items()}
        with starting_at(self.blocks, place, hidden[mask]):
            return outputs(self.model, batch)

    def loss(self, place: int, hidden: Sequence[torch.Tensor]) -> float:
        """Of the model as it is now, from the block at `place` on."""
        lost = []
        for call, mask, wanted, features in zip(self.calls, self.rows, self.wanted, hidden, strict=True):
            if wanted is not None:
                lost.append((change(self._out(call, mask, place, features), wanted), len(wanted)))
        return sum(value * count for value, count in lost) / sum(count for _, count in lost)


@torch.no_grad()
def curves(
    model: nn.Module,
    blocks: nn.ModuleList,
    units: Sequence[Unit],
    calls: Sequence[Call],
    groups: list[torch.Tensor],
) -> dict[str, torch.Tensor]:
    """(full + 1,) by unit: the loss at every width. The units lie in the blocks; the model is left as it was.

    Tokens count alike here: plans by weighed ones were no better on photographs kept apart (docs/log.md).
    """
    probe, found = Probe(model, blocks, calls, groups), {}
    names = {id(block): f"{name}." for name, block in model.named_modules()}
    hidden = [call.hidden for call in calls]
    for place, block in enumerate(blocks):
        inside = [unit for unit in units if unit.module.startswith(names[id(block)])]
        seen = seen_by(model, inside, block, calls, hidden, [~taken for taken in probe.taken], Weights())
        for unit in inside:
            parts = decomposed(model, unit, {key: seen[key] for key in watched(model, unit)})
            found[unit.name] = _measured(model, blocks, place, unit, parts, probe, hidden)
        hidden = [run(block, call, features) for call, features in zip(calls, hidden, strict=True)]
    return found


def seen_by(
    model: nn.Module, units: Sequence[Unit], block: nn.Module, calls: Sequence[Call], hidden: list, rows: list,
    weights: Weights,
) -> Seen:  # fmt: skip
    """What the layers of a block are given by these rows of each batch (B,); the block is run no further than that."""
    keys = dict.fromkeys(key for unit in units for key in watched(model, unit))
    seen, handles, keep, waiting = {}, [], [None], set()

    def look(key: Key, arguments: tuple, output: torch.Tensor | None = None) -> None:
        given = arguments[0][keep[0]]
        counted = weights.of(given.shape[1]) if key[2] else None
        seen[key].add(given, *(() if output is None else (output[keep[0]],)), counted)
        waiting.discard(key)
        if not waiting:
            raise Reached

    for key in keys:
        layer = model.get_submodule(key[0])
        if key[1] and layer.in_features > layer.out_features:
            seen[key] = Narrowing.zero(layer.in_features, layer.out_features, layer.weight)
            handles.append(layer.register_forward_hook(lambda _, a, out, k=key: look(k, a, out)))
        else:
            seen[key] = Moments.zero(layer.in_features, layer.weight)
            handles.append(layer.register_forward_pre_hook(lambda _, a, k=key: look(k, a)))
    try:
        for call, features, keep[0] in zip(calls, hidden, rows, strict=True):
            waiting.update(keys)
            if keep[0].any():
                with suppress(Reached):
                    run(block, call, features)
    finally:
        for handle in handles:
            handle.remove()
    refuse_unseen({path: moments for (path, *_), moments in seen.items()})
    return seen


def _measured(
    model: nn.Module, blocks: nn.ModuleList, place: int, unit: Unit, parts: Decomposed, probe: Probe, hidden: list
) -> torch.Tensor:
    """The predicted curve, scaled to what is measured at the probed widths."""
    curve, block = lost(unit, parts).clamp_min(TINY), blocks[place]
    widths = [width for width in unit.options() if width is not None]
    if not widths:
        return curve
    shares = PROBED_ALONE if unit.product == "linear" else PROBED
    probed = sorted({widths[round(share * (len(widths) - 1))] for share in shares})
    scales = []
    for width in probed:
        blocks[place] = copy.deepcopy(block)
        try:
            put(model, unit, parts, width)
            scales.append(max(probe.loss(place, hidden), TINY) / curve[width])
        finally:
            blocks[place] = block
    along = torch.arange(len(curve), dtype=curve.dtype)
    if len(probed) == 1:
        return curve * scales[0]
    share = ((along - probed[0]) / (probed[1] - probed[0])).clamp(0, 1)
    return curve * (scales[0].log() * (1 - share) + scales[1].log() * share).exp()
