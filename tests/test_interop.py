"""Files of others: what they hold is read, what they would run is not."""
import argparse
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from uniemo.interop import RefusedFile, load_emogen, load_uniemo, read_pickle, read_torch

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
golden = pytest.mark.skipif(not (SHARED / "golden/a_official").exists(), reason=f"no golden files at {SHARED / 'golden'}")
real = pytest.mark.skipif(not (SHARED / "real/emogen").exists(), reason=f"no real files at {SHARED / 'real'}")


class Calls:
    "Pickles as a call of `f(*args)`."
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args


class Own: pass


ATTACKS = [(os.system, "system"), (eval, "eval"), (exec, "exec"), (getattr, "getattr"), (os.remove, "remove"), (Path, "Path"), (np.load, "load"), (np.fromfile, "fromfile"), (__import__, "__import__")]


@pytest.mark.parametrize("f,name", ATTACKS)
@pytest.mark.parametrize("kind", ["pickle", "torch", "old torch"])
def test_nothing_is_run(f, name, kind, tmp_path):
    path, mark = tmp_path / "file", tmp_path / "ran"
    arg = {"system": f"touch {mark}", "eval": f"open({str(mark)!r}, 'w')", "exec": f"open({str(mark)!r}, 'w')"}.get(name, str(mark))
    content = {"model": {"w": torch.ones(2)} if kind != "pickle" else {}, "x": [Calls(f, arg)]}
    if kind == "pickle": path.write_bytes(pickle.dumps(content))
    else: torch.save(content, path, _use_new_zipfile_serialization=kind == "torch")
    with pytest.raises(RefusedFile, match=name) as e: (read_pickle if kind == "pickle" else read_torch)(path)
    assert not mark.exists() and str(path) in str(e.value)


def test_own_classes_and_functions_are_refused(tmp_path):
    path = tmp_path / "file.pth"
    for thing, name in ((Own(), "Own"), (torch.nn.Linear(2, 2), "Linear"), (Path("x"), "Path"), (np.ones(2), "numpy")):
        torch.save(dict(x=thing), path)
        with pytest.raises(RefusedFile, match=name): read_torch(path)
    torch.save(dict(x=argparse.Namespace(a=Own())), path)
    with pytest.raises(RefusedFile, match="Own"): read_torch(path)
    torch.save(dict(x=argparse.Namespace(a=1)), path); assert read_torch(path)["x"].a == 1


def test_broken_files(tmp_path):
    path = tmp_path / "file.pth"
    torch.save(dict(w=torch.ones(1000)), path); whole = path.read_bytes()
    for data in (b"", b"hello", whole[: len(whole) // 2], b"\x80\x04."):
        path.write_bytes(data)
        with pytest.raises(RefusedFile, match="file.pth"): read_torch(path)
        with pytest.raises(RefusedFile, match="file.pth"): read_pickle(path)
    with zipfile.ZipFile(path, "w") as z: z.writestr("a", "b")
    with pytest.raises(RefusedFile): read_torch(path)
    with pytest.raises(FileNotFoundError): read_torch(tmp_path / "none.pth")


@pytest.mark.parametrize("array", [np.arange(6.).reshape(2, 3), np.arange(3, dtype=np.int8), np.array(["a", "bc"]), np.float64(3), np.asfortranarray(np.ones((2, 3))), np.array([{"a": 1}, None], dtype=object)])
@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_both_numpys(array, protocol, tmp_path):
    path = tmp_path / "a.pkl"; data = pickle.dumps({"x": array, "y": [1, (2.5, None), {True}, frozenset(), "é", b"b", bytearray(b"c"), 1j]}, protocol)
    olds = [data.replace(b"numpy._core", b"numpy.core")] if protocol < 4 else []        # later protocols count bytes; EmoGen's real files are of protocol 4
    for d in (data, *olds):
        path.write_bytes(d); back = read_pickle(path)
        np.testing.assert_array_equal(back["x"], array); assert back["y"][1] == (2.5, None) and back["y"][6] == bytearray(b"c")


def test_an_object_array_hides_nothing(tmp_path):
    path = tmp_path / "a.pkl"; path.write_bytes(pickle.dumps(np.array([Calls(os.system, f"touch {tmp_path}/ran")], dtype=object)))
    with pytest.raises(RefusedFile, match="system"): read_pickle(path)
    assert not (tmp_path / "ran").exists()


@golden
def test_official_folder():
    files = load_uniemo(SHARED / "golden/a_official")
    assert files.checkpoint.name == "VIT_query.pth" and files.encoder.config.image_mean == [.5] * 3 and load_uniemo(SHARED / "golden/a_official", "best.pth").encoder.config.image_mean == [.485, .456, .406]
    assert files.encoder.config.num_queries == 4 and files.encoder.split == (2, 4) and files.mapper[2].out_features == files.mapper_scene[2].out_features == files.mapper_object[2].out_features == 96
    assert "visual.proj" in files.left_out and any("query_alpha" in k for k in files.left_out)


@golden
def test_official_encoder_saved_as_ours(tmp_path):
    files = load_uniemo(SHARED / "golden/a_official"); files.encoder.save_pretrained(tmp_path); x = torch.randn(2, 3, 32, 32)
    with torch.no_grad(): assert torch.equal(type(files.encoder).from_pretrained(tmp_path)(x).logits, files.encoder(x).logits)


@real
def test_real_emogen():
    e = load_emogen(SHARED / "real/emogen")
    assert all(abs(row.sum() - 1) < 1e-4 and len(row) == 8 for t in e.coefficients.values() for row in t.values()) and set(e.coefficients) == {"scene", "object"}
    assert len(e.names) == 655 and set(e.attributes["scene"]) == set(e.space) and len(e.space) == 8 and all(len(v) == 768 for s in e.space.values() for v in s["class"])
    assert e.classifier(torch.zeros(1, 768)).shape == (1, 8)
