"""The words that call a subject: a trigger, which nobody else uses, and the word for what kind of thing it is."""

import functools
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Words that stand around a subject and are never one: articles, pronouns, prepositions and what things do.
_FILLING = frozenset(
    (
        "a an the of on in at with and or by from to for as is are be this that these those my our your his her "
        "its their some any one two three no not very beside behind under over near next inside into onto out up "
        "down between sitting standing lying running walking sleeping eating playing wearing holding riding flying "
        "swimming jumping looking smiling made ein eine einen einem einer der die das den dem des von vom mit und "
        "auf im am mein meine meinem meiner unser unsere un une le la les l du de des d mon ma mes notre nos sur "
        "avec et dans el los las uno una unos unas del al mi mis nuestro nuestra con y en sobre il lo gli i di da "
        "mio mia nostro nostra e sul su um uma o os as do dos da das meu minha nosso nossa com em een het van mijn "
        "ons onze met op"
    ).split()
)
_STYLES = frozenset("style painting drawing artwork aesthetic pattern texture".split())  # classes that are no things
_OF = frozenset("of von vom de du des d del di do da dos das van".split())  # before it stands a kind of picture
_MARKS = ".,;:!?\"'()[]{}<>*_«»„“”‘’"
_ENDING = tuple(".,;:!?")  # after which words are no longer about the subject
_CLAUSES = re.compile(r"(.*[,;.:!?])?", re.DOTALL)  # those that are over where a text ends
_PIECE = re.compile(r"<[^<>\s]+>[.,;:!?]*|[^\s,;:()\[\]{}/\"]+[.,;:!?)\"]*")  # a word and the marks behind it
_UNHEARD = re.compile(r"[bcdfghjkmpqstvwz]x|j[b-df-hj-np-tv-z]|q[^u]")  # as in ohwx, and in hardly any word
_LETTER = r"[^\W_]|[\u0300-\u036f]"  # of a word, digits and accents that stand apart among them


@dataclass(frozen=True)
class Subject:
    """The trigger and the class word; `phrase` is how a prompt names the subject."""

    trigger: str
    class_word: str

    @property
    def phrase(self) -> str:
        """For instance "sks dog"."""
        return f"{self.trigger} {self.class_word}".strip()


def words_of(subjects: Iterable[Subject]) -> list[str]:
    """What subjects are called by in prompts, with and without the class."""
    return [words for subject in subjects for words in (subject.phrase, subject.trigger) if words]


def places(word: str, text: str) -> list[tuple[int, int]]:
    """Where a word stands in a text, (start, end) each, in small or capital letters.

    A word ends where no letter or digit follows: "sks" is in "a,sks", "(sks:1.2)", "sks's" and "sks-teddy", and not in
    "masks" or "sks1". The gate, prompts, captions and `comcat validate` all ask here.
    """
    return [found.span() for found in _pattern(word).finditer(unicodedata.normalize("NFC", text))]


@functools.lru_cache(maxsize=256)
def _pattern(word: str) -> re.Pattern:
    parts = unicodedata.normalize("NFC", word).split()
    before = rf"(?<!{_LETTER.replace('|', ')(?<!')})" if parts and re.match(_LETTER, parts[0][0]) else ""
    after = rf"(?!{_LETTER})" if parts and re.match(_LETTER, parts[-1][-1]) else ""
    return re.compile(before + r"\s+".join(map(re.escape, parts)) + after, re.IGNORECASE)


def subject_of(prompt: str, trigger: str | None = None, class_word: str | None = None) -> Subject:
    """Find trigger and class in a prompt like "a photo of sks dog": a word that is none of the everyday ones, and what
    stands behind it.

    Raises ValueError if there is no such word, or several, or not the trigger that was named.
    """
    if trigger is None:
        trigger = _guessed(prompt, _words(prompt))
    found = places(trigger, prompt)
    if not found:
        raise ValueError(f"--instance_prompt '{prompt}' does not contain the trigger '{trigger}'.")
    if class_word is None:
        class_word = _class_after(unicodedata.normalize("NFC", prompt)[found[0][1] :])
    return Subject(trigger.lower(), class_word.strip().lower())


@dataclass(frozen=True)
class _Word:
    """A word as it is written, and in small letters without the marks around it."""

    written: str
    plain: str

    @classmethod
    def of(cls, written: str) -> "_Word":
        plain = unicodedata.normalize("NFC", written).strip(_MARKS).lower()
        if written.startswith("<"):  # the marks around a learned word are its own
            return cls(written, written.rstrip("".join(_ENDING)).lower())
        return cls(written, re.sub(r"['’]s$", "", plain))

    @property
    def telling(self) -> bool:
        return bool(self.plain) and self.plain not in _FILLING

    @property
    def own(self) -> bool:
        """Whether it can be one subject's alone."""
        return self.telling and not is_everyday(self.plain) and any(letter.isalpha() for letter in self.plain)

    @property
    def ends(self) -> bool:
        """Whether what follows is no longer about it."""
        return self.written.endswith(_ENDING)

    @property
    def odd(self) -> bool:
        """Whether nobody would take it for a word: sks, zwx, p3rson, <my-cat>."""
        letters = unicodedata.normalize("NFD", self.plain)
        return not letters.isalpha() or not set(letters) & set("aeiouy") or bool(_UNHEARD.search(letters))


def _words(prompt: str) -> list[_Word]:
    """The words of a prompt; "sks-teddy" is two, "close-up" is one."""
    found = []
    for piece in _PIECE.findall(prompt):
        word = _Word.of(piece)
        whole = is_everyday(word.plain) or piece.startswith("<")
        parts = [word] if whole else [_Word.of(part) for part in re.split("(?<=.)-(?=.)", piece)]
        found += [part for part in parts if part.plain]
    return found


def is_everyday(word: str) -> bool:
    """Whether a word says what many things are, so that a base knows it well."""
    return word.lower() in _everyday() | _FILLING or word.isdigit() or (len(word) == 1 and word.isascii())


def is_style(class_word: str) -> bool:
    """Whether a class is none of things, which have a place in a picture, but a way of all of it."""
    return bool(_STYLES.intersection(class_word.lower().split()[-1:]))


def is_thing(subject: Subject) -> bool:
    """Whether a subject has a name and a place in a picture: a style has all of the picture."""
    return bool(subject.class_word) and not is_style(subject.class_word)


@functools.cache
def _everyday() -> frozenset[str]:
    lines = Path(__file__).with_name("everyday.txt").read_text("utf-8").splitlines()
    return frozenset(word for line in lines if not line.startswith("#") for word in line.split())


def _guessed(prompt: str, words: list[_Word]) -> str:
    """The one word that can be the trigger. What stands before "of" is a kind of picture, however rare."""
    following = [*words[1:], _Word("", "")]
    able = [index for index, word in enumerate(words) if word.own and following[index].plain not in _OF]
    odd = [index for index in able if words[index].odd]
    first = [index for index in able if index - 1 not in able or words[index - 1].ends]  # sks in "sks corgi"
    named = [index for index in first if following[index].telling and not words[index].ends]
    for narrower in (odd, first, named):
        row = [index for index in able if narrower and index - len(able) < narrower[0] <= index]
        if len(narrower) == 1 and (narrower is odd or len(row) < 3):
            return words[narrower[0]].plain
    kinds = [word.plain for index, word in enumerate(words) if word.telling and following[index].plain not in _OF]
    kind = kinds[-1] if kinds and not able else "dog"
    if able:
        why = f"may call the subject {' or '.join(repr(words[index].plain) for index in able)}"
    elif kinds:
        why = f"has no word that is the subject's alone ('{kind}' is any {kind}'s)"
    else:
        why = "names no subject"
    raise ValueError(
        f"--instance_prompt '{prompt}' {why}; write something like 'a photo of sks {kind}', or name them: "
        f"--trigger sks --class_word {kind}."
    )


def _class_after(text: str) -> str:
    """What kind of thing it is: the telling words that a text begins with, up to a mark that ends the phrase."""
    following = []
    text = re.sub(r"^:[\d.]+", "", text)  # the weight in (sks:1.2)
    behind = "" if text.startswith(_ENDING) else re.sub(r"^(['’]s\b|[^\w\s]+)*", "", text)
    for word in map(_Word.of, _PIECE.findall(behind)):
        if not word.telling:
            break
        following.append(word.plain)
        if word.ends:
            break
    return " ".join(following)


def filled(prompt: str, subject: Subject) -> str:
    """The prompt with {subject} replaced by the subject's phrase."""
    return prompt.replace("{subject}", subject.phrase)


def without_trigger(prompt: str, subject: Subject) -> str:
    """The prompt for any thing of the subject's kind: "a photo of sks dog" becomes "a photo of dog"."""
    text = unicodedata.normalize("NFC", prompt)
    for start, end in reversed(places(subject.trigger, text)):
        text = text[:start] + "\0" + text[end:]
    kept = []
    for chunk in text.split():
        rest = chunk.replace("\0", "").strip(_MARKS + "-")
        if "\0" not in chunk:
            kept.append(chunk)
        elif len(re.findall(r"[^\W\d_]", rest)) > 1:  # "sks-teddy" leaves teddy, "(sks:1.2)" and "sks's" leave nothing
            kept.append(rest)
    return " ".join(kept)


def says_more(prompt: str, names: Iterable[str]) -> bool:
    """Whether a prompt says more than the subject that one of these names calls: behind it, or in another clause.

    "a photo of sks dog" does not, and leaves open what is around it; "sks dog in the snow" and "snow, sks dog" do.
    """
    text = unicodedata.normalize("NFC", prompt)
    found = [place for name in names for place in places(name, text)]
    if not found:
        return False
    before, behind = text[: min(start for start, _ in found)], text[max(end for _, end in found) :]
    return any(any(map(str.isalpha, rest)) for rest in (_CLAUSES.match(before)[0], behind))


def calls(prompt: str, subject: Subject) -> bool:
    """Whether the prompt contains the trigger as a word."""
    return bool(places(subject.trigger, prompt))
