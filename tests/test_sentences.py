"""What the commands say is there in German: every sentence that the page can show is found in their source and said."""

import ast
import re
from pathlib import Path

import pytest

import comcat_diffusion
from comcat_diffusion.ui import sentences, settings, texts

ROOT = Path(comcat_diffusion.__file__).parent
# Whose sentences reach the page: what it asks for, looks over, runs and takes away.
FILES = [
    "config.py", "words.py", "places.py", "bases.py", "single_file.py",
    "adapters/header.py", "adapters/proportions.py", "export/fit.py", "export/hub.py",
    *(f"training/{name}.py" for name in (
        "config", "remarks", "validate", "dataset", "captions", "folder", "masks", "names", "images", "wording",
        "becomes", "precision", "order", "initial", "learned", "suitable", "encode", "class_pictures", "checkpoint",
        "loop", "output", "customize", "objective")),
    *(f"generation/{name}.py" for name in ("config", "order", "masks", "generate", "pictures", "chosen")),
    *(f"families/{path.name}" for path in (ROOT / "families").glob("*.py")),
    *(f"ui/{path.name}" for path in (ROOT / "ui").glob("*.py")),
]  # fmt: skip
# What does not: settings that the page has not, what the command alone prints, what programmers are told.
ELSEWHERE = (
    "--config", "--auth", "--host", "--port", "--token", "--framed_by", "--allow_paths:", "--draw_only", "Port ",
    "TOML file", "--merge", "--lora", "--reference_images", "--instance_data_dir and [[",
    "--instance_prompt, --trigger",
    "--prior images needs", "# Circumstances", "Load with comcat", "An adapter waits", "Another page is served",
    "Negative prompt", "Name at least one adapter", "{} is a free adapter ({})", "There is no file",
    "Name and password",
    "--repo_id {} holds no", "{} is another file",
    "{} does not hold", "Share an adapter", "{} Default: {}.", "{} hold other", "--init_adapter: ", 
    "{} Required", "Adapter files, each", "train one with another word",
)  # fmt: skip


def test_every_sentence_that_the_page_can_show_is_there_in_german():
    missing = {f"{name}: {told}" for name in FILES for told in _sentences(ROOT / name) if not _is_said(told)}
    assert not missing, "\n".join(sorted(missing))
    assert not _is_said("A sentence that nobody has {}.")


def _is_said(told: str) -> bool:
    if told.startswith(ELSEWHERE):
        return True
    form = ".+".join(map(re.escape, told.split("{}")))
    return sentences.known(told.replace("{}", "X"), "de") is not None or any(
        re.fullmatch(form, english) for name in ("sentences", "parts") for english in texts.table("de", name)
    )


def _sentences(path):
    """The texts of a file that end like a sentence, {} for what differs; not its help and its docstrings."""
    tree, left = ast.parse(path.read_text("utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr | ast.JoinedStr):
            left |= (
                {id(part) for part in ast.walk(node) if part is not node}
                if isinstance(node, ast.JoinedStr)
                else ({id(node.value)} if isinstance(node.value, ast.Constant) else set())
            )
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "option":
            left |= {id(part) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in left or not isinstance(node, ast.Constant | ast.JoinedStr):
            continue
        told = _text(node)
        if " " in told and told.endswith((".", ".{}")) and len(told) > 10:
            yield told.removeprefix(" ")


def _text(node):
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)


def test_german_says_what_english_does():
    """No name stands in German that English has not; nothing is lost of what differs but flags of the command."""
    for name in ("sentences", "parts"):
        for english, german in texts.table("de", name).items():
            pattern = sentences.Pattern.of(english, german)
            names = [gap for gap, _ in pattern.gaps]
            assert set(sentences._GAP.findall(german)) <= {(gap, "") for gap in names}, english
            assert len(set(names)) == len(names), english


@pytest.mark.parametrize(
    ("english", "german"),
    [
        ("--rank must be at least 1, not -5.", "„Rang“ muss mindestens 1 sein, nicht -5."),
        ("--learning_rate must be above 0, not -0.5.", "„Lernrate“ muss größer als 0 sein, nicht -0,5."),
        ("a.png and b.png: turned upright as its EXIF data say.",
         "a.png und b.png: aufgerichtet, wie die EXIF-Daten sagen."),
        ("salt and pepper.png: turned upright as its EXIF data say.",
         "salt and pepper.png: aufgerichtet, wie die EXIF-Daten sagen."),
        ("Left aside: a.txt, b c.md and 3 more (not a picture).",
         "Nicht beachtet: a.txt, b c.md und 3 weitere (kein Bild)."),
        (
            "Adapter: 98,304 parameters on 12 attentions, 197 kB and its header.",
            "Adapter: 98.304 Parameter auf 12 Attentions, 197 kB und der Kopf der Datei.",
        ),
        ("x is y.png shows the same as white: it only counts twice.",
         "x is y.png zeigt dasselbe wie white: Es zählt nur doppelt."),
        ("Whatever: is not known.", "Whatever: is not known."),
    ],
)  # fmt: skip
def test_sentences_are_found_again_by_what_never_differs(english, german):
    assert settings.refused(ValueError(english), "de").message == german
    assert sentences.said(english, "en") == english


def test_no_name_takes_longer_than_others():
    """Names made of what stands around gaps: a search that goes back over them would take minutes."""
    name = " is  x : and ".join(["a"] * 20_000)
    assert sentences.said(f"The mask {name}", "de") == f"The mask {name}"
    assert name in sentences.said(f"{name} shows the same as {name}: it only counts twice.", "de")
