"""Where a transformer looks at words whose picture and text share one softmax: its own attention, asked.

The host's own code runs on a view whose values are one for the tokens of the words, and in a column beside for all of
the text: what its heads give then *is* how much they look there, behind whatever norms, rotations and masks it has, and
no logits are written out. The words are counted by what goes to the text at all, head by head,

    looks = mean over heads of  sum_j p_j / sum_t p_t        p = softmax over picture and text
                                                             j: tokens of the words, t: all of the text's

which is the softmax over the text alone that a cross-attention has (looking.py).

Letters: B batch, N tokens of one attention, M context tokens, H heads, D head width, C channels.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.functional import pad

from comcat_diffusion.adapters.regions import grid_of, words_in
from comcat_diffusion.adapters.seam import View
from comcat_diffusion.attentions import Style, plain, style_of

_LEAST = 1e-6  # of a head's attention: where nothing goes to the text, nothing goes to the words


def shares_softmax(attention: nn.Module) -> bool:
    """Whether an attention is over the picture's tokens and the text's at once."""
    style = style_of(attention)
    return style is not None and (style.joint or style.stream)


@torch.no_grad()
def asked(
    attention: nn.Module,
    args: tuple,
    kwargs: Mapping[str, object],
    of_words: torch.Tensor,
    latent: tuple[int, int],
    words_at: Sequence[int] = (),
) -> torch.Tensor:
    """How much each token looks at words, 0 to 1: (B, 1, h, w) of the picture's tokens, latents being `latent` large.

    `args` and `kwargs` are those that the attention is called with, `of_words` (B, M) is one for the words' tokens and
    zero for others. In a stream they come first, or at `words_at` of each row. Raises ValueError if the picture's
    tokens are no level of the latents.
    """
    style, heads = style_of(attention), style_of(attention).head_count(attention)
    hidden = args[0] if args else kwargs["hidden_states"]  # B, N, C
    before, behind = words_in(latent, hidden.shape[1], words_at) if style.stream else (0, 0)
    told = told_of(of_words, hidden.shape[1], before, behind, words_at) if style.stream else _both(of_words)
    width = plain(style.projections(attention)[0]).out_features // heads
    values = pad(told.to(hidden), (0, width - 2)).repeat(1, 1, heads)  # B, N or M, H*D
    host = getattr(type(attention), "host", type(attention))
    made = host.forward(_view(attention, style, values), *args, **kwargs)
    made = made[0] if isinstance(made, tuple) else made
    made = made[:, before : made.shape[1] - behind].unflatten(-1, (heads, width))  # B, h*w, H, D
    return looked_by(made, grid_of(latent, made.shape[1]))


def looked_by(made: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """How much tokens look at words, (B, 1, h, w), by what heads gave them of what is told, (B, h*w, H, 2 or more)."""
    own = made[..., :2].float()
    looked = (own[..., 0] / own[..., 1].clamp(min=_LEAST)).mean(-1)  # B, h*w
    return looked.unflatten(1, grid).unsqueeze(1)


def _both(of_words: torch.Tensor) -> torch.Tensor:
    """Beside the words' tokens, all: (B, M, 2)."""
    return torch.stack([of_words, torch.ones_like(of_words)], dim=-1)


def told_of(
    of_words: torch.Tensor, tokens: int, before: int, behind: int, words_at: Sequence[int] = ()
) -> torch.Tensor:
    """What tokens of a stream are, (B, N, 2): the words', and the text's, which padding counts as.

    So many stand before the picture's, and behind; `of_words` (B, M) as in `asked`.
    """
    made = of_words.new_zeros(len(of_words), tokens, 2)
    made[:, :before, 1] = made[:, tokens - behind :, 1] = 1
    for row, own, start in zip(made, of_words, words_at or (0,) * len(made), strict=True):
        row[start : start + len(own), 0] = own[: tokens - start]
    return made


def _view(attention: nn.Module, style: Style, values: torch.Tensor) -> View:
    """The attention with other values, and with what its heads give for its output."""

    def given(_: torch.Tensor) -> torch.Tensor:
        return values

    if style.packed:
        into = attention.get_submodule(style.q)
        inner = values.shape[-1]

        def stream(hidden: torch.Tensor) -> torch.Tensor:
            query, key, _, rest = into(hidden).tensor_split([inner, 2 * inner, 3 * inner], dim=-1)
            return torch.cat([query, key, values, rest], dim=-1)

        return View(attention, **{style.q: stream, style.out: lambda mixed: mixed[..., :inner]})
    replaced = {"to_v": given}
    if style.out:
        replaced["to_out"] = [_same] * len(attention.to_out)
    if style.joint:
        nothing = values.new_zeros(1)

        def none(hidden: torch.Tensor) -> torch.Tensor:
            return nothing.expand(*hidden.shape[:-1], values.shape[-1])

        replaced |= {"to_v": none, "add_v_proj": given, "to_add_out": _same}
    if getattr(attention, "fused_projections", False):
        own = replaced["to_v"]
        replaced["to_qkv"] = lambda x: torch.cat([attention.to_q(x), attention.to_k(x), own(x)], dim=-1)
        if style.joint:
            text = attention.add_q_proj, attention.add_k_proj
            replaced["to_added_qkv"] = lambda x: torch.cat([*(one(x) for one in text), values], dim=-1)
    return View(attention, **replaced)


def _same(mixed: torch.Tensor) -> torch.Tensor:
    return mixed
