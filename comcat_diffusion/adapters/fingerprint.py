"""Which base an adapter belongs to: its architecture, what it predicts, a sketch of its attention weights.

A hash of the weights would change with their precision (fp32, fp16 and bf16 copies of one checkpoint are one base), so
the fingerprint keeps a few sampled weights, which same_base.py compares with a tolerance. That reads 64 numbers, not
gigabytes.
"""

import hashlib
import json
from itertools import groupby

import torch
from torch import nn

from comcat_diffusion.adapters import seam
from comcat_diffusion.adapters.parts import plain_modules
from comcat_diffusion.adapters.same_base import NARROWER
from comcat_diffusion.attentions import style_of

SAMPLES = 64


def fingerprint(denoiser: nn.Module, prediction_type: str) -> dict:
    """What identifies a base: plain JSON, about a kilobyte."""
    config = getattr(denoiser, "config", None)
    width, narrower = (getattr(config, name, None) for name in ("cross_attention_dim", NARROWER))
    found = fingerprint_as(type(denoiser).__name__, width, denoiser, prediction_type)
    return found | {NARROWER: narrower} if narrower else found


def fingerprint_as(kind: str, width: int | None, denoiser: nn.Module, prediction_type: str) -> dict:
    """The fingerprint of a denoiser as diffusers would have it: class, and width of the text states."""
    attentions = _attentions(denoiser)
    return {
        "class": kind,
        "cross_attention_dim": width,
        "heads": sorted({style_of(module).head_count(module) for module in attentions.values()}),
        "prediction_type": prediction_type,
        "layout": _layout(attentions),
        "sketch": _sketch(list(attentions.values())),
    }


def layout_of(denoiser: nn.Module) -> str:
    """A hash of which attentions there are, and of which widths; weights are not looked at."""
    return _layout(_attentions(denoiser))


def _layout(attentions: dict[str, nn.Module]) -> str:
    layout = []
    for name, module in attentions.items():
        style = style_of(module)
        q, k = (seam.plain(p) for p in style.projections(module)[:2])
        layout.append([name, style.head_count(module), q.in_features, k.in_features, q.out_features])
    return hashlib.sha256(json.dumps(layout).encode()).hexdigest()[:16]


def _attentions(denoiser: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in plain_modules(denoiser).items() if seam.why_not(module) is None}


def _sketch(attentions: list[nn.Module]) -> list[float]:
    keys = [seam.plain(style_of(module).projections(module)[1]) for module in attentions]
    picked = []
    for place, samples in groupby(range(SAMPLES if keys else 0), lambda index: index * len(keys) // SAMPLES):
        weight = keys[place].weight.detach().reshape(-1)  # one by one: quantized ones are made when asked for
        picked += [weight[index * 7919 % len(weight)].float() for index in samples]
    values = torch.stack([value.cpu() for value in picked]) if picked else torch.zeros(0)
    return [float(f"{value:.4g}") for value in values.tolist()]
