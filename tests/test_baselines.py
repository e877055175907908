"What a sceptic would try: names and counted tables, the placebo, chance."

import numpy as np
import pandas as pd
import pytest
import torch

from uniemo.correlation import CorrelationTable
from uniemo.data import EmoSet
from uniemo.data.resampling import random_choice, redraw
from uniemo.measure.name_rules import PairTable, additive_logits, true_shares, zero_shot_shares
from uniemo.mini import write_emoset
from uniemo.mini.truth import OBJECTS, SCENES, draw_spec, true_posterior, true_table

EMOTIONS = ["awe", "fear", "joy"]


def random_table(seed=0, scenes=3, objects=4):
    rng = np.random.default_rng(seed)
    rows = [
        {f"{kind} {k}": row for k, row in enumerate(rng.dirichlet(np.ones(3) * 2, n))}
        for kind, n in (("scene", scenes), ("object", objects))
    ]
    return CorrelationTable(*rows, EMOTIONS)


def test_the_additive_rule_is_the_worlds_posterior():
    "With the true tables and one object, naive Bayes is Bayes."
    tables = [true_table(kind) for kind in ("scene", "object")]
    table = CorrelationTable(*(t.div(t.sum(axis=1), axis=0) for t in tables), tables[0].columns)
    specs = [draw_spec(5, k) for k in range(60)]
    specs = [spec for spec in specs if len(spec.objects) == 1]
    scene = torch.tensor([list(SCENES).index(s.scene) for s in specs])
    objects = torch.zeros(len(specs), len(OBJECTS))
    for row, spec in zip(objects, specs):
        row[list(OBJECTS).index(spec.objects[0])] = 1
    found = additive_logits(true_shares(scene, objects, len(SCENES)), table).softmax(1)
    truth = np.stack([true_posterior(s.scene, s.objects) for s in specs])
    np.testing.assert_allclose(found.numpy(), truth, atol=1e-5)


def test_pairs_by_a_loop():
    table = random_table()
    rng = np.random.default_rng(1)
    scene, thing = (
        torch.from_numpy(rng.integers(0, 3, 50)),
        torch.from_numpy(rng.integers(0, 4, 50)),
    )
    label = torch.from_numpy(rng.integers(0, 3, 50))
    shares = true_shares(scene, torch.eye(4)[thing], 3)
    pairs = PairTable.count(table, shares, label, weight=4.0)
    images = torch.bincount(label, minlength=3).double()
    for s in range(3):
        for o in range(4):
            product = table.matrix("scene")[s].double() * table.matrix("object")[o].double()
            own = label[(scene == s) & (thing == o)]
            count = torch.bincount(own, minlength=3) * images.mean() / images
            expected = (count + 4 * product / product.sum()) / (count.sum() + 4)
            torch.testing.assert_close(pairs.rows[s, o], expected, atol=1e-6, rtol=0)
            torch.testing.assert_close(pairs[f"scene {s}", f"object {o}"], expected.float())
    # one scene and one object: the pair's row is the posterior
    found = pairs.logits(shares).softmax(1)
    torch.testing.assert_close(found, pairs.rows[scene, thing].float(), atol=1e-5, rtol=0)


def test_a_heavy_product_is_the_additive_rule():
    table = random_table()
    shares = zero_shot_shares(
        torch.randn(9, 5, generator=torch.manual_seed(0)),
        dict(scene=torch.randn(3, 5), object=torch.randn(4, 5)),
        scale=7.0,
    )
    pairs = PairTable(table, torch.ones(3, 4, 3), weight=1e9)
    torch.testing.assert_close(
        pairs.logits(shares), additive_logits(shares, table), atol=1e-5, rtol=0
    )


def test_a_zero_in_the_table_is_refused():
    table = CorrelationTable(dict(sea=[1.0, 0.0, 0.0]), None, EMOTIONS)
    with pytest.raises(ValueError, match="smoothing > 0"):
        additive_logits(dict(scene=torch.ones(1, 1)), table)


def test_a_placebo_on_disk_and_in_memory(tmp_path):
    data = EmoSet(write_emoset(tmp_path, 40, 0, progress=False), "train")
    placebo = redraw(data, 50, seed=3)
    assert len(placebo) == 50
    assert set(placebo.columns["path"]) <= set(data.columns["path"])
    chosen = redraw(dict(label=torch.as_tensor(data.labels)), 50, seed=3)
    assert placebo.labels.tolist() == chosen["label"].tolist()


def test_chance_keeps_as_many_of_each_emotion():
    table = pd.DataFrame(dict(emotion=["awe"] * 30 + ["fear"] * 20, reason="clear"))
    table["kept"] = np.arange(50) % 5 == 0
    chance = random_choice(table, seed=0)
    counts = [t.groupby("emotion").kept.sum().to_dict() for t in (table, chance)]
    assert counts[0] == counts[1] == dict(awe=6, fear=4)
    assert chance.kept.tolist() != table.kept.tolist()
    assert set(chance.reason[~chance.kept]) == {"not drawn"}
