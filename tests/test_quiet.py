"What is in order says nothing: standard error of the main ways, each in a process of its own."

import fcntl
import io
import os
import re
import select
import struct
import subprocess
import sys
import termios
import warnings
from pathlib import Path
from types import SimpleNamespace

from warm import processes

from uniemo.mini.splits import paint_splits
from uniemo.understanding import UnderstandingConfig, train_understanding

ROOT = Path(__file__).parent.parent

IN_PYTHON = """
import tempfile

from uniemo.mini.clip import load_clip, save_clip
from uniemo.mini.diffusion import load_diffusion, save_diffusion

# what ships loads and is saved without a bar
save_clip(*load_clip(), tempfile.mkdtemp())
save_diffusion(load_diffusion(), tempfile.mkdtemp())

from diffusers.utils import logging as of_diffusers
from transformers.utils import logging as of_transformers

# bars are progress, which is shown while it lasts
of_diffusers.disable_progress_bar()
of_transformers.disable_progress_bar()

from uniemo import UniEmoPipeline

pipe = UniEmoPipeline.from_pretrained("mini")
pipe.set_progress_bar_config(disable=True)
made = pipe.generate("awe", num_images=1, num_inference_steps=2, seed=0)
made.save("pictures")
print(len(pipe.understand(made.images).to_pandas()))

from uniemo.mini.splits import paint_splits
from uniemo.understanding import UnderstandingConfig, train_understanding

splits = paint_splits(16, 8, 8)
config = UnderstandingConfig.preset("mini", steps=1, batch_size=8)
# its bar is for those who look
print(len(train_understanding(splits, config).metrics) > 0)
"""

IN_A_SHELL = """
import sys
import warnings

from uniemo.runs.cli import main

asked = [
    ["generate", "awe", "-n", "1", "--out", "pictures"],
    ["understand", "pictures"],
    ["estimate", "mini", "-s", "understanding"],
]
sys.exit(max(main(arguments) for arguments in asked))
"""


# what a picture of two steps deserves to hear, with the line that asked
UNLIKE = re.compile(r".*this image is unlike .*\n(  .*\n)?")


def run(code, folder):
    "Standard output of a script; standard error is empty."
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    assert UNLIKE.sub("", done.stderr) == ""
    return done.stdout


def test_the_library_says_nothing_of_what_is_in_order(tmp_path):
    assert run(IN_PYTHON, tmp_path).split() == ["1", "True"]


def test_the_command_says_nothing_of_what_is_in_order(tmp_path):
    said = run(IN_A_SHELL, tmp_path)
    assert "activations" in said
    assert list((tmp_path / "pictures").glob("*.png"))


def test_a_real_warning_is_said(tmp_path):
    "The filters hide no warning of the project."
    code = "import warnings, uniemo; warnings.warn('the labels are skewed')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "the labels are skewed" in done.stderr


def test_a_command_keeps_the_libraries_notes_to_itself(monkeypatch, capsys):
    "What a library has not closed is no business of those who type a command; a warning is a line."
    from uniemo.runs import cli

    class Command:
        def main(self, *args, **kwargs):
            for kind in (ResourceWarning, DeprecationWarning, UserWarning):
                warnings.warn(f"a {kind.__name__}", kind, stacklevel=1)

    monkeypatch.setattr(cli, "get_command", lambda application: Command())
    assert cli.main([]) == 0
    assert capsys.readouterr().err == "uniemo: a UserWarning\n"


def train_on(terminal, environment):
    "Four steps, with a terminal for what is said."
    os.environ.update(environment)
    there = os.open(terminal, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(there, stream)
    config = UnderstandingConfig.preset("mini", steps=4, batch_size=8, log_every=2)
    train_understanding(paint_splits(16, 8, 8), config)


def shown_of_a_training(**environment):
    "What a training in a process of its own shows on a terminal of 120 columns."
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    done = processes.Process(target=train_on, args=(os.ttyname(theirs), environment))
    done.start()
    shown = b""
    while done.is_alive() or select.select([ours], [], [], 0)[0]:
        if select.select([ours], [], [], 0.1)[0]:
            shown += os.read(ours, 4096)
    os.close(theirs)
    os.close(ours)
    assert done.exitcode == 0, shown.decode()
    return shown.decode()


def test_a_training_shows_step_loss_and_what_is_left():
    "Without being asked, on a terminal."
    shown = shown_of_a_training()
    assert re.search(r"2/4 \[\d\d:\d\d<\d\d:\d\d, .*loss=\d", shown), shown


def test_a_run_has_no_bar_in_its_notebook(tmp_path):
    "The command that runs a notebook tells how far it is."
    assert "/4 [" not in shown_of_a_training(UNIEMO_RUN_DIR=str(tmp_path))


def test_a_notebook_that_is_open_has_a_bar(monkeypatch):
    from uniemo.train import callbacks

    monkeypatch.delenv("UNIEMO_RUN_DIR", raising=False)
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert callbacks.bar_is_seen()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not callbacks.bar_is_seen()


def test_experiments_show_bars_unless_told_not_to():
    from uniemo.runs.parameters import experiments, read_parameters

    known = {name: read_parameters(path) for name, path in experiments().items()}
    shown = {name: each["progress"].default for name, each in known.items() if "progress" in each}
    assert shown.keys() >= {"quickstart", "joint", "understanding", "emoset"}
    assert all(shown.values()), shown
