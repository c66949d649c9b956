"""docs/play.ipynb runs in a kernel, a little shorter than a reader runs it, and is committed as it was run."""

import re

import nbformat
import pytest
from helpers import ROOT
from nbclient import NotebookClient

SHORT = 6144  # steps of its runs here: three iterations


@pytest.fixture
def notebook():
    return nbformat.read(ROOT / "docs/play.ipynb", 4)


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream" and output.name == "stdout")


def kinds(cell):
    return {kind for output in cell.outputs for kind in output.get("data", {})}


def test_the_notebook_plays_trains_compares_and_shows_the_video(notebook, tmp_path):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "hosted" in code[0].metadata.tags and "git clone {URL}" in code[0].source
    notebook.cells.remove(code.pop(0))
    assert sum(cell.source.count("80_000") for cell in code) == 1
    for cell in code:
        cell.source = cell.source.replace("80_000", str(SHORT)).replace('"../runs/notebook', f'"{tmp_path}')
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "docs")}}).execute()
    watch, train, compare, see = code
    assert float(re.match(r"return ([\d.]+) in", printed(watch))[1]) > 200 and "text/html" in kinds(watch)
    assert "image/png" in kinds(train) & kinds(compare)
    steps = re.search(r"its control up to step (.*)\nand those of DPPO up to step (.*)\n", printed(compare)).groups()
    assert steps[1] == "2,048" and steps[0] in ("4,096", "the end")  # DPPO leaves after the first update
    assert re.search(rf"at step {SHORT:,}; returns \[[\d.]+\]", printed(see)) and "video" in str(see.outputs)
    arms = {path.parent.name.split("__")[1] for path in tmp_path.glob("CartPole-v1__*/result.json")}
    assert arms == {"dsppo_a0.5_b20", "dppo_a20.5", "dppo"}


def test_the_notebook_is_committed_with_its_pictures_and_without_errors(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert (ROOT / "docs/play.ipynb").stat().st_size < 300_000
    assert [cell.execution_count for cell in code] == [None, 1, 2, 3, 4]
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not re.search(r"/(home|root|work|tmp)/", str(outputs))
