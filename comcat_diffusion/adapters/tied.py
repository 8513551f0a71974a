"""A tied adapter in a file: as the one head of one attention, which is what it is to everything that takes files apart.

The text-side factors are the same for all attentions; the cores of all heads stand side by side, attention after
attention in the order of their names. So such a file has four tensors, however deep the base is.

Letters: H heads, D head width, R rank, C channels, W the sum of H*D over all attentions.
"""

from collections.abc import Mapping

import torch

from comcat_diffusion.adapters.layer import OTHER_TEXT
from comcat_diffusion.adapters.model import TIED

NAME = "tied"  # where files of other adapters have the name of an attention
CORES = ("q_core", "out_core")
WIDTH = 64  # of a head, for what depends on it where the base is not at hand; Stable Diffusion has 40 to 160


def gathered(factors: Mapping[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """Factors by name, ATTENTION.FACTOR, as a file holds them: k_down, v_down (R, C); q_core, out_core (R, W)."""
    found = {}
    for name in TIED:
        found[f"{NAME}.{name}"] = next(factor for key, factor in factors.items() if key.endswith("." + name))
    for name in CORES:
        wide = [_wide(factors[key], rank) for key in _places(factors, name)]
        found[f"{NAME}.{name}"] = torch.cat(wide, dim=1)
    return found


def scattered(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """The inverse of `gathered`, for factors of these shapes: (R, C) and (H*R, D)."""
    rank, found = len(tensors[f"{NAME}.{TIED[0]}"]), {}
    for name in TIED:
        found |= {key: tensors[f"{NAME}.{name}"] for key in _places(shapes, name)}
    for name in CORES:
        places = _places(shapes, name)
        widths = [shapes[key][0] * shapes[key][1] // rank for key in places]
        for key, wide in zip(places, tensors[f"{NAME}.{name}"].split(widths, dim=1), strict=True):
            found[key] = wide.unflatten(1, (-1, shapes[key][1])).movedim(0, 1).flatten(0, 1)  # R, H, D -> H*R, D
    return found


def tied_shapes(shapes: Mapping[str, tuple[int, int]], rank: int) -> dict[str, tuple[int, int]]:
    """Names and shapes of `gathered` for factors of these shapes. Raises ValueError if they read different text."""
    found = {}
    for name in TIED:
        (found[f"{NAME}.{name}"], *others) = {shapes[key] for key in _places(shapes, name)}
        if others:
            raise ValueError(OTHER_TEXT)
    for name in CORES:
        width = sum(shapes[key][0] * shapes[key][1] // rank for key in _places(shapes, name))
        found[f"{NAME}.{name}"] = (rank, width)
    return found


def _places(named: Mapping[str, object], factor: str) -> list[str]:
    return sorted(key for key in named if key.endswith("." + factor))


def _wide(core: torch.Tensor, rank: int) -> torch.Tensor:
    """(H*R, D) -> (R, H*D)."""
    return core.unflatten(0, (-1, rank)).movedim(1, 0).flatten(1)
