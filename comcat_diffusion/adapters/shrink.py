"""A finished adapter in fewer bytes: to each singular direction the bits that it is worth, and none where it is not.

Every head's product is decomposed by QR and a small SVD. A direction, that is a row on either side, is left out, or
rounded to 2 to 8 bits a number. All directions of all heads compete for the bytes: always the next step, from nothing
to 2 bits or to one bit more, that brings most energy per byte. Energy is counted as a share of that of the direction's
attention and product, QK or VO. As it is, it would let some attentions displace others: of an adapter of cross- and
self-attention half the effect was lost where shares lose a tenth, and weighing by sampled activations was no better
(docs/log.md). So no base is needed.

Ranks of terms beside other modules compete for a share of the bytes of their own, by the energy of their kernels; of
those without taps by that of singular directions.

Letters: H heads, R rank, C channels, E the rows of a left factor.
"""

import heapq
import tempfile
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch

from comcat_diffusion import atomic
from comcat_diffusion import heads as maths
from comcat_diffusion.adapters.beside_kinds import CONVOLUTIONS, Kind
from comcat_diffusion.adapters.beside_rows import ROUNDING, Beside, rank_bytes
from comcat_diffusion.adapters.header import Header
from comcat_diffusion.adapters.packing import FLOAT, LEAST, MOST_BITS, HeadBits, HeadRanks, row_bytes
from comcat_diffusion.adapters.terms import Contents, Term, assembled, read_contents, refuse_several

# By bits of a number: the share of a direction's energy that is lost when both of its rows, of normally distributed
# numbers, are rounded to them (a test measures it).
LOST = {0: 1.0, 2: 0.44, 3: 0.09, 4: 0.024, 5: 0.0064, 6: 0.0017, 7: 0.0004, 8: 0.0001}
_NEXT = {0: LEAST} | {bits: bits + 1 for bits in range(LEAST, MOST_BITS)}
BESIDE_SHARE = 0.6  # of the bytes, for what stands beside other modules, where there is any
_ATTEMPTS, _NEAR = 8, 8  # attempts to fill the budget, each a whole file made in memory; bytes that may be left


@dataclass(frozen=True)
class Shrunk:
    """What shrinking left behind."""

    header: Header
    bytes: int
    energy_kept: float  # share of a product's energy that neither cutting nor rounding took; mean over all products
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


@dataclass(frozen=True)
class _Direction:
    """A singular direction of one head's product."""

    share: float  # of the energy of its product, over all heads
    rows: tuple[int, int]  # lengths of its two rows

    def bytes(self, bits: int) -> int:
        """What it takes in a file."""
        return sum(row_bytes(length, bits) for length in self.rows) if bits else 0


@dataclass(frozen=True)
class _Rank(_Direction):
    """One rank of a term beside another module; its rows are of the channels that go out and come in."""

    kind: Kind = CONVOLUTIONS

    @classmethod
    def of(cls, term: Beside) -> list["_Rank"]:
        """All of a term's."""
        return [cls(share, term.channels, term.kind) for share in term.shares().tolist()]

    def bytes(self, bits: int) -> int:
        """See `_Direction`."""
        return rank_bytes(*self.rows, bits, self.kind)


class AddsNothing(ValueError):
    """An adapter whose products are all zero, as before its first step: there is nothing to choose from."""


def shrink(adapter: str | Path, output: str | Path, max_bytes: int) -> Shrunk:
    """Write an adapter file of at most `max_bytes`, header and new words included; it loads as any other.

    Factors are float16 if all directions fit that way, else whole numbers of 2 to 8 bits. Raises ValueError if not even
    one direction of one head fits, naming the least.
    """
    whole_file = read_contents(adapter)
    refuse_several(whole_file.header, adapter, "shrinking")
    made, content = shrunk(whole_file, max_bytes)
    atomic.write_bytes(output, content)
    return made


def shrunk(whole_file: Contents, max_bytes: int) -> tuple[Shrunk, bytes]:
    """As `shrink`, in memory: what was made, and the file's bytes."""
    whole_file = replace(whole_file, beside=[term.decomposed() for term in whole_file.beside])
    layers = [_Layer.of(term) for term in whole_file.terms]
    directions = _directions(layers)
    if not any(direction.share for direction in directions):
        raise AddsNothing("The adapter adds nothing to its base, since all its products are zero; train it first.")
    beside = [_Rank.of(term) for term in whole_file.beside]
    most = [[MOST_BITS if rank.share else 0 for rank in own] for own in beside]
    header, content = _made(whole_file, layers, [FLOAT if direction.share else 0 for direction in directions], most)
    if len(content) > max_bytes:
        ranks = [rank for own in beside for rank in own]
        left = iter(_allocated(ranks, round(BESIDE_SHARE * max_bytes)))
        header, content = _richest(
            whole_file, layers, directions, max_bytes, [list(islice(left, len(own))) for own in beside]
        )
    return Shrunk(header, len(content), _kept(layers, content), header.head_ranks), content


def least_bytes(whole_file: Contents) -> int:
    """The fewest bytes that an adapter of these shapes can be shrunk to, whatever it has learned or will learn."""
    ones = [_Layer(t, tuple((u, torch.ones_like(s), v) for u, s, v in _Layer.of(t).svds)) for t in whole_file.terms]
    whole_file = replace(whole_file, beside=[])  # which may all be left out
    return len(_made(whole_file, ones, _cheapest(_directions(ones)))[1])


def _directions(layers: list[_Layer]) -> list[_Direction]:
    """Of all layers, products and heads, in this order, the largest of a head first."""
    found = []
    for layer in layers:
        for u, s, vh in layer.svds:
            energies = s.square()
            shares = energies / energies.sum().clamp(min=torch.finfo(energies.dtype).tiny)
            rows = u.shape[1], vh.shape[2]
            found += [_Direction(share, rows) for share in shares.flatten().tolist()]
    return found


def _richest(
    whole_file: Contents,
    layers: list[_Layer],
    directions: list[_Direction],
    max_bytes: int,
    beside: list[list[int]],
) -> tuple[Header, bytes]:
    """The richest file within the budget. How long the header is depends on what is in the file, so it is tried out.

    What stands `beside` other modules has its bits already.
    """
    best = _made(whole_file, layers, _cheapest(directions), beside)
    if len(best[1]) > max_bytes:
        if any(map(any, beside)):
            return _richest(replace(whole_file, beside=[]), layers, directions, max_bytes, [])
        raise ValueError(
            f"{max_bytes:,} bytes are too few: the least this adapter can be shrunk to is {len(best[1]):,} bytes."
        )
    low, high, budget = 0, max_bytes + 1, max_bytes // 2  # bytes of factors: `low` fit, `high` do not
    for _ in range(_ATTEMPTS):
        bits = _allocated(directions, budget)
        made = _made(whole_file, layers, bits, beside) if any(bits) else best
        room = max_bytes - len(made[1])
        if room < 0:
            # Every budget from what these take up to this one makes the same file.
            high = budget = sum(direction.bytes(count) for direction, count in zip(directions, bits, strict=True))
        else:
            low, best = budget, made
        if high - low <= 1 or 0 <= room < _NEAR:
            break
        budget = min(max(budget + room, low + 1), high - 1)  # what is not factors hardly depends on them
    return best


def _allocated(directions: list[_Direction], budget: int) -> list[int]:
    """Bits of every direction within a budget of bytes: always the next step that brings most per byte and still fits.

    The directions of a head cost the same and come in order of their share, so none is left out before a smaller one.
    """
    chosen, queue = [0] * len(directions), []

    def offer(number: int) -> None:
        """Put the next step of a direction into the queue."""
        direction, bits = directions[number], chosen[number]
        if direction.share and bits in _NEXT:
            cost = direction.bytes(_NEXT[bits]) - direction.bytes(bits)
            gain = direction.share * (LOST[bits] - LOST[_NEXT[bits]])
            heapq.heappush(queue, (-gain / max(cost, 1), number, cost))

    for number in range(len(directions)):
        offer(number)
    while queue:
        _, number, cost = heapq.heappop(queue)
        if cost <= budget:  # else none of this direction's later steps can be taken either
            budget -= cost
            chosen[number] = _NEXT[chosen[number]]
            offer(number)
    return chosen


def _cheapest(directions: list[_Direction]) -> list[int]:
    """Bits for the one direction that costs least, the first of its head."""
    worth = [number for number, direction in enumerate(directions) if direction.share]
    first = min(worth, key=lambda number: directions[number].bytes(LEAST))
    return [LEAST * (number == first) for number in range(len(directions))]


def _kept(layers: list[_Layer], content: bytes) -> float:
    """The mean share of the products' energy that a file still has: one less that of the difference."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "made.safetensors"
        file.write_bytes(content)
        after = {term.key: term.products() for term in read_contents(file).terms}
    shares = []
    for layer in layers:
        for number, (left, right) in enumerate(layer.term.products()):
            whole = layer.svds[number][1].square().sum()
            if layer.term.key in after:
                now, then = after[layer.term.key][number]
                left, right = torch.cat([left, -now], dim=2), torch.cat([right, then], dim=1)
            if whole:
                shares.append(1 - float(maths.product_svd(left, right)[1].square().sum() / whole))
    return sum(shares) / len(shares)


def _made(
    whole_file: Contents, layers: list[_Layer], bits: list[int], beside: list[list[int]] | None = None
) -> tuple[Header, bytes]:
    """The file with these bits; an attention whose heads all have rank 0 is left out, unless it is tied."""
    terms, head_bits, left = [], HeadBits(), iter(bits)
    for layer in layers:
        products, own = [], []
        for u, s, vh in layer.svds:
            heads, rank = s.shape
            own.append([list(islice(left, rank)) for _ in range(heads)])
            products.append(maths.truncate(u, s * (torch.tensor(own[-1]) > 0), vh, rank))
        own = [[[count for count in head if count] for head in heads] for heads in own]
        if layer.term.tied or any(map(any, own)):
            rank = max(1, *(len(head) for heads in own for head in heads))
            terms.append(layer.term.rebuilt(*((u[..., :rank], vh[..., :rank, :]) for u, vh in products)))
            head_bits.setdefault(layer.term.part, {})[layer.term.attention] = own
    return assembled(replace(whole_file, terms=terms), head_bits=head_bits, beside_bits=beside or ())
