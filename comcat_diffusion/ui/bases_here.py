"""The bases that the page offers: the embedded one, those in the hub's cache, and those in folders that it may name."""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from comcat_diffusion.config import EMBEDDED, is_hub_id
from comcat_diffusion.families.family import UNET
from comcat_diffusion.families.known import family_in
from comcat_diffusion.places import place_of
from comcat_diffusion.ui.settings import Refused

FOLDER = "bases"  # inside the page's folder
USUAL = 512, 64  # side and step of the pictures of Stable Diffusion; the step is one of every family
LONGEST_HEADER = 20_000_000  # bytes of a safetensors header
# Families by what some of a single file's weights are called, those first whose files hold what others' hold as well.
_MARKS = (
    ("Stable Diffusion XL", "conditioner.embedders."),
    ("Stable Diffusion 3 and 3.5", "joint_blocks."),
    ("Chroma", "distilled_guidance_layer."),
    ("FLUX.2 [klein]", "double_stream_modulation_img."),
    ("FLUX.1", "double_blocks."),
    ("Stable Diffusion 1.x and 2.x", "model.diffusion_model.input_blocks."),
)
_LICENSE = re.compile(r"^license(?:_name)?:\s*[\"']?([\w.\- ]+)", re.MULTILINE)


@dataclass(frozen=True)
class Base:
    """A base as it is offered; `name` is what the settings of a run call it, `id` what the page does."""

    id: str
    name: str
    family: str
    bytes: int
    license: str
    usable: bool = True
    unet: bool = True  # or its denoiser is a transformer, whose attentions have other names


def bases_here(folder: Path, allowed: list[Path]) -> list[Base]:
    """All that can be trained on, the embedded one first; a Space of another base is without it."""
    found = [*_embedded(), *_cached()]
    for place in (folder / FOLDER, *allowed):
        for path in sorted(place.iterdir()) if place.is_dir() else [place] * place.is_file():
            if (path / "model_index.json").is_file():
                found.append(_of_folder(path, f"folder:{path.name}", str(path)))
            elif path.suffix == ".safetensors" and path.stat().st_size > 500_000_000:  # smaller ones are adapters
                found.append(_of_file(path))
        if (place / "model_index.json").is_file():
            found.append(_of_folder(place, f"folder:{place.name}", str(place)))
    return list({base.id: base for base in found}.values())


def asked(id: object, folder: Path, allowed: list[Path]) -> Base:
    """The base of an id. Raises Refused for one that the page does not offer."""
    for base in bases_here(folder, allowed):
        if base.id == id:
            if not base.usable:
                raise Refused(f"{base.name} is of no family that is known here.", "base")
            return base
    raise Refused("This base is not here: choose one of the list, or download it first.", "base")


def wanted(id: object) -> str:
    """A hub id that somebody wants downloaded. Raises Refused for what is none."""
    proper = isinstance(id, str) and re.fullmatch(r"[\w.\-]{1,96}/[\w.\-]{1,96}", id) and is_hub_id(id)
    if not proper:
        raise Refused("A name on the hub reads owner/name, as in stable-diffusion-v1-5/stable-diffusion-v1-5.", "hub")
    return id


def steps_of(name: str | None) -> tuple[int, int] | None:
    """(side, step) in pixels of what a base draws: the side of its squares, and what sides are multiples of.

    None where its configurations are not at hand as files.
    """
    folder = _configs_of(name) if name else None
    try:
        index = json.loads((folder / "model_index.json").read_text("utf-8")) if folder else {}
        family = family_in(index.get("_class_name", ""), {})
        if family is None:
            return None
        seer, vae = (json.loads((folder / part / "config.json").read_text("utf-8")) for part in (family.part, "vae"))
        return family.native(seer, vae), family.grain(seer, family.factor(vae))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _configs_of(name: str) -> Path | None:
    """The folder of a base by the name that an adapter calls it, if it is on this machine."""
    from huggingface_hub import try_to_load_from_cache

    try:
        path = place_of(name)
    except OSError:
        return None
    if path.is_dir():
        return path
    found = None if path.is_file() else try_to_load_from_cache(name, "model_index.json")
    return Path(found).parent if isinstance(found, str) else None


def _embedded() -> Iterator[Base]:
    with contextlib.suppress(FileNotFoundError):
        yield _of_folder(place_of(EMBEDDED), EMBEDDED, EMBEDDED)


def _cached() -> Iterator[Base]:
    """The bases in the hub's cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir()
    except (CacheNotFound, OSError):
        return
    for repo in sorted(cache.repos, key=lambda repo: repo.repo_id):
        newest = max(repo.revisions, key=lambda revision: revision.last_modified, default=None)
        if repo.repo_type == "model" and newest and (newest.snapshot_path / "model_index.json").is_file():
            weights = any(newest.snapshot_path.glob("*/*.safetensors"))
            base = _of_folder(newest.snapshot_path, repo.repo_id, repo.repo_id)
            yield base if weights else Base(base.id, base.name, base.family, base.bytes, base.license, False)


def _of_folder(path: Path, id: str, name: str) -> Base:
    try:
        kind = json.loads((path / "model_index.json").read_text("utf-8")).get("_class_name", "")
    except (OSError, ValueError):
        kind = ""
    family = family_in(kind, {})
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    license = "Apache-2.0" if id == EMBEDDED else _license(path)
    unet = family is None or family.part == UNET
    return Base(id, name, family.name if family else "", size, license, family is not None, unet)


def _of_file(path: Path) -> Base:
    """A single file by its header: its family by the names of its weights, its licence where it says one."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size <= LONGEST_HEADER else {}
        told, names = header.pop("__metadata__", {}), tuple(header)
        license = told.get("modelspec.license", "") if isinstance(told, dict) else ""
    except (OSError, ValueError, RecursionError, AttributeError):
        license, names = "", ()
    family = next((family for family, mark in _MARKS if any(mark in name for name in names)), "")
    unet = not family or family.startswith(("Stable Diffusion 1", "Stable Diffusion XL"))
    return Base(f"file:{path.name}", str(path), family, path.stat().st_size, str(license)[:60], bool(names), unet)


def _license(path: Path) -> str:
    try:
        found = _LICENSE.search((path / "README.md").read_text("utf-8", "replace")[:5000])
    except OSError:
        return ""
    return found[1].strip() if found else ""
