"""What a training run costs, from a folder of pictures to an adapter file, in time and memory.

    python -m benchmarks.training            # SD 1.5 at 512 px; estimated: ten minutes on two idle CPU cores, 16 GB of
                                             # memory, 4 GB of disk in the temporary folder (TMPDIR)
    python -m benchmarks.training --quick    # a tiny architecture at 64 px: under a minute
    python -m benchmarks.training --show F   # the tables of an earlier run

Two parts:

- recipe: our `customize()` against diffusers' DreamBooth-LoRA recipe as it works, written here from its description:
  every step opens a picture, encodes it with the VAE and the prompt with the text encoder, and trains a LoRA of rank 4
  on to_q, to_k, to_v, to_out.0 of all attentions. Same base (SD 1.5's architecture, random weights), same pictures,
  steps and batch. Each runs in a process of its own, and they take turns step by step. What is measured is a run of a
  few steps; a run of 400 is extrapolated from it and called so. Both end with the adapter file: neither draws samples,
  ours also proves its file on a base loaded again (the recipe's script loads one again too; that is not counted here).
- pictures: start-up and step time of ours against the number of pictures, on the embedded base at 64 px, at the first
  start and at the second, which finds latents in --cache_dir. Every start is a process of its own.

The goals: at most 0.65 of the recipe's time at equal steps and 0.6 of its peak memory, a step time that does not grow
with the pictures, and a second start in at most 0.2 of the first.
"""

import argparse
import inspect
import json
import math
import os
import random
import statistics
import tempfile
import time
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
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch.nn.functional import mse_loss
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks import circumstances as shared
from benchmarks import variants
from comcat_diffusion import bases
from comcat_diffusion.attentions import DIFFUSERS
from comcat_diffusion.timing import wait
from comcat_diffusion.training import customize as story
from comcat_diffusion.training import learned, output
from comcat_diffusion.training.batching import Batching
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.learner import Learner
from comcat_diffusion.training.loop import Loop, Step

PARTS = ("recipe", "pictures")
LEAST_FOR_RATIO = 0.05  # seconds; what is shorter gets no ratio in a table
PROMPT = "a photo of sks dog"
PRECISIONS = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}  # as Accelerate calls them
WHOLE_RUN = 400  # steps of the run that is extrapolated: our default
TARGETS = {  # of our adapter; `cross` is its default
    "cross": {},
    "up": {"way_up": True},
    "self+cross": {"target_modules": ["attn1", "attn2"]},
}
RECIPE_RANK, RECIPE_RATE = 4, 1e-4
LOOK, LOAD, ENCODE, ATTACH = "look at pictures", "load base", "encode pictures and prompt", "adapter and optimizer"
SAVE, PROVE = "save", "prove the file"
PHASES = (LOOK, LOAD, ENCODE, ATTACH, SAVE, PROVE)
STEP_PARTS = BATCH, VAE, TEXT, FORWARD, BACKWARD = "make the batch", "VAE", "text encoder", "U-Net forward", "backward"
# Slow to import, so imported once for all processes; what a run loads of the libraries only when it needs it is left.
MODULES = ("comcat_diffusion.training.customize", "benchmarks.variants", "diffusers.pipelines.stable_diffusion")
TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32, 32, 32),
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
}


@dataclass(frozen=True)
class Settings:
    """What is measured and how often."""

    device: torch.device
    dtype: torch.dtype
    threads: int | None
    tiny: bool  # the recipe's base
    resolution: int  # pixels, of the recipe
    batch: int
    steps: int
    small_steps: int  # on the embedded base, where a step is short
    pictures: tuple[int, ...]  # numbers of them, fewest first
    parts: tuple[str, ...]
    targets: str  # of our adapter: a key of TARGETS

    def __post_init__(self) -> None:
        if self.resolution % 64:
            raise ValueError(f"--resolution must be a multiple of 64, not {self.resolution}.")
        if self.steps < 2:
            raise ValueError(f"--steps must be at least 2, not {self.steps}: the first one warms up.")
        if self.dtype == torch.float16 and self.device.type == "cpu":
            raise ValueError("--dtype float16 needs --device cuda.")


def main(arguments: list[str] | None = None) -> None:
    """Measure, write the JSON, print its tables."""
    flags = command_line().parse_args(arguments)
    if flags.show:
        print(tables(json.loads(flags.show.read_text())))
        return
    settings = settings_of(flags)
    shared.use_threads(settings.threads)
    quiet()
    path = flags.output or shared.results_path("training-quick" if flags.quick else "training", settings.device)
    report = {
        "circumstances": shared.circumstances(settings.device, settings.dtype),
        "settings": {
            "architecture": "tiny" if settings.tiny else "SD 1.5",
            **{name: getattr(settings, name) for name in ("resolution", "batch", "steps", "targets")},
        },
        "rows": [],
    }
    measures = {"recipe": recipe_rows, "pictures": picture_rows}
    for part in settings.parts:
        report["rows"] += measures[part](settings)
        shared.write_json(path, report)  # a later part that fails takes nothing away
    if "pictures" in settings.parts:
        plot(report, path.with_suffix(".png"))
    print(tables(json.loads(path.read_text())))
    print(f"\nWritten to {path}")


def command_line() -> argparse.ArgumentParser:
    """The flags; a default that depends on --quick is None."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where (default: %(default)s)")
    parser.add_argument("--dtype", choices=shared.DTYPES, default="float32", help="precision (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as many as torch finds)")
    parser.add_argument("--resolution", type=int, help="pixels, a multiple of 64 (default: 512, with --quick 64)")
    parser.add_argument("--batch", type=int, default=1, help="pictures a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="steps of the recipe part (default: 6, with --quick 3)")
    parser.add_argument("--pictures", type=int, nargs="+", help="numbers (default: 4 32 256 1000, with --quick 4 32)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument(
        "--targets",
        choices=TARGETS,
        default="cross",
        help="what ours adapts (default: %(default)s-attention, its own; up is that in the way up)",
    )
    parser.add_argument("--quick", action="store_true", help="tiny and short: shows that it runs, not what it costs")
    parser.add_argument("--output", type=Path, help="the JSON (default: benchmarks/results/training-DEVICE.json)")
    parser.add_argument("--show", type=Path, metavar="JSON", help="print the tables of an earlier run and stop")
    return parser


def settings_of(flags: argparse.Namespace) -> Settings:
    """The flags as settings."""
    return Settings(
        device=torch.device(flags.device),
        dtype=shared.DTYPES[flags.dtype],
        threads=flags.threads,
        tiny=flags.quick,
        resolution=flags.resolution or (64 if flags.quick else 512),
        batch=flags.batch,
        steps=flags.steps or (3 if flags.quick else 6),
        small_steps=4 if flags.quick else 20,
        pictures=tuple(sorted(flags.pictures or ((4, 32) if flags.quick else (4, 32, 256, 1000)))),
        parts=tuple(part for part in PARTS if part in flags.parts),
        targets=flags.targets,
    )


class Clock:
    """Keeps one run's time, without the time that it waits for its turn, and counts what it computes."""

    def __init__(self, turn: Callable[[], None], device: torch.device):
        self.turn, self.device = turn, device
        self.waited, self.open = 0.0, False
        self.spent: dict[str, float] = {}  # seconds by name, of what is going on now
        self.told = {"phases": {}, "steps": [], "losses": [], "gradient_norms": [], "forwards": 0}

    def now(self) -> float:
        """Seconds of this run, when the device has done all it was given."""
        wait()
        return time.perf_counter() - self.waited

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the block's time to a name; inside another measured block nothing is added."""
        if self.open:
            yield
            return
        self.open, start = True, self.now()
        try:
            yield
        finally:
            self.open = False
            self.spent[name] = self.spent.get(name, 0.0) + self.now() - start

    def timed(self, name: str, function: Callable) -> Callable:
        """The same function, measured; what a generator function yields is computed at once."""

        @wraps(function)
        def measured(*arguments: object, **more: object) -> object:
            with self.measure(name):
                result = function(*arguments, **more)
                if inspect.isgenerator(result):
                    result = iter(list(result))
            return result

        return measured

    @contextmanager
    def run(self) -> Iterator[None]:
        """The whole run: what comes before `ready`, the steps, and what comes after the last one."""
        begun = self.now()
        yield
        end = self.now()
        self.told["phases"] |= self.spent
        self.told |= {"total_seconds": end - begun, "start_seconds": self.ready_at - begun}
        self.told |= {"end_seconds": end - self.last, "peak_mib": shared.peak_memory_mib(self.device)}

    def ready(self) -> None:
        """All is ready for the first step."""
        self.told["phases"] |= self.spent
        self.ready_at = self.now()
        self._pass_on(self.ready_at)

    def step_done(self, loss: float, gradient_norm: float) -> None:
        """An optimizer step is done."""
        done = self.now()
        self.told["steps"].append({"seconds": done - self.last, "parts": self.spent})
        self.told["losses"].append(loss)
        self.told["gradient_norms"].append(gradient_norm)
        self.told["peak_mib_of_steps"] = shared.peak_memory_mib(self.device)
        self._pass_on(done)

    def _pass_on(self, since: float) -> None:
        """Let the others go on; the clock stands still from `since`, when the device had nothing left to compute."""
        self.spent, self.last = {}, since
        self.turn()
        self.waited += self.now() - since

    def predicted(self, prediction: torch.Tensor) -> None:
        """Take down a prediction of the U-Net in a step, (B, C, h, w)."""
        self.told["forwards"] += 1
        self.told["latents"] = list(prediction.shape)


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


# Ours


class _Turns:
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
    return clock.told | described(outcome.adapter, ("k_down", "out_up"), outcome.parameters)


@contextmanager
def _measured(clock: Clock) -> Iterator[None]:
    """Measure the functions that a run of ours consists of for as long as the block lasts."""
    places = [
        (LOOK, story, "read_dataset"), (LOOK, story, "remarks"), (LOOK, output, "target_of"),
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


# The recipe


class Recipe:
    """DreamBooth-LoRA as diffusers' script works by default: nothing is kept from step to step but the weights.

    Letters: B batch, S side in pixels, C latent channels, h x w latent size, M context tokens, E their width.
    """

    def __init__(self, clock: Clock, settings: Settings, base: Path, pictures: Path):
        self.clock, self.settings = clock, settings
        with clock.measure(LOOK):
            self.paths = sorted(pictures.iterdir())
        self.accelerator = Accelerator(mixed_precision=PRECISIONS[settings.dtype])
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
            setattr(self, name, model.to(self.accelerator.device, self.settings.dtype))

    def _attach(self) -> None:
        """A new LoRA on every attention of the U-Net, AdamW and a constant schedule."""
        self.unet.add_adapter(
            LoraConfig(
                r=RECIPE_RANK, lora_alpha=RECIPE_RANK, init_lora_weights="gaussian", target_modules=DIFFUSERS.names
            )
        )
        cast_training_params(self.unet, torch.float32)
        self.trained = variants.trainable(self.unet)
        optimizer = torch.optim.AdamW(self.trained, lr=RECIPE_RATE, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
        schedule = get_scheduler("constant", optimizer)
        self.unet, self.optimizer, self.schedule = self.accelerator.prepare(self.unet.train(), optimizer, schedule)

    def step(self) -> tuple[float, float]:
        """One optimizer step; returns loss and gradient norm."""
        with self.clock.measure(BATCH):
            pixels = torch.stack([self._pixels(self._next_path()) for _ in range(self.settings.batch)])  # B, 3, S, S
            ids = self.tokenizer(
                [PROMPT] * self.settings.batch, padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids  # B, M
        device, dtype = self.accelerator.device, self.settings.dtype
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
    return clock.told | described(path, ("lora.up", "lora_B"), sum(p.numel() for p in running.trained))


# What both are given


def build_base(folder: Path, tiny: bool) -> Path:
    """SD 1.5's architecture, or a tiny one of its layout, with random weights, as a diffusers folder.

    No CLIP vocabulary comes with this project, so the tokenizer is the embedded base's: the table of token embeddings
    has some 700 rows instead of 49,408, all else is of full size.
    """
    words = CLIPTokenizer.from_pretrained(bases.assets() / "tiny-sd" / "tokenizer", model_max_length=77)
    width, layers, levels = (32, 2, (8, 16, 16, 16)) if tiny else (768, 12, (128, 256, 512, 512))
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64 or 1,
        max_position_embeddings=words.model_max_length,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=levels,
            down_block_types=("DownEncoderBlock2D",) * len(levels),
            up_block_types=("UpDecoderBlock2D",) * len(levels),
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=8 if tiny else 32,
            sample_size=512,
        )
        unet = UNet2DConditionModel(**TINY_UNET) if tiny else variants.bare_unet(torch.device("cpu"), torch.float32)
        encoder = CLIPTextModel(text)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=words,
        unet=unet,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def make_pictures(folder: Path, count: int, size: tuple[int, int], suffix: str) -> Path:
    """Soft random colours, no two pictures alike; `size` is (width, height)."""
    folder.mkdir(parents=True)
    for number in range(count):
        coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.BICUBIC).save(folder / f"{number:04d}{suffix}")
    return folder


def config_of(settings: Settings, pictures: Path, folder: Path, **more: object) -> TrainConfig:
    """Settings of a run of ours that ends, as the recipe's, with a float32 file."""
    return TrainConfig(
        instance_data_dir=str(pictures),
        instance_prompt=PROMPT,
        output_dir=str(folder),
        mixed_precision=PRECISIONS[settings.dtype],
        save_precision="fp32",
        skip_final_inference=True,
        **TARGETS[settings.targets],
        **more,
    )


# Parts


def recipe_rows(settings: Settings) -> list[dict]:
    """Ours and the recipe, and a row that compares them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = build_base(folder / "base", settings.tiny)
        side = settings.resolution
        photos = make_pictures(folder / "pictures", 4, (3 * side // 2, 2 * side), ".jpg")
        more = {"resolution": side, "train_batch_size": settings.batch, "max_train_steps": settings.steps}
        config = config_of(settings, photos, folder / "ours", pretrained_model_name_or_path=str(base), **more)
        jobs = {"ours": (ours, settings, config), "recipe": (recipe, settings, base, photos, folder / "recipe")}
        told = shared.taking_turns(jobs, MODULES)
    require_training(told, settings.steps)
    for one in told.values():
        del one["file"]
        later = [step["seconds"] for step in one["steps"][1:]]
        one |= {"first_step_seconds": one["steps"][0]["seconds"], "step_seconds": statistics.median(later)}
        one |= {"extrapolated_steps": WHOLE_RUN, "extrapolated_seconds": extrapolated(one, WHOLE_RUN)}
    told["ours"]["adapts"], told["recipe"]["adapts"] = settings.targets, "self+cross"
    return [{"part": "recipe", "variant": name, **one} for name, one in told.items()] + [compared(**told)]


def extrapolated(told: dict, steps: int) -> float:
    """Seconds of a run of this many steps: start, first step and end as measured, all other steps as their median."""
    start, end = told["start_seconds"], told["end_seconds"]
    return start + told["first_step_seconds"] + (steps - 1) * told["step_seconds"] + end


def compared(ours: dict, recipe: dict) -> dict:
    """Ratios of ours to the recipe; those of steps within the same round, the first one left out."""
    pairs = zip(ours["steps"][1:], recipe["steps"][1:], strict=True)
    ratios = [mine["seconds"] / other["seconds"] for mine, other in pairs]
    names = ("total_seconds", "extrapolated_seconds", "peak_mib_of_steps", "peak_mib", "parameters", "file_bytes")
    row = {"part": "recipe", "variant": "ratio", "step_seconds": statistics.median(ratios), "step_ratios": ratios}
    return row | {name: ours[name] / recipe[name] for name in names}


def require_training(told: dict[object, dict], steps: int) -> None:
    """Raise RuntimeError unless all runs did the same work and learned something by it."""
    for name, one in told.items():
        counts = {len(one["steps"]), len(one["losses"]), one["forwards"]}
        if counts != {steps}:
            raise RuntimeError(f"'{name}' was to take {steps} steps and took {sorted(counts)}.")
        numbers = [*one["losses"], *one["gradient_norms"], one["moved"]]
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            raise RuntimeError(f"'{name}' did not train: losses, gradient norms and movement are {numbers}.")
    sizes = {name: one["latents"] for name, one in told.items()}
    if len({tuple(size) for size in sizes.values()}) > 1:
        raise RuntimeError(f"The runs trained on latents of different sizes: {sizes}.")


def picture_rows(settings: Settings) -> list[dict]:
    """Starts and steps on the embedded base by the number of pictures, without and with latents in the cache."""
    rows, fewest = [], settings.pictures[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folders = {n: make_pictures(folder / f"pictures-{n}", n, (64, 64), ".png") for n in settings.pictures}
        starts = {}
        for start in ("first", "second"):
            jobs = {}
            for n, pictures in folders.items():
                more = {"train_batch_size": min(4, fewest), "max_train_steps": settings.small_steps}
                more["cache_dir"] = str(folder / f"cache-{n}")
                jobs[n] = ours, settings, config_of(settings, pictures, folder / f"{start}-{n}", **more)
            told = starts[start] = shared.taking_turns(jobs, MODULES)
            require_training(told, settings.small_steps)
            rows += [picture_row(n, start, told[n], told[fewest], starts["first"][n]) for n in folders]
        if settings.device.type == "cpu":
            require_same_adapters(starts["first"], starts["second"])
    return rows


def require_same_adapters(first: dict[int, dict], second: dict[int, dict]) -> None:
    """Raise RuntimeError unless a run from the cache learns to the byte what the run that filled it learned."""
    for count, one in second.items():
        if Path(one["file"]).read_bytes() != Path(first[count]["file"]).read_bytes():
            raise RuntimeError(f"With {count} pictures the cache changes what is learned.")


def picture_row(count: int, start: str, told: dict, fewest: dict, first: dict) -> dict:
    """One run; step ratios are to the run on the fewest pictures in the same round, start ratios to the first start."""
    seconds, other = ([step["seconds"] for step in one["steps"][1:]] for one in (told, fewest))
    row = {"part": "pictures", "pictures": count, "start": start, "start_seconds": told["start_seconds"]}
    row |= {"pictures_seconds": pictures_seconds(told), "phases": told["phases"]}
    row |= {"start_ratio": told["start_seconds"] / first["start_seconds"]}
    row |= {"pictures_ratio": pictures_seconds(told) / pictures_seconds(first)}
    ratios = [mine / its for mine, its in zip(seconds, other, strict=True)]
    row |= {"step_seconds": statistics.median(seconds), "step_ratio": statistics.median(ratios), "step_ratios": ratios}
    return row | {"peak_mib_of_steps": told["peak_mib_of_steps"]}


def pictures_seconds(told: dict) -> float:
    """The share of a start that the pictures make: looking at them and encoding them (with the one prompt)."""
    return told["phases"][LOOK] + told["phases"][ENCODE]


# Tables and a plot


def plot(report: dict, path: Path) -> None:
    """Seconds of a start, over the number of pictures."""
    rows = [row for row in report["rows"] if row["part"] == "pictures"]
    lines = {
        f"{start} start": tuple(
            [row[name] for row in rows if row["start"] == start] for name in ("pictures", "start_seconds")
        )
        for start in ("first", "second")
    }
    shared.line_plot(path, lines, xlabel="pictures", ylabel="seconds until the first step")


def tables(report: dict) -> str:
    """The report as markdown, a table for every part and for what it says of steps and memory."""
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    lines = [shared.circumstances_text(report["circumstances"]), f"Recipe part: random weights; {settings}."]
    makers = {"recipe": recipe_tables, "pictures": picture_table}
    for part, make in makers.items():
        rows = [row for row in report["rows"] if row["part"] == part]
        lines += [make(rows)] if rows else []
    return "\n\n".join(lines)


def recipe_tables(rows: list[dict]) -> str:
    """Phases, parts of a step, memory and size, side by side."""
    mine, other, ratio = rows
    steps = len(mine["steps"])

    def cells(name: str, of: Callable[[dict], float], form: str = ".3f") -> tuple[str, ...]:
        values = [of(row) for row in (mine, other)]
        shown = f"{values[0] / values[1]:.3f}" if min(values) >= LEAST_FOR_RATIO else "-"
        return name, *(format(value, form) if value else "-" for value in values), shown

    def rest(row: dict) -> float:
        known = [row["phases"].get(name, 0) for name in PHASES] + [step["seconds"] for step in row["steps"]]
        return row["total_seconds"] - sum(known)

    phases = [cells(name, lambda row, name=name: row["phases"].get(name, 0)) for name in PHASES]
    low, high = min(ratio["step_ratios"]), max(ratio["step_ratios"])
    phases[4:4] = [
        cells("first step", lambda row: row["first_step_seconds"]),
        (*cells("a later step (median)", lambda row: row["step_seconds"])[:3], f"{ratio['step_seconds']:.3f}"),
    ]
    phases += [
        cells("all else", rest),
        cells(f"**measured: run of {steps} steps**", lambda row: row["total_seconds"]),
        cells(f"**extrapolated: run of {WHOLE_RUN} steps**", lambda row: row["extrapolated_seconds"]),
    ]
    parts = [cells(name, lambda row, name=name: part_of_step(row, name)) for name in STEP_PARTS]
    parts.append(cells("all else", lambda row: row["step_seconds"] - sum(part_of_step(row, n) for n in STEP_PARTS)))
    sizes = [
        cells("peak MiB until the last step", lambda row: row["peak_mib_of_steps"], ",.0f"),
        cells("peak MiB of the run", lambda row: row["peak_mib"], ",.0f"),
        cells("parameters", lambda row: row["parameters"], ",d"),
        cells("bytes of the file, float32", lambda row: row["file_bytes"], ",d"),
    ]
    columns = ("ours", "recipe", "ratio")
    adapts = (
        f"Ours adapts {mine['adapts']}-attention, the recipe {other['adapts']}-attention; latents {mine['latents']}."
    )
    note = (
        f"Ratio of a later step: median of the rounds', which are {low:.3f} to {high:.3f}. Parts: of the later steps."
    )
    titled = {"seconds of a run": phases, "seconds of a step": parts, "memory and size": sizes}
    return "\n\n".join(
        ["**recipe: from pictures to an adapter**", adapts]
        + [shared.markdown_table((title, *columns), table) for title, table in titled.items()]
        + [note]
    )


def part_of_step(row: dict, name: str) -> float:
    """Median seconds of one part of a step over the steps after the first."""
    return statistics.median(step["parts"].get(name, 0) for step in row["steps"][1:])


def picture_table(rows: list[dict]) -> str:
    """Starts and steps by the number of pictures."""
    fewest = min(row["pictures"] for row in rows)
    columns = (
        "pictures, start", "start s", "x first", "of it look and encode s", "x first", "ms a picture", "step s",
        f"x {fewest} pictures", "peak MiB",
    )  # fmt: skip
    cells = [
        (
            *(f"{row['pictures']}, {row['start']}", f"{row['start_seconds']:.2f}", f"{row['start_ratio']:.3f}"),
            *(f"{row['pictures_seconds']:.3f}", f"{row['pictures_ratio']:.3f}"),
            *(f"{row['pictures_seconds'] / row['pictures'] * 1000:.1f}", f"{row['step_seconds']:.3f}"),
            *(f"{row['step_ratio']:.3f}", f"{row['peak_mib_of_steps']:,.0f}"),
        )
        for row in rows
    ]
    title = "**pictures: ours on the embedded base, 64 px; the second start finds its latents in the cache**"
    return f"{title}\n\n{shared.markdown_table(columns, cells)}"


if __name__ == "__main__":
    main()
