"""The settings of a run: one dataclass makes the command line, the TOML file, the saved run and the test.

A field's metadata holds its help text; its name is the flag. Values are checked when the object is made, and messages
name the flag. Nothing here imports torch.
"""

import argparse
import math
import tomllib
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import tomli_w

SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
EMBEDDED = "embedded"  # the small base that comes with the package


def option(default: object, help: str, **more: object) -> typing.Any:
    """A dataclass field with its help text; `choices` may be given."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata={"help": help, **more})
    return field(default=default, metadata={"help": help, **more})


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a training run. Without any, it teaches the sample subject to the embedded base."""

    pretrained_model_name_or_path: str = option(
        EMBEDDED, "Base: hub id, diffusers folder, single .safetensors file, or 'embedded'."
    )
    revision: str | None = option(None, "Branch, tag or commit of a hub base.")
    variant: str | None = option(None, "Variant of the base's weight files, for instance fp16.")
    base_config: str | None = option(
        None, "For a single-file base: diffusers folder or cached hub id of its family. Default: found in the cache."
    )
    instance_data_dir: str | None = option(
        None, "Folder with the pictures of the subject. Default: the sample subject."
    )
    instance_prompt: str | None = option(None, "A prompt that names the subject, for instance 'a photo of sks dog'.")
    trigger: str | None = option(
        None, "The word in the prompt that stands for the subject. Default: found in the prompt."
    )
    output_dir: str = option("out", "Folder for the adapter, its settings, metrics and samples.")
    name: str | None = option(None, "Name of the adapter file. Default: the trigger and class words.")
    seed: int = option(0, "Seed of everything random; the same seed gives the same file on a CPU.")
    resolution: int | None = option(None, "Side in pixels of the training pictures. Default: the base's own.")
    center_crop: bool = option(True, "Crop the middle; otherwise four random places of every picture.")
    random_flip: bool = option(False, "Also learn from mirrored pictures.")
    rank: int = option(4, "Rank added to each head's two products.")
    alpha: float | None = option(None, "Strength: the term is scaled by alpha / rank. Default: rank.")
    foldable: bool = option(False, "Stay in the span of the base heads, so that the adapter folds into stock weights.")
    target_modules: list[str] | None = option(
        None, "Attentions to adapt, for instance attn1 attn2. Default: cross-attention."
    )
    init_adapter: str | None = option(None, "Go on from this adapter file (it must have the same rank and targets).")
    train_batch_size: int | None = option(None, "Pictures a step. Default: 1; on the embedded base, all up to 4.")
    gradient_accumulation_steps: int = option(1, "Batches whose gradients are added up before a step.")
    max_train_steps: int = option(400, "Number of optimizer steps.")
    learning_rate: float = option(1e-3, "Peak learning rate.")
    lr_scheduler: str = option("linear", "Course of the learning rate.", choices=SCHEDULES)
    lr_warmup_steps: int = option(0, "Steps over which the learning rate rises from zero.")
    adam_beta1: float = option(0.9, "AdamW: decay of the first moment.")
    adam_beta2: float = option(0.999, "AdamW: decay of the second moment.")
    adam_weight_decay: float = option(1e-2, "AdamW: weight decay.")
    adam_epsilon: float = option(1e-8, "AdamW: epsilon.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    snr_gamma: float | None = option(None, "Min-SNR weighting of the loss; 5.0 is usual. Default: none.")
    noise_offset: float = option(0.0, "Constant noise per channel; about 0.1 helps very dark or bright subjects.")
    mixed_precision: str = option("no", "Precision of the frozen base.", choices=("no", "fp16", "bf16"))
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass: less memory, more time.")
    save_precision: str = option("fp16", "Precision of the adapter file.", choices=("fp16", "bf16", "fp32"))
    report_to: list[str] = option([], "Trackers that Accelerate knows, for instance tensorboard.")

    def __post_init__(self) -> None:
        for flag in ("rank", "max_train_steps", "gradient_accumulation_steps"):
            _require(getattr(self, flag) >= 1, f"--{flag} must be at least 1, not {getattr(self, flag)}.")
        for flag in ("train_batch_size", "resolution"):
            value = getattr(self, flag)
            _require(value is None or value >= 1, f"--{flag} must be at least 1, not {value}.")
        for flag in ("learning_rate", "max_grad_norm", "adam_epsilon"):
            value = getattr(self, flag)
            _require(
                math.isfinite(value) and value > 0, f"--{flag} must be above 0, not {value}: nothing would be learned."
            )
        _require(
            0 <= self.lr_warmup_steps < self.max_train_steps,
            f"--lr_warmup_steps {self.lr_warmup_steps} must be shorter than --max_train_steps {self.max_train_steps}: "
            "the learning rate would never reach its peak.",
        )
        _require(self.snr_gamma is None or self.snr_gamma > 0, f"--snr_gamma must be above 0, not {self.snr_gamma}.")
        _require(self.alpha is None or math.isfinite(self.alpha), f"--alpha must be a finite number, not {self.alpha}.")
        own_pictures, own_prompt = self.instance_data_dir is not None, self.instance_prompt is not None
        _require(
            own_pictures or self.pretrained_model_name_or_path == EMBEDDED,
            "--instance_data_dir is missing: the sample subject belongs to the embedded base.",
        )
        _require(
            not own_pictures or own_prompt, "--instance_prompt is missing: say in words what --instance_data_dir shows."
        )
        if self.trigger and own_prompt:
            words = self.instance_prompt.lower().split()
            _require(
                self.trigger.lower() in words,
                f"--instance_prompt '{self.instance_prompt}' does not contain the trigger '{self.trigger}'.",
            )


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Settings of a generation run: prompts x seeds, with any number of adapters."""

    pretrained_model_name_or_path: str | None = option(None, "Base. Default: the one the first adapter was trained on.")
    revision: str | None = option(None, "Branch, tag or commit of a hub base.")
    variant: str | None = option(None, "Variant of the base's weight files, for instance fp16.")
    base_config: str | None = option(
        None, "For a single-file base: diffusers folder or cached hub id of its family. Default: found in the cache."
    )
    adapter: list[str] = option([], "Adapter files, each with a scale after a colon if wanted: dog.safetensors:0.8.")
    scale: float = option(1.0, "Scale of the adapters that name none.")
    any_weights: bool = option(False, "Allow a base of the same shape with other weights (a fine-tune).")
    prompt: list[str] = option([], "What to draw; {subject} stands for the first adapter's trigger and class.")
    negative_prompt: str | None = option(None, "What not to draw.")
    any_prompt: bool = option(False, "Allow prompts without the adapter's trigger.")
    num_images: int = option(4, "Pictures per prompt, from consecutive seeds.")
    seed: int = option(0, "First seed. The same seed gives the same picture, whatever the batch size.")
    num_inference_steps: int = option(25, "Denoising steps.")
    guidance_scale: float = option(5.0, "Classifier-free guidance; 1 turns it off.")
    scheduler: str | None = option(
        None, "Sampler class of diffusers, for instance EulerDiscreteScheduler. Default: the base's."
    )
    resolution: int | None = option(None, "Side of the pictures in pixels. Default: the base's own.")
    batch_size: int = option(4, "Pictures drawn at once.")
    merge: bool = option(False, "Merge the adapters into the weights before drawing.")
    compare: bool = option(False, "Also draw every picture without adapters, as the row above.")
    precision: str = option("fp32", "Precision of the base.", choices=("fp32", "fp16", "bf16"))
    device: str | None = option(None, "cpu, cuda, mps, ... Default: the fastest that is there.")
    output_dir: str = option("pictures", "Folder for the pictures and the contact sheet.")

    def __post_init__(self) -> None:
        _require(bool(self.prompt), "--prompt is missing: say what to draw.")
        _require(all(p.strip() for p in self.prompt), "--prompt is empty: say what to draw.")
        for flag in ("num_images", "num_inference_steps", "batch_size"):
            _require(getattr(self, flag) >= 1, f"--{flag} must be at least 1, not {getattr(self, flag)}.")
        _require(math.isfinite(self.scale), f"--scale must be a finite number, not {self.scale}.")
        _require(
            math.isfinite(self.guidance_scale), f"--guidance_scale must be a finite number, not {self.guidance_scale}."
        )
        _require(bool(self.adapter) or not self.merge, "--merge needs an --adapter.")
        _require(
            bool(self.adapter) or self.pretrained_model_name_or_path is not None,
            "--adapter is missing (or, to draw with a base alone, --pretrained_model_name_or_path).",
        )


Config = typing.TypeVar("Config", TrainConfig, GenerateConfig)


def add_arguments(parser: argparse.ArgumentParser, kind: type[Config]) -> None:
    """One flag per field, and --config for a TOML file that holds any of them."""
    parser.add_argument("--config", metavar="FILE", help="TOML file with any of these settings; flags win over it.")
    for item in fields(kind):
        parser.add_argument(f"--{item.name}", default=argparse.SUPPRESS, **_argument(item, typing.get_type_hints(kind)))


def _argument(item: object, hints: dict) -> dict:
    kind, several = _value_type(hints[item.name])
    default = item.default if item.default is not MISSING else item.default_factory()
    shown = "" if default in (None, [], False) or "Default" in item.metadata["help"] else f" Default: {default}."
    text = (item.metadata["help"] + shown).replace("%", "%%")
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction, "help": text}
    settings = {"type": kind, "help": text, "choices": item.metadata.get("choices"), "metavar": kind.__name__.upper()}
    if settings["choices"]:
        settings.pop("metavar")
    return settings | ({"nargs": "+", "action": "extend"} if several else {})


def _value_type(hint: object) -> tuple[type, bool]:
    """(type of one value, whether there may be several) of a field's annotation."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True
    return hint, False


def from_arguments(kind: type[Config], arguments: argparse.Namespace) -> Config:
    """Defaults, then the TOML file, then the flags."""
    given = {name: value for name, value in vars(arguments).items() if name in {item.name for item in fields(kind)}}
    stored = read_toml(kind, arguments.config) if arguments.config else {}
    return kind(**{**stored, **given})


def read_toml(kind: type[Config], path: str | Path) -> dict:
    """The settings in a TOML file. Raises ValueError for what is no TOML, an unknown key or a value of another type."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--config: there is no file {path}.")
    try:
        content = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} is not TOML: {error}.") from error
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(content) - set(hints))
    if unknown:
        raise ValueError(f"--config: {path} has unknown settings: {', '.join(unknown)}.")
    for name, value in content.items():
        content[name] = _checked(name, value, *_value_type(hints[name]), path)
    return content


def _checked(name: str, value: object, kind: type, several: bool, path: Path) -> object:
    if several and isinstance(value, list):
        return [_checked(name, part, kind, False, path) for part in value]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not several and type(value) is kind:
        return value
    wanted = f"a list of {kind.__name__}" if several else kind.__name__
    raise ValueError(f"--config: {path}: {name} must be {wanted}, not {value!r}.")


def to_toml(config: TrainConfig | GenerateConfig) -> str:
    """Every setting that is set, as TOML that `read_toml` takes back."""
    return tomli_w.dumps({name: value for name, value in asdict(config).items() if value is not None})
