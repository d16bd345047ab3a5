"""Pages of executed notebooks: title, contents, equations, figures' texts, links, no network."""

import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from frugalvlm.papers import load_paper
from frugalvlm.report import pages

PIXEL = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
)


def picture() -> nbformat.NotebookNode:
    return new_output("display_data", {"image/png": PIXEL, "text/plain": "<Figure>"})


def notebook(title: str = "# VisionZip: *half* & `less`") -> nbformat.NotebookNode:
    cells = [
        new_markdown_cell(f"{title}\n\nTokens: $n < \\frac{{1}}{{9}}$ of all.\n\n$$a_i = b^2$$"),
        new_code_cell("from frugalvlm.report import comparison_plots as cp\nimport os"),
        new_markdown_cell("## First, over tokens\n\nText."),
        new_code_cell("cp.tokens_plot(x)\nplt.show()", outputs=[picture()]),
        new_markdown_cell("## Second & last"),
        new_code_cell("%matplotlib inline\nunknown(x)\nplt.show()", outputs=[picture()]),
    ]
    return new_notebook(cells=cells)


@pytest.fixture(scope="module")
def page() -> str:
    return pages.as_page(notebook(), "visionzip.failed")


def test_the_title_is_the_notebooks_heading_and_not_a_files_name(page: str) -> None:
    assert BeautifulSoup(page, "html.parser").title.text == "VisionZip: half & less"
    assert "failed" not in page
    assert pages.title_of(new_notebook(cells=[new_code_cell("# no heading")])) == ""


def test_every_figure_has_a_text_that_says_what_it_shows(page: str) -> None:
    texts = [img["alt"] for img in BeautifulSoup(page, "html.parser").find_all("img")]
    assert texts == [
        "First, over tokens: Mean retention over visual tokens, one panel per method; the others "
        "are grey there.",
        "Figure: Second & last",
    ]


def test_contents_lead_to_headings_that_are_there(page: str) -> None:
    soup = BeautifulSoup(page, "html.parser")
    links = soup.select("nav.contents a")
    assert [a.text for a in links] == ["First, over tokens", "Second & last"]
    for link in links:
        assert soup.find(id=link["href"].removeprefix("#")) is not None


def test_equations_need_no_network_and_no_script(page: str) -> None:
    soup = BeautifulSoup(page, "html.parser")
    inline, block = soup.find_all("math")
    assert inline.find("mfrac") is not None
    assert inline.find("mo", string="<") is not None
    assert block["display"] == "block"
    assert block.find("msub") is not None
    assert "$" not in soup.find("main").text
    assert not soup.find_all(["script", "link", "iframe"])
    assert not re.search(r"(?:src|href)=\"https?://|url\(['\"]?http|@import", page)


def test_markup_in_names_is_a_text_on_the_page() -> None:
    hostile = "<img src=x onerror=alert(1)>"
    frame = pd.DataFrame({"method": [hostile]})
    made = notebook("No heading.")
    made.cells[1].outputs = [
        new_output("stream", name="stdout", text=f"model {hostile}"),
        new_output("display_data", {"text/html": frame.to_html(), "text/plain": ""}),
        new_output("error", ename="ValueError", evalue=hostile, traceback=[hostile]),
    ]
    soup = BeautifulSoup(pages.as_page(made, hostile), "html.parser")
    assert soup.title.text == hostile
    assert soup.text.count(hostile) == 4  # the title, a print, a frame, an error
    assert all(img["src"].startswith("data:") for img in soup.find_all("img"))


def test_pages_link_to_each_other_and_to_what_is_there_only(tmp_path: Path) -> None:
    places = ["pocket/visionzip/visionzip.html", "pocket/gsearch/gsearch.html",
              "compare/accuracy.html"]  # fmt: skip
    for place in places:
        (tmp_path / place).parent.mkdir(parents=True)
        pages.write_page(notebook(), tmp_path / place)
    assert not BeautifulSoup((tmp_path / places[0]).read_text(), "html.parser").select("nav.pages")
    assert set(pages.relink(tmp_path)) == {tmp_path / place for place in places}
    for place in places:
        soup = BeautifulSoup((tmp_path / place).read_text(), "html.parser")
        links = [a["href"] for a in soup.select("nav.pages a") if not a["href"].endswith(".ipynb")]
        found = {((tmp_path / place).parent / link).resolve() for link in links}
        assert found == {tmp_path / other for other in places} - {tmp_path / place}
    names = [a.get("title") for a in soup.select("nav.pages a")]
    assert load_paper("gsearch").title in names  # the paper's name, not its key
    assert pages.relink(tmp_path) == []


def test_one_page_can_be_linked_alone(tmp_path: Path) -> None:
    for key in ("visionzip", "sgl"):
        (tmp_path / "pocket" / key).mkdir(parents=True)
        pages.write_page(notebook(), tmp_path / "pocket" / key / f"{key}.html")
    own = tmp_path / "pocket" / "sgl" / "sgl.html"
    assert pages.relink(tmp_path, only=own) == [own]


def test_a_figure_that_is_not_there_is_counted() -> None:
    made = notebook()
    assert pages.figures_drawn(made) == (2, 2)
    made.cells[3].outputs = []
    assert pages.figures_drawn(made) == (2, 1)
    made.cells[3].source = "if x:\n    plt.show()"  # a branch that was not taken
    assert pages.figures_drawn(made) == (1, 1)
