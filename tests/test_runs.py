"Runs: what does not read well in a notebook, such as signals, hostile text and odd folders."

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from filelock import FileLock

from uniemo import runs
from uniemo.runs import Run, RunFailed, execution, folders, read_json, threads

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "fixtures" / "tiny.ipynb"
HOSTILE = [
    "'; __import__('os').system('touch CANARY') #",
    '"""\n__import__("os").system("touch CANARY")\n"""',
    "\\",
    "\\'",
    '\\"',
    "a\nb\rc\x00\x1b[31m",
    "{steps}",
    "${HOME} $$ %s",
    "\u2028é字😀",
    "None",
    "1e3",
    "f'{1}'",
    "#",
    "]",
]


def printed(run):
    "What the last cell of an executed tiny notebook printed."
    cells = nbformat.read(run.dir / "executed.ipynb", 4).cells
    return json.loads(
        next(o.text for o in cells[-1].outputs if o.output_type == "stream" and o.name == "stdout")
    )


def spawn(tmp_path, *args, cwd=None, **kw):
    "`uniemo` as a process of its own."
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from uniemo.runs.cli import main; sys.exit(main())",
            *map(str, args),
        ],
        cwd=cwd or tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **kw,
    )  # a shell's background jobs ignore SIGINT


def wait_for(what, seconds=600):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return
        time.sleep(0.1)
    raise TimeoutError("it did not happen")


def logged(folder):
    return (folder / "metrics.jsonl").exists() and len(
        (folder / "metrics.jsonl").read_text().splitlines()
    ) >= 2


def test_values_are_never_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {k: [k, {"x": k}] for k in HOSTILE}
    run = runs.start(
        TINY, {"texts": HOSTILE, "options": options, "stop": HOSTILE[0]}, progress=False
    )
    assert (
        run.summary()["texts"] == HOSTILE
        and run.summary()["options"] == options
        and run.params["stop"] == HOSTILE[0]
    )
    assert not list(tmp_path.rglob("CANARY")) and printed(run)["cwd"] == str(tmp_path)


@pytest.mark.parametrize("name", ["steps=1;x", "__import__('os')", "steps\n", "", "class"])
def test_a_name_is_never_code(tmp_path, name):
    with pytest.raises(ValueError, match="unknown parameter"):
        runs.start(TINY, {name: 1}, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "given, part",
    [
        ({"step": 3}, "did you mean 'steps'"),
        ({"steps": "3.0"}, "no int"),
        ({"steps": True}, "no int"),
        ({"pause": "soon"}, "no float"),
        ({"steps": None}, "no int"),
        ({"texts": "x"}, "no list"),
        ({"texts": [1j]}, "type complex"),
        ({"options": "[1]"}, "no dict or None"),
        ({"options": {1: 2}}, "dict"),
        ({"pause": 1e999}, "not finite"),
        ({"steps": "9" * 5000}, "no int"),
        ({"options": '{"a": NaN}'}, "not finite"),
        ({"stop": "\udc80"}, "no valid text"),
        ({"options": {"\udc80": 1}}, "no valid text"),
    ],
)
def test_refused_before_anything_starts(tmp_path, given, part):
    with pytest.raises(ValueError, match=part):
        runs.start(TINY, given, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_what_a_run_keeps(tmp_path):
    a, b = (runs.start(TINY, {"seed": 5, "steps": "2"}, tmp_path, progress=False) for _ in range(2))
    assert (
        a.id != b.id
        and (a.dir / "summary.json").read_bytes() == (b.dir / "summary.json").read_bytes()
    )
    assert {
        "source.ipynb",
        "executed.ipynb",
        "params.json",
        "env.json",
        "status.json",
        "metrics.jsonl",
        "summary.json",
    } <= {p.name for p in a.dir.iterdir()} and not list(a.dir.glob("*.tmp"))
    assert (
        a.params == dict(steps=2, pause=0.0, stop="never", texts=None, options=None, seed=5)
        and a.env["seed"] == 5
        and "papermill" in a.env["packages"]
    )
    assert (
        a.info["status"] == "completed"
        and a.info["seconds"] > 0
        and a.info["given"] == {"seed": 5, "steps": 2}
    )
    assert (
        list(a.metrics().step) == [1, 2]
        and (a.dir / "source.ipynb").read_bytes() == TINY.read_bytes()
    )


def test_folders_with_odd_names_and_another_kernel_called_python3(tmp_path, monkeypatch):
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        json.dumps(
            dict(argv=["/bin/false", "{connection_file}"], display_name="wrong", language="python")
        )
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    run = runs.start(TINY, {"seed": 1}, tmp_path / 'it\'s {a} $HOME "odd" é', "x.1", progress=False)
    assert (
        run.status == "completed"
        and printed(run)["executable"] == sys.executable
        and run.summary()["last"] == 3
    )


@pytest.mark.parametrize(
    "stop, error", [("raise", "RuntimeError"), ("die", "DeadKernelError"), ("exit", "SystemExit")]
)
def test_failures_are_kept(tmp_path, stop, error):
    with pytest.raises(RunFailed, match=error):
        runs.start(TINY, {"stop": stop}, tmp_path, "bad", progress=False)
    run = Run(tmp_path / "bad")
    info = run.info
    assert (
        run.status == "failed"
        and info["error"]["name"] == error
        and info["ended"]
        and len(run.metrics()) == 1
    )
    nb = nbformat.read(run.dir / "executed.ipynb", 4)
    assert stop == "die" or any(
        o.output_type == "error" for c in nb.cells for o in c.get("outputs", [])
    )
    table = runs.list_runs(tmp_path)
    assert list(table.status) == ["failed"] and list(table.metric) == [""]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
@pytest.mark.parametrize(
    "sig, status, code",
    [
        (signal.SIGINT, "interrupted", 130),
        (signal.SIGTERM, "interrupted", 143),
        (signal.SIGKILL, "dead", -9),
    ],
)
def test_stopped_from_outside_and_resumed(tmp_path, sig, status, code):
    p = spawn(tmp_path, "run", TINY, "--run-id", "r", "-p", "pause", "0.3", "-p", "steps", "12")
    folder = tmp_path / "runs" / "r"
    wait_for(lambda: logged(folder))
    run = Run(folder)
    assert run.status == "running"
    with pytest.raises(ValueError, match="is running"):
        runs.resume(run)
    kernels = psutil.Process(p.pid).children()
    assert kernels
    p.send_signal(sig)
    out, err = p.communicate(timeout=600)
    assert p.returncode == code and run.status == status, err
    if sig != signal.SIGKILL:
        assert "uniemo resume r" in err and run.info["error"]["message"]
    wait_for(
        lambda: not any(k.is_running() and k.status() != psutil.STATUS_ZOMBIE for k in kernels)
    )
    done = json.loads((folder / "checkpoints" / "step.json").read_text())
    assert done < 12
    again = runs.resume(run, progress=False)
    assert (
        again.status == "completed"
        and again.info["attempts"] == 2
        and printed(again)["first"] == done
        and list(again.metrics().step) == list(range(1, 13))
    )
    fresh = runs.start(TINY, {"steps": 12}, tmp_path / "runs", progress=False)
    assert fresh.summary() == again.summary()


def test_resume_uses_the_kept_notebook(tmp_path):
    mine = tmp_path / "mine.ipynb"
    mine.write_bytes(TINY.read_bytes())
    with pytest.raises(RunFailed):
        runs.start(mine, {"stop": "raise", "steps": 1}, tmp_path, "r", progress=False)
    mine.unlink()
    run = runs.resume(Run(tmp_path / "r"), progress=False)
    assert run.status == "completed" and (run.dir / "executed-1.ipynb").exists()


def test_run_by_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNIEMO_RUN_DIR", raising=False)
    monkeypatch.setattr(folders, "_here", {})
    run = Run.current()
    assert (
        run is Run.current() and run.dir.parent == tmp_path / "runs" and run.status == "interactive"
    )
    run.log(loss=0.5)
    run.summary(a=1)
    run.summary(b=2)
    assert run.summary() == {"a": 1, "b": 2}
    with pytest.raises(ValueError, match="no source.ipynb"):
        runs.resume(run)
    monkeypatch.setenv("UNIEMO_RUN_DIR", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="UNIEMO_RUN_DIR"):
        Run.current()


def test_many_runs_begin_at_once(tmp_path):
    made = []
    threads = [
        threading.Thread(target=lambda: made.append(runs.new_run("x", {}, tmp_path).id))
        for _ in range(8)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(set(made)) == 8


def test_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "f.json"
    runs.write_json(path, list(range(3000)))
    stop = threading.Event()
    seen = []

    def read():
        while not stop.is_set():
            seen.append(len(read_json(path)))

    t = threading.Thread(target=read)
    t.start()
    for i in range(200):
        runs.write_json(path, list(range(3000 + i)))
    stop.set()
    t.join()
    assert seen and min(seen) >= 3000 and [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_notebooks_that_are_none(tmp_path):
    (tmp_path / "a.ipynb").write_text("{")
    (tmp_path / "b.ipynb").write_text("[]")
    nb = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "ir", "language": "R", "display_name": "R"}}
    )
    nbformat.write(nb, tmp_path / "r.ipynb")
    for name, part in [("a", "no whole JSON"), ("b", "no notebook"), ("r", "written in R")]:
        with pytest.raises(ValueError, match=part):
            runs.start(tmp_path / f"{name}.ipynb", {}, tmp_path / "runs")
    with pytest.raises(FileNotFoundError, match="looked from"):
        runs.start(tmp_path / "none.ipynb")
    assert not (tmp_path / "runs").exists()


def test_shipped_experiments_have_a_description_and_parameters():
    if not runs.experiments():
        pytest.skip("no experiments yet")
    for name, path in runs.experiments().items():
        assert runs.describe(path), f"{name}: no block quote in its first cell"
        assert runs.read_parameters(path), f"{name}: no cell tagged 'parameters'"


# ---- the life of a run


def running(tmp_path, **info):
    "A run that says it is running, with a notebook to go on with."
    run = runs.new_run("tiny", {"steps": 3}, tmp_path, "r", given={"steps": 3}, notebook="tiny")
    (run.dir / "source.ipynb").write_bytes(TINY.read_bytes())
    run._set(status="running", **info)
    return run


def test_a_lock_decides_what_runs(tmp_path, monkeypatch):
    "Neither a host that is gone nor a step of the clock: who holds the folder runs."
    run = running(tmp_path, host="gone", pid=1, started="2999-01-01T00:00:00+00:00")
    assert run.status == "dead"
    with FileLock(run.dir / folders.LOCK):
        monkeypatch.setattr(time, "time", lambda: 0.0)
        assert run.status == "running" and list(runs.list_runs(tmp_path).status) == ["running"]
        with pytest.raises(ValueError, match="is running.*uniemo resume --force r"):
            runs.resume(run)
    assert run.status == "dead"


def test_resume_by_force(tmp_path):
    "A lock that a machine left is taken over; that of a process here is not."
    run = running(tmp_path, host="gone")
    with FileLock(run.dir / folders.LOCK):
        p = spawn(tmp_path, "resume", "--force", run.dir, "-q")
        out, err = p.communicate(timeout=600)
    assert p.returncode == 0 and "r: completed" in out, err
    run = running(tmp_path / "here")
    with FileLock(run.dir / folders.LOCK):
        p = spawn(tmp_path, "resume", "--force", run.dir, "-q")
        out, err = p.communicate(timeout=600)
    assert p.returncode == 2 and "wait for it, or stop that process" in err


def test_a_killed_notebook_says_what_may_have_been(tmp_path):
    with pytest.raises(RunFailed, match="killed, perhaps out of memory: see uniemo estimate"):
        runs.start(TINY, {"stop": "die"}, tmp_path, "bad", progress=False)
    assert "uniemo estimate" in Run(tmp_path / "bad").info["error"]["message"]


@pytest.fixture
def full_disk(monkeypatch):
    "From now on nothing can be written but a few bytes."

    def fill():
        def write(self, data):
            with open(self, "wb") as f:
                f.write(data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", write)

    return fill


def test_a_full_disk_is_named(tmp_path, full_disk):
    run = runs.new_run("x", {}, tmp_path, "r")
    before = {p.name: p.read_bytes() for p in run.dir.iterdir()}
    full_disk()
    with pytest.raises(OSError, match=r"disk is full: .*summary.json .*needs .*Free some space"):
        run.summary(loss=1.0)
    assert {p.name: p.read_bytes() for p in run.dir.iterdir()} == before  # no half of a file
    with pytest.raises(OSError, match="disk is full"):
        runs.new_run("x", {}, tmp_path, "second")
    assert not (tmp_path / "second").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_while_logging(tmp_path):
    run = runs.new_run("x", {}, tmp_path, "r")
    (run.dir / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match="disk is full: .*metrics.jsonl"):
        run.log(loss=1.0)


def test_a_full_disk_while_a_notebook_runs(tmp_path, full_disk, monkeypatch):
    "The message comes although its note cannot be written; the run is dead, and can go on."
    save = execution.write_file

    def filling(path, content):
        if path.endswith("executed.ipynb"):
            full_disk()
        save(path, content)

    with monkeypatch.context() as m:
        m.setattr(execution, "write_file", lambda path, content: filling(str(path), content))
        with pytest.raises(RunFailed, match="disk is full: .*executed.ipynb"):
            runs.start(TINY, {}, tmp_path, "r", progress=False)
    monkeypatch.undo()
    assert Run(tmp_path / "r").status == "dead"
    assert runs.resume(Run(tmp_path / "r"), progress=False).status == "completed"


BROKEN = dict(
    torn="{",
    empty="",
    array="[]",
    number="3",
    words='{"started": "today", "status": "completed"}',
    odd='{"started": 5, "status": ["x"], "cells": "many"}',
    binary="\x00\x01",
)


@pytest.mark.parametrize("name", BROKEN)
def test_one_broken_run_hides_no_other(tmp_path, name):
    good = runs.new_run("x", {}, tmp_path, "good", status="completed")
    good.summary(main_metric="loss", loss=0.5)
    (tmp_path / name).mkdir()
    (tmp_path / name / "status.json").write_text(BROKEN[name])
    table = runs.list_runs(tmp_path).set_index("run")
    assert table.status["good"] == "completed" and table.metric["good"] == "loss 0.5"
    assert table.status[name] == "unreadable"
    assert runs.find_run("good", tmp_path).id == "good"


@pytest.mark.parametrize("record", ["{", "[]", '{"main_metric": []}'])
def test_a_broken_summary_hides_no_other(tmp_path, record):
    for name in ("good", "bad"):
        runs.new_run("x", {}, tmp_path, name, status="completed")
    (tmp_path / "bad" / "summary.json").write_text(record)
    table = runs.list_runs(tmp_path).set_index("run")
    assert table.status["good"] == "completed" and len(table) == 2


def test_threads_follow_what_may_be_used(tmp_path, monkeypatch):
    "The notebook's process gets as many threads as it may use; `env.json` says so."
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "usable_cores", lambda: 1)
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(THREADS)])
    nb.metadata["kernelspec"] = dict(name="python3", language="python", display_name="python3")
    nbformat.write(nb, tmp_path / "threads.ipynb")
    run = runs.start(tmp_path / "threads.ipynb", {}, tmp_path / "runs", progress=False)
    assert run.summary() == dict(threads="1", waits="PASSIVE")
    assert run.env["threads"] == dict(cores=os.cpu_count(), usable=1, threads="1")


THREADS = """import os
from uniemo.runs import Run
get = os.environ.get
Run.current().summary(threads=get("OMP_NUM_THREADS"), waits=get("OMP_WAIT_POLICY"))"""
