"""The judge of compression: its weights come over name by name, and its photographs are kept apart."""

import io
import json
import struct

import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from benchmarks import compression, dinov2, features, photographs
from benchmarks.circumstances import circumstances
from comcat_diffusion.compression import Settings, compress
from tests.compression_models import batches, built

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


def test_photographs_are_found_in_a_resource_file_of_qt(tmp_path):
    def picture(size, mode="RGB", colour="red", kind="JPEG"):
        stored = io.BytesIO()
        Image.new(mode, size, colour).save(stored, kind)
        return stored.getvalue()

    kept = [picture((300, 240)), picture((240, 300), "RGBA", (9, 9, 9, 255), "WEBP")]
    others = [picture((239, 400)), picture((300, 300), "RGBA", (9, 9, 9, 0), "WEBP"), b"import QtQuick", kept[0][:-400]]
    data = b"".join(struct.pack(">I", len(content)) + content for content in (*others, *kept))
    (tmp_path / "rcc").mkdir()
    header = struct.pack(">4s5I", b"qres", 3, 24 + len(data) + 7, 24, 24 + len(data), 0)
    (tmp_path / "rcc" / "erase.rcc").write_bytes(header + data + b"namtree")
    assert photographs.carved(tmp_path, tmp_path / "more") == 2
    found = sorted((tmp_path / "more").iterdir())
    assert [path.name for path in found] == ["erase-4.jpeg", "erase-5.webp"]
    assert [path.read_bytes() for path in found] == kept
    with pytest.raises(ValueError, match="no resource file"):
        list(photographs.resources(b"RIFF" + header[4:] + data))


def test_fewer_photographs_are_among_more_and_beyond_the_folder_others_join(tmp_path, monkeypatch):
    for folder, count in (("calibration", 4), ("more", 3)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            (tmp_path / folder / f"{number}.jpg").touch()
    monkeypatch.setattr(photographs, "FOLDER", tmp_path)
    own, found = features.calibrating(None), [features.calibrating(count) for count in range(1, 8)]
    assert own == sorted(found[3]) and all(found[n] == found[-1][: n + 1] for n in range(7))
    assert {path.parent.name for path in found[-1][4:]} == {"more"}
    with pytest.raises(ValueError, match="there are 7"):
        features.calibrating(8)
    (tmp_path / "own").mkdir()
    for name in ("a.JPEG", "b.webp", "list.txt"):
        (tmp_path / "own" / name).touch()
    assert {path.name for path in features.calibrating(6, [tmp_path / "own"])[4:]} == {"a.JPEG", "b.webp"}
    assert len({*features.calibrating(9, [tmp_path / "own", tmp_path / "more"])}) == 9
    with pytest.raises(ValueError, match="there are 6"):
        features.calibrating(7, [tmp_path / "own"])


def test_a_crop_is_found_by_the_nearest_other_class_token():
    tokens = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.9, 0.1]])
    assert features.neighbours(tokens.unsqueeze(1), torch.tensor([0, 0, 1, 1])) == 0.5


def test_the_compression_benchmark_hands_its_wishes_on():
    flags = compression.command_line().parse_args(["--data", "dinov2", "--parts", "model", "time", "--threads", "1"])
    assert compression.of_features(flags) == ["--parts", "model", "--device", "cpu", "--threads", "1"]
    features.command_line().parse_args(compression.of_features(flags))


def test_an_earlier_plan_is_taken_as_it_stands_and_a_missing_one_is_asked_for(tmp_path):
    model = built("dinov2")
    plan = compress(model, 0.3, batches(4))[1]
    path = tmp_path / "rows.json"
    path.write_text(
        json.dumps({"rows": [{"part": "model", "removed": 0.3, "method": "output", "widths": plan.widths}]})
    )
    assert features.planned(model, path, 0.3, Settings(method="output")) == plan
    with pytest.raises(ValueError, match="no plan for 40% of the model"):
        features.planned(model, path, 0.4, Settings(method="output"))


def test_the_goals_are_measured_first_and_a_table_is_in_order():
    flags = features.command_line().parse_args([])
    assert features.budgets(flags)[:4] == list(features.GOALS)
    flags = features.command_line().parse_args(["--parts", "model", "--removed", "0.61"])
    assert features.budgets(flags) == [("model", 0.61)]
    about = {
        "class_token": 0.9,
        "patches": 0.9,
        "neighbours": 0.8,
        "parameters": 1e6,
        "multiply_adds": 1e9,
        "seconds": 2,
    }
    rows = [{"part": "model", "removed": part, "method": "output"} | about for part in (0.61, 0.44)]
    rows.append(rows[0] | {"finetuned_on": 2000, "of_photographs": 230, "rate": 1e-5})
    report = {"rows": [{"part": "dense"} | about, *rows], "crops": 6, "photographs": {"calibration": 16, "test": 25}}
    report |= {"more": "one", "learn_more": "one and another"}
    report["circumstances"] = circumstances(torch.device("cpu"), torch.float32)
    title, *lines = features.table(report).splitlines()
    assert title.endswith("photographs beyond the sixteen are those of one, those learned from of one and another:")
    lines = [line for line in lines if "of the model" in line]
    shown = [line.split(" | ")[:2] for line in lines]
    assert [row for row, _ in shown] == ["| 44% of the model", *["| 61% of the model"] * 2]
    assert [how for _, how in shown] == ["output", "output", "output, then 2,000 crops of 230 photographs"]
