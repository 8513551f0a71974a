"""The layers of a compressed model: `LowRankLinear` and `LowRankAttention`, and how they take a layer's place.

A transformers attention keeps its identity, names, hooks and configuration: its class becomes a subclass of the host's
whose forward lets queries and keys be of another width than values, and its projections become narrower. A diffusers
attention keeps its class as well: only its Linears become narrower, so that every processor, LoRA and adapter goes on
working; its processors scale by the width they see, which a gain on the queries makes good.

Letters: B batch, N tokens, H heads, D dense head width, R rank, W columns of queries and keys (R and the key bias).
"""

import functools
import sys
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from comcat_diffusion import heads as maths
from comcat_diffusion.attentions import DIFFUSERS, style_of
from comcat_diffusion.compression.factor import Factors
from comcat_diffusion.compression.hosts import mlp_of

Weights = Sequence[tuple[torch.Tensor, torch.Tensor | None]]
SEVERAL_WIDTHS = ("eager", "sdpa")  # attention functions whose queries and values may differ in width


class LowRankLinear(nn.Module):
    """y = (x A) B + b: a Linear through a narrow waist, C -> R -> E."""

    def __init__(self, down: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        self.down, self.up = down, up
        self.in_features, self.out_features = down.in_features, up.out_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., E)."""
        return self.up(self.down(features))

    def extra_repr(self) -> str:
        """In and out features, as a Linear prints them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.down.out_features}"


class LowRankAttention(nn.Module):
    """What a transformers self-attention becomes: softmax(D^-1/2 [x A, 1][c B, c u]^T) (c V) O + b.

    [.., 1] and u, the key bias, are there if the dense attention had a query bias. Masks, dropout, attention outputs
    and the choice between eager and sdpa work as in the host; it exists as a subclass of one only: `low_rank_class`.
    """

    key_bias = False  # whether the last column of each head's keys is the key bias

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, N, C) -> (B, N, C) and, if the attention function gives them, the weights (B, H, N, N)."""
        style = style_of(self)
        heads = style.head_count(self)
        projections = style.projections(self)
        q, k, v = (maths.split_heads(p(hidden_states), heads).transpose(1, 2) for p in projections[:3])  # B, H, N, R
        if self.key_bias:
            q = nn.functional.pad(q, (0, 1), value=1.0)  # B, H, N, W
        dropout = getattr(self, style.dropout) if self.training else 0.0
        mixed, weights = self._attention_function(q, v)(
            self, q, k, v, attention_mask, dropout=dropout, scaling=getattr(self, style.scaling), **kwargs
        )  # B, N, H, R
        return projections[3](mixed.flatten(-2)), weights

    def _attention_function(self, q: torch.Tensor, v: torch.Tensor) -> Callable:
        name = self.config._attn_implementation
        if name not in SEVERAL_WIDTHS and q.shape[-1] != v.shape[-1]:
            raise ValueError(
                f"The attention function '{name}' needs values as wide as keys ({v.shape[-1]} and {q.shape[-1]} here); "
                f"use one of {', '.join(SEVERAL_WIDTHS)} with a compressed model."
            )
        eager = sys.modules[self.host.__module__].eager_attention_forward
        return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def _blank(host: type) -> nn.Module:
    cls = low_rank_class(host)
    return cls.__new__(cls)


@functools.cache
def low_rank_class(host: type) -> type:
    """The subclass of an attention class that runs LowRankAttention's forward."""

    # The class is made at run time, so copies and pickles name the host's instead.
    def __reduce_ex__(self: nn.Module, protocol: int) -> tuple:
        return _blank, (host,), self.__dict__

    body = {"__reduce_ex__": __reduce_ex__, "__module__": __name__, "host": host}
    return type(f"LowRank{host.__name__}", (LowRankAttention, host), body)


def is_compressed(module: nn.Module) -> bool:
    """Whether this is one of the layers that compression makes."""
    marked = any(getattr(module, name, None) is not None for name in ("comcat_width", "comcat_neurons"))
    return marked or isinstance(module, (LowRankLinear, LowRankAttention))


def replace_linear(model: nn.Module, path: str, factors: Factors, folded: bool = True) -> None:
    """Put factors in the place of a Linear. Not `folded`, the mean input stays a bias of the first factor."""
    parent, _, name = path.rpartition(".")
    host = model.get_submodule(parent)
    linear = model.get_submodule(path)
    down = _linear_like(linear, maths.in_weight(factors.down), _offset(factors, folded))
    up = _linear_like(linear, maths.out_weight(factors.up), _bias(factors, folded))
    setattr(host, name, LowRankLinear(down, up))


def replace_qk(attention: nn.Module, factors: Factors, folded: bool = True) -> None:
    """Put factors in the place of a transformers attention's query and key projections."""
    style, heads = style_of(attention), len(factors.down)
    q, k = style.projections(attention)[:2]
    bias = _bias_of_heads(factors, folded)  # H, C or None
    k_weight = maths.in_weight(factors.up.mT)  # H*R, C
    if bias is not None:
        k_weight = maths.widen_in(k_weight, bias, heads=heads)  # H*W, C
    become_low_rank(attention)
    attention.key_bias = bias is not None
    setattr(attention, style.q, _linear_like(q, maths.in_weight(factors.down), _offset(factors, folded)))
    setattr(attention, style.k, _linear_like(k, k_weight, None))


def replace_vo(attention: nn.Module, factors: Factors, folded: bool = True) -> None:
    """Put factors in the place of a transformers attention's value and output projections."""
    style = style_of(attention)
    v, out = style.projections(attention)[2:]
    become_low_rank(attention)
    setattr(attention, style.v, _linear_like(v, maths.in_weight(factors.down), _offset(factors, folded)))
    setattr(attention, style.out, _linear_like(out, maths.out_weight(factors.up), _bias(factors, folded)))


def replace_neurons(mlp: nn.Module, into: Weights, out: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    """Put other Linears in the place of an MLP's: (weight, bias) of each layer in, and of the one out."""
    parts = mlp_of(mlp)
    for name, layer, values in zip(parts.names, (*parts.into, parts.out), (*into, out), strict=True):
        setattr(mlp, name, _linear_like(layer, *values))
    mlp.comcat_neurons = parts.neurons  # how many there were


def replace_out(attention: nn.Module, v: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Put fewer values (H*R, C), which get no bias, and their output projection (E, H*R) in place of the old."""
    style = style_of(attention)
    value, ending = style.projections(attention)[2:]
    become_low_rank(attention)
    setattr(attention, style.v, _linear_like(value, v, None))
    setattr(attention, style.out, _linear_like(ending, out, bias))


def replace_both(attention: nn.Module, qk: Factors, vo: Factors, width: int, folded: bool = True) -> None:
    """Put factors in the place of a diffusers attention's four projections; `width` is the dense D."""
    heads, bias = len(qk.down), _bias_of_heads(qk, folded)  # H, C or None
    q, k, v, out = DIFFUSERS.projections(attention)
    q_weight, k_weight, q_bias = maths.in_weight(qk.down), maths.in_weight(qk.up.mT), _offset(qk, folded)
    wide = vo.down.shape[-1]
    gain = maths.logit_gain(width, wide)
    if bias is not None:
        zeros, ones = q_weight.new_zeros(heads, q_weight.shape[1]), q_weight.new_ones(heads)
        q_bias = q_weight.new_zeros(len(q_weight)) if q_bias is None else q_bias
        q_weight, q_bias = maths.widen_in(q_weight, zeros, heads=heads), maths.widen_in(q_bias, ones, heads=heads)
        k_weight = maths.widen_in(k_weight, bias, heads=heads)
    attention.to_q = _linear_like(q, q_weight * gain, None if q_bias is None else q_bias * gain)
    attention.to_k = _linear_like(k, k_weight, None)
    attention.to_v = _linear_like(v, maths.in_weight(vo.down), _offset(vo, folded))
    attention.to_out[0] = _linear_like(out, maths.out_weight(vo.up), _bias(vo, folded))
    attention.scale = wide**-0.5  # for the processors that do not take it from the width they see
    attention.inner_dim = attention.inner_kv_dim = heads * wide
    attention.comcat_width = wide


def become_low_rank(attention: nn.Module) -> None:
    """Give a transformers attention the forward that allows for different widths; the function stays the same."""
    if not isinstance(attention, LowRankAttention):
        attention.__class__ = low_rank_class(type(attention))


def _offset(factors: Factors, folded: bool) -> torch.Tensor | None:
    """(H*R,): minus the mean input, lowered, if it was not folded into the last bias."""
    return None if folded or factors.offset is None else -factors.offset.flatten()


def _bias_of_heads(factors: Factors, folded: bool) -> torch.Tensor | None:
    return factors.bias if folded else factors.constant


def _bias(factors: Factors, folded: bool) -> torch.Tensor | None:
    """(E,): what all heads add."""
    bias = _bias_of_heads(factors, folded)
    return None if bias is None else bias.sum(0)


def _linear_like(linear: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A Linear of this weight on the other's device, in its precision, trained if it is."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    trained, like = linear.weight.requires_grad, {"device": linear.weight.device, "dtype": linear.weight.dtype}
    made.weight = nn.Parameter(weight.to(**like).contiguous(), requires_grad=trained)
    if bias is not None:
        made.bias = nn.Parameter(bias.to(**like).contiguous(), requires_grad=trained)
    return made.train(linear.training)
