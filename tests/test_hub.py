"Hugging Face data sets as they circulate, through the same doors as folders and tables."

import io
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from uniemo.data.checking import check, find_layout, load_data
from uniemo.data.hub import EmotionArrow, data_place
from uniemo.data.reading import DataError
from uniemo.data.splits import load_splits, open_splits
from uniemo.data.tables import EmotionTable
from uniemo.data.transforms import NetworkView
from uniemo.emotions import MIKELS, EmotionSet

datasets = pytest.importorskip("datasets", reason="the extra 'data' is not installed")
SCENES = ("sea", "cellar")


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def made(count, seed=0, names=tuple(MIKELS)):
    "A data set of noise with EmoSet's columns."
    rng = np.random.default_rng(seed)
    rows = dict(
        image=[Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8)) for _ in range(count)],
        emotion=[k % len(names) for k in range(count)],
        scene=[SCENES[k % 2] for k in range(count)],
        object=[["cat", "cup"][: k % 3] for k in range(count)],
    )
    kinds = datasets.Features(
        image=datasets.Image(),
        emotion=datasets.ClassLabel(names=list(names)),
        scene=datasets.Value("string"),
        object=datasets.List(datasets.Value("string")),
    )
    return datasets.Dataset.from_dict(rows, features=kinds)


def test_a_folder_without_splits_is_split_as_any_other(tmp_path):
    made(48).save_to_disk(tmp_path / "one")
    assert find_layout(tmp_path / "one") is EmotionArrow
    splits = open_splits(tmp_path / "one")
    assert [len(splits[name]) for name in ("train", "val", "test")] == [32, 8, 8]
    assert splits.names == dict(scene=tuple(sorted(SCENES)), object=("cat", "cup"))
    assert splits.annotations("train").columns.tolist() == ["emotion", "scene", "object"]
    read = load_splits(tmp_path / "one", NetworkView(16))
    assert read["train"]["pixel_values"].shape == (32, 3, 16, 16)


def test_splits_of_a_dict_are_kept_and_checked(tmp_path):
    parts = dict(train=made(16), validation=made(8, 1), test=made(8, 2))
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "parts")
    splits = open_splits(tmp_path / "parts")
    assert [len(splits[name]) for name in ("train", "val", "test")] == [16, 8, 8]
    assert not len(check(tmp_path / "parts", verbose=False))
    parts["test"] = made(8, 1)
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "twice")
    found = check(tmp_path / "twice", verbose=False)
    assert found.problem.str.startswith("same image in two splits").sum() == 8


def test_parquet_shards_and_a_single_file_tell_names_of_classes(tmp_path):
    names = ("joy", "calm")
    (tmp_path / "shards").mkdir()
    for k in range(2):
        made(6, k, names).to_parquet(tmp_path / f"shards/train-0000{k}-of-00002.parquet")
    made(4, 5, names).to_parquet(tmp_path / "shards/test-00000-of-00001.parquet")
    train = load_data(tmp_path / "shards", "train")
    assert len(train) == 12 and list(train.emotions) == ["calm", "joy"]
    single = EmotionTable(tmp_path / "shards/test-00000-of-00001.parquet")
    assert [single.emotions.names[k] for k in single.labels] == ["joy", "calm", "joy", "calm"]
    assert np.array_equal(single.image(1), load_data(tmp_path / "shards", "test").image(1))


def test_a_column_of_splits_in_an_arrow_folder(tmp_path):
    data = made(16).add_column("split", ["train"] * 8 + ["val"] * 4 + ["test"] * 4)
    data.save_to_disk(tmp_path / "column")
    assert EmotionArrow.splits(tmp_path / "column") == ["test", "train", "val"]
    splits = open_splits(tmp_path / "column")
    assert [len(splits[name]) for name in ("train", "val", "test")] == [8, 4, 4]
    assert np.array_equal(splits["test"].image(0), data[12]["image"])


def test_what_cannot_be_decoded_or_is_missing_is_named(tmp_path):
    data = made(8).cast_column("image", datasets.Image(decode=False))
    cells = data["image"]
    broken = [dict(bytes=b"none", path=None), None, *cells[2:]]
    data = data.remove_columns("image").add_column("image", broken)
    data = data.cast_column("image", datasets.Image(decode=False))
    data.save_to_disk(tmp_path / "broken")
    found = check(tmp_path / "broken", verbose=False)
    assert len(found) == 2 and found.problem.str.contains("decoded|has no image").all()
    with pytest.warns(UserWarning, match="2 entries are skipped"):
        assert len(load_data(tmp_path / "broken", on_error="skip", progress=False)) == 6


def test_names_on_the_hub_are_not_taken_for_paths(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or made(8))
    assert data_place("hf:owner/name") == "hf:owner/name"
    assert len(load_data("hf:owner/name")) == 8
    assert asked == ["owner/name"]


def test_votes_in_one_column_and_others_names_of_columns(tmp_path):
    image = io.BytesIO()
    Image.new("RGB", (40, 20), "red").save(image, "PNG")
    (tmp_path / "a.png").write_bytes(image.getvalue())
    table = pd.DataFrame(
        dict(
            path=["a.png"],
            votes=[json.dumps([3, 1, 0, 0, 0, 0, 0, 0])],
            background=["sea"],
            subject=["cat; cup"],
            bbox=[json.dumps([10, 0, 20, 20])],
        )
    )
    table.to_csv(tmp_path / "t.csv", index=False)
    data = EmotionTable(tmp_path / "t.csv")
    assert data.annotation(0) == dict(scene="sea", object=["cat", "cup"])
    assert data.columns["votes"][0, :2].tolist() == [0.75, 0.25]
    mask = data.mask(0, 8)
    assert mask[:, :4].all() and not mask[:, 4:].any()
    with pytest.raises(DataError, match="no boxes"):
        data.columns["boxes"][0] = "[1, 2]"
        data.mask(0, 8)
    table.assign(votes="[1, 2]").to_csv(tmp_path / "two.csv", index=False)
    with pytest.raises(DataError, match="2 votes for 8 emotions"):
        EmotionTable(tmp_path / "two.csv")
    own = EmotionTable(tmp_path / "two.csv", emotions=EmotionSet(("calm", "joy")))
    assert own.labels.tolist() == [1]


def test_background_subject_and_boxes_of_a_data_set(tmp_path):
    features = datasets.Features(
        image=datasets.Image(),
        emotion=datasets.Value("string"),
        background=datasets.Value("string"),
        subject=datasets.Value("string"),
        bbox=datasets.List(datasets.Value("float32")),
    )
    rows = dict(
        image=[Image.new("RGB", (40, 20), "red")] * 2,
        emotion=["awe", "fear"],
        background=["sea", "street"],
        subject=["cat", "cup"],
        bbox=[[10, 0, 20, 20]] * 2,
    )
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "boxes")
    data = EmotionArrow(tmp_path / "boxes")
    assert data.annotation(1) == dict(scene="street", object=["cup"])
    mask = data.mask(0, 8)
    assert mask[:, :4].all() and not mask[:, 4:].any()


def test_without_the_library_the_error_says_what_to_install(tmp_path, monkeypatch):
    made(4).save_to_disk(tmp_path / "one")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'uniemo\[data\]'"):
        load_data(tmp_path / "one")
