"How the project is built: which room may know which, what an editor finds, how it reads."

import ast
import re
import statistics
import subprocess
import sys
import tokenize
from collections import Counter
from io import StringIO
from pathlib import Path

import pytest
from house import NBS, ROOT, SHELVES, directives, notebooks, read, text

PACKAGE = ROOT / "uniemo"
CHAPTERS = [
    "emotions",
    "backbones",
    "queries",
    "losses",
    "understanding",
    "correlation",
    "fusion",
    "conditioning",
    "joint",
    "space",
    "pipeline",
    "filtering",
    "feedback",
]
# stages train; the other chapters are models and what is done with them
STAGES = {"understanding", "joint", "feedback"}
MODELS = set(CHAPTERS) - STAGES


def module_of(path):
    "`uniemo/data/sets.py` -> `data.sets`."
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def modules():
    "Every module of the package that a notebook makes: name -> syntax tree."
    paths = [p for p in PACKAGE.rglob("*.py") if p.stem not in ("__init__", "_modidx", "interop")]
    paths += [p for p in PACKAGE.rglob("interop.py") if p.parent != PACKAGE]
    return {module_of(p): ast.parse(p.read_text(encoding="utf-8")) for p in paths}


def imported(name, tree):
    "Modules of the package that a module imports anywhere, its functions included."
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name[7:] for a in node.names if a.name.startswith("uniemo.")}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                parts = name.split(".")
                base = parts[: len(parts) - node.level]
                target = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            elif (node.module or "").startswith("uniemo."):
                target = node.module[7:]
            else:
                continue
            found.add(target)
    return found


ARROWS = {name: imported(name, tree) for name, tree in modules().items()}


def room(name):
    "The shelf of a module, or `method` for a chapter."
    top = name.split(".")[0]
    return top if top in SHELVES else "method"


def breaches(rooms, forbidden):
    "Arrows from `rooms` to what they may not know, as text."
    return [
        f"{name} -> {target}"
        for name, targets in sorted(ARROWS.items())
        if rooms(name)
        for target in sorted(targets)
        if forbidden(target)
    ]


def test_the_method_is_a_book_of_thirteen_chapters():
    chapters = [p.stem for p in notebooks() if p.parent == NBS and p.stem != "index"]
    method = [c for c in chapters if re.match(r"\d\d_", c)]
    assert [c[3:] for c in method] == CHAPTERS
    assert [c[:2] for c in method] == [f"{k:02d}" for k in range(1, 14)]


def test_measure_and_data_know_no_model():
    models = {m for m in ARROWS if room(m) == "method" and m != "emotions"}
    assert breaches(lambda m: room(m) in ("measure", "data"), models.__contains__) == []
    assert breaches(lambda m: room(m) in ("measure", "data"), lambda m: room(m) == "train") == []


def test_models_know_no_training():
    assert breaches(lambda m: m in MODELS, lambda m: room(m) == "train" or m in STAGES) == []


def test_training_knows_no_stage():
    chapter = {m for m in ARROWS if room(m) == "method"}
    assert breaches(lambda m: room(m) == "train", chapter.__contains__) == []


def test_nobody_knows_the_mini_world():
    assert breaches(lambda m: room(m) != "mini", lambda m: room(m) == "mini") == []


def test_arrows_make_no_circle():
    "Imports at the top of modules can be put in an order."
    left = {name: {t for t in targets if t in ARROWS} for name, targets in ARROWS.items()}
    while left:
        free = [name for name, targets in left.items() if not targets & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


# what our own rooms ask for, the lightest first; diffusers itself loads what it finds
ASKED = """
import builtins, sys
import uniemo
print([m for m in ("torch", "numpy", "pandas") if m in sys.modules])
import uniemo.measure.classification, uniemo.measure.intervals
import uniemo.measure.networks, uniemo.measure.pictures
print([m for m in ("scipy.stats", "seaborn", "accelerate") if m in sys.modules])
asked, plain = [], builtins.__import__
def spy(name, globals=None, *rest, **more):
    importer = (globals or {}).get("__name__", "")
    if importer.startswith("uniemo"):
        asked.append(name)
    return plain(name, globals, *rest, **more)
builtins.__import__ = spy
from uniemo import UniEmoPipeline
heavy = ("accelerate", "seaborn", "scipy", "papermill", "torchmetrics")
print([name for name in asked if name.split(".")[0] in heavy])
print([m for m in ("seaborn", "papermill", "torchmetrics") if m in sys.modules])
own = [m for m in sys.modules if m.startswith("uniemo.")]
print([m for m in own if m.startswith(("uniemo.train", "uniemo.mini", "uniemo.runs"))])
"""


def test_imports_are_light():
    "The package loads nothing, its measures no statistics, its pipeline no trainer."
    done = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[-6:-1] == ["[]"] * 5


STAY = """
from uniemo import UniEmoPipeline
from uniemo.correlation import CorrelationTable
from uniemo.data import EmoSet, check
from uniemo.filtering import facility_location
from uniemo.interop import load_emogen, load_uniemo
from uniemo.mini import write_emoset
from uniemo.queries import ExpertQueryModel
"""


def test_names_that_others_build_on_stay():
    exec(STAY, {})


# ---- what an editor finds

DEFINITIONS = {
    "pipe.generate": (
        "from uniemo import UniEmoPipeline\npipe = UniEmoPipeline.from_pretrained('mini')\n"
        "pipe.generate",
        ("pipeline", "generate"),
    ),
    "pipe.understand": (
        "from uniemo import UniEmoPipeline\npipe = UniEmoPipeline.from_pretrained('mini')\n"
        "pipe.understand",
        ("pipeline", "understand"),
    ),
    "dataset.subset": (
        "from uniemo.data import EmoSet\ndataset = EmoSet('x', 'train')\ndataset.subset",
        ("data.sets", "subset"),
    ),
    "Trainer.predict": (
        "from uniemo.train import Trainer\nTrainer.predict",
        ("train.trainer", "predict"),
    ),
    "JointStage.loss": (
        "from uniemo.joint import JointStage\nJointStage.loss",
        ("joint", "loss"),
    ),
    "a field of an output": (
        "from uniemo.queries import ExpertQueryOutput\nout = ExpertQueryOutput()\n"
        "out.scene_features",
        ("queries", "scene_features"),
    ),
    "a settings value": (
        "from uniemo.joint import JointConfig\nconfig = JointConfig(steps=1)\nconfig.margin",
        ("joint", "margin"),
    ),
}


@pytest.mark.parametrize("what", DEFINITIONS)
def test_go_to_definition(what):
    jedi = pytest.importorskip("jedi")
    code, (module, name) = DEFINITIONS[what]
    script = jedi.Script(code, project=jedi.Project(ROOT))
    lines = code.split("\n")
    found = script.goto(len(lines), len(lines[-1]), follow_imports=True)
    where = {(module_of(Path(d.module_path)), d.name) for d in found if d.module_path}
    assert where == {(module, name)}


# ---- how it reads


def code_cells(nb):
    "Sources of a notebook's code cells, without directives and magics."
    cells = [c for c in read(nb)["cells"] if c["cell_type"] == "code"]
    sources = [re.sub(r"^(#\||%|!).*$", "", text(c["source"]), flags=re.M).strip() for c in cells]
    return [s for s in sources if s]


def tokens_a_line(source):
    "Names, operators, numbers and strings of some code, divided by the lines that hold code."
    count, lines = 0, set()
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT)
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type in (*ignored, tokenize.DEDENT, tokenize.ENDMARKER):
            continue
        lines |= set(range(token.start[0], token.end[0] + 1))
        count += token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
    return count, len(lines)


def test_code_is_not_dense():
    "Tokens a line of code: at most 9 in the package, 10 in the experiments, which are calls."
    package = [p.read_text() for p in PACKAGE.rglob("*.py") if p.stem != "_modidx"]
    experiments = ["\n".join(code_cells(nb)) for nb in notebooks("experiments")]
    for sources, most in ((package, 9), (experiments, 10)):
        counts = [tokens_a_line(s) for s in sources]
        assert sum(c for c, _ in counts) / sum(n for _, n in counts) <= most


@pytest.mark.parametrize("nb", notebooks("experiments"), ids=lambda p: p.stem)
def test_an_experiment_defines_no_function(nb):
    trees = [ast.parse(s) for s in code_cells(nb)]
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Lambda)
    defined = [
        getattr(node, "name", "lambda")
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, kinds) and not (isinstance(node, ast.Lambda))
    ]
    assert defined == [], "what an experiment needs is a function of the library"


def test_quickstart_is_read_line_by_line():
    lines = [
        line for s in code_cells(NBS / "experiments/quickstart.ipynb") for line in s.split("\n")
    ]
    code = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    assert len(code) <= 60 and max(map(len, code)) <= 100


@pytest.mark.parametrize(
    "nb", [p for p in notebooks() if re.match(r"\d", p.name)], ids=lambda p: p.stem
)
def test_chapters_have_small_cells_pictures_and_exercises(nb):
    sizes = [len(s.split("\n")) for s in code_cells(nb)]
    assert statistics.median(sizes) <= 5, "one idea a cell"
    cells = read(nb)["cells"]
    outputs = [o for c in cells for o in c.get("outputs", [])]
    kinds = {kind for o in outputs for kind in o.get("data", {})}
    assert kinds & {"image/png", "image/jpeg"}, "a picture of the idea"
    assert any(re.search(r"^## Exercises", text(c["source"]), re.M) for c in cells)


def words_of(sources):
    "How often each word stands in some code."
    return Counter(re.findall(r"[A-Za-z_]\w*", "\n".join(sources)))


def test_few_names_are_exported_for_nobody():
    "What only its own room needs is `exporti`: of ten names, nine are used or shown somewhere."
    inside = {p: words_of([p.read_text(encoding="utf-8")]) for p in PACKAGE.rglob("*.py")}
    inside = {p: words for p, words in inside.items() if p.stem not in ("_modidx", "__init__")}
    # examples and assertions of notebooks, tests
    outside = words_of(p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("*.py"))
    for nb in notebooks():
        cells = [c for c in read(nb)["cells"] if c["cell_type"] == "code"]
        outside += words_of(text(c["source"]) for c in cells if not exports(c))
    in_modules = sum(inside.values(), Counter())
    names = [(p, name) for p in inside for name in exported(ast.parse(p.read_text("utf-8")))]
    unused = [
        name for p, name in names if in_modules[name] == inside[p][name] and not outside[name]
    ]
    assert len(unused) <= len(names) / 10, unused


def exports(cell):
    return directives(cell).keys() & {"export", "exports", "exporti"}


def exported(tree):
    "`__all__` of a module."
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return ast.literal_eval(node.value)
    return []


def test_public_names_are_documented():
    "Every public function and class of the package says what it is."
    silent = []
    for name, tree in modules().items():
        public = exported(tree)
        for node in tree.body:
            kinds = (ast.FunctionDef, ast.ClassDef)
            if isinstance(node, kinds) and node.name in public and not ast.get_docstring(node):
                silent.append(f"{name}.{node.name}")
    assert silent == []


def public_functions(body, inside=""):
    "Functions and methods (name, node) that others may call, of a module's or a class's body."
    for node in body:
        name = getattr(node, "name", "_")
        if isinstance(node, ast.FunctionDef) and (
            name[0] != "_" or name in ("__init__", "__call__")
        ):
            yield inside + name, node
        elif isinstance(node, ast.ClassDef) and name[0] != "_":
            yield from public_functions(node.body, f"{name}.")


def without_types(function, method):
    "What of a signature has no annotation: `**kwargs` may go without, `__init__` returns nothing."
    parameters = [*function.args.posonlyargs, *function.args.args]
    static = any(getattr(d, "id", "") == "staticmethod" for d in function.decorator_list)
    parameters = parameters[method and not static :] + function.args.kwonlyargs
    bare = [p.arg for p in parameters if p.annotation is None]
    return bare + ["->"] * (function.returns is None and function.name != "__init__")


def test_public_signatures_are_annotated():
    bare = [
        f"{module}.{name}: {', '.join(missing)}"
        for module, tree in modules().items()
        for name, function in public_functions(tree.body)
        if (missing := without_types(function, "." in name))
    ]
    assert bare == [], "say their types; `Any` where the class cannot be imported there"
