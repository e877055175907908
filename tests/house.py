"The house's chores: side bar, README and site from the notebooks. `python tests/house.py sidebar readme docs`, `python tests/house.py publish RUN_FOLDER`; test_house.py checks their results."
import base64, hashlib, html, json, posixpath, re, shutil, subprocess, sys
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/"nbs"
EXPERIMENTS = "quickstart tour understanding experts joint evaluate controls feedback emoset pretrain_clip pretrain_diffusion pretrain_judge".split()  # reading order; others follow by name

def read(path): return json.loads(Path(path).read_text(encoding="utf-8"))
def text(field): return field if isinstance(field, str) else "".join(field)

def notebooks(folder=None):
    "Every committed notebook under `nbs` (or in one of its folders), in reading order."
    def hidden(p): return any(o[0] in "._" for o in p.relative_to(NBS).parts)
    def key(p): return len(p.relative_to(NBS).parts), p.stem != "index", EXPERIMENTS.index(p.stem) if p.stem in EXPERIMENTS else 99, p.name
    return sorted((p for p in (NBS/(folder or "")).rglob("*.ipynb") if not hidden(p)), key=key)

# ---- side bar

def sidebar():
    "Text of `nbs/sidebar.yml`: Home, and a shelf each for experiments, the library's notebooks and benchmarks."
    shelves = {"Experiments": notebooks("experiments"), "Library": [p for p in notebooks() if p.parent == NBS and p.stem != "index"],
               "Benchmarks": notebooks("benchmarks")}
    out = ["website:", "  sidebar:", "    contents:", "      - {text: Home, href: index.ipynb}"]
    for name, nbs in shelves.items():
        if nbs: out += [f'      - section: "{name}"', "        contents:", *[f"          - {p.relative_to(NBS).as_posix()}" for p in nbs]]
    return "\n".join(out) + "\n"

# ---- README

DIRECTIVE = re.compile(r"^#\|\s*(\S+?):?(?:\s+(.*))?$", re.M)

def directives(cell): return {k: v for k, v in DIRECTIVE.findall(text(cell["source"]))}

def from_root(md): return re.sub(r"(\]\()(?!https?:|#|mailto:|/)([^)\s]+)", lambda m: m[1] + posixpath.normpath("nbs/" + m[2]), md.strip())

def output_md(out, pictures):
    "Markdown of one output; pictures are collected as `{file name: bytes}`."
    if out["output_type"] == "stream": return "\n".join("    " + o for o in text(out["text"]).rstrip().splitlines())
    data = out.get("data", {})
    if "image/png" in data:
        name = f"index-{len(pictures) + 1}.png"
        pictures[name] = base64.b64decode(text(data["image/png"]))
        return f"![](nbs/images/{name})"
    if "text/markdown" in data: return from_root(text(data["text/markdown"]))
    return "\n".join("    " + o for o in text(data.get("text/plain", "")).rstrip().splitlines())

def readme():
    "`(text of README.md, {name: bytes of its pictures})`, from `nbs/index.ipynb` and its outputs; links are made to start at the repository's root."
    parts, pictures = ["<!-- made from nbs/index.ipynb by `make readme`: edit there -->"], {}
    for cell in read(NBS/"index.ipynb")["cells"]:
        src, opts = text(cell["source"]), directives(cell)
        if cell["cell_type"] == "markdown":
            parts.append(from_root(src))
        elif cell["cell_type"] == "code" and "hide" not in opts:
            code = DIRECTIVE.sub("", src).strip()
            if code and opts.get("echo") != "false": parts.append(f"```python\n{code}\n```")
            parts += filter(None, (output_md(o, pictures) for o in cell["outputs"]))
    return "\n\n".join(parts) + "\n", pictures

def write_readme():
    body, pictures = readme()
    (ROOT/"README.md").write_text(body, encoding="utf-8")
    for old in (NBS/"images").glob("index-*.png"): old.unlink()
    for name, data in pictures.items():
        (NBS/"images").mkdir(exist_ok=True)
        (NBS/"images"/name).write_bytes(data)

# ---- site

MATH = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)
KATEX = re.compile(r'<(?:link|script)[^>]*katex[^>]*>(?:</script>)?\s*')

def mathml(page):
    "A page whose formulas are MathML, which browsers draw without a script or a network."
    from latex2mathml.converter import convert
    def one(m):
        tex = re.sub(r"\{(aligned|align|split)\}", "{align*}", html.unescape(m[2]).strip())
        out = convert(tex, display="inline" if m[1] == "inline" else "block")
        if "<mi>&</mi>" in out or re.search(r">\\[a-zA-Z]+<", out): raise ValueError(f"this formula cannot be drawn without a script, write it more simply: {tex}")
        return out
    return KATEX.sub("", MATH.sub(one, page))

def local_links(site, cfg):
    "API links lead to this site's own pages, not to the published ones; a method without an entry of its own is found under its class."
    api = re.compile(rf'href="{re.escape(cfg.doc_host + cfg.doc_baseurl)}/([^"#]*)(?:#([^"]*))?"')
    ids = {p.relative_to(site).as_posix(): parse(p).ids for p in site.rglob("*.html")}
    for name in ids:
        def one(m):
            anchor = m[2] or ""
            while anchor and anchor not in ids.get(m[1], ()): anchor = anchor.rpartition(".")[0]
            return f'href="{posixpath.relpath(m[1], posixpath.dirname(name) or ".")}{anchor and "#" + anchor}"'
        (site/name).write_text(api.sub(one, (site/name).read_text(encoding="utf-8")), encoding="utf-8")

def without_numbers(proc):
    "`00_emotions.ipynb` becomes `emotions.ipynb` in the folder of processed notebooks, and so in links: the addresses that nbdev's `output-file` promises."
    names = {p.name: re.sub(r"^\d+[a-zA-Z0-9]*_", "", p.name) for p in proc.rglob("*.ipynb")}
    moved = re.compile("|".join(rf"(?<![\w-]){re.escape(a)}" for a, b in names.items() if a != b) or "$^")
    for p in [*proc.rglob("*.ipynb"), *proc.glob("*.yml")]:
        src = moved.sub(lambda m: names[m[0]], p.read_text(encoding="utf-8"))
        p.write_text(re.sub(r"output-file: [\w.-]+\\n", "", src), encoding="utf-8")
        if p.name in names: p.rename(p.with_name(names[p.name]))

def process():
    """Notebooks ready to render, in `_proc`: nbdev's own processing, except that API entries are made from the imported module and no cell of a notebook is run
    (nbdev runs each cell that has an import in it, whatever else it does)."""
    import nbdev.processors as steps, nbdev.serve as serve
    from nbdev.doclinks import _get_exps
    from nbdev.quarto import refresh_quarto_yml

    class Entries(steps.Processor):
        def begin(self):
            self.shell = steps.CaptureShell()
            module = next((text(c["source"]).split("default_exp")[1].split()[0] for c in self.nb.cells if c.cell_type == "code" and "default_exp" in text(c["source"] or "")), None)
            self.shell.run_cell("from nbdev.showdoc import show_doc")
            if module: self.shell.run_cell(f"import importlib; globals().update(vars(importlib.import_module('uniemo.{module}')))")

        def cell(self, cell):
            if not (cell["source"] and steps._is_showdoc(cell)): return
            self.shell.cell(cell)
            if self.shell.exc: raise RuntimeError(f"{self.nb.path_}: {cell.source}") from self.shell.exc
            name = re.search(r"show_doc\((?:\w+\.)?([\w.]+)", text(cell["source"]))[1]
            for data in (o.get("data", {}) for o in cell.outputs):  # nbdev looks for the line under another name, and writes None
                for kind, md in data.items(): data[kind] = re.sub(r"(\w+/\w+\.py)#LNone", lambda m: f"{m[1]}#L{_get_exps(m[1]).get(name, 1)}", text(md))

    class Filter(serve.FilterDefaults):
        def base_procs(self): return [Entries if o is steps.exec_show_docs else o for o in super().base_procs()]

    refresh_quarto_yml()
    (NBS/"sidebar.yml").write_text(sidebar())
    default, serve.FilterDefaults = serve.FilterDefaults, Filter
    try: proc = serve.proc_nbs(NBS, n_workers=0, force=True)
    finally: serve.FilterDefaults = default
    without_numbers(proc)
    return proc

def docs():
    "Build the site into `_docs` without Quarto and without a network; raises where a link is broken. Returns the folder."
    from nbdev.config import get_config
    from smalldocs.cli import main as smalldocs
    cfg, proc, site = get_config(path=ROOT), process(), ROOT/"_docs"
    if smalldocs(["render", str(proc), "--quiet"]): raise SystemExit("the site could not be built")
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(proc/"_docs", site)
    for p in site.rglob("*.html"): p.write_text(mathml(p.read_text(encoding="utf-8")), encoding="utf-8")
    local_links(site, cfg)
    shutil.copy(files("ziamath")/"fonts/STIXTwoMath-Regular.ttf", site/"site_libs")  # formulas look the same on every machine
    if bad := broken_links(site): raise SystemExit("broken links:\n" + "\n".join(bad))
    return site

def quarto_docs():
    "The same site by Quarto, where that is installed: what is published."
    proc = process()
    subprocess.run(["quarto", "render", str(proc), "--no-cache"], check=True)
    shutil.rmtree(ROOT/"_docs", ignore_errors=True)
    shutil.move(proc/"_docs", ROOT/"_docs")

class Links(HTMLParser):
    "Collects a page's ids, its links and what it loads."
    def __init__(self): super().__init__(); self.ids, self.links, self.loads = set(), [], []
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"): self.links.append(a["href"])
        if tag in ("img", "script", "iframe") and a.get("src"): self.loads.append(a["src"])
        if tag == "link" and a.get("rel") in ("stylesheet", "icon", "preload"): self.loads.append(a["href"])

def parse(path):
    parser = Links()
    parser.feed(Path(path).read_text(encoding="utf-8"))
    return parser

def broken_links(site):
    "One line for each link to a page, file or heading that the site does not hold, and for each thing loaded from elsewhere."
    pages = {p.resolve(): parse(p) for p in Path(site).rglob("*.html")}
    bad = []
    for path, page in pages.items():
        here = path.relative_to(Path(site).resolve()).as_posix()
        bad += [f"{here}: loads {o[:90]} over the network" for o in page.loads if re.match(r"(https?:)?//", o)]
        for link in page.links + page.loads:
            if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//", link): continue
            target, _, anchor = link.partition("#")
            file = (path.parent/unquote(target.partition("?")[0])).resolve() if target else path
            if file.is_dir(): file = file/"index.html"
            if not file.exists(): bad.append(f"{here}: {link}: no such page")
            elif anchor and file in pages and unquote(anchor) not in pages[file].ids: bad.append(f"{here}: {link}: no such heading")
    return sorted(set(bad))

# ---- results that come with the package

def publish(folder):
    "Copy the tables of a finished run into the package, beside the settings and what the run's folder tells of its origin."
    folder = Path(folder); status, env = read(folder/"status.json"), read(folder/"env.json")
    target = ROOT/"uniemo"/"assets"/"results"/status["experiment"]; shutil.rmtree(target, ignore_errors=True); target.mkdir(parents=True)
    tables = sorted(p.name for p in folder.glob("*.csv"))
    for name in [*tables, "settings.json"]: shutil.copyfile(folder/name, target/name)
    packages = {k: env["packages"][k] for k in ("torch", "diffusers", "transformers", "accelerate", "numpy") if k in env["packages"]}
    origin = dict(run=folder.name, commit=env["commit"], dirty=env["dirty"], started=status["started"], seconds=status["seconds"], python=env["python"], platform=env["platform"], cpus=env["cpus"], device=env["device"], packages=packages,
                  sha256={n: hashlib.sha256((target/n).read_bytes()).hexdigest() for n in tables})
    (target/"provenance.json").write_text(json.dumps(origin, indent=1) + "\n")

if __name__ == "__main__":
    if sys.argv[1:2] == ["publish"]: [publish(o) for o in sys.argv[2:]]; raise SystemExit
    chores = dict(sidebar=lambda: (NBS/"sidebar.yml").write_text(sidebar()), readme=write_readme, docs=lambda: print(f"{docs()/'index.html'}"), quarto=quarto_docs)
    if unknown := [o for o in sys.argv[1:] if o not in chores]: raise SystemExit(f"unknown chore {unknown[0]!r}: one of {', '.join(chores)}")
    for o in sys.argv[1:]: chores[o]()
