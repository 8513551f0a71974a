"""Bases of every kind and form: folders, variants and single files train and draw; what cannot be loaded says why."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from comcat_diffusion import bases, load_adapter, places
from comcat_diffusion.generation.config import GenerateConfig
from comcat_diffusion.generation.generate import generate
from comcat_diffusion.training.config import TrainConfig
from comcat_diffusion.training.customize import customize
from tests import tiny_bases
from tests.quick_training import BARE

PICTURES = str(bases.assets() / "subject" / "train")


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    return tiny_bases.sd1(tmp_path_factory.mktemp("sd1") / "base")


def trained(base, output, **more):
    settings = {"instance_data_dir": PICTURES, "instance_prompt": "a photo of sks teddy", "rank": 2}
    settings |= {"num_validation_images": 1, **BARE}
    base, output = str(base), str(output)
    return customize(
        TrainConfig(pretrained_model_name_or_path=base, output_dir=output, max_train_steps=2, **{**settings, **more})
    )


def drawn(outcome, output, **more):
    return generate(
        GenerateConfig(
            adapter=[str(outcome.adapter)],
            prompt=["{subject}"],
            num_images=1,
            num_inference_steps=2,
            output_dir=str(output),
            **more,
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_a_folder_trains_and_draws(tmp_path, kind):
    base = getattr(tiny_bases, kind)(tmp_path / kind)
    outcome = trained(base, tmp_path / "out", kind="free", target_modules=["attn1", "attn2"])
    pipe = DiffusionPipeline.from_pretrained(base)
    header = load_adapter(pipe, outcome.adapter)
    assert header.fingerprint["prediction_type"] == {"sd1": "epsilon", "sd2": "v_prediction"}[kind]
    assert drawn(outcome, tmp_path / "drawn").files


@pytest.mark.slow
def test_a_single_file_is_the_same_base_as_its_folder(tmp_path, sd1):
    file = tiny_bases.single_file(sd1, tmp_path / "sd1.safetensors")
    whole, single = bases.load_base(str(sd1)), bases.load_base(str(file), base_config=str(sd1))
    for part in ("unet", "vae", "text_encoder"):
        torch.testing.assert_close(
            dict(getattr(single, part).state_dict()), dict(getattr(whole, part).state_dict()), rtol=0, atol=0
        )
    outcome = trained(file, tmp_path / "out", base_config=str(sd1))
    load_adapter(DiffusionPipeline.from_pretrained(sd1), outcome.adapter)
    made = drawn(outcome, tmp_path / "drawn", base_config=str(sd1))
    told = json.loads(Image.open(made.sheet).text["comcat"])
    assert told["base"] == file.name and str(tmp_path) not in json.dumps(told)  # a shared picture tells of no folders


def test_a_single_file_whose_configuration_is_nowhere_says_how_to_get_it(tmp_path, sd1):
    file = tiny_bases.single_file(sd1, tmp_path / "sd1.safetensors")
    with pytest.raises(FileNotFoundError, match="hf download stable-diffusion-v1-5/.*--base_config"):
        bases.load_base(str(file))
    with pytest.raises(FileNotFoundError, match="'no/such' is not in the local cache"):
        bases.load_base(str(file), base_config="no/such")


def test_a_damaged_single_file_is_refused(tmp_path, sd1):
    half = tiny_bases.damaged(tiny_bases.single_file(sd1, tmp_path / "sd1.safetensors"))
    for config in (None, str(sd1)):
        with pytest.raises(ValueError, match=r"half\.safetensors"):
            bases.load_base(str(half), base_config=config)


@pytest.mark.slow
def test_a_variant_is_loaded_where_it_is_asked_for(tmp_path, sd1):
    pipe = DiffusionPipeline.from_pretrained(sd1)
    pipe.save_pretrained(tmp_path / "fp16", variant="fp16")
    assert trained(tmp_path / "fp16", tmp_path / "out", variant="fp16").adapter.is_file()
    with pytest.raises(ValueError, match="could not be loaded"):
        trained(tmp_path / "fp16", tmp_path / "other", variant="bf16")


def test_what_is_no_base_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model_index.json"):
        bases.load_base(str(tmp_path))
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(ValueError, match="can run code"):
        bases.load_base(str(tmp_path / "model.ckpt"))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="model.safetensors"):
        bases.load_base(str(tmp_path / "model.safetensors"))
    with pytest.raises(FileNotFoundError, match="neither a local folder or file nor in the local cache"):
        bases.load_base("nobody/nothing")
    with pytest.raises(FileNotFoundError, match="no such folder or file"):
        bases.load_base(str(Path("nowhere") / "at" / "all"))


@pytest.mark.parametrize(
    ("device", "base", "able", "suits"),
    [
        ("cpu", "a/b", {"avx512_bf16": True}, True),
        ("cpu", "a/b", {"amx_bf16": True, "avx512_bf16": False}, True),
        ("cpu", "a/b", {"avx512_f": True}, False),
        ("cpu", "a/b", None, False),
        ("cpu", "embedded", {"avx512_bf16": True}, False),  # it would gain nothing
        ("cpu", str(bases.assets() / "tiny-sd"), {"avx512_bf16": True}, False),
        ("cpu:0", "a/b", {"avx512_bf16": True}, True),
        ("cuda", "a/b", {}, True),
        ("cuda", "embedded", {}, True),
        ("mps", "a/b", {"avx512_bf16": True}, False),
    ],
)
def test_bfloat16_suits_where_the_device_has_instructions_for_it(monkeypatch, device, base, able, suits):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    if able is None:  # an older torch does not tell
        monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    assert bases.suits_bf16(device, base) is suits
    if device.startswith("cpu"):
        assert bases.asked_precision(None, device, base) == ("bf16" if suits else "fp32")


def test_a_gpu_draws_in_half_precision_unless_another_is_asked_for():
    asked = (None, "cuda"), (None, "cuda:1"), (None, "mps"), ("bf16", "cuda"), ("fp32", "cuda"), ("fp32", "cpu")
    assert [bases.asked_precision(*one, "a/b") for one in asked] == ["fp16", "fp16", "fp32", "bf16", "fp32", "fp32"]


def test_a_copy_without_the_flow_base_says_how_it_is_made(tmp_path, monkeypatch):
    (tmp_path / "assets" / "tiny-sd").mkdir(parents=True)
    monkeypatch.setattr(places, "_PACKAGE", tmp_path)
    with pytest.raises(FileNotFoundError, match="make flow-base trains it"):
        bases.load_base(places.EMBEDDED_FLOW)
    (tmp_path / "assets" / "tiny-flow").mkdir()
    (tmp_path / "assets" / "tiny-flow" / "model_index.json").write_text("{}")
    assert bases.place_of(places.EMBEDDED_FLOW) == tmp_path / "assets" / "tiny-flow"
    for name in (places.EMBEDDED_FLOW, str(tmp_path / "assets" / "tiny-flow")):
        assert bases.is_embedded(name) and bases.default_guidance(name) == bases.EMBEDDED_GUIDANCE
    assert not bases.is_embedded(str(tmp_path / "assets"))


@pytest.mark.slow
def test_the_flow_base_trains_and_draws(tmp_path):
    outcome = trained(places.EMBEDDED_FLOW, tmp_path / "out", kind="tied")
    assert load_adapter(bases.load_base(places.EMBEDDED_FLOW), outcome.adapter).base_model == places.EMBEDDED_FLOW
    (file,) = drawn(outcome, tmp_path / "drawn").files
    assert Image.open(file).size == (64, 64)
