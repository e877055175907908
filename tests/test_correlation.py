"""The coefficient table from its three sources, and retrieval.

Truth of the mini world, EmoGen's real files, the paper's released numbers.
"""

import json
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from torch.autograd import gradcheck

from uniemo import correlation, mini
from uniemo.correlation import (
    KINDS,
    RETRIEVALS,
    AttributeRetriever,
    CorrelationTable,
    retrieval_accuracy,
)
from uniemo.data.emoset import EmoSet
from uniemo.data.folders import EmotionFolder
from uniemo.data.tables import EmotionTable
from uniemo.data.transforms import eval_transform
from uniemo.emotions import MIKELS
from uniemo.files.emogen import load_emogen
from uniemo.files.pickles import RefusedFile
from uniemo.files.uniemo import load_uniemo
from uniemo.files.weights import WeightsError

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
real = pytest.mark.skipif(
    not (SHARED / "real/emogen").exists(), reason=f"no real files at {SHARED / 'real/emogen'}"
)
golden = pytest.mark.skipif(
    not (SHARED / "golden/a.values.safetensors").exists(),
    reason=f"no golden numbers at {SHARED / 'golden'}",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A written world of 160 images, all in one split."
    return EmoSet(
        mini.write_emoset(
            tmp_path_factory.mktemp("world") / "emoset",
            160,
            seed=1,
            splits=(1.0, 0.0, 0.0),
            workers=1,
            progress=False,
        ),
        "train",
        transform=eval_transform(64, fraction=1.0),
    )


def random_table(scenes, objects, seed=0):
    rng = np.random.default_rng(seed)

    def rows(names):
        return {n: rng.dirichlet(np.ones(8)) for n in names}

    return CorrelationTable(rows(scenes), rows(objects))


# ---- from annotations


def test_counts_of_a_data_set(world):
    table, notes = CorrelationTable.from_annotations(world), world.read_annotations()
    assert (
        table.names("scene") == list(mini.SCENES)
        and table.names("object") == list(mini.OBJECTS)
        and table.emotions == list(MIKELS.names)
        and len(table) == 40
    )
    size = np.bincount(world.labels, minlength=8)
    n = np.array(
        [
            sum("Dog" in o for o, e in zip(notes.object, notes.emotion) if e == name)
            for name in MIKELS
        ]
    )
    share = n / size + 1 / size.mean()
    np.testing.assert_allclose(table["object", "dog"], share / share.sum(), atol=1e-6)


def test_frequent_emotions_do_not_win():
    "Ten times as many images of awe, a sea in half of each: the sea speaks for both alike."
    notes = pd.DataFrame(dict(emotion=["awe"] * 200 + ["fear"] * 20, scene=["sea", None] * 110))
    table = CorrelationTable.from_annotations(
        notes, emotions=("awe", "fear"), scene_names=["sea", "moon"]
    )
    np.testing.assert_allclose(table["scene", "sea"], [0.5, 0.5], atol=1e-6)
    np.testing.assert_allclose(table["scene", "moon"], [0.5, 0.5], atol=1e-6)


def test_smoothing_pulls_to_uniform():
    notes = pd.DataFrame(
        dict(emotion=["awe"] * 10 + ["fear"] * 10, scene=["sea"] * 10 + ["cave"] * 10)
    )
    top = [
        CorrelationTable.from_annotations(notes, k, ("awe", "fear"))["scene", "sea"][0].item()
        for k in (0.0, 1.0, 10.0, 1e6)
    ]
    np.testing.assert_allclose(top, [1, 11 / 12, 20 / 30, 0.5], atol=1e-4)


def test_votes_count_in_parts(tmp_path):
    pd.DataFrame(
        dict(path=["a.png", "b.png"], calm=[3, 0], angry=[1, 4], scene=["sea", "cave"])
    ).to_csv(tmp_path / "t.csv", index=False)
    from uniemo.emotions import EmotionSet

    data = EmotionTable(tmp_path / "t.csv", emotions=EmotionSet(("calm", "angry")))
    np.testing.assert_allclose(
        CorrelationTable.from_annotations(data, 0.0)["scene", "sea"],
        np.array([0.75 / 0.75, 0.25 / 1.25]) / 1.2,
        atol=1e-6,
    )


def test_two_classes(world):
    table = CorrelationTable.from_annotations(world.two_class())
    assert table.emotions == ["negative", "positive"] and table["object", "Skull"][0] > 0.7


def test_no_attributes(tmp_path):
    from PIL import Image

    for e in ("awe", "fear"):
        (tmp_path / e).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / e / "a.png")
    with pytest.raises(ValueError, match="no attributes"):
        CorrelationTable.from_annotations(EmotionFolder(tmp_path))


def test_a_missing_emotion_is_said(world):
    with pytest.warns(UserWarning, match="no image of fear"):
        table = CorrelationTable.from_annotations(
            world.subset(world.labels != MIKELS.index("fear"))
        )
    assert np.isfinite(table.to_pandas().to_numpy()).all()


@pytest.mark.parametrize("seed", [1, 2])
def test_4000_images_against_the_truth(seed):
    "True entries but two are equal, so ranks of all digits are noise; in tenths they are 0.99."
    truth = CorrelationTable(*(p.div(p.sum(axis=1), axis=0) for p in map(mini.true_table, KINDS)))
    specs = [mini.draw_spec(seed, i, emotion=MIKELS.names[i % 8]) for i in range(4000)]
    notes = pd.DataFrame(
        dict(
            emotion=[s.emotion for s in specs],
            scene=[s.scene for s in specs],
            object=[list(s.objects) for s in specs],
        )
    )
    table = CorrelationTable.from_annotations(
        notes, scene_names=list(mini.SCENES), object_names=list(mini.OBJECTS)
    )
    for kind in KINDS:
        a, b = (t.matrix(kind).double().numpy().ravel() for t in (table, truth))
        assert (
            stats.spearmanr(a.round(1), b.round(1)).statistic > 0.95
            and stats.pearsonr(a, b).statistic > 0.99
            and abs(a - b).mean() < 0.02
            and abs(a - b).max() < 0.12
        )


# ---- from a classifier


class Brightness(torch.nn.Module):
    "Eight soft-max logits that depend on the mean pixel; counts how it was called."

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.linspace(-1, 1, 8))
        self.modes = []

    def forward(self, x):
        self.modes.append(self.training)
        return type("Output", (), dict(logits=x.mean((1, 2, 3))[:, None] * self.w))()


def test_from_a_classifier(world):
    model = Brightness().train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = CorrelationTable.from_classifier(model, world, batch_size=48)
    items = [world[i] for i in range(len(world))]
    own = torch.stack([i["pixel_values"] for i in items if i["objects"][0] > 0])
    with torch.no_grad():
        p = model.eval()(own).logits.softmax(1).mean(0)
    np.testing.assert_allclose(table["object", "Balloon"], p, atol=1e-5)
    assert not any(model.modes)  # dropout off, and on again after
    model.train()
    CorrelationTable.from_classifier(model, {("scene", "sea"): torch.zeros(2, 3, 4, 4)})
    assert model.training and model.w.grad is None


def test_names_that_no_image_shows(world):
    few = world.subset([0, 1])
    with pytest.warns(UserWarning, match="speak for all emotions alike"):
        table = CorrelationTable.from_classifier(Brightness(), few)
    hidden = next(n for n in mini.SCENES if n not in set(few.read_annotations().scene))
    np.testing.assert_allclose(table["scene", hidden], 1 / 8)


def test_logits_are_no_probabilities():
    for bad in (
        lambda x: torch.ones(len(x), 8),
        lambda x: torch.randn(len(x), 8),
        lambda x: torch.ones(len(x)),
    ):
        with pytest.raises(ValueError, match="soft-max"):
            CorrelationTable.from_classifier(bad, {("scene", "sea"): torch.zeros(2, 3, 4, 4)})


# ---- from EmoGen's files


@real
def test_real_emogen():
    files = load_emogen(SHARED / "real/emogen")
    table = CorrelationTable.from_emogen(files.coefficients)
    for source in (SHARED / "real/emogen", str(SHARED / "real/emogen"), files):
        other = CorrelationTable.from_emogen(source)
        pd.testing.assert_frame_equal(other.to_pandas(), table.to_pandas(), check_exact=True)
    assert (
        len(table.names("scene")) == 254
        and len(table.names("object")) == 409
        and table.matrix("scene").shape == (254, 8)
    )
    for kind in KINDS:
        for name, row in files.coefficients[kind].items():
            np.testing.assert_allclose(table[kind, name], row, atol=2e-5)
    assert (
        ("object", "Alarm clock") in table
        and ("scene", "shop") in table
        and table["scene", "cemetery"].argmax() in (4, 6, 7)
    )
    both = {n for n in table.names("scene") if ("object", n) in table}
    assert len(both) == 8
    joint = AttributeRetriever(table, torch.randn(254, 16), torch.randn(409, 16), "mapped")
    assert len(joint.names("scene")) == 655  # as many as their own joint list
    place = joint.names("scene").index("castle")
    assert torch.equal(joint.rows("scene")[1][place], table["object", "castle"])


@real
def test_emogen_saved_as_ours(tmp_path):
    table = CorrelationTable.from_emogen(load_emogen(SHARED / "real/emogen").coefficients)
    table.save(tmp_path / "t.csv")
    pd.testing.assert_frame_equal(
        CorrelationTable.load(tmp_path / "t.csv").to_pandas(), table.to_pandas(), rtol=0, atol=1e-15
    )


class Calls:
    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_hostile_pickle_runs_nothing(tmp_path):
    bad = Calls()
    bad.mark = tmp_path / "ran"
    (tmp_path / "attr_coefficient_emotion_object.pkl").write_bytes(
        pickle.dumps({"dog": np.full(8, 0.125)})
    )
    (tmp_path / "attr_coefficient_emotion_scene.pkl").write_bytes(pickle.dumps({"sea": bad}))
    with pytest.raises(RefusedFile, match="system"):
        CorrelationTable.from_emogen(load_emogen(tmp_path).coefficients)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "attr_coefficient_emotion_scene.pkl").unlink()
    assert (
        len(CorrelationTable.from_emogen(load_emogen(tmp_path).coefficients)) == 1
    )  # one file of two will do


# ---- the table


@pytest.mark.parametrize("name", ["NA", "null", "nan", 'a "b", c', "été", "1", " x"])
def test_any_name_comes_back(name, tmp_path):
    CorrelationTable({name: np.full(8, 0.125)}).save(tmp_path / "t.csv")
    assert ("scene", name) in CorrelationTable.load(tmp_path / "t.csv")


def test_other_columns_are_refused(tmp_path):
    (tmp_path / "t.csv").write_text("name,awe\nsea,1\n")
    with pytest.raises(ValueError, match="t.csv"):
        CorrelationTable.load(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("kind,name,awe\nplace,sea,1\n")
    with pytest.raises(ValueError, match="place"):
        CorrelationTable.load(tmp_path / "t.csv")


def test_a_row_that_is_no_distribution():
    for row in ([0.5] * 8, [np.nan] * 8, [-1, 2] + [0] * 6):
        with pytest.raises(ValueError, match="sea"):
            CorrelationTable({"sea": row})


def test_a_file_with_other_columns_is_put_in_order(tmp_path):
    table = random_table("abc", "de")
    shuffled = [3, 0, 7, 1, 6, 2, 5, 4]
    path = tmp_path / "t.csv"
    frame = table.to_pandas()
    frame[[MIKELS.names[i] for i in shuffled]].to_csv(path)
    there = CorrelationTable.load(path)
    assert there.emotions == [MIKELS.names[i] for i in shuffled]
    assert torch.equal(there.reorder(MIKELS).matrix("scene"), table.matrix("scene"))
    q, e = torch.randn(7, 6), torch.arange(7)
    right, wrong = (
        AttributeRetriever(t, torch.eye(6)[:3], torch.eye(6)[3:5]) for t in (table, there)
    )
    assert not torch.equal(wrong(q, q, e).alpha_scene, right(q, q, e).alpha_scene)
    right.check_emotions(MIKELS)
    assert torch.equal(wrong.reorder(MIKELS)(q, q, e).alpha_scene, right(q, q, e).alpha_scene)
    with pytest.raises(ValueError, match="order excitement, amusement, .*order amusement, awe"):
        wrong.check_emotions(MIKELS)
    for which in (table, right):
        with pytest.raises(ValueError, match="has the emotions amusement.*wanted are awe, joy"):
            which.reorder(("awe", "joy"))
    wrong.reorder(MIKELS).save_pretrained(tmp_path / "r")
    back = AttributeRetriever.from_pretrained(tmp_path / "r")
    back.check_emotions(MIKELS)
    assert torch.equal(back.scene_table, right.scene_table)


# ---- retrieval


@pytest.mark.parametrize("retrieval", RETRIEVALS)
def test_batch_equals_one_by_one(retrieval):
    r = AttributeRetriever(
        random_table("abcde", "efgh"), torch.randn(5, 6), torch.randn(4, 6), retrieval, 0.1
    )
    q, k, e = torch.randn(7, 6), torch.randn(7, 6), torch.arange(7)
    whole, single = r(q, k, e), [r(q[i : i + 1], k[i : i + 1], e[i : i + 1]) for i in range(7)]
    for a, b in zip(whole, map(torch.cat, zip(*single))):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("retrieval", RETRIEVALS)
def test_a_mixture_of_one_is_a_label(retrieval):
    r = AttributeRetriever(
        random_table("abcde", "efgh"), torch.randn(5, 6), torch.randn(4, 6), retrieval
    )
    q, e = torch.randn(7, 6), torch.arange(7)
    torch.testing.assert_close(r(q, q, e), r(q, q, torch.eye(8)[e]))


def test_only_soft_has_a_gradient():
    def make(kind):
        return AttributeRetriever(
            random_table("abcde", "efgh"), torch.randn(5, 6), torch.randn(4, 6), kind, 0.5
        ).double()

    e = torch.tensor([1, 5])
    q = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    soft = make("soft")
    assert (
        gradcheck(lambda q: soft(q, q, e)[:2], q)
        and not make("projected")(q, q, e).alpha_scene.requires_grad
        and not list(soft.parameters())
    )


def test_saved_and_loaded_in_half_precision(tmp_path):
    r = AttributeRetriever(
        random_table("abcde", "efgh"), torch.randn(5, 6), torch.randn(4, 6), "mapped", 0.1
    )
    r.save_pretrained(tmp_path)
    back = AttributeRetriever.from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert (
        back.dtype == torch.float16
        and back.names("object") == r.names("object")
        and back.config.temperature == 0.1
        and back.table.emotions == list(MIKELS.names)
    )
    q, e = torch.randn(7, 6), torch.arange(7)
    torch.testing.assert_close(
        back(q.half(), q.half(), e).alpha_scene.float(), r(q, q, e).alpha_scene, atol=1e-3, rtol=0
    )


@golden
@torch.no_grad()
def test_mapped_as_released():
    v, files = (
        load_file(SHARED / "golden/a.values.safetensors"),
        load_uniemo(SHARED / "golden/a_official"),
    )
    out = files.encoder.eval()(v["in.pixel_values"])
    names = [f"name {i}" for i in range(12)]
    rows = dict(zip(names, v["fusion.in.table"].numpy()))
    for cut in (0, 5):  # all objects, or five scenes before seven objects: the same one list
        table = CorrelationTable(
            {n: rows[n] for n in names[:cut]}, {n: rows[n] for n in names[cut:]}
        )
        text = v["fusion.in.attribute_features"]
        found = AttributeRetriever(table, text[:cut], text[cut:], "mapped")(
            files.mapper_scene(out.scene_features),
            files.mapper_object(out.object_features),
            v["fusion.in.label"],
        )
        for kind in KINDS:
            assert torch.equal(getattr(found, kind), v[f"fusion.out.{kind}_index"])
            assert (
                getattr(found, f"alpha_{kind}") - v[f"fusion.out.alpha_{kind}"]
            ).abs().max() < 1e-5


def test_accuracy_where_nobody_has_one():
    r = AttributeRetriever(random_table("ab", "c"), torch.randn(2, 3), torch.randn(1, 3))
    found = r(torch.randn(2, 3), None, torch.tensor([0, 1]))
    assert np.isnan(retrieval_accuracy(r, found, torch.tensor([-1, -1]))["scene"])


# ---- files that are not whole


def saved(tmp_path):
    table = random_table("abcde", "efgh")
    AttributeRetriever(table, torch.randn(5, 6), torch.randn(4, 6)).save_pretrained(tmp_path)
    return next(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["scene_table", "object_features"])
def test_a_retriever_without_a_tensor_is_refused(name, tmp_path):
    path = saved(tmp_path)
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if k != name}, path, {"format": "pt"})
    with pytest.raises(WeightsError, match=f"incomplete.*{name}"):
        AttributeRetriever.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", [torch.full((5, 8), torch.nan), torch.ones(4, 8) / 8])
def test_a_table_that_is_not_finite_or_of_another_shape_is_refused(value, tmp_path):
    path = saved(tmp_path)
    save_file(load_file(path) | dict(scene_table=value), path, {"format": "pt"})
    with pytest.raises(WeightsError, match="scene_table"):
        AttributeRetriever.from_pretrained(tmp_path)


def test_a_folder_that_calls_it_by_its_old_name(tmp_path):
    saved(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "AttributeRetriever"
    config["_class_name"] = "Retriever"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert correlation.Retriever is AttributeRetriever
    assert len(AttributeRetriever.from_pretrained(tmp_path).names("scene")) == 5


@pytest.mark.parametrize("text", ["", "kind,name,awe\nscene,sea,x\n", "kind,name,awe\nscene,sea,"])
def test_a_table_file_that_is_not_whole_names_itself(text, tmp_path):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match="t.csv is no whole table.*save the table again"):
        CorrelationTable.load(tmp_path / "t.csv")


def test_a_byte_order_mark_is_no_error(tmp_path):
    table = random_table("ab", "c")
    table.save(tmp_path / "t.csv")
    text = (tmp_path / "t.csv").read_text()
    (tmp_path / "t.csv").write_text(text, encoding="utf-8-sig")
    assert len(CorrelationTable.load(tmp_path / "t.csv")) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("retrieval", RETRIEVALS)
def test_on_a_gpu(retrieval):
    r = AttributeRetriever(
        random_table("abcde", "efgh"), torch.randn(5, 6), torch.randn(4, 6), retrieval
    ).cuda()
    q, e = torch.randn(7, 6).cuda(), torch.arange(7)
    found = r(q, q, e)
    assert found.alpha_scene.is_cuda and torch.equal(found.alpha_scene, r(q, q, e.cuda())[0])
    assert retrieval_accuracy(r, found, torch.zeros(7, dtype=torch.long))["scene"] >= 0
    assert len(r.table) == 9 and r.reorder(MIKELS.names[::-1]).scene_table.is_cuda
    table = CorrelationTable.from_classifier(
        Brightness().cuda(), {("scene", "sea"): torch.zeros(2, 3, 4, 4, device="cuda")}
    )
    assert len(table) == 1
