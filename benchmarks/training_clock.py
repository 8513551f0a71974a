"""The clock of one training run: what it took, by phase and by part of a step, while others take turns with it."""

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

import torch

from benchmarks import circumstances as shared
from comcat_diffusion.timing import wait

LOOK, LOAD, ENCODE, ATTACH = "look at pictures", "load base", "encode pictures and prompt", "adapter and optimizer"
SAVE, PROVE = "save", "prove the file"
PHASES = (LOOK, LOAD, ENCODE, ATTACH, SAVE, PROVE)
STEP_PARTS = BATCH, VAE, TEXT, FORWARD, BACKWARD = "make the batch", "VAE", "text encoder", "U-Net forward", "backward"


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
