"The table of what words can do in each family, as committed, is what the trials say."

import json
import re

import diffusers
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.loaders import IPAdapterMixin, StableDiffusionLoraLoaderMixin
from families import (
    ABILITIES,
    MASK,
    PHOTO,
    STAGE,
    adapter_of,
    conditions,
    control_net,
    differ,
    emotion_words,
    in_eight_bits,
    outcome,
    read_table,
    reloaded,
    sibling,
    tiny_encoder,
)
from house import NBS
from peft import LoraConfig, get_peft_model_state_dict
from tiny_pipelines import BUILDERS, build
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from uniemo.joint import JointConfig
from uniemo.mini.splits import paint_splits
from uniemo.pipeline import UniEmoPipeline
from uniemo.queries import ExpertQueryModel
from uniemo.towers import text_towers
from uniemo.words import EmotionWords

torch.set_num_threads(1)
COMMITTED = read_table()


def test_the_table_is_whole():
    assert list(COMMITTED) == list(BUILDERS)
    for row in COMMITTED.values():
        assert list(row) == [ability.name for ability in ABILITIES]
        assert set(row.values()) <= {"yes", "-"}


@pytest.mark.parametrize("ability", ABILITIES, ids=lambda ability: ability.name)
@pytest.mark.parametrize("family", list(BUILDERS))
def test_an_entry(family, ability):
    assert outcome(family, ability) == COMMITTED[family][ability.name]


# ---- the page


def snippets():
    "Code that the page shows, in its order."
    cells = json.loads((NBS / "diffusion" / "own_pipeline.ipynb").read_text(encoding="utf-8"))[
        "cells"
    ]
    shown = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return re.findall(r"```python\n(.*?)```", shown, re.DOTALL)


MODELS = {
    "my/stable-diffusion": "Stable Diffusion 1.x and 2.x",
    "my/sdxl": "Stable Diffusion XL",
    "my/flux": "FLUX.1",
}
RUNS = dict(zip(("runs/joint", "runs/joint-sdxl", "runs/joint-flux"), MODELS.values()))


def random_lora(model):
    "States of a LoRA for a U-Net."
    torch.manual_seed(13)
    settings = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"])
    model.add_adapter(settings, "made")
    states = get_peft_model_state_dict(model, adapter_name="made")
    model.delete_adapters("made")
    return {f"unet.{key}": value for key, value in states.items()}


def image_reader():
    "What an IP-Adapter reads images with."
    sizes = dict(hidden_size=8, intermediate_size=8, projection_dim=8)
    layers = dict(num_hidden_layers=1, num_attention_heads=1, image_size=32, patch_size=32)
    reader = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, **layers)).eval()
    size = dict(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32))
    return dict(image_encoder=reader, feature_extractor=CLIPImageProcessor(**size))


@pytest.fixture
def stand_ins(monkeypatch):
    "Tiny random models in place of everything that the page would download."
    load = DiffusionPipeline.from_pretrained.__func__
    lora = StableDiffusionLoraLoaderMixin.load_lora_weights
    offload = DiffusionPipeline.enable_model_cpu_offload

    def from_pretrained(cls, name, **parts):
        if name not in MODELS:
            return load(cls, name, **parts)
        pipe = build(MODELS[name])
        if hasattr(pipe, "default_sample_size"):
            pipe.default_sample_size = 32
        if "quantization_config" in parts:
            return reloaded(pipe, **parts)
        ending = cls.__name__.removeprefix("StableDiffusion").removesuffix("Pipeline")
        return sibling(pipe, MODELS[name], ending, **parts) if parts else pipe

    def load_ip_adapter(pipe, name, subfolder, weight_name):
        pipe.unet._load_ip_adapter_weights([adapter_of(pipe.unet)])
        pipe.register_modules(**image_reader())

    def patch(owner, name, value):
        monkeypatch.setattr(owner, name, value)

    def in_two_steps(owner):
        generate = owner.generate
        few = dict(num_inference_steps=2)
        patch(owner, "generate", lambda self, *args, **kw: generate(self, *args, **(few | kw)))

    in_two_steps(EmotionWords)
    in_two_steps(UniEmoPipeline)
    patch(DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    patch(
        diffusers.ControlNetModel,
        "from_pretrained",
        lambda name: control_net(build(MODELS["my/stable-diffusion"]), RUNS["runs/joint"]),
    )
    patch(EmotionWords, "from_pretrained", lambda name: emotion_words(build(RUNS[name])))
    patch(diffusers.utils, "load_image", lambda name: MASK if name == "mask.png" else PHOTO)
    patch(IPAdapterMixin, "load_ip_adapter", load_ip_adapter)
    patch(
        StableDiffusionLoraLoaderMixin,
        "load_lora_weights",
        lambda pipe, name: lora(pipe, random_lora(pipe.unet), adapter_name="mine"),
    )
    patch(
        DiffusionPipeline,
        "enable_model_cpu_offload",
        lambda pipe, device=None: offload(pipe, device="cpu"),
    )
    patch(
        diffusers.UNet2DConditionModel,
        "compile",
        lambda model: torch.nn.Module.compile(model, backend="eager"),
    )
    yield
    torch._dynamo.reset()


@pytest.fixture
def small_training(monkeypatch, tmp_path):
    "Two steps on eight pictures in place of EmoSet, and a tiny encoder."
    preset = JointConfig.preset.__func__
    world = paint_splits(num_train=8, num_val=4, num_test=4)
    torch.manual_seed(3)
    text = {kind: torch.randn(len(own), 24) for kind, own in world.names.items() if own}

    load = ExpertQueryModel.from_pretrained.__func__

    def small(cls, name, **changes):
        return preset(cls, "mini", **(changes | STAGE))

    def encoder(cls, name, **how):
        return tiny_encoder() if name == "runs/understanding/model" else load(cls, name, **how)

    monkeypatch.setattr(JointConfig, "preset", classmethod(small))
    monkeypatch.setattr("uniemo.data.splits.open_splits", lambda name: world)
    monkeypatch.setattr("uniemo.joint.name_features", lambda *args: text)
    monkeypatch.setattr(ExpertQueryModel, "from_pretrained", classmethod(encoder))
    monkeypatch.chdir(tmp_path)


@pytest.mark.filterwarnings("ignore:vae_size is")
def test_every_snippet_of_the_page_runs(stand_ins, small_training):
    "In their order, each with the names that those before it have made."
    names = {}
    shown = snippets()
    assert len(shown) > 10
    for code in shown:
        names.pop("images", None)
        exec(compile(code, "own_pipeline.ipynb", "exec"), names)
        if "EmotionWords.from_pretrained" in code or "images" in code:
            assert len(names["images"]) and names["images"][0].size[0] >= 32, code


# ---- quantised text encoders


@pytest.mark.parametrize("family", ["Stable Diffusion 1.x and 2.x", "FLUX.1"])
def test_words_in_a_quantised_text_encoder(family):
    "In 8 bits a prompt with a word moves by little, and far less than another emotion moves it."
    plain = build(family)
    part = text_towers(plain)[-1].name
    made = reloaded(plain, **in_eight_bits(part, transformers.QuantoConfig(weights="int8")))
    kinds = {type(layer).__name__ for layer in getattr(made, part).modules()}
    assert "QLinear" in kinds
    for awe, fear, rounded in zip(conditions(plain), conditions(plain, "fear"), conditions(made)):
        assert rounded.isfinite().all()
        moved, other = (rounded - awe).norm(), (fear - awe).norm()
        assert moved < 0.2 * awe.norm() and moved < other
    assert differ(made)
