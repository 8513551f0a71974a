"""What an adapter file says of itself, readable without torch: the header of `NAME.safetensors`."""

import base64
import bisect
import itertools
import json
import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from comcat_diffusion.adapters.beside_kinds import KINDS, Kind
from comcat_diffusion.adapters.same_base import NARROWER
from comcat_diffusion.families.known import family_of_denoiser
from comcat_diffusion.words import Subject, words_of

FORMAT_VERSION = 1
PACKED_VERSION = 2  # keeps only the rows that each head has, see adapters/packing.py
PIECES_VERSION = 3  # the same for each of several adapters in one file, see adapters/pieces.py
NEWEST = max(kind.version for kind in KINDS)  # later ones are either with terms beside other modules
KEY = "comcat"
_FACTORS = 4  # of an attention, of whichever kind
_DERIVED = ("target_modules", "rank_pattern")  # what a packed file's config leaves out, see settings_of_layers
THUMBNAIL = "modelspec.thumbnail"
LONGEST_HEADER = 4 << 20  # bytes; an honest header is a few tens of kilobytes


class AdapterFileError(ValueError):
    """A file that is not a usable adapter, or not for this base. The message is one sentence with the way out."""


@dataclass(frozen=True)
class Notes:
    """What the trainer wants the user of the file to know."""

    trigger: str = ""  # the word that calls the subject
    instance_prompt: str = ""  # a prompt as it was trained
    class_word: str = ""  # what kind of thing the subject is
    training: dict = field(default_factory=dict)  # resolution, steps, seed and the like
    others: list[dict] = field(default_factory=list)  # trigger and class_word of every further subject

    @property
    def phrase(self) -> str:
        """How a prompt names the subject."""
        return f"{self.trigger} {self.class_word}".strip()

    @property
    def example(self) -> str:
        """A prompt to try the adapter with."""
        return self.instance_prompt or f"a photo of {self.trigger} {self.class_word}".strip()


@dataclass(frozen=True)
class Piece:
    """One of several packed adapters in a file, see adapters/pieces.py."""

    alpha: dict[str, float]  # by component: its strength, divided by the rank of an attention
    head_ranks: dict[str, dict[str, list[list[int]]]]  # as of a packed file
    row_lengths: dict[str, list[list[int]]]
    convolved: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    fed: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    weight: float = 1.0  # of its terms beside other modules, whose strength `alpha` is not


@dataclass(frozen=True)
class Header:
    """Everything needed to use an adapter, and to refuse the wrong base."""

    config: dict[str, dict]  # by pipeline component: the keyword arguments of its ComcatConfig
    base_model: str  # hub id, folder or file that the adapter was trained on
    revision: str
    fingerprint: dict  # see adapters/fingerprint.py
    notes: Notes
    versions: dict[str, str]  # of the libraries that wrote the file
    format_version: int = FORMAT_VERSION
    # Packed files only. By component and attention: the rank of every head, of its QK and of its VO product.
    head_ranks: dict[str, dict[str, list[list[int]]]] = field(default_factory=dict)
    row_lengths: dict[str, list[list[int]]] = field(default_factory=dict)  # see adapters/packing.py
    # Packed files with terms beside convolutions. By component and convolution: rank, channels that go out and come in.
    convolved: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    fed: dict[str, dict[str, list[int]]] = field(default_factory=dict)  # the same of terms beside feed-forwards
    pieces: list[Piece] = field(default_factory=list)  # of files of several packed adapters
    tokens: list[str] = field(default_factory=list)  # new words whose embeddings the file brings
    thumbnail: str = ""  # a small picture as a data URI, where one was asked for

    @property
    def width(self) -> int | None:
        """Of the text states, by which others tell the kinds of Stable Diffusion; None where they are made narrower."""
        return None if self.fingerprint.get(NARROWER) else self.fingerprint.get("cross_attention_dim")

    @property
    def packed(self) -> dict[str, dict[str, list[list[list[int]]]]]:
        """Of packed parts and their attentions: the ranks of the heads, in each piece; of a dense file none."""
        found: dict[str, dict[str, list]] = {}
        for head_ranks in [self.head_ranks, *(piece.head_ranks for piece in self.pieces)]:
            for part, attentions in head_ranks.items():
                for name, products in attentions.items():
                    found.setdefault(part, {}).setdefault(name, []).append(products)
        return found

    def beside(self, kind: Kind) -> dict[str, dict[str, list[int]]]:
        """Of packed parts and a kind's hosts: the rank in each piece, 0 where it has none; of a dense file none."""
        found: dict[str, dict[str, list[int]]] = {}
        packed = self.pieces or [self]
        for part, name in {(p, n) for own in packed for p, names in told_of(own, kind).items() for n in names}:
            ranks = [told_of(own, kind).get(part, {}).get(name, (0,))[0] for own in packed if part in own.head_ranks]
            found.setdefault(part, {})[name] = ranks
        return found

    def metadata(self) -> dict[str, str]:
        """As the string pairs of a safetensors header; the `modelspec.*` keys are what other tools read."""
        notes, content = self.notes, asdict(self)
        del content["thumbnail"]  # it stands where other tools look for it
        for name in ("head_ranks", "row_lengths", *(kind.told for kind in KINDS), "pieces", "tokens"):
            if not content[name]:  # a file that does without is one that older versions read
                del content[name]
        for piece in content.get("pieces", ()):
            none = [kind.told for kind in KINDS if not piece[kind.told]]
            for name in none if len(none) < len(KINDS) else [*none, "weight"]:
                del piece[name]
        if not notes.others:
            del content["notes"]["others"]
        for part in self.packed:  # the ranks of the heads say which layers there are, and of which rank
            told = () if self.config[part].get("tied") else _DERIVED
            content["config"][part] = {n: v for n, v in content["config"][part].items() if v and n not in told}
        for kind in KINDS:
            for part in self.beside(kind):
                for name in kind.settings:
                    content["config"][part].pop(name, None)
        pairs = {
            KEY: json.dumps(content, sort_keys=True, separators=(",", ":") if self.packed else None),
            "format": "pt",
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": _architecture(self.fingerprint) + "/comcat",
            "modelspec.implementation": "https://github.com/huggingface/diffusers",
            "modelspec.title": notes.instance_prompt or notes.trigger or "COMCAT adapter",
            "modelspec.prediction_type": self.fingerprint.get("prediction_type", ""),
            "modelspec.trigger_phrase": notes.trigger,
            "modelspec.usage_hint": f'Load with comcat-diffusion; prompt with "{notes.trigger} {notes.class_word}".',
        }
        if self.thumbnail:
            pairs[THUMBNAIL] = self.thumbnail
        if notes.training.get("resolution"):
            pairs["modelspec.resolution"] = "{0}x{0}".format(notes.training["resolution"])
        return pairs


def _architecture(fingerprint: dict) -> str:
    family = family_of_denoiser(str(fingerprint.get("class")), fingerprint)
    if family is not None and family.architecture:
        return family.architecture
    width = fingerprint.get("cross_attention_dim")
    known = {768: "stable-diffusion-v1", 1024: "stable-diffusion-v2-512", 2048: "stable-diffusion-xl-v1-base"}
    return known.get(width, "stable-diffusion-tiny")


def read_adapter(path: str | Path) -> Header:
    """The header of an adapter file. Raises AdapterFileError if the file is missing, damaged or something else."""
    path = Path(path)
    if not path.is_file():
        raise AdapterFileError(f"There is no adapter file {path}.")
    with path.open("rb") as file:
        start = file.read(8)
    # The length comes first: an honest header of 128 bytes more than a multiple of 256 begins like a pickle.
    if len(start) < 8 or struct.unpack("<Q", start)[0] > LONGEST_HEADER:
        if start[:2] == b"PK" or start[:1] == b"\x80":
            raise AdapterFileError(
                f"{path} is a pickle (.pt), which can run code; only .safetensors adapters are loaded."
            )
        raise AdapterFileError(f"{path} is not a safetensors file, or it is cut short.")
    try:
        with safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path} is damaged or cut short ({error}); get the file again.") from error
    if KEY not in metadata:
        raise AdapterFileError(
            f"{path} is not a COMCAT adapter: it has no '{KEY}' header (a LoRA goes to --lora, or to "
            "pipe.load_lora_weights)."
        )
    return _parsed(metadata, path)


def picture_of(header: Header) -> bytes | None:
    """The thumbnail's file content, or None. Raises AdapterFileError if what stands there is no picture."""
    if not header.thumbnail:
        return None
    kind, comma, text = header.thumbnail.partition(",")
    try:
        if not comma or not kind.startswith("data:image/") or not kind.endswith(";base64"):
            raise ValueError(kind[:40])
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise AdapterFileError(f"The adapter's thumbnail is no picture ({error}).") from error


def _parsed(metadata: dict[str, str], path: Path) -> Header:
    try:
        content = json.loads(metadata[KEY])
        version = content["format_version"]
        if version in range(FORMAT_VERSION, NEWEST + 1):
            content["notes"] = Notes(**content["notes"])
            content["pieces"] = [Piece(**piece) for piece in content.get("pieces", [])]
            header = Header(**content, thumbnail=metadata.get(THUMBNAIL, ""))
            _refuse_other_types(header)
            _refuse_other_ranks(header)
            for part, attentions in header.packed.items():
                config = header.config[part]
                if not config.get("tied"):
                    ranks = {
                        n: config["r"] if header.pieces else max(map(max, own[0])) for n, own in attentions.items()
                    }
                    config.update(settings_of_layers(ranks, config["r"]))
            for kind in KINDS:
                for part, hosts in header.beside(kind).items():
                    header.config[part].update(kind.of_ranks({name: sum(own) for name, own in hosts.items()}))
                    header.config[part].update(_shares_beside(header, part, kind, hosts))
            return header
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, ValueError, re.error) as error:
        raise AdapterFileError(f"{path} has a header that does not make sense ({error}).") from error
    newer = isinstance(version, int) and version > NEWEST
    way_out = "update comcat-diffusion" if newer else "the file was not written by comcat-diffusion"
    raise AdapterFileError(
        f"{path} has format version {version!r}, this program reads {FORMAT_VERSION} to {NEWEST}: {way_out}."
    )


def kind_of(config: dict) -> str:
    """What kind of adapter a header's configuration of one part describes: tied, cores, foldable or free."""
    kinds = [kind for kind in ("tied", "cores") if config.get(kind)]
    return kinds[0] if kinds else "foldable" if config.get("foldable") else "free"


def awaited(header: Header) -> set[str]:
    """The words that the adapter of a file waits for, in small letters; none if it acts everywhere."""
    return {word.lower() for config in header.config.values() for word in config.get("trigger") or ()}


def subjects_of(header: Header) -> list[Subject]:
    """What calls what a file has learned."""
    notes = header.notes
    return [Subject(notes.trigger, notes.class_word), *(Subject(**other) for other in notes.others)]


def called_by(header: Header) -> list[str]:
    """What the subjects of a file are called by in prompts: as its notes say, else the words that it waits for."""
    return words_of(subjects_of(header)) or sorted(awaited(header))


def same_words(headers: Sequence[tuple[str, Header]]) -> Iterator[str]:
    """A sentence for every two adapters, (name, header) each, that one word calls both of."""
    for (one, first), (other, second) in itertools.combinations(headers, 2):
        for word in sorted(awaited(first) & awaited(second)):
            yield f"{one} and {other} both act from '{word}' on, so their subjects mix"


def settings_of_layers(ranks: dict[str, int], common: int) -> dict:
    """The settings of a configuration that name every layer and its rank, `common` being the rank of most."""
    others = {f"^{re.escape(name)}": rank for name, rank in sorted(ranks.items()) if rank != common}
    return {"target_modules": sorted(ranks), "rank_pattern": others}


def told_of(packed: Header | Piece, kind: Kind) -> dict[str, dict[str, list[int]]]:
    """What a packed file, or a piece of one, says of a kind of terms: [R, O, C] by part and host."""
    return getattr(packed, kind.told)


def version_beside(packed: Sequence[Header | Piece]) -> int:
    """The format version that the terms beside other modules ask for, in a file of these; 0: there are none."""
    return max((kind.version for kind in KINDS if any(told_of(own, kind) for own in packed)), default=0)


def _shares_beside(header: Header, part: str, kind: Kind, ranks: dict[str, list[int]]) -> dict:
    """The setting that says of which words ranks beside a kind's hosts are, from those of every piece.

    A piece's words are those that its ranks at attentions wait for, and these stand piece by piece, word by word.
    """
    words = header.config[part].get("trigger_ranks")
    if not words:
        return {}
    ends = list(itertools.accumulate(count for _, count in words))
    last = itertools.accumulate(_rank(piece, part) for piece in header.pieces if part in piece.head_ranks)
    of_piece = [min(bisect.bisect_left(ends, end), len(ends) - 1) for end in last]
    found = {}
    for name, own in sorted(ranks.items()):
        found[name] = [0] * len(words)
        for word, count in zip(of_piece, own, strict=True):
            found[name][word] += count
    return {kind.shares: found}


def _refuse_other_types(header: Header) -> None:
    notes = header.notes
    known = {
        "config": isinstance(header.config, dict) and all(isinstance(c, dict) for c in header.config.values()),
        "fingerprint": isinstance(header.fingerprint, dict),
        "versions": isinstance(header.versions, dict),
        "tokens": isinstance(header.tokens, list) and all(isinstance(word, str) for word in header.tokens),
        "base_model": isinstance(header.base_model, str) and isinstance(header.revision, str),
        "notes": all(isinstance(text, str) for text in (notes.trigger, notes.instance_prompt, notes.class_word))
        and isinstance(notes.training, dict)
        and isinstance(notes.others, list)
        and all(isinstance(word, str) for other in notes.others for word in (other["trigger"], other["class_word"])),
    }
    wrong = [name for name, right in known.items() if not right]
    if wrong:
        raise TypeError(f"{' and '.join(wrong)} hold other things than they should")
    for config in header.config.values():
        if isinstance(config.get("target_modules"), str):
            re.compile(config["target_modules"])


def _refuse_other_ranks(header: Header) -> None:
    version, beside = header.format_version, version_beside((header, *header.pieces))
    if beside != (version if version > PIECES_VERSION else 0):
        raise TypeError("terms beside other modules belong to files of their own version and to no others")
    if not beside and bool(header.pieces) != (version == PIECES_VERSION):
        raise TypeError(f"pieces belong to files of version {PIECES_VERSION} and to no others")
    if bool(header.head_ranks) != ((beside or version == PACKED_VERSION) and not header.pieces):
        raise TypeError("head_ranks belong to packed files and to no others")
    _refuse_other_pieces(header)
    for packed in (header, *header.pieces):
        _refuse_other_heads(header, packed)
        for kind in KINDS:
            _refuse_other_hosts(packed, kind)


def _refuse_other_hosts(packed: Header | Piece, kind: Kind) -> None:
    for part, hosts in told_of(packed, kind).items():
        numbers = [number for own in hosts.values() for number in own]
        proper = all(type(number) is int and number > 0 for number in numbers)
        if part not in packed.head_ranks or not proper or {len(own) for own in hosts.values()} != {3}:
            raise TypeError(f"{kind.told} of {part} is not three whole numbers for each of its {kind.noun}")


def _refuse_other_pieces(header: Header) -> None:
    """The ranks of the pieces are those of the whole, and each has a strength wherever it has ranks."""
    for piece in header.pieces:
        numbers = all(type(a) in (int, float) and math.isfinite(a) for a in piece.alpha.values())
        if piece.alpha.keys() != piece.head_ranks.keys() or not piece.head_ranks or not numbers:
            raise TypeError("the alpha of a piece is not one number for each of its parts")
        if type(piece.weight) not in (int, float) or not math.isfinite(piece.weight):
            raise TypeError("the weight of a piece is not a number")
    for part in {part for piece in header.pieces for part in piece.head_ranks}:
        ranks = sum(_rank(piece, part) for piece in header.pieces if part in piece.head_ranks)
        if ranks != header.config[part]["r"]:
            raise TypeError(f"the ranks of the pieces of {part} are not those of the whole")


def _rank(piece: Piece, part: str) -> int:
    """The ranks that heads of a part have of a piece."""
    return max(1, *(rank for products in piece.head_ranks[part].values() for heads in products for rank in heads))


def _refuse_other_heads(header: Header, packed: Header | Piece) -> None:
    for part, attentions in packed.head_ranks.items():
        for name, products in attentions.items():
            numbers = [rank for ranks in products for rank in ranks]
            proper = all(type(rank) is int and rank >= 0 for rank in numbers)
            proper = proper and (any(numbers) or header.config.get(part, {}).get("tied"))
            if part not in header.config or len(products) != 2 or len({len(r) for r in products}) != 1 or not proper:
                raise TypeError(f"head_ranks of {part}.{name} are not two lists of whole numbers")
        lengths = [length for own in packed.row_lengths[part] for length in own]
        proper = [len(own) for own in packed.row_lengths[part]] == [_FACTORS] * len(attentions)
        if not proper or not all(type(length) is int and length > 0 for length in lengths):
            raise TypeError(f"row_lengths of {part} are not {_FACTORS} whole numbers for each attention")
