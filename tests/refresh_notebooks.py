"""Runs notebooks in place and stores their outputs: nothing changes where no cell or result did.

    python tests/refresh_notebooks.py [nbs/01_scan_reference.ipynb ...]

The last chapter trains its model in full, which takes minutes.
"""
import subprocess
import sys
from pathlib import Path

from execnb.nbio import write_nb
from nbdev.clean import clean_nb
from notebooks import NOTEBOOKS, run_notebook


def refresh(path):
    nb, error = run_notebook(path, quick=False)
    if error:
        raise SystemExit(error)
    clean_nb(nb)
    write_nb(nb, path)


if __name__ == "__main__":
    paths = [Path(p).absolute() for p in sys.argv[1:]] or NOTEBOOKS
    if len(paths) == 1:
        refresh(paths[0])
    else:                                               # a process each, so that no notebook sees another's state
        for path in paths:
            print(path.name, flush=True)
            subprocess.run([sys.executable, __file__, str(path)], check=True)
