"""What words can do in each family: every ability is tried on tiny random models.

`python tests/families.py` writes nbs/diffusion/abilities.csv; test_families.py compares it
with what the trials say.
"""

import csv
import inspect
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import torch
from diffusers import PipelineQuantizationConfig
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from PIL import Image
from tiny_pipelines import BUILDERS, build, unet
from transformers import ViTConfig, ViTModel

from uniemo.backbones import Backbone
from uniemo.correlation import AttributeRetriever, CorrelationTable
from uniemo.diffusion.denoisers import denoiser_of
from uniemo.diffusion.families import build_mapper
from uniemo.emotions import MIKELS
from uniemo.fusion import PseudoWordMapper
from uniemo.joint import JointConfig, stage_for
from uniemo.towers import text_towers
from uniemo.understanding import build_encoder
from uniemo.words import EmotionWords

TABLE = Path(__file__).resolve().parent.parent / "nbs" / "diffusion" / "abilities.csv"
PHOTO = Image.new("RGB", (32, 32), "orange")
MASK = Image.new("L", (32, 32), 255)
# the first part of the names of a family's classes
STEMS = {
    "Stable Diffusion 1.x and 2.x": "StableDiffusion",
    "Stable Diffusion XL": "StableDiffusionXL",
    "Stable Diffusion 3": "StableDiffusion3",
    "FLUX.1": "Flux",
    "PixArt-Sigma": "PixArtSigma",
    "Sana": "Sana",
    "Z-Image": "ZImage",
}


class NotThere(Exception):
    "diffusers offers nothing of the kind for this family, or it is not tried."


# ---- words of random models


class FewFeatures(torch.nn.Module):
    "Stands for an encoder: projections, names of two emotions."

    def __init__(self):
        super().__init__()
        self.scene_projection = torch.nn.Linear(6, 5, bias=False)
        self.object_projection = torch.nn.Linear(6, 5, bias=False)
        self.config = SimpleNamespace(class_names=["awe", "fear"])


class FewDraws:
    "Stands for an emotion space: features by the generator alone."

    emotions = ["awe", "fear"]

    def sample(self, wish, size, generators):
        return [torch.stack([torch.randn(6, generator=g) for g in generators]) for _ in range(3)]


def emotion_words(pipe):
    "Random mappers for each tower of a pipeline."
    torch.manual_seed(5)
    table = CorrelationTable(
        scene={"sea": [0.9, 0.1], "cellar": [0.2, 0.8]},
        object={"cat": [0.6, 0.4], "spider": [0.1, 0.9]},
        emotions=["awe", "fear"],
    )
    widths = [tower.width for tower in text_towers(pipe)]
    mappers = [PseudoWordMapper(6, width, separate=True) for width in widths]
    retriever = AttributeRetriever(table, torch.eye(2, 5), torch.eye(2, 5))
    return EmotionWords(FewFeatures(), mappers, retriever, FewDraws())


def painted(images):
    return np.stack([np.asarray(image, int) for image in images])


def largest_difference(a, b):
    return int(np.abs(painted(a) - painted(b)).max())


def call_settings(pipe, **more):
    "Two steps at a size that the tiny models take; `more` as far as the pipeline knows it."
    known = inspect.signature(pipe.__call__).parameters
    settings = dict(num_inference_steps=2, height=32, width=32)
    settings |= dict(max_sequence_length=77, complex_human_instruction=None)
    settings |= dict(use_resolution_binning=False)
    return {k: v for k, v in (settings | more).items() if k in known}


# ---- pipelines over the same parts


def denoiser(pipe):
    "Name of the part that denoises."
    return "unet" if hasattr(pipe, "unet") else "transformer"


def class_of(family, ending):
    "The class of a family for a way to paint, as diffusers has it."
    name = f"{STEMS[family]}{ending}Pipeline"
    # diffusers hands out no class under a name that it does not have
    if not hasattr(diffusers, name):
        raise NotThere(name)
    return getattr(diffusers, name)


def sibling(pipe, family, ending, **more):
    "A pipeline of another class over the parts of `pipe`."
    kind = class_of(family, ending)
    known = set(inspect.signature(kind.__init__).parameters)
    parts = {k: v for k, v in (pipe.components | more).items() if k in known}
    if "requires_safety_checker" in known:
        parts["requires_safety_checker"] = False
    made = kind(**parts)
    made.set_progress_bar_config(disable=True)
    return made


def control_net(pipe, family, **more):
    "A random ControlNet for a pipeline's denoiser."
    model = getattr(pipe, denoiser(pipe))
    small = dict(conditioning_embedding_out_channels=(4,))
    kinds = {
        "Stable Diffusion 1.x and 2.x": lambda: diffusers.ControlNetModel.from_unet(model, **small),
        "Stable Diffusion XL": lambda: diffusers.ControlNetModel.from_unet(model, **small),
        "Stable Diffusion 3": lambda: of_config(diffusers.SD3ControlNetModel, model, **more),
        "FLUX.1": lambda: of_config(diffusers.FluxControlNetModel, model),
        "Sana": lambda: of_config(diffusers.SanaControlNetModel, model),
    }
    if family not in kinds:
        raise NotThere("ControlNet")
    torch.manual_seed(7)
    net = kinds[family]()
    for parameter in net.parameters():
        # its last layers begin as zeros, which would change nothing
        torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


def of_config(kind, model, **more):
    "A model of another kind with the settings of `model`, as far as it knows them."
    known = inspect.signature(kind.__init__).parameters
    return kind(**{k: v for k, v in model.config.items() if k in known}, **more)


# ---- the trials: each returns whether it went as it should


def differ(pipe, **settings):
    "Whether two emotions give two pictures, and one alone is one of two."
    words = emotion_words(pipe).attach(pipe)
    settings = call_settings(pipe) | settings
    two = words.generate("awe", 2, prompt="<emotion> castle", seed=2, **settings).images
    alone = words.generate("awe", 1, prompt="<emotion> castle", seed=2, start=1, **settings).images
    other = words.generate("fear", 2, prompt="<emotion> castle", seed=2, **settings).images
    words.detach()
    return largest_difference(alone, two[1:]) <= 2 and largest_difference(two, other) > 0


def text_to_image(pipe, family):
    return differ(pipe)


def several_emotions(pipe, family):
    words = emotion_words(pipe).attach(pipe)
    call = dict(prompt="<emotion:awe> castle and <emotion:fear> dog", **call_settings(pipe))
    both = words.generate(None, 1, **call).images
    call["prompt"] = "<emotion:fear> castle and <emotion:fear> dog"
    return largest_difference(both, words.generate(None, 1, **call).images) > 0


def negative_prompt(pipe, family):
    known = inspect.signature(pipe.__call__).parameters
    if "negative_prompt" not in known:
        raise NotThere("negative_prompt")
    guided = dict(guidance_scale=5.0)
    if "true_cfg_scale" in known:
        guided = dict(true_cfg_scale=5.0)
    words = emotion_words(pipe).attach(pipe)
    settings = call_settings(pipe) | guided
    texts = ("", "blue dog", "<emotion:fear> dog")
    images = [words.generate("awe", 1, negative_prompt=t, **settings).images for t in texts]
    return all(largest_difference(images[i], images[j]) > 0 for i, j in ((0, 1), (1, 2), (0, 2)))


def image_to_image(pipe, family):
    return differ(sibling(pipe, family, "Img2Img"), image=PHOTO, strength=1.0)


def inpainting(pipe, family):
    made = sibling(pipe, family, "Inpaint")
    return differ(made, image=PHOTO, mask_image=MASK, strength=1.0)


def narrow_posterior(vae):
    "As of a trained one: SD 3's pipeline samples the control image's latents without a generator."
    last = vae.encoder.conv_out
    half = len(last.weight) // 2
    last.weight.data[half:] = 0
    last.bias.data[half:] = -30


def with_control_net(pipe, family):
    net = control_net(pipe, family)
    if family == "Stable Diffusion 3":
        narrow_posterior(pipe.vae)
    made = sibling(pipe, family, "ControlNet", controlnet=net)
    known = inspect.signature(made.__call__).parameters
    name = "image" if "image" in known else "control_image"
    call = {name: PHOTO, "controlnet_conditioning_scale": 1.0}
    words = emotion_words(made).attach(made)
    settings = call_settings(made) | call
    strong = words.generate("awe", 1, **settings).images
    settings["controlnet_conditioning_scale"] = 0.0
    weak = words.generate("awe", 1, **settings).images
    words.detach()
    return differ(made, **call) and largest_difference(strong, weak) > 0


def masked_control_net(pipe, family):
    "A ControlNet beside a mask: both are told of, and what the mask leaves stays."
    if family not in MASKED:
        raise NotThere("ControlNet with a mask")
    ending, settings_of_net = MASKED[family]
    net = control_net(pipe, family, **settings_of_net)
    narrow_posterior(pipe.vae)
    made = sibling(pipe, family, ending, controlnet=net)
    half = Image.new("L", PHOTO.size)
    half.paste(255, (0, 0, 32, 16))
    call = call_settings(made, image=PHOTO, control_image=PHOTO, strength=1.0)
    call |= call_settings(made, mask_image=half, control_mask=half)
    words = emotion_words(made).attach(made)
    scales = [dict(controlnet_conditioning_scale=scale) for scale in (1.0, 0.0)]
    strong, weak = (words.generate("awe", 1, **call, **scale).images for scale in scales)
    call |= call_settings(made, mask_image=MASK, control_mask=MASK)
    whole = words.generate("awe", 1, **call, **scales[0]).images
    words.detach()
    told = largest_difference(strong, weak) > 0 and largest_difference(strong, whole) > 0
    return told and differ(made, **call)


# the ending of the pipeline's name, what its ControlNet needs
MASKED = {
    "Stable Diffusion 1.x and 2.x": ("ControlNetInpaint", {}),
    "Stable Diffusion XL": ("ControlNetInpaint", {}),
    "Stable Diffusion 3": ("ControlNetInpainting", dict(extra_conditioning_channels=1)),
    "FLUX.1": ("ControlNetInpaint", {}),
}


def adapter_of(model):
    "A random IP-Adapter for a U-Net, as its file holds it: one image token of width 8."
    torch.manual_seed(9)
    states = {}
    number = 1
    for name in model.attn_processors:
        if name.endswith("attn1.processor"):
            continue
        layer = model.get_submodule(name.removesuffix(".processor"))
        wide, deep = layer.to_k.out_features, model.config.cross_attention_dim
        for kind in ("k", "v"):
            states[f"{number}.to_{kind}_ip.weight"] = torch.randn(wide, deep)
        number += 2
    width = model.config.cross_attention_dim
    projection = {"proj.weight": torch.randn(4 * width, 8), "proj.bias": torch.zeros(4 * width)}
    projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    return dict(image_proj=projection, ip_adapter=states)


def ip_adapter(pipe, family):
    if denoiser(pipe) != "unet":
        raise NotThere("tried for U-Nets only")
    pipe.unet._load_ip_adapter_weights([adapter_of(pipe.unet)])
    pipe.set_ip_adapter_scale(1.0)
    words = emotion_words(pipe).attach(pipe)
    settings = call_settings(pipe) | dict(guidance_scale=5.0)
    torch.manual_seed(11)
    # the negative image and the image
    embeds = [torch.randn(2, 1, 8), torch.randn(2, 1, 8)]
    one, other = (
        words.generate("awe", 1, ip_adapter_image_embeds=[e], **settings).images for e in embeds
    )
    words.detach()
    return (
        differ(pipe, ip_adapter_image_embeds=embeds[:1], guidance_scale=5.0)
        and largest_difference(one, other) > 0
    )


def lora(pipe, family):
    "A LoRA that the user loads after the words were attached."
    part = denoiser(pipe)
    model = getattr(pipe, part)
    words = emotion_words(pipe).attach(pipe)
    settings = call_settings(pipe)
    before = words.generate("awe", 1, **settings).images
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    torch.manual_seed(13)
    settings_of_lora = LoraConfig(r=2, init_lora_weights=False, target_modules=names)
    inject_adapter_in_model(settings_of_lora, model, "made")
    # where diffusers has no loader, peft puts it there
    if hasattr(pipe, "load_lora_weights"):
        states = get_peft_model_state_dict(model, adapter_name="made")
        setattr(pipe, part, getattr(build(family), part))
        pipe.load_lora_weights({f"{part}.{k}": v for k, v in states.items()}, adapter_name="made")
    after = words.generate("awe", 1, **settings).images
    words.detach()
    return largest_difference(before, after) > 0 and differ(pipe)


def offloaded(pipe, family):
    words = emotion_words(pipe).attach(pipe)
    settings = call_settings(pipe)
    plain = words.generate("awe", 2, **settings).images
    pipe.enable_model_cpu_offload(device="cpu")
    return largest_difference(words.generate("awe", 2, **settings).images, plain) == 0


def reloaded(pipe, load=diffusers.DiffusionPipeline.from_pretrained.__func__, **how):
    "A pipeline as it is read from its folder."
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = load(type(pipe), folder, **how)
    made.set_progress_bar_config(disable=True)
    return made


def in_eight_bits(part, config=None):
    "What diffusers is told to load a pipeline with one quantised part."
    with warnings.catch_warnings():
        # diffusers means to leave quanto behind
        warnings.simplefilter("ignore")
        config = config or diffusers.QuantoConfig(weights_dtype="int8")
    return dict(quantization_config=PipelineQuantizationConfig(quant_mapping={part: config}))


def conditions(pipe, emotion="awe"):
    "What a denoiser would read of a prompt with a word."
    words = emotion_words(pipe).attach(pipe)
    with words(emotion, seed=3), torch.no_grad():
        found = denoiser_of(pipe).encode(["<emotion> castle"], "cpu")
    words.detach()
    return list(found.values())


def quantised(pipe, family):
    "A denoiser of 8 bits reads the very words that the plain one reads, and paints with them."
    part = denoiser(pipe)
    made = reloaded(pipe, **in_eight_bits(part))
    kinds = {type(layer).__name__ for layer in getattr(made, part).modules()}
    pairs = zip(conditions(pipe), conditions(made), strict=True)
    # to rounding: a loaded tower may lie elsewhere in memory, where other kernels read it
    same = all(torch.allclose(torch.cat([*a]), torch.cat([*b]), atol=1e-6) for a, b in pairs)
    return "QLinear" in kinds and same and differ(made)


def compiled_denoiser(pipe, family):
    words = emotion_words(pipe).attach(pipe)
    settings = call_settings(pipe) | dict(num_inference_steps=1)
    plain = words.generate("awe", 1, **settings).images
    torch.nn.Module.compile(getattr(pipe, denoiser(pipe)), backend="eager")
    try:
        again = words.generate("awe", 1, **settings).images
        return largest_difference(again, plain) <= 1
    finally:
        torch._dynamo.reset()


def few_steps(pipe, family):
    "One step; where there is one, by a model that was distilled and reads the guidance."
    if family == "Stable Diffusion 1.x and 2.x":
        config = dict(pipe.unet.config, time_cond_proj_dim=32)
        config = {k: v for k, v in config.items() if not k.startswith("_")}
        parts = dict(unet=unet(**{k: config[k] for k in config if k not in FIXED}))
        parts["scheduler"] = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
        pipe.register_modules(**parts)
        made = sibling(pipe, "Latent consistency", "")
        return differ(made, num_inference_steps=1) and reads_guidance(pipe)
    if family == "FLUX.1":
        pipe.register_modules(transformer=distilled_flux(pipe.transformer))
        return differ(pipe, num_inference_steps=1) and reads_guidance(pipe)
    if family == "Stable Diffusion XL":
        pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    return differ(pipe, num_inference_steps=1, guidance_scale=0.0)


STEMS["Latent consistency"] = "LatentConsistencyModel"
# what `unet` sets itself
FIXED = ("sample_size", "down_block_types", "up_block_types")


def distilled_flux(model):
    settings = {k: v for k, v in model.config.items() if not k.startswith("_")}
    torch.manual_seed(3)
    return type(model)(**(settings | dict(guidance_embeds=True))).eval()


def reads_guidance(pipe):
    "Whether the scale of the guidance changes the picture of one pass."
    words = emotion_words(pipe).attach(pipe)
    settings = call_settings(pipe) | dict(num_inference_steps=1)
    one, other = (words.generate("awe", 1, guidance_scale=g, **settings).images for g in (1.5, 9))
    words.detach()
    return largest_difference(one, other) > 0


# ---- training

STAGE = dict(
    steps=2,
    batch_size=4,
    epochs=None,
    vae_size=32,
    warm_start=0,
    num_queries=2,
    head_width=16,
    eval_every=100,
    log_every=1,
    cpu=True,
)


def tiny_encoder():
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=1)
    torch.manual_seed(4)
    vision = ViTModel(ViTConfig(**sizes, image_size=64, patch_size=32), add_pooling_layer=False)
    config = JointConfig.preset("mini", **STAGE)
    return build_encoder(Backbone(vision), config, MIKELS.names, 24)


def stage_and_batch(pipe, text, mapper=None, **changes):
    "A stage on tiny models, and a batch of random images."
    config = JointConfig.preset("mini", **(STAGE | changes))
    rows = {
        kind: {f"{kind} {k}": [1 / 8] * 8 for k in range(len(own))} for kind, own in text.items()
    }
    retriever = AttributeRetriever(CorrelationTable(**rows, emotions=MIKELS), *text.values())
    torch.manual_seed(6)
    made = build_mapper(16, pipe, separate=True, **(mapper or {}))
    stage = stage_for(pipe)(tiny_encoder(), made, retriever, pipe, config, text)
    torch.manual_seed(7)
    batch = dict(
        pixel_values=torch.randn(2, 3, 64, 64),
        vae_pixel_values=torch.randn(2, 3, 32, 32).clamp(-1, 1),
        label=torch.tensor([0, 3]),
        scene=torch.tensor([0, 1]),
        objects=torch.ones(2, len(text["object"])),
    )
    return stage, batch


def training(pipe, family):
    "A step of stage 2: the denoiser's error reaches the words of every tower."
    torch.manual_seed(3)
    text = {"scene": torch.randn(4, 24), "object": torch.randn(5, 24)}
    stage, batch = stage_and_batch(pipe, text, joint_weights=(0, 0, 1.0))
    loss = stage.train().loss(batch)["loss"]
    loss.backward()
    moved = [p.grad is not None and p.grad.abs().max() > 0 for p in stage.mapper.parameters()]
    return bool(loss.isfinite()) and all(moved)


@dataclass(frozen=True)
class Ability:
    "A column of the table."

    name: str
    trial: object


ABILITIES = [
    Ability("text to image", text_to_image),
    Ability("several emotions", several_emotions),
    Ability("negative prompt", negative_prompt),
    Ability("image to image", image_to_image),
    Ability("inpainting", inpainting),
    Ability("ControlNet", with_control_net),
    Ability("ControlNet and mask", masked_control_net),
    Ability("IP-Adapter", ip_adapter),
    Ability("LoRA", lora),
    Ability("CPU offload", offloaded),
    Ability("8 bits", quantised),
    Ability("compiled denoiser", compiled_denoiser),
    Ability("few steps", few_steps),
    Ability("training", training),
]


def outcome(family, ability):
    "`yes`, `no`, or `-` where it is not there or not tried."
    try:
        return "yes" if ability.trial(build(family), family) else "no"
    except NotThere:
        return "-"


def write_table():
    "Try everything and write the table."
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["family", *(ability.name for ability in ABILITIES)])
        for family in BUILDERS:
            row = [outcome(family, ability) for ability in ABILITIES]
            print(family, row, file=sys.stderr)
            writer.writerow([family, *row])


def read_table():
    "{family: {ability: outcome}}, as committed."
    with TABLE.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {row.pop("family"): row for row in rows}


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_table()
