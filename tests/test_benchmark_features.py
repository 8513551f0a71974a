"""The judge of compression: its weights come over name by name, and its photographs are kept apart."""

import torch
from transformers import Dinov2Config, Dinov2Model

from benchmarks import compression, dinov2, features, photographs

ONNX = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value", "o_proj": "output.dense"}


def test_every_tensor_of_the_onnx_file_finds_its_place(monkeypatch):
    for name, value in (("LAYERS", 2), ("WIDTH", 8), ("PIXELS", 28)):
        monkeypatch.setattr(dinov2, name, value)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    wanted = Dinov2Model(Dinov2Config(**sizes)).state_dict()
    values, second = {}, {}
    for number, (name, tensor) in enumerate(wanted.items()):
        for ours, theirs in ONNX.items():
            name = name.replace(f"attention.{ours}", f"attention.{theirs}")
        if name.startswith("encoder") and tensor.ndim == 2:  # a transposed weight, known by its MatMul only
            node = "/backbone/" + name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.") + "/MatMul"
            values[f"onnx::{number}"], second[node] = tensor.mT, f"onnx::{number}"
        elif name == "embeddings.position_embeddings":
            values["onnx::cls"], values["onnx::patches"] = tensor[:, :1], tensor[:, 1:]
        elif name != "embeddings.mask_token":
            values[f"backbone.{name}"] = tensor
    found = dinov2.renamed(values, second)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items() if "mask" not in name)


def test_no_photograph_is_calibrated_on_and_judged_by():
    judged = photographs.TEST_OF_WHEELS + photographs.TEST_OF_DEBIAN
    assert len(photographs.CALIBRATION) == 16 and len(set(judged)) == len(judged) == 25
    assert not set(photographs.CALIBRATION) & set(judged)


def test_a_crop_is_found_by_the_nearest_other_class_token():
    tokens = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.9, 0.1]])
    assert features.neighbours(tokens.unsqueeze(1), torch.tensor([0, 0, 1, 1])) == 0.5


def test_the_compression_benchmark_hands_its_wishes_on():
    flags = compression.command_line().parse_args(["--data", "dinov2", "--parts", "model", "time", "--threads", "1"])
    assert compression.of_features(flags) == ["--parts", "model", "--device", "cpu", "--threads", "1"]
    features.command_line().parse_args(compression.of_features(flags))
