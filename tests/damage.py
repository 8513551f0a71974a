"""Damage to files of adapters with terms beside modules: what every kind of such terms is to be refused for."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from comcat_diffusion.adapters.header import read_adapter

DAMAGES = ("missing", "more", "shape", "nan", "rank", "unknown")


def damage(path: Path, how: str, factor: str, settings: tuple[str, str], ranks: tuple[int, int], stray: str) -> None:
    """Damage a dense file in one of these ways: at a factor of its terms, or in the two settings that tell their rank.

    `ranks` are the true one and another. A `stray` module is one that no term stands beside.
    """
    tensors, metadata = load_file(path), read_adapter(path).metadata()
    common, by_name = settings
    told = f'"{common}": {ranks[0]}'
    assert told in metadata["comcat"]
    if how == "missing":
        del tensors[factor]
    elif how == "more":
        tensors[f"{factor.rpartition('_')[0]}_bias"] = torch.zeros(1, 1)
    elif how == "shape":
        tensors[factor] = tensors[factor][:, :8].contiguous()
    elif how == "nan":
        tensors[factor][0, 0] = torch.nan
    elif how == "rank":
        metadata["comcat"] = metadata["comcat"].replace(told, f'"{common}": {ranks[1]}')
    else:
        metadata["comcat"] = metadata["comcat"].replace(told, f'{told}, "{by_name}": {{"{stray}": 2}}')
    save_file(tensors, path, metadata)
