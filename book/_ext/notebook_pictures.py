"""Pictures that a notebook stored with ``glue``, on other pages and in the README.

``{notebook-picture}`` shows one on a page::

    ```{notebook-picture} first_look_frames
    :notebook: dlg_first_look
    :alt: What the picture shows, for those who cannot see it.
    ```

It does what ``{glue}`` with ``:doc:`` does, and also has a text for those who cannot see, works for
pictures that their notebook does not display, and warns where a key is missing: ``{glue}`` would
leave a broken link without a word.

As a program it writes the README's picture: ``python book/_ext/notebook_pictures.py``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[2]
README_PICTURE = ROOT / "book" / "_static" / "first_look.png"
README_SOURCE = ROOT / "notebooks" / "dlg_first_look.ipynb"
README_KEY = "first_look_frames"


def stored_picture(notebook: Path, key: str) -> bytes:
    """PNG that a notebook stored under a glue key.

    Raises:
        KeyError: The notebook holds no picture under that key; names those it holds.
    """
    found: dict[str, Any] = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", []):
            glued = output.get("metadata", {}).get("scrapbook", {})
            for mime, data in output.get("data", {}).items():
                if "name" in glued and mime.endswith("image/png"):
                    found[glued["name"]] = data
    if key not in found:
        known = ", ".join(sorted(found)) or "none"
        raise KeyError(f"expected a picture {key!r} in {notebook.name}, found: {known}")
    text = found[key]
    return base64.b64decode(text if isinstance(text, str) else "".join(text))


class NotebookPicture(SphinxDirective):
    """``{notebook-picture} KEY`` with ``:notebook:`` and ``:alt:``."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {
        "notebook": directives.unchanged_required,
        "alt": directives.unchanged_required,
    }

    def run(self) -> list[nodes.Node]:
        """Copy the picture to the build folder and show it."""
        missing = [name for name in self.option_spec if name not in self.options]
        if missing:
            raise self.error(f"expected the option :{missing[0]}:, got none")
        notebook = Path(self.env.srcdir) / "notebooks" / f"{self.options['notebook']}.ipynb"
        self.env.note_dependency(str(notebook))
        try:
            png = stored_picture(notebook, self.arguments[0])
        except (OSError, KeyError) as error:
            raise self.error(str(error)) from error
        folder = Path(self.env.mystnb_config.output_folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{hashlib.sha256(png).hexdigest()}.png"
        path.write_bytes(png)
        page_folder = Path(self.env.doc2path(self.env.docname)).parent
        uri = Path(os.path.relpath(path, page_folder)).as_posix()
        return [nodes.image(uri=uri, alt=self.options["alt"], classes=["notebook-picture"])]


if __name__ == "__main__":
    README_PICTURE.write_bytes(stored_picture(README_SOURCE, README_KEY))
