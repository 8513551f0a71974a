"""The page: one tab teaches a subject, one draws with what was taught; each hands its form to the command's story."""

import shutil
import threading
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import gradio as gr

from comcat_diffusion import atomic
from comcat_diffusion.generation.config import GenerateConfig
from comcat_diffusion.generation.generate import generate
from comcat_diffusion.generation.pictures import slug
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.customize import customize
from comcat_diffusion.training.loop import NotFinite, Step
from comcat_diffusion.ui.config import UiConfig
from comcat_diffusion.ui.forms import Form, form
from comcat_diffusion.ui.port import address_of, refuse_taken

# What the page asks for in its own way or decides itself: every run has a new folder.
_OWN_OF_TRAIN = ("instance_data_dir", "output_dir", "name", "overwrite", "resume_from_checkpoint")
_OWN_OF_GENERATE = ("output_dir", "adapter")
_OFFERED_TO_ALL = ("prompt", "num_images", "seed", "scale", "compare")
_ONE_AT_A_TIME = {"concurrency_id": "model", "concurrency_limit": 1}  # two models may not fit
_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none from the network


def serve(
    config: UiConfig, background: bool = False, on_answer: Callable[[str], None] = lambda address: None
) -> gr.Blocks:
    """Serve the page until Ctrl-C, or in the background; `on_answer` is told its address when it answers.

    Raises OSError if the port or the folder cannot be had.
    """
    refuse_taken(config)
    atomic.make_folder(config.output_dir, "--output_dir")
    page = build(Path(config.output_dir))
    page.launch(
        server_name=config.host,
        server_port=config.port,
        inbrowser=config.open_browser,
        prevent_thread_lock=True,
        allowed_paths=[config.output_dir],
        theme=gr.themes.Default(**_FONTS),
        share=False,
        ssr_mode=False,
        footer_links=[],
        quiet=True,
    )
    on_answer(address_of(config))
    if not background:
        page.block_thread()
    return page


def build(folder: Path, teaches: bool = True) -> gr.Blocks:
    """The page over the adapters of a folder; in drawing mode it does not teach."""
    if not teaches:
        with gr.Blocks(title="COMCAT", analytics_enabled=False) as page:
            gr.Markdown("# COMCAT\nDraw what Stable Diffusion was taught.")
            _drawing(folder, _OFFERED_TO_ALL)
        return page
    with gr.Blocks(title="COMCAT", analytics_enabled=False) as page:
        gr.Markdown("# COMCAT\nTeach Stable Diffusion a subject from a few pictures, and draw it.")
        with gr.Tab("Teach"):
            taught = _teaching(folder)
        with gr.Tab("Draw"):
            adapters = _drawing(folder)
        offered = lambda: gr.Dropdown(choices=_adapters(folder))  # noqa: E731
        gr.on([page.load, taught.change], offered, outputs=adapters, api_name="adapters")
    return page


def _teaching(folder: Path) -> gr.File:
    stop = threading.Event()
    with gr.Row():
        with gr.Column():
            files = gr.File(
                label="Pictures of the subject, with .txt captions if wanted. None: the sample subject.",
                file_count="multiple",
            )
            asked = form(
                TrainConfig,
                ("instance_prompt", "max_train_steps", "pretrained_model_name_or_path"),
                _OWN_OF_TRAIN,
            )
        with gr.Column():
            with gr.Row():
                start, halt = gr.Button("Teach", variant="primary"), gr.Button("Stop and keep")
            said = gr.Textbox(label="What happened", lines=8)
            taught = gr.File(label="The adapter", interactive=False)
            samples = gr.Image(label="Samples", type="filepath", interactive=False)

    def run(pictures: list[str] | None, *values: object, progress: gr.Progress = gr.Progress()) -> tuple:  # noqa: B008
        stop.clear()
        return _told(teach, folder, asked, pictures, values, _Progress(progress, stop))

    start.click(run, [files, *asked.components.values()], [said, taught, samples], api_name="teach", **_ONE_AT_A_TIME)
    halt.click(stop.set, queue=False, api_name="stop")
    return taught


def _drawing(folder: Path, only: tuple[str, ...] = ()) -> gr.Dropdown:
    """The form that draws: of every setting, or, for people of whom nothing is known, of those alone that are named."""
    without = tuple(item.name for item in fields(GenerateConfig) if item.name not in only) if only else _OWN_OF_GENERATE
    with gr.Row():
        with gr.Column():
            adapters = gr.Dropdown(
                _adapters(folder),
                value=_adapters(folder)[:1] if only else None,
                multiselect=True,
                allow_custom_value=not only,
                label="adapter",
                info="One or several, also other files; a scale may stand behind a colon: dog.safetensors:0.8.",
            )
            asked = form(GenerateConfig, _OFFERED_TO_ALL, without)
        with gr.Column():
            start = gr.Button("Draw", variant="primary")
            gallery = gr.Gallery(label="Pictures", format="png", columns=4)
            sheet = gr.Image(label="All on one sheet", type="filepath", interactive=False)

    def run(adapter: list[str], *values: object, progress: gr.Progress = gr.Progress()) -> tuple:  # noqa: B008
        return _told(draw, folder, asked, adapter, values, lambda done, total: progress((done, total), unit="pictures"))

    start.click(run, [adapters, *asked.components.values()], [gallery, sheet], api_name="draw", **_ONE_AT_A_TIME)
    return adapters


def teach(folder: Path, asked: Form, pictures: list[str] | None, values: tuple, watcher: "_Progress") -> tuple:
    """Train as the form says; returns (what happened, the adapter's file, the sheet of samples or None)."""
    given = asked.given(values)
    run = _fresh(folder / slug(given.get("instance_prompt") or "sample subject"))
    own = str(run / "pictures") if pictures else None
    config = TrainConfig(**given, instance_data_dir=own, output_dir=str(run))
    names = [Path(picture).name for picture in pictures or []]
    if len(set(names)) < len(names):
        raise ValueError("Two of the files have the same name: rename one of them.")
    try:
        for picture in pictures or []:
            shutil.copy(picture, atomic.make_folder(own, "--instance_data_dir"))
        outcome = customize(config, watcher)
    except ValueError:  # refused: the copies are nobody's
        shutil.rmtree(run, ignore_errors=True)
        raise
    return "\n".join([*watcher.notes, outcome.told]), str(outcome.adapter), outcome.samples and str(outcome.samples)


def draw(folder: Path, asked: Form, adapter: list[str], values: tuple, on_picture: Callable) -> tuple:
    """Draw as the form says; returns (the pictures, the sheet)."""
    given = asked.given(values)
    here = _fresh(folder / "pictures" / slug(" ".join(given.get("prompt", []))))
    made = generate(GenerateConfig(**given, adapter=adapter or [], output_dir=str(here)), on_picture)
    return [str(file) for file in made.files], str(made.sheet)


def _fresh(folder: Path) -> Path:
    """The folder, or the first of folder-2, folder-3, ... that is not there."""
    number, found = 1, folder
    while found.exists():
        number += 1
        found = folder.with_name(f"{folder.name}-{number}")
    return found


def _adapters(folder: Path) -> list[str]:
    """The adapters of earlier runs, and those put into the folder, the newest first."""
    found = [*folder.glob("*/*.safetensors"), *folder.glob("*.safetensors")]
    return [str(path) for path in sorted(found, key=lambda p: -p.stat().st_mtime)]


def _told(story: Callable, *arguments: object) -> tuple:
    """What a story returns; what it refuses becomes the page's message."""
    try:
        return story(*arguments)
    except (ValueError, OSError, NotFinite) as error:
        raise gr.Error(" ".join(str(error).split()), duration=None, print_exception=False) from error


class _Progress:
    """Watches a training run: notes are kept, steps move the bar, and the button stops it."""

    def __init__(self, progress: gr.Progress, stop: threading.Event) -> None:
        self.notes: list[str] = []
        self.progress, self.stop = progress, stop

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, done: Step, total: int, peak_bytes: int) -> None:
        told = f"loss {done.loss:.4f}, {done.seconds:.2f} s a step, {peak_bytes / 2**30:.1f} GiB"
        self.progress((done.step, total), desc=told)
        if self.stop.is_set():
            raise KeyboardInterrupt
