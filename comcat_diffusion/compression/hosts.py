"""What can be compressed in a model, found by structure: its attentions, their projections, its other Linears.

transformers: self-attention of ViT, DeiT and their kin (q_proj, k_proj, v_proj, o_proj or out_proj). diffusers:
`Attention`, self and cross. Whatever else an attention has (normalized queries, grouped queries, rotary positions,
added keys) makes it another function than a product per head, and it is refused with that reason.
"""

import inspect
import sys
from dataclasses import dataclass

from torch import nn

from comcat_diffusion.attentions import DIFFUSERS, Style, style_of

_MLPS = (("fc1", "fc2"), ("gate_proj", "up_proj", "down_proj"))  # ViT and its kin; gated ones (SwiGLU)
_TAKEN = {"self", "hidden_states", "attention_mask", "kwargs"}  # what the forward that we replace may ask for


def why_not(attention: nn.Module) -> str | None:
    """Why this attention cannot be compressed, as the end of a sentence; None if it can."""
    style = style_of(attention)
    q, k, v, out = style.projections(attention)
    if not all(type(projection) is nn.Linear for projection in (q, k, v, out)):
        return "its projections are no plain Linears (unload or merge adapters, undo quantization, compress only once)"
    if hasattr(attention, "comcat"):
        return "it carries an adapter (unload or merge it first)"
    if not q.out_features == k.out_features == v.out_features == out.in_features:
        return "its heads share keys and values (grouped queries)"
    return _why_not_diffusers(attention) if style.diffusers else _why_not_transformers(attention, style)


def _why_not_diffusers(attention: nn.Module) -> str | None:
    for norm in ("norm_q", "norm_k"):
        if getattr(attention, norm, None) is not None:
            return f"its queries and keys are normalized ({norm})"
    for added in ("add_q_proj", "add_k_proj", "add_v_proj"):
        if getattr(attention, added, None) is not None:
            return f"it has added projections ({added})"
    if not getattr(attention, "scale_qk", False):
        return "its logits have no scale of their own (scale_qk)"
    if getattr(attention, "fused_projections", False):
        return "its projections are fused (call unfuse_qkv_projections first)"
    if hasattr(getattr(attention, "processor", None), "to_k_ip"):
        return "it has an IP-Adapter, whose own keys are as wide as before (unload it first)"
    return None


def _why_not_transformers(attention: nn.Module, style: Style) -> str | None:
    parts = {style.q, style.k, style.v, style.out}
    others = [name for name, child in attention.named_children() if name not in parts and list(child.parameters())]
    others += [name for name, _ in attention.named_parameters(recurse=False)]
    if others:
        return f"it has more than its four projections ({', '.join(others)})"
    asked = set(inspect.signature(type(attention).forward).parameters) - _TAKEN
    if asked:
        return f"its forward takes {', '.join(sorted(asked))}"
    if not all(hasattr(attention, name) for name in (style.scaling, style.dropout, "config")):
        return "it does not say its scale and dropout where ViT does"
    if not hasattr(sys.modules[type(attention).__module__], "eager_attention_forward"):
        return "it does not run on transformers' attention functions"
    return None


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Every attention of a known family by its path, compressible or not."""
    return {name: module for name, module in model.named_modules() if style_of(module) is not None}


def linears(model: nn.Module) -> dict[str, tuple[str, nn.Linear]]:
    """Path -> (part, layer) of the Linears outside attentions; the part is "mlp" in blocks, else "classifier"."""
    inside = tuple(f"{name}." for name in attentions(model))
    found = {}
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not (inside and name.startswith(inside)):
            repeated = any(piece.isdecimal() for piece in name.split("."))
            found[name] = ("mlp" if repeated else "classifier", module)
    return found


@dataclass(frozen=True)
class Mlp:
    """The layers of an MLP whose neurons can be left out: into them, one or two side by side, and out of them."""

    into: tuple[nn.Linear, ...]
    out: nn.Linear
    names: tuple[str, ...]  # of `into`, then of `out`

    @property
    def neurons(self) -> int:
        """Width M of the hidden layer."""
        return self.out.in_features


def mlp_of(module: nn.Module) -> Mlp | None:
    """The MLP that a module is, or None: its own layers and nothing else with weights, of which one is fed by one."""
    for names in _MLPS:
        layers = [getattr(module, name, None) for name in names]
        if all(type(layer) is nn.Linear for layer in layers):
            *into, out = layers
            held = {id(parameter) for layer in layers for parameter in layer.parameters()}
            alone = all(id(parameter) in held for parameter in module.parameters())
            fits = all((i.out_features, i.in_features) == (out.in_features, out.out_features) for i in into)
            if alone and fits and all((i.bias is None) == (into[0].bias is None) for i in into):
                return Mlp(tuple(into), out, names)
    return None


def mlps(model: nn.Module) -> dict[str, Mlp]:
    """Every MLP of the blocks by its path."""
    found = {name: mlp_of(module) for name, module in model.named_modules()}
    return {n: mlp for n, mlp in found.items() if mlp is not None and any(p.isdecimal() for p in n.split("."))}


def is_diffusers(model: nn.Module) -> bool:
    """Whether the model's attentions are diffusers'."""
    return any(style_of(module) is DIFFUSERS for module in attentions(model).values())
