"""A new word learned together with an adapter: its embeddings in every text encoder of a pipeline.

diffusers' own textual inversion puts it in place, so several embeddings behind one word work as they do there. A whole
name can be one such word: "sks dog" is then a word by itself, whatever "sks" and "dog" are to the tokenizer.
"""

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from tokenizers import AddedToken
from torch import nn
from transformers import PreTrainedTokenizerBase

from comcat_diffusion.adapters.parts import bare

ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


def refuse_token(pipe: DiffusionPipeline, token: str, vectors: dict[str, torch.Tensor]) -> None:
    """Raise ValueError if a tokenizer knows the token already, or the embeddings are not for these text encoders."""
    for encoder, tokenizer in ENCODERS.items():
        here = getattr(pipe, encoder, None)
        if (encoder in vectors) != (here is not None):
            raise ValueError(f"The token '{token}' was learned for {', '.join(vectors)}, which this pipeline is not.")
        known = getattr(pipe, tokenizer).get_vocab() if here is not None else {}
        if token in known or f"{token.lower()}</w>" in known:  # as CLIP's tokenizers end a word
            raise ValueError(
                f"The tokenizer already has the token '{token}': unload what brought it, or learn another word."
            )
        width = here.get_input_embeddings().embedding_dim if here is not None else 0
        if here is not None and vectors[encoder].shape[-1] != width:
            raise ValueError(
                f"The token '{token}' has embeddings of width {vectors[encoder].shape[-1]}, {encoder} needs {width}."
            )


def put_token(pipe: DiffusionPipeline, token: str, vectors: dict[str, torch.Tensor]) -> None:
    """Add a token to every tokenizer and its (n, E) embeddings, by encoder name, to every text encoder.

    Raises ValueError, before anything is touched, as `refuse_token` does.
    """
    refuse_token(pipe, token, vectors)
    earlier = words_of(pipe)
    for encoder, values in vectors.items():
        tokenizer = getattr(pipe, ENCODERS[encoder])
        model = bare(getattr(pipe, encoder))
        _make_room(model.get_input_embeddings(), len(tokenizer) + len(values))
        pipe.load_textual_inversion(
            {token: values if len(values) > 1 else values[0]}, token=token, tokenizer=tokenizer, text_encoder=model
        )
        # diffusers would find the word inside of others as well: "sks dog" in "two masks dogs wear".
        tokenizer.add_tokens([AddedToken(name, single_word=True) for name in names_of(token, len(values))])
    pipe.comcat_tokens = [*earlier, token]


def words_of(pipe: object) -> list[str]:
    """The words that `put_token` added to a pipeline and that are still there."""
    return [
        word for word in getattr(pipe, "comcat_tokens", []) if any(token_ids(pipe, n, word) for n in _present(pipe))
    ]


def _make_room(table: nn.Embedding, rows: int) -> None:
    """Rows for new tokens. transformers would draw the whole table anew first, ten times the time for CLIP's."""
    missing = rows - len(table.weight)
    if missing > 0:
        grown = torch.cat([table.weight.data, table.weight.data.new_zeros(missing, table.embedding_dim)])
        table.weight = nn.Parameter(grown, requires_grad=table.weight.requires_grad)
        table.num_embeddings = rows


def take_tokens(pipe: object) -> None:
    """Take away again every token that `put_token` added to a pipeline."""
    for token in words_of(pipe):
        LearnedWord(pipe, token).leave()
    if hasattr(pipe, "comcat_tokens"):
        del pipe.comcat_tokens


class LearnedWord:
    """A word that came with an adapter to the parts of a pipeline, and leaves with it."""

    def __init__(self, pipe: DiffusionPipeline, token: str, models: int = 1) -> None:
        self.token = token
        self._models = models  # in so many the adapter is
        self._homes: dict[str, tuple[PreTrainedTokenizerBase, nn.Module]] = {
            encoder: (getattr(pipe, ENCODERS[encoder]), bare(getattr(pipe, encoder))) for encoder in _present(pipe)
        }

    def vectors(self) -> dict[str, torch.Tensor]:
        """The word's embeddings by text encoder: (n, E)."""
        found = {}
        for encoder, (tokenizer, model) in self._homes.items():
            found[encoder] = model.get_input_embeddings().weight[_ids(tokenizer, self.token)].detach().clone()
        return found

    def leave(self) -> None:
        """A model has lost the adapter; when all have, tokenizers and text encoders forget the word."""
        self._models -= 1
        if self._models:
            return
        for tokenizer, model in self._homes.values():
            names = names_of(self.token, len(_ids(tokenizer, self.token)))
            if names[0] in tokenizer.get_vocab():  # not if somebody took it away by hand
                _forget(names, tokenizer, model)


def _forget(names: list[str], tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
    """Take names out of a tokenizer, and their embeddings out of a text encoder."""
    before = model.get_input_embeddings()
    TextualInversionLoaderMixin().unload_textual_inversion(names, tokenizer, model)
    after = model.get_input_embeddings()
    # diffusers leaves these as they were with the names, or as a new table has them
    model.config.vocab_size = after.num_embeddings
    after.train(before.training).requires_grad_(before.weight.requires_grad)


def _present(pipe: object) -> list[str]:
    return [encoder for encoder in ENCODERS if getattr(pipe, encoder, None) is not None]


def names_of(token: str, count: int) -> list[str]:
    """What diffusers calls the `count` embeddings of a token."""
    return [token, *(f"{token}_{number}" for number in range(1, count))]


def token_ids(pipe: DiffusionPipeline, encoder: str, token: str) -> list[int]:
    """The ids of a token's embeddings in one encoder, in order; empty if it is not there."""
    return _ids(getattr(pipe, ENCODERS[encoder]), token)


def _ids(tokenizer: PreTrainedTokenizerBase, token: str) -> list[int]:
    vocabulary = tokenizer.get_vocab()
    found = [vocabulary[token]] if token in vocabulary else []
    while f"{token}_{len(found)}" in vocabulary:
        found.append(vocabulary[f"{token}_{len(found)}"])
    return found


def word_vectors(pipe: DiffusionPipeline, words: str) -> dict[str, torch.Tensor]:
    """The embeddings of the tokens that known words consist of, by encoder name: (n, E)."""
    found = {}
    for encoder, tokenizer in ENCODERS.items():
        if getattr(pipe, encoder, None) is not None:
            ids = getattr(pipe, tokenizer)(words, add_special_tokens=False).input_ids
            found[encoder] = getattr(pipe, encoder).get_input_embeddings().weight[ids].detach()
    return found


def start_vectors(pipe: DiffusionPipeline, word: str, count: int) -> dict[str, torch.Tensor]:
    """`count` copies of a known word's embedding by encoder name: (count, E). Raises ValueError for an unknown word."""
    found = word_vectors(pipe, word)
    for rows in found.values():
        if len(rows) != 1:
            raise ValueError(
                f"--initializer_token '{word}' is {len(rows)} tokens to this base; choose a word that is one."
            )
    return {encoder: rows.repeat(count, 1) for encoder, rows in found.items()}


class LearnedToken(nn.Module):
    """The embeddings of new tokens in one encoder as parameters of their own, so that no other row can move."""

    def __init__(self, encoder: nn.Module, ids: list[int]):
        super().__init__()
        table = encoder.get_input_embeddings()
        self.ids = ids
        self.vectors = nn.Parameter(table.weight[ids].detach().clone().float())  # n, E
        table.register_forward_hook(self._replace)

    def _replace(self, table: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        for row, number in zip(self.vectors, self.ids, strict=True):
            output = torch.where((inputs[0] == number)[..., None], row.to(output.dtype), output)
        return output
