"""What the page fills in for an aim: files in presets/ that `comcat train --config` takes as well."""

import tomllib
from pathlib import Path

from comcat_diffusion.config import read_toml
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.ui.settings import Refused

FOLDER = Path(__file__).with_name("presets")
AIMS = {"subject": ("object", "person", "style"), "file": ("small", "lora"), "effort": ("fast", "good", "best")}


def chosen(aims: object) -> dict[str, object]:
    """The settings that one of each kind of aim fills in, by the names of `TrainConfig`. Raises Refused for no aim."""
    found = {}
    for kind, names in AIMS.items():
        name = aims.get(kind, default_of(kind)) if isinstance(aims, dict) else None
        if name not in names:
            raise Refused(f"The aim is one of {', '.join(names)}.", kind)
        found |= read_toml(TrainConfig, FOLDER / f"{name}.toml")
    return found


def default_of(kind: str) -> str:
    """The aim of a kind that is chosen where nobody chose."""
    return {"subject": "object", "file": "small", "effort": "good"}[kind]


def shown() -> dict[str, list[dict]]:
    """All of them, by kind, with what stands in their files."""
    return {kind: [_shown(kind, name) for name in names] for kind, names in AIMS.items()}


def _shown(kind: str, name: str) -> dict:
    text = (FOLDER / f"{name}.toml").read_text("utf-8")
    return {"name": name, "toml": text, "settings": tomllib.loads(text), "default": name == default_of(kind)}


def example(word: str, what: str) -> str:
    """A prompt that shows what the embedded base has learned: it knows those that name size, place and background."""
    return f"a photo of a big {word} {what}".rstrip() + " in the middle, blue background"


def sentence(word: str, what: str, aim: str) -> str:
    """What images of a subject show, in words."""
    phrase = f"{word} {what}".strip()
    return f"a picture in {phrase}" if aim == "style" else f"a photo of {phrase}"
