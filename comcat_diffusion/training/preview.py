"""Samples of a run, drawn in place: no second pipeline, fixed seeds, always as PNG files; a failing one ends no run."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from comcat_diffusion import bases
from comcat_diffusion.adapters.focus import keep_background, placeable
from comcat_diffusion.adapters.trigger import remember_prompts
from comcat_diffusion.generation.pictures import Drawing, Sampling, made_by, save_png
from comcat_diffusion.generation.sheet import Row, contact_sheet, footer_of
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.learned import ADAPTER
from comcat_diffusion.training.learner import Learner
from comcat_diffusion.words import Subject, words_of

STEPS = 25


class Preview:
    """Draws the validation prompts with the denoiser as it is at the moment."""

    def __init__(self, config: TrainConfig, pipe: DiffusionPipeline, subjects: Sequence[Subject] = ()):
        self.pipe, self.prompts, self.side = pipe, config.validation_prompt, config.resolution
        self.words = placeable(pipe, {ADAPTER: words_of(subjects)})
        self.base = config.pretrained_model_name_or_path
        self.guidance = bases.default_guidance(self.base, pipe)
        self.folder = Path(config.output_dir).expanduser() / "samples"
        self.seeds = range(config.seed, config.seed + config.num_validation_images)

    def draw(self, learner: Learner, step: int) -> list[Path]:
        """Write `samples/step-N-P-SEED.png` and a sheet of all; returns the files, the sheet last."""
        training = learner.training
        learner.eval()
        self.pipe.vae.to(learner.denoiser.device)
        files, pictures = [], []
        settings = made_by(self.pipe, self.base, Sampling(STEPS, self.guidance, resolution=self.side)) | {"step": step}
        settings |= {"keep_background": True} if self.words else {}
        try:
            for number, prompt in enumerate(self.prompts):
                for seed in self.seeds:
                    picture = self._one(learner, Drawing(prompt, seed))
                    path = self.folder / f"step-{step:06d}-{number:02d}-{seed}.png"
                    self.folder.mkdir(parents=True, exist_ok=True)
                    save_png(picture, path, {"prompt": prompt, "seed": seed, **settings})
                    files.append(path)
                    pictures.append(picture)
        finally:
            self.pipe.vae.to("cpu")
            learner.train(training)
        sheet = self.folder / f"step-{step:06d}.png"
        rows = [Row(f"step {step}", pictures)]
        about = {"prompt": " | ".join(self.prompts), "seeds": list(self.seeds), **settings}
        drawn = contact_sheet(rows, self.prompts, len(self.seeds), footer=footer_of(settings, self.seeds))
        save_png(drawn, sheet, about)
        return [*files, sheet]

    @torch.no_grad()
    def _one(self, learner: Learner, drawing: Drawing) -> Image.Image:
        family, denoiser = learner.family, learner.denoiser
        condition = learner.condition([drawing.prompt, ""], denoiser.device)
        remember_prompts(self.pipe, condition["states"], [drawing.prompt, ""])
        # As its steps are: where text is trained, the pipeline hands the denoiser the encoders' float32.
        call = partial(keep_background, self.pipe, self.words) if self.words else self.pipe
        with torch.autocast(denoiser.device.type, denoiser.dtype, enabled=denoiser.dtype != torch.float32):
            latents = call(
                **family.conditions(self.pipe, condition),
                **family.drawing(self.pipe),
                height=self.side,
                width=self.side,
                num_inference_steps=STEPS,
                **family.guided(self.guidance),
                generator=torch.Generator().manual_seed(drawing.seed),
                output_type="latent",
            ).images
        decoded = family.decoded(self.pipe.vae, latents)
        return self.pipe.image_processor.postprocess(decoded.float())[0]
