"""Files of others: what they hold is read, what they would run is not."""

import argparse
import os
import pickle
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from uniemo.files.emogen import load_emogen
from uniemo.files.pickles import RefusedFile, count_items, read_pickle, read_torch
from uniemo.files.uniemo import load_uniemo

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
golden = pytest.mark.skipif(
    not (SHARED / "golden/a_official").exists(), reason=f"no golden files at {SHARED / 'golden'}"
)
real = pytest.mark.skipif(
    not (SHARED / "real/emogen").exists(), reason=f"no real files at {SHARED / 'real'}"
)


class Calls:
    "Pickles as a call of `f(*args)`."

    def __init__(self, f, *args):
        self.f, self.args = f, args

    def __reduce__(self):
        return self.f, self.args


class Own:
    pass


ATTACKS = [
    (os.system, "system"),
    (eval, "eval"),
    (exec, "exec"),
    (getattr, "getattr"),
    (os.remove, "remove"),
    (Path, "Path"),
    (np.load, "load"),
    (np.fromfile, "fromfile"),
    (__import__, "__import__"),
]


@pytest.mark.parametrize("f,name", ATTACKS)
@pytest.mark.parametrize("kind", ["pickle", "torch", "old torch"])
def test_nothing_is_run(f, name, kind, tmp_path):
    path, mark = tmp_path / "file", tmp_path / "ran"
    arg = {
        "system": f"touch {mark}",
        "eval": f"open({str(mark)!r}, 'w')",
        "exec": f"open({str(mark)!r}, 'w')",
    }.get(name, str(mark))
    content = {"model": {"w": torch.ones(2)} if kind != "pickle" else {}, "x": [Calls(f, arg)]}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(RefusedFile, match=name) as e:
        (read_pickle if kind == "pickle" else read_torch)(path)
    assert not mark.exists() and str(path) in str(e.value)


def test_own_classes_and_functions_are_refused(tmp_path):
    path = tmp_path / "file.pth"
    for thing, name in (
        (Own(), "Own"),
        (torch.nn.Linear(2, 2), "Linear"),
        (Path("x"), "Path"),
        (np.ones(2), "numpy"),
    ):
        torch.save(dict(x=thing), path)
        with pytest.raises(RefusedFile, match=name):
            read_torch(path)
    torch.save(dict(x=argparse.Namespace(a=Own())), path)
    with pytest.raises(RefusedFile, match="Own"):
        read_torch(path)
    torch.save(dict(x=argparse.Namespace(a=1)), path)
    assert read_torch(path)["x"].a == 1


def test_broken_files(tmp_path):
    path = tmp_path / "file.pth"
    torch.save(dict(w=torch.ones(1000)), path)
    whole = path.read_bytes()
    for data in (b"", b"hello", whole[: len(whole) // 2], b"\x80\x04."):
        path.write_bytes(data)
        with pytest.raises(RefusedFile, match="file.pth"):
            read_torch(path)
        with pytest.raises(RefusedFile, match="file.pth"):
            read_pickle(path)
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("a", "b")
    with pytest.raises(RefusedFile):
        read_torch(path)
    with pytest.raises(FileNotFoundError):
        read_torch(tmp_path / "none.pth")


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6.0).reshape(2, 3),
        np.arange(3, dtype=np.int8),
        np.array(["a", "bc"]),
        np.float64(3),
        np.asfortranarray(np.ones((2, 3))),
        np.array([{"a": 1}, None], dtype=object),
    ],
)
@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_both_numpys(array, protocol, tmp_path):
    path = tmp_path / "a.pkl"
    data = pickle.dumps(
        {"x": array, "y": [1, (2.5, None), {True}, frozenset(), "é", b"b", bytearray(b"c"), 1j]},
        protocol,
    )
    olds = (
        [data.replace(b"numpy._core", b"numpy.core")] if protocol < 4 else []
    )  # later protocols count bytes; EmoGen's real files are of protocol 4
    for d in (data, *olds):
        path.write_bytes(d)
        back = read_pickle(path)
        np.testing.assert_array_equal(back["x"], array)
        assert back["y"][1] == (2.5, None) and back["y"][6] == bytearray(b"c")


def test_an_object_array_hides_nothing(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(
        pickle.dumps(np.array([Calls(os.system, f"touch {tmp_path}/ran")], dtype=object))
    )
    with pytest.raises(RefusedFile, match="system"):
        read_pickle(path)
    assert not (tmp_path / "ran").exists()


class Dtype:
    "A dtype of objects whose flags say that it holds none."

    def __reduce__(self):
        return np.dtype, ("O", False, True), (3, "|", None, None, None, -1, -1, 0)


class State:
    "An array with any state."

    def __init__(self, *state):
        self.state = state

    def __reduce__(self):
        return np.array(0.0).__reduce__()[0], (np.ndarray, (0,), b"b"), self.state


def dtype_state(name, *state):
    return (
        b"\x80\x02cnumpy\ndtype\n"
        + pickle.dumps((name, False, True), 2)[2:-1]
        + b"R"
        + pickle.dumps(state, 2)[2:-1]
        + b"b."
    )


F8 = np.dtype("f8")
HOSTILE = dict(
    pointer=(
        Calls(np.ndarray, (1,), np.dtype("O"), bytearray(b"AAAAAAAA")),
        "a call of numpy.ndarray",
    ),
    flags=(State(1, (1,), Dtype(), False, b"AAAAAAAA"), "an array of object from bytes"),
    strides=(Calls(np.ndarray, (4,), F8, b"x" * 64, 0, (1 << 40,)), "a call of numpy.ndarray"),
    huge=(Calls(np.ndarray, (1 << 33,)), "a call of numpy.ndarray"),
    short=(State(1, (3,), F8, False, b"x" * 8), r"float64 of the shape \(3,\) from 8 bytes"),
    long=(State(1, (0,), F8, False, b"x" * 8), "from 8 bytes"),
    negative=(State(1, (-1,), F8, False, b""), r"the shape \(-1,\)"),
    product=(State(1, (2**32, 2**32), F8, False, b""), "from 0 bytes"),
    nothing=(State(1, (0, 2**39), F8, False, b""), "an array of nothing"),
    empty_text=(State(1, (2**39,), np.dtype("U0"), False, b""), "an array of nothing"),
    truth=(State(1, (1,), np.dtype("?"), False, b"\x07"), "truth values"),
    text=(State(1, (1,), np.dtype("U1"), False, b"\xff" * 4), "no whole pickle"),
    objects=(State(1, (2,), np.dtype("O"), False, [1]), "from 1 objects"),
    nested=(State(1, (1,), np.dtype("O"), False, [np.array([1, None])]), "inside each other"),
    fields=(np.zeros(1, [("a", "O")]), "dtype 'V8'"),
    date=(np.zeros(1, "M8[s]"), "dtype 'M8'"),
    subarray=(dtype_state("f8", 3, "<", (np.int8, (2,)), None, None, -1, -1, 0), "int8"),
    metadata=(dtype_state("f8", 4, "<", None, None, None, -1, -1, 0, {}), "f8' with the state"),
    no_state=(
        b"\x80\x02cnumpy\ndtype\n" + pickle.dumps(("f8", False, True), 2)[2:-1] + b"R.",
        "without its state",
    ),
    stub=(b"\x80\x02c_codecs\nencode\n}X\x01\x00\x00\x00aK\x01sb.", "a state for function"),
    itself=(
        b"\x80\x04cnumpy.core.multiarray\n_reconstruct\n"
        + b"(cnumpy\nndarray\nK\x00\x85C\x01btR\x94h\x00\x86.",
        "holds itself",
    ),
    deep=(b"\x80\x02}N" + b"\x85" * 1_000_000 + b"Ns.", "tuples more than 100 deep"),
    bytes=(Calls(bytearray, 1 << 40), "no whole pickle"),
    bytearray8=(b"\x80\x05\x96" + b"\xff" * 5 + b"\0\0\0.", "ends too early"),
)


def test_hostile_arrays_are_refused_and_nothing_dies(tmp_path):
    "In a process of its own: what is taken for an array here would end it."
    for name, (thing, _) in HOSTILE.items():
        (tmp_path / f"{name}.pkl").write_bytes(
            thing if isinstance(thing, bytes) else pickle.dumps(thing, 4)
        )
    code = f"""
from uniemo.files.pickles import read_pickle
for name in {list(HOSTILE)}:
    try: print(name, "LOADED", repr(read_pickle(f"{tmp_path}/{{name}}.pkl"))[:200], flush=True)
    except ValueError as e: print(name, type(e).__name__, str(e), flush=True)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stdout[-500:], done.stderr[-1000:])
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    for name, (_, what) in HOSTILE.items():
        assert (
            said[name].startswith("RefusedFile")
            and f"{name}.pkl" in said[name]
            and re.search(what, said[name])
        ), (name, said[name])


@pytest.mark.parametrize("protocol", range(6))
def test_layout_byte_order_and_sharing(protocol, tmp_path):
    path, a = tmp_path / "a.pkl", np.arange(24.0).reshape(2, 3, 4)
    things = [
        np.asfortranarray(a),
        a.transpose(1, 0, 2),
        a[:, ::2],
        a.astype(">f4"),
        a.astype("<i2"),
        np.array([[True, False]]),
        np.zeros((0, 3)),
        np.array(7.0),
        np.array(["é", "a\0b"]),
        np.array([b"x\0", b"yz"]),
        a.astype(complex),
        np.float32(3),
        np.str_("é"),
        np.str_(""),
        np.bytes_(b"a"),
        np.bool_(True),
        np.dtype(">f4"),
        np.array([[1, [2]], [None, a]], dtype=object),
        bytearray(b""),
        bytearray(b"\xff"),
        b"",
    ]
    path.write_bytes(pickle.dumps([things, a, a], protocol))
    back, b, c = read_pickle(path)
    for x, y in zip(things, back):
        if not isinstance(x, np.ndarray):
            assert type(x) is type(y) and x == y
            continue
        assert (
            x.dtype.newbyteorder("=") == y.dtype
            and x.shape == y.shape
            and y.flags.writeable
            and y.flags.owndata
            and x.flags.f_contiguous == y.flags.f_contiguous
        )
        if x.dtype.kind != "O":
            np.testing.assert_array_equal(x, y)
    assert b is c and back[17][0, 1] == [2] and back[17][1, 1] is b


@golden
def test_official_folder():
    files = load_uniemo(SHARED / "golden/a_official")
    assert (
        files.checkpoint.name == "VIT_query.pth"
        and files.encoder.config.image_mean == [0.5] * 3
        and load_uniemo(SHARED / "golden/a_official", "best.pth").encoder.config.image_mean
        == [0.485, 0.456, 0.406]
    )
    assert (
        files.encoder.config.num_queries == 4
        and files.encoder.split == (2, 4)
        and files.mapper[2].out_features
        == files.mapper_scene[2].out_features
        == files.mapper_object[2].out_features
        == 96
    )
    assert "visual.proj" in files.left_out and any("query_alpha" in k for k in files.left_out)


@golden
def test_official_encoder_saved_as_ours(tmp_path):
    files = load_uniemo(SHARED / "golden/a_official")
    files.encoder.save_pretrained(tmp_path)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(
            type(files.encoder).from_pretrained(tmp_path)(x).logits, files.encoder(x).logits
        )


@real
def test_real_emogen():
    e = load_emogen(SHARED / "real/emogen")
    assert all(
        abs(row.sum() - 1) < 1e-4 and len(row) == 8
        for t in e.coefficients.values()
        for row in t.values()
    ) and set(e.coefficients) == {"scene", "object"}
    assert (
        len(e.names) == 655
        and set(e.attributes["scene"]) == set(e.space)
        and len(e.space) == 8
        and all(len(v) == 768 for s in e.space.values() for v in s["class"])
    )
    assert e.classifier(torch.zeros(1, 768)).shape == (1, 8)


def nested(levels, kind=list):
    content = kind((0.0,))
    for _ in range(levels):
        content = kind((content, content))
    return content


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_small_pickle_does_not_grow(kind, tmp_path):
    "30 levels of shared lists in 221 bytes: whoever makes an array of it needs 2 GB."
    path = tmp_path / "attr_coefficient_emotion_scene.pkl"
    path.write_bytes(pickle.dumps({"castle": nested(30, kind)}))
    assert path.stat().st_size < 400
    for read in (lambda: read_pickle(path), lambda: load_emogen(tmp_path)):
        with pytest.raises(RefusedFile, match="far larger than the file"):
            read()
    torch.save(nested(30, kind), tmp_path / "a.pth")
    with pytest.raises(RefusedFile, match="far larger"):
        read_torch(tmp_path / "a.pth")


def test_copies_of_a_copy_do_not_grow(tmp_path):
    "One long list, copied by a call of six bytes, again and again."
    path = tmp_path / "a.pkl"
    long = pickle.dumps([0] * 20_000, 2)[2:-1]
    path.write_bytes(
        b"\x80\x02](" + long + b"q\x05" + b"cbuiltins\nlist\nh\x05\x85R" * 20_000 + b"e."
    )
    with pytest.raises(RefusedFile, match="far larger"):
        read_pickle(path)


def test_shared_parts_are_counted_as_often_as_met():
    assert count_items(nested(10)) == 3 * 2**10 - 1
    shared = np.ones(3)
    assert count_items([shared, shared]) == 3


def test_tensors_from_fewer_elements_and_compressed_records(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(dict(w=torch.ones(1).expand(2**40)), path)
    with pytest.raises(RefusedFile, match="from fewer elements"):
        read_torch(path)
    torch.save(dict(w=torch.zeros(2**20)), path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.pth", "w", 8) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    with pytest.raises(RefusedFile, match="compressed"):
        read_torch(tmp_path / "b.pth")


@pytest.mark.parametrize("read", [read_pickle, read_torch])
def test_the_true_cause(read, tmp_path):
    "Never the advice to switch safety off; what is another kind of file is called so."
    path = tmp_path / "a.pth"
    for data, said in (
        (b"<!doctype html>Sign in", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x02\0\0\0\0\0\0\0{}", "a safetensors file"),
        (b"", "empty|no whole"),
        (b"\x80\x04.", "no whole"),
    ):
        path.write_bytes(data)
        with pytest.raises(RefusedFile, match=said) as error:
            read(path)
        assert "weights_only" not in str(error.value)
    torch.save(dict(x=Own()), path)
    with pytest.raises(RefusedFile) as error:
        read_torch(path)
    assert "weights_only" not in str(error.value) and "fetch" not in str(error.value)


@golden
def test_names_that_wrappers_leave(tmp_path):
    content = read_torch(SHARED / "golden/a_official/best.pth")
    wrapped = {f"module.{name}": tensor for name, tensor in content["model"].items()}
    torch.save(dict(content, model=wrapped), tmp_path / "best.pth")
    theirs = load_uniemo(SHARED / "golden/a_official", "best.pth").encoder.state_dict()
    ours = load_uniemo(tmp_path).encoder.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    content["model"]["visual.conv1.weight"][0] = torch.nan
    torch.save(content, tmp_path / "best.pth")
    with pytest.raises(ValueError, match=r"visual\.conv1\.weight holds values"):
        load_uniemo(tmp_path)
