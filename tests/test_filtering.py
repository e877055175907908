"The filter at sizes, and on data, that do not read well in a notebook."

import json
import warnings
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch

from uniemo.data.checking import check
from uniemo.data.emoset import EmoSet
from uniemo.data.kept import read_table, write_kept
from uniemo.emotions import MIKELS
from uniemo.filtering import (
    CRITERIA,
    REASONS,
    FilterThresholds,
    facility_location,
    filter_candidates,
    filter_summary,
    fit_thresholds,
    plot_filtered,
)
from uniemo.measure.evidence import Evidence
from uniemo.measure.facility import facility_value
from uniemo.measure.neighbours import coverage_scores, nearest, unit
from uniemo.mini.writing import write_emoset

E = len(MIKELS)


def draw(n, seed, name="images", table=None, d=16, sure=4.0, a=5):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % E
    z = torch.randn(n, E, generator=g)
    z[torch.arange(n), y] += sure
    return Evidence(
        torch.randn(n, d, generator=g),
        y,
        z,
        torch.rand(n, a, generator=g),
        [
            ("scene", "beach"),
            ("scene", "sky"),
            ("object", "Dog"),
            ("object", "Tea"),
            ("object", "Whale"),
        ][:a],
        table,
        name,
    )


def loose(**changes):
    "Thresholds that only the wrong emotion, out of range and copies fail."
    return FilterThresholds(
        **(
            dict(
                emotions=MIKELS.names,
                temperature=1.0,
                confidence=[0.0] * E,
                margin=[-1.0] * E,
                copy_distance=[1e-3] * E,
                images=[100] * E,
            )
            | changes
        )
    )


def quiet(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return filter_candidates(*args, **kwargs)


@pytest.mark.parametrize("seed", range(20))
def test_greedy_is_naive_and_within_the_bound(seed):
    x = torch.randn(9, 2 + seed % 3, generator=torch.Generator().manual_seed(100 + seed))
    k = 1 + seed % 5
    naive = []
    for _ in range(k):
        naive.append(
            max(
                (j for j in range(9) if j not in naive),
                key=lambda j: facility_value(x, naive + [j]),
            )
        )
    value = facility_value(x, facility_location(x, k))
    assert abs(value - facility_value(x, naive)) < 1e-5
    assert (
        value
        >= (1 - 1 / np.e) * max(facility_value(x, c) for c in combinations(range(9), k)) - 1e-5
    )


@pytest.mark.parametrize("limit", (1.5e9, 0))
def test_greedy_with_caps_and_distance(limit):
    "Every choice is the best of those allowed at that moment."
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(3))
    groups = np.stack([np.arange(60) % 3, np.where(np.arange(60) < 40, 0, -1)], 1)
    u = unit(x)
    chosen = facility_location(x, 12, groups, cap=4, min_distance=0.3, limit=limit)
    done = []
    for j in chosen:
        ok = [
            i
            for i in range(60)
            if i not in done
            and all((u[i] - u[c]).norm() >= 0.3 for c in done)
            and all(
                sum(groups[c, g] == groups[i, g] for c in done) < 4
                for g in range(2)
                if groups[i, g] >= 0
            )
        ]
        assert (
            j in ok
            and facility_value(x, done + [j])
            >= max(facility_value(x, done + [i]) for i in ok) - 1e-4
        )
        done.append(int(j))
    assert max(np.bincount(groups[chosen, 0])) <= 4 and (groups[chosen, 1] == 0).sum() <= 4


def test_greedy_does_not_depend_on_scale_or_order():
    "By its value: which of two near ties comes first is the processor's business."
    x = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
    order = np.random.default_rng(0).permutation(80)
    best = facility_value(x, facility_location(x, 10))
    others = (
        facility_location(x * torch.rand(80, 1).add(0.5), 10),
        order[facility_location(x[order], 10)],
        facility_location(x.numpy().astype(np.float64), 10),
    )
    for chosen in others:
        assert facility_value(x, chosen) == pytest.approx(best, rel=1e-3)


def test_few_images_and_equal_images():
    assert facility_location(torch.ones(1, 3), 5).tolist() == [0]
    assert (
        sorted(facility_location(torch.ones(4, 3), 9)) == [0, 1, 2, 3]
        and len(facility_location(torch.ones(4, 3), 9, min_distance=0.01)) == 1
    )


def test_every_candidate_has_a_verdict_and_the_first_reason():
    c, real = draw(800, 1, sure=2.0), draw(900, 2)
    t = quiet(c, real, fit_thresholds(draw(480, 3, sure=2.0), real), max_kept=10, cap=3)
    assert (
        len(t) == 800
        and (t.kept == (t.reason == "")).all()
        and set(t.reason) - {""} <= set(REASONS)
        and (t.detail[~t.kept] != "").all()
        and (t.detail[t.kept] == "").all()
    )
    assert (t.reason[t.predicted != t.emotion] == "wrong emotion").all() and (
        t["rank"].ge(0) == t.kept
    ).all()
    for _, g in t[t.kept].groupby("emotion"):
        assert (
            sorted(g["rank"]) == list(range(len(g)))
            and len(g) <= 10
            and g.scene.value_counts().max() <= 3
            and g.object.value_counts().max() <= 3
        )
    s = filter_summary(t)
    assert (s.drop(columns="candidates").sum(axis=1) == s.candidates).all() and s.candidates[
        "all"
    ] == 800


def test_criteria_can_be_left_out():
    c, real = draw(160, 1, sure=1.0), draw(900, 2)
    assert quiet(c, real, loose(), criteria=()).kept.all()
    t = quiet(c, real, loose(), max_kept=3, criteria=())
    assert (
        t.kept.sum() == 24 and set(t.reason) == {"", "surplus"} and t.kept[:24].all()
    )  # the first ones
    assert set(quiet(c, real, loose(confidence=[0.4] * E), criteria=("faithful",)).reason) == {
        "",
        "wrong emotion",
        "low confidence",
    }
    with pytest.raises(ValueError, match="unknown criterion 'pretty'"):
        quiet(c, real, loose(), criteria=("pretty",))


def test_an_emotion_without_kept_candidates_is_named():
    c, real = draw(160, 1), draw(900, 2)
    c.logits[c.labels == 2] = c.logits[c.labels == 2].roll(1, 1)
    c = c[np.flatnonzero(c.labels != 5)]
    with pytest.warns(UserWarning) as told:
        t = filter_candidates(c, real, loose())
    said = [str(w.message) for w in told]
    assert any(
        m.startswith("no candidate kept for contentment (20 candidates, ") and "wrong emotion" in m
        for m in said
    ) and any(m.startswith("no candidate kept for disgust (0 candidates)") for m in said)
    assert filter_summary(t).kept[["contentment", "disgust"]].tolist() == [0, 0]


def test_a_copy_of_a_real_image_is_named():
    c, real = draw(160, 1), draw(900, 2, table=dict(path=[f"r{i}.jpg" for i in range(900)]))
    c.features[8] = 3 * real.features[16]
    with pytest.warns(
        UserWarning,
        match=r"1 of 160 candidates are images of the real set, first row 8, there row 16 "
        r"\(r16.jpg\): dropped as copies",
    ):
        t = filter_candidates(c, real, loose(copy_distance=[0.0] * E), criteria=("in range",))
    assert (
        t.reason[8] == "copy"
        and t.detail[8] == "the image of real row 16 (r16.jpg)"
        and t.nearest_real[8] == 16
    )


def test_bad_input_is_named():
    c, real = draw(80, 1), draw(900, 2)
    for f, bad in (
        ("features", float("nan")),
        ("logits", float("inf")),
        ("similarities", float("nan")),
    ):
        d = {k: getattr(c, k).clone() for k in ("features", "labels", "logits", "similarities")}
        d[f][7, 1] = bad
        with pytest.raises(ValueError, match=f"candidates: {f} of row 7 .* not finite"):
            Evidence(**d, name="candidates")
    with pytest.raises(ValueError, match="4 images are too few for k = 5"):
        quiet(c, real[:4], loose())
    with pytest.raises(ValueError, match="width 16, real images of 8"):
        quiet(c, draw(900, 2, d=8), loose())
    with pytest.raises(ValueError, match="logits are missing"):
        quiet(Evidence(c.features, c.labels, name="candidates"), real, loose())
    with pytest.raises(ValueError, match="8 columns of logits, but 2 emotions"):
        fit_thresholds(c, real, ("a", "b"))


def test_thresholds_use_validation_and_pool_rare_emotions():
    v, real = draw(480, 3, sure=2.0), draw(900, 2)
    v = v[np.flatnonzero((v.labels != 1) | (torch.arange(480) < 100))]
    t = fit_thresholds(v, real)
    assert t.pooled == ("awe",) and t.images[1] == 13
    assert np.isclose(
        t.copy_distance[1],
        np.quantile(nearest(unit(v.features), unit(real.features))[0].numpy(), 0.01),
    )
    other = draw(900, 2)
    other.logits = other.logits * 9
    assert fit_thresholds(v, other) == t  # the real set's logits play no part
    again = FilterThresholds(**json.loads(json.dumps(dict(t.__dict__))))
    assert again == t
    with pytest.raises(ValueError, match="confidence has 1 values for 8"):
        loose(confidence=[0.5])


def test_real_images_pass_as_the_quantiles_say():
    "Fresh images of the real distribution: three quarters reach each of the two quantiles."
    real, t = draw(4000, 1), fit_thresholds(draw(4000, 2), draw(4000, 1))
    s = quiet(draw(4000, 3), real, t, max_kept=4000, cap=None)
    e = s.emotion.map(MIKELS.index)
    assert (
        abs((s.confidence >= np.array(t.confidence)[e]).mean() - 0.75) < 0.03
        and abs((s.margin >= np.array(t.margin)[e]).mean() - 0.75) < 0.03
    )
    assert (s.real_distance > np.array(t.copy_distance)[e]).mean() > 0.97


def test_coverage():
    real = draw(200, 1).features
    assert (
        coverage_scores(real, real)["coverage"] == 1
        and coverage_scores(real, real)["precision"] == 1
    )
    assert coverage_scores(real[:1], real)["coverage"] < 0.3
    x = unit(real[:20])
    n = 20
    assert (
        abs(coverage_scores(x, real)["diversity"] - (1 - (x @ x.T)).sum().item() / (n * (n - 1)))
        < 1e-5
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_emoset(
        tmp_path_factory.mktemp("w") / "real", 80, seed=5, workers=1, progress=False
    )


def kept_table(n=16):
    c = draw(
        n,
        1,
        table=dict(seed=range(n), scene=["Beach", None] * (n // 2), object=["teddy_bear"] * n),
        d=16,
    )
    return quiet(c, draw(900, 2), loose(), cap=None, criteria=())


def names_of(data):
    return dict(emotion=data.emotions.names, scene=data.scene_names, object=data.object_names)


@pytest.mark.parametrize("quality", (95, None))
@pytest.mark.parametrize("kind", ("png", "jpg", "array"))
def test_written_set_reads_as_emoset(world, tmp_path, kind, quality):
    data = EmoSet(world, "train")
    pictures = [data.image(i) for i in range(16)]
    table = kept_table()
    table.loc[3, "confidence"] = np.nan
    images = [np.asarray(picture) for picture in pictures]
    if kind != "array":
        images = None
        for i, picture in enumerate(pictures):
            picture.save(tmp_path / f"{i}.{kind}")
        table = table.assign(path=[str(tmp_path / f"{i}.{kind}") for i in range(16)])
    how = dict(label_by="retrieved", quality=quality)
    folder = write_kept(table, tmp_path / "kept", names_of(data), images, **how)
    assert check(folder, verbose=False).empty
    written = EmoSet(folder, "train")
    notes = written.read_annotations()
    assert names_of(written) == names_of(data)
    assert len(written) == 16
    # spelled as in the label file
    assert set(notes.scene.dropna()) == {"beach"}
    assert notes.scene.isna().sum() == 8
    assert all(objects == ["Teddy bear"] for objects in notes.object)
    assert sorted(g["seed"] for g in notes.generated) == list(range(16))
    assert sum(g["scores"]["confidence"] is None for g in notes.generated) == 1
    if kind == "jpg":
        there = {p.read_bytes() for p in (folder / "image").rglob("*.jpg")}
        assert there == {(tmp_path / f"{i}.jpg").read_bytes() for i in range(16)}
    elif quality is None:
        place = [int(i.rsplit("_", 1)[1]) for i in notes.image_id]
        for i, at in enumerate(place):
            assert np.array_equal(np.asarray(written.image(i)), np.asarray(pictures[at]))
    assert len(read_table(folder / "candidates.csv")) == 16


def test_what_cannot_be_written_is_named(world, tmp_path):
    "And leaves nothing behind that looks like a data set."
    data = EmoSet(world, "train")
    table, names = kept_table(), names_of(data)
    pictures = [data.image(i) for i in range(16)]
    cases = [
        (table, [pictures[0]] * 16, "are the same image"),
        (table, pictures[:3], "3 images for 16 candidates"),
        (table.assign(object="Unicorn"), pictures, "object 'Unicorn'"),
        (table.assign(emotion="joy"), pictures, "emotion 'joy'"),
        (table.assign(emotion="../../outside"), pictures, "separator|step in a path"),
    ]
    for k, (bad, images, says) in enumerate(cases):
        with pytest.raises(ValueError, match=says):
            write_kept(bad, tmp_path / str(k), names, images, label_by="retrieved")
        assert not (tmp_path / str(k)).exists()


def test_pictures_of_awkward_tables():
    "Nothing kept, everything kept."
    import matplotlib.pyplot as plt

    t = kept_table()
    pictures = [np.zeros((8, 8, 3), np.uint8)] * 16
    for table in (t, t.assign(kept=False, reason="surplus", rank=-1)):
        plot_filtered(table, pictures, columns=3)
        plt.close("all")


def test_annotations_name_what_the_picture_shows(world, tmp_path):
    "The likeliest names are the annotation; what the image was made with is its provenance."
    data = EmoSet(world, "train")
    table = kept_table()
    pictures = [data.image(i) for i in range(16)]
    folder = write_kept(table, tmp_path / "kept", names_of(data), pictures)
    notes = EmoSet(folder, "train").read_annotations()
    row = [int(i.rsplit("_", 1)[1]) for i in notes.image_id]
    assert [n.lower() for n in notes.scene] == list(table.shown_scene[row])
    assert [o for (o,) in notes.object] == list(table.shown_object[row])
    assert len(set(table.shown_scene)) > 1
    assert all(g["attributes"]["object"] == "teddy_bear" for g in notes.generated)


def test_a_table_keeps_names_as_text(tmp_path):
    "An emotion '0' or a scene 'None' is text when it comes back; a kept one has the reason ''."
    table = pd.DataFrame(
        dict(
            emotion=["0", "1"],
            scene=["None", "NA"],
            object=[None, "cat"],
            confidence=[0.5, None],
            reason=["", "copy"],
            seed=[1, 2],
        )
    )
    table.to_csv(tmp_path / "table.csv", index=False)
    back = read_table(tmp_path / "table.csv")
    assert back.emotion.tolist() == ["0", "1"]
    assert back.scene.tolist() == ["None", "NA"]
    assert back.object.isna().tolist() == [True, False]
    assert back.reason.tolist() == ["", "copy"]
    assert back.seed.tolist() == [1, 2]
    assert back.confidence.isna().tolist() == [False, True]
    for again in (back, pd.read_csv(tmp_path / "table.csv", dtype={"emotion": str})):
        counts = filter_summary(again, ("0", "1")).loc["all", ["candidates", "kept", "copy"]]
        assert counts.tolist() == [2, 1, 1]


WRONG = dict(
    empty="",
    text="{",
    list="[]",
    page="<!doctype html><html></html>",
    missing=dict(margin=None),
    infinite=dict(confidence=[float("inf")] * E),
    nan=dict(temperature=float("nan")),
    short=dict(margin=[0.0]),
    words=dict(copy_distance=["x"] * E),
    alone=dict(images=3),
    more=dict(colour=1),
)


@pytest.mark.parametrize("case", WRONG)
def test_thresholds_are_read_whole_or_not_at_all(tmp_path, case):
    path = tmp_path / "thresholds.json"
    loose().save(path)
    assert FilterThresholds.load(path) == loose()
    wrong = WRONG[case]
    if isinstance(wrong, dict):
        content = json.loads(path.read_text()) | wrong
        wrong = json.dumps({k: v for k, v in content.items() if v is not None})
    path.write_text(wrong)
    with pytest.raises(ValueError, match="thresholds|confidence|margin"):
        FilterThresholds.load(path)


def test_what_the_generator_said_decides_nothing():
    "What the filter computes counts; the candidates' own column of that name is called made_..."
    own = pd.DataFrame(
        dict(
            emotion="awe",
            predicted=[MIKELS.names[i % E] for i in range(160)],
            confidence=1.0,
            margin=9.0,
            range=0.0,
            real_distance=1.0,
            reason="",
            rank=3,
            kept=True,
            scene="attic",
            seed=range(160),
        )
    )
    c, real, limits = draw(160, 1, sure=1.0, table=own), draw(900, 2), loose(confidence=[0.4] * E)
    plain = quiet(draw(160, 1, sure=1.0), real, limits, cap=None)
    t = quiet(c, real, limits, cap=None)
    mine = [
        "emotion",
        "kept",
        "reason",
        "predicted",
        "confidence",
        "margin",
        "range",
        "real_distance",
        "rank",
    ]
    pd.testing.assert_frame_equal(t[mine], plain[mine])
    assert {"wrong emotion", "low confidence"} < set(t.reason)
    for k in own:
        assert (t[k if k in ("scene", "seed") else f"made_{k}"] == own[k]).all()
    again = quiet(draw(160, 1, sure=1.0, table=t), real, limits, cap=None)
    assert (
        again.columns.is_unique
        and (again.made_made_confidence == t.confidence).all()
        and (again.made_confidence == 1).all()
        and (again.kept == t.kept).all()
    )


def test_emotions_with_few_real_images_are_named_once():
    c, real = draw(160, 1), draw(900, 2)
    real = real[np.flatnonzero((real.labels != 1) & (real.labels != 4) | (torch.arange(900) < 40))]
    with pytest.warns(UserWarning) as told:
        t = filter_candidates(c, real, loose(), criteria=("in range",))
    said = [m for m in (str(w.message) for w in told) if m.startswith("in range:")]
    assert said == [
        "in range: fewer than 50 real images of awe (5), anger (5): "
        "their candidates may lie near a real image of any emotion"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        filter_candidates(c, draw(900, 2), loose(), criteria=("in range",))
    assert np.isfinite(t["range"]).all()


@pytest.mark.parametrize("field", ("features", "logits", "similarities"))
@pytest.mark.parametrize("who", (0, 1))
def test_nan_set_afterwards_is_refused(field, who):
    "Evidence can be changed after it was built and checked."
    pair = [draw(160, 1, "candidates"), draw(900, 2, "real")]
    getattr(pair[who], field)[9, 2] = float("nan")
    for decide in (lambda: quiet(*pair, loose()), lambda: fit_thresholds(*pair)):
        with pytest.raises(ValueError, match=f"{pair[who].name}: {field} of row 9 are not finite"):
            decide()


def test_a_threshold_that_is_no_number_lets_nothing_pass():
    nan = [float("nan")] * E
    c, real = draw(160, 1), draw(900, 2)
    for f, reason in (
        ("confidence", "low confidence"),
        ("margin", "unclear"),
        ("copy_distance", "copy"),
    ):
        assert not quiet(c, real, loose(**{f: nan}), criteria=CRITERIA[:3]).kept.any(), reason
