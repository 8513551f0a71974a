"""Captions by a model that describes pictures, where one is at hand: in the hub's cache, or in the page's folder."""

import json
from pathlib import Path

from PIL import Image

from comcat_diffusion.words import places

FOLDER = "captioners"  # inside the page's folder: transformers folders
KINDS = ("blip", "git")  # that say in a sentence what a picture shows
MOST_TOKENS = 40


def captioner_here(folder: Path) -> Path | None:
    """The folder of a captioning model, or None."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = sorted(scan_cache_dir().repos, key=lambda repo: repo.repo_id)
    except (CacheNotFound, OSError):
        repos = []
    cached = [revision.snapshot_path for repo in repos for revision in repo.revisions]
    own = sorted((folder / FOLDER).iterdir()) if (folder / FOLDER).is_dir() else []
    return next((path for path in (*own, *cached) if _is_one(path)), None)


def _is_one(path: Path) -> bool:
    try:
        kind = json.loads((path / "config.json").read_text("utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return False
    return kind in KINDS and any(path.glob("*.safetensors"))


class Captioner:
    """A model that is loaded; nothing is fetched, and no code of its folder is run."""

    def __init__(self, path: Path, device: str) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(path, local_files_only=True)
        own = {"local_files_only": True, "use_safetensors": True}
        self.model, self.device = AutoModelForImageTextToText.from_pretrained(path, **own).eval().to(device), device

    def says(self, picture: Image.Image) -> str:
        """What a picture shows, in its words."""
        seen = self.processor(images=picture, return_tensors="pt").to(self.device)
        tokens = self.model.generate(**seen, max_new_tokens=MOST_TOKENS, do_sample=False)
        return " ".join(self.processor.decode(tokens[0], skip_special_tokens=True).split())


def named(said: str, what: str, phrase: str, sentence: str) -> str:
    """A description that calls the subject by its own words: in the place of its class, or before all else."""
    found = places(what, said) if what else []
    if found:
        start, end = found[0]
        return said[:start] + phrase + said[end:]
    return f"{sentence}, {said}" if said else sentence
