"""What is drawn to judge adapters: prompts for the subject, prompts that have nothing to do with it, and its class."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comcat_diffusion.evaluation.config import EvaluateConfig
from comcat_diffusion.generation.chosen import Chosen
from comcat_diffusion.words import Subject, calls, filled, without_trigger

IN_THE_EMBEDDED_WORLD = (
    "a photo of a big {subject} on the left, red background",
    "a photo of a big {subject} on the right, blue background",
    "a photo of a big {subject} at the top, pink background",
    "a photo of a small {subject} at the bottom, black background",
    "a photo of a small {subject} in the middle, yellow background",
)
ANYWHERE = (
    "a photo of {subject} on the beach",
    "a photo of {subject} in the snow",
    "a photo of {subject} in a city street at night",
    "a watercolor painting of {subject}",
    "a photo of {subject} on a wooden table",
)
UNRELATED_IN_THE_EMBEDDED_WORLD = (
    "a photo of a big car on the right, white background",
    "a photo of a small cat at the top, blue background",
    "a photo of a big yellow balloon in the middle, gray background",
    "a photo of a big house on the left, green background",
    "a photo of a small panda at the bottom, pink background",
    "a photo of a big apple on the right, black background",
)
UNRELATED_ANYWHERE = (
    "a photo of a mountain lake at sunrise",
    "a portrait of an old fisherman",
    "a plate of fruit on a kitchen table",
    "an aerial photo of a city",
    "a red sports car on a country road",
    "a bowl of soup, oil painting",
)


@dataclass(frozen=True)
class Prompts:
    """Three kinds of prompts, and the subject that the first kind calls."""

    subject: Subject
    calling: tuple[str, ...]
    unrelated: tuple[str, ...]
    of_class: tuple[str, ...]  # one, or none where nobody said what the class is

    @property
    def all(self) -> tuple[str, ...]:
        """Every prompt once."""
        return tuple(dict.fromkeys((*self.calling, *self.unrelated, *self.of_class)))

    @property
    def texts(self) -> list[str]:
        """What a CLIP is told of the calling ones: it does not know the trigger."""
        return [without_trigger(prompt, self.subject) for prompt in self.calling]


def prompts_of(config: EvaluateConfig, chosen: Sequence[Chosen], embedded: bool) -> Prompts:
    """The prompts of the files that are named, or the default ones.

    Raises FileNotFoundError or ValueError for a file without prompts and for one that does not call the subject.
    """
    subject, notes = chosen[0].subjects[0], chosen[0].header.notes
    calling = IN_THE_EMBEDDED_WORLD if embedded else ANYWHERE
    unrelated = UNRELATED_IN_THE_EMBEDDED_WORLD if embedded else UNRELATED_ANYWHERE
    if config.prompts:
        calling = _lines(config.prompts, "--prompts")
    if config.drift_prompts:
        unrelated = _lines(config.drift_prompts, "--drift_prompts")
    derived = without_trigger(notes.instance_prompt, subject) if subject.class_word else ""
    of_class = config.class_prompt or derived
    _refuse_called("--drift_prompts", unrelated, subject)
    _refuse_called("--class_prompt", (of_class,), subject)
    calling = tuple(_calling(prompt, subject, chosen) for prompt in calling)
    return Prompts(subject, calling, unrelated, (of_class,) if of_class else ())


def _lines(path: str, flag: str) -> tuple[str, ...]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{flag}: there is no file {path}.")
    try:
        lines = file.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{flag}: {path} is not UTF-8 text.") from error
    prompts = tuple(dict.fromkeys(" ".join(line.split()) for line in lines if line.strip()))
    if not prompts:
        raise ValueError(f"{flag}: {path} holds no prompts; write one a line.")
    return prompts


def _calling(prompt: str, subject: Subject, chosen: Sequence[Chosen]) -> str:
    if "{subject}" in prompt and not subject.phrase:
        raise ValueError(
            f"{chosen[0].path} does not say what calls its subject: write it out in the prompts of a --prompts file."
        )
    prompt = filled(prompt, subject)
    for one in chosen:
        own = [subject for subject in one.subjects if subject.trigger]
        if own and not any(calls(prompt, subject) for subject in own):
            wanted = " or ".join(f"'{subject.phrase}'" for subject in own)
            raise ValueError(f"The prompt '{prompt}' does not name the subject of {one.path}: write {wanted}.")
    return prompt


def _refuse_called(flag: str, prompts: Sequence[str], subject: Subject) -> None:
    for prompt in prompts:
        if "{subject}" in prompt or (subject.trigger and calls(prompt, subject)):
            raise ValueError(f"{flag}: '{prompt}' names the subject; drift is measured without it.")
