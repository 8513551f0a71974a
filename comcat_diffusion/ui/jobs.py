"""What the page was asked to do: a folder each, whose two small files are the truth, and a queue of one at a time.

    job.json      what was asked, by whom and when; written once, but for a new title
    status.json   what became of it, written anew whenever that changes

Both are whole or not there, so that a page that was reloaded and a server that was started anew know as much as before.
"""

import json
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from comcat_diffusion import atomic

SHELVES = {
    "train": "runs",
    "draw": "pictures",
    "outline": "work",
    "cutout": "work",
    "fetch": "work",
    "export": "work",
    "push": "work",
    "caption": "work",
}
QUEUED, RUNNING, STOPPING = "queued", "running", "stopping"
DONE, STOPPED, CANCELLED, FAILED = "done", "stopped", "cancelled", "failed"
LIVE = (QUEUED, RUNNING, STOPPING)
ASKED, STATUS, LOG = "job.json", "status.json", "log.txt"
# Files by which the server asks the worker, whatever system and whether it is a process or a thread.
STOP, PAUSE, CANCEL = "stop", "pause", "cancel"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,79}")


class NotYours(PermissionError):
    """What was asked for belongs to somebody else."""


class Unknown(LookupError):
    """There is no such thing, or no more."""


@dataclass(frozen=True)
class Job:
    """One job by its folder."""

    folder: Path

    @property
    def id(self) -> str:
        """Its shelf and its name: runs/sks-dog."""
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def asked(self) -> dict:
        """Kind, title, owner, when, number and request."""
        return _read(self.folder / ASKED)

    @property
    def status(self) -> dict:
        """At least its state."""
        found = _read(self.folder / STATUS)
        return found if "state" in found else {"state": FAILED, "message": "Its status is lost."}

    def tell(self, **status: object) -> None:
        """Write the status anew, all of it."""
        atomic.write_bytes(self.folder / STATUS, json.dumps(status).encode())

    def change(self, **status: object) -> None:
        """Write what is new of the status."""
        self.tell(**self.status | status)

    def rename(self, title: str) -> None:
        """Give it another title."""
        atomic.write_bytes(self.folder / ASKED, json.dumps(self.asked | {"title": title}).encode())

    def log(self, text: str) -> None:
        """Add a line to what it said."""
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(" ".join(text.split()) + "\n")


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def safe_name(text: str, otherwise: str) -> str:
    """Words as the name of a folder and as part of an address: small letters and digits of ASCII, and dashes."""
    return "-".join(re.findall(r"[a-z0-9]+", text.lower()))[:60].strip("-") or otherwise


class Queue:
    """Jobs one after the other, in the order in which they were asked for, by one thread that `work` blocks."""

    def __init__(self, folder: Path, work: Callable[[Path], None], end: Callable[[], None] = lambda: None) -> None:
        self.folder, self.work, self.end = folder, work, end
        self._changed = threading.Condition()
        self._current: Job | None = None
        self._ended = False
        self._waiting = self._recovered()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def add(self, kind: str, title: str, owner: str, request: dict, prepare: Callable[[Path], None]) -> Job:
        """A new job at the end of the queue. `prepare` fills its folder; if it raises, nothing is left."""
        shelf = self.folder / SHELVES[kind]
        with self._changed:
            folder = _fresh(shelf, safe_name(title, kind))
            folder.mkdir(parents=True)
        try:
            prepare(folder)
            number = time.time_ns()
            asked = {"kind": kind, "title": title, "owner": owner, "number": number, "request": request}
            atomic.write_bytes(folder / ASKED, json.dumps(asked).encode())
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        self._enqueue(Job(folder), {})
        return Job(folder)

    def find(self, shelf: str, name: str) -> Job:
        """The job of this name. Raises Unknown."""
        if shelf in SHELVES.values() and _NAME.fullmatch(name) and (self.folder / shelf / name / ASKED).is_file():
            return Job(self.folder / shelf / name)
        raise Unknown("There is no such job, or no more.")

    def all(self, shelf: str) -> list[Job]:
        """The jobs of a shelf, the newest first. Raises Unknown."""
        if shelf not in SHELVES.values():
            raise Unknown("There are no such jobs.")
        found = [Job(path.parent) for path in (self.folder / shelf).glob(f"*/{ASKED}")]
        found = [(job.asked.get("number"), job) for job in found]  # a file that is none of ours has none
        return [job for number, job in sorted(found, key=lambda pair: -(pair[0] or 0)) if number is not None]

    def live(self) -> list[Job]:
        """What runs, then what waits, in its order."""
        with self._changed:
            return [*([self._current] if self._current else []), *self._waiting]

    def position(self, job: Job) -> int:
        """How many are before it: 0 of one that runs or does not wait."""
        with self._changed:
            waiting = [other.folder for other in self._waiting]
            running = self._current is not None
            return waiting.index(job.folder) + running if job.folder in waiting else 0

    def stop(self, job: Job) -> None:
        """Let a job end with what it has; it can be taken up again."""
        self._ask(job, STOP, STOPPED, STOPPING)

    def cancel(self, job: Job) -> None:
        """Let a job end at once. What it had saved before stays."""
        self._ask(job, CANCEL, CANCELLED, CANCELLED)

    def resume(self, job: Job) -> None:
        """Put a job that was stopped, cancelled or has failed at the end of the queue again."""
        with self._changed:
            if job.status["state"] not in (STOPPED, CANCELLED, FAILED):
                raise ValueError("Only what was stopped can go on.")
            self._refuse_ending(job)
        self._enqueue(job, {"resume": True})

    def remove(self, job: Job) -> None:
        """Delete a job and all that it made. Raises ValueError while it runs or waits."""
        with self._changed:
            if job.status["state"] in LIVE:
                raise ValueError("It is not finished: stop or cancel it first.")
            self._refuse_ending(job)
            shutil.rmtree(job.folder)

    def close(self, seconds: float = 30) -> None:
        """Let what runs pause, to be gone on with by the next server, and end."""
        with self._changed:
            self._ended, current = True, self._current
            if current is not None:
                (current.folder / PAUSE).touch()
            self._changed.notify_all()
        self._thread.join(seconds if current is not None and current.asked.get("kind") == "train" else 2)
        self.end()
        self._thread.join(5)

    def _refuse_ending(self, job: Job) -> None:
        """Raise ValueError for a job that was cancelled and whose worker has not heard of it yet."""
        if self._current is not None and self._current.folder == job.folder:
            raise ValueError("It is still ending: try again in a moment.")

    def _enqueue(self, job: Job, more: dict) -> None:
        with self._changed:
            for name in (STOP, PAUSE, CANCEL):
                (job.folder / name).unlink(missing_ok=True)
            job.tell(state=QUEUED, **more)
            self._waiting.append(job)
            self._changed.notify_all()

    def _ask(self, job: Job, file: str, at_once: str, state: str) -> None:
        """End a job: one that waits at once, one that runs by a file, and for a cancel by ending the worker, too."""
        with self._changed:
            if job.folder in [other.folder for other in self._waiting]:
                self._waiting = [other for other in self._waiting if other.folder != job.folder]
                job.change(state=at_once)
                return
            if self._current is None or self._current.folder != job.folder:
                raise ValueError("It is not running any more.")
            (job.folder / file).touch()
            if file == CANCEL:
                self.end()
            job.change(state=state)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if self._ended:
                    return
                self._current = job = self._waiting.pop(0)
            try:
                self.work(job.folder)
            except Exception as error:  # a fault of ours must not end the queue with it
                job.change(state=FAILED, message=" ".join(str(error).split()) or type(error).__name__)
            with self._changed:
                self._current = None
                self._settle(job)

    def _settle(self, job: Job) -> None:
        """Whatever became of a job, it is not running any more; one that paused is the next server's."""
        state = job.status["state"]
        if state in (RUNNING, STOPPING) or (state == QUEUED and not self._ended):
            job.change(state=FAILED, message="It ended without a word, as programs do that are out of memory.")

    def _recovered(self) -> list[Job]:
        """What an earlier server left waiting or running, in its order; what ran goes on from where it was saved."""
        found = []
        for shelf in sorted(set(SHELVES.values())):
            for job in self.all(shelf):
                status = job.status
                if status["state"] in (QUEUED, RUNNING):
                    was = status["state"] == RUNNING
                    (job.folder / PAUSE).unlink(missing_ok=True)
                    job.tell(state=QUEUED, resume=was or bool(status.get("resume")))
                    found.append(job)
                elif status["state"] == STOPPING:
                    job.change(state=STOPPED)
        return sorted(found, key=lambda job: job.asked.get("number", 0))


def fresh_id() -> str:
    """A name that nobody guesses."""
    return secrets.token_hex(8)


def _fresh(shelf: Path, name: str) -> Path:
    """The folder of this name, or the first of name-2, name-3, ... that is not there."""
    return next(shelf / (name if n == 1 else f"{name}-{n}") for n in _numbers() if not _there(shelf, name, n))


def _numbers() -> Iterator[int]:
    number = 0
    while True:
        number += 1
        yield number


def _there(shelf: Path, name: str, number: int) -> bool:
    return (shelf / (name if number == 1 else f"{name}-{number}")).exists()
