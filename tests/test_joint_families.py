"Stage 2 against every family: what is trained, what stays, and that the words can be used."

import warnings

import pytest
import torch
from families import (
    STAGE,
    call_settings,
    largest_difference,
    painted,
    stage_and_batch,
    tiny_encoder,
)
from tiny_pipelines import BUILDERS, build

from uniemo.diffusion.denoisers import denoiser_of
from uniemo.diffusion.families import save_lora
from uniemo.diffusion.warm import warm_start
from uniemo.joint import JointConfig, JointStage, PipelineStage, train_joint
from uniemo.mini.splits import paint_splits
from uniemo.space import fit_space
from uniemo.towers import text_towers
from uniemo.understanding import plain_batches
from uniemo.words import EmotionWords

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def world():
    return paint_splits(num_train=8, num_val=4, num_test=4)


@pytest.fixture(scope="module")
def text(world):
    torch.manual_seed(3)
    return {kind: torch.randn(len(names), 24) for kind, names in world.names.items() if names}


def train(pipe, world, text, mapper=None, **changes):
    config = JointConfig.preset("mini", **(STAGE | changes))
    with warnings.catch_warnings():
        # that these models paint larger images
        warnings.simplefilter("ignore")
        return train_joint(
            world,
            config,
            tiny_encoder(),
            pipe,
            text=text,
            mapper=dict(separate=True) | (mapper or {}),
            progress=False,
        )


def weights(pipe):
    "Of all frozen networks of a pipeline."
    parts = {k: v for k, v in pipe.components.items() if isinstance(v, torch.nn.Module)}
    return {
        f"{part}.{name}": value.clone()
        for part, module in parts.items()
        for name, value in module.state_dict().items()
    }


def emotion_words(result, world):
    encoder = result.parts["encoder"].eval()
    space = fit_space(plain_batches(world["train"]), encoder, world.emotions.names, "diagonal")
    return EmotionWords(encoder, result.parts["mapper"], result.parts["retriever"], space)


@pytest.mark.parametrize("family", list(BUILDERS))
def test_train_save_load_generate(family, world, text, tmp_path):
    pipe = build(family)
    before = weights(pipe)
    result = train(pipe, world, text)
    first = family == "Stable Diffusion 1.x and 2.x"
    assert type(result.stage) is (JointStage if first else PipelineStage)
    # 1. the loss is a number, and the words of every tower were moved
    losses = [row["loss"] for row in result.trainer.history if "loss" in row]
    assert len(losses) == 2 and torch.tensor(losses).isfinite().all()
    seen = result.trainer.predict(result.trainer.valid_data)
    assert seen["loss_diff"].shape == (4,) and seen["loss_diff"].isfinite().all()
    # 2. what is frozen is as it was
    after = weights(pipe)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # 3. saved, loaded, attached
    words = emotion_words(result, world)
    words.save_pretrained(tmp_path)
    again = EmotionWords.from_pretrained(tmp_path).attach(pipe)
    assert again.mappers[0].token_sizes == [tower.width for tower in text_towers(pipe)]
    settings = call_settings(pipe)
    images = again.generate("awe", 1, prompt="<emotion> castle", **settings).images
    words.attach(pipe)
    same = words.generate("awe", 1, prompt="<emotion> castle", **settings).images
    # a loaded weight may lie elsewhere in memory, and some processors then round its last bit apart
    assert largest_difference(images, same) <= 1


@pytest.mark.parametrize("family", list(BUILDERS))
def test_the_denoisers_error_reaches_every_head(family, world, text):
    "With L_diff alone, and with checkpointing as without."
    gradients = []
    for checkpointing in (False, True):
        stage, batch = stage_and_batch(
            build(family), text, gradient_checkpointing=checkpointing, joint_weights=(0, 0, 1.0)
        )
        stage.train()
        torch.manual_seed(1)
        loss = stage.loss(batch)["loss"]
        loss.backward()
        assert torch.isfinite(loss)
        named = {n: p for n, p in stage.named_parameters() if p.grad is not None}
        heads = [n for n in named if n.startswith("mapper.") and n.endswith("weight")]
        assert len(heads) == sum(n.endswith("weight") for n, _ in stage.mapper.named_parameters())
        # T5's scores of a tiny model may hardly move, but they do
        moved = {n: p.grad.abs().max() for n, p in named.items() if n.startswith("mapper.")}
        assert min(moved.values()) > 0, moved
        assert not [n for n in named if n.startswith(("unet", "text_encoder", "vae"))]
        gradients.append({n: p.grad for n, p in named.items()})
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, atol=1e-6, rtol=1e-3)


def test_a_tower_without_words_is_read_once(text):
    "SD 3's T5 reads the prompt without its placeholder; the answer is that of the whole run."
    pipe = build("Stable Diffusion 3")
    sizes = [16, 0]
    stage, batch = stage_and_batch(pipe, text, dict(more_token_sizes=sizes), prompt="<emotion> dog")
    stage.eval()
    with torch.no_grad():
        words, _ = stage.words(stage.model(batch["pixel_values"]), batch["label"])
        assert [None if w is None else w.shape[-1] for w in words] == [16, 16, None]
        first = stage.prompt_embeds(words)
        assert (stage.memory.met, len(stage.memory.answers)) == (0, 1)
        second = stage.prompt_embeds(words)
        assert stage.memory.met == 1
        # not from memory, and as the user would ask for it
        plain = pipe.encode_prompt(
            ["dog"] * 2, None, None, "cpu", 1, False, max_sequence_length=256
        )[0]
    tokens = first["encoder_hidden_states"].shape[1] - 256
    for name, value in first.items():
        assert torch.equal(value, second[name])
    assert torch.equal(first["encoder_hidden_states"][:, tokens:], plain[:, tokens:])
    assert not torch.equal(first["encoder_hidden_states"][:, :tokens], plain[:, :tokens])


def test_an_empty_prompt_is_read_once(text):
    pipe = build("FLUX.1")
    stage, batch = stage_and_batch(pipe, text, word_dropout=0.999)
    stage.train()
    torch.manual_seed(0)
    words, _ = stage.words(stage.model(batch["pixel_values"]), batch["label"])
    dropped = stage.prompt_embeds(words)
    with torch.no_grad():
        plain = denoiser_of(pipe).encode(["", ""], "cpu")
    for name, value in dropped.items():
        torch.testing.assert_close(value, plain[name], atol=1e-5, rtol=1e-4)
    met = stage.memory.met
    stage.prompt_embeds(words)
    assert stage.memory.met == met + 2


def test_lora(world, text, tmp_path):
    family = "FLUX.1"
    pipe = build(family)
    result = train(pipe, world, text, lora_rank=2, lr_lora=0.1)
    model = result.stage.unet
    trained = {n: p for n, p in model.named_parameters() if ".uniemo." in n}
    assert max(p.abs().max() for n, p in trained.items() if "lora_B" in n) > 0
    save_lora(model, pipe, tmp_path)
    words = emotion_words(result, world).attach(pipe)
    settings = call_settings(pipe)
    with_lora = words.generate("awe", 1, **settings).images
    other = build(family)
    words.attach(other)
    without = words.generate("awe", 1, **settings).images
    other.load_lora_weights(tmp_path)
    loaded = words.generate("awe", 1, **settings).images
    assert (painted(with_lora) != painted(without)).any()
    assert abs(painted(with_lora) - painted(loaded)).max() <= 1


def test_half_precision_of_what_is_frozen(text):
    "As on a GPU: T5 and the denoiser in bf16, CLIP in float32, the pipeline's own untouched."
    pipe = build("Stable Diffusion 3")
    stage, batch = stage_and_batch(pipe, text)
    stage.hold_frozen(torch.bfloat16)
    kinds = [encoder.dtype for encoder in stage.text_encoders]
    assert kinds == [torch.float32, torch.float32, torch.bfloat16]
    assert stage.unet.dtype == stage.vae.dtype == torch.bfloat16
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float32}
    assert pipe.text_encoder_3.dtype == torch.float32
    loss = stage.loss(batch)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert stage.mapper.more_heads[1]["class"].weight.grad.abs().max() > 0


@pytest.mark.parametrize("family", list(BUILDERS))
def test_a_warm_start_brings_every_towers_words_to_the_names(family, world, text):
    pipe = build(family)
    before = weights(pipe)
    stage, batch = stage_and_batch(pipe, text, warm_start=40)
    old = {name: value.clone() for name, value in stage.mapper.named_parameters()}
    first = stage_and_batch(build(family), text, warm_start=40)[0]
    far, _ = warm_start(first, [batch], world.names, steps=2, lr=1e-6, batch_size=4)
    near, reading = warm_start(stage, [batch], world.names, steps=40, lr=1e-2, batch_size=4)
    # 1. towards the names and towards the captions, for the words of every tower
    assert near < far and torch.tensor([near, reading]).isfinite().all()
    heads = [n for n in old if n.endswith("weight")]
    moved = [n for n, p in stage.mapper.named_parameters() if not torch.equal(p, old[n])]
    assert set(heads) <= set(moved)
    # 2. what is frozen is as it was
    after = weights(pipe)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_refused(text):
    with pytest.raises(ValueError, match="more_token_sizes must be"):
        stage_and_batch(build("Stable Diffusion XL"), text, dict(more_token_sizes=[7]))
    with pytest.raises(ValueError, match="lora_rank"):
        JointConfig.preset("mini", lora_rank=-1)
