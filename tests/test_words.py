"Words in the text towers of every family: exact, differentiable, batched, and gone afterwards."

import inspect

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionPipeline,
)
from families import call_settings, control_net, emotion_words, painted
from tiny_pipelines import BUILDERS, build

from uniemo.pipeline import DIFFUSION_PARTS, UniEmoPipeline
from uniemo.towers import FAMILIES, PromptWords, family_of, slot_name, text_towers
from uniemo.words import EmotionWords

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=list(BUILDERS))
def pipe(request):
    return build(request.param)


def floats(out):
    "All tensors of numbers in what `encode_prompt` gives: states and pooled outputs."
    if torch.is_tensor(out):
        return [out] if out.is_floating_point() else []
    if isinstance(out, (tuple, list)):
        return [tensor for one in out for tensor in floats(one)]
    return []


def encode(pipe, prompt, guided=False, **more):
    known = inspect.signature(pipe.encode_prompt).parameters
    settings = dict(prompt=prompt, device="cpu", num_images_per_prompt=1, **more)
    for name in ("prompt_2", "prompt_3"):
        if name in known and name not in more:
            settings[name] = None
    settings["do_classifier_free_guidance"] = guided
    return floats(pipe.encode_prompt(**{k: v for k, v in settings.items() if k in known}))


def real(towers, *words):
    "Embeddings of real words as one word of several tokens, [1, k, d] for each tower."
    return [
        tower.encoder.get_input_embeddings()
        .weight[tower.original_tokenizer.convert_tokens_to_ids(list(words))]
        .detach()
        .clone()[None]
        for tower in towers
    ]


def injected(pipe, **words):
    "Words by the name of their placeholder, `emotion` or `emotion_awe`."
    towers = text_towers(pipe)
    table = {f"<{name.replace('_', ':')}>": word for name, word in words.items()}
    return PromptWords(pipe, towers, table.__getitem__).active()


def same(a, b):
    assert len(a) == len(b) and len(a)
    for x, y in zip(a, b):
        assert torch.equal(x, y)


def test_every_family_is_tested():
    assert list(FAMILIES) == list(BUILDERS)
    for family in FAMILIES:
        assert family_of(build(family)) == family


@pytest.mark.parametrize("hub_end", [False, True])
@pytest.mark.parametrize("family", list(BUILDERS))
def test_a_real_word_as_the_word(family, hub_end):
    "States and pooled outputs equal those of the plain prompt, to the last bit."
    pipe = build(family, hub_end)
    words = real(text_towers(pipe), "red", "dog")
    with torch.no_grad(), injected(pipe, emotion=words):
        got = encode(pipe, ["<emotion> castle on the beach"])
    with torch.no_grad():
        same(got, encode(pipe, ["red dog castle on the beach"]))


def test_several_placeholders_and_emotions(pipe):
    towers = text_towers(pipe)
    awe, fear = real(towers, "red"), real(towers, "blue", "sea")
    with torch.no_grad(), injected(pipe, emotion_awe=awe, emotion_fear=fear):
        got = encode(pipe, ["<emotion:awe> dog on <emotion:fear> in <emotion:awe>"])
    with torch.no_grad():
        same(got, encode(pipe, ["red dog on blue sea in red"]))


def test_negative_prompts(pipe):
    words = real(text_towers(pipe), "red")
    with torch.no_grad():
        plain = encode(pipe, ["red dog"], guided=True, negative_prompt=["blue castle"])
        with injected(pipe, emotion=words):
            got = encode(pipe, ["<emotion> dog"], guided=True, negative_prompt=["blue castle"])
        same(got, plain)
        plain = encode(pipe, ["a dog"], guided=True, negative_prompt=["red castle"])
        with injected(pipe, emotion=words):
            got = encode(pipe, ["a dog"], guided=True, negative_prompt=["<emotion> castle"])
        same(got, plain)


def test_a_batch_equals_one_by_one(pipe):
    torch.manual_seed(0)
    words = [torch.randn(3, 2, tower.width) for tower in text_towers(pipe)]
    # of one length: padding to the longest prompt is the pipeline's own affair
    prompts = ["<emotion> castle", "<emotion> dog", "dog <emotion>"]
    with torch.no_grad():
        with injected(pipe, emotion=words):
            batch = encode(pipe, prompts)
        for i, prompt in enumerate(prompts):
            with injected(pipe, emotion=[word[i : i + 1] for word in words]):
                one = encode(pipe, [prompt])
            # some pipelines give a tensor for each prompt, some one for all
            apart = len(batch) > len(one)
            mine = (
                batch[i : i + 1] if apart else [x[i : i + 1] if len(x) == 3 else x for x in batch]
            )
            for x, y in zip(mine, one):
                torch.testing.assert_close(x.reshape(y.shape), y, atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_word_of_every_tower(pipe):
    words = [word.requires_grad_() for word in real(text_towers(pipe), "red", "dog")]
    with injected(pipe, emotion=words):
        states = encode(pipe, ["<emotion> castle"])
    loss = sum(state.square().sum() for state in states)
    for grad in torch.autograd.grad(loss, words):
        assert grad.abs().sum(-1).min() > 0


def trace(pipe):
    "Everything of a pipeline that putting words in might touch."
    encoders = [tower.encoder for tower in text_towers(pipe)]
    tokenizers = {k: v for k, v in pipe.components.items() if "tokenizer" in k}
    return (
        sorted(vars(pipe)),
        dict(pipe.config),
        {k: (id(v), len(v)) for k, v in tokenizers.items() if v is not None},
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for e in encoders for m in e.modules()],
        [e.get_input_embeddings().weight.shape for e in encoders],
    )


def test_it_leaves_no_trace(pipe):
    before = trace(pipe)
    words = real(text_towers(pipe), "red")
    with injected(pipe, emotion=words):
        assert trace(pipe) != before
    assert trace(pipe) == before
    with pytest.raises(RuntimeError, match="inside"), injected(pipe, emotion=words):
        raise RuntimeError("inside")
    assert trace(pipe) == before


def test_prompts_without_placeholders_are_as_before(pipe):
    with torch.no_grad():
        plain = encode(pipe, ["a photo of the sea"])
        with injected(pipe, emotion=real(text_towers(pipe), "red")):
            same(encode(pipe, ["a photo of the sea"]), plain)


def test_a_typing_error_is_refused(pipe):
    words = real(text_towers(pipe), "red")
    with injected(pipe, emotion=words), pytest.raises(ValueError, match="placeholder '<emotoin>'"):
        encode(pipe, ["<emotoin> castle"])


def test_wrong_widths_are_refused(pipe):
    words = [torch.zeros(1, 1, tower.width + 1) for tower in text_towers(pipe)]
    with injected(pipe, emotion=words), pytest.raises(ValueError, match="for text_encoder must be"):
        encode(pipe, ["<emotion> castle"])


def test_a_cut_word_is_noticed():
    pipe = build("Stable Diffusion 1.x and 2.x")
    words = real(text_towers(pipe), "red")
    with injected(pipe, emotion=words), pytest.raises(RuntimeError, match="did not read every"):
        encode(pipe, ["dog " * 80 + "<emotion>"])


def test_a_text_encoder_that_skips_hooks_is_noticed(pipe):
    "As a compiled one does: it calls the forward of its modules, and not what is hooked to them."
    encoder = text_towers(pipe)[-1].encoder
    encoder._compiled_call_impl = encoder.forward
    words = real(text_towers(pipe), "red")
    try:
        with pytest.raises(RuntimeError, match="Is it compiled"), injected(pipe, emotion=words):
            encode(pipe, ["<emotion> castle"])
    finally:
        encoder._compiled_call_impl = None


@pytest.mark.parametrize("family", ["Stable Diffusion 1.x and 2.x", "PixArt-Sigma"])
def test_a_compiled_text_encoder_is_right_or_noticed(family):
    pipe = build(family)
    encoder = text_towers(pipe)[0].encoder
    words = real(text_towers(pipe), "red")
    with torch.no_grad():
        plain = encode(pipe, ["red castle"])
        encoder.compile(backend="eager")
        try:
            encode(pipe, ["red castle"])
            try:
                with injected(pipe, emotion=words):
                    got = encode(pipe, ["<emotion> castle"])
            except RuntimeError as error:
                assert "Is it compiled" in str(error)
            else:
                same(got, plain)
        finally:
            encoder._compiled_call_impl = None
            torch._dynamo.reset()


def test_words_of_another_number_than_prompts(pipe):
    words = [torch.randn(3, 1, tower.width) for tower in text_towers(pipe)]
    with injected(pipe, emotion=words), pytest.raises(ValueError, match="3 words for 2 prompts"):
        encode(pipe, ["<emotion> castle", "<emotion> dog"])


def test_unknown_pipelines_are_refused_by_name():
    class KandinskyPipeline(DiffusionPipeline):
        pass

    with pytest.raises(
        ValueError, match="into a KandinskyPipeline: supported are .*FLUX.1, PixArt"
    ):
        family_of(KandinskyPipeline())


@pytest.mark.parametrize("kind", [name for names in FAMILIES.values() for name in names])
def test_every_class_that_is_named_reads_words(kind):
    "It is built from the parts of its family, and a real word as the word gives the same states."
    family = next(family for family, names in FAMILIES.items() if kind in names)
    pipe = build(family)
    parts = dict(pipe.components)
    if "ControlNet" in kind:
        parts["controlnet"] = control_net(pipe, family)
    known = inspect.signature(getattr(diffusers, kind).__init__).parameters
    parts = {k: v for k, v in parts.items() if k in known}
    if "requires_safety_checker" in known:
        parts["requires_safety_checker"] = False
    made = getattr(diffusers, kind)(**parts)
    assert family_of(made) == family
    words = real(text_towers(made), "red", "dog")
    with torch.no_grad(), injected(made, emotion=words):
        got = encode(made, ["<emotion> castle"])
    with torch.no_grad():
        same(got, encode(made, ["red dog castle"]))


def test_a_class_made_from_a_known_one_is_taken():
    class MyPipeline(StableDiffusionPipeline):
        pass

    parts = build("Stable Diffusion 1.x and 2.x").components
    assert family_of(MyPipeline(**parts, requires_safety_checker=False)).endswith("1.x and 2.x")


def test_one_with_at_a_time(pipe):
    words = real(text_towers(pipe), "red")
    before = trace(pipe)
    with injected(pipe, emotion=words):
        with (
            pytest.raises(RuntimeError, match="one `with` at a time"),
            injected(pipe, emotion=words),
        ):
            pass
        with torch.no_grad():
            got = encode(pipe, ["<emotion> castle"])
    assert trace(pipe) == before
    with torch.no_grad():
        same(got, encode(pipe, ["red castle"]))


def test_towers_that_are_exchanged_are_found_anew():
    pipe = build("Stable Diffusion 1.x and 2.x")
    words = emotion_words(pipe).attach(pipe)
    settings = call_settings(pipe)
    words.generate("awe", 1, **settings)
    # a textual inversion teaches the tokenizer a word
    pipe.tokenizer.add_tokens("<cat-toy>")
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    toy = words.generate("awe", 1, prompt="<emotion> <cat-toy>", **settings)
    dog = words.generate("awe", 1, prompt="<emotion> dog", **settings)
    assert (painted(toy.images) != painted(dog.images)).any()
    pipe.text_encoder = build("Stable Diffusion XL").text_encoder_2
    with pytest.raises(ValueError, match="reads words of width 48"):
        words.generate("awe", 1, **settings)


def test_two_embeddings_that_share_no_memory():
    "T5 keeps two and calls the second; offloaded or cast, they may be copies of each other."
    pipe = build("PixArt-Sigma")
    inner = pipe.text_encoder.encoder.embed_tokens
    inner.weight = torch.nn.Parameter(inner.weight.detach().clone())
    words = real(text_towers(pipe), "red", "dog")
    with torch.no_grad(), injected(pipe, emotion=words):
        got = encode(pipe, ["<emotion> castle"])
    with torch.no_grad():
        same(got, encode(pipe, ["red dog castle"]))


def test_slots_are_letters():
    names = [slot_name(number) for number in range(676)]
    assert len(set(names)) == 676 and all(n.isalpha() and n.islower() for n in names)
    with pytest.raises(ValueError, match="676"):
        slot_name(676)


# ---- emotions


def test_generate_with_every_family(pipe):
    words = emotion_words(pipe).attach(pipe)
    settings = call_settings(pipe)
    out = words.generate("awe", 3, prompt="<emotion> castle", seed=2, batch_size=2, **settings)
    # a call leaves state of the pipeline's own
    before = trace(pipe)
    assert len(out) == len(out.scene) == 3 and out.index == [0, 1, 2]
    alone = words.generate("awe", 1, prompt="<emotion> castle", seed=2, start=1, **settings)
    assert np.abs(painted(alone.images) - painted(out.images[1:2])).max() <= 2
    other = words.generate("fear", 1, prompt="<emotion> castle", seed=2, start=1, **settings)
    assert (painted(other.images) != painted(alone.images)).any()
    assert trace(pipe) == before
    assert words.detach() is pipe


def test_a_call_of_the_pipelines_own(pipe):
    words = emotion_words(pipe).attach(pipe)
    settings = call_settings(pipe)

    def image(emotion, prompt):
        with words(emotion, seed=4):
            generator = torch.Generator().manual_seed(0)
            return painted(pipe(prompt, generator=generator, **settings).images)

    assert (image("awe", "<emotion> castle") == image(None, "<emotion:awe> castle")).all()
    with pytest.raises(ValueError, match="which emotion"):
        image(None, "<emotion> castle")
    with pytest.raises(ValueError, match="unknown emotion 'joy'"):
        image(None, "<emotion:joy> castle")


def test_a_negative_prompt_for_all_images():
    pipe = build("Stable Diffusion XL")
    words = emotion_words(pipe).attach(pipe)
    settings = call_settings(pipe) | dict(guidance_scale=5.0)
    plain = words.generate("awe", 2, **settings)
    other = words.generate("awe", 2, negative_prompt="blue dog", **settings)
    assert (painted(plain.images) != painted(other.images)).any()


def test_mappers_of_another_model_are_refused():
    words = emotion_words(build("Stable Diffusion 1.x and 2.x"))
    said = "reads words of width 32 and 48 in text_encoder, text_encoder_2, the mappers make 32"
    with pytest.raises(ValueError, match=said):
        words.attach(build("Stable Diffusion XL"))
    with pytest.raises(RuntimeError, match="call attach"):
        words.generate("awe")


def test_the_shipped_words_paint_as_the_pipeline_does():
    whole = UniEmoPipeline.from_pretrained("mini")
    whole.set_progress_bar_config(disable=True)
    parts = {k: v for k, v in whole.components.items() if k in DIFFUSION_PARTS}
    plain = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None)
    plain.set_progress_bar_config(disable=True)
    call = dict(num_images=3, prompt="<emotion> castle", num_inference_steps=4, batch_size=2)
    ours = EmotionWords.from_pretrained("mini").attach(plain).generate("awe", **call)
    theirs = whole.generate("awe", judge=False, **call)
    assert (ours.scene, ours.object) == (theirs.scene, theirs.object)
    assert np.abs(painted(ours.images) - painted(theirs.images)).max() <= 1
