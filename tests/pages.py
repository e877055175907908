"""What the site has beside its notebooks: a page of all names, texts for pictures, llms.txt."""

import ast
import json
import re
from pathlib import Path

from reference import public_names

PICTURES = ("image/png", "image/jpeg", "image/svg+xml")
TITLES = ("title", "set_title", "suptitle")


def text(field):
    return field if isinstance(field, str) else "".join(field)


# ---- all names of the library

INTRODUCTION = """
Names that most people need: [`UniEmoPipeline`](../pipeline.html#uniemopipeline) reads and paints,
[`EmotionWords`](../diffusion/words.html#emotionwords) serves any diffusion pipeline, and
[`ExpertQueryModel`](../queries.html#expertquerymodel) is the encoder. The stages are
[`train_understanding`](../understanding.html#train_understanding),
[`train_joint`](../joint.html#train_joint), and
[`generate_candidates`](../feedback.html#generate_candidates) with
[`select`](../feedback.html#select).

Each entry has its signature with types, a table of what each parameter means, and, for a class,
its methods. The commands are told in a shell: `uniemo --help`.
"""


def module_of(notebook):
    "`data.sets` for the notebook that makes `uniemo/data/sets.py`, else None."
    for cell in notebook["cells"]:
        if found := re.search(r"^#\|\s*default_exp (\S+)", text(cell["source"]), re.M):
            return found[1]
    return None


def names_page(pages, package):
    "Markdown of the reference's first page; `pages` is {page's address: notebook}."
    lines = ["---", "title: All names", "description: Every public name, by its module", "---", ""]
    lines += [INTRODUCTION, ""]
    for page, notebook in pages.items():
        module = module_of(notebook)
        if module is None:
            continue
        names = public_names(Path(package) / (module.replace(".", "/") + ".py"))
        rows = [(name, said) for name, said in names.items() if said]
        if rows:
            lines += [f"## uniemo.{module}", ""]
            for name, said in rows:
                # a link of the text starts at its own page
                said = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(said.split()))
                lines.append(f"- [`{name}`](../{page}#{name.lower()}): {said}")
            lines.append("")
    return "\n".join(lines)


# ---- every picture has a text


def drawn_title(code):
    "The title that code gives its picture, where it is written out."
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return ""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        found = [k.value for k in node.keywords if k.arg == "title"]
        if getattr(node.func, "attr", "") in TITLES and node.args:
            found.append(node.args[0])
        for value in found:
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                return value.value
    return ""


def plain(markdown):
    "Markdown without its signs."
    markdown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    return " ".join(re.sub(r"[*`$#>|]", "", markdown).split())


def last_words(markdown):
    "The heading and the last sentence of a text cell, as far as it has them."
    blocks = [
        b.strip() for b in re.split(r"\n\s*\n", re.sub(r"```.*?```", "", markdown, flags=re.S))
    ]
    headings = [plain(b.splitlines()[0]) for b in blocks if b.startswith("#")]
    prose = [plain(b) for b in blocks if b and b[0] not in "#|-:<!"]
    sentence = re.split(r"(?<=[.:?!])\s+", prose[-1])[-1].rstrip(":.") if prose else ""
    return headings[-1] if headings else "", sentence


def picture_texts(notebook):
    "Give each picture without a text the title that it bears, or what was said before it."
    heading = sentence = ""
    for cell in notebook["cells"]:
        code = text(cell["source"])
        if cell["cell_type"] == "markdown":
            new, sentence = last_words(code)
            heading = new or heading
        elif "fig-alt" not in code and any(
            kind in out.get("data", {}) for out in cell.get("outputs", []) for kind in PICTURES
        ):
            title = plain(drawn_title(code))
            words = title or ": ".join(filter(None, [heading, sentence])) or "a figure"
            words = words.replace("\\", "").replace('"', "'")[:300]
            cell["source"] = f'#| fig-alt: "{words}"\n{code}'


def describe_pictures(folder):
    for path in Path(folder).rglob("*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        picture_texts(notebook)
        path.write_text(json.dumps(notebook, ensure_ascii=False), encoding="utf-8")


# ---- for machines that read


def llms(title, description, shelves, host):
    "`llms.txt`: shelves with their pages, each with its address and one line."
    lines = [f"# {title}", "", f"> {description}", ""]
    for shelf, pages in shelves.items():
        lines += [f"## {shelf}", ""]
        lines += [f"- [{name}]({host}/{page}): {said}" for page, name, said in pages]
        lines.append("")
    return "\n".join(lines)
