"""The training story: pictures in, one adapter file out. Read it from top to bottom."""

import json
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import free_memory

from comcat_diffusion import atomic, bases
from comcat_diffusion.adapters.parts import denoiser
from comcat_diffusion.adapters.terms import read_contents
from comcat_diffusion.adapters.token import words_of
from comcat_diffusion.config import to_toml
from comcat_diffusion.families.known import family_of
from comcat_diffusion.memory import hold, put_away
from comcat_diffusion.training import learned, output, suitable
from comcat_diffusion.training.batching import Batching
from comcat_diffusion.training.becomes import becomes, budget
from comcat_diffusion.training.checkpoint import Checkpoints, last_good
from comcat_diffusion.training.config import KINDS, TrainConfig
from comcat_diffusion.training.crops import sizes
from comcat_diffusion.training.dataset import Dataset
from comcat_diffusion.training.encode import Material, encode_all
from comcat_diffusion.training.judge import Judge
from comcat_diffusion.training.learner import Learner
from comcat_diffusion.training.loop import Loop, NotFinite, Step
from comcat_diffusion.training.objective import Objective, objective_of
from comcat_diffusion.training.order import Order, order_of, target_of
from comcat_diffusion.training.precision import launched_precision, refuse_precision, with_precision
from comcat_diffusion.training.preview import Preview
from comcat_diffusion.training.prior import ClassPictures, Teacher
from comcat_diffusion.training.remarks import look_over, small_doubts
from comcat_diffusion.training.sources import sketch, sources
from comcat_diffusion.training.wording import cut_off, well_known
from comcat_diffusion.words import Subject


class Watcher(Protocol):
    """Whoever wants to see the run: the command line, a notebook, a test."""

    def note(self, text: str) -> None:
        """Something worth knowing, one sentence."""

    def step(self, done: Step, total: int, peak_bytes: int) -> None:
        """A step is done."""

    def phase(self, name: str) -> None:
        """What begins now: loading, encoding, training, sampling, saving or proving."""


class Silent:
    """A watcher that looks away."""

    def note(self, text: str) -> None:
        """Nothing is shown."""

    def step(self, done: Step, total: int, peak_bytes: int) -> None:
        """Nothing is shown."""

    def phase(self, name: str) -> None:
        """Nothing is shown."""


@dataclass(frozen=True)
class Outcome:
    """What a run leaves behind."""

    adapter: Path
    subjects: tuple[Subject, ...]
    steps: int
    interrupted: bool
    parameters: int
    prompt: str  # of the first picture: what is like those that were learned is drawn best
    samples: Path | None = None

    @property
    def subject(self) -> Subject:
        """The first subject."""
        return self.subjects[0]

    @property
    def told(self) -> str:
        """What there is now, in words."""
        size = f"{self.adapter.stat().st_size / 1000:.1f} kB, {self.parameters:,} parameters"
        saved = f"Saved {self.adapter} ({size}), checked on a fresh base."
        stopped = f"Stopped after step {self.steps}. Go on with the same settings and --resume_from_checkpoint latest."
        return f"{saved}\n{stopped}" if self.interrupted else saved


def customize(config: TrainConfig, watcher: Watcher | None = None) -> Outcome:
    """Teach a base the subject of a few pictures; returns where the adapter is.

    Raises ValueError or OSError for bad input before the first step, NotFinite if the loss or a gradient breaks.
    """
    return learn(order_of(config), watcher)


def learn(order: Order, watcher: Watcher | None = None) -> Outcome:
    """What is ordered, learned; see `customize`."""
    watcher = watcher or Silent()
    # Everything that can be wrong with the input is looked at before the base, which is big, is loaded.
    asked, config = order.config, with_precision(order.config)
    suitable.refuse_folder(config)
    dataset, found = look_over(config, order.dataset)
    if found.errors:
        more = f" There are {len(found.errors) - 1} more: comcat validate lists them." if found.errors[1:] else ""
        raise ValueError(found.errors[0] + more)
    target = target_of(config, dataset.subjects)  # made only now, so that no refusal leaves an empty folder
    for text in (*launched_precision(asked), *found.facts, *found.doubts):
        watcher.note(text)
    # Accelerate owns the device, the precision and the processes.
    accelerator = _accelerator(config)
    try:
        with output.locked(target.parent) if accelerator.is_main_process else nullcontext():
            outcome, witness = _run(config, dataset, found.sizes, target, accelerator, watcher)
            accelerator.free_memory()
            free_memory()  # the trained base is gone by now, so a fresh one needs no more room than it did
            if witness is not None:
                watcher.phase("proving")
                output.prove(config, witness, target)
            accelerator.wait_for_everyone()  # so that no process tells of a file that is not proved yet
            accelerator.end_training()
    finally:
        AcceleratorState._reset_state()  # whatever comes next in this process has a precision of its own
    return outcome


def _run(
    config: TrainConfig,
    dataset: Dataset,
    picture_sizes: Mapping[Path, tuple[int, int]],
    target: Path,
    accelerator: Accelerator,
    watcher: Watcher,
) -> tuple[Outcome, output.Witness | None]:
    """All but the proof, which the main process gets a witness for."""
    watcher.phase("loading")
    pipe = bases.asked_base(config, "fp32", to_train=True)
    suitable.refuse_pipeline(pipe, config.pretrained_model_name_or_path)
    suitable.refuse_settings(config, family_of(pipe))
    config, base = _resolved(config, pipe, dataset), sketch(pipe)
    options = sizes(config.resolution, config.aspect_ratio_buckets, bases.grain(pipe))
    bases.refuse_large(family_of(pipe), denoiser(pipe).config, pipe.vae_scale_factor, options)
    for text in family_of(pipe).remarks(pipe):
        watcher.note(text)
    for text in small_doubts(picture_sizes, options, config.resolution):
        watcher.note(text)

    # Pictures and prompts are encoded once, by the bare base, each part on the accelerator for as long as it works; so
    # a GPU never holds more than a step needs. The adapter starts as exactly nothing, so the first step is taken from
    # the base itself.
    objective = objective_of(pipe, config.snr_gamma, config.noise_offset)
    pipe.vae.to(accelerator.device)
    watcher.phase("encoding")
    material = encode_all(config, pipe, dataset, objective, watcher.note)
    pipe.to("cpu")
    put_away(pipe.vae.parameters())
    learned.prepare(config, pipe, dataset.subjects)
    prompts = [*material.prompts, *config.validation_prompt, ""]
    tokenizer = getattr(pipe, family_of(pipe).tokenizer)
    most = family_of(pipe).most_tokens(tokenizer, type(pipe).__name__, denoiser(pipe).config)
    for text in (*cut_off(tokenizer, prompts, most), *well_known(tokenizer, dataset.subjects)):
        watcher.note(text)
    train_text = config.train_text_encoder or bool(words_of(pipe))
    learner = Learner(pipe, prompts, train_text, accelerator.device)
    learned.add_tokens(pipe, learner)
    _make_room(pipe, learner)

    loop = _loop(config, pipe, learner, material, objective, accelerator)
    parameters = learned.learned(learner)
    ema = learned.Ema(list(parameters.values()), config.ema_decay if config.use_ema else None)
    learned_from = sources(config, dataset, material.class_examples, base)
    checkpoints = Checkpoints(config, learned_from, accelerator, parameters, ema)
    done = checkpoints.resume(config.resume_from_checkpoint, watcher.note) if config.resume_from_checkpoint else 0
    count = sum(p.numel() for p in parameters.values())
    for subject in dataset.subjects:
        pictures = sum(example.subject == subject for example in dataset.examples)
        watcher.note(f"Learning '{subject.phrase}' from {pictures} pictures.")
    watcher.note(f"Training {count:,} parameters on {len(material.crops)} crops.")
    watcher.note(becomes(config, denoiser(pipe)))

    judge = Judge(
        config, dataset.subjects, len(dataset.examples), target, pipe, learner, material.held_out, objective, ema,
        Preview(config, pipe, dataset.subjects), accelerator, watcher.note,
    )  # fmt: skip
    output.refuse_small_budget(config, pipe, learner, judge.notes(config.max_train_steps))
    # From here on the folder is this run's, and whatever was wrong with its settings has been said.
    if not config.resume_from_checkpoint:
        checkpoints.forget()
    if accelerator.is_main_process:
        circumstances = f"# Circumstances: device {accelerator.device.type}, threads {torch.get_num_threads()}.\n"
        atomic.write_bytes(target.parent / "run.toml", (circumstances + to_toml(config)).encode())
    metrics = target.parent / "metrics.jsonl"
    judge.remember(_lines(metrics, done))
    write = _metrics(metrics, done, accelerator)
    if config.validation_steps and not done:  # of an adapter that is nothing yet: what the base draws from these seeds
        watcher.phase("sampling")
        judge.draw(0)
    watcher.phase("training")
    with _patience() as asked_to_stop:
        interrupted = whole = False
        try:
            for step in loop.steps(config.max_train_steps, done):
                done = step.step
                ema.step()
                if done == config.cut_step:  # AdamW's moments belong to directions that are no more
                    learned.finish(learner, ema, torch.float32)
                    kept = output.within_budget(config, pipe, learner, judge.notes(config.max_train_steps))
                    learned.take(learner, ema, kept)
                    loop.optimizer.state.clear()
                whole = True
                write(asdict(step))
                accelerator.log({"loss": step.loss, "lr": step.learning_rate}, step=done)
                last = done == config.max_train_steps
                if config.checkpointing_steps and done % config.checkpointing_steps == 0:
                    checkpoints.save(done, judge.save_into)
                if config.validation_steps and done % config.validation_steps == 0 and not last:
                    watcher.phase("sampling")
                    write(judge.look(done))
                    watcher.phase("training")
                watcher.step(step, config.max_train_steps, peak_bytes(accelerator.device))
                if asked_to_stop():
                    raise KeyboardInterrupt
                whole = False
        except KeyboardInterrupt:  # between two steps: what was learned so far is kept, and the run can go on from it
            if not whole:  # a second one, within a step: the last checkpoint stays what it is
                raise
            interrupted = True
            checkpoints.save(done, judge.save_into)
        except NotFinite as error:
            raise NotFinite(f"{error} {last_good(checkpoints.folder)}") from error

        # What is saved is what was trained: everything learned is first rounded to the file's precision, and at the
        # end the file is proved to do on a fresh base what the model does now.
        watcher.phase("saving")
        write(judge.measure(done))
        witness = None
        learned.finish(learner, ema, bases.PRECISIONS[config.save_precision if not config.max_bytes else "fp32"])
        if accelerator.is_main_process:
            judge.save(target, done)
            if config.max_bytes:
                learned.take(learner, ema, read_contents(target))
            witness = output.witness(learner, loop.batching.batch(material.crops, objective, 0))
        if not (interrupted or config.skip_final_inference):
            watcher.phase("sampling")
            judge.draw(done)
            if config.thumbnail and accelerator.is_main_process:
                judge.save(target, done)
    taught = dataset.examples[0].prompt
    return Outcome(target, dataset.subjects, done, interrupted, count, taught, judge.sheet), witness


def _accelerator(config: TrainConfig) -> Accelerator:
    refuse_precision(config)
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    AcceleratorState._reset_state()  # another Accelerator in this process must not decide this one's precision
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to or None,
        project_dir=config.output_dir,
    )
    if config.report_to:
        accelerator.init_trackers("logs", config={k: str(v) for k, v in asdict(config).items()})
    return accelerator


def _resolved(config: TrainConfig, pipe: DiffusionPipeline, dataset: Dataset) -> TrainConfig:
    """Fill in the defaults that depend on the base and the pictures."""
    prompts = [f"a photo of {subject.phrase}" for subject in dataset.subjects]
    if not config.subjects and config.instance_prompt:
        prompts = [config.instance_prompt]
    return replace(
        config,
        pretrained_model_name_or_path=config.pretrained_model_name_or_path or bases.EMBEDDED,
        learning_rate=config.learning_rate or KINDS[config.kind],
        convolutions=learned.convolutions(config, denoiser(pipe)),
        max_bytes=budget(config, denoiser(pipe)),
        resolution=bases.asked_resolution(pipe, config.resolution),
        train_batch_size=config.train_batch_size or default_batch(bases.native_resolution(pipe), len(dataset.examples)),
        validation_prompt=config.validation_prompt or prompts,
    )


def default_batch(resolution: int, pictures: int) -> int:
    """One picture a step, or, where they are as small as the embedded base's, all of them up to four."""
    return min(4, pictures) if resolution <= 128 else 1


def _make_room(pipe: DiffusionPipeline, learner: Learner) -> None:
    """Let go of what no step needs: text encoders that are not trained."""
    if not learner.encoders:
        for name in learner.family.encoders(pipe):
            setattr(pipe, name, None)
    free_memory()


def _loop(
    config: TrainConfig,
    pipe: DiffusionPipeline,
    learner: Learner,
    material: Material,
    objective: Objective,
    accelerator: Accelerator,
) -> Loop:
    precision = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.mixed_precision]
    hold(learner.train().denoiser, precision)  # what is learned stays in full precision
    if config.gradient_checkpointing:
        learner.denoiser.enable_gradient_checkpointing()
    if config.compile:
        learner.denoiser.compile()
    optimizer = torch.optim.AdamW(
        learned.groups(config, learner),
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
    )
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=config.max_train_steps * accelerator.num_processes,
    )
    prepared, optimizer, schedule = accelerator.prepare(learner, optimizer, schedule)
    prior = None
    if config.prior_kind == "teacher":
        prior = Teacher(pipe, material.class_prompts)
    elif config.prior_kind == "images":
        prior = ClassPictures(material.class_crops, config.seed, config.train_batch_size, objective)
    return Loop(
        prepared,
        material.crops,
        objective,
        Batching.of(material.crops, config.seed, config.train_batch_size, config.caption_dropout_rate),
        optimizer,
        schedule,
        accelerator,
        config.max_grad_norm,
        prior,
        config.prior_loss_weight,
    )


def _lines(path: Path, done: int) -> list[dict]:
    """What a resumed run wrote up to the step that it goes on from; a line that a full disk cut short is none."""
    lines = path.read_text("utf-8").rpartition("\n")[0].splitlines() if done and path.exists() else []
    return [record for record in map(json.loads, lines) if record["step"] <= done]


def _metrics(path: Path, done: int, accelerator: Accelerator) -> Callable[[dict], None]:
    """A function that adds a line; a resumed run goes on after the lines of the steps that it has."""
    if not accelerator.is_main_process:
        return lambda record: None
    atomic.write_bytes(path, "".join(json.dumps(record) + "\n" for record in _lines(path, done)).encode())

    def write(record: dict) -> None:
        if record:
            line = json.dumps({name: v for name, v in record.items() if v is not None}) + "\n"
            with atomic.writing(path, len(line)), path.open("a", encoding="utf-8") as file:
                file.write(line)

    return write


@contextmanager
def _patience() -> Iterator[Callable[[], bool]]:
    """Let the step in hand finish when Ctrl-C comes, so that what is saved is whole; a second one stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()

    def remember(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has used: on the accelerator, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
