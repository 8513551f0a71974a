"""Ways to teach the embedded base a subject: what each trains, at which rates it is tried, and what its file holds."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from peft import IA3Config, LoKrConfig, LoraConfig, PeftConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from benchmarks.variants import ATTENTIONS, RECIPE_RATE, RECIPE_SCHEDULE, recipe_lora
from comcat_diffusion import bases
from comcat_diffusion.adapters.config import ComcatConfig
from comcat_diffusion.adapters.model import adapted_layers
from comcat_diffusion.adapters.store import save_adapter
from comcat_diffusion.adapters.token import put_token, start_vectors
from comcat_diffusion.adapters.trigger import listen
from comcat_diffusion.attentions import DIFFUSERS
from comcat_diffusion.training.config import KINDS
from comcat_diffusion.training.learned import add_tokens
from comcat_diffusion.training.learner import Learner
from recipe.subject import TRIGGER

NAME = "subject"  # of every adapter here
SELF_AND_CROSS = ["attn1", "attn2"]
TOKEN = "<subject>"  # the word that Textual Inversion learns, in the place of trigger and class


@dataclass(frozen=True)
class Method:
    """One way to learn a subject. `start` attaches what is trained; `write` saves it as its users would."""

    rates: tuple[float, ...]  # tried on other subjects than those reported; a single one is the method's own
    start: Callable[[DiffusionPipeline], None]
    write: Callable[[DiffusionPipeline, Path], None]
    schedule: str = "linear"  # of the rate, as diffusers calls it
    token: bool = False  # whether it learns a word (Textual Inversion)
    teacher: bool = False  # whether the frozen base teaches it to keep the class (`comcat train --prior teacher`)
    mixed_precision: str = "no"  # of the training, as Accelerate calls it; drawn is in float32
    command: bool = False  # whether it is `comcat train` itself, with its outlines and its budget of bytes

    def learner(self, pipe: DiffusionPipeline, prompts: list[str], class_word: str) -> Learner:
        """The frozen base with what is trained in it; only that requires gradients."""
        for model in (pipe.unet, pipe.text_encoder):
            model.requires_grad_(False)
        if self.token:
            put_token(pipe, TOKEN, start_vectors(pipe, class_word, 1))
            pipe.text_encoder.requires_grad_(False)  # a resized table is a new one
        self.start(pipe)
        learner = Learner(pipe, prompts, train_text=self.token)
        if self.token:
            add_tokens(pipe, learner)
            pipe.comcat_learned = learner.tokens["text_encoder"]
        return learner


def _authors(pipe: DiffusionPipeline) -> None:
    """The paper's code: rank 2 on self- and cross-attention, all four factors random, so step 0 is not the base."""
    pipe.unet.add_adapter(ComcatConfig(r=2, target_modules=SELF_AND_CROSS), NAME)
    for layer in adapted_layers(pipe.unet).values():
        for factor in (layer.comcat_k_down, layer.comcat_out_up):
            factor[NAME].reset_parameters()


def _write_comcat(pipe: DiffusionPipeline, path: Path) -> None:
    save_adapter(pipe, path, NAME, bases.EMBEDDED, dtype=torch.float16)


def _adapter(config: PeftConfig) -> Callable[[DiffusionPipeline], None]:
    def start(pipe: DiffusionPipeline) -> None:
        pipe.unet.add_adapter(config, NAME)
        listen(pipe)

    return start


def _write_peft(pipe: DiffusionPipeline, path: Path) -> None:
    tensors = get_peft_model_state_dict(pipe.unet, adapter_name=NAME)
    save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, path)


def _copy(pipe: DiffusionPipeline, path: Path) -> None:
    shutil.copyfile(pipe.comcat_file, path)


def _weights(where: str) -> Callable[[DiffusionPipeline], None]:
    """Train the U-Net's own weights whose names end in one of `where`; without any, all."""

    def start(pipe: DiffusionPipeline) -> None:
        for name, parameter in pipe.unet.named_parameters():
            parameter.requires_grad_(not where or name.endswith(tuple(where.split())))

    return start


def _write_weights(pipe: DiffusionPipeline, path: Path) -> None:
    trained = {name: p.detach().half() for name, p in pipe.unet.named_parameters() if p.requires_grad}
    save_file(trained, path)


def _write_token(pipe: DiffusionPipeline, path: Path) -> None:
    save_file({TOKEN: pipe.comcat_learned.vectors.detach().half()}, path)


def _lora(rank: int, rates: tuple[float, ...]) -> Method:
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=DIFFUSERS.names)
    return Method(rates, _adapter(config), _write_peft)


def _ours(rates: tuple[float, ...], teacher: bool = False, mixed_precision: str = "no", **config: object) -> Method:
    start = _adapter(ComcatConfig(**config))
    return Method(rates, start, _write_comcat, teacher=teacher, mixed_precision=mixed_precision)


CROSS, WAITING = {"target_modules": ["attn2"]}, {"trigger": [TRIGGER]}
TIED = {**CROSS, "foldable": True, "tied": True}
LATE = {**TIED, "target_modules": ATTENTIONS["up"]}
BOTH = {**TIED, "target_modules": SELF_AND_CROSS}
OWN = {kind: (rate,) for kind, rate in KINDS.items()}  # what `comcat train` takes, so that no choice favours ours
MIDDLE, HIGH, LOW = (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 3e-2), (5e-5, 2e-4, 8e-4)
METHODS = {
    "comcat train": Method(OWN["free"], lambda pipe: None, _copy, command=True),
    "COMCAT tied, rank 2, from the trigger on": _ours(OWN["tied"], r=2, **TIED, **WAITING),
    "COMCAT tied, rank 4, from the trigger on": _ours(OWN["tied"], r=4, **TIED, **WAITING),
    "COMCAT tied, rank 8, from the trigger on": _ours(OWN["tied"], r=8, **TIED, **WAITING),
    "COMCAT tied, rank 8, from the trigger on, in bfloat16": _ours(
        OWN["tied"], r=8, **TIED, **WAITING, mixed_precision="bf16"
    ),
    "COMCAT tied, rank 8, way up, from the trigger on": _ours(OWN["tied"], r=8, **LATE, **WAITING),
    "COMCAT tied, rank 4, rank 2 of self-attention, from the trigger on": _ours(
        OWN["tied"], r=4, rank_pattern={"attn1": 2}, **BOTH, **WAITING
    ),
    "COMCAT tied, rank 8, rank 4 of self-attention, from the trigger on": _ours(
        OWN["tied"], r=8, rank_pattern={"attn1": 4}, **BOTH, **WAITING
    ),
    "COMCAT foldable, rank 4, cross, from the trigger on": _ours(
        OWN["foldable"], r=4, **CROSS, **WAITING, foldable=True
    ),
    "COMCAT free, rank 8, cross, from the trigger on": _ours(OWN["free"], r=8, **CROSS, **WAITING),
    "COMCAT tied, rank 4": _ours(OWN["tied"], r=4, **TIED),
    "COMCAT foldable, rank 4": _ours(OWN["foldable"], r=4, target_modules=SELF_AND_CROSS, foldable=True),
    "COMCAT free, rank 1": _ours(OWN["free"], r=1, target_modules=SELF_AND_CROSS),
    "COMCAT free, rank 4, cross": _ours(OWN["free"], r=4, target_modules=["attn2"]),
    "COMCAT free, rank 4, cross, teacher": _ours(OWN["free"], True, r=4, target_modules=["attn2"]),
    "COMCAT as the authors train it": Method((2.5e-3,), _authors, _write_comcat),
    "LoRA, rank 1": _lora(1, MIDDLE),
    "LoRA, rank 4": _lora(4, MIDDLE),
    "LoRA, rank 16": _lora(16, MIDDLE),
    "LoRA, rank 4, by diffusers' recipe": Method(
        (RECIPE_RATE,), _adapter(recipe_lora()), _write_peft, schedule=RECIPE_SCHEDULE
    ),
    "LoKr, rank 4": Method(MIDDLE, _adapter(LoKrConfig(r=4, alpha=4, target_modules=DIFFUSERS.names)), _write_peft),
    "IA3": Method(
        HIGH, _adapter(IA3Config(target_modules=DIFFUSERS.names, feedforward_modules=[DIFFUSERS.out])), _write_peft
    ),
    "DreamBooth, the whole U-Net": Method(LOW, _weights(""), _write_weights),
    "Custom Diffusion's keys and values": Method(LOW, _weights("attn2.to_k.weight attn2.to_v.weight"), _write_weights),
    "Textual Inversion": Method(HIGH, lambda pipe: None, _write_token, token=True),
}  # fmt: skip
