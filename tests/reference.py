"""Entries of the API reference, read from the source: signature, parameters, methods.

Nothing is imported: types and defaults stand as they are written, meanings are the comments.
"""

import ast
import io
import re
import tokenize
from dataclasses import dataclass
from functools import cache
from pathlib import Path

WIDTH = 88
HIDDEN = ("self", "cls")
KNOWN = (bool, int, float, str, tuple, list, dict)


@dataclass(frozen=True)
class Parameter:
    "One row of a table."

    name: str  # with its stars
    type: str  # as written; empty where nothing is
    default: str  # as written; empty where there is none
    meaning: str

    @property
    def signature(self):
        typed = f"{self.name}: {self.type}" if self.type else self.name
        if not self.default:
            return typed
        return f"{typed} = {self.default}" if self.type else f"{typed}={self.default}"

    @property
    def row(self):
        kind = self.type
        if self.default == "None" and kind and "None" not in kind:
            kind += " | None"
        meaning = self.meaning or ("passed on as they are" if self.name[0] == "*" else "")
        cells = [code(self.name), code(kind), code(self.default), meaning]
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def code(text):
    return f"`{text}`" if text else ""


@cache
def source(path):
    "Tree and comments of a module: {line: (text, whether it has the line for itself)}."
    text = Path(path).read_text(encoding="utf-8")
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[: token.start[1]].strip()
            said = token.string.lstrip("# ").strip()
            comments[token.start[0]] = ("" if said.startswith("noqa") else said, alone)
    return ast.parse(text), comments


def written(node):
    "A type or a default as it is written, strings of types without their quotes."
    if node is None:
        return ""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return ast.unparse(node)


def number(node):
    "A number as people write it."
    plain = isinstance(node, ast.Constant) and isinstance(node.value, float)
    return re.sub(r"e([+-])0", r"e\1", f"{node.value:g}") if plain else None


def default_of(node):
    "A default; what a data class makes again is shown as the call that makes it."
    if node is None:
        return ""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "field":
        options = {k.arg: k.value for k in node.keywords}
        if "default_factory" in options:
            return f"{ast.unparse(options['default_factory'])}()"
        return ast.unparse(options["default"]) if "default" in options else ""
    shown = number(node) or ast.unparse(node).replace("\n", " ")
    # strings as the formatter writes them
    return re.sub(r"'([^'\"\\]*)'", r'"\1"', shown)


def type_of(annotation, default):
    "What is written, or the type of a plain default."
    if annotation is not None:
        return written(annotation)
    try:
        value = ast.literal_eval(default)
    except (ValueError, TypeError, SyntaxError):
        return ""
    return type(value).__name__ if isinstance(value, KNOWN) else ""


def meaning(first, last, comments):
    "The comment behind a parameter, or those above it that have their lines for themselves."
    if last in comments and not comments[last][1]:
        return comments[last][0]
    lines, line = [], first - 1
    while line in comments and comments[line][1]:
        lines.insert(0, comments[line][0])
        line -= 1
    return " ".join(lines)


def parameters(function, comments):
    "The parameters of a function, but not self."
    args = function.args
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + args.defaults
    every = [("", a, d) for a, d in zip(plain, defaults, strict=True)]
    every += [("*", args.vararg, None)] if args.vararg else []
    every += [("", a, d) for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    every += [("**", args.kwarg, None)] if args.kwarg else []
    ends = [(d or a).end_lineno for _, a, d in every]
    rows = []
    for (stars, arg, default), end in zip(every, ends, strict=True):
        if arg.arg in HIDDEN:
            continue
        # a comment behind several parameters is that of none
        said = meaning(arg.lineno, end, comments) if ends.count(end) == 1 else ""
        if arg.lineno == function.lineno:
            said = ""
        kind = type_of(arg.annotation, default)
        rows.append(Parameter(stars + arg.arg, kind, default_of(default), said))
    return rows


def fields(cls, comments):
    "The fields of a data class or of settings as parameters."
    rows = []
    for node in cls.body:
        if not isinstance(node, ast.AnnAssign) or node.target.id.startswith("_"):
            continue
        kind = written(node.annotation)
        if not kind.startswith("ClassVar"):
            said = meaning(node.lineno, node.end_lineno, comments)
            rows.append(Parameter(node.target.id, kind, default_of(node.value), said))
    return rows


def signature(name, rows, returns=""):
    "A call as it is typed, on one line where it fits."
    tail = f" -> {returns}" if returns else ""
    line = f"{name}({', '.join(row.signature for row in rows)}){tail}"
    if len(line) > WIDTH:
        body = "".join(f"    {row.signature},\n" for row in rows)
        line = f"{name}(\n{body}){tail}"
    return f"```python\n{line}\n```"


def table(rows, returns="", said=""):
    "Name, type, default and meaning; nothing where there is nothing to tell."
    if not said and not any(row.meaning for row in rows):
        return ""  # the signature tells all there is
    lines = [row.row for row in rows]
    if returns and returns != "None":
        typed = code(returns).replace("|", "\\|")
        lines.append(f"| **returns** | {typed} | | {said.replace('|', chr(92) + '|')} |")
    return "\n".join(["| Name | Type | Default | Meaning |", "| --- | --- | --- | --- |", *lines])


def decorators(node):
    return {getattr(d, "id", getattr(d, "attr", "")) for d in node.decorator_list}


def function_entry(name, node, comments):
    "Signature, text and table of a function or method."
    returns = written(node.returns)
    said = meaning(10**9, node.returns.end_lineno, comments) if node.returns else ""
    text = ast.get_docstring(node) or ""
    if decorators(node) & {"property", "cached_property"}:
        head = f"```python\n{name}{f': {returns}' if returns else ''}\n```"
        return "\n\n".join(filter(None, [head, text, said]))
    rows = parameters(node, comments)
    if "classmethod" in decorators(node):
        text = f"{text} (class method)".strip()
    parts = [signature(name, rows, returns), text, table(rows, returns, said)]
    return "\n\n".join(filter(None, parts))


def methods(cls):
    "Public methods of a class and what makes its objects callable, in their order."
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in cls.body if isinstance(node, kinds)]
    return [o for o in found if o.name == "__call__" or not o.name.startswith("_")]


def class_entry(cls, comments, link, level):
    "A class: how it is made, from what it comes, and its methods."
    made = next((o for o in cls.body if getattr(o, "name", "") == "__init__"), None)
    rows = parameters(made, comments) if made else fields(cls, comments)
    bases = [ast.unparse(base) for base in cls.bases]
    told = f"Comes from {', '.join(map(code, bases))}." if bases else ""
    parts = [signature(cls.name, rows) if rows or made else "", ast.get_docstring(cls) or ""]
    parts += [told, table(rows)]
    for node in methods(cls):
        name = f"{cls.name}.{node.name}"
        title = name.replace("_", r"\_")
        parts += [link(node.lineno), f"{'#' * (level + 1)} {title}"]
        parts.append(function_entry(name, node, comments))
    return "\n\n".join(filter(None, parts))


def find(tree, name):
    "The definition of a name, also of a method (`Class.method`)."
    body = tree.body
    for part in name.split("."):
        node = next((o for o in body if getattr(o, "name", None) == part), None)
        body = getattr(node, "body", [])
    return node


def entry(path, name, address, level=3):
    """Markdown of one name of a module, or None where nothing of that name is defined.

    `address` is where the module's source can be read.
    """
    tree, comments = source(path)
    node = find(tree, name)
    if node is None:
        return None

    def link(line):
        return (
            f'[source]({address}#L{line}){{target="_blank" style="float:right; font-size:smaller"}}'
        )

    head = f"---\n\n{link(node.lineno)}\n\n{'#' * level} {name}\n\n"
    if isinstance(node, ast.ClassDef):
        return head + class_entry(node, comments, link, level)
    return head + function_entry(name, node, comments)


def public_names(path):
    "The names that a module gives, each with the first line of its text."
    tree, _ = source(path)
    own = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            own = dict.fromkeys(ast.literal_eval(node.value), "")
    for node in tree.body:
        if getattr(node, "name", None) in own and hasattr(node, "body"):
            own[node.name] = (ast.get_docstring(node) or "").partition("\n\n")[0]
    return own
