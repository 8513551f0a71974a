"""What the page says, in every language that it speaks: texts.toml holds all of it."""

import functools
import tomllib
from pathlib import Path

LANGUAGES = ("en", "de")


@functools.cache
def _all() -> dict:
    return tomllib.loads(Path(__file__).with_name("texts.toml").read_text("utf-8"))


def page(language: str) -> dict[str, str]:
    """The words of the page itself, by their keys."""
    return _all()[language]["page"]


def labels(language: str) -> dict[str, str]:
    """What all settings are called."""
    return _all()[language]["labels"]


def label(flag: str, language: str) -> str:
    """What a setting is called."""
    return _all()[language]["labels"].get(flag) or flag.replace("_", " ").capitalize()


def quoted_label(flag: str, language: str, known: set[str]) -> str:
    """A setting as a sentence names it; what is none is left as it was."""
    if flag not in known:
        return f"--{flag}"
    return f"„{label(flag, language)}“" if language == "de" else f"“{label(flag, language)}”"


def help_of(flag: str, english: str, language: str) -> str:
    """What a setting does: in English as the command says it."""
    return _all()[language].get("help", {}).get(flag, english)


def group(title: str, language: str) -> str:
    """The title of a group of settings."""
    return _all()[language]["groups"].get(title, title)


def table(language: str, name: str) -> dict[str, str]:
    """One of the tables of a language; empty where it has none."""
    return _all()[language].get(name, {})


def asked_language(header: str) -> str:
    """The first language of a browser's Accept-Language that the page speaks, else English."""
    for part in header.split(","):
        if part.strip()[:2].lower() in LANGUAGES:
            return part.strip()[:2].lower()
    return "en"
