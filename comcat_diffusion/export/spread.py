"""A tied adapter attention by attention, as LoRA files have it: its own file does not say how a base's heads share it.

What that takes is the base's configuration, and none of its weights. Cores take these too.

Letters: H heads, D head width, R rank, C channels.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from comcat_diffusion import bases
from comcat_diffusion.adapters import cores, tied
from comcat_diffusion.adapters.beside_kinds import split
from comcat_diffusion.adapters.beside_rows import Beside
from comcat_diffusion.adapters.fingerprint import layout_of
from comcat_diffusion.adapters.header import AdapterFileError, Header
from comcat_diffusion.adapters.parts import components
from comcat_diffusion.adapters.store import (
    TOKEN,
    config_of,
    expected_shapes,
    present_base,
    read_fitting,
    read_tensors,
)
from comcat_diffusion.adapters.terms import Contents, Term
from comcat_diffusion.config import BaseSettings
from comcat_diffusion.export.fit import family_in


def shells(config: BaseSettings, header: Header, adapter: str | Path) -> dict[str, nn.Module]:
    """The parts of an adapter's base without weights, on the meta device, for the parts that the adapter is in.

    Where it is of cores, with them. Raises AdapterFileError for another base, FileNotFoundError where there is none.
    """
    if cores.has_cores(header.config):
        pipe = bases.asked_base(config, "fp32", header.base_model)
        read_fitting(components(pipe), present_base(pipe), adapter)
        return components(pipe)
    folder, family = bases.config_folder(config, header.base_model), family_in(header)
    if not (folder / family.part).is_dir():
        raise AdapterFileError(f"{adapter} is for a {family.noun}, which '{folder.name}' does not have.")
    denoiser = family.blank(folder)
    parts = {family.part: denoiser}
    with torch.device("meta"):
        for part in header.config.keys() - parts.keys():
            parts[part] = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / part))  # its projection is not adapted
    if layout_of(denoiser) != header.fingerprint.get("layout"):
        raise AdapterFileError(f"{adapter} was trained on '{header.base_model}', and '{folder.name}' is another base.")
    return parts


def spread(contents: Contents, models: Mapping[str, nn.Module], path: str | Path) -> Contents:
    """The same adapter with a term for every attention that it acts on; the text side of tied ones stays R rows.

    Raises AdapterFileError for a tied adapter of parts that are not among the models.
    """
    terms = [term for term in contents.terms if not term.tied]
    for part in dict.fromkeys(term.part for term in contents.terms if term.tied):
        own = [term for term in contents.terms if term.part == part]
        config = config_of(contents.header.config[part], path).at_attentions()
        terms += _spread(own, models[part], replace(config, tied=False))
    return replace(contents, terms=sorted(terms, key=lambda term: term.key))


def unfolded(header: Header, models: Mapping[str, nn.Module], path: str | Path) -> Contents:
    """An adapter of cores as the foldable one that it is on these models, its base's parts with their weights.

    Raises AdapterFileError for parts that are not among the models.
    """
    tensors, terms, beside = read_tensors(path, header), [], []
    for part, fields in header.config.items():
        config, model = config_of(fields, path), models.get(part)
        if model is None or any(parameter.is_meta for parameter in model.parameters()):
            raise AdapterFileError(f"{path} holds cores of a {part}: name its base, whose weights they are made for.")
        foldable = expected_shapes(model, replace(config.at_attentions(), cores=False))
        heights = {name.rpartition(".")[0]: high for name, (high, _) in foldable.items()}
        shapes = {f"{name}.{mix}": (high, config.r) for name, high in heights.items() for mix in cores.MIXES}
        own = {n.removeprefix(f"{part}."): tensor for n, tensor in tensors.items() if n.startswith(f"{part}.")}
        mixes = cores.scattered(own, shapes)
        for name in heights:
            pair = [mixes[f"{name}.{mix}"] for mix in cores.MIXES]
            sets = config.core_sets.get(name, "")
            factors = cores.factors_of(model.get_submodule(name), config.r, *pair, sets)
            terms.append(Term(part, name, config.alpha / config.r, config.r, True, factors))
        held: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in sorted(split(own)[1].items()):
            host, _, factor = name.rpartition(".")
            held.setdefault(host, {})[factor] = tensor
        beside += [Beside.of(part, host, config.alpha / config.r, factors) for host, factors in held.items()]
    words = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{TOKEN}.")}
    return Contents(header, sorted(terms, key=lambda term: term.key), words, beside)


def _spread(terms: list[Term], model: nn.Module, config: object) -> list[Term]:
    shapes = expected_shapes(model, config)
    sides = tied.sides_of(model, shapes)
    ranks = {side: next(term for term in terms if term.attention == side) for side in sides}
    whole = {f"{term.attention}.{name}": factor for term in terms for name, factor in term.factors.items()}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, factor in tied.scattered(whole, shapes, sides).items():
        attention, _, factor_name = name.rpartition(".")
        found.setdefault(attention, {})[factor_name] = factor
    side_of = {attention: ranks[side] for side, attentions in sides.items() for attention in attentions}
    return [replace(side_of[a], attention=a, factors=factors, tied=False) for a, factors in found.items()]
