"""Do the text's keys and values alone carry a subject on a joint-attention transformer? Kinds against LoRA on them.

    make dinov2 && python -m benchmarks.joint    # hours on a CPU core; goes on where it was cut
    python -m benchmarks.joint --show            # the table of what is there

On the flow-matching base (embedded-flow, FLUX.2 [klein]'s classes): four captioned pictures each of an owl, a car and a
rocket (recipe/characters.py), 400 steps of four. What is adapted is, but where the name says more, `add_k_proj` and
`add_v_proj` of the blocks of two streams. Drawn are prompts with the trigger, which name background, place and size,
and prompts without it, whose pictures should be the base's (`drift`). Measures are those of `benchmarks.subjects`.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from benchmarks import circumstances as shared
from benchmarks.by_command import taught
from benchmarks.by_script import learned
from benchmarks.customization_report import shown
from benchmarks.customization_runs import DRIFT_PROMPTS, PROMPTS, apart, crop_of, obeyed_share, strip_of
from benchmarks.dinov2 import FOLDER as DINOV2
from comcat_diffusion import bases
from comcat_diffusion.config import EMBEDDED_FLOW
from comcat_diffusion.evaluation import metrics, world
from comcat_diffusion.evaluation.features import Features, load_features
from comcat_diffusion.evaluation.metrics import interval
from comcat_diffusion.generation.pictures import Drawing, Sampling, draw, slug
from recipe.characters import UNSEEN
from recipe.subject import HELD_OUT, TRAIN, TRIGGER, caption, picture

NAME, DRAWING_STEPS = "subject", 25
TEXT = ("add_k_proj", "add_v_proj")
BOTH = (*TEXT, "to_k", "to_v")
MEASURES = ("shape", "colour_off", "background_moved", "likeness", "obeyed", "drift")
Learned = tuple[DiffusionPipeline, int, float]  # with what was learned; bytes of its file, seconds of its steps


def _comcat(**settings: object) -> Callable[..., Learned]:
    def learn(subject: str, seed: int, steps: int, folder: Path) -> Learned:
        captions = [caption(subject, pose) for pose in TRAIN]
        done = taught(subject, seed, folder, NAME, captions, EMBEDDED_FLOW, max_train_steps=steps, **settings)
        return done.pipe, done.file.stat().st_size, done.seconds

    return learn


def _lora(rank: int, rate: float, targets: tuple[str, ...] = TEXT) -> Callable[..., Learned]:
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(targets))

    def start(pipe: DiffusionPipeline) -> None:
        pipe.transformer.requires_grad_(False)
        pipe.transformer.add_adapter(config, NAME)

    def kept(pipe: DiffusionPipeline) -> dict:
        return get_peft_model_state_dict(pipe.transformer, adapter_name=NAME)

    def learn(subject: str, seed: int, steps: int, folder: Path) -> Learned:
        pipe = bases.load_base(EMBEDDED_FLOW)
        crops = [crop_of(pipe, picture(subject, pose), caption(subject, pose)) for pose in TRAIN]
        return pipe, *learned(pipe, crops, start, rate, seed, steps, kept, folder / "lora.safetensors")

    return learn


METHODS = {
    "tied": _comcat(kind="tied"),
    "foldable": _comcat(kind="foldable"),
    "free": _comcat(kind="free"),
    "cores": _comcat(kind="cores", rank=4),
    "cores, and blocks of one stream": _comcat(kind="cores", rank=4, target_modules=["attn"]),
    "LoRA r=4, 1e-3": _lora(4, 1e-3),
    "LoRA r=16, 1e-3": _lora(16, 1e-3),
    "free, and blocks of one stream": _comcat(kind="free", target_modules=["attn"]),
    "LoRA r=4, 1e-3, the picture's keys and values too": _lora(4, 1e-3, BOTH),
}


def do(name: str, subject: str, seed: int, steps: int, root: Path) -> None:
    """One method on one subject once: its pictures in two rows, and what it cost, unless they are there."""
    folder = root / f"{slug(name)}-{subject}-{seed}-{steps}"
    if (folder / "cost.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    pipe, size, seconds = METHODS[name](subject, seed, steps, folder)
    strip_of(_drawn(pipe, subject)).save(folder / "drawn.png")
    shared.write_json(folder / "cost.json", {"bytes": size, "seconds": seconds})


def _prompts(subject: str) -> tuple[list[str], list[str]]:
    """Those with the trigger, and those without."""
    named = [prompt.format(subject=f"{TRIGGER} {subject}") for prompt in PROMPTS]
    return named, [prompt.format_map({"class": subject}) for prompt in DRIFT_PROMPTS]


def _drawn(pipe: DiffusionPipeline, subject: str) -> list[list[Image.Image]]:
    """A row for the prompts with the trigger, and one for the others."""
    pipe.set_progress_bar_config(disable=True)
    sampling = Sampling(DRAWING_STEPS, bases.EMBEDDED_GUIDANCE, batch_size=len(PROMPTS))
    return [list(draw(pipe, [Drawing(prompt, 0) for prompt in some], sampling)) for some in _prompts(subject)]


def _rows(path: Path) -> list[list[Image.Image]]:
    strip = Image.open(path).convert("RGB")
    side = strip.height // 2
    return [[strip.crop((x, y, x + side, y + side)) for x in range(0, strip.width, side)] for y in (0, side)]


def _base(root: Path, subject: str) -> list[list[Image.Image]]:
    path = root / f"base-{subject}.png"
    if not path.exists():
        strip_of(_drawn(bases.load_base(EMBEDDED_FLOW), subject)).save(path)
    return _rows(path)


def measured(root: Path, seeds: int, steps: int) -> Iterator[dict]:
    """What there is of every method, in means over subjects, trainings and prompts, with intervals."""
    judge = load_features(str(DINOV2))
    for name in METHODS:
        values: dict[str, list] = {measure: [] for measure in MEASURES}
        costs = []
        for subject in UNSEEN:
            for folder in (root / f"{slug(name)}-{subject}-{seed}-{steps}" for seed in range(seeds)):
                if (folder / "cost.json").exists():
                    costs.append(json.loads((folder / "cost.json").read_text()))
                    found = _measures(_rows(folder / "drawn.png"), subject, _base(root, subject), judge)
                    for measure, value in found.items():
                        values[measure].append(value.view(-1, 1))
        if costs:
            told = {measure: vars(interval(torch.cat(found))) for measure, found in values.items()}
            seconds = min(cost["seconds"] for cost in costs)  # another process may have slowed the others
            yield {
                "method": name,
                "runs": len(costs),
                "bytes": max(c["bytes"] for c in costs),
                "seconds": seconds,
            } | told


def _measures(
    rows: list[list[Image.Image]], subject: str, base: list[list[Image.Image]], judge: Features
) -> dict[str, torch.Tensor]:
    (made, others), held_out = rows, [picture(subject, pose) for pose in HELD_OUT]
    obeyed = [obeyed_share(prompt, one) for prompt, one in zip(_prompts(subject)[0], made, strict=True)]
    return {
        **apart(made, held_out, base[0], judge),
        "likeness": metrics.subject_fidelity(world.details(made), world.details(held_out)),
        "obeyed": torch.tensor(obeyed),
        "drift": metrics.drift(judge.images(others), judge.images(base[1])),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run what is not there yet, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/joint"), help="where every run is kept")
    parser.add_argument("--seeds", type=int, default=3, help="of the training")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--subjects", nargs="*", default=list(UNSEEN), choices=UNSEEN, metavar="SUBJECT")
    parser.add_argument("--show", action="store_true", help="only the table of what is there")
    asked = parser.parse_args(arguments)
    asked.folder.mkdir(parents=True, exist_ok=True)
    shared.use_threads(1)
    jobs = [
        (name, subject, seed) for seed in range(asked.seeds) for subject in asked.subjects for name in asked.methods
    ]
    for job in jobs if not asked.show else ():
        do(*job, asked.steps, asked.folder)
        print(f"{time.strftime('%H:%M:%S')} {' '.join(map(str, job))}", flush=True)
    rows = list(measured(asked.folder, asked.seeds, asked.steps))
    report = {"circumstances": shared.circumstances(torch.device("cpu"), torch.float32), "rows": rows}
    if not asked.show:
        shared.write_json(shared.results_path("joint", torch.device("cpu")), report)
    print(shown(rows, MEASURES))


if __name__ == "__main__":
    main()
