"""The two runs that benchmarks/training.py compares: our `customize()`, and diffusers' DreamBooth-LoRA recipe."""

import math
import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from unittest.mock import patch

import diffusers
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch.nn.functional import mse_loss
from transformers import CLIPTextModel, CLIPTokenizer

from benchmarks import circumstances as shared
from benchmarks import variants
from benchmarks.training_clock import (
    ATTACH,
    BACKWARD,
    BATCH,
    ENCODE,
    FORWARD,
    LOAD,
    LOOK,
    PHASES,
    PROVE,
    SAVE,
    TEXT,
    VAE,
    Clock,
)
from comcat_diffusion import bases
from comcat_diffusion.training import customize as story
from comcat_diffusion.training import learned, output
from comcat_diffusion.training.batching import Batching
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.learner import Learner
from comcat_diffusion.training.loop import Loop, Step

PROMPT = "a photo of sks dog"
PRECISIONS = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}  # as Accelerate calls them


@dataclass(frozen=True)
class Settings:
    """What is measured and how often."""

    device: torch.device
    dtype: torch.dtype | None  # None: each in its own default, ours in what the device is fast in
    threads: int | None
    tiny: bool  # the recipe's base
    resolution: int  # pixels, of the recipe
    batch: int
    steps: int
    small_steps: int  # on the embedded base, where a step is short
    pictures: tuple[int, ...]  # numbers of them, fewest first
    parts: tuple[str, ...]
    targets: str  # of our adapter: a key of TARGETS
    gradient_checkpointing: bool = False  # in ours

    def __post_init__(self) -> None:
        if self.resolution % 64:
            raise ValueError(f"--resolution must be a multiple of 64, not {self.resolution}.")
        if self.steps < 2:
            raise ValueError(f"--steps must be at least 2, not {self.steps}: the first one warms up.")
        if self.dtype == torch.float16 and self.device.type == "cpu":
            raise ValueError("--dtype float16 needs --device cuda.")


def prepare_process(settings: Settings) -> None:
    """Threads, device and silence for a process that trains."""
    shared.use_threads(settings.threads)
    if settings.device.type == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # else Accelerate takes the GPU that is there
    quiet()


def quiet() -> None:
    """Leave the terminal to the tables."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


class _Turns(story.Silent):
    """A watcher that takes the steps down and lets the others go on."""

    def __init__(self, clock: Clock):
        self.clock = clock

    def note(self, text: str) -> None:
        """Nothing is shown."""

    def step(self, done: Step, total: int, peak_bytes: int) -> None:
        """A step is done."""
        self.clock.step_done(done.loss, done.gradient_norm)


def ours(turn: Callable[[], None], settings: Settings, config: TrainConfig) -> dict:
    """A run of `customize()` as it is, its functions measured from outside."""
    prepare_process(settings)
    clock = Clock(turn, settings.device)
    with _measured(clock), clock.run():
        outcome = story.customize(config, _Turns(clock))
    unseen = set(PHASES) - set(clock.told["phases"])
    if unseen:
        raise RuntimeError(f"`customize()` has changed: {', '.join(sorted(unseen))} could not be measured.")
    used = story.with_precision(config).mixed_precision
    told = described(outcome.adapter, ("k_down", "out_up"), outcome.parameters)
    return clock.told | told | {"mixed_precision": used}


@contextmanager
def _measured(clock: Clock) -> Iterator[None]:
    """Measure the functions that a run of ours consists of for as long as the block lasts."""
    places = [
        (LOOK, story, "order_of"), (LOOK, story, "look_over"), (LOOK, story, "target_of"),
        (LOAD, bases, "asked_base"),
        (ENCODE, story, "encode_all"), (ENCODE, Learner, "__init__"),
        (ATTACH, learned, "prepare"), (ATTACH, story, "_loop"),
        (SAVE, output, "save"), (PROVE, output, "witness"), (PROVE, output, "prove"),
        (BATCH, Batching, "batch"), (BACKWARD, Accelerator, "backward"),
    ]  # fmt: skip
    forward, steps = Learner.forward, Loop.steps

    @wraps(forward)
    def measured_forward(learner: Learner, *arguments: object) -> torch.Tensor:
        counts = not clock.open  # a forward pass of the proof is not a step's
        with clock.measure(FORWARD):
            prediction = forward(learner, *arguments)
        if counts:
            clock.predicted(prediction)
        return prediction

    @wraps(steps)
    def steps_when_ready(*arguments: object) -> Iterator[Step]:
        clock.ready()
        yield from steps(*arguments)

    with ExitStack() as stack:
        for name, owner, attribute in places:
            stack.enter_context(patch.object(owner, attribute, clock.timed(name, getattr(owner, attribute))))
        stack.enter_context(patch.object(Learner, "forward", measured_forward))
        stack.enter_context(patch.object(Loop, "steps", steps_when_ready))
        yield


def described(path: Path, zeros: tuple[str, ...], parameters: int) -> dict:
    """An adapter file; `moved` is the norm of its tensors with such names, which training starts from zero."""
    found = [tensor for name, tensor in load_file(path).items() if any(part in name for part in zeros)]
    moved = math.sqrt(sum(tensor.double().square().sum().item() for tensor in found))
    return {"file": str(path), "file_bytes": path.stat().st_size, "parameters": parameters, "moved": moved}


class Recipe:
    """DreamBooth-LoRA as diffusers' script works by default: nothing is kept from step to step but the weights.

    Letters: B batch, S side in pixels, C latent channels, h x w latent size, M context tokens, E their width.
    """

    def __init__(self, clock: Clock, settings: Settings, base: Path, pictures: Path):
        self.clock, self.settings = clock, settings
        with clock.measure(LOOK):
            self.paths = sorted(pictures.iterdir())
        self.dtype = settings.dtype or torch.float32
        self.accelerator = Accelerator(mixed_precision=PRECISIONS[self.dtype])
        with clock.measure(LOAD):
            self._load(base)
        with clock.measure(ATTACH):
            self._attach()
        self.order, self.waiting = random.Random(0), []
        self.generator = torch.Generator(self.accelerator.device).manual_seed(0)

    def _load(self, base: Path) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")
        self.scheduler = DDPMScheduler.from_pretrained(base, subfolder="scheduler")
        kinds = {"text_encoder": CLIPTextModel, "vae": AutoencoderKL, "unet": UNet2DConditionModel}
        for name, kind in kinds.items():
            model = kind.from_pretrained(base, subfolder=name).requires_grad_(False)
            setattr(self, name, model.to(self.accelerator.device, self.dtype))

    def _attach(self) -> None:
        """A new LoRA on every attention of the U-Net, AdamW and the schedule."""
        self.unet.add_adapter(variants.recipe_lora())
        cast_training_params(self.unet, torch.float32)
        self.trained = variants.trainable(self.unet)
        settings = {"lr": variants.RECIPE_RATE, "betas": (0.9, 0.999), "weight_decay": 1e-2, "eps": 1e-8}
        optimizer = torch.optim.AdamW(self.trained, **settings)
        schedule = get_scheduler(variants.RECIPE_SCHEDULE, optimizer)
        self.unet, self.optimizer, self.schedule = self.accelerator.prepare(self.unet.train(), optimizer, schedule)

    def step(self) -> tuple[float, float]:
        """One optimizer step; returns loss and gradient norm."""
        with self.clock.measure(BATCH):
            pixels = torch.stack([self._pixels(self._next_path()) for _ in range(self.settings.batch)])  # B, 3, S, S
            ids = self.tokenizer(
                [PROMPT] * self.settings.batch, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids  # B, M
        device, dtype = self.accelerator.device, self.dtype
        with self.clock.measure(VAE):
            posterior = self.vae.encode(pixels.to(device, dtype)).latent_dist
            clean = posterior.sample(self.generator) * self.vae.config.scaling_factor  # B, C, h, w
        with self.clock.measure(TEXT):
            states = self.text_encoder(ids.to(device))[0]  # B, M, E
        noise = torch.randn(clean.shape, generator=self.generator, device=device, dtype=dtype)
        most = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(most, (len(clean),), generator=self.generator, device=device)
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        with self.clock.measure(FORWARD):
            predicted = self.unet(noisy, timesteps, states, return_dict=False)[0]
        self.clock.predicted(predicted)
        loss = mse_loss(predicted.float(), noise.float())
        with self.clock.measure(BACKWARD):
            self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.item(), norm.item()

    def _next_path(self) -> Path:
        if not self.waiting:
            self.waiting = self.order.sample(self.paths, len(self.paths))
        return self.waiting.pop()

    def _pixels(self, path: Path) -> torch.Tensor:
        """A picture from disk: upright, its shorter side made S, its middle, (3, S, S) in [-1, 1]."""
        side = self.settings.resolution
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
        scale = side / min(picture.size)
        picture = picture.resize([max(side, round(length * scale)) for length in picture.size], Image.BILINEAR)
        left, top = ((length - side) // 2 for length in picture.size)
        picture = picture.crop((left, top, left + side, top + side))
        return torch.from_numpy(np.asarray(picture, dtype=np.float32)).permute(2, 0, 1).div(127.5).sub(1)

    def save(self, folder: Path) -> Path:
        """Write the LoRA as diffusers does."""
        unet = self.accelerator.unwrap_model(self.unet).to(torch.float32)
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
        StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
        return folder / "pytorch_lora_weights.safetensors"


def recipe(turn: Callable[[], None], settings: Settings, base: Path, pictures: Path, folder: Path) -> dict:
    """A run of the recipe."""
    prepare_process(settings)
    clock = Clock(turn, settings.device)
    with clock.run():
        running = Recipe(clock, settings, base, pictures)
        clock.ready()
        for _ in range(settings.steps):
            clock.step_done(*running.step())
        with clock.measure(SAVE):
            path = running.save(folder)
    told = described(path, ("lora.up", "lora_B"), sum(p.numel() for p in running.trained))
    return clock.told | told | {"mixed_precision": PRECISIONS[running.dtype]}
