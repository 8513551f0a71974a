"""The adapters that the page knows: of its runs, brought to it, and of folders that it may name; a card for each."""

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

from comcat_diffusion import atomic
from comcat_diffusion.adapters.header import AdapterFileError, Header, kind_of, picture_of, read_adapter
from comcat_diffusion.export.fit import is_exact, waits
from comcat_diffusion.places import is_embedded, public_name
from comcat_diffusion.ui import bases_here, presets
from comcat_diffusion.ui.jobs import Unknown
from comcat_diffusion.ui.uploads import clean_name, unique
from comcat_diffusion.words import is_style

FOLDER = "adapters"  # of those that were brought, inside the page's folder


def files_here(folder: Path, allowed: list[Path]) -> dict[str, Path]:
    """Every adapter file by its id, the newest first."""
    found = {f"{path.parent.name}/{path.name}": path for path in folder.glob("runs/*/*.safetensors")}
    found |= {f"{path.parent.name}/{path.name}": path for path in folder.glob("*/*.safetensors")}  # brought, or earlier
    for place in (folder, *allowed):  # beside those of the page: what somebody has put there
        for path in place.glob("*.safetensors") if place.is_dir() else [place] * (place.suffix == ".safetensors"):
            found.setdefault(f"{place.name}/{path.name}", path)
    return dict(sorted(found.items(), key=lambda pair: -pair[1].stat().st_mtime))


def asked(id: object, folder: Path, allowed: list[Path]) -> Path:
    """The file of an id. Raises Unknown."""
    found = files_here(folder, allowed).get(id) if isinstance(id, str) else None
    if found is None:
        raise Unknown("There is no such adapter here, or no more.")
    return found


def cards(folder: Path, allowed: list[Path]) -> list[dict]:
    """What the page shows of every adapter; what is none is left out."""
    return [card for id, path in files_here(folder, allowed).items() for card in _card(id, path)]


def add(folder: Path, called: str, content: bytes) -> str:
    """Take in an adapter file; returns its id. Raises AdapterFileError for what is none."""
    stem, ending = clean_name(called)
    if ending != ".safetensors":
        raise AdapterFileError(f"{called} is no .safetensors file, and only such adapters are read.")
    shelf = folder / FOLDER
    shelf.mkdir(exist_ok=True)
    path = shelf / f"{unique(stem, {one.stem for one in shelf.iterdir()})}.safetensors"
    atomic.write_bytes(path, content)
    try:
        read_adapter(path)
    except AdapterFileError as error:
        path.unlink()
        raise AdapterFileError(str(error).replace(str(path), called)) from error
    return f"{FOLDER}/{path.name}"


def sample_of(path: Path) -> Path | None:
    """The last sample of the run that an adapter is of."""
    samples = sorted(path.parent.glob("samples/step-*-00-*.png"), key=lambda one: one.name.rsplit("-", 1)[0])
    return samples[-1] if samples else None


def thumbnail(path: Path) -> tuple[bytes, str]:
    """A picture of an adapter and its kind. Raises Unknown if there is none."""
    sample = sample_of(path)
    if sample:
        return sample.read_bytes(), "image/png"
    try:
        found = picture_of(read_adapter(path))
    except AdapterFileError:
        found = None
    if not found or found[:2] != b"\xff\xd8":  # anything but a JPEG stays where it is
        raise Unknown("It has no picture.")
    return found, "image/jpeg"


def sha256_of(path: Path) -> str:
    """The hash by which pictures name the adapters that they were drawn with."""
    return _hashed(path, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=512)
def _hashed(path: Path, written: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.lru_cache(maxsize=512)
def _read(path: Path, written: int) -> Header | None:
    try:
        return read_adapter(path)
    except (AdapterFileError, OSError):
        return None


def _card(id: str, path: Path) -> Iterator[dict]:
    header = _read(path, path.stat().st_mtime_ns)
    if header is None:
        return
    notes, base = header.notes, header.base_model
    denoiser = next(iter(header.config.values()), {})
    yield {
        "id": id,
        "name": path.stem,
        "trigger": notes.trigger,
        "what": notes.class_word,
        "phrase": notes.phrase,
        "prompt": presets.example(notes.trigger, notes.class_word) if is_embedded(base) else notes.instance_prompt,
        "others": notes.others,
        "base": public_name(base) if base else "",
        "bytes": path.stat().st_size,
        "steps": bases_here.steps_of(base) or bases_here.USUAL,
        "kind": kind_of(denoiser),
        "rank": denoiser.get("r"),
        "waits": waits(header),
        "exact": is_exact(header),
        "style": is_style(notes.class_word),
        "training": notes.training,
        "picture": bool(header.thumbnail) or sample_of(path) is not None,
        "run": f"runs/{path.parent.name}" if path.parent.parent.name == "runs" else "",
        "written": path.stat().st_mtime,
    }
