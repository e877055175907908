"Metrics against torchmetrics, by simulation and by symmetry."

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import special, stats

from uniemo import measure as M
from uniemo.backbones import Backbone
from uniemo.emotions import MIKELS
from uniemo.mini import draw_spec, expert_movement, render


def predictions(n=500, c=8, seed=0, sharp=1.5):
    "Probabilities and labels drawn from them: calibrated by construction."
    rng = np.random.default_rng(seed)
    p = special.softmax(sharp * rng.normal(size=(n, c)), 1)
    return np.array([rng.choice(c, p=row) for row in p]), p


def test_as_torchmetrics():
    F = pytest.importorskip(
        "torchmetrics.functional.classification", reason="torchmetrics is not installed"
    )
    y, p = predictions()
    t, q = torch.tensor(y), torch.tensor(p)
    m = M.confusion_matrix(y, p.argmax(1), 8)
    assert (m == F.multiclass_confusion_matrix(q, t, 8).numpy()).all()
    assert M.accuracy(y, p) == pytest.approx(F.multiclass_accuracy(q, t, 8, average="micro").item())
    assert M.macro_f1(m) == pytest.approx(F.multiclass_f1_score(q, t, 8, average="macro").item())
    assert M.calibration_error(y, p) == pytest.approx(
        F.multiclass_calibration_error(q, t, 8, n_bins=15).item(), abs=1e-6
    )
    table = M.per_class(m)
    for name, f in (
        ("recall", F.multiclass_recall),
        ("precision", F.multiclass_precision),
        ("f1", F.multiclass_f1_score),
    ):
        assert table[name].to_numpy() == pytest.approx(f(q, t, 8, average=None).numpy(), abs=1e-6)


def test_order_of_images_and_classes_does_not_matter():
    y, p = predictions(200)
    k = np.random.default_rng(1).permutation(200)
    assert M.scores(y, p) == pytest.approx(M.scores(y[k], p[k]))
    c = np.random.default_rng(2).permutation(8)
    other = type(MIKELS)(
        tuple(MIKELS.names[i] for i in c), tuple(MIKELS.polarity[i] for i in c), MIKELS.wheel
    )
    assert M.scores(y, p, emotions=MIKELS) == pytest.approx(
        M.scores(np.argsort(c)[y], p[:, c], emotions=other)
    )


def test_perfect_and_useless():
    y = np.arange(16) % 8
    s = M.scores(y, np.eye(8)[y])
    assert (
        s["accuracy"] == s["accuracy_2"] == s["macro_f1"] == 1
        and s["calibration_error"] == 0
        and np.isnan(s["wheel_distance"])
    )
    s = M.scores(y, np.eye(8)[(y + 4) % 8])
    assert s["accuracy"] == s["macro_f1"] == s["accuracy_2"] == 0 and s["calibration_error"] == 1
    assert np.isnan(
        M.evaluate(y, np.eye(8)[y], n=5).loc["wheel_distance"]
    ).all()  # nothing to measure stays NaN, without a warning


def test_bootstrap_covers_the_truth():
    "A 95% interval over 150 images holds the true accuracy 0.7 in about 95% of 200 simulations."
    rng = np.random.default_rng(0)
    held = []
    for _ in range(200):
        i = M.bootstrap(
            np.mean, (rng.random(150) < 0.7).astype(float), n=200, seed=int(rng.integers(2**31))
        )
        held.append(not i.excludes(0.7))
    assert 0.89 <= np.mean(held) <= 0.99


@pytest.mark.parametrize("paired", [True, False])
def test_student_covers_the_truth_over_seeds(paired):
    rng = np.random.default_rng(1)
    held = [
        not M.difference(
            rng.normal(0.1, 1, 5), rng.normal(0, 1 if paired else 2, 5), paired
        ).excludes(0.1)
        for _ in range(600)
    ]
    assert 0.92 <= np.mean(held) <= 0.98


def test_differences_of_seeds_as_scipy():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 6))
    i, ci = M.difference(a, b), stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (i.low, i.high) == pytest.approx((ci.low, ci.high))
    i, ci = (
        M.difference(a, b, paired=False),
        stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95),
    )
    assert (i.low, i.high) == pytest.approx((ci.low, ci.high))
    j = M.difference(b, a)
    assert (j.value, j.low, j.high) == pytest.approx(
        (-M.difference(a, b).value, -M.difference(a, b).high, -M.difference(a, b).low)
    )
    assert M.difference(a, b, level=0.9).low > M.difference(a, b).low


def test_rows_of_runs_may_come_in_any_order():
    runs = pd.DataFrame(
        [
            dict(seed=s, head=h, acc=s / 10 + (h == "q") * 0.01 * (s + 1))
            for s in range(5)
            for h in ("plain", "q")
        ]
    )
    one, two = (
        M.differences(r, "acc", "head", "plain")
        for r in (runs, runs.sample(frac=1, random_state=0))
    )
    assert one.difference[0] == pytest.approx(0.03) and two.low[0] == pytest.approx(one.low[0])
    with pytest.raises(ValueError, match="seed 3 twice"):
        M.differences(pd.concat([runs, runs[runs.seed == 3]]), "acc", "head", "plain")


def test_calibrated_by_construction():
    y, p = predictions(6000, seed=3)
    assert M.calibration_error(y, p) < 0.03
    z = np.log(p)
    assert M.fit_temperature(z, y) == pytest.approx(1, abs=0.05) and M.fit_temperature(
        2.5 * z, y
    ) == pytest.approx(2.5, abs=0.12)
    assert M.calibration_error(y, M.with_temperature(4 * z, 1)) > 0.1


def test_temperature_at_its_limits_warns():
    with pytest.warns(UserWarning, match="at its limit"):
        assert M.fit_temperature(np.eye(3) * 5, [0, 1, 2]) == pytest.approx(0.05, rel=0.01)
    with pytest.warns(UserWarning, match="at its limit"):
        assert M.fit_temperature(np.eye(3) * 5, [1, 2, 0]) == pytest.approx(20, rel=0.01)


@pytest.mark.parametrize("bad", [[[0.5, np.nan]], [[-0.1, 1.1]], [[3.0, 1.0]]])
def test_no_distribution_is_refused(bad):
    with pytest.raises(ValueError, match="row 0 .*soft-max"):
        M.check_predictions([0], bad)


def test_tensors_in_half_precision():
    y, p = predictions(100)
    s = M.evaluate(torch.tensor(y), torch.tensor(p).half(), n=3)
    assert s.value.accuracy == pytest.approx(M.accuracy(y, p), abs=0.03)
    assert M.evaluate(
        torch.tensor(y), torch.tensor(p, dtype=torch.bfloat16), n=3
    ).value.accuracy == pytest.approx(M.accuracy(y, p), abs=0.05)


def test_pointing_reaches_one_for_the_best_map_and_chance_for_a_random_one():
    masks = [render(draw_spec(5, i)).masks for i in range(80)]
    share = np.stack([m.any(0).reshape(8, 8, 8, 8).mean((1, 3)) for m in masks])
    table = M.pointing_table(
        dict(
            best=share,
            flat=np.ones_like(share),
            pixels=np.stack([np.kron(s, np.ones((8, 8))) for s in share]),
        ),
        masks,
        n=50,
    )
    assert (
        table.value["best"] == 1
        and table.value["flat"] == pytest.approx(table.value["chance"])
        and table.value["pixels"] > 0.7
    )
    assert abs(table.value["chance"] - table.value["area share"]) < 0.03
    assert M.pointing(share, masks, cover=0.25).chance.mean() > table.value["chance"]


def test_class_attention_is_the_models_own():
    "Against transformers' own output_attentions; the model is left as it was."
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
        )
    ).train()
    x = torch.rand(2, 3, 32, 32)
    before = model.config._attn_implementation
    maps = M.class_attention(Backbone(model), x)
    assert (
        model.training
        and model.config._attn_implementation == before
        and not [m for m in model.modules() if m._forward_hooks]
    )
    model.eval().set_attn_implementation("eager")
    own = model(x, output_attentions=True).attentions
    for a, b in zip(maps, own):
        r = b[:, :, 0, 1:].mean(1)
        assert torch.allclose(a.flatten(1), r / r.sum(1, keepdim=True), atol=1e-6)


def test_movement_ignores_scale_and_shift():
    rng = np.random.default_rng(0)
    f = {
        k: dict(scene=rng.normal(size=(30, 4)), object=rng.normal(size=(30, 4)))
        for k in ("base", "scene", "object")
    }
    g = {k: dict(scene=7 * v["scene"] + 3, object=v["object"]) for k, v in f.items()}
    assert expert_movement(f, n=20).ratio.to_numpy() == pytest.approx(
        expert_movement(g, n=20).ratio.to_numpy()
    )


# ---- what is refused, and names the item


def test_votes_that_are_all_zero():
    votes = np.ones((4, 8))
    votes[2] = 0
    p = np.full((4, 8), 1 / 8)
    for call in (
        lambda: M.vote_divergence(votes, p),
        lambda: M.evaluate(None, p, votes=votes, n=2),
        lambda: M.evaluate([0] * 4, p, votes=votes, n=2),
        lambda: M.fit_temperature(np.log(p), votes),
    ):
        with pytest.raises(ValueError, match="row 2 is not"):
            call()


def test_labels_out_of_range_and_no_images():
    with pytest.raises(ValueError, match="first at image 1"):
        M.check_predictions([0, 8], np.eye(8)[:2])
    with pytest.raises(ValueError, match="first at image 0"):
        M.fit_temperature(np.eye(8)[:2], [-1, 0])
    with pytest.raises(ValueError, match="at least one image"):
        M.check_predictions([], np.zeros((0, 8)))
    with pytest.raises(ValueError, match="at least one image"):
        M.fit_temperature(np.zeros((0, 8)), [])
