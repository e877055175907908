"Tiny runs of the experiments: what comes out is meaningless, that it comes out is the test."

import json
import shutil

import pandas as pd
import pytest

from uniemo.data.emoset import EmoSet
from uniemo.files.shipped import shipped_folder
from uniemo.mini.writing import write_emoset
from uniemo.runs import (
    RunFailed,
    find_notebook,
    resume,
    start,
)

# imports, and the cell that looks at parameters
EMOSET = ["cell-03", 'check_choice("networks"']
TINY = dict(steps=4, num_probes=20, batch_size=16, num_threads=1)


@pytest.fixture
def cells(tmp_path, monkeypatch):
    "Executes single cells of an experiment here, after its parameters; gives their names."
    monkeypatch.setenv("UNIEMO_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setattr(
        "matplotlib_inline.backend_inline.set_matplotlib_formats", lambda *args, **kwargs: None
    )

    def execute(name, ids, g=None, **params):
        source = {
            c["id"]: "".join(c["source"])
            for c in json.loads(find_notebook(name).read_text(encoding="utf-8"))["cells"]
        }
        if g is None:
            g = {}
            exec(source["cell-02"], g)
        g.update(params)
        for i in ids:
            # an id, or what stands in the cell
            exec(source.get(i) or next(text for text in source.values() if i in text), g)
        return g

    return execute


@pytest.mark.long
def test_understanding_is_repeatable(warm, tmp_path, run_again):
    "Same seed, same machine: the same summary, in a second process and after a second Run All."
    runs = [
        start(notebook, dict(TINY, num_images=160), tmp_path, name, progress=False)
        for notebook, name in (("understanding", "a"), (run_again("understanding"), "b"))
    ]
    a, b = ((r.dir / "summary.json").read_text() for r in runs)
    assert a == b and {
        "accuracy",
        "accuracy_low",
        "bayes",
        "pointing_object",
        "scene_moves",
        "calibration_error",
        "wheel_distance",
    } <= set(json.loads(a))
    assert (runs[0].dir / "model/model.safetensors").exists() and {
        "attention.png",
        "curves.png",
        "confusion.png",
    } <= {p.name for p in (runs[0].dir / "figures").iterdir()}


def test_understanding_reads_a_folder_of_photographs(warm, tmp_path):
    """No split, no attributes, no known truth, and emotions of your own; further images join them.

    All are read from the disk, as they are needed.
    """
    photos, more = (
        write_emoset(tmp_path / name, size, seed=size, workers=1, progress=False) / "image"
        for name, size in (("world", 240), ("more", 48))
    )
    for old, new in (("amusement", "joy"), ("anger", "fury"), ("awe", "wonder")):
        for folder in (photos, more):
            (folder / old).rename(folder / new)
    given = dict(data=str(photos), in_memory=False)
    given |= dict(extra=str(more), ratio=0.25, extra_weight=0.5)
    run = start("understanding", dict(TINY, **given), tmp_path / "runs", progress=False)
    summary = run.summary()
    assert summary["extra_images"] == 48
    assert {"accuracy", "macro_f1"} <= set(summary) and not {
        "bayes",
        "pointing_object",
        "wheel_distance",
    } & set(summary)
    assert json.loads((run.dir / "model/config.json").read_text())["class_names"] == sorted(
        p.name for p in photos.iterdir()
    )


def test_understanding_with_extra_images(warm, tmp_path):
    "Stage 3 at any size: a folder of emotions, without names, joins a set in EmoSet's format."
    data, more = (
        write_emoset(tmp_path / n, k, seed=k, workers=1, progress=False)
        for n, k in (("data", 160), ("more", 48))
    )
    run = start(
        "understanding",
        dict(
            TINY,
            data=str(data),
            extra=str(more / "image"),
            ratio=0.25,
            extra_weight=0.5,
        ),
        tmp_path / "runs",
        progress=False,
    )
    assert run.summary()["extra_images"] == 48 and run.summary()["images"] == len(
        EmoSet(data, "train")
    )


def test_what_ships_is_shown_without_training(warm, tmp_path):
    "The three studies: their figures are those of the cells, and nothing is made."
    for name, told in (
        ("experts", {"accuracy_plain_300", "supported"}),
        ("evaluate", {"emo_a_UniEmo_1000", "emo_a_written_prompts_1000"}),
        ("feedback", {"object_names_right_joint_training_300"}),
    ):
        run = start(name, dict(num_threads=1), tmp_path, progress=False)
        assert told <= set(run.summary())
        assert run.metrics().empty, "nothing was made"
        cells, verdicts = (pd.read_csv(run.dir / f"{k}.csv") for k in ("cells", "verdicts"))
        assert cells.seed.nunique() == 20 and set(verdicts.columns) >= {"claim", "verdict"}
    few = start("experts", dict(num_seeds=2, num_threads=1), tmp_path, progress=False)
    assert pd.read_csv(few.dir / "cells.csv").seed.nunique() == 2


def test_a_study_goes_on_where_it_was_stopped(warm, tmp_path):
    arms = ["plain", "frozen head", "zero-shot names, pair table"]
    size = dict(sizes=[24], num_seeds=2, num_test=40, steps=4, num_threads=1)
    params = dict(size, arms=arms, cells_file=str(tmp_path / "cells.jsonl"))
    run = start("experts", params, tmp_path / "runs", progress=False)
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    assert len(lines) == 6 and len(run.metrics()) == 6
    found = run.summary()
    assert {"accuracy_plain_24", "accuracy_frozen_head_24"} <= set(found)
    # as if it had been killed while it wrote the fourth cell
    (tmp_path / "cells.jsonl").write_text("\n".join([*lines[:3], lines[3][:30]]))
    again = start("experts", params, tmp_path / "runs", progress=False)
    assert len(again.metrics()) == 3
    assert again.summary() == found
    with pytest.raises(RunFailed, match="unknown arm 'plane'; known: "):
        start("experts", dict(params, arms=["plane"]), tmp_path / "runs", progress=False)


def test_studies_of_arms_that_no_claim_of_theirs_names(warm, tmp_path):
    "What they lack is said, and no error."
    size = dict(sizes=[24], num_seeds=2, num_test=40, steps=4, num_threads=1)
    for name, arms in (("evaluate", ["frozen head"]), ("feedback", ["names at the end, prior"])):
        file = tmp_path / f"{name}.jsonl"
        run = start(name, dict(size, arms=arms, cells_file=str(file)), tmp_path, progress=False)
        assert len(file.read_text().splitlines()) == 2
        assert run.summary()["cells"] == 2 and run.summary()["not tested"] == 3


@pytest.mark.parametrize("dry", [True, False])
def test_emoset_stops_where_files_are_missing(warm, tmp_path, monkeypatch, dry):
    "Dry: it looks and says what is missing. Else it stops there, before anything is trained."
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    params = dict(dry=dry, data=str(tmp_path / "nowhere"), emogen=str(tmp_path / "nothing"))
    if dry:
        summary = start("emoset", params, tmp_path / "runs", progress=False).summary()
        assert summary == dict(summary, dry=True, missing=21)
    else:
        with pytest.raises(
            RunFailed,
            match="21 of 21 files are missing or broken.*info.json.*"
            "clip-vit-large-patch14.*stable-diffusion-v1-5",
        ):
            start("emoset", params, tmp_path / "runs", progress=False)


@pytest.mark.long
def test_emoset_by_parameters_only(warm, tmp_path):
    "The whole path with mini models, and once more where it was stopped."
    tiny = dict(batch_size=8, micro_batch=4, workers=0, cpu=True)
    data = write_emoset(tmp_path / "world", 64, progress=False, splits=(0.5, 0.25, 0.25))
    diffusion = shutil.copytree(shipped_folder("diffusion"), tmp_path / "sd")
    index = json.loads((diffusion / "model_index.json").read_text())
    (diffusion / "model_index.json").write_text(
        json.dumps(
            index
            | dict(
                feature_extractor=["transformers", "CLIPImageProcessor"],
                safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
            )
        )
    )  # named as in the original, not there, not needed
    run = start(
        "emoset",
        dict(
            dry=False,
            data=str(data),
            backbone="mini",
            diffusion=str(diffusion),
            networks="mini",
            preset="mini",
            mapper=dict(separate=True),
            steps=2,
            num_images=2,
            num_inference_steps=2,
            generation_batch_size=2,
            metric_size=64,
            num_real=16,
            criteria=["diverse"],
            max_kept=1,
            ratio=0.25,
            understanding_settings=tiny,
            joint_settings=dict(tiny, warm_start=8),
            num_threads=1,
            progress=False,
        ),
        tmp_path / "runs",
        "tiny",
        progress=False,
    )
    summary = run.summary()
    assert (
        {
            "accuracy_stage1",
            "accuracy",
            "fid",
            "lpips",
            "emo_a",
            "sem_c",
            "sem_d",
            "accuracy_stage3",
        }
        <= set(summary)
        and not summary["dry"]
        and len(list((run.dir / "images").glob("*.png"))) == 16
    )
    # killed before stage 2 had saved anything, and before an image was painted
    shutil.rmtree(run.dir / "stage-2")
    (run.dir / "images/awe-0-1.png").unlink()
    kept = (run.dir / "images/fear-0-0.png").stat().st_mtime_ns
    run._set(status="interrupted")
    again = resume(run, progress=False).summary()
    # its mappers begin as before: the same trainings, and the same image in another batch
    trained = [name for name in summary if name.startswith("accuracy")]
    assert len(trained) == 3 and [again[name] for name in trained] == [
        summary[name] for name in trained
    ]
    assert again["fid"] == pytest.approx(summary["fid"], rel=1e-3)
    assert (run.dir / "images/awe-0-1.png").exists()
    assert (run.dir / "images/fear-0-0.png").stat().st_mtime_ns == kept


@pytest.mark.parametrize(
    "name, value, near",
    [
        ("networks", "publishd", "published"),
        ("space", "lowrnk", "lowrank"),
        ("on_error", "rise", "raise"),
        ("preset", "papr", "paper"),
        ("space", None, "bank"),
    ],
)
def test_emoset_looks_at_its_parameters_first(cells, name, value, near):
    says = f"{name} knows .*{near}.*, not {value!r}; the nearest is"
    with pytest.raises(ValueError, match=says):
        cells("emoset", EMOSET, **{name: value})


def test_emoset_looks_into_files(cells, tmp_path):
    "A vocabulary without its merges, a file that was cut off, where to get the networks."
    clip, sd = (shutil.copytree(shipped_folder(k), tmp_path / k) for k in ("clip", "diffusion"))
    params = dict(
        data=str(tmp_path),
        preset="mini",
        backbone=str(clip),
        diffusion=str(sd),
        emogen=str(tmp_path),
    )

    def look():
        found = cells("emoset", [*EMOSET, "cell-05"], **params)
        return found["files"].set_index(["what", "file"])

    clips, diffusions = "CLIP ViT-L/14", "Stable Diffusion 1.5"
    t = look()
    assert (
        (t.there[[clips, diffusions]] == "yes").all()
        and "https://github.com/toshas/torch-fidelity" in t.source["inception"].iloc[0]
        and "https://download.pytorch.org" in t.source["alexnet"].iloc[0]
    )
    for f in (clip / "tokenizer.json", sd / "tokenizer/tokenizer.json"):
        f.unlink()
        (f.parent / "vocab.json").write_text("{}")
    for f, size in (
        (clip / "model.safetensors", -100),
        (next((sd / "unet").glob("*.safetensors")), None),
    ):
        f.write_bytes(f.read_bytes()[:size] if size else b"")
    t = look()
    assert (
        t.there[clips, "model.safetensors"] == "broken"
        and t.there[diffusions, "unet/diffusion_pytorch_model.safetensors"] == "broken"
    )
    assert (
        t.there[clips, "tokenizer.json or vocab.json and merges.txt"]
        == t.there[
            diffusions, "tokenizer/tokenizer.json or tokenizer/vocab.json and tokenizer/merges.txt"
        ]
        == "missing"
        and (t.there == "broken").sum() == 2
    )
    for f in (clip, sd / "tokenizer"):
        (f / "merges.txt").touch()
    assert (look().there[[clips, diffusions]] != "missing").all()
    with pytest.raises(
        FileNotFoundError, match=r"CLIP ViT-L/14: model.safetensors \(broken: put it there again\)"
    ):
        cells("emoset", [*EMOSET, "cell-05", "cell-06"], **params, dry=False)


@pytest.mark.parametrize(
    "name, params, says",
    [
        ("emoset", dict(max_kept=-1), "max_kept must be at least 0"),
        ("emoset", dict(num_images=0), "num_images must be at least 1"),
        ("emoset", dict(steps=0), "steps must be above 0"),
    ],
)
def test_parameters_out_of_range_are_refused_at_once(cells, name, params, says):
    first = EMOSET if name == "emoset" else ["from uniemo.runs import Run", "at_least("]
    with pytest.raises(ValueError, match=says):
        cells(name, first, **params)


@pytest.mark.parametrize(
    "name, params, says",
    [
        ("quickstart", dict(ratio="2.0"), "ratio must be below 1, not 2.0"),
        ("quickstart", dict(max_kept="0"), "max_kept must be at least 1, not 0"),
        ("quickstart", dict(num_per_emotion="0"), "num_per_emotion must be at least 1, not 0"),
        ("joint", dict(num_images="0"), "num_images must be at least 1, not 0"),
        ("understanding", dict(processes="0"), "processes must be at least 1, not 0"),
        ("experts", dict(sizes="[300, 0]"), "sizes must be at least 1, not 0"),
        ("feedback", dict(num_seeds="1"), "num_seeds must be at least 2, not 1"),
        ("emoset", dict(num_real="0"), "num_real must be at least 1, not 0"),
        ("evaluate", dict(num_test="-5"), "num_test must be at least 1, not -5"),
        ("controls", dict(num_images="0"), "num_images must be at least 1, not 0"),
    ],
)
def test_what_a_comment_rules_out_is_refused_before_the_first_cell(tmp_path, name, params, says):
    with pytest.raises(ValueError, match=says):
        start(name, params, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())
