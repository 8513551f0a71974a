"""A finished adapter in fewer bytes: one rank per head and product, chosen by energy over the whole file.

Every head's product is decomposed by QR and a small SVD; all singular values, of all heads and of both products,
compete for the bytes, and those of most energy per byte are kept. The energy of a direction is sigma^2 in VO and
sigma^2 / D in QK, because logits are D^-1/2 of what QK gives; without that, QK would displace VO (one short run on the
embedded base, a fifth of the bytes: an error of 0.26 of the adapter's effect where this has 0.05). It is the energy of
the products as the file holds them. Weighing in the base's factors and the activations of sampled pictures was tried
on the same run and was worse at small budgets, so no base is needed.

Letters: H heads, R rank, C channels, E the rows of a left factor.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from comcat_diffusion import atomic
from comcat_diffusion import heads as maths
from comcat_diffusion.adapters.header import Header
from comcat_diffusion.adapters.packing import HeadRanks
from comcat_diffusion.adapters.terms import Contents, Term, assembled, read_contents

ROUNDING = 1e-12  # relative; products are computed in float64
_ATTEMPTS = 14  # attempts to fill the budget; each is a whole file made in memory


@dataclass(frozen=True)
class Shrunk:
    """What shrinking left behind."""

    header: Header
    bytes: int
    energy_kept: float  # share of the energy of all directions
    head_ranks: HeadRanks


@dataclass(frozen=True)
class _Layer:
    """A term whose products are decomposed; the products are QK and VO."""

    term: Term
    svds: tuple  # of both products: u (H, E, R), s (H, R), vh (H, R, C)

    @classmethod
    def of(cls, term: Term) -> "_Layer":
        """Decomposed; what is only rounding counts as nothing, so that a term shrinks again to the ranks it has."""
        svds = [maths.product_svd(*product) for product in term.products()]
        return cls(term, tuple((u, s * (s > ROUNDING * s.amax()), vh) for u, s, vh in svds))

    def energies(self, product: int) -> torch.Tensor:
        """What each direction of each head counts: (H, R)."""
        return self.svds[product][1].square() / (self.term.width if product == 0 else 1)

    def row_bytes(self, product: int, dtype: torch.dtype) -> int:
        """Bytes of one singular direction of one head."""
        u, _, vh = self.svds[product]
        scales = 8 if dtype == torch.int8 else 0  # a float32 for each of the two rows
        return dtype.itemsize * (u.shape[1] + vh.shape[2]) + scales


Chosen = list[tuple[list[int], list[int]]]  # by layer: the ranks of its heads, for QK and for VO


def shrink(adapter: str | Path, output: str | Path, max_bytes: int, dtype: torch.dtype | None = None) -> Shrunk:
    """Write an adapter file of at most `max_bytes`, header and new words included; it loads as any other.

    `dtype` is the precision of the factors: float16, bfloat16, float32 or int8 (one scale per row). Without one it is
    float16 if all of the adapter fits that way, else int8, which keeps twice the directions. Raises ValueError if not
    even one direction of one head fits, naming the least.
    """
    whole_file = read_contents(adapter)
    made, content = shrunk(whole_file, max_bytes, dtype)
    atomic.write_bytes(output, content)
    return made


def shrunk(whole_file: Contents, max_bytes: int, dtype: torch.dtype | None = None) -> tuple[Shrunk, bytes]:
    """As `shrink`, in memory: what was made, and the file's bytes."""
    layers = [_Layer.of(term) for term in whole_file.terms]
    whole = sum(float(layer.energies(product).sum()) for layer in layers for product in (0, 1))
    if whole == 0:
        raise ValueError("The adapter adds nothing to its base, since all its products are zero; train it first.")
    if dtype is None:
        everything = [tuple([s.shape[1]] * s.shape[0] for _, s, _ in layer.svds) for layer in layers]
        fits = len(_made(whole_file, layers, everything, torch.float16).content) <= max_bytes
        dtype = torch.float16 if fits else torch.int8
    made = _richest(whole_file, layers, max_bytes, dtype)
    return Shrunk(made.header, len(made.content), made.energy / whole, made.header.head_ranks), made.content


def least_bytes(whole_file: Contents) -> int:
    """The fewest bytes that an adapter of these shapes can be shrunk to, whatever it has learned or will learn."""
    ones = [_Layer(t, tuple((u, torch.ones_like(s), v) for u, s, v in _Layer.of(t).svds)) for t in whole_file.terms]
    return len(_made(whole_file, ones, _cheapest(ones, torch.int8), torch.int8).content)


@dataclass(frozen=True)
class _Made:
    header: Header
    content: bytes
    energy: float  # of what was kept


def _richest(whole_file: Contents, layers: list[_Layer], max_bytes: int, dtype: torch.dtype) -> _Made:
    """The richest file within the budget. How long the header is depends on what is in the file, so it is tried out."""
    everything = sum(
        layer.row_bytes(i, dtype) * s.numel() for layer in layers for i, (_, s, _) in enumerate(layer.svds)
    )
    best = _made(whole_file, layers, _cheapest(layers, dtype), dtype)
    if len(best.content) > max_bytes:
        raise ValueError(
            f"{max_bytes:,} bytes are too few: the least this adapter can be shrunk to is {len(best.content):,} bytes."
        )
    low, high = (
        0,
        2 * min(everything, max_bytes),
    )  # bytes of factors: `low` fit, `high` might not; everything comes first
    for _ in range(_ATTEMPTS):
        budget = (low + high) // 2
        chosen = _allocated(layers, budget, dtype)
        made = _made(whole_file, layers, chosen, dtype) if any(any(map(any, ranks)) for ranks in chosen) else best
        if len(made.content) > max_bytes:
            high = budget
            continue
        low, best = budget, max(best, made, key=lambda file: file.energy)
        if budget >= everything:
            break
    return best


def _allocated(layers: list[_Layer], budget: int, dtype: torch.dtype) -> Chosen:
    """Ranks for `budget` bytes of factors: always the next direction with the most energy per byte that still fits."""
    chosen, queue = _nothing(layers), list(_first_steps(layers, dtype))
    heapq.heapify(queue)
    while queue:
        _, cost, index, product, head = heapq.heappop(queue)
        if cost > budget:
            continue  # nor will this head's later directions fit, which cost the same
        budget -= cost
        ranks, energies = chosen[index][product], layers[index].energies(product)[head]
        ranks[head] += 1
        if ranks[head] < len(energies) and energies[ranks[head]] > 0:
            heapq.heappush(queue, (-float(energies[ranks[head]]) / cost, cost, index, product, head))
    return chosen


def _first_steps(layers: list[_Layer], dtype: torch.dtype) -> Iterator[tuple[float, int, int, int, int]]:
    """(minus energy per byte, bytes, layer, product, head) of the first direction of every head."""
    for index, layer in enumerate(layers):
        for product in (0, 1):
            cost = layer.row_bytes(product, dtype)
            for head, energy in enumerate(layer.energies(product)[:, 0].tolist()):
                if energy > 0:
                    yield -energy / cost, cost, index, product, head


def _cheapest(layers: list[_Layer], dtype: torch.dtype) -> Chosen:
    """The one direction that costs least."""
    _, index, product, head = min((cost, *place) for _, cost, *place in _first_steps(layers, dtype))
    chosen = _nothing(layers)
    chosen[index][product][head] = 1
    return chosen


def _nothing(layers: list[_Layer]) -> Chosen:
    return [tuple([0] * len(s) for _, s, _ in layer.svds) for layer in layers]


def _made(whole_file: Contents, layers: list[_Layer], chosen: Chosen, dtype: torch.dtype) -> _Made:
    """The file with these ranks; an attention whose heads all have rank 0 is left out, unless it is tied."""
    terms, head_ranks, energy = [], {}, 0.0
    for layer, ranks in zip(layers, chosen, strict=True):
        if not (any(map(any, ranks)) or layer.term.tied):
            continue
        products, rank = [], max(1, *map(max, ranks))
        for product, own in enumerate(ranks):
            u, s, vh = layer.svds[product]
            keeps = torch.arange(s.shape[1]) < torch.tensor(own).unsqueeze(1)  # H, R
            energy += float((layer.energies(product) * keeps).sum())
            products.append(maths.truncate(u, s * keeps, vh, rank))
        terms.append(layer.term.rebuilt(*products))
        head_ranks.setdefault(layer.term.part, {})[layer.term.attention] = [list(own) for own in ranks]
    return _Made(*assembled(replace(whole_file, terms=terms), dtype, head_ranks), energy)
