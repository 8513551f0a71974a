"""The pictures of the subject: those held out, which fidelity is measured on, and those of the training."""

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from comcat_diffusion.evaluation.config import EvaluateConfig
from comcat_diffusion.generation.chosen import Chosen
from comcat_diffusion.training import folder, images

SETTINGS = "run.toml"  # what a training run leaves beside its adapter


@dataclass(frozen=True)
class SubjectPictures:
    """What the subject looks like."""

    held_out: list[Image.Image]
    train: list[Image.Image]  # empty: nobody knows where they are
    notes: list[str]  # sentences for the report


def subject_pictures(config: EvaluateConfig, chosen: Sequence[Chosen]) -> SubjectPictures:
    """Read them all. Raises ValueError or OSError if there are none, or training pictures among the held-out ones."""
    held_out = _read(config.subject_dir, "--subject_dir")
    train, notes = {}, []
    for place, flag in _training_folders(config, chosen):
        try:
            train |= _read(place, flag)
        except (OSError, ValueError) as error:
            if flag == "--instance_data_dir":
                raise
            notes.append(f"Training pictures were not found: {error}")
    if not train:
        notes.append(
            "Where the training pictures are is not known (no --instance_data_dir, no run.toml beside the adapter), so "
            "copying was not measured, and nothing says that the held-out pictures were held out."
        )
    contents = {images.content_of(picture) for picture in train.values()}
    seen = [path.name for path, picture in held_out.items() if images.content_of(picture) in contents]
    if seen and not config.force:
        more = f" and {len(seen) - 1} more" if len(seen) > 1 else ""
        raise ValueError(
            f"--subject_dir {config.subject_dir}: {seen[0]}{more} are training pictures, and those reward copying; "
            "take others, or allow it with --force."
        )
    if seen:
        notes.append(
            f"{len(seen)} of the {len(held_out)} held-out pictures are training pictures (--force): the subject "
            "fidelity rewards copying."
        )
    return SubjectPictures(list(held_out.values()), list(train.values()), notes)


def _read(place: str | Path, flag: str) -> dict[Path, Image.Image]:
    try:
        shots = folder.find(place).shots
    except (OSError, ValueError) as error:
        raise type(error)(f"{flag}: {error}") from error
    return {shot.path: images.read(shot.path)[0] for shot in shots}


def _training_folders(config: EvaluateConfig, chosen: Sequence[Chosen]) -> Iterator[tuple[str, str]]:
    """(folder, where that is said)."""
    if config.instance_data_dir:
        yield config.instance_data_dir, "--instance_data_dir"
    places = []
    for one in chosen:
        above = one.path.expanduser().absolute().parents
        told = next((parent / SETTINGS for parent in above[:3] if (parent / SETTINGS).is_file()), None)
        if told:
            places += _folders_of(told)
    for place in dict.fromkeys(places):
        yield place, SETTINGS


def _folders_of(settings: Path) -> list[str]:
    try:
        told = tomllib.loads(settings.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return []
    found = [table.get("instance_data_dir") for table in (told, *told.get("subjects", ()))]
    return [place for place in found if place]
