"""What prompts say to adapters in ComfyUI: where a trigger stands among the tokens, and words that an adapter brings.

ComfyUI's tokens are lists of (token, weight) by encoder and by chunk, of CLIP's of 77; a token is a number or, of a
textual-inversion word, a vector. What they say travels with the conditioning, under `SAID`. Chunks are encoded one by
one, so in each of them an adapter acts from the first of its words on that stands in it. A T5 and a language model read
a prompt in one chunk, the latter within a template of a chat.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from comcat_diffusion.words import places

SAID = "comcat"  # key in a conditioning
KEYS = {"text_encoder": ("l", "h"), "text_encoder_2": ("g",)}  # of ComfyUI's lists of tokens, by our encoders
CLIP = ("l", "h", "g")  # those of CLIPs
# ComfyUI's tokenizers, and keys of their tokens; those of one model are here in the order of their states
_READERS = {"clip_l": "l", "clip_h": "h", "clip_g": "g", "t5xxl": "t5xxl", "clip_t5xxl": "t5xxl"}
_READERS |= {name: name for name in ("qwen3_4b", "qwen3_8b", "qwen25_7b")}
_LEAD = "\N{LOWER ONE EIGHTH BLOCK}"  # of a T5: what is a token of its own before a word belongs to the word
_END = "</w>"  # of a piece of CLIP's vocabulary that ends a word
Vectors = Mapping[str, torch.Tensor]  # of a word: (n, E) by text encoder
Marks = Mapping[str, tuple[str, int]]  # by word: what stands for it while the text is read, and its token


@dataclass(frozen=True)
class Said:
    """A prompt as text encoders have read it."""

    text: str
    chunks: tuple[tuple[int, ...], ...]  # where in the text each token ends; 0 of those that are no word
    behind: "Said | None" = None  # the same text as another encoder has read it, whose states stand behind

    def of_states(self, count: int) -> "Said":
        """That of so many states: without an encoder that is not there, and without a template's begin."""
        own = sum(map(len, self.chunks))
        if self.behind is not None and own < count:
            return replace(self, behind=self.behind.of_states(count - own))
        chunks = self.chunks
        if len(chunks) == 1 and own > count:
            chunks = (chunks[0][own - count :],)
        return replace(self, chunks=chunks, behind=None)

    def acts(self, words: Sequence[str]) -> torch.Tensor:
        """(M,) of bool: in each chunk the tokens from the first of these words on that stands there."""
        starts = sorted(start for word in words for start, _ in places(word, self.text))
        found, before = [], 0
        for ends in self.chunks:
            own = [start for start in starts if before <= start < max(ends, default=0)]
            begun = False
            for end in ends:
                begun = begun or (bool(own) and end > own[0])
                found.append(begun)
            before = max((before, *ends))
        own = torch.tensor(found, dtype=torch.bool)
        return own if self.behind is None else torch.cat([own, self.behind.acts(words)])

    def within(self, words: Sequence[str]) -> torch.Tensor:
        """(M,) of bool: the tokens of these words themselves."""
        spans = [span for word in words for span in places(word, self.text)]
        ends = [end for chunk in self.chunks for end in chunk]
        own = torch.tensor([any(start < end <= stop for start, stop in spans) for end in ends], dtype=torch.bool)
        return own if self.behind is None else torch.cat([own, self.behind.within(words)])


class Tokens(dict):
    """ComfyUI's tokens, which know what they say."""

    said: Said | None = None


class Tokenizer:
    """ComfyUI's tokenizer, with the words that adapters brought; what it makes knows what it says."""

    def __init__(self, inner: object, words: Mapping[str, Vectors]) -> None:
        known = inner.words if isinstance(inner, Tokenizer) else {}
        self.inner = inner.inner if isinstance(inner, Tokenizer) else inner
        self.words = {**known, **words}
        self.readers = _readers(self.inner)

    def __getattr__(self, name: str) -> object:
        return getattr(self.__dict__["inner"], name)

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: object) -> Tokens:
        """As the inner one's."""
        text = unicodedata.normalize("NFC", text)
        plain = next(iter(self.readers.values()))
        marks = _marks(plain, text, self.words)
        made = self.inner.tokenize_with_weights(_marked(text, self.words, marks), return_word_ids, **kwargs)
        tokens, words = Tokens(made), {number: word for word, (_, number) in marks.items()}
        template = kwargs.get("llama_template") or getattr(self.inner, "llama_template", "{}")
        if not kwargs.get("images"):  # which stand among the words, by another template
            tokens.said = _said(made, text, self.readers, words, template)
        for encoder, keys in KEYS.items():
            vectors = {number: self.words[word].get(encoder) for number, word in words.items()}
            for key in keys:
                for chunk in made.get(key, ()):
                    _put(chunk, vectors, words)
        return tokens


def _said(
    made: Mapping[str, Sequence], text: str, readers: Mapping[str, object], words: Mapping[int, str], template: str
) -> Said:
    """What tokens say, encoder by encoder in the order of their states."""
    before = template.partition("{}")[0]
    said = None
    for key, plain in reversed(readers.items()):
        ends = ends_of(made[key], template.replace("{}", text, 1), plain, words)
        own = tuple(tuple(max(end - len(before), 0) for end in chunk) for chunk in ends)
        said = Said(text, own, said)
    return said


def joined(parts: Sequence[Tokens]) -> Tokens:
    """The chunks of several texts, one after the other, as BREAK asks for.

    Raises ValueError for what encoders other than CLIP have to read.
    """
    if not all(key in CLIP for part in parts for key in part):
        raise ValueError("BREAK parts prompts for CLIP alone, and this text encoder reads them whole: leave it out.")
    whole = Tokens({key: [chunk for part in parts for chunk in part[key]] for key in parts[0]})
    text, chunks = "", []
    for part in parts:
        said = part.said
        chunks += [tuple(end + len(text) if end else 0 for end in chunk) for chunk in said.chunks]
        text += f"{said.text}\n"
    whole.said = Said(text, tuple(chunks))
    return whole


def _readers(tokenizer: object) -> dict[str, object]:
    """transformers' tokenizers inside of ComfyUI's, by keys of its tokens, whose encoders make the text states."""
    there = {name: getattr(tokenizer, name, None) for name in _READERS}
    found = {_READERS[name]: own.tokenizer for name, own in there.items() if own is not None}
    if "t5xxl" in found and "g" not in found:  # FLUX.1 takes no more than a pooled text of its CLIP
        return {"t5xxl": found["t5xxl"]}
    clips = {key: found[key] for key in CLIP if key in found}
    found = dict(list(clips.items())[:1]) | {key: own for key, own in found.items() if key not in CLIP}
    if not found:
        raise ValueError(
            f"The text encoder of this CLIP ({type(tokenizer).__name__}) is none whose prompts are read here."
        )
    return found


def _marks(tokenizer: object, text: str, words: Mapping[str, Vectors]) -> Marks:
    """For each word of adapters that the text has, a whole word of the vocabulary that it does not have."""
    present, found, low = [word for word in words if places(word, text)], {}, text.lower()
    if present:
        able = (
            (piece.removesuffix(_END), number)
            for piece, number in sorted(tokenizer.get_vocab().items())
            if re.fullmatch(f"[a-z]{{3,6}}{_END}", piece) and piece.removesuffix(_END) not in low
        )
        found = dict(zip(sorted(present, key=len, reverse=True), able, strict=False))
    return found


def _marked(text: str, words: Mapping[str, Vectors], marks: Marks) -> str:
    """The text with each word as its mark, once for each of its vectors; longer words come first."""
    for word, (mark, _) in marks.items():
        many = " ".join([mark] * len(next(iter(words[word].values()))))
        for start, end in reversed(places(word, text)):
            text = f"{text[:start]} {many} {text[end:]}"
    return text


def ends_of(
    chunks: Sequence[Sequence[tuple]], text: str, tokenizer: object, words: Mapping[int, str]
) -> tuple[tuple[int, ...], ...]:
    """Where in the text each token ends: the next place that reads like it, past weights and brackets."""
    special, low, here, found = set(tokenizer.all_special_ids), text.lower(), 0, []
    for chunk in chunks:
        own, before = [], None
        for token, *_ in chunk:
            if not isinstance(token, int):  # a vector of a word of somebody else's
                own.append(here)
            elif token in special:
                own.append(0)
            elif token in words:
                if token != before:
                    here = next((end for start, end in places(words[token], text) if start >= here), here)
                own.append(here)
            else:
                piece = tokenizer.decode([token]).strip().lower()
                at = low.find(piece, here) if piece else -1
                here = here if at < 0 else at + len(piece)
                lead = tokenizer.convert_ids_to_tokens(token) == _LEAD
                own.append(len(low) - len(low[here:].lstrip()) + 1 if lead else here)
            before = token if isinstance(token, int) else None
        found.append(tuple(own))
    return tuple(found)


def _put(chunk: list[tuple], vectors: Mapping[int, torch.Tensor | None], words: Mapping[int, str]) -> None:
    """Put the vectors of words in the place of their marks."""
    run = 0
    for place, (token, *rest) in enumerate(chunk):
        if not isinstance(token, int) or token not in vectors:
            run = 0
            continue
        own = vectors[token]
        if own is None:
            raise ValueError(f"The word '{words[token]}' has no embeddings for one of the text encoders of this CLIP.")
        chunk[place] = (own[run % len(own)], *rest)
        run += 1
