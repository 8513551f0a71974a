"""The adapters that a user names: a file each, its scale, what it says of itself; and what a picture says of them.

Nothing here imports torch: what headers and words say is known before anything is waited for.
"""

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from comcat_diffusion.adapters.header import Header, called_by, read_adapter, subjects_of
from comcat_diffusion.config import BaseSettings, weighted
from comcat_diffusion.places import asked_name
from comcat_diffusion.words import Subject


@dataclass(frozen=True)
class Chosen:
    """An adapter as the user named it: the file, its scale, and what it says of itself."""

    path: Path
    scale: float
    header: Header

    @property
    def subjects(self) -> list[Subject]:
        """The words that call what it learned."""
        return subjects_of(self.header)

    @property
    def words(self) -> list[str]:
        """What its subjects are called by in prompts: as its notes say, else the words that it waits for."""
        return called_by(self.header)

    @functools.cached_property
    def sha256(self) -> str:
        """A hash of the file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


def choose(text: str, default_scale: float) -> Chosen:
    """The adapter of `dog.safetensors` or `dog.safetensors:0.8`. Raises ValueError, AdapterFileError among them."""
    path, scale = weighted(text, default_scale)
    return Chosen(Path(path), scale, read_adapter(path))


def base_of(config: BaseSettings, chosen: list[Chosen]) -> str:
    """The base that is asked for, or the one that the first adapter was trained on."""
    return asked_name(config, chosen[0].header.base_model if chosen else None)


def files_of(chosen: list[Chosen]) -> list[dict]:
    """The adapters as a picture names them."""
    return [{"file": one.path.name, "sha256": one.sha256, "scale": one.scale} for one in chosen]
