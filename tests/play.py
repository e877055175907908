"The page of the mini model that runs without Python: made once, kept in `_play`, put on the site."

import hashlib
import shutil
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLAY = ROOT / "_play"


def made_of():
    "A digest of all that the page is made of."
    assets, code = ROOT / "uniemo/assets", ROOT / "uniemo"
    sources = [p for o in ("mini", "page") for p in sorted((assets / o).rglob("*")) if p.is_file()]
    sources += [code / "explore/webpage.py", code / "files/onnx.py", Path(__file__)]
    return hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()


def play():
    "The page's folder, made again where what it is made of has changed."
    from filelock import FileLock

    with FileLock(ROOT / "_play.lock"):
        stamp, digest = PLAY / "made-of", made_of()
        if not stamp.exists() or stamp.read_text() != digest:
            shutil.rmtree(PLAY, ignore_errors=True)
            write_play()
            stamp.write_text(digest)
    return PLAY


def write_play():
    "The page, with a painted picture of each emotion to begin with."
    from PIL import Image

    from uniemo.explore.webpage import PAINTED, PageSettings, write_page
    from uniemo.mini import write_emoset

    with tempfile.TemporaryDirectory() as folder:
        root = write_emoset(folder, num_images=60, seed=11, progress=False)
        first = {p.parent.name: p for p in sorted(root.glob("image/*/*"), reverse=True)}
        samples = {name: Image.open(path).copy() for name, path in sorted(first.items())}
    settings = PageSettings(warning=PAINTED, home="../explore/webpage.html")
    write_page("mini", PLAY, samples, settings)


def add_play(site):
    "The page in the folder `play` of a site."
    shutil.copytree(play(), Path(site) / "play", ignore=shutil.ignore_patterns("made-of"))
