"""The command line: run a notebook, list the notebooks, run a notebook over a grid."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from leaklib.runner.execute import (
    NotebookError,
    find_notebook,
    list_notebooks,
    project_root,
    run_notebook,
)
from leaklib.runner.notebook import ParameterError, read_notebook

EXAMPLES = """examples:
  leaklib list
  leaklib run dlg_first_look
  leaklib run dlg_first_look run.ipynb -p seed 3 -p profile paper -p device cuda
  leaklib sweep dlg_what_decides -p seed 0,1,2 -p profile smoke --jobs 2
  leaklib sweep dlg_what_decides -p seed 0,1,2 --scheduler tcp://10.0.0.1:8786
"""
FLAGS = ("-p", "--parameter")
PATHS = ("out", "data_root")  # parameters that name a folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit status.

    0: done. 1: a notebook failed. 2: the command was wrong. 130: interrupted.
    """
    parser = _parser()
    words, given = _take_parameters(list(sys.argv[1:] if argv is None else argv), parser)
    arguments, rest = parser.parse_known_args(words)
    if rest:  # argparse wants OUT right behind NOTEBOOK; people put flags between
        if arguments.command == "run" and arguments.out is None and not rest[0].startswith("-"):
            arguments.out, *rest = rest
        if rest:
            parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        status: int = arguments.action(arguments, given)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the exit complains
        return 0
    except (ParameterError, OSError, ImportError) as error:
        print(f"leaklib: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        notes = "; ".join(getattr(stop, "__notes__", []))
        print(f"\nleaklib: interrupted{': ' + notes if notes else ''}", file=sys.stderr)
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    style: dict[str, Any] = {
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,
    }
    parser = argparse.ArgumentParser(
        prog="leaklib",
        description="Gradient leakage, executed: run the study's notebooks.",
        epilog=EXAMPLES,
        **style,
    )
    parser.add_argument("--version", action="version", version=f"leaklib {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, epilog: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, epilog=epilog, **style)

    run = command(
        "run",
        "Run one notebook with parameters.",
        "A failed run is kept as OUT's name with .failed.ipynb; an earlier OUT stays as it was.",
    )
    run.add_argument("notebook", metavar="NOTEBOOK", help="path, or name in ./notebooks")
    run.add_argument("out", metavar="OUT", nargs="?", help="default: _build/executed/NAME.ipynb")
    _add_parameter_flag(run, "value", "a parameter that differs from its default; repeatable")
    run.add_argument("--in-place", action="store_true", help="write over NOTEBOOK itself")
    run.add_argument("--quiet", action="store_true", help="print errors only")
    run.set_defaults(action=_run)

    lister = command("list", "List the notebooks with their parameters, defaults and meaning.", "")
    lister.add_argument("folder", metavar="FOLDER", nargs="?", help="default: notebooks")
    lister.set_defaults(action=_list)

    sweep = command(
        "sweep",
        "Run one notebook for every combination of parameter values.",
        "The same command again runs what is missing or failed, nothing else. On a cluster every\n"
        "worker must read the notebook and write DIR at the same path (a shared disk), with the\n"
        "same leaklib installed.",
    )
    sweep.add_argument("notebook", metavar="NOTEBOOK", help="path, or name in ./notebooks")
    _add_parameter_flag(sweep, "v1,v2,...", "values of a parameter; repeatable")
    sweep.add_argument("--jobs", type=int, default=1, metavar="N", help="local processes")
    sweep.add_argument("--scheduler", metavar="tcp://HOST:PORT", help="a Dask cluster instead")
    sweep.add_argument("--out", metavar="DIR", help="default: _build/sweeps/NAME")
    sweep.add_argument("--quiet", action="store_true", help="print errors only")
    sweep.set_defaults(action=_sweep)
    return parser


def _add_parameter_flag(parser: argparse.ArgumentParser, value: str, text: str) -> None:
    parser.add_argument(*FLAGS, nargs=2, action="append", metavar=("name", value), help=text)


def _take_parameters(
    words: list[str], parser: argparse.ArgumentParser
) -> tuple[list[str], dict[str, str]]:
    """Take ``-p name value`` out; argparse would mistake a value such as -1e-3 for a flag."""
    rest: list[str] = []
    given: dict[str, str] = {}
    while words:
        word = words.pop(0)
        if word not in FLAGS:
            rest.append(word)
            continue
        if len(words) < 2:
            parser.error(f"expected a name and a value behind {word}")
        name, value = words.pop(0), words.pop(0)
        if name in given:
            parser.error(f"parameter {name!r} is given twice")
        given[name] = value
    return rest, given


def _run(arguments: argparse.Namespace, given: dict[str, str]) -> int:
    if arguments.in_place and arguments.out:
        print("leaklib: give OUT or --in-place, not both", file=sys.stderr)
        return 2
    info = read_notebook(find_notebook(arguments.notebook))
    parameters = info.resolve(_from_here(given, info.path), typed=True)
    try:
        path = run_notebook(
            info.path,
            arguments.out,
            parameters=parameters,
            in_place=arguments.in_place,
            progress=not arguments.quiet,
        )
    except NotebookError as error:
        tail = error.tail(colours=sys.stderr.isatty())
        kept = f"the partial notebook is {_short(error.kept)}" if error.kept else "nothing was kept"
        print(f"{tail}\nleaklib: {error}; {kept}".lstrip("\n"), file=sys.stderr)
        return 1
    if not arguments.quiet:
        print(_short(path))
    return 0


def _list(arguments: argparse.Namespace, given: dict[str, str]) -> int:
    here = Path("notebooks") if Path("notebooks").is_dir() else project_root("x") / "notebooks"
    folder = Path(arguments.folder) if arguments.folder else here
    if not folder.is_dir():
        raise FileNotFoundError(f"expected a folder of notebooks, got {folder}")
    paths = list_notebooks(folder)
    if not paths:
        print(f"no notebooks in {folder}")
    width = max(60, min(100, shutil.get_terminal_size().columns))
    for path in paths:
        info = read_notebook(path)
        print(f"{_short(path)}\n  {info.title}\n{info.describe(width)}\n")
    return 0


def _sweep(arguments: argparse.Namespace, given: dict[str, str]) -> int:
    from leaklib.runner.notebook_sweep import (  # pandas: not for the others
        split_values,
        sweep_notebook,
    )

    info = read_notebook(find_notebook(arguments.notebook))
    given = _from_here(given, info.path)
    if arguments.jobs < 1:
        raise ParameterError(f"expected --jobs >= 1, got {arguments.jobs}")
    result = sweep_notebook(
        info.path,
        {name: split_values(info, name, text) for name, text in given.items()},
        arguments.out,
        jobs=arguments.jobs,
        scheduler=arguments.scheduler,
        progress=not arguments.quiet,
    )
    if not arguments.quiet or not result.complete:
        manifest, failed = result.manifest, result.failed
        stream = sys.stdout if result.complete else sys.stderr
        print(manifest.drop(columns="error").to_string(index=False), file=stream)
        for key, error in zip(failed["key"], failed["error"], strict=True):
            print(f"{key} {error}", file=stream)
        done = int((manifest["status"] == "done").sum())
        print(f"{done} of {len(manifest)} settings done, {len(failed)} failed", file=stream)
    return 0 if result.complete else 1


def _from_here(given: dict[str, str], notebook: Path) -> dict[str, str]:
    """Paths typed here, as they read from the notebook's folder, where the kernel works."""
    start = notebook.resolve().parent
    paths = {name: value for name, value in given.items() if name in PATHS and value}
    return given | {
        name: os.path.relpath(Path(value).expanduser(), start) for name, value in paths.items()
    }


def _short(path: str | Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _version() -> str:
    try:
        return metadata.version("leaklib")
    except metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
