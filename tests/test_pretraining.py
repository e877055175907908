"The tour and the pre-training run headless from end to end, on tiny settings."

import json

import pytest

from uniemo import foundation, runs

shipped = pytest.mark.skipif(
    not (foundation.files("uniemo") / "assets/mini/manifest.json").is_file(),
    reason="no mini models in this checkout: run `make pretrain`",
)


def run(name, tmp_path, **params):
    done = runs.start(name, params, runs_dir=tmp_path, progress=False)
    assert done.status == "completed" and (done.dir / "executed.ipynb").exists()
    return done


@shipped
def test_tour(tmp_path, run_again):
    done = run(run_again("tour"), tmp_path, num_images=80, num_samples=8, steps=3, workers=1)
    summary = json.loads((done.dir / "summary.json").read_text())
    assert summary["problems"] == 0 and summary["clip_object"] > 0.85
    assert {p.name for p in (done.dir / "figures").iterdir()} >= {
        "world.png",
        "bayes.png",
        "painted.png",
    }


@shipped
def test_pretraining(tmp_path):
    clip = run(
        "pretrain_clip",
        tmp_path,
        num_images=64,
        num_validation=32,
        steps=2,
        batch_size=8,
        eval_every=2,
        workers=1,
    )
    model, tokenizer = foundation.load_clip(clip.dir / "clip")
    assert tokenizer.tokenize("<emotion>") == ["<emotion>"]
    diffusion = run(
        "pretrain_diffusion",
        tmp_path,
        clip_folder=str(clip.dir / "clip"),
        num_images=64,
        num_validation=32,
        vae_steps=2,
        vae_stop=1,
        vae_batch_size=2,
        unet_steps=2,
        unet_batch_size=4,
        decoder_steps=1,
        num_samples=4,
        num_prompts=4,
        eval_every=2,
        workers=1,
    )
    assert foundation.load_diffusion(diffusion.dir / "diffusion").unet.config.sample_size == 16
    entry = foundation.ship(diffusion.dir, "diffusion", tmp_path / "shipped")
    assert (
        entry["parameters"]["unet_steps"] == 2
        and foundation.check_manifest(tmp_path / "shipped") == []
    )
    losses = [
        json.loads(line) for line in (diffusion.dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert {row.get("part") for row in losses} >= {"vae", "unet", "decoder"}
