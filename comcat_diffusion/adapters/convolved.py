"""The side-car of one convolution: the terms of every adapter beside it, see separable.py for what they add.

The host's own forward makes its output, and what acts is added to it: row by row where the adapter waits for its
trigger, rank by rank where its ranks wait for words of their own, place by place where it has a region or its
background is kept. All of these weigh what a term has in its ranks, which are fewer than the channels that go out.
Without any that acts, there is nothing to add.

Letters: B batch, C channels that come in, O that go out, R rank.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Self, TypeVar

import torch
from torch import nn

from comcat_diffusion.adapters import seam
from comcat_diffusion.adapters.call import here
from comcat_diffusion.adapters.config import ComcatConfig
from comcat_diffusion.adapters.gate import spoken
from comcat_diffusion.adapters.merging import refuse_infinite
from comcat_diffusion.adapters.parts import bare, plain_modules
from comcat_diffusion.adapters.separable import SIDE, TAPS, across, around, first_taps, kernel_of
from comcat_diffusion.adapters.sidecar import SideCar, factor_of
from comcat_diffusion.adapters.wide import shared_out
from comcat_diffusion.attentions import plain

FACTORS = ("conv_down", "conv_taps", "conv_up")
_HOSTS = re.compile(r"(down|up|mid)_blocks?\..*resnets\.\d+\.conv[12]")  # of a U-Net of diffusers
Whatever = TypeVar("Whatever")


def is_named_so(name: str) -> bool:
    """Whether a module of this name in a U-Net is one of the convolutions that terms can stand beside."""
    return _HOSTS.fullmatch(name) is not None


def is_usual(name: str) -> bool:
    """Whether it has a term where none are named: the second of a residual block; docs/log.md, 2026-11-30."""
    return is_named_so(name) and name.endswith(".conv2")


def hosts(model: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions of a model that terms stand beside, by name.

    Raises ValueError for a model that is no U-Net of diffusers, and for a convolution of another kind.
    """
    found = {name: plain(module) for name, module in plain_modules(model).items() if is_named_so(name)}
    if not found:
        kind = type(bare(model)).__name__
        raise ValueError(f"Terms beside convolutions are for U-Nets, and this is a {kind}: set convolutions=0.")
    for name, host in found.items():
        reason = why_not(host)
        if reason is not None:
            raise ValueError(f"Cannot adapt '{name}' ({type(host).__name__}): {reason}; set convolutions=0.")
    return found


def why_not(module: nn.Module) -> str | None:
    """Why no term can stand beside a module, or None if one can."""
    if not isinstance(module, nn.Conv2d):
        return "it is no convolution of PyTorch's"
    if module.kernel_size != (SIDE, SIDE) or module.groups != 1 or module.dilation != (1, 1):
        return "its kernel is not of 3 x 3 places and all channels"
    if isinstance(module.padding, str):
        return f"it is padded by a rule ({module.padding})"
    if not seam.is_adapted(module) and "forward" in vars(module):
        return "hooks (offloading, casting to float8) replaced its forward; attach adapters before they are installed"
    return None


def shapes_beside(host: nn.Conv2d, rank: int) -> dict[str, tuple[int, int]]:
    """Names and shapes of the factors of a term."""
    return {"conv_down": (rank, host.in_channels), "conv_taps": (rank, TAPS), "conv_up": (host.out_channels, rank)}


def expected_shapes(model: nn.Module, config: ComcatConfig) -> dict[str, tuple[int, int]]:
    """Names and shapes of the factors that an adapter of this configuration has beside a model's convolutions.

    Raises ValueError as `hosts` does, and for ranks of convolutions that are not there.
    """
    found, shapes = hosts(model), {}
    unknown = sorted((config.convolution_ranks or {}).keys() - found.keys())
    if unknown:
        raise ValueError(f"convolution_ranks name '{unknown[0]}', which is no convolution here.")
    for name, rank in ranks_of(config, list(found)).items():
        shapes |= {f"{name}.{factor}": shape for factor, shape in shapes_beside(found[name], rank).items()}
    return shapes


def split(factors: Mapping[str, Whatever]) -> tuple[dict[str, Whatever], dict[str, Whatever]]:
    """What there is by names of factors, HOST.FACTOR: at attentions, and beside convolutions."""
    attentions, beside = {}, {}
    for name, value in factors.items():
        (beside if name.rpartition(".")[2] in FACTORS else attentions)[name] = value
    return attentions, beside


def ranks_of(config: ComcatConfig, names: list[str]) -> dict[str, int]:
    """The rank beside each of these convolutions, of those that have any."""
    if config.convolution_ranks is None:
        return {name: config.convolutions for name in names if is_usual(name)}
    return {name: config.convolution_ranks[name] for name in names if name in config.convolution_ranks}


def waits_of(config: ComcatConfig, name: str) -> list[tuple[tuple[str, ...], int]]:
    """For which words how many of the ranks beside a convolution wait; none where all wait for the same."""
    shares = (config.convolution_shares or {}).get(name, ())
    return [(tuple(words), own) for (words, _), own in zip(config.trigger_ranks or (), shares, strict=False) if own]


@functools.cache
def convolved(host: type) -> type:
    """The subclass of a convolution that adds what its side-car says to what the host's forward gives."""
    host_forward = host.forward

    def forward(self: nn.Module, hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        layer = self.__dict__["_modules"].get(seam.SIDECAR)  # PEFT makes a LoRA's convolutions of the host's class
        live, made = layer.live if layer else (), host_forward(self, hidden, *args, **kwargs)
        return layer.added(live, hidden, made) if live else made

    return seam.with_sidecar(host, forward, convolved)


class Across(nn.Linear):
    """A factor of 1 x 1; a module that is called, so that whoever offloads modules one by one brings its weight."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, R, h, w)."""
        return across(hidden, self.weight.to(hidden.dtype))


class Around(nn.Linear):
    """A factor of 3 x 3 taps for each rank by itself, strided and padded as it is told that the host is."""

    def forward(
        self, hidden: torch.Tensor, stride: tuple[int, int], padding: tuple[int, int], mode: str
    ) -> torch.Tensor:
        """(B, R, h, w) -> (B, R, h', w')."""
        return around(hidden, self.weight.to(hidden.dtype), stride, padding, mode)


class ConvolvedLayer(SideCar):
    """All adapters of one convolution. `live` names those that act; without any, the host's output is its own."""

    adapter_layer_names = tuple(f"comcat_{name}" for name in FACTORS)
    other_param_names = ("r", "alpha", "scaling", "trigger", "waits")

    def __init__(self, host: nn.Conv2d, belongings: object) -> None:
        super().__init__(host, belongings)
        self.waits: dict[str, Sequence[tuple[tuple[str, ...], int]]] = {}  # for which words how many of its ranks do
        self._unmerged: tuple[nn.Parameter, ...] = ()  # the base's kernel, while a merged one stands in its place

    # What PEFT and diffusers ask of a layer

    @property
    def weight(self) -> torch.Tensor:
        """The base's kernel, (O, C, 3, 3)."""
        return self._unmerged[0] if self._unmerged else self.owner.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias, (O,)."""
        return self.owner.bias

    @property
    def in_features(self) -> int:
        """Channels that come in."""
        return self.owner.in_channels

    @property
    def out_features(self) -> int:
        """Channels that go out."""
        return self.owner.out_channels

    def update_layer(
        self,
        adapter_name: str,
        rank: int,
        config: ComcatConfig,
        waits: Sequence[tuple[tuple[str, ...], int]] = (),
    ) -> None:
        """Create an adapter's factors on the base's device and in its precision; what they add is exactly zero.

        Raises ValueError if there is such an adapter.
        """
        self._refuse_twice(adapter_name)
        for name, (outof, into) in shapes_beside(self.owner, rank).items():
            kind = Around if name == "conv_taps" else Across
            factor = factor_of(kind, into, outof, self.weight.device, self._numbers, config.init_weights)
            if name == "conv_up" and config.init_weights:
                nn.init.zeros_(factor.weight)
            elif name == "conv_taps" and config.init_weights and not factor.weight.is_meta:
                with torch.no_grad():
                    factor.weight.copy_(first_taps(rank))
            getattr(self, f"comcat_{name}")[adapter_name] = factor
        self.waits[adapter_name] = waits
        self._came(adapter_name, rank, config.alpha / config.r * rank, config.trigger)  # as strong as at attentions

    def _trained(self, name: str) -> bool:
        return torch.is_grad_enabled() and self.comcat_conv_up[name].weight.requires_grad

    # What the host asks

    def added(self, live: list[str], hidden: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        """What the host made of (B, C, h, w), (B, O, h', w'), and what these adapters add to it."""
        shares = self._shares(live, made)
        for name in live:
            weight = self._weight(name, shares.get(name), made)
            if weight is not None:
                made = made + self.term(name, hidden, weight)
        return made

    def term(self, name: str, hidden: torch.Tensor, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
        """What an adapter makes of (B, C, h, w), its ranks (B, R, h', w') times a weight: (B, O, h', w')."""
        down, taps, up = (getattr(self, f"comcat_{factor}")[name] for factor in FACTORS)
        host = self.owner
        return up(weight * taps(down(hidden), host.stride, host.padding, host.padding_mode))

    def _weight(self, name: str, share: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | float | None:
        """The scale of each row, rank and place, (B, R, h', w') where it is not the same; None where it is nothing."""
        weight = self.scaling[name]
        if share is not None:  # B, h'*w', 1
            if not share.any():
                return None
            weight = weight * share.to(like).mT.unflatten(2, like.shape[2:])
        if self.trigger[name]:
            rows = shared_out(self.waits[name], self.trigger[name], lambda words: spoken(self.gate, words, False))
            weight = weight * rows.to(like).mT.unsqueeze(-1)  # B, 1 or R, 1, 1
        return weight

    def _shares(self, live: list[str], made: torch.Tensor) -> dict[str, torch.Tensor]:
        """What part of each place which live adapter makes, (1 or B, h'*w', 1), for those that act by place."""
        shares = {}
        if self.regions is not None:
            found = self.regions.shares(live, made.shape[2] * made.shape[3])
            shares = {name: share.unsqueeze(0) for name, share in found.items()}
        return shares if here.focus is None else here.focus.of_map(live, made, shares)

    # Merging

    def _write(self, acting: list[str], told: str, safe_merge: bool) -> None:
        """The kernel with these adapters in it, exactly; raises ValueError if it is no plain one."""
        if not self.weight.dtype.is_floating_point or self.weight.shape[2:] != (SIDE, SIDE):
            raise ValueError("Cannot merge into a quantized convolution: keep the COMCAT adapter live.")
        merged = self.weight + sum(self.scaling[name] * self._kernel(name) for name in acting)
        if safe_merge:
            refuse_infinite([merged], told)
        self._unmerged = (self.weight,)
        self.owner.weight = nn.Parameter(merged, requires_grad=False)

    def factors(self, name: str) -> list[torch.Tensor]:
        """The weights of an adapter: D, T and U."""
        return [getattr(self, f"comcat_{factor}")[name].weight for factor in FACTORS]

    def _kernel(self, name: str) -> torch.Tensor:
        return kernel_of(*self.factors(name)).to(self.weight)

    def unmerge(self) -> None:
        """Put the very kernel back that `merge` replaced."""
        if self._unmerged:
            self.owner.weight, self._unmerged, self.merged_adapters = self._unmerged[0], (), []

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        # The base's kernel is nobody's while a merged one stands in its place: it moves with the side-car.
        super()._apply(self._moving(fn) if hasattr(self.owner, "_diffusers_hook") else fn, recurse)
        for kernel in self._unmerged:
            kernel.data = fn(kernel.data)
        return self

    @staticmethod
    def _moving(fn: Callable) -> Callable:
        """What moves tensors and leaves their precision: diffusers casts hosts layer by layer, with all in them."""
        return lambda tensor: tensor.to(fn(tensor[:0]).device)
