"The mini world: what does not read well in its notebook."

import json
from collections import Counter

import numpy as np
import pytest

from uniemo import mini
from uniemo.emotions import MIKELS


def test_names_are_emosets(shared):
    info = json.loads((shared / "real/emoset_info.json").read_text())
    assert set(mini.SCENES) <= set(info["scene"]["label2idx"]) and set(mini.OBJECTS) <= set(
        info["object"]["label2idx"]
    )
    assert list(MIKELS.names) == list(info["emotion"]["label2idx"])
    assert mini._label_file().keys() == info.keys()


def test_any_number_of_processes_writes_the_same_bytes(tmp_path):
    one, two = (
        mini.write_emoset(tmp_path / str(w), 520, seed=3, workers=w, progress=False) for w in (1, 2)
    )
    files = [p.relative_to(one) for p in one.rglob("*") if p.is_file()]
    assert len(files) == 2 * 520 + 5 and all(
        (one / f).read_bytes() == (two / f).read_bytes() for f in files
    )


def test_more_images_extend_a_world(tmp_path):
    small, large = (
        mini.write_emoset(tmp_path / str(n), n, seed=1, workers=1, progress=False) for n in (16, 32)
    )
    a, b = mini.read_specs(small), mini.read_specs(large)
    assert all(b[k] == v for k, v in a.items())


def test_specs_follow_the_tables():
    specs = [mini.draw_spec(9, i, emotion="fear") for i in range(3000)]
    table = mini.true_table("scene")["fear"]
    counts = Counter(s.scene for s in specs)
    for name, p in table.items():
        assert abs(counts[name] / 3000 - p) < 5 * np.sqrt(p * (1 - p) / 3000) + 1e-3
    share = np.mean([len(s.objects) == 2 for s in specs])
    assert abs(share - mini.P_TWO) < 0.05 and all(
        len(set(s.objects)) == len(s.objects) for s in specs
    )


def test_neutral_images_mean_no_emotion():
    specs = [mini.draw_spec(2, i, neutral=True) for i in range(4000)]
    assert all(s.emotion is None for s in specs)
    counts = Counter(o for s in specs for o in s.objects)
    expected = sum(counts.values()) / len(mini.OBJECTS)
    assert all(abs(c - expected) < 6 * np.sqrt(expected) for c in counts.values())


@pytest.mark.parametrize("scene, objects", [(True, 0), (False, 1), (True, 1), (True, 2)])
def test_bayes_accuracy_agrees_with_simulation(scene, objects):
    rng, hits, n = np.random.default_rng(0), 0, 4000
    ps, po = mini.true_table("scene").to_numpy(), mini.true_table("object").to_numpy()
    for k in range(n):
        e = rng.integers(8)
        s = list(mini.SCENES)[rng.choice(16, p=ps[:, e])] if scene else None
        o = [list(mini.OBJECTS)[i] for i in rng.choice(24, objects, replace=False, p=po[:, e])]
        hits += mini.posterior(s, o).argmax() == e
    p = mini.bayes_accuracy(scene, objects)
    assert abs(hits / n - p) < 4 * np.sqrt(p * (1 - p) / n)


def test_objects_stay_apart_and_in_the_picture():
    areas, overlaps = [], []
    for i in range(300):
        masks = mini.render(mini.draw_spec(4, i)).masks
        areas += list(masks.mean((1, 2)))
        if len(masks) == 2:
            overlaps.append((masks[0] & masks[1]).sum() / min(m.sum() for m in masks))
    assert (
        min(areas) > 0.01
        and np.median(areas) > 0.05
        and np.mean(overlaps) < 0.01
        and max(overlaps) < 0.2
    )


def test_patch_labels_are_where_the_masks_are():
    spec = mini.Spec("ocean", ("Balloon",), 8)
    batch, mask = mini.paint([spec]), mini.render(spec).masks[0]
    covered = mask.reshape(8, 8, 8, 8).mean((1, 3)).ravel() >= 0.25
    names = list(mini.SCENES) + list(mini.OBJECTS)
    assert {names[i] for i in batch["patches"][0][covered]} == {"Balloon"}
    assert {names[i] for i in batch["patches"][0][~covered]} == {"ocean"}
