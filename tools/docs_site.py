"""Hooks of MkDocs (mkdocs.yml): the README is the start page, links that leave docs/ become text, formulas become MathML.

MathML needs neither scripts nor fonts from elsewhere: a site that is built is complete, and so is one page saved from it.
"""

import html
import pathlib
import re
from typing import Any

import latex2mathml.converter  # pyright: ignore[reportMissingImports]
from mkdocs.structure.files import File, Files  # pyright: ignore[reportMissingImports]

ROOT = pathlib.Path(__file__).resolve().parent.parent
# [text](target) of a file in the repository; images and what has a scheme are others
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(((?:\.\./)*)([^)#:]+)(#[^)]*)?\)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.S)


def on_files(files: Files, config: Any) -> Files:
    """The README, seen from docs/, is index.md."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to files of the repository outside docs/ lead nowhere on the site: their text stays."""
    folder = pathlib.PurePosixPath(page.file.src_uri).parent

    def shown(found: re.Match[str]) -> str:
        target = ROOT / "docs" / folder / (found[2] + found[3])
        if page.file.src_uri == "index.md" and (ROOT / found[3]).exists():
            return found[1]
        outside = not target.resolve().is_relative_to(ROOT / "docs")
        return found[1] if outside and target.exists() else found[0]

    return _LINK.sub(shown, markdown)


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """LaTeX that the extension arithmatex has marked, as MathML."""

    def formula(found: re.Match[str]) -> str:
        display = "inline" if found[1] == "span" else "block"
        latex = html.unescape(found[2] or found[3]).strip()
        return latex2mathml.converter.convert(latex, display=display)

    return _FORMULA.sub(formula, content)
