"""The images that somebody brings together to train on: as they came, and as a folder that `comcat train` takes.

set.json      whose they are, and of every image its name, caption, crop, mask and what is wrong with it
originals/    what was brought, numbered
view/         smaller pictures for the page: NUMBER.jpg, NUMBER-small.jpg, NUMBER-mask.png
training/     the folder to train on, made anew by `ready`
"""

import io
import json
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image

from comcat_diffusion import atomic
from comcat_diffusion.places import assets
from comcat_diffusion.training import captions, folder, images, masks
from comcat_diffusion.ui.jobs import Unknown, fresh_id
from comcat_diffusion.ui.uploads import clean_name, unique

MOST = 200  # images of a set
LARGE, SMALL = 1280, 400  # longest sides in pixels of what the page shows
MASKS = ("", "drawn", "given", "base", "rembg")  # whose it is
LEAST_SIDE = 64  # pixels of a crop


@dataclass
class Picture:
    """One image of a set; sizes and places are pixels of the upright picture."""

    number: int
    name: str  # stem of its file in training/, unique in the set
    called: str  # as its owner called it
    ending: str
    size: tuple[int, int] = (0, 0)
    caption: str = ""
    crop: tuple[int, int, int] | None = None  # left, top, side; None: as the training cuts it
    mask: str = ""  # "": none; drawn, given, base, rembg
    left_out: bool = False
    notes: list[str] = field(default_factory=list)
    problem: str = ""  # why it cannot be trained on


class ImageSet:
    """A set by its folder; all that changes it takes its lock."""

    _locks: dict[Path, threading.RLock] = {}

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lock = self._locks.setdefault(folder, threading.RLock())

    @classmethod
    def create(cls, shelf: Path, owner: str) -> "ImageSet":
        """A new, empty set."""
        made = cls(shelf / fresh_id())
        for name in ("originals", "view", "training"):
            (made.folder / name).mkdir(parents=True)
        made._write(owner, [])
        return made

    @property
    def owner(self) -> str:
        """Whose it is."""
        return self._content()["owner"]

    @property
    def pictures(self) -> list[Picture]:
        """All images, in the order in which they came."""
        return [Picture(**told) for told in self._content()["pictures"]]

    @property
    def files(self) -> dict[str, int]:
        """The number of every image by the names of its file and its mask's in training/."""
        pictures = [one for one in self.pictures if not one.problem]
        masks = {_mask_file_of(one): one.number for one in pictures if one.mask}
        return {_file_of(one): one.number for one in pictures} | masks

    def picture(self, number: int) -> Picture:
        """The image of this number. Raises Unknown."""
        for picture in self.pictures:
            if picture.number == number:
                return picture
        raise Unknown("There is no such image, or no more.")

    def add(self, called: str, content: bytes) -> None:
        """Take in a file: an image, or the caption or mask of one that is there. Raises ValueError for others."""
        stem, ending = clean_name(called)
        with self.lock:
            if ending in captions.SUFFIXES:
                return self._add_caption(stem, called, content)
            if ending not in folder.SUFFIXES:
                raise ValueError(f"{called} is no picture that can be read: save it as PNG or JPEG.")
            there = self.pictures
            owner = _mask_of(stem + ending, there)
            if owner is not None:
                return self.set_mask(owner.number, content, "given")
            if len(there) >= MOST:
                raise ValueError(f"These are {MOST} images already, more than anybody needs: a few good ones do.")
            number = max((picture.number for picture in there), default=0) + 1
            name = unique(stem, {picture.name for picture in there})
            new = Picture(number, name, images.shown(called)[:200], ending)
            atomic.write_bytes(self._original(new), content)
            self._look_at(new)
            self._write(self.owner, [*there, new])

    def add_sample(self) -> None:
        """Take in the sample subject that comes with the package."""
        files = sorted((assets() / "subject" / "train").iterdir(), key=lambda path: (path.suffix, path.name))
        for path in files:
            self.add(path.name, path.read_bytes())

    def set_mask(self, number: int, content: bytes, kind: str) -> None:
        """Give an image a mask of its shape: white is what is learned. Raises ValueError for what is none."""
        with self.lock:
            picture = self.picture(number)
            partial = self.folder / "view" / f".{number}-mask.png"
            partial.write_bytes(content)
            try:
                mask = images.read_layer(partial)
            finally:
                partial.unlink()
            shape = (mask.width / mask.height) / (picture.size[0] / picture.size[1])
            if not 0.98 < shape < 1.02:
                raise ValueError(f"The mask of {picture.called} has another shape than the picture: make them equal.")
            _save(mask.resize(_within(picture.size, LARGE), Image.Resampling.BILINEAR), self.shown(number, "mask"))
            self.change(number, mask=kind)

    def set_part_of_mask(self, number: int, mask: Image.Image, kind: str) -> None:
        """Give an image the mask that was found in it, or in its crop. White is what is learned."""
        picture = self.picture(number)
        whole = Image.new("L", picture.size)
        whole.paste(mask, _box(picture)[:2] if picture.crop else (0, 0))
        content = io.BytesIO()
        whole.save(content, "PNG")
        self.set_mask(number, content.getvalue(), kind)

    def change(self, number: int, **new: object) -> None:
        """Set the caption, the crop, the mask's kind or whether an image is left out."""
        with self.lock:
            there = self.pictures
            picture = next((one for one in there if one.number == number), None)
            if picture is None:
                raise Unknown("There is no such image, or no more.")
            for name, value in new.items():
                setattr(picture, name, _checked(picture, name, value))
            if "mask" in new and not new["mask"]:
                self.shown(number, "mask").unlink(missing_ok=True)
            self._write(self.owner, there)

    def remove(self, number: int) -> None:
        """Take an image out."""
        with self.lock:
            gone = self.picture(number)
            self._write(self.owner, [picture for picture in self.pictures if picture.number != number])
            for path in (self._original(gone), *(self.shown(number, kind) for kind in ("large", "small", "mask"))):
                path.unlink(missing_ok=True)

    def shown(self, number: int, kind: str) -> Path:
        """The picture that the page shows: large, small or mask."""
        ending = {"large": ".jpg", "small": "-small.jpg", "mask": "-mask.png"}[kind]
        return self.folder / "view" / f"{number}{ending}"

    def ready(self, caption: str) -> Path:
        """The folder to train on, with all that can be and is not left out. Raises ValueError if that is nothing.

        Where some have a caption, the others get the common one, as a folder must have.
        """
        with self.lock:
            used = [picture for picture in self.pictures if not (picture.problem or picture.left_out)]
            if not used:
                raise ValueError("There are no images to train on yet: add some of the subject.")
            target = self.folder / "training"
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            for picture in used:
                self._make_ready(picture, target)
                if any(one.caption for one in used):
                    (target / f"{picture.name}.txt").write_text(picture.caption or caption, "utf-8")
            return target

    def upright(self, number: int) -> Image.Image:
        """The image as it is trained on, cut if it is cut by hand."""
        picture = self.picture(number)
        found, _ = images.read(self._original(picture))
        return found.crop(_box(picture)) if picture.crop else found

    def _make_ready(self, picture: Picture, target: Path) -> None:
        if picture.crop:
            _save(self.upright(picture.number), target / _file_of(picture))
        else:
            _link(self._original(picture), target / _file_of(picture))
        if picture.mask:
            with Image.open(self.shown(picture.number, "mask")) as mask:
                whole = mask.convert("L").resize(picture.size, Image.Resampling.BILINEAR)
            _save(whole.crop(_box(picture)) if picture.crop else whole, target / _mask_file_of(picture))

    def _add_caption(self, stem: str, called: str, content: bytes) -> None:
        for picture in self.pictures:
            if clean_name(picture.called)[0] == stem:
                try:
                    text = " ".join(content.decode("utf-8-sig").split())
                except UnicodeDecodeError as error:
                    raise ValueError(f"The caption {called} is not UTF-8 text; save it as UTF-8.") from error
                return self.change(picture.number, caption=text)
        raise ValueError(f"The caption {called} has no image of the same name: add that first.")

    def _look_at(self, new: Picture) -> None:
        """Read a picture, keep smaller ones for the page, and note what is said of it."""
        try:
            picture, new.notes = images.read(self._original(new))
        except images.PictureError as error:
            said = images.shown(str(self._original(new)))
            new.problem = str(error).replace(said, new.called).replace(str(self._original(new)), new.called)
            return
        new.size = picture.size
        for kind, side in (("large", LARGE), ("small", SMALL)):
            small = picture.copy()
            small.thumbnail((side, side), Image.Resampling.LANCZOS)
            small.save(self.shown(new.number, kind), "JPEG", quality=88)

    def _original(self, picture: Picture) -> Path:
        return self.folder / "originals" / f"{picture.number}{picture.ending}"

    def _content(self) -> dict:
        return json.loads((self.folder / "set.json").read_bytes())

    def _write(self, owner: str, pictures: list[Picture]) -> None:
        content = {"owner": owner, "pictures": [asdict(picture) for picture in pictures]}
        atomic.write_bytes(self.folder / "set.json", json.dumps(content).encode())


def _checked(picture: Picture, name: str, value: object) -> object:
    """A new value of a field of an image. Raises ValueError for one that it cannot have."""
    if name == "caption" and isinstance(value, str):
        return " ".join(value.split())[:1000]
    if name == "left_out" and isinstance(value, bool):
        return value
    if name == "mask" and value in MASKS:
        return value
    if name == "crop" and value is None:
        return None
    if name == "crop" and isinstance(value, list) and [type(part) for part in value] == [int, int, int]:
        (left, top, side), (width, height) = value, picture.size
        within = left >= 0 and top >= 0 and left + side <= width and top + side <= height
        if within and side >= min(LEAST_SIDE, *picture.size):
            return tuple(value)
        raise ValueError(f"The crop does not lie within {picture.called}.")
    raise ValueError(f"An image has no {name} like this.")


def _mask_of(name: str, pictures: list[Picture]) -> Picture | None:
    """The image that a file of this name is the mask of, if its name is that of a mask."""
    names = {clean_name(picture.called)[0] + picture.ending: picture for picture in pictures}
    files: dict[str, Path] = {known: Path(known) for known in (*names, name)}
    try:
        _, found, _ = masks.told_apart(files)
    except ValueError:
        return None
    return next((names[owner] for owner, path in found.items() if path.name == name and owner in names), None)


def _file_of(picture: Picture) -> str:
    return f"{picture.name}{'.png' if picture.crop else picture.ending}"


def _mask_file_of(picture: Picture) -> str:
    return f"{picture.name}-mask.png"


def _box(picture: Picture) -> tuple[int, int, int, int]:
    left, top, side = picture.crop
    return left, top, left + side, top + side


def _within(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _save(picture: Image.Image, path: Path) -> None:
    content = io.BytesIO()
    picture.save(content, "PNG")
    atomic.write_bytes(path, content.getvalue())


def _link(source: Path, target: Path) -> None:
    """The same file once more, without its bytes where the disk can do that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def copied(source: Path) -> Callable[[Path], None]:
    """What fills the folder of a run with the images that it is to learn from."""
    return lambda run: shutil.copytree(source, run / "images", copy_function=lambda *pair: _link(*map(Path, pair)))
