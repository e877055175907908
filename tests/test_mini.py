"The painted world: what does not read well in its notebooks."

import json
from collections import Counter

import numpy as np
import pytest

from uniemo import mini
from uniemo.emotions import MIKELS


def test_names_are_emosets(shared):
    info = json.loads((shared / "real/emoset_info.json").read_text())
    assert set(mini.SCENES) <= set(info["scene"]["label2idx"])
    assert set(mini.OBJECTS) <= set(info["object"]["label2idx"])
    assert list(MIKELS.names) == list(info["emotion"]["label2idx"])
    assert mini.label_file().keys() == info.keys()


def test_any_number_of_processes_writes_the_same_bytes(tmp_path):
    folders = [tmp_path / str(workers) for workers in (1, 2)]
    for workers, folder in zip((1, 2), folders):
        mini.write_emoset(folder, 520, seed=3, workers=workers, progress=False)
    one, two = folders
    files = [p.relative_to(one) for p in one.rglob("*") if p.is_file()]
    assert len(files) == 2 * 520 + 5
    assert all((one / f).read_bytes() == (two / f).read_bytes() for f in files)


def test_more_images_extend_a_world(tmp_path):
    small, large = (
        mini.read_specs(mini.write_emoset(tmp_path / str(n), n, seed=1, workers=1, progress=False))
        for n in (16, 32)
    )
    assert all(large[name] == spec for name, spec in small.items())


def test_specs_follow_the_tables():
    specs = [mini.draw_spec(9, i, emotion="fear") for i in range(3000)]
    counts = Counter(spec.scene for spec in specs)
    for name, p in mini.true_table("scene")["fear"].items():
        assert abs(counts[name] / 3000 - p) < 5 * np.sqrt(p * (1 - p) / 3000) + 1e-3
    share = np.mean([len(spec.objects) == 2 for spec in specs])
    assert abs(share - mini.TWO_OBJECTS) < 0.05
    assert all(len(set(spec.objects)) == len(spec.objects) for spec in specs)


def test_neutral_images_mean_no_emotion():
    specs = [mini.draw_spec(2, i, neutral=True) for i in range(4000)]
    assert all(spec.emotion is None for spec in specs)
    counts = Counter(name for spec in specs for name in spec.objects)
    expected = sum(counts.values()) / len(mini.OBJECTS)
    assert all(abs(c - expected) < 6 * np.sqrt(expected) for c in counts.values())


@pytest.mark.parametrize("scene, objects", [(True, 0), (False, 1), (True, 1), (True, 2)])
def test_bayes_accuracy_agrees_with_simulation(scene, objects):
    rng, hits, n = np.random.default_rng(0), 0, 4000
    scene_p, object_p = (mini.true_table(kind).to_numpy() for kind in ("scene", "object"))
    for _ in range(n):
        e = rng.integers(8)
        shown = list(mini.SCENES)[rng.choice(16, p=scene_p[:, e])] if scene else None
        drawn = rng.choice(24, objects, replace=False, p=object_p[:, e])
        names = [list(mini.OBJECTS)[k] for k in drawn]
        hits += mini.true_posterior(shown, names).argmax() == e
    p = mini.bayes_accuracy(scene, objects)
    assert abs(hits / n - p) < 4 * np.sqrt(p * (1 - p) / n)


def test_objects_stay_apart_and_in_the_picture():
    areas, overlaps = [], []
    for i in range(300):
        masks = mini.render(mini.draw_spec(4, i)).masks
        areas += list(masks.mean((1, 2)))
        if len(masks) == 2:
            overlaps.append((masks[0] & masks[1]).sum() / min(m.sum() for m in masks))
    assert min(areas) > 0.01 and np.median(areas) > 0.05
    assert np.mean(overlaps) < 0.01 and max(overlaps) < 0.2


def test_patch_labels_are_where_the_masks_are():
    spec = mini.ImageSpec("ocean", ("Balloon",), 8)
    batch, mask = mini.paint([spec], progress=False), mini.render(spec).masks[0]
    covered = mask.reshape(8, 8, 8, 8).mean((1, 3)).ravel() >= 0.25
    names = [*mini.SCENES, *mini.OBJECTS]
    assert {names[i] for i in batch["patches"][0][covered]} == {"Balloon"}
    assert {names[i] for i in batch["patches"][0][~covered]} == {"ocean"}


FROZEN = dict(
    train=[57670161, 147, 317],
    val=[12421431, 36, 55],
    test=[12880398, 29, 49],
)


def test_the_painted_splits_are_those_of_the_first_version():
    "The world is frozen: checksums of pixels, names and labels."
    splits = mini.paint_splits(40, 8, 8)
    sums = {
        name: [int(splits[name][key].long().sum()) for key in ("images", "label", "scene")]
        for name in splits.splits
    }
    assert sums == FROZEN
