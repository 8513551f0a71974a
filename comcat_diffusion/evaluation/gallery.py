"""The pictures of an evaluation on disk: which there must be, which are there already, drawing those that are missing.

A picture is there if its file says that it was made by the very prompt, seed, adapter and settings; so a cut run goes
on where it was, and several processes share the work.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusers import DiffusionPipeline
from PIL import Image

from comcat_diffusion.adapters.focus import placeable
from comcat_diffusion.adapters.merge import unload_adapters
from comcat_diffusion.adapters.placing import set_adapters
from comcat_diffusion.adapters.store import load_adapter
from comcat_diffusion.generation.chosen import Chosen, files_of
from comcat_diffusion.generation.pictures import Drawing, Sampling, draw, save_png, slug

BEFORE = "before"
ADAPTER = "judged"  # name of an adapter inside the models while it draws


@dataclass(frozen=True)
class Row:
    """What draws: an adapter, or the bare base (None), under a name that no other row has."""

    name: str
    adapter: Chosen | None = None


@dataclass(frozen=True)
class Task:
    """One picture that there must be."""

    row: Row
    drawing: Drawing
    path: Path
    made_by: dict


def rows_of(chosen: Sequence[Chosen]) -> list[Row]:
    """The base and the adapters, named by their files; by their folders too, or numbers, where that is not enough."""
    stems = [path.stem for path in {one.path.absolute() for one in chosen}]
    rows = [Row(BEFORE)]
    for one in chosen:
        path = one.path.absolute()
        name = path.stem if stems.count(path.stem) == 1 else f"{path.parent.name}/{path.stem}"
        name += "" if one.scale == 1 else f" x {one.scale:g}"
        taken = {slug(row.name) for row in rows}
        names = itertools.chain([name], (f"{name} ({number})" for number in itertools.count(2)))
        rows.append(Row(next(name for name in names if slug(name) not in taken), one))
    return rows


@dataclass(frozen=True)
class Gallery:
    """Rows x prompts x seeds in a folder; `settings` is what every picture says of how it was made."""

    folder: Path
    rows: Sequence[Row]
    prompts: Sequence[str]
    seeds: Sequence[int]
    settings: dict

    def tasks(self) -> Iterator[Task]:
        """Every picture, row by row."""
        for row in self.rows:
            for prompt in self.prompts:
                for seed in self.seeds:
                    yield self._task(row, Drawing(prompt, seed))

    def missing(self) -> list[Task]:
        """The pictures that are not there, or were made in another way."""
        return [task for task in self.tasks() if _told(task.path) != task.made_by]

    def shown(self, row: Row, prompts: Sequence[str]) -> list[Image.Image]:
        """The pictures of a row in order: prompts x seeds."""
        paths = [self._task(row, Drawing(prompt, seed)).path for prompt in prompts for seed in self.seeds]
        return [_opened(path) for path in paths]

    def _task(self, row: Row, drawing: Drawing) -> Task:
        adapters = files_of([row.adapter] if row.adapter else [])
        made_by = {"prompt": drawing.prompt, "seed": drawing.seed, **self.settings, "adapters": adapters}
        key = hashlib.sha256(drawing.prompt.encode()).hexdigest()[:6]  # two long prompts may begin alike
        name = f"{slug(drawing.prompt)}-{key}-{drawing.seed}.png"
        return Task(row, drawing, self.folder / slug(row.name) / name, made_by)


def draw_tasks(
    pipe: DiffusionPipeline, tasks: Sequence[Task], sampling: Sampling, any_weights: bool, keep: bool = False
) -> Iterator[Task]:
    """Draw and write pictures; yields each when its file is there. The pipeline is the bare base before and after.

    With `keep`, adapters act where their subjects' words are looked at, if they can (adapters/focus.py).
    """
    for _, group in itertools.groupby(tasks, key=lambda task: task.row.name):
        own = list(group)
        with_adapter(pipe, own[0].row.adapter, any_weights)
        try:
            one = own[0].row.adapter
            words = placeable(pipe, {ADAPTER: one.words}) if one and keep else None
            drawn = draw(pipe, [task.drawing for task in own], sampling, words)
            for task, picture in zip(own, drawn, strict=True):
                task.path.parent.mkdir(parents=True, exist_ok=True)
                save_png(picture, task.path, task.made_by)
                yield task
        finally:
            unload_adapters(pipe)


def with_adapter(pipe: DiffusionPipeline, adapter: Chosen | None, any_weights: bool) -> None:
    """Load an adapter at its scale. Raises ValueError if it does not fit the base."""
    if adapter is not None:
        device = pipe.device
        load_adapter(pipe, adapter.path, ADAPTER, any_weights=any_weights)
        set_adapters(pipe, [ADAPTER], [adapter.scale])
        pipe.to(device)


def _told(path: Path) -> dict | None:
    """What a picture says of itself; None if there is none, or it is cut short."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return json.loads(picture.text["comcat"])
    except (OSError, SyntaxError, KeyError, ValueError):
        return None


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")
