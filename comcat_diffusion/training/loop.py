"""The training loop: a generator without input or output. It yields a record after every optimizer step."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from comcat_diffusion.training.encode import Encoded
from comcat_diffusion.training.objective import Objective


class NotFinite(RuntimeError):
    """The loss or a gradient became NaN or infinite; the message names step, pictures, timesteps and precision."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step did."""

    step: int  # counted from one
    loss: float
    learning_rate: float
    gradient_norm: float
    seconds: float


@dataclass(frozen=True)
class Batching:
    """Pictures, noise and timesteps of a micro-batch: a function of its number alone, so any step can be redone."""

    seed: int
    batch_size: int

    def generator(self, *key: int) -> torch.Generator:
        """Randomness that belongs to a key, for instance (number of the micro-batch, process)."""
        state = np.random.SeedSequence((self.seed, *key)).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0] >> 1))

    def pictures(self, count: int, number: int, process: int, processes: int) -> torch.Tensor:
        """Indices (B,) of the micro-batch's pictures: every picture once per pass, in a new order each pass."""
        first = (number * processes + process) * self.batch_size
        places = range(first, first + self.batch_size)
        return torch.tensor([self._order(count, place // count)[place % count] for place in places])

    def _order(self, count: int, passed: int) -> list[int]:
        return torch.randperm(count, generator=self.generator(passed)).tolist()


@dataclass
class Loop:
    """Everything a step needs. `data` and `batching` say what is learned, `objective` how it is judged."""

    unet: torch.nn.Module
    data: Encoded
    objective: Objective
    batching: Batching
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    accelerator: Accelerator
    max_grad_norm: float = 1.0

    def steps(self, count: int) -> Iterator[Step]:
        """Train what requires gradients, yielding after each of `count` optimizer steps.

        Raises NotFinite, before the weights are touched, at the first loss or gradient that is no number.
        """
        trained = [p for p in self.unet.parameters() if p.requires_grad]
        started, losses, number = time.perf_counter(), [], 0
        for step in range(1, count + 1):
            whole = False
            while not whole:
                with self.accelerator.accumulate(self.unet):
                    loss, told = self._micro_batch(number)
                    self._insist(loss, f"The loss of step {step}", told)
                    self.accelerator.backward(loss)
                    losses.append(loss.detach())
                    whole = self.accelerator.sync_gradients
                    if whole:
                        norm = self.accelerator.clip_grad_norm_(trained, self.max_grad_norm)
                        self._insist(norm, f"The gradient of step {step}", told)
                    self.optimizer.step()
                    self.schedule.step()
                    self.optimizer.zero_grad()
                number += 1
            mean = self.accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item()
            now = time.perf_counter()
            yield Step(step, mean, self.schedule.get_last_lr()[0], float(norm), now - started)
            started, losses = time.perf_counter(), []

    def _micro_batch(self, number: int) -> tuple[torch.Tensor, str]:
        """The loss of one micro-batch, and words that say which one it was."""
        device, process = self.accelerator.device, self.accelerator.process_index
        chosen = self.batching.pictures(len(self.data), number, process, self.accelerator.num_processes)  # B
        generator = self.batching.generator(number, process)
        clean = self.data.latents(chosen, generator)  # B, C, h, w
        noise, timesteps = self.objective.draw(clean, generator)
        clean, noise, timesteps = clean.to(device), noise.to(device), timesteps.to(device)
        noisy = self.objective.scheduler.add_noise(clean, noise, timesteps)
        predicted = self.unet(noisy, timesteps, self.data.context[chosen].to(device), return_dict=False)[0]
        target = self.objective.target(clean, noise, timesteps)
        names = ", ".join(self.data.names[index] for index in chosen.tolist())
        told = f"pictures {names}; timesteps {timesteps.tolist()}; precision {self.accelerator.mixed_precision}"
        return self.objective.loss(predicted, target, timesteps).mean(), told

    def _insist(self, value: torch.Tensor, what: str, told: str) -> None:
        if not torch.isfinite(value).all():
            raise NotFinite(
                f"{what} is not a finite number ({told}). Lower --learning_rate, or train with --mixed_precision no."
            )
