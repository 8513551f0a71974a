"""COMCAT among PEFT's tuners: which attentions get a side-car, and how it comes and goes."""

import re
from dataclasses import replace

import torch
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from torch import nn

from comcat_diffusion.adapters import guards, seam
from comcat_diffusion.adapters.belongings import Belongings
from comcat_diffusion.adapters.beside import BesideLayer, added_to, waits_of
from comcat_diffusion.adapters.beside_kinds import KINDS
from comcat_diffusion.adapters.beside_layers import layer_at, layers_of
from comcat_diffusion.adapters.config import ComcatConfig
from comcat_diffusion.adapters.layer import ComcatLayer, factor_shapes
from comcat_diffusion.adapters.merging import merge_all
from comcat_diffusion.adapters.parts import bare, plain_modules, plain_name
from comcat_diffusion.adapters.peft_type import COMCAT
from comcat_diffusion.adapters.sidecar import SideCar
from comcat_diffusion.adapters.tied import OTHER_TEXT, SHARED, TEXT, side_of
from comcat_diffusion.attentions import plain, style_of
from comcat_diffusion.families.known import family_of_model

# What two adapters must have in common for PEFT's hotswap_adapter, which copies weights in place and no more.
_KINDS = ("foldable", "tied", "cores")
_SAME_WHEN_SWAPPED = (
    "r",
    "alpha",
    "rank_pattern",
    "alpha_pattern",
    *_KINDS,
    "core_sets",
    *(name for kind in KINDS for name in kind.settings),
    "trigger",
    "trigger_ranks",
)


class ComcatModel(BaseTuner):
    """Adds a `ComcatLayer` beside every targeted attention of a model, in place, and a `BesideLayer` where asked to."""

    prefix = guards.PREFIX
    tuner_layer_cls = SideCar
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(
        self, model: nn.Module, peft_config: ComcatConfig | dict, adapter_name: str, *args: object, **kwargs: object
    ) -> None:
        try:
            if adapter_name in getattr(model, "peft_config", {}):
                raise ValueError(f"An adapter named '{adapter_name}' exists already: delete it or choose another name.")
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        except Exception:
            # diffusers and transformers note that there is an adapter before they add it.
            if not getattr(model, "peft_config", None) and hasattr(model, "_hf_peft_config_loaded"):
                model._hf_peft_config_loaded = False
            raise

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: object, state_dict: dict | None = None, **kwargs: object
    ) -> None:
        """As PEFT's, but all or nothing; only the names in `state_dict` are used, without the side-car's."""
        if state_dict is not None:
            own = f".{seam.SIDECAR}.{self.prefix}"
            state_dict = {key.replace(own, f".{self.prefix}"): value for key, value in state_dict.items()}
        self._tied: dict[str, dict[str, nn.Linear]] = {}  # by side: what the first attention has and the others share
        self._belongings = belongings_of(model)
        self._able: set[str] = set()  # names of attentions that were found to carry adapters
        try:
            refuse_name(adapter_name)
            super().inject_adapter(model, adapter_name, *args, state_dict=state_dict, **kwargs)
            self._note_sets(adapter_name)
            self._belongings.settle(bare(model))
        except Exception:
            withdraw(model, adapter_name)
            self.peft_config.pop(adapter_name, None)
            raise

    def _note_sets(self, adapter_name: str) -> None:
        """Have the configuration of new cores say what their directions go by; see adapters/cores.py."""
        config = self.peft_config[adapter_name]
        if config.cores and config.core_sets is None:
            layers = adapted_layers(self.model).items()
            told = {name: layer.sets[adapter_name] for name, layer in layers if adapter_name in layer.sets}
            told = {name: sets for name, sets in told.items() if sets.strip("0")}
            self.peft_config[adapter_name] = replace(config, core_sets=told)  # another base may get the one given

    def _prepare_model(self, peft_config: ComcatConfig, model: nn.Module) -> None:
        # PEFT creates layer by layer: refuse before the first, so that a refused model is left as it was.
        texts = set()  # widths of what a tied adapter's text side reads
        for layer in layers_of(peft_config):
            layer.hosts(model)
        for name, module in model.named_modules():
            if layer_at(bare(model), peft_config, plain_name(name)) is not None:
                continue
            if name and seam.SIDECAR not in name.split(".") and self._check_target_module_exists(peft_config, name):
                name, module = plain_name(name), bare(module)
                self._refuse(module, name)
                self._able.add(name)
                kind = {name: getattr(peft_config, name) for name in _KINDS}
                factor_shapes(module, _strength(peft_config, name)[0], **kind)  # which some have not of every kind
                if peft_config.tied and side_of(name, module) == TEXT:
                    rank, alpha = _strength(peft_config, name)
                    if (rank, alpha) != (peft_config.r, peft_config.alpha):
                        raise ValueError(OTHER_TEXT)
                    shapes = factor_shapes(module, rank, foldable=True, tied=True)
                    texts.add(tuple(shapes[factor] for factor in SHARED))
        if len(texts) > 1:
            raise ValueError(OTHER_TEXT)
        if layers_of(peft_config) and not self._able:
            raise ValueError(f"Target modules {peft_config.target_modules} are no attentions of this model: name some.")

    def _check_target_module_exists(self, peft_config: ComcatConfig, key: str) -> object:
        """As PEFT's, or what a term stands beside; a compiled block does not change the names of what is in it."""
        key, model = key.replace("_orig_mod.", ""), bare(self.model)
        layer = layer_at(model, peft_config, key)
        if layer is not None:
            return bool(layer.ranks_of(model, peft_config, [key]))
        return check_target_module_exists(peft_config, key)

    def _refuse(self, module: nn.Module, name: str) -> None:
        reason = _why_not(self.model, module, name)
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
        target, current_key = bare(target), plain_name(current_key)
        kind = layer_at(bare(self.model), peft_config, current_key)
        if kind is not None:
            self._put_beside(kind, plain(target), current_key, peft_config, adapter_name)
            return
        if current_key not in self._able:  # a state dict names it
            self._refuse(target, current_key)
        layer = target._modules.get(seam.SIDECAR)
        if not isinstance(layer, ComcatLayer):
            layer = ComcatLayer(target, self._belongings)
            seam.attach(target, layer)
        rank, alpha = _strength(peft_config, current_key)
        side = side_of(current_key, target) if peft_config.tied else None
        sets = None if peft_config.core_sets is None else peft_config.core_sets.get(current_key, "")
        layer.update_layer(adapter_name, rank, alpha, peft_config, self._tied.get(side, {}), sets)
        if peft_config.tied:
            self._tied[side] = {name: getattr(layer, f"comcat_{name}")[adapter_name] for name in SHARED}

    def _put_beside(
        self, kind: type[BesideLayer], host: nn.Module, name: str, peft_config: ComcatConfig, adapter_name: str
    ) -> None:
        """An adapter's term beside a module that is no attention."""
        layer = host._modules.get(seam.SIDECAR)
        if not isinstance(layer, kind):
            layer = kind(host, self._belongings)
            seam.attach(host, layer, added_to)
        rank = kind.ranks_of(bare(self.model), peft_config, [name])[name]
        layer.update_layer(adapter_name, rank, peft_config, waits_of(peft_config, name))

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
    ) -> None:
        """Add the weighted sum of adapters as one more, which does not act yet, as PEFT does for LoRAs.

        `cat` is exact, its rank is the sum of the ranks; `svd` is the best sum of a rank, by default that of the
        largest. Raises ValueError for adapters of different kinds or triggers, or with whole modules.
        """
        from comcat_diffusion.adapters.weighted import weighted_sum  # which stands on this file

        if adapter_name in self.peft_config:
            raise ValueError(f"An adapter named '{adapter_name}' exists already: delete it or choose another name.")
        if len(adapters) != len(weights):
            raise ValueError(f"{len(adapters)} adapters have {len(weights)} weights: give each adapter one.")
        pairs = list(zip(adapters, weights, strict=True))
        self.peft_config[adapter_name], values = weighted_sum(self.model, pairs, combination_type, svd_rank)
        self.inject_adapter(self.model, adapter_name)
        for name, factor in factors(self.model, adapter_name).items():
            factor.data = values[name].to(factor.device)
            factor.requires_grad_(False)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """As PEFT's; what cannot be merged is refused before anything is taken apart."""
        if merge:
            merge_all(list(side_cars(self.model).values()), safe_merge, adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """PEFT calls this when it unloads: of a side-car, so that the host gets its class back, or of others' layers.

        Modules that an adapter of ours trained whole come and go with the side-cars.
        """
        if isinstance(child, SideCar):
            seam.detach(parent)
        elif not (isinstance(child, ModulesToSaveWrapper) and child.modules_to_save.keys() & self.peft_config.keys()):
            super()._replace_module(parent, child_name, new_module, child)


def refuse_name(adapter_name: str) -> None:
    """Raise ValueError if PyTorch takes no module of this name, which an adapter's becomes."""
    try:
        nn.ModuleDict({adapter_name: nn.Identity()})
    except (KeyError, TypeError) as error:
        if isinstance(adapter_name, str) and "." in adapter_name:
            raise ValueError(
                f"An adapter's name is part of the names of its weights, so it cannot have a dot: call "
                f"'{adapter_name}' for instance '{adapter_name.replace('.', '_')}'."
            ) from error
        raise ValueError(f"PyTorch takes no adapter named {adapter_name!r}: choose another name.") from error


def withdraw(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter's factors out of a model again, and side-cars that nothing is left in."""
    for layer in side_cars(model).values():
        layer.delete_adapter(adapter_name)
        if not layer.r:
            seam.detach(layer.owner)


def _strength(config: ComcatConfig, key: str) -> tuple[int, float]:
    """The rank and the alpha of one module."""
    return of_pattern(config.rank_pattern, key, config.r), of_pattern(config.alpha_pattern, key, config.alpha)


def of_pattern(pattern: dict, key: str, default: float) -> float:
    """What a configuration's pattern says of one module (PEFT's rule: the end of the name), else the default."""
    return next((told for end, told in pattern.items() if re.fullmatch(rf"(.*\.)?({end})", key)), default)


def default_targets(model: nn.Module) -> list[str]:
    """Cross-attention where the model has it, else every attention that can be adapted, by the shortest names.

    Raises ValueError if there is none, naming why the model's attentions cannot be adapted.
    """
    modules = plain_modules(model)
    attentions = {name: m for name, m in modules.items() if style_of(m) is not None}
    able = {name: m for name, m in attentions.items() if _why_not(model, m, name) is None}
    if not able:
        reasons = {_why_not(model, m, name) for name, m in attentions.items()}
        reasons = reasons or {"it has no attention of a known style"}
        raise ValueError(f"{type(model).__name__} has no attention that can be adapted: {'; '.join(sorted(reasons))}.")
    chosen = {name for name, module in able.items() if seam.is_cross_attention(module)} or set(able)
    suffixes = {name.rpartition(".")[2] for name in chosen}
    if {name for name in modules if name.rpartition(".")[2] in suffixes} == chosen:
        return sorted(suffixes)
    return sorted(chosen)


def _why_not(model: nn.Module, module: nn.Module, name: str) -> str | None:
    """Why a module of this name in a model cannot carry an adapter, or None if it can."""
    return not_carried(model, module, name) or seam.why_not(module)


def not_carried(model: nn.Module, module: nn.Module, name: str) -> str | None:
    """Why an attention of this name is none that its family has adapters on, or None if it is."""
    carries = family_of_model(bare(model)).carries
    if carries and style_of(module) is not None and not re.fullmatch(carries, name):
        return "adapters of this family are in the blocks that see words and picture together"
    return None


def adapted_layers(model: nn.Module) -> dict[str, ComcatLayer]:
    """The side-cars of a model by the names of their attentions."""
    return {name: layer for name, layer in side_cars(model).items() if isinstance(layer, ComcatLayer)}


def side_cars(model: nn.Module) -> dict[str, SideCar]:
    """The side-cars of a model, of attentions and of other modules, by the names of their hosts."""
    end = "." + seam.SIDECAR
    found = {plain_name(n.removesuffix(end)): m for n, m in model.named_modules() if isinstance(m, SideCar)}
    return {name.removesuffix(".base_layer"): m for name, m in found.items()}  # beside other methods' adapters


def belongings_of(model: nn.Module) -> Belongings:
    """What the adapters of a model brought; of a model without adapters, nothing yet."""
    return next((layer.belongings for layer in adapted_layers(model).values()), Belongings())


def factors(model: nn.Module, adapter_name: str) -> dict[str, torch.nn.Parameter]:
    """One adapter's parameters, named ATTENTION.FACTOR (q_down, k_down, v_down, out_up; foldable: q_core, out_core).

    And CONVOLUTION.FACTOR (conv_down, conv_taps, conv_up), where it has terms beside these.
    """
    found = {}
    for host, layer in side_cars(model).items():
        for name in layer.adapter_layer_names:
            if adapter_name in getattr(layer, name):
                found[f"{host}.{name.removeprefix('comcat_')}"] = getattr(layer, name)[adapter_name].weight
    return found


def register() -> None:
    """Make the method known to PEFT; importing twice does no harm.

    An older PEFT, as Forge pins it, stays without: what reads files and attends in other programs asks nothing of it.
    """
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    try:
        from peft.utils import hotswap, register_peft_method
    except ImportError:
        return
    if COMCAT not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name="comcat", config_cls=ComcatConfig, model_cls=ComcatModel)
    hotswap.CONFIG_KEYS_TO_CHECK[COMCAT] = list(_SAME_WHEN_SWAPPED)
    guards.guard_lora_files()


register()
