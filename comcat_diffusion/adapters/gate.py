"""Which tokens an adapter acts on that waits for its trigger: those from the trigger on.

Text encoders read from left to right, so what stands before the trigger does not know of it, and a prompt without it
is the base's own: the adapter is then not there at all. An attention sees text states, not words; a `Gate` knows which
prompt the states were made of. A self-attention reads no text: there the adapter acts on the pictures whose prompt has
the trigger.

Letters: B batch, M context tokens, E width of the text states. Of some families states are a list, one (M, E) for each
prompt.
"""

import weakref
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from comcat_diffusion.adapters.call import Follower, carry, given, here
from comcat_diffusion.adapters.texts import Chunks, Said, States, texts_of
from comcat_diffusion.families.known import family_of_model


class Heard:
    """What the text states of one forward pass say; None where nobody told."""

    def __init__(self, gate: "Gate", states: States, said: Sequence[Said | Chunks] | None) -> None:
        self.gate, self.said = gate, said
        self.called: dict[tuple[str, ...], bool] = {}  # whether any of the prompts has the trigger
        self.acts: dict[tuple[str, ...], torch.Tensor] = {}  # (B, M, 1): one from the trigger on
        held = _held(states)
        self._states, self._versions = [weakref.ref(one) for one in held], [_version(one) for one in held]
        self._like = held[0].new_empty(0)
        for trigger in gate.triggers if said is not None else ():
            self.find(trigger)  # before the attentions ask, so that a compiled denoiser need not stop for it

    def is_of(self, gate: "Gate", states: States) -> bool:
        """Whether these are the very states that were heard: a pipeline gives the same objects at every step.

        Not where nobody had told what they say: somebody may have done so since.
        """
        held = _held(states)
        if self.gate is not gate or self.said is None or len(held) != len(self._states):
            return False
        known = zip(self._states, self._versions, held, strict=True)
        return all(ref() is one and version == _version(one) is not None for ref, version, one in known)

    @torch.compiler.disable
    def find(self, trigger: tuple[str, ...]) -> None:
        """Look where a trigger stands."""
        found = [one.acts(trigger) for one in self.said]
        most = max(len(one) for one in found)  # behind a shorter text is what comes after its trigger
        found = [torch.cat([one, one[-1:].expand(most - len(one))]) for one in found]
        acts = torch.stack(found).unsqueeze(-1)  # B, M, 1
        self.called[trigger] = bool(acts.any())
        self.acts[trigger] = acts.to(self._like)


class Gate(Follower):
    """What prompts call which adapters; the layers of one denoiser share the object, which knows nothing of a call."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.triggers: set[tuple[str, ...]] = set()  # those that adapters wait for
        self.pipes: weakref.WeakSet = weakref.WeakSet()  # which tell it of their prompts, see adapters/trigger.py

    def made_of(self) -> tuple:
        """See `Follower`."""
        return (self.tokenizer,)

    def tell(self, states: States, prompts: Sequence[str]) -> None:
        """These very text states, (B, M, E), of B prompts come next in this thread. For who holds the states."""
        read = [texts_of(self.tokenizer).read(said, len(one)) for said, one in zip(prompts, states, strict=True)]
        here.heard = here.next = Heard(self, states, read)

    @torch.compiler.disable
    def begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """The hook before the denoiser: which prompts its text states are of."""
        carry(model)
        family, call = family_of_model(model), given(model, args, kwargs)
        states, here.words_at = family.heard(call), family.words_at(call)
        if here.next is None or not here.next.is_of(self, states):
            here.next = Heard(self, states, texts_of(self.tokenizer).known(states))
        here.heard = here.next

    @torch.compiler.disable
    def end(self, model: nn.Module, args: tuple, output: object) -> None:
        """The hook after the denoiser."""
        here.heard, here.words_at = None, ()

    def hear(self, encoder: nn.Module | None) -> None:
        """Be told of what a text encoder reads, for as long as of the denoiser."""
        if encoder is not None and not any(hook == self.overhear for hook in encoder._forward_hooks.values()):
            encoder.register_forward_hook(self.overhear, with_kwargs=True)
            self._models.add(encoder)

    @torch.compiler.disable
    def overhear(self, encoder: nn.Module, args: tuple, kwargs: dict, output: Sequence[torch.Tensor]) -> None:
        """A hook after the text encoder, for who makes text states without the pipeline: weighted, or interpolated."""
        ids, states = args[0] if args else kwargs.get("input_ids"), output[0]
        if ids is not None and states.ndim == 3:
            texts = texts_of(self.tokenizer)
            with texts.lock:
                read = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
                read = [text.replace("</w>", " ") for text in read]  # not every tokenizer knows how its words end
                # The last but one are what SDXL takes of its two encoders, side by side.
                for made in (states, *(getattr(output, "hidden_states", None) or ())[-2:-1]):
                    texts.remember(made, read, written_out=True)

    def stop(self) -> None:
        """Listen no longer, to pipelines neither."""
        super().stop()
        for pipe in list(self.pipes):
            for name in ("encode_prompt", "comcat_gate"):
                vars(pipe).pop(name, None)
        self.pipes.clear()

    def calls(self, trigger: tuple[str, ...]) -> bool:
        """Whether any prompt of the pass that this thread is in has a trigger. Raises as `tokens` does."""
        return self._heard(trigger).called[trigger]

    def tokens(self, trigger: tuple[str, ...]) -> torch.Tensor:
        """(B, M, 1): one from the first word of `trigger` on. Raises ValueError if nobody told what the states say."""
        return self._heard(trigger).acts[trigger]

    def _heard(self, trigger: tuple[str, ...]) -> Heard:
        heard = here.heard
        if heard is None or heard.gate is not self or heard.said is None:
            raise ValueError(
                f"An adapter waits for '{trigger[0]}', but these text states are of no prompt that its pipeline has "
                "encoded: give the pipeline prompts, or say which ones they are of with "
                "comcat_diffusion.remember_prompts(pipe, prompt_embeds, prompts); another pipeline that shares the "
                "denoiser needs a comcat_diffusion.listen(pipe) of its own."
            )
        if trigger not in heard.acts:
            heard.find(trigger)
        return heard


def spoken(gate: Gate | None, trigger: tuple[str, ...], of_text: bool, stream: int = 0) -> torch.Tensor:
    """The tokens that an adapter acts on: of text, (B, M, 1); else whether on a picture at all, (B, 1, 1).

    In a `stream` of so many tokens, (B, stream, 1), all that is no text is what comes after the trigger: the picture,
    before or behind, and padding. Raises ValueError where there is no gate to tell.
    """
    if gate is None:
        raise ValueError(f"An adapter waits for '{trigger[0]}': call comcat_diffusion.listen(pipe) once it is there.")
    tokens = gate.tokens(trigger)
    called = tokens if of_text else tokens.amax(dim=1, keepdim=True)
    if not stream:
        return called
    if not here.words_at:
        return torch.cat([tokens, called.expand(-1, stream - tokens.shape[1], -1)], dim=1)
    made = called.repeat(1, stream, 1)
    for row, own, start in zip(made, tokens, here.words_at, strict=True):
        row[start : start + len(own)] = own[: stream - start]
    return made


def _held(states: States) -> list[torch.Tensor]:
    return states if isinstance(states, list) else [states]


def _version(states: torch.Tensor) -> int | None:
    """Counts changes in place; None where torch does not."""
    return None if states.is_inference() else states._version
