"""The foldable adapter closest to a free one, for export, with the error that this costs.

A free term's Aq and Ao may point anywhere; a foldable one has Aq' = Wq G' and Ao' = G Wo. Both fits are linear and
have a closed form, since the best unconstrained change of a product is of rank R already (no alternation is needed):

    G'_h = argmin |X (Wq_h G' - Aq_h)|      X the queries' inputs over a few sampled pictures, bias included
    G_h  = argmin |G Wo_h - Ao_h|           whatever the values are

How well it fits is a property of the adapter: heads span D of C channels. So the error is measured on the denoiser
itself, and what is too far off is not written. Terms beside other modules are LoRAs already and stay as they are.

Letters: H heads, D head width, R rank, C channels, N tokens.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from comcat_diffusion import atomic
from comcat_diffusion import heads as maths
from comcat_diffusion.adapters import seam
from comcat_diffusion.adapters.effect import predictions
from comcat_diffusion.adapters.header import AdapterFileError, Header
from comcat_diffusion.adapters.merge import layers_of, unload_adapters
from comcat_diffusion.adapters.parts import denoiser
from comcat_diffusion.adapters.store import load_adapter
from comcat_diffusion.adapters.terms import Term, assembled, read_contents
from comcat_diffusion.attentions import style_of
from comcat_diffusion.export.fit import refuse_foldable


@dataclass(frozen=True)
class Approximated:
    """What an approximation left behind."""

    header: Header
    error: float  # |denoiser with it - with the free adapter|, over the effect of the free adapter


@torch.no_grad()
def approximate(
    pipe: object, adapter: str | Path, output: str | Path, prompts: Sequence[str], largest_error: float = 0.1
) -> Approximated:
    """Write the foldable adapter that comes closest to a free one on what the base sees while it draws the prompts.

    The pipeline must carry no adapter, and carries none afterwards. Raises AdapterFileError for an adapter that is
    foldable already or acts on a text encoder, ValueError if the error is above `largest_error`.
    """
    contents = read_contents(adapter)
    refuse_foldable(contents.header, adapter)
    acting = any((left @ right).any() for term in contents.terms for left, right in term.products())
    if not acting and not any(term.shares().any() for term in contents.beside):
        raise AdapterFileError(f"{adapter} adds nothing to its base, since all its products are zero; train it first.")
    if layers_of(pipe):
        raise ValueError("The pipeline carries adapters already; approximate on a freshly loaded base.")
    model = denoiser(pipe)
    load_adapter(pipe, adapter)
    try:
        with _observed(model, contents.terms) as grams:
            noisy, free = predictions(pipe, prompts)
        unload_adapters(pipe)
        base = predictions(pipe, prompts, noisy)[1]
        terms = [_closest(term, model.get_submodule(term.attention), grams[term.key]) for term in contents.terms]
        header, written = assembled(replace(contents, terms=terms), torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "closest.safetensors").write_bytes(written)
            load_adapter(pipe, Path(folder) / "closest.safetensors")
        error = float((predictions(pipe, prompts, noisy)[1] - free).norm() / (free - base).norm())
    finally:
        unload_adapters(pipe)
    if not error <= largest_error:
        raise ValueError(
            f"The closest foldable adapter differs from {adapter} by {error:.0%} of its effect, more than the "
            f"{largest_error:.0%} allowed: train it again with --kind foldable, or force it."
        )
    atomic.write_bytes(output, written)
    return Approximated(header, error)


@contextmanager
def _observed(model: nn.Module, terms: list[Term]) -> Iterator[dict[str, torch.Tensor]]:
    """While the block lasts, collect per attention the Gram matrix (C+1, C+1) of its queries' inputs."""
    grams = {}

    def gram(key: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            tokens = args[0].flatten(0, -2).double()  # N, C
            tokens = torch.cat([tokens, tokens.new_ones(len(tokens), 1)], dim=1)  # the bias is one more channel
            grams[key] = grams.get(key, 0) + tokens.T @ tokens

        return hook

    hooks = []
    for term in terms:
        attention = model.get_submodule(term.attention)
        query = seam.plain(style_of(attention).projections(attention)[0])
        hooks.append(query.register_forward_pre_hook(gram(term.key)))
    try:
        yield grams
    finally:
        for hook in hooks:
            hook.remove()


def _closest(term: Term, attention: nn.Module, gram: torch.Tensor) -> Term:
    """The foldable term of the same rank that is closest to a free one."""
    q, _, _, out = (seam.plain(projection) for projection in style_of(attention).projections(attention))
    (query, key), (value, back) = term.products()  # (H, C, R), (H, R, C), (H, C, R), (H, R, C)
    into = maths.in_factors(q.weight.double(), term.heads)  # H, C, D
    bias = into.new_zeros(len(q.weight)) if q.bias is None else q.bias.double()
    into = torch.cat([into, bias.view(term.heads, 1, -1)], dim=1)  # H, C+1, D
    query = torch.cat([query.to(into.device), into.new_zeros(term.heads, 1, term.rank)], dim=1)
    core = torch.linalg.pinv(into.mT @ gram @ into, hermitian=True) @ (into.mT @ gram @ query)  # H, D, R
    mix = back.to(into.device) @ torch.linalg.pinv(maths.out_factors(out.weight.double(), term.heads))  # H, R, D
    return replace(term, foldable=True).rebuilt((core.cpu(), key), (value, mix.cpu()))
