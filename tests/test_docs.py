"""The README and the code say the same: commands, flags, names, the file tree."""

import json
import re
import shlex
from pathlib import Path

import pytest

import comcat_diffusion
from comcat_diffusion.cli import _parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def commands():
    """Every `comcat ...` or script call in the README, as the arguments of `comcat`."""
    scripts = {"train_customize.py": "train", "inference.py": "generate"}
    for line in README.splitlines():
        words = (
            shlex.split(line.strip().removeprefix("$ "), comments=True)
            if line.startswith("    ") and '"' not in line[:5]
            else []
        )
        if words[:1] == ["python"] and len(words) > 1 and words[1] in scripts:
            yield [scripts[words[1]], *words[2:]]
        elif words[:1] == ["comcat"]:
            yield words[1:]


def test_the_readme_shows_commands():
    assert len(list(commands())) >= 4


@pytest.mark.parametrize("arguments", list(commands()), ids=" ".join)
def test_every_command_of_the_readme_is_understood(arguments):
    parsed = _parser().parse_args(arguments)
    assert parsed.run


def test_the_names_of_the_readme_exist():
    (line,) = re.findall(r"from comcat_diffusion import (.+)", README)
    for name in line.split(", "):
        assert getattr(comcat_diffusion, name)


def test_every_public_name_has_a_docstring():
    assert all(getattr(comcat_diffusion, name).__doc__ for name in comcat_diffusion.__all__)


def test_the_file_tree_of_the_readme_is_the_one_on_disk():
    block = README.split("## What is where")[1].split("\n\n")[1]
    named = {line[4:].split()[0] for line in block.splitlines() if line.strip()}
    folder, found = "", set()
    for line in block.splitlines():
        if line.startswith(" " * 20):  # the description goes on
            continue
        name = line.strip().split()[0]
        path = folder + name if line.startswith("        ") else name
        folder = name if name.endswith("/") and not line.startswith("        ") else folder
        assert (ROOT / path).exists(), path
        found.add(path)
    package = {f"comcat_diffusion/{p.name}" + "/" * p.is_dir() for p in (ROOT / "comcat_diffusion").iterdir()}
    shown = {path for path in found if path.startswith("comcat_diffusion/")} - {"comcat_diffusion/"}
    hidden = {"comcat_diffusion/__init__.py", "comcat_diffusion/__pycache__/", "comcat_diffusion/assets/"}
    assert named and shown == package - hidden


def test_links_and_pictures_of_the_readme_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_makefile_targets_of_the_readme_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for name in re.findall(r"`make ([a-z-]+)`", README):
        assert name in targets


def test_the_scores_of_the_readme_are_those_beside_the_weights():
    from recipe.score import table

    for base in ("tiny-sd", "tiny-flow"):
        assert table(json.loads((ROOT / "assets" / base / "scores.json").read_text())) in README


def test_the_pages_show_the_results_as_they_are():
    from benchmarks.pages import PAGES, filled

    shown = [path for path in PAGES if "<!-- results:" in path.read_text()]
    assert shown
    for path in shown:
        assert filled(path.read_text()) == path.read_text(), f"{path} is stale: python -m benchmarks.pages"


def test_links_and_pictures_of_the_docs_exist():
    for page in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"
