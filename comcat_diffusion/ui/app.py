"""The page: an application that answers a browser, and a server for it. What it does is in the files beside it."""

import contextlib
import signal
import threading
import time
import webbrowser
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from comcat_diffusion import __version__, atomic
from comcat_diffusion.ui import asked as asking
from comcat_diffusion.ui import drawing, image_routes, job_routes, taking, texts, training
from comcat_diffusion.ui.asked import Asked, Studio
from comcat_diffusion.ui.config import UiConfig
from comcat_diffusion.ui.jobs import Queue
from comcat_diffusion.ui.port import address_of, refuse_taken
from comcat_diffusion.ui.visitors import Visitors
from comcat_diffusion.ui.worker import Process

STATIC = Path(__file__).with_name("static")
Work = Callable[[Path], None]


class _Fresh(StaticFiles):
    """Files that browsers ask for anew, so that a page never runs on the modules of an older version."""

    def file_response(self, *arguments: object, **more: object) -> Response:
        answer = super().file_response(*arguments, **more)
        answer.headers["cache-control"] = "no-cache"
        return answer


def build(config: UiConfig, work: Work | None = None) -> Starlette:
    """The application over a folder, which no other server may have.

    `work` does one job; by default a process of its own does. Raises OSError if the folder cannot be had.
    """
    folder = atomic.make_folder(config.output_dir, "--output_dir").resolve()
    lock = _hold(folder)
    process = Process()
    studio = Studio(config, folder, Queue(folder, work or process, process.end))

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        if work is None and studio.teaches:
            threading.Thread(target=training.warm, daemon=True).start()
        yield
        studio.queue.close()
        lock.close()

    shown = [Route("/", _index), asking.route("/api/texts", "GET", _texts), *drawing.ROUTES, *job_routes.ROUTES]
    taught = [*image_routes.ROUTES, *training.ROUTES, *taking.ROUTES]
    routes = [*shown, *(taught if studio.teaches else taking.READING), Mount("/static", _Fresh(directory=STATIC))]
    app = Starlette(routes=routes, middleware=[Middleware(Visitors, config=config)], lifespan=lifespan)
    app.state.studio = studio
    return app


def serve(config: UiConfig, on_answer: Callable[[str], None] = lambda address: None) -> None:
    """Serve the page until Ctrl-C; `on_answer` is told its address when it answers.

    Raises OSError if the port or the folder cannot be had.
    """
    with running(config) as server, _ended_by_terminate():
        address = address_of(config) + (f"/?token={config.token}" if config.token else "")
        on_answer(address)
        if config.open_browser:
            webbrowser.open(address)
        with contextlib.suppress(KeyboardInterrupt):
            while not server.should_exit:
                time.sleep(0.2)


@contextlib.contextmanager
def running(config: UiConfig, work: Work | None = None) -> Iterator[uvicorn.Server]:
    """The page, answering for as long as the block lasts."""
    refuse_taken(config)
    app = build(config, work)
    settings = {"log_level": "warning", "access_log": False, "server_header": False, "timeout_graceful_shutdown": 2}
    server = uvicorn.Server(uvicorn.Config(app, host=config.host, port=config.port, **settings))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.02)
        yield server
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def _ended_by_terminate() -> Iterator[None]:
    """Let whoever ends services end this one as Ctrl-C does, so that what runs can pause."""

    def end(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _index(request: object) -> Response:
    return Response((STATIC / "index.html").read_bytes(), media_type="text/html", headers={"cache-control": "no-cache"})


def _texts(asked: Asked) -> dict:
    """What the page says, and what it is."""
    about = {"language": asked.language, "version": __version__, "teaches": asked.studio.teaches}
    about |= {"languages": texts.LANGUAGES, "labels": texts.labels(asked.language)}
    return about | {"page": texts.page(asked.language)}


def _hold(folder: Path) -> object:
    """Keep a second server out of the folder: both would do the same jobs. Raises OSError if there is one."""
    file = (folder / ".page").open("w")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows: nothing to lock with
        pass
    except OSError as error:
        raise OSError(error.errno, f"Another page is served from {folder}: name another --output_dir.") from error
    return file
