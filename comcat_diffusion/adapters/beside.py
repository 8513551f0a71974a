"""The side-car of a module that is no attention: the terms of every adapter beside it.

The host's own forward makes its output, and what acts is added to it: row by row where the adapter waits for its
trigger, rank by rank where its ranks wait for words of their own, place by place where it has a region or its
background is kept. All of these weigh what a term has in its ranks, which are fewer than the channels that go out.
Without any that acts, there is nothing to add.

Letters: B batch, N tokens or places, C channels that come in, O that go out, R rank.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import nn

from comcat_diffusion.adapters import seam
from comcat_diffusion.adapters.beside_kinds import KINDS, Kind
from comcat_diffusion.adapters.call import here
from comcat_diffusion.adapters.config import ComcatConfig
from comcat_diffusion.adapters.gate import spoken
from comcat_diffusion.adapters.merging import refuse_infinite
from comcat_diffusion.adapters.parts import bare, plain_modules
from comcat_diffusion.adapters.sidecar import SideCar, factor_of
from comcat_diffusion.adapters.wide import shared_out
from comcat_diffusion.attentions import plain

_HOOKED = "hooks (offloading, casting to float8) replaced its forward; attach adapters before they are installed"
Waits = Sequence[tuple[tuple[str, ...], int]]  # for which words how many ranks wait


@functools.cache
def added_to(host: type) -> type:
    """The subclass of a module's class that adds what its side-car says to what the host's forward gives."""
    host_forward = host.forward

    def forward(self: nn.Module, hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        layer = self.__dict__["_modules"].get(seam.SIDECAR)  # PEFT makes a LoRA's convolutions of the host's class
        live, made = layer.live if layer else (), host_forward(self, hidden, *args, **kwargs)
        return layer.added(live, hidden, made) if live else made

    return seam.with_sidecar(host, forward, added_to)


class BesideLayer(SideCar):
    """All adapters of one host. `live` names those that act; without any, the host's output is its own."""

    kind: ClassVar[Kind]
    nowhere: ClassVar[str]  # what a model without such hosts is told, {} being its class
    other_param_names = ("r", "alpha", "scaling", "trigger", "waits")

    def __init__(self, host: nn.Module, belongings: object) -> None:
        super().__init__(host, belongings)
        self.waits: dict[str, Waits] = {}
        self._unmerged: tuple[nn.Parameter, ...] = ()  # the base's weight, while a merged one stands in its place

    # What each kind says of itself

    @classmethod
    def can_stand(cls, model: nn.Module, name: str) -> bool:
        """Whether a module of this name in a model is one that such terms can stand beside."""
        raise NotImplementedError

    @staticmethod
    def why_not(module: nn.Module) -> str | None:
        """Why no term can stand beside a module of such a name, or None if one can."""
        raise NotImplementedError

    @staticmethod
    def shapes(host: nn.Module, rank: int) -> dict[str, tuple[int, int]]:
        """Names and shapes of the factors of a term."""
        raise NotImplementedError

    def _new(self, name: str, into: int, outof: int, drawn: bool) -> nn.Linear:
        """A factor of a new adapter; with the last of them zero, what it adds is exactly zero."""
        raise NotImplementedError

    def term(self, name: str, hidden: torch.Tensor, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
        """What an adapter makes of the host's input, its ranks times a weight: like the host's output."""
        raise NotImplementedError

    def _laid(self, by_token: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Weights by row, token and rank, (B, N, R) or ones in place of them, as they weigh the ranks of a term."""
        raise NotImplementedError

    def _shares(self, live: list[str], made: torch.Tensor) -> dict[str, torch.Tensor]:
        """What part of each place which live adapter makes, (1 or B, N, 1), for those that act by place."""
        raise NotImplementedError

    def _change(self, name: str) -> torch.Tensor:
        """What an adapter adds, without its scale, as one weight like the host's."""
        raise NotImplementedError

    # Where

    @classmethod
    def hosts(cls, model: nn.Module) -> dict[str, nn.Module]:
        """The modules of a model that such terms stand beside, by name.

        Raises ValueError for a model that has none, and for a module of another kind.
        """
        own = bare(model)
        found = {name: plain(module) for name, module in plain_modules(own).items() if cls.can_stand(own, name)}
        if not found:
            raise ValueError(cls.nowhere.format(type(own).__name__))
        for name, host in found.items():
            reason = cls.why_not(host)
            if reason is None and not seam.is_adapted(host) and "forward" in vars(host):
                reason = _HOOKED
            if reason is not None:
                raise ValueError(f"Cannot adapt '{name}' ({type(host).__name__}): {reason}; set {cls.kind.setting}=0.")
        return found

    @classmethod
    def ranks_of(cls, model: nn.Module, config: ComcatConfig, names: Sequence[str]) -> dict[str, int]:
        """The rank beside each of these modules, of those that have any."""
        common, ranks = getattr(config, cls.kind.setting), getattr(config, cls.kind.ranks)
        if ranks is None:
            return {name: common for name in names if common and cls.can_stand(model, name)}
        return {name: ranks[name] for name in names if name in ranks}

    @classmethod
    def expected_shapes(cls, model: nn.Module, config: ComcatConfig) -> dict[str, tuple[int, int]]:
        """Names and shapes of the factors that an adapter of this configuration has beside a model's modules.

        Raises ValueError as `hosts` does, and for ranks of modules that are not there.
        """
        found, shapes = cls.hosts(model), {}
        unknown = sorted((getattr(config, cls.kind.ranks) or {}).keys() - found.keys())
        if unknown:
            raise ValueError(f"{cls.kind.ranks} name '{unknown[0]}', which is not among the {cls.kind.noun} here.")
        for name, rank in cls.ranks_of(model, config, list(found)).items():
            shapes |= {f"{name}.{factor}": shape for factor, shape in cls.shapes(found[name], rank).items()}
        return shapes

    # What PEFT and diffusers ask of a layer

    @property
    def weight(self) -> torch.Tensor:
        """The base's, (O, C, ...)."""
        return self._unmerged[0] if self._unmerged else self.owner.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's, (O,)."""
        return self.owner.bias

    @property
    def in_features(self) -> int:
        """Channels that come in."""
        return next(iter(self.shapes(self.owner, 1).values()))[1]

    @property
    def out_features(self) -> int:
        """Channels that go out."""
        return list(self.shapes(self.owner, 1).values())[-1][0]

    def update_layer(self, adapter_name: str, rank: int, config: ComcatConfig, waits: Waits = ()) -> None:
        """Create an adapter's factors on the base's device and in its precision; what they add is exactly zero.

        Raises ValueError if there is such an adapter.
        """
        self._refuse_twice(adapter_name)
        for name, (outof, into) in self.shapes(self.owner, rank).items():
            getattr(self, f"comcat_{name}")[adapter_name] = self._new(name, into, outof, config.init_weights)
        self.waits[adapter_name] = waits
        self._came(adapter_name, rank, config.alpha / config.r * rank, config.trigger)  # as strong as at attentions

    def _factor(self, kind: type[nn.Linear], into: int, outof: int, drawn: bool, zero: bool = False) -> nn.Linear:
        """A new factor, drawn at random or zero, or whose weights are yet to come."""
        made = factor_of(kind, into, outof, self.weight.device, self._numbers, drawn)
        if zero and drawn:
            nn.init.zeros_(made.weight)
        return made

    def held(self, name: str) -> list[nn.Linear]:
        """The factors of an adapter, D first and U last."""
        return [getattr(self, f"comcat_{factor}")[name] for factor in self.kind.factors]

    def factors(self, name: str) -> list[torch.Tensor]:
        """Their weights."""
        return [factor.weight for factor in self.held(name)]

    def _trained(self, name: str) -> bool:
        return torch.is_grad_enabled() and self.factors(name)[-1].requires_grad

    # What the host asks

    def added(self, live: list[str], hidden: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        """What the host made of its input, and what these adapters add to it."""
        shares = self._shares(live, made)
        for name in live:
            weight = self._weight(name, shares.get(name), made)
            if weight is not None:
                made = made + self.term(name, hidden, weight)
        return made

    def _weight(self, name: str, share: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | float | None:
        """The scale of each row, place and rank, see `_laid`, where it is not the same; None where it is nothing."""
        weight = self.scaling[name]
        if share is not None:  # B, N, 1
            if not share.any():
                return None
            weight = weight * self._laid(share.to(like), like)
        if self.trigger[name]:
            rows = shared_out(self.waits[name], self.trigger[name], lambda words: spoken(self.gate, words, False))
            weight = weight * self._laid(rows.to(like), like)  # B, 1, 1 or R
        return weight

    def _masked(self, live: list[str], tokens: int, stream: bool = False) -> Mapping[str, torch.Tensor]:
        """Shares of regions, (1, N, 1); see `Regions.shares`."""
        found = {} if self.regions is None else self.regions.shares(live, tokens, stream)
        return {name: share.unsqueeze(0) for name, share in found.items()}

    def _focused(
        self, live: list[str], places: torch.Tensor, masked: Mapping[str, torch.Tensor], stream: bool = False
    ) -> dict[str, torch.Tensor]:
        """The same where backgrounds are kept, too, of what is made of each place, (B, N, O)."""
        return dict(masked) if here.focus is None else here.focus.beside(live, places, masked, stream)

    # Merging

    def _write(self, acting: list[str], told: str, safe_merge: bool) -> None:
        """The weight with these adapters in it, exactly; raises ValueError if it is no plain one."""
        self._refuse_quantized()
        merged = self.weight + sum(self.scaling[name] * self._change(name).to(self.weight) for name in acting)
        if safe_merge:
            refuse_infinite([merged], told)
        self._unmerged = (self.weight,)
        self.owner.weight = nn.Parameter(merged, requires_grad=False)

    def _refuse_quantized(self) -> None:
        """Raise ValueError unless the base's weight is a plain one."""
        raise NotImplementedError

    def come_off(self) -> list[str]:
        """Leave the host as it was, to go on another (`go_on`). Returns the names of adapters that were merged."""
        merged = list(self.merged_adapters)
        self.unmerge()
        del self.owner._modules[seam.SIDECAR]
        self.owner.__class__ = type(self.owner).host
        return merged

    def go_on(self, host: nn.Module, merged: list[str]) -> None:
        """Stand beside this module from now on, with these adapters merged; the inverse of `come_off`."""
        self._owner = (host,)
        seam.attach(host, self, added_to)
        if merged:
            self.merge(adapter_names=merged)

    def unmerge(self) -> None:
        """Put the very weight back that `merge` replaced."""
        if self._unmerged:
            self.owner.weight, self._unmerged, self.merged_adapters = self._unmerged[0], (), []

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        # The base's weight is nobody's while a merged one stands in its place: it moves with the side-car.
        super()._apply(self._moving(fn) if hasattr(self.owner, "_diffusers_hook") else fn, recurse)
        for weight in self._unmerged:
            weight.data = fn(weight.data)
        return self

    @staticmethod
    def _moving(fn: Callable) -> Callable:
        """What moves tensors and leaves their precision: diffusers casts hosts layer by layer, with all in them."""
        return lambda tensor: tensor.to(fn(tensor[:0]).device)


def waits_of(config: ComcatConfig, name: str) -> list[tuple[tuple[str, ...], int]]:
    """For which words how many of the ranks beside a module wait; none where all wait for the same."""
    told = (getattr(config, kind.shares) or {} for kind in KINDS)
    shares = next((own[name] for own in told if name in own), ())
    return [(tuple(words), own) for (words, _), own in zip(config.trigger_ranks or (), shares, strict=False) if own]
