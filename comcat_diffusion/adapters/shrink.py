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
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from comcat_diffusion import atomic
from comcat_diffusion import heads as maths
from comcat_diffusion.adapters.header import Header
from comcat_diffusion.adapters.packing import HeadRanks, Precision, row_bytes
from comcat_diffusion.adapters.terms import Contents, Term, assembled, read_contents

PRECISIONS = {"fp16": torch.float16, "int8": 8, "int6": 6, "int5": 5, "int4": 4}  # tried in this order
LEAST = 4
ROUNDING = 1e-12  # relative; products are computed in float64
_ATTEMPTS = 14  # attempts to fill the budget; each is a whole file made in memory


@dataclass(frozen=True)
class Shrunk:
    """What shrinking left behind."""

    header: Header
    bytes: int
    energy_kept: float  # share of all products' energy that is not lost, by cutting or by rounding
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

    def direction_bytes(self, product: int, precision: Precision) -> int:
        """Bytes of one singular direction of one head: a row of each of the two factors."""
        u, _, vh = self.svds[product]
        return row_bytes(u.shape[1], precision) + row_bytes(vh.shape[2], precision)


Chosen = list[tuple[list[int], list[int]]]  # by layer: the ranks of its heads, for QK and for VO


def shrink(adapter: str | Path, output: str | Path, max_bytes: int, precision: Precision | None = None) -> Shrunk:
    """Write an adapter file of at most `max_bytes`, header and new words included; it loads as any other.

    `precision` is that of the factors: float16, bfloat16, float32, or the bits of whole numbers, 2 to 8, which have one
    scale a row. Without one it is the first of float16, 8, 6, 5 and 4 bits in which all directions fit, else 4: to
    round changes less than to leave directions out (docs/log.md). Raises ValueError if not even one direction of one
    head fits, naming the least.
    """
    whole_file = read_contents(adapter)
    made, content = shrunk(whole_file, max_bytes, precision)
    atomic.write_bytes(output, content)
    return made


def shrunk(whole_file: Contents, max_bytes: int, precision: Precision | None = None) -> tuple[Shrunk, bytes]:
    """As `shrink`, in memory: what was made, and the file's bytes."""
    layers = [_Layer.of(term) for term in whole_file.terms]
    whole = sum(float(layer.energies(product).sum()) for layer in layers for product in (0, 1))
    if whole == 0:
        raise ValueError("The adapter adds nothing to its base, since all its products are zero; train it first.")
    if precision is None:
        everything = [tuple([s.shape[1]] * s.shape[0] for _, s, _ in layer.svds) for layer in layers]
        fitting = (p for p in PRECISIONS.values() if len(_made(whole_file, layers, everything, p).content) <= max_bytes)
        precision = next(fitting, LEAST)
    made = _richest(whole_file, layers, max_bytes, precision)
    kept = 1 - _lost(layers, made.content) / whole
    return Shrunk(made.header, len(made.content), kept, made.header.head_ranks), made.content


def least_bytes(whole_file: Contents) -> int:
    """The fewest bytes that an adapter of these shapes can be shrunk to, whatever it has learned or will learn."""
    ones = [_Layer(t, tuple((u, torch.ones_like(s), v) for u, s, v in _Layer.of(t).svds)) for t in whole_file.terms]
    return len(_least(whole_file, ones, LEAST).content)


@dataclass(frozen=True)
class _Made:
    header: Header
    content: bytes
    energy: float  # of what was kept


def _richest(whole_file: Contents, layers: list[_Layer], max_bytes: int, precision: Precision) -> _Made:
    """The richest file within the budget. How long the header is depends on what is in the file, so it is tried out."""
    everything = sum(
        layer.direction_bytes(i, precision) * s.numel() for layer in layers for i, (_, s, _) in enumerate(layer.svds)
    )
    best = _least(whole_file, layers, precision)
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
        chosen = _allocated(layers, budget, precision)
        made = _made(whole_file, layers, chosen, precision) if any(any(map(any, ranks)) for ranks in chosen) else best
        if len(made.content) > max_bytes:
            high = budget
            continue
        low, best = budget, max(best, made, key=lambda file: file.energy)
        if budget >= everything:
            break
    return best


def _allocated(layers: list[_Layer], budget: int, precision: Precision) -> Chosen:
    """Ranks for `budget` bytes of factors: always the next direction with the most energy per byte that still fits."""
    chosen, queue = _nothing(layers), list(_first_steps(layers, precision))
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


def _first_steps(layers: list[_Layer], precision: Precision) -> Iterator[tuple[float, int, int, int, int]]:
    """(minus energy per byte, bytes, layer, product, head) of the first direction of every head."""
    for index, layer in enumerate(layers):
        for product in (0, 1):
            cost = layer.direction_bytes(product, precision)
            for head, energy in enumerate(layer.energies(product)[:, 0].tolist()):
                if energy > 0:
                    yield -energy / cost, cost, index, product, head


def _lost(layers: list[_Layer], content: bytes) -> float:
    """The energy of what a file's products differ by from these."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "made.safetensors"
        file.write_bytes(content)
        kept = {term.key: term for term in read_contents(file).terms}
    lost = 0.0
    for layer in layers:
        now = kept[layer.term.key].products() if layer.term.key in kept else ()
        for product, (left, right) in enumerate(layer.term.products()):
            if now:
                left = torch.cat([left, -now[product][0]], dim=2)
                right = torch.cat([right, now[product][1]], dim=1)
            energy = maths.product_svd(left, right)[1].square().sum()
            lost += float(energy / (layer.term.width if product == 0 else 1))
    return lost


def _least(whole_file: Contents, layers: list[_Layer], precision: Precision) -> _Made:
    return _made(whole_file, layers, _cheapest(layers, precision), precision)


def _cheapest(layers: list[_Layer], precision: Precision) -> Chosen:
    """The one direction that costs least."""
    _, index, product, head = min((cost, *place) for _, cost, *place in _first_steps(layers, precision))
    chosen = _nothing(layers)
    chosen[index][product][head] = 1
    return chosen


def _nothing(layers: list[_Layer]) -> Chosen:
    return [tuple([0] * len(s) for _, s, _ in layer.svds) for layer in layers]


def _made(whole_file: Contents, layers: list[_Layer], chosen: Chosen, precision: Precision) -> _Made:
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
    return _Made(*assembled(replace(whole_file, terms=terms), precision, head_ranks), energy)
