"""The smaller model, block by block, each fitted on what the already smaller blocks before it give.

In every block the layers into the attention first learn to read the dense model's stream out of the smaller one's. Then
queries and keys are truncated, and values and the output projection are solved for by least squares. After it the same
for the MLP. What the layers that end them are asked for is what the dense model has in that place, less what has come
so far: so each takes back what it can of the errors of those before it. What keeps its widths is fitted all the same.

Letters: B pictures, N tokens, C channels, H heads, R values kept a head, M neurons.
"""

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from comcat_diffusion.attentions import style_of
from comcat_diffusion.compression import cost, hosts, mixtures, modules, neurons
from comcat_diffusion.compression.chain import Call, inputs_to, recalling, run, watching
from comcat_diffusion.compression.cost import Unit, Widths
from comcat_diffusion.compression.decompose import decomposed, put, rows_of, watched, weights_of
from comcat_diffusion.compression.hosts import mlp_of
from comcat_diffusion.compression.importance import Weights
from comcat_diffusion.compression.losses import seen_by
from comcat_diffusion.compression.regression import Regression

OFF = 1e-3  # of the largest value: where stream and scaled output differ by more, a block does more than add
Streams = list[torch.Tensor]  # B, N, C, a batch each


@torch.no_grad()
def fitted(
    model: nn.Module,
    blocks: nn.ModuleList,
    units: Sequence[Unit],
    widths: Widths,
    calls: Sequence[Call],
    groups: list[torch.Tensor],
    weights: Sequence[Weights],
) -> nn.Module:
    """A copy of the model with these units, which lie in the blocks, at these widths.

    `groups` are regression.py's, `weights` importance.py's.
    """
    small = copy.deepcopy(model)
    names = [next(name for name, module in model.named_modules() if module is block) for block in blocks]
    wanted, have = [call.hidden for call in calls], [call.hidden for call in calls]
    for name, tokens in zip(names, weights, strict=True):
        inside = [unit for unit in units if unit.module.startswith(f"{name}.")]
        block = Block(small, name, inside, widths, calls, groups, tokens)
        wanted, given = block.dense(wanted)
        have = block.shrink(given, have, first=name is names[0])
    return small


class Block:
    """One block on its way from dense to small; in the model it is still the dense one."""

    def __init__(self, model: nn.Module, name: str, units: Sequence[Unit], widths: Widths,
                 calls: Sequence[Call], groups: list[torch.Tensor], weights: Weights) -> None:  # fmt: skip
        self.model, self.name, self.units, self.widths = model, name, units, widths
        self.calls, self.groups, self.count = calls, groups, 1 + max(int(g.max()) for g in groups)
        self.small, self.weights = model.get_submodule(name), weights

    def dense(self, wanted: Streams) -> tuple[Streams, "Targets"]:
        """The dense block on its own stream: what comes out, and by part what its layers have and are to give."""
        ends, norms, after = self._ends(), _norms(self.small), []
        given = {part: [] for part in ends}
        outs = {part: end.out for part, end in ends.items()}
        into = {f"into {part}": end.into[0] for part, end in ends.items()}
        for call, x in zip(self.calls, wanted, strict=True):
            with watching(outs | into | norms) as seen:
                after.append(run(self.small, call, x))
            for part in ends:
                given[part].append(Given.of(part, x, after[-1], seen, list(norms)))
        return after, given

    def shrink(self, given: "Targets", have: Streams, first: bool) -> Streams:
        """Make it small, by what it is to give on the small model's stream, and what it gives there then.

        The first block's stream is the dense one's.
        """
        ends = self._ends()
        early, late = self._in_order(ends)
        self._truncate(early.pop(None, []), have)
        with ExitStack() as stack:
            for part, end in ends.items():
                if not first:
                    self._denoise(end, have, given[part])
                self._truncate(early.get(part, []), have)
                self._fit(end, "vo" if part == "attention" else "neurons", have, given[part])
                self._truncate(late.get(part, []), have)
                if part == "attention" and given[part][0].scale is not None:  # seen to come first, so it is done
                    stack.enter_context(recalling(self.small, end.owner, self.calls, have))
            return [run(self.small, call, x) for call, x in zip(self.calls, have, strict=True)]

    def _ends(self) -> dict[str, "End"]:
        """By part the attention and the MLP of the block, compressed or not."""
        found = {}
        for module in self.small.modules():
            if style_of(module) is not None and hosts.why_not(module) is None:
                *into, out = style_of(module).projections(module)
                found["attention"] = End(module, out, tuple(into))
            elif mlp_of(module) is not None:
                found["mlp"] = End(module, mlp_of(module).out, mlp_of(module).into)
        return {part: found[part] for part in cost.BLOCK_PARTS if part in found}

    def _in_order(self, ends: dict[str, "End"]) -> tuple[dict, dict]:
        """By part what is truncated before its last layer is fitted, and after; what is in no part is under None."""
        early, late = {}, {}
        for unit in self.units:
            module = self.model.get_submodule(unit.module)
            part = next((part for part, end in ends.items() if module in (*end.into, end.out)), None)
            if unit.product in ("qk", "linear"):
                part = "attention" if unit.product == "qk" else part
                where = late if part and module is ends[part].out else early
                where.setdefault(part, []).append(unit)
        return early, late

    def _unit(self, product: str) -> Unit | None:
        return next((unit for unit in self.units if unit.product == product), None)

    def _denoise(self, end: "End", have: Streams, given: list["Given"]) -> None:
        """The layers into an attention or an MLP anew, on the dense model's input as the small one's predicts it."""
        seen = Regression(self.count)
        for call, x, target, group in zip(self.calls, have, given, self.groups, strict=True):
            seen.add(inputs_to(self.small, end.into[0], call, x), target.entered, group)
        found = [weights_of(layer) for layer in end.into]
        biased = all(bias is not None for _, bias in found)
        share, offset = seen.solve(torch.eye(found[0][0].shape[1], dtype=torch.float64), biased)  # C, C; C
        for layer, (weight, bias) in zip(end.into, found, strict=True):
            _refit(layer, share @ weight.mT, bias + offset @ weight.mT if biased else bias)

    def _truncate(self, units: Sequence[Unit], have: Streams) -> None:
        """What needs no more than moments of its input."""
        chosen = [unit for unit in units if self.widths[unit.name] is not None]
        if not chosen:
            return
        rows = [torch.ones(len(x), dtype=torch.bool, device=x.device) for x in have]
        seen = seen_by(self.model, chosen, self.small, self.calls, have, rows, self.weights)
        for unit in chosen:
            found = decomposed(self.model, unit, {key: seen[key] for key in watched(self.model, unit)})
            put(self.model, unit, found, self.widths[unit.name])

    def _fit(self, end: "End", product: str, have: Streams, given: list["Given"]) -> None:
        """What ends an attention or an MLP anew and, where fewer are kept, its values or its neurons."""
        unit, (weight, bias) = self._unit(product), weights_of(end.out)
        width = None if unit is None else self.widths[unit.name]
        seen = self._regression(end.out, have, given)
        if width is None:
            _refit(end.out, *seen.solve(weight.mT, bias is not None))
        elif product == "vo":
            _fit_values(end, seen, unit.heads, width)
        else:
            _fit_neurons(end, seen, width, self.weights.root)

    def _regression(self, layer: nn.Linear, have: Streams, given: list["Given"]) -> Regression:
        """Of what a layer of the small block is to give on what it sees."""
        seen = Regression(self.count)
        norms = _norms(self.small)
        for call, x, target, group in zip(self.calls, have, given, self.groups, strict=True):
            with watching(norms) as passed:
                features = inputs_to(self.small, layer, call, x)
            stream = passed[list(norms)[-1]][0] if target.part == "mlp" and norms else x
            # What heads give is fitted on all tokens alike: there so few class tokens do not carry over (docs/log.md).
            weights = self.weights.of(features.shape[1]) if target.part == "mlp" else None
            seen.add(features, target.less(stream), group, weights)
        return seen


@dataclass(frozen=True)
class End:
    """An attention or an MLP, the Linear that ends it, and those that it begins with, which see the same."""

    owner: nn.Module
    out: nn.Linear
    into: tuple[nn.Linear, ...]


def _fit_values(end: End, seen: Regression, heads: int, width: int) -> None:
    """Fewer values of each head, and the output projection out of them anew."""
    weight, bias = weights_of(end.out)
    v_weight, v_bias = weights_of(style_of(end.owner).projections(end.owner)[2])
    biased = v_bias is not None or bias is not None
    fit, _ = seen.solve(weight.mT, biased)  # H*D, E
    basis = mixtures.bases(seen.covariance, fit, heads, width)  # H*D, H*R
    fit, offset = seen.through(basis).solve(mixtures.onto(basis, seen.covariance, fit), biased)  # H*R, E; E
    if v_bias is not None:  # attention weights sum to one: what the values lose, the output gets
        offset = offset + (v_bias @ basis) @ fit
    values = basis.mT @ v_weight  # H*R, C
    gain = (fit.norm(dim=1) / values.norm(dim=1).clamp_min(1e-12)).clamp(1e-6, 1e6).sqrt()  # both of one size
    modules.replace_out(end.owner, values * gain.unsqueeze(1), (fit / gain.unsqueeze(1)).mT, offset)


def _fit_neurons(end: End, seen: Regression, width: int, root: torch.Tensor | None) -> None:
    """The neurons that stay, and the layer out of them anew."""
    weight, bias = weights_of(end.out)
    kept = neurons.order(seen.covariance, neurons.gains(weight, root), width)[0].sort().values
    fit, offset = seen.only(kept).solve(weight.mT[kept], bias is not None)
    modules.replace_neurons(end.owner, rows_of(end.into, kept), (fit.mT, offset))


def _refit(out: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Other numbers, (C, E) and (E,), in a Linear of the same shape."""
    out.weight.copy_(weight.mT)
    if bias is not None:
        out.bias.copy_(bias)


class Given:
    """What the layers into a part are given in the dense model, and what the one that ends it is to give.

    That is what it gives in the dense model or, where the block only adds it, what the stream after it lacks.
    """

    def __init__(self, part: str, entered: torch.Tensor, output: torch.Tensor | None, after: torch.Tensor,
                 scale: torch.Tensor | None) -> None:  # fmt: skip
        self.part, self.entered, self.output, self.after, self.scale = part, entered, output, after, scale

    @classmethod
    def of(cls, part: str, x: torch.Tensor, after: torch.Tensor, seen: dict, norms: list[str]) -> "Given":
        """Read off a pass of the dense block: the streams are what its two norms see."""
        entered, output = seen[f"into {part}"][0], seen[part][1]
        if len(norms) != 2 or not torch.equal(seen[norms[0]][0], x):
            return cls(part, entered, output, after, None)
        middle = seen[norms[1]][0]
        before, after = (x, middle) if part == "attention" else (middle, after)
        added, axes = after - before, tuple(range(output.ndim - 1))
        scale = (added * output).sum(axes) / output.square().sum(axes).clamp_min(torch.finfo(output.dtype).tiny)  # C
        off = (added - scale * output).abs().max()
        if off > OFF * added.abs().max() or bool((scale.abs() <= OFF * scale.abs().max()).any()):
            return cls(part, entered, output, after, None)
        return cls(part, entered, None, after, scale)

    def less(self, stream: torch.Tensor) -> torch.Tensor:
        """(B, N, C): what brings the small model's stream to where the dense one's is."""
        return self.output if self.scale is None else (self.after - stream) / self.scale


Targets = dict[str, list[Given]]  # by part, a batch each


def _norms(block: nn.Module) -> dict[str, nn.Module]:
    """The block's own layers with a weight a channel, by name: its norms."""
    found = {}
    for name, child in block.named_children():
        weight = getattr(child, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 1:
            found[name] = child
    return found
