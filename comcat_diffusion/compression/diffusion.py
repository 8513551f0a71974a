"""The attentions of a Stable Diffusion base as something to compress: prompts, the U-Net's calls, and its pictures.

What goes into the U-Net while the base draws the calibration prompts is recorded; these calls are the batches.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from comcat_diffusion import bases
from comcat_diffusion.compression.calibrate import checked
from comcat_diffusion.compression.config import CompressConfig
from comcat_diffusion.compression.finetune import Distillation
from comcat_diffusion.compression.report import Quality
from comcat_diffusion.generation.pictures import Drawing, Sampling, draw, made_by, save_png
from comcat_diffusion.generation.sheet import Row, contact_sheet, footer_of

SHOWN = 4  # prompts on the sheet
OWN_PROMPTS = 16  # of the embedded base's
PLAIN_PROMPTS = (
    "a photo of a dog in a garden",
    "a portrait of an old man",
    "a wooden house by a lake",
    "a bowl of fruit on a table",
)
Call = dict[str, torch.Tensor | dict]


class Diffusion:
    """A base, and the prompts of a run. Raises ValueError or OSError if there is no such base."""

    sample, counted, parts = "latent", "parts", ("attention",)
    distillation = Distillation()  # a U-Net is judged by the error of its sample
    usual_rate = 1e-5

    def __init__(self, config: CompressConfig) -> None:
        self.config = config
        self.pipe = bases.load_base(config.model, "fp32", config.revision).to(bases.fastest_device())
        if not hasattr(self.pipe, "unet"):
            raise ValueError(f"{config.model} is a {type(self.pipe).__name__}, which has no U-Net.")
        self.model: nn.Module = self.pipe.unet
        self.others = {name: part for name, part in self.pipe.components.items() if part not in (None, self.model)}
        self.prompts = config.calibration_prompt or default_prompts(config.model)
        guidance = bases.default_guidance(config.model)  # what the base is drawn with later
        self.sampling = Sampling(config.num_inference_steps, guidance, batch_size=config.at_once)
        self.calls: list[Call] = []
        self.sheet: Image.Image | None = None
        self.about: dict[str, object] = {}  # what the sheet says of itself

    def calibration(self) -> tuple[Sequence[Call], str]:
        """The calls of the U-Net while every prompt is drawn once, and what they are."""
        drawings = [Drawing(prompt, self.config.seed + number) for number, prompt in enumerate(self.prompts)]
        self.calls, _ = recorded(self.pipe, drawings, self.sampling)
        return self.calls, f"{len(self.calls)} U-Net calls of {len(self.prompts)} prompts"

    def search_batches(self) -> Sequence[Call]:
        """Those that ranks are searched on."""
        return self.calls

    def training(self) -> Sequence[Call]:
        """All passes of the fine-tuning."""
        return self.calls * self.config.finetune_epochs

    def timed(self) -> dict[str, torch.Tensor]:
        """What speed is measured on."""
        return next(checked(self.model, self.calls[:1]))

    def judge(self, small: nn.Module, note: Callable[[str], None]) -> Quality:
        """The drift on calls that calibration has not seen, and the sheet: the same noise drawn by both."""
        prompts = self.prompts[:SHOWN]
        first = self.config.seed + len(self.prompts)  # other noise than that of the calibration
        drawings = [Drawing(prompt, first + number) for number, prompt in enumerate(prompts)]
        note(f"Drawing {len(prompts)} prompts before and after.")
        calls, before = recorded(self.pipe, drawings, self.sampling)
        off = drift(self.model, small, calls)
        self.pipe.unet = small
        try:
            after = list(draw(self.pipe, drawings, self.sampling))
        finally:
            self.pipe.unet = self.model
        self.about = {"prompt": " | ".join(prompts), "seeds": [drawing.seed for drawing in drawings]}
        self.about |= made_by(self.pipe, self.config.model, self.sampling)
        footer = footer_of(self.about, self.about["seeds"])
        self.sheet = contact_sheet([Row("before", before), Row("after", after)], prompts, 1, footer=footer)
        return Quality(drift=off, judged_on=f"{len(calls)} U-Net calls of {len(prompts)} prompts")

    def leave(self, folder: Path) -> None:
        """The sheet, and the rest of the base, so that the folder is one."""
        save_png(self.sheet, folder / "sheet.png", self.about)
        self.pipe.save_config(folder)
        self.model.save_config(folder / "unet")  # what the dense one is; its weights are not there to be mistaken
        for name, part in self.others.items():
            part.save_pretrained(folder / name)
        for path in (folder / "model_index.json", *folder.glob("*/config.json")):
            bases.forget_folder(path)

    def usage(self, folder: str) -> str:
        """How the result is loaded, in Python."""
        return f'from comcat_diffusion import bases\n\npipe = bases.load_base("{folder}")'


def default_prompts(model: str) -> list[str]:
    """Those that the embedded base was judged by, or plain ones."""
    if not bases.is_embedded(model):
        return list(PLAIN_PROMPTS)
    return (bases.assets() / "tiny-sd" / "prompts.txt").read_text("utf-8").splitlines()[:OWN_PROMPTS]


def recorded(pipe: object, drawings: list[Drawing], sampling: Sampling) -> tuple[list[Call], list[Image.Image]]:
    """The arguments of every call of the U-Net while these are drawn, kept on the CPU, and the pictures."""
    calls, takes = [], inspect.signature(pipe.unet.forward)

    def record(_: nn.Module, arguments: tuple, named: dict) -> None:
        given = takes.bind(*arguments, **named).arguments
        calls.append({name: _kept(value) for name, value in given.items() if _holds_tensors(value)})

    handle = pipe.unet.register_forward_pre_hook(record, with_kwargs=True)
    try:
        return calls, list(draw(pipe, drawings, sampling))
    finally:
        handle.remove()


def _holds_tensors(value: object) -> bool:
    several = isinstance(value, Mapping) and bool(value)
    return all(map(_holds_tensors, value.values())) if several else isinstance(value, torch.Tensor)


def _kept(value: torch.Tensor | Mapping) -> torch.Tensor | dict:
    if isinstance(value, Mapping):
        return {name: _kept(part) for name, part in value.items()}
    return value.detach().to("cpu", copy=True)


@torch.no_grad()
def drift(dense: nn.Module, small: nn.Module, calls: Sequence[Call]) -> float:
    """||small - dense|| / ||dense|| of the outputs over all calls."""
    error, whole = 0.0, 0.0
    for call in checked(dense, calls):
        wanted, found = (model(**call).sample.cpu().double() for model in (dense, small))  # B, C, h, w
        error, whole = error + float((found - wanted).square().sum()), whole + float(wanted.square().sum())
    return (error / whole) ** 0.5
