"What the pipeline notebook does not show: other schedulers, precisions, sizes, what a callback may do, and importing."
import subprocess, sys

import numpy as np, pytest, torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, StableDiffusionPipeline

import uniemo
from uniemo.conditioning import encode_prompts
from uniemo.mini import draw_spec, render
from uniemo.space import seeded_generators

FEW = dict(num_inference_steps=2, guidance_scale=3., judge=False)

@pytest.fixture(scope="module")
def pipe():
    p = uniemo.UniEmoPipeline.from_pretrained("mini"); p.set_progress_bar_config(disable=True); return p

def pixels(g): return np.stack([np.asarray(i, float) for i in g.images])


def test_importing_the_package_is_light():
    code = "import sys, uniemo; assert 'torch' not in sys.modules and uniemo.__version__; import pytest\nwith pytest.raises(AttributeError): uniemo.Pipeline"
    subprocess.run([sys.executable, "-c", code], check=True)

@pytest.mark.parametrize("kind", [DDIMScheduler, EulerAncestralDiscreteScheduler])
def test_other_schedulers_and_batches(pipe, kind):
    "Noise that a scheduler adds on the way comes from each image's own generator too."
    before = pipe.scheduler; pipe.scheduler = kind.from_config(before.config)
    try: whole, parts = pipe.generate("fear", 3, **FEW, batch_size=3), pipe.generate("fear", 3, **FEW, batch_size=2)
    finally: pipe.scheduler = before
    assert np.abs(pixels(whole) - pixels(parts)).max() <= 2

def test_seeds_prompts_and_guidance(pipe):
    a = pixels(pipe.generate("awe", 1, **FEW)); assert (a == pixels(pipe.generate("awe", 1, **FEW))).all()
    for changed in (dict(seed=1), dict(start=1), dict(guidance_scale=1.), dict(negative_prompt="a photo of a dog"), dict(prompt="<emotion> dog"), dict(intensity=2., prompt="a photo of a <emotion>")):
        assert np.abs(a - pixels(pipe.generate("awe", 1, **{**FEW, **changed}))).max() > 5, changed
    assert np.abs(pixels(pipe.generate("awe", 1, prompt="<emotion> dog", guidance_scale=1., intensity=0., num_inference_steps=2)) - pixels(pipe.generate("fear", 1, prompt="<emotion> dog", guidance_scale=1., intensity=0., num_inference_steps=2))).max() == 0

def test_guidance_rescale_keeps_the_deviation(pipe):
    "Full rescale: the guided prediction has the deviation of the emotional one, whatever the guidance; as diffusers' own pipeline does it."
    strong = dict(FEW, guidance_scale=12., num_inference_steps=4); a, b = (pixels(pipe.generate("awe", 2, guidance_rescale=r, **strong)) for r in (0., 1.)); assert a.std() > b.std() and np.abs(a - b).max() > 5
    assert (pixels(pipe.generate("awe", 1, guidance_rescale=1., **{**FEW, "guidance_scale": 1.})) == pixels(pipe.generate("awe", 1, **{**FEW, "guidance_scale": 1.}))).all()       # nothing guides: nothing to rescale
    plain = StableDiffusionPipeline(vae=pipe.vae, text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer, unet=pipe.unet, scheduler=pipe.scheduler, safety_checker=None, feature_extractor=None); plain.set_progress_bar_config(disable=True)
    generators = seeded_generators(0, 1); words, _ = pipe.draw_words({"<emotion>": "awe"}, generators); latents, _ = pipe.start_latents(generators, 64, 64, 4)
    embeds, none = (encode_prompts(pipe.text_encoder, pipe.tokenizer, p, w).detach() for p, w in (("<emotion>", words), ("", None)))
    theirs = plain(prompt_embeds=embeds, negative_prompt_embeds=none, latents=latents / pipe.scheduler.init_noise_sigma, guidance_scale=12., guidance_rescale=.7, num_inference_steps=4).images
    assert np.abs(np.stack([np.asarray(i, float) for i in theirs]) - pixels(pipe.generate("awe", 1, guidance_rescale=.7, **strong))).max() <= 1

def test_sizes_and_reference(pipe):
    assert pipe.generate("awe", 1, height=96, width=64, **FEW).images[0].size == (64, 96)
    photo = render(draw_spec(1, 1), 200).image; g = pipe.generate(reference=photo, num_images=2, **FEW); assert len(g) == 2 and g.emotion[0] in pipe.emotions
    with pytest.raises(ValueError, match="one reference image"): pipe.generate(reference=[photo, photo], **FEW)
    with pytest.raises(ValueError, match="2 images to edit for 3"): pipe.generate("awe", 3, image=[photo, photo], **FEW)

def test_a_callback_may_change_the_latents(pipe):
    def zero(p, i, t, kw): return {"latents": torch.zeros_like(kw["latents"])}
    a, b = (pixels(pipe.generate("awe", 2, seed=s, callback_on_step_end=zero, **FEW)) for s in (0, 1)); assert (a == b).all()

def test_bfloat16(pipe, tmp_path):
    half = uniemo.UniEmoPipeline.from_pretrained("mini", dtype=torch.bfloat16); half.set_progress_bar_config(disable=True)
    assert half.unet.dtype == half.encoder.dtype == torch.bfloat16
    g = half.generate("awe", 1, **{**FEW, "judge": True}); assert np.isfinite(pixels(g)).all() and 0 <= g.confidence[0] <= 1
    half.save_pretrained(tmp_path / "half"); assert uniemo.UniEmoPipeline.from_pretrained(tmp_path / "half", dtype=torch.bfloat16).mapper.dtype == torch.bfloat16

def test_parts_are_diffusers_components(pipe):
    assert set(pipe.components) == {"vae", "text_encoder", "tokenizer", "unet", "scheduler", "encoder", "mapper", "retriever"}
    assert pipe.to("cpu") is pipe and pipe.image_size == 64
    with pytest.raises(ValueError, match="no emotion space"): uniemo.UniEmoPipeline(**pipe.components).generate("awe", **FEW)
