"""What an evaluation is asked for: adapters, prompts and pictures, checked before torch is waited for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comcat_diffusion.adapters.header import AdapterFileError
from comcat_diffusion.adapters.same_base import difference
from comcat_diffusion.evaluation.config import EvaluateConfig
from comcat_diffusion.evaluation.pictures import SubjectPictures, subject_pictures
from comcat_diffusion.evaluation.prompts import Prompts, prompts_of
from comcat_diffusion.generation.chosen import Chosen, base_of, choose
from comcat_diffusion.places import is_embedded, place_of


@dataclass(frozen=True)
class Order:
    """Settings whose files and words are known to be there, and what is to be noted of them."""

    config: EvaluateConfig
    chosen: Sequence[Chosen]
    base: str
    embedded: bool
    prompts: Prompts
    subject: SubjectPictures
    notes: Sequence[str]


def order_of(config: EvaluateConfig) -> Order:
    """Look at adapters, prompts and pictures. Raises ValueError or OSError."""
    chosen, notes = _adapters(config)
    base = base_of(config, chosen)
    place_of(base)
    embedded = is_embedded(base)
    prompts = prompts_of(config, chosen, embedded)
    return Order(config, chosen, base, embedded, prompts, subject_pictures(config, chosen), notes)


def _adapters(config: EvaluateConfig) -> tuple[list[Chosen], list[str]]:
    """The adapters that are named, then those of a run, and a sentence on these. Raises ValueError if bases differ."""
    notes = []
    chosen = [choose(text, config.scale) for text in config.adapter]
    if config.run_dir is not None:
        folder = Path(config.run_dir).expanduser()
        found = _of_run(folder, config.scale)
        if not found:
            raise ValueError(f"--run_dir {config.run_dir} holds no adapter file.")
        names = ", ".join(str(one.path.relative_to(folder)) for one in found)
        notes.append(f"{len(found)} adapters in {config.run_dir}: {names}.")
        chosen += found
    for one in chosen[1:]:
        reason = difference(chosen[0].header.fingerprint, one.header.fingerprint)
        if reason is not None and not config.any_weights:
            raise AdapterFileError(
                f"{chosen[0].path} was trained on '{chosen[0].header.base_model}' and {one.path} on "
                f"'{one.header.base_model}': their bases differ, evaluate them apart."
            )
    return chosen, notes


def _of_run(folder: Path, scale: float) -> list[Chosen]:
    """The adapters of the checkpoints by their steps, then those that the run itself left."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--run_dir: there is no folder {folder}.")
    found = []
    for path in sorted(folder.rglob("*.safetensors")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):  # a checkpoint that was never finished
            continue
        try:
            found.append(choose(str(path), scale))
        except AdapterFileError:  # weights of another kind: a checkpoint's, an exported LoRA's
            continue

    def place(one: Chosen) -> tuple:
        own = one.path.parent == folder
        steps = 0 if own else one.header.notes.training.get("steps", 0)
        return own, steps, one.path.stem  # the stem, so that NAME is before NAME-best

    return sorted(found, key=place)
