"""The training loop: a generator without input or output. It yields a record after every optimizer step."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from comcat_diffusion.training.batching import Batching, made
from comcat_diffusion.training.encode import Crop
from comcat_diffusion.training.objective import Objective
from comcat_diffusion.training.prior import Prior


class NotFinite(RuntimeError):
    """The loss or a gradient became NaN or infinite; the message names step, pictures, timesteps and precision."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step did."""

    step: int  # counted from one
    loss: float
    prior_loss: float | None
    learning_rate: float
    gradient_norm: float | None  # none of a step that fp16's loss scaling left out
    seconds: float


OVERFLOWS = 16  # halvings of the loss scale in a row; more is no matter of scale


@dataclass
class Loop:
    """Everything a step needs. `crops` and `batching` say what is learned, `objective` and `prior` how it is judged."""

    learner: torch.nn.Module  # of class Learner, as Accelerate prepared it
    crops: Sequence[Crop]
    objective: Objective
    batching: Batching
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    accelerator: Accelerator
    max_grad_norm: float = 1.0
    prior: Prior | None = None
    prior_weight: float = 1.0

    def steps(self, count: int, done: int = 0) -> Iterator[Step]:
        """Train what requires gradients, from step `done` to step `count`, yielding after each optimizer step.

        Raises NotFinite, before the weights are touched, at the first loss or gradient that is no number; in fp16,
        which scales the loss, at the first gradient that no scale makes one.
        """
        trained = [p for p in self.learner.parameters() if p.requires_grad]
        started, losses, number = time.perf_counter(), [], done * self.accelerator.gradient_accumulation_steps
        overflows = 0  # in a row: fp16's loss scaling finds its scale by them, and takes no step at one
        for step in range(done + 1, count + 1):
            whole = False
            while not whole:
                with self.accelerator.accumulate(self.learner):
                    loss, parts, told = self._micro_batch(number)
                    self._insist(loss, f"The loss of step {step}", told)
                    self.accelerator.backward(loss)
                    losses.append(parts)
                    whole = self.accelerator.sync_gradients
                    if whole:
                        norm = self.accelerator.clip_grad_norm_(trained, self.max_grad_norm)
                        overflows = 0 if torch.isfinite(norm) else overflows + 1
                        if overflows > (OVERFLOWS if self.accelerator.scaler is not None else 0):
                            self._insist(norm, f"The gradient of step {step}", told)
                    rate = self.schedule.get_last_lr()[0]
                    self.optimizer.step()
                    self.schedule.step()
                    self.optimizer.zero_grad()
                number += 1
            own, prior = self.accelerator.reduce(torch.stack(losses).mean(0), reduction="mean").tolist()
            now = time.perf_counter()
            told_norm = float(norm) if torch.isfinite(norm) else None
            yield Step(step, own, prior if self.prior else None, rate, told_norm, now - started)
            started, losses = time.perf_counter(), []

    def _micro_batch(self, number: int) -> tuple[torch.Tensor, torch.Tensor, str]:
        """The loss of one micro-batch, its two parts, and words that say which one it was."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        batch = self.batching.batch(self.crops, self.objective, number, process, processes)
        batch = batch.to(self.accelerator.device)
        predicted = self.learner(batch.noisy, batch.timesteps, batch.prompts, batch.frames)
        own = self.objective.loss(predicted, batch.target, batch.timesteps, batch.weights).mean()
        prior = own.new_zeros(())
        if self.prior:
            prior = self.prior.loss(self.learner, batch, number, process, processes)
        told = f"pictures {', '.join(batch.names)}; timesteps {batch.timesteps.tolist()}"
        told += f"; precision {self.accelerator.mixed_precision}"
        return own + self.prior_weight * prior, torch.stack([own.detach(), prior.detach()]), told

    def _insist(self, value: torch.Tensor, what: str, told: str) -> None:
        if not torch.isfinite(value).all():
            raise NotFinite(
                f"{what} is not a finite number ({told}). Lower --learning_rate, or train with --mixed_precision no."
            )


@torch.no_grad()
def held_out_loss(
    learner: torch.nn.Module, crops: Sequence[Crop], objective: Objective, device: torch.device, draws: int = 4
) -> float:
    """The loss on pictures that are not learned, each with the same `draws` noises and timesteps every time."""
    batching, losses = Batching(0, 1, ()), []
    for index, crop in enumerate(crops):
        generators = [batching.generator(index, draw) for draw in range(draws)]
        batch = made([crop] * draws, objective, generators).to(device)
        predicted = learner(batch.noisy, batch.timesteps, batch.prompts, batch.frames)
        losses.append(objective.loss(predicted, batch.target, batch.timesteps, batch.weights).mean())
    return torch.stack(losses).mean().item()
