"""A folder that becomes a Space of the hub: the page in drawing mode, one adapter, and the package itself.

The package goes along as source, so that a Space needs nothing but its libraries from a package index.
"""

import shutil
from importlib import metadata
from pathlib import Path

import comcat_diffusion
from comcat_diffusion import atomic, markdown
from comcat_diffusion.adapters.header import AdapterFileError, read_adapter
from comcat_diffusion.export.card import public_base, unpublished
from comcat_diffusion.export.shareable import as_png, refuse_unshareable
from comcat_diffusion.places import EMBEDDED_BASES, place_of

_APP = '''\
"""The page that draws with the adapter beside this file."""

from pathlib import Path

from comcat_diffusion.ui.app import serve
from comcat_diffusion.ui.config import UiConfig

if __name__ == "__main__":
    folder = str(Path(__file__).parent / "studio")
    shown = {"host": "0.0.0.0", "port": 7860, "draw_only": True, "framed_by": "https://huggingface.co"}
    serve(UiConfig(output_dir=folder, **shown))
'''
_DOCKERFILE = """\
FROM python:3.12-slim
RUN useradd --create-home --uid 1000 user
USER user
WORKDIR /home/user/app
COPY --chown=user requirements.txt .
RUN pip install --user --no-cache-dir -r requirements.txt
COPY --chown=user . .
CMD ["python", "app.py"]
"""
_README = """\
---
title: {title}
sdk: docker
app_port: 7860
models:
{models}
---

# {heading}

Write {phrase} in a prompt. Drawn with a [COMCAT](https://arxiv.org/abs/2305.17235) adapter on {base_told}.
"""


def build_space(target: str | Path, repo_id: str, adapter: str | Path, sheet: str | Path | None = None) -> Path:
    """Fill a new folder with a Space; it appears whole or not at all.

    An embedded base goes along. Raises AdapterFileError for what is no adapter or is of another base that the hub does
    not have, FileExistsError for a folder that holds something, ValueError as sharing does.
    """
    refuse_unshareable(repo_id, adapter, sheet)
    header, adapter = read_adapter(adapter), Path(adapter)
    base, notes = public_base(header), header.notes
    carried = header.base_model if header.base_model in EMBEDDED_BASES else ""
    if not base and not carried:
        raise AdapterFileError(f"{adapter} is of a base that is not on the hub, where a Space would look for it.")
    words = notes.phrase or adapter.stem
    card = _README.format(
        title=markdown.quoted(words),
        models="\n".join(f"- {one}" for one in (repo_id, markdown.quoted(base)) if one != '""'),
        heading=markdown.text(words),
        phrase=markdown.code(words),
        base_told=markdown.text(base) or unpublished(header),
    )
    with atomic.whole_folder(target) as folder:
        (folder / "studio" / "adapters").mkdir(parents=True)
        package = Path(comcat_diffusion.__file__).parent
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__", "assets"))
        if carried:
            place = place_of(carried)
            shutil.copytree(place, folder / package.name / "assets" / place.name)
        files = {"README.md": card, "app.py": _APP, "Dockerfile": _DOCKERFILE}
        files["requirements.txt"] = "\n".join(_requirements()) + "\n"
        for name, text in files.items():
            (folder / name).write_text(text, "utf-8")
        shutil.copyfile(adapter, folder / "studio" / "adapters" / adapter.name)
        if sheet is not None:
            (folder / "sheet.png").write_bytes(as_png(Path(sheet)))
    return Path(target)


def _requirements() -> list[str]:
    """The libraries that the package and its page need, with their least versions."""
    needed = [line.partition(";") for line in metadata.requires("comcat-diffusion") or []]
    return [what.strip() for what, _, where in needed if "extra ==" not in where or "'ui'" in where.replace('"', "'")]
