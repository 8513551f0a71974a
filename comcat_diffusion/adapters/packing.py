"""Packed factors: only the rows that a head really has, where the dense form gives every head of a layer one rank.

In a dense file an attention of H heads and rank R has H*R rows in each factor. In a packed one (format version 2) the
header's `head_ranks` says the rank of every head, once for its QK and once for its VO product, and each factor holds
that many rows, head after head; `out_up`, whose ranks are columns, is stored transposed. `unpack` fills the missing
rows with zeros, which is exact.

Factors may be whole numbers, int8 or int4; then `row_scales` holds one float32 for each of their rows, factor after
factor in the order of their names. Two int4 numbers share a byte (uint8), the first in its low half, each plus 8; a
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
_ZERO = 8  # what stands for 0 in half a byte
_TRIED = torch.linspace(0.5, 1, 11)  # scales of a row, over the one that its largest number asks for

HeadRanks = dict[str, dict[str, list[list[int]]]]


def kept_rows(ranks: list[int], rank: int) -> torch.Tensor:
    """Which of the H*rank rows of a dense factor exist: (K,), the first `ranks[h]` of every head h."""
    return torch.cat([torch.arange(count) + head * rank for head, count in enumerate(ranks)])


def row_bytes(numbers: int, dtype: torch.dtype) -> int:
    """Bytes that a row of so many numbers takes, its scale included."""
    if dtype not in LARGEST:
        return dtype.itemsize * numbers
    return SCALE_BYTES + (numbers if dtype == torch.int8 else (numbers + 1) // 2)


def pack(tensors: dict[str, torch.Tensor], head_ranks: HeadRanks, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Dense factors by name, PART.ATTENTION.FACTOR, to packed ones in `dtype` (float16, ..., int8 or int4)."""
    packed, scales = {}, []
    for name, dense in sorted(tensors.items()):
        ranks, product = _ranks_of(name, head_ranks)
        rows = dense.T if name.endswith("." + COLUMNS) else dense  # H*R, C
        kept = rows[kept_rows(ranks[product], _rank(ranks))].contiguous()  # K, C
        if dtype in LARGEST:
            kept, scale = _rounded(kept, LARGEST[dtype])
            scales.append(scale)
            packed[name] = _halves(kept) if dtype == torch.int4 and len(kept) else kept  # no rows: int8 tells C
        else:
            packed[name] = kept.to(dtype)
    return packed | {ROW_SCALES: torch.cat(scales)} if scales else packed


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


def unpack(tensors: dict[str, torch.Tensor], head_ranks: HeadRanks) -> dict[str, torch.Tensor]:
    """The inverse of `pack`. Raises ValueError, naming the tensor, if the rows are not those that the ranks ask for."""
    dense, scales, used = {}, tensors.get(ROW_SCALES, torch.zeros(0)), 0
    for name, kept in sorted(tensors.items()):
        if name == ROW_SCALES:
            continue
        if name.startswith(NO_FACTOR):
            dense[name] = kept
            continue
        ranks, product = _ranks_of(name, head_ranks)
        rank, heads, count = _rank(ranks), len(ranks[product]), sum(ranks[product])
        if kept.dim() != 2 or len(kept) != count:
            raise ValueError(f"{name} {tuple(kept.shape)} does not have the {count} rows of its heads")
        if kept.dtype == torch.uint8:
            kept = _from_halves(kept)
        if kept.dtype == torch.int8:
            scale, used = scales[used : used + count], used + count
            if tuple(scale.shape) != (count,):
                raise ValueError(f"{name} is of whole numbers and lacks its {count} {ROW_SCALES}")
            kept = kept.float() * scale.float().unsqueeze(1)
        rows = kept.new_zeros(heads * rank, kept.shape[1])  # H*R, C
        rows[kept_rows(ranks[product], rank)] = kept
        dense[name] = rows.T.contiguous() if name.endswith("." + COLUMNS) else rows
    return dense


def _rank(ranks: list[list[int]]) -> int:
    """The rank of the dense form; a side of a tied adapter that has lost all of its own is still there."""
    return max(1, *map(max, ranks))


def _ranks_of(name: str, head_ranks: HeadRanks) -> tuple[list[list[int]], int]:
    part, _, rest = name.partition(".")
    attention, _, factor = rest.rpartition(".")
    if factor not in PRODUCT or attention not in head_ranks.get(part, {}):
        raise ValueError(f"{name} is of no head that the header speaks of")
    return head_ranks[part][attention], PRODUCT[factor]
