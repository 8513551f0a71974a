"""The loop that every stage of the recipe shares: a cosine rate, EMA, a checkpoint a minute, one graph on a GPU."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel

from comcat_diffusion.bases import has_bf16

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where every stage trains
EAGER_STEPS = 3  # before a graph is captured: libraries choose their kernels and allocate what they keep

Batch = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Schedule:
    """How long a stage trains and how fast."""

    steps: int
    learning_rate: float
    warmup_steps: int = 200
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    checkpoint_seconds: float = 60.0
    hidden_rate: float = 2.5  # of `hidden` matrices, as a multiple
    limit_seconds: float = math.inf  # after which the stage ends where it is

    def rate(self, step: int) -> float:
        """Learning rate at a step: linear warm-up, then a cosine to a fiftieth."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        progress = torch.tensor(min(1.0, step / self.steps) * torch.pi)
        return self.learning_rate * warm * float(0.51 + 0.49 * torch.cos(progress))


def fit(
    model: torch.nn.Module,
    batch_of: Callable[[int], Batch],
    loss_of: Callable[..., torch.Tensor],
    schedule: Schedule,
    state: Path,
    hidden: Sequence[torch.nn.Parameter] = (),
) -> None:
    """Train `model`, which is on `DEVICE`, on `loss_of(*batch_of(step))`; leave the EMA weights in it.

    AdamW trains it but for its `hidden` matrices, which are Muon's. That reads its rate on the host, so that a GPU runs
    such a stage without a graph.

    A run that was cut goes on from `state`. `batch_of` draws from the step number, so a resumed run sees what an
    unbroken one would have seen; its tensors have the same shapes at every step, and all that is random is in it.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = _optimizers(trained, hidden, schedule.weight_decay)
    ema = EMAModel(trained, decay=schedule.ema_decay, foreach=True)
    first = _resume(model, optimizers, ema, state)
    ema.decay = schedule.ema_decay  # a resumed run may change it
    rate = torch.zeros((), device=DEVICE)  # a tensor, so that a captured update reads what the schedule says
    for group in optimizers["optimizer"].param_groups:
        group.update(lr=rate, capturable=DEVICE.type == "cuda")

    def update(*batch: torch.Tensor) -> torch.Tensor:
        loss = loss_of(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    torch.backends.cudnn.benchmark = True  # shapes never change, so the fastest kernels are worth looking for
    run = _OneGraph(update) if DEVICE.type == "cuda" and not hidden else update
    began = saved_at = printed_at = time.monotonic()
    mean = None
    for step in range(first, schedule.steps):
        now_rate = schedule.rate(step)
        rate.fill_(now_rate)
        for group in optimizers["muon"].param_groups if hidden else ():
            group["lr"] = schedule.hidden_rate * now_rate
        loss = run(*batch_of(step))
        ema.step(trained)
        mean = loss.clone() if mean is None else mean.lerp(loss, 0.02)  # read seldom: a GPU would wait
        now = time.monotonic()
        if (step + 1) % 100 == 0:
            each = (now - printed_at) / 100
            print(f"{state.stem} step {step + 1}/{schedule.steps} loss {mean:.4f} {each:.4f} s/step", flush=True)
            printed_at = now
        ends = step + 1 == schedule.steps or now - began > schedule.limit_seconds
        if ends or now - saved_at > schedule.checkpoint_seconds:
            _save(model, optimizers, ema, step + 1, state)
            saved_at = now
        if ends:
            break
    ema.copy_to(trained)


def _optimizers(
    trained: Sequence[torch.nn.Parameter], hidden: Sequence[torch.nn.Parameter], weight_decay: float
) -> dict[str, torch.optim.Optimizer]:
    """By the names that they go by in a checkpoint."""
    apart = {id(matrix) for matrix in hidden}
    others = [parameter for parameter in trained if id(parameter) not in apart]
    optimizers = {"optimizer": torch.optim.AdamW(others, weight_decay=weight_decay, fused=True)}
    if hidden:
        optimizers["muon"] = torch.optim.Muon(hidden, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return optimizers


class _OneGraph:
    """`update`, launched as one CUDA graph from its fourth call on.

    These models are so small that a GPU spends most of a step waiting to be told of its next kernel.
    """

    def __init__(self, update: Callable[..., torch.Tensor]):
        self._update, self._calls = update, 0
        self._graph, self._batch, self._loss = torch.cuda.CUDAGraph(), (), None

    def __call__(self, *batch: torch.Tensor) -> torch.Tensor:
        self._calls += 1
        if self._calls <= EAGER_STEPS:
            return self._aside(batch)
        if self._loss is None:
            self._batch = tuple(tensor.clone() for tensor in batch)
            with torch.cuda.graph(self._graph):
                self._loss = self._update(*self._batch)
        for held, tensor in zip(self._batch, batch, strict=True):
            held.copy_(tensor)
        self._graph.replay()
        return self._loss

    def _aside(self, batch: Batch) -> torch.Tensor:
        """On a stream of its own, as what is captured later will be."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            loss = self._update(*batch)
        torch.cuda.current_stream().wait_stream(stream)
        return loss


def adopt(model: torch.nn.Module, step: int, state: Path) -> None:
    """Write `model`, as it is, as the checkpoint of `step`, so that `fit` trains it further with a fresh optimizer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    _save(model, _optimizers(trained, (), Schedule.weight_decay), EMAModel(trained), step, state)


def fast_precision() -> torch.autocast:
    """bfloat16 on a GPU and where the processor multiplies it (AMX, or AVX-512: 0.75 of the time), else float32."""
    fast = DEVICE.type == "cuda" or has_bf16(DEVICE.type)
    # every weight is cast once a step, and a cache of casts must not outlive the capture of a graph
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=fast, cache_enabled=False)


def ema_weights(model: torch.nn.Module, state: Path) -> None:
    """Put the EMA weights of an unfinished (or finished) run into `model`."""
    saved = torch.load(state, weights_only=True, map_location="cpu")
    model.load_state_dict(saved["model"])
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter, shadow in zip(trained, saved["ema"]["shadow_params"], strict=True):
        parameter.data.copy_(shadow)


Optimizers = Mapping[str, torch.optim.Optimizer]


def _save(model: torch.nn.Module, optimizers: Optimizers, ema: EMAModel, step: int, state: Path) -> None:
    state.parent.mkdir(parents=True, exist_ok=True)
    partial = state.with_suffix(".partial")
    saved = {"model": model.state_dict(), "ema": ema.state_dict(), "step": step}
    saved |= {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
    torch.save(saved, partial)
    os.replace(partial, state)


def _resume(model: torch.nn.Module, optimizers: Optimizers, ema: EMAModel, state: Path) -> int:
    if not state.exists():
        return 0
    saved = torch.load(state, weights_only=True, map_location=DEVICE)
    model.load_state_dict(saved["model"])
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(saved[name])
    ema.load_state_dict(saved["ema"])
    ema.to(DEVICE)
    return saved["step"]
