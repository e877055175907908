"""Words in prompts: text towers of Stable Diffusion 1.x and 2.x, stock tokenizers, gradients, half
precision; and fusion against the paper's released numbers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.autograd import gradcheck
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from uniemo.conditioning import encode_prompts, max_tokens, split_prompt
from uniemo.files.uniemo import load_uniemo
from uniemo.fusion import PseudoWordMapper
from uniemo.mini.diffusion import load_diffusion

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
golden = pytest.mark.skipif(
    not (SHARED / "golden/a.values.safetensors").exists(),
    reason=f"no golden numbers at {SHARED / 'golden'}",
)
# as in the two text_encoder/config.json, but narrow: 1.x is OpenAI's CLIP ViT-L, 2.x the first
# 23 of OpenCLIP ViT-H's 24 layers
TOWERS = {
    "1.x": dict(
        hidden_act="quick_gelu",
        num_hidden_layers=12,
        num_attention_heads=12,
        hidden_size=24,
        intermediate_size=96,
        projection_dim=768,
        pad_token_id=1,
        eos_token_id=2,
    ),
    "2.x": dict(
        hidden_act="gelu",
        num_hidden_layers=23,
        num_attention_heads=16,
        hidden_size=32,
        intermediate_size=128,
        projection_dim=512,
        pad_token_id=1,
        eos_token_id=2,
    ),
}
PADS = {"1.x": "<|endoftext|>", "2.x": "!"}


@pytest.fixture(scope="module", params=list(TOWERS))
def stock(request):
    """A text tower of Stable Diffusion with random weights, and a tokenizer that does not know the
    placeholder and pads as the real one does."""
    mini = load_diffusion().tokenizer
    state = json.loads(mini.backend_tokenizer.to_str())["model"]
    vocab = {t: i for t, i in state["vocab"].items() if not t.startswith("<|")}
    vocab |= {t: len(vocab) + i for i, t in enumerate(("<|startoftext|>", "<|endoftext|>"))}
    tokenizer = CLIPTokenizer(
        vocab=vocab,
        merges=[tuple(m) for m in state["merges"]],
        model_max_length=77,
        pad_token=PADS[request.param],
    )
    torch.manual_seed(0)
    model = (
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer), max_position_embeddings=77, **TOWERS[request.param]
            )
        )
        .eval()
        .requires_grad_(False)
    )
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.2)  # livelier than at initialisation
    return model, tokenizer


def plain(model, tokenizer, texts):
    "As diffusers' pipeline encodes a prompt."
    return model(
        tokenizer(
            texts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids,
        attention_mask=None,
    )[0]


def row(model, tokenizer, word):
    return model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(word + "</w>")]


def test_stock_tokenizer_would_cut_the_placeholder(stock):
    model, tokenizer = stock
    assert (
        "<emotion>" not in tokenizer.get_vocab()
        and len(tokenizer("<emotion>").input_ids) > 3
        and max_tokens(model, tokenizer) == 77
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a photo of a dog",
        "Two   Words, and more!! (dog:1.2)",
        "dog's é 3.14 🎈",
        "a < b",
        "dog " * 75,
    ],
)
def test_without_words_the_plain_encoder(stock, text):
    assert torch.equal(encode_prompts(*stock, text), plain(*stock, [text]))


@pytest.mark.parametrize(
    "template,text",
    [
        ("<emotion>", "dog"),
        ("a photo of a <emotion> in a forest", "a photo of a dog in a forest"),
        ("a <emotion>,<emotion>.", "a dog,dog."),
        ("<emotion><emotion>", "dog dog"),
        ("A <emotion>", "a dog"),
        ("forest(<emotion>)", "forest(dog)"),
    ],
)
def test_a_real_word_as_the_word(stock, template, text):
    assert torch.equal(
        encode_prompts(*stock, template, row(*stock, "dog")[None]), plain(*stock, [text])
    )


def test_several_placeholders(stock):
    words = {
        "<emotion:awe>": row(*stock, "dog")[None],
        "<emotion:fear>": torch.stack([row(*stock, w) for w in ("forest", "beach")]),
    }
    out = encode_prompts(*stock, ["<emotion:awe> and <emotion:fear>", "a <emotion:fear>"], words)
    assert torch.equal(out, plain(*stock, ["dog and forest", "a beach"]))


def test_batch_equals_one_by_one(stock):
    w = torch.randn(5, stock[0].config.hidden_size)
    prompts = [
        "<emotion>",
        "a <emotion> dog",
        "<emotion> <emotion>",
        "dog " * 74 + "<emotion>",
        "<emotion>" * 75,
    ]
    torch.testing.assert_close(
        encode_prompts(*stock, prompts, w),
        torch.cat([encode_prompts(*stock, p, w[i : i + 1]) for i, p in enumerate(prompts)]),
        atol=1e-5,
        rtol=1e-5,
    )
    torch.testing.assert_close(
        encode_prompts(*stock, "a <emotion>", w),
        torch.cat([encode_prompts(*stock, "a <emotion>", v[None]) for v in w]),
        atol=1e-5,
        rtol=1e-5,
    )
    assert encode_prompts(*stock, ["a <emotion>"] * 3, w[:1]).shape == (
        3,
        77,
        stock[0].config.hidden_size,
    )  # one word for all


def test_a_word_changes_nothing_before_it(stock):
    w = torch.randn(2, stock[0].config.hidden_size)
    a, b = encode_prompts(*stock, "a photo of a <emotion> dog", w)
    assert (
        torch.equal(a[:5], b[:5]) and (a[5:] != b[5:]).any(1).all()
    )  # causal attention, start token included


def test_gradient_against_finite_differences(stock):
    model, tokenizer = stock
    small = (
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=3,
                num_attention_heads=2,
                max_position_embeddings=12,
                hidden_act=model.config.hidden_act,
            )
        )
        .double()
        .eval()
        .requires_grad_(False)
    )

    def ask(a, b):
        prompts = ["<emotion:a> in <emotion:b>", "a <emotion:a> <emotion:a>", "<emotion:b>"]
        return encode_prompts(small, tokenizer, prompts, {"<emotion:a>": a, "<emotion:b>": b})

    assert gradcheck(
        ask, [torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (3, 1)]
    )


def test_gradient_belongs_to_its_own_image(stock):
    model, tokenizer = stock
    before = model.get_input_embeddings().weight.clone()
    w = torch.randn(3, model.config.hidden_size, requires_grad=True)
    encode_prompts(model, tokenizer, "a <emotion>", w)[1].square().sum().backward()
    assert w.grad[1].abs().sum() > 0 and not w.grad[[0, 2]].any()
    assert model.get_input_embeddings().weight.grad is None and torch.equal(
        model.get_input_embeddings().weight, before
    )


def test_no_hook_is_left(stock):
    model, tokenizer = stock
    w = torch.randn(1, model.config.hidden_size)

    def fail(*args):
        raise RuntimeError("inside")

    model.encoder.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="inside"):
            encode_prompts(model, tokenizer, "<emotion>", w)
    finally:
        model.encoder._forward_pre_hooks.clear()
    assert not model.get_input_embeddings()._forward_hooks


def test_half_precision(stock):
    model, tokenizer = stock
    import copy

    half = copy.deepcopy(model).bfloat16()
    w = torch.randn(2, model.config.hidden_size, requires_grad=True)
    out = encode_prompts(half, tokenizer, "a <emotion>", w)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and w.grad.dtype == torch.float32


def test_attention_mask_where_the_encoder_wants_one(stock):
    model, tokenizer = stock
    model.config.use_attention_mask = True
    try:
        got = encode_prompts(model, tokenizer, "a <emotion>", row(*stock, "dog")[None])
        b = tokenizer(["a dog"], padding="max_length", return_tensors="pt")
        expected = model(b.input_ids, attention_mask=b.attention_mask)[0]
        assert torch.equal(got, expected)
    finally:
        del model.config.use_attention_mask


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing(stock):
    model, tokenizer = stock
    w = torch.randn(2, model.config.hidden_size, requires_grad=True)
    grads = []
    for on in (False, True):
        model.gradient_checkpointing_enable() if on else None
        model.train(on)
        grads.append(
            torch.autograd.grad(
                encode_prompts(model, tokenizer, "a <emotion>", w).square().sum(), w
            )[0]
        )
    model.gradient_checkpointing_disable()
    model.eval()
    torch.testing.assert_close(*grads)


def test_names_added_to_the_tokenizer_are_no_typing_errors():
    tokenizer = load_diffusion().tokenizer
    tokenizer.add_tokens(["<my-toy>"])
    assert split_prompt("<my-toy> <emotion>", tokenizer=tokenizer) == ["<my-toy> ", "<emotion>", ""]


@pytest.mark.parametrize(
    "prompts,words,message",
    [
        ("a castle", (1,), "no placeholder in 'a castle'"),
        (["<emotion>", "castle"], (2,), "no placeholder in 'castle'"),
        ("<emotion:joy>", {"awe": (1,)}, "unknown placeholder '<emotion:joy>'"),
        ("<emotoin> <emotion>", (1,), "unknown placeholder '<emotoin>'"),
        ("<emotion>", None, "unknown placeholder '<emotion>'"),
        ("dog " * 75 + "<emotion>", (1,), "<emotion> would be cut off"),
        ("dog " * 74 + "<emotion> <emotion>", (1,), "<emotion> would be cut off"),
        ("<emotion> " + "dog " * 75, (1,), "78 tokens, the text encoder reads 77: shorten"),
        (["<emotion>"] * 3, (2,), "3 prompts need 3 words"),
        ("<emotion:a>", {"a": (1,), "b": (1,)}, "no placeholder <emotion:b>"),
        ("<emotion:a> <emotion:b>", {"a": (2,), "b": (3,)}, "2 of <emotion:a>"),
    ],
)
def test_bad_prompts(stock, prompts, words, message):
    d = stock[0].config.hidden_size
    words = (
        {f"<emotion:{k}>": torch.randn(*n, d) for k, n in words.items()}
        if isinstance(words, dict)
        else None
        if words is None
        else torch.randn(*words, d)
    )
    with pytest.raises(ValueError) as e:
        encode_prompts(*stock, prompts, words)
    assert message in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "words",
    [
        torch.randn(1, 7),
        torch.randn(8),
        torch.randn(1, 2, 7),
        torch.randn(1, 0, 24),
        torch.randn(1, 1, 1, 24),
    ],
)
def test_bad_words(stock, words):
    with pytest.raises(ValueError, match=r"must be \[B, "):
        encode_prompts(*stock, "<emotion>", words)


@pytest.mark.parametrize("placeholder", ["emotion", "<emotion", "<>", "<a b>", ""])
def test_bad_placeholders(stock, placeholder):
    with pytest.raises(ValueError, match="angle brackets"):
        encode_prompts(*stock, "emotion", torch.randn(1, stock[0].config.hidden_size), placeholder)


def test_another_placeholder(stock):
    assert torch.equal(
        encode_prompts(*stock, "a <mood>", row(*stock, "dog")[None], "<mood>"),
        plain(*stock, ["a dog"]),
    )


def test_diffusers_reads_the_same(stock):
    "StableDiffusionPipeline's own `encode_prompt` and ours agree on prompts without words."
    from diffusers import StableDiffusionPipeline

    model, tokenizer = stock
    pipe = StableDiffusionPipeline.__new__(StableDiffusionPipeline)
    pipe.text_encoder, pipe.tokenizer, pipe.unet = model, tokenizer, None
    theirs = StableDiffusionPipeline.encode_prompt(
        pipe, ["a photo of a dog", "beach"], "cpu", 1, False
    )[0]
    assert torch.equal(encode_prompts(model, tokenizer, ["a photo of a dog", "beach"]), theirs)


# ---- fusion


@golden
@torch.no_grad()
def test_fusion_as_released():
    v, files = (
        load_file(SHARED / "golden/a.values.safetensors"),
        load_uniemo(SHARED / "golden/a_official"),
    )
    out = files.encoder.eval()(v["in.pixel_values"])
    mapper = PseudoWordMapper.from_mappers(files.mapper, files.mapper_scene, files.mapper_object)
    w = mapper(
        out.class_features,
        out.scene_features,
        out.object_features,
        v["fusion.out.alpha_scene"],
        v["fusion.out.alpha_object"],
    )
    assert (w - v["fusion.out.pseudo_word"]).abs().max() < 1e-5


def test_from_features_to_text_states():
    "Gradients reach features, coefficients and mappers through the frozen text encoder."
    pipe = load_diffusion()
    encoder = pipe.text_encoder.requires_grad_(False)
    m = PseudoWordMapper(16, 128)
    c, s, o = (torch.randn(2, 16, requires_grad=True) for _ in range(3))
    a, b = (torch.rand(2, requires_grad=True) for _ in range(2))
    encode_prompts(
        encoder, pipe.tokenizer, "<emotion> castle", m(c, s, o, a, b)
    ).square().mean().backward()
    assert all(x.grad.abs().sum() > 0 for x in (c, s, o, a, b, *m.parameters()))


def test_fusion_in_half_precision_and_ablated(tmp_path):
    m = PseudoWordMapper(16, 8, use_object=False)
    m.save_pretrained(tmp_path)
    half = PseudoWordMapper.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert (
        half.dtype == torch.bfloat16 and half.mapper_object is None and not half.config.use_object
    )
    assert half(*torch.randn(2, 3, 16).bfloat16(), None, torch.rand(3)).dtype == torch.bfloat16
