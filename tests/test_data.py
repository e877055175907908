"Data sets: faults with real photographs, and what does not read well in the notebook."

import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from uniemo.data.batches import make_loader
from uniemo.data.checking import check, load_data
from uniemo.data.emoset import EmoSet
from uniemo.data.folders import EmotionFolder
from uniemo.data.images import read_image
from uniemo.data.mixing import same_images
from uniemo.data.reading import DataError
from uniemo.data.splits import EmotionSplits, three_splits, training_images
from uniemo.data.tables import EmotionTable
from uniemo.data.transforms import (
    CentreCrop,
    NetworkView,
    RandomCrop,
    Transform,
    eval_transform,
    joint_transform,
    train_transform,
)
from uniemo.emotions import MIKELS, EmotionSet

data = pytest.importorskip("skimage.data")
PHOTOS = ("astronaut", "coffee", "chelsea", "rocket")


@pytest.fixture(scope="session")
def photos():
    return {n: Image.fromarray(getattr(data, n)()) for n in PHOTOS}  # 451 to 640 pixels wide


@pytest.fixture
def emoset(tmp_path, photos):
    "A small set in EmoSet's format: 8 emotions, 2 images each in train, 1 in val and test."
    root = tmp_path / "set"
    tables = dict(
        emotion=MIKELS.names,
        scene=("beach", "castle"),
        object=("Dog", "Alarm clock", "castle"),
        facial_expression=("happy",),
        human_action=("reading book",),
        brightness=(),
        colorfulness=(),
    )
    root.mkdir()
    (root / "info.json").write_text(
        json.dumps(
            {
                k: dict(
                    label2idx={n: i for i, n in enumerate(v)},
                    idx2label={str(i): n for i, n in enumerate(v)},
                )
                for k, v in tables.items()
            }
        )
    )
    for s, count in dict(train=2, val=1, test=1).items():
        index = []
        for e, emotion in enumerate(MIKELS):
            for k in range(count):
                name = f"{emotion}_{s}{k}"
                image, note = (
                    root / f"image/{emotion}/{name}.jpg",
                    root / f"annotation/{emotion}/{name}.json",
                )
                for f in (image, note):
                    f.parent.mkdir(parents=True, exist_ok=True)
                photos[PHOTOS[e % 4]].resize((60, 40)).rotate(7 * e + 3 * k + len(s)).save(image)
                note.write_text(
                    json.dumps(
                        dict(
                            image_id=name,
                            emotion=emotion,
                            brightness=0.5,
                            colorfulness=0.3,
                            scene="castle",
                            object=["alarm_clock", "castle"],
                            facial_expression="happy",
                            human_action=["reading book"],
                        )
                        if k == 0
                        else {}
                    )
                )
                index.append(
                    [emotion, image.relative_to(root).as_posix(), note.relative_to(root).as_posix()]
                )
        (root / f"{s}.json").write_text(json.dumps(index))
    return root


def edit(root, row, change, split="train"):
    index = json.loads((root / f"{split}.json").read_text())
    index[row] = change(index[row])
    (root / f"{split}.json").write_text(json.dumps(index))
    return index[row]


# ---- images


def test_every_colour_mode_of_real_photographs(tmp_path, photos):
    for name, photo in photos.items():
        photo = photo.resize((240, 160))
        want = np.asarray(photo, int)
        for mode, ending in (
            ("CMYK", "jpg"),
            ("CMYK", "tif"),
            ("P", "png"),
            ("P", "gif"),
            ("RGBA", "webp"),
            ("RGBA", "png"),
            ("YCbCr", "jpg"),
        ):
            file = tmp_path / f"{name}_{mode}.{ending}"
            (photo.quantize(128) if mode == "P" else photo.convert(mode)).save(file)
            got = read_image(file)
            assert (
                got.mode == "RGB"
                and got.size == photo.size
                and np.abs(np.asarray(got, int) - want).mean() < 12
            ), file
        for mode in ("L", "LA", "1"):
            photo.convert(mode).save(tmp_path / "grey.png")
            assert read_image(tmp_path / "grey.png").mode == "RGB"


def test_sixteen_bits_keep_their_range(tmp_path, photos):
    grey = np.asarray(photos["coffee"].convert("L"))
    for ending in ("png", "tif"):
        Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / f"a.{ending}")
        assert (np.asarray(read_image(tmp_path / f"a.{ending}"))[..., 1] == grey).all()
    for kind, said in ((np.float32, "floating point"), (np.int32, "32-bit integer")):
        Image.fromarray(grey.astype(kind)).save(tmp_path / "f.tif")
        with pytest.raises(DataError, match=f"{said}.*known range. Convert it to 8-bit RGB"):
            read_image(tmp_path / "f.tif")
    # a dark picture with 16 bits stays dark: its range is not guessed from its values
    (tmp_path / "a.pgm").write_bytes(b"P5 2 2 65535 " + np.full(4, 200, ">u2").tobytes())
    assert np.asarray(read_image(tmp_path / "a.pgm")).max() == 0


def test_transparency_lies_on_white(tmp_path, photos):
    photo = photos["chelsea"].copy()
    photo.putalpha(0)
    photo.save(tmp_path / "a.png")
    assert np.asarray(read_image(tmp_path / "a.png")).min() == 255
    photos["chelsea"].quantize(16).save(tmp_path / "p.png", transparency=3)
    assert read_image(tmp_path / "p.png").mode == "RGB"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_with_and_without_reduction(tmp_path, photos, orientation):
    turn = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[
        orientation
    ]  # what undoes the orientation, undone: the stored pixels
    photo = photos["rocket"]
    stored = photo if turn is None else photo.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "r.jpg", quality=95, exif=exif)
    for reduce in (1, 2, lambda w, h: 2 if (w, h) == photo.size else 1 / 0):
        got = read_image(tmp_path / "r.jpg", reduce)
        want = np.asarray(photo.resize(got.size, Image.BOX), int)
        assert (
            abs(got.width / got.height - photo.width / photo.height) < 0.02
            and np.abs(np.asarray(got, int) - want).mean() < 6
        )


def test_truncated_at_any_place_is_refused(tmp_path, photos):
    photos["astronaut"].save(tmp_path / "a.jpg", quality=90)
    photos["astronaut"].save(tmp_path / "p.jpg", quality=90, progressive=True)
    photos["astronaut"].save(tmp_path / "a.png")
    for name in ("a.jpg", "p.jpg", "a.png"):
        whole = (tmp_path / name).read_bytes()
        for share in (0, 0.001, 0.1, 0.5, 0.95):
            (tmp_path / "cut").write_bytes(whole[: int(share * len(whole))])
            for reduce in (1, 8):
                with pytest.raises(DataError, match="cut: cannot be decoded.*Fetch it again"):
                    read_image(tmp_path / "cut", reduce)


def test_decompression_bomb_names_file_and_remedy(tmp_path, monkeypatch):
    Image.new("1", (3000, 2000)).save(tmp_path / "bomb.png")
    for limit in (5_000_000, 2_000_000):  # Pillow warns up to twice the limit and refuses beyond
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(DataError, match="bomb.png: too many pixels.*MAX_IMAGE_PIXELS"):
                read_image(tmp_path / "bomb.png")


def test_reduction_keeps_enough_pixels(tmp_path, photos):
    photos["astronaut"].resize((1000, 700)).save(tmp_path / "a.jpg")
    for size, fraction in ((64, 1.0), (224, 224 / 256), (224, 1.0), (512, 1.0)):
        image = read_image(tmp_path / "a.jpg", 700 * fraction / size)
        assert min(image.size) * fraction >= size - 1
    assert read_image(tmp_path / "a.jpg", 0.5).size == (1000, 700)


# ---- transforms


def test_one_crop_for_both_views(photos):
    t = joint_transform(32, vae_size=96, flip=0.5)
    flips = set()
    for seed in range(12):
        out = t(photos["coffee"], np.random.default_rng(seed))
        assert out["pixel_values"].shape == (3, 32, 32) and out["vae_pixel_values"].shape == (
            3,
            96,
            96,
        )
        small = torch.nn.functional.interpolate(
            out["vae_pixel_values"][None], size=32, mode="area"
        )[0]
        assert (small - out["pixel_values"]).abs().mean() < 0.04
        flips.add(tuple(out["pixel_values"][:, 5, 3].tolist()))
    assert len(flips) == 2  # mirrored or not, nothing else is drawn


def test_normalisation_is_the_models(photos):
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    plain, normed = (
        eval_transform(40, m, s)(photos["rocket"])["pixel_values"]
        for m, s in (((0, 0, 0), (1, 1, 1)), (mean, std))
    )
    assert plain.dtype == torch.float32 and plain.min() >= 0 and plain.max() <= 1
    assert torch.allclose(
        normed,
        (plain - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None],
        atol=1e-5,
    )


def test_draws_follow_the_seed(photos):
    t = train_transform(24)

    def draw(seed):
        torch.manual_seed(seed)
        return t(photos["coffee"])["pixel_values"]

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (5, 4), (2000, 30)])
def test_any_size_of_image(size):
    for geometry in (RandomCrop(), CentreCrop(), CentreCrop(1.0, 0.5)):
        for seed in range(5):
            x = Transform(geometry, dict(pixel_values=NetworkView(16)))(
                Image.new("RGB", size, "red"), np.random.default_rng(seed)
            )["pixel_values"]
            assert x.shape == (3, 16, 16) and torch.isfinite(x).all()


# ---- EmoSet


def test_every_attribute_and_the_items(emoset):
    assert len(check(emoset)) == 0
    d = EmoSet(emoset, "train", transform=eval_transform(32))
    assert (
        d.emotions is MIKELS
        and d.scene_names == ("beach", "castle")
        and d.object_names == ("Dog", "Alarm clock", "castle")
        and len(d) == 16
    )
    assert d.annotation(0) == dict(
        image_id="amusement_train0",
        emotion="amusement",
        brightness=0.5,
        colorfulness=0.3,
        scene="castle",
        object=["Alarm clock", "castle"],
        facial_expression="happy",
        human_action=["reading book"],
    )
    assert d.annotation(1) == {}
    item, none = d[0], d[-15]
    assert (
        item["label"] == 0
        and item["scene"] == 1
        and item["objects"].tolist() == [0, 1, 1]
        and item["image_id"] == "amusement_train0"
        and item["path"].endswith("amusement_train0.jpg")
    )
    assert none["scene"] == -1 and none["objects"].sum() == 0
    table = d.read_annotations()
    assert (
        list(table["scene"][:2]) == ["castle", None]
        and list(table["object"][1]) == []
        and table["brightness"].isna().sum() == 8
    )
    for f in emoset.glob("annotation/*/*"):
        f.unlink()
    assert d[0]["scene"] == 1 and d.subset([0])[0]["objects"].tolist() == [
        0,
        1,
        1,
    ]  # kept after one pass
    with pytest.raises(IndexError, match="16 of 16"):
        d[16]
    with pytest.raises(DataError, match="no such file.*write null"):
        EmoSet(emoset, "test")[0]


def test_both_layouts_mixed_and_no_annotation(emoset):
    edit(emoset, 0, lambda e: [e[0], "some id", e[1], e[2]])
    edit(emoset, 2, lambda e: [e[0], e[1], None])
    edit(emoset, 4, lambda e: [e[0], 17, e[1], None])
    d = EmoSet(emoset, "train")
    assert (
        [d[i]["image_id"] for i in (0, 2, 4)] == ["some id", "awe_train0", "17"]
        and d[0]["scene"] == 1
        and d[2]["scene"] == d[4]["scene"] == -1
    )
    assert len(check(emoset, verbose=False)) == 0


def test_emotions_of_ones_own(emoset):
    info = json.loads((emoset / "info.json").read_text())
    info["emotion"]["label2idx"] = {n: 7 - i for i, n in enumerate(MIKELS)}
    (emoset / "info.json").write_text(json.dumps(info))
    d = EmoSet(emoset)
    assert d.emotions.names == MIKELS.names[::-1] and d.labels[0] == 7
    with pytest.raises(ValueError, match="no polarity"):
        d.two_class()


def test_real_label_file(shared, emoset):
    (emoset / "info.json").write_bytes((shared / "real/emoset_info.json").read_bytes())
    d = EmoSet(emoset, "train")
    assert d.emotions is MIKELS and (
        len(d.scene_names),
        len(d.object_names),
        len(d.tables["human_action"]),
    ) == (254, 409, 264)
    item = d[0]
    assert d.scene_names[item["scene"]] == "castle" and [
        d.object_names[j] for j in item["objects"].nonzero()[:, 0]
    ] == [n for n in d.object_names if n.lower() in ("alarm clock", "castle")]


OUTSIDE = "leaves the root"
FAULTS = dict(
    missing=(lambda r, p, a: p.unlink(), "no such file"),
    truncated=(lambda r, p, a: p.write_bytes(p.read_bytes()[:500]), "cannot be decoded"),
    text=(lambda r, p, a: p.write_text("<html>"), "cannot be decoded"),
    folder=(lambda r, p, a: (p.unlink(), p.mkdir()), "cannot be "),
    link=(
        lambda r, p, a: (p.rename(r.parent / "x.jpg"), p.symlink_to(r.parent / "x.jpg")),
        OUTSIDE,
    ),
    up=(lambda r, p, a: edit(r, 0, lambda e: [e[0], "../x.jpg", e[2]]), OUTSIDE),
    absolute=(lambda r, p, a: edit(r, 0, lambda e: [e[0], str(p.resolve()), e[2]]), OUTSIDE),
    windows=(lambda r, p, a: edit(r, 0, lambda e: [e[0], "C:\\x.jpg", e[2]]), OUTSIDE),
    note_up=(lambda r, p, a: edit(r, 0, lambda e: [e[0], e[1], "../../etc/passwd"]), OUTSIDE),
    note_link=(
        lambda r, p, a: (a.rename(r.parent / "x.json"), a.symlink_to(r.parent / "x.json")),
        OUTSIDE,
    ),
    emotion=(lambda r, p, a: edit(r, 0, lambda e: ["joy", *e[1:]]), "unknown label: emotion 'joy'"),
    wrong=(lambda r, p, a: edit(r, 0, lambda e: ["awe", *e[1:]]), "wrong emotion folder"),
    twice=(
        lambda r, p, a: edit(r, 2, lambda e: json.loads((r / "train.json").read_text())[0]),
        "duplicated entry",
    ),
    malformed=(lambda r, p, a: edit(r, 0, lambda e: e[:2]), "malformed entry"),
    number=(lambda r, p, a: edit(r, 0, lambda e: [e[0], 3, e[2]]), "malformed entry"),
    no_json=(lambda r, p, a: a.write_text("{scene: beach}"), "no JSON"),
    bytes=(lambda r, p, a: a.write_bytes(b"\xff\xfe\x00"), "no JSON"),
    a_list=(lambda r, p, a: a.write_text("[1]"), "not a JSON object"),
    note_gone=(lambda r, p, a: a.unlink(), "no such file"),
    scene=(lambda r, p, a: a.write_text('{"scene": "moon"}'), "unknown label: scene 'moon'"),
    object=(
        lambda r, p, a: a.write_text('{"object": ["Dog", "Unicorn"]}'),
        "unknown label: object 'Unicorn'",
    ),
    scenes=(lambda r, p, a: a.write_text('{"scene": ["beach", "castle"]}'), "2 scenes"),
    action=(
        lambda r, p, a: a.write_text('{"human_action": "flying"}'),
        "unknown label: human_action",
    ),
    bright=(lambda r, p, a: a.write_text('{"brightness": 7}'), "brightness is 7"),
)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_found_and_skipped(emoset, fault):
    harm, message = FAULTS[fault]
    harm(
        emoset,
        emoset / "image/amusement/amusement_train0.jpg",
        emoset / "annotation/amusement/amusement_train0.json",
    )
    with pytest.raises(DataError) as e:  # at opening, or when the entry is read
        d = EmoSet(emoset, "train", transform=eval_transform(16))
        [d[i] for i in range(len(d))]
    assert message in str(e.value) and e.value.path and e.value.remedy
    table = check(emoset, verbose=False)
    assert (
        list(table.columns) == ["path", "problem", "remedy"]
        and len(table) == 1
        and table["problem"][0].startswith(message)
        and table["remedy"][0]
    )
    with pytest.warns(UserWarning, match="1 entry is skipped and listed"):
        d = EmoSet(emoset, "train", transform=eval_transform(16), on_error="skip", progress=False)
    assert (
        len(d.skipped) == 1
        and message in d.skipped["problem"][0]
        and len([d[i] for i in range(len(d))]) == 15
    )


def test_links_are_followed_if_allowed(emoset):
    (emoset / "image").rename(emoset.parent / "elsewhere")
    (emoset / "image").symlink_to(emoset.parent / "elsewhere")
    with pytest.raises(DataError, match="through a link.*allow_links=True"):
        EmoSet(emoset)[0]
    assert (
        EmoSet(emoset, allow_links=True)[0]["label"] == 0
        and len(check(emoset, verbose=False, allow_links=True)) == 0
    )
    (emoset.parent / "alias").symlink_to(
        emoset
    )  # a root that is itself a link is the user's own doing
    (emoset / "image").unlink()
    (emoset.parent / "elsewhere").rename(emoset / "image")
    assert EmoSet(emoset.parent / "alias")[0]["label"] == 0


def test_what_makes_a_whole_set_unusable(emoset):
    (emoset / "val.json").write_text("[]")
    with pytest.raises(DataError, match="'val' is empty"):
        EmoSet(emoset, "val")
    assert list(check(emoset, verbose=False)["problem"]) == ["empty split"]
    with pytest.raises(
        DataError, match="dev.json: no such file. Splits in this folder: train, val, test"
    ):
        EmoSet(emoset, "dev")
    (emoset / "test.json").write_text("{")
    with pytest.raises(DataError, match="test.json: no JSON"):
        EmoSet(emoset, "test")
    for text, problem in (
        ('{"emotion": {"label2idx": {"joy": 3}}}', "does not number"),
        ("[]", "does not number"),
        ("{}", "no emotions"),
        ("nope", "no JSON"),
    ):
        (emoset / "info.json").write_text(text)
        with pytest.raises(DataError, match=f"info.json.*{problem}"):
            EmoSet(emoset)
    (emoset / "info.json").unlink()
    with pytest.raises(DataError, match="info.json: no such file.*copy it into the root"):
        EmoSet(emoset)
    assert (
        "info.json" in check(emoset, verbose=False)["path"][0]
        and len(check(emoset, verbose=False)) == 1
    )
    assert check(emoset / "nothing", verbose=False)["problem"][0].startswith(
        "no such file or folder"
    )
    (emoset / "void").mkdir()
    assert check(emoset / "void", verbose=False)["problem"][0] == "no data found"


def test_leaks_between_splits_are_found_by_hash(emoset, capsys):
    a, b = emoset / "image/fear/fear_train0.jpg", emoset / "image/awe/awe_test0.jpg"
    b.write_bytes(a.read_bytes())
    c = emoset / "image/fear/fear_train1.jpg"
    c.write_bytes(a.read_bytes())
    table = check(emoset)
    assert (
        sorted(table["problem"].str.split(":").str[0])
        == ["same image in two splits", "same image twice"]
        and "fear_train0.jpg" in table["problem"][0]
    )
    out = capsys.readouterr().out
    assert (
        "32 entries (train 16, val 8, test 8), 2 problems" in out
        and "same image in two splits: image/awe/awe_test0.jpg" in out
    )


def test_all_broken_says_so(emoset):
    for f in emoset.glob("image/*/*"):
        f.unlink()
    with (
        pytest.warns(UserWarning, match="16 entries"),
        pytest.raises(DataError, match="empty.*16 entries were skipped"),
    ):
        EmoSet(emoset, on_error="skip", progress=False)
    assert len(check(emoset, verbose=False)) == 32


# ---- folders and tables


@pytest.fixture
def folder(tmp_path, photos):
    for s in ("train", "test"):
        for k, n in enumerate(("calm", "joy", "rage")):
            (tmp_path / "own" / s / n).mkdir(parents=True)
            for j, ending in enumerate(("jpg", "PNG", "webp", "jpeg")):
                photos["coffee"].resize((30 + j, 20 + k + 10 * (s == "test"))).save(
                    tmp_path / "own" / s / n / f"{j}.{ending}"
                )
    return tmp_path / "own"


def test_folders(folder):
    d = EmotionFolder(folder, "train")
    assert (
        d.emotions.names == ("calm", "joy", "rage")
        and len(d) == 12
        and len(check(folder, verbose=False)) == 0
        and len(set(d.columns["image_id"])) == 12
    )
    assert (
        d[4]["label"] == 1
        and d[0]["scene"] == -1
        and d[0]["objects"].shape == (0,)
        and next(iter(make_loader(d, 3)))["objects"].shape == (3, 0)
    )
    for f in (folder / "test/rage").iterdir():
        f.unlink()
    (folder / "test/rage").rmdir()
    d = EmotionFolder(folder, "test")
    assert (
        len(d.emotions) == 3
        and set(d.labels) == {0, 1}
        and check(folder, verbose=False)["problem"][0].startswith("empty emotion")
    )  # an index means the same in both splits
    with pytest.raises(DataError, match="Splits in this folder: test, train"):
        EmotionFolder(folder)
    with pytest.raises(DataError, match="no such folder"):
        EmotionFolder(folder / "nope")


def test_files_that_are_no_images_are_told(folder):
    (folder / "train/joy/notes.txt").write_text("x")
    (folder / "train/joy/.DS_Store").write_text("x")
    with pytest.warns(UserWarning, match="1 files are no images that are read .1 .txt.*notes.txt"):
        d = EmotionFolder(folder, "train")
    assert d.ignored == ["train/joy/notes.txt"] and list(check(folder, verbose=False)["path"]) == [
        "train/joy/notes.txt"
    ]


@pytest.mark.parametrize("stray", ["train/montage.png", "cover.png", "docs/figure.png"])
def test_a_stray_image_does_not_change_the_layout(folder, photos, stray):
    (folder / stray).parent.mkdir(exist_ok=True)
    photos["rocket"].resize((50, 40)).save(folder / stray)
    assert EmotionFolder.splits(folder) == ["test", "train"]
    with pytest.warns(UserWarning, match=f"1 files lie in no emotion's folder.*first {stray}"):
        d = EmotionFolder(folder, "train")
    assert d.emotions.names == ("calm", "joy", "rage") and len(d) == 12 and d.ignored == [stray]
    assert check(folder, verbose=False)[["path", "problem"]].values.tolist() == [
        [stray, "not read: in no emotion's folder"]
    ]


def test_where_the_images_lie_is_the_layout(folder, photos):
    small, flat = photos["rocket"].resize((20, 20)), folder / "train"
    for k in range(
        20
    ):  # more images beside the folders than in them: the name still says that it is a split
        photos["rocket"].resize((20 + k, 20)).save(folder / f"train/new{k}.png")
    with pytest.warns(UserWarning, match="20 files lie in no"):
        assert len(EmotionFolder(folder, "train")) == 12
    (flat / "joy/spare").mkdir()
    small.save(flat / "joy/spare/a.png")
    with pytest.warns(
        UserWarning
    ) as said:  # emotions, one of which holds a folder; images in the root
        d = EmotionFolder(flat)
    assert (
        d.split is None
        and len(d) == 12
        and d.ignored == ["joy/spare", *sorted(f"new{k}.png" for k in range(20))]
        and ["1 files are no" in str(said[0].message), "20 files lie in" in str(said[1].message)]
        == [True] * 2
    )
    assert check(flat, verbose=False)["problem"].value_counts().to_dict() == {
        "not read: no image file": 1,
        "not read: in no emotion's folder": 20,
    }
    for p in flat.glob("joy/*"):
        p.unlink() if p.is_file() else [p.joinpath("a.png").unlink(), p.rmdir()]
    for n in "calm", "rage":
        for p in flat.glob(f"{n}/*"):
            p.unlink()
    assert sorted(p.split(":")[0] for p in check(folder, verbose=False)["problem"]) == [
        "empty split",
        *["not read"] * 20,
    ]  # an empty split still tells what it does not read


def test_folders_with_mikels_names(tmp_path, photos):
    for e in sorted(MIKELS):
        (tmp_path / e).mkdir()
        photos["rocket"].resize((20, 20)).save(tmp_path / e / "a.png")
    d = EmotionFolder(tmp_path)
    assert (
        d.emotions is MIKELS
        and d.labels.tolist() == [0, 4, 1, 2, 5, 3, 6, 7]
        and (check(tmp_path, verbose=False)["problem"].str.startswith("same image twice")).sum()
        == 7
    )
    with pytest.raises(DataError, match="unknown label: emotion 'amusement'"):
        EmotionFolder(tmp_path, emotions=EmotionSet(("anger", "awe")))


def table(folder, **columns):
    t = pd.DataFrame(
        dict(path=[f"train/calm/{f}" for f in ("0.jpg", "1.PNG", "2.webp")], **columns)
    )
    t.to_csv(folder / "t.csv", index=False)
    t.to_parquet(folder / "t.parquet")
    return folder / "t.csv"


VOTES = {n: [2, 0, 0] for n in MIKELS} | dict(fear=[6, 3, 0], awe=[0, 0, 1])


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_tables_with_votes(folder, ending):
    file = table(
        folder,
        **VOTES,
        valence=[0.1, None, -0.3],
        arousal=[0.1, 0.2, 0.3],
        scene=["beach", None, "castle"],
        objects=["Dog; Cat", None, "Cat"],
        split=["train", "train", "test"],
    ).with_suffix("." + ending)
    d = EmotionTable(file, "train")
    assert len(d) == 2 and d.scene_names == ("beach", "castle") and d.object_names == ("Cat", "Dog")
    assert (
        d[0]["votes"].sum().isclose(torch.tensor(1.0))
        and d[0]["label"] == 6
        and d[1]["votes"].tolist() == [0, 0, 0, 0, 0, 0, 1, 0]
        and torch.isnan(d[1]["valence"])
    )
    batch = next(iter(make_loader(d, 2)))
    assert (
        batch["votes"].shape == (2, 8)
        and batch["votes"].dtype == torch.float32
        and batch["objects"].tolist() == [[1, 1], [0, 0]]
        and batch["scene"].tolist() == [0, -1]
    )
    assert len(check(file, verbose=False)) == 0 and load_data(file, "test")[0]["label"] == 1
    two = d.two_class()
    assert (
        two[0]["votes"].shape == (2,)
        and two[0]["label"] == 0
        and two[1]["votes"].tolist() == [1, 0]
    )


@pytest.mark.parametrize(
    "change, problem",
    [
        (dict(fear=[6, -3, 0]), "votes: negative or no number"),
        (dict(fear=[6, 0, 0]), "votes: all are zero"),
        (dict(fear=[6, None, 0]), "votes: negative or no number"),
        (dict(fear=[6, float("inf"), 0]), "votes: negative or no number"),
        (dict(fear=[6, "many", 0]), "votes: negative or no number"),
    ],
)
def test_bad_votes(folder, change, problem):
    t = pd.DataFrame(
        dict(path=[f"train/calm/{f}" for f in ("0.jpg", "1.PNG", "2.webp")], **(VOTES | change))
    )
    t.to_csv(folder / "t.csv", index=False)
    with pytest.raises(DataError, match=f"t.csv, row 3: {problem}.*correct the row"):
        EmotionTable(folder / "t.csv")
    with pytest.warns(UserWarning, match="1 entry"):
        d = EmotionTable(folder / "t.csv", on_error="skip", progress=False)
    assert (
        len(d) == 2
        and len(d.skipped) == 1
        and [d[i]["label"] for i in range(2)] == [6, 1]
        and len(check(folder / "t.csv", verbose=False)) == 1
    )


def test_tables_with_labels(folder):
    d = EmotionTable(table(folder, label=["calm", "joy", "calm"]))
    assert d.emotions.names == ("calm", "joy") and "votes" not in d[0] and d[2]["label"] == 0
    assert EmotionTable(table(folder, emotion=["fear", "awe", "awe"])).labels.tolist() == [6, 1, 1]
    assert EmotionTable(
        table(folder, label=[1, 0, 1]), emotions=EmotionSet(("calm", "joy"))
    ).labels.tolist() == [1, 0, 1]
    for columns, kwargs, problem in (
        (dict(label=["calm", "joy", None]), {}, "row 4: unknown label"),
        (
            dict(label=["calm", "joy", "x"]),
            dict(emotions=EmotionSet(("calm", "joy"))),
            "row 4: unknown label: emotion 'x'",
        ),
        (dict(score=[1, 2, 3]), {}, "neither a label nor votes"),
        (dict(fear=[1, 2, 3]), dict(emotions=MIKELS), "votes for fear only"),
        (
            dict(label=["a"] * 3, scene=["sea", "moon", "sea"]),
            dict(scene_names=("sea",)),
            "row 3: unknown label: scene 'moon'",
        ),
        (dict(label=["a"] * 3), dict(split="train"), "no column 'split'"),
    ):
        with pytest.raises(DataError, match=problem):
            EmotionTable(table(folder, **columns), **kwargs)


def test_tables_with_bad_paths(folder):
    pd.DataFrame(
        dict(
            path=[
                "../secret.jpg",
                "train/calm/0.jpg",
                "train/calm/0.jpg",
                None,
                "train/calm/9.jpg",
            ],
            label=["a"] * 5,
        )
    ).to_csv(folder / "t.csv", index=False)
    assert list(check(folder / "t.csv", verbose=False)["problem"].str.split(":").str[0]) == [
        OUTSIDE,
        "duplicated entry",
        "no path",
        "no such file",
    ]
    with pytest.raises(DataError, match="no column 'path'.*Columns in it: file, label"):
        pd.DataFrame(dict(file=["a"], label=["b"])).to_csv(folder / "u.csv", index=False)
        EmotionTable(folder / "u.csv")
    with pytest.raises(DataError, match="no such file"):
        EmotionTable(folder / "gone.csv")
    (folder / "x.parquet").write_text("nope")
    with pytest.raises(DataError, match="cannot be read as a table"):
        EmotionTable(folder / "x.parquet")


def test_a_row_without_a_split_is_told(folder):
    names = [f"train/{e}/{f}" for e in ("calm", "joy") for f in ("0.jpg", "1.PNG", "2.webp")]
    for split, lost in (
        (["train", "train", None, "test", "  ", " test "], ["row 4", "row 6"]),
        ([0, 0, None, 1, 1, 0], ["row 4"]),
    ):
        pd.DataFrame(dict(path=names, label="calm", split=split)).to_csv(
            folder / "t.csv", index=False
        )
        first = EmotionTable.splits(folder / "t.csv")[0]
        assert EmotionTable.splits(folder / "t.csv") == (
            ["test", "train"] if len(lost) == 2 else ["0", "1"]
        )
        table = check(folder / "t.csv", verbose=False)
        assert (
            [p.rsplit(", ")[1] for p in table["path"]] == lost
            and set(table["problem"]) == {"no split"}
            and table["remedy"].all()
        )
        with pytest.raises(DataError, match="t.csv, row 4: no split. Write its split"):
            EmotionTable(folder / "t.csv", first)
        with pytest.warns(UserWarning, match=f"{len(lost)} entr(y is|ies are) skipped"):
            d = EmotionTable(folder / "t.csv", first, on_error="skip", progress=False)
        assert len(d) == (2 if len(lost) == 2 else 3) and list(d.skipped["problem"]) == [
            "no split"
        ] * len(lost)
        assert len(EmotionTable(folder / "t.csv")) == 6  # all rows, whatever their split
    pd.DataFrame(dict(path=names, label="calm", split=None)).to_csv(folder / "t.csv", index=False)
    assert list(check(folder / "t.csv", verbose=False)["problem"]) == ["no data found"]


CELLS = dict(
    objects=(dict(objects=["Dog", '["a"', "Dog; Cat"]), "no list of names: objects is '[\"a\"'"),
    nested=(dict(objects=["Dog", '[["a"]]', None]), "no list of names: objects is '[[\"a\"]]'"),
    deep=(dict(objects=["Dog", "[" * 10**5, None]), "no list of names"),
    valence=(dict(valence=[".5", "a", None]), "no finite number: valence is 'a'"),
    infinite=(dict(valence=[0.5, float("inf"), 9]), "no finite number: valence is "),
    comma=(dict(arousal=[" ", "0,5", "1"]), "no finite number: arousal is '0,5'"),
    large=(dict(arousal=[1, 1e300, 1]), "no finite number: arousal is"),
    label=(dict(label=["calm", None, "joy"]), "unknown label: the cell is empty"),
    blank=(dict(label=["calm", "  ", "joy"]), "unknown label: the cell is empty"),
    numbers=(dict(label=[0, None, 2]), "unknown label: the cell is empty"),
    half=(dict(label=[0, 1.5, 1]), "unknown label: emotion "),
)


@pytest.mark.parametrize("case", CELLS)
@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_a_bad_cell_is_one_bad_row(folder, case, ending):
    change, problem = CELLS[case]
    rows, file = (
        pd.DataFrame(
            dict(
                path=[f"train/calm/{f}" for f in ("0.jpg", "1.PNG", "2.webp")],
                label=["calm", "joy", "calm"],
            )
            | change,
            index=["x", "y", "z"],
        ),
        folder / f"t.{ending}",
    )
    rows.to_csv(file, index=False) if ending == "csv" else rows.to_parquet(
        file
    )  # Parquet keeps an index that is no number
    kwargs = dict(emotions=EmotionSet(("calm", "joy", "rage"))) if "label" in change else {}
    with pytest.raises(DataError) as e:
        EmotionTable(file, **kwargs)
    assert (
        f"{file.name}, row 3: {problem}" in str(e.value)
        and e.value.remedy
        and "np.float64" not in str(e.value)
    )
    with pytest.warns(UserWarning, match="1 entry is skipped"):
        d = EmotionTable(file, on_error="skip", progress=False, **kwargs)
    assert (
        len(d) == 2
        and len(d.skipped) == 1
        and [d[i]["path"][-5:] for i in range(2)] == ["0.jpg", ".webp"]
    )
    found = check(file, verbose=False, **kwargs)
    assert (
        len(found) == 1
        and found["path"][0].endswith("row 3")
        and found["problem"][0].startswith(problem)
    )
    if case == "numbers":
        assert d.labels.tolist() == [0, 2]


def test_spellings_of_one_label(folder):
    d = EmotionTable(table(folder, label=["Awe", "awe ", "FEAR"]))
    assert (
        d.emotions is MIKELS
        and d.labels.tolist() == [1, 1, 6]
        and d.two_class().labels.tolist() == [1, 1, 0]
        and len(check(folder / "t.csv", verbose=False)) == 0
    )
    with pytest.warns(UserWarning, match="differ only in case or blanks are one: 'Joy' = 'joy'"):
        d = EmotionTable(table(folder, label=["joy", "Joy", " Joy"]))
    assert d.emotions.names == ("Joy",)
    assert EmotionTable(
        table(folder, label=["deep  calm", "JOY", "Deep Calm"]),
        emotions=EmotionSet(("joy", "deep calm")),
    ).labels.tolist() == [1, 0, 1]
    assert EmotionTable(
        table(folder, label=["a", "A", "1"]), emotions=EmotionSet(("A", "a"))
    ).labels.tolist() == [1, 0, 1]  # told apart by case, if you say so
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert EmotionTable(table(folder, label=[-1, 0, 1])).emotions.names == ("-1", "0", "1")


def test_missing_votes_are_named(folder):
    seven = {n: v for n, v in VOTES.items() if n != "fear"}
    for kwargs in {}, dict(emotions=MIKELS):
        with pytest.raises(
            DataError,
            match="t.csv: votes for amusement.*only: no column 'fear'. Add what is missing",
        ):
            EmotionTable(table(folder, **seven), **kwargs)
    assert "no column 'fear'" in check(folder / "t.csv", verbose=False)["problem"][0]
    with pytest.warns(
        UserWarning, match="columns 'amusement'.*but none 'fear'.*the labels stand alone"
    ):
        d = EmotionTable(table(folder, label=["awe", "fear", "awe"], **seven))
    assert "votes" not in d.columns and d.labels.tolist() == [1, 6, 1]


# ---- loading


def test_an_error_in_a_worker_names_the_file(emoset):
    (emoset / "image/awe/awe_train1.jpg").write_text("x")
    with pytest.raises(DataError, match="awe_train1.jpg: cannot be decoded"):
        list(make_loader(EmoSet(emoset), 4, workers=1))
    e = pickle.loads(pickle.dumps(DataError("a", "b", "c")))
    assert (e.path, e.problem, e.remedy, str(e)) == ("a", "b", "c", "a: b. c")


def test_augmentation_depends_on_seed_epoch_and_index_only(emoset):
    def run(workers, epoch, seed=0, batch_size=4):
        data = EmoSet(emoset, transform=train_transform(16), seed=seed)
        data.set_epoch(epoch)
        return torch.cat([b["pixel_values"] for b in make_loader(data, batch_size, workers)])

    base = run(0, 1)
    assert torch.equal(base, run(2, 1)) and torch.equal(base, run(0, 1, batch_size=7))
    assert not torch.equal(base, run(0, 2)) and not torch.equal(base, run(0, 1, seed=1))


def test_running_workers_see_the_epoch(emoset):
    d = EmoSet(emoset, transform=train_transform(16))
    loader = torch.utils.data.DataLoader(d, batch_size=16, num_workers=1, persistent_workers=True)
    first = next(iter(loader))["pixel_values"]
    d.set_epoch(1)
    second = next(iter(loader))["pixel_values"]
    assert not torch.equal(first, second) and torch.equal(second[3], d[3]["pixel_values"])
    part = d.subset([0, 1])
    part.set_epoch(9)
    assert torch.equal(second[3], d[3]["pixel_values"])  # a part has its own epoch


def test_opens_without_touching_the_files(tmp_path, emoset):
    entries = [
        [e, f"image/{e}/{e}_{k:05d}.jpg", f"annotation/{e}/{e}_{k:05d}.json"]
        for k in range(2000)
        for e in MIKELS
    ]
    (emoset / "big.json").write_text(json.dumps(entries))
    d = EmoSet(emoset, "big")
    assert len(d) == 16000 and (np.bincount(d.labels) == 2000).all()
    assert os.path.basename(d.columns["path"][-1]) == "sadness_01999.jpg"


def test_spellings_of_one_scene_or_object(folder):
    "One name each, the commonest spelling; what is given twice is refused."
    with pytest.warns(UserWarning) as said:
        d = EmotionTable(
            table(
                folder,
                label=["awe", "awe", "fear"],
                scene=["living-room", "Living Room", "Living Room"],
                objects=["Cat; cat", "cat", "cup"],
            )
        )
    assert [str(w.message).split(" are one: ")[1] for w in said] == [
        "'Living Room' = 'living-room'",
        "'cat' = 'Cat'",
    ]
    assert (
        d.scene_names == ("Living Room",)
        and d.object_names == ("cat", "cup")
        and [d[i]["scene"] for i in range(3)] == [0, 0, 0]
        and [d[i]["objects"].tolist() for i in range(3)] == [[1, 0], [1, 0], [0, 1]]
    )
    assert d.annotation(0) == dict(scene="Living Room", object=["cat"])
    with pytest.raises(
        DataError, match="t.csv: scene_names has 'A_b' and 'a b', which are the same name"
    ):
        EmotionTable(
            table(folder, label=["awe", "awe", "fear"], scene=["a b", None, None]),
            scene_names=("a b", "A_b"),
        )


def test_what_looks_misspelt_is_named(folder, tmp_path):
    with pytest.warns(UserWarning) as said:
        d = EmotionTable(table(folder, label=["awe", "amusemnt", "fear"], scenes=["a", "b", "c"]))
    said = " ".join(str(w.message) for w in said)
    assert (
        len(d.emotions) == 3
        and "'amusemnt' is much like 'amusement'" in said
        and "column 'scenes' is not read, did you mean 'scene'?" in said
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EmotionTable(table(folder, label=["calm", "joy", "rage"], source=["x", "y", "z"]))
        EmotionTable(table(folder, label=["class1", "class2", "class10"]))
        d = EmotionTable(
            table(
                folder,
                Label=["awe", "awe", "fear"],
                Scene=["a", "b", "c"],
                Split=["Train", "Dev", "TEST"],
            )
        )  # columns and splits in any case
        assert d.scene_names == ("a", "b", "c") and {
            k: len(v) for k, v in three_splits(folder / "t.csv").items()
        } == dict(train=1, val=1, test=1)
    for text, says in (
        ("path;label\na.jpg;joy\n", "part columns by commas"),
        ("path,emotoin\na.jpg,joy\n", "'label' or 'emotion'.*columns in it: path, emotoin"),
        ("path,label\n", "bad.csv: no image"),
    ):
        (folder / "bad.csv").write_text(text)
        with pytest.raises(DataError, match=says):
            EmotionTable(folder / "bad.csv")
    (folder / "bad.csv").write_text(f"path,label\n{folder.absolute()}/train/calm/0.jpg,joy\n")
    with pytest.raises(DataError, match="Write train/calm/0.jpg: paths start at"):
        EmotionTable(folder / "bad.csv")


def test_splits_by_their_usual_names(emoset, folder, tmp_path):
    photos = sorted((emoset / "image").rglob("*.jpg"))
    for k, (split, emotion) in enumerate(
        (s, e) for s in ("Training", "dev", "testing") for e in ("Awe", "fear")
    ):
        (tmp_path / "mine" / split / emotion).mkdir(parents=True)
        shutil.copy(photos[k], tmp_path / "mine" / split / emotion / "a.jpg")
    (tmp_path / "mine/dev/fear/Thumbs.db").write_bytes(b"x")
    found = three_splits(tmp_path / "mine")
    assert {k: (len(d), d.split) for k, d in found.items()} == dict(
        train=(2, "Training"), val=(2, "dev"), test=(2, "testing")
    )
    assert len(check(tmp_path / "mine", verbose=False)) == 0
    shutil.copytree(tmp_path / "mine/dev", tmp_path / "mine/val")
    with pytest.raises(DataError, match="'dev' and 'val' are both 'val'"):
        three_splits(tmp_path / "mine")
    (tmp_path / "mine/val").rename(tmp_path / "mine/more")
    with pytest.warns(UserWarning, match="splits 'more' are not read"):
        three_splits(tmp_path / "mine")
    with pytest.raises(DataError, match="no data found. Images lie in root/emotion"):
        three_splits(tmp_path / "mine/dev/fear")
    table(folder, label=["awe", "awe", "fear"], split=[None] * 3)
    with pytest.raises(DataError, match="no data found"):
        three_splits(folder / "t.csv")


def test_an_image_in_two_splits_stays_in_one(emoset):
    "Left out where skipped: the test set is what stays."
    a, b = emoset / "image/fear/fear_train0.jpg", emoset / "image/fear/fear_test0.jpg"
    a.write_bytes(b.read_bytes())
    with pytest.warns(UserWarning, match="1 entry is skipped"):
        found = three_splits(emoset, on_error="skip", progress=False)
    assert {k: (len(d), len(d.skipped)) for k, d in found.items()} == dict(
        train=(15, 1), val=(8, 0), test=(8, 0)
    ) and "same image in two splits" in found["train"].skipped.problem[0]
    whole = {k: EmoSet(emoset, k) for k in ("train", "test")}
    assert [
        tuple(Path(p).name for p in pair) for pair in same_images(whole["train"], whole["test"])
    ] == [(a.name, b.name)] and not same_images(found["train"], found["test"])


# ---- data as people have them


@pytest.fixture
def mikels(tmp_path, photos):
    "A folder for each of Mikels' eight, with one image."
    root = tmp_path / "mikels"
    for k, emotion in enumerate(MIKELS):
        (root / emotion).mkdir(parents=True)
        photos["coffee"].resize((40 + k, 30)).save(root / emotion / "0.jpg")
    return root


def test_what_a_mac_leaves_in_a_zip_is_passed_over(mikels):
    for place in (mikels, mikels / "awe"):
        (place / "__MACOSX/awe").mkdir(parents=True)
        (place / "__MACOSX/awe/._0.jpg").write_bytes(b"\0\5\x16\7")
        (place / "._0.jpg").write_bytes(b"\0")
    data = load_data(mikels)
    assert data.emotions is MIKELS and len(data) == 8 and data.ignored == []
    assert len(check(mikels, verbose=False)) == 0
    (mikels.parent / "set").mkdir()
    mikels.rename(mikels.parent / "set/train")
    shutil.copytree(mikels.parent / "set/train/__MACOSX", mikels.parent / "set/__MACOSX")
    data = load_data(mikels.parent / "set", "train")
    assert data.emotions is MIKELS and EmotionFolder.splits(data.root) == ["train"]


def test_one_folder_more_than_it_should_be(mikels, emoset):
    (mikels.parent / "zip/Photos").mkdir(parents=True)
    mikels.rename(mikels.parent / "zip/Photos/FI")
    shutil.copytree(mikels.parent / "zip/Photos/FI/awe", mikels.parent / "zip/Photos/__MACOSX")
    assert load_data(mikels.parent / "zip").emotions is MIKELS
    assert len(training_images(mikels.parent / "zip")) == 8
    (emoset.parent / "outer").mkdir()
    emoset.rename(emoset.parent / "outer/EmoSet-118K")
    assert len(load_data(emoset.parent / "outer", "train")) == 16
    assert len(check(emoset.parent / "outer", verbose=False)) == 0


def test_every_usual_ending_is_read_and_others_are_counted(mikels, photos):
    small = photos["rocket"].resize((20, 20))
    kinds = dict(jfif="jpeg", jpe="jpeg", bmp="bmp", tif="tiff", gif="gif", avif="avif")
    for ending, written in kinds.items():
        small.rotate(len(ending)).save(mikels / f"joyful.{ending}", written)
        (mikels / f"joyful.{ending}").rename(mikels / f"awe/{ending}.{ending.upper()}")
    for name in ("a.heic", "b.HEIC", "c.txt"):
        (mikels / "fear" / name).write_text(name)
    with pytest.warns(UserWarning, match="3 files are no images.*2 .heic, 1 .txt"):
        data = load_data(mikels, transform=eval_transform(16))
    assert len([data[i] for i in range(len(data))]) == 8 + len(kinds)
    assert len(check(mikels, verbose=False)) == 3


def test_votes_in_any_spelling_are_read(folder):
    spelt = {f" {n.capitalize()}": v for n, v in VOTES.items()}
    data = EmotionTable(table(folder, label=["fear", "fear", "awe"], **spelt))
    assert data.columns["votes"].shape == (3, 8)
    with pytest.warns(UserWarning, match="column 'amusemnt' is not read, did you mean 'amusement'"):
        EmotionTable(table(folder, label=["fear", "fear", "awe"], amusemnt=[1, 2, 3]))
    with pytest.warns(UserWarning, match="column 'fear' is not read, though it is called like an"):
        EmotionTable(table(folder, label=["calm", "joy", "joy"], fear=[1, 2, 3]))


@pytest.mark.parametrize("as_bytes", [False, True])
def test_images_inside_parquet(folder, as_bytes):
    paths = [folder / "train/calm" / f for f in ("0.jpg", "1.PNG", "2.webp")]
    cells = [p.read_bytes() if as_bytes else dict(bytes=p.read_bytes(), path="x") for p in paths]
    file, own = folder / "t.parquet", dict(transform=eval_transform(16))
    pd.DataFrame(dict(image=cells, label=["calm", "joy", "joy"])).to_parquet(file)
    data = EmotionTable(file, **own)
    plain = EmotionTable(table(folder, label=["calm", "joy", "joy"]), **own)
    pd.DataFrame(dict(image=cells, label=["calm", "joy", "joy"])).to_parquet(file)
    assert all(torch.equal(data[i]["pixel_values"], plain[i]["pixel_values"]) for i in range(3))
    assert data.image(1).mode == "RGB" and len(check(file, verbose=False)) == 0
    assert [Path(a).name for a, _ in same_images(data, plain)] == ["row-2", "row-3", "row-4"]
    cells[1] = b"<html>" if as_bytes else dict(bytes=b"<html>", path="x")
    pd.DataFrame(dict(image=cells, label=["calm", "joy", "joy"])).to_parquet(file)
    found = check(file, verbose=False)
    assert found.path.tolist() == ["t.parquet/row-3"] and "a web page" in found.problem[0]
    with pytest.raises(DataError, match="t.parquet/row-3: cannot be decoded: it is a web page"):
        EmotionTable(file, **own)[1]
    assert len(EmotionTable(file, on_error="skip", progress=False, **own)) == 2


def test_the_older_label_file(emoset):
    info = json.loads((emoset / "info.json").read_text())
    (emoset / "info.json").write_text(json.dumps(info["emotion"]))
    data = EmoSet(emoset)
    assert data.emotions is MIKELS and data.scene_names == ("castle",)
    assert data.object_names == ("alarm_clock", "castle") and data[0]["scene"] == 0
    assert EmoSet(emoset, "test").scene_names == data.scene_names
    assert len(check(emoset, verbose=False)) == 0


def test_cells_are_read_as_they_stand(folder):
    words = ["None", "NA", "nan"]
    data = EmotionTable(table(folder, label=words, scene=words, valence=["NA", "0.5", "nan"]))
    assert data.emotions.names == ("NA", "None", "nan") and data.scene_names == (
        "NA",
        "None",
        "nan",
    )
    assert np.isnan(data.columns["valence"][[0, 2]]).all() and data.columns["valence"][1] == 0.5


def test_paths_as_other_systems_write_them(folder, photos):
    photos["coffee"].resize((32, 20)).save(folder / "train/cafe\u0301.jpg")
    photos["coffee"].resize((33, 20)).save(folder / "odd\\name.jpg")
    paths = ["train\\calm\\0.jpg", " train/calm/1.PNG ", "train/caf\xe9.jpg", "odd\\name.jpg"]
    pd.DataFrame(dict(path=paths, label="calm")).to_csv(folder / "t.csv", index=False)
    data = EmotionTable(folder / "t.csv", transform=eval_transform(16))
    assert len([data[i] for i in range(4)]) == 4 and len(check(data._file, verbose=False)) == 0
    pd.DataFrame(dict(path=["train\\calm\\0.jpg", "./train/calm/0.jpg"], label="calm")).to_csv(
        folder / "t.csv", index=False
    )
    assert check(folder / "t.csv", verbose=False).problem.tolist() == ["duplicated entry"]


def test_an_index_of_windows(emoset):
    for split in ("train", "val", "test"):
        entries = json.loads((emoset / f"{split}.json").read_text())
        entries = [[e, *(p.replace("/", "\\") for p in rest)] for e, *rest in entries]
        (emoset / f"{split}.json").write_text(json.dumps(entries))
    assert len(check(emoset, verbose=False)) == 0 and EmoSet(emoset)[0]["scene"] == 1


@pytest.mark.parametrize("mark", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_error(emoset, folder, mark):
    for file in (*emoset.glob("*.json"), *emoset.glob("annotation/*/*.json")):
        file.write_bytes(file.read_text(encoding="utf-8").encode(mark))
    assert len(check(emoset, verbose=False)) == 0
    file = table(folder, label=["Ärger", "Ärger", "joy"])
    file.write_bytes(file.read_text(encoding="utf-8").encode(mark))
    assert EmotionTable(file).emotions.names == ("joy", "Ärger")


NAMES = ("../../outside", "a/b", "a\\b", "tab\tbed", "..", "/etc", "nul\x01")


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_paths_are_refused(folder, emoset, name):
    with pytest.raises(DataError, match="t.csv: the emotion.*Give it another name"):
        EmotionTable(table(folder, label=["joy", "joy", name]))
    assert "the emotion" in check(folder / "t.csv", verbose=False).problem[0]
    info = json.loads((emoset / "info.json").read_text())
    for kind in ("emotion", "scene", "object"):
        harmed = json.loads(json.dumps(info))
        harmed[kind]["label2idx"] = {name: 0}
        (emoset / "info.json").write_text(json.dumps(harmed))
        if kind != "emotion" and name == "a/b":
            continue
        with pytest.raises(DataError, match=f"the {kind}.*Give it another name"):
            EmoSet(emoset)


def test_a_scene_of_emoset_holds_a_slash(folder):
    data = EmotionTable(table(folder, label=["joy"] * 3, scene=["bakery/shop"] * 3))
    assert data.scene_names == ("bakery/shop",)


def test_what_is_no_regular_file_does_not_hang(emoset, folder):
    image, note = EmoSet(emoset).columns["path"][0], EmoSet(emoset).columns["annotation"][0]
    for path in (image, note):
        (emoset / path).unlink()
        os.mkfifo(emoset / path)
    found = check(emoset, verbose=False)
    assert len(found) == 2 and found.problem.str.contains("cannot be read: it is a pipe").all()
    os.mkfifo(folder / "train/joy/pipe.jpg")
    assert len(check(folder, verbose=False)) == 1
    with pytest.raises(DataError, match="it is a pipe"):
        EmotionFolder(folder, "train")[8]
    for name in ("pipe.csv", "pipe.parquet"):
        os.mkfifo(folder / name)
        with pytest.raises(DataError, match=f"{name}: cannot be read: it is a pipe"):
            load_data(folder / name)
    (emoset / "info.json").unlink()
    os.mkfifo(emoset / "info.json")
    with pytest.raises(DataError, match="info.json: cannot be read: it is a pipe"):
        EmoSet(emoset)


def test_a_size_limit_comes_before_the_work(tmp_path):
    from uniemo.data.reading import read_json

    with open(tmp_path / "train.json", "wb") as file:
        file.truncate(2**31)
    with pytest.raises(DataError, match="train.json: too large: 2,147,483,648 bytes"):
        read_json(tmp_path / "train.json", "")


def test_odd_exif_costs_no_photograph(tmp_path, photos):
    photo = photos["coffee"].resize((60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    good = exif.tobytes()
    rng = np.random.default_rng(0)
    odd = [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", good[:-3]]
    odd += [bytes(b if rng.random() > 0.2 else rng.integers(256) for b in good) for _ in range(40)]
    for k, data in enumerate(odd):
        data = b"Exif\0\0" + data[6:]
        photo.save(tmp_path / "a.jpg", exif=data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert sorted(read_image(tmp_path / "a.jpg").size) == [40, 60], (k, data)
    for value in (0, 9, 300):
        exif[0x0112] = value
        photo.save(tmp_path / "a.jpg", exif=exif)
        assert read_image(tmp_path / "a.jpg").size == (60, 40)


CONTENTS = {
    "a web page": b"\n<!DOCTYPE HTML><html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a HEIC photograph": b"\0\0\0\x24ftypheic\0\0\0\0mif1",
    "a safetensors file": b"\x40\0\0\0\0\0\0\0" + b'{"weight":{"dtype":"F32"}}',
    "a video": b"\0\0\0\x18ftypmp42\0\0\0\0",
    "an empty file": b"",
    "nothing but zeros": b"\0" * 999,
}


@pytest.mark.parametrize("content", CONTENTS)
def test_what_a_file_really_is(tmp_path, emoset, content):
    (tmp_path / "a.jpg").write_bytes(CONTENTS[content])
    with pytest.raises(DataError, match=f"a.jpg: cannot be decoded: it is {content}") as e:
        read_image(tmp_path / "a.jpg")
    if content in ("a HEIC photograph", "a Git LFS pointer"):
        assert "again" not in e.value.remedy
    (emoset / "info.json").write_bytes(CONTENTS[content])
    with pytest.raises(DataError, match=f"info.json: no JSON: it is {content}"):
        EmoSet(emoset)


def test_a_set_that_is_nearly_a_known_one_is_named(mikels, emoset, photos):
    shutil.copytree(mikels / "awe", mikels / "neutral")
    with pytest.warns(UserWarning, match="not read as Mikels' eight.*beside them: neutral"):
        EmotionFolder(mikels)
    shutil.rmtree(mikels / "neutral")
    shutil.rmtree(mikels / "awe")
    with pytest.warns(UserWarning, match="not read as Mikels' eight.*lacking: awe"):
        EmotionFolder(mikels)
    for name in ("dataset_info.json", "dataset_dict.json"):
        (emoset.parent / name).mkdir()
        (emoset.parent / name / name).write_text("{}")
        found = check(emoset.parent / name, verbose=False)
        assert len(found) == 1
        assert "cannot be opened" in found.problem[0] or "no data found" in found.problem[0]
    (emoset.parent / "shards/data").mkdir(parents=True)
    (emoset.parent / "shards/data/train-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be opened"):
        load_data(emoset.parent / "shards", "train")


# ---- tensors in memory


def tensors(n=4):
    return dict(
        pixel_values=torch.zeros(n, 3, 8, 8),
        label=torch.arange(n) % 8,
        scene=torch.full((n,), -1),
        objects=torch.zeros(n, 2),
        votes=torch.full((n, 8), 0.125),
    )


FAULTY = dict(
    label=(8, "label is 8. Numbers are from 0 to 7"),
    scene=(2, "scene is 2. Numbers are from -1 to 1"),
    objects=(float("nan"), "objects is"),
    votes=(0.0, "votes: all are zero"),
    pixel_values=(float("nan"), "pixel_values are not finite"),
)


@pytest.mark.parametrize("name", FAULTY)
def test_tensors_in_memory_name_the_image(name):
    value, said = FAULTY[name]
    bad = tensors()
    bad[name][2] = value
    names = dict(scene=["beach", "park"], object=["dog", "cat"])
    EmotionSplits(dict(train=tensors(), val=tensors()), names, MIKELS)
    with pytest.raises(DataError, match=f"split 'val', image 2: {said}"):
        EmotionSplits(dict(train=tensors(), val=bad), names, MIKELS)
    with pytest.raises(DataError, match="split 'val': no image in it"):
        EmotionSplits(dict(train=tensors(), val=tensors(0)), names, MIKELS)
