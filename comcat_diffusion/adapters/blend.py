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
    made = [(share, attend(names)) for share, names in terms_of(shares, live, hidden)]
    if not isinstance(made[0][1], tuple):
        return sum(share * output for share, output in made)
    # A joint attention gives the text's tokens as well, which have no place: they are mixed by the shares' means.
    pictures, texts = zip(*(_weighed(share, *output) for share, output in made), strict=True)
    if len({text.shape[-1] for text in texts}) > 1:  # heads that are not projected: of a last block, nobody reads them
        return sum(pictures), texts[0]
    return sum(pictures), sum(texts)


def terms_of(
    shares: Mapping[str, torch.Tensor], live: list[str], like: torch.Tensor
) -> list[tuple[torch.Tensor, list[str]]]:
    """What is summed: a share, as precise as `like` (B, N, C), and who acts there; none that is nothing."""
    everywhere = [name for name in live if name not in shares]
    terms = [
        (share.to(like), [one for one in live if one == name or one in everywhere]) for name, share in shares.items()
    ]
    rest = 1 - sum((share for share, _ in terms), like.new_zeros(like.shape[1], 1))
    return [(share, names) for share, names in [*terms, (rest, everywhere)] if share.any()]


def _weighed(share: torch.Tensor, picture: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return share * picture, share.mean(dim=-2, keepdim=True) * text
