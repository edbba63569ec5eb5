"""Records: what is written comes back, a kill never harms, and every difference is named."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from leaklib import records
from leaklib.records import (
    Tolerance,
    compare_records,
    prepare_folder,
    provenance,
    read_record,
    write_record,
)
from leaklib.records.tables import tidy

TABLE = pd.DataFrame(
    {
        "seed": [0, 1, 2],
        "attack": ["dlg", "idlg", None],
        "psnr_db": [0.1 + 0.2, math.nan, -math.inf],
        "recovered": [True, False, True],
    }
)
FIGURES = {"frames": {"ax0/line1": np.linspace(0, 1, 5), "file": np.arange(6).reshape(2, 3)}}
PARAMETERS = {"profile": "smoke", "seed": 0}


def write(folder, table=TABLE, **options):
    return write_record(folder, table, parameters=PARAMETERS, **options)


def test_a_record_comes_back_bit_for_bit(tmp_path):
    folder = write(tmp_path / "a" / "run", figures=FIGURES, seconds=1.5, data={"digits": "abc"})
    record = read_record(folder)
    pd.testing.assert_frame_equal(record.table, tidy(TABLE), check_exact=True)
    assert record.table["psnr_db"][0] == 0.1 + 0.2
    assert set(record.figures) == {"frames"}
    for name, array in FIGURES["frames"].items():
        np.testing.assert_array_equal(record.figures["frames"][name], array)
    described = record.provenance
    assert described["table"]["rows"] == 3
    assert described["parameters"] == PARAMETERS
    assert described["seconds"] == 1.5
    assert described["data"] == {"digits": "abc"}
    assert sorted(path.name for path in folder.iterdir()) == [
        "figures",
        "provenance.json",
        "table.csv",
    ]


def test_equal_records_have_equal_files(tmp_path):
    first, second = (write(tmp_path / name, figures=FIGURES) for name in "ab")
    for name in ("table.csv", "figures/frames.npz"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_missing_record_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no provenance.json: run the notebook again"):
        read_record(tmp_path / "nowhere")
    folder = write(tmp_path / "run", figures=FIGURES)
    (folder / "figures" / "frames.npz").unlink()
    with pytest.raises(FileNotFoundError, match="no figures/frames.npz"):
        read_record(folder)


@pytest.mark.parametrize("name", ["table.csv", "figures/frames.npz"])
def test_a_truncated_or_edited_file_is_refused(tmp_path, name):
    folder = write(tmp_path, figures=FIGURES)
    whole = (folder / name).read_bytes()
    for damaged in (whole[:-3], whole.replace(b"1", b"2", 1), b""):
        (folder / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name}.*cut short or edited; run the notebook"):
            read_record(folder)


@pytest.mark.parametrize("text", ["", '{"table": {', "[]", "{}", '{"sha256": {}}', "null"])
def test_malformed_provenance_is_refused(tmp_path, text):
    folder = write(tmp_path)
    (folder / "provenance.json").write_text(text)
    with pytest.raises(ValueError, match="expected a record's JSON in .*provenance.json"):
        read_record(folder)


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/run \(Not a directory\): choose another folder"):
        prepare_folder(tmp_path / "file" / "run")
    assert prepare_folder(tmp_path / "new" / "run").is_dir()
    assert not list((tmp_path / "new" / "run").iterdir())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device"):
        prepare_folder(tmp_path / "new")


class Killed(BaseException):
    """Stands for the process dying: no handler of errors may see it."""


def steps_of_a_write(folder, table, monkeypatch, stop_at, error):
    """Write a record; raise at the given step that touches the disk. Return the steps made."""
    made = 0

    def counted(function):
        def step(*args, **kwargs):
            nonlocal made
            made += 1
            if made == stop_at:
                raise error
            return function(*args, **kwargs)

        return step

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "fsync"):
            patch.setattr(os, name, counted(getattr(os, name)))
        remove = shutil.rmtree
        counted_remove = counted(remove)
        patch.setattr(
            shutil,
            "rmtree",
            lambda path, ignore_errors=False: (
                remove(path, ignore_errors=True) if ignore_errors else counted_remove(path)
            ),
        )
        patch.setattr(Path, "unlink", counted(Path.unlink))
        write(folder, table, figures={f"only_{len(table)}": {"x": np.arange(len(table))}})
    return made


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Killed()])
def test_a_write_stopped_at_any_step_leaves_the_old_record_or_the_new(tmp_path, monkeypatch, error):
    old, new = TABLE.iloc[:2], TABLE
    write(tmp_path / "count", old, figures={"only_2": {}})
    total = steps_of_a_write(tmp_path / "count", new, monkeypatch, 0, error)
    assert total >= 6
    seen = set()
    for stop_at in range(1, total + 2):
        folder = tmp_path / f"run{stop_at}"
        steps_of_a_write(folder, old, monkeypatch, 0, error)
        (folder / "mine.txt").write_text("not the record's")
        if stop_at <= total:
            said = "the record there is whole|choose another folder" if error.args else None
            with pytest.raises(type(error), match=said):
                steps_of_a_write(folder, new, monkeypatch, stop_at, error)
        else:
            steps_of_a_write(folder, new, monkeypatch, stop_at, error)
        record = read_record(folder)
        assert len(record.table) in (2, 3)
        pd.testing.assert_frame_equal(record.table, tidy(TABLE.iloc[: len(record.table)]))
        assert set(record.figures) == {f"only_{len(record.table)}"}
        seen.add(len(record.table))
        write(folder, TABLE.iloc[:1])  # and the next writer cleans up
        assert len(read_record(folder).table) == 1
        assert (folder / "mine.txt").exists()
        assert not (folder / ".pending").exists()
        assert not list((folder / "figures").iterdir())
    assert seen == {2, 3}


WRITER = """
import sys
import pandas as pd
from leaklib.records import write_record

for turn in range(10**6):
    rows = 1 + turn % 5
    table = pd.DataFrame({{"seed": range(rows), "value": [float(rows)] * rows}})
    figures = {{f"f{{rows}}": {{"x": [float(rows)] * rows}}}}
    write_record({folder!r}, table, parameters={{"rows": rows}}, figures=figures)
"""


def test_readers_beside_a_writer_that_is_killed_never_see_half_a_record(tmp_path):
    script = WRITER.format(folder=str(tmp_path / "run"))
    for _ in range(2):
        with subprocess.Popen([sys.executable, "-c", script]) as writer:
            try:
                deadline = time.monotonic() + 60
                while not (tmp_path / "run" / "provenance.json").exists():
                    assert time.monotonic() < deadline
                    assert writer.poll() is None
                    time.sleep(0.01)
                seen = set()
                while len(seen) < 4:
                    assert time.monotonic() < deadline
                    seen.add(whole_rows(tmp_path / "run"))
            finally:
                writer.send_signal(signal.SIGKILL)
        whole_rows(tmp_path / "run")


def whole_rows(folder):
    record = read_record(folder)
    rows = record.provenance["parameters"]["rows"]
    assert record.table["value"].tolist() == [float(rows)] * rows
    assert record.figures[f"f{rows}"]["x"].tolist() == [float(rows)] * rows
    return rows


def test_names_and_arrays_that_cannot_be_stored_are_refused(tmp_path):
    with pytest.raises(ValueError, match="figure name"):
        write(tmp_path, figures={"../escape": {}})
    with pytest.raises(ValueError, match=r"figure 'f', 'x', got objects or rows of unequal"):
        write(tmp_path, figures={"f": {"x": [[1], [1, 2]]}})
    with pytest.raises(ValueError, match="objects"):
        write(tmp_path, figures={"f": {"x": [object()]}})
    assert not (tmp_path / "provenance.json").exists()


def test_keys_that_name_no_rows_are_refused_after_the_work_is_safe(tmp_path):
    for options, message in (
        ({"keys": ["image"]}, "got 'image'"),
        ({"keys": ["recovered"]}, "one row for"),
        ({"keys": ["seed"], "tolerances": {"psnr": "ignore"}}, "got 'psnr'"),
    ):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / message[:5], **options)
        assert len(read_record(tmp_path / message[:5]).table) == 3
    rules = {"psnr_db": Tolerance(atol=math.inf), "figures/frames": "ignore"}
    folder = write(tmp_path / "good", keys=["seed"], tolerances=rules)
    assert compare_records(folder, folder) == []


def test_provenance_names_the_run_but_no_machine(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Source:
        name: str = "digits"
        split: str = "test"
        checksum: str = "abc"

    home = str(Path.home())
    described = provenance(
        parameters={
            "data_root": f"{home}/pictures",
            "out": Path.cwd() / "x",
            "lr": np.float32(0.5),
            "shape": (3, 32),
            "settings": Source(),
            "worst": math.inf,
            "function": test_equal_records_have_equal_files,
        },
        seconds=2.0,
        data=[Source()],
    )
    text = json.dumps(described, allow_nan=False)
    for private in (home, os.uname().nodename, str(Path(records.__file__).parents[1])):
        assert len(private) < 3 or private not in text
    assert described["parameters"]["data_root"] == ".../pictures"
    assert described["parameters"]["shape"] == [3, 32]
    assert described["parameters"]["settings"]["checksum"] == "abc"
    assert described["parameters"]["worst"] == "inf"
    assert described["data"] == {"digits/test": "abc"}
    assert described["date"].endswith("+00:00")
    for name in ("python", "torch", "torchvision", "numpy", "leaklib", "code_version"):
        assert described[name], name
    assert described["device"] == "cpu"
    assert described["device_name"]
    assert described["threads"] >= 1


def test_provenance_reads_the_checkout(tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True)

    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("leaklib.run_info.ROOT", tmp_path)
    assert provenance(parameters={})["commit"] is None
    git("init", "-q")
    (tmp_path / "code.py").write_text("1")
    (tmp_path / "page.ipynb").write_text("1")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    described = provenance(parameters={})
    assert len(described["commit"]) == 40
    assert described["dirty"] is False
    (tmp_path / "page.ipynb").write_text("2")  # outputs change while a study runs
    assert provenance(parameters={})["dirty"] is False
    (tmp_path / "code.py").write_text("2")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as inside a hook
    assert provenance(parameters={})["dirty"] is True


REFERENCE = pd.DataFrame(
    {"seed": [0, 1], "net": ["a", "b"], "psnr": [20.0, math.nan], "seconds": [1.0, 2.0]}
)
RULES = {"psnr": Tolerance(atol=0.2), "seconds": "ignore"}


def test_records_are_compared_by_the_rules_of_the_reference(tmp_path):
    x = np.linspace(1, 2, 4)
    reference = write_record(
        tmp_path / "reference",
        REFERENCE,
        parameters={"profile": "smoke", "out": "/a/b"},
        keys=["seed"],
        tolerances=RULES | {"figures/loose": Tolerance(rtol=0.1), "figures/noise": "ignore"},
        figures={"tight": {"x": x}, "loose": {"x": x}, "noise": {"x": x}},
    )

    def compare(table=REFERENCE, figures=None, **parameters):
        run = write_record(
            tmp_path / "run",
            table,
            parameters={"profile": "smoke", "out": "/c", **parameters},
            figures={"tight": {"x": x}, "loose": {"x": x}, "noise": {"x": -x}} | (figures or {}),
        )
        return compare_records(run, reference)

    assert compare() == []
    assert compare(figures={"tight": {"x": x * 1.0005}, "loose": {"x": x * 1.05}}) == []
    assert compare(profile="paper") == ["parameter 'profile': got 'paper', reference 'smoke'"]
    assert compare(REFERENCE.assign(psnr=[21.0, math.nan]))[0].startswith("row (seed=0)")
    assert compare(figures={"tight": {"x": x * 1.005}}) == [
        "figure 'tight', 'x': 4 of 4 values differ, first at (0,): got 1.005, reference 1, "
        "tolerance rtol 0.001 and atol 1e-06"
    ]
    assert compare(figures={"loose": {"x": x * 1.2}})[0].startswith("figure 'loose', 'x': 4 of 4")
    assert compare(figures={"tight": {"x": x[:2]}}) == [
        "figure 'tight', 'x': got shape (2,), reference (4,)"
    ]
    assert compare(figures={"tight": {"y": x}}) == [
        "figure 'tight', 'x' is missing",
        "figure 'tight', 'y' is not in the reference",
    ]
    assert compare(figures={"extra": {"y": x}}) == ["figure 'extra' is not in the reference"]


def test_captions_that_are_numbers_have_the_tolerance_of_numbers(tmp_path):
    def record(folder, *captions):
        figure = {"texts": np.array(captions)}
        rule = {"figures/strip": records.Tolerance(atol=0.5)}
        table = pd.DataFrame({"a": [1]})
        return records.write_record(
            tmp_path / folder,
            table,
            parameters={},
            keys=["a"],
            figures={"strip": figure},
            tolerances=rule,
        )

    reference = record("reference", "21.4", "DLG")
    assert records.compare_records(record("near", "21.7", "DLG"), reference) == []
    assert "21.4" in records.compare_records(record("far", "22.4", "DLG"), reference)[0]
    assert "iDLG" in records.compare_records(record("word", "21.4", "iDLG"), reference)[0]
