"""Folders of pictures as batches for a classifier: found in any nesting, labelled by folder, read when they are due.

Letters: B pictures of a batch, h and w what the model's image processor makes of them.
"""

import random
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from comcat_diffusion.training import images
from comcat_diffusion.training.folder import SUFFIXES

if typing.TYPE_CHECKING:
    import torch

LEAST = 0.5  # of the shorter side that a square cut at random has
Processor = Callable[..., Mapping[str, "torch.Tensor"]]  # of transformers


@dataclass(frozen=True)
class Shot:
    """One picture, and its class where that is known."""

    path: Path
    label: int | None = None


def folder_of(name: str | Path, flag: str) -> Path:
    """The folder of this name. Raises FileNotFoundError if there is none."""
    folder = Path(name).expanduser()
    if not folder.is_dir():
        problem = "is a file; give the folder that holds it" if folder.exists() else "is no folder"
        raise FileNotFoundError(f"--{flag} {folder} {problem}.")
    return folder


def find(folder: str | Path, flag: str) -> list[Shot]:
    """Every picture below a folder, in order of path. Raises FileNotFoundError or ValueError if there is none."""
    folder = folder_of(folder, flag)
    found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    shown = sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    if not shown:
        raise ValueError(f"--{flag} {folder} holds no pictures ({', '.join(SUFFIXES)}).")
    return [Shot(path) for path in shown]


def find_labelled(folder: str | Path, flag: str, classes: Mapping[str, int], count: int) -> list[Shot]:
    """Every picture of a folder of folders, the class being that of the outermost folder; `count` classes there are.

    Raises FileNotFoundError or ValueError if there is no picture, or a folder is no class of the classifier.
    """
    root = Path(folder).expanduser()
    shots = find(root, flag)
    inner = [shot.path.relative_to(root).parts for shot in shots]
    loose = [shot.path for shot, parts in zip(shots, inner, strict=True) if len(parts) == 1]
    if loose:
        raise ValueError(f"{loose[0]} lies in no folder of a class: --{flag} takes one folder per class.")
    labels = labels_of(sorted({parts[0] for parts in inner}), f"--{flag} {root}", classes, count)
    return [Shot(shot.path, labels[parts[0]]) for shot, parts in zip(shots, inner, strict=True)]


def labels_of(names: Sequence[str], where: str, classes: Mapping[str, int], count: int) -> dict[str, int]:
    """The class of every folder: by the classifier's own names, by number, or, if all are there, in sorted order.

    Raises ValueError for a folder that is no class; a guess would be a wrong top-1.
    """
    if any(name in classes for name in names):
        labels = {name: int(classes[name]) for name in names if name in classes}
    elif all(name.isdecimal() for name in names):
        labels = {name: int(name) for name in names}
    elif len(names) == count:
        labels = {name: place for place, name in enumerate(sorted(names))}
    else:
        known = ", ".join(list(classes)[:2])
        raise ValueError(
            f"{where} has {len(names)} folders, none of a name that the classifier knows ({known}, ...); for "
            f"its {count} classes in sorted order there must be {count}."
        )
    outside = [name for name in names if not 0 <= labels.get(name, -1) < count]
    if outside:
        raise ValueError(f"The folder '{outside[0]}' of {where} is none of the classifier's {count} classes.")
    return labels


def chosen(shots: Sequence[Shot], count: int, seed: int) -> list[Shot]:
    """So many of them at random, or all if there are fewer."""
    return random.Random(seed).sample(shots, min(count, len(shots)))


def refuse_unreadable(shots: Sequence[Shot]) -> None:
    """Raises ValueError, naming the file, if one does not begin as a picture does: better now than after an hour."""
    for shot in shots:
        try:
            Image.open(shot.path).close()
        except (OSError, SyntaxError, Image.DecompressionBombError):
            images.read(shot.path)  # which says what is wrong


def square(picture: Image.Image, chance: random.Random) -> Image.Image:
    """A square of half to all of the shorter side, anywhere in the picture."""
    side = max(1, round(min(picture.size) * chance.uniform(LEAST, 1)))
    left, top = (chance.randint(0, length - side) for length in picture.size)
    return picture.crop((left, top, left + side, top + side))


class Batches(Sequence):
    """Batches of pictures, and labels where they are known, made when they are asked for; `epochs` passes of them.

    With a seed, every pass has its own order and, `cropped`, its own square of every picture.
    """

    def __init__(
        self, shots: Sequence[Shot], size: int, processor: Processor, epochs: int = 1, seed: int | None = None,
        cropped: bool = False,
    ) -> None:  # fmt: skip
        self.shots, self.size, self.processor, self.epochs, self.seed = list(shots), size, processor, epochs, seed
        self.each = -(-len(self.shots) // size)  # batches a pass
        self.cropped, self._order = cropped, (None, [])

    def __len__(self) -> int:
        return self.epochs * self.each

    def __getitem__(self, index: int) -> dict[str, "torch.Tensor"]:
        """pixel_values (B, 3, h, w) and labels (B,). Raises ValueError, naming the file, for one that is no picture."""
        import torch  # which folders are not looked at with: what is wrong with them is known before

        if not 0 <= index < len(self):
            raise IndexError(index)
        epoch, place = divmod(index, self.each)
        numbers = self._ordered(epoch)[place * self.size : (place + 1) * self.size]
        part = [self.shots[number] for number in numbers]
        pictures = [images.read(shot.path)[0] for shot in part]
        if self.cropped:
            chances = [random.Random(f"{self.seed} {epoch} {number}") for number in numbers]
            pictures = [square(*pair) for pair in zip(pictures, chances, strict=True)]
        pixels = self.processor(pictures, return_tensors="pt")["pixel_values"]
        labelled = part[0].label is not None
        return {"pixel_values": pixels} | ({"labels": torch.tensor([s.label for s in part])} if labelled else {})

    def _ordered(self, epoch: int) -> Sequence[int]:
        if self.seed is None:
            return range(len(self.shots))
        if self._order[0] != epoch:
            order = list(range(len(self.shots)))
            random.Random(f"{self.seed} {epoch}").shuffle(order)
            self._order = (epoch, order)
        return self._order[1]
