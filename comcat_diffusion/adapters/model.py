"""COMCAT among PEFT's tuners: which attentions get a side-car, and how it comes and goes."""

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from peft.utils.other import get_pattern_key
from torch import nn

from comcat_diffusion.adapters import seam
from comcat_diffusion.adapters.config import ComcatConfig
from comcat_diffusion.adapters.layer import ComcatLayer, factor_shapes
from comcat_diffusion.adapters.peft_type import COMCAT
from comcat_diffusion.adapters.tied import OTHER_TEXT, SHARED, TEXT, side_of
from comcat_diffusion.attentions import style_of


class ComcatModel(BaseTuner):
    """Adds a `ComcatLayer` beside every targeted attention of a model, in place."""

    prefix = "comcat_"
    tuner_layer_cls = ComcatLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: object, state_dict: dict | None = None, **kwargs: object
    ) -> None:
        """As PEFT's; only the names in `state_dict` are used there, and it takes them without the side-car's."""
        if state_dict is not None:
            own = f".{seam.SIDECAR}.{self.prefix}"
            state_dict = {key.replace(own, f".{self.prefix}"): value for key, value in state_dict.items()}
        self._tied: dict[str, dict[str, nn.Linear]] = {}  # by side: what the first attention has and the others share
        super().inject_adapter(model, adapter_name, *args, state_dict=state_dict, **kwargs)

    def _prepare_model(self, peft_config: ComcatConfig, model: nn.Module) -> None:
        # PEFT creates layer by layer: refuse before the first, so that a refused model is left as it was.
        texts = set()  # widths of what a tied adapter's text side reads
        for name, module in model.named_modules():
            if name and seam.SIDECAR not in name.split(".") and self._check_target_module_exists(peft_config, name):
                self._refuse(module, name)
                if peft_config.tied and side_of(name, module) == TEXT:
                    rank, alpha = _strength(peft_config, name)
                    if (rank, alpha) != (peft_config.r, peft_config.alpha):
                        raise ValueError(OTHER_TEXT)
                    shapes = factor_shapes(module, rank, foldable=True, tied=True)
                    texts.add(tuple(shapes[factor] for factor in SHARED))
        if len(texts) > 1:
            raise ValueError(OTHER_TEXT)

    def _refuse(self, module: nn.Module, name: str) -> None:
        reason = seam.why_not(module)
        if reason is None and not seam.is_adapted(module) and "forward" in vars(module):
            reason = "offloading hooks replaced its forward; attach adapters before offloading hooks are installed"
        if reason is not None:
            raise ValueError(f"Cannot adapt '{name}' ({type(module).__name__}): {reason}.")

    def _prepare_adapter_config(self, peft_config: ComcatConfig, model_config: dict) -> ComcatConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = default_targets(self.model)
        return peft_config

    def _create_and_replace(
        self,
        peft_config: ComcatConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        self._refuse(target, current_key)  # again, for modules that a state dict names
        layer = target._modules.get(seam.SIDECAR)
        if not isinstance(layer, ComcatLayer):
            layer = ComcatLayer(target)
            seam.attach(target, layer)
        rank, alpha = _strength(peft_config, current_key)
        side = side_of(current_key, target) if peft_config.tied else None
        layer.update_layer(adapter_name, rank, alpha, peft_config, self._tied.get(side, {}))
        if peft_config.tied:
            self._tied[side] = {name: getattr(layer, f"comcat_{name}")[adapter_name] for name in SHARED}

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT calls this when it unloads; what it unloads is a side-car, so the host gets its class back."""
        seam.detach(parent)

    def _post_injection_hook(self, model: nn.Module, config: ComcatConfig, adapter_name: str) -> None:
        # diffusers' layerwise casting to float8 knows LoRA's names and must skip ours as well.
        if hasattr(model, "_skip_layerwise_casting_patterns"):
            patterns = tuple(model._skip_layerwise_casting_patterns or ())
            if self.prefix not in patterns:
                model._skip_layerwise_casting_patterns = (*patterns, self.prefix)


def _strength(config: ComcatConfig, key: str) -> tuple[int, float]:
    """The rank and the alpha of one module."""
    return of_pattern(config.rank_pattern, key, config.r), of_pattern(config.alpha_pattern, key, config.alpha)


def of_pattern(pattern: dict, key: str, default: float) -> float:
    """What a configuration's pattern says of one module (PEFT's rule: the end of the name), else the default."""
    return pattern.get(get_pattern_key(pattern.keys(), key), default) if pattern else default


def default_targets(model: nn.Module) -> list[str]:
    """Cross-attention where the model has it, else every attention that can be adapted, by the shortest names.

    Raises ValueError if there is none, naming why the model's attentions cannot be adapted.
    """
    attentions = {name: m for name, m in model.named_modules() if style_of(m) is not None}
    able = {name: m for name, m in attentions.items() if seam.why_not(m) is None}
    if not able:
        reasons = {seam.why_not(module) for module in attentions.values()} or {"it has no attention of a known style"}
        raise ValueError(f"{type(model).__name__} has no attention that can be adapted: {'; '.join(sorted(reasons))}.")
    chosen = {name for name, module in able.items() if seam.is_cross_attention(module)} or set(able)
    suffixes = {name.rpartition(".")[2] for name in chosen}
    if {name for name, _ in model.named_modules() if name.rpartition(".")[2] in suffixes} == chosen:
        return sorted(suffixes)
    return sorted(chosen)


def adapted_layers(model: nn.Module) -> dict[str, ComcatLayer]:
    """The side-cars of a model by the names of their attentions."""
    end = "." + seam.SIDECAR
    return {n.removesuffix(end): m for n, m in model.named_modules() if isinstance(m, ComcatLayer)}


def factors(model: nn.Module, adapter_name: str) -> dict[str, torch.nn.Parameter]:
    """One adapter's parameters, named ATTENTION.FACTOR (q_down, k_down, v_down, out_up; foldable: q_core, out_core)."""
    found = {}
    for attention, layer in adapted_layers(model).items():
        for name in layer.adapter_layer_names:
            if adapter_name in getattr(layer, name):
                found[f"{attention}.{name.removeprefix('comcat_')}"] = getattr(layer, name)[adapter_name].weight
    return found


def register() -> None:
    """Make the method known to PEFT; importing twice does no harm."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if COMCAT not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name="comcat", config_cls=ComcatConfig, model_cls=ComcatModel)


register()
