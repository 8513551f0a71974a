"""Packed factors: only the rows that a head really has, where the dense form gives every head of a layer one rank.

In a dense file an attention of H heads and rank R has H*R rows in each factor, and every factor is a tensor of its own,
whose entry in the file's table costs more than a hundred bytes. In a packed file (format version 2) the header's
`head_ranks` says the rank of every head, once for its QK and once for its VO product, and all rows of one length C
stand in one tensor, PART.C: head after head, factor after factor, and attention after attention, in the order of their
names. The header's `row_lengths` has the lengths C of every attention's factors. `out_up`, whose ranks are columns, is
stored transposed. `unpack` fills the missing rows with zeros, which is exact.

Factors may be whole numbers of a few bits, which the header's `bits` says. A row is then a string of bits, the lowest
of every number first, in bytes (uint8), and `row_scales` holds one float32 for each row, tensor after tensor in the
order of their names.

Letters: H heads, R rank, C channels, K rows kept.
"""

from collections.abc import Iterable, Iterator

import torch
from torch.nn.functional import pad

PRODUCT = {"q_down": 0, "k_down": 0, "q_core": 0, "v_down": 1, "out_up": 1, "out_core": 1}  # 0: QK, 1: VO
FREE = ("k_down", "out_up", "q_down", "v_down")
FOLDABLE = ("k_down", "out_core", "q_core", "v_down")
COLUMNS = "out_up"  # the one factor whose ranks are columns
ROW_SCALES, SCALE_BYTES = "row_scales", 4
NO_FACTOR = "token."  # the embeddings of new words stand beside the factors, as they are
MOST = 1 << 28  # numbers in a dense factor; SDXL's of rank 128 have 5 million
_TRIED = torch.linspace(0.5, 1, 11)  # scales of a row, over the one that its largest number asks for

HeadRanks = dict[str, dict[str, list[list[int]]]]  # by part and attention: of every head its rank in QK, and in VO
RowLengths = dict[str, list[list[int]]]  # by part: of every attention the lengths C of its factors' rows
Precision = torch.dtype | int  # a floating one, or the bits of whole numbers


def kept_rows(ranks: list[int], rank: int) -> torch.Tensor:
    """Which of the H*rank rows of a dense factor exist: (K,), the first `ranks[h]` of every head h."""
    return torch.cat([torch.arange(count) + head * rank for head, count in enumerate(ranks)])


def row_bytes(length: int, precision: Precision) -> int:
    """Bytes that a row of so many numbers takes, its scale included."""
    if isinstance(precision, torch.dtype):
        return precision.itemsize * length
    return SCALE_BYTES + -(-length * precision // 8)


def pack(
    tensors: dict[str, torch.Tensor], head_ranks: HeadRanks, precision: Precision
) -> tuple[dict[str, torch.Tensor], RowLengths]:
    """Dense factors by name, PART.ATTENTION.FACTOR, to packed ones, and the lengths of their rows."""
    grouped: dict[str, list[torch.Tensor]] = {}
    lengths: RowLengths = {}
    for part, attention, ranks in _attentions(head_ranks):
        own = {factor: tensors.get(f"{part}.{attention}.{factor}") for factor in sorted(PRODUCT)}
        own = {factor: dense for factor, dense in own.items() if dense is not None}
        lengths.setdefault(part, []).append([])
        for factor, dense in own.items():
            rows = dense.T if factor == COLUMNS else dense  # H*R, C
            kept = rows[kept_rows(ranks[PRODUCT[factor]], _rank(ranks))]  # K, C
            grouped.setdefault(f"{part}.{kept.shape[1]}", []).append(kept)
            lengths[part][-1].append(kept.shape[1])
    rows = {name: torch.cat(found) for name, found in sorted(grouped.items())}
    if isinstance(precision, torch.dtype):
        return {name: found.to(precision) for name, found in rows.items()}, lengths
    rounded = {name: _rounded(found, 2 ** (precision - 1) - 1) for name, found in rows.items()}
    packed = {name: _to_bits(numbers, precision) for name, (numbers, _) in rounded.items()}
    return packed | {ROW_SCALES: torch.cat([scale for _, scale in rounded.values()])}, lengths


def unpack(
    tensors: dict[str, torch.Tensor],
    head_ranks: HeadRanks,
    row_lengths: RowLengths,
    bits: int,
    foldable: Iterable[str],
) -> dict[str, torch.Tensor]:
    """The inverse of `pack`; `foldable` are the parts of that kind, `bits` is 0 for floating numbers.

    Raises ValueError if the rows are not those that ranks and lengths ask for, KeyError for a tensor that is missing.
    """
    dense = {name: tensor for name, tensor in tensors.items() if name.startswith(NO_FACTOR)}
    rows = {name: tensor for name, tensor in tensors.items() if name not in dense}
    for name, tensor in rows.items():
        if not (tensor.dim() == 2 and name.rpartition(".")[2].isdigit()) and name != ROW_SCALES:
            raise ValueError(f"{name} holds no rows")
    rows = _from_scales(rows, bits) if bits else rows
    used, left = dict.fromkeys(rows, 0), {part: iter(lengths) for part, lengths in row_lengths.items()}
    for part, attention, ranks in _attentions(head_ranks):
        factors = FOLDABLE if part in foldable else FREE
        for factor, length in zip(factors, next(left[part]), strict=True):
            own, name = ranks[PRODUCT[factor]], f"{part}.{length}"
            kept = rows[name][used[name] : used[name] + sum(own)]
            if kept.shape != (sum(own), length):
                raise ValueError(f"{name} does not have the {sum(own)} rows of {attention}")
            if len(own) * _rank(ranks) * length > MOST:
                raise ValueError(f"{attention} has heads of a rank that nothing has")
            used[name] += sum(own)
            whole = kept.new_zeros(len(own) * _rank(ranks), length)  # H*R, C
            whole[kept_rows(own, _rank(ranks))] = kept
            dense[f"{part}.{attention}.{factor}"] = whole.T.contiguous() if factor == COLUMNS else whole
    for name, count in used.items():
        if count != len(rows[name]):
            raise ValueError(f"{name} has rows of no head that the header speaks of")
    return dense


def _attentions(head_ranks: HeadRanks) -> Iterator[tuple[str, str, list[list[int]]]]:
    """Part, attention and its ranks, in the order of a file."""
    return ((part, name, ranks) for part, own in sorted(head_ranks.items()) for name, ranks in sorted(own.items()))


def _rank(ranks: list[list[int]]) -> int:
    """The rank of the dense form; a side of a tied adapter that has lost all of its own is still there."""
    return max(1, *map(max, ranks))


def _rounded(rows: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers (K, C) up to `largest` and scales (K), of some the ones that come closest to the rows (K, C)."""
    rows = rows.float()
    tried = _TRIED.unsqueeze(1) * rows.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / largest  # S, K
    numbers = (rows / tried.unsqueeze(2)).round().clamp(-largest, largest)  # S, K, C
    best = (numbers * tried.unsqueeze(2) - rows).square().sum(2).argmin(0)  # K
    each = torch.arange(len(rows))
    return numbers[best, each], tried[best, each]


def _from_scales(tensors: dict[str, torch.Tensor], bits: int) -> dict[str, torch.Tensor]:
    """Whole numbers times the scales of their rows."""
    found, scales = {}, tensors[ROW_SCALES].float()
    for name, rows in sorted(tensors.items()):
        if name == ROW_SCALES:
            continue
        length, scale, scales = int(name.rpartition(".")[2]), scales[: len(rows)], scales[len(rows) :]
        if rows.dtype != torch.uint8 or rows.dim() != 2 or rows.shape[1] != row_bytes(length, bits) - SCALE_BYTES:
            raise ValueError(f"{name} does not hold whole numbers of {bits} bits")
        if len(scale) != len(rows):
            raise ValueError(f"{ROW_SCALES} has no scale for each row")
        found[name] = _from_bits(rows, length, bits) * scale.unsqueeze(1)
    return found


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
