"""Packed factors: only the rows that a head really has, where the dense form gives every head of a layer one rank.

In a dense file an attention of H heads and rank R has H*R rows in each factor, and every factor is a tensor of its
own, whose entry in the file's table costs more than a hundred bytes. In a packed file (format version 2) the header's
`head_ranks` says the rank of every head, once for its QK and once for its VO product, and `row_lengths` the lengths C
of every attention's factors. Rows follow each other head by head, factor by factor and attention by attention, in the
order of their names; `out_up`, whose ranks are columns, is transposed. `unpack` fills the missing rows with zeros,
which is exact.

Rows of float16 (or, in a piece of pieces.py, of the precision that was asked for) and one length C are one tensor,
PART.C. Or rows are whole numbers of 2 to 8 bits: `row_bits` says of how many, for each row, and `row_scales` (float32)
what they are to be multiplied with. Then PART.rows has all bytes of a part, row after row; a row is a string of bits
that begins with the lowest of its first number, and ends in a byte of its own.

Letters: H heads, R rank, C channels, K rows kept.
"""

from collections.abc import Iterable, Iterator

import torch
from torch.nn.functional import pad

PRODUCT = {"q_down": 0, "k_down": 0, "q_core": 0, "v_down": 1, "out_up": 1, "out_core": 1}  # 0: QK, 1: VO
FREE = ("k_down", "out_up", "q_down", "v_down")
FOLDABLE = ("k_down", "out_core", "q_core", "v_down")
COLUMNS = "out_up"  # the one factor whose ranks are columns
ROWS, ROW_BITS, ROW_SCALES = "rows", "row_bits", "row_scales"
NO_FACTOR = "token."  # the embeddings of new words stand beside the factors, as they are
LEAST, MOST_BITS, FLOAT = 2, 8, 16  # bits of a number; those of 16 are not whole
MOST = 1 << 28  # numbers in a dense factor; SDXL's of rank 128 have 5 million
_BESIDE = 5  # bytes that a row has in `row_bits` and `row_scales`
_TRIED = torch.linspace(0.5, 1, 11)  # scales of a row, over the one that its largest number asks for

HeadRanks = dict[str, dict[str, list[list[int]]]]  # by part and attention: of every head its rank in QK, and in VO
HeadBits = dict[str, dict[str, list[list[list[int]]]]]  # the same with, for a rank, the bits of its directions
RowLengths = dict[str, list[list[int]]]  # by part: of every attention the lengths C of its factors' rows


def ranks_of(head_bits: HeadBits) -> HeadRanks:
    """How many directions each head has."""
    return {
        part: {name: [list(map(len, heads)) for heads in products] for name, products in attentions.items()}
        for part, attentions in head_bits.items()
    }


def kept_rows(ranks: list[int], rank: int) -> torch.Tensor:
    """Which of the H*rank rows of a dense factor exist: (K,), the first `ranks[h]` of every head h."""
    return torch.cat([torch.arange(count) + head * rank for head, count in enumerate(ranks)])


def row_bytes(length: int, bits: int) -> int:
    """Bytes that a row of whole numbers takes, with its bits and its scale."""
    return _BESIDE + byte_count(length, bits)


def byte_count(length: int, bits: int) -> int:
    """Bytes that so many numbers of a row take; `bits` may be a tensor."""
    return -(-length * bits // 8)


def pack(
    tensors: dict[str, torch.Tensor], head_bits: HeadBits, dtype: torch.dtype = torch.float16
) -> tuple[dict[str, torch.Tensor], RowLengths]:
    """Dense factors by name, PART.ATTENTION.FACTOR, to packed ones, and the lengths of their rows.

    All directions are of float16 (16 bits) or what else `dtype` names, or all of whole numbers.
    """
    grouped: dict[str, list[torch.Tensor]] = {}
    lengths: RowLengths = {}
    bits, scales = [], []
    for part, attention, ranks in _attentions(ranks_of(head_bits)):
        lengths.setdefault(part, []).append([])
        for factor in sorted(PRODUCT):
            if (dense := tensors.get(f"{part}.{attention}.{factor}")) is None:
                continue  # it is of the other kind
            rows = dense.T if factor == COLUMNS else dense  # H*R, C
            rows = rows[kept_rows(ranks[PRODUCT[factor]], dense_rank(ranks))]  # K, C
            own = [count for head in head_bits[part][attention][PRODUCT[factor]] for count in head]
            lengths[part][-1].append(rows.shape[1])
            if not own:
                continue
            if FLOAT in own:
                grouped.setdefault(f"{part}.{rows.shape[1]}", []).append(rows.to(dtype))
            else:
                stream, scale = written_rows(rows, own)
                grouped.setdefault(f"{part}.{ROWS}", []).append(stream)
                scales.append(scale)
                bits += own
    packed = {name: torch.cat(found) for name, found in grouped.items()}
    if bits:
        packed |= {ROW_BITS: torch.tensor(bits, dtype=torch.uint8), ROW_SCALES: torch.cat(scales)}
    return packed, lengths


def unpack(
    tensors: dict[str, torch.Tensor], head_ranks: HeadRanks, row_lengths: RowLengths, foldable: Iterable[str]
) -> dict[str, torch.Tensor]:
    """The inverse of `pack`; `foldable` are the parts of that kind.

    Raises ValueError if the rows are not those that ranks and lengths ask for, KeyError for a tensor that is missing.
    """
    dense = {name: tensor for name, tensor in tensors.items() if name.startswith(NO_FACTOR)}
    left = {name: tensor for name, tensor in tensors.items() if name not in dense}
    for name, tensor in left.items():
        if not tensor.dim():
            raise ValueError(f"{name} holds no rows")
    lengths = {part: iter(own) for part, own in row_lengths.items()}
    for part, attention, ranks in _attentions(head_ranks):
        for factor, length in zip(FOLDABLE if part in foldable else FREE, next(lengths[part]), strict=True):
            own = ranks[PRODUCT[factor]]
            if len(own) * dense_rank(ranks) * length > MOST:
                raise ValueError(f"{attention} has heads of a rank that nothing has")
            rows = _taken(left, part, length, sum(own))
            whole = rows.new_zeros(len(own) * dense_rank(ranks), length)  # H*R, C
            whole[kept_rows(own, dense_rank(ranks))] = rows
            dense[f"{part}.{attention}.{factor}"] = whole.T.contiguous() if factor == COLUMNS else whole
    for name, tensor in left.items():
        if tensor.numel():
            raise ValueError(f"{name} has rows of no head that the header speaks of")
    return dense


def _attentions(head_ranks: HeadRanks) -> Iterator[tuple[str, str, list[list[int]]]]:
    """Part, attention and its ranks, in the order of a file."""
    return ((part, name, ranks) for part, own in sorted(head_ranks.items()) for name, ranks in sorted(own.items()))


def dense_rank(ranks: list[list[int]]) -> int:
    """The rank of the dense form; a side of a tied adapter that has lost all of its own is still there."""
    return max(1, *map(max, ranks))


def _taken(left: dict[str, torch.Tensor], part: str, length: int, count: int) -> torch.Tensor:
    """Take the next `count` rows of a part, (count, length), out of what is left of the packed tensors."""
    if not count:
        return torch.zeros(0, length)
    if ROW_BITS not in left:
        name = f"{part}.{length}"
        rows, left[name] = left[name][:count], left[name][count:]
    else:
        name = f"{part}.{ROWS}"
        bits, left[ROW_BITS] = left[ROW_BITS][:count].flatten().long(), left[ROW_BITS][count:]
        scales, left[ROW_SCALES] = left[ROW_SCALES][:count].flatten(), left[ROW_SCALES][count:]
        size = int(byte_count(length, bits).sum())
        stream, left[name] = left[name][:size].to(torch.uint8), left[name][size:]
        bounded = bool(((bits >= LEAST) & (bits <= MOST_BITS)).all())
        if not (bounded and len(bits) == len(scales) == count and stream.shape == (size,)):
            raise ValueError(f"{name} does not have the {count} rows of the next factor")
        rows = read_rows(stream, length, bits) * scales.float().unsqueeze(1)
    if rows.shape != (count, length):
        raise ValueError(f"{name} does not have the {count} rows of the next factor")
    return rows


def written_rows(rows: torch.Tensor, own: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (K, C) rounded to their `own` bits, as bytes one after the other, and their scales (K)."""
    bits = torch.tensor(own)
    sizes, scales = byte_count(rows.shape[1], bits), torch.empty(len(rows))
    stream = torch.empty(int(sizes.sum()), dtype=torch.uint8)
    for count in bits.unique().tolist():
        chosen = bits == count
        numbers, scales[chosen] = _rounded(rows[chosen], 2 ** (count - 1) - 1)
        stream[_places(sizes, chosen)] = _to_bits(numbers, count)
    return stream, scales


def read_rows(stream: torch.Tensor, length: int, bits: torch.Tensor) -> torch.Tensor:
    """The inverse of `written_rows`, but for the scales: (K, C) of `length` C."""
    sizes, rows = byte_count(length, bits), torch.empty(len(bits), length)
    for count in bits.unique().tolist():
        chosen = bits == count
        rows[chosen] = _from_bits(stream[_places(sizes, chosen)], length, count)
    return rows


def _places(sizes: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Where the bytes of the chosen rows, which are equally many, stand in the stream of all: (chosen rows, bytes)."""
    starts = sizes.cumsum(0) - sizes
    return starts[chosen].unsqueeze(1) + torch.arange(int(sizes[chosen][0]))


def _rounded(rows: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers (K, C) up to `largest` and scales (K), of some the ones that come closest to the rows (K, C)."""
    rows = rows.float()
    tried = _TRIED.unsqueeze(1) * rows.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / largest  # S, K
    numbers = (rows / tried.unsqueeze(2)).round().clamp(-largest, largest)  # S, K, C
    best = (numbers * tried.unsqueeze(2) - rows).square().sum(2).argmin(0)  # K
    each = torch.arange(len(rows))
    return numbers[best, each], tried[best, each]


def _to_bits(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers (K, C) as bytes (K, C*bits/8, rounded up)."""
    shifted = (numbers + 2 ** (bits - 1)).to(torch.uint8).unsqueeze(2)  # K, C, 1
    spread = (shifted >> torch.arange(bits, dtype=torch.uint8) & 1).flatten(1)  # K, C*bits
    eights = pad(spread, (0, -spread.shape[1] % 8)).unflatten(1, (-1, 8))
    return (eights << torch.arange(8, dtype=torch.uint8)).sum(2, dtype=torch.uint8)


def _from_bits(rows: torch.Tensor, length: int, bits: int) -> torch.Tensor:
    """The inverse of `_to_bits`: (K, C) of `length` C."""
    spread = (rows.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)[:, : length * bits]
    numbers = spread.unflatten(1, (length, bits)) << torch.arange(bits, dtype=torch.uint8)
    return numbers.sum(2, dtype=torch.float32) - 2 ** (bits - 1)
