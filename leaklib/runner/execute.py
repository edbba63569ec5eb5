"""Run one notebook through papermill, in this interpreter, without ever losing a good result.

The run is written under a temporary name. Only a complete run takes the place of an earlier one; a
failed run is kept beside it as ``NAME.failed.ipynb``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leaklib.code_hash import code_version, strip_source
from leaklib.files import prepare_folder
from leaklib.run_info import provenance
from leaklib.runner.notebook import NotebookInfo, read_notebook
from leaklib.runner.notebook_file import KERNEL, write_executed, write_prepared

ANSI = re.compile(r"\x1b\[[0-9;]*m")


class NotebookError(RuntimeError):
    """A cell raised, or the kernel died.

    Attributes:
        kept: Where the partial notebook is.
        error: Name and message of the error.
        traceback: The kernel's traceback, with its colours.
    """

    def __init__(self, notebook: str, error: str, *, kept: str = "", traceback: str = "") -> None:
        super().__init__(notebook, error)
        self.notebook, self.error, self.kept, self.traceback = notebook, error, kept, traceback

    def __str__(self) -> str:
        return f"{self.notebook} failed: {self.error}"

    def tail(self, lines: int = 15, *, colours: bool = False) -> str:
        """Return the last lines of the traceback."""
        text = self.traceback if colours else ANSI.sub("", self.traceback)
        return "\n".join(text.splitlines()[-lines:])


def project_root(path: str | Path) -> Path:
    """Return the folder above the path that holds the project, else the current folder."""
    for folder in Path(path).resolve().parents:
        if (folder / "pyproject.toml").exists() or (folder / ".git").exists():
            return folder
    return Path.cwd()


def find_notebook(name: str | Path) -> Path:
    """Find a notebook by its path, or by its name in ``notebooks/``.

    Raises:
        FileNotFoundError: There is none, with the names of those that there are.
    """
    folders = [Path(), Path("notebooks"), project_root(Path.cwd() / "x") / "notebooks"]
    for folder in folders:
        for path in (folder / name, folder / f"{name}.ipynb"):
            if path.is_file():
                return path
    known = sorted({path.stem for folder in folders[1:] for path in list_notebooks(folder)})
    raise FileNotFoundError(
        f"expected a notebook, got {str(name)!r}: give a path"
        + (f" or one of {', '.join(known)}" if known else "")
    )


def list_notebooks(folder: str | Path) -> list[Path]:
    """List the notebooks of a folder, without failed and hidden ones."""
    return sorted(
        path
        for path in Path(folder).glob("*.ipynb")
        if not path.name.startswith(".") and not path.name.endswith(".failed.ipynb")
    )


def run_notebook(
    notebook: str | Path,
    out: str | Path | None = None,
    *,
    parameters: Mapping[str, object] | None = None,
    in_place: bool = False,
    progress: bool = True,
) -> Path:
    """Run a notebook with parameters; the kernel works in the notebook's folder.

    The kernel runs in this interpreter with one OpenMP thread unless ``OMP_NUM_THREADS`` is set,
    because rounding depends on the number of threads.

    Args:
        notebook: The notebook.
        out: The executed notebook; by default ``_build/executed/NAME.ipynb`` in the project.
        parameters: Name -> value of what differs from the defaults.
        in_place: Write the executed notebook over the notebook itself.
        progress: Show papermill's bar, and on a terminal the notebook's own.

    Returns:
        Where the executed notebook is. ``metadata.leaklib`` says what ran, with what, on what.

    Raises:
        ParameterError: An unknown or ill-typed parameter; nothing was run.
        NotebookError: A cell raised or the kernel died; an earlier result is untouched.
        OSError: The output folder cannot be written, or the notebook was edited meanwhile.
        ImportError: papermill is not installed.
    """
    info = read_notebook(notebook)
    given = info.resolve(parameters or {})
    root = project_root(info.path)
    built = root / "_build" / "executed" / info.path.name
    target = info.path if in_place else Path(out) if out is not None else built
    in_place = target.resolve() == info.path.resolve()
    kept = (built if in_place else target).with_suffix(".failed.ipynb")
    prepare_folder(target.parent)
    prepare_folder(kept.parent)
    before = info.path.read_bytes()
    partial = kept.parent.resolve() / f".{info.path.stem}.{uuid.uuid4().hex[:8]}.ipynb"
    write_prepared(info.path, given, partial)
    start = time.perf_counter()
    try:
        failure = _execute(partial, info, progress=progress)
    except KeyboardInterrupt as stop:
        os.replace(partial, kept)
        stop.add_note(f"the partial notebook is {kept}")
        raise
    described = _describe(info, given, seconds=time.perf_counter() - start)
    if failure:
        with contextlib.suppress(OSError, ValueError):  # a full disk cuts the partial one short
            write_executed(partial, kept, info.path, given, described, root=root)
            failure.kept = str(kept)
        raise failure
    if in_place and info.path.read_bytes() != before:
        target = built
    write_executed(partial, target, info.path, given, described, root=root)
    kept.unlink(missing_ok=True)
    if in_place and target != info.path:
        raise OSError(
            f"{info.path} was edited while it ran, so it was left alone: the executed version is "
            f"{target}; run it again"
        )
    return target


def _execute(partial: Path, info: NotebookInfo, *, progress: bool) -> NotebookError | None:
    try:
        import papermill
        from papermill.exceptions import PapermillExecutionError
    except ImportError as error:
        partial.unlink(missing_ok=True)
        raise ImportError(
            "expected papermill to run a notebook, got none: pip install 'leaklib[study]'"
        ) from error
    escaped = str(partial).replace("{", "{{").replace("}", "}}")  # papermill formats its paths
    live = LiveLine() if progress and sys.stderr.isatty() else None
    try:
        papermill.execute_notebook(
            escaped,
            escaped,
            kernel_name=KERNEL["name"],
            language=KERNEL["language"],
            progress_bar={"desc": info.path.stem, "dynamic_ncols": True} if progress else False,
            # not papermill's `cwd`: that changes the folder of this whole process
            resources={"metadata": {"path": str(info.path.resolve().parent)}},
            kernel_manager_class=_kernel_manager_class(),
            stderr_file=live,
        )
    except PapermillExecutionError as error:
        text = f"cell {error.exec_count}: {error.ename}: {error.evalue}"
        return NotebookError(info.path.name, text, traceback="\n".join(error.traceback))
    except Exception as error:  # the kernel died or did not start
        return NotebookError(info.path.name, f"{type(error).__name__}: {error}")
    return None


def _kernel_manager_class() -> type:
    """A kernel manager that starts this interpreter, whatever kernels are installed."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class ThisInterpreter(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            launcher = ["-Xfrozen_modules=off", "-m", "ipykernel_launcher"]
            quiet = "--IPKernelApp.log_level=50"  # it warns of TCP, on this machine's loopback
            return KernelSpec(
                argv=[sys.executable, *launcher, quiet, "-f", "{connection_file}"],
                display_name=KERNEL["display_name"],
                language=KERNEL["language"],
                env={"OMP_NUM_THREADS": _threads()},
            )

    return ThisInterpreter


def _threads() -> str:
    return os.environ.get("OMP_NUM_THREADS") or "1"


def _describe(info: NotebookInfo, given: Mapping[str, Any], *, seconds: float) -> dict[str, Any]:
    values = {name: parameter.default for name, parameter in info.parameters.items()} | dict(given)
    described = provenance(parameters=values, seconds=seconds)
    threads = _threads()
    described |= {
        "notebook": info.path.stem,
        "profile": values.get("profile"),
        "code_version": code_version(strip_source(info.code)),
        "threads": int(threads) if threads.isdigit() else threads,
    }
    return described


class LiveLine:
    """Shows the last line that the kernel writes to stderr, such as a progress bar."""

    def write(self, text: str) -> None:
        """Show the last line of the text in the current line of the terminal."""
        line = re.split(r"[\r\n]+", text.strip("\r\n"))[-1]
        width = shutil.get_terminal_size().columns - 1
        sys.stderr.write(f"\r\x1b[K{line[:width]}")

    def flush(self) -> None:
        """Pass on what is buffered."""
        sys.stderr.flush()
