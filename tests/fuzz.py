"""Files as they should not be: each is read right, or refused in one clear error.

A kind is a function of a random generator and a folder, which writes a case into the folder and
gives `(read, verdict)`: `read()` reads it and asserts that what was read is usable; `verdict` says
whether it must be refused (True), must be read (False) or may be either (None).
"""

import json
import os
import random
import shutil
import signal
import tempfile
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from uniemo.data.batches import check_tensors
from uniemo.data.checking import check, load_data
from uniemo.data.images import read_image
from uniemo.data.reading import DataError
from uniemo.data.transforms import eval_transform
from uniemo.emotions import MIKELS

KINDS = {}
SECONDS = 20


def kind(function):
    "Register a kind under its name."
    KINDS[function.__name__] = function
    return function


# ---- running


def cases(seed: int, n: int):
    "`n` pairs (kind, seed of the case): all kinds in turn."
    rng = random.Random(seed)
    names = sorted(KINDS)
    for k in range(n):
        yield names[k % len(names)], rng.randrange(2**32)


@contextmanager
def time_limit(seconds: int):
    "A `TimeoutError` for what takes longer, where the system has alarms."

    def stop(*_):
        raise TimeoutError(f"still reading after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fault_of(error: Exception, folder: Path) -> str | None:
    "What is not clear about an error, or None."
    if isinstance(error, DataError):
        return None if error.path and error.problem and error.remedy else "parts are missing"
    # a missing file in our words, not in the system's ("[Errno 2] ...")
    missing = isinstance(error, FileNotFoundError) and error.errno is None
    raw = isinstance(error, UnicodeError | json.JSONDecodeError)
    if raw or not (missing or isinstance(error, ValueError)):
        return "obscure"
    names = [p.name for p in folder.rglob("*")] + [str(folder)]
    if not any(name in str(error) for name in names):
        return "names no file"
    return None if len(str(error).split()) > 5 else "says too little"


def run_case(name: str, seed: int) -> str:
    "'read' or 'refused'; an `AssertionError` says what is wrong with the case."
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    try:
        with warnings.catch_warnings(), time_limit(SECONDS):
            warnings.simplefilter("ignore")
            read, verdict = KINDS[name](random.Random(seed), folder)
            try:
                read()
            except (AssertionError, TimeoutError):
                raise
            except Exception as error:
                fault = fault_of(error, folder)
                said = f"{type(error).__name__}: {error}"
                assert fault is None, f"{name} {seed}: {fault}: {said}"
                assert verdict is not False, f"{name} {seed}: refused, though it is good: {said}"
                return "refused"
        assert verdict is not True, f"{name} {seed}: read, though it is broken"
        return "read"
    except TimeoutError as error:
        raise AssertionError(f"{name} {seed}: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---- what files are made of

JUNK = (
    *(None, True, -1, 0, 3, 1e308, float("nan"), "", " ", "\0", "../../x", "a/b", "C:\\x", "\n"),
    *("NA", "None", "x" * 400, [], {}, [[[]]], {"a": 1}, ["awe"], "awe", "AWE ", "é", "\ud7ff"),
)
FOREIGN = (
    b"",
    b"\0" * 4000,
    b"<!DOCTYPE html><html><body>404</body></html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\1" * 500,
    b"\x10\0\0\0\0\0\0\0" + b'{"a":[1,2,3,4]} ',
    b"PK\x03\x04" + b"\0" * 60,
    b"\x80\x04\x95" + b"a" * 60,
    b'{"scene": "beach"}',
)


def picture(seed: int, size=(40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    "Some bytes flipped, a part gone, doubled or zeroed."
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        if not data:
            break
        at = rng.randrange(len(data))
        length = rng.choice((1, 4, 64, 1000))
        how = rng.randrange(5)
        if how == 0:
            data[at] = rng.randrange(256)
        elif how == 1:
            del data[at : at + length]
        elif how == 2:
            data[at:at] = data[at : at + length]
        elif how == 3:
            data[at : at + length] = bytes(len(data[at : at + length]))
        else:
            data[at:at] = rng.randbytes(min(length, 16))
    return bytes(data)


def mutate_json(rng: random.Random, value, depth=0):
    "One place of a JSON value exchanged, taken out or doubled."
    if isinstance(value, dict | list) and value and (depth == 0 or rng.random() < 0.8):
        key = rng.choice(sorted(value) if isinstance(value, dict) else range(len(value)))
        if rng.random() < 0.15:
            del value[key]
        elif rng.random() < 0.1 and isinstance(value, list):
            value.append(value[key])
        else:
            value[key] = mutate_json(rng, value[key], depth + 1)
        return value
    return rng.choice(JUNK)


def read_all(root, split=None, **kwargs):
    "Open a data set and read all of its items; each must be usable."
    data = load_data(root, split, transform=eval_transform(16), **kwargs)
    for i in range(len(data)):
        item = data[i]
        assert item["pixel_values"].shape == (3, 16, 16)
        assert torch.isfinite(item["pixel_values"]).all()
        assert 0 <= item["label"] < len(data.emotions)
        assert -1 <= item["scene"] < max(1, len(data.scene_names))
        assert item["objects"].shape == (len(data.object_names),)
        if "votes" in item:
            assert abs(float(item["votes"].sum()) - 1) < 1e-3 and item["votes"].min() >= 0
    return data


def both_ways(root, split=None):
    "`check` finds something where reading fails, and skipping leaves a set that can be read."
    found = check(root, verbose=False)
    try:
        read_all(root, split)
    except DataError as error:
        # what is asked for and is not there is no fault of what is there
        gone = Path(error.path).name == f"{split}.json" and error.problem == "no such file"
        assert len(found) or gone, f"check found nothing, reading says: {error}"
        assert found.remedy.str.len().gt(0).all()
        with suppress(DataError):
            read_all(root, split, on_error="skip", progress=False)
        raise error


# ---- images


@kind
def image_files(rng, folder):
    ending = rng.choice(("jpg", "png", "gif", "webp", "tif", "bmp", "avif", "pgm", "jfif"))
    path = folder / f"a.{ending}"
    made = picture(rng.randrange(99), (rng.randrange(1, 60), rng.randrange(1, 60)))
    if ending in ("png", "tif"):
        made = made.convert(rng.choice(("RGB", "L", "RGBA", "P", "1", "LA")))
    made.save(path, {"pgm": "ppm", "jfif": "jpeg", "tif": "tiff"}.get(ending))
    whole = path.read_bytes()
    how, verdict = rng.choice(("whole", "foreign", "cut", "mutated", "mutated", "mutated")), None
    if how == "foreign":
        path.write_bytes(rng.choice(FOREIGN))
        verdict = True
    elif how == "cut":
        path.write_bytes(whole[: rng.randrange(len(whole))])
    elif how == "mutated":
        path.write_bytes(mutate_bytes(rng, whole))
    else:
        verdict = False

    def read():
        image = read_image(path, rng.choice((1, 2, 8)))
        assert image.mode == "RGB" and min(image.size) > 0

    return read, verdict


@kind
def exif(rng, folder):
    path = folder / "a.jpg"
    data = Image.Exif()
    data[0x0112] = rng.choice((0, 1, 3, 6, 8, 9, 77))
    data[0x010E] = "x" * rng.randrange(200)
    raw = bytearray(data.tobytes())
    for _ in range(rng.randrange(12)):
        raw[rng.randrange(6, len(raw))] = rng.randrange(256)
    picture(1, (40, 30)).save(path, exif=bytes(raw))

    def read():
        assert sorted(read_image(path).size) == [30, 40]

    return read, False


@kind
def special_files(rng, folder):
    path = folder / "a.jpg"
    how = rng.choice(("pipe", "folder", "loop", "gone", "device"))
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "loop":
        path.symlink_to(path)
    elif how == "device":
        path.symlink_to("/dev/zero")
    ways = (
        lambda: read_image(path),
        lambda: load_data(path.rename(folder / "a.csv") if how != "gone" else path),
    )
    return rng.choice(ways), True


# ---- data sets


def small_emoset(folder, count=3):
    "A set in EmoSet's format with `count` images in train, one in test."
    tables = dict(emotion=MIKELS.names, scene=("beach", "bakery/shop"), object=("Dog", "Tea cup"))
    info = {k: dict(label2idx={n: i for i, n in enumerate(v)}) for k, v in tables.items()}
    files, names = {"info.json": info}, list(MIKELS)
    for split, number in (("train", count), ("test", 1)):
        index = []
        for k in range(number):
            emotion = names[(k + (split == "test") * 5) % 8]
            image, note = f"image/{emotion}/{split}{k}.jpg", f"annotation/{emotion}/{split}{k}.json"
            (folder / image).parent.mkdir(parents=True, exist_ok=True)
            picture(k + 50 * (split == "test")).save(folder / image)
            files[note] = dict(scene="beach", object=["dog"], brightness=0.5, emotion=emotion)
            index.append([emotion, image, note])
        files[f"{split}.json"] = index
    return files


def write_all(folder, files):
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value), encoding="utf-8")


@kind
def emoset_json(rng, folder):
    files = small_emoset(folder)
    name = rng.choice(sorted(files))
    files[name] = mutate_json(rng, files[name])
    write_all(folder, files)
    return lambda: both_ways(folder, "train"), None


@kind
def emoset_bytes(rng, folder):
    write_all(folder, small_emoset(folder))
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    path = rng.choice(files)
    how = rng.choice(("mutate", "foreign", "gone", "deep", "mark", "pipe"))
    if how == "mutate":
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    elif how == "foreign":
        path.write_bytes(rng.choice(FOREIGN))
    elif how == "deep":
        path.write_text("[" * 10**5)
    elif how == "mark" and path.suffix == ".json":
        path.write_bytes(path.read_text().encode(rng.choice(("utf-8-sig", "utf-16"))))
        return lambda: both_ways(folder, "train"), False
    elif how in ("gone", "pipe"):
        path.unlink()
        if how == "pipe":
            os.mkfifo(path)
    return lambda: both_ways(folder, "train"), None


@kind
def tables(rng, folder):
    for k in range(4):
        picture(k).save(folder / f"{k}.png")
    columns = dict(
        path=[f"{k}.png" for k in range(4)],
        label=[rng.choice(MIKELS.names) for _ in range(4)],
        scene=["beach", None, "park", "beach"],
        objects=["Dog; Ball", None, '["Dog"]', "Tea cup"],
        valence=[0.5, None, -1, 2],
        split=["train", "train", "test", "train"],
    )
    if rng.random() < 0.4:
        for k, name in enumerate(MIKELS):
            columns[name if rng.random() < 0.9 else name.upper()] = [k + j for j in range(4)]
    for _ in range(rng.randrange(4)):
        column = rng.choice(sorted(columns))
        how = rng.random()
        if how < 0.7:
            columns[column][rng.randrange(4)] = rng.choice(JUNK)
        elif how < 0.85:
            columns.pop(column)
        else:
            columns[str(rng.choice(JUNK))] = columns.pop(column)
    table = pd.DataFrame(columns, dtype=object)
    file = folder / "t.csv"
    text = table.to_csv(index=False, sep=rng.choice((",", ",", ",", ";", "\t")))
    data = text.encode(rng.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16")))
    if rng.random() < 0.3:
        data = mutate_bytes(rng, data)
    elif rng.random() < 0.05:
        data = rng.choice(FOREIGN)
    file.write_bytes(data)
    return lambda: both_ways(file), None


@kind
def parquet_tables(rng, folder):
    cells, labels = [], [rng.choice(MIKELS.names) for _ in range(3)]
    for k in range(3):
        picture(k).save(folder / f"{k}.png")
        data = (folder / f"{k}.png").read_bytes()
        if rng.random() < 0.3:
            data = rng.choice((mutate_bytes(rng, data), rng.choice(FOREIGN), None))
        cells.append(dict(bytes=data, path=rng.choice((f"{k}.png", "../x", None))))
    if rng.random() < 0.3:
        cells = [cell["bytes"] for cell in cells]
    if rng.random() < 0.2:
        labels = rng.choice(
            ([1, 2, 3], [0.5, 1, 2], [None] * 3, [["awe"]] * 3, [True, False, True])
        )
    file = folder / "t.parquet"
    pd.DataFrame(dict(image=cells, label=labels)).to_parquet(file)
    if rng.random() < 0.3:
        file.write_bytes(mutate_bytes(rng, file.read_bytes()))
    return lambda: both_ways(file), None


def stray_mac(odd, rng):
    "What a Mac leaves in a zip file."
    (odd.parent / "__MACOSX").mkdir(exist_ok=True)
    (odd.parent / "__MACOSX/._0.jpg").write_bytes(b"\0\5\x16\7")


# what may lie among the emotions' folders
STRAY = (
    stray_mac,
    lambda odd, rng: odd.write_text("x"),
    lambda odd, rng: odd.write_bytes(rng.choice(FOREIGN)),
    lambda odd, rng: os.mkfifo(odd),
    lambda odd, rng: odd.symlink_to(rng.choice(("/etc/passwd", "gone", odd.parent))),
    lambda odd, rng: (odd.parent / ".thumbnails").mkdir(exist_ok=True),
    lambda odd, rng: (odd.parent / f"empty{rng.randrange(9)}").mkdir(exist_ok=True),
    lambda odd, rng: picture(77).save(odd.parent / "stray.png"),
)


@kind
def folders(rng, folder):
    names = rng.choice((MIKELS.names, ("calm", "joy"), ("a" * 190, "é", "x y"), ("..a", "b")))
    levels = rng.choice(("", "train/", "train/", "Photos/", "Photos/train/", "a/b/"))
    for k, name in enumerate(names):
        (folder / f"{levels}{name}").mkdir(parents=True)
        for j in range(rng.randrange(1, 3)):
            ending = rng.choice(("jpg", "PNG", "webp", "jfif", "bmp"))
            written = "jpeg" if ending == "jfif" else ending.lower().replace("jpg", "jpeg")
            picture(9 * k + j).save(folder / f"{levels}{name}/{j}.{ending}", written)
    places = sorted(p for p in folder.rglob("*") if p.is_dir()) + [folder]
    for _ in range(rng.randrange(4)):
        place = rng.choice(places)
        odd = place / f"odd{rng.randrange(99)}{rng.choice(('.jpg', '.txt', '', '.heic'))}"
        if place.exists() and not odd.exists():
            rng.choice(STRAY)(odd, rng)

    def read():
        found = check(folder, verbose=False)
        split = "train" if (folder / "train").is_dir() or "/train" in levels else None
        try:
            read_all(folder, split)
        except DataError as error:
            assert len(found) or "split" in error.problem, f"check found nothing: {error}"
            raise

    return read, None


@kind
def tensors_in_memory(rng, folder):
    n = rng.randrange(1, 6)
    good = dict(
        pixel_values=torch.zeros(n, 3, 4, 4),
        label=torch.zeros(n, dtype=torch.int64),
        scene=torch.zeros(n, dtype=torch.int64) - 1,
        objects=torch.zeros(n, 2),
        votes=torch.full((n, 8), 0.125),
    )
    key, row = rng.choice(sorted(good)), rng.randrange(n)
    bad = dict(
        pixel_values=rng.choice((float("nan"), float("inf"))),
        label=rng.choice((-1, 8, 10**9)),
        scene=rng.choice((-2, 3)),
        objects=rng.choice((float("nan"), 2.0, -0.1)),
        votes=rng.choice((float("nan"), 0.0, -1.0)),
    )
    broken = rng.random() < 0.8
    if broken:
        good[key][row] = bad[key]
    where = f"{folder}, split 'val'"
    return lambda: check_tensors(good, where, 8, 3, 2), broken
