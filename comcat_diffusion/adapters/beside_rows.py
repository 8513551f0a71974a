"""Terms beside modules that are no attentions in few bytes: each rank rounded to the bits that it is worth.

A packed file (packing.py), or one of its pieces (pieces.py), with such terms says in its header of every host of a kind
(beside_kinds.py; format version 4 for convolutions, 5 for feed-forwards) its rank and channels, [R, O, C], in the order
of their names, and has three tensors more of this kind. A rank has a row of D (C numbers), one of T where there are
taps (9) and one of U (O), see separable.py. Bits (K) says of how many bits the numbers of D and U are, for each of the
K ranks; those of T are of 8. Rows has the bytes of all rows, host by host the rows of D, of T and of U, each written as
packing.py writes rows. Scales (K, 3, or 2 without taps) are what the numbers of a rank's rows are to be multiplied
with; in bfloat16, whose error of a five-hundredth of a row is far below that of rounding its numbers.

Letters: R rank, C channels that come in, O that go out, K ranks of all hosts of a kind.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Self

import torch

from comcat_diffusion.adapters.beside_kinds import CONVOLUTIONS, KINDS, Kind, kind_with
from comcat_diffusion.adapters.header import Header, Piece, told_of
from comcat_diffusion.adapters.packing import LEAST, MOST, MOST_BITS, byte_count, read_rows, written_rows
from comcat_diffusion.adapters.separable import TAPS, energies
from comcat_diffusion.heads import product_svd, truncate

ROUNDING = 1e-12  # relative, of singular values in float64: what is below counts as nothing
Bits = int | torch.Tensor  # of one rank, or of each, (K,)
Told = Mapping[str, Mapping[str, Sequence[int]]]  # by part and host: [R, O, C]


@dataclass(frozen=True)
class Beside:
    """What an adapter adds beside one module, without the scale, as a file holds it."""

    part: str  # component of the pipeline
    host: str  # name within the component
    scale: float  # s = alpha / r of the adapter
    down: torch.Tensor  # R, C
    taps: torch.Tensor | None  # R, 9; None beside what is no convolution
    up: torch.Tensor  # O, R

    @classmethod
    def of(cls, part: str, host: str, scale: float, factors: Mapping[str, torch.Tensor]) -> Self:
        """Of factors by their names, which are those of one kind."""
        down, *taps, up = (factors[name] for name in kind_with(factors).factors)
        return cls(part, host, scale, down, taps[0] if taps else None, up)

    @property
    def kind(self) -> Kind:
        """Which it is."""
        return next(kind for kind in KINDS if len(kind.factors) == 1 + len(self.lower))

    @property
    def lower(self) -> list[torch.Tensor]:
        """The factors whose rows are ranks: D, and T where there is one."""
        return [self.down] if self.taps is None else [self.down, self.taps]

    @property
    def key(self) -> str:
        """PART.HOST, as in the file."""
        return f"{self.part}.{self.host}"

    @property
    def channels(self) -> tuple[int, int]:
        """Those that go out and come in."""
        return len(self.up), self.down.shape[1]

    @property
    def fits(self) -> bool:
        """Whether the factors are of one rank, as factors of a term are."""
        matrices = all(factor.dim() == 2 for factor in (*self.lower, self.up))
        tapped = self.taps is None or self.taps.shape == (len(self.down), TAPS)
        return matrices and tapped and self.up.shape[1] == len(self.down) > 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """The factors by the names that a file has them under, of an adapter whose scale is one."""
        held = (*self.lower, self.scale * self.up)
        return {f"{self.key}.{name}": factor for name, factor in zip(self.kind.factors, held, strict=True)}

    def shares(self) -> torch.Tensor:
        """What each rank is worth, (R,): its energy by channel that goes out, by which a base's kernels are alike."""
        return self.scale**2 * energies(*(factor.double() for factor in (*self.lower, self.up))) / len(self.up)

    def decomposed(self) -> "Beside":
        """The same by its singular directions, the largest first; with taps, which have none in common, as it is."""
        if self.taps is not None:
            return self
        u, s, vh = product_svd(self.scale * self.up.double()[None], self.down.double()[None])
        up, down = truncate(u, s * (s > ROUNDING * s.amax()), vh, s.shape[1])
        return replace(self, scale=1.0, down=down[0], up=up[0])

    def kept(self, ranks: torch.Tensor) -> "Beside":
        """The same of these ranks alone."""
        taps = None if self.taps is None else self.taps[ranks]
        return replace(self, down=self.down[ranks], taps=taps, up=self.up[:, ranks])


def side_by_side(terms: Sequence[Beside]) -> Beside:
    """The sum of terms beside one module: their ranks one after the other, at a scale of one if there are more.

    Raises ValueError if they are of other channels.
    """
    if len(terms) == 1:
        return terms[0]
    if len({(term.kind, *term.channels) for term in terms}) > 1:
        raise ValueError(f"{terms[0].key} has other channels in one of them")
    down, *taps = (torch.cat(factors) for factors in zip(*(term.lower for term in terms), strict=True))
    up = torch.cat([term.scale * term.up for term in terms], 1)
    return replace(terms[0], scale=1.0, down=down, taps=taps[0] if taps else None, up=up)


def summed(terms: Iterable[Beside]) -> list[Beside]:
    """Terms with those beside the same module as one. Raises as `side_by_side` does."""
    found: dict[str, list[Beside]] = {}
    for term in terms:
        found.setdefault(term.key, []).append(term)
    return [side_by_side(own) for _, own in sorted(found.items())]


def rank_bytes(outof: int, into: int, bits: int, kind: Kind = CONVOLUTIONS) -> int:
    """Bytes that one rank of a term takes."""
    rows = [byte_count(length, each) for length, each in _rows_of(kind, into, outof, bits)]
    return sum(rows) + 1 + 2 * len(rows) if bits else 0  # its bits, and a scale for each row


def _rows_of(kind: Kind, into: int, outof: int, bits: Bits) -> list[tuple[int, Bits]]:
    """Lengths and bits of the rows of ranks, whose own `bits` are those of all rows but taps."""
    most = torch.full_like(bits, MOST_BITS) if isinstance(bits, torch.Tensor) else MOST_BITS
    return [(into, bits), *[(TAPS, most)] * (len(kind.factors) - 2), (outof, bits)]


def pack_terms(
    terms: Sequence[Beside], bits: Sequence[Sequence[int]]
) -> tuple[dict[str, torch.Tensor], dict[Kind, dict[str, dict[str, list[int]]]]]:
    """Terms whose ranks have these bits, none for those left out: tensors, and by kind what the header says."""
    pairs = sorted(zip(terms, bits, strict=True), key=lambda pair: (KINDS.index(pair[0].kind), pair[0].key))
    packed, told = {}, {}
    for kind, own in groupby(pairs, key=lambda pair: pair[0].kind):
        tensors, hosts = _packed(kind, list(own))
        if hosts:
            packed, told[kind] = packed | tensors, hosts
    return packed, told


def _packed(
    kind: Kind, pairs: Sequence[tuple[Beside, Sequence[int]]]
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, list[int]]]]:
    """Those of one kind, each with the bits of its ranks."""
    rows, counts, scales, told = [], [], [], {}
    for term, own in pairs:
        ranks = torch.tensor([rank for rank, count in enumerate(own) if count], dtype=torch.long)
        if not len(ranks):
            continue
        kept, own, of_rank = term.kept(ranks), torch.tensor([count for count in own if count]), []
        lengths = _rows_of(kind, *reversed(term.channels), own)
        for factor, (_, each) in zip((*kept.lower, term.scale * kept.up.T), lengths, strict=True):
            stream, scale = written_rows(factor, each.tolist())
            rows.append(stream)
            of_rank.append(scale)
        counts += own.tolist()
        scales.append(torch.stack(of_rank, dim=1))
        told.setdefault(term.part, {})[term.host] = [len(own), *term.channels]
    if not counts:
        return {}, {}
    found = torch.cat(rows), torch.tensor(counts, dtype=torch.uint8), torch.cat(scales).bfloat16()
    return dict(zip(kind.tensors, found, strict=True)), told


def take_terms(tensors: dict[str, torch.Tensor], packed: Header | Piece) -> list[Beside]:
    """The inverse of `pack_terms`: takes its tensors out and gives the terms, at a scale of one; of none, none.

    Raises ValueError if they are not what the header says, KeyError for one that is missing.
    """
    return [term for kind in KINDS for term in _taken(tensors, kind, told_of(packed, kind))]


def _taken(tensors: dict[str, torch.Tensor], kind: Kind, told: Told) -> list[Beside]:
    """The terms of one kind."""
    if not told:
        return []
    rows, bits, scales = (tensors.pop(name) for name in kind.tensors)
    bits, scales, found = bits.flatten().long(), scales.float(), []
    shapes = [(part, name, shape) for part, own in sorted(told.items()) for name, shape in sorted(own.items())]
    total = sum(rank for _, _, (rank, _, _) in shapes)
    expected = (total, len(kind.factors))
    if len(bits) != total or scales.shape != expected or not ((bits >= LEAST) & (bits <= MOST_BITS)).all():
        raise ValueError(f"{' and '.join(kind.tensors[1:])} do not have the {total} ranks of the header")
    for part, name, (rank, outof, into) in shapes:
        if rank * (into + outof) > MOST:
            raise ValueError(f"{name} has a rank that nothing has")
        own, bits = bits[:rank], bits[rank:]
        scale, scales = scales[:rank], scales[rank:]
        made = []
        for number, (length, each) in enumerate(_rows_of(kind, into, outof, own)):
            size = int(byte_count(length, each).sum())
            stream, rows = rows[:size].to(torch.uint8), rows[size:]
            if stream.shape != (size,):
                raise ValueError(f"{kind.tensors[0]} ends within {name}")
            made.append(read_rows(stream, length, each) * scale[:, number, None])
        *lower, up = made
        factors = dict(zip(kind.factors, (*lower, up.T.contiguous()), strict=True))
        found.append(Beside.of(part, name, 1.0, factors))
    if rows.numel():
        raise ValueError(f"{kind.tensors[0]} has rows of no host that the header speaks of")
    return found
