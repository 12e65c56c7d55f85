"""Every notebook runs from its first cell to its last, in a process of its own."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent.parent / "colabs"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("JATTN_NOTEBOOK_STEPS", "25")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    shown = [kind for cell in cells for output in cell.outputs for kind in output.get("data", {})]
    assert "image/svg+xml" in shown  # the mask
    assert "image/png" in shown  # the curve
    printed = "".join(output.text for cell in cells for output in cell.outputs if output.output_type == "stream")
    assert "step   24" in printed
    assert len(printed.split("The ", 1)[1]) == 200


def test_notebooks_are_stored_without_outputs():
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            assert not cell.get("outputs")
            assert not cell.get("execution_count")
