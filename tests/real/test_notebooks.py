"""Every notebook runs from top to bottom, and its stored form is the one that its source makes."""

import re
import resource
from pathlib import Path

import jupytext
import nbclient
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
LIMIT = 90  # seconds for a notebook alone on two cores
NAMES = sorted(path.stem for path in FOLDER.glob("[0-9]*.py"))


def processor_seconds():
    """Of all ended child processes, such as a kernel."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(name):
    notebook, before = jupytext.read(FOLDER / f"{name}.py"), processor_seconds()
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": FOLDER}}
    ).execute()
    assert not [o for cell in notebook.cells for o in cell.get("outputs", ()) if o.output_type == "error"]
    # Something else may run meanwhile: not the time on the clock, but what both cores need at the least.
    assert 5 < (processor_seconds() - before) / 2 < LIMIT


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_notebook_is_current_and_shows_its_figures(name):
    source, stored = jupytext.read(FOLDER / f"{name}.py"), jupytext.read(FOLDER / f"{name}.ipynb")
    assert [(c.cell_type, c.source) for c in source.cells] == [(c.cell_type, c.source) for c in stored.cells]
    outputs = [output for cell in stored.cells for output in cell.get("outputs", ())]
    drawn = [output.data for output in outputs if "<Figure" in output.get("data", {}).get("text/plain", "")]
    assert drawn
    assert all("image/png" in data for data in drawn)
    assert not [output for output in outputs if output.output_type == "error"]


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_use_the_public_surface(name):
    imported = re.findall(r"^(?:from|import) (specjax[\w.]*)", (FOLDER / f"{name}.py").read_text(), re.MULTILINE)
    assert imported
    assert set(imported) <= {"specjax", "specjax.lab"}


def test_there_are_notebooks():
    assert len(NAMES) == 4
