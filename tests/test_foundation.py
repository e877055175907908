"The shipped models, and the tokenizer with Stable Diffusion's own vocabulary."

import gzip
import re
from importlib.metadata import PackageNotFoundError, files

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from transformers import CLIPTokenizer

from uniemo.files.shipped import check_manifest, read_manifest, shipped_folder
from uniemo.mini.autoencoder import vae_scores
from uniemo.mini.clip import clip_scores, load_clip, retrieve_names, shift_patches
from uniemo.mini.diffusion import (
    SCHEDULE,
    balanced_prompts,
    diffusion_pipeline,
    load_diffusion,
    save_diffusion,
)
from uniemo.mini.interaction import INTERACTION_VERSION
from uniemo.mini.splits import paint_neutral
from uniemo.mini.tokens import PLACEHOLDER, build_tokenizer
from uniemo.mini.truth import OBJECT_NAMES, SCENE_NAMES, WORLD_VERSION


@pytest.fixture(scope="session")
def held_out():
    return paint_neutral(4711, 400)


@pytest.fixture(scope="session")
def pipe():
    pipe = load_diffusion()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def real_tokenizer():
    "Stable Diffusion's tokenizer, made from the merges that open_clip_torch ships."
    try:
        name = "bpe_simple_vocab_16e6.txt.gz"
        path = next(p for p in files("open_clip_torch") if p.name == name).locate()
    except PackageNotFoundError:
        pytest.skip("open_clip_torch is not installed: it ships CLIP's vocabulary")
    with gzip.open(path, "rt", encoding="utf-8") as f:
        lines = f.read().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    spans = ("!~", "¡¬", "®ÿ")
    codes = [code for a, b in spans for code in range(ord(a), ord(b) + 1)]
    letters = [chr(code) for code in codes]
    letters += [chr(256 + k) for k in range(256 - len(letters))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: k for k, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


# ---- tokens


def test_placeholder_is_one_token_of_the_real_vocabulary(real_tokenizer):
    assert len(real_tokenizer) == 49408
    # CLIP's own ids
    ids = [49406, 320, 1125, 539, 320, 1929, 49407]
    assert real_tokenizer("a photo of a dog").input_ids == ids
    assert len(real_tokenizer.tokenize("<emotion>")) > 1
    real_tokenizer.add_tokens([PLACEHOLDER])
    assert real_tokenizer("<emotion> bag").input_ids[1] == 49408
    assert len(real_tokenizer.tokenize("<emotion> bag")) == 2


def test_every_name_is_whole_words(tmp_path):
    tokenizer = build_tokenizer(tmp_path)
    for name in SCENE_NAMES + OBJECT_NAMES:
        assert tokenizer.tokenize(name) == [word + "</w>" for word in name.split()]
    ids = tokenizer("castle 42!").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "castle42!"


def test_mirrored_and_shifted_labels_follow_the_pixels():
    "Pixels and labels both hold the number of the patch that they came from."
    numbers = torch.arange(64)
    picture = numbers.view(8, 8).repeat_interleave(8, 0).repeat_interleave(8, 1)
    images = picture[None, :, :, None].expand(4, 64, 64, 3).byte()
    for seed in range(8):
        rng = np.random.default_rng(seed)
        shifted, labels = shift_patches(images, numbers.expand(4, 64), rng)
        cells = shifted[..., 0].unflatten(1, (8, 8)).unflatten(3, (8, 8))
        assert (cells == cells[:, :, :1, :, :1]).all()
        assert (cells[:, :, 0, :, 0].flatten(1) == labels).all()


# ---- what ships


def test_manifest_names_every_file_and_all_is_small():
    assert check_manifest() == []
    folder, manifest = shipped_folder(), read_manifest()
    listed = {name for entry in manifest.values() for name in entry["sha256"]}
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert listed == there - {"manifest.json"}
    # with results and the static page: what is allowed in the wheel
    shipped = sum(p.stat().st_size for p in folder.parent.rglob("*") if p.is_file())
    assert shipped < 45e6
    second = {name for name, entry in manifest.items() if entry["world"] == INTERACTION_VERSION}
    assert second == {"clip_middle", "clip_strong", "diffusion_strong"}
    first = [entry["world"] for name, entry in manifest.items() if name not in second]
    assert set(first) == {WORLD_VERSION}


def test_what_ships_names_no_place_on_the_machine_that_made_it():
    kinds = (".json", ".csv", ".txt", ".md")
    texts = [p for p in shipped_folder().parent.rglob("*") if p.suffix in kinds]
    assert len(texts) > 10
    place = re.compile(r'"(/\w|[A-Z]:\\)[^"]*"')
    assert [p.name for p in texts if place.search(p.read_text(encoding="utf-8"))] == []


def test_shipped_clip_names_scene_and_object(held_out):
    scores = clip_scores(*load_clip(), held_out)
    assert scores["scene"] >= 0.95 and scores["object"] >= 0.85


def test_shipped_autoencoder_keeps_the_object(pipe, held_out):
    scores = vae_scores(pipe.vae, *load_clip(), held_out)
    assert scores["mae"] <= 0.03 and scores["object_ratio"] >= 0.95


def named_rightly(pipe, num=16, **sampling):
    "Shares of scenes and objects that the mini CLIP finds in what a pipeline paints."
    prompts, scene, named = balanced_prompts(num, seed=5)
    generators = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
    how = dict(guidance_scale=4.0, generator=generators, output_type="pt")
    images = pipe(prompts, **how, **sampling).images
    found = retrieve_names(*load_clip(), images * 2 - 1)
    return (found[0] == scene).mean(), (found[1] == named).mean()


def test_shipped_pipeline_is_the_trained_sampler(pipe, monkeypatch):
    "Far above 1/16 and 1/24: scheduler, scale and conditioning fit."
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    scene, named = named_rightly(pipe, num_inference_steps=25)
    assert scene > 0.5 and named > 0.3


@pytest.mark.parametrize("kind, steps", [(DDIMScheduler, 20), (DDPMScheduler, 40)])
def test_samplers_made_from_the_shipped_scheduler_paint_as_well(pipe, kind, steps):
    "Latents are not bounded as images are: clipped at every step they give washed-out pictures."
    assert pipe.scheduler.config.clip_sample is False
    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.scheduler = kind.from_config(pipe.scheduler.config)
    other.set_progress_bar_config(disable=True)
    scene, named = named_rightly(other, num_inference_steps=steps)
    assert scene > 0.5 and named > 0.3


def test_what_is_saved_clips_no_latents(pipe, tmp_path):
    _, tokenizer = load_clip()
    save_diffusion(pipe, tmp_path)
    again = load_diffusion(tmp_path)
    assert DDIMScheduler.from_config(again.scheduler.config).config.clip_sample is False
    made = diffusion_pipeline(pipe.unet, pipe.vae, pipe.text_encoder, tokenizer)
    ours, theirs = (dict(p.scheduler.config) for p in (made, again))
    assert {k: ours[k] for k in SCHEDULE} == {k: theirs[k] for k in SCHEDULE}
