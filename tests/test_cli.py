"The command line as a process of its own: exit codes, messages, progress, start-up."

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import uniemo
from uniemo.runs import Run, experiments
from uniemo.runs.cli import main

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tests" / "fixtures" / "tiny.ipynb"
MAIN = [sys.executable, "-c", "import sys; from uniemo.runs.cli import main; sys.exit(main())"]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def uniemo_(tmp_path, *args, **kw):
    return subprocess.run(
        [*MAIN, *map(str, args)],
        cwd=tmp_path,
        env=ENV,
        capture_output=True,
        text=True,
        timeout=900,
        **kw,
    )


def test_help_and_version(tmp_path):
    p = uniemo_(tmp_path, "--version")
    assert p.returncode == 0 and p.stdout.strip() == f"uniemo {uniemo.__version__}"
    p = uniemo_(tmp_path, "--help")
    assert p.returncode == 0
    assert all(c in p.stdout for c in ("run", "runs", "resume", "list", "estimate"))
    for c in ("run", "runs", "resume", "list", "estimate"):
        assert uniemo_(tmp_path, c, "--help").returncode == 0
    assert uniemo_(tmp_path).returncode == 2 and uniemo_(tmp_path, "rnu").returncode == 2


HEAVY = {"torch", "transformers", "diffusers", "pandas", "numpy", "papermill", "matplotlib"}
LIGHT = [
    ("import uniemo", 150),
    ("from uniemo.runs.cli import main; main(['--help'])", 350),
    ("from uniemo.runs.cli import main; main(['run', '--help'])", 350),
    ("from uniemo.runs.cli import main; main(['list'])", 350),
]


def test_threads_of_a_command_leave_their_core_to_others(monkeypatch, capsys):
    "On two cores at a load of eight a sketch took 2.5 s instead of 34."
    for argv, told in ((["--version"], None), (None, "PASSIVE")):
        monkeypatch.setattr(os, "environ", {})
        monkeypatch.setattr(sys, "argv", ["uniemo", "--version"])
        assert main(argv) == 0
        assert os.environ.get("OMP_WAIT_POLICY") == told


@pytest.mark.parametrize("code, most", LIGHT)
def test_what_is_quick_imports_little(tmp_path, code, most):
    "Modules are counted, not seconds, which another program could take."
    counted = f"import sys; before = set(sys.modules); {code}; print(*(set(sys.modules) - before))"
    p = subprocess.run(
        [sys.executable, "-c", counted], cwd=tmp_path, env=ENV, capture_output=True, text=True
    )
    modules = p.stdout.splitlines()[-1].split()
    assert p.returncode == 0, p.stderr
    assert not HEAVY & set(modules) and len(modules) < most, len(modules)


def test_run_list_compare(tmp_path):
    (tmp_path / "s.yaml").write_text("seed: 4\npause: 1e-3\ntexts: [a, b]")
    p = uniemo_(
        tmp_path,
        "run",
        TINY,
        "-y",
        "s.yaml",
        "-p",
        "steps",
        "2",
        "-p",
        "seed",
        "7",
        "--run-id",
        "one",
    )
    assert p.returncode == 0, p.stderr
    run = Run(tmp_path / "runs" / "one")
    assert run.params == dict(
        steps=2, pause=0.001, stop="never", texts=["a", "b"], options=None, seed=7
    )
    assert (
        "one: completed" in p.stdout
        and os.path.join("runs", "one", "executed.ipynb") in p.stdout
        and "draw" in p.stdout
    )
    assert (
        re.search(r"cell \d of \d \(Count\)", p.stderr)
        and "step 2, loss 0.5" in p.stderr
        and "Warning" not in p.stderr
    ), p.stderr
    evil = "-'); __import__('os').system('touch CANARY')"
    p = uniemo_(tmp_path, "run", TINY, "--run-id", "two", "-q", "-p", "stop", evil)
    assert p.returncode == 0 and p.stderr == "" and not (tmp_path / "CANARY").exists()
    p = uniemo_(tmp_path, "runs")
    lines = p.stdout.splitlines()
    assert (
        lines[0].split()[:3] == ["run", "experiment", "status"]
        and re.match(r"one +tiny +completed .* draw 0\.\d+", lines[1])
        and len(lines) == 3
    )
    p = uniemo_(tmp_path, "runs", "compare", "one", "two")
    assert (
        p.returncode == 0
        and re.search(r"parameter +steps +2 +3", p.stdout)
        and re.search(r"summary +draw +0\.", p.stdout)
        and "pause" in p.stdout
    )
    p = uniemo_(tmp_path, "resume", "one")
    assert p.returncode == 2 and "completed" in p.stderr
    assert "Traceback" not in p.stderr and len(p.stderr.strip().splitlines()) == 1
    p = uniemo_(tmp_path, "run", TINY, "--run-id", "one")
    assert p.returncode == 2 and "uniemo resume one" in p.stderr


@pytest.mark.parametrize(
    "args, part",
    [
        (["run", TINY, "-p", "step", "3"], "did you mean 'steps'"),
        (["run", TINY, "-p", "steps", "x"], "no int"),
        (["run", TINY, "-p", "steps"], "a name and a value"),
        (["run", TINY, "-p", "steps", "1", "-p", "steps", "2"], "twice"),
        (["run", TINY, "-y", "none.yaml"], "none.yaml"),
        (["run", "nope"], "no experiment 'nope'"),
        (["run", "nope.ipynb"], "no notebook"),
        (["run", TINY, "--run-id", "../x"], "run id"),
        (["resume", "nope"], "no run 'nope'"),
        (["runs", "compare", "nope", "no"], "no run"),
        (["runs", "compare"], "two runs"),
        (["list", "nope"], "no experiment"),
        (["run", "quickstart", "-p", "seed", "-1"], "seed must be at least 0"),
        (["run", "quickstart", "-p", "num_train", "0"], "num_train must be at least 1"),
        (["run", "quickstart", "-p", "ratio", "1"], "ratio must be below 1"),
        (
            ["run", "quickstart", "-p", "backbone", "nowhere"],
            "backbone: there is no file or folder",
        ),
        (["run", "quickstart", "-p", "diffusion", "nowhere"], "diffusion: there is no file"),
        (["run", "quickstart", "-p", "data", "none.csv"], "data: there is no file or folder"),
        (["run", "understanding", "-p", "num_threads", "many"], "no int or None"),
    ],
)
def test_refused_with_one_line(tmp_path, monkeypatch, capsys, args, part):
    "As a process it does the same: see what is refused of a run that is there."
    monkeypatch.chdir(tmp_path)
    assert main([str(arg) for arg in args]) == 2
    said = capsys.readouterr().err
    assert part in said and "Traceback" not in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_failing_notebook(tmp_path):
    p = uniemo_(
        tmp_path, "run", TINY, "-p", "stop", "raise", "--run-id", "bad", "--runs-dir", "elsewhere"
    )
    assert (
        p.returncode == 1
        and "RuntimeError: told to stop at step 1" in p.stderr
        and "Traceback" not in p.stderr
    )
    run = Run(tmp_path / "elsewhere" / "bad")
    assert run.status == "failed" and "told to stop" in (run.dir / "executed.ipynb").read_text()
    assert "failed" in uniemo_(tmp_path, "runs", "--runs-dir", "elsewhere").stdout


def test_list(tmp_path):
    p = uniemo_(tmp_path, "list", TINY)
    assert (
        "Counts, remembers" in p.stdout
        and "texts: list or None (default None)  returned as they are" in p.stdout
    )
    p = uniemo_(tmp_path, "list")
    names = [line.split()[0] for line in p.stdout.splitlines() if line]
    assert p.returncode == 0 and names[:-1] == list(experiments())  # one line each, names first
    p = uniemo_(tmp_path, "runs")
    assert p.returncode == 0 and "no runs in runs" in p.stdout


@pytest.mark.skipif(os.name != "posix", reason="terminals of POSIX")
def test_progress_on_a_terminal(tmp_path):
    import pty

    leader, follower = pty.openpty()
    p = subprocess.Popen(
        [*MAIN, "run", str(TINY), "-p", "pause", "0.4", "--run-id", "t"],
        cwd=tmp_path,
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=follower,
    )
    os.close(follower)
    seen = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:
            break
        if not part:
            break
        seen += part
    os.close(leader)
    assert p.wait(600) == 0
    text = seen.decode(errors="replace")
    assert "\r" in text and "of 5 (Count)" in text and "step 3, loss 0.3333" in text, text
    assert json.loads((tmp_path / "runs" / "t" / "status.json").read_text())["cells"] == 5


def test_estimate_asks_what_the_experiment_would_do(capsys):
    "Images at a time in generation are no batch of training."
    from uniemo.runs.cli import _of_experiment

    for pairs, made in (({}, 8), (dict(generation_batch_size="3"), 3)):
        preset, changes = _of_experiment("emoset", pairs)
        assert preset == "paper" and "batch_size" not in changes and changes["num_images"] == made
    assert (
        _of_experiment("understanding", dict(batch_size="16"))[1]["batch_size"] == 16
        and "num_images" not in _of_experiment("understanding", {})[1]
    )
    mini = [
        "estimate",
        "emoset",
        "-p",
        "preset",
        "mini",
        "-p",
        "backbone",
        "mini",
        "-p",
        "diffusion",
        "mini",
        "--device",
        "cpu",
        "-s",
        "understanding",
    ]
    both = [
        "-p",
        "understanding_settings",
        '{"micro_batch": 4}',
        "-p",
        "joint_settings",
        '{"micro_batch": 2, "vae_size": 64}',
    ]
    assert main([*mini, *["-p", "generation_batch_size", "3", "-s", "generation"]]) == 0
    out = capsys.readouterr().out
    assert "understanding, 64 images" in out and "generation, 3 images" in out
    assert main([*mini, "-s", "joint", *both]) == 0
    out = capsys.readouterr().out
    assert "understanding, 4 images" in out and "joint, 2 images" in out  # each stage has its own
    assert (
        main([*mini, "-p", "understanding_settings", '{"vae_size": 64}']) == 2
        and "UnderstandingConfig has no setting 'vae_size'" in capsys.readouterr().err
    )
