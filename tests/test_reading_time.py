"""What the course promises to cost: minutes by the reader's measure, and that the two-hour route leads to headings that are there."""
import nbformat
import pytest
from reading_time import chapters, code_lines, minutes, read, route, sections, words

cell = nbformat.v4


def test_the_measure():
    prose, code = cell.new_markdown_cell("# Title\n\nfour words of prose <details>not these two</details>"), cell.new_code_cell("#| export\nx = 1\n\ny = 2  # two")
    folded = cell.new_code_cell("#| code-fold: true\nz = 3")
    note = cell.new_markdown_cell('seen\n\n::: {.callout-note collapse="true"}\nnot seen\n:::\n')
    assert (words(prose), code_lines(code), code_lines(folded), words(note)) == (6, 2, 0, 1)
    assert minutes([prose, code, folded, note]) == pytest.approx(7 / 200 + 2 * 4 / 60)
    parts = sections([cell.new_markdown_cell("# A"), cell.new_markdown_cell("## B\n\none"), code, cell.new_markdown_cell("## C")])
    assert [len(part) for part in parts.values()] == [4, 2, 1]


def test_the_course_takes_a_day():
    taken = {page: minutes(read(page)) for page in chapters()}
    assert len(taken) == 23 and sum(taken.values()) <= 8 * 60 and max(taken.values()) <= 45, taken


def test_one_page_is_one_page():
    cells = read("00_one_page")
    page = cells[:next(i for i, c in enumerate(cells) if c.source.startswith("## Exercises"))]
    every = sum(sum(bool(line.strip()) and not line.startswith("#|") for line in c.source.splitlines()) for c in page if c.cell_type == "code")
    assert minutes(cells) <= 40 and every <= 250                     # folded or not
    imports = {line.split()[1].split(".")[0] for c in page if c.cell_type == "code" for line in c.source.splitlines() if line.startswith(("import ", "from "))}
    assert imports <= {"math", "re", "torch", "einops", "datasets", "PIL"}


def test_two_hours_are_two_hours():
    stops = list(route())                                            # a heading that is gone is a KeyError
    assert sum(time for *_, time in stops) <= 120 and stops[0][0] == "00_one_page"
