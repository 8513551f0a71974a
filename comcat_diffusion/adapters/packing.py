"""Packed factors: only the rows that a head really has, where the dense form gives every head of a layer one rank.

In a dense file an attention of H heads and rank R has H*R rows in each factor, and every factor is a tensor of its own,
whose entry in the file's table costs more than a hundred bytes. In a packed file (format version 2) the header's
`head_ranks` says the rank of every head, once for its QK and once for its VO product, and the rows of all attentions
that are of one length C stand in one tensor, PART.FACTOR.C: head after head, and attention after attention in the order
of their names. The header's `row_lengths` has the lengths C of every attention's factors, both in the order of their
names. `out_up`, whose ranks are columns, is stored transposed. `unpack` fills the missing rows with zeros, which is
exact.

Factors may be whole numbers, int8 or int4; then `row_scales` holds one float32 for each of their rows, tensor after
tensor in the order of their names. Two int4 numbers share a byte (uint8), the first in its low half, each plus 8; a
half of 0 is no number, which is where a row of odd length ends.

Letters: H heads, R rank, C channels, K rows kept.
"""

import torch
from torch.nn.functional import pad

PRODUCT = {"q_down": 0, "k_down": 0, "q_core": 0, "v_down": 1, "out_up": 1, "out_core": 1}  # 0: QK, 1: VO
COLUMNS = "out_up"  # the one factor whose ranks are columns
ROW_SCALES, SCALE_BYTES = "row_scales", 4
NO_FACTOR = "token."  # the embeddings of new words stand beside the factors, as they are
LARGEST = {torch.int8: 127, torch.int4: 7}  # number of a precision; the smallest is its negative
MOST = 1 << 28  # numbers in a dense factor; SDXL's of rank 128 have 5 million
_ZERO = 8  # what stands for 0 in half a byte
_TRIED = torch.linspace(0.5, 1, 11)  # scales of a row, over the one that its largest number asks for

HeadRanks = dict[str, dict[str, list[list[int]]]]  # by part and attention: of every head its rank in QK, and in VO
RowLengths = dict[str, list[list[int]]]  # by part: of every attention the lengths C of its factors' rows


def kept_rows(ranks: list[int], rank: int) -> torch.Tensor:
    """Which of the H*rank rows of a dense factor exist: (K,), the first `ranks[h]` of every head h."""
    return torch.cat([torch.arange(count) + head * rank for head, count in enumerate(ranks)])


def row_bytes(numbers: int, dtype: torch.dtype) -> int:
    """Bytes that a row of so many numbers takes, its scale included."""
    if dtype not in LARGEST:
        return dtype.itemsize * numbers
    return SCALE_BYTES + (numbers if dtype == torch.int8 else (numbers + 1) // 2)


def pack(
    tensors: dict[str, torch.Tensor], head_ranks: HeadRanks, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], RowLengths]:
    """Dense factors by name, PART.ATTENTION.FACTOR, to packed ones in `dtype` (float16, ..., int8 or int4)."""
    grouped: dict[str, list[torch.Tensor]] = {}
    lengths: RowLengths = {}
    for part, attentions in head_ranks.items():
        for attention, ranks in sorted(attentions.items()):
            lengths.setdefault(part, []).append([])
            for factor in sorted(PRODUCT):
                if (dense := tensors.get(f"{part}.{attention}.{factor}")) is None:
                    continue  # it is of the other kind
                rows = dense.T if factor == COLUMNS else dense  # H*R, C
                kept = rows[kept_rows(ranks[PRODUCT[factor]], _rank(ranks))]  # K, C
                grouped.setdefault(f"{part}.{factor}.{kept.shape[1]}", []).append(kept)
                lengths[part][-1].append(kept.shape[1])
    rows = {name: torch.cat(found) for name, found in sorted(grouped.items())}
    if dtype not in LARGEST:
        return {name: found.to(dtype) for name, found in rows.items()}, lengths
    rounded = {name: _rounded(found, LARGEST[dtype]) for name, found in rows.items()}
    packed = {
        name: _halves(numbers) if dtype == torch.int4 and len(numbers) else numbers  # without rows int8 tells C
        for name, (numbers, _) in rounded.items()
    }
    return packed | {ROW_SCALES: torch.cat([scale for _, scale in rounded.values()])}, lengths


def _rounded(rows: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers (K, C) up to `largest` and scales (K), of some the ones that come closest to the rows (K, C)."""
    rows = rows.float()
    tried = _TRIED.unsqueeze(1) * rows.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / largest  # S, K
    numbers = (rows / tried.unsqueeze(2)).round().clamp(-largest, largest)  # S, K, C
    best = (numbers * tried.unsqueeze(2) - rows).square().sum(2).argmin(0)  # K
    each = torch.arange(len(rows))
    return numbers[best, each].to(torch.int8), tried[best, each]


def _halves(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers from -7 to 7, (K, C), as half-bytes: (K, C/2), rounded up."""
    shifted = pad(numbers + _ZERO, (0, numbers.shape[1] % 2)).to(torch.uint8)
    return shifted[:, ::2] | shifted[:, 1::2] << 4


def _from_halves(bytes_: torch.Tensor) -> torch.Tensor:
    """The inverse of `_halves`."""
    shifted = torch.stack([bytes_ & 15, bytes_ >> 4], dim=2).flatten(1)
    odd = not shifted[:, -1].any()
    return shifted[:, : shifted.shape[1] - odd].to(torch.int8) - _ZERO


def unpack(tensors: dict[str, torch.Tensor], head_ranks: HeadRanks, row_lengths: RowLengths) -> dict[str, torch.Tensor]:
    """The inverse of `pack`. Raises ValueError if the rows are not those that ranks and lengths ask for."""
    dense = {name: tensor for name, tensor in tensors.items() if name.startswith(NO_FACTOR)}
    rows = _unscaled({name: tensor for name, tensor in tensors.items() if name not in dense})
    used = dict.fromkeys(rows, 0)
    for part, attentions in sorted(head_ranks.items()):
        factors = sorted({name.split(".")[1] for name in rows if name.startswith(f"{part}.")})
        if any(len(lengths) != len(factors) for lengths in row_lengths[part]):
            raise ValueError(f"{part} lacks a factor, or has some of two kinds")
        for (attention, ranks), lengths in zip(sorted(attentions.items()), row_lengths[part], strict=True):
            for factor, length in zip(factors, lengths, strict=True):
                own, name = ranks[PRODUCT[factor]], f"{part}.{factor}.{length}"
                kept = rows[name][used[name] : used[name] + sum(own)]
                if kept.shape != (sum(own), length):
                    raise ValueError(f"{name} does not have the {sum(own)} rows of {attention}")
                used[name] += sum(own)
                if len(own) * _rank(ranks) * length > MOST:
                    raise ValueError(f"{attention} has heads of a rank that nothing has")
                whole = kept.new_zeros(len(own) * _rank(ranks), length)  # H*R, C
                whole[kept_rows(own, _rank(ranks))] = kept
                dense[f"{part}.{attention}.{factor}"] = whole.T.contiguous() if factor == COLUMNS else whole
    for name, count in used.items():
        if count != len(rows[name]):
            raise ValueError(f"{name} has rows of no head that the header speaks of")
    return dense


def _unscaled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rows of a packed file's tensors by name, as numbers that their scales went into."""
    found, scales, used = {}, tensors.get(ROW_SCALES, torch.zeros(0)), 0
    for name, rows in sorted(tensors.items()):
        if name == ROW_SCALES:
            continue
        if rows.dim() != 2 or len(name.split(".")) != 3 or name.split(".")[1] not in PRODUCT:
            raise ValueError(f"{name} holds rows of no factor")
        if rows.dtype == torch.uint8:
            rows = _from_halves(rows)
        if rows.dtype == torch.int8:
            scale, used = scales[used : used + len(rows)], used + len(rows)
            if tuple(scale.shape) != (len(rows),):
                raise ValueError(f"{name} is of whole numbers and lacks its {len(rows)} {ROW_SCALES}")
            rows = rows.float() * scale.float().unsqueeze(1)
        found[name] = rows
    return found


def _rank(ranks: list[list[int]]) -> int:
    """The rank of the dense form; a side of a tied adapter that has lost all of its own is still there."""
    return max(1, *map(max, ranks))
