"""Do the text's keys and values alone carry a subject on a joint-attention transformer? Kinds against LoRA on them.

    make dinov2 && python -m benchmarks.joint    # hours on a CPU core; goes on where it was cut
    python -m benchmarks.joint --show            # the table of what is there
    python -m benchmarks.joint --results joint-kept --methods METHOD ...    # of some, into a table of their own

On the flow-matching base (embedded-flow, FLUX.2 [klein]'s classes): four captioned pictures each of an owl, a car and a
rocket (recipe/characters.py), 400 steps of four, with captions always and without masks, as the LoRAs learn. What is
adapted is, but where the name says more, `add_k_proj` and `add_v_proj` of the blocks of two streams; in those of one
stream LoRAs are on `to_qkv_mlp_proj`, with the feed-forward. Drawn are prompts with the trigger, which name background,
place and size, and prompts without it, whose pictures should be the base's (`drift`); by our kinds also with the
background kept, as `comcat generate` draws. Measures are those of `benchmarks.subjects`.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
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
from benchmarks.customization_runs import DRIFT_PROMPTS, PROMPTS, apart, crop_of, obeyed_share, strip_of
from benchmarks.dinov2 import FOLDER as DINOV2
from comcat_diffusion import bases, load_adapter
from comcat_diffusion.config import EMBEDDED_FLOW
from comcat_diffusion.evaluation import metrics, world
from comcat_diffusion.evaluation.features import Features, load_features
from comcat_diffusion.evaluation.metrics import interval
from comcat_diffusion.generation.pictures import Drawing, Sampling, draw, slug
from recipe.characters import UNSEEN
from recipe.subject import HELD_OUT, TRAIN, TRIGGER, caption, picture

NAME, DRAWING_STEPS = "subject", 25
TEXT = ("add_k_proj", "add_v_proj")
OF_TWO = ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]  # the base's blocks of two streams
ALL = (*TEXT, "to_qkv_mlp_proj")
# So that kinds learn from what the LoRAs learn from
ALIKE = {"caption_dropout_rate": 0.0, "auto_mask": False, "background_augmentation": False}
FREE_RATE = {"learning_rate": 3e-3}  # the best of three where that is all they learn from (docs/log.md)
SMALL = {"max_bytes": 20_000}  # as many for both
MEASURES = ("shape", "colour_off", "background_moved", "likeness", "obeyed", "drift")
FREE, KEPT = "drawn.png", "kept.png"
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
    "comcat train": _comcat(),
    "tied": _comcat(kind="tied", target_modules=OF_TWO, **ALIKE),
    "foldable": _comcat(kind="foldable", target_modules=OF_TWO, **ALIKE),
    "free": _comcat(kind="free", target_modules=OF_TWO, **ALIKE, **FREE_RATE),
    "cores": _comcat(kind="cores", rank=4, target_modules=OF_TWO, **ALIKE),
    "LoRA r=4, 1e-3": _lora(4, 1e-3),
    "LoRA r=16, 1e-3": _lora(16, 1e-3),
    "tied, and blocks of one stream": _comcat(kind="tied", target_modules=["attn"], **ALIKE),
    "free, and blocks of one stream": _comcat(kind="free", target_modules=["attn"], **ALIKE, **FREE_RATE),
    "cores, and blocks of one stream": _comcat(kind="cores", rank=4, target_modules=["attn"], **ALIKE),
    "LoRA r=4, 1e-3, and blocks of one stream": _lora(4, 1e-3, ALL),
    "LoRA r=16, 1e-3, and blocks of one stream": _lora(16, 1e-3, ALL),
    "free, and blocks of one stream, 20 kB": _comcat(target_modules=["attn"], **ALIKE, **FREE_RATE, **SMALL),
    "free, and beside feed-forwards, 20 kB": _comcat(feed_forwards=8, learning_rate=2e-3, **ALIKE, **SMALL),
}


def do(name: str, subject: str, seed: int, steps: int, root: Path) -> None:
    """One method on one subject once: its pictures in two rows, and what it cost, unless they are there."""
    folder = root / f"{slug(name)}-{subject}-{seed}-{steps}"
    if (folder / "cost.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    pipe, size, seconds = METHODS[name](subject, seed, steps, folder)
    strip_of(_drawn(pipe, subject)).save(folder / FREE)
    shared.write_json(folder / "cost.json", {"bytes": size, "seconds": seconds})


def keep(name: str, subject: str, seed: int, steps: int, root: Path) -> None:
    """The same pictures of an adapter of ours with their backgrounds kept, unless they are there."""
    folder = root / f"{slug(name)}-{subject}-{seed}-{steps}"
    file = folder / f"{slug(f'{TRIGGER} {subject}')}.safetensors"
    if file.exists() and not (folder / KEPT).exists():
        pipe = bases.load_base(EMBEDDED_FLOW)
        load_adapter(pipe, file, NAME)
        strip_of(_drawn(pipe, subject, words(pipe, subject, NAME))).save(folder / KEPT)


def _prompts(subject: str) -> tuple[list[str], list[str]]:
    """Those with the trigger, and those without."""
    named = [prompt.format(subject=f"{TRIGGER} {subject}") for prompt in PROMPTS]
    return named, [prompt.format_map({"class": subject}) for prompt in DRIFT_PROMPTS]


def _drawn(pipe: DiffusionPipeline, subject: str, placed: dict | None = None) -> list[list[Image.Image]]:
    """A row for the prompts with the trigger, and one for the others; `placed`: words that adapters are placed by."""
    pipe.set_progress_bar_config(disable=True)
    sampling = Sampling(DRAWING_STEPS, bases.EMBEDDED_GUIDANCE, batch_size=len(PROMPTS))
    return [list(draw(pipe, [Drawing(prompt, 0) for prompt in some], sampling, placed)) for some in _prompts(subject)]


def _rows(path: Path) -> list[list[Image.Image]]:
    strip = Image.open(path).convert("RGB")
    side = strip.height // 2
    return [[strip.crop((x, y, x + side, y + side)) for x in range(0, strip.width, side)] for y in (0, side)]


def _base(root: Path, subject: str) -> list[list[Image.Image]]:
    path = root / f"base-{subject}.png"
    if not path.exists():
        strip_of(_drawn(bases.load_base(EMBEDDED_FLOW), subject)).save(path)
    return _rows(path)


def measured(root: Path, seeds: int, steps: int, methods: Sequence[str] = tuple(METHODS)) -> Iterator[dict]:
    """What there is of these methods, in means over subjects, trainings and prompts, with intervals."""
    judge = load_features(str(DINOV2))
    for name, strip in ((name, strip) for name in methods for strip in (FREE, KEPT)):
        values: dict[str, list] = {measure: [] for measure in MEASURES}
        costs = []
        for subject in UNSEEN:
            for folder in (root / f"{slug(name)}-{subject}-{seed}-{steps}" for seed in range(seeds)):
                if (folder / "cost.json").exists() and (folder / strip).exists():
                    costs.append(json.loads((folder / "cost.json").read_text()))
                    found = _measures(_rows(folder / strip), subject, _base(root, subject), judge)
                    for measure, value in found.items():
                        values[measure].append(value.view(-1, 1))
        if costs:
            told = {measure: vars(interval(torch.cat(found))) for measure, found in values.items()}
            seconds = min(cost["seconds"] for cost in costs)  # another process may have slowed the others
            yield {
                "method": f"{name}, background kept" if strip == KEPT else name,
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


def table(report: dict) -> str:
    """A line a method, and where it was measured."""
    return f"{shown(report['rows'], MEASURES)}\n\n{shared.circumstances_text(report['circumstances'])}"


def main(arguments: list[str] | None = None) -> None:
    """Run what is not there yet, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/joint"), help="where every run is kept")
    parser.add_argument("--seeds", type=int, default=3, help="of the training")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--subjects", nargs="*", default=list(UNSEEN), choices=UNSEEN, metavar="SUBJECT")
    parser.add_argument("--results", default="joint", help="name of the table (default: %(default)s)")
    parser.add_argument("--show", action="store_true", help="only the table of what is there")
    asked = parser.parse_args(arguments)
    asked.folder.mkdir(parents=True, exist_ok=True)
    shared.use_threads(1)
    jobs = [
        (name, subject, seed) for seed in range(asked.seeds) for subject in asked.subjects for name in asked.methods
    ]
    for job in jobs if not asked.show else ():
        do(*job, asked.steps, asked.folder)
        keep(*job, asked.steps, asked.folder)
        print(f"{time.strftime('%H:%M:%S')} {' '.join(map(str, job))}", flush=True)
    rows = list(measured(asked.folder, asked.seeds, asked.steps, asked.methods))
    report = {"circumstances": shared.circumstances(torch.device("cpu"), torch.float32), "rows": rows}
    if not asked.show:
        shared.write_json(shared.results_path(asked.results, torch.device("cpu")), report)
    print(table(report))


if __name__ == "__main__":
    main()
