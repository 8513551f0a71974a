"""The same in Forge, whose models have ComfyUI's names: its conditionings carry text states and nothing of the prompt.

So prompts are remembered with the states that Forge's engine makes of them, and known again by the last state of each
row, which has read the whole prompt. A modifier of conditionings, Forge's own hook, puts what they say beside them.

Letters: B batch, M context tokens, E width of the text states, T triggers.
"""

import functools
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from comcat_diffusion.adapters.header import AdapterFileError, Header, read_adapter
from comcat_diffusion.comfy.guests import Guests, guests_of
from comcat_diffusion.comfy.load import load_unet
from comcat_diffusion.comfy.text import SAID, Said, ends_of

_REMEMBERED = 256  # prompts; the oldest are forgotten
_CHUNK = 77


class Memory:
    """The prompts that a model of Forge has encoded."""

    def __init__(self) -> None:
        self._said: OrderedDict[bytes, Said] = OrderedDict()  # by the last state, (E,)

    def remember(self, states: torch.Tensor, said: Sequence[Said]) -> None:
        """States (B, M, E) are of these prompts."""
        for row, one in zip(states, said, strict=True):
            key = _key(row)
            self._said[key] = one
            self._said.move_to_end(key)
        while len(self._said) > _REMEMBERED:
            self._said.popitem(last=False)

    def acts(self, states: torch.Tensor, guests: Guests) -> torch.Tensor:
        """(B, M, T + 2P): what these states say to adapters, see `Guests.told`.

        Raises ValueError for states that nobody has made here.
        """
        found = []
        for row in states:
            said = self._said.get(_key(row))
            if said is None:
                raise ValueError(
                    "COMCAT does not know the prompt of these text states, and an adapter waits for "
                    f"'{guests.triggers[0][0]}': another extension has changed them."
                )
            found.append(guests.told(said))
        return torch.stack(found).to(states)


def _key(row: torch.Tensor) -> bytes:
    return row[-1].detach().float().cpu().numpy().tobytes()


def listen(engine: object) -> Memory:
    """Remember what a `ForgeDiffusionEngine` encodes from now on; asked again, the same memory."""
    memory = getattr(engine, "comcat_memory", None)
    if memory is None:
        memory = engine.comcat_memory = Memory()
        engine.get_learned_conditioning = functools.partial(_encoding, engine, engine.get_learned_conditioning, memory)
    return memory


def _encoding(engine: object, encode: Callable, memory: Memory, prompts: Sequence[str]) -> object:
    made = encode(prompts)
    states = made["crossattn"] if isinstance(made, dict) else made  # B, M, E
    text = getattr(engine, "text_processing_engine", None) or engine.text_processing_engine_l
    said = []
    for prompt in (unicodedata.normalize("NFC", prompt) for prompt in prompts):
        chunks, _ = text.tokenize_line(prompt)
        ends = ends_of([[(token,) for token in chunk.tokens] for chunk in chunks], prompt, text.tokenizer, {})
        empty = ((0,) * _CHUNK,) * (states.shape[1] // _CHUNK - len(ends))  # beside a longer prompt of the batch
        said.append(Said(prompt, (*ends, *empty)))
    memory.remember(states, said)
    return made


def load(unet: object, memory: Memory, path: str | Path, strength: float = 1.0) -> tuple[object, Header]:
    """A clone of Forge's `UnetPatcher` with an adapter. Raises as `comfy.load.load` does, also for other parts."""
    header = read_adapter(path)
    others = sorted({*header.config} - {"unet"})
    if others or header.tokens:
        told = f"adapts {', '.join(others)}" if others else f"brings the word '{header.tokens[0]}'"
        raise AdapterFileError(f"{path} also {told}, which this extension cannot put in place: use ComfyUI's nodes.")
    made, header = load_unet(unet, path, strength)
    others = made.model_options.get("conditioning_modifiers", [])
    kept = [modifier for modifier in others if not isinstance(modifier, Telling)]
    made.model_options["conditioning_modifiers"] = [*kept, Telling(memory, guests_of(made))]
    return made, header


class Telling:
    """A modifier of Forge's conditionings: what they say goes along, row by row."""

    def __init__(self, memory: Memory, guests: Guests) -> None:
        self.memory, self.guests = memory, guests

    def __deepcopy__(self, memo: dict) -> "Telling":  # Forge copies its options with every clone
        return self

    def __call__(
        self, model: object, x: object, timestep: object, uncond: list | None, cond: list, *more: object
    ) -> tuple:
        for one in (*cond, *(uncond or ())) if self.guests.triggers else ():  # without guidance there is no other
            states = one["cross_attn"]
            kind = type(one["model_conds"]["c_crossattn"])
            one["model_conds"][SAID] = kind(self.memory.acts(states, self.guests))
        return model, x, timestep, uncond, cond, *more


def refuse(unet: object, error: Exception) -> object:
    """A clone whose sampling raises the error: Forge itself would log it and draw on as if nothing were wrong."""
    made = unet.clone()

    def modifier(*arguments: object) -> tuple:
        raise error

    made.model_options.setdefault("conditioning_modifiers", []).insert(0, modifier)
    return made
