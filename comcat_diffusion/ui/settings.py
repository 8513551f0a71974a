"""Settings as the page asks for them: what `comcat train` and `comcat generate` have, under labels of its own.

Help, choices and defaults are the commands'. What was left empty is not sent, and so is the default; a message that
names a flag is told with the label that the page shows for it.
"""

import re
from dataclasses import MISSING, fields
from typing import get_type_hints

from comcat_diffusion.config import fields_by_group, flag_of, value_type
from comcat_diffusion.generation.config import GenerateConfig
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.ui import sentences, texts

# What the page asks for in its own way, or decides itself: every run has a folder of its own.
OWN = (
    "instance_data_dir", "instance_prompt", "trigger", "class_word", "subjects", "pretrained_model_name_or_path",
    "output_dir", "name", "overwrite", "resume_from_checkpoint", "skip_broken", "adapter", "scale", "prompt", "compare",
    "num_images", "region", "merge", "lora", "reference_images", "as_", "report_to", "with_prior_preservation",
    "base_config",
)  # fmt: skip
# Those that name files of the machine: asked for only where the page may name any.
PATHS = ("class_data_dir", "validation_data_dir", "cache_dir", "init_adapter")
# (least, most, step) of what a slider is better for than a number alone. Beyond them a number can be typed.
SLIDERS = {
    "rank": (1, 64, 1), "max_train_steps": (50, 4000, 50), "unmasked_weight": (0, 1, 0.05),
    "noise_offset": (0, 0.2, 0.01),
    "ema_decay": (0.9, 0.999, 0.001), "validation_fraction": (0, 0.5, 0.05), "snr_gamma": (0.5, 20, 0.5),
    "num_validation_images": (1, 8, 1), "prior_loss_weight": (0.1, 2, 0.1), "num_inference_steps": (5, 100, 1),
    "guidance_scale": (1, 15, 0.5), "gradient_accumulation_steps": (1, 16, 1), "train_batch_size": (1, 16, 1),
    "num_vectors": (1, 8, 1), "repeats": (1, 20, 1), "batch_size": (1, 16, 1),
}  # fmt: skip
# Where the page asks for what a flag means, under a name of its own.
_FIELDS = {
    "instance_prompt": "word", "trigger": "word", "class_word": "what", "pretrained_model_name_or_path": "base",
    "as": "file", "adapter": "adapters",
}  # fmt: skip
_ABOUT = {"The prompt '": "prompt"}  # how sentences begin that are about another field than the first that they name
PAGE_DEFAULTS = {"num_validation_images": 2, "checkpoints_total_limit": 1}  # where the page's are others
_FLAG = re.compile(r"--(no-)?([a-z][a-z0-9_]*)")


class Refused(ValueError):
    """A sentence for whoever typed something in, and the field that it is about, if it is about one."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.message, self.field = message, field


def asked_of(kind: type, language: str, paths: bool = False) -> list[dict]:
    """The groups of settings of a command, each with its fields, as the page shows them."""
    hints, groups = get_type_hints(kind), []
    for title, items in fields_by_group(kind).items():
        shown = [_field(item, *value_type(hints[item.name]), language) for item in items if _is_asked(item.name, paths)]
        if shown:
            groups.append({"title": texts.group(title, language), "fields": shown})
    return groups


def _is_asked(name: str, paths: bool) -> bool:
    return name not in OWN and (paths or name not in PATHS)


def _field(item: object, kind: type, several: bool, language: str) -> dict:
    default = item.default if item.default is not MISSING else item.default_factory()
    return {
        "name": flag_of(item),
        "label": texts.label(flag_of(item), language),
        "help": texts.help_of(flag_of(item), item.metadata["help"], language),
        "kind": "several" if several else {bool: "switch", int: "whole", float: "number", str: "text"}[kind],
        "choices": list(item.metadata.get("choices") or ()),
        "default": PAGE_DEFAULTS.get(item.name, default),
        "slider": SLIDERS.get(item.name),
    }


def given(kind: type, values: object, paths: bool = False) -> dict[str, object]:
    """What was typed in, by the names of the settings of `kind`; what was left empty is left out.

    Raises Refused for a setting that is none of the page's, and for what is no value of its kind.
    """
    if not isinstance(values, dict):
        raise Refused("The settings are none.")
    hints, names = get_type_hints(kind), {flag_of(item): item.name for item in fields(kind)}
    found = {}
    for flag, value in values.items():
        name = names.get(flag)
        if name is None or not _is_asked(name, paths):
            raise Refused(f"The page has no setting {flag}.", flag)
        if value not in (None, "", []):
            found[name] = _typed(flag, value, *value_type(hints[name]))
    return found


def _typed(flag: str, value: object, kind: type, several: bool) -> object:
    if several and isinstance(value, list) and all(isinstance(part, str) for part in value):
        return [part.strip() for part in value if part.strip()]
    if not several and kind is float and type(value) in (int, float):
        return float(value)
    if not several and type(value) is kind:
        return value.strip() if kind is str else value
    wanted = {int: "a whole number", float: "a number", bool: "yes or no", str: "text"}[kind]
    raise Refused(f"--{flag} must be {'a list of texts' if several else wanted}.", flag)


def refused(error: Exception, language: str) -> Refused:
    """An error of a command as the page says it: in its language, with its labels, and the field that it is about."""
    if isinstance(error, OSError) and error.strerror and error.filename is None:
        said = error.strerror
    else:
        said = " ".join(str(error).split())
    known = {flag_of(item) for kind in (TrainConfig, GenerateConfig) for item in fields(kind)}
    flags = [name for _, name in _FLAG.findall(said) if name in known]
    about = [name for start, name in _ABOUT.items() if said.startswith(start)]
    field = (
        getattr(error, "field", None) or next(iter(about), None) or (_FIELDS.get(flags[0], flags[0]) if flags else None)
    )
    told = _FLAG.sub(lambda found: texts.quoted_label(found[2], language, known), sentences.said(said, language))
    return Refused(told, field)
