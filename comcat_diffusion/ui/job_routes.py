"""Jobs on the page: how far they are, what they made, and what their owner may do with them."""

import json
import re
from pathlib import Path

from starlette.routing import Route

from comcat_diffusion.config import to_toml
from comcat_diffusion.places import public_name
from comcat_diffusion.ui import asked as asking
from comcat_diffusion.ui import jobs
from comcat_diffusion.ui.asked import Asked
from comcat_diffusion.ui.jobs import Job
from comcat_diffusion.ui.settings import Refused, refused
from comcat_diffusion.ui.tasks import train_config

LAST_LINES = 200  # of the log that the page shows
# What of a job's folder can be had, by name: nothing else, wherever a name would lead.
_FILES = re.compile(
    r"(samples|base|strength-[0-9.e+-]{1,12})/[\w.() -]{1,160}\.png|[\w.() -]{1,160}\.(safetensors|toml|jsonl|json|png)"
)
_SAMPLE = re.compile(r"step-(\d+)-(\d+)-(\d+)\.png")


def listed(asked: Asked) -> list[dict]:
    """All jobs of a shelf, the newest first."""
    return [told(asked, job) for job in asked.studio.queue.all(asked.params["shelf"])]


def waiting(asked: Asked) -> list[dict]:
    """What runs or waits, whosever it is, in its order."""
    return [told(asked, job) for job in asked.studio.queue.live()]


def told(asked: Asked, job: Job) -> dict:
    """A job as the page lists it."""
    about, status = job.asked, job.status
    own = about.get("owner") == asked.owner
    found = {"id": job.id, "kind": about["kind"], "title": about["title"], "number": about["number"], "own": own}
    if "message" in status:
        status |= vars(refused(ValueError(asked.bare(status["message"], job.folder)), asked.language))
    found |= {name: value for name, value in status.items() if name != "resume"}
    if "said" in found.get("result", {}):
        lines = [refused(ValueError(line), asked.language).message for line in found["result"]["said"]]
        found["result"] = found["result"] | {"said": [line for line in lines if not line.startswith("Wrote ")]}
    found["position"] = asked.studio.queue.position(job) if status["state"] == jobs.QUEUED else 0
    if about["kind"] == "train":
        drawn = [one for one in samples(job.folder / "samples") if one["prompt"] == 0]
        found["thumb"] = drawn[-1]["file"] if drawn else ""
        found["can_go_on"] = status["state"] in (jobs.STOPPED, jobs.CANCELLED, jobs.FAILED)
        found["adapters"] = sorted(path.name for path in job.folder.glob("*.safetensors"))
    return found


def show(asked: Asked) -> dict:
    """A job with all that its own page shows; of its losses those from a step on."""
    job = asked.job()
    found = told(asked, job)
    log = job.folder / jobs.LOG
    lines = log.read_text("utf-8", "replace").splitlines()[-LAST_LINES:] if log.is_file() else []
    found["log"] = [refused(ValueError(asked.bare(line, job.folder)), asked.language).message for line in lines]
    if found["kind"] == "train":
        request = job.asked["request"]
        found["losses"] = losses(job.folder / "metrics.jsonl", _number(asked.query.get("from", "0")))
        found["samples"] = samples(job.folder / "samples")
        found["sheet"] = next(iter(sorted(_sheets(job.folder), reverse=True)), "")
        found["request"] = {name: request[name] for name in ("aims", "typed", "images", "base", "word", "what")}
        found["prompt"] = (request["settings"].get("validation_prompt") or [request["settings"]["instance_prompt"]])[0]
        base = request["settings"].get("pretrained_model_name_or_path") or ""
        told_settings = to_toml(train_config(request, Path("out")))
        found["settings"] = (
            told_settings.replace(base, public_name(base)) if Path(base).is_absolute() else told_settings
        )
    return found


def losses(path: Path, first: int) -> list[dict]:
    """The lines of a run's metrics from a step on, whose held-out loss comes in a line of its own, a while later.

    One that is being written is none yet.
    """
    lines = path.read_text("utf-8").rpartition("\n")[0].splitlines() if path.is_file() else []
    records = [json.loads(line) for line in lines]
    kept = ("step", "loss", "held_out_loss", "learning_rate")
    return [{name: one[name] for name in kept if name in one} for one in records if one["step"] >= first]


def samples(folder: Path) -> list[dict]:
    """The samples of a run: step, prompt and seed of each, in order."""
    found = [_SAMPLE.fullmatch(path.name) for path in folder.glob("step-*.png")] if folder.is_dir() else []
    told = [{"file": f"samples/{one[0]}"} | _numbers(one) for one in found if one]
    return sorted(told, key=lambda one: (one["step"], one["prompt"], one["seed"]))


def _sheets(folder: Path) -> list[str]:
    """The contact sheets of a run, one for each round of samples."""
    return [f"samples/{path.name}" for path in folder.glob("samples/step-??????.png")]


def stop(asked: Asked) -> dict:
    """End it, and keep what there is."""
    asked.studio.queue.stop(asked.job(own=True))
    return {}


def cancel(asked: Asked) -> dict:
    """End it at once."""
    asked.studio.queue.cancel(asked.job(own=True))
    return {}


def resume(asked: Asked) -> dict:
    """Go on with what was stopped."""
    asked.studio.queue.resume(asked.job(own=True))
    return {}


def rename(asked: Asked) -> dict:
    """Give it another title."""
    title = " ".join(str(asked.value("title", str, "")).split())[:100]
    if not title:
        raise Refused("Write a name.", "title")
    asked.job(own=True).rename(title)
    return {}


def remove(asked: Asked) -> dict:
    """Delete it with all that it made."""
    asked.studio.queue.remove(asked.job(own=True))
    return {}


def file(asked: Asked) -> object:
    """One of the files that it made."""
    job, name = asked.job(), asked.params["file"]
    if not _FILES.fullmatch(name) or ".." in name.split("/") or name in (jobs.ASKED, jobs.STATUS):
        raise jobs.Unknown("There is no such file, or no more.")
    return asking.file(job.folder / name, Path(name).name if "keep" in asked.query else "")


def _numbers(found: re.Match) -> dict:
    return {"step": int(found[1]), "prompt": int(found[2]), "seed": int(found[3])}


def _number(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) < 12 else 0


JOB = "/api/jobs/{shelf}/{name}"
ROUTES: list[Route] = [
    asking.route("/api/queue", "GET", waiting),
    asking.route("/api/jobs/{shelf}", "GET", listed),
    asking.route(JOB, "GET", show),
    asking.route(JOB, "PATCH", rename),
    asking.route(JOB, "DELETE", remove),
    asking.route(f"{JOB}/stop", "POST", stop),
    asking.route(f"{JOB}/cancel", "POST", cancel),
    asking.route(f"{JOB}/resume", "POST", resume),
    asking.route(f"{JOB}/files/{{file:path}}", "GET", file),
]
