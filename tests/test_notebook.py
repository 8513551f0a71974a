"""The notebook runs from its top to its end, on the embedded base, in an empty folder; with two steps of each kind."""

import json
from pathlib import Path

import pytest
from PIL import Image

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "quickstart.ipynb"
CELLS = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
CODE = ["".join(one["source"]) for one in CELLS if one["cell_type"] == "code" and "tags" not in one["metadata"]]


def test_the_notebook_is_kept_without_what_it_printed():
    assert all(one.get("outputs", []) == [] and not one.get("execution_count") for one in CELLS)
    assert len({one["id"] for one in CELLS}) == len(CELLS)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    program, names = "\n".join(CODE), {}
    assert "max_train_steps=400" in program and "num_inference_steps=25" in program
    for many in ("max_train_steps=400", "num_inference_steps=25"):
        program = program.replace(many, f"{many.partition('=')[0]}=2")
    exec(compile(program, NOTEBOOK.name, "exec"), names)
    assert "'sks teddy': 4 pictures" in capsys.readouterr().out
    assert names["outcome"].steps == 2 and names["sheet"].width > 300
    assert isinstance(names["picture"], Image.Image) and len(names["made"].files) == 4
