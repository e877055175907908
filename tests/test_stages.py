"The mini world's stages in a row, and tiny runs of the experiments that are built on them."

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from uniemo.data.checking import check
from uniemo.data.emoset import EmoSet
from uniemo.data.splits import three_splits
from uniemo.data.transforms import NetworkView
from uniemo.feedback import read_candidates
from uniemo.joint import JointConfig
from uniemo.mini.stages import (
    Budget,
    candidates,
    joint,
    kept,
    load_world,
    metrics_of,
    open_pipeline,
    read_kept,
    settings_of,
    understanding,
)
from uniemo.mini.story import Source
from uniemo.mini.writing import write_emoset
from uniemo.runs import RunFailed, start
from uniemo.runs.store import Store
from uniemo.understanding import UnderstandingConfig

DATA = dict(num_train=48, num_val=16, num_test=16, seed=0)
SHORT = dict(seed=0, steps=4, eval_every=4, num_queries=2)
FIRST = settings_of(UnderstandingConfig.preset("mini", **SHORT, epochs=None, batch_size=16))
SECOND = settings_of(JointConfig.preset("mini", **SHORT, batch_size=8, warm_start=4))
pytestmark = pytest.mark.usefixtures("short_warm_start")
TINY = dict(understanding_steps=2, joint_steps=2, num_inference_steps=1, num_threads=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("stages"), code="one")


@pytest.fixture(scope="module")
def trained(store):
    encoder = store(understanding, data=DATA, config=FIRST)
    return encoder, store(joint, data=DATA, encoder=encoder, config=SECOND)


def test_a_trained_stage_survives_a_kill_while_it_tidies_up(tmp_path, monkeypatch):
    own = Store(tmp_path, code="one")
    removed = shutil.rmtree

    def half(path, **kwargs):
        (path / "best.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", half)
    with pytest.raises(KeyboardInterrupt):
        own(understanding, data=DATA, config=FIRST)
    monkeypatch.setattr(shutil, "rmtree", removed)
    folder = own(understanding, data=DATA, config=FIRST)
    assert metrics_of(folder)["steps"] == 4
    assert not (folder / "checkpoints").exists()


# ---- from real images to kept ones, and again


def test_from_real_to_kept(store, trained):
    encoder, two = trained
    wanted = {"accuracy", "val_loss_diff", "val_word_accuracy", "scene_accuracy"}
    assert wanted <= set(metrics_of(two))
    made = store(candidates, pipeline=two, num_per_emotion=2, num_inference_steps=2)
    images, table = read_candidates(made)
    assert images.shape == (16, 64, 64, 3)
    assert list(table.groupby("emotion").size()) == [2] * 8
    assert table.scene.notna().all()
    how = dict(data=DATA, encoder=encoder, candidates=made, max_kept=1)
    every = store(kept, how=[], **how)
    assert metrics_of(every)["kept"] == 8
    chosen = store(kept, how=["diverse"], **how)
    for folder in (every, chosen):
        check_kept(folder, images, table)
    again = store(understanding, data=DATA, config=FIRST, extra=dict(images=every, ratio=0.25))
    assert metrics_of(again)["images"] == 48 + 8
    with pytest.raises(ValueError, match="ratio"):
        store(understanding, data=DATA, config=FIRST, extra=dict(images=every, ratio=1.0))


def check_kept(folder, images, table):
    "Kept images stand in EmoSet's format, pixel by pixel, with their origin."
    data = EmoSet(folder / "emoset", "train")
    assert len(data) == 8
    assert not len(check(folder / "emoset", verbose=False))
    for i, path in enumerate(data.columns["annotation"]):
        note = json.loads((data.root / path).read_text())
        made = note["generated"]
        at = np.flatnonzero((table.seed == made["seed"]) & (table["index"] == made["index"]))[0]
        assert note["emotion"] == made["emotion"] == table.emotion[at]
        assert made["attributes"]["scene"] == table.scene[at]
        assert "confidence" in made["scores"]
        assert "/" not in made["path"]
        assert np.array_equal(np.asarray(data.image(i)), images[at])
    pictures, labels = read_kept(folder)
    assert len(pictures) == 8
    assert sorted(labels) == list(range(8))


def test_the_second_world(store):
    "Its own CLIP, diffusion model, names and judge; what is saved names them, and is opened again."
    budget = Budget(48, 16, 2, 2, world="2.0")
    data, small = budget.data(0), dict(batch_size=16, eval_every=2)
    config = budget.first(0, "names") | small
    encoder = store(understanding, data=data, config=config)
    second = budget.second(0, warm_start=4) | small
    two = store(joint, data=data, encoder=encoder, config=second, diffusion=budget.diffusion)
    note = json.loads((two / "pipeline/uniemo.json").read_text())
    assert note["diffusion"] == "mini:diffusion_strong"
    pipe = open_pipeline(two)
    # an object that came with the second world
    assert "Chair" in pipe.retriever.names("object")
    made = pipe.generate("awe", 2, num_inference_steps=1)
    right, judged = Source(world=data).judge(np.stack(made.images), made.to_pandas())
    assert right.mean() == judged["emo_a"] and 0.8 < judged["bayes"] < 0.9
    with pytest.raises(ValueError, match="1.0, 2.0"):
        Budget(world="3.0")
    with pytest.raises(ValueError, match="mini:diffusion_strong"):
        Budget(diffusion="mini:diffusion_weak")


def test_nothing_kept_says_so(tmp_path):
    (tmp_path / "metrics.json").write_text('{"kept": 0}')
    with pytest.raises(ValueError, match="nothing was kept"):
        understanding(tmp_path / "stage", DATA, FIRST, extra=dict(images=tmp_path))


def test_a_kept_set_of_other_names_is_refused(tmp_path):
    "Kept images are read by name: what is no name of the data cannot join it."
    root = write_emoset(tmp_path / "other", 16, progress=False)
    note = next((root / "annotation").rglob("*.json"))
    text = json.loads(note.read_text())
    note.write_text(json.dumps(dict(text, scene="moon")))
    with pytest.raises(ValueError, match="moon"):
        understanding(tmp_path / "stage", DATA, FIRST, extra=dict(images=root))


def test_each_network_reads_a_photograph_at_its_own_size(tmp_path, monkeypatch):
    "The latents are of the photograph, not of a small encoder's view enlarged."
    from transformers import CLIPModel

    import uniemo.joint
    from uniemo.data.transforms import eval_transform
    from uniemo.mini.clip import load_clip
    from uniemo.queries import ExpertQueryModel

    small = tmp_path / "clip"
    shutil.copytree(uniemo_clip(), small)
    config = load_clip()[0].config
    config.vision_config.image_size = 32
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(small)
    root = write_emoset(tmp_path / "world", 48, size=128, progress=False)
    read, cache = [], uniemo.joint.cache_latents

    def noting(vae, images, *args, **kwargs):
        read.append(images)
        return cache(vae, images, *args, **kwargs)

    monkeypatch.setattr(uniemo.joint, "cache_latents", noting)
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    understanding(first, str(root), FIRST, backbone=str(small))
    assert ExpertQueryModel.from_pretrained(first / "model").config.image_size == 32
    joint(second, str(root), first, SECOND, text=str(small))
    assert (second / "metrics.json").exists()
    photos = EmoSet(root, "train", transform=eval_transform(64, fraction=1.0))
    want = torch.stack([photos[i]["pixel_values"] for i in range(len(photos))])
    given = next(images for images in read if len(images) == len(photos)).float() / 127.5 - 1
    torch.testing.assert_close(given, want, atol=0.02, rtol=0)
    world = load_world(str(root), NetworkView(32), side=64)["train"]
    assert world["pixel_values"].shape[-1] == 32
    assert world["images"].shape[-1] == 64
    assert world["images"].dtype == torch.uint8


def uniemo_clip():
    from uniemo.files.shipped import shipped_folder

    return shipped_folder("clip")


def test_labels_are_the_encoder_s_classes(trained, tmp_path):
    "Coefficients, labels and logits are read by position, so another order is refused."
    from uniemo.queries import ExpertQueryModel

    model = ExpertQueryModel.from_pretrained(trained[0] / "model")
    model.config.class_names = model.config.class_names[::-1]
    model.save_pretrained(tmp_path / "model")
    says = "the data have the emotions amusement, awe.*the encoder has sadness, fear"
    with pytest.raises(ValueError, match=says):
        joint(tmp_path, DATA, tmp_path, SECOND)


# ---- photographs


def photographs(folder, per_emotion=10, emotions=("awe", "fear")):
    "A table of crops of photographs, two of Mikels' emotions, without splits."
    from PIL import Image

    skimage, rng, rows = pytest.importorskip("skimage.data"), np.random.default_rng(0), []
    whole = [getattr(skimage, n)() for n in ("astronaut", "coffee", "chelsea", "rocket")]
    (folder / "photos").mkdir()
    # one image shows more than the text encoder can read
    many = "cat; person; saucer; rocket; spoon"
    for k, emotion in enumerate(emotions):
        for i in range(per_emotion):
            photo = whole[(2 * k + i) % 4]
            side = int(min(photo.shape[:2]) * rng.uniform(0.6, 0.9))
            y, x = (int(rng.integers(n - side)) for n in photo.shape[:2])
            name = f"photos/{emotion}{i}.png"
            crop = Image.fromarray(photo[y : y + side, x : x + side])
            crop.resize((80, 80)).save(folder / name)
            objects = many if i == 0 else ("cat", "cup; spoon", "")[i % 3]
            scene = ("sky", "room", None)[i % 3]
            rows.append(dict(path=name, emotion=emotion, scene=scene, objects=objects))
    pd.DataFrame(rows).to_csv(folder / "photos.csv", index=False)
    return folder / "photos.csv"


def test_splits_are_made_where_there_are_none(tmp_path):
    table = photographs(tmp_path, 10)
    first, second = three_splits(table), three_splits(table)
    assert {k: len(d) for k, d in first.items()} == dict(train=14, val=2, test=4)
    for name in first:
        assert list(first[name].columns["path"]) == list(second[name].columns["path"])
    assert len({p for d in first.values() for p in d.columns["path"]}) == 20
    pd.read_csv(table).assign(split=["val", "train"] * 10).to_csv(table, index=False)
    own = three_splits(table)
    assert len(own["val"]) == 10
    assert len(own["train"]) + len(own["test"]) == 10
    pd.read_csv(table).groupby("emotion").head(1).drop(columns="split").to_csv(table, index=False)
    with pytest.raises(ValueError, match="too few"):
        three_splits(table)


def test_the_filter_does_without_names(store, trained, tmp_path):
    from PIL import Image

    table = photographs(tmp_path)
    pd.read_csv(table).drop(columns=["scene", "objects"]).to_csv(table, index=False)
    made, rng = tmp_path / "made", np.random.default_rng(0)
    made.mkdir()
    for i in range(4):
        pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(made / f"{i}.png")
    rows = dict(emotion=["awe", "fear"] * 2, seed=range(4), path=[f"{i}.png" for i in range(4)])
    pd.DataFrame(rows).to_csv(made / "table.csv", index=False)
    found = store(kept, data=str(table), encoder=trained[0], candidates=made)
    assert metrics_of(found)["skipped"] == ["clear"]
    assert metrics_of(found)["candidates"] == 4


def test_a_caption_that_is_too_long_drops_objects():
    from uniemo.diffusion.latents import open_diffusion
    from uniemo.diffusion.warm import fitting_caption

    pipe = open_diffusion("mini")
    parts = pipe.text_encoder, pipe.tokenizer
    many = ["cat", "person", "saucer", "spoon"]
    assert fitting_caption(*parts, "forest", ["dog"]) == "a photo of a dog in a forest"
    assert fitting_caption(*parts, "sky", many).endswith(" in a sky")
    assert len(fitting_caption(*parts, None, many)) > 12
    with pytest.raises(ValueError, match="warm_start=0"):
        fitting_caption(*parts, None, ["antidisestablishmentarianism"])


# ---- experiments


def test_joint_experiment(tmp_path):
    "With coefficients of pairs and a gate, which the saved pipeline has too."
    params = dict(TINY, num_train=32, num_test=16, num_images=1)
    params |= dict(joint_settings=dict(pair_weight=4.0), mapper=dict(separate=True, gate=True))
    run = start("joint", params, tmp_path, progress=False)
    assert {"stage1_accuracy", "stage2_val_loss_diff", "own_accuracy"} <= set(run.summary())
    pipe = open_pipeline(next((run.dir / "stages").glob("joint-*")))
    assert pipe.mapper.config.gate
    rows = pipe.retriever.pair_table
    assert rows.shape[-1] == 8 and torch.allclose(rows.sum(-1), torch.ones(()))


def test_joint_experiment_in_the_paper_s_setting(tmp_path):
    "As long as the preset says: 15 epochs of 32 images, then one; on the mini models."
    long = dict(preset="paper", understanding_steps=None, joint_steps=None)
    params = dict(TINY, **long, num_train=32, num_test=16, num_images=1)
    run = start("joint", params, tmp_path, progress=False)
    found = run.summary()
    assert found["stage1_steps"] == 2
    assert found["stage2_steps"] == 4
    params = json.loads(next((run.dir / "stages").glob("joint-*/params.json")).read_text())
    config = params["config"]
    assert config["num_queries"] == 32
    assert config["vae_size"] == 64
    assert config["backbone"] == "mini"


def test_joint_says_what_it_needs_before_it_begins(tmp_path):
    for wrong, say in (
        (dict(joint_settings=dict(stepz=3)), "the nearest is 'steps'"),
        (dict(mapper=dict(use_scen=False)), "did you mean 'mapper.use_scene'"),
        (dict(space="bnak"), "the nearest is 'bank'"),
    ):
        with pytest.raises(RunFailed, match=say):
            start("joint", dict(TINY, **wrong), tmp_path / "runs", progress=False)
    assert not list((tmp_path / "runs").glob("*/stages"))


@pytest.mark.long
def test_quickstart(tmp_path, run_again):
    params = dict(TINY, num_train=48, num_test=32, num_per_emotion=2, max_kept=2)
    run = start(run_again("quickstart"), params, tmp_path, progress=False)
    assert {"stage1_accuracy", "stage2_accuracy", "emo_a", "kept"} <= set(run.summary())
    figures = {p.name for p in (run.dir / "figures").iterdir()}
    assert {"world.png", "generated.png", "filter.png", "story.png"} <= figures
    told = run.metrics()
    assert {"loss", "loss_cls", "loss_diff"} <= set(told), "its log tells of every training"


def test_quickstart_on_photographs(tmp_path, run_again):
    table = photographs(tmp_path)
    params = dict(TINY, data=str(table), num_per_emotion=2, max_kept=2)
    run = start(run_again("quickstart"), params, tmp_path, progress=False)
    said = run.summary()
    assert {"stage1_accuracy", "stage2_accuracy", "own_accuracy", "kept"} <= set(said)
    assert not {"emo_a", "bayes"} & set(said)
    assert said["candidates"] == 4
    assert len(said["left_out"]) == 6
    figures = {p.name for p in (run.dir / "figures").iterdir()}
    assert {"world.png", "generated.png", "filter.png", "story.png"} <= figures


def test_quickstart_says_what_photographs_lack(tmp_path):
    photographs(tmp_path, 4)
    bare = tmp_path / "bare"
    for path in (tmp_path / "photos").iterdir():
        (bare / path.stem[:-1]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, bare / path.stem[:-1])
    says = "names no scenes and no objects.*uniemo run understanding"
    for name in ("quickstart", "joint"):
        with pytest.raises(ValueError, match=says):
            start(name, dict(data=str(bare)), tmp_path / "runs", progress=False)
    assert not (tmp_path / "runs").exists(), "refused before the first cell"


def test_controls(tmp_path):
    knobs = dict(intensities=[0.0, 1.0], quarters=[0.0, 1.0], strengths=[0.5])
    knobs |= dict(guidance_rescales=[1.0])
    params = dict(knobs, num_images=1, num_inference_steps=1, num_threads=1)
    run = start("controls", params, tmp_path, progress=False)
    assert {"spearman_intensity", "plane_accuracy", "kept_last"} <= set(run.summary())
