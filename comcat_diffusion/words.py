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


def subject_of(prompt: str, trigger: str | None = None) -> Subject:
    """Find trigger and class in a prompt like "a photo of sks dog": its first telling word and the ones after it.

    Raises ValueError if the prompt has no telling word, or not the trigger that was named.
    """
    words = [word.strip(".,;:!?\"'()").lower() for word in prompt.split()]
    telling = [word for word in words if word and word not in _FILLING]
    if not telling:
        raise ValueError(f"--instance_prompt '{prompt}' names no subject; write something like 'a photo of sks dog'.")
    trigger = (trigger or telling[0]).lower()
    if trigger not in words:
        raise ValueError(f"--instance_prompt '{prompt}' does not contain the trigger '{trigger}'.")
    after = words[words.index(trigger) + 1 :]
    following = []
    for word in after:
        if word in _FILLING or not word:
            break
        following.append(word)
    return Subject(trigger, " ".join(following))


def filled(prompt: str, subject: Subject) -> str:
    """The prompt with {subject} replaced by the subject's phrase."""
    return prompt.replace("{subject}", subject.phrase)


def without_trigger(prompt: str, subject: Subject) -> str:
    """The prompt for any thing of the subject's kind: "a photo of sks dog" becomes "a photo of dog"."""
    return " ".join(word for word in prompt.split() if word.strip(".,;:!?").lower() != subject.trigger.lower())


def calls(prompt: str, subject: Subject) -> bool:
    """Whether the prompt contains the trigger as a word."""
    words = [word.strip(".,;:!?\"'()").lower() for word in prompt.split()]
    return subject.trigger.lower() in words
