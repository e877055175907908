"Tiny runs of the experiments: what comes out is meaningless, that it comes out is the test."
import json
import pandas as pd, pytest
from uniemo.mini import write_emoset
from uniemo.runs import RunFailed, resume, start

TINY = dict(steps=4, num_probes=20, batch_size=16, num_threads=1)

def test_understanding_is_repeatable(tmp_path, run_again):
    "Same seed, same machine: identical summary.json, in a second process and after a second Run All, with the scores that only a known truth allows."
    runs = [start(notebook, dict(TINY, num_images=160), tmp_path, name, progress=False) for notebook, name in (("understanding", "a"), (run_again("understanding"), "b"))]
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
    other = start("experts", dict(params, previous=[str(run.dir)]), tmp_path, progress=False); assert not (other.dir/"metrics.jsonl").exists()    # nothing was trained
    table.iloc[3:].to_csv(run.dir/"runs.csv", index=False); table.iloc[:7].to_csv(other.dir/"runs.csv", index=False); other._set(status="interrupted")     # one half here, one there, some in both
    joined = resume(other, progress=False); assert not (joined.dir/"metrics.jsonl").exists() and joined.summary()["difference_16"] == run.summary()["difference_16"]
    assert len(pd.read_csv(joined.dir/"runs.csv")) == 9
    with pytest.raises(RunFailed, match="num_probes is 8 there"): start("experts", dict(params, num_probes=9, previous=[str(run.dir)]), tmp_path, progress=False)
    with pytest.raises(Exception, match="needs its steps"): start("experts", dict(params, steps=[2, 3]), tmp_path, progress=False)

@pytest.mark.parametrize("dry", [True, False])
def test_emoset_stops_where_files_are_missing(tmp_path, monkeypatch, dry):
    "Dry: it looks and says what is missing. Else it stops there, before anything is trained."
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path/"cache")); monkeypatch.setenv("TORCH_HOME", str(tmp_path/"torch"))
    params = dict(dry=dry, data=str(tmp_path/"nowhere"), emogen=str(tmp_path/"nothing"))
    if dry: summary = start("emoset", params, tmp_path/"runs", progress=False).summary(); assert summary == dict(summary, dry=True, missing=21)
    else:
        with pytest.raises(RunFailed, match="21 of 21 files are missing.*info.json.*clip-vit-large-patch14.*stable-diffusion-v1-5"): start("emoset", params, tmp_path/"runs", progress=False)

def test_emoset_by_parameters_only(tmp_path):
    "The whole path, mini models in the place of the full ones: data read from files, latents made on the way, images, metrics; and once more where it was stopped."
    tiny = dict(batch_size=8, micro_batch=4, workers=0, cpu=True); data = write_emoset(tmp_path/"world", 64, progress=False, splits=(.5, .25, .25))
    run = start("emoset", dict(dry=False, data=str(data), backbone="mini", diffusion="mini", networks="mini", preset="mini", steps=2, num_images=2, num_inference_steps=2, batch_size=2, metric_size=64, num_real=16,
                               understanding_settings=tiny, joint_settings=tiny, num_threads=1, progress=False), tmp_path/"runs", "tiny", progress=False)
    summary = run.summary(); assert {"accuracy_stage1", "accuracy", "fid", "lpips", "emo_a", "sem_c", "sem_d"} <= set(summary) and not summary["dry"] and len(list((run.dir/"images").glob("*.png"))) == 16
    (run.dir/"images/awe-0-1.png").unlink(); kept = (run.dir/"images/fear-0-0.png").stat().st_mtime_ns; run._set(status="interrupted"); again = resume(run, progress=False)
    assert (run.dir/"images/awe-0-1.png").exists() and (run.dir/"images/fear-0-0.png").stat().st_mtime_ns == kept and again.summary()["fid"] == pytest.approx(summary["fid"], rel=1e-3)
