"""A compressed model as a folder: `compressed.safetensors` and `plan.json`, which together need nothing else.

The names are not those that `from_pretrained` looks for: it would fill what it does not find with random weights. Of a
model of transformers there are two files besides, by which it loads the folder where its user allows it (modelling.py).
Loading is strict and gives the model back bit for bit; writing is atomic, `plan.json` comes last with the other's hash.
"""

import hashlib
import importlib
import json
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

from comcat_diffusion import atomic
from comcat_diffusion.compression import modules
from comcat_diffusion.compression.cost import Unit, linears_of
from comcat_diffusion.compression.decompose import put
from comcat_diffusion.compression.factor import Product
from comcat_diffusion.compression.hosts import mlp_of
from comcat_diffusion.compression.modelling import files_for_transformers
from comcat_diffusion.compression.plan import Plan, refuse_bad_weights, refuse_other_model
from comcat_diffusion.compression.planning import count, units_of

TENSORS, PLAN = "compressed.safetensors", "plan.json"
_BASES = {"transformers": "PreTrainedModel", "diffusers": "ModelMixin"}


def save_compressed(model: nn.Module, plan: Plan, folder: str | Path) -> None:
    """Write a compressed model and its plan. Same inputs, same bytes.

    Raises ValueError if the folder holds a result already, if the model is not the plan's, or if a weight is no number.
    """
    folder = Path(folder)
    if (folder / PLAN).exists():
        raise ValueError(f"{folder} holds a compressed model already; choose another folder, or delete that one.")
    if count(model) != plan.parameters_after:
        raise ValueError(
            f"This model has {count(model):,} parameters, its plan {plan.parameters_after:,}: it is another's."
        )
    refuse_bad_weights(model)
    described = _described(model)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = safetensors.torch.save(tensors)
    whole = {"plan": json.loads(plan.to_json()), "model": described, "sha256": hashlib.sha256(content).hexdigest()}
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(folder / TENSORS, content)
    if described["library"] == "transformers":
        for name, text in files_for_transformers(model, described["config"]).items():
            atomic.write_bytes(folder / name, text)
    atomic.write_bytes(folder / PLAN, (json.dumps(whole, indent=1) + "\n").encode())


def load_compressed(folder: str | Path) -> tuple[nn.Module, Plan]:
    """The model, in evaluation mode on the CPU, and its plan: the inverse of `save_compressed`.

    Raises ValueError if the folder holds no compressed model, or one that is damaged or was edited.
    """
    folder = Path(folder)
    described, plan, tensors = _read(folder)
    with torch.random.fork_rng(devices=[]):  # the random weights that are replaced below come from nobody's seed
        model = _stock(described, folder).eval()
    units = units_of(model, plan)
    refuse_other_model(plan, model, units)
    with torch.no_grad():
        for unit in units:
            if plan.widths[unit.name] is not None:
                _put_blank(model, unit, plan.widths[unit.name])
    _refuse_other_tensors(tensors, model.state_dict(), folder / TENSORS)
    model.load_state_dict(tensors, assign=True)
    return model, plan


def _described(model: nn.Module) -> dict[str, object]:
    """What builds the dense model's architecture again."""
    for library, base in _BASES.items():
        if isinstance(model, getattr(importlib.import_module(library), base)):
            break
    else:
        raise ValueError(f"A {type(model).__name__} is no model of transformers or diffusers, so it cannot be saved.")
    text = model.config.to_json_string(use_diff=False) if library == "transformers" else model.to_json_string()
    config = {name: value for name, value in json.loads(text).items() if name != "_name_or_path"}
    attention = getattr(model.config, "_attn_implementation", None)
    return {"library": library, "class": type(model).__name__, "config": config, "attention": attention}


def _stock(described: dict, folder: Path) -> nn.Module:
    """The dense architecture with random weights, of a class that one of the two libraries defines."""
    library = described["library"]
    module = importlib.import_module(library) if library in _BASES else None
    found = getattr(module, str(described["class"]), None)
    if module is None or not isinstance(found, type) or not issubclass(found, getattr(module, _BASES[library])):
        raise ValueError(f"{folder / PLAN} asks for a {described['class']} of {library}, which is no model known here.")
    if library == "diffusers":
        return found.from_config(described["config"])
    config = found.config_class.from_dict(described["config"])
    config._attn_implementation = described["attention"]
    return found(config)


def _read(folder: Path) -> tuple[dict, Plan, dict[str, torch.Tensor]]:
    if not (folder / PLAN).is_file():
        raise ValueError(f"{folder} holds no compressed model: it has no {PLAN}.")
    try:
        whole = json.loads((folder / PLAN).read_text("utf-8"))
        described, sha256, text = whole["model"], whole["sha256"], json.dumps(whole["plan"])
        described["library"], described["class"], described["config"], described["attention"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / PLAN} does not make sense ({error!r}); get the folder again.") from error
    plan = Plan.from_json(text)
    if not (folder / TENSORS).is_file():
        raise ValueError(f"{folder} lacks {TENSORS}; get the folder again.")
    content = (folder / TENSORS).read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{folder / TENSORS} is not the file that {PLAN} belongs to: it is damaged or was edited.")
    try:
        return described, plan, safetensors.torch.load(content)
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS} is damaged ({error}); get the folder again.") from error


def _put_blank(model: nn.Module, unit: Unit, width: int) -> None:
    """Layers of the unit's shapes in place, for the tensors of the file to take theirs."""
    if unit.product != "neurons":
        put(model, unit, _blank_products(unit, model), width)
        return
    mlp = mlp_of(model.get_submodule(unit.module))
    into = [_zeros(width, layer.in_features, layer.bias is not None) for layer in mlp.into]
    out = _zeros(mlp.out.out_features, width, mlp.out.bias is not None)
    modules.replace_neurons(model.get_submodule(unit.module), into, out)


def _zeros(outof: int, into: int, biased: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.zeros(outof, into), torch.zeros(outof) if biased else None


def _blank_products(unit: Unit, model: nn.Module) -> tuple[Product, ...]:
    """Products of the unit's shapes without values, for the tensors of the file to take their place."""
    layers, made = linears_of(model, unit), []
    if unit.product == "linear":
        made.append(_blank(unit, layers[0].in_features, layers[0].out_features, layers[0].bias is not None))
    if unit.product in ("qk", "both"):
        made.append(_blank(unit, layers[0].in_features, layers[1].in_features, layers[0].bias is not None))
    if unit.product in ("vo", "both"):
        v, out = layers[-2:]
        made.append(_blank(unit, v.in_features, out.out_features, v.bias is not None or out.bias is not None))
    return tuple(made)


def _blank(unit: Unit, into: int, outof: int, biased: bool) -> Product:
    heads, rank = unit.heads, unit.full
    constant = torch.zeros(heads, outof) if biased else None
    return Product(
        torch.zeros(heads, into, rank), torch.zeros(heads, rank), torch.zeros(heads, rank, outof), None, constant
    )


def _refuse_other_tensors(tensors: dict, expected: dict, path: Path) -> None:
    misshapen = [n for n in sorted(tensors.keys() & expected.keys()) if tensors[n].shape != expected[n].shape]
    bad = [n for n, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()]
    for problem, names in (
        ("lacks", sorted(expected.keys() - tensors.keys())),
        ("has unknown tensors", sorted(tensors.keys() - expected.keys())),
        ("has misshapen tensors", misshapen),
        ("holds NaN or infinity in", bad),
    ):
        if names:
            rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{path} {problem}: {', '.join(names[:3])}{rest}; the file is damaged or was edited.")
