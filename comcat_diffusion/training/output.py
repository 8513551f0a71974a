"""The folder of a run: locked while the run lasts, and the adapter file in it."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from comcat_diffusion import atomic, bases
from comcat_diffusion.adapters.header import Notes
from comcat_diffusion.adapters.shrink import AddsNothing, least_bytes, shrunk
from comcat_diffusion.adapters.store import load_adapter, save_adapter
from comcat_diffusion.adapters.terms import Contents, read_contents
from comcat_diffusion.memory import hold
from comcat_diffusion.training.batching import Batch
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.learned import ADAPTER, embeddings
from comcat_diffusion.training.learner import Learner

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a second run out of the folder for as long as the block lasts. Raises ValueError if there is one."""
    try:
        import fcntl
    except ImportError:  # Windows: nothing to lock with
        yield
        return
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"Another run is writing to {folder}: give this one another --output_dir.") from error
        try:
            yield
        finally:
            os.unlink(folder / LOCK)


def save(
    config: TrainConfig, pipe: DiffusionPipeline, learner: Learner, notes: Notes, path: Path, thumbnail: str = ""
) -> None:
    """Write the adapter, and the new token where there is one, as they are now, within the budget of bytes."""
    if config.max_bytes:
        with contextlib.suppress(AddsNothing):  # stopped before anything was learned: it is saved as it is
            return atomic.write_bytes(path, shrunk(_contents(config, pipe, learner, notes), config.max_bytes)[1])
    return _save_whole(config, pipe, learner, notes, path, bases.PRECISIONS[config.save_precision], thumbnail)


def within_budget(config: TrainConfig, pipe: DiffusionPipeline, learner: Learner, notes: Notes) -> Contents:
    """What is left of all that is learned in the budget of bytes."""
    with tempfile.TemporaryDirectory() as folder:
        save(config, pipe, learner, notes, Path(folder) / "small.safetensors")
        return read_contents(Path(folder) / "small.safetensors")


def refuse_small_budget(config: TrainConfig, pipe: DiffusionPipeline, learner: Learner, notes: Notes) -> None:
    """Raise ValueError, before anything is learned, if not one direction would fit into the budget of bytes."""
    if config.max_bytes:
        least = least_bytes(_contents(config, pipe, learner, notes))
        if least > config.max_bytes:
            raise ValueError(
                f"--max_bytes {config.max_bytes:,} is too little: the least this adapter can have is {least:,} bytes."
            )


def _contents(config: TrainConfig, pipe: DiffusionPipeline, learner: Learner, notes: Notes) -> Contents:
    """All that is learned, as a file in full precision would hold it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "whole.safetensors"
        _save_whole(config, pipe, learner, notes, file, torch.float32)
        return read_contents(file)


def _save_whole(
    config: TrainConfig,
    pipe: DiffusionPipeline,
    learner: Learner,
    notes: Notes,
    path: Path,
    precision: torch.dtype,
    thumbnail: str = "",
) -> None:
    save_adapter(
        pipe,
        path,
        ADAPTER,
        config.pretrained_model_name_or_path,
        notes,
        precision,
        config.revision or "",
        embeddings(pipe, learner),
        thumbnail,
    )


@dataclass(frozen=True)
class Witness:
    """What a trained model predicts, for its file to be proved by when the model is gone."""

    batch: Batch
    predicted: torch.Tensor  # B, C, h, w


@torch.no_grad()
def witness(learner: Learner, batch: Batch) -> Witness:
    """One prediction of a trained model."""
    batch = batch.to(learner.denoiser.device)
    batch = replace(batch, noisy=batch.noisy.to(learner.denoiser.dtype))
    return Witness(batch, learner.eval()(batch.noisy, batch.timesteps, batch.prompts, batch.frames).float())


@torch.no_grad()
def prove(config: TrainConfig, known: Witness, path: Path) -> None:
    """Load a saved file onto a fresh base and compare one prediction. Raises RuntimeError at a difference."""
    batch, fresh = known.batch, bases.asked_base(config, "fp32", to_train=True)
    load_adapter(fresh, path, ADAPTER)
    learner = Learner(fresh, batch.prompts, False, batch.noisy.device).eval()
    hold(learner.denoiser.requires_grad_(False), batch.noisy.dtype)
    learner.denoiser.to(batch.noisy.device)
    found = learner(batch.noisy, batch.timesteps, batch.prompts, batch.frames).float()
    off = (known.predicted - found).abs().max() / known.predicted.abs().max()
    if not off < (1e-4 if batch.noisy.dtype == torch.float32 else 5e-2):
        raise RuntimeError(f"{path} does not reproduce what was trained (off by {off:.1e}); please report this.")
