"""Every notebook is a test: its cells run as `nbdev_test` runs them, directives respected, and bring the outputs that are stored."""
import pytest

notebooks = pytest.importorskip("notebooks", reason="needs the [dev] extra")


@pytest.fixture
def one_thread():
    "Stored outputs are those of one thread: more change the last digits."
    import torch
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("path", notebooks.NOTEBOOKS, ids=lambda p: p.relative_to(notebooks.ROOT / "nbs").with_suffix("").as_posix())
def test_notebook(path, one_thread):
    import matplotlib
    matplotlib.use("Agg")
    fresh, error = notebooks.run_notebook(path)
    assert error is None, error
    assert notebooks.stale(path, fresh) is None, notebooks.stale(path, fresh)


@pytest.mark.parametrize("stored, fresh, same", [
    ("a 1.25", "a  1.26\n", True), ("1.25", "1.28", False), ("a 1.25", "b 1.25", False), ("12 tokens", "13 tokens", False), ("12", "12", True),
    ("error 1.2e-07", "error 2.9e-07", True), ("1.2e-07", "1.2e-05", False), ("3.1e-3", "3.2e-3", True), ("4,096.0", "4,096.1", True),
    ("(2, 3)", "(2, 3)", True), ("(2, 3)", "(3, 2)", False), ("x1.5", "x1.6", False), ("1.0", "2.0", False), ("0.999", "1.0", True)])
def test_what_counts_as_the_same_output(stored, fresh, same):
    assert notebooks.same_text(stored, fresh) is same


def test_a_stale_output_is_found(tmp_path):
    import nbformat
    new = nbformat.v4
    cells = [new.new_markdown_cell("# A page"), new.new_code_cell("1 + 1"), new.new_code_cell("#| timed\n3")]
    for cell, text in zip(cells[1:], ("3", "9")):
        cell.outputs = [new.new_output("execute_result", {"text/plain": text}, execution_count=1)]
    path = tmp_path / "page.ipynb"
    nbformat.write(new.new_notebook(cells=cells), path)
    fresh, error = notebooks.run_notebook(path)
    assert error is None and "cell 1 is stale" in notebooks.stale(path, fresh)
