"""The folder of a compressed model: bit for bit, the same bytes twice, strict about everything that is not its own."""

import json

import pytest
import safetensors.torch
import torch

from comcat_diffusion.compression import Plan, Settings, compress, load_compressed, save_compressed
from comcat_diffusion.compression.modelling import CONFIG, MODELLING
from comcat_diffusion.compression.store import PLAN, TENSORS
from tests.compression_models import batches, built, out, pictures
from tests.slow import mostly


@pytest.fixture
def saved(tmp_path):
    low, plan = compress(built("vit"), 0.4, batches(), settings=Settings(model_id="some/vit"))
    save_compressed(low, plan, tmp_path / "low")
    return tmp_path / "low"


@pytest.mark.parametrize("kind", mostly(["vit", "vit-nobias", "deit", "deit-nobias"], "vit", "deit"))
@pytest.mark.parametrize("method", mostly(["energy", "uniform", "matrix"], "energy", "matrix"))
def test_a_model_comes_back_bit_for_bit(kind, method, tmp_path):
    dtype = torch.bfloat16 if kind == "deit" else torch.float32
    dense = built(kind).to(dtype)
    calibration = batches(2, dtype=torch.float32)
    low, plan = compress(dense, 0.4, calibration, settings=Settings(method=method))
    with torch.no_grad():
        low.train().vit.layernorm.weight.mul_(1.5) if "vit" in kind else None  # as after training
    save_compressed(low, plan, tmp_path / "low")
    assert sorted(path.name for path in (tmp_path / "low").iterdir()) == [TENSORS, CONFIG, MODELLING, PLAN]
    state = torch.random.get_rng_state()
    again, read = load_compressed(tmp_path / "low")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert read == plan and not again.training
    ours, theirs = low.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(t.dtype == ours[n].dtype and torch.equal(t, ours[n]) for n, t in theirs.items())
    inputs = pictures(dtype=dtype)
    assert torch.equal(out(again, inputs), out(low.eval(), inputs))
    assert not torch.equal(out(again, inputs), out(dense, inputs))


def test_the_attention_function_comes_back(tmp_path):
    dense = built("vit").float()
    dense.set_attn_implementation("eager")
    low, plan = compress(dense, 0.4)
    save_compressed(low, plan, tmp_path / "low")
    again, _ = load_compressed(tmp_path / "low")
    inputs = pictures(dtype=torch.float32)
    assert len(again(inputs, output_attentions=True).attentions) == 2
    assert torch.equal(out(again, inputs), out(low, inputs))


def test_the_same_model_gives_the_same_bytes_and_no_path_of_this_machine(saved, tmp_path):
    low, plan = load_compressed(saved)
    low.config._name_or_path = str(tmp_path)
    save_compressed(low, plan, tmp_path / "again")
    for name in (TENSORS, PLAN):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes()
    assert str(tmp_path) not in (saved / PLAN).read_text() and plan.model_id == "some/vit"


def test_a_folder_with_a_result_is_not_overwritten(saved):
    low, plan = load_compressed(saved)
    before = (saved / PLAN).read_bytes()
    with pytest.raises(ValueError, match="holds a compressed model already"):
        save_compressed(low, plan, saved)
    assert (saved / PLAN).read_bytes() == before


def test_another_model_or_one_with_nan_is_not_written_under_a_plan(tmp_path):
    dense = built("vit")
    low, plan = compress(dense, 0.4)
    with pytest.raises(ValueError, match="another's"):
        save_compressed(dense, plan, tmp_path / "low")
    with torch.no_grad():
        low.vit.layers[1].attention.q_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.attention\.q_proj\.weight"):
        save_compressed(low, plan, tmp_path / "low")
    assert not (tmp_path / "low").exists()


def test_a_plan_survives_its_json():
    _, plan = compress(built("deit"), 0.4)
    assert Plan.from_json(plan.to_json()) == plan and any(width is None for width in plan.widths.values())


def edited(folder, change):
    whole = json.loads((folder / PLAN).read_text())
    change(whole)
    (folder / PLAN).write_text(json.dumps(whole))


def widen(whole):
    name = next(name for name, width in whole["plan"]["widths"].items() if width is not None)
    whole["plan"]["widths"][name] = 1000


def retype(whole):
    whole["plan"]["widths"] = {name: "4" for name in whole["plan"]["widths"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, told",
    [
        (lambda w: w["plan"].update(format_version=99), "format version 99"),
        (lambda w: w["plan"].update(mystery=1), "unknown entries: mystery"),
        (lambda w: w["plan"].pop("layout"), "missing entries: layout"),
        (lambda w: w["plan"].update(layout="0"), "another layout"),
        (lambda w: w["plan"]["widths"].popitem(), "another layout"),
        (lambda w: w["model"].update({"class": "Trainer"}), "no model known here"),
        (lambda w: w["model"].update(library="os"), "no model known here"),
        (lambda w: w["model"]["config"].update(num_hidden_layers=3), "another layout"),
        (lambda w: w.update(sha256="0"), "damaged or was edited"),
        (lambda w: w.pop("model"), "does not make sense"),
        (widen, "the width 1000"),
        (retype, "whole numbers"),
    ],
)
def test_a_plan_that_was_edited_is_refused(saved, change, told):
    edited(saved, change)
    with pytest.raises(ValueError, match=told):
        load_compressed(saved)


def other_tensors(folder, change):
    import hashlib

    tensors = safetensors.torch.load_file(folder / TENSORS)
    change(tensors)
    content = safetensors.torch.save(tensors)
    (folder / TENSORS).write_bytes(content)
    edited(folder, lambda whole: whole.update(sha256=hashlib.sha256(content).hexdigest()))


NORM = "vit.layernorm.weight"


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda t: t.pop(NORM), f"lacks: {NORM}"),
        (lambda t: t.update(more=torch.ones(1)), "unknown tensors: more"),
        (lambda t: t.update({NORM: torch.ones(3)}), f"misshapen tensors: {NORM}"),
        (lambda t: t[NORM].fill_(torch.inf), f"NaN or infinity in: {NORM}"),
    ],
)
def test_tensors_that_are_not_the_models_are_refused(saved, change, told):
    other_tensors(saved, change)
    with pytest.raises(ValueError, match=told):
        load_compressed(saved)


def test_folders_without_a_model_are_refused(saved, tmp_path):
    with pytest.raises(ValueError, match=r"no compressed model: it has no plan\.json"):
        load_compressed(tmp_path)
    (saved / TENSORS).write_bytes((saved / TENSORS).read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged or was edited"):
        load_compressed(saved)
    (saved / TENSORS).unlink()
    with pytest.raises(ValueError, match="lacks"):
        load_compressed(saved)
    (saved / PLAN).write_text("{")
    with pytest.raises(ValueError, match="does not make sense"):
        load_compressed(saved)


def test_from_pretrained_does_not_mistake_it_for_a_stock_checkpoint(saved):
    from transformers import ViTForImageClassification

    with pytest.raises(OSError):
        ViTForImageClassification.from_pretrained(saved)
