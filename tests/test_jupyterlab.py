"Notebooks in JupyterLab: opened unchanged, saved as they are committed; those of a run as well."

import asyncio
import os
import shutil
import socket
import subprocess
import sys

import house
import nbformat
import pytest
from browser import Browser, find_chromium
from traitlets.config.loader import PyFileConfigLoader

PATIENCE = 300  # seconds that a busy machine may take
CONTEXT = "[...jupyterapp.shell.widgets('main')].map(shown => shown.context).find(Boolean)"


@pytest.fixture
def settings():
    return PyFileConfigLoader("jupyter_server_config.py", path=str(house.ROOT)).load_config()


def test_every_notebook_is_saved_as_it_is_committed(settings, tmp_path):
    "Read with what JupyterLab adds, saved without it: the same bytes."
    shutil.copytree(house.NBS, tmp_path / "nbs", ignore=shutil.ignore_patterns("_*", ".*"))
    manager = settings.ServerApp.contents_manager_class(root_dir=str(tmp_path), config=settings)
    manager.notary.data_dir = str(tmp_path)

    async def open_and_save(path):
        model = await manager.get(path)
        told = model["content"]["metadata"]
        assert told["language_info"]["version"] == sys.version.split()[0], path
        model["content"]["metadata"]["from_a_session"] = True
        await manager.save(model, path)

    copies = sorted((tmp_path / "nbs").rglob("*.ipynb"))
    assert len(copies) > 150
    for copy in copies:
        before = copy.read_bytes()
        asyncio.run(open_and_save(copy.relative_to(tmp_path).as_posix()))
        assert copy.read_bytes() == before, copy


def a_run(folder):
    "A notebook of two cells, run; its path."
    from uniemo.runs.execution import start

    cells = [nbformat.v4.new_markdown_cell("# tiny"), nbformat.v4.new_code_cell("x = 1")]
    cells[1].metadata["tags"] = ["parameters"]
    kernel = dict(name="python3", language="python", display_name="python3")
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel))
    nbformat.write(notebook, folder / "tiny.ipynb")
    return start(folder / "tiny.ipynb", {}, folder / "runs", "once", False).dir / "executed.ipynb"


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def look(browser, name):
    "Open a notebook; whether it counts as changed once its kernel rests; it is saved then."
    browser.wait_js(f"!!({CONTEXT}) && ({CONTEXT}).isReady", f"{name} to open", PATIENCE)
    kernel = f"({CONTEXT}).sessionContext.session?.kernel"
    told = f"'language_info' in ({CONTEXT}).model.sharedModel.metadata"
    browser.wait_js(f"{kernel}?.status === 'idle' && {told}", "its kernel", PATIENCE)
    browser.js(f"{kernel}.info.then(() => setTimeout(() => {{ window.rests = true }}, 500))")
    browser.wait_js("window.rests", "its kernel's name", PATIENCE)
    changed = browser.js(f"({CONTEXT}).model.dirty")
    browser.js(f"({CONTEXT}).save().then(() => {{ window.saved = true }})")
    browser.wait_js("window.saved", "the notebook to be saved", PATIENCE)
    return changed


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium to look through")
@pytest.mark.parametrize("kind", ["committed", "of a run"])
def test_a_notebook_opens_unchanged(tmp_path, kind):
    "A committed one by the project's own settings, that of a run by any JupyterLab's."
    root = tmp_path / "root"
    root.mkdir()
    source = house.NBS / "start" / "first.ipynb" if kind == "committed" else a_run(tmp_path)
    shutil.copy(source, root / "shown.ipynb")
    empty = {f"JUPYTER_{name}_DIR": str(tmp_path / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    ours = tmp_path / "ours"
    ours.mkdir()
    if kind == "committed":
        shutil.copy(house.ROOT / "jupyter_server_config.py", ours)
    environment = {**os.environ, **empty, "JUPYTER_CONFIG_PATH": str(ours)}
    environment["JUPYTERLAB_WORKSPACES_DIR"] = str(tmp_path / "workspaces")
    port = free_port()
    options = ["--no-browser", "--allow-root", f"--port={port}", "--IdentityProvider.token="]
    options += [f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True"]
    with open(tmp_path / "lab.log", "w") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            with Browser(tmp_path / "browser") as browser:

                def answers():
                    with socket.socket() as asked:
                        return asked.connect_ex(("127.0.0.1", port)) == 0

                browser.wait(answers, "JupyterLab to answer", PATIENCE)
                browser.open(f"http://127.0.0.1:{port}/lab/tree/shown.ipynb")
                assert not look(browser, "shown.ipynb")
        finally:
            server.terminate()
            server.wait(60)
    now, before = (root / "shown.ipynb").read_text(), source.read_text()
    # papermill ends a notebook without a new line
    assert now.rstrip() == before.rstrip()
