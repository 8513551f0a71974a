"""Finding a vision model of transformers, classifier or feature extractor, and its image processor: offline first."""

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from comcat_diffusion.compression.config import UNET
from comcat_diffusion.compression.pictures import Processor
from comcat_diffusion.config import is_hub_id


@dataclass(frozen=True)
class Classifier:
    """A vision model in float32, and what makes its input of pictures, if that came with it."""

    model: nn.Module
    processor: Processor | None


def is_classifier(model: nn.Module) -> bool:
    """Whether the model gives classes, and not features."""
    return "ForImageClassification" in type(model).__name__


def load_classifier(name: str, revision: str | None = None) -> Classifier:
    """The model and its processor. Only a hub id that is not in the local cache asks the network.

    Raises FileNotFoundError, saying what was looked for, and ValueError for what is no whole vision model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        _refuse_other_folder(path)
        return _loaded(str(path), None, True)
    if not is_hub_id(name):
        raise FileNotFoundError(f"There is no model at '{name}': no such folder, and a hub id reads owner/name.")
    try:
        return _loaded(name, revision, True)
    except OSError:  # not, or not wholly, in the cache: the user named a hub id, so ask the hub
        try:
            return _loaded(name, revision, False)
        except OSError as error:
            raise FileNotFoundError(
                f"The model '{name}' is neither a local folder nor in the local cache, and the hub did not give "
                "it: check the name and the connection."
            ) from error


def _refuse_other_folder(path: Path) -> None:
    if (path / "model_index.json").is_file():
        raise ValueError(f"{path} is a Stable Diffusion base: compress its attentions with --part {UNET}.")
    if (path / "plan.json").is_file():
        raise ValueError(f"{path} holds a compressed model; start from the dense one.")
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} is no folder of a transformers model: it has no config.json.")


def _kind(name: str, where: dict) -> type:
    """The class that loads a model: as a classifier if it was saved as one, the picture half of a CLIP or SigLIP."""
    made = (AutoConfig.from_pretrained(name, **where).architectures or ["ForImageClassification"])[0]
    if "ForImageClassification" in made:
        return AutoModelForImageClassification
    half = f"{made.removesuffix('Model')}VisionModel"
    return getattr(transformers, half, AutoModel) if made.endswith("Model") else AutoModel


def _loaded(name: str, revision: str | None, offline: bool) -> Classifier:
    where = {"revision": revision, "local_files_only": offline}
    try:
        kind = _kind(name, where)
        model, told = kind.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **where)
    except (ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        raise ValueError(f"{name} could not be loaded as a vision model: {reason}.") from error
    if told["missing_keys"]:  # transformers fills them with random numbers
        missing = ", ".join(sorted(told["missing_keys"])[:3])
        raise ValueError(f"{name} is no trained {type(model).__name__}: it has no weights for {missing}.")
    if getattr(model, "main_input_name", None) != "pixel_values":
        raise ValueError(f"{name} is a {type(model).__name__}, which takes no pictures: name a vision model.")
    try:
        processor = AutoImageProcessor.from_pretrained(name, backend="pil", **where)
    except (OSError, ValueError):  # it is only needed where there are pictures
        processor = None
    return Classifier(model.eval(), processor)
