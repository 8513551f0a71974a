"""A tied adapter: attentions that read the text share one context side, the heads of a self-attention one of their own.

In a file each side is one head of one attention, which is what it is to everything that takes files apart: the cores
of all heads that share it stand side by side, attention after attention in the order of their names. So such a file
has four tensors for the text, however deep the base is, and four for each self-attention.

Letters: H heads, D head width, R rank, C channels, W the sum of H*D over the attentions of a side.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from comcat_diffusion.adapters import seam

TEXT = "tied"  # the side of all attentions that read the text; that of a self-attention has the attention's name
SHARED = ("k_down", "v_down")  # the factors on the context's side
CORES = ("q_core", "out_core")
WIDTH = 64  # of a head, for what depends on it where the base is not at hand; Stable Diffusion has 40 to 160
OTHER_TEXT = (
    "Attentions of a tied adapter that read a text must all read the same one, at the rank and alpha of the whole: "
    "choose other targets, or another kind."
)

Sides = Mapping[str, list[str]]  # by side: its attentions in the order of their names


def side_of(attention: str, module: nn.Module) -> str:
    """The side that an attention of this name shares with others, or with none."""
    return TEXT if seam.reads_text(module) else attention


def sides_of(model: nn.Module, factors: Iterable[str]) -> Sides:
    """The sides of a model's attentions; `factors` are names of theirs, ATTENTION.FACTOR."""
    found: dict[str, list[str]] = {}
    for attention in sorted({name.rpartition(".")[0] for name in factors}):
        found.setdefault(side_of(attention, model.get_submodule(attention)), []).append(attention)
    return found


def gathered(factors: Mapping[str, torch.Tensor], sides: Sides) -> dict[str, torch.Tensor]:
    """Factors by name, ATTENTION.FACTOR, as a file holds them: k_down, v_down (R, C); q_core, out_core (R, W)."""
    found = {}
    for side, attentions in sides.items():
        for name in SHARED:
            found[f"{side}.{name}"] = factors[f"{attentions[0]}.{name}"]
        rank = len(found[f"{side}.{SHARED[0]}"])
        for name in CORES:
            found[f"{side}.{name}"] = torch.cat([_wide(factors[f"{a}.{name}"], rank) for a in attentions], dim=1)
    return found


def scattered(
    tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, int]], sides: Sides
) -> dict[str, torch.Tensor]:
    """The inverse of `gathered`, for factors of these shapes: (R, C) and (H*R, D)."""
    found = {}
    for side, attentions in sides.items():
        for name in SHARED:
            found |= {f"{attention}.{name}": tensors[f"{side}.{name}"] for attention in attentions}
        rank = len(tensors[f"{side}.{SHARED[0]}"])
        for name in CORES:
            keys = [f"{attention}.{name}" for attention in attentions]
            widths = [shapes[key][0] * shapes[key][1] // rank for key in keys]
            for key, wide in zip(keys, tensors[f"{side}.{name}"].split(widths, dim=1), strict=True):
                found[key] = wide.unflatten(1, (-1, shapes[key][1])).movedim(0, 1).flatten(0, 1)  # R, H, D -> H*R, D
    return found


def tied_shapes(shapes: Mapping[str, tuple[int, int]], sides: Sides) -> dict[str, tuple[int, int]]:
    """Names and shapes of `gathered` for factors of these shapes. Raises ValueError if they read different text."""
    found = {}
    for side, attentions in sides.items():
        for name in SHARED:
            (found[f"{side}.{name}"], *others) = {shapes[f"{attention}.{name}"] for attention in attentions}
            if others:
                raise ValueError(OTHER_TEXT)
        rank = found[f"{side}.{SHARED[0]}"][0]
        for name in CORES:
            width = sum(high * wide // rank for high, wide in (shapes[f"{a}.{name}"] for a in attentions))
            found[f"{side}.{name}"] = (rank, width)
    return found


def _wide(core: torch.Tensor, rank: int) -> torch.Tensor:
    """(H*R, D) -> (R, H*D)."""
    return core.unflatten(0, (-1, rank)).movedim(1, 0).flatten(1)
