"""A new token learned together with an adapter: its embeddings in every text encoder of a pipeline.

diffusers' own textual inversion puts it in place, so several embeddings behind one word work as they do there.
"""

import torch
from diffusers import DiffusionPipeline
from torch import nn

ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


def refuse_token(pipe: DiffusionPipeline, token: str, vectors: dict[str, torch.Tensor]) -> None:
    """Raise ValueError if a tokenizer knows the token already, or the embeddings are not for these text encoders."""
    for encoder, tokenizer in ENCODERS.items():
        here = getattr(pipe, encoder, None)
        if (encoder in vectors) != (here is not None):
            raise ValueError(f"The token '{token}' was learned for {', '.join(vectors)}, which this pipeline is not.")
        if here is not None and token in getattr(pipe, tokenizer).get_vocab():
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
    for encoder, values in vectors.items():
        pipe.load_textual_inversion(
            {token: values if len(values) > 1 else values[0]},
            token=token,
            tokenizer=getattr(pipe, ENCODERS[encoder]),
            text_encoder=getattr(pipe, encoder),
        )
    pipe.comcat_tokens = [*getattr(pipe, "comcat_tokens", []), token]


def take_tokens(pipe: object) -> None:
    """Take away again every token that `put_token` added to a pipeline."""
    for token in getattr(pipe, "comcat_tokens", []):
        for encoder, tokenizer in ENCODERS.items():
            if getattr(pipe, encoder, None) is not None:
                count = len(token_ids(pipe, encoder, token))
                names = [token, *(f"{token}_{number}" for number in range(1, count))]
                pipe.unload_textual_inversion(names, getattr(pipe, tokenizer), getattr(pipe, encoder))
    if hasattr(pipe, "comcat_tokens"):
        del pipe.comcat_tokens


def token_ids(pipe: DiffusionPipeline, encoder: str, token: str) -> list[int]:
    """The ids of a token's embeddings in one encoder, in order; empty if it is not there."""
    vocabulary = getattr(pipe, ENCODERS[encoder]).get_vocab()
    found = [vocabulary[token]] if token in vocabulary else []
    while f"{token}_{len(found)}" in vocabulary:
        found.append(vocabulary[f"{token}_{len(found)}"])
    return found


def start_vectors(pipe: DiffusionPipeline, word: str, count: int) -> dict[str, torch.Tensor]:
    """`count` copies of a known word's embedding by encoder name: (count, E). Raises ValueError for an unknown word."""
    found = {}
    for encoder, tokenizer in ENCODERS.items():
        if getattr(pipe, encoder, None) is not None:
            ids = getattr(pipe, tokenizer)(word, add_special_tokens=False).input_ids
            if len(ids) != 1:
                raise ValueError(
                    f"--initializer_token '{word}' is {len(ids)} tokens to this base; choose a word that is one."
                )
            row = getattr(pipe, encoder).get_input_embeddings().weight[ids[0]].detach()
            found[encoder] = row.repeat(count, 1)
    return found


class LearnedToken(nn.Module):
    """The embeddings of one token in one encoder as parameters of their own, so that no other row can move."""

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
