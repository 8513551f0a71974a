"""Two subjects of two adapters in one prompt, backgrounds kept, each beside what it is alone: on embedded-flow.

    make dinov2 && python -m benchmarks.together     # an hour on a CPU core; goes on where it was cut
    python -m benchmarks.together --show             # the table of what is there

Owl, car and rocket (recipe/characters.py), four captioned pictures each under a word of its own, `comcat train` with
its defaults. Then every two of them in one prompt that says who is on the left, who on the right, and the background,
in both orders; and each by itself, small, in the same places. A subject is measured in its half of the picture, the
other half painted over with the border's colour. Measures are those of `benchmarks.subjects`; `of the other` is the
likeness to the subject that stands beside it, or, where it is alone, to the other two.
"""

import argparse
from collections.abc import Sequence
from itertools import permutations
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


def of_subject(pictures: list[Image.Image], subject: str, others: Sequence[str], judge: Features) -> dict:
    """What a subject is like in pictures, (N,) each; `others` stand beside it in them, one in each picture."""
    held_out = [picture(subject, pose) for pose in HELD_OUT]
    made = world.details(pictures)
    beside = [
        metrics.subject_fidelity(one[None], world.details([picture(other, pose) for pose in HELD_OUT]))
        for one, other in zip(made, others, strict=True)
    ]
    return {
        **cut_out(pictures, held_out, judge),
        "likeness": metrics.subject_fidelity(made, world.details(held_out)),
        "of_the_other": torch.cat([one.flatten() for one in beside]),
    }


def measured(subject: str, seed: int, root: Path, judge: Features) -> dict[str, dict[str, torch.Tensor]]:
    """A subject's measures alone, and beside each of the others."""
    others = [other for other in TRIGGERS if other != subject]
    base, made = drawn([subject], seed, root)
    sides = [side for side in SIDES for _ in BACKGROUNDS]
    own = [half(one, side) for one, side in zip(made, sides, strict=True)]
    alone = [of_subject(own, subject, [other] * len(own), judge) for other in others]
    moved = background_moved(made, base, world.outline)
    found = {"alone": alone[0] | {"of_the_other": torch.cat([one["of_the_other"] for one in alone])}}
    found["alone"]["background_moved"] = moved
    pictures, beside, gone = [], [], []
    for other in others:
        for pair, side in (((subject, other), "left"), ((other, subject), "right")):
            base, made = drawn(pair, seed, root)
            pictures += [half(one, side) for one in made]
            beside += [other] * len(made)
            gone.append(background_moved(made, base, world.outline))
    found["together"] = of_subject(pictures, subject, beside, judge) | {"background_moved": torch.cat(gone)}
    return found


def rows_of(seeds: int, root: Path) -> list[dict]:
    """Means over subjects, trainings and prompts, with intervals: alone, together."""
    judge = load_features(str(DINOV2))
    found = [measured(subject, seed, root, judge) for seed in range(seeds) for subject in TRIGGERS]
    rows = []
    for how, name in (("alone", "one subject"), ("together", "two subjects")):
        told = {one: vars(interval(torch.cat([own[how][one].view(-1, 1) for own in found]))) for one in MEASURES}
        rows.append({"method": name, "pictures": sum(len(own[how]["shape"]) for own in found)} | told)
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
