"The everyday commands: as a process once, the rest through typer's runner."

import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from uniemo.commands.annotation import fit_threshold, wilson_lower
from uniemo.commands.photos import find_photos
from uniemo.commands.pictures import read_mixture
from uniemo.files.provenance import read_provenance
from uniemo.runs.cli import EVERYDAY, application, join_pairs

ROOT = Path(__file__).parent.parent
MAIN = [sys.executable, "-c", "import sys; from uniemo.runs.cli import main; sys.exit(main())"]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
ASSETS = ROOT / "uniemo" / "assets" / "mini"


@pytest.fixture
def photos(tmp_path, monkeypatch):
    "A folder with images and a file that is none; the tests work beside it."
    for k, name in enumerate(["awe/a.jpg", "awe/b.png", "fear/c.png"]):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(k).integers(0, 255, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args):
    "A command in this process: exit code, stdout; what was raised is raised."
    result = CliRunner().invoke(application, [str(a) for a in args], catch_exceptions=False)
    return result.exit_code, result.stdout, result.stderr


def command(*args):
    "The exit code of a command as a function, whose value it is."
    from uniemo.runs.cli import main

    return main([str(a) for a in args])


# ---- the whole way, as a process


def test_understand_as_a_process(photos):
    "JSON alone on stdout, and one line that noise is unlike all training images, in a pipe."
    done = subprocess.run(
        [*MAIN, "understand", "photos", "--json"], cwd=photos, env=ENV, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [Path(row["path"]).name for row in rows] == ["a.jpg", "b.png", "c.png"]
    assert all(abs(sum(row[e] for e in ("awe", "fear")) - 0.5) < 0.5 for row in rows)
    said = done.stderr.decode().splitlines()
    assert len(said) == 1 and "3 of 3 photographs are unlike" in said[0], "and no bar"


def test_completion_knows_the_commands(tmp_path):
    env = {
        **ENV,
        "_UNIEMO_COMPLETE": "complete_bash",
        "COMP_WORDS": "uniemo und",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(MAIN, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["understand"], done.stderr


# ---- help and refusals


@pytest.mark.parametrize("name", EVERYDAY)
def test_help_has_examples(name):
    code, out, _ = run(name, "--help")
    assert code == 0 and "Examples:" in out and f"uniemo {name}" in out


def test_help_tells_the_exit_codes():
    code, out, _ = run("--help")
    said = " ".join(out.split())
    assert code == 0 and "Exit codes: 0 all went well; 1 something was found" in said


@pytest.mark.parametrize(
    "args, part",
    [
        (["understand", "none.jpg"], "none.jpg: no such file"),
        (["understand", "photos/notes.txt"], "notes.txt"),
        (["understand", "photos", "-m", "nowhere"], "nowhere"),
        (["understand", "photos/awe/a.jpg", "photos/notes.txt"], "--skip"),
        (["understand", "photos", "--plot", "look.xyz"], "look.xyz: a picture ends in .png"),
        (["understand", "photos", "--csv", "nowhere/read.csv"], "there is no folder nowhere"),
        (["understand"], "Missing argument"),
        (["generate"], "which emotion?"),
        (["generate", "awe", "--mix", "awe=1"], "not both"),
        (["generate", "--mix", "awe"], "awe=.7,fear=.3"),
        (["generate", "awe", "-n", "0"], "-n"),
        (["generate", "joy"], "joy"),
        (["edit", "none.jpg", "awe"], "none.jpg"),
        (["annotate", "photos", "--out", "new"], "--calibrate"),
        (["annotate", "photos", "--out", "photos"], "not empty"),
        (["convert", "photos", "--out", "new"], "no files that are known"),
        (["convert", "mini", "--out", "new"], "--to authors"),
        (["understnd", "photos"], "Did you mean 'understand'"),
        (["xyzzy"], "No such command 'xyzzy'."),
    ],
)
def test_refused_with_one_line(photos, capsys, args, part):
    "Exit code 2, one line, nothing written."
    before = sorted(p.name for p in photos.iterdir())
    assert command(*args) == 2
    err = capsys.readouterr().err.strip()
    assert part in err and len(err.splitlines()) == 1
    assert sorted(p.name for p in photos.iterdir()) == before


def test_only_a_near_name_is_suggested(photos, capsys):
    assert command("xyzzy") == 2 and "mean" not in capsys.readouterr().err
    assert command("run", "quickstrat") == 2 and "'quickstart'" in capsys.readouterr().err
    assert command("run", "zzzzzz") == 2 and "did you mean" not in capsys.readouterr().err


# ---- understand


def test_patterns_find_each_photo_once(photos):
    found = find_photos(["photos", "photos/*/*.png", "photos/awe/a.jpg"])
    assert [p.name for p in found] == ["a.jpg", "b.png", "c.png"]


def test_understand_writes_csv_and_picture(photos, capsys):
    assert command("understand", "photos", "--csv", "t.csv", "--plot", "t.png") == 0
    table = pd.read_csv("t.csv")
    assert len(table) == 3 and {"path", "emotion", "confidence", "awe"} <= set(table)
    with Image.open("t.png") as picture:
        assert picture.width > 200
    assert capsys.readouterr().out == "", "results are in the files that were asked for"


def test_the_encoder_of_a_run_understands(photos, capsys):
    folder = photos / "run"
    shutil.copytree(ASSETS / "uniemo" / "encoder", folder / "model")
    assert command("understand", "photos", "--csv", "all.csv") == 0
    assert command("understand", "photos", "--csv", "t.csv", "--model", folder) == 0
    whole, alone = (pd.read_csv(name) for name in ("all.csv", "t.csv"))
    assert list(whole.emotion) == list(alone.emotion) and whole.scene.notna().all()
    assert alone.scene.isna().all() and alone.object.isna().all()
    # what generates needs more
    assert command("generate", "awe", "--model", folder) == 2
    assert "holds no UniEmo pipeline" in capsys.readouterr().err


def test_skip_lists_what_was_left_out(photos, capsys):
    code = command("understand", "photos/awe/a.jpg", "photos/notes.txt", "--skip")
    said = capsys.readouterr()
    assert code == 1 and "skipped photos/notes.txt" in said.err and "a.jpg" in said.out


# ---- generate, edit


def test_generate_tells_its_provenance(photos, capsys):
    args = ["--mix", "awe=.7,fear=.3", "-n", 2, "--seed", 3, "--steps", 2, "--out", "made"]
    assert command("generate", *args) == 0
    paths = sorted(Path("made").glob("*.png"))
    assert len(paths) == 2 and str(paths[0]) in capsys.readouterr().out
    told = read_provenance(paths[1])
    wanted = dict(seed="3", index="1", model="mini", steps="2", prompt="<emotion>")
    assert wanted.items() <= told.items() and told["emotion"].startswith("awe 0.70")
    assert told["Source"] == "generated" and told["Software"].startswith("uniemo")
    assert command("generate", "awe", "--out", "made") == 2, "nothing is overwritten"


def test_edit_keeps_the_name_of_the_photo(photos):
    assert command("edit", "photos/awe/a.jpg", "fear", "--steps", 2, "--out", "new") == 0
    told = read_provenance(next(Path("new").glob("*.png")))
    assert told["photo"] == "a.jpg" and told["strength"] == "0.5" and told["emotion"] == "fear"


@pytest.mark.parametrize("text", ["awe", "awe=", "=1", "awe=x", "awe=1,fear"])
def test_a_mixture_is_read_or_refused(text):
    assert read_mixture("awe=1, fear=.5") == {"awe": 1.0, "fear": 0.5}
    with pytest.raises(ValueError, match="--mix"):
        read_mixture(text)


# ---- check, annotate


def test_check_tells_by_its_exit_code(photos, capsys):
    bad = photos / "photos" / "fear" / "bad.jpg"
    bad.write_text("<html>")
    assert command("check", "photos") == 1 and "fear/bad.jpg" in capsys.readouterr().out
    bad.unlink()
    assert command("check", "photos", "--csv", "p.csv") == 0
    assert len(pd.read_csv("p.csv")) == 0


def test_threshold_keeps_its_promise():
    "On claims that were not fitted on, at several wishes."
    rng = np.random.default_rng(0)
    scores = rng.uniform(size=4000)
    right = rng.uniform(size=4000) < scores
    for wish in (0.6, 0.75, 0.9):
        threshold = fit_threshold(scores[:2000], right[:2000], wish)
        assert right[2000:][scores[2000:] >= threshold].mean() > wish - 0.03
    assert fit_threshold([0.9] * 3, [True] * 3) is None, "three images prove nothing"
    assert fit_threshold([0.5, 0.5] * 50, [True, False] * 50, 0.6) is None
    assert wilson_lower(5, 10) < 0.5 < wilson_lower(99, 100)


def test_annotate_marks_what_it_wrote(tmp_path, monkeypatch, capsys):
    "Annotations of people stay, those of a CLIP say so, splits stay as they were."
    from uniemo.data import EmoSet, check
    from uniemo.mini import read_specs, write_emoset

    monkeypatch.chdir(tmp_path)
    write_emoset("world", num_images=160, seed=5, workers=1, progress=False)
    bare = json.loads(Path("world/train.json").read_text())[:64:2]
    for _, _, note in bare:
        path = Path("world") / note
        kept = {k: v for k, v in json.loads(path.read_text()).items() if k != "scene"}
        path.write_text(json.dumps(kept))
    before = EmoSet("world", "train").read_annotations()
    assert command("annotate", "world", "--out", "new", "--precision", ".6") == 0
    assert "images have new names" in capsys.readouterr().out
    assert len(check("new", verbose=False)) == 0
    after, truth, right = EmoSet("new", "train").read_annotations(), read_specs("world"), []
    assert len(after) == len(before) and len(EmoSet("new", "val")) == len(EmoSet("world", "val"))
    marks = after["source"] if "source" in after else [None] * len(after)
    for i, source in enumerate(marks):
        if before["scene"][i]:
            assert after["scene"][i] == before["scene"][i]
        if isinstance(source, dict) and "scene" in source:
            assert not before["scene"][i] and source["scene"]["model"] == "mini"
            assert source["scene"]["scores"][0] >= source["scene"]["threshold"]
            right.append(after["scene"][i] == truth[before["image_id"][i]].scene)
    assert len(right) >= 5 and np.mean(right) > 0.5


# ---- convert, doctor


def test_convert_there_and_back(tmp_path, monkeypatch):
    import torch

    from uniemo.fusion import PseudoWordMapper
    from uniemo.queries import ExpertQueryModel

    monkeypatch.chdir(tmp_path)
    assert command("convert", "mini", "--to", "authors", "--out", "theirs") == 0
    assert command("convert", "theirs", "--out", "ours") == 0
    kinds = dict(encoder=ExpertQueryModel, mapper=PseudoWordMapper)
    for part, kind in kinds.items():
        old = kind.from_pretrained(ASSETS / "uniemo" / part).float().state_dict()
        new = kind.from_pretrained(Path("ours") / part).float().state_dict()
        assert set(old) == set(new)
        assert all(torch.equal(old[k], new[k]) for k in old), part


def test_emogen_files_of_the_authors(shared, tmp_path, monkeypatch):
    "Their coefficients into our table and back, number for number."
    from uniemo.interop import load_emogen

    source = shared / "real" / "emogen"
    monkeypatch.chdir(tmp_path)
    assert command("convert", source, "--out", "ours") == 0
    assert {p.name for p in Path("ours").iterdir()} >= {"correlation.csv", "space.safetensors"}
    assert command("convert", "ours", "--to", "emogen", "--out", "back") == 0
    first, second = load_emogen(source), load_emogen("back")
    assert second.classifier.weight.equal(first.classifier.weight)
    assert second.classifier.bias.equal(first.classifier.bias)
    for kind, rows in first.coefficients.items():
        assert set(rows) == set(second.coefficients[kind])
        for name, row in rows.items():
            assert np.allclose(row, second.coefficients[kind][name], atol=1e-6)


def test_doctor_finds_what_is_damaged(monkeypatch, capsys):
    room = importlib.import_module("uniemo.commands.doctor")

    rows = room.examine()
    assert {"uniemo", "torch", "packages", "mini models", "GPU", "runs"} <= {r[0] for r in rows}
    assert [r for r in rows if r[0] == "mini models"] == [("mini models", "whole", "")]
    monkeypatch.setattr(room, "requirements", lambda: {None: ["no-such-package"], "x": ["none"]})
    bad = room.check_packages()
    assert room.is_fault(bad[0]) and "no-such-package" in bad[0][1]
    assert not room.is_fault(bad[1]) and 'pip install "uniemo[x]"' in bad[1][2]
    monkeypatch.setattr(room, "CHECKS", (room.check_packages,))
    assert room.diagnose() == 1 and "to mend" in capsys.readouterr().out


# ---- parameters


def test_pairs_are_joined_as_typed():
    assert join_pairs(["run", "x", "-p", "a", "-1", "-q"]) == ["run", "x", "-p", "a=-1", "-q"]
    assert join_pairs(["-p", "a=b", "-p", "c"]) == ["-p", "a=b", "-p", "c"]


class Terminal(io.StringIO):
    "What is written to it, as if a person looked on."

    def isatty(self):
        return True


def test_a_table_on_a_narrow_terminal_keeps_every_word(monkeypatch):
    "Its widest column goes on in the next line; in a pipe a row is one line."
    from uniemo.commands.terminal import print_table

    remedy = "hf download openai/clip-vit-large-patch14"
    row, heads = ["photographs/beach.jpg", "contentment", remedy], ["path", "emotion", "remedy"]
    narrow, pipe = Terminal(), io.StringIO()
    monkeypatch.setenv("COLUMNS", "40")
    for place in (narrow, pipe):
        monkeypatch.setattr(sys, "stdout", place)
        print_table([row], heads)
    said = re.sub(r"\x1b\[\d*m", "", narrow.getvalue())
    assert max(map(len, said.splitlines())) <= 40 and "…" not in said
    assert all(word in said for word in ("contentment", "hf download"))
    assert [cell.strip() for cell in pipe.getvalue().splitlines()[1].split("  ") if cell] == row
