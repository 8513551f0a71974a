"""The evaluation story: adapters, prompts and held-out pictures in; a report, a sheet and a plot out."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from comcat_diffusion import atomic, bases
from comcat_diffusion.adapters.merge import unload_adapters
from comcat_diffusion.adapters.store import library_versions, present_base
from comcat_diffusion.config import EMBEDDED
from comcat_diffusion.evaluation import report as reports
from comcat_diffusion.evaluation import world
from comcat_diffusion.evaluation.config import NONE, EvaluateConfig
from comcat_diffusion.evaluation.cutout import Outline, by_attention
from comcat_diffusion.evaluation.features import Features, load_features
from comcat_diffusion.evaluation.gallery import Gallery, Row, draw_tasks, rows_of, with_adapter
from comcat_diffusion.evaluation.measure import Measures, Shown
from comcat_diffusion.evaluation.metrics import interval
from comcat_diffusion.evaluation.order import Order, order_of
from comcat_diffusion.evaluation.prompts import Prompts
from comcat_diffusion.evaluation.report import Judged, Report
from comcat_diffusion.generation import sheet
from comcat_diffusion.generation.chosen import Chosen, files_of
from comcat_diffusion.generation.pictures import made_by, sampling_of, save_png, use_sampler

CLIP, DINO = "openai/clip-vit-base-patch32", "facebook/dinov2-small"
SHEET_SEEDS = 2  # columns of a prompt on the sheet
Note = Callable[[str], None]
OnPicture = Callable[[int, int], None]


def evaluate(
    config: EvaluateConfig, note: Note = lambda text: None, on_picture: OnPicture = lambda done, total: None
) -> Report | None:
    """Judge adapters side by side; returns the report, or None on a process that only helped to draw.

    Raises ValueError or OSError for bad input before anything is drawn.
    """
    return judged(order_of(config), note, on_picture)


def judged(order: Order, note: Note, on_picture: OnPicture) -> Report | None:
    """What is ordered, drawn and measured; see `evaluate`."""
    accelerator = Accelerator()  # owns the device and the processes, of which one speaks
    if not accelerator.is_main_process:
        note, on_picture = (lambda text: None), (lambda done, total: None)
    for text in order.notes:
        note(text)
    config, chosen, base, prompts, subject = order.config, order.chosen, order.base, order.prompts, order.subject
    config = replace(config, cache_dir=config.cache_dir or str(Path(config.output_dir) / "features"))

    # The feature models, and whether every adapter fits the base, are known before anything is drawn.
    device = bases.asked_device(config.device or str(accelerator.device))
    config = replace(config, precision=bases.asked_precision(config.precision, device, base, config.base_config))
    clip, judge = _features(config, order.embedded, device)
    pipe = _pipeline(config, base, chosen, device)
    folder = atomic.make_folder(config.output_dir, "--output_dir")

    # The same prompts and seeds with and without every adapter; what is there from a cut run is not drawn again.
    sampling = sampling_of(config, config.batch_size, base, pipe)
    seeds = range(config.seed, config.seed + config.seeds)
    settings = made_by(pipe, base, sampling) | {"base_digest": _digest_of(pipe)}
    settings |= {"keep_background": True} if config.keep_background else {}
    gallery = Gallery(folder / "pictures", rows_of(chosen), prompts.all, seeds, settings)
    missing = gallery.missing()
    accelerator.wait_for_everyone()  # nobody draws before everybody knows what is missing
    if missing:
        note(f"Drawing {len(missing)} of {sum(1 for _ in gallery.tasks())} pictures; the others are there.")
    share = missing[accelerator.process_index :: accelerator.num_processes]
    drawing = draw_tasks(pipe, share, sampling, config.any_weights, config.keep_background)
    for number, _ in enumerate(drawing, start=1):
        on_picture(number, len(share))
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return None

    # One process measures and writes.
    outline = world.outline if order.embedded else by_attention(pipe, prompts.subject)
    measures = Measures(clip, judge, subject, prompts, order.embedded, outline)
    before = _shown(gallery, gallery.rows[0], prompts)
    rows = [_judged(row, measures.of(_shown(gallery, row, prompts), before, len(seeds))) for row in gallery.rows]
    notes = [*subject.notes, *_world_notes(order.embedded), *_outline_notes(outline)]
    around = _circumstances(clip, judge, device, base, settings)
    report = Report(folder, rows, prompts, seeds, len(subject.held_out), len(subject.train), notes, around)
    _write(report, gallery, settings, note)
    return report


def _features(config: EvaluateConfig, embedded: bool, device: str) -> tuple[Features, Features]:
    """(the CLIP, what pictures are compared with each other by)."""
    clip = load_features(config.clip_model or (EMBEDDED if embedded else CLIP), device, config.cache_dir)
    if not clip.reads:
        raise ValueError(f"--clip_model {clip.name} knows no texts; name a CLIP.")
    dino = config.dino_model or (NONE if embedded else DINO)
    return clip, clip if dino == NONE else load_features(dino, device, config.cache_dir)


def _pipeline(config: EvaluateConfig, base: str, chosen: list[Chosen], device: str) -> DiffusionPipeline:
    """The bare base. Raises ValueError if an adapter does not fit it."""
    pipe = bases.asked_base(config, config.precision, base)
    use_sampler(pipe, config.scheduler)
    for one in chosen:
        with_adapter(pipe, one, config.any_weights)
        unload_adapters(pipe)
    return pipe.to(device)


def _digest_of(pipe: DiffusionPipeline) -> str:
    """A short hash of the base's fingerprint: another base under the same name draws its own pictures."""
    return hashlib.sha256(json.dumps(present_base(pipe)).encode()).hexdigest()[:16]


def _shown(gallery: Gallery, row: Row, prompts: Prompts) -> Shown:
    return Shown(*(gallery.shown(row, kind) for kind in (prompts.calling, prompts.unrelated, prompts.of_class)))


def _judged(row: Row, values: dict[str, torch.Tensor]) -> Judged:
    found = {name: interval(value) for name, value in values.items()}
    if row.adapter is None:
        return Judged(row.name, found)
    one = row.adapter
    size = one.path.stat().st_size
    return Judged(row.name, found, one.path.name, one.sha256, one.scale, size, one.header.notes.training)


def _circumstances(clip: Features, judge: Features, device: str, base: str, settings: dict) -> dict:
    return {
        "base": bases.public_name(base),
        "pictures and prompts compared by": _told(clip),
        "pictures compared by": _told(judge),
        "device": device,
        "precision": settings["precision"],
        "steps": settings["num_inference_steps"],
        "guidance": settings["guidance_scale"],
        "sampler": settings["scheduler"],
        **library_versions(),
    }


def _told(features: Features) -> str:
    return "the embedded CLIP" if bases.is_embedded(features.name) else bases.public_name(features.name)


def _world_notes(embedded: bool) -> list[str]:
    if not embedded:
        return []
    return [
        "On the embedded base, subject fidelity and copying compare the details of subjects alone: each is cut out by "
        "its distance to the border's colour and centred on grey at one size, so that backgrounds and places do not "
        "count, and its mean colours are left out, which satisfy the small CLIP (subject_fidelity_clip) by themselves."
    ]


def _outline_notes(outline: Outline | None) -> list[str]:
    if outline is not None:
        return []
    return [
        "Shape, colour and background were not measured apart: this base does not show where in a picture the subject "
        "is, or the subject has no class word, or is a style."
    ]


def _write(report: Report, gallery: Gallery, settings: dict, note: Note) -> None:
    """The report last: where it is, all is."""
    prompts = [*report.prompts.calling, *report.prompts.of_class]
    columns = min(SHEET_SEEDS, len(report.seeds))
    rows = [sheet.Row(row.name, _few(gallery, row, prompts, columns)) for row in gallery.rows]
    settings = settings | {"adapters": files_of([row.adapter for row in gallery.rows if row.adapter])}
    seeds = list(report.seeds)[:columns]
    drawn = sheet.contact_sheet(rows, prompts, columns, footer=sheet.footer_of(settings, seeds))
    about = {"prompt": " | ".join(prompts), "seeds": seeds, **settings}
    save_png(drawn, report.folder / "sheet.png", about)
    pictures = {"Before, and with every adapter": "sheet.png"}
    try:
        reports.plot(report, report.folder / "plot.png")
        pictures = {"Subject fidelity against drift": "plot.png"} | pictures
    except ImportError:
        note("There is no plot.png: it needs matplotlib (pip install matplotlib).")
    atomic.write_bytes(report.folder / "report.md", report.page(pictures).encode())
    atomic.write_bytes(report.folder / "report.json", report.to_json().encode())


def _few(gallery: Gallery, row: Row, prompts: list[str], columns: int) -> list:
    pictures, each = gallery.shown(row, prompts), len(gallery.seeds)
    return [pictures[start + column] for start in range(0, len(pictures), each) for column in range(columns)]
