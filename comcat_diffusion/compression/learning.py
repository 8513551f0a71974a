"""A fine-tuning from its first step to its last, which goes on where it was cut.

Adam's first steps are signs of gradients: all weights of a layer move along the mean of what it sees, whatever their
size, and DINOv2's patches (weights of 0.007) and stream (values of 0.05) are left in a step or two. So rates rise from
nothing, and small tensors have smaller ones (docs/log.md).

What is needed to go on stands in one file: the student, the moments of its optimizer, its schedule, the random numbers
(dropout) and the losses. Cut anywhere and taken up again, the result is that of an uncut run, bit for bit.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors.torch
import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import nn

from comcat_diffusion import atomic
from comcat_diffusion.compression.calibrate import Batch
from comcat_diffusion.compression.finetune import Distillation, Finetune, Step

WEIGHT_DECAY = 0.005  # as in the paper's code
WARM_UP = 0.1  # of the steps, in which rates rise
USUAL = 0.02  # root mean square of weights that take the whole rate: what transformers draws its own with
STATE_SECONDS = 60.0  # between writing the state
KEY = "comcat"  # of what the state file says about its run


def learned(
    small: nn.Module, dense: nn.Module, batches: Sequence[Batch], distillation: Distillation, rate: float, seed: int,
    state: Path | None = None, told: Callable[[Step], None] = lambda step: None,
) -> tuple[nn.Module, list[float]]:  # fmt: skip
    """The student after one step for each batch, in evaluation mode, and the losses of all steps.

    The learning rate rises to `rate`, then falls along a cosine; small tensors have less of it. The global random
    numbers are left as they were. Raises ValueError at a loss or gradient that is no number, or if the state
    file is another run's.
    """
    optimizer, schedule = _course(small, rate, len(batches))
    accelerator, named = Accelerator(), dict(small.named_parameters())
    student, prepared, stepped = accelerator.prepare(small, optimizer, schedule)
    loop = Finetune(student, dense, batches, distillation, prepared, stepped, accelerator)
    about = json.dumps([len(batches), rate, seed, {name: list(p.shape) for name, p in named.items()}])
    losses, saved = [], time.monotonic()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if state is not None and state.exists():
            losses = _load(state, about, small, named, optimizer, schedule)
        for step in loop.steps(len(batches) - len(losses), first=len(losses)):
            losses.append(step.loss)
            told(step)
            if state is not None and accelerator.is_main_process and time.monotonic() - saved >= STATE_SECONDS:
                _save(state, about, small, named, optimizer, schedule, losses)
                saved = time.monotonic()
    return accelerator.unwrap_model(student).eval(), losses


def _course(
    small: nn.Module, rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW with a group for each tensor, and the course of their rates."""
    groups = [{"params": [tensor], "lr": rate * _share(tensor)} for tensor in small.parameters()]
    warm = int(WARM_UP * steps)

    def course(step: int) -> float:
        return min(1.0, (step + 1) / (warm + 1)) * (1 + math.cos(math.pi * step / steps)) / 2

    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, course)


def _share(tensor: torch.Tensor) -> float:
    """Of the rate; all of it for zeros, which have no size that a step could be too large for."""
    size = float(tensor.detach().double().square().mean().sqrt())
    return min(1.0, size / USUAL) or 1.0


def refuse_other(path: Path, rate: float, seed: int, steps: int | None = None) -> None:
    """Raises ValueError if this cannot be the state of such a fine-tuning, by what is known before there is a student.

    `steps` may not be known yet. That the student's shapes are the same is seen when the state is loaded.
    """
    about = json.loads(_said(path)[KEY])
    if not isinstance(about, list) or len(about) != 4 or about[1:3] != [rate, seed] or steps not in (None, about[0]):
        raise _wrong(path)


def _wrong(path: Path) -> ValueError:
    return ValueError(f"{path} is not the state of this fine-tuning; take it away, and the fine-tuning begins anew.")


def _said(path: Path) -> dict[str, str]:
    """What the file says, of its run above all, in JSON. Raises ValueError if it is damaged or says nothing."""
    try:
        with safe_open(path, framework="pt") as opened:
            said = opened.metadata() or {}
        json.loads(said[KEY])
        return said
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise _wrong(path) from error


def _save(path: Path, about: str, small: nn.Module, named: dict, optimizer: object, schedule: object,
          losses: list[float]) -> None:  # fmt: skip
    tensors = {f"model.{name}": tensor for name, tensor in small.state_dict().items()}
    for name, parameter in named.items():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    tensors |= {"random": torch.get_rng_state(), "losses": torch.tensor(losses, dtype=torch.float64)}
    rates = {"schedule": schedule.state_dict(), "rates": [group["lr"] for group in optimizer.param_groups]}
    content = safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        {KEY: about, "rates": json.dumps(rates)},
    )
    atomic.write_bytes(path, content)


def _load(path: Path, about: str, small: nn.Module, named: dict, optimizer: object, schedule: object) -> list[float]:
    """Put the state in place; the losses so far."""
    said = _said(path)
    if said[KEY] != about:
        raise _wrong(path)
    rates = json.loads(said["rates"])
    if len(rates["rates"]) != len(optimizer.param_groups):  # earlier versions had one rate for all tensors
        raise _wrong(path)
    tensors = safetensors.torch.load_file(path)
    small.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    for name, parameter in named.items():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"optimizer.{name}.{key}" in tensors:
                value = tensors[f"optimizer.{name}.{key}"]
                optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)
    schedule.load_state_dict(rates["schedule"])
    for group, rate in zip(optimizer.param_groups, rates["rates"], strict=True):
        group["lr"] = rate
    torch.set_rng_state(tensors["random"])
    return tensors["losses"].tolist()
