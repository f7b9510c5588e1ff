"""README.md is `nbs/index.ipynb` as Markdown:  python tests/readme.py  writes it, a test compares it."""
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent


def picture_text(cell):
    "A cell that shows a picture file: the same as Markdown, its `fig-alt` between the brackets."
    path = re.search(r'Image\("([^"]+)"\)', cell.source)
    alt = re.search(r'^#\| fig-alt: "(.*)"$', cell.source, re.M)
    return [f"![{alt[1]}]({path[1]})"] if path and alt else []


def cell_text(cell):
    "A Markdown cell, or the Markdown a code cell has put out; code itself is shown unless `#| echo: false` or `#| hide` says no."
    if cell.cell_type == "markdown":
        return cell.source
    shown = [] if re.search(r"^#\|\s*(hide|echo: false)", cell.source, re.M) else [f"```python\n{cell.source}\n```"]
    outputs = [o.data["text/markdown"] for o in cell.outputs if "text/markdown" in o.get("data", {})]
    return "\n\n".join(shown + picture_text(cell) + ["".join(o).strip() for o in outputs])


def readme():
    "The text of README.md; links of the notebook and to files of the repository are made relative to its top."
    cells = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4).cells
    text = "\n\n".join(filter(None, map(cell_text, cells))) + "\n"
    address = re.search(r"^git_url = (\S+)", (ROOT / "settings.ini").read_text(encoding="utf-8"), re.M)[1]
    text = text.replace(f"]({address}/blob/main/", "](../")
    return re.sub(r"(\]\(|src=\")(\.\./)?(?=[\w./-]+)(?!https?:)",
                  lambda m: m[1] if m[2] else f"{m[1]}nbs/", text)


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
