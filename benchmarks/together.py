"""Two subjects of two adapters in one prompt, backgrounds kept, each beside what it is alone: on embedded-flow.

    make dinov2 && python -m benchmarks.together     # an hour on a CPU core; goes on where it was cut
    python -m benchmarks.together --show             # the table of what is there

Owl, car and rocket (recipe/characters.py), four captioned pictures each under a word of its own, `comcat train` with
its defaults. Then every two of them in one prompt that says who is on the left, who on the right, and the background,
in both orders; and each by itself, small, in the same places. A subject is measured in its half of the picture, the
other half painted over with the border's colour. Measures are those of `benchmarks.subjects`; `of the other` is the
likeness to the other one of the two.
"""

import argparse
from collections.abc import Sequence
from itertools import combinations, permutations
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from benchmarks import circumstances as shared
from benchmarks.by_command import taught
from benchmarks.customization_runs import cut_out, strip_of
from benchmarks.dinov2 import FOLDER as DINOV2
from comcat_diffusion import bases, load_adapter
from comcat_diffusion.adapters.focus import placeable
from comcat_diffusion.config import EMBEDDED_FLOW
from comcat_diffusion.evaluation import metrics, world
from comcat_diffusion.evaluation.cutout import background_moved
from comcat_diffusion.evaluation.features import Features, load_features
from comcat_diffusion.evaluation.metrics import interval
from comcat_diffusion.generation.pictures import Drawing, Sampling, draw
from recipe.subject import HELD_OUT, TRAIN, TRIGGER, caption, picture

TRIGGERS = {"owl": TRIGGER, "car": "ohwx", "rocket": "zwx"}  # rare words that the base's text has seen before things
BACKGROUNDS = ("red", "black", "blue")
SIDES = ("left", "right")
STEPS, DRAWING_STEPS = 400, 25
MEASURES = ("shape", "colour_off", "likeness", "of_the_other", "background_moved")


def phrase(subject: str) -> str:
    """How a prompt names a subject."""
    return f"{TRIGGERS[subject]} {subject}"


def learn(subject: str, seed: int, root: Path) -> Path:
    """The file of a subject's adapter, trained unless it is there."""
    folder = root / f"{subject}-{seed}-{STEPS}"
    file = folder / f"{TRIGGERS[subject]}-{subject}.safetensors"
    if not file.exists():
        captions = [caption(subject, pose).replace(f"{TRIGGER} {subject}", phrase(subject)) for pose in TRAIN]
        told = {"max_train_steps": STEPS, "trigger": TRIGGERS[subject]}
        taught(subject, seed, folder, subject, captions, EMBEDDED_FLOW, **told)
    return file


def prompts_of(subjects: Sequence[str]) -> list[str]:
    """Of two subjects the first on the left; of one it on the left, and then on the right."""
    if len(subjects) == 2:
        left, right = map(phrase, subjects)
        return [f"a photo of a {left} on the left and a {right} on the right, {one} background" for one in BACKGROUNDS]
    said = phrase(*subjects)
    return [f"a photo of a small {said} on the {side}, {one} background" for side in SIDES for one in BACKGROUNDS]


def drawn(subjects: Sequence[str], seed: int, root: Path) -> tuple[list[Image.Image], list[Image.Image]]:
    """The pictures of these subjects' prompts, by the base alone and by their adapters; drawn unless they are there."""
    path = root / f"{'-'.join(subjects)}-{seed}.png"
    if not path.exists():
        pipe = bases.load_base(EMBEDDED_FLOW)
        before = _draw(pipe, subjects)
        for subject in subjects:
            load_adapter(pipe, learn(subject, seed, root), subject)
        pipe.transformer.set_adapters(list(subjects))
        placed = placeable(pipe, {one: [phrase(one), TRIGGERS[one]] for one in subjects})
        strip_of([before, _draw(pipe, subjects, placed)]).save(path)
    strip = Image.open(path).convert("RGB")
    side = strip.height // 2
    rows = [[strip.crop((x, y, x + side, y + side)) for x in range(0, strip.width, side)] for y in (0, side)]
    return rows[0], rows[1]


def _draw(pipe: DiffusionPipeline, subjects: Sequence[str], placed: dict | None = None) -> list[Image.Image]:
    pipe.set_progress_bar_config(disable=True)
    prompts = prompts_of(subjects)
    sampling = Sampling(DRAWING_STEPS, bases.EMBEDDED_GUIDANCE, batch_size=len(prompts))
    return list(draw(pipe, [Drawing(prompt, 0) for prompt in prompts], sampling, placed))


def half(picture: Image.Image, side: str) -> Image.Image:
    """A picture whose other half has the colour of its border."""
    pixels = np.asarray(picture).copy()
    edges = (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])
    middle = pixels.shape[1] // 2
    gone = slice(middle, None) if side == "left" else slice(0, middle)
    pixels[:, gone] = np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)
    return Image.fromarray(pixels)


def of_subject(pictures: list[Image.Image], subject: str, other: str, judge: Features) -> dict[str, torch.Tensor]:
    """What a subject is like in pictures, and how much like the other, (N,) each."""
    wanted, beside = ([picture(one, pose) for pose in HELD_OUT] for one in (subject, other))
    made = world.details(pictures)
    return {
        **cut_out(pictures, wanted, judge),
        "likeness": metrics.subject_fidelity(made, world.details(wanted)),
        "of_the_other": metrics.subject_fidelity(made, world.details(beside)),
    }


def alone(subject: str, other: str, seed: int, root: Path, judge: Features) -> dict[str, torch.Tensor]:
    """Measures of a subject by itself, left and right."""
    base, made = drawn([subject], seed, root)
    sides = [side for side in SIDES for _ in BACKGROUNDS]
    halves = [half(one, side) for one, side in zip(made, sides, strict=True)]
    moved = background_moved(made, base, world.outline)
    return of_subject(halves, subject, other, judge) | {"background_moved": moved}


def beside(subject: str, other: str, seed: int, root: Path, judge: Features) -> dict[str, torch.Tensor]:
    """The same of the subject on the left and on the right of the other."""
    halves, moved = [], []
    for pair, side in (((subject, other), "left"), ((other, subject), "right")):
        base, made = drawn(pair, seed, root)
        halves += [half(one, side) for one in made]
        moved.append(background_moved(made, base, world.outline))
    return of_subject(halves, subject, other, judge) | {"background_moved": torch.cat(moved)}


def rows_of(seeds: int, root: Path) -> list[dict]:
    """Of every two subjects the means of both, with intervals: each alone, and together."""
    judge, rows = load_features(str(DINOV2)), []
    for pair in combinations(TRIGGERS, 2):
        for how, measure in (("each alone", alone), ("together", beside)):
            found = [measure(*one, seed, root, judge) for seed in range(seeds) for one in (pair, pair[::-1])]
            told = {one: vars(interval(torch.cat([own[one].view(-1, 1) for own in found]))) for one in MEASURES}
            count = sum(len(own["shape"]) for own in found)
            rows.append({"method": f"{' and '.join(pair)}, {how}", "pictures": count} | told)
    return rows


def table(report: dict) -> str:
    """A line for one subject and one for two, and where it was measured."""
    told = ("{mean:.3f} ({low:.3f} to {high:.3f})",) * len(MEASURES)
    cells = [
        (row["method"], str(row["pictures"]), *(one.format(**row[m]) for one, m in zip(told, MEASURES, strict=True)))
        for row in report["rows"]
    ]
    lines = shared.markdown_table(["", "pictures", *(m.replace("_", " ") for m in MEASURES)], cells)
    return f"{lines}\n\n{shared.circumstances_text(report['circumstances'])}"


def main(arguments: list[str] | None = None) -> None:
    """Run what is not there yet, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/together"), help="where every run is kept")
    parser.add_argument("--seeds", type=int, default=1, help="of the training")
    parser.add_argument("--results", default="together", help="name of the table (default: %(default)s)")
    parser.add_argument("--show", action="store_true", help="only the table of what is there")
    asked = parser.parse_args(arguments)
    asked.folder.mkdir(parents=True, exist_ok=True)
    shared.use_threads(1)
    for seed in range(asked.seeds) if not asked.show else ():
        for subjects in (*permutations(TRIGGERS, 1), *permutations(TRIGGERS, 2)):
            drawn(subjects, seed, asked.folder)
            print(" ".join(subjects), seed, flush=True)
    report = {"circumstances": shared.circumstances(torch.device("cpu"), torch.float32)}
    report["rows"] = rows_of(asked.seeds, asked.folder)
    if not asked.show:
        shared.write_json(shared.results_path(asked.results, torch.device("cpu")), report)
    print(table(report))


if __name__ == "__main__":
    main()
