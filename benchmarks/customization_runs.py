"""One run of the customization benchmark: what it learns, what it keeps of that, and how that is measured."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import nn

from benchmarks import circumstances as shared
from benchmarks.by_command import taught, words
from benchmarks.methods import METHODS, NAME, TOKEN, Method
from comcat_diffusion import bases
from comcat_diffusion.evaluation import metrics, world
from comcat_diffusion.evaluation.cutout import background_moved, centred, colour_off
from comcat_diffusion.evaluation.features import Features
from comcat_diffusion.generation.pictures import Drawing, Sampling, draw, slug
from comcat_diffusion.memory import hold
from comcat_diffusion.training.batching import Batching
from comcat_diffusion.training.encode import Crop, posterior
from comcat_diffusion.training.learner import Learner
from comcat_diffusion.training.loop import Loop
from comcat_diffusion.training.objective import Objective
from comcat_diffusion.training.prior import Teacher
from recipe.subject import HELD_OUT, TRAIN, TRIGGER, caption, picture

BATCH = 4
SIDE, SPAN = 224, 168  # pixels, of a cut-out as DINOv2 sees it
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

    def drawn(self, pipe: DiffusionPipeline, prompts: Iterable[str], placed: dict | None = None) -> list[Image.Image]:
        """Every prompt from every seed; `placed` are the words that adapters are placed by."""
        drawings = [Drawing(prompt, seed) for prompt in prompts for seed in SEEDS]
        sampling = Sampling(self.drawing_steps, bases.EMBEDDED_GUIDANCE, batch_size=len(drawings))
        return list(draw(pipe, drawings, sampling, placed))


def prompts_of(subject: str, method: Method | None = None) -> tuple[list[str], list[str]]:
    """The prompts that name the subject, as a method knows it, and those without it."""
    phrase = TOKEN if method and method.token else f"{TRIGGER} {subject}"
    return [p.format(subject=phrase) for p in PROMPTS], [p.format_map({"class": subject}) for p in DRIFT_PROMPTS]


def learn(bench: Bench, run: Run) -> tuple[DiffusionPipeline, dict]:
    """Train one method; returns the pipeline with what it learned, and what that cost."""
    method, pipe = METHODS[run.method], bench.base()
    if method.command:
        return _by_command(bench, run)
    named = f"{TRIGGER} {run.subject}"
    captions = [caption(run.subject, pose).replace(named, TOKEN if method.token else named) for pose in TRAIN]
    crops = [crop_of(pipe, picture(run.subject, p), text) for p, text in zip(TRAIN, captions, strict=True)]
    torch.manual_seed(run.seed)
    of_class = {text: text.replace(named, run.subject) for text in captions}
    learner = method.learner(pipe, [*captions, *of_class.values()], run.subject).train()
    trained = [p for p in learner.parameters() if p.requires_grad]
    with _held(pipe.unet, method.mixed_precision):
        loop = _loop(learner, crops, run)
        loop.prior = Teacher(pipe, of_class) if method.teacher else None
        seconds = [step.seconds for step in loop.steps(run.steps)]
    learner.eval()
    return pipe, {"parameters": sum(p.numel() for p in trained), "seconds": sum(seconds)}


def _by_command(bench: Bench, run: Run) -> tuple[DiffusionPipeline, dict]:
    captions = [caption(run.subject, pose) for pose in TRAIN]
    made = taught(run.subject, run.seed, bench.folder / run.name, NAME, captions, max_train_steps=run.steps)
    made.pipe.comcat_file = made.file
    made.pipe.set_progress_bar_config(disable=True)
    return made.pipe, {"parameters": made.parameters, "seconds": made.seconds}


@contextmanager
def _held(unet: nn.Module, mixed_precision: str) -> Iterator[None]:
    """Hold what is frozen as `comcat train` does in this precision; afterwards it is as it was."""
    frozen = [(p, p.data) for p in unet.parameters() if not p.requires_grad]
    if mixed_precision == "bf16":
        hold(unet, torch.bfloat16)
    yield
    for parameter, data in frozen:
        parameter.data = data


def crop_of(pipe: DiffusionPipeline, photo: Image.Image, prompt: str) -> Crop:
    """A picture as the U-Net sees it."""
    side = bases.native_resolution(pipe)
    found = posterior(pipe, photo.resize((side, side), Image.Resampling.LANCZOS))
    return Crop(**found, prompt=prompt, name="", frame=(side, side, 0, 0, side, side))


def _loop(learner: Learner, crops: list[Crop], run: Run) -> Loop:
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=run.rate)
    kind = METHODS[run.method].schedule
    schedule = get_scheduler(kind, optimizer, num_warmup_steps=0, num_training_steps=run.steps)
    objective = Objective(DDPMScheduler.from_config(learner._pipe.scheduler.config))
    batching = Batching.of(crops, run.seed, BATCH)
    AcceleratorState._reset_state()  # an earlier run in this process must not decide this one's precision
    accelerator = Accelerator(cpu=True, mixed_precision=METHODS[run.method].mixed_precision)
    return Loop(accelerator.prepare(learner), crops, objective, batching, optimizer, schedule, accelerator)


def peak_mib(run: Run, folder: Path) -> float:
    """Most memory of a process that does nothing but learn by a run's method; measured once a method and kept."""
    kept = folder / f"{slug(run.method)}.memory.json"
    if not kept.exists():
        shared.write_json(kept, {"peak_mib": shared.in_fresh_process(_peak_mib, run)})
    return json.loads(kept.read_text())["peak_mib"]


def _peak_mib(run: Run) -> float:
    torch.set_num_threads(1)
    learn(Bench(Path(), 0), replace(run, steps=MEMORY_STEPS))
    return shared.peak_memory_mib(torch.device("cpu"))


def keep_pictures(bench: Bench, run: Run, pipe: DiffusionPipeline, facts: dict) -> None:
    """Draw what is judged, the prompts of the subject above those without it, and keep it with the run's facts."""
    method, (about, without) = METHODS[run.method], prompts_of(run.subject, METHODS[run.method])
    placed = words(pipe, run.subject, NAME) if method.command else None
    strip_of([bench.drawn(pipe, about, placed), bench.drawn(pipe, without, placed)]).save(
        bench.folder / f"{run.name}.png"
    )
    shared.write_json(bench.folder / f"{run.name}.json", facts | asdict(run))


def measured(features: Features, judge: Features, run: Run, folder: Path) -> dict:
    """Facts and measures of a run, read from the pictures that it kept; the measures are (prompts, seeds) each."""
    kept = folder / f"{run.name}.measures.json"
    if not kept.exists():
        shared.write_json(kept, _measures(features, judge, run, folder))
    return json.loads((folder / f"{run.name}.json").read_text()) | json.loads(kept.read_text())


def _measures(features: Features, judge: Features, run: Run, folder: Path) -> dict:
    (made, others), (base, before) = (_rows(folder / f"{name}.png") for name in (run.name, f"base-{run.subject}"))
    train, held_out = ([picture(run.subject, pose) for pose in poses] for poses in (TRAIN, HELD_OUT))
    details, shape = world.details(made), (len(PROMPTS), len(SEEDS))
    alone, held_alone = (features.images([world.alone(one) for one in some]) for some in (made, held_out))
    obeyed = [obeyed_share(prompt, one) for prompt, one in zip(_each(prompts_of(run.subject)[0]), made, strict=True)]
    found = {
        "fidelity": metrics.subject_fidelity(details, world.details(held_out)),
        **apart(made, held_out, base, judge),
        "clip": metrics.subject_fidelity(alone, held_alone),
        "copying": metrics.copying(details, world.details(train)),
        "obedience": torch.tensor(obeyed),
        "drift": metrics.drift(features.images(others), features.images(before)),
    }
    diversity = metrics.diversity(features.images(made).view(*shape, -1)).unsqueeze(1)
    return {name: values.view(shape).tolist() for name, values in found.items()} | {"diversity": diversity.tolist()}


def apart(
    made: list[Image.Image], held_out: list[Image.Image], base: list[Image.Image], judge: Features
) -> dict[str, torch.Tensor]:
    """What the cut-outs are like, and how far what is around them has moved."""
    return {**cut_out(made, held_out, judge), "background_moved": background_moved(made, base, world.outline)}


def cut_out(made: list[Image.Image], held_out: list[Image.Image], judge: Features) -> dict[str, torch.Tensor]:
    """The shape of the cut-outs to `judge`, and how far their colour is off."""
    cut, wanted = ([centred(one, world.outline(one), SIDE, SPAN) for one in some] for some in (made, held_out))
    return {
        "shape": metrics.subject_fidelity(judge.images(cut), judge.images(wanted)),
        "colour_off": colour_off(made, held_out, world.outline),
    }


def _each(prompts: list[str]) -> Iterator[str]:
    return (prompt for prompt in prompts for _ in SEEDS)


def obeyed_share(prompt: str, made: Image.Image) -> float:
    """Share of what the prompt says of background, place and size that the picture shows."""
    asked, seen = asdict(world.asked(prompt)), asdict(world.see(np.asarray(made)))
    said = [name for name, value in asked.items() if value is not None]
    return sum(seen[name] == asked[name] for name in said) / len(said)


def strip_of(rows: list[list[Image.Image]]) -> Image.Image:
    """Rows of equally large pictures as one picture."""
    side = rows[0][0].width
    strip = Image.new("RGB", (side * max(map(len, rows)), side * len(rows)))
    for down, row in enumerate(rows):
        for across, one in enumerate(row):
            strip.paste(one, (across * side, down * side))
    return strip


def _rows(path: Path) -> list[list[Image.Image]]:
    """The inverse of `strip_of` for rows of equal length."""
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
        strip_of([bench.drawn(bench.base(), prompts) for prompts in prompts_of(subject)]).save(path)
