"""Does shrinking keep more of an adapter if singular directions are weighed by what the attentions see? It does not.

    python -m benchmarks.calibrated ADAPTER.safetensors ...

Both sides of every product are weighed by second moments, collected on pictures of the adapter's own prompt over ten
timesteps with the adapter in place. For one head with P the attention weights:

    QK_h = Aq Ak^T     left: queries' inputs x (foldable: queries q_h)      right: context c, its mean over M taken off
    VO_h = Av Ao       left: P c                                            right: what Wo does to G (foldable), or one

so that a singular value is the spread of the logits, or of the output, that its direction makes. Logits become outputs
through the softmax: to first order, E|sum_m P_m (v_m - o) Wo|^2 of independent changes, which is the third variant's
weight of QK; the second takes 1/D, as shrinking without calibration does.

Letters: B batch, N tokens, M context tokens, H heads, D head width, R rank, C channels.
"""

import argparse
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import circumstances as shared
from comcat_diffusion import bases, load_adapter, unload_adapters
from comcat_diffusion import heads as maths
from comcat_diffusion.adapters import seam
from comcat_diffusion.adapters.effect import change, predictions
from comcat_diffusion.adapters.shrink import shrunk
from comcat_diffusion.adapters.terms import Product, Term, read_contents
from comcat_diffusion.attentions import style_of

SHARES = (0.5, 0.2, 0.1, 0.07, 0.05, 0.03)
PROMPTS = ("a photo of sks teddy on the left, red background", "a photo of sks teddy at the top, blue background")
DAMPING = 1e-3  # of the mean second moment, so that every weight can be taken off again
VARIANTS = ("as in the file", "second moments", "second moments, softmax")


@dataclass
class Moments:
    """Second moments of one attention, summed over calls."""

    count: int = 0
    query: torch.Tensor | float = 0.0  # free: (1, C, C) of x; foldable: (H, D, D) of q_h
    context: torch.Tensor | float = 0.0  # (1, C, C)
    mixed: torch.Tensor | float = 0.0  # (H, C, C) of P_h c
    logit: torch.Tensor | float = 0.0  # (H,), the softmax's weight

    def add(self, x: torch.Tensor, c: torch.Tensor, attention: torch.nn.Module, foldable: bool) -> None:
        """Take one call into account: (B, N, C), (B, M, C)."""
        style, heads = style_of(attention), style_of(attention).head_count(attention)
        q, k, v, out = (seam.plain(p) for p in style.projections(attention))
        q, k, v = (maths.split_heads(p(f), heads).transpose(1, 2).double() for p, f in ((q, x), (k, c), (v, c)))
        x, c = x.double(), c.double()
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)  # B, H, N, M
        mixed = weights @ c.unsqueeze(1)  # B, H, N, C
        values = v @ maths.out_factors(out.weight.double(), heads)  # B, H, M, C
        apart = torch.cdist(weights @ values, values).square()  # B, H, N, M
        centred = c - c.mean(1, keepdim=True)
        self.count += 1
        left = torch.einsum("bhnc,bhnd->hcd", q, q) if foldable else torch.einsum("bnc,bnd->cd", x, x)[None]
        self.query = self.query + left / (len(x) * x.shape[1])
        self.context = self.context + torch.einsum("bmc,bmd->cd", centred, centred)[None] / (len(c) * c.shape[1])
        self.mixed = self.mixed + torch.einsum("bhnc,bhnd->hcd", mixed, mixed) / (len(x) * x.shape[1])
        self.logit = self.logit + (weights.square() * apart).sum(-1).mean((0, 2))


class Root:
    """The symmetric root of a second moment, and its inverse: (H or 1, E, E)."""

    def __init__(self, moment: torch.Tensor) -> None:
        values, vectors = torch.linalg.eigh(moment)
        values = values.clamp(min=0)
        values = (values + DAMPING * values.mean(-1, keepdim=True)).sqrt().unsqueeze(-2)
        self.on, self.off = vectors * values @ vectors.mT, vectors / values @ vectors.mT


@dataclass(frozen=True)
class Weighed(Term):
    """A term whose products are given with the weights on, and taken back with the weights on."""

    roots: tuple = ()  # (left, right) of QK and of VO

    def products(self) -> tuple[Product, Product]:
        """As a term's, times the roots."""
        pairs = zip(super().products(), self.roots, strict=True)
        return tuple((left_root.on @ left, right @ right_root.on) for (left, right), (left_root, right_root) in pairs)

    def rebuilt(self, qk: Product, vo: Product) -> Term:
        """As a term's, after the roots are taken off."""
        pairs = zip((qk, vo), self.roots, strict=True)
        plain = ((left_root.off @ left, right @ right_root.off) for (left, right), (left_root, right_root) in pairs)
        return super().rebuilt(*plain)


def weighed(term: Term, moments: Moments, attention: torch.nn.Module, softmax: bool) -> Weighed:
    """The term with its calibration."""
    out = seam.plain(style_of(attention).projections(attention)[3]).weight.double()
    query, context, mixed = (m / moments.count for m in (moments.query, moments.context, moments.mixed))
    if softmax:  # shrinking divides the energy of QK by D; a weight of the query takes its place
        query = query * (moments.logit / moments.count).view(-1, 1, 1)
    back = maths.out_factors(out, term.heads)  # H, D, C
    right = back @ back.mT if term.foldable else torch.eye(len(out), dtype=torch.float64)[None]
    fields = {name: getattr(term, name) for name in ("part", "attention", "scale", "rank", "foldable", "factors")}
    return Weighed(**fields, roots=((Root(query), Root(context)), (Root(mixed), Root(right))))


@torch.no_grad()
def observed(pipe: object, adapter: Path, terms: list[Term], prompt: str) -> dict[str, Moments]:
    """What every attention of the adapter sees while four pictures are drawn with it."""
    load_adapter(pipe, adapter)
    moments, hooks = {term.key: Moments() for term in terms}, []
    for term in terms:

        def look(attention: torch.nn.Module, args: tuple, kwargs: dict, term: Term = term) -> None:
            context = kwargs.get("encoder_hidden_states")
            moments[term.key].add(args[0], args[0] if context is None else context, attention, term.foldable)

        hooks.append(pipe.unet.get_submodule(term.attention).register_forward_pre_hook(look, with_kwargs=True))
    predictions(pipe, [prompt] * 4, steps=10, seed=1)
    for hook in hooks:
        hook.remove()
    unload_adapters(pipe)
    return moments


def measured(pipe: object, adapter: Path) -> list[dict]:
    """The change of the output by variant and budget, on the calibration's prompt and on others."""
    contents, rows = read_contents(adapter), []
    moments = observed(pipe, adapter, contents.terms, contents.header.notes.example)
    with tempfile.TemporaryDirectory() as folder:
        for share in SHARES:
            for number, variant in enumerate(VARIANTS):
                terms = contents.terms
                if number:
                    places = [pipe.unet.get_submodule(term.attention) for term in terms]
                    pairs = zip(terms, places, strict=True)
                    terms = [weighed(term, moments[term.key], place, number == 2) for term, place in pairs]
                size = int(share * adapter.stat().st_size)
                made, content = shrunk(replace(contents, terms=terms), size, 8)
                file = Path(folder) / "small.safetensors"
                file.write_bytes(content)
                row = {"adapter": adapter.parent.name, "share": share, "variant": variant, "bytes": made.bytes}
                row["own"] = change(pipe, adapter, [file], [contents.header.notes.example])[0]
                row["others"] = change(pipe, adapter, [file], PROMPTS)[0]
                rows.append(row)
    return rows


def main() -> None:
    """Measure, write the JSON, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("adapters", nargs="+", type=Path, help="Adapters of the embedded base.")
    adapters = parser.parse_args().adapters
    shared.use_threads(1)
    taken = shared.circumstances(torch.device("cpu"), torch.float32)
    pipe = bases.load_base("embedded")
    rows = [row for adapter in adapters for row in measured(pipe, adapter)]
    report = {"circumstances": taken, "rows": rows}
    shared.write_json(shared.results_path("calibrated", torch.device("cpu")), report)
    print(table(report))


def table(report: dict) -> str:
    """The change of the output, a line a budget."""
    lines = {}
    for row in report["rows"]:
        told = f"{row['own']:.1%}, {row['others']:.1%}"
        lines.setdefault((row["adapter"], f"{row['share']:.0%}"), []).append(told)
    cells = [[" ".join(key), *told] for key, told in lines.items()]
    text = shared.markdown_table(["change of the output on its own prompt, on others", *VARIANTS], cells)
    return text + "\n\n" + shared.circumstances_text(report["circumstances"])


if __name__ == "__main__":
    main()
