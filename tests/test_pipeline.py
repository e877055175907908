"What the pipeline notebook does not show: other schedulers, precisions, sizes, what a callback may do, and importing."

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, StableDiffusionPipeline
from diffusers.callbacks import SDCFGCutoffCallback

import uniemo
from uniemo.conditioning import encode_prompts
from uniemo.files.shipped import shipped_folder
from uniemo.mini.world import draw_spec, render
from uniemo.space import seeded_generators

FEW = dict(num_inference_steps=2, guidance_scale=3.0, judge=False)


@pytest.fixture(scope="module")
def pipe():
    p = uniemo.UniEmoPipeline.from_pretrained("mini")
    p.set_progress_bar_config(disable=True)
    return p


def pixels(g):
    return np.stack([np.asarray(i, float) for i in g.images])


def test_importing_the_package_is_light():
    code = "import sys, uniemo; assert 'torch' not in sys.modules and uniemo.__version__; import pytest\nwith pytest.raises(AttributeError): uniemo.Pipeline"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerAncestralDiscreteScheduler])
def test_other_schedulers_and_batches(pipe, kind):
    "Noise that a scheduler adds on the way comes from each image's own generator too."
    before = pipe.scheduler
    pipe.scheduler = kind.from_config(before.config)
    try:
        whole, parts = (
            pipe.generate("fear", 3, **FEW, batch_size=3),
            pipe.generate("fear", 3, **FEW, batch_size=2),
        )
    finally:
        pipe.scheduler = before
    assert np.abs(pixels(whole) - pixels(parts)).max() <= 2


def test_seeds_prompts_and_guidance(pipe):
    a = pixels(pipe.generate("awe", 1, **FEW))
    assert (a == pixels(pipe.generate("awe", 1, **FEW))).all()
    for changed in (
        dict(seed=1),
        dict(start=1),
        dict(guidance_scale=1.0),
        dict(negative_prompt="a photo of a dog"),
        dict(prompt="<emotion> dog"),
        dict(intensity=2.0, prompt="a photo of a <emotion>"),
    ):
        assert np.abs(a - pixels(pipe.generate("awe", 1, **{**FEW, **changed}))).max() > 5, changed
    assert (
        np.abs(
            pixels(
                pipe.generate(
                    "awe",
                    1,
                    prompt="<emotion> dog",
                    guidance_scale=1.0,
                    intensity=0.0,
                    num_inference_steps=2,
                )
            )
            - pixels(
                pipe.generate(
                    "fear",
                    1,
                    prompt="<emotion> dog",
                    guidance_scale=1.0,
                    intensity=0.0,
                    num_inference_steps=2,
                )
            )
        ).max()
        == 0
    )


def test_guidance_rescale_keeps_the_deviation(pipe):
    "Full rescale: the guided prediction has the deviation of the emotional one, whatever the guidance; as diffusers' own pipeline does it."
    strong = dict(FEW, guidance_scale=12.0, num_inference_steps=4)
    a, b = (pixels(pipe.generate("awe", 2, guidance_rescale=r, **strong)) for r in (0.0, 1.0))
    assert a.std() > b.std() and np.abs(a - b).max() > 5
    assert (
        pixels(pipe.generate("awe", 1, guidance_rescale=1.0, **{**FEW, "guidance_scale": 1.0}))
        == pixels(pipe.generate("awe", 1, **{**FEW, "guidance_scale": 1.0}))
    ).all()  # nothing guides: nothing to rescale
    plain = StableDiffusionPipeline(
        vae=pipe.vae,
        text_encoder=pipe.text_encoder,
        tokenizer=pipe.tokenizer,
        unet=pipe.unet,
        scheduler=pipe.scheduler,
        safety_checker=None,
        feature_extractor=None,
    )
    plain.set_progress_bar_config(disable=True)
    generators = seeded_generators(0, 1)
    words, _ = pipe.draw_words({"<emotion>": "awe"}, generators)
    latents, _ = pipe.start_latents(generators, 64, 64, 4)
    embeds, none = (
        encode_prompts(pipe.text_encoder, pipe.tokenizer, p, w).detach()
        for p, w in (("<emotion>", words), ("", None))
    )
    theirs = plain(
        prompt_embeds=embeds,
        negative_prompt_embeds=none,
        latents=latents / pipe.scheduler.init_noise_sigma,
        guidance_scale=12.0,
        guidance_rescale=0.7,
        num_inference_steps=4,
    ).images
    assert (
        np.abs(
            np.stack([np.asarray(i, float) for i in theirs])
            - pixels(pipe.generate("awe", 1, guidance_rescale=0.7, **strong))
        ).max()
        <= 1
    )


def test_sizes_and_reference(pipe):
    assert pipe.generate("awe", 1, height=96, width=64, **FEW).images[0].size == (64, 96)
    photo = render(draw_spec(1, 1), 200).image
    g = pipe.generate(reference=photo, num_images=2, **FEW)
    assert len(g) == 2 and g.emotion[0] in pipe.emotions
    with pytest.raises(ValueError, match="one reference image"):
        pipe.generate(reference=[photo, photo], **FEW)
    with pytest.raises(ValueError, match="2 images to edit for 3"):
        pipe.generate("awe", 3, image=[photo, photo], **FEW)


def test_a_callback_may_change_the_latents(pipe):
    def zero(p, i, t, kw):
        return {"latents": torch.zeros_like(kw["latents"])}

    a, b = (
        pixels(pipe.generate("awe", 2, seed=s, callback_on_step_end=zero, **FEW)) for s in (0, 1)
    )
    assert (a == b).all()


def test_bfloat16(pipe, tmp_path):
    half = uniemo.UniEmoPipeline.from_pretrained("mini", dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.unet.dtype == half.encoder.dtype == torch.bfloat16
    g = half.generate("awe", 1, **{**FEW, "judge": True})
    assert np.isfinite(pixels(g)).all() and 0 <= g.confidence[0] <= 1
    half.save_pretrained(tmp_path / "half")
    assert (
        uniemo.UniEmoPipeline.from_pretrained(tmp_path / "half", dtype=torch.bfloat16).mapper.dtype
        == torch.bfloat16
    )


def test_parts_are_diffusers_components(pipe):
    assert set(pipe.components) == {
        "vae",
        "text_encoder",
        "tokenizer",
        "unet",
        "scheduler",
        "encoder",
        "mapper",
        "retriever",
    }
    assert pipe.to("cpu") is pipe and pipe.image_size == 64
    with pytest.raises(ValueError, match="no emotion space"):
        uniemo.UniEmoPipeline(**pipe.components).generate("awe", **FEW)


def test_everything_is_looked_at_before_anything_is_computed(pipe, monkeypatch):
    monkeypatch.setattr(pipe.unet, "forward", lambda *a, **k: pytest.fail("the U-Net was called"))
    for wrong, say in (
        (dict(guidance_scale=float("nan")), "guidance_scale is a finite number"),
        (dict(intensity=float("inf")), "intensity is a finite number"),
        (dict(negative_prompt=["dog", "sky"]), "negative_prompt is one text"),
        (dict(height=-64), "height is a whole number"),
        (dict(height=0), "height is a whole number"),
        (dict(width=60), "multiple of"),
        (dict(num_images=2.5), "num_images is a whole number"),
        (dict(num_images="2"), "num_images"),
        (dict(num_inference_steps=2.5), "num_inference_steps"),
        (dict(emotion=["awe", "fear"]), "one name or a mixture"),
        (dict(emotion=8), "an index is 0 to 7"),
        (dict(seed=2**32), "below 2\\*\\*32"),
        (dict(seed=1.0), "integers"),
        (dict(start=1_000_003), "1,000,003 samples"),
        (
            dict(emotion=None, reference=render(draw_spec(1, 1), 64).image, prompt="<emotion:awe>"),
            "reference image's word",
        ),
        (
            dict(callback_on_step_end=print, callback_on_step_end_tensor_inputs=["noise"]),
            "no 'noise'; there are latents, prompt_embeds",
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=say):
            pipe.generate(**{"emotion": "awe", **FEW, **wrong})


def test_what_diffusers_users_are_used_to(pipe):
    "An index, no negative prompt, guidance of 1 or less, a word that the tokenizer knows."
    same = lambda a, b: (
        pixels(pipe.generate(**{**FEW, **a})) == pixels(pipe.generate(**{**FEW, **b}))
    ).all()
    g = pipe.generate(1, **FEW)
    assert g.emotion == ["awe"]
    assert (
        same(dict(emotion=1), dict(emotion="awe"))
        and same(dict(emotion="awe", negative_prompt=None), dict(emotion="awe"))
        and same(dict(emotion="awe", guidance_scale=0), dict(emotion="awe", guidance_scale=1.0))
    )
    assert not same(dict(emotion="awe", guidance_scale=0), dict(emotion="fear", guidance_scale=0))
    known = copy.deepcopy(pipe.tokenizer)
    known.add_tokens("<cat-toy>")
    other = uniemo.UniEmoPipeline(**{**pipe.components, "tokenizer": known}, space=pipe.space)
    with pytest.raises(ValueError, match="unknown placeholder '<cat-toy>'"):
        pipe.generate("awe", prompt="<emotion> <cat-toy>", **FEW)
    assert other.check_inputs(
        "awe", "<emotion> <cat-toy>", 1, None, None, None, None, 0.5, 64, 64, 2, 1, 1.0
    ) == {"<emotion>": "awe"}


def test_callbacks_of_diffusers(pipe):
    "Guidance cut off after the first step is guidance only there; an interrupted run ends; embeddings may be changed, but not their shape."
    seen, real = [], pipe.unet.forward

    def forward(x, *a, **k):
        seen.append(len(x))
        return real(x, *a, **k)

    pipe.unet.forward = forward
    try:
        pipe.generate(
            "awe",
            2,
            **{**FEW, "num_inference_steps": 4},
            callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0),
        )
        assert (
            seen == [4, 2, 2, 2]
            and pipe.num_timesteps == 4
            and not pipe.do_classifier_free_guidance
        )
        seen.clear()
        pipe.generate(
            "awe",
            1,
            **{**FEW, "num_inference_steps": 4},
            callback_on_step_end=lambda p, i, t, kw: setattr(p, "_interrupt", i == 1),
        )
        assert seen == [2, 2]
    finally:
        del pipe.unet.forward
    swap = lambda p, i, t, kw: dict(prompt_embeds=kw["prompt_embeds"].flip(0))
    a, b = (
        pixels(
            pipe.generate(
                "awe",
                1,
                callback_on_step_end=c,
                callback_on_step_end_tensor_inputs=["prompt_embeds"],
                **FEW,
            )
        )
        for c in (None, swap)
    )
    assert np.abs(a - b).max() > 5
    with pytest.raises(ValueError, match="prompt_embeds"):
        pipe.generate(
            "awe",
            1,
            callback_on_step_end=lambda p, i, t, kw: dict(prompt_embeds=kw["prompt_embeds"][:1]),
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
            **FEW,
        )


@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading(pipe, how):
    "Parts come and go between memory and device; here both are the CPU. The images are the same."
    if how == "enable_sequential_cpu_offload":
        plain = StableDiffusionPipeline.from_pretrained(
            shipped_folder("diffusion"), safety_checker=None
        )
        plain.set_progress_bar_config(disable=True)
        plain.enable_sequential_cpu_offload(device="cpu")
        try:
            plain("a photo of a dog", num_inference_steps=1)
        except TypeError as e:
            pytest.skip(
                f"these versions cannot offload Stable Diffusion itself to the CPU layer by layer: {str(e)[:60]}"
            )
    other = uniemo.UniEmoPipeline.from_pretrained("mini")
    other.set_progress_bar_config(disable=True)
    getattr(other, how)(device="cpu")
    photo = render(draw_spec(1, 1), 64).image
    for asked in (
        dict(emotion="awe"),
        dict(reference=photo),
        dict(emotion="awe", image=photo),
        dict(emotion="awe", prompt="a photo of a <emotion>", intensity=2.0),
    ):
        assert (
            pixels(pipe.generate(**asked, **FEW)) == pixels(other.generate(**asked, **FEW))
        ).all(), asked
    assert np.allclose(
        pipe.understand(photo).probabilities, other.understand(photo).probabilities, atol=1e-6
    )


def test_emotions_in_another_order_are_refused(pipe):
    turned = copy.deepcopy(pipe.retriever)
    turned.register_to_config(emotions=pipe.emotions[::-1])
    with pytest.raises(ValueError, match="the retriever lists the emotions sadness"):
        uniemo.UniEmoPipeline(**{**pipe.components, "retriever": turned}, space=pipe.space)
    space = copy.deepcopy(pipe.space)
    space.settings["emotions"] = pipe.emotions[::-1]
    space.emotions = pipe.emotions[::-1]
    with pytest.raises(ValueError, match="the space lists"):
        uniemo.UniEmoPipeline(**pipe.components, space=space)


def test_loading_takes_what_diffusers_takes(pipe, tmp_path):
    half = uniemo.UniEmoPipeline.from_pretrained(
        "mini", torch_dtype=torch.float16, safety_checker=None
    )
    assert half.unet.dtype == half.encoder.dtype == torch.float16
    pipe.save_pretrained(tmp_path / "whole")
    for name in ("mini", tmp_path / "whole"):
        own = uniemo.UniEmoPipeline.from_pretrained(name, encoder=pipe.encoder, space=pipe.space)
        assert own.encoder is pipe.encoder and own.space is pipe.space
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        uniemo.UniEmoPipeline.from_pretrained("runs/last/uniemo")
    again = uniemo.UniEmoPipeline.from_pipe(pipe)
    assert again.unet is pipe.unet and again.space is pipe.space
    plain = StableDiffusionPipeline.from_pretrained(shipped_folder("diffusion"), safety_checker=None)
    made = uniemo.UniEmoPipeline.from_pipe(
        plain, encoder=pipe.encoder, mapper=pipe.mapper, retriever=pipe.retriever, space=pipe.space
    )
    assert made.vae is plain.vae and made.space is pipe.space


def test_saved_images_do_not_replace_each_other(pipe, tmp_path):
    both = pipe.generate("awe", 2, prompt="<emotion> dog", **FEW) + pipe.generate(
        "awe", 2, prompt="<emotion> balloon", **FEW
    )
    table = both.save(tmp_path / "a")
    assert table.path.is_unique and len(list((tmp_path / "a").glob("*.png"))) == 4
    with pytest.raises(FileExistsError, match="images.csv"):
        both.save(tmp_path / "a")


def test_bytes_are_read_as_bytes(pipe):
    photo = torch.from_numpy(np.asarray(render(draw_spec(1, 1), 64).image).copy()).permute(2, 0, 1)[
        None
    ]
    want = pipe.understand(render(draw_spec(1, 1), 64).image).probabilities
    for x in (photo, photo[0], photo / 255):
        assert np.allclose(pipe.understand(x).probabilities, want, atol=1e-5)
    for x, say in (
        (photo / 127.5 - 1, "must lie in \\[0, 1\\]"),
        (photo * float("nan"), "not finite"),
    ):
        with pytest.raises(ValueError, match=say):
            pipe.understand(x)


def test_editing_keeps_the_aspect():
    "A wide picture edited at another ratio is cropped, not stretched: a circle stays one."
    from PIL import Image, ImageDraw

    from uniemo.pipeline import _crop

    wide = Image.new("L", (256, 128))
    ImageDraw.Draw(wide).ellipse((96, 32, 160, 96), fill=255)
    for size in ((64, 64), (128, 64), (64, 128)):
        x = np.asarray(_crop(wide, *size).resize(size)) > 127
        assert abs(np.ptp(np.flatnonzero(x.any(0))) - np.ptp(np.flatnonzero(x.any(1)))) <= 1
