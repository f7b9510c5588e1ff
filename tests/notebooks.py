"""How the cells of a notebook run, and whether their fresh outputs are the stored ones: shared by the tests and by `refresh.py`."""
import math
import os
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from execnb.nbio import read_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import NBProcessor

from vlmamba_lite.ops.cpp import fused_library, without_compiler

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")     # a bar is drawn on the first reading of a file, and only then
ROOT = Path(__file__).resolve().parent.parent
CONFIG = get_config(path=ROOT)
NOTEBOOKS = sorted(Path(p).absolute() for p in nbglob(ROOT / CONFIG.nbs_path, as_path=True))


def directives(path):
    "The directives of each cell of a notebook, as nbdev reads them."
    cells = NBProcessor(path, process=True).nb.cells
    return {cell.idx_: getattr(cell, "directives_", None) or {} for cell in cells}


def skipped_flags():
    "The directives of `tst_flags` whose cells do not run: `cuda` runs where there is a GPU, others where $NB_FLAGS names them."
    import torch
    forced = set(os.environ.get("NB_FLAGS", "").split()) | ({"cuda"} if torch.cuda.is_available() else set())
    return set(CONFIG.tst_flags.split()) - forced


def run_notebook(path, quick=True):
    """Runs the cells `nbdev_test` would run; returns the notebook with its new outputs (skipped cells keep theirs) and the error, if any.

    quick: $IN_TEST is set, and in a cell under `#| in_test: a -> b` b stands for a, so that nothing trains for minutes.
    """
    words, skip, nb = directives(path), skipped_flags(), read_nb(path)

    def no_run(cell):
        here = words.get(cell.idx_, {})
        return (cell.cell_type != "code" or "nbdev_export(" in cell.source
                or here.get("eval:", [""])[0].lower() == "false" or skip & here.keys())

    plt.close("all")                                    # a figure that somebody left open would stand among the outputs
    if without_compiler() is None:
        fused_library()                                 # built before, so that no output says that it is
    for cell in nb.cells:
        if cell.cell_type == "code" and not no_run(cell):
            cell["outputs"] = []                        # a cell that prints nothing any more must not keep its old output
    written = {}
    if quick:
        os.environ["IN_TEST"] = "1"
        for cell in nb.cells:
            if change := words.get(cell.idx_, {}).get("in_test:"):
                old, _, new = " ".join(change).partition(" -> ")
                written[cell.idx_], cell.source = cell.source, cell.source.replace(old, new)
    sys.path.insert(0, str(ROOT))
    shell = CaptureShell(path, mpl_format="png")
    try:
        with working_directory(path.parent):
            shell.run_all(nb, exc_stop=True, preproc=no_run)
    except Exception:
        return nb, shell.prettytb(fname=path)
    finally:
        os.environ.pop("IN_TEST", None)
        for cell in nb.cells:
            cell["source"] = written.get(cell.idx_, cell.source)
    return nb, None


# Stored outputs are compared with fresh ones

NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?(?![\w])", re.IGNORECASE)
TEXTS = ("text/plain", "text/markdown", "text/html")


def texts(cell):
    "All text that a cell puts out; pictures are left out."
    for output in cell.get("outputs", []):
        found = [output["text"]] if "text" in output else [output["data"][kind] for kind in TEXTS if kind in output.get("data", {})]
        yield from ("".join(text) for text in found)


def last_digit(text):
    "The size of a written number's last digit: 0.01 for 1.25, 1e-9 for 1.2e-08."
    digits, _, power = text.lower().partition("e")
    decimals = len(digits.partition(".")[2])
    return 10.0 ** (int(power or 0) - decimals)


def same_number(stored, fresh):
    """Equal up to 2 in the last digit that is shown. Rounding errors, below 1e-4, may be four times as large or as small."""
    a, b = (float(text.replace(",", "")) for text in (stored, fresh))
    if abs(a - b) <= 2.01 * max(last_digit(stored), last_digit(fresh)) * ("." in stored + fresh or "e" in (stored + fresh).lower()):
        return True
    small = 0 < abs(a) < 1e-4 and 0 < abs(b) < 1e-4
    return a == b or small and abs(math.log(abs(a / b))) <= math.log(4)


def same_text(stored, fresh):
    "Whether two outputs say the same: white space and the last digits of decimals may differ."
    stored, fresh = (" ".join(text.split()) for text in (stored, fresh))
    numbers = list(zip(NUMBER.findall(stored), NUMBER.findall(fresh)))
    return stored == fresh or NUMBER.sub("0", stored) == NUMBER.sub("0", fresh) and all(same_number(*pair) for pair in numbers)


def stale(path, fresh):
    """The first cell whose stored text is not that of a fresh run, as a message; None where there is none.

    Cells under `#| timed` show times, or what a short training brings: their outputs are not compared."""
    words, stored = directives(path), read_nb(path)
    clean_nb(fresh)
    for old, new in zip(stored.cells, fresh.cells):
        if old.cell_type != "code" or "timed" in words.get(old.idx_, {}):
            continue
        before, after = list(texts(old)), list(texts(new))
        if len(before) != len(after) or not all(map(same_text, before, after)):
            return f"cell {old.idx_} is stale: stored\n{before}\nfresh\n{after}\n\n{old.source}"
    return None
