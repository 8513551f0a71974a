"""The loop that every stage of the recipe shares: a time or step budget, a cosine rate, EMA, a checkpoint a minute."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel

from comcat_diffusion.bases import has_bf16

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where every stage trains


@dataclass(frozen=True)
class Schedule:
    """How long a stage trains and how fast."""

    steps: int
    learning_rate: float
    warmup_steps: int = 200
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    checkpoint_seconds: float = 60.0

    def rate(self, step: int) -> float:
        """Learning rate at a step: linear warm-up, then a cosine to a fiftieth."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        progress = torch.tensor(min(1.0, step / self.steps) * torch.pi)
        return self.learning_rate * warm * float(0.51 + 0.49 * torch.cos(progress))


def fit(model: torch.nn.Module, loss_of: Callable[[int], torch.Tensor], schedule: Schedule, state: Path) -> None:
    """Train `model`, which is on `DEVICE`, on `loss_of(step)`; leave the EMA weights in it.

    A run that was cut goes on from `state`. `loss_of` draws its batch from the step number, so a resumed run sees what
    an unbroken one would have seen.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True)
    ema = EMAModel(trained, decay=schedule.ema_decay, foreach=True)
    first = _resume(model, optimizer, ema, state)
    ema.decay = schedule.ema_decay  # a resumed run may change it
    saved_at, printed_at, mean = time.monotonic(), time.monotonic(), None
    for step in range(first, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = loss_of(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(trained)
        mean = loss.detach() if mean is None else mean.lerp(loss.detach(), 0.02)  # read seldom: a GPU would wait
        now = time.monotonic()
        if (step + 1) % 100 == 0:
            each = (now - printed_at) / 100
            print(f"{state.stem} step {step + 1}/{schedule.steps} loss {mean:.4f} {each:.3f} s/step", flush=True)
            printed_at = now
        if now - saved_at > schedule.checkpoint_seconds or step + 1 == schedule.steps:
            _save(model, optimizer, ema, step + 1, state)
            saved_at = now
    ema.copy_to(trained)


def adopt(model: torch.nn.Module, step: int, state: Path) -> None:
    """Write `model`, as it is, as the checkpoint of `step`, so that `fit` trains it further with a fresh optimizer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    _save(model, torch.optim.AdamW(trained, fused=True), EMAModel(trained), step, state)


def fast_precision() -> torch.autocast:
    """bfloat16 on a GPU and where the processor multiplies it (AMX, or AVX-512: 0.75 of the time), else float32."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda" or has_bf16(DEVICE.type))


def ema_weights(model: torch.nn.Module, state: Path) -> None:
    """Put the EMA weights of an unfinished (or finished) run into `model`."""
    saved = torch.load(state, weights_only=True, map_location="cpu")
    model.load_state_dict(saved["model"])
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter, shadow in zip(trained, saved["ema"]["shadow_params"], strict=True):
        parameter.data.copy_(shadow)


def _save(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel, step: int, state: Path) -> None:
    state.parent.mkdir(parents=True, exist_ok=True)
    partial = state.with_suffix(".partial")
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict(), "step": step}
    torch.save(saved, partial)
    os.replace(partial, state)


def _resume(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: EMAModel, state: Path) -> int:
    if not state.exists():
        return 0
    saved = torch.load(state, weights_only=True, map_location=DEVICE)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    ema.load_state_dict(saved["ema"])
    ema.to(DEVICE)
    return saved["step"]
