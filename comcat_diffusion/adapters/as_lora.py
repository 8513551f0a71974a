"""A foldable adapter of a live model as a LoRA of its key and value projections, exactly.

    Delta W_K,h = s G'_h Ak_h^T        Delta W_V,h = s G_h^T Av_h^T        (as Linears store them, D x C)

is up @ down with the text side as `down`. Of a tied adapter all heads share that, so the rank is R instead of H*R. The
same of a file, without its base, is export/lora.py. A term beside another module is a LoRA of it.

Letters: H heads, D head width, R rank, C channels, O channels that go out.
"""

import torch
from torch import nn

from comcat_diffusion import heads as maths
from comcat_diffusion.adapters.beside import BesideLayer
from comcat_diffusion.adapters.layer import ComcatLayer
from comcat_diffusion.adapters.model import adapted_layers, side_cars
from comcat_diffusion.adapters.parts import bare
from comcat_diffusion.adapters.separable import lowered
from comcat_diffusion.families.family import STREAM_ROWS


def lora_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    """What `save_lora_weights` of a diffusers pipeline takes as `unet_lora_layers` or `text_encoder_lora_layers`.

    The strength is the trained one, alpha / r, whatever weight `set_adapters` gave. Raises ValueError if there is no
    such adapter, and for one that no LoRA can express: a free one, or one that waits for its trigger.
    """
    layers = {n: m for n, m in adapted_layers(bare(model)).items() if adapter_name in m.r}
    if not layers:
        raise ValueError(f"There is no COMCAT adapter '{adapter_name}' in this {type(bare(model)).__name__}.")
    found = {}
    for attention, layer in layers.items():
        _refuse_inexpressible(layer, adapter_name)
        path = attention if layer.style.diffusers else text_encoder_name(attention)
        scale, made = layer.alpha[adapter_name] / layer.r[adapter_name], []
        k_down, v_down, q_core, out_core = layer.folded(adapter_name)
        for projection, down, core in ((layer.style.k, k_down, q_core), (layer.style.v, v_down, out_core)):
            down, core = down.weight.detach(), core.weight.detach()
            made.append((projection, down.clone(), up_of(core, len(down), layer.heads, scale)))
        if layer.style.packed:
            (projection, k_down, k_up), (_, v_down, v_up) = made
            ups = [placed(up, number, STREAM_ROWS) for number, up in ((1, k_up), (2, v_up))]
            made = [(projection, torch.cat([k_down, v_down]), torch.cat(ups, dim=1))]
        for projection, down, up in made:
            found[f"{path}.{projection}.lora_A.weight"], found[f"{path}.{projection}.lora_B.weight"] = down, up
    for name, layer in side_cars(bare(model)).items():
        if isinstance(layer, BesideLayer) and adapter_name in layer.r:
            *lower, up = (factor.detach() for factor in layer.factors(adapter_name))
            up = layer.alpha[adapter_name] / layer.r[adapter_name] * up
            made = (lowered(*lower), up[:, :, None, None]) if len(lower) > 1 else (lower[0].clone(), up)
            for factor, own, axis in zip(("lora_A", "lora_B"), made, (0, 1), strict=True):
                # A Linear that also makes an attention's keys and values has their ranks first.
                before = found.get(f"{name}.{factor}.weight")
                found[f"{name}.{factor}.weight"] = own if before is None else torch.cat([before, own], dim=axis)
    return found


def placed(up: torch.Tensor, place: int, count: int, span: int = 1) -> torch.Tensor:
    """The rows of one projection, (O, K), among those of `count` of the same height, of which it is `span` itself.

    Zero elsewhere.
    """
    rows = up.new_zeros(count, len(up) // span, up.shape[1])
    rows[place : place + span] = up.unflatten(0, (span, -1))
    return rows.flatten(0, 1)


def up_of(core: torch.Tensor, rank: int, heads: int, scale: float) -> torch.Tensor:
    """G as H*R rows of width D -> (H*D, H*R), or, where all heads share the `rank` rows of the text side, (H*D, R)."""
    per_head = maths.in_factors(scale * core, heads)  # H, D, R
    if rank < len(core):
        return per_head.flatten(0, 1).contiguous()
    return torch.block_diag(*per_head)


def text_encoder_name(projection: str) -> str:
    """A name in a text encoder as LoRA files have it, whether or not this version of transformers has `text_model`."""
    return "text_model." + projection.removeprefix("text_model.")


def _refuse_inexpressible(layer: ComcatLayer, name: str) -> None:
    if layer.trigger[name]:
        raise ValueError(
            f"'{name}' acts from '{layer.trigger[name][0]}' on, which no LoRA can: save it with save_adapter, or train "
            "it again with --everywhere."
        )
    if name in layer.comcat_out_up:
        raise ValueError(
            f"'{name}' is a free adapter, which no LoRA can express: save it with save_adapter, or train it again with "
            "foldable=True."
        )
