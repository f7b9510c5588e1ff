"""Exports the modules, runs notebooks in place and stores their outputs: nothing changes where no cell or result did.

    python tests/refresh.py --changed            what changed since the last commit and all that depends on it, then the short tests
    python tests/refresh.py nbs/ops/04_ssd.ipynb ...
    python tests/refresh.py                      all notebooks
    python tests/refresh.py --texts              only the sidebar and README.md, which are made of others

The chapter that trains its model, which takes minutes, runs only where it is named, or with all.
"""
import argparse
import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import house
import nbformat
from house import NBS, ROOT

TITLES = dict(ops="Scans", layers="Blocks", language="Language model", vision="Vision encoders", connectors="Connectors", data="Data",
              model="The whole model", training="Training", evaluation="Evaluation", hf="In transformers", cli="Command line")


def refresh(path):
    "Runs one notebook in this process and stores its outputs."
    from execnb.nbio import write_nb
    from nbdev.clean import clean_nb
    from notebooks import run_notebook
    nb, error = run_notebook(path, quick=False)
    if error:
        raise SystemExit(error)
    clean_nb(nb)
    write_nb(nb, path)


def refresh_all(paths):
    "A process each, so that no notebook sees another's state; one thread, because more change the last digits."
    environment = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", **os.environ}
    for path in paths:
        print(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path, flush=True)
        code = "import sys, pathlib, refresh; refresh.refresh(pathlib.Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", code, str(path)], check=True, env={**environment, "PYTHONPATH": python_path()})


def python_path():
    return os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])


# What changed

def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)


def at_head(path):
    "A file's text in the last commit; '' where it is new."
    return git("show", f"HEAD:{path.relative_to(ROOT).as_posix()}").stdout


def sources(text):
    return [(cell.cell_type, cell.source) for cell in nbformat.reads(text, as_version=4).cells] if text else None


def touched(suffix, folder):
    "Files below a folder that differ from the last commit, or are new."
    names = git("status", "--porcelain", "--untracked-files=all", "--no-renames", "--", folder).stdout.splitlines()
    return [path for path in (ROOT / name[3:].strip('"') for name in names) if path.suffix == suffix and path.is_file()]


def changed_modules():
    "Modules whose code, not only a comment of the export, differs from the last commit."
    paths, found = {path: name for name, path in house.files().items()}, set()
    for path in touched(".py", "vlmamba_lite"):
        before = at_head(path)
        if path in paths and (not before or ast.dump(ast.parse(before)) != ast.dump(ast.parse(path.read_text(encoding="utf-8")))):
            found.add(paths[path])
    return found


def page_needs(page):
    "The modules whose change may change a page's outputs."
    if page == "api":
        return set(house.files())
    return set().union(*(house.needs(module) for module in house.page_imports(page)), {house.module_of(page)})


def edited_pages():
    "Notebooks with other cells than in the last commit."
    return {path.relative_to(NBS).with_suffix("").as_posix() for path in touched(".ipynb", "nbs")
            if sources(at_head(path)) != sources(path.read_text(encoding="utf-8"))}


def pages_to_run(edited, modules):
    "Edited notebooks, and those that need a changed module, in reading order."
    pages = [page for page in house.pages() if page in edited or page_needs(page) & modules]
    return sorted(pages, key=lambda page: (house.number(page) is None, house.number(page) or 0, page == "api", page))


def trains(page):
    return "IN_TEST" in house.page_code(page) and house.module_of(page) is None


def short_tests(modules):
    "The test files that import one of these modules, and those of the house."
    found = [ROOT / "tests" / f"test_{name}.py" for name in ("repository", "site")]
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        if path not in found and house.imports(ast.parse(path.read_text(encoding="utf-8"))) & modules:
            found.append(path)
    return found


# Files that are made of others

def sidebar():
    "The text of nbs/sidebar.yml: the course in reading order, then the workshop, each by rooms."
    def room_of(page):
        return page.rpartition("/")[0]

    def entry(page):
        "A page; a chapter with its number before its title, as the text names it."
        if house.number(page) is None:
            return f"- {page}.ipynb"
        title = house.read(page).cells[0].source.splitlines()[0].removeprefix("# ")
        return f"- {{text: {json.dumps(f'{house.number(page):02} {title}', ensure_ascii=False)}, href: {page}.ipynb}}"

    def grouped(pages):
        lines, room = [], None
        for page in pages:
            if room_of(page) and room_of(page) != room:
                lines += [f"          - section: {TITLES[room_of(page)]}", "            contents:"]
            room = room_of(page)
            lines.append(f"{' ' * (14 if room else 10)}{entry(page)}")
        return lines
    workshop = [page for page in house.pages() if house.number(page) is None and (house.module_of(page) or room_of(page))]
    workshop.sort(key=lambda page: (house.floor(house.module_of(page) or room_of(page)), page))
    return "\n".join([
        "# Written by tests/refresh.py from the files below nbs.", "website:", "  sidebar:", "    contents:", "      - index.ipynb", "      - live.ipynb",
        "      - section: Course", "        contents:", *grouped(house.chapters()),
        "      - section: Workshop", "        contents:", *grouped(workshop),
        "      - section: Reference", "        contents:", "          - glossary.ipynb", "          - solutions.ipynb",
        "          - api.ipynb"]) + "\n"


def write_if_new(path, text):
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(ROOT)} written")


def write_texts():
    from readme import readme
    write_if_new(NBS / "sidebar.yml", sidebar())
    write_if_new(ROOT / "README.md", readme())


def forget():
    "Nothing that was read of the house before the export holds after it."
    for value in vars(house).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


def refresh_changed():
    "Export, refresh what depends on a change, test: one command after an edit."
    subprocess.run(["nbdev_export"], cwd=ROOT, check=True)
    forget()
    modules = changed_modules()
    edited = edited_pages()
    pages = pages_to_run(edited, modules)
    for page in filter(trains, pages):
        print(f"nbs/{page}.ipynb trains for minutes: left out, name it to run it")
    refresh_all([house.path_of(page) for page in pages if not trains(page)])
    write_texts()
    tests = short_tests(modules | {house.module_of(page) for page in edited} - {None})
    print("pytest", *(path.name for path in tests), flush=True)
    raise SystemExit(subprocess.run([sys.executable, "-m", "pytest", "-q", *map(str, tests)], cwd=ROOT).returncode)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--changed", action="store_true", help="what changed since the last commit, and the short tests")
    parser.add_argument("--texts", action="store_true", help="only the sidebar and README.md")
    given = parser.parse_args()
    if given.changed:
        refresh_changed()
    if given.texts:
        return write_texts()
    refresh_all([path.absolute() for path in given.notebooks] or [house.path_of(page) for page in house.pages()])


if __name__ == "__main__":
    main()
