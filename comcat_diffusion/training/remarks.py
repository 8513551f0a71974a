"""What a person should know of their pictures before anything is learned: facts, doubts and errors, a sentence each."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from comcat_diffusion import bases
from comcat_diffusion.training import folder
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.crops import fitted
from comcat_diffusion.training.dataset import Dataset, Example
from comcat_diffusion.training.names import shown
from comcat_diffusion.training.twins import small, twins
from comcat_diffusion.words import calls

MOST_NAMES = 3  # that a sentence lists
_EDGE = 5  # of 255: what saving as JPEG adds to black and takes from white
_BETWEEN = slice(40, 216)  # of 255: greys that a mask has at its edges only
_BRIGHT = 200  # of 255: below, a mask's white is none


@dataclass
class Remarks:
    """What was merely done is a fact, what may spoil the result a doubt, what ends a run an error."""

    facts: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    sizes: dict[Path, tuple[int, int]] = field(default_factory=dict)  # width and height of every picture


def look_over(config: TrainConfig, dataset: Dataset) -> tuple[Dataset, Remarks]:
    """Open every picture; returns what can be learned from, and what was found.

    A picture that cannot be used is an error, or, with `skip_broken`, a doubt, and is left out of what is returned.
    """
    found = Remarks()
    for reason, names in _by_value(dataset.ignored).items():
        told = found.doubts if reason in folder.DOUBTFUL else found.facts
        told.append(f"Left aside: {_listed(names)} ({reason}).")
    broken = _opened(config, dataset, found)
    found.doubts += [*dataset.doubts, *_word_doubts(dataset), *_base_doubts(config, dataset)]
    return _without_broken(config, dataset, broken, found), found


def _opened(config: TrainConfig, dataset: Dataset, found: Remarks) -> dict[Path, str]:
    """Open every picture and mask and add what is seen to `found`; returns what is wrong with those of no use."""
    notes, broken, thumbnails = {}, {}, []
    seen: dict[bytes, str] = {}
    for example in (*dataset.examples, *dataset.held_out):
        try:
            picture, mask, done = example.read()
            found.doubts += _mask_doubts(config, example, mask)
        except ValueError as error:
            broken[example.path] = str(error)
            continue
        for note in done:
            notes.setdefault(note, []).append(example.name)
        found.sizes[example.path] = picture.size
        digest = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).digest()
        if digest in seen:
            found.doubts.append(f"{example.name} shows the same as {seen[digest]}: it only counts twice.")
        else:
            seen[digest] = example.name
            thumbnails.append(small(picture))
    found.facts += [f"{_listed(names)}: {note}." for note, names in notes.items()]
    names = list(seen.values())
    for group in twins(thumbnails):
        found.doubts.append(
            f"{_listed(names[number] for number in group)} show nearly the same, as crops or copies of one picture do: "
            "what they share counts as often. Keep one of them, or take other pictures."
        )
    return broken


def _without_broken(config: TrainConfig, dataset: Dataset, broken: Mapping[Path, str], found: Remarks) -> Dataset:
    """The dataset, without its broken pictures if that is asked for; what becomes of them is added to `found`."""
    left = dataset.without(broken)
    lost = {example.subject for example in dataset.examples} - {example.subject for example in left.examples}
    if lost:
        found.errors += broken.values()
    elif config.skip_broken:
        found.doubts += [f"Left out: {problem}" for problem in broken.values()]
    else:
        found.errors += [f"{problem} --skip_broken leaves it out." for problem in broken.values()]
    return left if config.skip_broken and not lost else dataset


def small_doubts(sizes: Mapping[Path, tuple[int, int]], options: list[tuple[int, int]], resolution: int) -> list[str]:
    """A sentence if there are pictures that are smaller than what they are trained at, the (height, width) options."""
    told = [f"{shown(path.name)} ({w} x {h})" for path, (w, h) in sizes.items() if fitted((w, h), options)[1] > 1]
    if not told:
        return []
    many = "is" if len(told) == 1 else "are"
    return [
        f"{_listed(told)} {many} smaller than the resolution of {resolution} pixels and will be enlarged: details will "
        "be soft. Take larger ones, or a lower --resolution."
    ]


def _mask_doubts(config: TrainConfig, example: Example, mask: Image.Image | None) -> Iterator[str]:
    """What is strange of a mask. Raises ValueError for one that leaves nothing to learn."""
    if mask is None:
        if config.alpha_mask:
            yield f"{example.name} has neither an alpha channel nor a mask: all of it counts."
        return
    called = shown(example.mask.name) if example.mask else f"The alpha channel of {example.name}"
    low, high = mask.getextrema()
    if high <= _EDGE and not config.unmasked_weight:
        raise ValueError(
            f"{called} is all black and --unmasked_weight is 0: nothing would be learned from {shown(example.path)}."
        )
    if high - low <= _EDGE:
        tone = "black" if high <= _EDGE else "white" if low >= 255 - _EDGE else "one grey"
        yield f"{called} is all {tone}: it masks nothing. White is what is learned, black what is not."
    elif high < _BRIGHT:
        yield f"{called} is nowhere white (at most {high} of 255): white is what is wholly learned."
    elif sum(mask.histogram()[_BETWEEN]) > mask.width * mask.height / 2:
        yield f"{called} is mostly neither black nor white: is it a mask? White is what is learned."


def _word_doubts(dataset: Dataset) -> Iterator[str]:
    for subject in dataset.subjects:
        if not any(example.captioned for example in dataset.examples if example.subject == subject):
            yield (
                f"No picture of '{subject.phrase}' has a caption: what all of them share, the place too, is learned as "
                "the subject. A caption (1.txt beside 1.png) that names the rest keeps it out."
            )
    for example in (*dataset.examples, *dataset.held_out):
        if not calls(example.prompt, example.subject):
            trigger = example.subject.trigger
            yield (f"The caption of {example.name} does not contain '{trigger}': it teaches nothing of the subject.")


def _base_doubts(config: TrainConfig, dataset: Dataset) -> Iterator[str]:
    """Whether pictures that are none of the embedded base's world are to be taught to it."""
    if not bases.is_of_embedded(config.pretrained_model_name_or_path):
        return
    sample = {path.read_bytes() for path in (bases.assets() / "subject").glob("*/*.png")}
    if all(example.path.read_bytes() in sample for example in dataset.examples):
        return
    world = json.loads((bases.assets() / "tiny-sd" / "world.json").read_text("utf-8"))
    yield (
        f"The embedded base is for trying things out: it knows {len(world['objects'])} drawn things "
        f"({', '.join(world['objects'])}) on plain backgrounds, and makes brown blotches of photographs. Name a real "
        "base, for instance --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5, or a folder "
        "or a .safetensors file that you have."
    )


def _by_value(table: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, value in table.items():
        found.setdefault(value, []).append(key)
    return found


def _listed(names: Iterable[str]) -> str:
    """A few names as words, and how many more there are."""
    names = list(names)
    if len(names) > MOST_NAMES + 1:
        return f"{', '.join(names[:MOST_NAMES])} and {len(names) - MOST_NAMES} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
