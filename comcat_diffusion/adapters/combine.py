"""Several adapters of one base as one file: their products are added, exactly or to a rank.

Letters: H heads, R rank, C channels.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch

from comcat_diffusion import heads as maths
from comcat_diffusion.adapters.alike import refuse_unlike, several_words
from comcat_diffusion.adapters.beside_kinds import KINDS, Kind
from comcat_diffusion.adapters.beside_rows import Beside, summed
from comcat_diffusion.adapters.header import Header, Notes, Piece, same_words, told_of
from comcat_diffusion.adapters.packing import FLOAT, HeadBits
from comcat_diffusion.adapters.pieces import own_tensors
from comcat_diffusion.adapters.store import TOKEN
from comcat_diffusion.adapters.terms import Contents, Term, assembled, read_contents, write_contents


@dataclass(frozen=True)
class Combined:
    """What a combination left behind."""

    header: Header
    rank: int  # the largest of any attention
    energy_kept: float  # share of the squared Frobenius norm of all products; 1 if nothing was cut off
    doubts: tuple[str, ...] = ()  # what the maker should know, sentences


@dataclass(frozen=True)
class _Read:
    path: str | Path
    weight: float
    contents: Contents

    @property
    def is_packed(self) -> bool:
        return bool(self.contents.header.packed)

    @property
    def beside(self) -> list[Beside]:
        return [replace(term, scale=self.weight * term.scale) for term in self.contents.beside]

    def ranks_beside(self, part: str, kind: Kind) -> dict[str, list[int]]:
        own = [term for term in self.contents.beside if (term.part, term.kind) == (part, kind)]
        return {term.host: [len(term.down)] for term in own}


def combine(
    adapters: Sequence[tuple[str | Path, float]],
    output: str | Path,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Combined:
    """Write the weighted sum of adapter files, (file, weight) each, as one adapter.

    Without a rank the heads' ranks are concatenated, which is exact up to the rounding to `dtype`; where a file is
    packed, each keeps its own rows (adapters/pieces.py), so that the sum takes about their bytes. Not so if a dense one
    has terms beside other modules, which packing would round: then all of the sum is dense. With a rank, every
    head's sum is cut by QR and SVD to its best approximation of that rank; of a foldable adapter it is the product
    without the base, G' Ak^T and Av G, that is approximated. Terms beside other modules keep all of their ranks. Raises
    ValueError for adapters of different bases or kinds and for weights without meaning.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"The rank must be a whole number of at least 1, not {rank}.")
    refuse_unlike(adapters, rank)
    read = [_Read(path, weight, read_contents(path)) for path, weight in adapters]
    _refuse_misfits(read)
    packable = all(file.is_packed or not file.contents.beside for file in read)
    apart = packable and rank is None and len(read) > 1 and any(file.is_packed for file in read)
    waiting, beside = _waiting(read), [term for file in read for term in file.beside]
    added = _added(read, {part for file in read for part in file.contents.header.config} if apart else set(waiting))
    whole = kept = 0.0
    combined = []
    for group in added.values():
        term = concatenated(group)
        if rank is not None:
            term, of_all, of_it = cut(term, rank)
            whole, kept = whole + of_all, kept + of_it
        combined.append(term)
    words, vectors = _tokens(read)
    configs = {part: config for file in reversed(read) for part, config in file.contents.header.config.items()}
    configs = {part: {**config, **waiting.get(part, {})} for part, config in configs.items()}
    header = replace(read[0].contents.header, config=configs, notes=_notes(read), tokens=words)
    pieces = [piece for file in read for piece in _pieces(file, dtype)] if apart else []
    header = write_contents(output, Contents(header, combined, vectors, summed(beside)), dtype, pieces)
    named = [(Path(file.path).name, file.contents.header) for file in read]
    doubts = tuple(f"{text}: this word will call the sum of both." for text in same_words(named))
    return Combined(header, max(term.rank for term in combined), kept / whole if whole else 1.0, doubts)


def _waiting(read: list[_Read]) -> dict[str, dict]:
    """By part in which files wait for words of their own: all of these, and how many ranks wait for which.

    Of other modules how many of the ranks beside them do, in the same order.
    """
    found, headers = {}, [file.contents.header for file in read]
    for part in {part for header in headers for part in header.config if several_words(headers, part)}:
        own = [file for file in read if part in file.contents.header.config]
        mine = [_awaited(file, part) for file in own]
        shares = [share for of_file in mine for share in of_file]
        words = list(dict.fromkeys(word for own_words, _ in shares for word in own_words))
        found[part] = {"trigger": words, "trigger_ranks": shares}
        found[part] |= {kind.shares: _shares_beside(own, part, kind, list(map(len, mine))) for kind in KINDS}
    return found


def _awaited(file: _Read, part: str) -> list[list]:
    """For which words how many ranks of a file wait at attentions."""
    config = file.contents.header.config[part]
    rank = max(term.rank for term in file.contents.terms if term.part == part)
    return config.get("trigger_ranks") or [[list(config["trigger"]), rank]]


def _shares_beside(files: list[_Read], part: str, kind: Kind, counts: list[int]) -> dict[str, list[int]]:
    """By a kind's host how many ranks are of which words, `counts` being of how many each file has ranks."""
    found: dict[str, list[int]] = {name: [] for file in files for name in file.ranks_beside(part, kind)}
    for file, count in zip(files, counts, strict=True):
        there = file.contents.header.config[part].get(kind.shares) or file.ranks_beside(part, kind)
        for name, own in found.items():
            own += there.get(name, [0] * count)
    return found


def _added(read: list[_Read], alike: set[str]) -> dict[str, list[Term]]:
    """What is to be summed, by attention.

    In parts that are to be `alike` all attentions have the same ranks, in the same order: zeros where a file has none.
    """
    added: dict[str, list[Term]] = {}
    shapes = {term.key: term for file in read for term in file.contents.terms}
    for file in read:
        own, most = {term.key: term for term in file.contents.terms}, {}
        for term in own.values():
            most[term.part] = max(term.rank, most.get(term.part, 0))
        for key, like in sorted(shapes.items()):
            term = own.get(key)
            if like.part in alike and like.part in most:
                term = (term or like.nothing(most[like.part])).widened(most[like.part])
            if term:
                added.setdefault(key, []).append(replace(term, scale=file.weight * term.scale))
    return added


def _pieces(file: _Read, dtype: torch.dtype) -> Iterator[tuple[Piece, dict[str, torch.Tensor]]]:
    """A file as one packed piece, or as those that it is of already, and their tensors; a dense one in `dtype`."""
    header, packed = file.contents.header, safetensors.torch.load_file(file.path)
    if header.pieces:
        for number, piece in enumerate(header.pieces):
            alpha = {part: file.weight * strength for part, strength in piece.alpha.items()}
            yield replace(piece, alpha=alpha, weight=file.weight * piece.weight), own_tensors(packed, number)
        return
    if not header.head_ranks:
        directions: HeadBits = {}
        for term in file.contents.terms:
            directions.setdefault(term.part, {})[term.attention] = [[[FLOAT] * term.rank] * term.heads] * 2
        header, content = assembled(file.contents, dtype, directions)
        packed = safetensors.torch.load(content)
    alpha = {part: file.weight * header.config[part]["alpha"] for part in header.head_ranks}
    beside = {kind.told: told_of(header, kind) for kind in KINDS}
    yield Piece(alpha, header.head_ranks, header.row_lengths, weight=file.weight, **beside), packed


def concatenated(terms: Sequence[Term]) -> Term:
    """The sum of terms of one attention: head by head, their ranks side by side."""
    if len(terms) == 1:
        return terms[0]
    joined = []
    for products in zip(*(term.products() for term in terms), strict=True):  # first all QK, then all VO
        lefts, rights = zip(*products, strict=True)
        joined.append((torch.cat(lefts, dim=-1), torch.cat(rights, dim=-2)))
    return terms[0].rebuilt(*joined)


def cut(term: Term, rank: int) -> tuple[Term, float, float]:
    """The best term of a rank, and the squared norm of the products before and after."""
    whole = kept = 0.0
    products = []
    for left, right in term.products():
        u, s, vh = maths.product_svd(left, right)
        whole, kept = whole + float(s.square().sum()), kept + float(s[..., :rank].square().sum())
        products.append(maths.truncate(u, s, vh, rank))
    return term.rebuilt(*products), whole, kept


def _refuse_misfits(read: list[_Read]) -> None:
    """What headers do not say: that factors have the same widths, and that tied adapters are on the same attentions."""
    first_path, first = read[0].path, read[0].contents.header
    widths: dict[str, tuple] = {}
    for path, header, terms in ((file.path, file.contents.header, file.contents.terms) for file in read):
        for term in terms:
            if widths.setdefault(term.key, _channels(term)) != _channels(term):
                raise ValueError(f"{first_path} and {path} do not fit each other: {term.key} has other widths.")
        for part in header.config.keys() & first.config.keys():
            own, others = ({t.key for t in some if t.part == part} for some in (terms, read[0].contents.terms))
            if header.config[part].get("tied") and own != others:
                raise ValueError(
                    f"{first_path} and {path} are tied and adapt different attentions; load them side by side instead."
                )
    for file in read:
        for term in file.contents.beside:
            if widths.setdefault(term.key, term.channels) != term.channels:
                raise ValueError(f"{first_path} and {file.path} do not fit each other: {term.key} has other channels.")


def _channels(term: Term) -> tuple:
    return term.heads, *(left.shape[1] for left, _ in term.products()), *(r.shape[2] for _, r in term.products())


def _tokens(read: list[_Read]) -> tuple[list[str], dict[str, torch.Tensor]]:
    """The new words of all files, and their embeddings as a file names them. A weight does not change a word."""
    words: list[str] = []
    vectors: dict[str, torch.Tensor] = {}
    for file in read:
        for old, word in enumerate(file.contents.header.tokens):
            mark = f"{TOKEN}.{old}."
            own = {n.removeprefix(mark): v for n, v in file.contents.tokens.items() if n.startswith(mark)}
            if word not in words:
                words.append(word)
                vectors |= {f"{TOKEN}.{len(words) - 1}.{encoder}": values for encoder, values in own.items()}
            elif any(not torch.equal(vectors[f"{TOKEN}.{words.index(word)}.{e}"], values) for e, values in own.items()):
                raise ValueError(f"Two of the adapters bring the new word '{word}' with different meanings.")
    return words, vectors


def _notes(read: list[_Read]) -> Notes:
    """The first adapter's words, and under `training` what went into the file."""
    told = [
        {
            "file": Path(file.path).name,
            "weight": file.weight,
            "trigger": file.contents.header.notes.trigger,
            "class_word": file.contents.header.notes.class_word,
            "sha256": hashlib.sha256(Path(file.path).read_bytes()).hexdigest(),
        }
        for file in read
    ]
    notes = read[0].contents.header.notes
    kept = {key: value for key, value in notes.training.items() if key == "resolution"}
    subjects = [{name: one[name] for name in ("trigger", "class_word")} for one in told[1:] if one["trigger"]]
    others = [*notes.others, *subjects, *(other for file in read[1:] for other in file.contents.header.notes.others)]
    further = [other for n, other in enumerate(others) if other not in others[:n] and other["trigger"] != notes.trigger]
    return replace(notes, training=kept | {"combined": told}, others=further)
