"""Every stage on a device that is not the CPU: on a GPU where there is one, else on a stand-in.

The stand-in (`standin.py`) refuses an operator whose tensors lie on different devices.
"""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from uniemo import UniEmoPipeline
from uniemo.files.shipped import shipped_folder
from uniemo.joint import JointConfig, train_joint
from uniemo.measure.evidence import EvidenceReader
from uniemo.measure.generation import evaluate_generation
from uniemo.mini import draw_spec, load_clip, load_judge, mini_networks, paint_splits, render
from uniemo.mini.autoencoder import AutoencoderStage, build_vae, encode_latents, vae_scores
from uniemo.mini.diffusion import (
    DiffusionStage,
    build_unet,
    diffusion_scores,
    samples_to_paint,
    save_diffusion,
    with_captions,
)
from uniemo.mini.fewsteps import FewStepStage, save_few_steps
from uniemo.mini.flow import FlowStage, build_transformer
from uniemo.mini.pretraining import strongest_clip, with_mirrored
from uniemo.mini.splits import paint_neutral
from uniemo.mini.worlds import world_of
from uniemo.space import fit_space
from uniemo.train import TrainConfig, Trainer, trainer
from uniemo.understanding import (
    UnderstandingConfig,
    encoder_view,
    name_features,
    plain_batches,
    train_understanding,
)

HAS_GPU = torch.cuda.is_available()
if HAS_GPU:
    # a stand-in beside a GPU would be taken for the machine's accelerator
    DEVICE, stand_in, DeviceMismatch = torch.device("cuda", 0), nullcontext, RuntimeError
else:
    from standin import DEVICE, DeviceMismatch, stand_in
FIRST = UnderstandingConfig.preset(
    "mini", epochs=None, steps=2, eval_every=2, batch_size=16, num_queries=2
)
SECOND = JointConfig.preset(
    "mini", steps=2, eval_every=2, batch_size=8, num_queries=2, warm_start=4
)


@pytest.fixture(autouse=True)
def device(monkeypatch):
    "What trainers and pipelines of the test compute on."
    build = trainer.build_accelerator

    def on_the_device(*args, **kwargs):
        accelerator = build(*args, **kwargs)
        accelerator.state.device = DEVICE
        return accelerator

    if not HAS_GPU:
        monkeypatch.setattr(trainer, "build_accelerator", on_the_device)
    with stand_in():
        yield DEVICE


@pytest.fixture(scope="module")
def splits():
    return paint_splits(32, 16, 16)


@pytest.fixture(scope="module")
def images():
    return [render(draw_spec(999, i)).image for i in range(16)]


@pytest.fixture
def pipe(device):
    pipe = UniEmoPipeline.from_pretrained("mini")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def test_the_stand_in_refuses_what_a_gpu_refuses(device):
    layer = torch.nn.Linear(4, 2).to(device)
    layer(torch.randn(3, 4, device=device)).sum().backward()
    assert layer.weight.grad.device.type == device.type
    with pytest.raises(DeviceMismatch):
        layer(torch.randn(3, 4))


def test_both_stages(splits, tmp_path):
    "Steps, validation, best weights, warm start, latents, predictions."
    first = train_understanding(splits, FIRST, folder=tmp_path / "first", progress=False)
    assert first.trainer.device.type == DEVICE.type
    text = name_features("mini", splits.names)
    second = train_joint(
        splits, SECOND, first.model, "mini", folder=tmp_path / "second", text=text, progress=False
    )
    assert np.isfinite(list(second.metrics.values())).all()


def test_the_emotion_space(splits, pipe):
    batches = plain_batches(splits["train"], encoder_view(pipe.encoder))
    for kind in ("diagonal", "lowrank", "bank"):
        space = fit_space(batches, pipe.encoder, emotions=splits.emotions.names, kind=kind)
        drawn = space.sample("awe", 2, device=DEVICE)
        assert all(x.device.type == DEVICE.type for x in drawn)
        batches = plain_batches(splits["train"], encoder_view(pipe.encoder))


def test_the_pipeline_answers_as_on_the_cpu(pipe, images):
    there = pipe.understand(images[:4])
    made = pipe.generate("awe", 2, num_inference_steps=3)
    edited = pipe.generate("fear", 2, image=images[0], num_inference_steps=3, intensity=1.5)
    pipe.generate(reference=images[1], num_inference_steps=2)
    pipe.generate({"awe": 0.5, "fear": 0.5}, 2, num_inference_steps=2)
    pipe.to("cpu")
    here = pipe.understand(images[:4])
    np.testing.assert_allclose(there.probabilities, here.probabilities, atol=1e-3)
    assert len(made) == len(edited) == 2
    if not HAS_GPU:
        again = pipe.generate("awe", 2, num_inference_steps=3)
        apart = np.asarray(made.images[0]).astype(int) - np.asarray(again.images[0])
        assert np.abs(apart).max() <= 2


def test_evidence_of_the_filter(pipe, images, device):
    clip, _ = load_clip(shipped_folder("clip"))
    reader = EvidenceReader(clip.to(device), encoder_view(pipe.encoder), classifier=pipe.encoder)
    evidence = reader(images, np.arange(16) % 8)
    assert evidence.features.device.type == evidence.logits.device.type == "cpu"


def test_metrics_of_generation(images, device):
    judge = load_judge().to(device)
    emotions = ["awe", "fear"] * 8
    scores = evaluate_generation(images, emotions, images[::-1], mini_networks(judge))
    assert np.isfinite(scores.value.dropna()).all()


def test_pretraining_of_the_mini_models(tmp_path, device):
    "An autoencoder, both denoisers, and the few steps of one."
    world = world_of("2.0")
    clip, tokenizer = strongest_clip(world)
    data = paint_neutral(0, 8, world=world)
    config = TrainConfig(steps=2, batch_size=4, eval_every=2, ema_decay=0.9)
    vae = build_vae(8)
    images = dict(images=data["images"])
    Trainer(AutoencoderStage(vae, clip), config, images, images, progress=False).fit()
    vae.eval().requires_grad_(False)
    assert vae_scores(vae, clip, tokenizer, data)["mae"] > 0
    double = with_mirrored(data)
    latents = encode_latents(vae, double["images"], progress=False).float()
    captioned = with_captions(double, tokenizer)
    learned = dict(latents=latents, **{k: captioned[k] for k in ("input_ids", "patches")})
    transformer = build_transformer()
    parts = (vae, clip, tokenizer, 1e-3)
    stages = {
        "unet": lambda: DiffusionStage(build_unet(8), *parts),
        "flow": lambda: FlowStage(transformer, *parts),
        "fewsteps": lambda: FewStepStage(transformer, *parts, rank=2),
    }
    asked = samples_to_paint(2, world)
    for name, build in stages.items():
        stage = build()
        fitted = Trainer(stage, config, learned, asked, tmp_path / name, progress=False).fit()
        assert "sample_object" in fitted.history[-2] or "sample_object" in fitted.history[-1]
        stage.eval().requires_grad_(False)
        scores, *_ = diffusion_scores(stage.pipeline(), clip, 2, steps=2)
        assert 0 <= scores["object"] <= 1
    save_few_steps(transformer.to("cpu"), tmp_path / "lora")
    save_diffusion(stages["unet"]().pipeline(), tmp_path / "saved")
