"""A subject learned as diffusers' scripts do: a constant rate, the plain loss of all of a picture, no masks."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from comcat_diffusion.training.batching import Batching
from comcat_diffusion.training.encode import Crop
from comcat_diffusion.training.learner import Learner
from comcat_diffusion.training.loop import Loop
from comcat_diffusion.training.objective import objective_of

BATCH = 4


def started(pipe: DiffusionPipeline, crops: Sequence[Crop], rate: float, seed: int) -> Loop:
    """The loop over all that a pipeline's denoiser has to learn, before its first step."""
    learner = Learner(pipe, list(dict.fromkeys(crop.prompt for crop in crops)), train_text=False).train()
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision="no")
    batching = Batching.of(crops, seed, BATCH)
    return Loop(accelerator.prepare(learner), crops, objective_of(pipe), batching, optimizer, schedule, accelerator)


def learned(
    pipe: DiffusionPipeline,
    crops: Sequence[Crop],
    start: Callable[[DiffusionPipeline], None],
    rate: float,
    seed: int,
    steps: int,
    kept: Callable[[DiffusionPipeline], Mapping[str, torch.Tensor]],
    file: Path,
) -> tuple[int, float]:
    """Train what `start` puts into a pipeline or frees, and write what `kept` names; (its bytes, seconds of steps)."""
    torch.manual_seed(seed)
    start(pipe)
    loop = started(pipe, crops, rate, seed)
    seconds = sum(step.seconds for step in loop.steps(steps))
    loop.learner.eval()
    save_file({name: tensor.half().contiguous() for name, tensor in kept(pipe).items()}, file)
    return file.stat().st_size, seconds
