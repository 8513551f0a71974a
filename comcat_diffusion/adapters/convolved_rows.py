"""Terms beside convolutions in few bytes: each rank rounded to the bits that it is worth (format version 4).

A packed file (packing.py), or one of its pieces (pieces.py), with such terms says in its header's `convolved` of every
convolution its rank and channels, [R, O, C], in the order of their names, and has three tensors more. A rank has a row
of D (C numbers), one of T (9) and one of U (O), see separable.py. CONV_BITS (K) says of how many bits the numbers of D
and U are, for each of the K ranks; those of T are of 8. CONV_ROWS has the bytes of all rows, convolution by
convolution the rows of D, of T and of U, each written as packing.py writes rows. CONV_SCALES (K, 3) are what the
numbers of a rank's rows are to be multiplied with; in bfloat16, whose error of a five-hundredth of a row is far below
that of rounding its numbers.

Letters: R rank, C channels that come in, O that go out, K ranks of all convolutions.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from comcat_diffusion.adapters.packing import LEAST, MOST, MOST_BITS, byte_count, read_rows, written_rows
from comcat_diffusion.adapters.separable import TAPS, energies

CONV_ROWS, CONV_BITS, CONV_SCALES = "conv_rows", "conv_bits", "conv_scales"
_BESIDE = 7  # bytes of a rank in CONV_BITS and CONV_SCALES
Convolved = Mapping[str, Mapping[str, Sequence[int]]]  # by part and convolution: [R, O, C]


@dataclass(frozen=True)
class Beside:
    """What an adapter adds beside one convolution, without the scale, as a file holds it."""

    part: str  # component of the pipeline
    convolution: str  # name within the component
    scale: float  # s = alpha / r of the adapter
    down: torch.Tensor  # R, C
    taps: torch.Tensor  # R, 9
    up: torch.Tensor  # O, R

    @property
    def key(self) -> str:
        """PART.CONVOLUTION, as in the file."""
        return f"{self.part}.{self.convolution}"

    @property
    def channels(self) -> tuple[int, int]:
        """Those that go out and come in."""
        return len(self.up), self.down.shape[1]

    @property
    def fits(self) -> bool:
        """Whether the factors are of one rank, as factors of a term are."""
        matrices = all(factor.dim() == 2 for factor in (self.down, self.taps, self.up))
        return matrices and self.taps.shape == (len(self.down), TAPS) and self.up.shape[1] == len(self.down) > 0

    def tensors(self) -> dict[str, torch.Tensor]:
        """The factors by the names that a file has them under, of an adapter whose scale is one."""
        return {
            f"{self.key}.conv_down": self.down,
            f"{self.key}.conv_taps": self.taps,
            f"{self.key}.conv_up": self.scale * self.up,
        }

    def shares(self) -> torch.Tensor:
        """What each rank is worth, (R,): its energy by channel that goes out, by which a base's kernels are alike."""
        return self.scale**2 * energies(self.down.double(), self.taps.double(), self.up.double()) / len(self.up)

    def kept(self, ranks: torch.Tensor) -> "Beside":
        """The same of these ranks alone."""
        return replace(self, down=self.down[ranks], taps=self.taps[ranks], up=self.up[:, ranks])


def side_by_side(terms: Sequence[Beside]) -> Beside:
    """The sum of terms beside one convolution: their ranks one after the other, at a scale of one if there are more.

    Raises ValueError if they are of other channels.
    """
    if len(terms) == 1:
        return terms[0]
    if len({term.channels for term in terms}) > 1:
        raise ValueError(f"{terms[0].key} has other channels in one of them")
    down, taps = (torch.cat([getattr(term, name) for term in terms]) for name in ("down", "taps"))
    return replace(terms[0], scale=1.0, down=down, taps=taps, up=torch.cat([term.scale * term.up for term in terms], 1))


def summed(terms: Iterable[Beside]) -> list[Beside]:
    """Terms with those beside the same convolution as one. Raises as `side_by_side` does."""
    found: dict[str, list[Beside]] = {}
    for term in terms:
        found.setdefault(term.key, []).append(term)
    return [side_by_side(own) for _, own in sorted(found.items())]


def rank_bytes(outof: int, into: int, bits: int) -> int:
    """Bytes that one rank of a term takes."""
    return byte_count(into, bits) + byte_count(TAPS, MOST_BITS) + byte_count(outof, bits) + _BESIDE if bits else 0


def pack_terms(
    terms: Sequence[Beside], bits: Sequence[Sequence[int]]
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, list[int]]]]:
    """Terms whose ranks have these bits, none for those that are left out: tensors, and the header's `convolved`."""
    rows, counts, scales, convolved = [], [], [], {}
    for term, own in sorted(zip(terms, bits, strict=True), key=lambda pair: pair[0].key):
        ranks = torch.tensor([rank for rank, count in enumerate(own) if count], dtype=torch.long)
        if not len(ranks):
            continue
        kept, own = term.kept(ranks), [count for count in own if count]
        of_rank = []
        for factor, each in ((kept.down, own), (kept.taps, [MOST_BITS] * len(own)), (term.scale * kept.up.T, own)):
            stream, scale = written_rows(factor, each)
            rows.append(stream)
            of_rank.append(scale)
        counts += own
        scales.append(torch.stack(of_rank, dim=1))
        convolved.setdefault(term.part, {})[term.convolution] = [len(own), *term.channels]
    if not counts:
        return {}, {}
    packed = {CONV_ROWS: torch.cat(rows), CONV_BITS: torch.tensor(counts, dtype=torch.uint8)}
    return packed | {CONV_SCALES: torch.cat(scales).bfloat16()}, convolved


def take_terms(tensors: dict[str, torch.Tensor], convolved: Convolved) -> list[Beside]:
    """The inverse of `pack_terms`: takes its tensors out and gives the terms, at a scale of one; of none, none.

    Raises ValueError if they are not what `convolved` asks for, KeyError for one that is missing.
    """
    if not convolved:
        return []
    rows, bits, scales = (tensors.pop(name) for name in (CONV_ROWS, CONV_BITS, CONV_SCALES))
    bits, scales, found = bits.flatten().long(), scales.float(), []
    shapes = [(part, name, shape) for part, own in sorted(convolved.items()) for name, shape in sorted(own.items())]
    total = sum(rank for _, _, (rank, _, _) in shapes)
    if len(bits) != total or scales.shape != (total, 3) or not ((bits >= LEAST) & (bits <= MOST_BITS)).all():
        raise ValueError(f"{CONV_BITS} and {CONV_SCALES} do not have the {total} ranks of the header")
    for part, name, (rank, outof, into) in shapes:
        if rank * (into + outof) > MOST:
            raise ValueError(f"{name} has a rank that nothing has")
        own, bits = bits[:rank], bits[rank:]
        scale, scales = scales[:rank], scales[rank:]
        made = []
        for number, (length, each) in enumerate(
            ((into, own), (TAPS, torch.full_like(own, MOST_BITS)), (outof, own)),
        ):
            size = int(byte_count(length, each).sum())
            stream, rows = rows[:size].to(torch.uint8), rows[size:]
            if stream.shape != (size,):
                raise ValueError(f"{CONV_ROWS} ends within {name}")
            made.append(read_rows(stream, length, each) * scale[:, number, None])
        down, taps, up = made
        found.append(Beside(part, name, 1.0, down, taps, up.T.contiguous()))
    if rows.numel():
        raise ValueError(f"{CONV_ROWS} has rows of no convolution that the header speaks of")
    return found
