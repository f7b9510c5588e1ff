"""What a notebook of this course is and how its cells run: shared by the tests and by `refresh_notebooks.py`."""
import os
import sys
from pathlib import Path

from execnb.nbio import read_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import NBProcessor

ROOT = Path(__file__).resolve().parent.parent
CONFIG = get_config(path=ROOT)
NOTEBOOKS = sorted(Path(p).absolute() for p in nbglob(ROOT / CONFIG.nbs_path, as_path=True))


def skipped_flags():
    "The directives of `tst_flags` whose cells do not run: `cuda` runs where there is a GPU, others where $NB_FLAGS names them."
    import torch
    forced = set(os.environ.get("NB_FLAGS", "").split()) | ({"cuda"} if torch.cuda.is_available() else set())
    return set(CONFIG.tst_flags.split()) - forced


def run_notebook(path, quick=True):
    """Runs the cells `nbdev_test` would run; returns the notebook with its new outputs (skipped cells keep theirs) and the error, if any.

    quick sets $IN_TEST, under which the last chapter trains for seconds and not for minutes.
    """
    directives = {c.idx_: getattr(c, "directives_", None) or {} for c in NBProcessor(path, process=True).nb.cells}
    skip, nb = skipped_flags(), read_nb(path)

    def no_run(cell):
        words = directives.get(cell.idx_, {})
        return (cell.cell_type != "code" or "nbdev_export(" in cell.source
                or words.get("eval:", [""])[0].lower() == "false" or skip & words.keys())

    for cell in nb.cells:
        if cell.cell_type == "code" and not no_run(cell):
            cell["outputs"] = []                        # a cell that has nothing to say any more must not keep what it said
    if quick:
        os.environ["IN_TEST"] = "1"
    sys.path.insert(0, str(ROOT))
    shell = CaptureShell(path, mpl_format="png")
    try:
        with working_directory(path.parent):
            shell.run_all(nb, exc_stop=True, preproc=no_run)
    except Exception:
        return nb, shell.prettytb(fname=path)
    return nb, None
