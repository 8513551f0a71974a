"""A vision model as something to compress: its pictures, what it learns from, and how well it still does.

A classifier is judged by its top-1; a feature extractor, which knows no classes, by the cosine of its features.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from comcat_diffusion import bases
from comcat_diffusion.compression.calibrate import checked
from comcat_diffusion.compression.classifier import is_classifier, load_classifier
from comcat_diffusion.compression.config import CompressConfig
from comcat_diffusion.compression.finetune import OF_FEATURES, Distillation
from comcat_diffusion.compression.modelling import auto_class
from comcat_diffusion.compression.pictures import Batches, Shot, chosen, find, find_labelled, refuse_unreadable
from comcat_diffusion.compression.report import Quality

FEATURES_RATE = 2e-5  # at 1e-4 a DINOv2 that was fitted breaks in two steps (docs/log.md)


class Vision:
    """A model, and the folders of a run; all of them are looked at when it is made, only pictures are read later.

    Raises ValueError or OSError for a model or folder that is not what it should be.
    """

    sample, counted, parts = "picture", "model", None

    def __init__(self, config: CompressConfig) -> None:
        self.config = config
        loaded = load_classifier(config.model, config.revision)
        self.model, self.processor = loaded.model.to(bases.fastest_device()), loaded.processor
        self.classifies = is_classifier(self.model)
        # The labels and the dense model's classes, as in the paper; or features, and the streams that lead to them.
        self.distillation = Distillation(labels=0.5, hard=0.5) if self.classifies else OF_FEATURES
        self.usual_rate = 1e-4 if self.classifies else FEATURES_RATE
        self.others: dict[str, object] = {}
        self.train_shots = self._labelled("train_dir")
        self.eval_shots = self._labelled("eval_dir")
        seen = self.train_shots if config.calibration_dir is None else find(config.calibration_dir, "calibration_dir")
        self.seen = chosen(seen, config.pictures_seen, config.seed)
        if self.processor is None and (self.seen or self.eval_shots):
            raise ValueError(
                f"{config.model} does not say how pictures become its input: it has no preprocessor_config.json; copy "
                "the one of the model that it was trained from."
            )

    def _labelled(self, flag: str) -> list[Shot]:
        folder, about = getattr(self.config, flag), self.model.config
        if folder is None:
            return []
        if not self.classifies:  # folders are no classes to it
            return find(folder, flag)
        return find_labelled(folder, flag, about.label2id, about.num_labels)

    def calibration(self) -> tuple[Sequence | None, str]:
        """The batches that say what the model uses of its weights, and what they are; None without pictures.

        Raises ValueError, naming the file, if any picture of the run does not begin as one.
        """
        trains = self.config.finetune_epochs or self.config.method == "search"
        refuse_unreadable([*self.seen, *self.eval_shots, *(self.train_shots if trains else ())])
        if not self.seen:
            return None, "nothing"
        return Batches(self.seen, self.config.at_once, self.processor), f"{len(self.seen)} pictures"

    def search_batches(self) -> Sequence:
        """Those that ranks are searched on: with labels if there are any."""
        shots = chosen(self.train_shots, self.config.pictures_seen, self.config.seed) or self.seen
        return Batches(shots, self.config.at_once, self.processor)

    def training(self) -> Sequence:
        """All passes of the fine-tuning."""
        epochs, seed = self.config.finetune_epochs, self.config.seed
        return Batches(self.train_shots, self.config.at_once, self.processor, epochs, seed, self.config.random_crop)

    def timed(self) -> dict[str, torch.Tensor]:
        """What speed is measured on; it does not depend on what is in the pictures. (B, channels, h, w)."""
        size, made = self.model.config.image_size, torch.Generator().manual_seed(self.config.seed)
        height, width = (size, size) if isinstance(size, int) else size
        shape = (self.config.at_once, self.model.config.num_channels, height, width)
        return next(checked(self.model, [torch.randn(shape, generator=made)]))

    def judge(self, small: nn.Module, note: Callable[[str], None]) -> Quality:
        """Top-1 of both over the same pictures, or how alike their features are, if there are any."""
        if not self.eval_shots:
            return Quality()
        batches = Batches(self.eval_shots, self.config.at_once, self.processor)
        if not self.classifies:
            note(f"A {type(self.model).__name__} has no classes: the folders of --eval_dir count as pictures only.")
            first, rest = alike(self.model, small, batches)
            return Quality(cosine_first=first, cosine_rest=rest, judged_on=f"{len(self.eval_shots)} pictures")
        before, after = top1((self.model, small), batches)
        return Quality(top1_before=before, top1_after=after, judged_on=f"{len(self.eval_shots)} pictures")

    def leave(self, folder: Path) -> None:
        """The file that says how pictures become the model's input."""
        if self.processor is not None:
            self.processor.save_pretrained(folder)

    def usage(self, folder: str) -> str:
        """How the result is loaded, in Python."""
        auto = auto_class(self.model)
        lines = [
            "from comcat_diffusion.compression import load_compressed",
            "",
            f'model, plan = load_compressed("{folder}")',
            "",
            "# or by transformers, beside this package:",
            f"from transformers import {auto}",
            "",
            f'model = {auto}.from_pretrained("{folder}", trust_remote_code=True)',
        ]
        return "\n".join(lines)


@torch.no_grad()
def alike(dense: nn.Module, small: nn.Module, batches: Sequence) -> tuple[float, float]:
    """Mean cosine of both models' features over the pictures: of the first (class) token, and of all others."""
    first, rest, seen = 0.0, 0.0, 0
    for batch in checked(dense, batches):
        wanted, found = (m(pixel_values=batch["pixel_values"]).last_hidden_state for m in (dense, small))  # B, N, C
        cosine = torch.cosine_similarity(found.double(), wanted.double(), dim=-1)  # B, N
        first, rest, seen = (
            first + float(cosine[:, 0].sum()),
            rest + float(cosine[:, 1:].mean(1).sum()),
            seen + len(cosine),
        )
    return first / seen, rest / seen


@torch.no_grad()
def top1(models: Sequence[nn.Module], batches: Sequence) -> list[float]:
    """Percent of the pictures whose class each model finds; every picture is read once."""
    right, seen = [0] * len(models), 0
    for batch in checked(models[0], batches):
        seen += len(batch["labels"])
        for number, model in enumerate(models):
            found = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
            right[number] += int((found == batch["labels"]).sum())
    return [100 * count / seen for count in right]
