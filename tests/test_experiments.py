"Tiny runs of the experiments: what comes out is meaningless, that it comes out is the test."
import json
import pandas as pd, pytest
from uniemo.mini import write_emoset
from uniemo.runs import resume, start

TINY = dict(steps=4, num_probes=20, batch_size=16, num_threads=1)

def test_understanding_is_repeatable(tmp_path):
    "Same seed, same machine: identical summary.json, with the scores that only a known truth allows."
    runs = [start("understanding", dict(TINY, num_images=160), tmp_path, name, progress=False) for name in ("a", "b")]
    a, b = ((r.dir/"summary.json").read_text() for r in runs)
    assert a == b and {"accuracy", "accuracy_low", "bayes", "pointing_object", "scene_moves", "calibration_error", "wheel_distance"} <= set(json.loads(a))
    assert (runs[0].dir/"model/model.safetensors").exists() and {"attention.png", "curves.png", "confusion.png"} <= {p.name for p in (runs[0].dir/"figures").iterdir()}

def test_understanding_reads_a_folder_of_photographs(tmp_path):
    "No split, no attributes, no known truth, and emotions of one's own."
    photos = write_emoset(tmp_path/"world", 240, progress=False)/"image"
    for old, new in (("amusement", "joy"), ("anger", "fury"), ("awe", "wonder")): (photos/old).rename(photos/new)
    run = start("understanding", dict(TINY, data=str(photos)), tmp_path/"runs", progress=False)
    summary = run.summary()
    assert {"accuracy", "macro_f1"} <= set(summary) and not {"bayes", "pointing_object", "wheel_distance"} & set(summary)
    assert json.loads((run.dir/"model/config.json").read_text())["class_names"] == sorted(p.name for p in photos.iterdir())

def test_experts_goes_on_where_it_was_stopped(tmp_path):
    params = dict(sizes=[16], steps=[2], seeds=[0, 1], search_seeds=[100], lr_backbone=[1e-4], lr_new=[1e-3], num_validation=16, num_test=24, num_probes=8, ablation_size=16, weak_steps=0, batch_size=8, num_threads=1, arms=["plain", "registers", "expert"])
    run = start("experts", params, tmp_path, progress=False); table = pd.read_csv(run.dir/"runs.csv")
    assert len(table) == 9 and run.summary()["dry_run"] is True and "difference_16" in run.summary()
    table.iloc[:5].to_csv(run.dir/"runs.csv", index=False); run._set(status="interrupted")           # as if it had been killed after five trainings
    again = pd.read_csv(resume(run, progress=False).dir/"runs.csv")
    assert len((run.dir/"metrics.jsonl").read_text().splitlines()) == 9 + 4                           # four were trained again
    pd.testing.assert_frame_equal(again, table)
    with pytest.raises(Exception, match="needs its steps"): start("experts", dict(params, steps=[2, 3]), tmp_path, progress=False)
