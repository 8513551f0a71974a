"""The words that call a subject: a trigger, which nobody else uses, and the word for what kind of thing it is."""

from dataclasses import dataclass

_FILLING = frozenset(
    (
        "a an the of on in at with and my this that photo picture image drawing painting rendering portrait close-up "
        "closeup one good cropped bright dark clean nice small big large"
    ).split()
)


@dataclass(frozen=True)
class Subject:
    """The trigger and the class word; `phrase` is how a prompt names the subject."""

    trigger: str
    class_word: str

    @property
    def phrase(self) -> str:
        """For instance "sks dog"."""
        return f"{self.trigger} {self.class_word}".strip()


_MARKS = ".,;:!?\"'()"
_ENDING = tuple(".,;:!?")  # after which words are no longer about the subject


def words_in(prompt: str) -> list[str]:
    """The words of a prompt, in small letters, without the marks around them."""
    return [word.strip(_MARKS).lower() for word in prompt.split()]


def subject_of(prompt: str, trigger: str | None = None) -> Subject:
    """Find trigger and class in a prompt like "a photo of sks dog": its first telling word and the ones after it.

    Raises ValueError if the prompt has no telling word, or not the trigger that was named.
    """
    words = words_in(prompt)
    telling = [word for word in words if word and word not in _FILLING]
    if not telling:
        raise ValueError(f"--instance_prompt '{prompt}' names no subject; write something like 'a photo of sks dog'.")
    trigger = (trigger or telling[0]).lower()
    if trigger not in words:
        raise ValueError(f"--instance_prompt '{prompt}' does not contain the trigger '{trigger}'.")
    start = words.index(trigger)
    following = []
    for before, word in zip(prompt.split()[start:], words[start + 1 :], strict=False):
        if before.endswith(_ENDING) or word in _FILLING or not word:
            break
        following.append(word)
    return Subject(trigger, " ".join(following))


def filled(prompt: str, subject: Subject) -> str:
    """The prompt with {subject} replaced by the subject's phrase."""
    return prompt.replace("{subject}", subject.phrase)


def without_trigger(prompt: str, subject: Subject) -> str:
    """The prompt for any thing of the subject's kind: "a photo of sks dog" becomes "a photo of dog"."""
    pairs = zip(prompt.split(), words_in(prompt), strict=True)
    return " ".join(written for written, word in pairs if word != subject.trigger.lower())


def calls(prompt: str, subject: Subject) -> bool:
    """Whether the prompt contains the trigger as a word."""
    return subject.trigger.lower() in words_in(prompt)
