"Two processes give what one gives: every training, the space, images, the choice, metrics, files."

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from uniemo.files.shipped import shipped_folder
from uniemo.joint import JointConfig
from uniemo.mini.writing import write_emoset
from uniemo.runs.jobs import FullRun
from uniemo.runs.processes import launch_command
from uniemo.understanding import UnderstandingConfig

pytestmark = pytest.mark.long

# stage 3 first: what it reads must be the same images, to the bit
ORDER = ("understand_again", "understand", "join", "paint", "choose", "measure")
SHORT = dict(steps=4, epochs=None, batch_size=8, num_queries=2, cpu=True)
SHORT |= dict(log_every=1, eval_every=2, save_every=2)


def full_run(folder, data):
    "Dropout, crops, a warm start, kept latents, empty prompts: whatever draws random numbers."
    more = dict(warm_start=4, keep_latents=True, word_dropout=0.3)
    write_emoset(folder / "kept", 24, seed=1, progress=False, workers=1)
    return FullRun(
        folder=str(folder),
        data=str(data),
        backbone=str(shipped_folder("clip")),
        diffusion=str(shipped_folder("diffusion")),
        first=asdict(UnderstandingConfig.preset("mini", **SHORT)),
        second=asdict(JointConfig.preset("mini", **SHORT, **more)),
        num_images=3,
        batch_size=2,
        num_inference_steps=2,
        criteria=("diverse",),
        max_kept=2,
        networks="uniemo.mini.judge:mini_networks",
        metric_size=64,
        num_real=16,
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "The same run in one process and, at the same time, in two."
    tmp = tmp_path_factory.mktemp("processes")
    data = write_emoset(tmp / "world", 64, progress=False, splits=(0.5, 0.25, 0.25), workers=1)
    one, two = (full_run(tmp / name, data) for name in ("one", "two"))
    told = two.path / "jobs.json"
    told.write_text(json.dumps(dict(run=asdict(two), jobs=ORDER)))
    command = [*launch_command(2), "-m", "uniemo.runs.jobs", str(told)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with open(two.path / "jobs.log", "wb") as log:
        both = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            found = {name: getattr(one, name)() for name in ORDER}
            code = both.wait(900)
        finally:
            both.terminate()
    assert code == 0, (two.path / "jobs.log").read_text()[-3000:]
    return one, two, found, json.loads((two.path / "jobs-done.json").read_text())


@pytest.mark.parametrize("stage", ["stage-1", "stage-2", "stage-3"])
def test_losses_are_those_of_one(runs, stage):
    tables = [pd.read_json(run.path / stage / "history.jsonl", lines=True) for run in runs[:2]]
    losses = [name for name in tables[0] if name.startswith("loss") or name == "accuracy"]
    assert (tables[0].split == "train").sum() == 4 and "loss" in losses
    for name in losses:
        np.testing.assert_allclose(*(t[name] for t in tables), atol=1e-5, rtol=0, err_msg=name)
    metrics = [json.loads((run.path / stage / "metrics.json").read_text()) for run in runs[:2]]
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-5)


def test_files_are_those_of_one(runs):
    one, two = (
        {path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()}
        for run in runs[:2]
    )
    own = {"jobs.json", "jobs-done.json", "jobs.log"}
    # latents are called by their data set's autoencoder and place, which are the same
    assert two - own == one and own <= two
    # everything is logged once
    lines = [len((run.path / "metrics.jsonl").read_text().splitlines()) for run in runs[:2]]
    assert lines[0] == lines[1]


def test_pipeline_and_space_are_those_of_one(runs):
    for name in (
        "space.safetensors",
        "mapper/diffusion_pytorch_model.safetensors",
        "encoder/model.safetensors",
    ):
        one, two = (load_file(run.path / "pipeline" / name) for run in runs[:2])
        assert one.keys() == two.keys()
        for key, values in one.items():
            torch.testing.assert_close(two[key], values, atol=1e-4, rtol=1e-3, msg=f"{name} {key}")


def test_images_are_those_of_one(runs):
    one, two = (run.path / "images" for run in runs[:2])
    names = sorted(path.name for path in one.glob("*.png"))
    assert len(names) == 24
    for name in names:
        a, b = (np.asarray(Image.open(folder / name)).astype(int) for folder in (one, two))
        assert abs(a - b).max() <= 2, name
    tables = [pd.read_csv(folder / "table.csv") for folder in (one, two)]
    assert tables[0].path.tolist() == tables[1].path.tolist()


def test_choice_and_metrics_are_those_of_one_from_the_same_images(runs):
    "What two processes read of these images, read once more by one."
    _, two, _, found = runs
    chosen, measured = (pd.read_csv(two.path / n) for n in ("candidates.csv", "metrics.csv"))
    assert two.choose() == found["choose"]
    again = pd.read_csv(two.path / "candidates.csv")
    numbers = list(chosen.select_dtypes("number"))
    np.testing.assert_allclose(again[numbers], chosen[numbers], atol=1e-5)
    assert again.kept.tolist() == chosen.kept.tolist()
    assert two.measure() == pytest.approx(found["measure"], rel=1e-4, abs=1e-6)
    assert measured.metric.tolist() == list(found["measure"])


def test_results_are_those_of_one(runs):
    *_, one, two = runs
    assert one.keys() == two.keys()
    for name in ("understand", "join", "understand_again"):
        assert two[name] == pytest.approx(one[name], abs=1e-5)


def test_a_job_that_fails_is_one_clear_error(runs):
    from uniemo.runs.jobs import in_processes

    broken = replace(runs[1], data=str(Path(runs[1].data) / "nowhere"))
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node 2"
    with pytest.raises(RuntimeError, match="2 processes ended with code 1: .*nowhere"):
        in_processes(broken, ["understand"], 2, torchrun)


# ---- threads


NARROW = """
import json, os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from uniemo.runs.folders import new_run
from uniemo.runs.threads import process_settings
run = new_run("narrow", {}, runs_dir=".", run_id="narrow")
print(json.dumps([run.env["threads"], process_settings()]))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a matter of Linux")
def test_threads_follow_what_the_process_may_use(tmp_path):
    "Of however many processors one may be used: env.json says so, and the notebook gets one."
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GLIBC_"))}
    command = [sys.executable, "-c", NARROW]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said, given = json.loads(done.stdout)
    assert said == dict(cores=os.cpu_count(), usable=1, threads="1")
    kept = "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=268435456"
    wanted = dict(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", GLIBC_TUNABLES=kept)
    assert given == wanted
