"The store of stages: what its keys depend on, kills, several processes, damaged results."

import importlib
import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from uniemo.runs import Store
from uniemo.runs.keys import reached, source_hash


def quiet(message):
    pass


def count(folder, **params):
    ran = folder / "ran"
    ran.write_text(str(int(ran.read_text()) + 1 if ran.exists() else 1))


# ---- made once


def test_a_stage_runs_once(tmp_path):
    store = Store(tmp_path, code="one", log=quiet)
    a = store(count, x=1, y=[2, (3, 4)])
    assert store(count, y=[2, [3, 4]], x=1) == a  # order and tuples do not matter
    assert (a / "ran").read_text() == "1"
    assert store(count, x=2, y=[2, 3]) != a
    assert Store(tmp_path, code="two").path(count, x=1, y=[2, [3, 4]]) != a
    (a / "done.json").unlink()
    store(count, x=1, y=[2, [3, 4]])
    assert (a / "ran").read_text() == "2"  # killed before its end: goes on in the same folder
    b = store(count, x=2, y=[2, 3])
    assert store.path(count, x=a) == store.path(count, x=a) != store.path(count, x=b)


def test_a_stage_that_fails_is_not_done(tmp_path):
    def broken(folder):
        raise RuntimeError("no")

    store = Store(tmp_path)
    with pytest.raises(RuntimeError):
        store(broken)
    assert not (store.path(broken) / "done.json").exists()


def broken_once(folder):
    "Trains, and is killed the first time just before its end."
    (folder / "checkpoints").mkdir(exist_ok=True)
    best = folder / "checkpoints" / "best"
    if not best.exists():
        best.write_text("trained")
    if not (folder / "killed").exists():
        (folder / "killed").touch()
        raise KeyboardInterrupt
    (folder / "result").write_text(best.read_text())


def test_checkpoints_go_when_the_stage_is_done(tmp_path, monkeypatch):
    store = Store(tmp_path)
    folder = store.path(broken_once)
    with pytest.raises(KeyboardInterrupt):
        store(broken_once)
    assert (folder / "checkpoints" / "best").exists()
    with monkeypatch.context() as m:

        def killed(path, **kwargs):
            (folder / "checkpoints" / "best").unlink()
            raise KeyboardInterrupt

        m.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            store(broken_once)  # the worst moment: half of the checkpoints gone
    assert store(broken_once) == folder
    assert (folder / "result").exists() and not (folder / "checkpoints").exists()


def slow(folder):
    (folder / "checkpoints").mkdir()
    time.sleep(1.0)
    count(folder)


def _make_slow(folder):
    Store(folder, log=print)(slow)


def test_a_second_process_waits_and_takes_the_stage(tmp_path):
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=_make_slow, args=(tmp_path,)) for _ in range(2)]
    for p in both:
        p.start()
    for p in both:
        p.join(60)
    folder = Store(tmp_path).path(slow)
    assert [p.exitcode for p in both] == [0, 0]
    assert (folder / "ran").read_text() == "1" and not (folder / "checkpoints").exists()


def test_a_run_goes_through_a_store(tmp_path):
    def stage(folder, run=None):
        run.append(folder)

    class Logbook:  # a thing that JSON cannot hold
        def append(self, folder):
            self.folder = folder

    run = Logbook()
    assert Store(tmp_path)(stage, run=run) == run.folder


# ---- what is damaged


@pytest.mark.parametrize("damage", ["changed", "missing", "empty record", "no list of files"])
def test_a_damaged_stage_says_so(tmp_path, damage):
    def stage(folder):
        (folder / "model").mkdir()
        (folder / "model" / "weights.bin").write_bytes(b"0123")

    folder = Store(tmp_path)(stage)
    weights, done = folder / "model" / "weights.bin", folder / "done.json"
    if damage == "changed":
        weights.write_bytes(b"0124")
    elif damage == "missing":
        weights.unlink()
    else:
        done.write_text("" if damage == "empty record" else "{}")
    with pytest.raises(ValueError, match="delete this folder to make it again") as error:
        Store(tmp_path)(stage)
    named = weights if damage in ("changed", "missing") else done
    assert str(named) in str(error.value)
    shutil.rmtree(folder)
    assert Store(tmp_path)(stage) == folder and weights.read_bytes() == b"0123"


def test_results_are_on_the_disk_before_the_stage_is_done(tmp_path, monkeypatch):
    from uniemo.runs import store as room

    def stage(folder):
        (folder / "result").write_text("1")

    flushed = []

    def flush(path):
        assert not (Path(path).parent / "done.json").exists()
        flushed.append(Path(path).name)

    monkeypatch.setattr(room, "flush", flush)
    folder = Store(tmp_path)(stage)
    assert "result" in flushed and folder.name in flushed and (folder / "done.json").exists()


# ---- keys: files


def test_a_key_knows_what_is_in_its_inputs(tmp_path, monkeypatch):
    store = Store(tmp_path / "runs" / "stages", log=quiet)
    data = tmp_path / "photos"
    (data / "awe").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        (data / "awe" / f"{i}.png").write_bytes(b"x" * i)
    whole = store.path(count, data=str(data))
    assert whole == store.path(count, data="photos") == store.path(count, data=data)
    (data / "awe" / "2.png").unlink()
    fewer = store.path(count, data=str(data))
    (data / "awe" / "1.png").write_bytes(b"yy")
    assert len({whole, fewer, store.path(count, data=str(data))}) == 3
    (data / "t.csv").write_text("path,label\nawe/0.png,awe\n")
    table = store.path(count, data="photos/t.csv")
    os.utime(data / "awe" / "0.png", (1, 1))
    assert store.path(count, data="photos/t.csv") != table  # images that a table names
    a = store(count, x=1)
    elsewhere = Store("runs/stages").path(count, x=a).absolute()
    assert store.path(count, x=a) == store.path(count, x=str(a)) == elsewhere  # counts by its name
    (a / "emoset").mkdir()
    b = store.path(count, x=a / "emoset")
    (a / "emoset" / "new").touch()
    assert b == store.path(count, x=a / "emoset")
    here = store.path(count, data=".")
    store(count, x=2)
    assert here == store.path(count, data=".")  # the store itself is no input
    beside = dict(progress=True, run=object(), workers=2, num_threads=1)
    assert store.path(count, x=1, **beside) == store.path(count, x=1)


def test_a_key_does_not_depend_on_the_working_directory(tmp_path, monkeypatch):
    "A word or the name of a model means the same wherever one stands, and whatever lies there."

    def stage(folder, space, mood, table: Path | str = "none"):
        pass

    store = Store(tmp_path / "stages")
    keys = []
    for place, names in dict(empty=[], full=["bank", "awe", "some/model"]).items():
        for name in names:
            (tmp_path / place / name).mkdir(parents=True)
        (tmp_path / place).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / place)
        keys.append(store.path(stage, space="bank", mood=["awe", {"x": "some/model"}]))
    assert keys[0] == keys[1]
    before = store.path(stage, space="bank", mood=[], table="bank")
    (tmp_path / "full" / "bank" / "new").touch()
    assert store.path(stage, space="bank", mood=[], table="bank") != before  # said to hold a path
    missing = store.path(stage, space="bank", mood=[], table="org/model")
    monkeypatch.chdir(tmp_path / "empty")
    assert store.path(stage, space="bank", mood=[], table="org/model") == missing


# ---- keys: code

PACKAGE = {
    "__init__.py": "",
    "stages.py": '''"""A module."""
from stagepkg import parts
from stagepkg.losses import total as sum_up

STEPS = 3

def stage(folder):
    "Trains."
    from stagepkg.late import finish

    model = parts.Model(STEPS)
    return finish(sum_up(model.run()))

def another(folder):
    return STEPS + 1
''',
    "parts.py": """import math

SCALE = 2.0
UNUSED = 5

class Base:
    def run(self):
        return [self.one(k) for k in range(self.steps)]

class Model(Base):
    def __init__(self, steps):
        "Takes steps."
        self.steps = steps

    def one(self, k):
        return SCALE * math.sqrt(k)

    def plot(self):
        return "a picture"

def alone():
    return 1
""",
    "losses.py": '''def total(values):
    """Sum."""
    return sum(weight(v) for v in values)

def weight(v):
    return v * 0.5

def total_of_others(values):
    return total(values) + 1
''',
    "late.py": """def finish(x):
    return round(x, LATE)

if True:
    LATE = 3
""",
}
SAME = [
    ("stages.py", "STEPS = 3", "STEPS = 3  # steps"),
    ("stages.py", '"Trains."', '"Trains a model."'),
    ("stages.py", '"""A module."""', ""),
    ("stages.py", "STEPS + 1", "STEPS + 2"),
    ("stages.py", "def stage(folder):", "def stage(\n    folder: str,\n) -> float:"),
    ("parts.py", "UNUSED = 5", "UNUSED = 6"),
    ("parts.py", "return 1", "return 2"),
    ("parts.py", "a picture", "another picture"),
    ("parts.py", '"Takes steps."', '"Takes some steps."'),
    ("losses.py", '"""Sum."""', ""),
    ("losses.py", "total(values) + 1", "total(values) + 2"),
    ("losses.py", "v * 0.5", "(v  *\n            0.5)"),
]
OTHER = [
    ("stages.py", "STEPS = 3", "STEPS = 4"),
    ("stages.py", "model.run()", "model.run()[1:]"),
    ("parts.py", "SCALE = 2.0", "SCALE = 2.5"),
    ("parts.py", "range(self.steps)", "range(1, self.steps)"),
    ("parts.py", "math.sqrt(k)", "math.exp(k)"),
    ("losses.py", "v * 0.5", "v * 0.6"),
    ("late.py", "LATE = 3", "LATE = 4"),
    ("late.py", "round(x, LATE)", "round(-x, LATE)"),
]


@pytest.fixture
def package(tmp_path, monkeypatch):
    "Write a small package again, with a change; returns its stage."
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(file=None, old="", new=""):
        (tmp_path / "stagepkg").mkdir(exist_ok=True)
        for name, source in PACKAGE.items():
            if name == file:
                assert old in source
                source = source.replace(old, new)
            (tmp_path / "stagepkg" / name).write_text(source)
        for name in [n for n in sys.modules if n.split(".")[0] == "stagepkg"]:
            del sys.modules[name]
        importlib.invalidate_caches()
        return importlib.import_module("stagepkg.stages").stage

    return write


@pytest.mark.parametrize("change", SAME, ids=lambda c: f"{c[0]}: {c[1]}")
def test_code_that_changes_no_result(package, change):
    before = source_hash(package())
    assert source_hash(package(*change)) == before


@pytest.mark.parametrize("change", OTHER, ids=lambda c: f"{c[0]}: {c[1]}")
def test_code_that_a_stage_runs(package, change):
    before = source_hash(package())
    assert source_hash(package(*change)) != before


def test_what_a_stage_reaches(package):
    names = {name for _, name in reached(package())}
    assert names == {
        "stage",
        "STEPS",
        "Model",
        "Base",
        "SCALE",
        "total",
        "weight",
        "finish",
        "LATE",
    }


def test_a_stage_of_a_notebook(package):
    "A function without a file: what it uses of its notebook counts, and what it imports."
    from uniemo.runs.parameters import at_least

    shared = dict(__name__="a_notebook_without_file", at_least=at_least, LEAST=2)
    exec("def stage(folder): return at_least(LEAST)", shared)
    shared["stage"].__module__ = "a_notebook_without_file"
    before = reached(shared["stage"])
    assert ("a_notebook_without_file", "stage") in before


def test_stages_of_the_project_reach_what_they_run():
    "The key of a training knows its loss, and not the command line."
    from uniemo.runs.tables import list_runs

    found = reached(list_runs)
    modules = {module for module, _ in found}
    assert ("uniemo.runs.folders", "Run") in found and ("uniemo.files.disk", "read_json") in found
    assert "uniemo.runs.cli" not in modules and "uniemo.runs.estimate" not in modules


def test_the_key_stands_in_done_json(tmp_path):
    folder = Store(tmp_path, log=quiet)(count, x=1)
    done = json.loads((folder / "done.json").read_text())
    assert done["code"] == source_hash(count) and list(done["files"]) == ["ran"]
