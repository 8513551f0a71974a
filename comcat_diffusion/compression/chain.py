"""The blocks of a transformer, run one after the other on what is at hand, and the model run from one of them on.

What a block is called with is recorded once; the first batch is also run by the whole model, and a model whose blocks
do not give its own result when they are run like this is refused.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

import torch
from torch import nn

from comcat_diffusion.compression.calibrate import Batch, checked
from comcat_diffusion.compression.cost import Unit


class Reached(Exception):
    """What was looked for has been seen: the rest of the pass is not needed."""


@dataclass(frozen=True)
class Call:
    """How the blocks are called for one batch, and what that batch is for the whole model."""

    hidden: torch.Tensor  # B, N, C: what enters the first block
    others: tuple
    named: dict
    batch: dict[str, torch.Tensor]  # of the model


def blocks_of(model: nn.Module, units: Sequence[Unit]) -> tuple[str, nn.ModuleList] | None:
    """The one list of blocks that holds the units, by its path; None if there is none or there are several."""
    paths = {unit.module for unit in units if unit.part != "classifier"}
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(path.startswith(f"{name}.") for path in paths)
    ]
    outermost = [pair for pair in lists if not any(pair[0].startswith(f"{name}.") for name, _ in lists)]
    if len(outermost) != 1 or not all(path.startswith(f"{outermost[0][0]}.") for path in paths):
        return None
    return outermost[0]


@torch.no_grad()
def recorded(model: nn.Module, blocks: Sequence[nn.Module], batches: Iterable[Batch]) -> list[Call]:
    """The calls of the first block over all batches. Raises ValueError if the blocks are no chain."""
    calls: list[Call] = []
    for number, batch in enumerate(checked(model, batches)):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        first, last = _ends(model, blocks, inputs, whole=not number)
        calls.append(Call(*first, inputs))
        if not number:
            found = first[0]
            for block in blocks:
                found = run(block, calls[0], found)
            if not torch.allclose(found, last, rtol=1e-4, atol=1e-5 * float(last.abs().max())):
                raise _unfit(model, "are not run one after the other")
    return calls


def _ends(model: nn.Module, blocks: Sequence[nn.Module], inputs: dict, whole: bool) -> tuple:
    """What the first block is called with, and what the last one gives if the pass is run whole."""
    seen = {}

    def enter(_: nn.Module, arguments: tuple, named: dict) -> None:
        named = dict(named)
        hidden = arguments[0] if arguments else named.pop("hidden_states")
        seen["first"] = (hidden, arguments[1:], named)
        if not whole:
            raise Reached

    def leave(_: nn.Module, __: tuple, output: object) -> None:
        seen["last"] = output

    with ExitStack() as stack:
        stack.callback(blocks[0].register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(blocks[-1].register_forward_hook(leave).remove)
        with suppress(Reached):
            model(**inputs)
    if whole and not isinstance(seen.get("last"), torch.Tensor):
        raise _unfit(model, "do not hand on one tensor")
    return seen["first"], seen.get("last")


def _unfit(model: nn.Module, why: str) -> ValueError:
    return ValueError(
        f"The blocks of this {type(model).__name__} {why}, so what its output loses is not measured block by block: "
        "choose the method energy."
    )


def outputs(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What counts of a model's output: logits (B, K), or features (B, N, C)."""
    found = model(**batch)
    return found.logits if hasattr(found, "logits") else found[0]


def run(block: nn.Module, call: Call, hidden: torch.Tensor) -> torch.Tensor:
    """(B, N, C) -> (B, N, C)."""
    return block(hidden, *call.others, **call.named)


def inputs_to(block: nn.Module, layer: nn.Module, call: Call, hidden: torch.Tensor) -> torch.Tensor:
    """What a layer of the block is called with, the block being run no further."""
    seen = []

    def look(_: nn.Module, arguments: tuple) -> None:
        seen.append(arguments[0])
        raise Reached

    handle = layer.register_forward_pre_hook(look)
    try:
        with suppress(Reached):
            run(block, call, hidden)
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def watching(layers: dict[str, nn.Module]) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """(input, output) of these layers in the passes run meanwhile, by name."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def looks(name: str) -> Callable:
        return lambda _, arguments, output: seen.__setitem__(name, (arguments[0], output))

    handles = [layer.register_forward_hook(looks(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recalling(
    block: nn.Module, inner: nn.Module, calls: Sequence[Call], hidden: Sequence[torch.Tensor]
) -> Iterator[None]:
    """Meanwhile a module of the block is not run again on these very streams, but gives what it gives now."""
    known: dict[int, object] = {}
    stream = [0]

    def enter(_: nn.Module, arguments: tuple) -> None:
        stream[0] = id(arguments[0])

    def leave(_: nn.Module, __: tuple, output: object) -> None:
        known[stream[0]] = output
        raise Reached

    entered = block.register_forward_pre_hook(enter)
    try:
        left = inner.register_forward_hook(leave)
        try:
            for call, features in zip(calls, hidden, strict=True):
                with suppress(Reached):
                    run(block, call, features)
        finally:
            left.remove()
        inner.forward = lambda *_, **__: known[stream[0]]
        yield
    finally:
        entered.remove()
        inner.__dict__.pop("forward", None)


@contextmanager
def starting_at(blocks: Sequence[nn.Module], place: int, hidden: torch.Tensor) -> Iterator[None]:
    """Meanwhile the model skips the blocks before this one, which sees `hidden`."""
    skipped = blocks[:place]
    handle = blocks[place].register_forward_pre_hook(lambda _, arguments: (hidden, *arguments[1:]))
    try:
        for block in skipped:
            block.forward = lambda features, *_, **__: features
        yield
    finally:
        handle.remove()
        for block in skipped:
            del block.forward
