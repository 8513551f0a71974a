"""Which files of a folder are masks of others, by their names.

Tools name a mask after its picture in many ways: `1-mask.png`, `1_mask.png`, `1.mask.png`, `1-masklabel.png`,
`1_mask001.png`, `mask_1.png`, or like the picture itself in a folder `masks`. Case does not matter.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from comcat_diffusion.training.names import Owners, shown, stem

FOLDERS = ("mask", "masks")  # inside the folder of the pictures
_MARK = r"[\s\-_.,()\[\]#]"
_MARKS = rf"{_MARK}*"
_WORD = rf"masks?{_MARKS}(?:labels?)?"
_OTHERS = rf"(?<={_MARK})(?:matte|segmentation|seg|alpha)"  # words that also end other words
_AFTER = re.compile(rf"(?P<of>.+?)(?:{_WORD}|{_OTHERS}){_MARKS}\d*{_MARKS}", re.IGNORECASE)
_BEFORE = re.compile(rf"{_WORD}(?P<of>.+)", re.IGNORECASE)
_PLAIN = re.compile(rf".*{_MARK}{_WORD}{_MARKS}\d*{_MARKS}", re.IGNORECASE)  # nobody calls a photo of a dog so
_ALIKE = re.compile(rf"(?<![^\W\d_]){_WORD}(?![^\W\d_])", re.IGNORECASE)  # as a word of its own


def told_apart(
    images: Mapping[str, Path], beside: Iterable[Path] = ()
) -> tuple[dict[str, Path], dict[str, Path], list[str]]:
    """The pictures and the masks, both by the picture's name, among the image files of a folder; and doubts.

    `beside` are the files of its folder of masks. Raises ValueError for a mask of no picture or of several, and for a
    second mask of one. Where all files are named like masks, masks are what was photographed: that is a doubt.
    """
    pictures = {name: path for name, path in images.items() if not list(_called(name))}
    owners, masks, lonely = Owners(pictures), {}, []
    for name in sorted(images.keys() - pictures.keys(), key=lambda name: (len(stem(name)), name)):
        owner = _owner(_called(name), owners, images[name])
        if owner is not None:
            _add(masks, owner, images[name])
            continue
        lonely += [name] if _PLAIN.fullmatch(stem(name)) else []
        pictures[name] = images[name]
        owners = Owners(pictures)
    for path in beside:
        owner = _owner((path.name, stem(path.name), *_called(path.name)), owners, path)
        if owner is None:
            raise _lonely(path, stem(path.name))
        _add(masks, owner, path)
    if lonely and len(lonely) < len(pictures):
        raise _lonely(images[lonely[0]], next(_called(lonely[0])))
    alike = [shown(name) for name in images if name in pictures and _ALIKE.search(stem(name))]
    told = [f"Learned as pictures, though named like masks: {', '.join(alike[:3])}."] if alike else []
    return {name: pictures[name] for name in images if name in pictures}, masks, told


def _called(name: str) -> Iterator[str]:
    """What the picture may be called, with or without its ending, that a file of this name is a mask of."""
    after, before = _AFTER.fullmatch(stem(name)), _BEFORE.fullmatch(stem(name))
    if after:
        rest = re.sub(f"{_MARK}+$", "", after["of"])
        yield from (after["of"][:end] for end in range(len(rest), len(after["of"]) + 1))
    if before:
        rest = re.sub(f"^{_MARK}+", "", before["of"])
        yield from (before["of"][start:] for start in range(len(before["of"]) - len(rest), -1, -1))


def _owner(called: Iterable[str], owners: Owners, path: Path) -> str | None:
    return next(filter(None, (owners.only(name, f"The mask {shown(path)}") for name in called)), None)


def _add(masks: dict[str, Path], owner: str, path: Path) -> None:
    if owner in masks:
        raise ValueError(f"{shown(owner)} has two masks, {shown(masks[owner])} and {shown(path)}: keep one of them.")
    masks[owner] = path


def _lonely(path: Path, of: str) -> ValueError:
    return ValueError(f"The mask {shown(path)} has no picture {shown(of)}: rename it or take it out.")
