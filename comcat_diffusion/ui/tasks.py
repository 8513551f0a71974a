"""What the worker does for each kind of job: the commands' own functions, with what was asked for on the page.

A task takes its job, whose folder is where everything goes, and returns what the page is to know of its result.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

from comcat_diffusion.generation.config import GenerateConfig
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.ui.images import ImageSet
from comcat_diffusion.ui.jobs import Job
from comcat_diffusion.ui.progress import Paused, Progress


def train_config(request: dict, folder: Path, resume: bool = False) -> TrainConfig:
    """The settings of a training as it was asked for, in the folder of its run."""
    own = folder / "images"
    return TrainConfig(
        **request["settings"],
        instance_data_dir=str(own) if request["own_images"] else None,
        output_dir=str(folder),
        resume_from_checkpoint="latest" if resume else None,
        overwrite=True,  # of what a run that has not come to a checkpoint has left
    )


def train(job: Job) -> dict:
    """Learn a subject."""
    from comcat_diffusion.training.customize import customize

    resume = bool(job.status.get("resume")) and any((job.folder / "checkpoints").glob("checkpoint-*"))
    config = train_config(job.asked["request"], job.folder, resume)
    rounds = 0 if config.skip_final_inference else 1
    if config.validation_steps:
        rounds += (config.max_train_steps - 1) // config.validation_steps + (not resume)
    progress = Progress(job, rounds)
    outcome = customize(config, progress)
    if progress.paused:
        raise Paused
    return {
        "adapter": outcome.adapter.name,
        "steps": outcome.steps,
        "bytes": outcome.adapter.stat().st_size,
        "stopped": outcome.interrupted,
    }


def draw_configs(request: dict, folder: Path) -> Iterator[tuple[float, GenerateConfig]]:
    """(strength, settings) of every row of pictures that was asked for."""
    regions = {one["file"]: folder / f"region-{n}.png" for n, one in enumerate(request["adapters"]) if one["region"]}
    for strength in request["strengths"]:
        yield (
            strength,
            GenerateConfig(
                **request["settings"],
                prompt=[request["prompt"]],
                num_images=request["num_images"],
                adapter=[f"{one['file']}:{one['scale'] * strength:g}" for one in request["adapters"]],
                region=[f"{Path(file).stem}={mask}" for file, mask in regions.items()],
                pretrained_model_name_or_path=request["base"],
                output_dir=str(folder / f"strength-{strength:g}"),
            ),
        )


def draw(job: Job) -> dict:
    """Draw with adapters, at every strength, and with the base alone from the same seeds."""
    from comcat_diffusion.generation.generate import drawn
    from comcat_diffusion.generation.order import order_of
    from comcat_diffusion.ui.base_pictures import BasePictures
    from comcat_diffusion.ui.loaded import LOADED

    request, progress, found = job.asked["request"], Progress(job), []
    rows = [(strength, order_of(config)) for strength, config in draw_configs(request, job.folder)]
    first = rows[0][1]
    seeds = range(first.config.seed, first.config.seed + request["num_images"])
    base = BasePictures(job.folder.parent.parent, first, request["settings"]) if request["compare"] else None
    before, total = 0, len(seeds) * len(rows) + len(base.missing(seeds) if base else ())

    def count(done: int, of: int) -> None:
        progress.count(before + done, total)

    progress.phase("drawing")
    if base:
        for run in base.missing_runs(seeds):
            base.draw(run, count, progress.note, LOADED)
            before += len(run)
        base.copy(seeds, job.folder / "base")
    for strength, order in rows:
        made = drawn(order, count, progress.note, LOADED)
        before += len(made.files)
        for seed, file in zip(seeds, made.files, strict=True):
            one = {"strength": strength, "seed": seed, "prompt": order.prompts[0]}
            found.append(one | {"file": str(file.relative_to(job.folder)), "base": f"base/{seed}.png" if base else ""})
    return {"pictures": found}


def outline(job: Job) -> dict:
    """Let the base find the subject in images that have no mask."""
    from comcat_diffusion import bases
    from comcat_diffusion.training.objective import objective_of
    from comcat_diffusion.training.outline import Outliner, can_outline
    from comcat_diffusion.ui.outlines import outlined
    from comcat_diffusion.words import Subject

    request, progress = job.asked["request"], Progress(job)
    pipe = bases.load_base(request["base"], to_train=True)
    if not can_outline(pipe):
        raise ValueError("This base does not show where it sees a subject: draw the masks by hand.")
    subject, device = Subject(request["word"], request["what"]), bases.fastest_device()
    outliner = Outliner(pipe, objective_of(pipe))
    outliner.bring([subject], device)
    pipe.vae.to(device)
    images = ImageSet(job.folder.parent.parent / "images" / request["set"])
    numbers = [one.number for one in images.pictures if one.number in request["numbers"]]
    progress.phase("drawing")
    for done, number in enumerate(numbers, start=1):
        mask = outlined(outliner, images.upright(number), subject)
        images.set_part_of_mask(number, mask, "base")
        progress.count(done, len(numbers))
    return {"numbers": numbers}


def cutout(job: Job) -> dict:
    """Let rembg cut the subject out of images that have no mask."""
    from comcat_diffusion.ui.cutouts import Cutter

    request, progress = job.asked["request"], Progress(job)
    images, cutter = ImageSet(job.folder.parent.parent / "images" / request["set"]), Cutter(request["download"])
    progress.phase("drawing")
    for done, number in enumerate(request["numbers"], start=1):
        images.set_part_of_mask(number, cutter.mask(images.upright(number)), "rembg")
        progress.count(done, len(request["numbers"]))
    return {"numbers": request["numbers"]}


def caption(job: Job) -> dict:
    """Let a captioning model describe images, and call the subject by its words in what it says."""
    from comcat_diffusion import bases
    from comcat_diffusion.ui.captioning import Captioner, captioner_here, named

    request, progress = job.asked["request"], Progress(job)
    folder = job.folder.parent.parent
    path = captioner_here(folder)
    if path is None:
        raise ValueError("The captioning model is not here any more.")
    captioner, images = Captioner(path, bases.fastest_device()), ImageSet(folder / "images" / request["set"])
    progress.phase("drawing")
    for done, number in enumerate(request["numbers"], start=1):
        said = captioner.says(images.upright(number))
        images.change(number, caption=named(said, request["what"], request["phrase"], request["sentence"]))
        progress.count(done, len(request["numbers"]))
    return {"numbers": request["numbers"]}


def fetch(job: Job) -> dict:
    """Download a base from the hub, which its owner asked for by name."""
    from comcat_diffusion.ui.download import download

    name, progress = job.asked["request"]["hub"], Progress(job)
    progress.phase("fetching")
    download(name, progress.count)
    return {"base": name}


def export(job: Job) -> dict:
    """Write an adapter as another program reads it."""
    request = job.asked["request"]
    target = job.folder / f"{Path(request['file']).stem}-lora.safetensors"
    target.unlink(missing_ok=True)
    more = ["--approximate"] if request["approximate"] else []
    arguments = ["export", "--adapter", request["file"], "--output", str(target), "--for", request["client"]]
    said = _command(job, [*arguments, "--overwrite", *more])
    names = sorted(path.name for path in job.folder.iterdir() if path.name.startswith(target.stem))
    return {"files": names, "said": said}


def push(job: Job) -> dict:
    """Share an adapter on the hub."""
    request = job.asked["request"]
    arguments = ["push", "--adapter", request["file"], "--repo_id", request["repo_id"]]
    arguments += ["--private"] if request["private"] else []
    arguments += ["--sheet", request["sheet"]] if request["sheet"] else []
    return {"said": _command(job, arguments)}


def _command(job: Job, arguments: list[str]) -> list[str]:
    """Run a command as it is; returns the lines that it printed. Raises ValueError with its sentence if it refuses."""
    from comcat_diffusion.cli import main

    Progress(job)
    said, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
        status = main(arguments)
    if status:
        raise ValueError(told.getvalue().strip().removeprefix("comcat: ") or "It ended without a word.")
    lines = [line.replace(f"{job.folder}/", "") for line in said.getvalue().splitlines()]
    for line in lines:
        job.log(line)
    return lines


TASKS: dict[str, Callable[[Job], dict]] = {
    "train": train, "draw": draw, "outline": outline, "fetch": fetch, "export": export, "push": push,
    "caption": caption, "cutout": cutout,
}  # fmt: skip
