"""The paper authors' `comcat_weight.pt` as an adapter file.

Theirs is a pickled list of nameless tensors in the order of a walk over the U-Net of Stable Diffusion 1.x: the down
blocks, the up blocks, then the middle; in each transformer block attn1 before attn2; of each attention Aq, Ak, Av
(H*R, C) and Ao (C, H*R), head after head. Rank, base and strength are not in it. Their strength a multiplies both
factors of each product, which is the scale s = a^2 of DESIGN section 1.

Letters: H heads, R rank, C channels.
"""

import pickle
import re
from pathlib import Path

import torch
from torch import nn

from comcat_diffusion import atomic
from comcat_diffusion.adapters.config import ComcatConfig
from comcat_diffusion.adapters.header import AdapterFileError, Header, Notes
from comcat_diffusion.adapters.layer import factor_shapes
from comcat_diffusion.adapters.parts import components
from comcat_diffusion.adapters.store import library_versions, plain_config, present_base, serialized
from comcat_diffusion.attentions import style_of
from comcat_diffusion.export.fit import refuse_missing

FACTORS = ("q_down", "k_down", "v_down", "out_up")
_ATTENTION = re.compile(
    r"(down_blocks\.\d+|up_blocks\.\d+|mid_block)\.attentions\.\d+\.transformer_blocks\.\d+\.attn[12]"
)


def import_authors_file(
    pipe: object,
    weights: str | Path,
    output: str | Path,
    strength: float = 1.0,
    base_model: str = "",
    notes: Notes | None = None,
) -> Header:
    """Write `comcat_weight.pt` as an adapter file for the base it was trained on, which nobody can check.

    `strength` is the authors' alpha (1 in their training, 0.7 to 0.8 in their notebook); it is squared into the file's
    alpha. Raises AdapterFileError for a file that is not such a list, does not fit the base, or holds code.
    """
    unet = components(pipe).get("unet")
    if unet is None:
        raise AdapterFileError(f"{weights} is for the U-Net of Stable Diffusion 1.x, which this base does not have.")
    tensors = _read_list(Path(weights))
    attentions = authors_order(unet)
    if not attentions or len(tensors) != len(FACTORS) * len(attentions):
        raise AdapterFileError(
            f"{weights} has {len(tensors)} tensors, but the {len(attentions)} attentions of this base need "
            f"{len(FACTORS) * len(attentions)}: name the Stable Diffusion 1.x base that it was trained on."
        )
    rank = _rank_of(tensors[1], unet.get_submodule(attentions[0]), weights)
    named = _named(tensors, attentions, unet, rank, weights)
    config = ComcatConfig(r=rank, alpha=rank * strength**2, target_modules=sorted(attentions))
    parts = {"unet": plain_config(config)}
    header = Header(parts, str(base_model), "", present_base(pipe), notes or Notes(), library_versions())
    atomic.write_bytes(output, serialized(named, header))
    return header


def authors_order(unet: nn.Module) -> list[str]:
    """The attentions of a U-Net in the order of the authors' list."""
    found = [name for name, _ in unet.named_modules() if _ATTENTION.fullmatch(name)]
    places = ("down_blocks", "up_blocks", "mid_block")
    return sorted(found, key=lambda name: places.index(name.partition(".")[0]))  # within a place the order stays


def _read_list(path: Path) -> list[torch.Tensor]:
    refuse_missing(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise AdapterFileError(
            f"{path} holds more than tensors, or is no PyTorch file; it was not opened, since it could run code."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        raise AdapterFileError(f"{path} is damaged or is no PyTorch file; get the file again.") from error
    if not isinstance(content, (list, tuple)) or not all(isinstance(item, torch.Tensor) for item in content):
        raise AdapterFileError(f"{path} is not the list of tensors that the authors' code writes.")
    for index, tensor in enumerate(content):
        if tensor.dim() != 2 or not tensor.is_floating_point() or tensor.layout != torch.strided:
            raise AdapterFileError(f"{path} has a tensor {index} that is no matrix of numbers.")
        if not torch.isfinite(tensor).all():
            raise AdapterFileError(f"{path} holds NaN or infinity in tensor {index}; train again or get another copy.")
    return [tensor.detach() for tensor in content]


def _rank_of(k_down: torch.Tensor, attention: nn.Module, path: str | Path) -> int:
    heads = style_of(attention).head_count(attention)
    rank, rest = divmod(len(k_down), heads)
    if rest or rank == 0:
        raise AdapterFileError(f"{path} has factors of {len(k_down)} rows, which {heads} heads cannot share.")
    return rank


def _named(
    tensors: list[torch.Tensor], attentions: list[str], unet: nn.Module, rank: int, path: str | Path
) -> dict[str, torch.Tensor]:
    named = {}
    for index, tensor in enumerate(tensors):
        attention, factor = attentions[index // len(FACTORS)], FACTORS[index % len(FACTORS)]
        into, outof = factor_shapes(unet.get_submodule(attention), rank, foldable=False)[factor]
        if tuple(tensor.shape) != (outof, into):
            raise AdapterFileError(
                f"{path} does not fit this base: tensor {index} is {tuple(tensor.shape)}, and {factor} of {attention} "
                f"is {(outof, into)} at rank {rank}."
            )
        named[f"unet.{attention}.{factor}"] = tensor.clone()
    return named
