"""What a module carries that adapters add to: which adapters it has, how strong they are, and which of them act.

Such a side-car is a child of its host, in the shape that PEFT and diffusers expect of a layer; what it adds is its own
affair (layer.py beside attentions, beside.py beside other modules).
"""

import math
from collections.abc import Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from comcat_diffusion.adapters.belongings import Belongings
from comcat_diffusion.adapters.gate import Gate
from comcat_diffusion.adapters.merging import NoBase


def _refuse_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"The scale of an adapter must be a finite number, not {scale}.")


def factor_of(
    kind: type[nn.Linear], into: int, outof: int, device: torch.device, dtype: torch.dtype, drawn: bool = True
) -> nn.Linear:
    """A factor, its weights `drawn` at random or yet to come, which PyTorch's skip_init would draw first."""
    if drawn:
        return kind(into, outof, bias=False, device=device, dtype=dtype)
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    made.in_features, made.out_features = into, outof
    made.weight = nn.Parameter(torch.empty(outof, into, device=device, dtype=dtype))
    made.register_parameter("bias", None)
    return made


class SideCar(nn.Module, BaseTunerLayer):
    """All adapters of one host module. `live` names those that act; without any, the host runs untouched."""

    other_param_names = ("r", "alpha", "scaling", "trigger")

    def __init__(self, host: nn.Module, belongings: Belongings) -> None:
        super().__init__()
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.trigger: dict[str, tuple[str, ...]] = {}  # words that an adapter waits for; none: it acts everywhere
        self.gate: Gate | None = None  # which tells where these words stand, see adapters/gate.py
        self.merged_adapters: list[str] = []
        self._owner = (host,)  # in a tuple, so that the parent is not a submodule of its own child
        self.regions = None  # where in the picture which adapter acts, see adapters/regions.py
        self.belongings = belongings  # what adapters brought besides, see adapters/belongings.py
        belongings.sidecar_came()

    # What PEFT and diffusers ask of a layer

    @property
    def base_layer(self) -> nn.Module:
        """A stub: nothing is wrapped, so whoever unwraps adapters leaves the host as it was."""
        return NoBase()

    def get_base_layer(self) -> nn.Module:
        """See `base_layer`."""
        return NoBase()

    @property
    def lora_A(self) -> dict[str, nn.ModuleList]:
        """All factors by adapter: diffusers' `set_lora_device` moves what it finds under LoRA's two names."""
        held = [getattr(self, name) for name in self.adapter_layer_names]
        return {name: nn.ModuleList(by_name[name] for by_name in held if name in by_name) for name in self.r}

    lora_B = lora_A

    def _came(self, adapter_name: str, rank: int, alpha: float, trigger: Sequence[str] | None) -> None:
        """Note an adapter whose factors are in their places."""
        self.r[adapter_name], self.alpha[adapter_name] = rank, alpha
        self.trigger[adapter_name] = tuple(trigger or ())
        self.set_scale(adapter_name, 1.0)
        super().set_adapter(self.active_adapters)
        self.belongings.came(adapter_name)

    def _refuse_twice(self, adapter_name: str) -> None:
        """Raise ValueError if there is such an adapter."""
        if adapter_name in self.r:
            raise ValueError(f"An adapter named {adapter_name} exists already: delete it or choose another name.")

    def set_scale(self, adapter: str, scale: float) -> None:
        """Weight of an adapter relative to its trained strength alpha / r; other adapters keep theirs."""
        _refuse_scale(scale)
        if adapter in self.r:
            self.scaling[adapter] = scale * self.alpha[adapter] / self.r[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters (diffusers' `cross_attention_kwargs={"scale": ...}`)."""
        _refuse_scale(scale)
        for name in self._active():
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`; without a number, go back to the trained strength."""
        for name in self._active():
            if scale is None:
                self.set_scale(name, 1.0)
            else:
                self.scaling[name] /= scale

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's; modules that adapters train whole follow."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.belongings.activate(names, inference_mode)
        super().set_adapter(names, inference_mode=inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """As PEFT's; a merged adapter that is disabled is unmerged, as LoRA's layers do."""
        if not enabled:
            self.unmerge()
        super().enable_adapters(enabled)
        self.belongings.enable(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; what came with the adapter goes with the last layer that has it."""
        known = adapter_name in self.r
        super().delete_adapter(adapter_name)
        if known:
            self.belongings.left(adapter_name)
        if self.gate is not None and not any(self.trigger.values()):
            self.gate.leave(self)
            self.gate = None

    def leave(self) -> None:
        """The host has no side-car any more; merged weights stay."""
        for name in list(self.r):
            self.belongings.left(name, merged=name in self.merged_adapters)
        self.belongings.sidecar_left()

    # Merging

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters (default: the active ones) into the host's weights; its own are kept for `unmerge`.

        Warns, as PEFT's own layers do, if some are merged already. Raises ValueError if an adapter has a region or
        waits for its trigger, if the host's weights cannot be written, or, with `safe_merge`, would not be finite.
        """
        before = [name for name in self.merged_adapters if name in self.r]
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.r]
        if not names:
            return
        waiting = [name for name in names if self.trigger[name]]
        if waiting:
            raise ValueError(
                f"'{waiting[0]}' acts from its trigger on, which merged weights cannot tell: keep it live, or train it "
                "again with --everywhere."
            )
        if self.regions is not None:
            raise ValueError("Merged adapters act everywhere: take the regions away (set_regions(pipe, {})) first.")
        self._write([name for name in before + names if self.scaling[name] != 0], ", ".join(names), safe_merge)
        self.merged_adapters = before + names

    def _write(self, acting: list[str], told: str, safe_merge: bool) -> None:
        """Put weights with these adapters in the place of the host's. Raises ValueError, of what is `told`."""
        raise NotImplementedError

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Leave the base (or, with `merge`, the merged base) behind; the tuner then takes the side-car off."""
        if not merge:
            self.unmerge()
        elif not self.merged:  # the tuner has merged all layers before it takes the first apart
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return NoBase()

    # What the host asks

    @property
    def owner(self) -> nn.Module:
        """The module whose side-car this is."""
        return self._owner[0]

    @property
    def live(self) -> list[str]:
        """Adapters that act on the forward pass that this thread is in, without those whose trigger no prompt has."""
        if self._disable_adapters or self.merged_adapters:
            return []
        return [name for name in self._active() if self.scaling[name] != 0 and self._called(name)]

    def _called(self, name: str) -> bool:
        # What is trained stays in the graph, so that a step without the trigger has gradients, if of zero.
        if self.gate is None or not self.trigger[name] or self._trained(name):
            return True
        return self.gate.calls(self.trigger[name])

    def _active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.r]

    def _trained(self, name: str) -> bool:
        """Whether an adapter is being learned."""
        raise NotImplementedError

    @property
    def _numbers(self) -> torch.dtype:
        """The precision of new factors: the base's, unless that is one for storing alone."""
        dtype = self.weight.dtype
        return dtype if dtype.is_floating_point and dtype.itemsize > 1 else torch.float32
