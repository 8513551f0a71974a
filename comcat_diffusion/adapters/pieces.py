"""Several packed adapters in one file (format version 3): each keeps the rows that its own heads have.

The header's `pieces` say of each what a packed file of it alone would (`head_ranks`, `row_lengths`), and under `alpha`
its strength, by part: its term is scaled by alpha over its own rank there, so that a weight costs no second rounding.
Where it has terms beside other modules, `convolved` and `fed` say which (beside_rows.py), and `weight` what these are
times.
Its tensors are those of that file behind its number, NUMBER.PART.C or NUMBER.PART.rows; embeddings of new words stand
beside them. What is read is the sum: head by head the ranks of the pieces side by side, zeros where a head of one has
fewer than its others or an attention is not among its own. So whoever reads dense factors reads these.

Letters: H heads, R rank, C channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch.nn.functional import pad

from comcat_diffusion.adapters.beside_rows import summed, take_terms
from comcat_diffusion.adapters.header import Piece
from comcat_diffusion.adapters.packing import COLUMNS, FOLDABLE, FREE, MOST, NO_FACTOR, dense_rank, unpack

CONTEXT = ("k_down", "v_down")  # the factors that carry scales


def apart(packed: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors of packed pieces as one file holds them, without their new words."""
    return {
        f"{number}.{name}": tensor
        for number, tensors in enumerate(packed)
        for name, tensor in tensors.items()
        if not name.startswith(NO_FACTOR)
    }


def own_tensors(tensors: Mapping[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    """Those of one piece, under the names that a packed file of it has."""
    mark = f"{number}."
    return {name.removeprefix(mark): tensor for name, tensor in tensors.items() if name.startswith(mark)}


def joined(
    tensors: Mapping[str, torch.Tensor], pieces: Sequence[Piece], foldable: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Dense factors by name, PART.ATTENTION.FACTOR, of the sum; `foldable` are the parts of that kind.

    Raises ValueError and KeyError as `unpack` does, and for pieces that do not fit each other.
    """
    numbers = {str(number) for number in range(len(pieces))}
    for name in tensors:
        if not name.startswith(NO_FACTOR) and name.partition(".")[0] not in numbers:
            raise ValueError(f"{name} is of no piece that the header speaks of")
    found = {name: tensor for name, tensor in tensors.items() if name.startswith(NO_FACTOR)}
    rows, beside = [], []
    for number, piece in enumerate(pieces):
        own = own_tensors(tensors, number)
        beside += [replace(term, scale=piece.weight) for term in take_terms(own, piece)]
        rows.append(unpack(own, piece.head_ranks, piece.row_lengths, foldable))
    for term in summed(beside):
        found |= term.tensors()
    for part in sorted({part for piece in pieces for part in piece.head_ranks}):
        own = [(piece, dense) for piece, dense in zip(pieces, rows, strict=True) if part in piece.head_ranks]
        for attention in sorted({name for piece, _ in own for name in piece.head_ranks[part]}):
            for factor in FOLDABLE if part in foldable else FREE:
                found[f"{part}.{attention}.{factor}"] = _joined(own, part, attention, factor)
    return found


def rank_of(piece: Piece, part: str) -> int:
    """How many ranks of each head of a part are a piece's."""
    return max(map(dense_rank, piece.head_ranks[part].values()))


def _joined(own: list[tuple[Piece, dict]], part: str, attention: str, factor: str) -> torch.Tensor:
    """One factor of an attention, the ranks of the pieces side by side."""
    name, there = f"{part}.{attention}.{factor}", {}
    for number, (piece, dense) in enumerate(own):
        ranks = piece.head_ranks[part].get(attention)
        if ranks is not None:
            rows = dense[name].T if factor == COLUMNS else dense[name]  # H*R, C
            scale = piece.alpha[part] / dense_rank(ranks) if factor in CONTEXT else 1.0
            rows = rows.unflatten(0, (len(ranks[0]), -1))  # H, R, C
            there[number] = rows if scale == 1 else rows.float() * scale
    shapes = {(rows.shape[0], rows.shape[2]) for rows in there.values()}
    if len(shapes) > 1:
        raise ValueError(f"its pieces have other heads or widths for {attention}")
    ((heads, length),) = shapes
    ranks = [rank_of(piece, part) for piece, _ in own]
    if heads * sum(ranks) * length > MOST:
        raise ValueError(f"{attention} has heads of a rank that nothing has")
    like = next(iter(there.values()))
    none = like.new_zeros(heads, 0, length)
    wide = [there.get(number, none) for number in range(len(own))]
    wide = [pad(rows, (0, 0, 0, rank - rows.shape[1])) for rows, rank in zip(wide, ranks, strict=True)]
    whole = torch.cat(wide, dim=1).flatten(0, 1)  # H*R, C
    return whole.T.contiguous() if factor == COLUMNS else whole
