"""The two files that let transformers load a compressed folder, beside those of store.py.

A `config.json` of a model type of its own, and a modelling file of a few lines that imports pretrained.py. So
transformers asks for consent where it must, and a stock class finds no weights to fill up with random ones.
"""

import json

from torch import nn

from comcat_diffusion.compression.classifier import is_classifier

MODEL_TYPE, CONFIG, MODELLING = "comcat", "config.json", "modeling_comcat.py"
CODE = '''"""Loads the compressed model of this folder, with the package that has compressed it."""

try:
    from comcat_diffusion.compression.pretrained import CompressedConfig, CompressedModel  # noqa: F401
except ImportError as error:
    raise ImportError("This model was compressed by comcat-diffusion: pip install comcat-diffusion") from error
'''


def auto_class(model: nn.Module) -> str:
    """The name of transformers' class that loads a model like this one."""
    return "AutoModelForImageClassification" if is_classifier(model) else "AutoModel"


def files_for_transformers(model: nn.Module, config: dict[str, object]) -> dict[str, bytes]:
    """By name the files for a model of transformers; `config` is the dense model's."""
    module = MODELLING.removesuffix(".py")
    about = config | {
        "model_type": MODEL_TYPE,
        "architectures": [type(model).__name__],
        "auto_map": {"AutoConfig": f"{module}.CompressedConfig", auto_class(model): f"{module}.CompressedModel"},
    }
    return {CONFIG: (json.dumps(about, indent=1, sort_keys=True) + "\n").encode(), MODELLING: CODE.encode()}
