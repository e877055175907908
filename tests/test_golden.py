"""Numbers of the paper's released code, made once with random weights.

Values agree within 1e-5, gradients within 1e-4 of their largest entry.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from uniemo.files.uniemo import load_uniemo, official_name, official_state
from uniemo.losses import (
    condition_loss,
    likeliest_wrong,
    triplet_loss,
    understanding_loss,
    word_logits,
)

GOLDEN = Path(__file__).resolve().parent.parent.parent / "shared/golden"
pytestmark = pytest.mark.skipif(
    not (GOLDEN / "a.values.safetensors").exists(), reason=f"no golden numbers at {GOLDEN}"
)


def close(a, b, eps=1e-5):
    assert (a - b).abs().max() <= eps, f"differs by {(a - b).abs().max():.2e}"


@pytest.fixture(scope="module")
def values():
    return load_file(GOLDEN / "a.values.safetensors")


@pytest.fixture(scope="module", params=["VIT_query.pth", "best.pth"])
def files(request):
    return load_uniemo(GOLDEN / "a_official", request.param)


@pytest.fixture(scope="module")
def output(files, values):
    with torch.no_grad():
        return files.encoder.eval()(values["in.pixel_values"])


def test_weights(files):
    theirs, ours = load_file(GOLDEN / "a.weights.safetensors"), official_state(files.encoder)
    for k, t in ours["model"].items():
        assert torch.equal(t, theirs[f"model.{k}"]), k
    for k, t in ours["Emo_classifier"].items():
        assert torch.equal(t, theirs[f"Emo_classifier.{k}"]), k
    used = {f"model.{k}" for k in ours["model"]}
    assert {f"model.{k}" for k in files.left_out} == {
        k for k in theirs if k.startswith("model.")
    } - used  # every other name is listed
    for name in ("mapper", "mapper_scene", "mapper_object"):
        for k, t in getattr(files, name).state_dict().items():
            assert torch.equal(t, theirs[f"{name}.mlp.{k}"])


@pytest.mark.parametrize(
    "name", ["class_features", "scene_features", "object_features", "patch_tokens", "logits"]
)
def test_outputs(output, values, name):
    close(output[name], values[f"out.{name}"])


@pytest.mark.parametrize("kind", ["scene", "object"])
def test_attentions(output, values, kind):
    close(output[f"{kind}_attentions"], values[f"out.{kind}_attention"])


@pytest.mark.parametrize("i", range(4))
def test_losses_and_gradients(files, values, i):
    b = {k.removeprefix(f"batch{i}."): v for k, v in values.items() if k.startswith(f"batch{i}.")}
    model = files.encoder.train()
    dropout, model.head.dropout = model.head.dropout, 0.0
    model.zero_grad()
    pairs = {
        kind: (b[f"in.has_{kind}"], b[f"in.{kind}_text_features"]) for kind in ("scene", "object")
    }
    losses = understanding_loss(
        model, model(b["in.pixel_values"]), b["in.label"], **pairs, targets="identity"
    )
    losses["loss"].backward()
    model.eval()
    model.head.dropout = dropout
    for k, v in losses.items():
        close(v, b[f"out.{k}"])
    parameters = {
        official_name(n): (n, p)
        for n, p in model.named_parameters()
        if "_proj." not in n or "self_attn" not in n
    }
    grads = {k.removeprefix("grad."): g for k, g in b.items() if k.startswith("grad.")}
    assert len(grads) == 9
    for theirs, g in grads.items():
        n, p = parameters[theirs]
        mine = torch.zeros_like(p) if p.grad is None else p.grad
        close(
            mine.T if n.endswith("_projection.weight") else mine,
            g,
            max(1e-4 * g.abs().max().item(), 1e-8),
        )


def fused(files, output, values):
    return files.mapper(output.class_features) + sum(
        values[f"fusion.out.alpha_{k}"][:, None]
        * getattr(files, f"mapper_{k}")(output[f"{k}_features"])
        for k in ("scene", "object")
    )


@torch.no_grad()
def test_retrieval_as_released(files, output, values):
    "Arg max of the cosine with the mapped feature, both kinds in one list; alpha is the label's."
    text, table, label = (
        values[f"fusion.in.{k}"] for k in ("attribute_features", "table", "label")
    )
    for kind in ("scene", "object"):
        index = (
            F.normalize(getattr(files, f"mapper_{kind}")(output[f"{kind}_features"]), dim=1)
            @ F.normalize(text, dim=1).T
        ).argmax(1)
        assert torch.equal(index, values[f"fusion.out.{kind}_index"])
        close(table[index, label], values[f"fusion.out.alpha_{kind}"])


@torch.no_grad()
def test_pseudo_word(files, output, values):
    close(fused(files, output, values), values["fusion.out.pseudo_word"])


@torch.no_grad()
def test_condition_loss(files, output, values):
    logits, label = (
        word_logits(files.encoder.head, fused(files, output, values)),
        values["fusion.in.label"],
    )
    negative = likeliest_wrong(output.logits, label)
    assert torch.equal(negative, values["fusion.out.negative"])
    close(triplet_loss(logits, label, negative), values["fusion.out.loss_triplet"])
    released = condition_loss(logits, label, output.logits, weights=(1e-3, 1e-6))
    close(released["loss_ce"], values["fusion.out.loss_ce"])
    close(released["loss"], values["fusion.out.loss_cond_released"])
