"""Subjects that no choice here has seen, from pictures without captions: `comcat train` against diffusers' script.

    make dinov2 && python -m benchmarks.subjects    # half an hour on two CPU cores; goes on where it was cut
    python -m benchmarks.subjects --show            # the table of what is there
    python -m benchmarks.subjects --add --methods "comcat train, 140 steps"    # one more row to the table that stands

Four pictures each of an owl, a car and a rocket (recipe/characters.py; the base knows owls and cars and has no word for
rockets), 400 steps of four pictures, three prompts that name place and background, two seeds of pictures; and a prompt
that names the subject alone, six seeds. With captions the default learns once more, with and without dropout. LoRAs are
those of diffusers' `train_dreambooth_lora.py`: its targets, start, loss and constant rate, here at the rates and ranks
that are named. Judged by who did not write this: DINOv2-small on cut-outs (`shape`), and pixels (colour, background);
and by this project's own likeness of details (`evaluation/world.py`), which a LoRA of rank 16 is to be met in.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from benchmarks import circumstances as shared
from benchmarks.by_command import taught, words
from benchmarks.by_script import learned
from benchmarks.customization_report import shown
from benchmarks.customization_runs import crop_of, cut_out, obeyed_share, strip_of
from benchmarks.dinov2 import FOLDER as DINOV2
from comcat_diffusion import bases
from comcat_diffusion.attentions import DIFFUSERS
from comcat_diffusion.evaluation import metrics, world
from comcat_diffusion.evaluation.cutout import background_moved
from comcat_diffusion.evaluation.features import Features, load_features
from comcat_diffusion.evaluation.metrics import interval
from comcat_diffusion.generation.pictures import Drawing, Sampling, draw, slug
from comcat_diffusion.training.backgrounds import before, others
from recipe.characters import UNSEEN
from recipe.subject import HELD_OUT, TRAIN, TRIGGER, caption, picture

NAME, STEPS = "subject", 400
PROMPTS = (
    "a photo of a big {subject} on the left, red background",
    "a photo of a big {subject} on the right, black background",
    "a photo of a small {subject} at the bottom, blue background",
)
SEEDS = (0, 1)  # of the pictures that are drawn
DRAWING_STEPS = 25
ALONE = ("a photo of {subject}",)  # what names no background, so that none is kept
SEEDS_ALONE = tuple(range(6))
# Strips of pictures: drawn as a pipeline does, with the background kept, and of prompts that name the subject alone
FREE, KEPT, BARE = "free", "kept", "alone"
FREELY = ", drawn with --no-keep_background"
LIKENESS = ("shape", "colour_off", "likeness")
MEASURES = ("shape", "colour_off", "background_moved", "likeness", "obeyed")


@dataclass(frozen=True)
class Method:
    """One way to learn: leaves what it learned in a pipeline, and returns (bytes of its file, seconds of its steps)."""

    learn: Callable[[str, int, Path], tuple[DiffusionPipeline, int, float]]
    kept: bool = False  # whether it is drawn with its background kept too, as `comcat generate` does
    once: bool = False  # whether one training is enough


def _comcat(captioned: bool = False, **settings: object) -> Callable:
    def learn(subject: str, seed: int, folder: Path) -> tuple[DiffusionPipeline, int, float]:
        captions = [caption(subject, pose) for pose in TRAIN] if captioned else None
        made = taught(subject, seed, folder, NAME, captions, **settings)
        return made.pipe, made.file.stat().st_size, made.seconds

    return learn


def _lora(rank: int, rate: float, augmented: bool = False, beside: bool = False) -> Callable:
    names = [*DIFFUSERS.names, *["conv1", "conv2"] * beside]
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=names)

    def start(pipe: DiffusionPipeline) -> None:
        pipe.unet.requires_grad_(False)
        pipe.unet.add_adapter(config, NAME)

    return _by_script(start, rate, lambda pipe: get_peft_model_state_dict(pipe.unet, adapter_name=NAME), augmented)


def _dreambooth(rate: float) -> Callable:
    return _by_script(lambda pipe: pipe.unet.requires_grad_(True), rate, lambda pipe: pipe.unet.state_dict())


def _by_script(start: Callable, rate: float, kept: Callable, augmented: bool = False) -> Callable:
    def learn(subject: str, seed: int, folder: Path) -> tuple[DiffusionPipeline, int, float]:
        pipe, prompt = bases.load_base(bases.EMBEDDED), f"a photo of {TRIGGER} {subject}"
        shown = [(picture(subject, pose), prompt) for pose in TRAIN]
        if augmented:
            shown += [
                (before(one, name)[0], f"{prompt}, {name} background")
                for number, (one, _) in enumerate(shown)
                for name in others(one, number)
            ]
        crops = [crop_of(pipe, *one) for one in shown]
        return pipe, *learned(pipe, crops, start, rate, seed, STEPS, kept, folder / "learned.safetensors")

    return learn


WITHOUT = "comcat train, convolutions 0"  # what was the default before terms beside convolutions
METHODS = {
    "comcat train": Method(_comcat(), kept=True),
    "comcat train, 140 steps": Method(_comcat(max_train_steps=140), kept=True),
    WITHOUT: Method(_comcat(convolutions=0), kept=True),
    f"{WITHOUT}, 140 steps": Method(_comcat(convolutions=0, max_train_steps=140), kept=True),
    # What was the default before backgrounds were made for what stands on a plain one
    f"{WITHOUT}, 3e-3, without other backgrounds": Method(
        _comcat(convolutions=0, learning_rate=3e-3, background_augmentation=False), kept=True
    ),
    "diffusers' script, LoRA r=4, 5e-4": Method(_lora(4, 5e-4)),
    "diffusers' script, LoRA r=16, 1e-3": Method(_lora(16, 1e-3)),
    # What the other backgrounds do for it
    "diffusers' script, LoRA r=16, 1e-3, other backgrounds too": Method(_lora(16, 1e-3, augmented=True), once=True),
    # And what the convolutions of the residual blocks do, which the script leaves as they are
    "diffusers' script, LoRA r=16, 1e-3, convolutions too": Method(_lora(16, 1e-3, beside=True), once=True),
    "DreamBooth, the whole U-Net, 2e-4": Method(_dreambooth(2e-4), once=True),  # the base's own limit
    # How often a picture is learned by the prompt of all instead of its caption
    f"{WITHOUT}, with captions": Method(_comcat(captioned=True, convolutions=0), kept=True, once=True),
    f"{WITHOUT}, with captions, dropout 0": Method(
        _comcat(captioned=True, convolutions=0, caption_dropout_rate=0.0), kept=True, once=True
    ),
}


def do(name: str, subject: str, seed: int, root: Path) -> None:
    """One method on one subject once: its pictures in a strip, and what it cost, unless they are there."""
    folder = root / f"{slug(name)}-{subject}-{seed}"
    if (folder / "cost.json").exists():
        return
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    pipe, size, seconds = METHODS[name].learn(subject, seed, folder)
    strip_of([_drawn(pipe, subject)]).save(folder / f"{FREE}.png")
    if METHODS[name].kept:
        strip_of([_drawn(pipe, subject, words(pipe, subject, NAME))]).save(folder / f"{KEPT}.png")
    strip_of([_drawn(pipe, subject, prompts=ALONE, seeds=SEEDS_ALONE)]).save(folder / f"{BARE}.png")
    shared.write_json(folder / "cost.json", {"bytes": size, "seconds": seconds})


def _drawn(
    pipe: DiffusionPipeline,
    subject: str,
    placed: dict | None = None,
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = SEEDS,
) -> list[Image.Image]:
    pipe.set_progress_bar_config(disable=True)
    drawings = [Drawing(prompt, seed) for prompt in _prompts(subject, prompts) for seed in seeds]
    return list(draw(pipe, drawings, Sampling(DRAWING_STEPS, bases.EMBEDDED_GUIDANCE, batch_size=6), placed))


def _prompts(subject: str, prompts: Sequence[str] = PROMPTS) -> list[str]:
    return [prompt.format(subject=f"{TRIGGER} {subject}") for prompt in prompts]


def _cut(path: Path) -> list[Image.Image]:
    strip = Image.open(path).convert("RGB")
    return [strip.crop((x, 0, x + strip.height, strip.height)) for x in range(0, strip.width, strip.height)]


def measured(root: Path, seeds: int, strips: Sequence[str] = (KEPT, FREE)) -> Iterator[dict]:
    """What there is of every method, in means over subjects, trainings, prompts and seeds, with intervals."""
    judge = load_features(str(DINOV2))
    for name, strip in ((name, strip) for name in METHODS for strip in strips):
        found, costs = [], []
        for subject in UNSEEN:
            held_out = [picture(subject, pose) for pose in HELD_OUT]
            for folder in (root / f"{slug(name)}-{subject}-{seed}" for seed in range(seeds)):
                if (folder / "cost.json").exists() and (folder / f"{strip}.png").exists():
                    costs.append(json.loads((folder / "cost.json").read_text()))
                    made = _cut(folder / f"{strip}.png")
                    if strip == BARE:
                        found.append(_likeness(made, held_out, judge))
                    else:
                        found.append(_measures(made, held_out, _base(root, subject), _prompts(subject), judge))
        if costs:
            drawn = FREELY if METHODS[name].kept and strip == FREE else ""
            prompts = len(ALONE if strip == BARE else PROMPTS)
            yield {
                "method": name + drawn,
                "runs": len(costs),
                "bytes": max(c["bytes"] for c in costs),
                "seconds": min(c["seconds"] for c in costs),  # another process may have slowed the others
            } | {
                measure: vars(interval(torch.cat([one[measure].view(prompts, -1) for one in found])))
                for measure in found[0]
            }


def _base(root: Path, subject: str) -> list[Image.Image]:
    path = root / f"base-{subject}.png"
    if not path.exists():
        strip_of([_drawn(bases.load_base(bases.EMBEDDED), subject)]).save(path)
    return _cut(path)


def _measures(
    made: list[Image.Image], held_out: list[Image.Image], base: list[Image.Image], prompts: list[str], judge: Features
) -> dict[str, torch.Tensor]:
    each = [prompt for prompt in prompts for _ in SEEDS]
    obeyed = [obeyed_share(prompt, one) for prompt, one in zip(each, made, strict=True)]
    return {
        **_likeness(made, held_out, judge),
        "background_moved": background_moved(made, base, world.outline),
        "obeyed": torch.tensor(obeyed),
    }


def _likeness(made: list[Image.Image], held_out: list[Image.Image], judge: Features) -> dict[str, torch.Tensor]:
    return {
        **cut_out(made, held_out, judge),
        "likeness": metrics.subject_fidelity(world.details(made), world.details(held_out)),
    }


# The rows of README's table, and what they are called there
OURS, LESS, MORE = "comcat train", "diffusers' script, LoRA r=4, 5e-4", "diffusers' script, LoRA r=16, 1e-3"
SHOWN = {
    OURS: "`comcat train`",
    f"{OURS}, 140 steps": "`comcat train`, 140 steps",
    OURS + FREELY: "`comcat train`, drawn with `--no-keep_background`",
    WITHOUT: "`comcat train --convolutions 0`",
    f"{WITHOUT}, 3e-3, without other backgrounds": "the same with `--no-background_augmentation --learning_rate 3e-3`",
    LESS: LESS,
    MORE: MORE,
    f"{MORE}, other backgrounds too": f"{MORE}, learned from our other backgrounds too, one training each",
    f"{MORE}, convolutions too": f"{MORE}, on the convolutions of residual blocks too, one training each",
    "DreamBooth, the whole U-Net, 2e-4": "DreamBooth, the whole U-Net, 2e-4, one training each",
}
DIGITS = {"shape": 3, "colour_off": 1, "background_moved": 1, "likeness": 3, "obeyed": 2}


def tables(report: dict) -> str:
    """README's: what it does better and worse than a LoRA, in five rows, and what was measured of each method."""
    rows = {row["method"]: row for row in report["rows"]}

    def mean(method: str, measure: str) -> str:
        return f"{rows[method][measure]['mean']:.{DIGITS[measure]}f}"

    def of_loras(measure: str) -> str:
        return f"{mean(LESS, measure)} (r=4) to {mean(MORE, measure)} (r=16)"

    sizes = {name: f"{rows[name]['bytes'] / 1000:.0f} kB" for name in (OURS, LESS, MORE)}
    told = [
        ("the file", sizes[OURS], f"{sizes[LESS]} (r=4) to {sizes[MORE]} (r=16)"),
        ("a prompt without the trigger word", "the base's picture, to the bit",
         "moves (its *drift*: [docs/results.md](docs/results.md))"),
        ("how far the background is moved that the prompt asks for, of 255", mean(OURS, "background_moved"),
         of_loras("background_moved")),
        ("how much like the subject (likeness of details)", mean(OURS, "likeness"), of_loras("likeness")),
        ("opens in", "this tool, ComfyUI and Forge with our nodes; as a LoRA if trained with `--as lora`",
         "every program"),
    ]  # fmt: skip
    versus = shared.markdown_table(["", "COMCAT, the default", "a LoRA by diffusers' script"], told)
    cells = [
        (label, f"{rows[name]['bytes']:,}", *(mean(name, measure) for measure in MEASURES))
        for name, label in SHOWN.items()
        if name in rows
    ]
    measured = shared.markdown_table(["", "bytes", *(measure.replace("_", " ") for measure in MEASURES)], cells)
    return f"{versus}\n\n{measured}\n\n{_circumstances(report)}"


def alone(report: dict) -> str:
    """The same methods by prompts that name the subject and nothing else."""
    return f"{shown(report['rows'], LIKENESS)}\n\n{_circumstances(report)}"


def _circumstances(report: dict) -> str:
    """Those of the table, and of rows that were added to it."""
    own = {row["method"].removesuffix(FREELY): row["added"] for row in report["rows"] if "added" in row}
    apart = [f"{method}: {shared.circumstances_text(taken)}" for method, taken in own.items()]
    return "\n\n".join([shared.circumstances_text(report["circumstances"]), *apart])


def added(report: dict, rows: list[dict], taken: dict) -> dict:
    """A report with more rows, which say how they were added; in the order of `METHODS`, and of no others."""
    new = {row["method"]: {**row, "added": taken} for row in rows}
    found = {row["method"]: row for row in report["rows"]} | new
    order = [name + drawn for name in METHODS for drawn in ("", FREELY)]
    return {**report, "rows": [found[name] for name in order if name in found]}


def main(arguments: list[str] | None = None) -> None:
    """Run what is not there yet, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/subjects"), help="where every run is kept")
    parser.add_argument("--seeds", type=int, default=1, help="of the training")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--show", action="store_true", help="only the table of what is there")
    parser.add_argument("--add", action="store_true", help="leave the other rows of the table as they are")
    asked = parser.parse_args(arguments)
    asked.folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        (name, subject, seed)
        for seed in range(asked.seeds)
        for subject in UNSEEN
        for name in asked.methods
        if not (METHODS[name].once and seed)
    ]
    with ProcessPoolExecutor(asked.processes, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(do, *job, asked.folder) for job in jobs if not asked.show]
        for job, done in zip(jobs, waiting, strict=False):
            done.result()
            print(f"{time.strftime('%H:%M:%S')} {' '.join(map(str, job))}", flush=True)
    shared.use_threads(1)  # as every run does
    taken = shared.circumstances(torch.device("cpu"), torch.float32)
    for name, strips, measures in (("subjects", (KEPT, FREE), MEASURES), ("alone", (BARE,), LIKENESS)):
        rows = list(measured(asked.folder, asked.seeds, strips))
        if not asked.show:
            path = shared.results_path(name, torch.device("cpu"))
            whole = {"circumstances": taken, "rows": rows}
            shared.write_json(path, added(json.loads(path.read_text()), rows, taken) if asked.add else whole)
        print(shown(rows, measures))


if __name__ == "__main__":
    main()
