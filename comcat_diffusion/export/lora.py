"""A foldable adapter as an ordinary LoRA of the key and value projections, for tools that know no COMCAT.

A foldable adapter is, exactly, a change of two weights per attention in their own shapes,

    Delta W_K,h = s G'_h Ak_h^T        Delta W_V,h = s G_h^T Av_h^T        (as Linears store them, D x C)

which is a LoRA of rank H*R: down holds the Ak_h of all heads, up is block-diagonal in G'_h (the query bias is
included, since it stands beside the queries that meet the changed keys). Tools disagree on how alpha and ranks that
differ by module go together, so no strength is left to them: s is in `up`, and alpha is one number for the file.

A term beside a convolution is the LoRA of it whose `down` is of 3 x 3 places, each rank's with one pattern of taps, and
whose `up` is of one (adapters/separable.py). So it takes nine times the numbers of the channels that come in. A term
beside a Linear is the LoRA of it; where the Linear, or the weight that holds it, makes keys and values as well, theirs
and its own are one, their ranks side by side.

Letters: H heads, D head width, R rank, C channels, O channels that go out, K = H*R.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from comcat_diffusion import atomic
from comcat_diffusion.adapters.as_lora import placed, text_encoder_name, up_of
from comcat_diffusion.adapters.beside_rows import Beside
from comcat_diffusion.adapters.cores import has_cores
from comcat_diffusion.adapters.header import AdapterFileError, Header, kind_of, read_adapter
from comcat_diffusion.adapters.separable import lowered
from comcat_diffusion.adapters.store import TOKEN, safetensors_bytes
from comcat_diffusion.adapters.terms import Contents, Term, read_contents
from comcat_diffusion.export.clients import FORMATS
from comcat_diffusion.export.fit import TEXT_ENCODERS, family_in, needs_base, projections_of, refuse_inexpressible
from comcat_diffusion.export.metadata import lora_metadata
from comcat_diffusion.export.spread import spread, unfolded
from comcat_diffusion.families.family import Family, Native

_CLIPS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
_WIDTH_SDXL, _SDXL_BLOCK = 2048, 3  # width of SDXL's text states; layers and a resampler per block of its U-Net
_SDXL_CONVOLUTIONS = {"conv1": "in_layers.2", "conv2": "out_layers.3"}  # as its original code counts a block's layers


@dataclass(frozen=True)
class Lora:
    """A LoRA of one projection, of a Linear or of a convolution: the weight changes by up @ down."""

    part: str  # component of the pipeline
    projection: str  # name within the component
    down: torch.Tensor  # K, C; of a convolution R, C, 3, 3
    up: torch.Tensor  # H*D, K; of a Linear O, R, of a convolution O, R, 1, 1

    @property
    def rank(self) -> int:
        """K, the columns of all heads together."""
        return len(self.down)


@dataclass(frozen=True)
class Exported:
    """What an export left behind."""

    files: tuple[Path, ...]  # the LoRA, then one textual-inversion file for each new word
    metadata: dict[str, str]  # of the LoRA


def export_adapter(
    adapter: str | Path,
    output: str | Path,
    format: str = "kohya",
    dtype: torch.dtype = torch.float32,
    models: Mapping[str, nn.Module] | None = None,
) -> Exported:
    """Write a foldable or tied adapter file as a LoRA file.

    `kohya` is what A1111, Forge, ComfyUI, InvokeAI, kohya's scripts and diffusers read, `diffusers-lora` what
    `pipe.load_lora_weights` reads. `models` are the parts of a tied adapter's base, see export/spread.py; other kinds
    need no base. A new word becomes a textual-inversion file beside it, OUTPUT_emb.safetensors: other tools load such
    embeddings by themselves, A1111 and ComfyUI under the file's name. In float32 the LoRA does what the adapter does
    up to rounding. Raises AdapterFileError for a free adapter and for one that waits for its trigger, which no LoRA can
    express, for a tied one without its base, for a model that those tools do not know, and for an adapter that does
    nothing.
    """
    if format not in FORMATS:
        raise ValueError(f"The format must be one of {', '.join(FORMATS)}, not '{format}'.")
    header = read_adapter(adapter)
    refuse_inexpressible(header, adapter)
    if needs_base(header) and models is None:
        kind = kind_of(next(iter(header.config.values())))
        raise AdapterFileError(f"{adapter} is {kind}: name its base, of whose attentions it does not speak.")
    if has_cores(header.config):
        contents = unfolded(header, models, adapter)
    else:
        contents = read_contents(adapter)
        contents = spread(contents, models, adapter) if needs_base(header) else contents
    family = family_in(header)
    loras = [lora for term in contents.terms for lora in as_loras(term, family)]
    loras += [lora for term in contents.beside for lora in beside_as_loras(term)]
    if not loras:
        raise AdapterFileError(f"{adapter} adds nothing to its base, since all its products are zero; train it first.")
    if format == "kohya":
        tensors, alpha = _kohya(loras, header, family)
    else:
        tensors, alpha = _diffusers(loras, family), None
    tensors = {name: tensor if tensor.dim() == 0 else tensor.to(dtype) for name, tensor in tensors.items()}
    ranks, beside = (Counter(lora.rank for lora in loras if lora.down.ndim == ndim) for ndim in (2, 4))
    metadata = lora_metadata(header, tensors, Path(output), ranks, beside, alpha)
    files = {Path(output): safetensors_bytes(tensors, metadata)} | _word_files(contents, Path(output))
    for path, content in files.items():
        atomic.write_bytes(path, content)
    return Exported(tuple(files), metadata)


def as_loras(term: Term, family: Family) -> list[Lora]:
    """The LoRAs of keys and values that do what a foldable term does; a product that is zero gives none."""
    factors = {name: factor.double() for name, factor in term.factors.items()}
    loras = []
    for projection, down, core in zip(
        projections_of(family, term.part, term.attention), ("k_down", "v_down"), ("q_core", "out_core"), strict=True
    ):
        heads = len(factors[core]) // term.rank  # of a tied term all of them share the rows of `down`
        up = up_of(factors[core], len(factors[down]), heads, term.scale)  # H*D, K
        acts = (up != 0).any(dim=0) & (factors[down] != 0).any(dim=1)  # K: columns of heads that were cut act nothing
        if acts.any():
            loras.append(Lora(term.part, f"{term.attention}.{projection}", factors[down][acts], up[:, acts]))
    return loras


def beside_as_loras(term: Beside) -> list[Lora]:
    """The LoRA of a module that does what a term beside it does; none if that is nothing."""
    acts = term.shares() != 0
    if not acts.any():
        return []
    kept = term.kept(acts)
    down, up = kept.down.double(), kept.scale * kept.up.double()
    if kept.taps is None:
        return [Lora(term.part, term.host, down, up)]
    return [Lora(term.part, term.host, lowered(down, kept.taps.double()), up[:, :, None, None])]


def _word_files(contents: Contents, output: Path) -> dict[Path, bytes]:
    """Textual-inversion files: one tensor named as the word, or `clip_l` and `clip_g` for the two encoders of SDXL."""
    files = {}
    for number, word in enumerate(contents.header.tokens):
        own = {name: contents.tokens.get(f"{TOKEN}.{number}.{name}") for name in ("text_encoder", "text_encoder_2")}
        names = {"text_encoder": word} if own["text_encoder_2"] is None else _CLIPS
        vectors = {names[encoder]: values.float() for encoder, values in own.items() if values is not None}
        path = output.with_name(f"{output.stem}_emb{number or ''}.safetensors")
        files[path] = safetensors_bytes(vectors, {"format": "pt", "modelspec.trigger_phrase": word})
    return files


# diffusers: alpha is not written, and means the rank of each module


def _diffusers(loras: list[Lora], family: Family) -> dict[str, torch.Tensor]:
    tensors = {}
    for lora in _fused(loras, family.held_by):
        name = f"{family.lora_prefix or lora.part}.{lora.projection}"
        if lora.part in TEXT_ENCODERS:
            name = f"{lora.part}.{text_encoder_name(lora.projection)}"
        tensors[f"{name}.lora_A.weight"] = lora.down
        tensors[f"{name}.lora_B.weight"] = lora.up
    return tensors


# kohya: one alpha for the whole file


def _kohya(loras: list[Lora], header: Header, family: Family) -> tuple[dict[str, torch.Tensor], float]:
    """The tensors, and the alpha that stands with each of them."""
    loras = _fused(loras, family.native_weight)
    alpha = float(Counter(lora.rank for lora in loras).most_common(1)[0][0])
    tensors = {}
    for lora in [*loras, *_markers(loras)]:
        name = _kohya_name(lora, _is_sdxl(header))
        tensors[f"{name}.lora_down.weight"] = lora.down
        tensors[f"{name}.lora_up.weight"] = lora.up * (lora.rank / alpha)  # tools multiply by alpha / rank
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors, alpha


def _fused(loras: list[Lora], place: Callable[[str], Native | None]) -> list[Lora]:
    """LoRAs of a family's weights: those of one Linear are one, whose `up` has each in its rows."""
    own: dict[tuple[str, str], list[tuple[Native | None, Lora]]] = {}
    for lora in loras:
        native = place(lora.projection) if lora.part not in TEXT_ENCODERS else None
        own.setdefault((lora.part, native.name if native else lora.projection), []).append((native, lora))
    made = []
    for (part, name), parts in own.items():
        down = torch.cat([lora.down for _, lora in parts])  # K1 + K2, C
        made.append(Lora(part, name, down, torch.cat([_rows(lora.up, native) for native, lora in parts], dim=1)))
    return made


def _rows(up: torch.Tensor, native: Native | None) -> torch.Tensor:
    """The rows of a weight that holds a projection, where it is none itself."""
    return up if native is None else placed(up, native.place, native.count, native.span)


def _markers(loras: list[Lora]) -> list[Lora]:
    """A LoRA of zeros for one out_proj per text encoder: by its name alone diffusers knows the format of the others."""
    first = {lora.part: lora for lora in reversed(loras) if lora.part in TEXT_ENCODERS}
    return [
        Lora(part, lora.projection.rpartition(".")[0] + ".out_proj", lora.up.T[:1] * 0, lora.down.T[:, :1] * 0)
        for part, lora in first.items()
    ]


def _is_sdxl(header: Header) -> bool:
    return header.width == _WIDTH_SDXL or "text_encoder_2" in header.config


def _kohya_name(lora: Lora, sdxl: bool) -> str:
    if lora.part not in TEXT_ENCODERS:
        path = _original_name(lora.projection) if sdxl else lora.projection
        return "lora_unet_" + path.replace(".", "_")
    prefix = {"text_encoder": "lora_te1_" if sdxl else "lora_te_", "text_encoder_2": "lora_te2_"}[lora.part]
    return prefix + text_encoder_name(lora.projection).replace(".", "_")


def _original_name(name: str) -> str:
    """SDXL's blocks as its original code counts them, which is how kohya names them."""

    def counted(found: re.Match) -> str:
        block, layer, kind = int(found[2]), int(found[4]), int(found[3] == "attentions")
        place = _SDXL_BLOCK * block + layer
        return f"input_blocks.{place + 1}.{kind}." if found[1] == "down" else f"output_blocks.{place}.{kind}."

    name = re.sub(r"^(down|up)_blocks\.(\d+)\.(attentions|resnets)\.(\d+)\.", counted, name)
    name = re.sub(r"^mid_block\.attentions\.0\.", "middle_block.1.", name)
    name = re.sub(r"^mid_block\.resnets\.(\d+)\.", lambda found: f"middle_block.{2 * int(found[1])}.", name)
    return re.sub(r"(?<=\.)conv[12]$", lambda found: _SDXL_CONVOLUTIONS[found[0]], name)
