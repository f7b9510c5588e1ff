"""How long the course takes to read: minutes a chapter, for the course and for the two-hour route.

    python tests/reading_time.py

Prose is read at 200 words a minute, a line of code in 4 seconds. What is folded or hidden on the page (cells with `hide`, `echo: false`
or `code-fold: true`, collapsed notes, solutions in `<details>`) is not counted; comments in code are.
"""
import re
from pathlib import Path

import nbformat
import yaml

NBS = Path(__file__).resolve().parent.parent / "nbs"
ROUTE = NBS / "two_hours.yml"                            # {page: [headings], or "all"}
FOLDED = re.compile(r"^#\|\s*(hide\b|echo:\s*false|code-fold:\s*true)", re.MULTILINE)
SKIPPED = re.compile(r"<!--.*?-->|<details>.*?</details>|^:::+ *\{[^}]*collapse=\"?true.*?^:::+ *$|<svg.*?</svg>", re.DOTALL | re.MULTILINE)


def code_lines(cell):
    "Lines of code that a reader sees: not blank, no directives, nothing of a folded cell."
    if cell.cell_type != "code" or FOLDED.search(cell.source):
        return 0
    return sum(bool(line.strip()) and not line.startswith("#|") for line in cell.source.splitlines())


def words(cell):
    "Words of prose in a Markdown cell; an equation counts as its symbols do, a word for each run without a space."
    return len(SKIPPED.sub(" ", cell.source).split()) if cell.cell_type == "markdown" else 0


def minutes(cells):
    "The reader's measure of some cells."
    return sum(map(words, cells)) / 200 + sum(map(code_lines, cells)) * 4 / 60


def sections(cells):
    "{heading: its cells}: a section holds what stands below its heading, up to the next heading of the same or a higher level."
    found, open_ = {}, []
    for cell in cells:
        if cell.cell_type == "markdown" and (match := re.match(r"(#+) (.+)", cell.source)):
            level = len(match[1])
            open_ = [(depth, title) for depth, title in open_ if depth < level] + [(level, match[2].strip())]
            found[match[2].strip()] = []
        for _, title in open_:
            found[title].append(cell)
    return found


def read(page):
    return nbformat.read(NBS / f"{page}.ipynb", as_version=4).cells


def chapters():
    "The numbered notebooks in reading order, as pages: paths below nbs without their suffix."
    paths = [p for p in NBS.rglob("[0-9][0-9]_*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    return [p.relative_to(NBS).with_suffix("").as_posix() for p in sorted(paths, key=lambda p: p.name)]


def route():
    "The two-hour route: (page, heading or None for the whole page, minutes) of each stop."
    for page, headings in yaml.safe_load(ROUTE.read_text(encoding="utf-8")).items():
        if headings == "all":
            yield page, None, minutes(read(page))
        else:
            parts = sections(read(page))
            for heading in headings:
                yield page, heading, minutes(parts[heading])


def main():
    total = 0
    for page in chapters():
        cells = read(page)
        total += minutes(cells)
        print(f"{page:40} {minutes(cells):4.0f} minutes {sum(map(code_lines, cells)):6} lines of code")
    print(f"{'the course':40} {total:4.0f} minutes, {total / 60:.1f} hours")
    if ROUTE.exists():
        stops = list(route())
        for page, heading, time in stops:
            print(f"  {page}{'' if heading is None else f', {heading}':60} {time:4.0f}")
        print(f"{'the two-hour route':40} {sum(time for *_, time in stops):4.0f} minutes")


if __name__ == "__main__":
    main()
