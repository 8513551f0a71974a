"""Drawing from the page: prompts, strengths and painted regions become `GenerateConfig`s, and then a job."""

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from starlette.routing import Route

from comcat_diffusion import atomic
from comcat_diffusion.adapters.header import read_adapter
from comcat_diffusion.config import EMBEDDED, flag_of, require_scale
from comcat_diffusion.generation.config import GenerateConfig
from comcat_diffusion.generation.infotext import sampler_name
from comcat_diffusion.ui import adapters, bases_here, settings
from comcat_diffusion.ui import asked as asking
from comcat_diffusion.ui.asked import Asked
from comcat_diffusion.ui.settings import Refused
from comcat_diffusion.ui.tasks import draw_configs

MOST_PICTURES = 64  # of one job
MOST_REGION = 4_000_000  # bytes of a region's PNG
PNG = b"\x89PNG\r\n\x1a\n"
# Samplers of diffusers that every noise-predicting base can be drawn with; a base refuses what is not for it.
SCHEDULERS = (
    "DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
    "UniPCMultistepScheduler", "HeunDiscreteScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "DDPMScheduler",
)  # fmt: skip
_ALGORITHM = {"DPMSolverMultistepScheduler": {"algorithm_type": "dpmsolver++", "solver_order": 2}}
# What is offered to people of whom nothing is known, as those who come to a Space.
TO_ALL = ("seed",)


def form(asked: Asked) -> dict:
    """Everything that the page has to know to ask for pictures."""
    groups = settings.asked_of(GenerateConfig, asked.language) if asked.studio.teaches else []
    own = (
        "negative_prompt",
        "resolution",
        "height",
        "width",
        "scheduler",
        "seed",
        "num_inference_steps",
        "guidance_scale",
    )
    shown = {one["name"]: one for group in groups for one in group["fields"] if one["name"] in own}
    left = [group | {"fields": [f for f in group["fields"] if f["name"] not in own]} for group in groups]
    return {
        "fields": shown,
        "groups": [group for group in left if group["fields"]],
        "schedulers": [{"name": sampler_name(one, _ALGORITHM.get(one, {})), "value": one} for one in SCHEDULERS],
        "known": [flag_of(item) for item in fields(GenerateConfig)],
        "steps": bases_here.steps_of(EMBEDDED) or bases_here.USUAL,  # a Space of another base is without it
    }


def draw(asked: Asked) -> dict:
    """New pictures, at the end of the queue."""
    from comcat_diffusion.generation.order import order_of

    studio = asked.studio
    chosen = [_chosen(asked, one) for one in asked.value("adapters", list, [])]
    strengths = [_strength(one, "strengths") for one in asked.value("strengths", list, [1.0])] or [1.0]
    typed = asked.value("settings", dict, {})
    if not studio.teaches and set(typed) - set(TO_ALL):
        raise Refused("These settings are not offered here.")
    request = {
        "prompt": str(asked.value("prompt", str, "")),
        "settings": settings.given(GenerateConfig, typed),
        "typed": typed,
        "adapters": [{"id": id, "file": str(path), "scale": scale, "region": bool(r)} for id, path, scale, r in chosen],
        "strengths": list(dict.fromkeys(strengths)),
        "num_images": asked.value("num_images", int, 4),
        "compare": bool(asked.value("compare", bool, True) and chosen),
        "base": None,
    }
    if asked.value("base", str, "") or not chosen:
        id = asked.value("base", str, "") or "embedded"
        request["base"] = bases_here.asked(id, studio.folder, studio.allowed).name
    _refuse_off_grain(
        request["settings"], request["base"] or (read_adapter(chosen[0][1]).base_model if chosen else None)
    )
    if not 1 <= request["num_images"] * len(request["strengths"]) <= MOST_PICTURES:
        raise Refused(f"Ask for 1 to {MOST_PICTURES} pictures at once.", "num_images")

    def prepare(folder: Path) -> None:
        for number, (_, _, _, region) in enumerate(chosen):
            if region:
                atomic.write_bytes(folder / f"region-{number}.png", region)
        for _, config in draw_configs(request, folder):  # which refuses what can be refused before anything is loaded
            order_of(config)

    title = request["prompt"][:100] or "pictures"
    return {"id": studio.queue.add("draw", title, asked.owner, request, prepare).id}


def _refuse_off_grain(found: Mapping[str, object], base: str | None) -> None:
    """Say at once what the base would, were it loaded. Raises Refused."""
    _, step = bases_here.steps_of(base) or (0, 1)
    for flag in ("height", "width"):
        if found.get(flag, step) % step:
            raise Refused(f"--{flag} {found[flag]} must be a multiple of {step} for this base.", flag)


def gallery(asked: Asked) -> list[dict]:
    """All pictures that were drawn, by what asked for them, the newest first."""
    found = []
    for job in asked.studio.queue.all("pictures"):
        request, status = job.asked["request"], job.status
        found.append(
            {
                "id": job.id,
                "title": job.asked["title"],
                "number": job.asked["number"],
                "own": job.asked["owner"] == asked.owner,
                "state": status["state"],
                "pictures": status.get("result", {}).get("pictures", []),
                "request": _public(request),
            }
        )
    return found


def _public(request: dict) -> dict:
    """What was asked for as the page asks for it: ids, and no paths of the machine."""
    shown = [{"id": one["id"], "scale": one["scale"], "region": one["region"]} for one in request["adapters"]]
    names = ("prompt", "typed", "strengths", "num_images", "compare")
    kind = request["typed"].get("scheduler")
    sampler = {"sampler": sampler_name(kind, _ALGORITHM.get(kind, {}))} if kind else {}
    return {name: request[name] for name in names} | {"adapters": shown} | sampler


def read_back(asked: Asked) -> dict:
    """The settings that a PNG says it was drawn with. Raises Refused for one that says nothing."""
    about = _about(asked.content)
    files = adapters.files_here(asked.studio.folder, asked.studio.allowed)
    by_hash = {adapters.sha256_of(path): id for id, path in files.items()}
    used, missing = [], []
    for one in about.get("adapters") or []:
        id = by_hash.get(one.get("sha256"))
        if id:
            used.append({"id": id, "scale": one.get("scale", 1.0)})
        else:
            missing.append(str(one.get("file", ""))[:200])
    names = ("seed", "num_inference_steps", "guidance_scale", "resolution", "height", "width", "scheduler")
    typed = {name: about[name] for name in names if about.get(name) is not None}
    if about.get("negative_prompt"):
        typed["negative_prompt"] = about["negative_prompt"]
    typed |= {} if "keep_background" in about or "adapters" not in about else {"keep_background": False}
    settings.given(GenerateConfig, typed)  # a picture of somebody else may say anything
    told = {"prompt": str(about.get("prompt", "")), "typed": typed, "adapters": used, "missing": missing}
    return told | {"painted": bool(about.get("regions"))}


def _about(content: bytes) -> dict:
    import io

    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as opened:
            opened.load()  # what stands behind the pixels is read with them
            text = dict(opened.text)
        about = json.loads(text["comcat"])
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise Refused("This is no PNG that can be read.") from error
    except (KeyError, ValueError, RecursionError) as error:
        raise Refused("This PNG does not say how it was made: only those that were drawn here do.") from error
    if not isinstance(about, dict) or not isinstance(about.get("adapters") or [], list):
        raise Refused("What this PNG says of how it was made makes no sense.")
    if any(not isinstance(one, dict) for one in about.get("adapters") or []):
        raise Refused("What this PNG says of how it was made makes no sense.")
    return about


def _chosen(asked: Asked, one: object) -> tuple[str, Path, float, bytes | None]:
    """(id, file, scale, the region's PNG or None) of an adapter that is asked for."""
    told = one if isinstance(one, dict) else {}
    scale, region = told.get("scale", 1.0), told.get("region")
    path = adapters.asked(told.get("id"), asked.studio.folder, asked.studio.allowed)
    return told["id"], path, _strength(scale), _region(region) if region else None


def _strength(value: object, field: str = "scale") -> float:
    if type(value) not in (int, float):
        raise Refused("The strength must be a number.", field)
    try:
        require_scale(value)
    except ValueError as error:
        raise Refused(str(error), field) from error
    return float(value)


def _region(text: object) -> bytes:
    """A painted region, from the data URI of a canvas. Raises Refused for what is none."""
    head, _, data = str(text).partition(",")
    try:
        content = base64.b64decode(data, validate=True) if head == "data:image/png;base64" else b""
    except (binascii.Error, ValueError):
        content = b""
    if not content.startswith(PNG) or len(content) > MOST_REGION:
        raise Refused("A region is a PNG picture of at most 4 MB.", "region")
    return content


ROUTES: list[Route] = [
    asking.route("/api/draw", "GET", form),
    asking.route("/api/draw", "POST", draw),
    asking.route("/api/pictures", "GET", gallery),
    asking.route("/api/pictures/read", "POST", read_back, upload="picture"),
]
