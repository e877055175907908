"The accelerator's script runs dry where there is no accelerator."

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent / "gpu.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="make gpu is the test of this machine")
def test_dry_run():
    parts = ["equality", "understanding", "joint", "generation"]
    command = [sys.executable, str(SCRIPT), "--only", *parts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "There is no accelerator here" in done.stdout
    for said in ("same seed twice", "resumed", "stage 1, batch", "joint step", "generation"):
        assert said in done.stdout
