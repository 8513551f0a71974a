"""Adapters written into the weights of their base, saved as an ordinary diffusers folder."""

from collections.abc import Sequence
from pathlib import Path

from diffusers import DiffusionPipeline

from comcat_diffusion import atomic, bases
from comcat_diffusion.adapters import seam
from comcat_diffusion.adapters.header import Header
from comcat_diffusion.adapters.merge import bake_adapters, layers_of, unload_adapters
from comcat_diffusion.adapters.parts import denoiser
from comcat_diffusion.adapters.store import load_adapter
from comcat_diffusion.export.fit import refuse_unmergeable


def merge_to_folder(
    pipe: DiffusionPipeline,
    adapters: Sequence[tuple[str | Path, float]],
    output: str | Path,
    any_weights: bool = False,
) -> list[Header]:
    """Fold adapter files, (file, weight) each, into a fresh pipeline and save it as a folder that diffusers loads.

    The fold is exact in stock shapes, so only foldable adapters are taken. The pipeline is changed: its weights are
    then the merged ones. The folder appears whole or not at all. Raises FileExistsError for a folder that holds
    something already, AdapterFileError for a free adapter or another base, OSError if it cannot be written.
    """
    output = Path(output).expanduser()
    refuse_unmergeable(adapters, output)
    if any(seam.is_adapted(module) for part in pipe.components.values() for module in _modules(part)):
        raise ValueError("The pipeline carries adapters already; merge into a freshly loaded base.")
    if any(hasattr(module, "comcat_width") for module in _modules(denoiser(pipe))):
        raise ValueError("A compressed base has no stock shapes to merge into: use base and adapter as they are.")
    headers = _folded(pipe, adapters, any_weights)
    _save_whole(pipe, output)
    return headers


def _modules(part: object) -> list:
    return list(part.modules()) if hasattr(part, "modules") else []


def _folded(pipe: DiffusionPipeline, adapters: Sequence[tuple[str | Path, float]], any_weights: bool) -> list[Header]:
    try:
        headers = []
        for index, (path, weight) in enumerate(adapters):
            headers.append(load_adapter(pipe, path, f"merged_{index}", any_weights))
            for layer in layers_of(pipe):
                layer.set_scale(f"merged_{index}", weight)
        bake_adapters(pipe)
    except (ValueError, OSError):
        unload_adapters(pipe)
        raise
    return headers


def _save_whole(pipe: DiffusionPipeline, output: Path) -> None:
    needed = atomic.bytes_of(pipe.components.values())
    with atomic.whole_folder(output) as partial, atomic.writing(output, needed, partial):
        pipe.save_pretrained(partial)
        for config in (partial / "model_index.json", *partial.glob("*/config.json")):
            bases.forget_folder(config)
