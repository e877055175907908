"""Backbones as people have them: whole models, classifiers, other sizes, broken folders."""

import json

import pytest
import torch
import transformers

from uniemo.backbones import Backbone, TextTower, vision_config
from uniemo.files.weights import WeightsError, quiet, read_tensors, write_tensors

SIZE = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8)
VISION = dict(SIZE, intermediate_size=64)
TEXT = dict(
    vocab_size=50,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=1,
    max_position_embeddings=16,
    eos_token_id=1,
    bos_token_id=0,
    pad_token_id=1,
)
CLIP = dict(vision_config=VISION, text_config=TEXT, projection_dim=24)
SIGLIP = dict(vision_config=VISION, text_config=TEXT)
WRAPPED = {
    "CLIPModel": ("CLIPConfig", CLIP),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", dict(VISION, projection_dim=24)),
    "CLIPForImageClassification": ("CLIPConfig", CLIP),
    "ViTForImageClassification": ("ViTConfig", VISION),
    "Dinov2ForImageClassification": ("Dinov2Config", SIZE),
    "Dinov2WithRegistersForImageClassification": ("Dinov2WithRegistersConfig", SIZE),
    "SiglipModel": ("SiglipConfig", SIGLIP),
    "SiglipForImageClassification": ("SiglipConfig", SIGLIP),
}


def build(name):
    config, settings = WRAPPED[name]
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()


def features(backbone, pixels):
    with torch.no_grad():
        return backbone.final(backbone.run(backbone.embed(pixels)))[0]


@pytest.mark.parametrize("name", WRAPPED)
def test_the_vision_model_inside(name, tmp_path):
    "An instance is unwrapped, and its folder gives the same."
    model = build(name)
    backbone, pixels = Backbone(model), torch.randn(2, 3, 32, 32)
    with quiet():
        model.save_pretrained(tmp_path)
    loaded = Backbone.from_pretrained(tmp_path)
    loaded.model.eval()
    assert torch.equal(features(backbone, pixels), features(loaded, pixels))
    projected = name.startswith("CLIP") and "Classification" not in name
    assert not projected or backbone.text_dim == loaded.text_dim == 24
    assert Backbone.from_pretrained(tmp_path, image_size=48).image_size == 48


@pytest.mark.parametrize("name", WRAPPED)
def test_a_configuration_without_weights(name, tmp_path):
    "What an estimate of memory needs: the vision configuration of any folder, at any size."
    build(name).config.save_pretrained(tmp_path)
    backbone = Backbone.from_config(vision_config(tmp_path), image_size=16)
    assert features(backbone, torch.randn(1, 3, 16, 16)).shape == (1, 64)


def test_siglip_2_of_any_aspect_is_refused_by_name(tmp_path):
    transformers.Siglip2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="siglip2.*fixed resolution"):
        Backbone.from_pretrained(tmp_path)


def test_siglip_2_of_fixed_resolution(tmp_path):
    "Its folders say siglip, with a large vocabulary and a projection of the text."
    config = transformers.SiglipConfig(
        vision_config=VISION, text_config=dict(TEXT, vocab_size=2000, projection_size=64)
    )
    with quiet():
        transformers.SiglipModel(config).save_pretrained(tmp_path)
    assert Backbone.from_pretrained(tmp_path).prefix == 0


@pytest.fixture
def folder(tmp_path):
    with quiet():
        build("ViTForImageClassification").save_pretrained(tmp_path)
    return tmp_path


def test_a_foreign_folder_that_lacks_a_layer(folder):
    path = folder / "model.safetensors"
    tensors = read_tensors(path)
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
    kept = (
        kept if len(kept) < len(tensors) else {k: v for k, v in tensors.items() if ".1." not in k}
    )
    write_tensors(path, kept)
    with pytest.raises(WeightsError, match="incomplete"):
        Backbone.from_pretrained(folder)


def test_a_foreign_folder_with_what_is_no_number(folder):
    path = folder / "model.safetensors"
    tensors = read_tensors(path)
    write_tensors(path, {name: tensor * torch.nan for name, tensor in tensors.items()})
    with pytest.raises(WeightsError, match="not finite"):
        Backbone.from_pretrained(folder)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_wrappers_prefix(folder, prefix):
    want = Backbone.from_pretrained(folder).model.state_dict()
    tensors = read_tensors(folder / "model.safetensors")
    wrapped = {prefix + name: tensor for name, tensor in tensors.items()}
    write_tensors(folder / "model.safetensors", wrapped)
    loaded = Backbone.from_pretrained(folder).model.state_dict()
    # the pooler, which nothing reads, is not in the file
    read = [name for name in want if not name.startswith("pooler.")]
    assert all(torch.equal(loaded[name], want[name]) for name in read)


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_broken_settings_name_the_file(folder, file):
    (folder / file).write_text('{"image_mean": [1, 2')
    with pytest.raises(ValueError, match=file):
        Backbone.from_pretrained(folder)


def test_the_normalisation_of_a_preprocessor_file(folder):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(dict(image_mean=[0.1, 0.2, 0.3], image_std=[0.4] * 3)))
    backbone = Backbone.from_pretrained(folder)
    assert (backbone.image_mean, backbone.image_std) == ([0.1, 0.2, 0.3], [0.4] * 3)
    path.write_text(json.dumps(dict(image_mean=[0.1, 0.2, 0.3], image_std=[0, 1, 1])))
    with pytest.raises(ValueError, match="image_std must be three positive numbers"):
        Backbone.from_pretrained(folder)
    path.unlink()
    nested = dict(image_processor=dict(image_mean=[0.3] * 3, image_std=[0.4] * 3))
    (folder / "processor_config.json").write_text(json.dumps(nested))
    assert Backbone.from_pretrained(folder).image_mean == [0.3] * 3


def test_a_model_without_text():
    with pytest.raises(ValueError, match="no text features"):
        TextTower(build("ViTForImageClassification"), None)


def test_a_class_token_alone_through_the_last_layer():
    torch.manual_seed(0)
    settings = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3)
    config = transformers.CLIPVisionConfig(
        **settings, num_attention_heads=4, image_size=32, patch_size=8
    )
    backbone = Backbone.from_config(config)
    assert backbone.family.can_shorten(backbone.model)
    tokens = torch.randn(2, 21, 32)
    found = []
    whole = backbone.final(backbone.run(tokens, 1))[0]
    for feature in (whole, backbone.class_feature(tokens, 1)):
        backbone.model.zero_grad()
        feature.square().sum().backward()
        gradients = [p.grad.clone() for p in backbone.layers[1:].parameters()]
        found.append([feature.detach(), *gradients])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
    backbone.model.gradient_checkpointing_enable()
    assert not backbone.family.can_shorten(backbone.model)
