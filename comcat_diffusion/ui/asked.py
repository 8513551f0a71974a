"""A request as the page's functions take it, and their answers as a browser gets them: JSON, files, or one sentence."""

import functools
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from comcat_diffusion.ui import sentences, texts, uploads
from comcat_diffusion.ui.config import UiConfig
from comcat_diffusion.ui.images import ImageSet
from comcat_diffusion.ui.jobs import Job, NotYours, Queue, Unknown
from comcat_diffusion.ui.settings import Refused, refused


@dataclass(frozen=True)
class Studio:
    """What all requests share: the settings of the page, its folder and its queue."""

    config: UiConfig
    folder: Path
    queue: Queue

    @property
    def teaches(self) -> bool:
        """Whether it does more than drawing."""
        return not self.config.draw_only

    @property
    def allowed(self) -> list[Path]:
        """The folders and files of the machine that may be named beside the page's own."""
        return [Path(path).expanduser().resolve() for path in self.config.allow_paths]


@dataclass(frozen=True)
class Asked:
    """One request: who asks for what."""

    studio: Studio
    owner: str
    language: str
    params: dict
    query: dict
    content: object = None  # bytes of an upload, or what stood in the JSON

    def bare(self, text: str, folder: Path | None = None) -> str:
        """A sentence without the machine's paths to a folder and to the page's own."""
        for known in filter(None, (folder, self.studio.folder)):
            text = text.replace(f"{known}/", "").replace(str(known), known.name)
        return text

    def images(self) -> ImageSet:
        """The set of images that is named. Raises Unknown for one that is not there, or is somebody else's."""
        return self.own_images(self.params["set"])

    def own_images(self, name: object) -> ImageSet:
        """The set of this name. Raises Unknown as `images` does."""
        folder = self.studio.folder / "images" / str(name)
        if not str(name).isalnum() or not (folder / "set.json").is_file() or ImageSet(folder).owner != self.owner:
            raise Unknown("There are no such images, or no more.")
        return ImageSet(folder)

    def job(self, own: bool = False) -> Job:
        """The job that is named. Raises Unknown, or NotYours if it is to be the visitor's own and is not."""
        job = self.studio.queue.find(self.params["shelf"], self.params["name"])
        if own and job.asked["owner"] != self.owner:
            raise NotYours("Somebody else started this; only they can change it.")
        return job

    def value(self, name: str, kind: type, default: object = None) -> object:
        """What stood under a name in the JSON. Raises Refused for another type."""
        value = self.content.get(name, default) if isinstance(self.content, dict) else default
        if value is default or type(value) is kind or (kind is float and type(value) is int):
            return value
        told = f"--{name} must be a whole number." if kind is int else f"{name} is not what it should be."
        raise Refused(told, name)


Function = Callable[[Asked], object]


def route(path: str, method: str, function: Function, upload: str = "") -> Route:
    """A route whose function is called in a thread, with the JSON or the upload that a request brings."""

    async def answer(request: Request) -> Response:
        told = functools.partial(said, request)
        language = request.query_params.get("lang") or request.cookies.get("studio_language") or ""
        if language not in texts.LANGUAGES:
            language = texts.asked_language(request.headers.get("accept-language", ""))
        try:
            content = await _content(request, method, upload)
            asked = Asked(
                request.app.state.studio,
                request.scope["owner"],
                language,
                dict(request.path_params),
                dict(request.query_params),
                content,
            )
            found = await run_in_threadpool(function, asked)
        except NotYours as error:
            return told(403, sentences.said(str(error), language))
        except Unknown as error:
            return told(404, sentences.said(str(error.args[0]), language))
        except uploads.TooLarge as error:
            return told(413, sentences.said(str(error), language))
        except (ValueError, OSError, ImportError) as error:
            one = refused(error, language)
            folder = request.app.state.studio.folder
            return told(422, one.message.replace(f"{folder}/", "").replace(str(folder), folder.name), one.field)
        return found if isinstance(found, Response) else JSONResponse(found)

    return Route(path, answer, methods=[method])


def said(request: Request, status: int, message: str, field: str | None = None) -> Response:
    """A sentence as an answer, and the field that it is about.

    To the page's own script the status is told beside an answer that is none of an error: browsers write every such one
    into their console, whoever shows it.
    """
    aside = request.headers.get("x-studio") == "page"
    headers = {"x-status": str(status)} if aside else {}
    return JSONResponse({"message": message, "field": field}, 200 if aside else status, headers)


def file(path: Path, name: str = "") -> Response:
    """A file as it is, to be shown, or, under a name, to be kept. Raises Unknown."""
    if not path.is_file():
        raise Unknown("There is no such file, or no more.")
    return FileResponse(path, filename=name or None, headers={"cache-control": "private, no-cache"})


async def _content(request: Request, method: str, upload: str) -> Awaitable[object]:
    if method in ("GET", "DELETE"):
        return None
    if upload:
        return await uploads.body(request, upload)
    try:
        return json.loads(await uploads.body(request, "json"), parse_constant=_no_number)
    except (json.JSONDecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Refused("This is no JSON.") from error


def _no_number(text: str) -> float:
    raise Refused(f"{text} is no number.")
