"""The benchmark of ways to learn a subject: each trains and writes what it says; the table follows the runs."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from benchmarks import customization, customization_report, customization_runs
from benchmarks.customization_runs import METHODS, Bench, Run
from comcat_diffusion import bases
from comcat_diffusion.evaluation.features import load_features
from recipe.subject import HELD_OUT, TRAIN, caption, picture

KINDS = (
    "comcat train",
    "COMCAT free, rank 4, cross, teacher",
    "LoRA, rank 4",
    "Custom Diffusion's keys and values",
    "Textual Inversion",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_method_trains_and_writes_what_it_says(name, tmp_path, monkeypatch):
    monkeypatch.setattr(customization_runs, "picture", lambda subject, pose: _blank())
    pipe, cost = customization_runs.learn(Bench(tmp_path, 2), Run(name, "cat", 1e-2, 0, 2))
    METHODS[name].write(pipe, tmp_path / "file.safetensors")
    with safe_open(tmp_path / "file.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert METHODS[name].command or sum(tensor.numel() for tensor in tensors.values()) == cost["parameters"] > 0
    assert (tmp_path / "file.safetensors").stat().st_size < 20_000 or not METHODS[name].command
    base = bases.load_base(bases.EMBEDDED)
    if name.startswith("Custom"):
        shipped = base.unet.state_dict()
        assert all(key.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for key in tensors)
        assert any(not torch.equal(tensor, shipped[key].half()) for key, tensor in tensors.items())


def _blank():
    from PIL import Image

    return Image.new("RGB", (64, 64), "red")


@pytest.mark.slow
def test_the_peak_of_a_method_is_that_of_a_process_of_its_own_measured_once(tmp_path, monkeypatch):
    asked = []

    def fresh(function, run):
        asked.append(run)
        return function(run)

    monkeypatch.setattr(customization_runs.shared, "in_fresh_process", fresh)
    monkeypatch.setattr(customization_runs, "picture", lambda subject, pose: _blank())
    run = Run("LoRA, rank 4", "cat", 1e-2, 0, 300)
    first = customization_runs.peak_mib(run, tmp_path)
    assert customization_runs.peak_mib(replace(run, seed=1), tmp_path) == first > 100 and asked == [run]


def test_the_grid_is_not_tried_on_what_is_reported():
    assert not set(customization.TUNING) & set(customization.REPORTED)


def test_captions_name_what_is_not_the_subject():
    assert caption("cat", TRAIN[1]) == "a photo of a big sks cat on the left, green background"


def test_the_best_rate_has_the_highest_score(tmp_path, monkeypatch):
    method = METHODS["LoRA, rank 4"]
    monkeypatch.setattr(customization, "METHODS", {"LoRA, rank 4": method})
    for rate, fidelity in zip(method.rates, (0.5, 0.9, 0.7), strict=True):
        _keep(tmp_path, Run("LoRA, rank 4", "teddy", rate, 0, 3), fidelity)
    assert customization.best_rates(None, None, tmp_path, 3, ("teddy",)) == {"LoRA, rank 4": method.rates[1]}


def test_the_table_has_a_row_for_each_method_with_means_over_its_runs(tmp_path):
    runs = [Run("LoRA, rank 4", subject, 1e-2, 0, 3) for subject in ("fish", "house")]
    results = [_result(run, fidelity) for run, fidelity in zip(runs, (0.5, 0.7), strict=True)]
    report = customization_report.write_report(results, {}, tmp_path / "result.json", tmp_path)
    assert json.loads((tmp_path / "result.json").read_text()) == report
    assert (tmp_path / "fidelity-bytes.png").exists() and (tmp_path / "fidelity-seconds.png").exists()
    (row,) = report["rows"]
    assert row["method"] == "LoRA, rank 4" and row["runs"] == 2 and row["file_bytes"] == 1000
    assert row["fidelity"]["mean"] == pytest.approx(0.6)
    assert row["fidelity"]["low"] < 0.6 < row["fidelity"]["high"]


def test_a_method_is_compared_with_lora_run_by_run(tmp_path):
    """Subjects differ by far more than methods do, and the interval of the difference knows nothing of that."""
    results = []
    for subject, fidelity in (("fish", 0.2), ("house", 0.8)):
        results.append(_result(Run("LoRA, rank 4", subject, 1e-2, 0, 3), fidelity))
        results.append(_result(Run("LoKr, rank 4", subject, 1e-2, 0, 3), fidelity - 0.1))
        results.append(_result(Run("IA3", subject, 1e-2, 0, 5), fidelity))  # of which no LoRA has as many steps
    lora, lokr, ia3 = customization_report.write_report(results, {}, tmp_path / "result.json", tmp_path)["rows"]
    against = customization_report.AGAINST
    assert lora[against]["mean"] == 0 and against not in ia3
    assert all(lokr[against][name] == pytest.approx(-0.1) for name in ("mean", "low", "high"))
    assert lokr["fidelity"]["high"] > lora["fidelity"]["low"]


@pytest.mark.slow
def test_measures_are_read_from_the_pictures_that_were_kept(tmp_path):
    run = Run("LoRA, rank 4", "cat", 1e-2, 0, 3)
    own = [picture("cat", pose).resize((64, 64)) for pose in (*HELD_OUT, *TRAIN)] * 2
    other = [picture("house", pose).resize((64, 64)) for pose in (*HELD_OUT, *TRAIN)] * 2
    customization_runs.strip_of([own, own]).save(tmp_path / f"{run.name}.png")
    customization_runs.strip_of([other, other]).save(tmp_path / "base-cat.png")
    customization_runs.strip_of([other, own]).save(tmp_path / f"{replace(run, seed=1).name}.png")
    features, found = load_features(bases.EMBEDDED), []
    for one in (run, replace(run, seed=1)):
        (tmp_path / f"{one.name}.json").write_text(json.dumps({"seconds": 1.0}))
        found.append(customization_runs.measured(features, features, one, tmp_path))
    likeness, otherness = (customization.mean(one["fidelity"]) for one in found)
    assert likeness > 0.7 > 0.3 > otherness
    assert customization.mean(found[0]["drift"]) > 0.2 and customization.mean(found[0]["copying"]) > 0.9
    own, other = found
    assert customization.mean(own["shape"]) > customization.mean(other["shape"])
    assert all(customization.mean(one["background_moved"]) < 0.1 for one in found)  # both stand on the same colours
    assert found[0] == customization_runs.measured(None, None, run, tmp_path)  # from what was kept


def _keep(folder, run, fidelity):
    (folder / f"{run.name}.json").write_text("{}")
    (folder / f"{run.name}.measures.json").write_text(json.dumps(_result(run, fidelity)))


def _result(run, fidelity):
    facts = {**vars(run), "parameters": 10, "seconds": 1.0, "file_bytes": 1000, "fidelity": [[fidelity] * 2] * 2}
    facts["peak_mib"] = 900.0
    others = dict.fromkeys(("clip", "obedience", "drift", "copying"), [[0.5, 0.5]] * 2) | {"diversity": [[0.1]] * 2}
    return facts | others
