"""A unit decomposed by what its layers have seen: what each width loses, and the narrower layers in place."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from comcat_diffusion.attentions import DIFFUSERS, style_of
from comcat_diffusion.compression import modules, neurons
from comcat_diffusion.compression.cost import Unit
from comcat_diffusion.compression.factor import Moments, Narrowing, Product, linear_product, qk_product, vo_product
from comcat_diffusion.compression.hosts import mlp_of

# Of a Linear's input: its path, whether the layer is truncated by itself, and whether an error of a token counts where
# it is made (in keys and values it counts wherever it is looked at).
Key = tuple[str, bool, bool]
Seen = Mapping[Key, Moments | Narrowing]


def watched(model: nn.Module, unit: Unit) -> tuple[Key, ...]:
    """The Linears whose inputs say what a unit may lose: for queries and for the context, or of the one layer."""
    if unit.product == "linear":
        owner, _, name = unit.module.rpartition(".")
        style = style_of(model.get_submodule(owner))
        return ((unit.module, True, style is None or name not in (style.k, style.v)),)
    module = model.get_submodule(unit.module)
    if unit.product == "neurons":
        return ((f"{unit.module}.{mlp_of(module).names[-1]}", False, True),)
    style = style_of(module)
    if not style.diffusers:  # self-attention: queries, keys and values are made of the same
        query, context = ((f"{unit.module}.{style.q}", False, weighed) for weighed in (True, False))
        return {"qk": (query, context), "vo": (context,)}[unit.product]
    return ((f"{unit.module}.{style.q}", False, True), (f"{unit.module}.{style.k}", False, False))


@dataclass(frozen=True)
class Neurons:
    """An MLP's neurons in the order in which they stay."""

    picks: torch.Tensor  # M
    lost: torch.Tensor  # M + 1
    covariance: torch.Tensor  # M, M
    mean: torch.Tensor  # M


Decomposed = tuple[Product, ...] | Neurons


def decomposed(model: nn.Module, unit: Unit, seen: Seen) -> Decomposed:
    """Every truncation of a unit; without moments (`seen` empty) by the weights alone."""
    module = model.get_submodule(unit.module)
    inputs = [seen.get(key) for key in watched(model, unit)]
    if unit.product == "neurons":
        return _neurons(module, inputs[0])
    if unit.product == "linear":
        return (linear_product(*weights_of(module), inputs[0]),)
    q, k, v, out = style_of(module).projections(module)
    query, context = inputs[0], inputs[-1]
    qk = qk_product(*weights_of(q), weights_of(k)[0], unit.heads, query, context) if unit.product != "vo" else None
    vo = vo_product(*weights_of(v), *weights_of(out), unit.heads, context) if unit.product != "qk" else None
    return tuple(product for product in (qk, vo) if product is not None)


def _neurons(module: nn.Module, seen: Moments | None) -> Neurons:
    mlp = mlp_of(module)
    gains = neurons.gains(weights_of(mlp.out)[0])
    if seen is None:  # neurons that know nothing of each other: the ones with the largest weights stay
        sizes = torch.stack([weights_of(layer)[0].square().sum(1) for layer in mlp.into]).prod(0)  # M
        covariance, mean = sizes.diag(), torch.zeros_like(sizes)
    else:
        covariance, mean = seen.second(centred=True), seen.mean
    return Neurons(*neurons.order(covariance, gains), covariance, mean)


def lost(unit: Unit, found: Decomposed) -> torch.Tensor:
    """(full + 1,): the part of what the unit does that each width loses, by the decomposition's own measure."""
    if isinstance(found, Neurons):
        return found.lost / found.lost[0].clamp_min(torch.finfo(found.lost.dtype).tiny)
    energies = [product.energy for product in found]
    if unit.key_bias:  # its column keeps nothing that is counted
        energies[0] = torch.cat([energies[0].new_zeros(1), energies[0]])
    return 1 - torch.stack([energy[: unit.full + 1] for energy in energies]).mean(0)


def put(model: nn.Module, unit: Unit, found: Decomposed, width: int, folded: bool = True) -> None:
    """Replace a unit's layers by those of this width."""
    module = model.get_submodule(unit.module)
    if isinstance(found, Neurons):
        _put_neurons(module, found, width)
    elif unit.product == "linear":
        modules.replace_linear(model, unit.module, found[0].truncated(width), folded)
    elif unit.product == "qk":
        modules.replace_qk(module, found[0].truncated(width - unit.key_bias), folded)
    elif unit.product == "vo":
        modules.replace_vo(module, found[0].truncated(width), folded)
    else:
        qk, vo = found[0].truncated(width - unit.key_bias), found[1].truncated(width)
        dense = DIFFUSERS.projections(module)[0].out_features // unit.heads
        modules.replace_both(module, qk, vo, dense, folded)


def _put_neurons(module: nn.Module, found: Neurons, width: int) -> None:
    """The neurons that stay take over, by least squares, what those that go have added."""
    mlp = mlp_of(module)
    weight, bias = weights_of(mlp.out)
    kept = found.picks[:width].sort().values
    covariance = found.covariance if bias is not None else found.covariance + found.mean.outer(found.mean)
    ridge = neurons.RIDGE * covariance.diagonal().mean() * torch.eye(width, dtype=weight.dtype)
    share = torch.linalg.solve(covariance[kept][:, kept] + ridge, covariance[kept] + ridge @ _places(kept, mlp.neurons))
    narrow = weight @ share.mT  # E, K
    if bias is not None:
        bias = bias + weight @ found.mean - narrow @ found.mean[kept]
    modules.replace_neurons(module, rows_of(mlp.into, kept), (narrow, bias))


def _places(kept: torch.Tensor, size: int) -> torch.Tensor:
    """(K, M): which neuron each kept one is; what a ridge draws towards."""
    return torch.eye(size, dtype=torch.float64)[kept]


def rows_of(layers: tuple[nn.Linear, ...], kept: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """(weight, bias) of the layers into these neurons, as they are."""
    found = [weights_of(layer) for layer in layers]
    return [(weight[kept], None if bias is None else bias[kept]) for weight, bias in found]


def weights_of(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias in float64 on the CPU."""
    bias = None if linear.bias is None else linear.bias.detach().cpu().double()
    return linear.weight.detach().cpu().double(), bias
