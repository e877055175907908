"The shipped foundation models, and the tokenizer with Stable Diffusion's own vocabulary."

import gzip
import json
from importlib.metadata import PackageNotFoundError, files

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from uniemo import foundation as f
from uniemo.mini.world import OBJECT_NAMES, SCENE_NAMES, WORLD_VERSION, draw_spec, paint

shipped = pytest.mark.skipif(
    not (f.files("uniemo") / "assets/mini/manifest.json").is_file(),
    reason="no mini models in this checkout: run `make pretrain`",
)


@pytest.fixture(scope="session")
def held_out():
    return paint([draw_spec(4711, i, neutral=True) for i in range(400)], workers=1, progress=False)


@pytest.fixture(scope="session")
def real_tokenizer():
    "Stable Diffusion's tokenizer, made from the merges that open_clip_torch ships (the file is read, the package not imported)."
    try:
        path = next(
            p for p in files("open_clip_torch") if p.name == "bpe_simple_vocab_16e6.txt.gz"
        ).locate()
    except PackageNotFoundError:
        pytest.skip("open_clip_torch is not installed: it ships CLIP's vocabulary")
    merges = [
        tuple(line.split())
        for line in gzip.open(path, "rt", encoding="utf-8")
        .read()
        .split("\n")[1 : 49152 - 256 - 2 + 1]
    ]
    letters = (
        list(range(ord("!"), ord("~") + 1))
        + list(range(ord("¡"), ord("¬") + 1))
        + list(range(ord("®"), ord("ÿ") + 1))
    )
    letters = [chr(b) for b in letters] + [chr(256 + k) for k in range(256 - len(letters))]
    tokens = (
        letters
        + [c + "</w>" for c in letters]
        + ["".join(m) for m in merges]
        + ["<|startoftext|>", "<|endoftext|>"]
    )
    return CLIPTokenizer(
        vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=77
    )


def test_placeholder_is_one_token_of_the_real_vocabulary(real_tokenizer):
    assert len(real_tokenizer) == 49408
    assert real_tokenizer("a photo of a dog").input_ids == [
        49406,
        320,
        1125,
        539,
        320,
        1929,
        49407,
    ]  # CLIP's own ids
    assert len(real_tokenizer.tokenize("<emotion>")) > 1
    real_tokenizer.add_tokens([f.PLACEHOLDER])
    assert (
        real_tokenizer("<emotion> bag").input_ids[1] == 49408
        and len(real_tokenizer.tokenize("<emotion> bag")) == 2
    )


def test_every_name_is_whole_words(tmp_path):
    tokenizer = f.build_tokenizer(tmp_path)
    for name in SCENE_NAMES + OBJECT_NAMES:
        assert tokenizer.tokenize(name) == [w + "</w>" for w in name.split()]
    assert (
        tokenizer.decode(tokenizer("castle 42!").input_ids, skip_special_tokens=True).replace(
            " ", ""
        )
        == "castle42!"
    )


def test_mirrored_and_shifted_labels_follow_the_pixels(tmp_path, held_out, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        f,
        "image_embeds",
        lambda clip, x: (
            seen.update(x=x) or (torch.zeros(len(x), 128), torch.zeros(len(x), 64, 128))
        ),
    )
    monkeypatch.setattr(
        f.F,
        "cross_entropy",
        lambda a, b: (
            seen.update(patches=b)
            if b.dtype == torch.int64 and len(b) == 64 * 8
            else torch.zeros(())
        ),
    )
    tokenizer = f.build_tokenizer(tmp_path)
    clip = f.build_clip(tokenizer)
    position = dict(
        held_out,
        images=np.broadcast_to(
            (np.arange(64) // 8)[None, :, None, None] * 8
            + (np.arange(64) // 8)[None, None, :, None],
            (400, 64, 64, 3),
        ).astype(np.uint8),
        patches=np.broadcast_to(np.arange(64), (400, 64)).astype(np.int8),
    )
    for seed in range(8):  # pixels and labels both hold the number of the patch that they came from
        with pytest.raises(
            TypeError
        ):  # the patched loss returns nothing for the patches: that is where it ends
            f.clip_loss(
                clip, tokenizer, position, np.arange(8), np.random.default_rng(seed), noise=0
            )
        number = ((seen["x"][:, 0] + 1) * 127.5).round().long().reshape(8, 8, 8, 8, 8)
        assert (number == number[:, :, :1, :, :1]).all() and (
            number[:, :, 0, :, 0].flatten() == seen["patches"]
        ).all()


@shipped
def test_manifest_names_every_file_and_all_is_small():
    assert f.check_manifest() == []
    folder = f.mini_folder()
    manifest = json.loads((folder / "manifest.json").read_text())
    listed = {p for entry in manifest.values() for p in entry["sha256"]}
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {
        "manifest.json"
    }
    assert listed == there and sum((folder / p).stat().st_size for p in there) < 25e6
    assert all(entry["world"] == WORLD_VERSION for entry in manifest.values())


@shipped
def test_shipped_clip_names_scene_and_object(held_out):
    scores = f.clip_scores(*f.load_clip(), held_out)
    assert scores["scene"] >= 0.95 and scores["object"] >= 0.85


@shipped
def test_shipped_autoencoder_keeps_the_object(held_out):
    pipe, (clip, tokenizer) = f.load_diffusion(), f.load_clip()
    scores = f.vae_scores(pipe.vae, clip, tokenizer, held_out)
    assert scores["mae"] <= 0.03 and scores["object_ratio"] >= 0.95


@shipped
def test_shipped_pipeline_is_the_trained_sampler(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pipe, (clip, tokenizer) = f.load_diffusion(), f.load_clip()
    pipe.set_progress_bar_config(disable=True)
    prompts, scene, obj = f.balanced_prompts(32, seed=5)
    generators = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
    images = pipe(
        prompts, num_inference_steps=25, guidance_scale=4.0, generator=generators, output_type="pt"
    ).images
    s, o = f.retrieve_names(clip, tokenizer, images * 2 - 1)
    assert (
        (s == scene).mean() > 0.5 and (o == obj).mean() > 0.3
    )  # far above 1/16 and 1/24: scheduler, scale and conditioning fit; the score itself is the experiment's


def test_what_ships_names_no_place_on_the_machine_that_made_it():
    import re

    texts = [
        p for p in f.mini_folder().parent.rglob("*") if p.suffix in (".json", ".csv", ".txt", ".md")
    ]
    assert len(texts) > 10
    assert [
        p.name for p in texts if re.search(r'"(/\w|[A-Z]:\\)[^"]*"', p.read_text(encoding="utf-8"))
    ] == []
