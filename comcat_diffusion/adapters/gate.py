"""Which tokens an adapter acts on that waits for its trigger: those from the trigger on.

Text encoders read from left to right, so what stands before the trigger does not know of it, and a prompt without it
is the base's own: keys and values of its tokens are left alone, and with them the picture. An attention sees text
states, not words; a `Gate` knows which tokens the states were made of. A self-attention reads no text: there the
adapter acts on the pictures whose prompt has the trigger.

Letters: B batch, M context tokens, C channels.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from torch import nn
from transformers import CLIPTokenizer

_REMEMBERED = 4096  # prompts; the oldest are forgotten
_CHANNELS = 8  # of every token, by which text states are known again


class Gate:
    """What the text states of one pipeline say; the layers of its denoiser share the object."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self.tokenizer = tokenizer
        self._said: OrderedDict[bytes, torch.Tensor] = OrderedDict()  # text states of one prompt -> its ids, (M,)
        self._states: torch.Tensor | None = None  # what the denoiser was last given, (B, M, C)
        self._ids: torch.Tensor | None = None  # which tokens that is, (B, M); None: nobody told
        self._acts: dict[tuple[str, ...], torch.Tensor] = {}  # by trigger: on which of these tokens it lets act
        self._triggers: set[tuple[str, ...]] = set()  # those that were asked for

    def tell(self, states: torch.Tensor, prompts: Sequence[str]) -> None:
        """These very text states, (B, M, C), of B prompts come next. For those who hold the states themselves."""
        self._take(states, torch.stack([self._read(prompt, states.shape[1]) for prompt in prompts]))

    def remember(self, states: torch.Tensor, prompts: Sequence[str]) -> None:
        """Know the text states (B, M, C) of B prompts again, however a pipeline repeats and stacks them."""
        for key, prompt in zip(_keys(states), prompts, strict=True):
            self._said[key] = self._read(prompt, states.shape[1])
            self._said.move_to_end(key)
        while len(self._said) > _REMEMBERED:
            self._said.popitem(last=False)

    @torch.compiler.disable
    def look(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """A hook before the denoiser: which tokens its text states are."""
        states = args[2] if len(args) > 2 else kwargs["encoder_hidden_states"]
        if states is not self._states:  # a pipeline gives the same object at every step
            found = [self._said.get(key) for key in _keys(states)]
            self._take(states, None if any(ids is None for ids in found) else torch.stack(found))
        if self._ids is not None:  # before the attentions ask, so that a compiled denoiser need not stop for it
            for trigger in self._triggers - self._acts.keys():
                self._find(trigger)

    def tokens(self, trigger: tuple[str, ...]) -> torch.Tensor:
        """(B, M, 1): one from the first word of `trigger` on. Raises ValueError if nobody told what the states say."""
        if self._ids is None:
            raise ValueError(
                f"An adapter waits for '{trigger[0]}', but these text states are of no prompt that its pipeline has "
                "encoded: give the pipeline prompts, and call comcat_diffusion.listen on every other that shares them."
            )
        if trigger not in self._acts:
            self._find(trigger)
        return self._acts[trigger]

    @torch.compiler.disable
    def _find(self, trigger: tuple[str, ...]) -> None:
        called = sum(_starts(self._ids, self._word(word)) for word in trigger)
        self._acts[trigger] = (called.cumsum(1) > 0).unsqueeze(-1).to(self._states)
        self._triggers.add(trigger)

    def _take(self, states: torch.Tensor, ids: torch.Tensor | None) -> None:
        self._states, self._ids, self._acts = states, ids, {}

    def _read(self, prompt: str, length: int) -> torch.Tensor:
        """The ids of a prompt, (M,), as the text encoder was given them."""
        text = _written_out(prompt, self.tokenizer)
        return torch.tensor(self.tokenizer(text, padding="max_length", max_length=length, truncation=True).input_ids)

    def _word(self, word: str) -> list[int]:
        return self.tokenizer(_written_out(word, self.tokenizer), add_special_tokens=False).input_ids


def spoken(gate: Gate | None, trigger: tuple[str, ...], of_text: bool) -> torch.Tensor:
    """The tokens that an adapter acts on: of text, (B, M, 1); else whether on a picture at all, (B, 1, 1).

    Raises ValueError where there is no gate to tell.
    """
    if gate is None:
        raise ValueError(f"An adapter waits for '{trigger[0]}': call comcat_diffusion.listen(pipe) once it is there.")
    tokens = gate.tokens(trigger)
    return tokens if of_text else tokens.amax(dim=1, keepdim=True)


def _keys(states: torch.Tensor) -> list[bytes]:
    some = states[..., :_CHANNELS].detach().float().cpu().contiguous()
    return [one.numpy().tobytes() for one in some]


def _written_out(text: str, tokenizer: CLIPTokenizer) -> str:
    """A learned word of several embeddings as the several words that diffusers makes of it."""
    return TextualInversionLoaderMixin().maybe_convert_prompt(text, tokenizer)


def _starts(ids: torch.Tensor, word: list[int]) -> torch.Tensor:
    """Where a word begins: (B, M) ids -> (B, M), one or zero."""
    there = [ids.roll(-offset, dims=1) == wanted for offset, wanted in enumerate(word)]
    return torch.stack(there).all(dim=0).long()
