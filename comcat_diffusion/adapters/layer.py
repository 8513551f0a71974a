"""The side-car of one attention: the factors of every adapter, by name, in the shape that PEFT expects of a layer."""

import torch
from torch import nn

from comcat_diffusion.adapters import seam
from comcat_diffusion.adapters.belongings import Belongings
from comcat_diffusion.adapters.call import here
from comcat_diffusion.adapters.config import ComcatConfig
from comcat_diffusion.adapters.cores import MIXES, Core, Ends, FixedEnds, first_sets
from comcat_diffusion.adapters.gate import spoken
from comcat_diffusion.adapters.merging import Merging
from comcat_diffusion.adapters.sidecar import SideCar, factor_of
from comcat_diffusion.adapters.tied import OTHER_TEXT
from comcat_diffusion.adapters.wide import Foldable, Free, WideHeads, shared_out
from comcat_diffusion.attentions import style_of


def factor_shapes(
    attention: nn.Module, rank: int, foldable: bool = False, tied: bool = False, cores: bool = False
) -> dict[str, tuple[int, int]]:
    """Name -> (in, out) features of the factors that an adapter of this rank and kind has on an attention.

    Raises ValueError where there is no such kind.
    """
    layer = attention._modules.get(seam.SIDECAR)
    if isinstance(layer, ComcatLayer):  # which knows the base's own projections while merged ones stand in their place
        return _shapes(layer._plain(), layer.heads, rank, foldable, tied, cores)
    style = style_of(attention)
    plain = [seam.plain(projection) for projection in style.projections(attention)]
    return _shapes(plain, style.head_count(attention), rank, foldable, tied, cores)


def _shapes(
    projections: list[nn.Linear], heads: int, rank: int, foldable: bool, tied: bool, cores: bool
) -> dict[str, tuple[int, int]]:
    q, k, v, out = projections
    across, width = heads * rank, k.out_features // heads
    if cores:
        if rank > min(width, k.in_features, v.in_features):
            raise ValueError(f"Cores of rank {rank} do not fit into heads of width {width}: choose a smaller rank.")
        return dict.fromkeys(MIXES, (rank, across))
    text = rank if tied else across
    context = {"k_down": (k.in_features, text), "v_down": (v.in_features, text)}
    if foldable:
        return context | {"q_core": (width, across), "out_core": (width, across)}
    if out is None:
        raise ValueError(
            "A free adapter widens heads, and in its blocks of one stream this base projects what they give outside of "
            "the attention: choose another kind, or other targets."
        )
    return context | {"q_down": (q.in_features, across), "out_up": (across, out.out_features)}


class ComcatLayer(Merging, SideCar):
    """All adapters of one attention. `live` names those that act; without any, the host runs untouched."""

    adapter_layer_names = (
        "comcat_q_down",
        "comcat_k_down",
        "comcat_v_down",
        "comcat_out_up",
        "comcat_q_core",
        "comcat_out_core",
        "comcat_k_mix",
        "comcat_v_mix",
    )
    other_param_names = ("r", "alpha", "scaling", "trigger", "waits", "sets")

    def __init__(self, attention: nn.Module, belongings: Belongings) -> None:
        super().__init__(attention, belongings)
        self.waits: dict[str, list[tuple[tuple[str, ...], int]]] = {}  # for which words how many of its ranks do
        self.ends = FixedEnds()  # of adapters that are cores, see adapters/cores.py
        self.sets: dict[str, str] = {}  # what fixed vectors they go by
        self.shared: set[str] = set()  # names of weights that another attention, which came first, holds as well
        self.style = style_of(attention)
        self._unmerged: tuple | None = None  # the base's Linears and width, while merged ones stand in their place

    # What PEFT and diffusers ask of a layer

    @property
    def weight(self) -> torch.Tensor:
        """The base's query weight, (H*D, C)."""
        return self._plain()[0].weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's query bias, (H*D,)."""
        return self._plain()[0].bias

    @property
    def in_features(self) -> int:
        """Channels of what the attention reads."""
        return self._plain()[0].in_features

    @property
    def out_features(self) -> int:
        """Channels of what the attention gives."""
        return (self._plain()[3] or self._plain()[2]).out_features

    def update_layer(
        self,
        adapter_name: str,
        rank: int,
        alpha: float,
        config: ComcatConfig,
        tied: dict[str, nn.Linear],
        sets: str | None = None,
    ) -> None:
        """Create an adapter's factors on the base's device and in its precision; what they add is exactly zero.

        `tied` holds the factors, by name, that the adapter has on another attention already and shares with this one;
        `sets` is what heads of cores go by, None: what suits these weights, "": the first.
        Raises ValueError if there is such an adapter, or if what is to be shared does not fit.
        """
        self._refuse_twice(adapter_name)
        device, dtype = self.weight.device, self._numbers
        # One factor of each product is zero, the other random: step 0 is the base, and gradients flow.
        zero = ("q_core", "out_core") if config.tied else ("k_down", "out_up", "out_core", *MIXES)
        if config.cores:
            self._go_by(adapter_name, rank, sets)
        for name, (into, outof) in factor_shapes(self.owner, rank, config.foldable, config.tied, config.cores).items():
            if name in tied and (tied[name].in_features, tied[name].out_features) != (into, outof):
                raise ValueError(OTHER_TEXT)
            factor = tied.get(name) or factor_of(nn.Linear, into, outof, device, dtype, config.init_weights)
            if name in zero and config.init_weights:
                nn.init.zeros_(factor.weight)
            getattr(self, f"comcat_{name}")[adapter_name] = factor
            if name in tied:
                self.shared.add(f"comcat_{name}.{adapter_name}.weight")
        self.waits[adapter_name] = [(tuple(words), count) for words, count in config.trigger_ranks or ()]
        self._came(adapter_name, rank, alpha, config.trigger)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; what came with the adapter goes with the last layer that has it."""
        super().delete_adapter(adapter_name)
        self.shared = {name for name in self.shared if name.split(".")[1] != adapter_name}

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, torch.Tensor]:
        """As PyTorch's, without what another attention's has already: so PEFT's files of tied adapters are small."""
        found = super().state_dict(*args, **kwargs)
        for name in self.shared:
            found.pop(kwargs.get("prefix", "") + name, None)
        return found

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        for name in self.shared:  # loaded with the attention that has it
            state_dict.setdefault(prefix + name, self.get_parameter(name).data)
        super()._load_from_state_dict(state_dict, prefix, *args)

    # What the seam asks

    @property
    def heads(self) -> int:
        """Number of heads H."""
        return self.style.head_count(self.owner)

    @property
    def width(self) -> int:
        """Width D of the base's heads, merged or not."""
        return self._keys.out_features // self.heads

    def _trained(self, name: str) -> bool:
        held = next(by_name[name] for by_name in (self.comcat_k_down, self.comcat_k_mix) if name in by_name)
        return torch.is_grad_enabled() and held.weight.requires_grad

    def shares(self, live: list[str], args: tuple, kwargs: dict[str, object]) -> dict[str, torch.Tensor] | None:
        """What part of each place's output which live adapter makes, for those that act by place; None: nobody does.

        (N, 1) or (B, N, 1) by adapter; `args` and `kwargs` are those that the attention is called with.
        """
        shares = None
        if self.regions is not None:
            hidden = args[0] if args else kwargs["hidden_states"]  # B, N, C
            shares = self.regions.shares(live, hidden.shape[1], self.style.stream)
        return shares if here.focus is None else here.focus.shares(self, live, args, kwargs, shares or {})

    def view(self, names: list[str], tokens: int) -> seam.View:
        """The attention as its own forward should see it while these adapters act, on so many tokens."""
        wide = self._wide_heads(names, tokens)
        if here.texts is not None and seam.is_cross_attention(self.owner) and not self.style.joint:
            here.texts.cover(self, wide, names)
        return seam.view_of(self.owner, self.style, wide)

    @property
    def _keys(self) -> nn.Linear:
        return seam.plain(self._base_projections()[1])

    def _plain(self) -> list[nn.Linear]:
        return [seam.plain(projection) for projection in self._base_projections()]

    def _wide_heads(self, names: list[str], tokens: int = 0) -> WideHeads:
        adapters = [self._factors(name, tokens) for name in names]
        owner, device = self.owner, self._keys.weight.device.type
        normed, rotated = seam.is_normed(owner), seam.is_rotated(owner)
        return WideHeads(self.heads, self.width, adapters, self.style.diffusers, device, normed, rotated)

    def _factors(self, name: str, length: int) -> Free | Foldable:
        scale, tokens = self.scaling[name], None
        if self.trigger[name]:
            crossed = seam.is_cross_attention(self.owner)
            stream = length if self.style.stream else 0
            tokens = shared_out(
                self.waits[name], self.trigger[name], lambda words: spoken(self.gate, words, crossed, stream)
            )
        if name in self.comcat_out_up:
            k, v = self.comcat_k_down[name], self.comcat_v_down[name]
            return Free(scale, tokens, self.comcat_q_down[name], k, v, self.comcat_out_up[name])
        return Foldable(scale, tokens, *self.folded(name))

    def folded(self, name: str) -> tuple[nn.Linear, nn.Linear, nn.Linear, nn.Linear]:
        """The factors of a foldable adapter, or what is like them: k_down, v_down, q_core, out_core."""
        if name not in self.comcat_k_mix:
            return tuple(
                getattr(self, f"comcat_{factor}")[name] for factor in ("k_down", "v_down", "q_core", "out_core")
            )
        k, v = self._ends_of(name)
        return k, v, Core(self.comcat_k_mix[name], k), Core(self.comcat_v_mix[name], v)

    def _go_by(self, name: str, rank: int, sets: str | None) -> None:
        """Note what sets an adapter's directions go by, and what the weights are that these are of."""
        _, k, v, _ = self._plain()
        if sets is None and not k.weight.is_meta:
            sets = self.ends.chosen(k.weight, v.weight, self.heads, rank)
        self.sets[name] = sets or first_sets(self.heads)
        if not k.weight.is_meta:
            self.ends.of(k.weight, v.weight, self.heads, rank, self.sets[name])

    def _ends_of(self, name: str) -> tuple[Ends, Ends]:
        _, k, v, _ = self._plain()
        return self.ends.of(k.weight, v.weight, self.heads, self.r[name], self.sets[name])
