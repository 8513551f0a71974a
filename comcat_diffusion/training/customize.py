"""The training story: pictures in, one adapter file out. Read it from top to bottom."""

import json
import random
import resource
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params, free_memory

from comcat_diffusion import atomic, bases
from comcat_diffusion.adapters.config import ComcatConfig
from comcat_diffusion.adapters.header import Notes
from comcat_diffusion.adapters.model import factors
from comcat_diffusion.adapters.store import load_adapter, save_adapter
from comcat_diffusion.config import TrainConfig, to_toml
from comcat_diffusion.training import encode, images
from comcat_diffusion.training.loop import Batching, Loop, Step
from comcat_diffusion.training.objective import Objective
from comcat_diffusion.words import Subject, subject_of

ADAPTER = "subject"  # name of the adapter inside the model while it is trained


class Watcher(Protocol):
    """Whoever wants to see the run: the command line, a notebook, a test."""

    def note(self, text: str) -> None:
        """Something worth knowing, one sentence."""

    def step(self, done: Step, total: int, peak_bytes: int) -> None:
        """A step is done."""


class Silent:
    """A watcher that looks away."""

    def note(self, text: str) -> None:
        """Nothing is shown."""

    def step(self, done: Step, total: int, peak_bytes: int) -> None:
        """Nothing is shown."""


@dataclass(frozen=True)
class Outcome:
    """What a run leaves behind."""

    adapter: Path
    subject: Subject
    steps: int
    interrupted: bool
    parameters: int


def customize(config: TrainConfig, watcher: Watcher | None = None) -> Outcome:
    """Teach a base the subject of a few pictures; returns where the adapter is.

    Raises ValueError or OSError for bad input before the first step, NotFinite if the loss or a gradient breaks.
    """
    watcher = watcher or Silent()
    # Everything that can be wrong with the input is looked at before the base, which is big, is loaded.
    config = _with_sample(config)
    subject = subject_of(config.instance_prompt, config.trigger)
    folder = images.find(config.instance_data_dir)
    for name, reason in folder.ignored.items():
        watcher.note(f"Left aside: {name} ({reason}).")
    pictures = [(path, *images.read(path)) for path in folder.pictures]
    target = _prepared_output(config, subject)

    # Accelerate owns the device, the precision and the processes.
    accelerator = _accelerator(config)
    pipe = bases.asked_base(config, "fp32")
    config = _resolved(config, pipe, len(pictures))
    atomic.write_bytes(target.parent / "run.toml", to_toml(config).encode())
    for text in _remarks(config, subject, pictures, pipe):
        watcher.note(text)

    # Pictures and prompt are encoded once; then the encoders make room.
    data = _encoded(config, pipe.to(accelerator.device), pictures)
    noise_process = DDPMScheduler.from_config(pipe.scheduler.config)
    unet = pipe.unet
    for part in ("vae", "text_encoder", "text_encoder_2"):
        if getattr(pipe, part, None) is not None:
            setattr(pipe, part, None)
    free_memory()

    # The adapter starts as exactly nothing, so the first step is taken from the base itself.
    _add_adapter(config, pipe)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    loop = _loop(config, unet, data, noise_process, accelerator)
    watcher.note(f"Training {sum(p.numel() for p in parameters):,} parameters on {len(data)} crops.")

    done, interrupted = 0, False
    with (target.parent / "metrics.jsonl").open("w", buffering=1) as metrics:
        try:
            for step in loop.steps(config.max_train_steps):
                done = step.step
                metrics.write(json.dumps(asdict(step)) + "\n")
                accelerator.log({"loss": step.loss, "lr": step.learning_rate}, step=done)
                watcher.step(step, config.max_train_steps, peak_bytes(accelerator.device))
        except KeyboardInterrupt:  # what was learned so far is kept
            interrupted = True
    accelerator.end_training()

    # What is saved is what was trained: the factors are first rounded to the file's precision, then proved.
    if accelerator.is_main_process:
        pipe.unet = accelerator.unwrap_model(loop.unet)
        _save(config, pipe, subject, done, len(pictures), target)
        prove(config, pipe.unet, data, target)
    return Outcome(target, subject, done, interrupted, sum(p.numel() for p in parameters))


def _with_sample(config: TrainConfig) -> TrainConfig:
    if config.instance_data_dir is not None:
        return config
    return replace(
        config,
        instance_data_dir=str(bases.assets() / "subject" / "train"),
        instance_prompt=config.instance_prompt or (bases.assets() / "subject" / "prompt.txt").read_text().strip(),
    )


def _prepared_output(config: TrainConfig, subject: Subject) -> Path:
    folder = Path(config.output_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # an unwritable folder is better known now than after the training
            pass
    except OSError as error:
        raise OSError(error.errno, f"--output_dir {folder} cannot be written to ({error.strerror}).") from error
    return folder / f"{config.name or subject.phrase.replace(' ', '-')}.safetensors"


def _accelerator(config: TrainConfig) -> Accelerator:
    if config.mixed_precision == "fp16" and not torch.accelerator.is_available():
        raise ValueError("--mixed_precision fp16 needs a GPU; on a CPU use no or bf16.")
    AcceleratorState._reset_state()  # an earlier run in this process must not decide this one's precision
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=config.report_to or None,
        project_dir=config.output_dir,
    )
    if config.report_to:
        accelerator.init_trackers("logs", config={k: str(v) for k, v in asdict(config).items()})
    return accelerator


def _resolved(config: TrainConfig, pipe: DiffusionPipeline, pictures: int) -> TrainConfig:
    """Fill in the defaults that depend on the base."""
    small = bases.native_resolution(pipe) <= 128
    return replace(
        config,
        resolution=config.resolution or bases.native_resolution(pipe),
        train_batch_size=config.train_batch_size or (min(4, pictures) if small else 1),
    )


def _remarks(config: TrainConfig, subject: Subject, pictures: list, pipe: DiffusionPipeline) -> Iterator[str]:
    for path, picture, notes in pictures:
        yield from (f"{path.name}: {note}." for note in notes)
        if min(picture.size) < config.resolution * images.SMALL:
            size = f"{picture.width} x {picture.height} for {config.resolution} pixels"
            yield f"{path.name} is tiny ({size}): details will be soft."
    count, most = encode.prompt_tokens(pipe, config.instance_prompt)
    if count > most:
        yield f"The prompt has {count} tokens, of which the text encoder reads {most}: the end is cut off."
    yield f"Learning '{subject.trigger}' from {len(pictures)} pictures as '{config.instance_prompt}'."


def _encoded(config: TrainConfig, pipe: DiffusionPipeline, pictures: list) -> encode.Encoded:
    rng = random.Random(config.seed)
    cuts, names = [], []
    for path, picture, _ in pictures:
        squares = images.squares(picture, config.resolution, config.center_crop, config.random_flip, rng)
        cuts += squares
        names += [path.name] * len(squares)
    mean, std = encode.posterior(pipe.vae, images.to_tensor(cuts))
    context = encode.text_states(pipe, config.instance_prompt).expand(len(cuts), -1, -1)
    return encode.Encoded(mean, std, context, tuple(names))


def _add_adapter(config: TrainConfig, pipe: DiffusionPipeline) -> None:
    pipe.unet.requires_grad_(False)
    if config.init_adapter:
        load_adapter(pipe, config.init_adapter, ADAPTER)
        for factor in factors(pipe.unet, ADAPTER).values():
            factor.requires_grad_(True)
    else:
        targets = config.target_modules
        settings = ComcatConfig(r=config.rank, alpha=config.alpha, foldable=config.foldable, target_modules=targets)
        with torch.random.fork_rng():  # PEFT draws the random factors from the global generator
            torch.manual_seed(config.seed)
            pipe.unet.add_adapter(settings, ADAPTER)
    if config.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()


def _loop(
    config: TrainConfig,
    unet: torch.nn.Module,
    data: encode.Encoded,
    noise_process: DDPMScheduler,
    accelerator: Accelerator,
) -> Loop:
    precision = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.mixed_precision]
    unet.to(dtype=precision).train()
    cast_training_params(unet, torch.float32)  # what is learned stays in full precision
    optimizer = torch.optim.AdamW(
        [p for p in unet.parameters() if p.requires_grad],
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
    unet, optimizer, schedule = accelerator.prepare(unet, optimizer, schedule)
    objective = Objective(noise_process, config.snr_gamma, config.noise_offset)
    batching = Batching(config.seed, config.train_batch_size)
    return Loop(unet, data, objective, batching, optimizer, schedule, accelerator, config.max_grad_norm)


def _save(
    config: TrainConfig, pipe: DiffusionPipeline, subject: Subject, steps: int, pictures: int, target: Path
) -> None:
    precision = bases.PRECISIONS[config.save_precision]
    for factor in factors(pipe.unet, ADAPTER).values():
        factor.data = factor.data.to(precision).to(factor.dtype)
    training = {"resolution": config.resolution, "steps": steps, "seed": config.seed, "pictures": pictures}
    notes = Notes(subject.trigger, config.instance_prompt, subject.class_word, training)
    save_adapter(pipe, target, ADAPTER, config.pretrained_model_name_or_path, notes, precision)


@torch.no_grad()
def prove(config: TrainConfig, trained: torch.nn.Module, data: encode.Encoded, adapter: Path) -> None:
    """Load the saved file onto a fresh base and compare one forward pass. Raises RuntimeError at a difference."""
    fresh = bases.asked_base(config, "fp32")
    load_adapter(fresh, adapter, ADAPTER)
    parameter = next(trained.parameters())
    fresh.unet.to(parameter.device, parameter.dtype)
    inputs = (data.mean[:1], torch.tensor([500]), data.context[:1])
    inputs = [part.to(parameter.device, parameter.dtype if part.is_floating_point() else None) for part in inputs]
    expected, found = (model.eval()(*inputs).sample.float() for model in (trained, fresh.unet))
    off = (expected - found).abs().max() / expected.abs().max()
    if not off < (1e-4 if parameter.dtype == torch.float32 else 5e-2):
        raise RuntimeError(f"{adapter} does not reproduce what was trained (off by {off:.1e}); please report this.")


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has used: on the accelerator, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
