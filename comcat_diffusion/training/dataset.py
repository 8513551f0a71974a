"""What is to be learned: the pictures of every subject with their prompts, read and checked before a base is loaded."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageChops

from comcat_diffusion.training import backgrounds, folder, images
from comcat_diffusion.training.config import SubjectConfig, TrainConfig
from comcat_diffusion.training.names import shown
from comcat_diffusion.words import Subject, calls, is_thing, subject_of


@dataclass(frozen=True)
class Example:
    """One picture to learn from."""

    path: Path
    prompt: str
    subject: Subject
    mask: Path | None = None
    alpha_mask: bool = False
    repeats: int = 1
    captioned: bool = False  # or the prompt is that of all the subject's pictures
    plain: str | None = None  # the prompt of all, of a picture with a caption of its own
    background: str | None = None  # that it is set before, see backgrounds.py; None: its own

    @property
    def name(self) -> str:
        """The picture's name as it is shown, the same wherever its folder lies and whichever system wrote it."""
        return shown(self.path.name)

    @property
    def digest(self) -> str:
        """A hash over picture, mask, prompt and repeats: what a resumed run must have the same of."""
        digest = hashlib.sha256(f"{self.name} {self.prompt} {self.repeats} ".encode())
        for path in filter(None, (self.path, self.mask)):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def read(self) -> tuple[Image.Image, Image.Image | None, list[str]]:
        """The picture, its mask, and what had to be done to it. Raises ValueError, naming the file."""
        picture, notes = images.read(self.path)
        mask = self._mask(picture.size)
        if self.background:
            picture, found = backgrounds.before(backgrounds.reduced(picture), self.background)
            mask = ImageChops.multiply(found, backgrounds.reduced(mask)) if mask else found
        return picture, mask, notes

    def _mask(self, size: tuple[int, int]) -> Image.Image | None:
        """What somebody has masked of the picture, which has this size."""
        if self.mask:
            return images.read_mask(self.mask, size)
        return images.read_alpha(self.path) if self.alpha_mask else None


@dataclass(frozen=True)
class Dataset:
    """Everything that a run learns from and everything that it is judged on."""

    examples: tuple[Example, ...]
    held_out: tuple[Example, ...]
    subjects: tuple[Subject, ...]
    ignored: dict[str, str]
    doubts: tuple[str, ...] = ()  # of the folders' files

    def without(self, left_out: Iterable[Path]) -> "Dataset":
        """All but the pictures of these paths."""
        gone = set(left_out)
        examples, held_out = (tuple(e for e in kept if e.path not in gone) for kept in (self.examples, self.held_out))
        return replace(self, examples=examples, held_out=held_out)


def read_dataset(config: TrainConfig) -> Dataset:
    """List the examples of all subjects; pictures are opened by `look_over` and later. Raises ValueError or OSError."""
    examples, subjects, ignored, doubts = [], [], {}, []
    for one in config.all_subjects():
        subject = subject_of(one.prompt or one.trigger, one.trigger, one.class_word)
        if subject.trigger in {other.trigger for other in subjects}:
            raise ValueError(f"Two subjects have the trigger '{subject.trigger}'; give each a word of its own.")
        found = folder.find(one.instance_data_dir)
        own = [_example(shot, one, subject, config) for shot in found.shots]
        if not any(calls(example.prompt, subject) for example in own):
            raise ValueError(
                f"No caption in {shown(one.instance_data_dir)} contains '{subject.trigger}': nothing would be learned "
                "of it. Write it into them, or take them out to learn from the --instance_prompt alone."
            )
        examples += own
        ignored |= found.ignored
        doubts += found.doubts
        subjects.append(subject)
    examples, held_out = _split(config, examples)
    if config.validation_data_dir:
        one = config.all_subjects()[0]
        found = folder.find(config.validation_data_dir)
        held_out += [_example(shot, one, subjects[0], config) for shot in found.shots]
        doubts += found.doubts
    return Dataset(tuple(examples), tuple(held_out), tuple(subjects), ignored, tuple(doubts))


def _example(shot: folder.Shot, one: SubjectConfig, subject: Subject, config: TrainConfig) -> Example:
    prompt = shot.caption or one.prompt
    if not prompt:
        raise ValueError(f"{shown(shot.path)} has no caption and there is no --instance_prompt: write one of the two.")
    plain = (one.prompt or f"a photo of {subject.phrase}") if shot.caption else None
    return Example(shot.path, prompt, subject, shot.mask, config.alpha_mask, one.repeats, bool(shot.caption), plain)


def before_others(examples: Sequence[Example]) -> list[Example]:
    """The examples of things on plain backgrounds once more, before others that their prompts name.

    Raises ValueError, naming the file, for a picture that cannot be read.
    """
    found = []
    for number, example in enumerate(examples):
        names = backgrounds.others(example.read()[0], number) if is_thing(example.subject) else []
        said = example.plain or example.prompt  # a caption may tell of the background that is there no more
        found += [replace(example, prompt=f"{said}, {n} background", plain=None, background=n) for n in names]
    return found


def _split(config: TrainConfig, examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Keep a fraction of the pictures out of the training, chosen by their names so that new pictures move none."""
    count = round(len(examples) * config.validation_fraction)
    if not config.validation_fraction:
        return examples, []
    if not 0 < count < len(examples):
        raise ValueError(
            f"--validation_fraction {config.validation_fraction} of {len(examples)} pictures leaves {count} to judge "
            f"by and {len(examples) - count} to learn from: choose another one or name a --validation_data_dir."
        )
    names = sorted(examples, key=lambda e: hashlib.sha256(f"{config.seed} {e.name}".encode()).digest())
    kept_out = {example.path for example in names[:count]}
    learned, judged = [e for e in examples if e.path not in kept_out], [e for e in examples if e.path in kept_out]
    for subject in {e.subject for e in judged} - {e.subject for e in learned}:
        raise ValueError(
            f"--validation_fraction {config.validation_fraction} keeps out all pictures of '{subject.phrase}': choose "
            "another one, or name a --validation_data_dir."
        )
    return learned, judged
