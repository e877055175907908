"The site: built offline, whole, and looked at page by page in a browser, light and dark."

import json
import re
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import house
import pytest
from browser import Browser, find_chromium
from filelock import FileLock
from house import NBS, notebooks, page_of

PATIENCE = 300  # seconds that a busy machine may take for one page

# what is wrong with a page as it stands: `dark`, whether it should be dark
LOOK = """
(async dark => {
  await document.fonts.ready;
  const wrong = [];
  const numbers = color => (color.match(/[\\d.]+/g) || []).map(Number);
  const light = color => {
    const [r, g, b] = numbers(color).map(v => v / 255)
      .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = node => {
    for (let o = node; o; o = o.parentElement) {
      const color = getComputedStyle(o).backgroundColor, parts = numbers(color);
      if (parts.length && (parts.length < 4 || parts[3] === 1)) return light(color);
    }
    return 1;
  };
  const root = document.documentElement, still = document.createElement("style");
  still.textContent = "* { transition: none !important }";
  document.head.append(still);
  const changed = () => (behind(document.body) < 0.2) === dark
    && root.classList.contains("quarto-dark") === dark;
  for (let k = 0; k < 1200 && !changed(); k++) await new Promise(go => setTimeout(go, 50));
  if (!changed()) wrong.push("the colour scheme did not change");
  const texts = ["main p", "main p a", "main li", ".sidebar-link", ".sidebar-link.active",
    "#TOC a", ".navbar .nav-link", ".navbar-title", "main td", "figcaption", "main pre span.kw"];
  for (const selector of texts) {
    const node = document.querySelector(selector);
    if (!node || !node.offsetParent) continue;
    const style = getComputedStyle(node), alpha = numbers(style.color)[3] ?? 1;
    const back = behind(node), front = light(style.color) * alpha + back * (1 - alpha);
    const [low, high] = [back, front].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    if (ratio < 4.4) wrong.push(`${selector} is hard to read: contrast ${ratio.toFixed(1)}`);
  }
  for (const image of document.images) {
    if (!image.naturalWidth) wrong.push(`a picture is not shown: ${image.src.slice(0, 80)}`);
    if (!image.alt) wrong.push("a picture has no text");
  }
  for (const math of document.querySelectorAll("main math")) {
    const box = math.getBoundingClientRect(), said = math.textContent.trim().slice(0, 60);
    const hidden = math.closest("details:not([open])");
    if (!hidden && (box.width < 1 || box.height < 1)) wrong.push(`not drawn: ${said}`);
    if (math.scrollWidth > math.clientWidth + 2) wrong.push(`a formula is cut off: ${said}`);
  }
  for (const said of document.querySelectorAll("main .cell-output pre")) {
    // what can be scrolled, as a printed table, is not lost
    const lost = !["auto", "scroll"].includes(getComputedStyle(said).overflowX);
    if (lost && said.scrollWidth > said.clientWidth + 2) wrong.push("an output is cut off");
  }
  if (document.querySelector("span.math")) wrong.push("a formula is still TeX");
  if (root.scrollWidth > window.innerWidth + 1) wrong.push("wider than the window");
  return wrong;
})
"""
LOADED = """new Promise(ready => document.readyState === "complete" ? ready(true)
  : addEventListener("load", () => ready(true)))"""
FOUND = """(async () => {
  const box = document.querySelector(".smalldocs-search"), input = box.querySelector("input");
  const shown = box.querySelector(".smalldocs-search-results");
  shown.innerHTML = "";
  input.value = QUERY;
  input.dispatchEvent(new Event("input"));
  while (!shown.querySelector("a, .search-none")) await new Promise(go => setTimeout(go, 50));
  return [...shown.querySelectorAll("a")].map(a => a.getAttribute("href"));
})()"""
QUESTIONS = {
    "train on my images": {"tutorials/own_data.html"},
    "own photographs": {"howto/recipes.html", "tutorials/own_data.html"},
    "LoRA": {"howto/recipes.html", "diffusion/own_pipeline.html"},
}


@pytest.fixture(scope="session")
def site(tmp_path_factory, testrun_uid):
    "The site, built once, whichever process asks first."
    pytest.importorskip("smalldocs")
    pytest.importorskip("ziamath")
    shared = tmp_path_factory.getbasetemp().parent
    built = shared / f"site-{testrun_uid}"
    with FileLock(shared / "site.lock"):
        if not built.exists():
            house.docs()
            built.touch()
    return house.ROOT / "_docs"


class Silent(SimpleHTTPRequestHandler):
    "The site as it is."

    def log_message(self, *said):
        pass


class NothingToFind(Silent):
    "The site with an empty index of the search, which each page would read again: 2 MB."

    def do_GET(self):
        if self.path != "/search.json":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b"[]")


@contextmanager
def served(site, handler=Silent):
    "Where the site is served."
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=site))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()


def pages_of(site):
    "Addresses of the pages that notebooks make; the page that runs by itself has its own test."
    found = (p.relative_to(site).as_posix() for p in site.rglob("*.html"))
    return sorted(page for page in found if not page.startswith("play/"))


def test_site_is_whole(site):
    "All pages, formulas as MathML, a text for every picture; a broken link stops `house.docs`."
    pages = set(pages_of(site))
    assert {page_of(p) for p in notebooks()} <= pages
    bodies = {page: (site / page).read_text(encoding="utf-8") for page in pages}
    assert not [page for page, body in bodies.items() if 'class="math ' in body]
    bare = re.compile(r'<img (?![^>]*\balt="[^"])[^>]{0,80}')
    assert [page for page, body in bodies.items() if bare.search(body)] == []


def test_nothing_of_another_host_is_in_the_style(site):
    "Fonts and pictures of style sheets lie in the site."
    foreign = re.compile(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//")
    styles = {p: p.read_text(encoding="utf-8") for p in site.rglob("*.css")}
    assert styles and [p.name for p, body in styles.items() if foreign.search(body)] == []


def test_every_page_stands_on_one_shelf():
    placed = [
        p
        for sections in house.shelves_of_the_site().values()
        for nbs in sections.values()
        for p in nbs
    ]
    assert sorted(placed) == sorted(notebooks()), "each notebook once: see house.py"


def test_reference_shows_types_as_they_are_written(site):
    "No type of a parameter is guessed; methods stand with their class."
    made_up = ("NoneType", "VAR_KEYWORD", "VAR_POSITIONAL")
    for page in pages_of(site):
        body = (site / page).read_text(encoding="utf-8")
        heads = re.findall(r'<h[34][^>]*data-anchor-id="[^"]*"[^>]*>(.*?)</h[34]>', body)
        assert not [word for word in made_up if word in body], page
        assert "show_doc(" not in body, page
        assert not [o for o in heads if "&lt;function" in o], page
    body = (site / "pipeline.html").read_text(encoding="utf-8")
    assert 'id="uniemopipeline.generate"' in body
    assert '<div class="sd-table parameters">' in body, "what a narrow screen lays out again"


def test_llms_txt_names_every_page(site):
    told = (site / "llms.txt").read_text(encoding="utf-8")
    assert told.startswith("# uniemo\n\n> ")
    pages = re.findall(r"\]\(https://uniemo\.github\.io/uniemo/([^)]+)\)", told)
    assert set(pages) >= {page_of(p) for p in notebooks()}
    assert [page for page in pages if not (site / page).exists()] == []
    assert not re.search(r"\): *$", told, re.M), "a page without its one line"


def promised(browser, code):
    "The value that a promise of the page gives."
    how = dict(expression=code, awaitPromise=True, returnByValue=True)
    answer = browser.send("Runtime.evaluate", **how)
    if "exceptionDetails" in answer:
        raise RuntimeError(answer["exceptionDetails"])
    return answer["result"].get("value")


def prefer(browser, scheme):
    "Ask for a colour scheme as the system does."
    wish = [dict(name="prefers-color-scheme", value=scheme)]
    browser.send("Emulation.setEmulatedMedia", features=wish)


needs_browser = pytest.mark.skipif(
    find_chromium() is None, reason="there is no Chromium on this machine"
)


@pytest.mark.long
@needs_browser
def test_every_page_in_both_schemes(site, tmp_path):
    "No complaint of the browser, formulas drawn and not cut off, pictures shown, text readable."
    pytest.importorskip("websocket")
    wrong, schemes = [], ["light", "dark"]
    with served(site, NothingToFind) as address, Browser(tmp_path / "profile") as browser:
        browser.socket.settimeout(PATIENCE)
        # low: what stands below is laid out too, but not painted
        size = dict(width=1280, height=200, deviceScaleFactor=1, mobile=False)
        browser.send("Emulation.setDeviceMetricsOverride", **size)
        prefer(browser, "light")
        for page in pages_of(site):
            # in the scheme of the page before, then in the other one
            browser.open(address + page)
            promised(browser, LOADED)
            found = []
            for scheme in schemes:
                prefer(browser, scheme)
                dark = json.dumps(scheme == "dark")
                found += [f"{scheme}: {o}" for o in promised(browser, f"({LOOK})({dark})")]
            schemes.reverse()
            found += browser.complaints
            browser.complaints.clear()
            wrong += [f"{page}: {o}" for o in dict.fromkeys(found)]
        assert browser.foreign() == []
    assert wrong == [], "\n".join(wrong)


CUT = """[...document.querySelectorAll("main .cell-output-display")]
  .filter(o => o.querySelector("table") && o.scrollWidth > o.clientWidth + 2).length"""


@needs_browser
def test_verdicts_are_seen_without_scrolling(site, tmp_path):
    "On a laptop's screen every column of the claims is there, the last one too."
    pytest.importorskip("websocket")
    with served(site, NothingToFind) as address, Browser(tmp_path / "profile") as browser:
        browser.socket.settimeout(PATIENCE)
        browser.open(address + "experiments/claims.html")
        promised(browser, LOADED)
        assert browser.js("document.body.textContent.includes('verdict')")
        assert browser.js(CUT) == 0


@needs_browser
def test_search_answers(site, tmp_path):
    "What people ask first leads to the page that tells it, before any other."
    pytest.importorskip("websocket")
    with served(site) as address, Browser(tmp_path / "profile") as browser:
        browser.socket.settimeout(PATIENCE)
        browser.open(address)
        promised(browser, LOADED)
        found = {q: promised(browser, FOUND.replace("QUERY", json.dumps(q))) for q in QUESTIONS}
    for question, pages in QUESTIONS.items():
        first = found[question][0].partition("#")[0].removeprefix("./")
        assert first in pages, (question, found[question])


def test_pages_name_commands_that_exist():
    "Every `uniemo ...` line of the pages for people asks for a command and options that are there."
    from typer.main import get_command

    from uniemo.runs import read_parameters
    from uniemo.runs.cli import application as app

    root = get_command(app)
    bad = []
    for folder in ("start", "tutorials", "howto", "about"):
        for path in notebooks(folder):
            body = "\n".join(house.text(c["source"]) for c in house.read(path)["cells"])
            shell = "\n".join(re.findall(r"^```sh\n(.*?)^```", body, re.M | re.S))
            for line in re.findall(r"^uniemo (.+)$", shell.replace("\\\n", " "), re.M):
                words = line.partition("  #")[0].split()
                command = root.commands.get(words[0]) if words[0][0] != "-" else root
                known = {o for p in getattr(command, "params", ()) for o in p.opts}
                used = [w for w in words if re.fullmatch(r"--?[a-zA-Z][\w-]*", w)]
                extra = {"--help", "-h", "--install-completion", "--show-completion"}
                asked = {w.partition(".")[0] for w in re.findall(r" -p (\S+)", line)}
                settings = asked
                if words[0] in ("run", "sweep"):
                    settings = set(read_parameters(NBS / "experiments" / f"{words[1]}.ipynb"))
                if command is None or set(used) - known - extra or asked - settings:
                    bad.append(f"{path.relative_to(NBS)}: uniemo {line}")
    assert bad == []
