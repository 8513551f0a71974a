"""The smaller model, block by block, each fitted on what the already smaller blocks before it give.

In every block queries and keys are truncated first; then values and the output projection are solved for by least
squares, and after them the second layer of the MLP. What they are asked for is what the dense model has in that place,
less what has come so far: so each layer takes back what it can of the errors of those before it.

Letters: B pictures, N tokens, C channels, H heads, R values kept a head, M neurons.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from comcat_diffusion.attentions import style_of
from comcat_diffusion.compression import mixtures, modules, neurons
from comcat_diffusion.compression.chain import Call, inputs_to, run, watching
from comcat_diffusion.compression.cost import Unit, Widths
from comcat_diffusion.compression.decompose import decomposed, put, rows_of, watched, weights_of
from comcat_diffusion.compression.hosts import mlp_of
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
) -> nn.Module:
    """A copy of the model with these units, which lie in the blocks, at these widths. `groups`: of regression.py."""
    small = copy.deepcopy(model)
    names = [next(name for name, module in model.named_modules() if module is block) for block in blocks]
    wanted, have = [call.hidden for call in calls], [call.hidden for call in calls]
    for name in names:
        inside = [unit for unit in units if unit.module.startswith(f"{name}.")]
        wanted, have = _Block(small, name, inside, widths, calls, groups).fit(wanted, have)
    return small


class _Block:
    """One block on its way from dense to small."""

    def __init__(self, model: nn.Module, name: str, units: Sequence[Unit], widths: Widths,
                 calls: Sequence[Call], groups: list[torch.Tensor]) -> None:  # fmt: skip
        self.model, self.name, self.units, self.widths = model, name, units, widths
        self.calls, self.groups, self.count = calls, groups, 1 + max(int(g.max()) for g in groups)
        self.small = model.get_submodule(name)

    def fit(self, wanted: Streams, have: Streams) -> tuple[Streams, Streams]:
        """The streams after the dense block, and after the small one, which is now in the model."""
        outs = self._outs()
        after, given = self._dense(wanted, {part: end.out for part, end in outs.items()})
        found = {unit: self.model.get_submodule(unit.module) for unit in self.units}
        ending = {part: [unit for unit, module in found.items() if module is end.out] for part, end in outs.items()}
        last = [unit for units in ending.values() for unit in units]  # fitted before they are truncated, if they are
        self._truncate([u for u in self.units if u.product in ("qk", "linear") and u not in last], have)
        for part, end in outs.items():
            self._fit(end, "vo" if part == "attention" else "neurons", have, given[part])
            self._truncate(ending[part], have)
        return after, [run(self.small, call, x) for call, x in zip(self.calls, have, strict=True)]

    def _outs(self) -> dict[str, "End"]:
        """By part what is compressed here, and the Linear that ends it."""
        found = {}
        for path, module in self.small.named_modules(prefix=self.name):
            if not any(unit.module == path or unit.module.startswith(f"{path}.") for unit in self.units):
                continue
            if style_of(module) is not None:
                found["attention"] = End(module, style_of(module).projections(module)[3])
            elif mlp_of(module) is not None:
                found["mlp"] = End(module, mlp_of(module).out, mlp_of(module).into)
        return found

    def _unit(self, product: str) -> Unit | None:
        return next((unit for unit in self.units if unit.product == product), None)

    def _dense(self, wanted: Streams, outs: dict[str, nn.Linear]) -> tuple[Streams, dict]:
        """The dense block on its own stream: what comes out, and by part what each `out` Linear is to give."""
        after, given = [], {part: [] for part in outs}
        for call, x in zip(self.calls, wanted, strict=True):  # the small block is still the dense one
            with watching(outs | _norms(self.small)) as seen:
                after.append(run(self.small, call, x))
            for part in outs:
                given[part].append(Given.of(part, x, after[-1], seen, list(_norms(self.small))))
        return after, given

    def _truncate(self, units: Sequence[Unit], have: Streams) -> None:
        """What needs no more than moments of its input."""
        chosen = [unit for unit in units if self.widths[unit.name] is not None]
        if not chosen:
            return
        rows = [torch.ones(len(x), dtype=torch.bool, device=x.device) for x in have]
        seen = seen_by(self.model, chosen, self.small, self.calls, have, rows)
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
            _fit_neurons(end, seen, width)

    def _regression(self, layer: nn.Linear, have: Streams, given: list["Given"]) -> Regression:
        """Of what a layer of the small block is to give on what it sees."""
        seen = Regression(self.count)
        norms = _norms(self.small)
        for call, x, target, group in zip(self.calls, have, given, self.groups, strict=True):
            with watching(norms) as passed:
                features = inputs_to(self.small, layer, call, x)
            stream = passed[list(norms)[-1]][0] if target.part == "mlp" and norms else x
            seen.add(features, target.less(stream), group)
        return seen


@dataclass(frozen=True)
class End:
    """An attention or an MLP, the Linear that ends it and, of an MLP, those into its neurons."""

    owner: nn.Module
    out: nn.Linear
    into: tuple[nn.Linear, ...] = ()


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


def _fit_neurons(end: End, seen: Regression, width: int) -> None:
    """The neurons that stay, and the layer out of them anew."""
    weight, bias = weights_of(end.out)
    kept = neurons.order(seen.covariance, neurons.gains(weight))[0][:width].sort().values
    fit, offset = seen.only(kept).solve(weight.mT[kept], bias is not None)
    modules.replace_neurons(end.owner, rows_of(end.into, kept), (fit.mT, offset))


def _refit(out: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Other numbers, (C, E) and (E,), in a Linear of the same shape."""
    out.weight.copy_(weight.mT)
    if bias is not None:
        out.bias.copy_(bias)


class Given:
    """What a Linear is to give: what it gives in the dense model, or what the stream after it lacks."""

    def __init__(self, part: str, output: torch.Tensor, after: torch.Tensor, scale: torch.Tensor | None) -> None:
        self.part, self.output, self.after, self.scale = part, output, after, scale

    @classmethod
    def of(cls, part: str, x: torch.Tensor, after: torch.Tensor, seen: dict, norms: list[str]) -> "Given":
        """Read off a pass of the dense block: the streams are what its two norms see."""
        output = seen[part][1]
        if len(norms) != 2 or not torch.equal(seen[norms[0]][0], x):
            return cls(part, output, after, None)
        middle = seen[norms[1]][0]
        before, after = (x, middle) if part == "attention" else (middle, after)
        added, axes = after - before, tuple(range(output.ndim - 1))
        scale = (added * output).sum(axes) / output.square().sum(axes).clamp_min(torch.finfo(output.dtype).tiny)  # C
        off = (added - scale * output).abs().max()
        clear = off <= OFF * added.abs().max() and bool((scale.abs() > OFF * scale.abs().max()).all())
        return cls(part, output, after, scale if clear else None)

    def less(self, stream: torch.Tensor) -> torch.Tensor:
        """(B, N, C): what brings the small model's stream to where the dense one's is."""
        return self.output if self.scale is None else (self.after - stream) / self.scale


def _norms(block: nn.Module) -> dict[str, nn.Module]:
    """The block's own layers with a weight a channel, by name: its norms."""
    found = {}
    for name, child in block.named_children():
        weight = getattr(child, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 1:
            found[name] = child
    return found
