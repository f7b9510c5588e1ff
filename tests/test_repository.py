"""The house: what a clone holds, and what the notebooks may not hold."""
import ast
import json
import re
import subprocess
import sys
from configparser import ConfigParser

import house
import pytest
import yaml
from house import LIBRARY, ROOT, chapters, number, pages, path_of, read

TOP = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "settings.ini", "setup.py", "pytest.ini", "ruff.toml",
       "MANIFEST.in", ".gitignore", ".ci", ".github", "nbs", "vlmamba_lite", "data", "tests"}
MACHINE_PATH = re.compile(r"(?<![\w./:])/(?:root|home|Users|work|tmp|opt|usr|mnt|var)/\w+")


def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def tracked():
    run = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        pytest.skip("not a git checkout")
    return run.stdout.splitlines()


def test_top_level():
    assert {name.split("/")[0] for name in tracked()} <= TOP


def test_no_file_is_huge():
    allowed = {"data/emoji/emoji.parquet": 8_000_000}                     # 4,331 drawings, compressed without loss
    assert not [name for name in tracked() if (ROOT / name).is_file() and (ROOT / name).stat().st_size > allowed.get(name, 3_000_000)]


@pytest.mark.parametrize("page", pages())
def test_stored_outputs(page):
    "No error, no path of the machine it ran on, no address of an object; every chapter's code has been run."
    for i, cell in enumerate(read(page).cells):
        outputs = cell.get("outputs", [])
        assert not [o for o in outputs if o.output_type == "error"], f"cell {i} holds an error"
        assert not [o for o in outputs if o.get("name") == "stderr"], f"cell {i} holds a warning"
        text = json.dumps([cell.source, list(outputs)])
        assert not MACHINE_PATH.search(text), f"cell {i}: {MACHINE_PATH.search(text)[0]}"
        assert " at 0x" not in text, f"cell {i} shows an address"


@pytest.mark.parametrize("page", chapters())
def test_chapter_form(page):
    "A title, a line that says what one will be able to do, a figure."
    cells = read(page).cells
    assert cells[0].cell_type == "markdown" and re.match(r"# .+\n\n> .+", cells[0].source)
    assert [o for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]


def test_chapters_are_numbered_without_gaps():
    assert list(map(number, chapters())) == list(range(23))


@pytest.mark.parametrize("rule", [house.uphill, house.circles, house.reading_order], ids=lambda rule: rule.__name__)
def test_imports_run_downhill(rule):
    "Between rooms, between modules, between chapters; wherever an import stands, and also where a string names the module."
    assert not list(rule())


@pytest.mark.parametrize("code, package, found", [
    ("import vlmamba_lite.cli", "", {"cli"}), ("def f():\n    from vlmamba_lite.cli import app", "", {"cli"}), ("import torch.cli, typer", "", set()),
    ("from .cli import app", "vlmamba_lite", {"cli"}), ("from ..cli import app", "vlmamba_lite.ops", {"cli"}), ("from . import cli", "vlmamba_lite", {"cli"}),
    ("from .. import cli", "vlmamba_lite.ops", {"cli"}), ("import_module('vlmamba_lite.cli')", "", {"cli"}), ("importlib.import_module('.cli', p)", "vlmamba_lite", {"cli"}),
    ("__import__('vlmamba_lite.' + 'cli')", "", {house.COMPUTED}), ("import_module(f'vlmamba_lite.{x}')", "", {house.COMPUTED}),
    ("import_module(f'{x}')", "", set()), ("from vlmamba_lite import __version__", "", {""})])
def test_imports_are_found(code, package, found):
    assert {name.partition(".")[0] for name in house.imports(ast.parse(code), package)} == found


@pytest.mark.parametrize("page", pages())
def test_links_between_chapters(page):
    for cell in read(page).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)#\s]+\.ipynb)", cell.source):
                assert not target.startswith(("/", "http")) and (path_of(page).parent / target).is_file(), f"links to {target}"


def test_every_module_has_its_notebook():
    "At the same place and, but for the number, with the same name."
    for module in house.modules():
        page = house.page_of(module)
        assert page, f"{module} has no notebook"
        assert house.html_of(page) == module.replace(".", "/") + ".html", f"{page} exports {module}"


def test_packages_hold_no_code():
    """But the library's own, which loads public names, that of `hf`, which registers its classes when it is imported, and
    what `python -m vlmamba_lite.cli` runs."""
    for name, path in house.files().items():
        if name and name != "hf" and path.name == "__init__.py":
            assert not [node for node in house.tree_of(name).body if not isinstance(node, ast.Expr)], path


def test_citation():
    "CITATION.cff: the keys its schema asks for, the version of the library, and both papers."
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation) and citation["authors"] == [{"name": settings()["author"]}]
    assert (citation["version"], citation["repository-code"]) == (settings()["version"], settings()["git_url"])
    assert [paper["url"][-10:] for paper in citation["references"]] == ["2403.13600", "2407.19832"]
    assert all({"type", "title", "authors"} <= set(paper) for paper in citation["references"])
    assert f"## {settings()['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_workflows():
    "They are YAML with what GitHub needs; nbdev comes from the pins of the dev extra, never by itself."
    for path in (ROOT / ".github" / "workflows").iterdir():
        text = path.read_text(encoding="utf-8")
        jobs = yaml.safe_load(text)["jobs"]
        assert all(job["runs-on"] and job["steps"] for job in jobs.values()) and "install nbdev" not in text and "fastai/" not in text


def test_contributing_names_what_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in re.findall(r"python (tests/\w+\.py)|(nbs/[\w/]+\.ipynb)|\]\(((?:nbs|data)/[^)]+)\)", text):
        assert "NN_" in path[1] or (ROOT / "".join(path)).exists(), path


def test_versions_agree():
    import vlmamba_lite
    assert settings()["version"] == vlmamba_lite.__version__


def test_nothing_needs_a_newer_python(tmp_path):
    "Library, tests and the code of the notebooks run on the oldest Python that settings.ini names, as far as syntax and standard library go."
    pytest.importorskip("vermin", reason="needs the [dev] extra")
    for page in pages():
        (tmp_path / f"{page.replace('/', '.')}.py").write_text(house.page_code(page), encoding="utf-8")
    places = [LIBRARY, ROOT / "tests", ROOT / "data", ROOT / "setup.py", tmp_path]
    run = subprocess.run([sys.executable, "-c", "import vermin; vermin.main()", f"--target={settings()['min_python']}-", "--violations",
                          "--eval-annotations", "--no-tips", *map(str, places)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_readme_is_the_index():
    from readme import readme
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme()


def test_readme_links_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"(?:\]\(|src=\")(?!https?:|#)([^)\"#\s]+)", text):
        assert (ROOT / target).exists(), target


def test_ci_runs_the_commands_of_the_readme():
    text, ci = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", ".ci/run"))
    assert 'pip install -e ".[dev]" && pytest' in text and 'pip install --quiet -e ".[dev]" && pytest' in ci
    assert "pip install -e . && vlmamba train" in text


def test_result_files_say_where_they_come_from():
    for path in (ROOT / "data" / "results").glob("*.json"):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert {"commit", "command", "hardware", "versions", "date"} <= set(result), path.name
        assert not MACHINE_PATH.search(path.read_text(encoding="utf-8")), path.name


def test_author():
    assert settings()["author"] == "vlmamba_lite contributors"


def test_the_command_is_declared():
    assert settings()["console_scripts"] == "vlmamba=vlmamba_lite.cli.commands:app"
    assert (LIBRARY / "cli" / "__main__.py").is_file()
