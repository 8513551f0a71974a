"""An adapter file taken apart without its base: per attention and head, the two products that it adds.

    free:      QK_h = s Aq_h Ak_h^T, VO_h = s Av_h Ao_h       foldable: QK_h = s G'_h Ak_h^T, VO_h = s Av_h G_h

Letters: H heads, D head width, R rank, C channels; E the rows of a left factor (C or D).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch.nn.functional import pad

from comcat_diffusion import atomic
from comcat_diffusion import heads as maths
from comcat_diffusion.adapters.beside_kinds import KINDS, at_attentions, kind_with
from comcat_diffusion.adapters.beside_rows import Beside, pack_terms
from comcat_diffusion.adapters.cores import refuse_cores
from comcat_diffusion.adapters.header import (
    FORMAT_VERSION,
    PACKED_VERSION,
    PIECES_VERSION,
    AdapterFileError,
    Header,
    Piece,
    read_adapter,
    settings_of_layers,
    version_beside,
)
from comcat_diffusion.adapters.model import of_pattern
from comcat_diffusion.adapters.packing import COLUMNS, FOLDABLE, FREE, HeadBits, pack, ranks_of
from comcat_diffusion.adapters.pieces import CONTEXT, apart
from comcat_diffusion.adapters.store import TOKEN, config_of, library_versions, read_tensors, serialized
from comcat_diffusion.adapters.tied import TEXT, WIDTH
from comcat_diffusion.adapters.wholes import WHOLE

Product = tuple[torch.Tensor, torch.Tensor]  # of every head: left (H, E, R), right (H, R, C)


@dataclass(frozen=True)
class Term:
    """What an adapter adds to one attention. Its factors are as a file holds them, without the scale."""

    part: str  # component of the pipeline
    attention: str  # name within the component; of a tied adapter that of a side, which counts as one head
    scale: float  # s = alpha / r
    rank: int
    foldable: bool
    factors: dict[str, torch.Tensor]  # k_down, v_down, q_down (H*R, C), out_up (C, H*R), q_core, out_core (H*R, D)
    tied: bool = False

    @property
    def key(self) -> str:
        """PART.ATTENTION, as in the file."""
        return f"{self.part}.{self.attention}"

    @property
    def heads(self) -> int:
        """Number of heads H."""
        return self.factors["k_down"].shape[0] // self.rank

    @property
    def width(self) -> int:
        """Width D of the heads; of a free term, that of heads which share the channels C among them, as they all do."""
        if self.tied:
            return WIDTH
        return self.factors["q_core"].shape[1] if self.foldable else self.factors["q_down"].shape[1] // self.heads

    def products(self) -> tuple[Product, Product]:
        """QK and VO of every head in float64, the scale included (on the context's side)."""
        f = {name: factor.double() for name, factor in self.factors.items()}
        k, v = (self.scale * maths.in_factors(f[name], self.heads) for name in CONTEXT)  # H, C, R
        if self.foldable:
            core, back = maths.in_factors(f["q_core"], self.heads), maths.in_factors(f["out_core"], self.heads)
            return (core, k.mT), (v, back.mT)
        return (maths.in_factors(f["q_down"], self.heads), k.mT), (v, maths.out_factors(f["out_up"], self.heads))

    def rebuilt(self, qk: Product, vo: Product) -> "Term":
        """The same attention with other products; the scale is then one, the rank that of the longer product."""
        rank = max(qk[0].shape[-1], vo[0].shape[-1])
        qk, vo = _padded(qk, rank), _padded(vo, rank)
        factors = {"k_down": maths.in_weight(qk[1].mT), "v_down": maths.in_weight(vo[0])}
        if self.foldable:
            factors |= {"q_core": maths.in_weight(qk[0]), "out_core": maths.in_weight(vo[1].mT)}
        else:
            factors |= {"q_down": maths.in_weight(qk[0]), "out_up": maths.out_weight(vo[1])}
        return replace(self, scale=1.0, rank=rank, factors=factors)

    def nothing(self, rank: int) -> "Term":
        """One of the same heads and widths, of a rank, that adds nothing."""
        across = self.heads * rank
        shapes = {n: (f.shape[0], across) if n == COLUMNS else (across, f.shape[1]) for n, f in self.factors.items()}
        factors = {name: torch.zeros(shape, dtype=self.factors[name].dtype) for name, shape in shapes.items()}
        return replace(self, scale=1.0, rank=rank, factors=factors)

    def widened(self, rank: int) -> "Term":
        """The same with zeros up to a rank."""
        if rank == self.rank:
            return self
        (query, key), (value, back) = self.products()
        missing = rank - self.rank
        left = lambda factor: pad(factor, (0, missing))  # noqa: E731
        right = lambda factor: pad(factor, (0, 0, 0, missing))  # noqa: E731
        return self.rebuilt((left(query), right(key)), (left(value), right(back)))


def _padded(product: Product, rank: int) -> Product:
    """Zeros up to a rank: a product that is cut to fewer channels than ranks is shorter than its partner."""
    missing = rank - product[0].shape[-1]
    return pad(product[0], (0, missing)), pad(product[1], (0, 0, 0, missing))


@dataclass(frozen=True)
class Contents:
    """What is in an adapter file."""

    header: Header
    terms: list[Term]
    tokens: dict[str, torch.Tensor] = field(default_factory=dict)  # embeddings (n, E) by name, token.NUMBER.ENCODER
    beside: list[Beside] = field(default_factory=list)  # what there is beside other modules


def read_contents(path: str | Path) -> Contents:
    """A file taken apart. What needs no base is checked as strictly as when loading.

    Raises AdapterFileError for a damaged file, naming the module whose factors do not fit each other.
    """
    header = read_adapter(path)
    refuse_cores(header.config, path)
    tensors = read_tensors(path, header)
    configs = {part: config_of(fields, path) for part, fields in header.config.items()}
    if any(name.startswith(f"{WHOLE}.") for name in tensors):
        modules = sorted({module for config in configs.values() for module in config.modules_to_save or ()})
        raise AdapterFileError(
            f"{path} also holds whole modules ({', '.join(modules)}), of which there is no low-rank form: use it as it "
            "is, with load_adapter."
        )
    tokens = {name: tensors.pop(name) for name in sorted(tensors) if name.startswith(f"{TOKEN}.")}
    grouped: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        attention, _, factor = rest.rpartition(".")
        grouped.setdefault((part, attention), {})[factor] = tensor
    terms, beside = [], []
    for (part, attention), factors in sorted(grouped.items()):
        if part not in configs:
            raise AdapterFileError(f"{path} has tensors of '{part}', of which its header does not speak.")
        config = configs[part]
        if kind_with(factors):
            beside.append(Beside.of(part, attention, config.alpha / config.r, factors))
            if not beside[-1].fits:
                raise AdapterFileError(f"{path} has factors of {part}.{attention} that do not fit: it is damaged.")
            continue
        rank = of_pattern(config.rank_pattern, attention, config.r)
        alpha = of_pattern(config.alpha_pattern, attention, config.alpha)
        term = Term(part, attention, alpha / rank, rank, config.foldable, factors, config.tied)
        if not _fits(term):
            raise AdapterFileError(f"{path} has factors of {term.key} that do not fit its rank {rank}: it is damaged.")
        terms.append(term)
    if not terms:
        raise AdapterFileError(f"{path} holds no factors: it is damaged.")
    return Contents(header, terms, tokens, beside)


def _fits(term: Term) -> bool:
    names = FOLDABLE if term.foldable else FREE
    if sorted(term.factors) != sorted(names) or any(f.dim() != 2 for f in term.factors.values()):
        return False
    rows = {f.shape[1] if name == "out_up" else f.shape[0] for name, f in term.factors.items()}
    same_context = term.factors["k_down"].shape == term.factors["v_down"].shape
    same_width = not term.foldable or term.factors["q_core"].shape == term.factors["out_core"].shape
    whole = term.heads == 1 if term.tied else term.heads > 0
    return len(rows) == 1 and rows.pop() % term.rank == 0 and same_context and same_width and whole


def assembled(
    contents: Contents,
    dtype: torch.dtype = torch.float16,
    head_bits: HeadBits | None = None,
    pieces: Sequence[tuple[Piece, Mapping[str, torch.Tensor]]] = (),
    beside_bits: Sequence[Sequence[int]] = (),
) -> tuple[Header, bytes]:
    """A file of these terms that keeps the header's base and notes: dense, or packed where `head_bits` are given.

    Those beside other modules are packed as well, with the `beside_bits` of each. Or of `pieces` and the tensors of
    each, whose sum these terms are.

    A layer whose rank is not the common one would be scaled by alpha / rank, so its factors on the context's side
    carry the inverse: no module needs an alpha of its own. Raises ValueError if a factor leaves the range of `dtype`.
    """
    config, tensors = {}, {}
    for part, own in _by_part(contents.terms).items():
        common = next((term.rank for term in own if term.attention == TEXT), None)
        common = common or Counter(term.rank for term in own).most_common(1)[0][0]
        config[part] = _config(own, common, contents.header.config[part])
        config[part] |= _config_beside(contents, part)
        for term in own:
            gain = term.scale * term.rank / common
            for name, factor in term.factors.items():
                tensors[f"{term.key}.{name}"] = factor * gain if name in CONTEXT else factor
    row_lengths, told = {}, {}
    if pieces:
        tensors = apart([packed for _, packed in pieces])
    elif head_bits:
        tensors, row_lengths = pack(tensors, head_bits, dtype)
        packed, told = pack_terms(contents.beside, beside_bits) if contents.beside else ({}, {})
        for part, own in config.items():
            config[part] = at_attentions(own)
            for kind, hosts in told.items():
                config[part] |= kind.of_ranks({name: rank for name, (rank, *_) in hosts.get(part, {}).items()})
        tensors |= packed
    else:
        tensors |= {name: factor for term in contents.beside for name, factor in term.tensors().items()}
        tensors = {name: factor.to(dtype) for name, factor in tensors.items()}
    tensors |= {name: vectors.to(dtype) for name, vectors in contents.tokens.items()}
    version = PIECES_VERSION if pieces else PACKED_VERSION if head_bits else FORMAT_VERSION
    header = replace(
        contents.header,
        config=config,
        versions=library_versions(),
        head_ranks=ranks_of(head_bits or {}),
        row_lengths=row_lengths,
        pieces=[piece for piece, _ in pieces],
        thumbnail="",  # it shows what the file did before, and would cost more bytes than the ranks
        **{kind.told: told.get(kind, {}) for kind in KINDS},
    )
    header = replace(header, format_version=version_beside((header, *header.pieces)) or version)
    return header, serialized(tensors, header)


def write_contents(
    path: str | Path,
    contents: Contents,
    dtype: torch.dtype,
    pieces: Sequence[tuple[Piece, Mapping[str, torch.Tensor]]] = (),
) -> Header:
    """Write a dense file, or one of pieces; see `assembled`. Raises OSError if it cannot be written."""
    made, content = assembled(contents, dtype, pieces=pieces)
    atomic.write_bytes(path, content)
    return made


def refuse_several(header: Header, path: str | Path, what: str) -> None:
    """Raise AdapterFileError for a file whose ranks wait for words of their own, where what is done would mix them."""
    if any(config.get("trigger_ranks") for config in header.config.values()):
        raise AdapterFileError(
            f"{path} holds several subjects, each with ranks and words of its own, and {what} would mix them: take the "
            "files that it was made of."
        )


def _by_part(terms: Iterable[Term]) -> dict[str, list[Term]]:
    parts: dict[str, list[Term]] = {}
    for term in terms:
        parts.setdefault(term.part, []).append(term)
    return parts


def _config_beside(contents: Contents, part: str) -> dict:
    """The settings of what there is beside other modules of a part."""
    found, before = {}, contents.header.config[part]
    for kind in KINDS:
        ranks = {term.host: len(term.down) for term in contents.beside if (term.part, term.kind) == (part, kind)}
        found |= kind.of_ranks(ranks)
        if ranks and before.get(kind.shares):
            found[kind.shares] = before[kind.shares]
    return found


def _config(terms: list[Term], common: int, before: dict) -> dict:
    """The configuration of these terms; what they do not say is as it was `before`."""
    before = at_attentions(before)
    layers = settings_of_layers({term.attention: term.rank for term in terms}, common)
    if terms[0].tied:  # whose text side does not say of which attentions it is
        ranks = {"rank_pattern": layers["rank_pattern"], "alpha_pattern": {}}
        return {**before, "r": common, "alpha": float(common), **ranks}
    trigger = {name: before[name] for name in ("trigger", "trigger_ranks") if before.get(name)}
    return {"r": common, "alpha": float(common), "foldable": terms[0].foldable, **trigger, **layers}
