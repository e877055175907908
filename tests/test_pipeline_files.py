"What a pipeline's folder may say of itself."

import json
import shutil

import pytest

from uniemo.backbones import vision_config
from uniemo.files.disk import FileError
from uniemo.files.pipelines import load_parts, read_base
from uniemo.files.shipped import shipped_folder
from uniemo.files.weights import WeightsError
from uniemo.pipeline import UniEmoPipeline


@pytest.mark.parametrize(
    "name", ["C:\\x", "", " ", "\n", "../../no/such", "x" * 400, "a\0b", "a/b/c", 3]
)
def test_a_diffusion_model_that_cannot_be_one(name, tmp_path):
    note = tmp_path / "uniemo.json"
    note.write_text(json.dumps(dict(diffusion=name)))
    with pytest.raises(FileError, match="uniemo.json: diffusion"):
        read_base(note)


@pytest.mark.parametrize(
    "name", ["mini", "mini:diffusion_strong", "owner/name", "stable-diffusion-v1-5/x.y", None]
)
def test_a_diffusion_model_that_can_be_one(name, tmp_path):
    note = tmp_path / "uniemo.json"
    note.write_text(json.dumps(dict(diffusion=name)))
    assert read_base(note) == name


def test_a_diffusion_model_beside_the_note(tmp_path):
    (tmp_path / "here").mkdir()
    note = tmp_path / "uniemo.json"
    note.write_text(json.dumps(dict(diffusion="here")))
    assert read_base(note) == "here"


def test_emotions_that_are_no_words(tmp_path):
    folder = shutil.copytree(shipped_folder("uniemo"), tmp_path / "mine")
    path = folder / "retriever/config.json"
    config = json.loads(path.read_text())
    config["emotions"][5] = {}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the retriever lists the emotions"):
        UniEmoPipeline.from_pretrained(folder)


def test_no_module_is_imported_for_a_file(tmp_path):
    index = dict(encoder=["antigravity", "fly"], vae=["diffusers", "NoSuchClass"])
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(FileError, match="vae is no class of diffusers"):
        load_parts(tmp_path, {}, None)


def test_a_configuration_below_zero(tmp_path):
    config = json.loads((shipped_folder("clip") / "config.json").read_text())
    config["vision_config"]["num_attention_heads"] = -1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match="num_attention_heads is a number above 0"):
        vision_config(tmp_path)
