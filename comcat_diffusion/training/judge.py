"""Looking at a run from outside: held-out loss with fixed noise, samples in place, the best adapter so far.

Nothing here may end a run: a sample that cannot be drawn is reported and skipped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from diffusers import DiffusionPipeline

from comcat_diffusion.adapters.header import Notes
from comcat_diffusion.generation.pictures import data_uri
from comcat_diffusion.training import output
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.encode import Crop
from comcat_diffusion.training.learned import Ema
from comcat_diffusion.training.learner import Learner
from comcat_diffusion.training.loop import held_out_loss
from comcat_diffusion.training.objective import Objective
from comcat_diffusion.training.preview import Preview
from comcat_diffusion.words import Subject


@dataclass
class Judge:
    """Judges and saves what is learned as it would be used: with the running mean in place, where there is one."""

    config: TrainConfig
    subjects: Sequence[Subject]
    pictures: int
    target: Path
    pipe: DiffusionPipeline
    learner: Learner
    held_out: Sequence[Crop]
    objective: Objective
    ema: Ema
    preview: Preview
    accelerator: Accelerator
    note: Callable[[str], None]
    lowest: float = float("inf")
    sample: Path | None = None
    sheet: Path | None = None

    @property
    def best(self) -> Path:
        """Where the adapter with the lowest held-out loss is kept."""
        return self.target.with_name(f"{self.target.stem}-best.safetensors")

    def remember(self, records: Sequence[dict]) -> None:
        """Take over what an interrupted run had measured, so that its best adapter is not replaced by a worse one."""
        first = self.config.cut_step or 0
        known = [r["held_out_loss"] for r in records if "held_out_loss" in r and r["step"] >= first]
        if self.best.exists():
            self.lowest = min(known, default=self.lowest)

    def look(self, step: int) -> dict[str, float]:
        """Measure and draw at a step; returns what is worth logging."""
        with self.ema.in_place():
            self.draw(step)
        return self.measure(step)

    def measure(self, step: int) -> dict[str, float]:
        """The held-out loss, on the main process alone; the adapter is kept if it is the best so far."""
        found = {}
        if self.accelerator.is_main_process:
            with self.ema.in_place():
                found = self._held_out(step)
        self.accelerator.wait_for_everyone()
        return found

    def draw(self, step: int) -> None:
        """Samples of the weights as they are, on the main process alone; one that fails is told and skipped."""
        if self.accelerator.is_main_process:
            try:
                self.sample, *_, self.sheet = self.preview.draw(self.learner, step)
            except (RuntimeError, OSError) as error:  # out of memory is a RuntimeError too
                reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
                self.note(f"No samples at step {step}: {reason[0]} The run goes on.")
        self.accelerator.wait_for_everyone()

    def save(self, path: Path, step: int) -> None:
        """Write the adapter file as of a step; its thumbnail, where there is to be one, is the last sample's first."""
        thumbnail = data_uri(self.sample) if self.config.thumbnail and self.sample else ""
        output.save(self.config, self.pipe, self.learner, self.notes(step), path, thumbnail)

    def save_into(self, folder: Path, step: int) -> None:
        """Write the adapter file as of a step into a checkpoint's folder, under the name of the run's own."""
        with self.ema.in_place():
            self.save(folder / self.target.name, step)

    def _held_out(self, step: int) -> dict[str, float]:
        if not self.held_out:
            return {}
        training = self.learner.training
        loss = held_out_loss(self.learner.eval(), self.held_out, self.objective, self.accelerator.device)
        self.learner.train(training)
        self.accelerator.log({"held_out_loss": loss}, step=step)
        if loss < self.lowest and step >= (self.config.cut_step or 0):  # before, no file would hold what was judged
            self.lowest = loss
            self.save(self.best, step)
        return {"step": step, "held_out_loss": loss}

    def notes(self, step: int) -> Notes:
        """What the file of a step tells its user."""
        config, first = self.config, self.subjects[0]
        training = {"resolution": config.resolution, "steps": step, "seed": config.seed, "pictures": self.pictures}
        others = [{"trigger": s.trigger, "class_word": s.class_word} for s in self.subjects[1:]]
        prompt = config.all_subjects()[0].prompt or first.phrase
        return Notes(first.trigger, prompt, first.class_word, training, others)
