"""The weighted sum of live adapters of one model as one adapter more (PEFT's `add_weighted_adapter`).

The maths is that of adapter files (terms.py, combine.py): what adapters add to an attention are products, and the sum
of products is that of their ranks side by side. The attentions that share a text side, of tied adapters, are one term.
So are the terms beside another module, which keep all of their ranks.

Letters: H heads, R rank, C channels, D head width.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from comcat_diffusion.adapters.beside import BesideLayer
from comcat_diffusion.adapters.beside_kinds import split
from comcat_diffusion.adapters.beside_rows import Beside, summed
from comcat_diffusion.adapters.combine import concatenated, cut
from comcat_diffusion.adapters.config import ComcatConfig
from comcat_diffusion.adapters.header import settings_of_layers
from comcat_diffusion.adapters.layer import ComcatLayer, factor_shapes
from comcat_diffusion.adapters.model import adapted_layers, factors, side_cars
from comcat_diffusion.adapters.packing import FOLDABLE, FREE
from comcat_diffusion.adapters.terms import CONTEXT, Term
from comcat_diffusion.adapters.tied import CORES, SHARED, TEXT, Sides, gathered, scattered, sides_of

KINDS = ("cat", "svd")
Factors = dict[str, torch.Tensor]  # by name, ATTENTION.FACTOR


def weighted_sum(
    model: nn.Module, adapters: Sequence[tuple[str, float]], kind: str, rank: int | None
) -> tuple[ComcatConfig, Factors]:
    """The configuration and the factors of the sum of a model's adapters, (name, weight) each, as strong as they are.

    `cat` is exact; `svd` is the best approximation of a rank, that of the largest adapter if none is given. Raises
    ValueError for what has no sum in one adapter: other kinds, other triggers, whole modules.
    """
    config = _common_config(model, adapters, kind, rank)
    layers = adapted_layers(model)
    own = {name: {key: f.detach() for key, f in factors(model, name).items()} for name, _ in adapters}
    keys = {key for found in own.values() for key in split(found)[0]}
    sides = sides_of(model, keys) if config.tied else {key.rpartition(".")[0]: [key.rpartition(".")[0]] for key in keys}
    terms_of = {}
    for side, members in sides.items():
        terms = [
            replace(term, scale=weight * term.scale)
            for name, weight in adapters
            if (term := _term(own[name], name, members, layers, config)) is not None
        ]
        terms_of[side] = concatenated(terms)
        if kind == "svd":
            terms_of[side] = cut(terms_of[side], rank or max(term.rank for term in terms))[0]
    ranks = {name: terms_of[side].rank for side, members in sides.items() for name in members}
    common = terms_of[TEXT].rank if TEXT in terms_of else Counter(ranks.values()).most_common(1)[0][0]
    beside = _beside(model, adapters)
    kept = {"foldable": config.foldable, "tied": config.tied, "trigger": config.trigger}
    for of_kind in {term.kind for term in beside}:
        kept |= of_kind.of_ranks({term.host: len(term.down) for term in beside if term.kind == of_kind})
    made = ComcatConfig(r=common, alpha=float(common), **kept, **settings_of_layers(ranks, common))
    dtype = next(iter(own[adapters[0][0]].values())).dtype
    found = _factors(terms_of, common, sides, layers)
    for term in beside:
        found |= {name.removeprefix(f"{term.part}."): factor for name, factor in term.tensors().items()}
    return made, {key: value.to(dtype) for key, value in found.items()}


def _beside(model: nn.Module, adapters: Sequence[tuple[str, float]]) -> list[Beside]:
    """What adapters, (name, weight) each, add beside other modules, as strong as they are."""
    found = []
    for name, weight in adapters:
        for host, layer in side_cars(model).items():
            if isinstance(layer, BesideLayer) and name in layer.r:
                held = dict(zip(layer.kind.factors, (factor.detach() for factor in layer.factors(name)), strict=True))
                found.append(Beside.of("", host, weight * layer.scaling[name], held))
    return summed(found)


def _common_config(
    model: nn.Module, adapters: Sequence[tuple[str, float]], kind: str, rank: int | None
) -> ComcatConfig:
    """What all of the adapters are. Raises ValueError, see `weighted_sum`."""
    if kind not in KINDS:
        raise ValueError(f"combination_type must be one of {', '.join(KINDS)}, not '{kind}': 'cat' is exact.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"svd_rank must be a whole number of at least 1, not {rank!r}.")
    if not adapters:
        raise ValueError("Name at least one adapter to add.")
    known = getattr(model, "peft_config", {})
    for name, weight in adapters:
        if name not in known or not factors(model, name):
            raise ValueError(f"There is no COMCAT adapter '{name}' to add; loaded: {', '.join(known) or 'none'}.")
        if not math.isfinite(weight):
            raise ValueError(f"The weight of '{name}' must be a finite number, not {weight}.")
        if known[name].trigger_ranks:
            raise ValueError(f"'{name}' holds several subjects with words of their own, which have no weighted sum.")
        if known[name].cores:
            raise ValueError(f"'{name}' is of cores, which have no weighted sum of their kind: let both act instead.")
        if known[name].modules_to_save:
            raise ValueError(f"'{name}' trains whole modules (modules_to_save), which have no weighted sum.")
    first = adapters[0][0]
    for name, _ in adapters:
        for setting, told in (
            ("foldable", "kinds"),
            ("tied", "kinds"),
            ("trigger", "triggers"),
            ("trigger_ranks", "triggers"),
        ):
            if getattr(known[name], setting) != getattr(known[first], setting):
                raise ValueError(
                    f"'{first}' and '{name}' are of different {told} and cannot be one adapter: keep both and let both "
                    "act (set_adapters)."
                )
    return known[first]


def _term(
    own: Factors, adapter: str, members: Sequence[str], layers: Mapping[str, ComcatLayer], config: ComcatConfig
) -> Term | None:
    """What an adapter adds to an attention or, tied, to all of a side; None if it is in none of them."""
    there = [name for name in members if adapter in layers[name].r]
    if not there:
        return None
    rank, scale = layers[there[0]].r[adapter], layers[there[0]].scaling[adapter]
    if not config.tied:
        names = FOLDABLE if config.foldable else FREE
        return Term("", members[0], scale, rank, config.foldable, {n: own[f"{members[0]}.{n}"] for n in names})
    shared = {factor: own[f"{there[0]}.{factor}"] for factor in SHARED}
    whole = {}
    for name in members:
        whole |= {f"{name}.{factor}": values for factor, values in shared.items()}
        shapes = factor_shapes(layers[name].owner, rank, foldable=True, tied=True)
        for factor in CORES:  # which carry the strength, as that may differ by attention
            whole[f"{name}.{factor}"] = (
                own[f"{name}.{factor}"] * layers[name].scaling[adapter]
                if name in there
                else shared[SHARED[0]].new_zeros(shapes[factor][::-1])
            )
    side = gathered(whole, {TEXT: list(members)})
    return Term("", TEXT, 1.0, rank, True, {n: side[f"{TEXT}.{n}"] for n in FOLDABLE}, tied=True)


def _factors(
    terms: Mapping[str, Term], common: int, sides: Sides, layers: Mapping[str, ComcatLayer]
) -> dict[str, torch.Tensor]:
    """The factors of terms for an adapter whose alpha is the common rank: its strength is that over a term's rank."""
    found = {}
    for side, term in terms.items():
        gain = term.scale * term.rank / common
        own = {f"{side}.{name}": f * gain if name in CONTEXT else f for name, f in term.factors.items()}
        if term.tied:
            shapes = {
                f"{name}.{factor}": (outof, into)
                for name in sides[side]
                for factor, (into, outof) in factor_shapes(layers[name].owner, term.rank, True, True).items()
            }
            own = scattered(own, shapes, {side: sides[side]})
        found |= own
    return found
