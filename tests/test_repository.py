"""The house: what a clone holds, and what the notebooks may not hold."""
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
CHAPTERS = [p for p in NOTEBOOKS if p.name[0].isdigit()]
TOP = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "settings.ini", "setup.py", "pytest.ini", "MANIFEST.in", ".gitignore", ".ci", ".github", "nbs", "vlmamba_lite", "data", "tests"}
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


@cache
def read(path):
    "A notebook, read once for all tests, which do not change it."
    return nbformat.read(path, as_version=4)


def module_of(notebook):
    found = [re.search(r"^#\|\s*default_exp (\S+)", c.source, re.M) for c in read(notebook).cells]
    return next((m[1] for m in found if m), None)


def test_top_level():
    assert {name.split("/")[0] for name in tracked()} <= TOP


def test_no_file_is_huge():
    assert not [name for name in tracked() if (ROOT / name).is_file() and (ROOT / name).stat().st_size > 3_000_000]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs(path):
    "No error, no path of the machine it ran on, no address of an object; every chapter's code has been run."
    for i, cell in enumerate(read(path).cells):
        outputs = cell.get("outputs", [])
        assert not [o for o in outputs if o.output_type == "error"], f"cell {i} holds an error"
        assert not [o for o in outputs if o.get("name") == "stderr"], f"cell {i} holds a warning"
        text = json.dumps([cell.source, [o for o in outputs]])
        assert not MACHINE_PATH.search(text), f"cell {i}: {MACHINE_PATH.search(text)[0]}"
        assert " at 0x" not in text, f"cell {i} shows an address"


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapter_form(path):
    "A title, a line that says what one will be able to do, a figure."
    cells = read(path).cells
    assert cells[0].cell_type == "markdown" and re.match(r"# .+\n\n> .+", cells[0].source)
    pictures = [o for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert pictures


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_chapter_imports_only_earlier_chapters(path):
    number = {module_of(p): int(p.name[:2]) for p in CHAPTERS}
    for cell in read(path).cells:
        if cell.cell_type == "code":
            for name in re.findall(r"^\s*from vlmamba_lite\.(\w+) import", cell.source, re.M):
                assert number[name] < int(path.name[:2]), f"imports {name}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_links_between_chapters(path):
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)#\s]+\.ipynb)", cell.source):
                assert (path.parent / target).is_file(), f"links to {target}"


def exported_modules():
    return [ROOT / "vlmamba_lite" / f"{module_of(p)}.py" for p in CHAPTERS if module_of(p)]


def test_every_module_has_its_notebook():
    written = set((ROOT / "vlmamba_lite").glob("*.py"))
    assert {p.name for p in written} - {p.name for p in exported_modules()} == {"__init__.py", "_modidx.py"}


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
    for path in re.findall(r"python (tests/\w+\.py)|`(nbs/\w+(?:\.ipynb)?)`|\]\((nbs/[^)]+)\)", text):
        assert "NN_" in path[1] or (ROOT / "".join(path)).exists(), path


def test_versions_agree():
    import vlmamba_lite
    assert settings()["version"] == vlmamba_lite.__version__


def test_nothing_needs_a_newer_python(tmp_path):
    "Library, tests and the code of the notebooks run on the oldest Python that settings.ini names, as far as syntax and standard library go."
    pytest.importorskip("vermin", reason="needs the [dev] extra")
    for path in NOTEBOOKS:
        code = [c.source for c in read(path).cells if c.cell_type == "code"]
        (tmp_path / f"{path.stem}.py").write_text("\n\n".join(code), encoding="utf-8")
    places = [ROOT / "vlmamba_lite", ROOT / "tests", ROOT / "data", ROOT / "setup.py", tmp_path]
    run = subprocess.run([sys.executable, "-c", "import vermin; vermin.main()", f"--target={settings()['min_python']}-", "--violations", "--eval-annotations", "--no-tips",
                          *map(str, places)], capture_output=True, text=True)
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


def test_author_and_addresses():
    config = settings()
    assert config["author"] == "vlmamba_lite contributors"
    assert config["requirements"].split()[0] == "torch>=2.6,<2.14"
