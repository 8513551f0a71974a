"""Teaching the embedded base a subject: COMCAT against what a person would pick instead, in one table.

    make dinov2                                   # an outside judge
    python -m benchmarks.customization            # four hours on two CPU cores; goes on where it was cut
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
- shape, colour off, background moved: of the cut-out subject by DINOv2-small, and of 255 by the pixels;
- clip: the same by the small CLIP's features;
- obedience: share of backgrounds, places and sizes that are as asked, read from the pixels;
- drift: 1 - cosine to the base's picture of the same seed, on prompts without the trigger: the plain class and others;
- diversity: 1 - cosine between the seeds of a prompt.

Besides, some COMCAT adapters are shrunk to ever fewer bytes (`comcat shrink`) and measured again, and some methods
learn in fewer and in more steps too, which tells what one reaches of the other in the same time.
"""

import argparse
import hashlib
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks import circumstances as shared
from benchmarks.customization_report import table, write_report
from benchmarks.customization_runs import Bench, Run, keep_pictures, learn, measured, peak_mib, prepare_base
from benchmarks.dinov2 import FOLDER as DINOV2
from benchmarks.methods import METHODS
from comcat_diffusion import bases
from comcat_diffusion.adapters.shrink import shrink
from comcat_diffusion.adapters.store import load_adapter
from comcat_diffusion.evaluation.features import Features, load_features

TUNING, REPORTED = ("teddy", "cat"), ("robot", "fish", "house")
SHRUNK = {  # adapters that are shrunk to these bytes and measured again
    "COMCAT tied, rank 4, from the trigger on": (5_000,),
    "COMCAT tied, rank 8, from the trigger on": (10_000, 6_000),
    "COMCAT tied, rank 8, way up, from the trigger on": (5_000,),
    "COMCAT tied, rank 4, rank 2 of self-attention, from the trigger on": (10_000,),
    "COMCAT tied, rank 8, rank 4 of self-attention, from the trigger on": (16_000,),
    "COMCAT free, rank 8, cross, from the trigger on": (20_000, 10_000),
}
SHORTER = (150, 180, 220)  # steps after which ours may be as good as the recipe's 300 (training_report.AS_GOOD)
OTHER_STEPS = {
    "COMCAT tied, rank 8, from the trigger on": (*SHORTER, 600),
    "COMCAT tied, rank 8, way up, from the trigger on": (150, 600),
    "COMCAT free, rank 8, cross, from the trigger on": (150,),
    "LoRA, rank 4": (150, 600),
}


def drawn_by() -> str:
    """The embedded base as it is and its guidance: runs with others are not taken for theirs."""
    weights = bases.assets() / "tiny-sd" / "unet" / "diffusion_pytorch_model.safetensors"
    return f"{hashlib.sha256(weights.read_bytes()).hexdigest()[:8]}-{bases.EMBEDDED_GUIDANCE:g}"


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


def best_rates(
    features: Features, judge: Features, folder: Path, steps: int, tuning: tuple[str, ...]
) -> dict[str, float]:
    """By method, the rate with the highest score on the tuning subjects."""

    def of(name: str, rate: float) -> float:
        if len(METHODS[name].rates) == 1:
            return 0.0
        runs = [Run(name, subject, rate, 0, steps) for subject in tuning]
        return sum(score(measured(features, judge, run, folder)) for run in runs)

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
    features, judge = load_features(bases.EMBEDDED), load_features(str(DINOV2))
    rates = best_rates(features, judge, asked.folder, asked.steps, tuning)
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
        measured(features, judge, run, asked.folder) | {"peak_mib": peak_mib(run, asked.folder)}
        for run in runs
        if all(subjects_kept[replace(run, subject=subject).name] for subject in subjects)  # a seed counts when whole
    ]
    print(table(write_report(results, taken, target, plots)))


if __name__ == "__main__":
    main()
