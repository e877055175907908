"The tour and the pre-training run headless from end to end, on tiny settings."

import json

import numpy as np
import pytest
import torch

from uniemo import runs
from uniemo.diffusion.latents import open_diffusion
from uniemo.files.shipped import check_manifest
from uniemo.mini.autoencoder import AutoencoderStage, build_vae, only_decoder
from uniemo.mini.clip import ClipStage, build_clip, clip_config, load_clip
from uniemo.mini.shipping import ship
from uniemo.mini.splits import paint_neutral
from uniemo.mini.tokens import build_tokenizer
from uniemo.train.config import TrainConfig
from uniemo.train.trainer import Trainer


def run(name, tmp_path, **params):
    done = runs.start(name, params, runs_dir=tmp_path, progress=False)
    assert done.status == "completed" and (done.dir / "executed.ipynb").exists()
    return done


@pytest.fixture(scope="session")
def data():
    return paint_neutral(3, 32)


def trained_clip(data, tmp_path, until=None, folder=None):
    "Weights of a mini CLIP after six steps, or of one that went on after `until`."
    tokenizer = build_tokenizer(tmp_path / "tokenizer")
    torch.manual_seed(0)
    stage = ClipStage(build_clip(tokenizer), tokenizer)
    config = clip_config(6, batch_size=8, save_every=2, eval_every=6)
    Trainer(stage, config, data, data, folder, progress=False).fit(until=until)
    return stage.state_dict()


def test_pre_training_that_was_broken_off_goes_on_exactly(data, tmp_path):
    whole = trained_clip(data, tmp_path)
    trained_clip(data, tmp_path, until=4, folder=tmp_path / "broken")
    resumed = trained_clip(data, tmp_path, folder=tmp_path / "broken")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_an_autoencoder_stops_early_and_its_decoder_goes_on(data):
    torch.manual_seed(0)
    vae, images = build_vae(), dict(images=data["images"])
    config = TrainConfig(steps=6, batch_size=8, eval_every=3)
    first = Trainer(AutoencoderStage(vae), config, images, images, progress=False)
    assert first.fit(until=3).step == 3
    errors = [row["mae"] for row in first.history if row["split"] == "valid"]
    assert np.isfinite(errors).all() and len(errors) == 1
    encoder = {k: v.clone() for k, v in vae.encoder.state_dict().items()}
    decoder = vae.decoder.conv_in.weight.clone()
    clip, _ = load_clip()
    stage = AutoencoderStage(only_decoder(vae), clip.requires_grad_(False), mirror=False)
    Trainer(stage, config, images, progress=False).fit()
    assert all(torch.equal(v, encoder[k]) for k, v in vae.encoder.state_dict().items())
    assert not torch.equal(vae.decoder.conv_in.weight, decoder)


def test_tour(warm, tmp_path, run_again):
    done = run(run_again("tour"), tmp_path, num_images=80, num_samples=8, steps=3, workers=1)
    summary = json.loads((done.dir / "summary.json").read_text())
    assert summary["problems"] == 0 and summary["clip_object"] > 0.85
    figures = {p.name for p in (done.dir / "figures").iterdir()}
    assert figures >= {"world.png", "bayes.png", "painted.png"}


@pytest.mark.long
def test_pretraining(warm, tmp_path):
    # one thread: beside other tests, two wait for each other most of the time
    tiny = dict(num_images=64, num_validation=32, eval_every=2, workers=1, num_threads=1)
    clip = run("pretrain_clip", tmp_path, steps=2, batch_size=8, **tiny)
    _, tokenizer = load_clip(clip.dir / "clip")
    assert tokenizer.tokenize("<emotion>") == ["<emotion>"]


@pytest.mark.long
def test_pretraining_of_an_autoencoder_and_both_denoisers(warm, tmp_path):
    tiny = dict(world="2.0", num_images=64, num_validation=32, workers=1, num_threads=1)
    first = dict(start="mini", latent_channels=8, perceptual=True)
    steps = dict(steps=2, stop=1, decoder_steps=1, batch_size=2)
    autoencoder = run("pretrain_autoencoder", tmp_path, **first, **steps, **tiny)
    lines = (autoencoder.dir / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line).get("part") for line in lines} >= {"vae", "decoder"}
    few = dict(steps=2, batch_size=4, eval_every=2, mirror=True)
    few |= dict(num_samples=4, num_prompts=4, num_shown=4)
    for denoiser, model in dict(unet="UNet2D", transformer="SD3").items():
        given = dict(denoiser=denoiser, vae_folder=str(autoencoder.dir / "autoencoder"))
        made = run("pretrain_diffusion", tmp_path, **given, **few, **tiny)
        pipe = open_diffusion(made.dir / "diffusion")
        part = pipe.components["unet" if denoiser == "unet" else "transformer"]
        assert type(part).__name__.startswith(model) and part.config.in_channels == 8
    entry = ship(made.dir, "diffusion", tmp_path / "shipped", "flow")
    assert entry["parameters"]["steps"] == 2
    assert check_manifest(tmp_path / "shipped") == []
    assert list((made.dir / "figures").glob("samples_*.png"))
