"""Which side-cars stand beside which modules of a model that are no attentions."""

from torch import nn

from comcat_diffusion.adapters.beside import BesideLayer
from comcat_diffusion.adapters.config import ComcatConfig
from comcat_diffusion.adapters.convolved import ConvolvedLayer
from comcat_diffusion.adapters.fed import FedLayer

LAYERS: tuple[type[BesideLayer], ...] = (ConvolvedLayer, FedLayer)


def layers_of(config: ComcatConfig) -> list[type[BesideLayer]]:
    """The kinds of which an adapter of this configuration has any."""
    return [layer for layer in LAYERS if getattr(config, layer.kind.setting)]


def layer_at(model: nn.Module, config: ComcatConfig, name: str) -> type[BesideLayer] | None:
    """The kind of which an adapter can have a term beside a module of this name; None: it is not of such a name."""
    return next((layer for layer in layers_of(config) if layer.can_stand(model, name)), None)


def expected_shapes(model: nn.Module, config: ComcatConfig) -> dict[str, tuple[int, int]]:
    """Names and shapes of all factors beside such modules. Raises as `BesideLayer.expected_shapes` does."""
    shapes: dict[str, tuple[int, int]] = {}
    for layer in layers_of(config):
        shapes |= layer.expected_shapes(model, config)
    return shapes
