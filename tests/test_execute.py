"""Running a notebook: what it gets, what it leaves; a failure never costs a good result."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from leaklib.runner import execute
from leaklib.runner.execute import NotebookError, find_notebook, list_notebooks, run_notebook
from leaklib.runner.notebook import ParameterError

pytest.importorskip("papermill", reason="needs leaklib[study]")

SOURCES = Path(__file__).parent / "notebooks"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of its own, with the fixture notebooks, as the current folder."""
    root = tmp_path / "a {project} of its own"  # papermill formats its paths
    shutil.copytree(SOURCES, root / "notebooks")
    (root / "pyproject.toml").touch()
    monkeypatch.chdir(root)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return root


def run(name, out=None, **options):
    return run_notebook(f"notebooks/{name}.ipynb", out, progress=False, **options)


def texts(path):
    """What the cells printed and returned."""
    outputs = [output for cell in nbformat.read(path, as_version=4).cells
               for output in cell.get("outputs", [])]  # fmt: skip
    return [o.get("text") or o.get("data", {}).get("text/plain") or o.get("ename") for o in outputs]


def test_a_run_gets_its_parameters_and_says_where_it_comes_from(project, monkeypatch):
    # another kernel of the same name comes first on the search path
    spec = project / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["/bin/false"], "display_name": "?", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(project / "jupyter"))
    given = {"seed": 3, "scale": 0.5, "layers": ["fc"], "sizes": (4,), "out": str(project / "rec")}
    out = run("squares", parameters=given)
    assert out == project / "_build" / "executed" / "squares.ipynb"
    assert texts(out) == ["[4.5, 8.0]", "notebooks 1 int float ['fc'] plain False\n"]
    assert (project / "rec" / "table.csv").read_text() == "number,square\n3,4.5\n4,8.0\n"

    notebook = nbformat.read(out, as_version=4)
    nbformat.validate(notebook)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    about = notebook.metadata["leaklib"]
    assert about["parameters"]["seed"] == 3
    assert about["parameters"]["verbose"] is False  # defaults too
    assert about["profile"] == "smoke"
    assert about["threads"] == 1
    assert about["seconds"] > 0
    for name in ("date", "torch", "python", "code_version", "device_name", "commit"):
        assert name in about
    assert notebook.metadata["papermill"]["input_path"] == "notebooks/squares.ipynb"
    assert notebook.metadata["papermill"]["output_path"] == "_build/executed/squares.ipynb"
    assert str(project) not in json.dumps(notebook.metadata)
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    assert sorted(path.name for path in out.parent.iterdir()) == ["squares.ipynb"]

    # an executed notebook is a notebook: what an earlier run was given is gone
    shutil.copy(out, "notebooks/again.ipynb")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    again = run("again", "deep/er/out.ipynb")
    assert texts(again) == ["[0.0, 1.0, 4.0]", "notebooks 2 int float None plain False\n"]
    assert nbformat.read(again, as_version=4).metadata["papermill"]["parameters"] == {}


def test_a_failed_run_leaves_the_earlier_one_bit_identical(project):
    out = project / "out.ipynb"
    run("fragile", out)
    good = out.read_bytes()
    with pytest.raises(NotebookError, match="cell 4: ValueError: seed 13 is unlucky") as failure:
        run("fragile", out, parameters={"seed": 13})
    assert out.read_bytes() == good
    kept = project / "out.failed.ipynb"
    assert failure.value.kept == str(kept)
    assert texts(kept) == ["before\n", "ValueError"]
    assert "raise ValueError" in failure.value.tail()
    assert "\x1b" not in failure.value.tail()
    assert nbformat.read(kept, as_version=4).metadata["leaklib"]["parameters"]["seed"] == 13
    assert str(project) not in json.dumps(nbformat.read(kept, as_version=4).metadata)

    with pytest.raises(NotebookError, match="Kernel died"):
        run("fragile", out, parameters={"how": "die"})
    assert out.read_bytes() == good
    assert texts(kept) == ["before\n"]

    run("fragile", out)
    assert not kept.exists()  # of no use any more
    assert sorted(path.name for path in project.glob(".*")) == []


def test_in_place_writes_the_notebook_itself_only_when_it_ran(project):
    path = project / "notebooks" / "fragile.ipynb"
    assert run("fragile", in_place=True) == Path("notebooks/fragile.ipynb")
    good = path.read_bytes()
    assert texts(path) == ["before\n", "after\n"]
    with pytest.raises(NotebookError):
        run("fragile", in_place=True, parameters={"how": "raise"})
    assert path.read_bytes() == good
    assert (project / "_build" / "executed" / "fragile.failed.ipynb").exists()
    names = ["fragile.ipynb", "squares.ipynb"]
    assert sorted(other.name for other in path.parent.iterdir()) == names


def test_a_notebook_edited_while_it_runs_is_left_alone(project, monkeypatch):
    path = project / "notebooks" / "fragile.ipynb"

    def edit(*_, **__):
        path.write_text(path.read_text().replace("can fail", "may fail"))

    monkeypatch.setattr(execute, "_execute", edit)
    with pytest.raises(OSError, match="was edited while it ran"):
        run("fragile", path)  # OUT is the notebook: the same as in place
    assert "may fail" in path.read_text()
    assert "leaklib" not in json.loads(path.read_text())["metadata"]
    assert (project / "_build" / "executed" / "fragile.ipynb").exists()


def test_nothing_runs_when_the_request_is_wrong(project, monkeypatch):
    monkeypatch.setattr(execute, "_execute", lambda *_, **__: pytest.fail("it ran"))
    with pytest.raises(ParameterError, match="no parameter sead"):
        run("squares", parameters={"sead": 1})
    with pytest.raises(ParameterError, match="expected int for parameter 'seed', got '1'"):
        run("squares", parameters={"seed": "1"})
    with pytest.raises(OSError, match="choose another folder"):
        run("squares", project / "pyproject.toml" / "out.ipynb")
    assert not (project / "_build").exists()


def test_a_full_disk_at_the_end_costs_nothing_earlier(project, monkeypatch):
    out = project / "out.ipynb"
    out.write_text("good")
    monkeypatch.setattr(execute, "_execute", lambda *_, **__: None)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        run("squares", out)
    assert out.read_text() == "good"


def test_papermill_missing_is_explained(project, monkeypatch):
    monkeypatch.setitem(sys.modules, "papermill", None)
    with pytest.raises(ImportError, match=r"pip install 'leaklib\[study\]'"):
        run("squares")
    assert list((project / "_build" / "executed").iterdir()) == []


def test_notebooks_are_found_by_path_and_by_name(project):
    for name in ("squares", "squares.ipynb", "notebooks/squares", "notebooks/squares.ipynb"):
        assert find_notebook(name).resolve() == project / "notebooks" / "squares.ipynb"
    (project / "notebooks" / "x.failed.ipynb").touch()
    (project / "notebooks" / ".x.ipynb").touch()
    assert [path.stem for path in list_notebooks("notebooks")] == ["fragile", "squares"]
    with pytest.raises(FileNotFoundError, match="got 'cubes': give a path or one of fragile, sq"):
        find_notebook("cubes")


def test_an_interrupted_run_keeps_its_part_and_stops_its_kernel(project):
    words = "run fragile out.ipynb --quiet -p how wait"
    with subprocess.Popen(
        [sys.executable, "-m", "leaklib.cli", *words.split()],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 60
        while not any(r"before\n" in path.read_text() for path in project.glob(".fragile.*.ipynb")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert "leaklib: interrupted: the partial notebook is out.failed" in process.stderr.read()
    assert "before\n" in texts("out.failed.ipynb")
    assert not Path("out.ipynb").exists()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            assert f"JPY_PARENT_PID={process.pid}" not in path.read_text(errors="ignore")
        except OSError:
            continue  # it ended meanwhile


def test_the_kernels_own_progress_is_one_line(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    line = execute.LiveLine()
    line.write(" 10%|#\r 20%|##\r")
    line.write("x" * 500 + "\n")
    line.flush()
    first, second = stream.getvalue().split("\r\x1b[K")[1:]
    assert first == " 20%|##"
    assert set(second) == {"x"}
    assert len(second) < 500
