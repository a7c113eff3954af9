"""What MkDocs does to pages: README is the first of them, and a few files from outside of this folder have their place.

Links are written as a reader of the repository needs them; here those that lead into or out of ``docs/`` are cut.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "tests/README.md", "bench/data/*.csv")


def on_files(files: Files, config: Any) -> Files:
    """README as ``index.md``, and the files from outside."""
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links without what leads out of ``docs/``, or from outside into it."""
    if page.file.abs_src_path != str(ROOT / "docs" / page.file.src_uri):
        return markdown.replace("](docs/", "](").replace("](../docs/", "](../")
    if "/" in page.file.src_uri:
        return markdown
    return markdown.replace("](../README.md", "](index.md").replace("](../", "](")
