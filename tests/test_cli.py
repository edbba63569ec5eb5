"""The command line, as a user meets it: what is printed, where, and with which exit status."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from leaklib import cli
from leaklib.cli import main
from leaklib.runner.notebook import ParameterError, read_notebook
from leaklib.runner.notebook_sweep import split_values, sweep_notebook
from leaklib.sweep import sweep_manifest

SOURCES = Path(__file__).parent / "notebooks"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of its own, with the fixture notebooks, as the current folder."""
    shutil.copytree(SOURCES, tmp_path / "notebooks")
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """Record what would be run, without running it."""
    seen = []

    def record(notebook, out=None, **options):
        seen.append((str(notebook), out, options))
        return Path(out or "default.ipynb")

    monkeypatch.setattr(cli, "run_notebook", record)
    return seen


def leaklib(line, capsys):
    """Run a command line; return its status, stdout and stderr."""
    try:
        status = main(line.split())
    except SystemExit as leave:  # argparse's own errors and --help
        status = leave.code
    shown = capsys.readouterr()
    return status, shown.out, shown.err


def test_run_passes_typed_parameters(project, calls, capsys):
    line = "run squares -p seed 3 -p scale -1e-3 -p layers a,b -p verbose yes"
    status, out, err = leaklib(line, capsys)
    assert (status, out, err) == (0, "default.ipynb\n", "")
    notebook, out, options = calls[0]
    assert notebook == "notebooks/squares.ipynb"
    assert out is None
    given = {"seed": 3, "scale": -0.001, "layers": ["a", "b"], "verbose": True}
    assert options == {"parameters": given, "in_place": False, "progress": True}


@pytest.mark.parametrize(
    "line",
    [
        "run squares x.ipynb --quiet -p seed 1",
        "run squares -p seed 1 x.ipynb --quiet",
        "run --quiet squares --parameter seed 1 x.ipynb",
        "run squares --quiet x.ipynb -p seed 1",
    ],
)
def test_words_of_run_come_in_any_order(project, calls, capsys, line):
    assert leaklib(line, capsys) == (0, "", "")
    options = {"parameters": {"seed": 1}, "in_place": False, "progress": False}
    assert calls == [("notebooks/squares.ipynb", "x.ipynb", options)]


def test_folders_among_the_parameters_are_meant_from_here(project, calls, capsys):
    leaklib("run squares -p out results/a", capsys)
    assert calls[0][2]["parameters"] == {"out": "../results/a"}  # the kernel's folder is notebooks/
    leaklib("run squares -p out", capsys)
    main(["run", "squares", "-p", "out", ""])
    assert calls[1][2]["parameters"] == {"out": ""}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run squares -p sead 1", "has no parameter sead"),
        ("run squares -p seed 1.5", "expected int for parameter 'seed', got '1.5'"),
        ("run squares -p kind cubed", "expected Literal['plain', 'signed'] for parameter 'kind'"),
        ("run cubes", "expected a notebook, got 'cubes': give a path or one of fragile, squares"),
        ("run squares x.ipynb --in-place", "give OUT or --in-place, not both"),
        ("run squares -p seed", "expected a name and a value behind -p"),
        ("run squares -p seed 1 -p seed 2", "parameter 'seed' is given twice"),
        ("run squares x.ipynb y.ipynb", "unknown arguments: y.ipynb"),
        ("run squares --qiet", "unknown arguments: --qiet"),
        ("sweep squares -p sead 1,2", "has no parameter sead"),
        ("sweep squares -p seed 1,x", "expected int for parameter 'seed', got 'x'"),
        ("sweep squares -p seed 1,1", "expected distinct values for parameter 'seed'"),
        ("sweep squares --jobs 0", "expected --jobs >= 1"),
        ("list nowhere", "expected a folder of notebooks, got nowhere"),
        ("list notebooks/squares.ipynb", "expected a folder of notebooks"),
        ("", "COMMAND"),
    ],
)
def test_wrong_commands_are_explained_without_a_traceback(project, calls, capsys, line, message):
    status, out, err = leaklib(line, capsys)
    assert status == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err
    assert calls == []
    assert not (project / "_build").exists()


def test_an_unknown_parameter_lists_the_known_ones(project, capsys):
    _, _, err = leaklib("run squares -p sead 1", capsys)
    for row in ("seed     int  ", '"smoke" (seconds) or "paper"', "which layers; None: all"):
        assert row in err


def test_list_shows_titles_parameters_and_meaning(project, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    status, out, err = leaklib("list", capsys)
    assert (status, err) == (0, "")
    assert out.index("notebooks/fragile.ipynb\n  A notebook that can fail\n") < out.index(
        "notebooks/squares.ipynb\n  Squares of a few numbers\n"
    )
    assert re.search(r'^  profile +str +"smoke" +"smoke" \(seconds\) or "paper"$', out, re.M)
    assert re.search(r"^  layers +list\[str\] \| None +None +which layers; None: all$", out, re.M)
    assert max(map(len, out.splitlines())) <= 90
    monkeypatch.chdir(project / "notebooks")
    assert leaklib("list .", capsys)[1].startswith("fragile.ipynb")
    assert leaklib("list", capsys)[0] == 0  # from inside the project, too
    (project / "empty").mkdir()
    assert leaklib(f"list {project / 'empty'}", capsys)[1].startswith("no notebooks in")


def test_help_and_version(capsys):
    status, out, _ = leaklib("--help", capsys)
    assert status == 0
    assert "leaklib sweep dlg_what_decides -p seed 0,1,2" in out
    assert "shared disk" in leaklib("sweep --help", capsys)[1]
    assert re.fullmatch(r"leaklib \d+\.\d+\.\d+\n", leaklib("--version", capsys)[1])


def test_the_commands_start_quickly_and_without_torch():
    code = "import sys, leaklib.cli; print([m for m in ('torch', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_a_failing_notebook_shows_its_traceback_and_status_1(project, capsys):
    pytest.importorskip("papermill")
    status, out, err = leaklib("run fragile --quiet -p seed 13", capsys)
    assert status == 1
    assert out == ""
    assert 'raise ValueError(f"seed {seed} is unlucky")' in err
    assert err.splitlines()[-1] == (
        "leaklib: fragile.ipynb failed: cell 4: ValueError: seed 13 is unlucky; "
        "the partial notebook is _build/executed/fragile.failed.ipynb"
    )


def test_an_interruption_has_its_own_status(project, monkeypatch, capsys):
    def interrupted(*_, **__):
        stop = KeyboardInterrupt()
        stop.add_note("3 of 8 settings are finished")
        raise stop

    monkeypatch.setattr(cli, "run_notebook", interrupted)
    status, _, err = leaklib("run squares", capsys)
    assert status == 130
    assert err.strip() == "leaklib: interrupted: 3 of 8 settings are finished"


def test_values_are_split_at_commas_outside_brackets(project):
    info = read_notebook("notebooks/squares.ipynb")
    assert split_values(info, "seed", "1, 2,3") == [1, 2, 3]
    assert split_values(info, "layers", "[a,b],none,fc") == [["a", "b"], None, ["fc"]]
    assert split_values(info, "layers", "['a','b'],none") == [["a", "b"], None]
    assert split_values(info, "sizes", "(1,2),(3,),4") == [(1, 2), (3,), (4,)]
    assert split_values(info, "kind", "plain") == ["plain"]
    with pytest.raises(ParameterError, match="distinct"):
        split_values(info, "scale", "1,1.0")


def test_a_sweep_runs_the_grid_and_goes_on_where_it_was(project, capsys):
    pytest.importorskip("papermill")
    status, out, err = leaklib("sweep fragile -p seed 13,1 --out study", capsys)
    assert status == 1
    assert out == ""
    assert "failed: {'seed': 13}: NotebookError: fragile.ipynb failed: cell 4" in err
    assert re.search(r"^ +13 failed +\d", err, re.M)
    assert re.search(r"^\w{16} NotebookError: .*ValueError: seed 13 is unlucky$", err, re.M)
    assert "1 of 2 settings done, 1 failed" in err
    manifest = sweep_manifest("study").set_index("seed")
    good = project / "study" / f"{manifest['key'][1]}.ipynb"
    assert nbformat.read(good, as_version=4).metadata["leaklib"]["parameters"]["seed"] == 1
    assert (project / "study" / f"{manifest['key'][13]}.failed.ipynb").exists()

    # one cell is mended: everything runs again; then nothing does
    path = project / "notebooks" / "fragile.ipynb"
    path.write_text(path.read_text().replace("or seed == 13", "or seed == 14"))
    status, out, err = leaklib("sweep fragile -p seed 13,1 --out study --quiet --jobs 2", capsys)
    assert (status, out) == (0, "")
    files = {file: file.stat().st_mtime_ns for file in (project / "study").glob("*.ipynb")}
    status, out, _ = leaklib("sweep fragile -p seed 13,1 --out study", capsys)
    assert status == 0
    assert "2 of 2 settings done, 0 failed" in out
    assert files == {file: file.stat().st_mtime_ns for file in (project / "study").glob("*.ipynb")}

    # somebody removed one run
    removed = project / "study" / f"{sweep_manifest('study')['key'][0]}.ipynb"
    removed.unlink()
    assert leaklib("sweep fragile -p seed 13,1 --out study --quiet", capsys)[0] == 0
    assert removed.exists()


def test_the_records_of_a_sweep_become_one_table(project):
    pytest.importorskip("papermill")
    values = {"scale": [1.0, 2.0], "sizes": [(5,)]}
    result = sweep_notebook("notebooks/squares.ipynb", values, progress=False)
    assert result.complete, result.manifest.to_string()
    folder = project / "_build" / "sweeps" / "squares"
    table = pd.read_csv(folder / "table.csv")
    assert table.to_dict("list") == {
        "scale": [1.0, 1.0, 2.0, 2.0],
        "sizes": ["(5,)"] * 4,
        "number": [0, 5, 0, 5],
        "square": [0.0, 25.0, 0.0, 50.0],
    }
    key = result.manifest["key"][1]
    assert (folder / key / "provenance.json").exists()
    assert str(project) not in (folder / f"{key}.ipynb").read_text()


def test_a_reader_that_has_seen_enough_is_no_error(project):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "leaklib.cli", "list"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
