"""Checkpoints that a run can be trusted to: whole or not there, checked when read, and of the same settings.

`checkpoints/checkpoint-N/` holds what Accelerate saves of optimizer, schedule and scaler, the learned tensors in full
precision, the adapter file as the run would leave it then, and `checkpoint.json` with the step, the settings, what was
learned from (see sources.py), the number of threads and the hash of every file.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import nn

from comcat_diffusion import atomic
from comcat_diffusion.training.config import BESIDE, STEADY_SCHEDULES, TrainConfig
from comcat_diffusion.training.learned import Ema
from comcat_diffusion.training.sources import PLACES, Sources, changed

RECORD = "checkpoint.json"


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self,
        config: TrainConfig,
        learned_from: Sources,
        accelerator: Accelerator,
        parameters: dict[str, nn.Parameter],
        ema: Ema,
    ):
        self.folder, self.limit = Path(config.output_dir).expanduser() / "checkpoints", config.checkpoints_total_limit
        # The rate's course is counted in steps of all processes, so their number is a setting too.
        self.settings = settings_of(config) | {"processes": accelerator.num_processes}
        self.sources = learned_from
        self.accelerator, self.parameters, self.ema = accelerator, parameters, ema
        # The base is not Accelerate's to save: all that changes is in `parameters`.
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

    def save(self, step: int, write_adapter: Callable[[Path, int], None]) -> Path:
        """Write a checkpoint beside its place, then move it there; drop those beyond the limit. Every process calls.

        `write_adapter` writes the adapter file of the step into a folder; the main process alone calls it. Raises
        OSError, naming the last good checkpoint, if there is no room for another one.
        """
        target, partial = self.folder / f"checkpoint-{step}", self.folder / f".checkpoint-{step}.partial"
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            with atomic.writing(target, self._bytes(), partial):
                self._fill(partial, step, write_adapter)
                if main:
                    shutil.rmtree(target, ignore_errors=True)
                    os.replace(partial, target)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror} {last_good(self.folder)}") from error
        if main:
            self._prune()
        self.accelerator.wait_for_everyone()
        return target

    def _fill(self, folder: Path, step: int, write_adapter: Callable[[Path, int], None]) -> None:
        self.accelerator.save_state(str(folder))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            tensors = {name: p.detach().cpu().contiguous() for name, p in self.parameters.items()}
            save_file(tensors, folder / "learned.safetensors")
            if self.ema.mean:
                save_file({k: v.cpu().contiguous() for k, v in self.ema.tensors().items()}, folder / "ema.safetensors")
            write_adapter(folder, step)
            record = {"step": step, "settings": self.settings, "sources": self.sources}
            record |= {"threads": torch.get_num_threads(), "files": _digests(folder)}
            (folder / RECORD).write_text(json.dumps(record, indent=1), "utf-8")
            _flush(folder)

    def _bytes(self) -> int:
        """Of what is learned, of AdamW's two moments of it, and of its running mean."""
        return (4 if self.ema.mean else 3) * sum(p.nbytes for p in self.parameters.values())

    def resume(self, asked: str, note: Callable[[str], None]) -> int:
        """Put everything back as it was at a checkpoint (a folder, or "latest"); returns its step.

        `note` is told of a number of threads that is not the run's. Raises ValueError or FileNotFoundError for a
        missing or damaged one, naming the last good one, and for settings, pictures or a base that are not those of the
        run, naming them.
        """
        folder = self._latest() if asked == "latest" else Path(asked).expanduser()
        problem = damage(folder)
        if problem:
            good = [path for path in listed(self.folder) if path != folder and damage(path) is None]
            way_out = f"the last good one is {good[-1]}" if good else "there is no good one: start afresh without it"
            raise ValueError(f"--resume_from_checkpoint: {problem}; {way_out}.")
        record = json.loads((folder / RECORD).read_text("utf-8"))
        self._refuse_others(record, folder)
        threads = torch.get_num_threads()
        if record["threads"] != threads and self.accelerator.device.type == "cpu":
            note(
                f"{folder} was written with {record['threads']} threads and goes on with {threads}: sums are rounded "
                f"otherwise, so the file will differ in its last bits. OMP_NUM_THREADS={record['threads']} would keep "
                "them."
            )
        self.accelerator.load_state(str(folder))
        with torch.no_grad():
            for name, tensor in load_file(folder / "learned.safetensors").items():
                self.parameters[name].copy_(tensor)
        if self.ema.mean:
            self.ema.load(load_file(folder / "ema.safetensors"))
        return record["step"]

    def forget(self) -> None:
        """Remove the checkpoints of a run that is replaced: "latest" and the limit would take them for this one's."""
        if self.accelerator.is_main_process:
            for old in listed(self.folder):
                shutil.rmtree(old)

    def _latest(self) -> Path:
        there = listed(self.folder)
        if not there:
            raise FileNotFoundError(f"--resume_from_checkpoint latest: there is no checkpoint in {self.folder}.")
        return there[-1]

    def _refuse_others(self, record: dict, folder: Path) -> None:
        """Raise ValueError for settings, pictures or a base that are not those of a checkpoint, naming them."""
        if "sources" not in record:
            raise ValueError(
                f"--resume_from_checkpoint: {folder} is of an earlier version; start from its weights with "
                "--init_adapter."
            )
        saved = record["settings"]
        names = sorted(saved.keys() | self.settings.keys())
        other = [name for name in names if saved.get(name) != self.settings.get(name)]
        told = [f"{name} (was {saved.get(name)}, is {self.settings.get(name)})" for name in other[:5]]
        told += changed(record["sources"], self.sources)
        if told:
            raise ValueError(
                f"--resume_from_checkpoint: what is learned has changed: {', '.join(told)}. Give the same again, or "
                "start from the weights alone with --init_adapter."
            )

    def _prune(self) -> None:
        if self.limit:
            for old in listed(self.folder)[: -self.limit]:
                shutil.rmtree(old, ignore_errors=True)


def settings_of(config: TrainConfig) -> dict:
    """The settings that decide what is learned, as JSON holds them; where it lies does not."""
    longer = config.lr_scheduler in STEADY_SCHEDULES and not config.max_bytes  # nothing hangs on the last step
    beside = {*BESIDE, *PLACES, *(("max_train_steps",) if longer else ())}
    found = {name: value for name, value in asdict(config).items() if name not in beside}
    found["subjects"] = [{n: v for n, v in one.items() if n not in PLACES} for one in found["subjects"]]
    return json.loads(json.dumps(found))


def listed(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def last_good(folder: Path) -> str:
    """A sentence that says which checkpoint is whole."""
    good = [path for path in listed(folder) if damage(path) is None]
    return f"The last good checkpoint is {good[-1]}." if good else "No checkpoint was written yet."


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if not folder.is_dir():
        return f"there is no checkpoint {folder}"
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        files = record["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder} has no readable {RECORD}"
    for name, digest in files.items():
        path = folder / Path(name).name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            return f"{folder} is damaged: {name} is missing or changed"
    return None


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def _flush(folder: Path) -> None:
    """Force the files to disk before the rename makes them count."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
