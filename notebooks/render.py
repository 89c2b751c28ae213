"""Executes the notebooks' sources and stores the results: `make notebooks`."""

import sys
import time
from pathlib import Path

import jupytext
import nbclient

FOLDER = Path(__file__).parent

for source in [FOLDER / name for name in sys.argv[1:]] or sorted(FOLDER.glob("[0-9]*.py")):
    notebook, begin = jupytext.read(source), time.perf_counter()
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": FOLDER}}
    ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of the machine at hand
    jupytext.write(notebook, source.with_suffix(".ipynb"))
    print(f"{source.name}: {time.perf_counter() - begin:.0f} s")
