"""Expert queries on four families of backbones: what must hold whatever the weights."""

import copy
import pickle

import pytest
import torch
import transformers

from uniemo.backbones import FAMILIES, Backbone
from uniemo.files.weights import WeightsError, read_tensors, write_tensors
from uniemo.queries import PARTS, ExpertQueryModel, attention_maps, parts, train_only

CONFIGS = {family: transformers.CONFIG_MAPPING[family] for family in FAMILIES}
FEATURES = (
    "logits",
    "class_features",
    "scene_features",
    "object_features",
    "patch_tokens",
    "scene_attentions",
    "object_attentions",
)
families = pytest.mark.parametrize("family", CONFIGS)


def backbone(family, layers=4, attention=None, **kwargs):
    torch.manual_seed(0)
    mlp = {} if family.startswith("dinov2") else dict(intermediate_size=128)
    config = CONFIGS[family](
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        **mlp,
        **kwargs,
    )
    return FAMILIES[family].model._from_config(config, attn_implementation=attention).eval()


def model_of(family="clip_vision_model", n=3, **kwargs):
    return ExpertQueryModel(backbone(family, **kwargs), n, head_width=32).eval()


@pytest.fixture
def pixels():
    torch.manual_seed(1)
    return torch.randn(4, 3, 32, 32)


def loss_of(model, pixels):
    o, text = model(pixels), torch.ones(model.config.text_dim, 3, dtype=model.dtype)
    kinds = [
        (o.scene_features, model.scene_projection, model.scene_logit_scale),
        (o.object_features, model.object_projection, model.object_logit_scale),
    ]
    return o.logits.float().pow(2).mean() + sum(
        (t * p(f) @ text).float().pow(2).mean() for f, p, t in kinds
    )


@families
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_without_queries_the_plain_model(family, attention, pixels):
    plain = backbone(family, attention=attention)
    want, got = plain(pixels), ExpertQueryModel(plain, 0).eval()(pixels)
    assert torch.equal(
        got.class_features, want.last_hidden_state[:, 0] if family == "vit" else want.pooler_output
    )
    assert torch.equal(got.patch_tokens, want.last_hidden_state[:, -16:])
    assert all(getattr(got, k) is None for k in FEATURES if k.startswith(("scene", "object")))
    assert plain.config._attn_implementation == attention


@families
@pytest.mark.parametrize("layers", [3, 4, 5, 7, 8])
@torch.no_grad()
def test_any_depth(family, layers, pixels):
    model = model_of(family, layers=layers)
    out = model(pixels)
    assert (
        0 < model.split[0] < model.split[1] < layers
        and out.logits.shape == (4, 8)
        and all(torch.isfinite(out[k]).all() for k in FEATURES)
    )


@families
@pytest.mark.parametrize("layers", [1, 2])
def test_too_shallow(family, layers):
    with pytest.raises(ValueError, match="at least 3"):
        model_of(family, layers=layers)


@families
@torch.no_grad()
def test_the_split_is_where_it_says(family, pixels):
    "Split at (1, 2), scene queries depend on the first layer only, object queries on two."
    a = ExpertQueryModel(backbone(family, layers=4), 3, split=(1, 2)).eval()
    b = copy.deepcopy(a)
    before = a(pixels)
    for p in b.view.layers[2].parameters():
        p.add_(torch.randn_like(p))
    out = b(pixels)
    assert (
        torch.equal(out.scene_features, before.scene_features)
        and torch.equal(out.object_features, before.object_features)
        and not torch.equal(out.class_features, before.class_features)
    )
    for p in b.view.layers[1].parameters():
        p.add_(torch.randn_like(p))
    out = b(pixels)
    assert torch.equal(out.scene_features, before.scene_features) and not torch.equal(
        out.object_features, before.object_features
    )


@families
@pytest.mark.parametrize("trained", [PARTS, ("queries", "heads"), ("queries",), ("heads",)])
def test_gradients_reach_what_is_trained_and_nothing_else(family, trained, pixels):
    model = train_only(model_of(family).train(), *trained)
    loss_of(model, pixels).backward()
    for part, group in parts(model).items():
        for name, p in group.items():
            if part in trained:
                assert p.grad is not None and p.grad.abs().sum() > 0, name
            else:
                assert p.grad is None, name
    for p in model.view.unused():
        assert p.grad is None and not p.requires_grad


@families
@torch.no_grad()
def test_order_and_company_do_not_matter(family, pixels):
    model, order = model_of(family), torch.tensor([2, 0, 3, 1])
    out = model(pixels)
    for other, want in (
        (model(pixels[order]), {k: out[k][order] for k in FEATURES}),
        (model(pixels[1:2]), {k: out[k][1:2] for k in FEATURES}),
    ):
        for k in FEATURES:
            torch.testing.assert_close(other[k], want[k], atol=1e-5, rtol=1e-5)


@families
@torch.no_grad()
def test_attention_maps(family, pixels):
    model = model_of(family)
    out = model(pixels)
    T = 16 + dict(siglip_vision_model=0, dinov2_with_registers=5).get(family, 1)
    for kind in ("scene", "object"):
        a = out[f"{kind}_attentions"]
        assert a.shape == (4, 1, 3, T)
        torch.testing.assert_close(a.sum(-1), torch.ones(4, 1, 3))
    for size in (None, (32, 32)):
        for m in attention_maps(model, out, size).values():
            assert m.shape[1:] == (size or (4, 4)) and m.min() >= 0
            torch.testing.assert_close(m.sum((1, 2)), torch.ones(4))


@families
@torch.no_grad()
def test_attention_implementations_agree(family, pixels):
    a, b = model_of(family, attention="sdpa"), model_of(family, attention="eager")
    b.load_state_dict(a.state_dict())
    assert (
        a.backbone.config._attn_implementation == "sdpa"
        and b.backbone.config._attn_implementation == "eager"
    )
    for k in FEATURES:
        torch.testing.assert_close(a(pixels)[k], b(pixels)[k], atol=1e-5, rtol=1e-4)


@families
def test_half_precision(family, pixels):
    model = model_of(family)
    want = model(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(pixels)
        loss_of(model, pixels).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    half = ExpertQueryModel(backbone(family).to(torch.bfloat16), 3, head_width=32).eval()
    assert half.dtype == torch.bfloat16
    half.load_state_dict(model.state_dict())
    half = half(pixels)
    for out in (mixed, half):
        for k in ("class_features", "scene_features", "object_features"):
            cos = torch.cosine_similarity(out[k].float(), want[k].float(), dim=-1)
            assert cos.min() > 0.99, (k, cos)
        torch.testing.assert_close(
            out.scene_attentions.sum(-1), torch.ones(4, 1, 3), atol=1e-4, rtol=0
        )


@pytest.mark.skipif(
    torch.__version__ < "2.7",
    reason="torch 2.6 compiles no named tuple of which a field is replaced",
)
def test_compile(pixels):
    """One graph without a break, forward and backward, with the same numbers.

    What a compiler makes of it takes a minute on a processor: `make gpu` trains a compiled stage 1.
    """
    model = model_of(layers=3)
    want = model(pixels)
    loss_of(model, pixels).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    traced = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    out = traced(pixels)
    for k in FEATURES:
        torch.testing.assert_close(out[k], want[k], atol=1e-5, rtol=1e-4)
    text = torch.ones(model.config.text_dim, 3)
    (
        out.logits.pow(2).mean()
        + (model.scene_logit_scale * model.scene_projection(out.scene_features) @ text)
        .pow(2)
        .mean()
        + (model.object_logit_scale * model.object_projection(out.object_features) @ text)
        .pow(2)
        .mean()
    ).backward()
    for n, p in model.named_parameters():
        if n in grads:
            torch.testing.assert_close(
                p.grad, grads[n], atol=1e-4 * max(grads[n].abs().max().item(), 1.0), rtol=1e-3
            )


def test_gradient_checkpointing(pixels):
    a = model_of().train()
    b = copy.deepcopy(a)
    b.gradient_checkpointing_enable()
    for m in (a, b):
        m.head.dropout = 0.0
        loss_of(m, pixels).backward()
    assert any(getattr(layer, "gradient_checkpointing", False) for layer in b.view.layers)
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)


@families
@torch.no_grad()
def test_saved_copied_and_pickled(family, pixels, tmp_path):
    model = ExpertQueryModel(
        backbone(family),
        2,
        num_classes=3,
        class_names=["calm", "joy", "anger"],
        head_inputs="all",
        image_mean=[0.1, 0.2, 0.3],
        head_width=32,
    ).eval()
    want = model(pixels)
    model.save_pretrained(tmp_path)
    loaded = ExpertQueryModel.from_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert (
        loaded.config.image_mean == [0.1, 0.2, 0.3]
        and loaded.config.class_names == ["calm", "joy", "anger"]
        and loaded.config.image_size == 32
    )
    for other in (loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for k in FEATURES:
            assert torch.equal(other(pixels)[k], want[k]), k


def test_given_weights_are_kept():
    plain = backbone("clip_vision_model")
    before = {k: v.clone() for k, v in plain.state_dict().items()}
    model = ExpertQueryModel(Backbone(plain, image_mean=[0.5] * 3), 2)
    assert (
        model.backbone is plain
        and all(torch.equal(v, before[k]) for k, v in plain.state_dict().items())
        and model.config.image_mean == [0.5] * 3
    )


def test_a_diffusers_pipeline_keeps_it(pixels, tmp_path):
    from diffusers import DDIMScheduler, DiffusionPipeline

    class Pipe(DiffusionPipeline):
        def __init__(self, encoder, scheduler):
            super().__init__()
            self.register_modules(encoder=encoder, scheduler=scheduler)

    model = model_of()
    Pipe(model, DDIMScheduler()).save_pretrained(tmp_path)
    loaded = Pipe.from_pretrained(tmp_path).encoder
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, model(pixels).logits)


@families
def test_another_size_from_training_to_maps(family, tmp_path):
    "Positions are interpolated, a step is taken, and the saved model knows its size."
    plain = backbone(family)
    kept = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    model = ExpertQueryModel(plain, 3, head_width=32, image_size=48).train()
    torch.manual_seed(1)
    pixels, optimizer = torch.randn(2, 3, 48, 48), torch.optim.AdamW(model.parameters(), 1e-4)
    for _ in range(2):
        optimizer.zero_grad()
        loss = loss_of(model, pixels)
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss)
    model.eval().save_pretrained(tmp_path)
    loaded = ExpertQueryModel.from_pretrained(tmp_path)
    assert loaded.config.image_size == 48 and loaded.view.grid() == (6, 6)
    with torch.no_grad():
        out = loaded(pixels)
        assert torch.isfinite(out.logits).all()
        assert torch.equal(out.logits, model(pixels).logits)
    assert attention_maps(loaded, out)["scene"].shape == (2, 6, 6)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in plain.state_dict().items())


@families
def test_a_size_that_no_patches_fill(family):
    with pytest.raises(ValueError, match="image_size 50 is no multiple.*48 or 56"):
        ExpertQueryModel(backbone(family), 3, image_size=50)


@pytest.fixture
def saved(tmp_path):
    model_of().save_pretrained(tmp_path)
    return tmp_path, read_tensors(tmp_path / "model.safetensors")


@pytest.mark.parametrize("gone", ["layers.2.", "head.", "scene_queries", "head.out.bias"])
def test_incomplete_weights_are_refused(saved, gone):
    folder, tensors = saved
    kept = {name: tensor for name, tensor in tensors.items() if gone not in name}
    write_tensors(folder / "model.safetensors", kept)
    with pytest.raises(WeightsError, match=rf"incomplete: it lacks .*{gone}.*; fetch or train"):
        ExpertQueryModel.from_pretrained(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["scene_queries", "head.out.bias", "object_logit_scale"])
def test_values_that_are_not_finite_are_refused(saved, name, value):
    folder, tensors = saved
    tensors[name].view(-1)[0] = value
    write_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(WeightsError, match=f"{name} holds values that are not finite"):
        ExpertQueryModel.from_pretrained(folder)


def test_weights_of_another_model_are_refused(saved):
    folder, tensors = saved
    path = folder / "model.safetensors"
    write_tensors(path, dict(tensors, more=torch.ones(1)))
    with pytest.raises(WeightsError, match="no place for more"):
        ExpertQueryModel.from_pretrained(folder)
    write_tensors(path, dict(tensors, scene_queries=torch.ones(5, 64)))
    with pytest.raises(WeightsError, match="scene_queries"):
        ExpertQueryModel.from_pretrained(folder)
    path.write_text("<!doctype html>Sign in")
    with pytest.raises(WeightsError, match="a web page"):
        ExpertQueryModel.from_pretrained(folder)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_wrappers_prefix_is_taken_off(saved, prefix, pixels):
    folder, tensors = saved
    with torch.no_grad():
        want = ExpertQueryModel.from_pretrained(folder)(pixels).logits
    wrapped = {prefix + name: tensor for name, tensor in tensors.items()}
    write_tensors(folder / "model.safetensors", wrapped)
    with torch.no_grad():
        assert torch.equal(ExpertQueryModel.from_pretrained(folder)(pixels).logits, want)
