"""Cores: an adapter of R x R numbers a head, between directions that its base has already.

    logits_h += s (q_h B_h) N_h (k_h B_h)ᵀ        out += s P_h (v_h B'_h) N'_hᵀ B'_hᵀ Wo_h

B_h (D, R) are the R leading singular directions of the head's keys, those of Wk_h in its own width, B'_h those of its
values. So it is the foldable adapter of Ak_h = Wk_h B_h and G'_h = B_h N_h, and folds, merges and exports as one. Only
N_h and N'_h are learned and kept: in a file those of all heads of all attentions are one tensor for keys and one for
values, attention after attention in the order of their names.

Singular vectors have no sign, and none of their own where two singular values are equal. What they span has neither, so
B_h is the basis of that which is nearest to fixed vectors. It is found in float64 from weights rounded to bfloat16, so
that a base has the same in float32 and in bfloat16, to 1e-13 in whatever order a machine sums. In a copy in half
precision of weights that had more bits, which are rounded twice then, directions turn by 1 %. A span that is almost at
right angles to one of its fixed vectors would turn by half a turn there: a head that stands so askew goes by another of
a few sets of them, and its adapter says by which (`ComcatConfig.core_sets`). To find directions takes a quarter of a
second of a core for a projection of FLUX.2 [klein], so a loaded adapter waits until it first acts.

Letters: H heads, D head width, R rank, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torch.nn.functional import linear

from comcat_diffusion.adapters.header import AdapterFileError
from comcat_diffusion.attentions import plain, style_of

MIXES = ("k_mix", "v_mix")  # the factors: N_h of all heads, (H*R, R)
SIDE = "cores"  # where a file has them
SETS = 10  # of fixed vectors, so that a digit tells one
ASKEW = 0.05  # of a span's cosines to the first set, which are about 0.7 / sqrt(R), the least that is sure enough
SAMPLES = 61
ROUNDED = 2**-8  # what a weight may differ by after a change of precision, relative
CHANGED = (
    "The base's weights are others than when this adapter of cores was loaded, and it stands between their directions: "
    "load it again once they are what they were (an unfused LoRA), or let it act before they change."
)
QUANTIZED = (
    "Cores stand between singular directions of the base's weights, and here these are quantized: choose another kind, "
    "or a base in full or half precision."
)


def basis_of(weight: torch.Tensor, heads: int, rank: int, sets: str = "") -> torch.Tensor:
    """(H*D, C) -> (H, D, R) in float64: for every head an orthonormal basis of its R leading left singular directions.

    `sets` says by a digit which fixed vectors each head goes by; empty: all by the first. Raises ValueError for
    quantized weights.
    """
    return _nearest(_leading(weight, heads, rank), sets or "0" * heads)


def _leading(weight: torch.Tensor, heads: int, rank: int) -> torch.Tensor:
    """Some basis of what the leading directions span, (H, D, R)."""
    _refuse_quantized(weight)
    rounded = weight.detach().cpu().to(torch.bfloat16).double().unflatten(0, (heads, -1))  # H, D, C
    _, vectors = torch.linalg.eigh(rounded @ rounded.mT)  # ascending, H, D, D
    return vectors[..., -rank:]


def _fixed(number: int, width: int, rank: int) -> torch.Tensor:
    """Set `number` of fixed vectors, (D, R): cosines of R waves, of further ones in each set."""
    places = torch.arange(width, dtype=torch.float64)
    waves = (torch.arange(rank, dtype=torch.float64) + number * rank) % width
    return torch.cos(math.pi * (places[:, None] + 0.5) * waves / width)


def _nearest(leading: torch.Tensor, sets: str) -> torch.Tensor:
    """Of the bases of a head's span, L Q with Q orthogonal, the nearest to its F: Q is the polar factor of Lᵀ F."""
    fixed = torch.stack([_fixed(int(digit), *leading.shape[1:]) for digit in sets])  # H, D, R
    u, _, vh = torch.linalg.svd(leading.mT @ fixed)
    return leading @ (u @ vh)


def _chosen(leading: torch.Tensor) -> str:
    """The set that each head is to go by: the first, or of those askew to it the one that the span is most along."""
    fixed = torch.stack([_fixed(number, *leading.shape[1:]) for number in range(SETS)])  # S, D, R
    least = torch.linalg.svdvals(leading.mT @ fixed.unsqueeze(1))[..., -1]  # S, H
    return "".join(map(str, torch.where(least[0] < ASKEW, least.argmax(0), 0).tolist()))


def _refuse_quantized(weight: torch.Tensor) -> None:
    if not weight.dtype.is_floating_point:
        raise ValueError(QUANTIZED)


class Ends:
    """The two fixed ends of an attention's keys, or of its values, on whichever device they are asked for.

    They are found when they are first asked for, of weights that have to be what they were when this was made.
    Without `sets`, which say what fixed vectors heads go by, those are chosen then.
    """

    def __init__(self, weight: torch.Tensor, heads: int, rank: int, sets: str | None = None) -> None:
        _refuse_quantized(weight)
        self.heads, self.rank, self._sets = heads, rank, sets
        self._base: tuple[torch.Tensor, torch.Tensor] | None = weight, _sampled(weight)
        self._weight = self._basis = None

    @property
    def weight(self) -> torch.Tensor:
        """H*R, C: the text side."""
        self._find()
        return self._weight

    @property
    def basis(self) -> torch.Tensor:
        """H, D, R."""
        self._find()
        return self._basis

    @property
    def sets(self) -> str:
        """Of each head the set of fixed vectors that it goes by, a digit."""
        if self._sets is None:
            self._find()
        return self._sets

    @torch.compiler.disable
    def _find(self) -> None:
        """Raises ValueError if the weights have been changed, as by a LoRA that was fused into them."""
        base = self._base
        if base is None:  # said last, so what it stands for is there in every thread that sees it
            return
        weight, before = base
        _refuse_quantized(weight)
        floor = 0.25 * before.abs().mean()  # below it half precision rounds to steps of one size
        if ((_sampled(weight) - before).abs() > ROUNDED * (before.abs() + floor)).any():
            raise ValueError(CHANGED)
        with torch.inference_mode(False), torch.no_grad():  # what is kept here may be trained behind, later
            leading = _leading(weight, self.heads, self.rank)
            self._sets = self._sets or _chosen(leading)
            basis = _nearest(leading, self._sets)
            rows = weight.detach().cpu().double().unflatten(0, (self.heads, -1))  # H, D, C
            dtype = weight.dtype if weight.dtype.itemsize > 1 else torch.float32
            self._basis = basis.to(weight.device, dtype)
            self._weight = (basis.mT @ rows).flatten(0, 1).to(weight.device, dtype)
        self._base = None

    @property
    def out_features(self) -> int:
        """H*R."""
        return self.heads * self.rank

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., H*R)."""
        self.follow(features.device)
        return linear(features, self.weight)

    def follow(self, device: torch.device) -> None:
        """Be on a device."""
        if self.weight.device != device:
            self._weight, self._basis = self._weight.to(device), self._basis.to(device)


def _sampled(weight: torch.Tensor) -> torch.Tensor:
    """A few weights, by which a change of all is seen; in float64."""
    flat = weight.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLES)].double().cpu()


class Core:
    """Learned N_h behind a fixed end, as the core of a foldable adapter: H*R rows of width D."""

    def __init__(self, mix: nn.Linear, ends: Ends) -> None:
        self.mix, self.ends = mix, ends

    @property
    def out_features(self) -> int:
        """H*R."""
        return self.mix.out_features

    @property
    def weight(self) -> torch.Tensor:
        """(H*R, D)."""
        return self._turned(self.mix.weight)

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., H*R), where the features are; if offloaded, a hook brings what is learned there."""
        unit = torch.eye(self.mix.in_features, dtype=features.dtype, device=features.device)
        return linear(features, self._turned(self.mix(unit).mT))

    def _turned(self, mix: torch.Tensor) -> torch.Tensor:
        self.ends.follow(mix.device)
        basis = self.ends.basis.to(mix.dtype)
        return (mix.unflatten(0, (len(basis), -1)).mT @ basis.mT).flatten(0, 1)  # N_hᵀ B_hᵀ, head by head


class FixedEnds:
    """The ends of one attention: its adapters of one rank and the same sets share them, and a copy or a file has none.

    Sets are a digit for each head's keys, then for each head's values.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, str], tuple[Ends, Ends]] = {}

    def of(self, keys: torch.Tensor, values: torch.Tensor, heads: int, rank: int, sets: str) -> tuple[Ends, Ends]:
        """Those of keys and values; of weights as they are when these are asked for first."""
        if (rank, sets) not in self._found:
            self._found[rank, sets] = Ends(keys, heads, rank, sets[:heads]), Ends(values, heads, rank, sets[heads:])
        return self._found[rank, sets]

    def chosen(self, keys: torch.Tensor, values: torch.Tensor, heads: int, rank: int) -> str:
        """The sets that a new adapter of these weights is to go by."""
        made = Ends(keys, heads, rank), Ends(values, heads, rank)
        sets = made[0].sets + made[1].sets
        self._found.setdefault((rank, sets), made)
        return sets

    def __reduce__(self) -> tuple:
        return type(self), ()

    def __deepcopy__(self, memo: dict) -> FixedEnds:
        return type(self)()


def factors_of(
    attention: nn.Module, rank: int, k_mix: torch.Tensor, v_mix: torch.Tensor, sets: str
) -> dict[str, torch.Tensor]:
    """The factors of the foldable adapter that cores (H*R, R) are on an attention of a base, with `sets` as files have.

    An attention that a file names no sets of has "".
    """
    style = style_of(attention)
    _, k, v, _ = (p if p is None else plain(p) for p in style.projections(attention))
    heads = style.head_count(attention)
    both = FixedEnds().of(k.weight, v.weight, heads, rank, sets or first_sets(heads))
    found = {}
    for names, ends, mix in zip((("k_down", "q_core"), ("v_down", "out_core")), both, (k_mix, v_mix), strict=True):
        held = nn.Linear(rank, len(mix), bias=False, device="meta")
        held.weight = nn.Parameter(mix.to(ends.weight), requires_grad=False)
        found |= dict(zip(names, (ends.weight, Core(held, ends).weight), strict=True))
    return found


def first_sets(heads: int) -> str:
    """Of keys and values that all go by the first set, as those of a file do which says nothing."""
    return "0" * (2 * heads)


# Files


def gathered(factors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Factors by name, ATTENTION.FACTOR, as a file holds them: two tensors, (sum of H*R, R)."""
    return {f"{SIDE}.{mix}": torch.cat([factors[f"{name}.{mix}"] for name in _attentions(factors)]) for mix in MIXES}


def scattered(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    """The inverse of `gathered`, for factors of these shapes."""
    found = {}
    for mix in MIXES:
        names = [f"{attention}.{mix}" for attention in _attentions(shapes)]
        heights = [shapes[name][0] for name in names]
        found |= dict(zip(names, tensors[f"{SIDE}.{mix}"].split(heights), strict=True))
    return found


def gathered_shapes(shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Names and shapes of `gathered` for factors of these shapes."""
    found = {}
    for mix in MIXES if shapes else ():
        own = [shapes[f"{attention}.{mix}"] for attention in _attentions(shapes)]
        found[f"{SIDE}.{mix}"] = (sum(high for high, _ in own), own[0][1])
    return found


def _attentions(factors: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[0] for name in factors})


def has_cores(config: Mapping[str, Mapping]) -> bool:
    """Whether any part of a file is of cores, by its header's configurations."""
    return any(own.get("cores") for own in config.values())


def refuse_cores(config: Mapping[str, Mapping], path: object) -> None:
    """Raise AdapterFileError for a file that cannot be taken apart without the weights of its base."""
    if has_cores(config):
        raise AdapterFileError(
            f"{path} holds cores, which mean nothing without their base's weights and are as small as they get: use it "
            "as it is with load_adapter, or, trained with --everywhere, as a LoRA (comcat export) or merged."
        )
