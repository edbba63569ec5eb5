"""The book's sources and the files around it. The pages are tested in test_book_pages.py."""

import hashlib
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "book").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


# --- pages and table of contents ----------------------------------------------------------------


def toc_files():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    chapters = [chapter for part in toc["parts"] for chapter in part["chapters"]]
    return [toc["root"], *(chapter["file"] for chapter in chapters)]


def test_table_of_contents_names_every_page_and_notebook_once():
    existing = [path.relative_to(ROOT).with_suffix("").as_posix() for path in PAGES + NOTEBOOKS]
    assert sorted(toc_files()) == sorted(existing)


def test_every_reference_is_cited():
    bib = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")
    keys = re.findall(r"^@\w+\{([^,]+),", bib, re.MULTILINE)
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES + NOTEBOOKS)
    cited = {
        key for group in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text) for key in group.split(",")
    }
    assert len(keys) == len(set(keys))
    assert set(keys) == cited


def test_api_page_shows_every_package_of_the_library():
    rooms = re.findall(r"\{leaklib-room\} (\w+)", (ROOT / "book" / "api.md").read_text())
    packages = {path.parent.name for path in (ROOT / "leaklib").glob("*/__init__.py")}
    assert packages <= set(rooms)


def test_shipped_mathjax_is_the_published_file():
    folder = ROOT / "book" / "_static" / "mathjax"
    assert CONFIG["sphinx"]["config"]["mathjax_path"] == "mathjax/tex-svg.js"
    stated = re.search(r"sha256 (\w{64})", (folder / "README.md").read_text()).group(1)
    assert hashlib.sha256((folder / "tex-svg.js").read_bytes()).hexdigest() == stated


# --- README, Makefile, pins, addresses ----------------------------------------------------------


def shell_lines(text):
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.DOTALL)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", ROOT / "book" / "rerun.md"], ids=lambda p: p.name
)
def test_documented_commands_exist(path):
    lines = shell_lines(path.read_text(encoding="utf-8"))
    targets = [word for line in lines if line.startswith("make ") for word in line.split()[1:]]
    targets = [word for word in targets if "=" not in word and not word.startswith("-")]
    assert {"book", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), f"make {target}"
    used = {m.group(1) for line in lines if (m := re.match(r"\S*leaklib (\w+)", line))}
    assert {"list", "run", "sweep"} >= used > set()


@pytest.mark.parametrize("name", ["README.md", "book/rerun.md"])
def test_documented_example_runs(name, capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    assert "max_evaluations=2_000" in code.group(1)
    names: dict = {}
    exec(code.group(1).replace("2_000", "5"), names)
    assert names["recovered"].images.shape == names["victims"].images.shape
    assert "tensor" in capsys.readouterr().out


def test_continuous_integration_runs_the_documented_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "make test"


def test_makefile_parses_and_helps():
    done = subprocess.run(["make", "-C", str(ROOT)], capture_output=True, text=True, check=True)
    for target in ("book", "html", "test", "clean"):
        assert f"make {target} " in done.stdout


def test_repository_has_one_address():
    address = CONFIG["repository"]["url"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["repository-code"] == address
    clone = re.findall(r"git clone (\S+)", README)
    assert clone == [address]


def requirements():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    lines = [line.split("#")[0].strip() for line in lines]
    return [line for line in lines if line]


def test_requirements_are_exact_and_end_with_this_repository():
    *pins, last = requirements()
    assert last == "-e ."
    for pin in pins:
        assert re.fullmatch(r"[\w.-]+==[\w.]+", pin), pin


def test_requirements_cover_the_package():
    pins = {Requirement(pin).name.lower(): pin.split("==")[1] for pin in requirements()[:-1]}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + extras["study"] + extras["cluster"] + extras["test"]
    for text in wanted:
        need = Requirement(text)
        assert need.name.lower() in pins, f"no pin for {need.name}"
        assert need.specifier.contains(pins[need.name.lower()]), f"{text} against the pin"


# --- the examples worked by hand ----------------------------------------------------------------


def hand_matrices(label):
    """Matrices of a labelled equation of the page, float64."""
    text = (ROOT / "book" / "how_gradients_leak.md").read_text(encoding="utf-8")
    equation = re.search(rf":label: {label}\n(.*?)```", text, re.DOTALL).group(1)
    return [
        torch.tensor(
            [[float(value) for value in row.split("&")] for row in body.split(r"\\")],
            dtype=torch.float64,
        )
        for body in re.findall(r"\\begin\{bmatrix\}(.*?)\\end\{bmatrix\}", equation, re.DOTALL)
    ]


def test_hand_worked_gradient_is_autograds_and_gives_the_picture_back():
    (picture,) = hand_matrices("worked-picture")
    weight, bias, target = hand_matrices("worked-layer")
    weight.requires_grad_()
    bias.requires_grad_()
    loss = (weight @ picture + bias - target).square().sum() / 2
    grads = torch.autograd.grad(loss, [weight, bias])
    printed = hand_matrices("worked-gradient")
    for computed, shown in zip(grads, printed, strict=True):
        torch.testing.assert_close(shown, computed, rtol=0, atol=1e-12)
    for row in range(2):
        recovered = printed[0][row] / printed[1][row]
        torch.testing.assert_close(recovered, picture[:, 0], rtol=0, atol=1e-12)


def one_pixel_gradient(pixel):
    weight, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (2.0, -0.5))
    loss = (weight * pixel + bias).square() / 2
    return torch.stack(torch.autograd.grad(loss, [weight, bias], create_graph=True))


def test_hand_worked_jacobian_predicts_the_best_match_under_noise():
    pixel = torch.tensor(0.5, dtype=torch.float64)
    grad, jac, gram = hand_matrices("worked-jacobian")
    torch.testing.assert_close(grad[0], one_pixel_gradient(pixel.requires_grad_()).detach())
    computed = torch.autograd.functional.jacobian(one_pixel_gradient, pixel.detach())
    torch.testing.assert_close(jac[0], computed)
    torch.testing.assert_close(gram, jac @ jac.T)
    candidates = torch.linspace(0.4, 0.6, 20001, dtype=torch.float64)
    for noise, predicted in zip(hand_matrices("worked-noise"), (0.02, 0.0), strict=True):
        assert noise.norm().item() == pytest.approx(0.05)
        assert (jac @ noise.T / gram).item() == pytest.approx(predicted, abs=1e-12)
        residual = 2 * candidates - 0.5  # k(x), and k(x) x below: the gradient of a candidate
        wanted = grad[0] + noise[0]
        mismatch = (residual * candidates - wanted[0]).square() + (residual - wanted[1]).square()
        best = candidates[mismatch.argmin()].item()
        assert best - 0.5 == pytest.approx(predicted, abs=1e-3)


def test_the_readmes_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "max_evaluations=2_000" in code
    exec(code.replace("max_evaluations=2_000", "max_evaluations=20"), {})
    assert capsys.readouterr().out.startswith("tensor([[")
