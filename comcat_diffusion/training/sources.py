"""What a run learns from, by what it holds and not by where it lies: a folder that has moved is the same one."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.dataset import Dataset, Example

# Settings that say where something lies; their contents are compared instead.
PLACES = (
    "instance_data_dir", "class_data_dir", "validation_data_dir", "init_adapter", "pretrained_model_name_or_path",
    "base_config", "revision", "variant",
)  # fmt: skip
SAMPLES = 8  # numbers of every weight, which tell two bases apart

Sources = dict[str, list[list[str]]]  # by kind: what each part is called, and a hash of it


def sources(config: TrainConfig, dataset: Dataset, class_examples: Sequence[Example], base: str) -> Sources:
    """The contents of everything that is learned from; `base` is what `sketch` says of the base."""
    found = {
        "the pictures": _digests(dataset.examples),
        "the held-out pictures": _digests(dataset.held_out),
        "the class pictures": _digests(class_examples),
        "the base": [[str(config.pretrained_model_name_or_path), base]],
    }
    if config.init_adapter:
        digest = hashlib.sha256(Path(config.init_adapter).expanduser().read_bytes()).hexdigest()
        found["--init_adapter"] = [[config.init_adapter, digest]]
    return found


def _digests(examples: Sequence[Example]) -> list[list[str]]:
    return [[example.name, example.digest] for example in examples]


def changed(before: Sources, now: Sources) -> list[str]:
    """What is not as it was, in words, with the names of the parts."""
    told = []
    for kind in dict.fromkeys([*before, *now]):
        was, now_is = before.get(kind, []), now.get(kind, [])
        if [digest for _, digest in was] != [digest for _, digest in now_is]:
            known = {digest for _, digest in was} & {digest for _, digest in now_is}
            names = dict.fromkeys(name for name, digest in (*was, *now_is) if digest not in known)
            told.append(f"{kind} ({', '.join(list(names)[:5]) or 'in another order'})")
    return told


@torch.no_grad()
def sketch(pipe: DiffusionPipeline) -> str:
    """A hash over a few numbers of every weight of a base, and over its schedule of noise: no gigabytes are read."""
    schedule = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    digest = hashlib.sha256(repr(sorted(schedule.items())).encode())
    for part, model in sorted(pipe.components.items()):
        if isinstance(model, nn.Module):
            for name, weight in sorted(model.state_dict().items()):
                flat = weight.reshape(-1)
                picked = flat[:: max(1, flat.numel() // SAMPLES)].float().cpu().contiguous()
                digest.update(f"{part}.{name} {tuple(weight.shape)}".encode() + picked.numpy().tobytes())
    return digest.hexdigest()
