"""A compressed folder that transformers itself loads, its user consenting: bit for bit what `load_compressed` gives."""

import json
import sys

import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    ViTForImageClassification,
    ViTImageProcessorPil,
    pipeline,
)

from comcat_diffusion.compression import compress, load_compressed, save_compressed
from comcat_diffusion.compression.modelling import CODE, CONFIG, MODELLING
from comcat_diffusion.compression.store import TENSORS
from tests.compression_models import batches, built, out, pictures

CONSENT = {"trust_remote_code": True}


@pytest.fixture(autouse=True)
def modules(monkeypatch, tmp_path_factory):
    """Where transformers copies modelling files to."""
    place = str(tmp_path_factory.mktemp("modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", place)
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a compressed classifier and of a compressed extractor, with their image processors."""
    root = tmp_path_factory.mktemp("saved")
    for kind, seen in (("vit", None), ("dinov2", batches(4, dtype=torch.float32))):
        low, plan = compress(built(kind).float(), 0.3, seen)
        save_compressed(low, plan, root / kind)
        ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(root / kind)
    return root


@pytest.mark.parametrize("kind, auto", [("vit", AutoModelForImageClassification), ("dinov2", AutoModel)])
def test_transformers_gives_the_compressed_model(saved, kind, auto):
    ours, plan = load_compressed(saved / kind)
    theirs = auto.from_pretrained(saved / kind, **CONSENT)
    assert type(theirs) is type(ours) and not theirs.training
    assert sum(p.numel() for p in theirs.parameters()) == plan.parameters_after
    inputs = pictures(dtype=torch.float32)
    assert torch.equal(out(theirs, inputs), out(ours, inputs))
    assert not torch.equal(out(theirs, inputs), out(built(kind).float(), inputs))
    assert theirs.config.to_diff_dict().keys() == ours.config.to_diff_dict().keys()
    about = AutoConfig.from_pretrained(saved / kind, **CONSENT)
    assert (about.model_type, about.hidden_size, about.architectures) == ("comcat", 24, [type(ours).__name__])


def test_a_pipeline_runs_on_the_folder(saved):
    picture = Image.effect_noise((16, 16), 90).convert("RGB")
    found = pipeline("image-classification", model=str(saved / "vit"), **CONSENT)(picture)
    pixels = ViTImageProcessorPil.from_pretrained(saved / "vit")(picture, return_tensors="pt")["pixel_values"]
    wanted = out(load_compressed(saved / "vit")[0], pixels).softmax(-1).max()
    assert found[0]["score"] == pytest.approx(float(wanted), rel=1e-5)
    features = pipeline("image-feature-extraction", model=str(saved / "dinov2"), return_tensors=True, **CONSENT)
    assert torch.equal(features(picture), out(load_compressed(saved / "dinov2")[0], pixels))


def test_a_precision_a_device_and_an_attention_function_can_be_asked_for(saved):
    for wishes in ({"dtype": torch.bfloat16}, {"dtype": "bfloat16", "device_map": "cpu"}):
        model = AutoModel.from_pretrained(saved / "dinov2", attn_implementation="eager", **wishes, **CONSENT)
        assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
    pixels = pictures(dtype=torch.bfloat16)
    assert len(model(pixels, output_attentions=True).attentions) == 2
    assert AutoModel.from_pretrained(saved / "dinov2", **CONSENT).config._attn_implementation == "sdpa"
    for wish, told in (
        ({"num_hidden_layers": 1}, "num_hidden_layers"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"device_map": {"a": 0}}, "one"),
    ):
        with pytest.raises(ValueError, match=told):
            AutoModel.from_pretrained(saved / "dinov2", **wish, **CONSENT)


def test_nothing_is_loaded_without_consent_or_by_a_stock_class(saved):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForImageClassification.from_pretrained(saved / "vit", trust_remote_code=False)
    with pytest.raises(OSError):
        ViTForImageClassification.from_pretrained(saved / "vit")


def test_a_damaged_folder_is_refused_there_too(tmp_path):
    low, plan = compress(built("vit"), 0.4)
    save_compressed(low, plan, tmp_path)
    (tmp_path / TENSORS).write_bytes((tmp_path / TENSORS).read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged or was edited"):
        AutoModelForImageClassification.from_pretrained(tmp_path, **CONSENT)


def test_the_files_say_no_path_of_this_machine_and_what_to_install(saved, monkeypatch):
    about = json.loads((saved / "vit" / CONFIG).read_text())
    assert "_name_or_path" not in about and (saved / "vit" / MODELLING).read_text() == CODE
    monkeypatch.setitem(sys.modules, "comcat_diffusion.compression.pretrained", None)
    with pytest.raises(ImportError, match="pip install comcat-diffusion"):
        exec(CODE, {})
