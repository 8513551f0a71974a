"""benchmarks/training.py, run tiny: that it measures real training, fairly, and what its JSON holds."""

import copy
import json
import threading
import time
from multiprocessing import Pipe

import pytest
import torch

from benchmarks import circumstances, training, training_clock, training_report

CPU, STEPS = torch.device("cpu"), 3

pytestmark = pytest.mark.slow  # what is measured is not what a change of the package can break


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What a quick run of one part writes."""
    path = tmp_path_factory.mktemp("benchmark") / "training.json"
    training.main(["--quick", "--parts", "recipe", "--steps", str(STEPS), "--output", str(path)])
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def pair(report):
    """The runs of ours and of the recipe, and the row that compares them."""
    rows = [row for row in report["rows"] if row["part"] == "recipe"]
    assert [row["variant"] for row in rows] == ["ours", "recipe", "ratio"]
    return rows


def test_the_json_says_what_was_measured_and_where(report):
    assert {"circumstances", "settings", "rows"} == set(report)
    assert report["settings"] == {
        "architecture": "tiny",
        "resolution": 64,
        "batch": 1,
        "steps": STEPS,
        "targets": "self+cross",
    }
    assert {"commit", "dtype", "threads", "versions"} <= set(report["circumstances"])
    assert {row["part"] for row in report["rows"]} == {"recipe"}


def test_both_really_train_on_the_same_amount_of_work(pair):
    ours, recipe, _ = pair
    for one in (ours, recipe):
        assert one["forwards"] == len(one["steps"]) == len(one["losses"]) == len(one["gradient_norms"]) == STEPS
        assert one["latents"] == [1, 4, 8, 8]
        assert one["moved"] > 1e-3 and min(one["gradient_norms"]) > 0
        assert all(0.1 < loss < 10 for loss in one["losses"])  # of unit noise
    assert ours["losses"] != recipe["losses"] and ours["parameters"] != recipe["parameters"]


def test_the_recipe_encodes_at_every_step_and_ours_only_before(pair):
    ours, recipe, _ = pair
    parts = {
        name: {part for step in row["steps"] for part in step["parts"]}
        for name, row in zip("or", pair[:2], strict=True)
    }
    assert parts["r"] == set(training_clock.STEP_PARTS)
    assert parts["o"] == {training_clock.BATCH, training_clock.FORWARD, training_clock.BACKWARD}
    assert set(training_clock.PHASES) <= set(ours["phases"])
    assert set(recipe["phases"]) == {
        training_clock.LOOK,
        training_clock.LOAD,
        training_clock.ATTACH,
        training_clock.SAVE,
    }
    for step in (*ours["steps"], *recipe["steps"]):
        assert 0 < sum(step["parts"].values()) <= step["seconds"]


def test_the_times_add_up_and_the_long_run_is_extrapolated_from_them(pair):
    for one in pair[:2]:
        steps = [step["seconds"] for step in one["steps"]]
        parts = one["start_seconds"] + sum(steps) + one["end_seconds"]
        assert parts == pytest.approx(one["total_seconds"], rel=1e-9)
        assert sum(one["phases"].values()) <= one["start_seconds"] + one["end_seconds"]
        assert one["step_seconds"] == pytest.approx(sum(steps[1:]) / 2)  # the median of two
        longer = one["total_seconds"] + (training.WHOLE_RUN - STEPS) * one["step_seconds"]
        assert one["extrapolated_seconds"] == pytest.approx(longer, rel=1e-9)
        assert 50 < one["peak_mib_of_steps"] <= one["peak_mib"]
    ratio = pair[2]
    assert len(ratio["step_ratios"]) == STEPS - 1
    assert ratio["peak_mib"] == pytest.approx(pair[0]["peak_mib"] / pair[1]["peak_mib"])


def test_a_run_that_did_not_train_is_no_result(pair):
    told = {row["variant"]: row for row in pair[:2]}
    training.require_training(told, STEPS)
    wrong = {
        "took": {"forwards": 2},
        "did not train": {"moved": 0.0},
        "did not": {"losses": [1.0, float("nan"), 1.0]},
        "different sizes": {"latents": [2, 4, 8, 8]},
    }
    for message, change in wrong.items():
        broken = copy.deepcopy(told)
        broken["recipe"] |= change
        with pytest.raises(RuntimeError, match=message):
            training.require_training(broken, STEPS)


def test_the_tables_tell_measured_from_extrapolated(report, tmp_path, capsys):
    (tmp_path / "earlier.json").write_text(json.dumps(report))
    training.main(["--show", str(tmp_path / "earlier.json")])
    text = capsys.readouterr().out
    assert f"**measured: run of {STEPS} steps**" in text and "**extrapolated: run of 400 steps**" in text
    assert all(name in text for name in (*training_clock.PHASES, *training_clock.STEP_PARTS))


def test_a_clock_counts_outer_blocks_once_and_no_waiting():
    clock = training_clock.Clock(lambda: time.sleep(0.3), CPU)
    with clock.run():
        with clock.measure("outer"), clock.measure("inner"):
            time.sleep(0.02)
        clock.ready()
        time.sleep(0.02)
        clock.step_done(1.0, 1.0)
    assert set(clock.told["phases"]) == {"outer"}
    assert 0.02 <= clock.told["steps"][0]["seconds"] < 0.2 and 0.04 <= clock.told["total_seconds"] < 0.3


def told_of(seconds, start, share):
    phases = {training_clock.LOOK: share / 2, training_clock.ENCODE: share / 2, training_clock.LOAD: start - share}
    steps = [{"seconds": one, "parts": {}} for one in seconds]
    return {"steps": steps, "start_seconds": start, "phases": phases, "peak_mib_of_steps": 500.0}


def test_starts_are_compared_with_the_first_and_steps_with_the_fewest_pictures_of_the_same_round():
    few, many, again = told_of([9, 1, 2], 2, 1), told_of([1, 3, 2], 10, 8), told_of([1, 1, 2], 3, 1)
    rows = [
        training.picture_row(4, "first", few, few, few),
        training.picture_row(80, "first", many, few, many),
        training.picture_row(80, "second", again, few, many),
    ]
    assert [row["start_ratio"] for row in rows] == pytest.approx([1, 1, 0.3])
    assert [row["pictures_ratio"] for row in rows] == pytest.approx([1, 1, 1 / 8])
    assert [row["step_ratio"] for row in rows] == pytest.approx([1, 2, 1])  # the first round warms up
    table = training_report.picture_table(rows)
    assert "| 80, first | 10.00 | 1.000 | 8.000 | 1.000 | 100.0 | 2.500 | 2.000 | 500 |" in table


def test_starts_are_drawn_over_the_number_of_pictures(tmp_path):
    told = {"part": "pictures", "start_seconds": 0.5}
    rows = [told | {"start": start, "pictures": count} for start in ("first", "second") for count in (4, 32)]
    training_report.plot({"rows": rows}, tmp_path / "starts.png")
    assert (tmp_path / "starts.png").stat().st_size > 1000


def test_a_cache_that_changes_what_is_learned_is_no_result(tmp_path):
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    first, same, other = ({4: {"file": str(tmp_path / name)}} for name in "abc")
    training.require_same_adapters(first, same)
    with pytest.raises(RuntimeError, match="With 4 pictures the cache changes"):
        training.require_same_adapters(first, other)


def test_flags_reach_both_runs(tmp_path):
    flags = ["--device", "cuda", "--dtype", "bfloat16", "--threads", "2", "--batch", "2", "--pictures", "9", "3"]
    more = ["--targets", "cross", "--gradient_checkpointing"]
    settings = training.settings_of(training.command_line().parse_args([*flags, *more]))
    assert (settings.device.type, settings.dtype, settings.threads) == ("cuda", torch.bfloat16, 2)
    assert (settings.resolution, settings.batch, settings.steps, settings.tiny) == (512, 2, 6, False)
    assert settings.pictures == (3, 9) and settings.parts == training.PARTS
    config = training.config_of(settings, tmp_path, tmp_path / "out", max_train_steps=2)
    assert config.target_modules == ["attn2"] and config.mixed_precision == "bf16"
    assert config.gradient_checkpointing
    default = training.settings_of(training.command_line().parse_args([]))
    assert training.config_of(default, tmp_path, tmp_path / "out").target_modules is None


def test_what_a_generator_makes_counts_where_it_is_asked_for():
    def slow():
        time.sleep(0.02)
        yield 1

    clock = training_clock.Clock(lambda: None, CPU)
    assert list(clock.timed("slow", slow)()) == [1] and clock.spent["slow"] >= 0.02


def test_one_job_goes_on_at_a_time_and_a_failing_one_is_named():
    here, there = Pipe()
    went = []

    def job(turn, word):
        went.append(word)
        turn()
        went.append("again")
        raise ValueError("broken")

    thread = threading.Thread(target=circumstances._job, args=(there, job, ["first"]))
    thread.start()
    assert circumstances._heard("it", here) == ("waits", None) and went == []
    here.send(None)
    assert circumstances._heard("it", here) == ("waits", None) and went == ["first"]
    here.send(None)
    with pytest.raises(RuntimeError, match=r"'it' failed:[\s\S]*ValueError: broken"):
        circumstances._heard("it", here)
    thread.join()
    there.close()
    with pytest.raises(RuntimeError, match="'it' ended without a word"):
        circumstances._heard("it", here)


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--resolution", "100"], "--resolution"), (["--steps", "1"], "--steps"), (["--dtype", "float16"], "--dtype")],
)
def test_settings_that_make_no_sense_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        training.main(["--quick", *flags])


def test_runs_called_equal_in_fidelity_are_so_in_the_results():
    rows = json.loads(circumstances.results_path("customization", CPU).read_text())["rows"]
    ours, theirs = training_report.AS_GOOD
    (mine,) = (r for r in rows if r["method"] == f"COMCAT tied, rank 8, from the trigger on, {ours} steps")
    (other,) = (r for r in rows if r["method"] == "LoRA, rank 4, by diffusers' recipe")
    assert other["steps"] == theirs and mine["runs"] == other["runs"]
    assert mine["fidelity"]["mean"] >= other["fidelity"]["mean"]
    assert mine["obedience"]["mean"] >= other["obedience"]["mean"]
