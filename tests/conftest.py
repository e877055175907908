"Fixtures that several tests use."

import sys
from pathlib import Path

import nbformat
import pytest
from warm import WARM_START, fork_kernel

from uniemo.runs import find_notebook

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_configure(config):
    config.addinivalue_line("markers", "long: takes a minute or so, and begins before the others")


def pytest_collection_modifyitems(items):
    "Long tests first: none of them is what everybody waits for at the end."
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session")
def shared():
    "Real files and golden numbers beside the checkout; where they are missing, tests skip."
    if not SHARED.exists():
        pytest.skip(
            f"{SHARED} is missing: real files and golden numbers are not part of the project"
        )
    return SHARED


@pytest.fixture
def warm(monkeypatch):
    "Notebooks that are run get kernels which need not import torch again."
    if sys.platform == "linux":
        place = "jupyter_client.provisioning.local_provisioner.launch_kernel"
        monkeypatch.setattr(place, fork_kernel)


@pytest.fixture
def short_warm_start(warm, monkeypatch):
    "Where an experiment has no parameter for it."
    monkeypatch.setenv(WARM_START, "8")


@pytest.fixture
def run_again(tmp_path):
    "Experiment name -> a copy of its notebook with all cells twice: Run All, pressed twice."

    def copy(name):
        nb = nbformat.read(find_notebook(name), 4)
        again = [
            c
            for c in nb.cells
            if c.cell_type == "code" and "parameters" not in c.metadata.get("tags", [])
        ]
        nb.cells += [nbformat.v4.new_code_cell(c.source) for c in again]
        path = tmp_path / f"{name}.ipynb"
        nbformat.write(nb, path)
        return path

    return copy
