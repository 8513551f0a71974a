"""What this machine takes for a step of training and a step of drawing: the base alone, with COMCAT, with a LoRA.

Latents and prompts are made up, for time does not depend on what they show. Each case is put on the bare base just
before it is timed, as it is in use, so that none carries another's hooks.
"""

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig

from comcat_diffusion import atomic, bases, timing
from comcat_diffusion.adapters.merge import unload_adapters
from comcat_diffusion.adapters.parts import denoiser
from comcat_diffusion.adapters.placing import add_adapter, forget
from comcat_diffusion.adapters.store import library_versions
from comcat_diffusion.adapters.trigger import listen
from comcat_diffusion.attentions import DIFFUSERS
from comcat_diffusion.bench.config import BenchConfig
from comcat_diffusion.config import EMBEDDED
from comcat_diffusion.families.known import family_of
from comcat_diffusion.markdown import table
from comcat_diffusion.training.batching import Batch, made
from comcat_diffusion.training.encode import Crop
from comcat_diffusion.training.learned import ADAPTER, adapter_config
from comcat_diffusion.training.learner import Learner
from comcat_diffusion.training.objective import objective_of

TRIGGER, PROMPT = "sks", "a photo of sks dog"
BASE, COMCAT, LORA = "the base alone", "COMCAT", "LoRA"
LEAST_SECONDS = 0.2  # a shorter step is repeated within a sample
FILE_BYTES = 2  # a parameter in float16, as both kinds of file usually hold it


@dataclass(frozen=True)
class Row:
    """One kind of step with one kind of adapter; `ratio` is to the base alone, round by round."""

    step: str
    adapter: str
    seconds: float
    ratio: float
    parameters: int

    @property
    def kilobytes(self) -> float:
        """Of the adapter's tensors in float16."""
        return self.parameters * FILE_BYTES / 1000


@dataclass(frozen=True)
class Bench:
    """Everything that was timed, and where."""

    rows: list[Row]
    circumstances: Mapping[str, object]

    def table(self) -> str:
        """As markdown that reads well as plain text."""
        cells = [
            (f"{row.step}, {row.adapter}", f"{row.seconds:.3f}", f"{row.ratio:.2f}x", f"{row.kilobytes:,.0f} kB")
            for row in self.rows
        ]
        return table([("a step of", "seconds", "to the base's", "adapter"), *cells])

    def to_json(self) -> str:
        """As text."""
        return json.dumps({"rows": [asdict(row) for row in self.rows], "circumstances": self.circumstances}, indent=1)


def bench(config: BenchConfig) -> Bench:
    """Time a base without adapter, with COMCAT and with a LoRA, in turns. Raises ValueError and OSError."""
    device = bases.asked_device(config.device)
    base = config.pretrained_model_name_or_path or EMBEDDED
    config = replace(config, precision=bases.asked_precision(config.precision, device, base, config.base_config))
    pipe = bases.asked_base(config, config.precision).to(device)
    denoiser(pipe).requires_grad_(False)
    resolution = bases.asked_resolution(pipe, config.resolution)
    learner = Learner(pipe, [PROMPT, ""], train_text=False)
    trained = _batch(pipe, resolution, [PROMPT] * config.train_batch_size)
    drawn = _batch(pipe, resolution, [PROMPT, ""])  # classifier-free guidance asks for both

    def attach(name: str) -> None:
        _attach(pipe, name, config)

    sizes = {}
    for name in (BASE, COMCAT, LORA):
        attach(name)
        sizes[name] = sum(p.numel() for p in denoiser(pipe).parameters() if p.requires_grad)
    predict = torch.no_grad()(_predict)
    # A base without adapter has nothing to train: what no step can do without is its forward pass.
    cases = {
        "training": (lambda: predict(learner, trained), lambda: _learn(learner, trained)),
        "drawing": (lambda: predict(learner, drawn), lambda: predict(learner, drawn)),
    }
    rows = []
    for step, (bare, adapted) in cases.items():
        turns = {BASE: bare, COMCAT: adapted, LORA: adapted}
        timed = list(islice(timing.rounds(turns, attach, LEAST_SECONDS), config.rounds))
        for name in turns:
            seconds = statistics.median(found[name] for found in timed)
            ratio = statistics.median(found[name] / found[BASE] for found in timed)
            rows.append(Row(step, name, seconds, ratio, sizes[name]))
    made_of = Bench(rows, _circumstances(config, pipe, resolution))
    if config.output:
        atomic.write_bytes(config.output, made_of.to_json().encode())
    return made_of


def _attach(pipe: DiffusionPipeline, name: str, config: BenchConfig) -> None:
    """Leave the bare denoiser with one adapter, or with none."""
    unload_adapters(pipe)
    model = denoiser(pipe)
    recurse_remove_peft_layers(model)
    forget(model, list(getattr(model, "peft_config", {})))
    if name == COMCAT:
        add_adapter(model, adapter_config(config, model, [TRIGGER]), ADAPTER)
        listen(pipe)
    elif name == LORA:
        rank = config.lora_rank
        add_adapter(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=DIFFUSERS.names), ADAPTER)
    cast_training_params(model, torch.float32)  # what is learned is in full precision, whatever the base is in


def _batch(pipe: DiffusionPipeline, resolution: int, prompts: list[str]) -> Batch:
    """Noise for every prompt, as a training step sees its pictures."""
    side = resolution // (pipe.vae_scale_factor * family_of(pipe).packing)
    size = (resolution, resolution)
    noise = torch.randn(denoiser(pipe).config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    crops = [Crop(noise, torch.zeros_like(noise), prompt, "noise", (*size, 0, 0, *size)) for prompt in prompts]
    objective = objective_of(pipe)
    return made(crops, objective, [torch.Generator().manual_seed(n) for n in range(len(crops))]).to(pipe.device)


def _predict(learner: Learner, batch: Batch) -> torch.Tensor:
    dtype = learner.denoiser.dtype
    with torch.autocast(batch.noisy.device.type, dtype, enabled=dtype != torch.float32):
        return learner(batch.noisy, batch.timesteps, batch.prompts, batch.frames)


def _learn(learner: Learner, batch: Batch) -> None:
    """Forward and backward; the optimizer of so few parameters takes next to nothing."""
    (_predict(learner, batch).float() - batch.target).square().mean().backward()
    learner.zero_grad(set_to_none=True)


def _circumstances(config: BenchConfig, pipe: DiffusionPipeline, resolution: int) -> dict[str, object]:
    device = pipe.device
    return {
        "base": bases.public_name(config.pretrained_model_name_or_path or EMBEDDED),
        "resolution": resolution, "train_batch_size": config.train_batch_size, "precision": config.precision,
        "device": f"{device.type} ({timing.device_name(device)})",
        "threads": torch.get_num_threads(), "rounds": config.rounds, **library_versions(),
    }  # fmt: skip
