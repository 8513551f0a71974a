"""What a job that runs tells of itself: which phase it is in, how far it is and how long it will take.

The whole of a training is what is known of its parts: a step takes what steps took so far, a round of samples what
rounds took, the proof at the end what loading the base took. So no bar stands at its end while the file is saved.
"""

import os
import time
import typing
from collections.abc import Callable

from comcat_diffusion.ui import jobs
from comcat_diffusion.ui.jobs import Job

if typing.TYPE_CHECKING:
    from comcat_diffusion.training.loop import Step

PAUSE_SECONDS = 0.4  # between two writings of the status
COUNTED = ("training", "drawing", "fetching")  # the phases whose steps are counted
LAST = ("saving", "proving")


class Paused(KeyboardInterrupt):
    """The server ends; the next one goes on."""


class Cancelled(Exception):
    """Its owner wants nothing of it: what was learned since it was last saved goes."""


class Progress:
    """Watches a job's work and writes its status; where it was asked to end, it interrupts the work.

    `rounds` are the rounds of samples that a training is to draw; it is proved as well. None: it is something else.
    """

    def __init__(self, job: Job, rounds: int | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.job, self.rounds, self.clock, self.parent = job, rounds, clock, os.getppid()
        self.begun = self.since = clock()
        self.name, self.over = "loading", {}  # the phase, and by name the seconds of all that are over
        self.before = self.done = self.total = 0  # steps, or bytes: of an earlier run, so far, in all
        self.interrupted = self.paused = False
        self.peak_bytes, self._written = 0, float("-inf")
        self._write()

    def phase(self, name: str) -> None:
        """Another part of the work begins."""
        self.over.setdefault(self.name, []).append(self.clock() - self.since)
        self.name, self.since = name, self.clock()
        self._write()
        self._listen()

    def note(self, text: str) -> None:
        """Something worth knowing."""
        self.job.log(text)
        self._listen()

    def step(self, done: "Step", total: int, peak_bytes: int) -> None:
        """A step of a training is done."""
        self.count(done.step, total, peak_bytes)

    def count(self, done: int, total: int, peak_bytes: int = 0) -> None:
        """So many of so many are done."""
        if not self.total:  # of a download, what is there when it is first told of may be of an earlier one
            self.before = done - (self.name != "fetching")
        self.done, self.total, self.peak_bytes = done, total, max(peak_bytes, self.peak_bytes)
        if self.clock() - self._written >= PAUSE_SECONDS or done == total:
            self._write()
        self._listen()

    @property
    def seconds_left(self) -> float | None:
        """How long it will take; None as long as nothing is known."""
        if not self.total or self.done <= self.before:
            return None
        each = sum(self._spent(name) for name in COUNTED) / (self.done - self.before)
        left = each * (self.total - self.done)
        if self.rounds is not None:
            drawn = self.over.get("sampling", [])
            left += max(self.rounds - len(drawn), 0) * sum(drawn) / max(len(drawn), 1)
            left += sum(self.over.get("loading", []))
        now = 0.0 if self.name in COUNTED else self.clock() - self.since  # of what is ahead, this is over
        return max(left - now, 0.0)

    def _spent(self, name: str) -> float:
        return sum(self.over.get(name, [])) + (self.clock() - self.since if name == self.name else 0.0)

    def _listen(self) -> None:
        """Interrupt the work, once, if its owner stopped it, or if the server has ended or is about to.

        What is only to be saved and proved yet is let alone.
        """
        folder = self.job.folder
        if (folder / jobs.CANCEL).exists():
            raise Cancelled
        if self.interrupted or self.name in LAST or (self.total and self.done == self.total):
            return
        self.paused = (folder / jobs.PAUSE).exists() or os.getppid() != self.parent
        self.interrupted = self.paused or (folder / jobs.STOP).exists()
        if self.interrupted:
            raise Paused if self.paused else KeyboardInterrupt

    def _write(self) -> None:
        if (self.job.folder / jobs.CANCEL).exists():
            return  # its state is said already
        self._written, left = self.clock(), self.seconds_left
        passed = self._written - self.begun
        self.job.tell(
            state=jobs.STOPPING if (self.job.folder / jobs.STOP).exists() else jobs.RUNNING,
            phase=self.name,
            done=self.done,
            total=self.total,
            seconds=passed,
            seconds_left=left,
            share=None if left is None else passed / max(passed + left, 1e-9),
            peak_bytes=self.peak_bytes,
        )
