"""Adapters on the page: their cards, and taking them away as files, for other programs, and to the hub."""

from pathlib import Path

from starlette.responses import Response
from starlette.routing import Route

from comcat_diffusion.adapters.header import read_adapter
from comcat_diffusion.export import fit
from comcat_diffusion.export.clients import CLIENTS
from comcat_diffusion.ui import adapters, texts
from comcat_diffusion.ui import asked as asking
from comcat_diffusion.ui.asked import Asked
from comcat_diffusion.ui.jobs import NotYours
from comcat_diffusion.ui.settings import Refused, refused

# The programs that read the file as it is, see README's table, by the key of what the page says of them.
AS_IT_IS = ("here", "comfyui-node", "forge-extension")


def cards(asked: Asked) -> list[dict]:
    """All adapters."""
    return adapters.cards(asked.studio.folder, asked.studio.allowed)


def add(asked: Asked) -> dict:
    """An adapter that somebody brings."""
    return {"id": adapters.add(asked.studio.folder, asked.query.get("name", ""), asked.content)}


def picture(asked: Asked) -> Response:
    """Its thumbnail."""
    content, kind = adapters.thumbnail(_path(asked))
    return Response(content, media_type=kind, headers={"cache-control": "private, no-cache"})


def download(asked: Asked) -> Response:
    """Its file."""
    path = _path(asked)
    return asking.file(path, path.name)


def programs(asked: Asked) -> dict:
    """Where an adapter can go: as it is, exactly as a LoRA, or as the closest one."""
    path = _path(asked)
    header = read_adapter(path)
    exact = fit.is_exact(header)
    try:
        if not exact:
            fit.refuse_exact(header, path)
        able, why = True, ""
    except ValueError as error:
        able, why = False, refused(ValueError(str(error).replace(str(path), path.name)), asked.language).message
    every = texts.page(asked.language)["every_program"]
    loras = [{"client": key, "name": every if key == "all" else one.name} for key, one in CLIENTS.items()]
    return {"as_it_is": AS_IT_IS, "loras": loras, "exact": exact, "able": able, "why": why,
            "push": asked.studio.config.is_local}  # fmt: skip


def export(asked: Asked) -> dict:
    """It as a LoRA, as a job."""
    path, client = _path(asked), asked.value("client", str, "all")
    if client not in CLIENTS:
        raise Refused("There is no such program.", "client")
    approximate = not fit.is_exact(read_adapter(path))
    request = {"file": str(path), "client": client, "approximate": approximate}
    return {"id": asked.studio.queue.add("export", path.stem, asked.owner, request, lambda folder: None).id}


def push(asked: Asked) -> dict:
    """It on the hub, by whoever is logged in on this machine, and so from this machine alone; as a job."""
    from huggingface_hub.errors import HFValidationError

    from comcat_diffusion.export.shareable import refuse_unshareable

    if not asked.studio.config.is_local:
        raise NotYours("Sharing uses the account of this machine, and so is offered on it alone.")
    path, repo = _path(asked), asked.value("repo_id", str, "")
    told = "A name on the hub reads owner/name, with letters, digits, dashes and dots."
    if repo.count("/") != 1:
        raise Refused(told, "repo_id")
    sheet = next(iter(sorted(path.parent.glob("samples/step-??????.png"), reverse=True)), None)
    try:
        refuse_unshareable(repo, path, sheet)
    except ValueError as error:
        raise Refused(told if isinstance(error, HFValidationError) else str(error), "repo_id") from error
    request = {"file": str(path), "repo_id": repo, "private": asked.value("private", bool, True),
               "sheet": str(sheet) if sheet else ""}  # fmt: skip
    return {"id": asked.studio.queue.add("push", repo, asked.owner, request, lambda folder: None).id}


def _path(asked: Asked) -> Path:
    return adapters.asked(f"{asked.params['shelf']}/{asked.params['name']}", asked.studio.folder, asked.studio.allowed)


ONE = "/api/adapters/{shelf}/{name}"
READING: list[Route] = [
    asking.route("/api/adapters", "GET", cards),
    asking.route(f"{ONE}/picture", "GET", picture),
]
ROUTES: list[Route] = [
    *READING,
    asking.route("/api/adapters", "PUT", add, upload="adapter"),
    asking.route(f"{ONE}/file", "GET", download),
    asking.route(f"{ONE}/programs", "GET", programs),
    asking.route(f"{ONE}/export", "POST", export),
    asking.route(f"{ONE}/push", "POST", push),
]
