"""The benchmark of subjects that nothing was tuned to: what it keeps of a run, how it measures that, what it shows."""

import json

import pytest

from benchmarks import subjects
from comcat_diffusion import bases
from comcat_diffusion.evaluation.features import load_features
from recipe.characters import CHARACTERS, UNSEEN


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder with one run of a method that learns nothing, on one subject, drawn in few steps."""

    def learn(subject, seed, folder):
        pipe = bases.load_base(bases.EMBEDDED)
        (folder / "file").write_bytes(b"x" * 7)
        return pipe, 7, 0.5

    monkeypatch.setattr(subjects, "METHODS", {"nothing": subjects.Method(learn, kept=True)})
    monkeypatch.setattr(subjects, "UNSEEN", {"owl": UNSEEN["owl"]})
    monkeypatch.setattr(subjects, "DRAWING_STEPS", 2)
    monkeypatch.setattr(subjects, "PROMPTS", subjects.PROMPTS[:1])
    monkeypatch.setattr(subjects, "SEEDS_ALONE", (0,))
    monkeypatch.setattr(subjects, "load_features", lambda name: load_features(bases.EMBEDDED))
    monkeypatch.setattr(subjects.torch, "set_num_threads", lambda count: None)
    subjects.do("nothing", "owl", 0, tmp_path)
    return tmp_path


def test_no_choice_sees_what_is_reported():
    assert not set(UNSEEN) & set(CHARACTERS)


@pytest.mark.slow
def test_what_learns_nothing_moves_no_background_and_every_measure_is_told(root):
    rows = list(subjects.measured(root, seeds=1))
    assert [row["method"] for row in rows] == ["nothing", "nothing, drawn with --no-keep_background"]
    for row in rows:
        assert (row["runs"], row["bytes"], row["seconds"]) == (1, 7, 0.5)
        assert row["background_moved"]["mean"] == 0 and 0 < row["shape"]["mean"] < 1
    told = subjects.shown(rows, subjects.MEASURES)
    assert all(measure.replace("_", " ") in told for measure in subjects.MEASURES) and told.count("\n") == 3


@pytest.mark.slow
def test_prompts_that_name_the_subject_alone_are_measured_apart(root):
    (row,) = subjects.measured(root, 1, (subjects.BARE,))
    assert row["method"] == "nothing" and set(subjects.LIKENESS) < set(row) and "background_moved" not in row


@pytest.mark.slow
def test_what_is_there_is_not_learned_again_and_what_is_not_is_not_told(root, monkeypatch):
    monkeypatch.setattr(subjects, "METHODS", {"nothing": subjects.Method(lambda *_: 1 / 0, kept=True)})
    subjects.do("nothing", "owl", 0, root)
    assert json.loads((root / "nothing-owl-0" / "cost.json").read_text()) == {"bytes": 7, "seconds": 0.5}
    (root / "nothing-owl-0" / "cost.json").unlink()
    assert not list(subjects.measured(root, seeds=2))


def test_a_row_that_is_added_says_so_and_one_of_no_method_is_left_out():
    rows = [{"method": name} for name in (subjects.MORE, "comcat train, 10 steps", subjects.OURS + subjects.FREELY)]
    told = subjects.added({"rows": rows, "circumstances": 1}, [{"method": subjects.OURS}, {"method": subjects.LESS}], 2)
    assert told["circumstances"] == 1 and [(row["method"], row.get("added")) for row in told["rows"]] == [
        (subjects.OURS, 2), (subjects.OURS + subjects.FREELY, None), (subjects.LESS, 2), (subjects.MORE, None)
    ]  # fmt: skip
