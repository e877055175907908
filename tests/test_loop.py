"The store of stages, joint training that is interrupted, and tiny runs of the experiments that are built on them."

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from uniemo.data.checking import check
from uniemo.data.emoset import EmoSet
from uniemo.data.transforms import NetworkView
from uniemo.emotions import MIKELS
from uniemo.feedback import (
    candidates,
    inversion,
    joint,
    kept,
    metrics_of,
    prompted,
    read_candidates,
    respaced,
    settings_of,
    understanding,
)
from uniemo.joint import JointConfig, flip_together
from uniemo.mini.writing import write_emoset
from uniemo.runs import RunFailed, start
from uniemo.runs.store import Store
from uniemo.train.batches import MemoryData
from uniemo.train.trainer import Trainer
from uniemo.understanding import UnderstandingConfig

DATA = dict(num_train=48, num_val=24, num_test=24, seed=0)
FIRST = settings_of(
    UnderstandingConfig.preset(
        "mini", seed=0, epochs=None, steps=4, eval_every=4, batch_size=16, num_queries=2
    )
)
SECOND = settings_of(
    JointConfig.preset(
        "mini", seed=0, steps=4, eval_every=4, batch_size=8, num_queries=2, warm_start=4
    )
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("stages"), code="one")


@pytest.fixture(scope="module")
def trained(store):
    encoder = store(understanding, data=DATA, config=FIRST)
    return encoder, store(joint, data=DATA, encoder=encoder, config=SECOND)


def test_a_trained_stage_survives_a_kill_while_it_tidies_up(tmp_path, monkeypatch):
    s = Store(tmp_path, code="one")
    removed = shutil.rmtree

    def half(path, **kwargs):
        (path / "best.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", half)
    with pytest.raises(KeyboardInterrupt):
        s(understanding, data=DATA, config=FIRST)
    monkeypatch.setattr(shutil, "rmtree", removed)
    folder = s(understanding, data=DATA, config=FIRST)
    assert metrics_of(folder)["steps"] == 4 and not (folder / "checkpoints").exists()


def test_loop_from_real_to_kept(store, trained, tmp_path):
    encoder, two = trained
    assert {"accuracy", "val_loss_diff", "val_word_accuracy", "scene_accuracy"} <= set(
        metrics_of(two)
    )
    made = store(candidates, pipeline=two, num_per_emotion=2, num_inference_steps=2)
    images, table = read_candidates(made)
    assert (
        images.shape == (16, 64, 64, 3)
        and list(table.groupby("emotion").size()) == [2] * 8
        and table.scene.notna().all()
    )
    every = store(kept, data=DATA, encoder=encoder, candidates=made, how=[], max_kept=1)
    assert metrics_of(every)["kept"] == 8
    again = store(understanding, data=DATA, config=FIRST, extra=every, ratio=0.25)
    assert metrics_of(again)["images"] == 48 + 8
    with pytest.raises(ValueError, match="ratio"):
        store(understanding, data=DATA, config=FIRST, extra=every, ratio=1.0)
    chosen = store(kept, data=DATA, encoder=encoder, candidates=made, how=["diverse"], max_kept=1)
    for folder in (every, chosen):
        is_emoset(folder, table, store)


def is_emoset(folder, table, store):
    "The kept images stand in EmoSet's format with their origin, and say the same as kept.npz."
    from uniemo.feedback import _kept_tensors, load_world

    data = EmoSet(folder / "emoset", "train")
    notes = [json.loads((data.root / a).read_text()) for a in data.columns["annotation"]]
    assert len(data) == 8 and not len(check(folder / "emoset", verbose=False))
    for n in notes:
        made = n["generated"]
        r = table[(table.seed == made["seed"]) & (table["index"] == made["index"])].iloc[0]
        assert (
            n["emotion"] == made["emotion"] == r.emotion
            and made["attributes"]["scene"] == r.scene
            and "confidence" in made["scores"]
        )
    a, b = (
        _kept_tensors(f, NetworkView(64), load_world(DATA)) for f in (folder, folder / "emoset")
    )
    order = b["label"].argsort(), a["label"].argsort()
    assert (
        all(
            torch.equal(b[k][order[0]].long(), a[k][order[1]].long())
            for k in ("label", "scene", "objects")
        )
        and (b["pixel_values"][order[0]] - a["pixel_values"][order[1]]).abs().mean() < 0.1
    )
    assert (
        metrics_of(
            store(understanding, data=DATA, config=FIRST, extra=folder / "emoset", ratio=0.25)
        )["images"]
        == 48 + 8
    )


def test_nothing_kept_says_so(tmp_path):
    from uniemo.feedback import _save_kept

    _save_kept(
        tmp_path, pd.DataFrame(), np.zeros((0, 64, 64, 3), np.uint8), label=np.zeros(0, np.int64)
    )
    with pytest.raises(ValueError, match="nothing was kept"):
        understanding(tmp_path / "stage", DATA, FIRST, extra=tmp_path)


def test_joint_training_resumes_to_the_same_weights(trained, tmp_path):
    "Stopped after two of four steps and resumed from the checkpoint: bit for bit the unbroken run."
    from uniemo.correlation import CorrelationTable, AttributeRetriever
    from uniemo.feedback import load_world, name_tensors, vae_pixels
    from uniemo.fusion import PseudoWordMapper
    from uniemo.joint import JointStage, cache_latents
    from uniemo.mini.diffusion import load_diffusion
    from uniemo.queries import ExpertQueryModel

    world, pipe = load_world(DATA), load_diffusion()
    text = name_tensors("mini", world.names)
    table = CorrelationTable.from_annotations(
        world.annotations("train"), 1.0, world.emotions, world.names["scene"], world.names["object"]
    )
    data = {k: v for k, v in world["train"].items() if k != "images"} | dict(
        latents=cache_latents(pipe.vae, vae_pixels(world["train"]["images"], pipe))
    )

    def trainer(folder):
        torch.manual_seed(0)
        config = JointConfig(**{**SECOND, "save_every": 2})
        stage = JointStage(
            ExpertQueryModel.from_pretrained(trained[0] / "model"),
            PseudoWordMapper(128, 128),
            AttributeRetriever(table, text["scene"], text["object"]),
            pipe.unet,
            pipe.text_encoder,
            pipe.tokenizer,
            pipe.scheduler,
            config,
            scene_text=text["scene"],
            object_text=text["object"],
        )
        return Trainer(
            stage, config, MemoryData(data, flip_together), folder=folder, progress=False
        )

    whole = trainer(tmp_path / "whole").fit().weights()

    class Stop(Exception):
        pass

    broken = trainer(tmp_path / "broken")
    saved = broken.call

    def call(moment):
        saved(moment)
        if moment == "after_step" and broken.step == 2:
            raise Stop

    broken.call = call
    with pytest.raises(Stop):
        broken.fit()
    resumed = trainer(tmp_path / "broken")
    resumed.fit()
    got = resumed.weights()
    assert (
        resumed.step == 4
        and all(torch.equal(whole[k], got[k]) for k in whole)
        and any(k.startswith("mapper.") for k in whole)
    )


def test_another_space_needs_no_training(store, trained):
    from uniemo.pipeline import UniEmoPipeline

    other = store(respaced, data=DATA, pipeline=trained[1], space="diagonal")
    a, b = (UniEmoPipeline.from_pretrained(f / "pipeline") for f in (trained[1], other))
    assert (a.space.kind, b.space.kind) == ("bank", "diagonal") and other.name.startswith(
        "respaced"
    )
    assert all(
        torch.equal(p, q)
        for part in ("encoder", "mapper")
        for p, q in zip(getattr(a, part).parameters(), getattr(b, part).parameters())
    )


def test_each_network_reads_a_photograph_at_its_own_size(tmp_path, monkeypatch):
    "An encoder of 32 pixels beside an autoencoder of 64, both stages: the latents are of the photograph, not of the encoder's view enlarged."
    from transformers import CLIPModel

    from uniemo import loop
    from uniemo.data.emoset import EmoSet
    from uniemo.data.transforms import eval_transform
    from uniemo.files.shipped import shipped_folder
    from uniemo.mini.clip import load_clip
    from uniemo.queries import ExpertQueryModel

    small = tmp_path / "clip"
    shutil.copytree(shipped_folder("clip"), small)
    config = load_clip()[0].config
    config.vision_config.image_size = 32
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(small)
    root = write_emoset(tmp_path / "world", 48, size=128, progress=False)
    read, cache = [], loop.cache_latents
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    monkeypatch.setattr(
        loop, "cache_latents", lambda vae, x, **kwargs: (read.append(x), cache(vae, x, **kwargs))[1]
    )
    understanding(first, str(root), FIRST, backbone=str(small))
    assert ExpertQueryModel.from_pretrained(first / "model").config.image_size == 32
    joint(second, str(root), first, SECOND, backbone=str(small))
    assert (second / "metrics.json").exists()
    want = EmoSet(root, "train", transform=eval_transform(64, fraction=1.0))
    want = torch.stack([want[i]["pixel_values"] for i in range(len(want))])
    x = torch.cat(read)[: len(want)]
    resized = lambda x, size: torch.nn.functional.interpolate(
        x, (size, size), mode="bicubic", antialias=True
    )
    detail = lambda x: (x - resized(resized(x, 32), 64)).square().mean()
    torch.testing.assert_close(x, want, atol=0.02, rtol=0)
    assert detail(x) > 10 * detail(resized(resized(want, 32), 64))
    world = loop.load_world(str(root), loop.NetworkView(32), side=64)["train"]
    assert (
        world["pixel_values"].shape[-1] == 32
        and world["images"].shape[-1] == 64
        and world["images"].dtype == torch.uint8
    )
    with pytest.warns(UserWarning, match="vae_size=64"):
        loop._latents(
            world["images"][:2], loop.load_diffusion(), JointConfig.preset("mini", vae_size=32)
        )


def test_labels_are_the_encoder_s_classes(trained, tmp_path):
    "Coefficients, labels and logits are read by position, so data in another order than the encoder's are refused."
    from uniemo.queries import ExpertQueryModel

    model = ExpertQueryModel.from_pretrained(trained[0] / "model")
    model.config.class_names = model.config.class_names[::-1]
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match="the data have the emotions amusement, awe.*the encoder has sadness, fear"
    ):
        joint(tmp_path, DATA, tmp_path, SECOND)


TINY = dict(understanding_steps=2, joint_steps=2, num_inference_steps=1, num_threads=1)


def test_joint_experiment(tmp_path):
    run = start(
        "joint", dict(TINY, num_train=32, num_test=32, num_images=1), tmp_path, progress=False
    )
    assert {"stage1_accuracy", "stage2_val_loss_diff", "own_accuracy"} <= set(run.summary())


def test_joint_experiment_in_the_paper_s_setting(tmp_path):
    "As long as the preset says: 15 epochs of 32 images in batches of 256, then one in batches of 8; on the mini models, at their sizes."
    params = dict(
        TINY,
        preset="paper",
        understanding_steps=None,
        joint_steps=None,
        num_train=32,
        num_test=32,
        num_images=1,
    )
    run = start("joint", params, tmp_path, progress=False)
    found = run.summary()
    assert found["stage1_steps"] == 2 and found["stage2_steps"] == 4
    config = json.loads(next((run.dir / "stages").glob("joint-*/params.json")).read_text())[
        "config"
    ]
    assert config["num_queries"] == 32 and config["vae_size"] == 64 and config["backbone"] == "mini"


def test_joint_says_what_it_needs_before_it_begins(tmp_path):
    world = write_emoset(tmp_path / "world", 48, progress=False)
    bare = tmp_path / "bare"
    for split in ("train", "val", "test"):
        shutil.copytree(world / "image", bare / split)
    for wrong, say in (
        (dict(data=str(world / "image")), "no split 'train'"),
        (dict(data=str(bare)), "names no scenes and no objects"),
        (dict(joint_settings=dict(stepz=3)), "the nearest is 'steps'"),
        (dict(mapper=dict(use_scen=False)), "did you mean 'mapper.use_scene'"),
        (dict(space="bnak"), "the nearest is 'bank'"),
    ):
        with pytest.raises(RunFailed, match=say):
            start("joint", dict(TINY, **wrong), tmp_path / "runs", progress=False)
    assert not list((tmp_path / "runs").glob("*/stages"))


def test_quickstart(tmp_path, run_again):
    run = start(
        run_again("quickstart"),
        dict(TINY, num_train=48, num_test=32, num_per_emotion=2, max_kept=2),
        tmp_path,
        progress=False,
    )
    assert {"stage1_accuracy", "stage2_accuracy", "emo_a", "kept"} <= set(run.summary()) and {
        "world.png",
        "generated.png",
        "filter.png",
        "story.png",
    } <= {p.name for p in (run.dir / "figures").iterdir()}


def photographs(folder, per_emotion=10, emotions=("awe", "fear")):
    "A table of crops of scikit-image's photographs, two of Mikels' emotions, without splits; one image shows more than the text encoder can read."
    from PIL import Image

    skimage, rng, rows = pytest.importorskip("skimage.data"), np.random.default_rng(0), []
    whole = [getattr(skimage, n)() for n in ("astronaut", "coffee", "chelsea", "rocket")]
    (folder / "photos").mkdir()
    for k, e in enumerate(emotions):
        for i in range(per_emotion):
            a = whole[(2 * k + i) % 4]
            s = int(min(a.shape[:2]) * rng.uniform(0.6, 0.9))
            y, x = (int(rng.integers(n - s)) for n in a.shape[:2])
            name = f"photos/{e}{i}.png"
            Image.fromarray(a[y : y + s, x : x + s]).resize((80, 80)).save(folder / name)
            rows.append(
                dict(
                    path=name,
                    emotion=e,
                    scene=("sky", "room", None)[i % 3],
                    objects="cat; person; saucer; rocket; spoon"
                    if i == 0
                    else ("cat", "cup; spoon", "")[i % 3],
                )
            )
    pd.DataFrame(rows).to_csv(folder / "photos.csv", index=False)
    return folder / "photos.csv"


def test_quickstart_on_photographs(tmp_path, run_again):
    table = photographs(tmp_path)
    run = start(
        run_again("quickstart"),
        dict(TINY, data=str(table), num_per_emotion=2, max_kept=2),
        tmp_path,
        progress=False,
    )
    said = run.summary()
    assert (
        {"stage1_accuracy", "stage2_accuracy", "own_accuracy", "kept"} <= set(said)
        and not {"emo_a", "bayes"} & set(said)
        and said["candidates"] == 4
        and len(said["left_out"]) == 6
    )
    assert {"world.png", "generated.png", "filter.png", "story.png"} <= {
        p.name for p in (run.dir / "figures").iterdir()
    }


def test_quickstart_says_what_photographs_lack(tmp_path):
    table = photographs(tmp_path, 4)
    bare = tmp_path / "bare"
    for p in (tmp_path / "photos").iterdir():
        (bare / p.stem[:-1]).mkdir(parents=True, exist_ok=True)
        shutil.copy(p, bare / p.stem[:-1])
    with pytest.raises(RunFailed, match="names no scenes and no objects.*uniemo run understanding"):
        start("quickstart", dict(TINY, data=str(bare)), tmp_path / "runs", progress=False)
    assert not list((tmp_path / "runs").glob("*/stages"))


def test_splits_are_made_where_there_are_none(tmp_path):
    from uniemo.data.splits import three_splits

    table = photographs(tmp_path, 10)
    a, b = three_splits(table), three_splits(table)
    sizes = {k: len(d) for k, d in a.items()}
    assert (
        sizes == dict(train=14, val=2, test=4)
        and all(list(a[k].columns["path"]) == list(b[k].columns["path"]) for k in a)
        and len({p for d in a.values() for p in d.columns["path"]}) == 20
    )
    pd.read_csv(table).assign(split=["val", "train"] * 10).to_csv(table, index=False)
    own = three_splits(table)
    assert len(own["val"]) == 10 and len(own["train"]) + len(own["test"]) == 10
    pd.read_csv(table).groupby("emotion").head(1).drop(columns="split").to_csv(table, index=False)
    with pytest.raises(ValueError, match="too few"):
        three_splits(table)


def test_the_filter_does_without_names(store, trained, tmp_path):
    table = photographs(tmp_path)
    pd.read_csv(table).drop(columns=["scene", "objects"]).to_csv(table, index=False)
    made = tmp_path / "made"
    made.mkdir()
    names = pd.DataFrame(dict(emotion=["awe", "fear"] * 2, seed=range(4)))
    names.to_csv(made / "table.csv", index=False)
    np.savez(
        made / "images.npz",
        images=np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8),
    )
    found = store(kept, data=str(table), encoder=trained[0], candidates=made)
    assert metrics_of(found)["skipped"] == ["clear"] and metrics_of(found)["candidates"] == 4


def test_baselines_leave_out_emotions_without_photographs(tmp_path):
    table = photographs(tmp_path)
    t = pd.read_csv(table)
    t.loc[t.emotion == "awe", "objects"] = None
    t.loc[t.objects.notna(), "objects"] = "cat"
    t.to_csv(table, index=False)
    few = dict(num_per_emotion=2, num_inference_steps=1)
    made, learnt = tmp_path / "made", tmp_path / "learnt"
    made.mkdir()
    learnt.mkdir()
    prompted(made, str(table), **few)
    inversion(
        learnt,
        str(table),
        settings_of(JointConfig.preset("mini", steps=2, batch_size=4, eval_every=2)),
        num_vectors=2,
        **few,
    )
    for folder in (made, learnt):
        images, rows = read_candidates(folder)
        assert (
            len(images) == 4
            and set(rows.emotion) == {"awe", "fear"}
            and len(metrics_of(folder)["left_out"]) == 6
        )
    rows = read_candidates(made)[1]
    assert (
        rows.object.isna().tolist() == [True, True, False, False]
        and rows.prompt[0] in ("a photo of a sky", "a photo of a room")
        and "cat in a" in rows.prompt[3]
    )


def test_a_caption_that_is_too_long_drops_objects():
    from uniemo.joint import _caption
    from uniemo.mini.diffusion import load_diffusion

    pipe = load_diffusion()
    say = lambda *a: _caption(pipe.text_encoder, pipe.tokenizer, *a)
    assert (
        say("forest", ["dog"]) == "a photo of a dog in a forest"
        and say("sky", ["cat", "person", "saucer", "spoon"]).endswith(" in a sky")
        and len(say(None, ["cat", "person", "saucer", "spoon"])) > 12
    )
    with pytest.raises(ValueError, match="warm_start=0"):
        say(None, ["antidisestablishmentarianism"])


def test_evaluate(tmp_path):
    params = dict(
        TINY,
        seeds=[0],
        implicit_seeds=[0],
        variants=[
            "prompts, estimated table",
            "textual inversion, three tokens",
            "separate words",
            "UniEmo",
            "space diagonal",
        ],
        num_train=32,
        num_test=40,
        num_per_emotion=2,
    )
    run = start("evaluate", params, tmp_path, progress=False)
    table = pd.read_csv(run.dir / "scores.csv")
    assert set(table.variant) == set(params["variants"]) and {
        "emo_a",
        "fit",
        "fid",
        "sem_d",
    } <= set(table.metric)
    assert {"emo_a_UniEmo", "accuracy_stage_1_continued", "accuracy_joint_training"} <= set(
        run.summary()
    )
    again = start("evaluate", dict(params, previous=str(run.dir)), tmp_path, progress=False)
    assert (
        again.summary() == run.summary() and not (again.dir / "stages").exists()
    )  # all rows are taken over


def test_feedback(tmp_path):
    params = dict(
        TINY,
        sizes=[32],
        seeds=[0],
        num_per_emotion=2,
        max_kept=2,
        num_test=40,
        stages=str(tmp_path / "stages"),
    )
    run = start("feedback", params, tmp_path, progress=False)
    rows = pd.read_csv(run.dir / "results.csv")
    assert {"real only", "+ full filter, separate words"} <= set(rows.arm)
    rows[~rows.arm.str.contains("separate")].to_csv(run.dir / "results.csv", index=False)
    again = start("feedback", dict(params, previous=str(run.dir)), tmp_path, progress=False)
    other = pd.read_csv(again.dir / "results.csv")
    # only the missing arm is made; the columns are there whatever was kept
    pd.testing.assert_frame_equal(other.drop(columns="code"), rows.drop(columns="code"))


def test_controls(tmp_path):
    run = start(
        "controls",
        dict(
            intensities=[0.0, 1.0],
            quarters=[0.0, 0.5],
            strengths=[0.5],
            num_images=1,
            num_inference_steps=1,
            num_threads=1,
        ),
        tmp_path,
        progress=False,
    )
    assert {"spearman_intensity", "plane_accuracy", "kept_last"} <= set(run.summary())


def test_numbers_and_names_stay_what_they_were(store, tmp_path):
    "An emotion '0' or a scene 'None' is text when it comes back; a kept set of other data is refused; without criteria what is too much has a reason."
    from uniemo.feedback import _check_numbers, load_world, name_shares
    from uniemo.filtering import filter_summary

    t = pd.DataFrame(
        dict(
            emotion=["0", "1"],
            scene=["None", "NA"],
            object=[None, "cat"],
            confidence=[0.5, None],
            reason=["", "copy"],
            seed=[1, 2],
        )
    )
    t.to_csv(tmp_path / "table.csv", index=False)
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    back = read_candidates(tmp_path)[1]
    assert (
        back.emotion.tolist() == ["0", "1"]
        and back.scene.tolist() == ["None", "NA"]
        and back.object.isna().tolist() == [True, False]
        and back.reason.tolist() == ["", "copy"]
        and back.seed.tolist() == [1, 2]
        and back.confidence.isna().tolist() == [False, True]
    )
    for again in (back, pd.read_csv(tmp_path / "table.csv", dtype={"emotion": str})):
        assert filter_summary(again, ("0", "1")).loc[
            "all", ["candidates", "kept", "copy"]
        ].tolist() == [2, 1, 1]
    world = load_world(DATA)
    z = dict(
        label=np.array([0, 1]),
        scene=np.array([0, 3]),
        objects=np.zeros((2, len(world.names["object"])), bool),
    )
    pd.DataFrame(dict(emotion=MIKELS.names[:2])).to_csv(tmp_path / "kept.csv", index=False)
    _check_numbers(tmp_path, z, world)
    for wrong, says in (
        (dict(label=np.array([1, 0])), "emotion 'amusement'"),
        (dict(scene=np.array([0, 999])), "scenes"),
        (dict(objects=np.zeros((2, 3), bool)), "objects"),
    ):
        with pytest.raises(
            ValueError, match=f"its {says} are not numbered as in the data.*'emoset'"
        ):
            _check_numbers(tmp_path, z | wrong, world)
    own = SimpleNamespace(
        annotations=lambda split: pd.DataFrame(
            dict(
                emotion=["joy", "joy"],
                scene=["beach", "street"],
                object=[["cat", "dog", "cup"], ["cat"]],
            )
        ),
        names=dict(scene=("beach", "street"), object=("cat", "dog", "cup")),
        emotions=SimpleNamespace(names=("joy",)),
    )
    assert name_shares(own, "scene")[:, 0].tolist() == [0.5, 0.5] and name_shares(own, "object")[
        :, 0
    ].tolist() == [0.5, 0.25, 0.25]  # an image with three objects is one image of its scene
