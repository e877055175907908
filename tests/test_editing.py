"Editing with masks and references, the best of several, refined words: what must hold exactly."

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image

import uniemo
from uniemo.diffusion.editing import Edits, keep, read_mask, words_like
from uniemo.diffusion.refinement import WordRefiner, wish_scores
from uniemo.measure.content import kept_content, psnr
from uniemo.mini.edits import ARMS, edit_curve, edit_tasks, edited, measure_edits, positivity
from uniemo.mini.judge import mini_networks
from uniemo.mini.painting import render
from uniemo.mini.truth import ImageSpec
from uniemo.runs import start
from uniemo.sampling import Refinement, Sampling
from uniemo.space import seeded_generators
from uniemo.words import EmotionWords

FEW = dict(num_inference_steps=2, guidance_scale=4.0, judge=False)


@pytest.fixture(scope="module")
def pipe():
    made = uniemo.UniEmoPipeline.from_pretrained("mini")
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def beach():
    return render(ImageSpec("beach", ("Dog",), 3))


def pixels(images):
    return np.stack([np.asarray(image, int) for image in images])


def largest(a, b):
    return int(np.abs(pixels(a) - pixels(b)).max())


# ---- masks


def test_what_is_kept_is_kept_to_the_byte(pipe, beach):
    mask = beach.masks[0]
    made = pipe.generate("fear", 3, image=beach.image, mask=keep(mask), batch_size=2, **FEW)
    photo = np.asarray(beach.image, int)
    assert (pixels(made.images)[:, mask] == photo[mask]).all()
    changed = np.abs(pixels(made.images)[:, ~mask] - photo[~mask]).mean((1, 2))
    assert (changed > 1).all()
    alone = pipe.generate("fear", 1, start=2, image=beach.image, mask=keep(mask), **FEW)
    assert largest(made.images[2:], alone.images) <= 2


def test_a_mask_of_everything_is_no_mask(pipe, beach):
    everything = np.ones(beach.masks[0].shape, bool)
    call = dict(image=beach.image, strength=0.8, **FEW)
    plain, whole = (pipe.generate("awe", 1, mask=m, **call) for m in (None, everything))
    assert largest(plain.images, whole.images) <= 2
    nothing = pipe.generate("awe", 1, mask=~everything, **call)
    assert largest(nothing.images, [beach.image]) == 0


def test_a_mask_for_each_image(pipe, beach):
    mask = beach.masks[0]
    masks = [read_mask(mask), keep(mask)]
    made = pixels(pipe.generate("fear", 2, image=beach.image, mask=masks, **FEW).images)
    photo = np.asarray(beach.image, int)
    assert (made[0][~mask] == photo[~mask]).all() and (made[1][mask] == photo[mask]).all()


def test_masks_that_cannot_be_meant(pipe, beach):
    small = np.ones((8, 8), bool)
    for call, said in (
        (dict(mask=small), "give that image"),
        (dict(mask=small, image=beach.image), "8 x 8 pixels for an image of 64 x 64"),
        (dict(mask=[small] * 3, image=beach.image), "3 masks for 2 results"),
        (dict(mask="nowhere.png", image=beach.image), "nowhere.png"),
    ):
        with pytest.raises((ValueError, OSError), match=said):
            pipe.generate("awe", 2, **FEW, **call)
    with pytest.raises(TypeError, match="a mask is a Pillow image"):
        read_mask(np.zeros((4, 4)))


def test_masks_go_with_the_crop():
    wide = Image.new("RGB", (96, 64), "red")
    left = np.zeros((64, 96), bool)
    left[:, :48] = True
    edits = Edits.collect([wide], left, 1, (64, 64))
    blue = Image.new("RGB", (64, 64), "blue")
    back = np.asarray(edits.put_back([blue])[0])
    assert (back[:, :32] == (0, 0, 255)).all() and (back[:, 32:] == (255, 0, 0)).all()


# ---- a reference's word


def test_a_reference_for_another_content(pipe, beach):
    street = render(ImageSpec("street", ("Truck",), 4)).image
    call = dict(image=beach.image, mask=keep(beach.masks[0]), strength=0.9, **FEW)
    like = pipe.generate(reference=street, **call)
    other = pipe.generate(reference=beach.image, **call)
    assert largest(like.images, other.images) > 0
    kept = beach.masks[0]
    assert (pixels(like.images)[0][kept] == np.asarray(beach.image, int)[kept]).all()


def test_a_references_word_in_an_own_inpainting_pipeline(pipe, beach):
    street = render(ImageSpec("street", ("Truck",), 4)).image
    own = StableDiffusionInpaintPipeline(**pipe.diffusion.components)
    own.set_progress_bar_config(disable=True)
    words = EmotionWords.from_pretrained("mini")
    like, emotion = words_like(words, street)
    assert emotion == pipe.understand(street).emotion[0]
    mapped, _ = like.draw(emotion, seeded_generators(0, 2))
    features, _ = pipe.read_reference(street, {"<emotion>": emotion})
    ours, _ = pipe.words.draw(emotion, seeded_generators(0, 2), features)
    assert torch.allclose(mapped[0], ours[0], atol=1e-5)
    like.attach(own)
    call = dict(image=beach.image, mask_image=keep(beach.masks[0]), strength=0.9)
    call |= dict(num_inference_steps=2, guidance_scale=4.0)
    two = like.generate(emotion, 2, seed=1, **call).images
    alone = like.generate(emotion, 1, seed=1, start=1, **call).images
    assert largest(two[1:], alone) <= 2


# ---- the best of several


def test_the_best_of_several_is_the_best(pipe):
    plain = pipe.generate("fear", 6, seed=3, **FEW)
    best = pipe.generate("fear", 2, seed=3, best_of=3, **FEW)
    scores = wish_scores(pipe, plain.images, "fear").reshape(2, 3)
    assert best.index == [int(k) for k in scores.argmax(1) + [0, 3]]
    assert largest(best.images, [plain.images[k] for k in best.index]) <= 2
    second = pipe.generate("fear", 1, seed=3, best_of=3, start=1, batch_size=1, **FEW)
    assert second.index == best.index[1:]
    again = pipe.generate("fear", 1, seed=3, start=best.index[1], **FEW)
    assert largest(again.images, second.images) <= 2


def test_the_best_of_a_mixture_and_of_edits(pipe, beach):
    other = render(ImageSpec("street", ("Truck",), 4)).image
    mixture = {"awe": 0.5, "fear": 0.5}
    photos, left = [beach.image, other], np.zeros((64, 64), bool)
    left[:, :32] = True
    made = pipe.generate(mixture, 2, image=photos, mask=left, best_of=2, **FEW)
    assert [k // 2 for k in made.index] == [0, 1]
    assert (pixels(made.images)[:, :, 32:] == pixels(photos)[:, :, 32:]).all()
    plain = pipe.generate(mixture, 4, image=[p for p in photos for _ in "ab"], mask=left, **FEW)
    assert largest(made.images, [plain.images[k] for k in made.index]) <= 2


def test_counts_that_cannot_be_meant(pipe):
    for call, said in (
        (dict(best_of=0), "best_of is a whole number"),
        (dict(refine_steps=-1), "refine_steps is a whole number"),
        (dict(refinement={"rate": 1}), "refinement is Refinement"),
        (dict(best_of=3, start=400_000), "1,000,003 samples"),
    ):
        with pytest.raises((ValueError, TypeError), match=said):
            pipe.generate("awe", **FEW, **call)
    with pytest.raises(ValueError, match="rate is a share"):
        Refinement(rate=2)


# ---- refined words


def test_a_refined_word_never_fits_less(pipe):
    plain = pipe.generate("fear", 3, seed=3, **FEW)
    refined = pipe.generate("fear", 3, seed=3, refine_steps=1, batch_size=2, **FEW)
    before, after = (wish_scores(pipe, g.images, "fear") for g in (plain, refined))
    assert (after >= before - 1e-4).all()
    assert all(p.grad is None for p in pipe.unet.parameters())
    assert all(p.requires_grad for p in pipe.unet.parameters())


def test_the_word_moves_as_far_as_it_may(pipe):
    how = Refinement(rate=0.1, radius=0.15)
    sampling = Sampling(refine_steps=2, refinement=how, **FEW)
    refiner = WordRefiner(pipe, "<emotion> dog", sampling, "fear")
    generators = seeded_generators(0, 2)
    words, _ = pipe.words.draw_all({"<emotion>": "fear"}, generators)
    clean = torch.zeros(2, 4, 16, 16)
    refined = refiner.refine(words, generators, clean)["<emotion>"][0]
    drawn = words["<emotion>"][0]
    share = (refined - drawn).flatten(1).norm(dim=1) / drawn.flatten(1).norm(dim=1)
    assert (share <= 0.15 + 1e-5).all() and (share > 0.01).all()
    alone = pipe.words.draw_all({"<emotion>": "fear"}, single := seeded_generators(0, 1, 1))[0]
    again = refiner.refine(alone, single, clean[1:])["<emotion>"][0]
    assert torch.allclose(again, refined[1:], atol=1e-3 * float(drawn.norm()))


def test_the_gradient_points_uphill(pipe):
    "A small step along it raises the score at the same noise."
    sampling = Sampling(refine_steps=1, refinement=Refinement(rate=0.002, radius=0.5), **FEW)
    refiner = WordRefiner(pipe, "<emotion>", sampling, "fear")
    words, _ = pipe.words.draw_all({"<emotion>": "fear"}, seeded_generators(0, 2))
    clean = pipe.clean_latents([render(ImageSpec("swamp", ("Skull",), 2)).image], (64, 64), 2)
    refined = refiner.refine(words, seeded_generators(5, 2), clean.detach())
    noise = torch.stack([torch.randn(4, 16, 16, generator=g) for g in seeded_generators(5, 2)])
    timesteps = torch.full((2,), refiner.timestep)
    noised = refiner.schedule.add_noise(clean, noise, timesteps)
    with torch.no_grad():
        before, after = (
            refiner.predicted_scores(
                pipe.embed("<emotion>", w, seeded_generators(0, 2), sampling), noised
            )
            for w in (words, refined)
        )
    assert (after > before).all()


def test_refinement_where_no_gradient_comes_back(pipe):
    other = uniemo.UniEmoPipeline.from_pretrained("mini")
    other.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="without offloading"):
        other.generate("awe", refine_steps=1, **FEW)


# ---- what an edit keeps


def test_kept_content_of_equal_images(beach):
    photo = np.asarray(beach.image)[None]
    assert np.isinf(psnr(photo, photo)).all()
    with pytest.raises(ValueError, match="one original an image"):
        kept_content(photo, np.concatenate([photo, photo]))


def test_edits_of_the_mini_world(pipe):
    tasks = edit_tasks(8)
    assert len({task.spec.emotion for task in tasks}) == 8
    networks = mini_networks()
    sampling = Sampling(num_inference_steps=2, guidance_scale=4.0, strength=0.5)
    tables = [
        measure_edits(edited(pipe, arm, tasks, sampling), tasks, networks, arm=arm, strength=0.5)
        for arm in ARMS[:2]
    ]
    assert tables[1].kept.eq(1).all()
    curve = edit_curve(tables[0])
    assert (curve.low <= curve.value).all() and (curve.value <= curve.high).all()
    assert -1 <= positivity(tables[0]).value <= 1


def test_the_editing_experiment(warm, tmp_path):
    params = dict(num_photos=8, arms=list(ARMS[:2]), strengths=[0.5], num_inference_steps=1)
    run = start("editing", params, tmp_path, progress=False)
    assert {"reached_word", "kept_word_objects_kept", "photos"} <= set(run.summary())
    assert (run.dir / "edits.csv").exists()
