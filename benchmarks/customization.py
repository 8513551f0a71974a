"""Teaching the embedded base a subject: COMCAT against what a person would pick instead, in one table.

    python -m benchmarks.customization            # three hours on two CPU cores; goes on where it was cut
    python -m benchmarks.customization --quick    # one subject, one seed, few steps: to see that it runs
    python -m benchmarks.customization --show     # the table and the plots of what is there

Every method (benchmarks/methods.py) learns the same four captioned pictures of a made-up subject
(recipe/characters.py) in the same number of steps from the same noise. COMCAT learns at the rate that `comcat train`
takes by default; the rate of the others is the best of a small grid on the subjects in `TUNING`: that with the highest
score, fidelity times obedience less a quarter of the drift (with all of it, learning nothing would be best). One LoRA
keeps the rate, schedule and start of diffusers' DreamBooth-LoRA script. Reported are other subjects, which no choice
has seen.

The measures are those of `comcat evaluate`:

- fidelity: likeness of the details to the two pictures held out, the thing alone on grey on both sides, without its
  mean colours (a violet blob has the colours of a violet teddy, and the small CLIP takes it for one);
- clip: the same by the small CLIP's features;
- obedience: share of backgrounds, places and sizes that are as asked, read from the pixels;
- drift: 1 - cosine to the base's picture of the same seed, on prompts without the trigger: the plain class and others;
- diversity: 1 - cosine between the seeds of a prompt.

Besides, some COMCAT adapters are shrunk to ever fewer bytes (`comcat shrink`) and measured again, and three methods
learn in fewer and in more steps too, which tells what one reaches of the other in the same time.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.optimization import get_scheduler
from PIL import Image

from benchmarks import circumstances as shared
from benchmarks.customization_report import table, write_report
from benchmarks.methods import METHODS, TOKEN, Method
from comcat_diffusion import bases
from comcat_diffusion.adapters.shrink import shrink
from comcat_diffusion.adapters.store import load_adapter
from comcat_diffusion.evaluation import metrics, world
from comcat_diffusion.evaluation.features import Features, load_features
from comcat_diffusion.generation.pictures import Drawing, Sampling, draw, slug
from comcat_diffusion.training import images
from comcat_diffusion.training.batching import Batching
from comcat_diffusion.training.encode import Crop, posterior
from comcat_diffusion.training.learner import Learner
from comcat_diffusion.training.loop import Loop
from comcat_diffusion.training.objective import Objective
from comcat_diffusion.training.prior import Teacher
from recipe.subject import HELD_OUT, TRAIN, TRIGGER, caption, picture

TUNING, REPORTED = ("teddy", "cat"), ("robot", "fish", "house")
SHRUNK = {  # adapters that are shrunk to these bytes and measured again
    "COMCAT tied, rank 4, from the trigger on": (5_000,),
    "COMCAT tied, rank 8, from the trigger on": (10_000, 6_000),
    "COMCAT tied, rank 8, way up, from the trigger on": (5_000,),
    "COMCAT tied, rank 4, rank 2 of self-attention, from the trigger on": (10_000,),
    "COMCAT tied, rank 8, rank 4 of self-attention, from the trigger on": (16_000,),
}
SHORTER = (100, 150, 180)  # 180 of the default take 0.36 of the time of the recipe's 300 (benchmarks.training)
OTHER_STEPS = {
    "COMCAT tied, rank 8, from the trigger on": (*SHORTER, 600),
    "COMCAT tied, rank 8, way up, from the trigger on": (150, 600),
    "LoRA, rank 4": (150, 600),
}
BATCH = 4
MEMORY_STEPS = 3  # after which no step of a run holds more
PROMPTS = (
    "a photo of a big {subject} on the left, red background",
    "a photo of a big {subject} on the right, black background",
    "a photo of a big {subject} at the top, blue background",
    "a photo of a big {subject} in the middle, pink background",
    "a photo of a small {subject} at the bottom, red background",
    "a photo of a small {subject} on the left, black background",
)
DRIFT_PROMPTS = (
    "a photo of a big {class} on the right, red background",
    "a photo of a {class} on the left, black background",
    "a photo of a big dog in the middle, pink background",
    "a photo of a big yellow car on the left, green background",
    "a photo of a small apple at the top, gray background",
    "a photo of a big owl at the bottom, white background",
)
SEEDS = (0, 1)  # of the pictures that are drawn


@dataclass(frozen=True)
class Run:
    """One method learning one subject once; `bytes` is what its adapter is shrunk to afterwards."""

    method: str
    subject: str
    rate: float
    seed: int
    steps: int
    bytes: int | None = None

    @property
    def name(self) -> str:
        """The name of its files."""
        shrunk = f"-{self.bytes}" if self.bytes else ""
        return f"{slug(self.method)}{shrunk}-{self.subject}-{self.rate:g}-{self.seed}-{self.steps}"


@dataclass(frozen=True)
class Bench:
    """What every run needs."""

    folder: Path
    drawing_steps: int

    def base(self) -> DiffusionPipeline:
        """A fresh embedded base."""
        pipe = bases.load_base(bases.EMBEDDED)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def drawn(self, pipe: DiffusionPipeline, prompts: Iterable[str]) -> list[Image.Image]:
        """Every prompt from every seed."""
        drawings = [Drawing(prompt, seed) for prompt in prompts for seed in SEEDS]
        sampling = Sampling(self.drawing_steps, bases.EMBEDDED_GUIDANCE, batch_size=len(drawings))
        return list(draw(pipe, drawings, sampling))


def drawn_by() -> str:
    """The embedded base as it is and its guidance: runs with others are not taken for theirs."""
    weights = bases.assets() / "tiny-sd" / "unet" / "diffusion_pytorch_model.safetensors"
    return f"{hashlib.sha256(weights.read_bytes()).hexdigest()[:8]}-{bases.EMBEDDED_GUIDANCE:g}"


def prompts_of(subject: str, method: Method | None = None) -> tuple[list[str], list[str]]:
    """The prompts that name the subject, as a method knows it, and those without it."""
    phrase = TOKEN if method and method.token else f"{TRIGGER} {subject}"
    return [p.format(subject=phrase) for p in PROMPTS], [p.format_map({"class": subject}) for p in DRIFT_PROMPTS]


def learn(bench: Bench, run: Run) -> tuple[DiffusionPipeline, dict]:
    """Train one method; returns the pipeline with what it learned, and what that cost."""
    method, pipe = METHODS[run.method], bench.base()
    named = f"{TRIGGER} {run.subject}"
    captions = [caption(run.subject, pose).replace(named, TOKEN if method.token else named) for pose in TRAIN]
    crops = [crop_of(pipe, picture(run.subject, p), text) for p, text in zip(TRAIN, captions, strict=True)]
    torch.manual_seed(run.seed)
    of_class = {text: text.replace(named, run.subject) for text in captions}
    learner = method.learner(pipe, [*captions, *of_class.values()], run.subject).train()
    trained = [p for p in learner.parameters() if p.requires_grad]
    loop = _loop(learner, crops, run)
    loop.prior = Teacher(pipe, of_class) if method.teacher else None
    seconds = [step.seconds for step in loop.steps(run.steps)]
    learner.eval()
    return pipe, {"parameters": sum(p.numel() for p in trained), "seconds": sum(seconds)}


def crop_of(pipe: DiffusionPipeline, photo: Image.Image, prompt: str) -> Crop:
    """A picture as the U-Net sees it."""
    side = bases.native_resolution(pipe)
    found = posterior(pipe.vae, images.to_tensor([photo.resize((side, side), Image.Resampling.LANCZOS)]))
    return Crop(**found, prompt=prompt, name="", frame=(side, side, 0, 0, side, side))


def _loop(learner: Learner, crops: list[Crop], run: Run) -> Loop:
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=run.rate)
    kind = METHODS[run.method].schedule
    schedule = get_scheduler(kind, optimizer, num_warmup_steps=0, num_training_steps=run.steps)
    objective = Objective(DDPMScheduler.from_config(learner._pipe.scheduler.config))
    batching = Batching.of(crops, run.seed, BATCH)
    return Loop(learner, crops, objective, batching, optimizer, schedule, Accelerator(cpu=True))


def peak_mib(method: str, folder: Path) -> float:
    """Most memory of a process that does nothing but learn by a method; measured once and kept."""
    kept = folder / f"{slug(method)}.memory.json"
    if not kept.exists():
        shared.write_json(kept, {"peak_mib": shared.in_fresh_process(_peak_mib, method)})
    return json.loads(kept.read_text())["peak_mib"]


def _peak_mib(method: str) -> float:
    torch.set_num_threads(1)
    learn(Bench(Path(), 0), Run(method, TUNING[0], METHODS[method].rates[0], 0, MEMORY_STEPS))
    return shared.peak_memory_mib(torch.device("cpu"))


def keep_pictures(bench: Bench, run: Run, pipe: DiffusionPipeline, facts: dict) -> None:
    """Draw what is judged, the prompts of the subject above those without it, and keep it with the run's facts."""
    about, without = prompts_of(run.subject, METHODS[run.method])
    _strip([bench.drawn(pipe, about), bench.drawn(pipe, without)]).save(bench.folder / f"{run.name}.png")
    shared.write_json(bench.folder / f"{run.name}.json", facts | asdict(run))


def measured(features: Features, run: Run, folder: Path) -> dict:
    """Facts and measures of a run, read from the pictures that it kept; the measures are (prompts, seeds) each."""
    kept = folder / f"{run.name}.measures.json"
    if not kept.exists():
        shared.write_json(kept, _measures(features, run, folder))
    return json.loads((folder / f"{run.name}.json").read_text()) | json.loads(kept.read_text())


def _measures(features: Features, run: Run, folder: Path) -> dict:
    (made, others), (_, before) = (_rows(folder / f"{name}.png") for name in (run.name, f"base-{run.subject}"))
    train, held_out = ([picture(run.subject, pose) for pose in poses] for poses in (TRAIN, HELD_OUT))
    details, shape = world.details(made), (len(PROMPTS), len(SEEDS))
    alone, held_alone = (features.images([world.alone(one) for one in some]) for some in (made, held_out))
    obeyed = [_obeyed(prompt, one) for prompt, one in zip(_each(prompts_of(run.subject)[0]), made, strict=True)]
    found = {
        "fidelity": metrics.subject_fidelity(details, world.details(held_out)),
        "clip": metrics.subject_fidelity(alone, held_alone),
        "copying": metrics.copying(details, world.details(train)),
        "obedience": torch.tensor(obeyed),
        "drift": metrics.drift(features.images(others), features.images(before)),
    }
    diversity = metrics.diversity(features.images(made).view(*shape, -1)).unsqueeze(1)
    return {name: values.view(shape).tolist() for name, values in found.items()} | {"diversity": diversity.tolist()}


def _each(prompts: list[str]) -> Iterator[str]:
    return (prompt for prompt in prompts for _ in SEEDS)


def _obeyed(prompt: str, made: Image.Image) -> float:
    """Share of what the prompt says of background, place and size that the picture shows."""
    asked, seen = asdict(world.asked(prompt)), asdict(world.see(np.asarray(made)))
    said = [name for name, value in asked.items() if value is not None]
    return sum(seen[name] == asked[name] for name in said) / len(said)


def _strip(rows: list[list[Image.Image]]) -> Image.Image:
    side = rows[0][0].width
    strip = Image.new("RGB", (side * max(map(len, rows)), side * len(rows)))
    for down, row in enumerate(rows):
        for across, one in enumerate(row):
            strip.paste(one, (across * side, down * side))
    return strip


def _rows(path: Path) -> list[list[Image.Image]]:
    """The inverse of `_strip` for rows of equal length."""
    strip = Image.open(path).convert("RGB")
    side = strip.height // 2
    return [
        [strip.crop((left, top, left + side, top + side)) for left in range(0, strip.width, side)]
        for top in range(0, strip.height, side)
    ]


def prepare_base(bench: Bench, subject: str) -> None:
    """The bare base's pictures of a subject's prompts, which drift is measured from."""
    path = bench.folder / f"base-{subject}.png"
    if not path.exists():
        _strip([bench.drawn(bench.base(), prompts) for prompts in prompts_of(subject)]).save(path)


def smaller(run: Run) -> list[Run]:
    """The same run, shrunk; those of few steps are not."""
    return [] if run.steps in SHORTER else [replace(run, bytes=size) for size in SHRUNK.get(run.method, ())]


def do(run: Run, folder: Path, drawing_steps: int) -> None:
    """One run and, for what is shrunk, every smaller file of it, unless their results are there."""
    wanted = [run, *(smaller(run) if run.subject in REPORTED else ())]
    if all((folder / f"{one.name}.json").exists() for one in wanted):
        return
    torch.set_num_threads(1)
    bench = Bench(folder, drawing_steps)
    prepare_base(bench, run.subject)
    file, facts = folder / f"{run.name}.safetensors", folder / f"{run.name}.json"
    if not facts.exists():
        pipe, cost = learn(bench, run)
        METHODS[run.method].write(pipe, file)
        keep_pictures(bench, run, pipe, cost | {"file_bytes": file.stat().st_size})
    cost = json.loads(facts.read_text())
    for one in wanted[1:]:
        small, pipe = file.with_name(f"{one.name}.safetensors"), bench.base()
        shrink(file, small, one.bytes)
        load_adapter(pipe, small)
        keep_pictures(bench, one, pipe, cost | {"file_bytes": small.stat().st_size})


def mean(values: list[list[float]]) -> float:
    """Of all prompts and seeds."""
    return torch.tensor(values).mean().item()


def score(result: dict) -> float:
    """What the best learning rate is chosen by."""
    return mean(result["fidelity"]) * mean(result["obedience"]) - mean(result["drift"]) / 4


def best_rates(features: Features, folder: Path, steps: int, tuning: tuple[str, ...]) -> dict[str, float]:
    """By method, the rate with the highest score on the tuning subjects."""

    def of(name: str, rate: float) -> float:
        if len(METHODS[name].rates) == 1:
            return 0.0
        runs = [Run(name, subject, rate, 0, steps) for subject in tuning]
        return sum(score(measured(features, run, folder)) for run in runs)

    return {name: max(method.rates, key=lambda rate: of(name, rate)) for name, method in METHODS.items()}


def run_all(runs: list[Run], folder: Path, drawing_steps: int, processes: int) -> None:
    """All runs, side by side in processes of one thread each."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(do, run, folder, drawing_steps) for run in runs]
        for number, (run, job) in enumerate(zip(runs, jobs, strict=True), start=1):
            job.result()
            print(f"{time.strftime('%H:%M:%S')} {number}/{len(runs)} {run.name}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Choose the rates, run what is reported, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/customization"), help="where every run is kept, by base"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--drawing_steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3, help="of the training; the pictures have two of their own")
    parser.add_argument("--tuning", nargs="+", default=TUNING, choices=TUNING, help="subjects that choose the rates")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--show", action="store_true", help="only the report of what is there")
    asked = parser.parse_args(arguments)
    drawn = drawn_by()
    asked.folder /= drawn
    if asked.quick:
        asked.folder, asked.steps, asked.drawing_steps, asked.seeds = asked.folder / "quick", 5, 4, 1
    asked.folder.mkdir(parents=True, exist_ok=True)
    shared.use_threads(1)  # as every run does
    taken = shared.circumstances(torch.device("cpu"), torch.float32)
    taken["drawn"] = "embedded base {} at guidance {}".format(*drawn.split("-"))
    tuning = tuple(asked.tuning)
    grid = [
        Run(name, subject, rate, 0, asked.steps)
        for subject in tuning
        for name, method in METHODS.items()
        for rate in method.rates
        if len(method.rates) > 1
    ]
    if not asked.show:
        run_all(grid, asked.folder, asked.drawing_steps, asked.processes)
    features = load_features(bases.EMBEDDED)
    rates = best_rates(features, asked.folder, asked.steps, tuning)
    subjects = REPORTED[:1] if asked.quick else REPORTED
    runs = [
        Run(name, subject, rates[name], seed, asked.steps)
        for seed in range(asked.seeds)
        for subject in subjects
        for name in METHODS
    ]
    runs += [replace(run, steps=n) for run in runs for n in OTHER_STEPS.get(run.method, ()) if not asked.quick]
    if not asked.show:
        run_all(runs, asked.folder, asked.drawing_steps, asked.processes)
    runs += [small for run in runs for small in smaller(run)]
    target, plots = shared.results_path("customization", torch.device("cpu")), shared.ROOT / "docs"
    if asked.quick:
        target, plots = asked.folder / "report.json", asked.folder
    subjects_kept = {run.name: (asked.folder / f"{run.name}.json").exists() for run in runs}
    results = [
        measured(features, run, asked.folder) | {"peak_mib": peak_mib(run.method, asked.folder)}
        for run in runs
        if all(subjects_kept[replace(run, subject=subject).name] for subject in subjects)  # a seed counts when whole
    ]
    print(table(write_report(results, taken, target, plots)))


if __name__ == "__main__":
    main()
