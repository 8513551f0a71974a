"""Which parameters are learned: the factors of the adapters and the embeddings of a new token, with their rates."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from torch import nn
from torch.nn.functional import pad

from comcat_diffusion.adapters import tied
from comcat_diffusion.adapters.beside import BesideLayer
from comcat_diffusion.adapters.beside_kinds import split
from comcat_diffusion.adapters.beside_rows import Beside
from comcat_diffusion.adapters.config import ComcatConfig
from comcat_diffusion.adapters.convolved import ConvolvedLayer
from comcat_diffusion.adapters.model import adapted_layers, default_targets, factors, side_cars
from comcat_diffusion.adapters.packing import COLUMNS, PRODUCT
from comcat_diffusion.adapters.parts import denoiser, plain_modules
from comcat_diffusion.adapters.placing import add_adapter
from comcat_diffusion.adapters.store import TOKEN
from comcat_diffusion.adapters.terms import CONTEXT, Contents, Term
from comcat_diffusion.adapters.token import (
    LearnedToken,
    put_token,
    start_vectors,
    token_ids,
    word_vectors,
    words_of,
)
from comcat_diffusion.adapters.trigger import listen
from comcat_diffusion.attentions import style_of
from comcat_diffusion.families.known import family_of, family_of_model
from comcat_diffusion.training import initial
from comcat_diffusion.training.config import AdapterShape, TrainConfig
from comcat_diffusion.training.learner import Learner
from comcat_diffusion.words import Subject

_UP = (math.inf, 0)  # behind the way down
ADAPTER = "subject"  # name of the adapter inside the models while it is trained


def prepare(config: TrainConfig, pipe: DiffusionPipeline, subjects: Sequence[Subject]) -> None:
    """Freeze the base and add what is learned to it; the adapters are exactly nothing yet. Raises ValueError."""
    if config.init_adapter:
        initial.load(config, pipe, ADAPTER, targets(config, denoiser(pipe)))
    _refuse_unknown_targets(config, pipe)
    for word in new_words(config, subjects):
        if word not in words_of(pipe):  # it may have come with the adapter that is learned on
            put_token(pipe, word, _start(config, pipe, word, subjects))
    encoders = family_of(pipe).encoders(pipe)
    for model in (denoiser(pipe), *encoders.values()):
        model.requires_grad_(False)
    if not config.init_adapter:
        with torch.random.fork_rng():  # PEFT draws the random factors from the global generator
            torch.manual_seed(config.seed)
            model = denoiser(pipe)
            add_adapter(model, adapter_config(config, model, awaited(config, subjects)), ADAPTER)
            for encoder in encoders.values() if config.train_text_encoder else ():
                shape = adapter_config(config, encoder, ()).at_attentions()
                encoder.add_adapter(replace(shape, target_modules=None), ADAPTER)
        listen(pipe)
    for model in (denoiser(pipe), *encoders.values()):
        for factor in factors(model, ADAPTER).values():
            factor.requires_grad_(True)


def _refuse_unknown_targets(config: TrainConfig, pipe: DiffusionPipeline) -> None:
    """Raise ValueError for a target that is the end of no attention's name."""
    names = [name for name, module in denoiser(pipe).named_modules() if style_of(module) is not None]
    for target in config.target_modules or []:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            there = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            noun = family_of(pipe).noun
            raise ValueError(f"--target_modules {target}: the {noun} has no such attention; it has {there}.")


def new_words(config: TrainConfig, subjects: Sequence[Subject]) -> list[str]:
    """The words whose embeddings are learned: a token of one's own, or the names of the subjects.

    Raises ValueError for a name without a class, of which nothing is known to start from.
    """
    if config.placeholder_token:
        return [config.placeholder_token]
    if not config.learn_name:
        return []
    for subject in subjects:
        if not subject.class_word:
            raise ValueError(
                f"--learn_name starts from the class, and none stands after '{subject.trigger}': write something like "
                f"'a photo of {subject.trigger} dog'."
            )
    return [subject.phrase for subject in subjects]


def _start(
    config: TrainConfig, pipe: DiffusionPipeline, word: str, subjects: Sequence[Subject]
) -> dict[str, torch.Tensor]:
    """What a new word means before anything is learned: the word that it is to start from, or its subject's class."""
    if word == config.placeholder_token:
        return start_vectors(pipe, config.initializer_token, config.num_vectors)
    return word_vectors(pipe, next(subject.class_word for subject in subjects if subject.phrase == word))


def awaited(config: TrainConfig, subjects: Sequence[Subject]) -> list[str]:
    """The words from which on an adapter is to act, any of them: new ones and triggers."""
    return list(dict.fromkeys([*new_words(config, subjects), *(subject.trigger for subject in subjects)]))


def adapter_config(shape: AdapterShape, model: nn.Module, words: Sequence[str]) -> ComcatConfig:
    """A model's adapter, which waits for any of the words unless it is to act everywhere."""
    beside = convolutions(shape, model)
    usual = family_of_model(model).usual_targets(shape.kind, bool(beside or shape.feed_forwards))
    return ComcatConfig(
        r=shape.rank,
        alpha=shape.alpha,
        foldable=shape.kind != "free",
        tied=shape.kind == "tied",
        cores=shape.kind == "cores",
        convolutions=beside,
        convolution_ranks=_ranks_beside(shape, model, beside),
        feed_forwards=shape.feed_forwards,
        trigger=None if shape.everywhere else list(words),
        target_modules=targets(shape, model) or usual,
    )


def convolutions(shape: AdapterShape, model: nn.Module) -> int:
    """The rank of the terms beside a model's convolutions: what is asked for, or what its family usually has."""
    if shape.convolutions is not None or shape.up_blocks_only:
        return shape.convolutions or 0
    return family_of_model(model).usual_convolutions(shape.kind)


def targets(shape: AdapterShape, model: nn.Module) -> list[str] | str | None:
    """Names of the attentions to adapt, or a pattern of those in the way up; None if nothing is asked for.

    Adapters in the way up alone spare a step the way back through the rest of the U-Net.
    """
    if not shape.up_blocks_only:
        return shape.target_modules
    names = map(re.escape, shape.target_modules or default_targets(model))
    return rf"up_blocks\..*\.({'|'.join(names)})"


def _ranks_beside(shape: AdapterShape, model: nn.Module, rank: int) -> dict[str, int] | None:
    """The rank beside the second convolution of each residual block after the first attention, or of the way up alone.

    Half as many ranks beside both bring no more, in slower steps; before the first attention they bring nothing, and
    what is learned at attentions needs no way back through there. docs/log.md, 2026-11-30.
    """
    if not rank:
        return None
    names = [name for name in plain_modules(model) if name.startswith("up_blocks.") or not shape.up_blocks_only]
    first = min((_down(name) for name in names if ".attentions." in name), default=_UP)
    seconds = (name for name in names if name.endswith(".conv2") and ConvolvedLayer.can_stand(model, name))
    return {name: rank for name in seconds if _down(name) == _UP or _down(name) > first}


def _down(name: str) -> tuple[float, int]:
    """Where in the way down it is: the block, and the place there, at which a residual block precedes an attention."""
    found = re.match(r"down_blocks\.(\d+)\.\w+\.(\d+)\.", name)
    return (int(found[1]), int(found[2])) if found else _UP


def add_tokens(pipe: DiffusionPipeline, learner: Learner) -> None:
    """Make the embeddings of the pipeline's new words parameters of the learner."""
    learner.words = words_of(pipe)
    learner.tokens = nn.ModuleDict(
        {
            name: LearnedToken(encoder, [number for word in learner.words for number in token_ids(pipe, name, word)])
            for name, encoder in family_of(pipe).encoders(pipe).items()
            if learner.words
        }
    )


def embeddings(pipe: DiffusionPipeline, learner: Learner) -> dict[str, dict[str, torch.Tensor]]:
    """The embeddings that are learned, (n, E), by word and by encoder."""
    found: dict[str, dict[str, torch.Tensor]] = {word: {} for word in learner.words}
    for name, tokens in learner.tokens.items():
        counts = [len(token_ids(pipe, name, word)) for word in learner.words]
        for word, vectors in zip(learner.words, tokens.vectors.detach().split(counts), strict=True):
            found[word][name] = vectors
    return found


def learned(learner: Learner) -> dict[str, nn.Parameter]:
    """Every parameter that is trained, by name."""
    return {name: p for name, p in learner.named_parameters() if p.requires_grad}


def groups(config: TrainConfig, learner: Learner) -> list[dict]:
    """AdamW's parameter groups: denoiser, text encoders and token, each at its own rate."""
    rates = {
        "denoiser": config.learning_rate,
        "encoders": config.text_encoder_lr or config.learning_rate / 10,
        "tokens": config.token_lr or config.learning_rate,
    }
    found = {}
    for name, parameter in learned(learner).items():
        found.setdefault(name.partition(".")[0], []).append(parameter)
    return [{"params": parameters, "lr": rates[part]} for part, parameters in found.items()]


@torch.no_grad()
def finish(learner: Learner, ema: "Ema", precision: torch.dtype) -> None:
    """Leave in the models what the file will hold: the running mean, where there is one, in the file's precision."""
    if ema.mean:
        ema.mean.copy_to(ema.parameters)
    for parameter in learned(learner).values():
        parameter.copy_(parameter.to(precision))


@torch.no_grad()
def take(learner: Learner, ema: "Ema", contents: Contents) -> None:
    """Put what an adapter file holds in the place of what is learned. Ranks that the file lacks become zeros.

    Such a rank then stays zero, as each of its two factors gets its gradient through the other one.
    """
    terms = {term.key: term for term in contents.terms}
    parts = {learner.family.part: learner.denoiser, **learner.encoders}
    for part, model in parts.items():
        _take_beside({term.key: term for term in contents.beside}, part, model)
        if any(term.tied for term in contents.terms if term.part == part):
            _take_tied(terms, part, model)
            continue
        for attention, layer in adapted_layers(model).items():
            own = {name: getattr(layer, f"comcat_{name}") for name in PRODUCT}
            term = terms.get(f"{part}.{attention}")
            for name, factor in ((name, found[ADAPTER].weight) for name, found in own.items() if ADAPTER in found):
                factor.zero_()
                if term is not None:
                    gain = term.scale / layer.scaling[ADAPTER] if name in CONTEXT else 1.0
                    rows = factor.T if name == COLUMNS else factor
                    given = term.factors[name].T if name == COLUMNS else term.factors[name]
                    heads = rows.unflatten(0, (layer.heads, -1))  # H, R, C
                    heads[:, : term.rank] = gain * given.unflatten(0, (layer.heads, -1)).to(rows)
    for name, token in learner.tokens.items():
        token.vectors.copy_(torch.cat([contents.tokens[f"{TOKEN}.{n}.{name}"] for n in range(len(learner.words))]))
    if ema.mean:
        for shadow, parameter in zip(ema.mean.shadow_params, ema.parameters, strict=True):
            shadow.copy_(parameter)


def _take_beside(terms: Mapping[str, Beside], part: str, model: nn.Module) -> None:
    for name, layer in side_cars(model).items():
        if not isinstance(layer, BesideLayer) or ADAPTER not in layer.r:
            continue
        *lower, up = layer.factors(ADAPTER)
        for factor in (*lower, up):
            factor.zero_()
        term = terms.get(f"{part}.{name}")
        if term is not None:
            for factor, given in zip(lower, term.lower, strict=True):
                factor[: len(given)] = given
            up[:, : len(term.down)] = term.scale / layer.scaling[ADAPTER] * term.up


def _take_tied(terms: Mapping[str, Term], part: str, model: nn.Module) -> None:
    places, layers, whole = split(factors(model, ADAPTER))[0], adapted_layers(model), {}
    sides = tied.sides_of(model, places)
    for side, attentions in sides.items():
        term, layer = terms[f"{part}.{side}"], layers[attentions[0]]
        for name, factor in term.factors.items():
            gain = term.scale / layer.scaling[ADAPTER] if name in CONTEXT else 1.0
            whole[f"{side}.{name}"] = pad(gain * factor, (0, 0, 0, layer.r[ADAPTER] - term.rank))
    for name, factor in tied.scattered(whole, {name: place.shape for name, place in places.items()}, sides).items():
        places[name].copy_(factor)


class Ema:
    """diffusers' running mean of everything learned, or, without a decay, nothing at all."""

    def __init__(self, parameters: list[nn.Parameter], decay: float | None):
        self.parameters = parameters
        self.mean = EMAModel(parameters, decay=decay) if decay else None

    def step(self) -> None:
        """Take the parameters as they are into the mean."""
        if self.mean:
            self.mean.step(self.parameters)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The mean in the place of the parameters, for as long as the block lasts."""
        if self.mean:
            self.mean.store(self.parameters)
            self.mean.copy_to(self.parameters)
        try:
            yield
        finally:
            if self.mean:
                self.mean.restore(self.parameters)

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps."""
        if not self.mean:
            return {}
        shadows = {f"shadow.{index}": p for index, p in enumerate(self.mean.shadow_params)}
        return shadows | {"steps": torch.tensor(self.mean.optimization_step)}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take back what `tensors` gave."""
        if self.mean:
            for index, shadow in enumerate(self.mean.shadow_params):
                shadow.copy_(tensors[f"shadow.{index}"])
            self.mean.optimization_step = int(tensors["steps"])
