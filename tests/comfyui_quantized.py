"""A transformer's file in few bits, as people share them, and a file of the numbers that are in it.

    python tests/comfyui_quantized.py TRANSFORMER.safetensors [ARCHITECTURE]

It is run by ComfyUI's own Python, whose libraries write the weights: comfy-kitchen, and with an architecture, as its
readers call it, gguf. Layers of blocks alone are made smaller. Beside the file stand NAME-FORMAT.safetensors or
NAME-FORMAT.gguf and NAME-FORMAT-plain.safetensors; formats are printed, one a line.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch

BLOCK = re.compile(r"(blocks|layers)\.\d+\..*\.weight")
# Formats in which products can be had of exact numbers; those of whole numbers of 8 bits round what enters them too.
SCALES = {  # format: names of a layer's scales in a file, by what comfy-kitchen calls them; widths are multiples of
    "float8_e4m3fn": ({"scale": "weight_scale"}, 16),
    "mxfp8": ({"scale": "weight_scale"}, 32),
    "nvfp4": ({"scale": "weight_scale_2", "block_scale": "weight_scale"}, 16),
}
GGUF = ("Q8_0", "Q4_0", "Q5_1")


def is_small(name: str, tensor: torch.Tensor, multiple: int) -> bool:
    """Whether a weight is one of those that are made smaller."""
    return tensor.ndim == 2 and bool(BLOCK.search(name)) and not any(size % multiple for size in tensor.shape)


def scaled(exact: dict[str, torch.Tensor], kind: str) -> tuple[dict, dict]:
    """Tensors of a file whose layers bring scales, and the same as numbers."""
    from comfy_kitchen import tensor as layouts

    names, multiple = SCALES[kind]
    layout = getattr(layouts, f"TensorCore{kind.removesuffix('_e4m3fn').replace('float', 'fp').upper()}Layout")
    told = {"format": kind, "full_precision_matrix_mult": True}
    found, plain = {}, {}
    for name, tensor in exact.items():
        found[name] = plain[name] = tensor
        if is_small(name, tensor, multiple):
            found[name], params = layout.quantize(tensor)
            plain[name] = layout.dequantize(found[name], params).to(tensor)
            layer = name.removesuffix("weight")
            found |= {f"{layer}{ours}": getattr(params, theirs) for theirs, ours in names.items()}
            found[f"{layer}comfy_quant"] = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)
    return found, plain


def in_gguf(exact: dict[str, torch.Tensor], kind: str, architecture: str, path: Path) -> dict[str, torch.Tensor]:
    """Write such a file; the same as numbers."""
    import gguf

    writer, plain = gguf.GGUFWriter(path, arch=architecture), {}
    for name, tensor in exact.items():
        small = is_small(name, tensor, 32)
        chosen = gguf.GGMLQuantizationType[kind if small else "F32"]
        held = gguf.quants.quantize(tensor.float().numpy(), chosen)
        writer.add_tensor(name, held, raw_dtype=chosen)
        if tensor.ndim > 2:  # ComfyUI-GGUF's own note, as other readers take fewer dimensions
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(tensor.shape))
        plain[name] = torch.from_numpy(gguf.quants.dequantize(held, chosen).copy()).view(tensor.shape)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return plain


def written(path: Path, architecture: str | None) -> Iterator[str]:
    """Write every format; the name of each."""
    exact = safetensors.torch.load_file(path)
    beside = lambda name: path.with_name(f"{path.stem}-{name}")
    for kind in SCALES:
        found, plain = scaled(exact, kind)
        safetensors.torch.save_file(found, beside(f"{kind}.safetensors"))
        safetensors.torch.save_file(plain, beside(f"{kind}-plain.safetensors"))
        yield kind
    for kind in GGUF if architecture else ():
        plain = in_gguf(exact, kind, architecture, beside(f"{kind}.gguf"))
        safetensors.torch.save_file(plain, beside(f"{kind}-plain.safetensors"))
        yield kind


if __name__ == "__main__":
    for name in written(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None):
        print(name, flush=True)
