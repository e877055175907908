"""The house's chores: shelves, side bar, README and site, all made from the notebooks.

`python tests/house.py shelves sidebar readme docs`, `python tests/house.py publish RUN_FOLDER`;
test_house.py checks their results.
"""

import ast
import base64
import hashlib
import html
import json
import posixpath
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import partial
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from urllib.parse import unquote

from pages import describe_pictures, llms, names_page
from play import add_play
from reference import entry

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
BLOB = "https://github.com/uniemo/uniemo/blob/main"
EXPERIMENTS = [
    "quickstart",
    "tour",
    "understanding",
    "experts",
    "joint",
    "evaluate",
    "controls",
    "feedback",
    "emoset",
    "pretrain_clip",
    "pretrain_autoencoder",
    "pretrain_diffusion",
    "pretrain_fewsteps",
    "pretrain_judge",
]  # reading order; others follow by name


SHELVES = dict(
    data="Images, data sets and tables: reading, checking, mixing, batches.",
    train="One trainer for every stage: settings, loop, callbacks.",
    measure="Scores, intervals, image metrics, neighbours, plots.",
    mini="The painted world, its foundation models, its judge and its stages.",
    explore="A page to play with, live controls, emotions from text and sound.",
    commands="What is typed every day: read photographs, make images, look after data and models.",
    runs="Runs in folders: parameters, execution, store, command line, estimates.",
    diffusion="What a frozen diffusion model does: sampling, noise, latents, warm start.",
    files="Files that the package ships, writes, and that others made.",
)


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def text(field):
    return field if isinstance(field, str) else "".join(field)


def notebooks(folder=None):
    "Every committed notebook under `nbs` (or in one of its folders), in reading order."

    def hidden(p):
        return any(o[0] in "._" for o in p.relative_to(NBS).parts)

    def key(p):
        place = EXPERIMENTS.index(p.stem) if p.stem in EXPERIMENTS else 99
        return len(p.relative_to(NBS).parts), p.parent.name, p.stem != "index", place, p.name

    return sorted((p for p in (NBS / (folder or "")).rglob("*.ipynb") if not hidden(p)), key=key)


# ---- side bars

START = ["index", "start/install", "start/first", "start/words"]
TUTORIALS = [
    "tutorials/read_photo",
    "tutorials/make_images",
    "tutorials/own_data",
    "tutorials/own_backbone",
    "diffusion/own_pipeline",
    "tutorials/emoset_gpus",
    "tutorials/filter_feedback",
    "tutorials/read_claim",
]
RECIPES = ["howto/recipes", "train/cluster", "runs/sweeps"]
ABOUT = ["about/authors", "about/faq", "about/citing"]
# shelves whose rooms are read to do something, not to look something up
DOING = {"explore": "Explore", "commands": "Everyday commands"}
NAMES_PAGE = "reference/names.qmd"  # written while the site is built


def in_folder(*names):
    "Notebooks that stand in these places, in this order, and others of their folders after them."
    first = [NBS / f"{name}.ipynb" for name in names]
    folders = {name.partition("/")[0] for name in names} & {"start", "tutorials", "howto", "about"}
    rest = [p for folder in sorted(folders) for p in notebooks(folder) if p not in first]
    return [p for p in first + rest if p.exists()]


def shelves_of_the_site():
    """{shelf: {section: notebooks}}; a section without a name stands at the top.

    A notebook stands once: a room that a tutorial or a recipe is made of is not repeated in the
    reference, whose first page names everything.
    """
    chapters = [p for p in notebooks() if p.parent == NBS and p.stem != "index"]
    doing = {title: notebooks(name) for name, title in DOING.items()}
    site = {
        "Get started": {"": in_folder(*START)},
        "Tutorials": {"": in_folder(*TUTORIALS)},
        "How-to": {"": in_folder(*RECIPES), **doing},
        "Method": {"": chapters},
        "Reference": {},
        "Experiments": {"": notebooks("experiments"), "Benchmarks": notebooks("benchmarks")},
        "More": {"": in_folder(*ABOUT)},
    }
    placed = {p for shelf in site.values() for nbs in shelf.values() for p in nbs}
    for name in SHELVES:
        rooms = [p for p in notebooks(name) if p not in placed]
        if rooms:
            site["Reference"][name] = rooms
    return site


def sidebar():
    "Text of `nbs/sidebar.yml`: a side bar for each shelf of the site."
    bars = []
    for shelf, sections in shelves_of_the_site().items():
        contents = [NAMES_PAGE] if shelf == "Reference" else []
        for title, nbs in sections.items():
            pages = [p.relative_to(NBS).as_posix() for p in nbs]
            contents += [dict(section=title, contents=pages)] if title else pages
        name = shelf.lower().replace(" ", "-")
        bars.append(dict(id=name, style="floating", contents=contents))
    import yaml

    return yaml.safe_dump(dict(website=dict(sidebar=bars)), sort_keys=False)


# ---- shelves of the package


def shelf_names(folder):
    "The names that a shelf gives, by room; one that two rooms have is asked of the room."
    table = {}
    for path in sorted(folder.glob("*.py")):
        if path.stem in ("__init__", "cli"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                table[path.stem] = sorted(ast.literal_eval(node.value))
    rooms_of = Counter(name for names in table.values() for name in names)
    return {room: [n for n in names if rooms_of[n] == 1] for room, names in table.items()}


def write_shelves():
    "The `__init__.py` of each shelf: its rooms' names, read when they are asked for."
    for shelf, doc in SHELVES.items():
        folder = ROOT / "uniemo" / shelf
        table = {room: names for room, names in shelf_names(folder).items() if names}
        rooms = [f"    from .{room} import {', '.join(names)}" for room, names in table.items()]
        lines = [
            f'"""{doc}"""',
            "",
            "# AUTOGENERATED by `make prepare` from the rooms' own names",
            "from typing import TYPE_CHECKING",
            "",
            "import lazy_loader",
            "",
            "if TYPE_CHECKING:",
            *rooms,
            "",
            f"_rooms = {table!r}",
            "__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs=_rooms)",
        ]
        (folder / "__init__.py").write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---- README

DIRECTIVE = re.compile(r"^#\|\s*(\S+?):?(?:\s+(.*))?$", re.M)


def directives(cell):
    return dict(DIRECTIVE.findall(text(cell["source"])))


def from_root(md):
    return re.sub(
        r"(\]\()(?!https?:|#|mailto:|/)([^)\s]+)",
        lambda m: m[1] + posixpath.normpath("nbs/" + m[2]),
        md.strip(),
    )


def output_md(out, pictures, alt=""):
    "Markdown of one output; pictures are collected as `{file name: bytes}`."
    if out["output_type"] == "stream":
        return "\n".join("    " + o for o in text(out["text"]).rstrip().splitlines())
    data = out.get("data", {})
    # a progress bar says nothing when it is over
    if "application/vnd.jupyter.widget-view+json" in data:
        return ""
    if "image/png" in data:
        name = f"index-{len(pictures) + 1}.png"
        pictures[name] = base64.b64decode(text(data["image/png"]))
        return f"![{alt}](nbs/images/{name})"
    if "text/markdown" in data:
        return from_root(text(data["text/markdown"]))
    return "\n".join("    " + o for o in text(data.get("text/plain", "")).rstrip().splitlines())


def readme():
    "README.md and its pictures {name: bytes}, from `nbs/index.ipynb`; links start at the root."
    parts, pictures = ["<!-- made from nbs/index.ipynb by `make readme`: edit there -->"], {}
    for cell in read(NBS / "index.ipynb")["cells"]:
        src, opts = text(cell["source"]), directives(cell)
        if cell["cell_type"] == "markdown":
            parts.append(from_root(src))
        elif cell["cell_type"] == "code" and "hide" not in opts:
            code = DIRECTIVE.sub("", src).strip()
            if code and opts.get("echo") != "false":
                parts.append(f"```python\n{code}\n```")
            alt = opts.get("fig-alt", "").strip('"')
            parts += filter(None, (output_md(o, pictures, alt) for o in cell["outputs"]))
    return "\n\n".join(parts) + "\n", pictures


def write_readme():
    body, pictures = readme()
    (ROOT / "README.md").write_text(body, encoding="utf-8")
    for old in (NBS / "images").glob("index-*.png"):
        old.unlink()
    for name, data in pictures.items():
        (NBS / "images").mkdir(exist_ok=True)
        (NBS / "images" / name).write_bytes(data)


# ---- site

MATH = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)
FOREIGN_STYLE = re.compile(r"@import\s+url\([\"']?(?:https?:)?//[^)]*\);")
SIGNS = str.maketrans("<>", "\ue000\ue001")
COLUMNS = r"\s*".join(f"<th[^>]*>{name}</th>" for name in ("Name", "Type", "Default", "Meaning"))
# a table of parameters, told from others by its columns
PARAMETERS = re.compile(
    rf'<div class="sd-table">(?=\s*<table[^>]*>\s*<thead>\s*<tr[^>]*>\s*{COLUMNS})'
)
KATEX = re.compile(r"<(?:link|script)[^>]*katex[^>]*>(?:</script>)?\s*")


def mathml(page):
    "A page whose formulas are MathML, which browsers draw without a script or a network."
    from latex2mathml.converter import convert

    def one(m):
        tex = re.sub(r"\{(aligned|align|split)\}", "{align*}", html.unescape(m[2]).strip())
        # `<emotion>` in a text is no tag; a large bar is a bar
        tex = re.sub(r"\\text\{[^}]*\}", lambda o: o[0].translate(SIGNS), tex)
        tex = re.sub(r"\\[bB]ig[lr]?\s*\\\|", r"\\|", tex)
        out = convert(tex, display="inline" if m[1] == "inline" else "block")
        out = out.replace("\ue000", "&lt;").replace("\ue001", "&gt;")
        if "<mi>&</mi>" in out or re.search(r">\\([a-zA-Z]+|\|)<", out):
            raise ValueError(
                f"this formula cannot be drawn without a script, write it more simply: {tex}"
            )
        return out

    return KATEX.sub("", MATH.sub(one, page))


def local_links(site, cfg):
    "API links lead to this site's own pages; a method without an entry is found under its class."
    api = re.compile(rf'href="{re.escape(cfg.doc_host + cfg.doc_baseurl)}/([^"#]*)(?:#([^"]*))?"')
    ids = {p.relative_to(site).as_posix(): parse(p).ids for p in site.rglob("*.html")}

    def local(m, name):
        anchor = m[2] or ""
        while anchor and anchor not in ids.get(m[1], ()):
            anchor = anchor.rpartition(".")[0]
        page = posixpath.relpath(m[1], posixpath.dirname(name) or ".")
        return f'href="{page}{anchor and "#" + anchor}"'

    for name in ids:
        body = (site / name).read_text(encoding="utf-8")
        (site / name).write_text(api.sub(partial(local, name=name), body), encoding="utf-8")


def without_numbers(proc):
    "`01_emotions.ipynb` becomes `emotions.ipynb`, and so in links: what `output-file` promises."
    names = {p.name: re.sub(r"^\d+[a-zA-Z0-9]*_", "", p.name) for p in proc.rglob("*.ipynb")}
    moved = re.compile(
        "|".join(rf"(?<![\w-]){re.escape(a)}" for a, b in names.items() if a != b) or "$^"
    )
    for p in [*proc.rglob("*.ipynb"), *proc.glob("*.yml")]:
        src = moved.sub(lambda m: names[m[0]], p.read_text(encoding="utf-8"))
        p.write_text(re.sub(r"output-file: [\w.-]+\\n", "", src), encoding="utf-8")
        if p.name in names:
            p.rename(p.with_name(names[p.name]))


def page_of(path):
    "`nbs/01_emotions.ipynb` is the page `emotions.html`."
    path = path.relative_to(NBS)
    return path.with_name(re.sub(r"^\d+[a-zA-Z0-9]*_", "", path.stem) + ".html").as_posix()


def write_names(proc):
    "The page of all names, beside the notebooks."
    page = proc / NAMES_PAGE
    page.parent.mkdir(exist_ok=True)
    pages = {page_of(p): read(p) for p in notebooks()}
    page.write_text(names_page(pages, ROOT / "uniemo"), encoding="utf-8")


def write_llms(site, cfg):
    "`llms.txt` at the site's root."
    shelves = {}
    for shelf, sections in shelves_of_the_site().items():
        shelves[shelf] = []
        for path in [p for nbs in sections.values() for p in nbs]:
            title, _, said = text(read(path)["cells"][0]["source"]).partition("> ")
            shelves[shelf].append((page_of(path), title.strip("# \n"), said.strip()))
    host = cfg.doc_host + cfg.doc_baseurl
    (site / "llms.txt").write_text(llms(cfg.title, cfg.description, shelves, host))


def tell_names(site):
    """In the search an entry of the reference says that it is one.

    Short entries come first there: without this, "LoRA" finds `load_lora` before the pages
    that tell how a LoRA is used.
    """
    index = site / "search.json"
    entries = json.loads(index.read_text(encoding="utf-8"))
    for found in entries:
        section = found["section"] or ""
        if "_" in section and " " not in section:
            found["section"] = f"{section}, a name in the reference"
    index.write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")


def process():
    """Notebooks ready to render, in `_proc`: nbdev's own processing, but no cell is run.

    API entries are read from the source (`reference.py`); nbdev would run each cell that has an
    import in it, whatever else it does.
    """
    import nbdev.processors as steps
    import nbdev.serve as serve
    from fastcore.basics import AttrDict
    from nbdev.quarto import refresh_quarto_yml

    class Entries(steps.Processor):
        def begin(self):
            cells = [c for c in self.nb.cells if c.cell_type == "code"]
            told = [text(c["source"]) for c in cells if "default_exp" in text(c["source"] or "")]
            self.module = told[0].split("default_exp")[1].split()[0] if told else ""

        def cell(self, cell):
            if not (cell["source"] and steps._is_showdoc(cell)):
                return
            name = re.search(r"show_doc\(([\w.]+)", text(cell["source"]))[1]
            place = self.module.replace(".", "/") + ".py"
            made = entry(ROOT / "uniemo" / place, name, f"{BLOB}/uniemo/{place}")
            if made is None:
                raise RuntimeError(f"{self.nb.path_}: uniemo.{self.module} defines no {name}")
            data = AttrDict({"text/markdown": made})
            cell.outputs = [AttrDict(output_type="display_data", metadata=AttrDict(), data=data)]

    class Filter(serve.FilterDefaults):
        def base_procs(self):
            return [Entries if o is steps.exec_show_docs else o for o in super().base_procs()]

    refresh_quarto_yml()
    (NBS / "sidebar.yml").write_text(sidebar())
    default, serve.FilterDefaults = serve.FilterDefaults, Filter
    try:
        proc = serve.proc_nbs(NBS, n_workers=0, force=True)
    finally:
        serve.FilterDefaults = default
    write_names(proc)
    describe_pictures(proc)
    without_numbers(proc)
    return proc


def without_foreign_fonts(site):
    "Themes ask another host for their fonts; here those of the machine do."
    for p in site.rglob("*.css"):
        p.write_text(FOREIGN_STYLE.sub("", p.read_text(encoding="utf-8")), encoding="utf-8")


def docs():
    "Build the site into `_docs`, offline and without Quarto; a broken link stops it."
    from nbdev.config import get_config
    from smalldocs.cli import main as smalldocs

    cfg, proc, site = get_config(path=ROOT), process(), ROOT / "_docs"
    if smalldocs(["render", str(proc), "--quiet"]):
        raise SystemExit("the site could not be built")
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(proc / "_docs", site)
    for p in site.rglob("*.html"):
        page = mathml(p.read_text(encoding="utf-8"))
        page = PARAMETERS.sub('<div class="sd-table parameters">', page)
        p.write_text(page, encoding="utf-8")
    local_links(site, cfg)
    add_play(site)
    write_llms(site, cfg)
    tell_names(site)
    without_foreign_fonts(site)
    # formulas look the same on every machine
    shutil.copy(files("ziamath") / "fonts/STIXTwoMath-Regular.ttf", site / "site_libs")
    if bad := broken_links(site):
        raise SystemExit("broken links:\n" + "\n".join(bad))
    return site


def quarto_docs():
    "The same site by Quarto, where that is installed: what is published."
    from nbdev.config import get_config

    proc = process()
    subprocess.run(["quarto", "render", str(proc), "--no-cache"], check=True)
    shutil.rmtree(ROOT / "_docs", ignore_errors=True)
    shutil.move(proc / "_docs", ROOT / "_docs")
    add_play(ROOT / "_docs")
    write_llms(ROOT / "_docs", get_config(path=ROOT))
    without_foreign_fonts(ROOT / "_docs")


class Links(HTMLParser):
    "Collects a page's ids, its links and what it loads."

    def __init__(self):
        super().__init__()
        self.ids, self.links, self.loads = set(), [], []

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if tag in ("img", "script", "iframe") and a.get("src"):
            self.loads.append(a["src"])
        if tag == "link" and a.get("rel") in ("stylesheet", "icon", "preload"):
            self.loads.append(a["href"])


def parse(path):
    parser = Links()
    parser.feed(Path(path).read_text(encoding="utf-8"))
    return parser


def broken_links(site):
    "A line for each link to what the site does not hold, and for each thing loaded from elsewhere."
    pages = {p.resolve(): parse(p) for p in Path(site).rglob("*.html")}
    bad = []
    for path, page in pages.items():
        here = path.relative_to(Path(site).resolve()).as_posix()
        bad += [
            f"{here}: loads {o[:90]} over the network"
            for o in page.loads
            if re.match(r"(https?:)?//", o)
        ]
        for link in page.links + page.loads:
            if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//", link):
                continue
            target, _, anchor = link.partition("#")
            file = (path.parent / unquote(target.partition("?")[0])).resolve() if target else path
            if file.is_dir():
                file = file / "index.html"
            if not file.exists():
                bad.append(f"{here}: {link}: no such page")
            elif anchor and file in pages and unquote(anchor) not in pages[file].ids:
                bad.append(f"{here}: {link}: no such heading")
    return sorted(set(bad))


# ---- results that come with the package


def publish(folder):
    "Copy the tables of a finished run into the package, with its settings and its origin."
    folder = Path(folder)
    status, env = read(folder / "status.json"), read(folder / "env.json")
    target = ROOT / "uniemo" / "assets" / "results" / status["experiment"]
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    tables = sorted(p.name for p in folder.glob("*.csv"))
    for name in [*tables, "settings.json"]:
        shutil.copyfile(folder / name, target / name)
    packages = {
        k: env["packages"][k]
        for k in ("torch", "diffusers", "transformers", "accelerate", "numpy")
        if k in env["packages"]
    }
    origin = dict(
        run=folder.name,
        commit=env["commit"],
        dirty=env["dirty"],
        started=status["started"],
        seconds=status["seconds"],
        python=env["python"],
        platform=env["platform"],
        cpus=env["cpus"],
        device=env["device"],
        packages=packages,
        sha256={n: hashlib.sha256((target / n).read_bytes()).hexdigest() for n in tables},
    )
    (target / "provenance.json").write_text(json.dumps(origin, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["publish"]:
        [publish(o) for o in sys.argv[2:]]
        raise SystemExit
    chores = dict(
        shelves=write_shelves,
        sidebar=lambda: (NBS / "sidebar.yml").write_text(sidebar()),
        readme=write_readme,
        docs=lambda: print(f"{docs() / 'index.html'}"),
        quarto=quarto_docs,
    )
    if unknown := [o for o in sys.argv[1:] if o not in chores]:
        raise SystemExit(f"unknown chore {unknown[0]!r}: one of {', '.join(chores)}")
    for o in sys.argv[1:]:
        chores[o]()
