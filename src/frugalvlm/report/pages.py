"""The HTML page of an executed notebook: one file that needs no network and has no scripts.

Beside what nbconvert makes of it a page has a title, a table of contents, equations as MathML, a
text for every figure, and links to the other pages.
"""

from __future__ import annotations

import ast
import html
import importlib
import inspect
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import nbformat
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from frugalvlm.errors import FrugalError
from frugalvlm.papers import all_papers
from frugalvlm.report.display import name_of

__all__ = ["FigurelessError", "as_page", "figures_drawn", "relink", "title_of", "write_page"]

_NAV = re.compile(r"<!-- pages -->.*?<!-- end of pages -->", re.DOTALL)
_COMPARISONS = ("accuracy", "efficiency", "emissions")
_TEMPLATE = """
{%- extends 'index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block html_head_css -%}<style>{{ resources.page_css }}</style>{%- endblock -%}
{%- block body_header -%}
{{ super() }}
<!-- pages --><!-- end of pages -->
{{ resources.page_contents }}
{%- endblock -%}
{%- block data_png scoped -%}
<div class="jp-RenderedImage jp-OutputArea-output {{ extra_class }}">
<img class="jp-needs-light-background" alt="{{ output | get_metadata('alt', 'image/png')
| default('', true) | escape_html_keep_quotes }}"
src="data:image/png;base64,{{ output.data['image/png'] | escape_html }}">
</div>
{%- endblock -%}
"""
_CSS = """
main{max-width:75rem;margin:0 auto}
.pages,.contents{font-family:var(--jp-content-font-family);font-size:0.95rem;margin:0.8rem 1rem}
.pages a,.contents a{color:var(--jp-content-link-color)}
.contents ol{margin:0.3rem 0;padding-left:1.6rem;columns:2}
.jp-RenderedHTMLCommon table.dataframe td{white-space:nowrap}
.jp-OutputArea-output{overflow-x:auto}
math[display=block]{margin:0.8em 0}
"""


class FigurelessError(FrugalError, RuntimeError):
    """An executed notebook holds fewer figures than it draws."""


class _Renderer(IPythonRenderer):
    """Markdown whose equations are MathML, which browsers show without a script."""

    def block_math(self, body: str) -> str:
        return convert(body, display="block")

    def inline_math(self, body: str) -> str:
        return convert(body)


class _Exporter(HTMLExporter):
    @jinja2.pass_context
    def markdown2html(self, context: Any, source: str) -> str:
        attachments = context.get("cell", {}).get("attachments", {})
        renderer = _Renderer(escape=False, attachments=attachments, anchor_link_text="¶")
        return MarkdownWithMath(renderer=renderer).render(source)


def as_page(notebook: nbformat.NotebookNode, name: str) -> str:
    """The page of an executed notebook; links to other pages are put in by `relink`.

    Args:
        notebook: executed; its outputs get texts for their figures.
        name: what to call the page where the notebook has no heading.
    """
    _describe_figures(notebook)
    exporter = _Exporter(
        template_name="lab", template_file="page.html.j2",
        extra_loaders=[jinja2.DictLoader({"page.html.j2": _TEMPLATE})],
    )  # fmt: skip
    resources = {
        "metadata": {"name": title_of(notebook) or name},
        "page_css": _CSS,
        "page_contents": _contents(notebook),
    }
    page, _ = exporter.from_notebook_node(notebook, resources=resources)
    return page


def write_page(notebook: nbformat.NotebookNode, path: Path) -> Path:
    """Write the page of an executed notebook; it is there as a whole or not at all."""
    _replace(path, as_page(notebook, path.stem))
    return path


def title_of(notebook: nbformat.NotebookNode) -> str:
    """The first heading, without marks of Markdown; empty where there is none."""
    for level, text in _headings(notebook):
        if level == 1:
            return text
    return ""


def figures_drawn(notebook: nbformat.NotebookNode) -> tuple[int, int]:
    """How many cells show a figure by `plt.show()`, and how many of these hold a picture."""
    shown = [c for c in notebook.cells if c.cell_type == "code" and "plt.show()" in c.source]
    ran = [c for c in shown if not _branched(c.source)]
    return len(ran), sum(any(_is_picture(o) for o in c.outputs) for c in ran)


def relink(root: Path, only: Path | None = None) -> list[Path]:
    """Put links to all pages of a folder of results into each of them.

    Args:
        root: results, or the work folder: pages lie in SCALE/KEY and in compare.
        only: just this page.

    Returns:
        The pages that changed.
    """
    known = list(_pages(root))
    changed = []
    for _, _, path in known:
        if only is not None and path.resolve() != only.resolve():
            continue
        old = path.read_text(encoding="utf-8")
        new = _NAV.sub(lambda _, path=path: _links(path, known), old, count=1)  # type: ignore[misc]
        if new != old:
            _replace(path, new)
            changed.append(path)
    return changed


def _pages(root: Path) -> Iterator[tuple[str, str, Path]]:
    """Name, title and place of every page there is: papers first, then comparisons."""
    for paper in all_papers():
        path = root / "pocket" / paper.key / f"{paper.key}.html"
        if path.is_file():
            yield name_of(paper), paper.title, path
    for name in _COMPARISONS:
        path = root / "compare" / f"{name}.html"
        if path.is_file():
            yield name.capitalize(), f"{name.capitalize()} of all methods", path


def _links(page: Path, known: list[tuple[str, str, Path]]) -> str:
    items = []
    for name, title, path in known:
        there = Path(os.path.relpath(path, page.parent)).as_posix()
        text, where, full = (html.escape(t) for t in (name, there, title))
        link = f'<a href="{where}" title="{full}">{text}</a>'
        items.append(f"<strong>{text}</strong>" if path == page else link)
    notebook = f'<a href="{html.escape(page.stem)}.ipynb">this page as a notebook</a>'
    inside = " · ".join([*items, notebook])
    return (
        f'<!-- pages --><nav class="pages" aria-label="Pages">{inside}</nav><!-- end of pages -->'
    )


def _contents(notebook: nbformat.NotebookNode) -> str:
    """Links to the headings of the second level."""
    items = [
        f'<li><a href="#{html.escape(re.sub(" +", "-", text))}">{html.escape(text)}</a></li>'
        for level, text in _headings(notebook)
        if level == 2
    ]
    if len(items) < 2:
        return ""
    return f'<nav class="contents" aria-label="Contents"><ol>{"".join(items)}</ol></nav>'


def _headings(notebook: nbformat.NotebookNode) -> Iterator[tuple[int, str]]:
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for marks, text in re.findall(r"^(#{1,6}) +(.+?) *$", cell.source, re.MULTILINE):
                yield len(marks), re.sub(r"[*_`]|\[([^\]]*)\]\([^)]*\)", r"\1", text)


def _describe_figures(notebook: nbformat.NotebookNode) -> None:
    """Give every picture a text: the heading above it, and what the drawing function says."""
    heading, known = title_of(notebook), dict[str, str]()
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            found = re.findall(r"^#+ +(.+?) *$", cell.source, re.MULTILINE)
            heading = found[-1] if found else heading
            continue
        if cell.cell_type != "code":
            continue
        known |= _imported(cell.source)
        said = " ".join(_said(cell.source, known))
        for output in cell.outputs:
            if _is_picture(output):
                text = f"{heading}: {said}" if said else f"Figure: {heading}"
                output.metadata.setdefault("image/png", {})["alt"] = text


def _imported(source: str) -> dict[str, str]:
    """By its name in the notebook, the full name of all that a cell imports from the kit."""
    found: dict[str, str] = {}
    for node in ast.walk(_parsed(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("frugalvlm"):
            found |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return found


def _said(source: str, known: Mapping[str, str]) -> Iterator[str]:
    """First lines of the docstrings of the plotting functions that a cell calls."""
    for node in ast.walk(_parsed(source)):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=attr)) if name in known:
                function = f"{known[name]}.{attr}"
            case ast.Call(func=ast.Name(id=name)) if name in known:
                function = known[name]
            case _:
                continue
        module, _, own = function.rpartition(".")
        if re.search(r"plot|panel|bars|curve|draw", own):
            try:
                doc = inspect.getdoc(getattr(importlib.import_module(module), own)) or ""
            except (ImportError, AttributeError):  # written by another version of the kit
                continue
            yield doc.split("\n\n")[0].replace("\n", " ")


def _parsed(source: str) -> ast.AST:
    try:
        return ast.parse(source)
    except SyntaxError:  # a magic of IPython
        return ast.Module(body=[], type_ignores=[])


def _branched(source: str) -> bool:
    """Whether a figure stands in a branch, which need not have been taken."""
    return bool(re.search(r"^\s+plt\.show\(\)", source, re.MULTILINE))


def _is_picture(output: Any) -> bool:
    return "image/png" in output.get("data", {})


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
