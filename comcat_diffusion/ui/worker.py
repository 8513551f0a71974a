"""The process that does the page's work, one job at a time, so that pages answer meanwhile and outlive a crash.

The server writes a job's folder as a line, and reads one back when it is done with; what became of it stands in the
job's status. A worker whose server has ended pauses what it does and ends, too.
"""

import contextlib
import os
import subprocess
import sys
import threading
from pathlib import Path

from comcat_diffusion.ui import jobs
from comcat_diffusion.ui.jobs import Job
from comcat_diffusion.ui.progress import Cancelled, Paused

LOCK = ".worker"


def run(folder: Path) -> None:
    """Do a job; its status says how it ended."""
    from comcat_diffusion.training.loop import NotFinite
    from comcat_diffusion.ui.loaded import LOADED
    from comcat_diffusion.ui.tasks import TASKS

    job, whole = Job(folder), False
    if job.asked["kind"] != "draw":
        LOADED.forget()
    try:
        with _alone(folder):
            result = TASKS[job.asked["kind"]](job)
        ended = jobs.STOPPED if result.pop("stopped", False) else jobs.DONE
        job.change(state=ended, result=result, seconds_left=None, share=None)
        whole = True
    except Paused:
        job.tell(state=jobs.QUEUED, resume=True)
    except (KeyboardInterrupt, Cancelled):
        job.tell(state=jobs.CANCELLED)
    except (ValueError, OSError, ImportError, NotFinite) as error:  # refused: these have a sentence
        job.tell(state=jobs.FAILED, message=" ".join(str(error).split()))
    except RuntimeError as error:  # torch's, of a device that is out of memory above all
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        job.tell(state=jobs.FAILED, message=f"It ended with an error: {first}")
    finally:
        if not whole:
            LOADED.forget()


class Process:
    """A worker in a process of its own, started when it is first needed and anew after it was ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def __call__(self, folder: Path) -> None:
        """Have a job done; returns when it is, or when the process has ended over it."""
        process = self._started()
        with contextlib.suppress(OSError):
            process.stdin.write(f"{folder}\n".encode())
            process.stdin.flush()
            process.stdout.readline()

    def end(self) -> None:
        """End the process, whatever it does."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.wait()
                self._process = None

    def _started(self) -> subprocess.Popen:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "comcat_diffusion.ui.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C is the server's, who lets the work pause
                )
            return self._process


@contextlib.contextmanager
def _alone(folder: Path) -> contextlib.AbstractContextManager:
    """Wait until no worker of an earlier server is at this job any more."""
    try:
        import fcntl
    except ImportError:  # Windows: nothing to lock with
        yield
        return
    with (folder / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Do what is read from standard input until it ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    from comcat_diffusion.commands import quiet

    quiet()
    for line in sys.stdin:
        run(Path(line.rstrip("\n")))
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main()
