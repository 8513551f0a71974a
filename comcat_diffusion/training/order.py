"""What a training run is asked for, checked before torch is waited for: its pictures, its words, where it writes."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from comcat_diffusion.adapters.beside_kinds import KINDS
from comcat_diffusion.adapters.header import kind_of, read_adapter
from comcat_diffusion.families.family import DENOISERS
from comcat_diffusion.places import asked_name, assets, place_of
from comcat_diffusion.training.config import LearningSettings, TrainConfig
from comcat_diffusion.training.dataset import Dataset, read_dataset
from comcat_diffusion.words import Subject

TAKEN = ("learned", "ema")  # names of a checkpoint's own tensors, beside which the adapter file stands too


@dataclass(frozen=True)
class Order:
    """Settings whose pictures are listed, and whose folders are looked at."""

    config: TrainConfig
    dataset: Dataset


def order_of(config: TrainConfig) -> Order:
    """List the pictures and look at the folders; nothing is made. Raises ValueError or OSError."""
    config = with_sample(config)
    dataset = read_dataset(config)
    config = with_initial(config, dataset.subjects)
    place_of(asked_name(config))
    planned(config, dataset.subjects)
    return Order(config, dataset)


def with_sample(config: TrainConfig) -> TrainConfig:
    """The settings, with the sample subject where no pictures are named."""
    if config.instance_data_dir is not None or config.subjects:
        return config
    folder = assets() / "subject"
    own = config.instance_prompt is not None
    sample = (folder / "sample.txt").read_text("utf-8").splitlines()
    return replace(
        config,
        instance_data_dir=str(folder / "train"),
        instance_prompt=config.instance_prompt or (folder / "prompt.txt").read_text("utf-8").strip(),
        # The embedded base draws best what it is told everything of: where the thing is, how large and on what.
        validation_prompt=config.validation_prompt or ([] if own else sample),
    )


def with_initial(config: TrainConfig, subjects: Sequence[Subject]) -> TrainConfig:
    """The settings, with the shape of the adapter that is learned on. Raises ValueError for settings that it is not of.

    AdapterFileError among them, for a file that is no adapter.
    """
    path = config.init_adapter
    parts = read_adapter(path).config if path else {}
    found = next((parts[part] for part in DENOISERS if part in parts), None)
    if found is None:
        return config
    if found.get("trigger_ranks"):
        raise ValueError(f"--init_adapter {path} holds several subjects: learn on one of the files it was made of.")
    words = found.get("trigger") or []
    shape = {"kind": kind_of(found), "rank": found["r"], "alpha": found.get("alpha"), "everywhere": not words}
    shape |= {kind.setting: found.get(kind.setting, 0) for kind in KINDS}
    shape["train_text_encoder"] = len(parts) > 1  # what was adapted goes on being so
    untouched = LearningSettings()
    for name, value in shape.items():
        if getattr(config, name) not in (getattr(untouched, name), value):
            raise ValueError(f"--init_adapter {path} stays what it is, with {name} {value}: leave --{name} out.")
    missed = [subject.trigger for subject in subjects if subject.trigger not in words]
    if words and missed:
        raise ValueError(
            f"--init_adapter {path} acts from '{words[-1]}' on, which is not in the prompts of '{missed[0]}': call the "
            "subject as it does."
        )
    return replace(config, **shape)


def target_of(config: TrainConfig, subjects: Sequence[Subject]) -> Path:
    """Where the adapter will be; its folder is there and can be written to. Raises OSError, or as `planned` does."""
    target = planned(config, subjects)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):  # better known now than after the training
            pass
    except OSError as error:
        raise OSError(error.errno, f"--output_dir {target.parent} cannot be written to ({error.strerror}).") from error
    return target


def planned(config: TrainConfig, subjects: Sequence[Subject]) -> Path:
    """Where the adapter is to be. Raises ValueError if what is there must not be replaced, or the name is taken."""
    folder = Path(config.output_dir).expanduser()
    target = folder / f"{_stem(config.name, subjects)}.safetensors"
    if target.stem in TAKEN:
        raise ValueError(f"--name {target.stem} is what a checkpoint calls a file of its own; choose another name.")
    if target.exists() and not (config.overwrite or config.resume_from_checkpoint):
        raise ValueError(
            f"{target} is there already: choose another --output_dir or --name, or replace it with --overwrite."
        )
    if (folder / "run.toml").exists() and not (config.overwrite or config.resume_from_checkpoint):
        raise ValueError(
            f"{folder} holds another run, whose settings, metrics and checkpoints would be replaced: choose another "
            "--output_dir, go on with that one (--resume_from_checkpoint latest), or replace it with --overwrite."
        )
    return target


def _stem(name: str | None, subjects: Sequence[Subject]) -> str:
    """The file's name: the one asked for, which must be one, or the subjects' words."""
    if name is None:
        words = "-".join(subject.phrase.replace(" ", "-") for subject in subjects)
        return "".join(c for c in words if c.isalnum() or c in "-_.").strip("-.") or "adapter"
    if any(not (c.isalnum() or c in "-_. ") for c in name) or name.strip()[:1] in ("", ".", "-"):
        raise ValueError(f"--name '{name}' makes no file name: use letters, digits, '-', '_' and '.', a letter first.")
    return name.strip().replace(" ", "-")
