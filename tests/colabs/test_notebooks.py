"""Every notebook runs from its first cell to its last, in a process of its own."""

import shutil
import subprocess
from importlib import metadata, util
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


@pytest.fixture
def install(tmp_path, monkeypatch):
    """What the first cell asks pip for in `tmp_path`, where nothing is installed; `None` when it gives up."""
    (cell, *_) = (c for c in nbformat.read(FOLDER / "quickstart.ipynb", as_version=4).cells if c.cell_type == "code")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JATTN", raising=False)
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)

    def run():
        asked = []
        monkeypatch.setattr(subprocess, "check_call", lambda words: asked.append(words[-1]))
        try:
            exec(cell.source, {})
        except SystemExit:
            return None
        return asked[0]

    return run


def test_a_clone_below_or_around_the_notebook_is_installed(install, tmp_path, monkeypatch):
    assert install() is None
    (tmp_path / "jattn" / "jattn").mkdir(parents=True)  # `import jattn` here would now give an empty package
    (tmp_path / "jattn" / "jattn" / "catalog.py").touch()
    (tmp_path / "jattn" / "colabs").mkdir()
    for folder in (".", "jattn", "colabs"):
        monkeypatch.chdir(folder)
        assert install() == f"jattn[nn,train] @ file://{tmp_path}/jattn"


def test_a_clone_elsewhere_and_what_drives_the_device(install, monkeypatch):
    monkeypatch.setenv("JATTN", "git+https://host/some/jattn.git")
    assert install() == "jattn[nn,train] @ git+https://host/some/jattn.git"
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert install() == "jattn[nn,train,cuda] @ git+https://host/some/jattn.git"
    monkeypatch.setattr(util, "find_spec", lambda name: object())
    assert install() == "jattn[nn,train,tpu] @ git+https://host/some/jattn.git"
