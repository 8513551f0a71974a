"""One attention's output put together by place. Who acts where is said in adapters/regions.py and adapters/focus.py.

Letters: B batch, N tokens of one attention, C channels.
"""

from collections.abc import Callable, Mapping

import torch

Output = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # of a joint attention that of the text, (B, M, C), as well


def blended(
    shares: Mapping[str, torch.Tensor],
    live: list[str],
    hidden: torch.Tensor,
    attend: Callable[[list[str]], Output],
) -> Output:
    """An attention's output, (B, N, C), by place; `attend` gives it with only the adapters that are named.

    `shares` are (N, 1) or (B, N, 1), at most one in sum; adapters without a share act everywhere.
    """
    if hidden.ndim != 3:
        raise ValueError("A region needs an attention over a sequence of tokens, not over a feature map.")
    everywhere = [name for name in live if name not in shares]
    terms = [
        (share.to(hidden), [one for one in live if one == name or one in everywhere]) for name, share in shares.items()
    ]
    rest = 1 - sum((share for share, _ in terms), hidden.new_zeros(hidden.shape[1], 1))
    made = [(share, attend(names)) for share, names in [*terms, (rest, everywhere)] if share.any()]
    if not isinstance(made[0][1], tuple):
        return sum(share * output for share, output in made)
    # A joint attention gives the text's tokens as well, which have no place: they are mixed by the shares' means.
    pictures, texts = zip(*(_weighed(share, *output) for share, output in made), strict=True)
    return sum(pictures), sum(texts)


def _weighed(share: torch.Tensor, picture: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return share * picture, share.mean(dim=-2, keepdim=True) * text
