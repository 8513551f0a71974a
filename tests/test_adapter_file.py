"""The adapter file: it explains itself, the same inputs give the same bytes, and nothing wrong gets in."""

import hashlib
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig

from comcat_diffusion import (
    ComcatConfig,
    atomic,
    load_adapter,
    merge_adapters,
    read_adapter,
    save_adapter,
    unload_adapters,
    unmerge_adapters,
)
from comcat_diffusion.adapters.header import NEWEST, AdapterFileError, Notes
from comcat_diffusion.adapters.model import factors
from comcat_diffusion.adapters.same_base import other_weights
from tests.slow import slow

GOLDEN = Path(__file__).parent / "golden" / "adapter-v1.safetensors"
NOTES = Notes("sks", "a photo of sks dog", "dog", {"resolution": 64, "steps": 3, "seed": 0})


def pipeline(unet, text_encoder=None, prediction_type="epsilon"):
    parts = dict.fromkeys(("vae", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    return StableDiffusionPipeline(
        unet=unet, text_encoder=text_encoder, scheduler=scheduler, **parts, requires_safety_checker=False
    )


@pytest.fixture(params=[pytest.param(False, id="free"), slow(True, id="foldable")])
def trained(request, tiny_unet, tiny_clip, randomize):
    """A pipeline whose U-Net and text encoder carry a random adapter named dog."""
    pipe = pipeline(tiny_unet(), tiny_clip())
    pipe.unet.add_adapter(ComcatConfig(r=2, alpha=3.0, foldable=request.param), "dog")
    pipe.text_encoder.add_adapter(ComcatConfig(r=1, foldable=request.param), "dog")
    randomize(pipe.unet, "dog", 1)
    randomize(pipe.text_encoder, "dog", 2)
    return pipe


@pytest.fixture
def fresh(tiny_unet, tiny_clip):
    return pipeline(tiny_unet(), tiny_clip())


@pytest.fixture
def file(trained, tmp_path):
    save_adapter(trained, tmp_path / "dog.safetensors", "dog", "somebody/base", NOTES)
    return tmp_path / "dog.safetensors"


def rewritten(file, tmp_path, change):
    """A copy of the file after `change(tensors, metadata)`."""
    with safetensors.safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = safetensors.torch.load_file(file)
    change(tensors, metadata)
    safetensors.torch.save_file(tensors, tmp_path / "changed.safetensors", metadata)
    return tmp_path / "changed.safetensors"


def test_a_saved_adapter_does_on_a_fresh_base_what_it_did(trained, fresh, file, tiny_unet, tiny_clip):
    base = tiny_unet.run(fresh.unet), tiny_clip.run(fresh.text_encoder)
    header = load_adapter(fresh, file, "hund")
    assert torch.equal(tiny_unet.run(fresh.unet), tiny_unet.run(trained.unet))
    assert torch.equal(tiny_clip.run(fresh.text_encoder), tiny_clip.run(trained.text_encoder))
    assert (tiny_unet.run(fresh.unet) - base[0]).abs().max() > 0.01
    assert (tiny_clip.run(fresh.text_encoder) - base[1]).abs().max() > 0.01
    assert (header.notes.trigger, header.base_model) == ("sks", "somebody/base")
    assert not any(p.requires_grad for p in fresh.unet.parameters())


def test_loading_draws_no_random_numbers_and_leaves_none_in_place(trained, fresh, file):
    """Factors that a file's take the place of are not made up first, which took most of the time."""
    state = torch.get_rng_state()
    load_adapter(fresh, file, "hund")
    assert torch.equal(torch.get_rng_state(), state)
    for model, other in ((fresh.unet, trained.unet), (fresh.text_encoder, trained.text_encoder)):
        found, expected = factors(model, "hund"), factors(other, "dog")
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
        assert model.peft_config["hund"].init_weights
    fresh.unet.delete_adapters("hund")
    fresh.unet.add_adapter(trained.unet.peft_config["dog"], "new")
    assert not torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_number_that_is_none_is_found(number, dtype):
    from comcat_diffusion.adapters.store import _is_finite

    for shape in ((3, 700), (1,)):
        tensor = torch.randn(shape).to(dtype)
        assert _is_finite(tensor) and _is_finite(tensor[:0])
        tensor[-1:] = number
        assert not _is_finite(tensor)


def test_the_header_is_read_without_torch(file):
    code = (
        "import sys; from comcat_diffusion.adapters.header import read_adapter; "
        f"h = read_adapter({str(file)!r}); assert 'torch' not in sys.modules; print(h.notes.trigger)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "sks\n"), done.stderr


def test_the_header_speaks_to_other_tools_and_no_key_contains_lora(file):
    with safetensors.safe_open(file, framework="pt") as opened:
        metadata, names = opened.metadata(), list(opened.keys())
    assert metadata["modelspec.trigger_phrase"] == "sks"
    assert metadata["modelspec.resolution"] == "64x64"
    assert names and not any("lora" in name for name in names)


def test_diffusers_refuses_the_file_loudly(fresh, file):
    with pytest.raises(ValueError, match="lora"):
        fresh.load_lora_weights(str(file))


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False], indirect=True, ids=["free"])
def test_same_inputs_same_bytes_in_every_process(file):
    code = (
        "import torch; from comcat_diffusion.adapters.store import serialized; "
        "from comcat_diffusion.adapters.header import read_adapter; import safetensors.torch, hashlib; "
        f"path = {str(file)!r}; "
        "print(hashlib.sha256(serialized(safetensors.torch.load_file(path), read_adapter(path))).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == hashlib.sha256(file.read_bytes()).hexdigest() + "\n"


def test_precision_of_the_file_is_a_choice(trained, tmp_path):
    for dtype in (torch.float16, torch.bfloat16, None):
        save_adapter(trained, tmp_path / "a.safetensors", "dog", dtype=dtype)
        found = {tensor.dtype for tensor in safetensors.torch.load_file(tmp_path / "a.safetensors").values()}
        assert found == {dtype or torch.float32}


def test_adapters_add_up_and_stay_active(trained, fresh, file, tiny_unet, randomize):
    load_adapter(fresh, file, "one")
    once = tiny_unet.run(fresh.unet)
    load_adapter(fresh, file, "two")
    assert fresh.unet.active_adapters() == ["one", "two"]
    trained.unet.set_adapters(["dog"], [2.0])
    torch.testing.assert_close(tiny_unet.run(fresh.unet), tiny_unet.run(trained.unet), rtol=1e-5, atol=1e-5)
    assert (tiny_unet.run(fresh.unet) - once).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_copy_of_the_base_in_another_precision_is_the_same_base(file, tiny_unet, tiny_clip, dtype):
    assert load_adapter(pipeline(tiny_unet(dtype), tiny_clip(dtype)), file).notes.trigger == "sks"


def test_a_fine_tune_is_refused_unless_allowed(fresh, file, tiny_unet):
    before = tiny_unet.run(fresh.unet)
    for parameter in fresh.unet.parameters():
        parameter.data *= 1.1
    with pytest.raises(AdapterFileError, match="somebody/base.*other weights.*any_weights"):
        load_adapter(fresh, file)
    assert load_adapter(fresh, file, any_weights=True).base_model == "somebody/base"
    assert (tiny_unet.run(fresh.unet) - before).abs().max() > 0.01


def test_a_sketch_of_numbers_that_no_weight_has_is_of_another_base(file, fresh):
    trained = read_adapter(file).fingerprint
    assert other_weights(trained, trained) is False
    for value in (10**400, float("nan"), 1e31):
        assert other_weights({**trained, "sketch": [value] * len(trained["sketch"])}, trained) is True


def test_a_base_that_predicts_something_else_is_refused(file, tiny_unet, tiny_clip):
    with pytest.raises(AdapterFileError, match="prediction type.*v_prediction instead of epsilon"):
        load_adapter(pipeline(tiny_unet(), tiny_clip(), "v_prediction"), file, any_weights=True)


def test_a_base_of_another_shape_is_refused_in_one_sentence(file, tiny_clip):
    from diffusers import UNet2DConditionModel

    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    other = UNet2DConditionModel(8, 4, 4, block_out_channels=(16,), norm_num_groups=8, cross_attention_dim=40, **blocks)
    with pytest.raises(AdapterFileError, match="40 instead of 24") as caught:
        load_adapter(pipeline(other, tiny_clip()), file)
    assert "\n" not in str(caught.value)


def rename(tensors, metadata):
    name = sorted(tensors)[0]
    tensors[name.replace("attn", "atn")] = tensors.pop(name)


BROKEN = {
    "lacks: .*attn": rename,
    "holds NaN or infinity": lambda tensors, metadata: tensors[sorted(tensors)[0]].fill_(float("-inf")),
    "lacks": lambda tensors, metadata: tensors.pop(sorted(tensors)[0]),
    "unknown tensors": lambda tensors, metadata: tensors.update(stray=torch.zeros(2)),
    "misshapen": lambda tensors, metadata: tensors.update({sorted(tensors)[0]: torch.zeros(3, 5)}),
    "NaN or infinity": lambda tensors, metadata: tensors[sorted(tensors)[0]].fill_(float("nan")),
    "settings that this version does not know": lambda tensors, metadata: edit(
        metadata, lambda h: h["config"]["unet"].update(q=1)
    ),
    "configuration that does not make sense": lambda tensors, metadata: edit(
        metadata, lambda h: h["config"]["unet"].update(r=0)
    ),
    "update comcat-diffusion": lambda tensors, metadata: edit(metadata, lambda h: h.update(format_version=NEWEST + 1)),
    "header that does not make sense": lambda tensors, metadata: metadata.update(comcat="{"),
    "not a COMCAT adapter": lambda tensors, metadata: metadata.pop("comcat"),
}


STRANGE = {
    "notes hold": lambda header: header["notes"].update(trigger=5),
    "notes": lambda header: header["notes"].update(others=[{"trigger": 1, "class_word": "dog"}]),
    "fingerprint hold": lambda header: header.update(fingerprint=[]),
    "versions hold": lambda header: header.update(versions=[]),
    "tokens hold": lambda header: header.update(tokens=[1]),
    "base_model hold": lambda header: header.update(base_model=None),
    "config hold": lambda header: header.update(config=[1]),
    "parenthesis|unterminated": lambda header: header["config"]["unet"].update(target_modules="("),
}


@pytest.mark.parametrize("message", STRANGE)
def test_a_header_that_holds_other_things_than_it_should_is_refused(file, tmp_path, message):
    changed = rewritten(file, tmp_path, lambda tensors, metadata: edit(metadata, STRANGE[message]))
    with pytest.raises(AdapterFileError, match=f"has a header that does not make sense.*({message})"):
        read_adapter(changed)


def edit(metadata, change):
    header = json.loads(metadata["comcat"])
    change(header)
    metadata["comcat"] = json.dumps(header)


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_file_is_refused_and_the_pipeline_stays_as_it_was(fresh, file, tmp_path, tiny_unet, message):
    before, keys = tiny_unet.run(fresh.unet), list(fresh.unet.state_dict())
    with pytest.raises(AdapterFileError, match=message):
        load_adapter(fresh, rewritten(file, tmp_path, BROKEN[message]))
    assert torch.equal(tiny_unet.run(fresh.unet), before)
    assert list(fresh.unet.state_dict()) == keys and not hasattr(fresh.unet, "peft_config")


def test_files_that_are_no_safetensors_are_refused(file, tmp_path):
    content = file.read_bytes()
    huge = struct.pack("<Q", 1 << 40) + content[8:]
    torch.save({"a": torch.zeros(1)}, tmp_path / "zip.safetensors")
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps([1]))
    for name, bytes_ in {"cut": content[:-7], "start": content[:5], "empty": b"", "huge": huge}.items():
        (tmp_path / f"{name}.safetensors").write_bytes(bytes_)
    expected = {
        "zip": "pickle",
        "pickle": "pickle",
        "cut": "damaged",
        "start": "cut short",
        "empty": "cut short",
        "huge": "cut short",
    }
    for name, message in expected.items():
        with pytest.raises(AdapterFileError, match=message):
            read_adapter(tmp_path / f"{name}.safetensors")
    with pytest.raises(AdapterFileError, match="no adapter file"):
        read_adapter(tmp_path / "nobody.safetensors")


@pytest.mark.parametrize("lie", ["longer", "beyond", "other type"])
def test_a_header_that_lies_about_its_shapes_is_refused(fresh, file, tmp_path, lie):
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    table = json.loads(content[8 : 8 + length])
    entry = table[min(name for name in table if name != "__metadata__")]
    if lie == "longer":
        entry["shape"][0] += 1
    elif lie == "beyond":
        entry["data_offsets"][1] += 1 << 20
    else:
        entry["dtype"] = "F64"
    text = json.dumps(table).encode()
    (tmp_path / "lie.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    with pytest.raises(AdapterFileError, match="damaged or cut short") as caught:
        load_adapter(fresh, tmp_path / "lie.safetensors")
    assert "\n" not in str(caught.value) and not hasattr(fresh.unet, "peft_config")


def test_a_header_whose_length_begins_like_a_pickle_is_read(trained, tmp_path):
    """The first byte of a file is the low byte of its header's length: 0x80 now and then, as of every pickle."""
    found = set()
    for letters in range(0, 256, 4):
        notes = Notes(instance_prompt="x" * letters)
        save_adapter(trained, tmp_path / "dog.safetensors", "dog", "somebody/base", notes)
        found.add((tmp_path / "dog.safetensors").read_bytes()[0])
        assert read_adapter(tmp_path / "dog.safetensors").notes == notes
    assert 0x80 in found and len(found) > 10


def test_a_component_that_the_pipeline_lacks_is_named(file, tiny_unet):
    with pytest.raises(AdapterFileError, match="text_encoder"):
        load_adapter(pipeline(tiny_unet()), file)


def test_saving_a_merged_adapter_says_what_to_do_first(fresh, file, tmp_path):
    load_adapter(fresh, file, "dog")
    merge_adapters(fresh)
    with pytest.raises(ValueError, match="call unmerge_adapters, then save"):
        save_adapter(fresh, tmp_path / "merged.safetensors", "dog")
    unmerge_adapters(fresh)
    save_adapter(fresh, tmp_path / "live.safetensors", "dog")
    assert not (tmp_path / "merged.safetensors").exists()


def test_a_home_of_ones_own_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    atomic.write_bytes("~/dog.safetensors", b"x")
    assert (tmp_path / "dog.safetensors").read_bytes() == b"x"


def test_loading_beside_a_merged_adapter_says_what_to_do_first(fresh, file):
    load_adapter(fresh, file, "dog")
    merge_adapters(fresh)
    with pytest.raises(ValueError, match="call unmerge_adapters first"):
        load_adapter(fresh, file, "again")
    unmerge_adapters(fresh)
    load_adapter(fresh, file, "again")


def test_a_name_in_use_is_refused(fresh, file):
    load_adapter(fresh, file, "dog")
    with pytest.raises(ValueError, match="already loaded"):
        load_adapter(fresh, file, "dog")


def test_an_adapter_loads_beside_a_lora(fresh, file, tiny_unet):
    fresh.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False), "style")
    styled = tiny_unet.run(fresh.unet)
    load_adapter(fresh, file, "dog")
    both = tiny_unet.run(fresh.unet)
    assert (both - styled).abs().max() > 0.01
    fresh.unet.set_adapters(["style"])
    assert torch.equal(tiny_unet.run(fresh.unet), styled)


def test_what_is_not_there_or_not_finite_is_not_saved(trained, tmp_path):
    with pytest.raises(ValueError, match="no COMCAT adapter 'cat' to save; loaded: dog"):
        save_adapter(trained, tmp_path / "cat.safetensors", "cat")
    next(iter(factors(trained.unet, "dog").values())).data.fill_(float("inf"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        save_adapter(trained, tmp_path / "dog.safetensors", "dog")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(trained, file, tmp_path):
    before = file.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # a real write error after 100 bytes
    try:
        with pytest.raises(OSError):
            save_adapter(trained, file, "dog")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["dog.safetensors"]


def _by_formula(model):
    """Weights that no random generator has to reproduce: a sine of their position."""
    for name, parameter in model.named_parameters():
        number = sum(name.encode())
        positions = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
        parameter.data = (torch.sin(positions * 0.7 + number) * 0.3).to(parameter.dtype)
    return model


def test_the_golden_file_of_format_version_1_opens_for_ever(tiny_unet):
    """Written once by `python tests/golden/write.py`; never written again."""
    pipe = pipeline(_by_formula(tiny_unet()))
    header = load_adapter(pipe, GOLDEN, "golden")
    assert (header.format_version, header.base_model, header.notes.class_word) == (1, "tests/tiny", "dog")
    expected = _by_formula(_with_adapter(tiny_unet()))
    for name, factor in factors(pipe.unet, "golden").items():
        torch.testing.assert_close(factor.data, factors(expected, "golden")[name].data.half().float(), rtol=0, atol=0)
    assert len(factors(pipe.unet, "golden")) == 16


def _with_adapter(unet):
    unet.add_adapter(ComcatConfig(r=2, alpha=4.0, target_modules=["attn2"]), "golden")
    return unet


def test_the_verbs_for_a_whole_pipeline_undo_each_other(trained, tiny_unet, tiny_clip):
    live = tiny_unet.run(trained.unet), tiny_clip.run(trained.text_encoder)
    with pytest.raises(ValueError, match="nothing to unmerge"):
        unmerge_adapters(trained)
    merge_adapters(trained)
    torch.testing.assert_close(tiny_unet.run(trained.unet), live[0], rtol=1e-4, atol=1e-5)  # sums in another order
    with pytest.raises(ValueError, match="merged already"):
        merge_adapters(trained)
    unmerge_adapters(trained)
    assert torch.equal(tiny_unet.run(trained.unet), live[0])
    assert torch.equal(tiny_clip.run(trained.text_encoder), live[1])
    with pytest.raises(ValueError, match="No adapter cat to merge; loaded: dog"):
        merge_adapters(trained, ["cat"])
    unload_adapters(trained)
    assert torch.equal(tiny_unet.run(trained.unet), tiny_unet.run(tiny_unet()))
    assert (tiny_unet.run(trained.unet) - live[0]).abs().max() > 0.01
    with pytest.raises(ValueError, match="No adapter at all to merge"):
        merge_adapters(trained)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]
)
def test_numbers_of_every_type_are_looked_at(dtype):
    """Files are anybody's, and what no file of ours holds must not end in an error of PyTorch's, nor go unseen."""
    from comcat_diffusion.adapters.store import _is_finite

    fine, bad = torch.ones(5, 5).to(dtype), torch.ones(5, 5)
    bad[2, 3] = float("nan")
    assert _is_finite(fine) and not _is_finite(bad.to(dtype))
