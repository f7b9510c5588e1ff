"""The site without Quarto: the pages as nbdev's processors leave them, in a copy; links, anchors, documentation, alt text, headings."""
import difflib
import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from posixpath import dirname, join, normpath

import house
import nbformat
import pytest
import yaml
from house import NBS, ROOT, chapters, html_of, module_of, page_of, pages, read

pytest.importorskip("nbdev", reason="needs the [dev] extra")
pypandoc = pytest.importorskip("pypandoc", reason="needs the [dev] extra")
PAGES = pages()
CHAPTERS = chapters()
BUILD = """
import json
from pathlib import Path
from nbdev.processors import FilterDefaults
from nbdev.serve_drv import main
errors = {}
for source in sorted(Path("nbs").rglob("*.ipynb")):     # what proc_nbs does with each page; here an error on one hides no other
    page = source.relative_to("nbs")
    (Path("_proc") / page).parent.mkdir(parents=True, exist_ok=True)
    try:
        main((source, Path("_proc") / page, FilterDefaults))
    except Exception as error:
        errors[page.with_suffix("").as_posix()] = f"{error}\\n{error.__cause__ or ''}"
Path("errors.json").write_text(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A folder with the processed pages in _proc, and what went wrong in errors.json."
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(NBS, folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copy(ROOT / "settings.ini", folder)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", BUILD], cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return folder


def errors_of(site):
    return json.loads((site / "errors.json").read_text())


@pytest.fixture(scope="module")
def page(site):
    "A function that reads a processed page; the test is skipped where it could not be built, which test_page_is_built reports."
    @cache
    def page(name):
        if name in errors_of(site):
            pytest.skip(f"{name} was not built")
        return nbformat.read(site / "_proc" / f"{name}.ipynb", as_version=4)
    return page


def prose(nb):
    "All that becomes text of the page: Markdown cells, and the Markdown that shown outputs hold. Code blocks are left out."
    texts = []
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            texts.append(cell.source)
        texts += ["".join(o.data["text/markdown"]) for o in cell.get("outputs", []) if "text/markdown" in o.get("data", {})]
    return re.sub(r"^```.*?^```", "", "\n\n".join(texts), flags=re.MULTILINE | re.DOTALL)


def words(text, reader):
    "What Pandoc makes of a page: words, and the tags round them. Its typography, and the tags that hide a solution, are undone."
    text = re.sub(r"</?(details|summary)>|^:::.*$", "", text, flags=re.MULTILINE)                # what folds on the page
    page = pypandoc.convert_text(text, "html", format=reader, extra_args=["--wrap=none", "--mathjax", "--syntax-highlighting=none"])
    page = re.sub(r"</?(p|col|colgroup|span|div)\b[^>]*>", "", page)                             # readers differ in these, eyes do not
    page = page.translate(str.maketrans("“”‘’\xa0", "\"\"'' ")).replace("…", "...")
    return re.sub(r"<(/?\w+)[^>]*>", r" <\1> ", page).split()


def headings(nb):
    return [(len(marks), title) for marks, title in re.findall(r"^(#+) +(.+?) *$", prose(nb), re.MULTILINE)]


def slug(title):
    "The anchor Pandoc gives a heading."
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title).lower()
    text = re.sub(r"[^\w\s.-]", "", re.sub(r"[$`*]", "", text))
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s", "-", text.strip()))


def front_matter(nb):
    return yaml.safe_load(nb.cells[0].source.strip().strip("-"))


@pytest.mark.parametrize("name", PAGES)
def test_page_is_built(site, name):
    assert name not in errors_of(site), errors_of(site)[name]


@pytest.mark.parametrize("name", PAGES)
def test_front_matter(page, name):
    "Title and one line of description; and nothing of the first cell is lost, since nbdev keeps no more of it."
    first = read(name).cells[0].source.strip().splitlines()
    assert len(first) == 3 and first[1] == "" and re.match(r"# \S", first[0]) and re.match(r"> \S", first[2]), "the first cell holds title and subtitle only"
    matter = front_matter(page(name))
    assert set(matter) == {"title", "description", "output-file"} and len(matter["description"]) > 20


def test_page_names_are_unique():
    assert len({html_of(name) for name in PAGES}) == len(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_headings_nest(page, name):
    "Below the title level by level; nbdev's `### name` stands below a section."
    levels = [1, *(level for level, _ in headings(page(name)))]
    for (above, below), (_, title) in zip(zip(levels, levels[1:]), headings(page(name))):
        assert 1 < below <= above + 1, f"{title!r}: level {below} after {above}"


def anchors(nb):
    return {slug(title) for _, title in headings(nb)} | set(re.findall(r"\{#([\w.-]+)", prose(nb)))


def leads_to(name, target):
    "The file below nbs that a relative link of a page means."
    return normpath(join(dirname(name), target))


@pytest.mark.parametrize("name", PAGES)
def test_links_and_anchors_resolve(page, name):
    for target, anchor in re.findall(r"\]\(([\w./-]*)(?:#([\w.-]+))?\)", prose(page(name))):
        file = leads_to(name, target)
        if target.endswith(".ipynb") or (anchor and not target):
            other = file.removesuffix(".ipynb") if target else name
            assert other in PAGES, f"links to {target}"
            assert not anchor or anchor in anchors(page(other)), f"links to {target}#{anchor}"
        elif target:
            assert not file.startswith("..") and (NBS / file).exists(), f"links to {target}, which the site does not hold"


@pytest.mark.parametrize("name", PAGES)
def test_links_to_names_resolve(site, page, name):
    "Names in backticks lead to a page of this site and, for functions and classes, to their heading there."
    config = {line.split(" = ")[0]: line.strip().split(" = ")[1] for line in open(ROOT / "settings.ini") if " = " in line}
    there = {html_of(other): other for other in PAGES}
    address = re.escape(config["doc_host"] + config["doc_baseurl"])
    for target, anchor in re.findall(address + r"/([\w./]+)#([\w.]+)\)", prose(page(name))):
        assert target in there, target
        if not re.search(r"\.|^_", anchor) and there[target] not in errors_of(site):         # methods and private names lead to their page
            assert anchor in anchors(page(there[target])), f"{target}#{anchor}"


@pytest.mark.parametrize("module", house.modules())
def test_every_public_name_is_documented(page, module):
    "Functions and classes on their notebook's page by `show_doc`; all of them, and the methods, in the reference."
    names = [(name, owner) for name, _, owner in house.definitions(module) if not house.is_derivative(owner)]
    shown = {title for _, title in headings(page(page_of(module)))}
    assert not [name for name, owner in names if owner is None and name not in shown]
    text = re.search(rf"^## {re.escape(module)}$.*?(?=^## |\Z)", prose(read("api")), re.MULTILINE | re.DOTALL)
    assert text, f"{module} is missing in the reference"
    assert not [name for name, _ in names if not re.search(rf"^(### {re.escape(name)}$|\| \[{name}\])", text[0], re.MULTILINE)]


def directives(cell):
    "The options at the top of a cell, as Quarto reads them: YAML behind `#|`."
    lines = re.match(r"(?:#\|.*\n?)*", cell.source)[0].splitlines()
    options = [re.sub(r"^#\| ?", "", line) for line in lines]
    return yaml.safe_load("\n".join(o for o in options if re.match(r"[\w-]+:", o))) or {}


@pytest.mark.parametrize("name", PAGES)
def test_pictures_have_captions_and_alt_text(name):
    "`#| fig-alt:` and `#| fig-cap:` over every cell that shows a picture, one picture a cell; words between the brackets of every Markdown picture."
    nb = read(name)
    for i, cell in enumerate(nb.cells):
        pictures = [o for o in cell.get("outputs", []) if any(kind.startswith("image/") for kind in o.get("data", {}))]
        assert len(pictures) <= 1, f"cell {i} shows {len(pictures)} pictures"
        if pictures and "#| hide" not in cell.source:
            alt, caption = (directives(cell).get(f"fig-{kind}", "") for kind in ("alt", "cap"))
            assert caption and caption != alt and len(caption) <= 120, f"cell {i}: fig-cap {caption!r}"
            assert 6 <= len(alt.split()) and len(alt) <= 300, f"cell {i}: fig-alt {alt!r}"
            assert not re.search(r"^#\|\s*exports?\b", cell.source, re.MULTILINE), f"cell {i} is exported"
    assert not re.findall(r"!\[\s*\]\(|<img(?![^>]*\balt=)", prose(nb))


@pytest.mark.parametrize("name", PAGES)
def test_options_are_yaml(name):
    for cell in read(name).cells:
        assert cell.cell_type != "code" or isinstance(directives(cell), dict)


@pytest.mark.parametrize("name", PAGES)
def test_quarto_reads_what_jupyter_reads(page, name):
    """Quarto renders with Pandoc's Markdown, GitHub and Jupyter with another: the same words, lists and tables in both.

    In Pandoc's, `*a * b*` ends at the second star, `--word` begins with a dash, `\\word` is TeX, and some lines begin a list that do not here."""
    text = prose(page(name))
    quarto, github = words(text, "markdown"), words(text, "gfm+tex_math_dollars-tex_math_gfm+attributes")
    assert quarto == github, " ".join(difflib.unified_diff(github, quarto, "github", "quarto", lineterm="", n=4))
    tags = re.findall(r"</?([a-zA-Z][\w-]*)[ />]", re.sub(r"`[^`]*`|\$\$.*?\$\$|\$[^$]*\$", "", text, flags=re.DOTALL))
    assert set(tags) <= {"code", "details", "summary"}, "a word in angle brackets is not shown"


def contents(entries):
    return [name for e in entries for name in ([e] if isinstance(e, str) else [e["href"]] if "href" in e else contents(e["contents"]))]


def test_sidebar_lists_every_page_once():
    "The course in reading order, then what needs not be read: the workshop, room by room."
    sidebar = yaml.safe_load((NBS / "sidebar.yml").read_text())["website"]["sidebar"]["contents"]
    parts = {e["section"]: contents(e["contents"]) for e in sidebar if isinstance(e, dict)}
    course = next(e for e in sidebar if isinstance(e, dict) and e["section"] == "Course")["contents"]
    named = [e for part in course for e in ([part] if "href" in part else part["contents"])]
    assert [e["text"][:2] for e in named] == [re.search(r"(\d\d)_[^/]*$", e["href"])[1] for e in named]       # as the text names chapters
    assert sorted(contents(sidebar)) == sorted(f"{name}.ipynb" for name in PAGES)
    assert parts["Course"] == [f"{name}.ipynb" for name in CHAPTERS]
    rooms = [house.floor(module_of(name.removesuffix(".ipynb")) or name.partition("/")[0]) for name in parts["Workshop"]]
    assert rooms == sorted(rooms)


def test_configuration():
    "Light and dark, search, files that exist; what is included asks nobody but GitHub and Colab, and only when clicked."
    config = yaml.safe_load((NBS / "_quarto.yml").read_text())
    html, website = config["format"]["html"], config["website"]
    assert set(html["theme"]) == {"light", "dark"} and website["search"] and html["code-tools"]["toggle"]
    assert website["repo-subdir"] == "nbs" and "source" in website["repo-actions"]
    for name in (html["css"], html["include-after-body"],
                 *(entry["href"] for entry in website["navbar"]["left"])):
        assert (NBS / name).is_file(), name
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", (NBS / "colab.html").read_text())


def test_glossary_names_exist():
    "Every code name of the glossary is a name in the library."
    library = "\n".join(path.read_text(encoding="utf-8") for path in house.files().values())
    rows = re.findall(r"^\|[^|]*\|([^|]*)\|", prose(read("glossary")), re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert len(names) > 25
    assert not [name for name in names if not re.search(rf"\b{name}\b", library)]


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapter_leads_to_the_glossary(name):
    assert "glossary.ipynb" in prose(read(name))
