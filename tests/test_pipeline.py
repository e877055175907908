"""What the pipeline notebook does not show: other schedulers, precisions, sizes, what a callback
may do, damaged folders."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import SDCFGCutoffCallback
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tiny_pipelines import build

import uniemo
from uniemo.conditioning import encode_prompts
from uniemo.files.shipped import shipped_folder
from uniemo.files.weights import WeightsError
from uniemo.fusion import PseudoWordMapper
from uniemo.mini import draw_spec, render
from uniemo.mini.diffusion import (
    balanced_prompts,
    diffusion_scores,
    few_steps,
    load_diffusion,
    sample,
)
from uniemo.mini.pretraining import strongest_clip
from uniemo.mini.worlds import world_of
from uniemo.results import crop_to
from uniemo.sampling import Sampling, wishes_of
from uniemo.space import seeded_generators

FEW = dict(num_inference_steps=2, guidance_scale=3.0, judge=False)


def quiet_pipeline(*args, **kwargs):
    pipe = uniemo.UniEmoPipeline.from_pretrained(*args, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pipe():
    return quiet_pipeline("mini")


@pytest.fixture(scope="module")
def photo():
    return render(draw_spec(1, 1), 64).image


def pixels(generated):
    images = getattr(generated, "images", generated)
    return np.stack([np.asarray(image, float) for image in images])


def largest_difference(a, b):
    return np.abs(pixels(a) - pixels(b)).max()


# ---- importing


def test_an_unknown_name_of_the_package_is_an_attribute_error():
    assert uniemo.__version__
    with pytest.raises(AttributeError):
        uniemo.Pipeline  # noqa: B018


def test_results_are_importable_from_the_pipeline():
    from uniemo import pipeline, results

    assert pipeline.Generated is results.Generated
    assert pipeline.Understanding is results.Understanding


# ---- sampling


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerAncestralDiscreteScheduler])
def test_other_schedulers_and_batches(pipe, kind):
    "Noise that a scheduler adds on the way comes from each image's own generator too."
    before = pipe.scheduler
    pipe.scheduler = kind.from_config(before.config)
    try:
        whole = pipe.generate("fear", 3, **FEW, batch_size=3)
        parts = pipe.generate("fear", 3, **FEW, batch_size=2)
    finally:
        pipe.scheduler = before
    assert largest_difference(whole, parts) <= 2


def test_four_steps_are_a_scheduler_and_two_settings():
    "What `few_steps` says to the mini world's own `sample`, in a plain diffusers pipeline."
    world = world_of("2.0")
    plain = load_diffusion(world=world)
    plain.set_progress_bar_config(disable=True)
    prompts = balanced_prompts(2, seed=3, world=world)[0]
    ours = sample(plain, prompts, **few_steps())
    how = dict(timestep_spacing="trailing")
    plain.scheduler = UniPCMultistepScheduler.from_config(plain.scheduler.config, **how)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    call = dict(num_inference_steps=4, guidance_scale=2.5, output_type="pt")
    theirs = plain(prompts, generator=generators, **call).images * 2 - 1
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.long
def test_four_steps_paint_what_is_asked():
    "Objects of 60 prompts that CLIP finds: near those of many steps, which are 0.968."
    world = world_of("2.0")
    clip, _ = strongest_clip(world)
    scores, _, _ = diffusion_scores(load_diffusion(world=world), clip, 60, **few_steps())
    assert scores["scene"] > 0.95 and scores["object"] > 0.85


def test_seeds_prompts_and_guidance(pipe):
    first = pipe.generate("awe", 1, **FEW)
    assert largest_difference(first, pipe.generate("awe", 1, **FEW)) == 0
    for changed in (
        dict(seed=1),
        dict(start=1),
        dict(guidance_scale=1.0),
        dict(negative_prompt="a photo of a dog"),
        dict(prompt="<emotion> dog"),
        dict(intensity=2.0, prompt="a photo of a <emotion>"),
    ):
        other = pipe.generate("awe", 1, **{**FEW, **changed})
        assert largest_difference(first, other) > 5, changed


def test_without_intensity_emotions_are_alike(pipe):
    neutral = dict(FEW, prompt="<emotion> dog", guidance_scale=1.0, intensity=0.0)
    awe, fear = (pipe.generate(emotion, 1, **neutral) for emotion in ("awe", "fear"))
    assert largest_difference(awe, fear) == 0


def test_settings_as_an_object_or_as_keywords(pipe):
    sampling = Sampling(**FEW)
    assert (
        largest_difference(
            pipe.generate("awe", 1, sampling=sampling), pipe.generate("awe", 1, **FEW)
        )
        == 0
    )
    both = pipe.generate("awe", 1, sampling=sampling, num_inference_steps=3)
    assert (
        largest_difference(both, pipe.generate("awe", 1, **{**FEW, "num_inference_steps": 3})) == 0
    )
    with pytest.raises(TypeError, match="did you mean num_inference_steps"):
        pipe.generate("awe", num_inference_step=3)


def test_guidance_rescale_keeps_the_deviation(pipe):
    "Full rescale: the guided prediction has the deviation of the emotional one."
    strong = dict(FEW, guidance_scale=12.0, num_inference_steps=4)
    plain, rescaled = (pipe.generate("awe", 2, guidance_rescale=r, **strong) for r in (0.0, 1.0))
    assert pixels(plain).std() > pixels(rescaled).std()
    assert largest_difference(plain, rescaled) > 5
    # nothing guides: nothing to rescale
    unguided = dict(FEW, guidance_scale=1.0)
    rescaled = pipe.generate("awe", 1, guidance_rescale=1.0, **unguided)
    assert largest_difference(rescaled, pipe.generate("awe", 1, **unguided)) == 0


def test_diffusers_own_pipeline_paints_the_same(pipe):
    "From embeddings that were made in another way, and noise that was drawn here."
    parts = {
        k: pipe.components[k] for k in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    }
    plain = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None)
    plain.set_progress_bar_config(disable=True)
    generators = seeded_generators(0, 1)
    words = {"<emotion>": pipe.words.draw("awe", generators)[0][0]}
    latents = torch.randn(1, 4, 16, 16, generator=generators[0])
    guidance = dict(guidance_scale=12.0, guidance_rescale=0.7, num_inference_steps=4)
    with torch.no_grad():
        states = encode_prompts(pipe.text_encoder, pipe.tokenizer, "<emotion>", words)
        nothing = encode_prompts(pipe.text_encoder, pipe.tokenizer, "")
    theirs = plain(
        prompt_embeds=states, negative_prompt_embeds=nothing, latents=latents, **guidance
    ).images
    assert largest_difference(theirs, pipe.generate("awe", 1, **{**FEW, **guidance})) <= 1


def test_intensity_is_the_second_term_of_guidance(pipe):
    "Against a loop that is written out: three prompts, one pass each, the formula by hand."
    steps, scale, intensity = 4, 5.0, 1.7
    generators = seeded_generators(0, 1)
    words = {"<emotion>": pipe.words.draw("awe", generators)[0][0]}
    latents = torch.randn(1, 4, 16, 16, generator=generators[0])
    with torch.no_grad():
        negative, neutral = (
            encode_prompts(pipe.text_encoder, pipe.tokenizer, text) for text in ("", "dog")
        )
        emotional = encode_prompts(pipe.text_encoder, pipe.tokenizer, "<emotion> dog", words)
        scheduler = pipe.scheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            n, m, p = (
                pipe.unet(latents, t, encoder_hidden_states=states).sample
                for states in (negative, neutral, emotional)
            )
            guided = n + scale * (m - n + intensity * (p - m))
            latents = scheduler.step(guided, t, latents).prev_sample
        pixels_here = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    wanted = ((pixels_here / 2 + 0.5).clamp(0, 1) * 255).round()[0].permute(1, 2, 0).numpy()
    call = dict(prompt="<emotion> dog", intensity=intensity, guidance_scale=scale, judge=False)
    got = pipe.generate("awe", 1, num_inference_steps=steps, **call)
    assert np.abs(pixels(got)[0] - wanted).max() <= 1


def test_sizes_and_reference(pipe, photo):
    assert pipe.generate("awe", 1, height=96, width=64, **FEW).images[0].size == (64, 96)
    large = render(draw_spec(1, 1), 200).image
    generated = pipe.generate(reference=large, num_images=2, **FEW)
    assert len(generated) == 2 and generated.emotion[0] in pipe.emotions
    with pytest.raises(ValueError, match="one reference image"):
        pipe.generate(reference=[photo, photo], **FEW)
    with pytest.raises(ValueError, match="2 images to edit for 3"):
        pipe.generate("awe", 3, image=[photo, photo], **FEW)


def test_everything_is_looked_at_before_anything_is_computed(pipe, photo, monkeypatch):
    monkeypatch.setattr(pipe.unet, "forward", lambda *a, **k: pytest.fail("the U-Net was called"))
    wrong = [
        (dict(guidance_scale=float("nan")), "guidance_scale is a finite number"),
        (dict(intensity=float("inf")), "intensity is a finite number"),
        (dict(guidance_rescale=2), "guidance_rescale is a share from 0 to 1"),
        (dict(strength=0), "strength is a share from 0 to 1, above 0"),
        (dict(negative_prompt=["dog", "sky"]), "negative_prompt is one text"),
        (dict(prompt=["<emotion>"]), "prompt is one text"),
        (dict(height=-64), "height is a whole number"),
        (dict(height=0), "height is a whole number"),
        (dict(width=60), "multiple of"),
        (dict(num_images=2.5), "num_images is a whole number"),
        (dict(num_images="2"), "num_images"),
        (dict(num_inference_steps=2.5), "num_inference_steps"),
        (dict(emotion=["awe", "fear"]), "one name or a mixture"),
        (dict(emotion=8), "an index is 0 to 7"),
        (dict(valence=1.0, arousal=0.0), "not both"),
        (dict(emotion=None, valence=1.0), "both valence and arousal"),
        (dict(seed=2**32), "below 2\\*\\*32"),
        (dict(seed=1.0), "integers"),
        (dict(start=1_000_003), "1,000,003 samples"),
        (dict(emotion=None, reference=photo, prompt="<emotion:awe>"), "reference image's word"),
        (dict(callback_on_step_end_tensor_inputs=["noise"]), "there are latents, prompt_embeds"),
    ]
    for call, said in wrong:
        with pytest.raises((ValueError, TypeError), match=said):
            pipe.generate(**{"emotion": "awe", **FEW, **call})


def test_what_diffusers_users_are_used_to(pipe):
    "An index, no negative prompt, guidance of 1 or less, a word that the tokenizer knows."

    def painted(**call):
        return pipe.generate(**{**FEW, **call})

    assert painted(emotion=1).emotion == ["awe"]
    awe = painted(emotion="awe")
    assert largest_difference(painted(emotion=1), awe) == 0
    assert largest_difference(painted(emotion="awe", negative_prompt=None), awe) == 0
    unguided = [painted(emotion="awe", guidance_scale=scale) for scale in (0, 1.0)]
    assert largest_difference(*unguided) == 0
    assert largest_difference(unguided[0], painted(emotion="fear", guidance_scale=0)) > 0


def test_a_word_that_the_tokenizer_knows(pipe):
    known = copy.deepcopy(pipe.tokenizer)
    known.add_tokens("<cat-toy>")
    with pytest.raises(ValueError, match="unknown placeholder '<cat-toy>'"):
        pipe.generate("awe", prompt="<emotion> <cat-toy>", **FEW)
    wishes = wishes_of("<emotion> <cat-toy>", "awe", False, pipe.emotions, known)
    assert wishes == {"<emotion>": "awe"}


# ---- callbacks


def test_a_callback_may_change_the_latents(pipe):
    def zero(pipeline, step, timestep, tensors):
        return {"latents": torch.zeros_like(tensors["latents"])}

    a, b = (pipe.generate("awe", 2, seed=s, callback_on_step_end=zero, **FEW) for s in (0, 1))
    assert largest_difference(a, b) == 0


@pytest.fixture
def unet_batches(pipe):
    "Sizes of the batches that the U-Net sees."
    seen, real = [], pipe.unet.forward

    def forward(latents, *args, **kwargs):
        seen.append(len(latents))
        return real(latents, *args, **kwargs)

    pipe.unet.forward = forward
    yield seen
    del pipe.unet.forward


FOUR = {**FEW, "num_inference_steps": 4}


@pytest.mark.parametrize("intensity", [1.0, 2.0])
def test_guidance_cut_off(pipe, unet_batches, intensity):
    "Guidance cut off after the first step is guidance only there."
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    call = dict(prompt="<emotion> dog", intensity=intensity, callback_on_step_end=cutoff)
    pipe.generate("awe", 2, **FOUR, **call)
    assert unet_batches == [4 if intensity == 1 else 6, 2, 2, 2]
    assert pipe.diffusion.num_timesteps == 4
    assert not pipe.diffusion.do_classifier_free_guidance


def test_an_interrupted_run_ends(pipe, unet_batches):
    def stop(pipeline, step, timestep, tensors):
        pipeline._interrupt = step == 1

    pipe.generate("awe", 1, **FOUR, callback_on_step_end=stop)
    assert unet_batches == [2, 2] and pipe.diffusion.interrupt


def test_embeddings_may_be_changed_but_not_their_shape(pipe):
    def swap(pipeline, step, timestep, tensors):
        return dict(prompt_embeds=tensors["prompt_embeds"].flip(0))

    def cut(pipeline, step, timestep, tensors):
        return dict(prompt_embeds=tensors["prompt_embeds"][:1])

    asks = dict(FEW, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    a, b = (pipe.generate("awe", 1, callback_on_step_end=c, **asks) for c in (None, swap))
    assert largest_difference(a, b) > 5
    with pytest.raises(ValueError, match="prompt_embeds"):
        pipe.generate("awe", 1, callback_on_step_end=cut, **asks)


# ---- precision, offloading


def test_bfloat16(tmp_path):
    half = quiet_pipeline("mini", dtype=torch.bfloat16)
    assert half.unet.dtype == half.encoder.dtype == torch.bfloat16
    generated = half.generate("awe", 1, **{**FEW, "judge": True})
    assert np.isfinite(pixels(generated)).all() and 0 <= generated.confidence[0] <= 1
    half.save_pretrained(tmp_path / "half")
    again = quiet_pipeline(tmp_path / "half", dtype=torch.bfloat16)
    assert again.mapper.dtype == again.unet.dtype == torch.bfloat16


@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading(pipe, photo, how):
    "Parts come and go between memory and device; here both are the CPU. The images are the same."
    if how == "enable_sequential_cpu_offload":
        plain = StableDiffusionPipeline.from_pretrained(
            shipped_folder("diffusion"), safety_checker=None
        )
        plain.set_progress_bar_config(disable=True)
        plain.enable_sequential_cpu_offload(device="cpu")
        try:
            plain("a photo of a dog", num_inference_steps=1)
        except TypeError as error:
            pytest.skip(f"these versions cannot offload Stable Diffusion so: {str(error)[:60]}")
    other = quiet_pipeline("mini")
    getattr(other, how)(device="cpu")
    for asked in (
        dict(emotion="awe"),
        dict(reference=photo),
        dict(emotion="awe", image=photo),
        dict(emotion="awe", prompt="a photo of a <emotion>", intensity=2.0),
    ):
        a, b = (p.generate(**asked, **FEW) for p in (pipe, other))
        assert largest_difference(a, b) == 0, asked
    a, b = (p.understand(photo).probabilities for p in (pipe, other))
    assert np.allclose(a, b, atol=1e-6)


# ---- parts


def test_parts_are_diffusers_components(pipe):
    names = "vae text_encoder tokenizer unet scheduler encoder mapper retriever"
    assert set(pipe.components) == set(names.split())
    assert pipe.to("cpu") is pipe and pipe.image_size == 64
    with pytest.raises(ValueError, match="no emotion space"):
        uniemo.UniEmoPipeline(**pipe.components).generate("awe", **FEW)


def test_data_that_name_scenes_only(pipe, photo):
    some = copy.deepcopy(pipe.retriever)
    some.register_to_config(object_names=[])
    some.object_features, some.object_table = some.object_features[:0], some.object_table[:0]
    other = uniemo.UniEmoPipeline(**{**pipe.components, "retriever": some}, space=pipe.space)
    read = other.understand([photo, photo])
    assert read.scene == pipe.understand([photo, photo]).scene and read.object is None
    assert read.to_pandas().object.tolist() == [None, None]


def test_emotions_in_another_order_are_refused(pipe):
    turned = copy.deepcopy(pipe.retriever)
    turned.register_to_config(emotions=pipe.emotions[::-1])
    with pytest.raises(ValueError, match="the retriever lists the emotions sadness"):
        uniemo.UniEmoPipeline(**{**pipe.components, "retriever": turned}, space=pipe.space)
    space = copy.deepcopy(pipe.space)
    space.settings["emotions"] = space.emotions = pipe.emotions[::-1]
    with pytest.raises(ValueError, match="the space lists"):
        uniemo.UniEmoPipeline(**pipe.components, space=space)


# ---- what diffusers can do


def test_a_lora_that_a_user_loads(pipe):
    other = quiet_pipeline("mini")
    before = other.generate("awe", 1, **FEW)
    torch.manual_seed(0)
    settings = LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"])
    other.unet.add_adapter(settings, "made")
    states = get_peft_model_state_dict(other.unet, adapter_name="made")
    other.unet.delete_adapters("made")
    other.load_lora_weights({f"unet.{k}": v for k, v in states.items()}, adapter_name="mine")
    loaded = other.generate("awe", 1, **FEW)
    assert largest_difference(before, loaded) > 0
    assert other.diffusion.get_active_adapters() == ["mine"]
    other.diffusion.unload_lora_weights()
    assert largest_difference(before, other.generate("awe", 1, **FEW)) == 0


def test_the_vae_in_slices(pipe):
    plain = pipe.generate("awe", 2, **FEW)
    pipe.diffusion.vae.enable_slicing()
    try:
        assert pipe.vae.use_slicing
        assert largest_difference(plain, pipe.generate("awe", 2, **FEW)) <= 1
    finally:
        pipe.vae.disable_slicing()


def test_diffusion_follows_the_parts(pipe):
    diffusion = pipe.diffusion
    assert diffusion is pipe.diffusion and diffusion.unet is pipe.unet
    before = pipe.scheduler
    pipe.scheduler = DDIMScheduler.from_config(before.config)
    try:
        assert pipe.diffusion is diffusion and diffusion.scheduler is pipe.scheduler
    finally:
        pipe.scheduler = before
    editor = StableDiffusionImg2ImgPipeline.from_pipe(pipe.diffusion)
    assert editor.vae is pipe.vae
    assert "diffusion" not in pipe.components


def test_words_of_the_negative_prompt(pipe):
    plain, without = (
        pipe.generate("awe", 1, negative_prompt=text, **FEW) for text in ("", "<emotion:fear>")
    )
    assert largest_difference(plain, without) > 5
    with pytest.raises(ValueError, match="unknown emotion 'joy'"):
        pipe.generate("awe", 1, negative_prompt="<emotion:joy>", **FEW)


def test_a_distilled_unet_reads_the_guidance(pipe):
    "Its scale is an input, not a mixture: one pass a step, and intensity goes along."
    torch.manual_seed(0)
    config = {k: v for k, v in pipe.unet.config.items() if not k.startswith("_")}
    distilled = type(pipe.unet)(**{**config, "time_cond_proj_dim": 8}).eval()
    missing = distilled.load_state_dict(pipe.unet.state_dict(), strict=False).missing_keys
    assert missing == ["time_embedding.cond_proj.weight"]
    torch.nn.init.normal_(distilled.time_embedding.cond_proj.weight)
    scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    parts = {**pipe.components, "unet": distilled, "scheduler": scheduler}
    other = uniemo.UniEmoPipeline(**parts, space=pipe.space)
    other.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=2, judge=False, prompt="<emotion> dog")
    images = [other.generate("awe", 2, guidance_scale=g, **call) for g in (1.5, 8.0)]
    assert largest_difference(*images) > 0
    stronger = other.generate("awe", 2, guidance_scale=8.0, intensity=2.0, **call)
    assert largest_difference(images[1], stronger) > 0
    alone = other.generate("awe", 1, guidance_scale=8.0, intensity=2.0, start=1, **call)
    assert largest_difference(alone.images, stronger.images[1:]) <= 2


FAMILIES_REFUSED = ["Stable Diffusion XL", "Stable Diffusion 3", "FLUX.1", "PixArt-Sigma", "Sana"]


@pytest.mark.parametrize("family", [*FAMILIES_REFUSED, "Z-Image"])
def test_other_families_are_refused_when_made(pipe, family, tmp_path):
    "By the pipeline, by its folder before weights are read, and by its parts."
    other = build(family)
    own = dict(encoder=pipe.encoder, mapper=pipe.mapper, retriever=pipe.retriever)
    said = f"not with a {type(other).__name__}: EmotionWords"
    with pytest.raises(ValueError, match=said):
        uniemo.UniEmoPipeline.from_diffusion(other, **own)
    with pytest.raises(ValueError, match=said):
        uniemo.UniEmoPipeline.from_pipe(other, **own)
    (tmp_path / "model_index.json").write_text(json.dumps(dict(_class_name=type(other).__name__)))
    with pytest.raises(ValueError, match=said):
        uniemo.UniEmoPipeline.from_diffusion(tmp_path, **own)
    parts = {**pipe.components, "unet": getattr(other, "unet", None) or other.transformer}
    with pytest.raises(ValueError, match="EmotionWords"):
        uniemo.UniEmoPipeline(**parts)


def test_an_inpainting_unet_is_refused(pipe):
    config = {k: v for k, v in pipe.unet.config.items() if not k.startswith("_")}
    inpainting = type(pipe.unet)(**{**config, "in_channels": 9})
    with pytest.raises(ValueError, match="9 channels, as that of an inpainting model.*EmotionWo"):
        uniemo.UniEmoPipeline(**{**pipe.components, "unet": inpainting})


# ---- folders


@pytest.fixture(scope="module")
def whole(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "whole"
    pipe.save_pretrained(folder)
    return folder


def test_loading_takes_what_diffusers_takes(pipe, whole):
    half = quiet_pipeline("mini", torch_dtype=torch.float16, safety_checker=None)
    assert half.unet.dtype == half.encoder.dtype == torch.float16
    for name in ("mini", whole):
        own = quiet_pipeline(name, encoder=pipe.encoder, space=pipe.space)
        assert own.encoder is pipe.encoder and own.space is pipe.space
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        quiet_pipeline("runs/last/uniemo")


def test_a_saved_pipeline_paints_the_same(pipe, whole):
    a, b = (p.generate("awe", 1, **FEW) for p in (pipe, quiet_pipeline(whole)))
    assert largest_difference(a, b) == 0


def test_from_pipe(pipe):
    again = uniemo.UniEmoPipeline.from_pipe(pipe)
    assert again.unet is pipe.unet and again.space is pipe.space
    plain = StableDiffusionPipeline.from_pretrained(
        shipped_folder("diffusion"), safety_checker=None
    )
    own = dict(encoder=pipe.encoder, mapper=pipe.mapper, retriever=pipe.retriever)
    made = uniemo.UniEmoPipeline.from_pipe(plain, **own, space=pipe.space)
    assert made.vae is plain.vae and made.space is pipe.space


@pytest.mark.parametrize("kind", ["whole", "own"])
def test_diffusers_loader_says_which_class_to_use(pipe, whole, tmp_path, kind):
    folder = whole
    if kind == "own":
        folder = tmp_path / "own"
        pipe.save_pretrained(folder, whole=False, diffusion="mini")
    with pytest.raises(AttributeError, match="uniemo.UniEmoPipeline"):
        DiffusionPipeline.from_pretrained(folder)


def test_a_run_holds_its_pipeline(pipe, tmp_path):
    run = tmp_path / "runs" / "20261126-joint"
    pipe.save_pretrained(run / "uniemo", whole=False, diffusion="mini")
    (run / "figures").mkdir()
    assert quiet_pipeline(run).emotions == pipe.emotions
    pipe.save_pretrained(run / "second", whole=False, diffusion="mini")
    with pytest.raises(FileNotFoundError, match="several UniEmo pipelines: give one of .*second"):
        quiet_pipeline(run)
    with pytest.raises(FileNotFoundError, match=r"figures holds no UniEmo pipeline.*uniemo\.json"):
        quiet_pipeline(run / "figures")


def change_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "encoder", "mapper", "retriever"])
def test_incomplete_and_infinite_weights_are_refused(whole, tmp_path, part):
    folder = shutil.copytree(whole, tmp_path / "damaged")
    file = next((folder / part).glob("*.safetensors"))
    names = [name for name, tensor in load_file(file).items() if tensor.is_floating_point()]

    def not_a_number(tensors):
        tensors[names[-1]].view(-1)[0] = float("nan")

    change_tensors(file, not_a_number)
    with pytest.raises(WeightsError, match=f"damaged.{part}.* not finite"):
        quiet_pipeline(folder)
    change_tensors(file, lambda tensors: tensors.pop(names[-1]))
    with pytest.raises(WeightsError, match=f"damaged.{part}.*lacks"):
        quiet_pipeline(folder)


def test_a_mapper_without_tensors_is_refused(tmp_path):
    PseudoWordMapper(8, 4).save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({}, file, {"format": "pt"})
    with pytest.raises(WeightsError, match="lacks mapper"):
        PseudoWordMapper.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(WeightsError, match="holds no whole model"):
        PseudoWordMapper.from_pretrained(tmp_path)


def test_a_note_that_is_no_json_is_refused(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "damaged")
    (folder / "uniemo.json").write_text("<!doctype html>")
    with pytest.raises(ValueError, match="uniemo.json is a web page"):
        quiet_pipeline(folder)


def test_the_note_may_have_a_byte_order_mark(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "marked")
    note = json.loads((folder / "uniemo.json").read_text())
    (folder / "uniemo.json").write_text("\ufeff" + json.dumps(note), encoding="utf-8")
    assert quiet_pipeline(folder).diffusion_name is None


# ---- results and images


def test_saved_images_do_not_replace_each_other(pipe, tmp_path):
    dog, balloon = (
        pipe.generate("awe", 2, prompt=f"<emotion> {thing}", **FEW) for thing in ("dog", "balloon")
    )
    table = (dog + balloon).save(tmp_path / "a")
    assert table.path.is_unique and len(list((tmp_path / "a").glob("*.png"))) == 4
    with pytest.raises(FileExistsError, match="images.csv"):
        (dog + balloon).save(tmp_path / "a")


def test_bytes_are_read_as_bytes(pipe, photo):
    tensor = torch.from_numpy(np.asarray(photo).copy()).permute(2, 0, 1)[None]
    want = pipe.understand(photo).probabilities
    for images in (tensor, tensor[0], tensor / 255):
        assert np.allclose(pipe.understand(images).probabilities, want, atol=1e-5)
    for images, said in (
        (tensor / 127.5 - 1, "must lie in \\[0, 1\\]"),
        (tensor * float("nan"), "not finite"),
    ):
        with pytest.raises(ValueError, match=said):
            pipe.understand(images)


def test_editing_keeps_the_aspect():
    "A wide picture edited at another ratio is cropped, not stretched: a circle stays one."
    wide = Image.new("L", (256, 128))
    ImageDraw.Draw(wide).ellipse((96, 32, 160, 96), fill=255)
    for size in ((64, 64), (128, 64), (64, 128)):
        shown = np.asarray(crop_to(wide, *size).resize(size)) > 127
        height, width = (np.ptp(np.flatnonzero(shown.any(axis))) for axis in (1, 0))
        assert abs(height - width) <= 1
