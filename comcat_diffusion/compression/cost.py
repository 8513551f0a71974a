"""What a layer costs, dense and at every width: parameters and multiply-adds, counted with the real ranks.

A width is the number of columns per head that a product keeps. A key bias (where the model has a query bias) is one of
the columns, so that a multiple of 8 is a multiple of 8 for the attention kernel. Width None means: kept dense.

Letters: H heads, D head width, W width kept, C channels.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from comcat_diffusion.attentions import style_of
from comcat_diffusion.compression import hosts

PARTS = ("attention", "mlp", "classifier")
BLOCK_PARTS = PARTS[:2]  # what lies in the blocks of a transformer
Widths = Mapping[str, int | None]  # by the name of a unit


@dataclass(frozen=True)
class Unit:
    """One thing whose rank is chosen: a product of an attention, both of a diffusers attention, or a Linear."""

    name: str  # key of a plan: "layers.0.attention:qk", "layers.0.mlp.fc1"
    module: str  # path in the model
    product: str  # "qk", "vo", "both", "linear" or "neurons"
    part: str  # one of PARTS
    heads: int
    full: int  # largest width; at it nothing is lost
    key_bias: int  # 1 if one of the columns is a key bias
    per_width: int  # parameters of one more column
    fixed: int  # parameters besides; may be negative, for a key bias has no column of queries
    dense: int  # parameters as the model has them

    def parameters(self, width: int | None) -> int:
        """Number of parameters at a width."""
        return self.dense if width is None else self.fixed + width * self.per_width

    @property
    def break_even(self) -> int:
        """The smallest width that is no cheaper than the dense layer."""
        return max(0, -(-(self.dense - self.fixed) // self.per_width))

    def options(self, multiple: int = 1) -> list[int | None]:
        """Widths that are cheaper than dense, ascending, and None for dense at the end."""
        least = 1 + self.key_bias
        widths = [w for w in range(least, min(self.full, self.break_even - 1) + 1) if w % multiple == 0]
        return [*widths, None]


def units(model: nn.Module, parts: Iterable[str] = PARTS, per_matrix: bool = False) -> list[Unit]:
    """Everything that can be compressed in these parts, in the model's order; `per_matrix` ignores the heads.

    Raises ValueError if a part is unknown, not there or not compressible.
    """
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        raise ValueError(f"There is no part {unknown[0]}; parts are {', '.join(PARTS)}.")
    if hosts.is_diffusers(model) and set(parts) != {"attention"}:
        raise ValueError("Of a diffusers model only the attentions are compressed: give parts=('attention',).")
    found = []
    for name, module in hosts.attentions(model).items() if "attention" in parts else ():
        if hosts.why_not(module) is None:
            found += _matrices(name, module) if per_matrix else _products(name, module)
    found += [_linear(name, part, layer) for name, (part, layer) in hosts.linears(model).items() if part in parts]
    if not found:
        raise ValueError(f"There is nothing to compress in this {type(model).__name__}: {_why_nothing(model, parts)}.")
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda unit: order[unit.module])


def sites(model: nn.Module, parts: Iterable[str] = PARTS) -> list[list[list[Unit]]]:
    """Every place that can be compressed, in the model's order, with its alternatives, of which one is to be taken.

    Queries and keys, and values and output: by heads, or matrix by matrix. An MLP: fewer neurons, or low rank of each
    layer. Other Linears: low rank. Raises ValueError as `units` does.
    """
    by_heads, by_matrix = units(model, parts), {unit.name: unit for unit in units(model, parts, per_matrix=True)}
    mlps = hosts.mlps(model) if "mlp" in parts else {}
    places: dict[str, list[list[Unit]]] = {}
    for unit in by_heads:
        owner = unit.module.rpartition(".")[0]
        if unit.product != "linear":
            names = style_of(model.get_submodule(unit.module)).names
            names = {"qk": names[:2], "vo": names[2:], "both": names}[unit.product]
            places[unit.name] = [[unit], [by_matrix[f"{unit.module}.{name}"] for name in names]]
        elif owner in mlps:
            places.setdefault(owner, [[_neurons(owner, mlps[owner])], []])[1].append(unit)
        else:
            places[unit.module] = [[unit]]
    return list(places.values())


def named(model: nn.Module, parts: Iterable[str], names: Iterable[str]) -> list[Unit]:
    """The units of these names: of each site the alternative that has its names, else the first."""
    names, found = set(names), []
    for alternatives in sites(model, parts):
        found += next((units for units in alternatives if names.issuperset(u.name for u in units)), alternatives[0])
    return found


def _neurons(name: str, mlp: hosts.Mlp) -> Unit:
    bias = 0 if mlp.into[0].bias is None else 1
    per_width = len(mlp.into) * (mlp.into[0].in_features + bias) + mlp.out.out_features
    fixed = 0 if mlp.out.bias is None else mlp.out.out_features
    dense = fixed + mlp.neurons * per_width
    return Unit(f"{name}:neurons", name, "neurons", "mlp", 1, mlp.neurons, 0, per_width, fixed, dense)


def skipped(model: nn.Module, parts: Iterable[str]) -> dict[str, str]:
    """Attentions that stay as they are, with the reason."""
    if "attention" not in parts:
        return {}
    reasons = {name: hosts.why_not(module) for name, module in hosts.attentions(model).items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _why_nothing(model: nn.Module, parts: Iterable[str]) -> str:
    reasons = skipped(model, parts)
    if not reasons:
        return f"it has no {' or '.join(parts)} of a known kind"
    name, reason = next(iter(reasons.items()))
    return f"of {name}, {reason}"


def _matrices(name: str, module: nn.Module) -> list[Unit]:
    style = style_of(module)
    paths = (style.q, style.k, style.v, style.out)
    return [
        _linear(f"{name}.{path}", "attention", layer)
        for path, layer in zip(paths, style.projections(module), strict=True)
    ]


def _linear(name: str, part: str, layer: nn.Linear) -> Unit:
    into, outof, bias = layer.in_features, layer.out_features, 0 if layer.bias is None else layer.out_features
    return Unit(name, name, "linear", part, 1, min(into, outof), 0, into + outof, bias, into * outof + bias)


def _products(name: str, module: nn.Module) -> list[Unit]:
    style = style_of(module)
    q, k, v, out = style.projections(module)
    heads, width = style.head_count(module), q.out_features // style.head_count(module)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in (q, k, v, out)]
    key_bias = 0 if q.bias is None else 1
    out_bias = 0 if v.bias is None and out.bias is None else out.out_features
    qk, vo = heads * (q.in_features + k.in_features), heads * (v.in_features + out.out_features)
    if style.diffusers:  # stock Linears: the key bias is a row of zeros and a one in the biased query projection
        both = qk + vo + heads * key_bias
        full = min(width, q.in_features, k.in_features, out.out_features)
        return [Unit(f"{name}:both", name, "both", "attention", heads, full, key_bias, both, out_bias, sum(sizes))]
    without = -key_bias * heads * q.in_features  # the constant column of queries has no weights
    into, outof = min(width, q.in_features, k.in_features), min(width, v.in_features, out.out_features)
    return [
        Unit(f"{name}:qk", name, "qk", "attention", heads, into + key_bias, key_bias, qk, without, sum(sizes[:2])),
        Unit(f"{name}:vo", name, "vo", "attention", heads, outof, 0, vo, out_bias, sum(sizes[2:])),
    ]


def multiply_adds(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> int:
    """Multiply-adds of one forward pass on these inputs, counted while it runs: Linears, convolutions and attention.

    Of an attention with N queries and M keys: N M H W_qk for the logits and N M H W_vo for the mixture.
    """
    total, tokens, handles = 0, {}, []

    def count(module: nn.Module, _: tuple, output: torch.Tensor) -> None:
        nonlocal total
        total += output.numel() * module.weight[0].numel()  # per output number, a row of the weight

    def remember(module: nn.Module, _: tuple, output: torch.Tensor) -> None:
        tokens[module] = output.shape[1]

    def attend(module: nn.Module, _: tuple, output: object) -> None:
        nonlocal total
        q, k, v, _ = style_of(module).projections(module)
        batch = (output[0] if isinstance(output, tuple) else output).shape[0]
        total += batch * tokens[q] * tokens[k] * (k.out_features + v.out_features)

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            handles.append(module.register_forward_hook(count))
        if style_of(module) is not None:
            handles += [p.register_forward_hook(remember) for p in style_of(module).projections(module)[:2]]
            handles.append(module.register_forward_hook(attend))
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return total


def linears_of(model: nn.Module, unit: Unit) -> tuple[nn.Linear, ...]:
    """The dense layers that the unit stands for."""
    module = model.get_submodule(unit.module)
    if unit.product == "linear":
        return (module,)
    if unit.product == "neurons":
        mlp = hosts.mlp_of(module)
        return (*mlp.into, mlp.out)
    projections = style_of(module).projections(module)
    return {"qk": projections[:2], "vo": projections[2:], "both": projections}[unit.product]


def work(model: nn.Module, unit: Unit, width: int | None, tokens: int) -> int:
    """Multiply-adds of a unit on so many tokens of one picture, in a transformer's self-attention or MLP.

    Of a product of an attention also those of the mixing: N^2 H W for the logits, and as many for the mixture.
    """
    layers = linears_of(model, unit)
    if unit.product == "linear":
        weights = layers[0].weight.numel() if width is None else width * unit.per_width
        return tokens * (weights + _mixing(model, unit, tokens))
    mixed = unit.heads * tokens if unit.product in ("qk", "vo") else 0  # a token, for every column of a head
    if width is None:
        return tokens * (sum(layer.weight.numel() for layer in layers) + mixed * (unit.full - unit.key_bias))
    if unit.product == "neurons":
        each = sum(layer.in_features for layer in layers[:-1]) + layers[-1].out_features
    else:
        each = unit.per_width
    constant = unit.fixed if unit.product == "qk" else 0  # the constant column of queries is no product
    return tokens * (width * (each + mixed) + constant)


def _mixing(model: nn.Module, unit: Unit, tokens: int) -> int:
    """What a token's mixing costs where the matrices of an attention are compressed one by one: as much as before."""
    owner, _, name = unit.module.rpartition(".")
    style = style_of(model.get_submodule(owner))
    mixes = style is not None and name in (style.q, style.v)  # the logits count with queries, the mixture with values
    return tokens * model.get_submodule(unit.module).out_features if mixes else 0


def parameters(found: Iterable[Unit], widths: Widths) -> int:
    """Parameters of these units at these widths."""
    return sum(unit.parameters(widths[unit.name]) for unit in found)
