"""Writing the adapters of one attention into its projections, and taking them out again."""

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import nn

from comcat_diffusion.adapters import guards, seam
from comcat_diffusion.adapters.wide import WideHeads, merged_weights
from comcat_diffusion.attentions import Part


class NoBase(nn.Module):
    """Stands for the base layer that a side-car does not have; tools that unwrap adapters put it in our place."""

    weight = bias = None
    live = ()  # it stays where the attention looks for its side-car


class Merging:
    """How a `ComcatLayer` does what `SideCar.merge` asks. `_unmerged`, set there, holds what `unmerge` puts back."""

    def _write(self, acting: list[str], told: str, safe_merge: bool) -> None:
        """Wider projections with these adapters in the place of the base's own; see `SideCar.merge`.

        Raises ValueError if a projection is quantized or wrapped by another adapter, if the host has fused its
        projections, or if heads would not fit an IP-Adapter's.
        """
        with seam.bare_projections(self.owner, self.style):
            self._write_bare(acting, told, safe_merge)

    def _write_bare(self, acting: list[str], told: str, safe_merge: bool) -> None:
        attention, base = self.owner, self._base_held()
        wide = self._wide_heads(acting)
        self._refuse_to_merge(self.style.held(attention), wide)
        merged = self.style.joined(base, merged_weights(wide, *self.style.cut(base)))
        if safe_merge:
            refuse_infinite([linear.weight for linear in merged], told)
        self.unmerge()
        if wide.wide != self.width:
            guards.mark_wider(merged[0])
        self._unmerged = (base, merged, seam.set_projections(attention, self.style, merged, wide.wide))

    def unmerge(self) -> None:
        """Put the very Linears back that `merge` replaced. Raises ValueError if another adapter has wrapped these."""
        if self._unmerged is None:
            return
        base, merged, width_attributes = self._unmerged
        now = self.style.held(self.owner)
        if any(here is not ours for here, ours in zip(now, merged, strict=True)):
            raise ValueError("Cannot unmerge: another adapter wraps the merged projections. Unload that one first.")
        with seam.bare_projections(self.owner, self.style):
            seam.set_projections(self.owner, self.style, base, width_attributes)
        self._unmerged, self.merged_adapters = None, []

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        # The base's Linears are nobody's children while merged ones stand in their place: they move with the side-car.
        super()._apply(fn, recurse)
        if self._unmerged is not None:
            for linear in self._unmerged[0]:
                linear._apply(fn, recurse)
        return self

    def _base_held(self) -> tuple[nn.Module, ...]:
        return self.style.held(self.owner) if self._unmerged is None else self._unmerged[0]

    def _base_projections(self) -> tuple[nn.Module | Part, ...]:
        return self.style.cut(self._base_held())

    def _refuse_to_merge(self, projections: tuple[nn.Module, ...], wide: WideHeads) -> None:
        if getattr(self.owner, "fused_projections", False):
            raise ValueError("Call unfuse_qkv_projections() before merging: the fused copy would not see the merge.")
        if wide.wide != self.width and (self.style.joint or seam.is_normed(self.owner)):
            raise ValueError(
                "A free adapter widens heads, which a joint attention, or one that normalizes queries and keys, cannot "
                "be by its weights alone: keep it live, or train a foldable one, which merges exactly."
            )
        if wide.wide != self.width and hasattr(getattr(self.owner, "processor", None), "to_k_ip"):
            raise ValueError(
                "A free adapter cannot be merged beside an IP-Adapter, whose keys and values would be narrower than "
                "the heads: keep it live, where both work, or merge a foldable one."
            )
        for projection in projections:
            if type(projection) is not nn.Linear or not projection.weight.dtype.is_floating_point:
                kind = type(projection).__name__
                raise ValueError(
                    f"Cannot merge into a projection of type {kind}: it is quantized or wrapped by another adapter. "
                    "Keep the COMCAT adapter live, or fuse and unload the other one first."
                )


def refuse_infinite(weights: Sequence[torch.Tensor], told: str) -> None:
    """Raise ValueError if a merged weight is not finite."""
    if not all(weight.isfinite().all() for weight in weights):
        raise ValueError(f"Merging {told} would write NaN or infinity; nothing changed.")


def merge_all(layers: Sequence[Merging], safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """Merge in all of these layers or, if one refuses (ValueError), in none."""
    before = [list(layer.merged_adapters) for layer in layers]
    try:
        for layer in layers:
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
    except ValueError:
        for layer, names in zip(layers, before, strict=True):
            if layer.merged_adapters != names:
                layer.unmerge()
                if names:
                    layer.merge(adapter_names=names)
        raise
