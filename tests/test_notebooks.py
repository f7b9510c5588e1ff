"""Every notebook is a test: its cells run as `nbdev_test` runs them, directives respected, `cuda` cells where a GPU is."""
import pytest

notebooks = pytest.importorskip("notebooks", reason="needs the [dev] extra")


@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(path):
    import matplotlib
    matplotlib.use("Agg")
    _, error = notebooks.run_notebook(path)
    assert error is None, error
