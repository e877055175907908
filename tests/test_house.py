"Is what is committed what the notebooks say? Export, outputs, tags, README, side bar, site, wheel."

import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import house
import pytest
from house import NBS, ROOT, directives, notebooks, read, text

ALL = notebooks()
each = pytest.mark.parametrize("nb", ALL, ids=lambda p: p.relative_to(NBS).as_posix())


def code_cells(nb):
    return [c for c in read(nb)["cells"] if c["cell_type"] == "code" and text(c["source"]).strip()]


def run(*cmd, cwd=ROOT, **env):
    done = subprocess.run(
        [str(o) for o in cmd], cwd=cwd, capture_output=True, text=True, env={**os.environ, **env}
    )
    assert done.returncode == 0, (
        f"{' '.join(map(str, cmd))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done.stdout


def tree(folder, *patterns):
    return {
        p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8")
        for o in patterns
        for p in sorted(folder.glob(o))
    }


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    "A copy of the repository in which everything was exported and cleaned again."
    to = tmp_path_factory.mktemp("fresh")
    shutil.copytree(
        NBS, to / "nbs", symlinks=True, ignore=shutil.ignore_patterns(".ipynb_checkpoints")
    )
    shutil.copytree(
        ROOT / "uniemo", to / "uniemo", ignore=shutil.ignore_patterns("__pycache__", "assets")
    )
    for o in ("settings.ini", "pyproject.toml", "setup.py", "_quarto.yml"):
        shutil.copy(ROOT / o, to)
    for module, o in (("doclinks", "export"), ("clean", "clean")):
        run(sys.executable, "-c", f"from nbdev.{module} import nbdev_{o}; nbdev_{o}()", cwd=to)
    run(sys.executable, "-m", "ruff", "format", "-q", "uniemo", cwd=to)
    return to


# ---- the library is its notebooks


def test_export_is_in_sync(fresh):
    was = tree(ROOT, "uniemo/**/*.py", "pyproject.toml")
    now = tree(fresh, "uniemo/**/*.py", "pyproject.toml")
    assert [k for k in sorted({*was, *now}) if was.get(k) != now.get(k)] == [], "run: make prepare"


# written by hand: the package's door, and a module whose name others build on
BY_HAND = {"__init__", "_modidx", "interop"}


def test_every_module_comes_from_a_notebook():
    exported = {
        re.search(r"default_exp ([\w.]+)", text(c["source"]))[1]
        for nb in ALL
        for c in code_cells(nb)
        if "default_exp" in directives(c)
    }
    files = [p.relative_to(ROOT / "uniemo") for p in (ROOT / "uniemo").rglob("*.py")]
    modules = {p.with_suffix("").as_posix().replace("/", ".") for p in files}
    shelves = {f"{name}.__init__" for name in house.SHELVES}
    assert modules - BY_HAND - shelves == exported


def test_shelves_are_in_sync():
    for shelf in house.SHELVES:
        init = (ROOT / "uniemo" / shelf / "__init__.py").read_text(encoding="utf-8")
        rooms = next(
            ast.literal_eval(node.value)
            for node in ast.parse(init).body
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_rooms"
        )
        assert rooms == house.shelf_names(ROOT / "uniemo" / shelf), "run: make prepare"


# ---- notebooks are clean, executed and readable


@each
def test_notebook_is_clean(nb, fresh):
    assert nb.read_text(encoding="utf-8") == (fresh / nb.relative_to(ROOT)).read_text(
        encoding="utf-8"
    ), "run: make prepare"


@each
def test_notebook_has_its_outputs(nb):
    shown = [
        c
        for c in code_cells(nb)
        if not directives(c).keys() & {"export", "exporti", "exports", "default_exp", "hide"}
    ]
    if not shown:
        pytest.skip("no code to run")
    assert any(c["outputs"] for c in shown), "committed without outputs: execute it in place"
    assert not [
        text(c["source"])[:80]
        for c in shown
        for o in c["outputs"]
        if o["output_type"] == "error" and "raises-exception" not in c["metadata"].get("tags", [])
    ], "an error is left in its outputs"

    def prints(c):
        try:
            body = ast.parse(text(c["source"])).body
        except SyntaxError:
            return False  # a magic
        return any(
            isinstance(o, ast.Expr)
            and isinstance(o.value, ast.Call)
            and getattr(o.value.func, "id", "") == "print"
            for o in body
        )

    assert not [
        text(c["source"])[:80]
        for c in shown
        if prints(c) and not c["outputs"] and directives(c).get("eval") != "false"
    ], "prints, but has no output: execute it in place"


@each
def test_notebook_reads_well(nb):
    cells = read(nb)["cells"]
    head = text(cells[0]["source"]).strip().splitlines()
    assert head[0].startswith("# ") and any(o.startswith("> ") for o in head), (
        "the first cell is `# title` and `> one line`"
    )
    assert len([o for o in head if o.strip()]) == 2, (
        "prose in the first cell is lost on the site: put it into the next"
    )
    # small cells are many: what a reader scrolls through is counted by the length of each
    assert len(cells) <= 120 and nb.stat().st_size <= 500_000
    long = [
        text(c["source"])
        for c in cells
        if c["cell_type"] == "code" and len(text(c["source"]).splitlines()) > 40
    ]
    whole = (ast.ClassDef, ast.FunctionDef)
    several = [
        o[:80] for o in long if len(kinds := ast.parse(o).body) > 1 or type(kinds[0]) not in whole
    ]
    assert several == [], "a cell of more than 40 lines that is not one class or one function"


@each
def test_notebook_holds_no_path_of_its_machine(nb):
    found = [
        line.strip()[:120]
        for c in read(nb)["cells"]
        for part in [
            c["source"],
            *[o.get("text", o.get("data", {}).get("text/plain", "")) for o in c.get("outputs", [])],
        ]
        for line in text(part).splitlines()
        if re.search(r"(?<![\w.:/])/(home|root|Users|work|tmp|var)/\w", line)
    ]
    assert found == []


# a bar that no kernel fills any more, lines about what is in order, and numbers in numpy's dress
STALE = r"\b0%\||requires torchvision|torchvision is not installed|IProgress not found"
STALE += r"|\bnp\.(float|int|str|bool)\w*\("


@each
def test_notebook_stores_no_stale_line(nb):
    found = [
        line.strip()[:120]
        for c in read(nb)["cells"]
        for o in c.get("outputs", [])
        for line in text(o.get("text", o.get("data", {}).get("text/plain", ""))).splitlines()
        if re.search(STALE, line)
    ]
    assert found == [], (
        "in the hidden cell: disable_progress_bar() of diffusers.utils.logging and "
        "transformers.utils.logging; float(...) of a number of numpy's; then execute it again"
    )


@each
def test_notebook_holds_no_state_of_widgets_that_it_does_not_show(nb):
    "Bars of a kernel leave thousands of lines in the metadata, and nobody sees them."
    whole = read(nb)
    shown = any("widget-view" in json.dumps(c.get("outputs", [])) for c in whole["cells"])
    assert shown or "widgets" not in whole["metadata"], "delete it from the notebook's metadata"


def test_parameters_tag_survives_cleaning(tmp_path):
    "nbdev_clean strips cell metadata, but papermill needs its tag."
    nb = tmp_path / "tagged.ipynb"
    cell = dict(
        cell_type="code",
        id="a",
        source="x = 1",
        outputs=[],
        execution_count=3,
        metadata=dict(tags=["parameters"], collapsed=True),
    )
    nb.write_text(json.dumps(dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5)))
    run(sys.executable, "-c", f"from nbdev.clean import nbdev_clean; nbdev_clean({str(nb)!r})")
    cell = read(nb)["cells"][0]
    assert cell["metadata"] == dict(tags=["parameters"]) and cell["execution_count"] is None


@pytest.mark.parametrize("nb", notebooks("experiments"), ids=lambda p: p.name)
def test_experiment_has_parameters(nb):
    tagged = [c for c in code_cells(nb) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1, "one cell of an experiment has the tag `parameters`"


RESULTS = sorted((ROOT / "uniemo" / "assets" / "results").glob("*/"))


@pytest.mark.parametrize("folder", RESULTS, ids=lambda p: p.name)
def test_published_results_are_those_of_their_run(folder):
    "No table was edited, and the settings are the experiment's own defaults."
    from uniemo.mini.worlds import WORLDS
    from uniemo.runs import read_parameters

    origin, settings, known = (
        read(folder / "provenance.json"),
        read(folder / "settings.json"),
        read_parameters(NBS / "experiments" / f"{folder.name}.ipynb"),
    )
    tables = sorted(p.name for kind in ("csv", "jsonl") for p in folder.glob(f"*.{kind}"))
    assert tables and sorted(origin["sha256"]) == tables
    for name in tables:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == origin["sha256"][name], (
            f"{name} is not what the run wrote: python tests/house.py publish RUN_FOLDER"
        )
    # what a notebook does not ask for is a default of the library: test_experiments compares those
    asked = {name: known[name].default for name in settings if name in known}
    assert settings["world"] in WORLDS and settings == settings | asked, (
        "the notebook's defaults are not those of the published run"
    )


# ---- README, side bar, site


def test_readme_is_in_sync():
    body, pictures = house.readme()
    assert (ROOT / "README.md").read_text(encoding="utf-8") == body, "run: make readme"
    assert {p.name: p.read_bytes() for p in (NBS / "images").glob("index-*.png")} == pictures, (
        "run: make readme"
    )


def test_home_page_names_every_chapter_and_experiment():
    "The other rooms stand in the side bar."
    body = house.readme()[0]
    shown = [p for p in ALL if p.parent in (NBS, NBS / "experiments") and p.stem != "index"]
    missing = [p.name for p in shown if f"({p.relative_to(ROOT).as_posix()})" not in body]
    assert len(shown) > 20 and missing == [], "execute nbs/index.ipynb again, then: make prepare"


def test_readme_leads_somewhere():
    links = re.findall(
        r"\]\((?!https?:|#)([^)#\s]+)", (ROOT / "README.md").read_text(encoding="utf-8")
    )
    assert [o for o in links if not (ROOT / o).exists()] == []


def test_sidebar_is_in_sync():
    assert (NBS / "sidebar.yml").read_text() == house.sidebar(), "run: make prepare"


def test_quarto_settings_are_one_file():
    assert (NBS / "_quarto.yml").is_symlink() and (
        NBS / "_quarto.yml"
    ).resolve() == ROOT / "_quarto.yml"


def test_link_checker_sees_what_is_broken(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h2 id="x">x</h2><a href="#x">1</a><a href="#y">2</a><a href="b.html">3</a><script src="https://cdn.example/k.js"></script>'
    )
    assert [o.partition(": ")[2] for o in house.broken_links(tmp_path)] == [
        "#y: no such heading",
        "b.html: no such page",
        "loads https://cdn.example/k.js over the network",
    ]


# ---- the package


def test_torch_is_pinned_for_make_only():
    assert "torch==" in (ROOT / "constraints.txt").read_text()
    assert re.search(r"^requirements = .*\btorch>=", (ROOT / "settings.ini").read_text(), re.M)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from the sdist as a stranger's pip would, by this environment's tools."
    src, out = tmp_path_factory.mktemp("src"), tmp_path_factory.mktemp("dist")
    for o in [
        "setup.py",
        "settings.ini",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
        "constraints.txt",
    ]:
        shutil.copy(ROOT / o, src)
    for o in ("uniemo", "nbs/experiments"):
        if (ROOT / o).exists():
            shutil.copytree(
                ROOT / o,
                src / o,
                ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
            )
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, src)
    return next(out.glob("*.whl"))


def test_wheel_holds_what_it_needs(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.stat().st_size < 45e6
    wanted = [f"uniemo/experiments/{p.name}" for p in notebooks("experiments")] + [
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "uniemo").rglob("*")
        if p.is_file() and p.suffix != ".pyc"
    ]
    assert [o for o in wanted if o not in names] == []
    assert not [
        o
        for o in names
        if o.startswith(("tests/", "nbs/")) or "__pycache__" in o or "checkpoint" in o
    ]
    with tarfile.open(next(wheel.parent.glob("*.tar.gz"))) as archive:
        sdist = archive.getnames()
    assert [
        p.name
        for p in notebooks("experiments")
        if not any(o.endswith("nbs/experiments/" + p.name) for o in sdist)
    ] == []


def test_wheel_works_in_an_empty_environment(wheel, tmp_path):
    "A new environment with this wheel that sees this one's other packages, but not the checkout."
    env = tmp_path / "env"
    run(sys.executable, "-m", "venv", "--without-pip", env)
    python, site = env / "bin/python", next(env.glob("lib/python*/site-packages"))
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-compile",
        "--prefix",
        env,
        "--ignore-installed",
        wheel,
    )
    import numpy

    here, seen = Path(numpy.__file__).parents[1], site / "heavy"
    seen.mkdir()
    for o in here.iterdir():
        if not re.search("uniemo|__editable__|distutils-precedence|__pycache__", o.name):
            (seen / o.name).symlink_to(o)
    (site / "heavy.pth").write_text(f"{seen}\n")
    found = [p.relative_to(ROOT).with_suffix("") for p in (ROOT / "uniemo").rglob("*.py")]
    modules = sorted(".".join(p.parts) for p in found if p.stem != "__init__")
    code = f"""import importlib, uniemo
for name in {modules}: importlib.import_module(name)
from uniemo.mini import write_emoset
print(uniemo.__file__)
print([p.name for p in write_emoset("mini", num_images=20, seed=0, progress=False).iterdir()])"""
    where, files = run(python, "-I", "-c", code, cwd=tmp_path).splitlines()[-2:]
    assert Path(where).is_relative_to(env) and "info.json" in files
    shown = run(env / "bin/uniemo", "list", cwd=tmp_path)
    assert [p.stem for p in notebooks("experiments") if p.stem not in shown] == []
