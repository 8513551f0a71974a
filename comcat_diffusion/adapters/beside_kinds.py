"""The kinds of terms beside modules of a base, other than attentions: what their settings and factors are called.

What a kind adds stands with its side-car (convolved.py, fed.py); what is common to all of them is in beside.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

Whatever = TypeVar("Whatever")


@dataclass(frozen=True)
class Kind:
    """One kind. The names are those of configurations and files, which stay as they are."""

    setting: str  # of a configuration: the rank, and what its hosts are called in sentences
    ranks: str  # the same by name of the host
    shares: str  # how many of these wait for which words, where not all wait for the same
    told: str  # what the header of a packed file says of them
    version: int  # the format version of packed files that have them
    factors: tuple[str, ...]  # D, then T if there is one, and U
    tensors: tuple[str, str, str]  # of a packed file: rows, bits and scales

    @property
    def noun(self) -> str:
        """Its hosts in sentences."""
        return self.setting.replace("_", "-")

    @property
    def settings(self) -> tuple[str, ...]:
        """All of them."""
        return self.setting, self.ranks, self.shares

    def of_ranks(self, ranks: Mapping[str, int]) -> dict:
        """The settings that name every host with a term beside it and its rank; of none, none."""
        return {self.setting: max(ranks.values()), self.ranks: dict(sorted(ranks.items()))} if ranks else {}


CONVOLUTIONS = Kind(
    "convolutions",
    "convolution_ranks",
    "convolution_shares",
    "convolved",
    4,
    ("conv_down", "conv_taps", "conv_up"),
    ("conv_rows", "conv_bits", "conv_scales"),
)
FEED_FORWARDS = Kind(
    "feed_forwards",
    "feed_forward_ranks",
    "feed_forward_shares",
    "fed",
    5,
    ("feed_down", "feed_up"),
    ("feed_rows", "feed_bits", "feed_scales"),
)
KINDS = (CONVOLUTIONS, FEED_FORWARDS)
_BY_FACTOR = {factor: kind for kind in KINDS for factor in kind.factors}


def kind_with(factors: Mapping[str, object]) -> Kind | None:
    """The kind whose factors these are, all of them; None: of an attention."""
    return next((kind for kind in KINDS if sorted(factors) == sorted(kind.factors)), None)


def split(factors: Mapping[str, Whatever]) -> tuple[dict[str, Whatever], dict[str, Whatever]]:
    """What there is by names of factors, HOST.FACTOR: at attentions, and beside other modules."""
    attentions, beside = {}, {}
    for name, value in factors.items():
        (beside if name.rpartition(".")[2] in _BY_FACTOR else attentions)[name] = value
    return attentions, beside


def at_attentions(config: Mapping[str, object]) -> dict:
    """A configuration's settings without those of terms beside other modules."""
    left_out = {name for kind in KINDS for name in kind.settings}
    return {name: value for name, value in config.items() if name not in left_out}
