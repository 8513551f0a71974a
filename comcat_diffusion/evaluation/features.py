"""What pictures and texts are compared by: the features of a CLIP (both) or a DINOv2 (pictures), found offline first.

Letters: N pictures or texts, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import nn
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from comcat_diffusion import bases
from comcat_diffusion.config import is_hub_id
from comcat_diffusion.training.cache import Cache

_UNFIT = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)


@dataclass
class Features:
    """A model in float32 that tells pictures, and texts where it is a CLIP, by vectors of length one."""

    name: str
    model: nn.Module
    processor: object  # of transformers; makes the model's input of pictures
    tokenizer: object | None = None
    batch_size: int = 32
    cache_dir: str | Path | None = None

    def __post_init__(self) -> None:
        self.cache = Cache(self.cache_dir, self.model)

    @property
    def reads(self) -> bool:
        """Whether it knows texts too."""
        return self.tokenizer is not None

    @torch.no_grad()
    def images(self, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """(N, F), float32 on the CPU, from the cache where they are there."""
        found = [self.cache.find(picture) for picture in pictures]
        missing = [place for place, kept in enumerate(found) if kept is None]
        for start in range(0, len(missing), self.batch_size):
            places = missing[start : start + self.batch_size]
            pixels = self.processor([pictures[p] for p in places], return_tensors="pt")["pixel_values"]  # N, 3, h, w
            given = {"pixel_values": pixels.to(self.model.device)}
            made = self.model.get_image_features(**given) if self.reads else self.model(**given)
            for place, row in zip(places, _unit(made), strict=True):
                found[place] = self.cache.keep(pictures[place], {"features": row})
        return torch.stack([kept["features"] for kept in found])

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """(N, F), float32 on the CPU. Raises ValueError for a model that knows pictures alone."""
        if not self.reads:
            raise ValueError(f"The feature model '{self.name}' knows no texts; name a CLIP.")
        rows = []
        for start in range(0, len(texts), self.batch_size):
            # padded to the full length, as Stable Diffusion's own encoder and the embedded CLIP were trained
            batch = list(texts[start : start + self.batch_size])
            ids = self.tokenizer(batch, padding="max_length", truncation=True, return_tensors="pt").input_ids
            rows.append(_unit(self.model.get_text_features(input_ids=ids.to(self.model.device))))
        return torch.cat(rows)


def _unit(output: object) -> torch.Tensor:
    """The pooled output of a model as float32 rows of length one, (N, F)."""
    return normalize(output.pooler_output.float(), dim=-1).cpu()


def load_features(
    name: str, device: str = "cpu", cache_dir: str | Path | None = None, batch_size: int = 32
) -> Features:
    """A feature model by hub id or folder; 'embedded' is the small CLIP of the embedded base.

    Only a hub id that is not in the local cache asks the network. Raises FileNotFoundError, saying what was looked
    for, and ValueError for what is no model of pictures.
    """
    model, processor, tokenizer = _embedded() if bases.is_embedded(name) else _named(name)
    return Features(name, model.eval().to(device), processor, tokenizer, batch_size, cache_dir)


def _embedded() -> tuple:
    folder = bases.assets() / "tiny-sd"
    model, processor = _pictured(folder / "clip", offline=True)
    return model, processor, AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)


def _named(name: str) -> tuple:
    path = Path(name).expanduser()
    if path.is_dir():
        missing = [file for file in ("config.json", "preprocessor_config.json") if not (path / file).is_file()]
        if missing:
            raise FileNotFoundError(f"{path} is no folder of a feature model: it has no {missing[0]}.")
        return _whole(path, offline=True)
    if not is_hub_id(name):
        raise FileNotFoundError(
            f"There is no feature model at '{name}': no such folder, and a hub id reads owner/name."
        )
    try:
        return _whole(name, offline=True)
    except (FileNotFoundError, ValueError):  # not, or not wholly, in the cache: ask the hub
        try:
            return _whole(name, offline=False)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"The feature model '{name}' is neither a local folder nor in the local cache (looked for its "
                f"config.json), and the hub did not give it: fetch it once with: hf download {name}"
            ) from error


def _whole(name: str | Path, offline: bool) -> tuple:
    model, processor = _pictured(name, offline)
    if not hasattr(model, "get_text_features"):
        return model, processor, None
    return model, processor, _read(AutoTokenizer, name, offline)


def _pictured(name: str | Path, offline: bool) -> tuple:
    # Pillow's processors, so that a picture has the same features whether or not torchvision is installed
    processor = _read(AutoImageProcessor, name, offline, backend="pil")
    model, told = _read(AutoModel, name, offline, dtype=torch.float32, output_loading_info=True)
    if not (hasattr(model, "get_image_features") or model.config.model_type.startswith("dinov2")):
        raise ValueError(f"'{name}' is a {type(model).__name__}, neither a CLIP nor a DINOv2.")
    if told["missing_keys"]:  # they would be random
        raise ValueError(f"'{name}' is not whole: it has no weights for {sorted(told['missing_keys'])[0]}.")
    return model, processor


def _read(kind: type, name: str | Path, offline: bool, **settings: object) -> object:
    try:
        return kind.from_pretrained(name, local_files_only=offline, **settings)
    except OSError as error:
        raise FileNotFoundError(f"The feature model '{name}' is not whole: {_first_line(error)}") from error
    except _UNFIT as error:
        raise ValueError(f"'{name}' could not be loaded as a feature model: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
