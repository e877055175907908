"""Kinds of weights, pickles and folders of models for the fuzzer; see `fuzz`."""

import argparse
import json
import pickle
import shutil
import struct
import zipfile
from functools import cache

import numpy as np
import torch
from fuzz import FOREIGN, JUNK, kind, mutate_bytes, mutate_json
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from uniemo.backbones import Backbone
from uniemo.files.emogen import load_emogen
from uniemo.files.pickles import read_pickle, read_torch
from uniemo.files.shipped import shipped_folder
from uniemo.files.uniemo import load_uniemo, official_state
from uniemo.files.weights import quiet, read_json, read_tensors, write_tensors
from uniemo.pipeline import UniEmoPipeline
from uniemo.queries import ExpertQueryModel


@cache
def encoder(head_width=8):
    "A tiny encoder with random weights."
    torch.manual_seed(0)
    size = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=1, intermediate_size=16)
    config = CLIPVisionConfig(**size, image_size=16, patch_size=8, projection_dim=8)
    return ExpertQueryModel(CLIPVisionModel(config), 2, head_width=head_width).eval()


def spoil_file(rng, path):
    "Mutate, cut, exchange or take away one file; whether what is left must be refused."
    how = rng.choice(("mutate", "mutate", "cut", "foreign", "gone", "zeros"))
    whole = path.read_bytes()
    if how == "mutate":
        path.write_bytes(mutate_bytes(rng, whole))
        return None
    if how == "cut":
        path.write_bytes(whole[: rng.randrange(len(whole))])
    elif how == "foreign":
        path.write_bytes(rng.choice(FOREIGN))
    elif how == "zeros":
        path.write_bytes(bytes(len(whole)))
    else:
        path.unlink()
        return None
    return None if path.suffix == ".json" else True


def spoil_tensors(rng, tensors):
    "One tensor gone, too many, of another shape, of no numbers, or renamed."
    tensors = dict(tensors)
    name = rng.choice(sorted(tensors))
    how = rng.choice(("gone", "more", "shape", "nan", "infinite", "renamed"))
    if how in ("gone", "renamed"):
        tensor = tensors.pop(name)
        if how == "renamed":
            tensors[name + ".x"] = tensor
    elif how == "more":
        tensors["x.y"] = torch.ones(2)
    elif how == "shape":
        tensors[name] = torch.ones(*tensors[name].shape, 2)
    else:
        value = float("nan") if how == "nan" else float("inf")
        tensors[name] = torch.full(tensors[name].shape, value)
    return tensors


def spoil_settings(rng, path):
    "One place of a JSON file exchanged."
    path.write_text(json.dumps(mutate_json(rng, json.loads(path.read_text()))), encoding="utf-8")


# ---- single files


@kind
def safetensors_files(rng, folder):
    tensors = dict(w=torch.randn(3, 2), b=torch.randn(3), n=torch.arange(4))
    expected, path = {name: t.shape for name, t in tensors.items()}, folder / "a.safetensors"
    how, verdict = rng.choice(("whole", "tensors", "bytes", "head")), None
    if how == "tensors":
        tensors, verdict = spoil_tensors(rng, tensors), True
    write_tensors(path, tensors)
    if how == "whole":
        verdict = False
    elif how == "bytes":
        verdict = spoil_file(rng, path)
    elif how == "head":
        head = {"w": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]}}
        text = json.dumps(mutate_json(rng, head)).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(24))
        verdict = True

    def read():
        if not path.exists():
            raise ValueError(f"there is no such file any more: {path}")
        found = read_tensors(path, expected)
        assert all(found[name].shape == shape for name, shape in expected.items())
        assert all(torch.isfinite(t).all() for t in found.values())

    return read, verdict


@kind
def settings_files(rng, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(dict(a=[1, {"b": "c"}])))
    how = rng.choice(("mutate", "foreign", "deep", "mark", "large"))
    if how == "mutate":
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    elif how == "foreign":
        path.write_bytes(rng.choice(FOREIGN))
    elif how == "deep":
        path.write_text("[" * 10**5)
    elif how == "large":
        path.write_text(json.dumps("x" * 2000))
    else:
        path.write_text("{}", encoding="utf-8-sig")
    verdict = dict(deep=True, large=True, mark=False).get(how)
    return lambda: read_json(path, limit=1000), verdict


class Call:
    "Pickles as a call."

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def some_content(rng, depth=0):
    "Plain containers and arrays."
    how = rng.randrange(9 if depth < 3 else 5)
    if how == 0:
        return rng.choice(JUNK)
    if how == 1:
        dtype = rng.choice((float, int, bool, "<f4", ">f8", np.uint8))
        return np.ones(tuple(rng.randrange(4) for _ in range(rng.randrange(3)))).astype(dtype)
    if how == 2:
        return np.array(["a", "bc"])
    if how == 3:
        return np.float64(rng.random())
    if how == 4:
        return rng.choice((1j, b"x", bytearray(b"y"), 2**70, (), frozenset("a")))
    parts = [some_content(rng, depth + 1) for _ in range(rng.randrange(4))]
    if how == 5:
        return parts
    if how == 6:
        return tuple(parts)
    return {str(i): part for i, part in enumerate(parts)}


def growing_content(rng):
    "A few bytes that become gigabytes."
    nested = rng.choice(([0.0], (0.0,), {"a": 1.0}))
    for _ in range(40):
        nested = (
            {"a": nested, "b": nested}
            if isinstance(nested, dict)
            else type(nested)((nested, nested))
        )
    return nested


@kind
def pickle_files(rng, folder):
    path = folder / "a.pkl"
    how = rng.choice(("whole", "bytes", "call", "growing", "foreign", "copies"))
    content, verdict = some_content(rng), False
    if how == "call":
        import os

        content = [content, Call(os.system, f"touch {folder}/ran")]
        verdict = True
    elif how == "growing":
        content, verdict = growing_content(rng), True
    data = pickle.dumps(content, rng.randrange(6))
    if how == "bytes":
        data, verdict = mutate_bytes(rng, data), None
    elif how == "foreign":
        data, verdict = rng.choice(FOREIGN), True
    elif how == "copies":
        # list(x) of one long list, again and again
        long = pickle.dumps([0] * 20_000, 2)[2:-1]
        copy = b"cbuiltins\nlist\nh\x05\x85R"
        data, verdict = b"\x80\x02](" + long + b"q\x05" + copy * 20_000 + b"e.", True
    path.write_bytes(data)

    def read():
        repr(read_pickle(path))

    def unharmed():
        try:
            read()
        finally:
            assert not (folder / "ran").exists()

    return unharmed, verdict


@kind
def torch_files(rng, folder):
    path = folder / "a.pth"
    how = rng.choice(("whole", "bytes", "call", "wide", "foreign", "compressed", "growing"))
    content = dict(w=torch.randn(3), n=[1, "a"], config=argparse.Namespace(a=1))
    verdict = how != "whole"
    if how == "call":
        import os

        content["x"] = Call(os.system, f"touch {folder}/ran")
    elif how == "wide":
        content["w"] = torch.ones(1).expand(2**40)
    elif how == "growing":
        content["x"] = growing_content(rng)
    torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.7)
    if how == "bytes":
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
        verdict = None
    elif how == "foreign":
        path.write_bytes(rng.choice(FOREIGN))
    elif how == "compressed":
        torch.save(content, path)
        with zipfile.ZipFile(path) as old:
            parts = {record.filename: old.read(record) for record in old.infolist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name, data in parts.items():
                new.writestr(name, data)

    def read():
        try:
            found = read_torch(path)
            assert not torch.is_tensor(found) or found.float().sum() is not None
        finally:
            assert not (folder / "ran").exists()

    return read, verdict


# ---- folders


@kind
def encoder_folders(rng, folder):
    with quiet():
        encoder().save_pretrained(folder)
    path = folder / "model.safetensors"
    how, verdict = rng.choice(("whole", "tensors", "bytes", "settings", "settings")), None
    if how == "whole":
        verdict = False
    elif how == "tensors":
        tensors = spoil_tensors(rng, read_tensors(path))
        save_file(tensors, path, {"format": "pt"})
        verdict = True
    elif how == "bytes":
        verdict = spoil_file(rng, rng.choice((path, folder / "config.json")))
    else:
        spoil_settings(rng, folder / "config.json")

    def read():
        model = ExpertQueryModel.from_pretrained(folder).eval()
        size = model.config.image_size
        with torch.no_grad():
            out = model(torch.zeros(1, 3, size, size))
        assert torch.isfinite(out.logits).all()

    return read, verdict


@kind
def backbone_folders(rng, folder):
    with quiet():
        encoder().backbone.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(dict(image_mean=[0.5] * 3, image_std=[0.5] * 3))
    )
    how = rng.choice(("tensors", "bytes", "settings", "preprocessor"))
    verdict = None
    if how == "tensors":
        path = folder / "model.safetensors"
        tensors = read_tensors(path)
        gone = rng.choice(sorted(tensors))
        save_file({k: v for k, v in tensors.items() if k != gone}, path, {"format": "pt"})
        verdict = True
    elif how == "bytes":
        verdict = spoil_file(rng, folder / "model.safetensors")
    elif how == "settings":
        spoil_settings(rng, folder / "config.json")
    else:
        spoil_settings(rng, folder / "preprocessor_config.json")

    def read():
        backbone = Backbone.from_pretrained(folder)
        size = backbone.image_size
        with torch.no_grad():
            c, _ = backbone.final(backbone.run(backbone.embed(torch.zeros(1, 3, size, size))))
        assert torch.isfinite(c).all() and len(backbone.image_mean) == 3

    return read, verdict


@kind
def uniemo_folders(rng, folder):
    state = official_state(encoder())
    how, verdict = rng.choice(("whole", "tensors", "bytes", "junk", "mapper")), None
    if how == "whole":
        verdict = False
    elif how == "tensors":
        group = rng.choice(("model", "Emo_classifier"))
        state[group] = spoil_tensors(rng, state[group])
    elif how == "junk":
        state[rng.choice(("model", "Emo_classifier"))] = rng.choice(JUNK)
        verdict = True
    torch.save(state, folder / "best.pth")
    if how == "bytes":
        verdict = spoil_file(rng, folder / "best.pth")
    elif how == "mapper":
        layer = dict(zip(("mlp.0.weight", "mlp.0.bias"), (torch.ones(4, 64), torch.ones(4))))
        layer |= {"mlp.2.weight": torch.ones(5, 4), "mlp.2.bias": torch.ones(5)}
        torch.save(spoil_tensors(rng, layer), folder / "mapper.pth")
        verdict = True

    def read():
        files = load_uniemo(folder, "best.pth")
        with torch.no_grad():
            assert torch.isfinite(files.encoder(torch.zeros(1, 3, 16, 16)).logits).all()

    return read, verdict


@kind
def emogen_folders(rng, folder):
    rows = dict(castle=np.full(8, 0.125), dog=np.full(8, 0.125))
    how, verdict = rng.choice(("whole", "rows", "bytes", "space", "classifier")), None
    if how == "rows":
        rows["dog"] = rng.choice((*JUNK, growing_content(rng), np.ones((2, 2)), [1, "a"]))
        if isinstance(rows["dog"], list) and not rows["dog"]:
            rows["dog"] = None
        verdict = True
    path = folder / "attr_coefficient_emotion_scene.pkl"
    path.write_bytes(pickle.dumps(rows))
    if how == "whole":
        verdict = False
    elif how == "bytes":
        verdict = spoil_file(rng, path)
    elif how == "space":
        torch.save(rng.choice((*JUNK, torch.full((3,), torch.nan))), folder / "awe_mean_v2.pt")
        torch.save(torch.ones(3), folder / "awe_std_v2.pt")
        verdict = True
    elif how == "classifier":
        layer = {"fc.weight": torch.ones(8, 3), "fc.bias": torch.ones(8)}
        torch.save(spoil_tensors(rng, layer), folder / "time_best.pth")
        verdict = True

    def read():
        if not list(folder.iterdir()):
            raise ValueError(f"nothing is left in {folder} to be read here")
        emogen = load_emogen(folder)
        for row in emogen.coefficients["scene"].values():
            assert row.ndim == 1 and np.isfinite(row).all()

    return read, verdict


@kind
def pipeline_folders(rng, folder):
    shutil.copytree(shipped_folder("uniemo"), folder, dirs_exist_ok=True)
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md")
    path = rng.choice(paths)
    how = rng.choice(("file", "tensors", "settings"))
    if how == "tensors" and path.suffix == ".safetensors" and path.name != "space.safetensors":
        save_file(spoil_tensors(rng, read_tensors(path)), path, {"format": "pt"})
        verdict = True
    elif how == "settings" and path.suffix == ".json":
        spoil_settings(rng, path)
        verdict = None
    else:
        verdict = spoil_file(rng, path)

    def read():
        pipe = UniEmoPipeline.from_pretrained(folder)
        assert all(torch.isfinite(p).all() for p in pipe.mapper.parameters())

    return read, verdict
