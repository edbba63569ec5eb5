"""What the notebooks just found, against what they found when their references were committed.

`make notebooks` runs the committed notebooks under nbval; each leaves its record in
`_build/results`. Here the tables and the figures' data are compared with `data/reference`.
"""

import base64
import json
import re
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pytest

from leaklib.figures import check_picture
from leaklib.records import code_version, compare_records, read_record, write_record

ROOT = Path(__file__).resolve().parents[2]
FOUND, REFERENCE = ROOT / "_build" / "results", ROOT / "data" / "reference"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("name", NAMES)
def test_the_run_agrees_with_its_reference(name):
    assert (FOUND / name / "provenance.json").is_file(), "no run to compare: make notebooks"
    run = read_record(FOUND / name).provenance
    assert run["code_version"] == code_version(), "the run is of other code: make notebooks"
    differences = compare_records(FOUND / name, REFERENCE / name)
    assert not differences, "\n".join(differences)


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_table_and_a_changed_figure_are_noticed(name, tmp_path):
    """The comparison must be able to fail: mutate the reference's own copy."""
    record = read_record(REFERENCE / name)
    rules = record.provenance["tolerances"]
    column = next(c for c in record.table if rules.get(c) not in ("ignore", None))
    keys = record.provenance["keys"]
    settings = {"parameters": record.provenance["parameters"], "keys": keys}

    changed = record.table.copy()
    changed.loc[0, column] = changed.loc[0, column] * 1.3 + 20
    write_record(tmp_path / "table", changed, figures=record.figures, **settings)
    lines = compare_records(tmp_path / "table", REFERENCE / name)
    assert len(lines) == 1
    assert column in lines[0]

    figures = {f: {k: v.copy() for k, v in a.items()} for f, a in record.figures.items()}
    figure, key = next(
        (f, k) for f, a in figures.items() for k, v in a.items() if v.dtype.kind == "f" and v.size
    )
    figures[figure][key] = figures[figure][key] * 2 + 1
    write_record(tmp_path / "figure", record.table, figures=figures, **settings)
    lines = compare_records(tmp_path / "figure", REFERENCE / name)
    assert len(lines) == 1
    assert key in lines[0]

    shutil.copytree(REFERENCE / name, tmp_path / "cut")
    text = (tmp_path / "cut" / "table.csv").read_text()
    (tmp_path / "cut" / "table.csv").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"table\.csv"):
        compare_records(tmp_path / "cut", REFERENCE / name)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_every_code_cell_was_executed_and_none_failed(path):
    """nbval compares nothing in a cell that was never run."""
    cells = [c for c in nbformat.read(path, 4).cells if c.cell_type == "code" and c.source]
    assert all(cell.execution_count for cell in cells)
    assert not any(o.output_type == "error" for cell in cells for o in cell.outputs)
    pictures = [
        output.data["image/png"]
        for cell in cells
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert pictures
    for picture in pictures:
        assert check_picture(base64.b64decode(picture)) == []


def test_references_hold_no_other_notebook():
    assert sorted(p.name for p in REFERENCE.iterdir() if p.is_dir()) == NAMES


@pytest.mark.parametrize("folder", sorted((ROOT / "data" / "results").glob("*")), ids=str)
def test_recorded_runs_are_whole(folder):
    record = read_record(folder)
    assert record.provenance["parameters"]["profile"] == "paper"
    assert len(record.table) > 0
    assert np.isfinite(record.provenance["seconds"])
    assert not re.search(r"/(home|root|tmp|work)/", json.dumps(record.provenance))
