"The trainer and both stages under SIGKILL, in two processes, and what they must not do."

import os
import random
import signal
import socket
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import ConcatDataset, Dataset
from transformers import CLIPVisionConfig, CLIPVisionModel
from warm import processes

from uniemo.data.splits import open_splits
from uniemo.joint import JointConfig, train_joint
from uniemo.mini.splits import paint_splits
from uniemo.mini.writing import write_emoset
from uniemo.queries import ExpertQueryModel, parts
from uniemo.train.batches import SampleOrder, read_batches
from uniemo.train.callbacks import Callback
from uniemo.train.config import TrainConfig
from uniemo.train.trainer import Stage, Trainer
from uniemo.understanding import (
    ExtraImages,
    UnderstandingConfig,
    UnderstandingStage,
    train_understanding,
)

# how many random moments are tried
KILLS = int(os.environ.get("UNIEMO_KILLS", 3))


class Points(Dataset):
    "Points with noise as augmentation; some have no group."

    def __init__(self, n, seed):
        g = torch.Generator().manual_seed(seed)
        self.x, self.label = torch.randn(n, 4, generator=g), torch.randint(3, (n,), generator=g)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return dict(x=self.x[i] + 0.1 * torch.randn(4), label=self.label[i])


class Toy(Stage):
    "Dropout, a buffer that learns, a frozen layer: whatever could be forgotten in a checkpoint."

    metric, greater_is_better = "accuracy", True

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.frozen, self.body, self.norm, self.out = (
            nn.Linear(4, 8).requires_grad_(False),
            nn.Linear(8, 16),
            nn.BatchNorm1d(16),
            nn.Linear(16, 3),
        )

    def logits(self, x):
        return self.out(F.dropout(self.norm(self.body(self.frozen(x))), 0.3, self.training))

    def loss(self, batch, counts=None):
        logits = self.logits(batch["x"])
        return dict(loss=F.cross_entropy(logits, batch["label"]), noise=torch.rand(()))

    def parameter_groups(self):
        return dict(all=({n: p for n, p in self.named_parameters() if p.requires_grad}, 1e-2, 1e-2))

    def predict(self, batch):
        return dict(logits=self.logits(batch["x"]), label=batch["label"])

    def evaluate(self, p):
        return dict(accuracy=(p["logits"].argmax(1) == p["label"]).float().mean().item())


STEPS = 60
CONFIG = TrainConfig(
    steps=STEPS, batch_size=8, ema_decay=0.9, eval_every=7, save_every=4, log_every=6, cpu=True
)


def toy_run(folder, kill_after=None, kill_at_call=None, done=None):
    "The run; killed after so many seconds, or at so many calls that make a file lasting."
    torch.set_num_threads(1)
    if kill_at_call is not None:
        left = [kill_at_call]

        def count(f):
            def counted(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return f(*args, **kwargs)

            return counted

        for name in ("fsync", "rename", "replace"):
            setattr(os, name, count(getattr(os, name)))
    trainer = Trainer(Toy(), CONFIG, Points(50, 0), Points(30, 1), folder, progress=False)
    if kill_after is not None:
        timer = threading.Timer(kill_after, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    start = time.monotonic()
    trainer.fit()
    if done is not None:
        done.put(time.monotonic() - start)


def launch(*args, **kwargs):
    p = processes.Process(target=toy_run, args=args, kwargs=kwargs)
    p.start()
    p.join(900)
    return p.exitcode


def read_whole(path):
    "Tensors and metadata; the order of the metadata in the file is left to chance."
    with safe_open(path, "pt") as file:
        return load_file(path), file.metadata()


def end(folder):
    last = folder / f"step-{STEPS:06d}"
    return (
        (last / "weights.safetensors").read_bytes(),
        read_whole(folder / "best.safetensors"),
        torch.load(last / "state.pt", weights_only=True),
    )


def equal(a, b):
    "Equal to the last bit, all the way down."
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder, done = tmp_path_factory.mktemp("unbroken") / "run", processes.Queue()
    assert launch(folder, done=done) == 0
    return end(folder), done.get()


def check_resumed(folder, unbroken, hint):
    assert launch(folder) == 0, hint
    assert equal(end(folder), unbroken[0]), f"{hint}: the resumed run ended differently"
    assert not list(folder.glob(".*")), f"{hint}: unfinished files are left over"


@pytest.mark.parametrize("k", range(KILLS))
def test_killed_at_a_random_moment_and_resumed(tmp_path, unbroken, k):
    folder, share = tmp_path / "run", random.random()
    for _ in range(20):  # until the kill came before the end
        code = launch(folder, kill_after=share * unbroken[1])
        if code == -signal.SIGKILL:
            break
        assert code == 0
        folder, share = tmp_path / f"again{_}", share * 0.8
    left = sorted(p.name for p in folder.glob("step-*")) if folder.exists() else []
    check_resumed(folder, unbroken, f"killed at {share:.4f} of the run, when {left} were there")


@pytest.mark.parametrize("call", [0, 3, 4, 6, 7, 13, 21, 22])
def test_killed_while_writing(tmp_path, unbroken, call):
    "Each of these calls makes a file or a name lasting: of checkpoints, of the best weights."
    assert launch(tmp_path / "run", kill_at_call=call) == -signal.SIGKILL
    check_resumed(tmp_path / "run", unbroken, f"killed at call {call}")


# ---- the whole chain

FIRST = dict(epochs=None, steps=6, eval_every=3, save_every=2, log_every=2, batch_size=8)
SECOND = dict(steps=6, eval_every=3, save_every=2, log_every=2, batch_size=4, warm_start=8)


def chain_run(folder, kill_after=None, done=None):
    "Stage 1 and stage 2 with a warm start, on painted images; killed after so many seconds."
    torch.set_num_threads(1)
    start = time.monotonic()
    if kill_after is not None:
        timer = threading.Timer(kill_after, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    world = paint_splits(num_train=24, num_val=8, num_test=8)
    first = UnderstandingConfig.preset("mini", num_queries=2, cpu=True, **FIRST)
    second = JointConfig.preset("mini", num_queries=2, cpu=True, **SECOND)
    train_understanding(world, first, "mini", folder=folder / "first", progress=False)
    encoder = folder / "first" / "model"
    train_joint(world, second, encoder, folder=folder / "second", progress=False)
    if done is not None:
        done.put(time.monotonic() - start)


def chain_end(folder):
    "What both stages left, to the bit."
    left = [folder / "first" / "model" / "model.safetensors"]
    for stage in ("first", "second"):
        for name in ("predictions.safetensors", "metrics.json", "history.jsonl"):
            left.append(folder / stage / name)
    left.append(folder / "second" / "checkpoints" / "step-000006" / "weights.safetensors")
    found = {str(path.relative_to(folder)): path.read_bytes() for path in left}
    for stage in ("first", "second"):
        found[stage] = read_whole(folder / stage / "checkpoints" / "best.safetensors")
    return found


def launch_chain(*args, **kwargs):
    p = processes.Process(target=chain_run, args=args, kwargs=kwargs)
    p.start()
    p.join(900)
    return p.exitcode


@pytest.fixture(scope="module")
def unbroken_chain(tmp_path_factory):
    folder, done = tmp_path_factory.mktemp("chain"), processes.Queue()
    assert launch_chain(folder, done=done) == 0
    return chain_end(folder), done.get()


@pytest.mark.parametrize("k", range(KILLS))
def test_chain_killed_at_a_random_moment_and_resumed(tmp_path, unbroken_chain, k):
    folder, share = tmp_path / "run", random.uniform(0.1, 1)
    for again in range(20):  # until the kill came before the end
        code = launch_chain(folder, kill_after=share * unbroken_chain[1])
        if code == -signal.SIGKILL:
            break
        assert code == 0
        folder, share = tmp_path / f"again{again}", share * 0.8
    assert launch_chain(folder) == 0
    ended = chain_end(folder)
    there = unbroken_chain[0]
    different = [name for name in there if not equal(ended[name], there[name])]
    assert not different, f"killed at {share:.4f} of the chain"


# ---- several processes


def understanding(**changes):
    torch.manual_seed(0)
    clip = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=1,
            intermediate_size=64,
            image_size=16,
            patch_size=8,
            projection_dim=8,
        )
    )
    config = UnderstandingConfig.preset(
        "mini",
        **{
            **dict(steps=6, batch_size=16, log_every=1, num_queries=2, cpu=True, lr_backbone=1e-3),
            **changes,
        },
    )
    model = ExpertQueryModel(
        clip, config.num_queries, head_width=16, head_dropout=0.0, head_inputs=config.head_inputs
    )
    g = torch.Generator().manual_seed(1)
    data = dict(
        pixel_values=torch.randn(40, 3, 16, 16, generator=g),
        label=torch.randint(8, (40,), generator=g),
        scene=torch.randint(-2, 5, (40,), generator=g).clamp(min=-1),
        objects=(torch.rand(40, 6, generator=g) > 0.8).float(),
    )
    return model, config, data, torch.randn(5, 8, generator=g), torch.randn(6, 8, generator=g)


def understanding_run(folder=None, attributes=True, **changes):
    torch.set_num_threads(1)
    model, config, data, scene, objects = understanding(**changes)
    stage = UnderstandingStage(model, config, *((scene, objects) if attributes else ()))
    return Trainer(
        stage, config, data, {k: v[:21] for k, v in data.items()}, folder, progress=False
    ).fit()


def one_of_two(rank, port, queue, attributes):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="yes",
        GLOO_SOCKET_IFNAME="lo",
    )
    t = understanding_run(attributes=attributes)
    assert t.world == 2 and t.micro == 8
    if rank == 0:
        queue.put(t.history)
    wrapped = weakref.ref(t.model)
    t.close()
    assert wrapped() is None and not torch.distributed.is_initialized()


def values(history, key="loss"):
    return torch.tensor([r[key] for r in history if key in r])


@pytest.mark.parametrize("attributes", [True, False])
def test_two_processes_give_the_losses_of_one(attributes):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    queue = processes.Queue()
    both = [
        processes.Process(target=one_of_two, args=(r, port, queue, attributes), daemon=True)
        for r in range(2)
    ]  # daemon: one that hangs does not hold up the end of the tests
    for p in both:
        p.start()
    history = queue.get(timeout=900)
    for p in both:
        p.join(60)
    assert [p.exitcode for p in both] == [0, 0]
    one = understanding_run(attributes=attributes)
    assert len(values(history)) == 6
    for key in ("loss", "loss_cls", "loss_scene", "loss_object"):
        torch.testing.assert_close(
            values(history, key), values(one.history, key), atol=1e-5, rtol=0
        )
    assert [r["accuracy"] for r in history if r["split"] == "valid"] == [
        r["accuracy"] for r in one.history if r["split"] == "valid"
    ]


def test_passes_give_the_losses_of_one():
    a, b = understanding_run(), understanding_run(micro_batch=4)
    torch.testing.assert_close(values(a.history), values(b.history), atol=1e-5, rtol=0)


# ---- what it must not do


def test_no_waiting_for_the_device_in_a_step():
    model, config, data, scene, objects = understanding(steps=20, log_every=10)
    trainer = Trainer(
        UnderstandingStage(model, config, scene, objects), config, data, progress=False
    )
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            if f in (
                torch.ops.aten._local_scalar_dense.default,
                torch.ops.aten.nonzero.default,
                torch.ops.aten.is_nonzero.default,
            ):
                seen.append(str(f))
            return f(*args, **(kwargs or {}))

    batches = trainer.batches(0, 3)
    trainer.one_step([next(batches)])
    with Watch():
        trainer.one_step([next(batches)])
    assert seen == []


def test_a_loss_that_is_no_number_is_never_saved(tmp_path):
    class Sick(Toy):
        def loss(self, batch, counts=None):
            out = super().loss(batch)
            self.calls = getattr(self, "calls", 0) + 1
            return dict(out, loss=out["loss"] * (torch.nan if self.calls == 6 else 1))

    with pytest.raises(
        FloatingPointError, match=r"step 6: the loss is nan.*Lower the learning rate \(all 0.01\)"
    ):
        Trainer(Sick(), CONFIG, Points(50, 0), folder=tmp_path / "run", progress=False).fit()
    assert [p.name for p in (tmp_path / "run").glob("step-*")] == ["step-000004"]


def test_memory_runs_out_on_the_last_image():
    class Greedy(Toy):
        def loss(self, batch, counts=None):
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: "
                "you tried to allocate 4000 bytes"
            )

    with pytest.raises(RuntimeError, match="try micro_batch=4. batch_size stays 8, in 2 passes"):
        Trainer(Greedy(), CONFIG, Points(50, 0), progress=False).fit()
    config = TrainConfig(steps=1, batch_size=1, cpu=True)
    with pytest.raises(RuntimeError, match="that is the least"):
        Trainer(Greedy(), config, Points(50, 0), progress=False).fit()


def test_a_parameter_in_no_group_is_named():
    class Forgets(Toy):
        def parameter_groups(self):
            return dict(
                all=(
                    {
                        n: p
                        for n, p in self.named_parameters()
                        if p.requires_grad and n != "out.bias"
                    },
                    1e-2,
                    0.0,
                )
            )

    with pytest.raises(ValueError, match="'out.bias'"):
        Trainer(Forgets(), CONFIG, Points(50, 0))


@pytest.mark.parametrize("left", [1e3, -1e3])
def test_gradients_of_before_are_not_followed(left):
    "What a warm start, or anyone, left in `grad` has no say in the first step."
    clean = Trainer(Toy(), CONFIG, Points(50, 0), progress=False).fit(until=6)
    stage = Toy()
    for p in stage.parameters():
        p.grad = torch.full_like(p, left)
    dirty = Trainer(stage, CONFIG, Points(50, 0), progress=False).fit(until=6)
    assert dirty.history == clean.history


def test_a_validation_that_is_no_number_is_never_best(tmp_path):
    "A first validation that is NaN stayed best for ever."

    class Shy(Toy):
        def evaluate(self, p):
            self.calls = getattr(self, "calls", 0) + 1
            return dict(accuracy=float("nan") if self.calls in (1, 3) else float(self.calls))

    config = replace(CONFIG, steps=28, ema_decay=None)
    with pytest.warns(UserWarning, match="after step 7: accuracy is nan"):
        trainer = Trainer(Shy(), config, Points(50, 0), Points(30, 1), tmp_path, progress=False)
        trainer.fit()
    assert (trainer.validation.best, trainer.validation.best_step) == (4.0, 28)


def test_all_validations_without_a_number():
    class Blind(Toy):
        def evaluate(self, p):
            return dict(accuracy=float("nan"))

    trainer = Trainer(Blind(), CONFIG, Points(50, 0), Points(30, 1), progress=False)
    with pytest.warns(UserWarning, match="are not kept"):
        trainer.fit(until=7)
    with pytest.raises(ValueError, match="no number does not count"):
        trainer.load_best()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_what_is_trained_is_float32(dtype):
    "fp16 gave NaN with wrong advice, bf16 learnt worse without a word."
    stage = Toy()
    stage.out.to(dtype)
    with pytest.raises(ValueError, match="out.weight is .*: what is trained must be float32"):
        Trainer(stage, CONFIG, Points(50, 0), progress=False)


def test_frozen_parts_may_be_of_any_type():
    stage = Toy()
    stage.frozen.to(torch.bfloat16)
    Trainer(stage, CONFIG, Points(50, 0), progress=False)


# ---- its folder


@pytest.fixture
def finished(tmp_path):
    folder = tmp_path / "run"
    config = replace(CONFIG, steps=28, keep=4)
    Trainer(Toy(), config, Points(50, 0), Points(30, 1), folder, progress=False).fit()
    return folder, config


def resume(finished):
    folder, config = finished
    return Trainer(Toy(), config, Points(50, 0), Points(30, 1), folder, progress=False).fit()


def test_stray_names_do_not_stop_a_resumption(finished):
    folder, _ = finished
    (folder / "step-000028.bak").mkdir()
    (folder / "step-notes").write_text("mine")
    (folder / "step-").mkdir()
    assert resume(finished).step == 28


@pytest.mark.parametrize("manifest", ["{}", "[]", "", '{"state.pt": 1}', "null"])
def test_an_empty_manifest_is_not_whole(finished, manifest):
    folder, _ = finished
    (folder / "step-000028" / "manifest.json").write_text(manifest)
    with pytest.warns(UserWarning, match="step-000028 is damaged; going on from step-000024"):
        assert resume(finished).step == 28


def test_nothing_whole_is_one_clear_error(finished):
    folder, _ = finished
    for path in folder.glob("step-*/weights.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="delete this folder to make it again"):
        resume(finished)


@pytest.mark.parametrize("change", ["bit", "short", "gone", "web page"])
def test_damaged_best_weights_are_refused(finished, change):
    folder, _ = finished
    path = folder / "best.safetensors"
    trainer = resume(finished)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    if change == "short":
        content = content[:-8]
    if change == "web page":
        content = b"<!DOCTYPE html><html></html>"
    path.unlink() if change == "gone" else path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match="best.safetensors"):
        trainer.load_best()


def test_a_second_trainer_in_the_folder_is_refused(tmp_path):
    class Second(Callback):
        def after_step(self, trainer):
            if trainer.step == 1:
                with pytest.raises(RuntimeError, match="another training is at work"):
                    Trainer(Toy(), CONFIG, Points(50, 0), folder=tmp_path, progress=False).fit()

    Trainer(Toy(), CONFIG, Points(50, 0), folder=tmp_path, progress=False).add(Second()).fit(
        until=2
    )
    # and the lock goes with the process that had it
    Trainer(Toy(), CONFIG, Points(50, 0), folder=tmp_path, progress=False).fit(until=2)


# ---- data


class Epochs(Dataset):
    "Draws its augmentation from an epoch, as the package's data sets do."

    def __init__(self):
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()

    def __len__(self):
        return 5

    def set_epoch(self, e):
        self._epoch.fill_(e)

    def __getitem__(self, i):
        return torch.tensor([i, int(self._epoch)])


def test_each_position_has_its_own_augmentation_whoever_reads_it():
    data, spans = ConcatDataset([Epochs(), Epochs()]), [(k, k + 3) for k in range(0, 30, 3)]
    one, two = (
        torch.cat(list(read_batches(data, SampleOrder(10), spans, workers=w))) for w in (0, 2)
    )
    assert torch.equal(one, two) and torch.equal(one[:, 1], torch.arange(30))


# ---- stage 1


def test_frozen_parts_stay():
    model, config, data, scene, objects = understanding(train_parts=("queries",))
    before = {n: p.clone() for n, p in model.named_parameters()}
    Trainer(UnderstandingStage(model, config, scene, objects), config, data, progress=False).fit()
    for part, group in parts(model).items():
        changed = [n for n, p in group.items() if not torch.equal(p, before[n])]
        assert len(changed) == (len(group) if part == "queries" else 0), part


@pytest.mark.parametrize(
    "changes",
    [
        dict(targets="identity"),
        dict(num_queries=0),
        dict(head_inputs="all"),
        dict(mixed_precision="bf16"),
        dict(ema_decay=0.9),
    ],
)
def test_options_run(changes):
    t = understanding_run(**changes)
    assert torch.isfinite(values(t.history)).all()
    assert ("scene_accuracy" in [r for r in t.history if r["split"] == "valid"][-1]) == (
        changes.get("num_queries") != 0
    )


def test_votes():
    model, config, data, scene, objects = understanding()
    data["votes"] = torch.rand(40, 8)
    t = Trainer(
        UnderstandingStage(model, config, scene, objects), config, data, data, progress=False
    ).fit()
    assert {"accuracy", "loss_cls", "scene_accuracy", "object_accuracy"} <= set(t.evaluate(data))


# ---- stages in one call


def short(**changes):
    return UnderstandingConfig.preset(
        "mini", **{**dict(epochs=None, steps=2, batch_size=8, num_queries=2, cpu=True), **changes}
    )


def test_stage_1_on_disk_and_in_memory(tmp_path):
    "The same function, the same names of metrics; further images leave the length as it is."
    world = paint_splits(num_train=24, num_val=16, num_test=16)
    on_disk = open_splits(write_emoset(tmp_path / "world", 60, progress=False))
    memory = train_understanding(world, short(), "mini", folder=tmp_path / "a", progress=False)
    disk = train_understanding(on_disk, short(), "mini", progress=False)
    assert memory.metrics.keys() == disk.metrics.keys()
    assert {"val", "test"} == memory.predictions.keys()
    left = {"checkpoints", "model", "predictions.safetensors", "history.jsonl", "metrics.json"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == left
    extra = ExtraImages(tmp_path / "world", 0.5, 0.3)
    third = train_understanding(world, short(), "mini", extra=extra, progress=False)
    assert third.trainer.step == 2 and third.metrics["images"] == 24 + len(on_disk["train"])
    with pytest.raises(ValueError, match="learnt by heart"):
        again = ExtraImages(on_disk["test"], 0.5)
        train_understanding(on_disk, short(), "mini", extra=again, progress=False)


def test_one_query_an_object_in_both_stages(tmp_path):
    "Queries that part, passes that add up, and an encoder that stage 2 and a folder take as any."
    world = paint_splits(num_train=24, num_val=16, num_test=16)
    chain = dict(read_out="last", prior="pairs", object_slots=True)
    runs = [
        train_understanding(world, short(**chain, **more), "mini", progress=False)
        for more in ({}, dict(micro_batch=4))
    ]
    histories = [values(run.trainer.history, "loss_object") for run in runs]
    torch.testing.assert_close(*histories, atol=1e-5, rtol=0)
    encoder = runs[0].model
    out = encoder(world["test"]["pixel_values"])
    assert out.object_slots.shape == (16, 2, 128)
    apart = torch.cosine_similarity(*out.object_slots.unbind(1), dim=-1)
    assert apart.max() < 0.99
    steps = dict(steps=2, batch_size=8, warm_start=2, cpu=True)
    config = JointConfig.preset("mini", **steps)
    joint = train_joint(world, config, encoder, progress=False)
    assert torch.isfinite(values(joint.trainer.history, "loss_object")).all()
    encoder.save_pretrained(tmp_path)
    again = ExpertQueryModel.from_pretrained(tmp_path).eval()
    pixels = world["test"]["pixel_values"]
    assert torch.equal(again(pixels).object_features, encoder.eval()(pixels).object_features)


@pytest.mark.parametrize("changes", [dict(read_out="thirds"), dict(targets="identity")])
def test_one_query_an_object_needs_names_at_the_end(changes):
    with pytest.raises(ValueError, match="read_out='last' and targets='vocabulary'"):
        short(**{**dict(read_out="last", object_slots=True), **changes})


def test_further_images_that_cannot_join_are_refused(tmp_path):
    "A folder with images of another split, and one with an emotion that is none of the data."
    on_disk = open_splits(write_emoset(tmp_path / "world", 60, progress=False))
    again = ExtraImages(tmp_path / "world" / "image", 0.5)
    with pytest.raises(ValueError, match="images are in the split 'val' too.*learnt by heart"):
        train_understanding(on_disk, short(), "mini", extra=again, progress=False)
    more = write_emoset(tmp_path / "more", 48, seed=48, progress=False)
    (more / "image" / "awe").rename(more / "image" / "joy")
    other = ExtraImages(more / "image", 0.5)
    with pytest.raises(ValueError, match="no emotion of the data that it should join"):
        train_understanding(on_disk, short(), "mini", extra=other, progress=False)


def test_stage_2_on_disk_with_latents_made_once(tmp_path):
    "What a data set at full size needs: images read as needed, latents kept on the disk."
    on_disk = open_splits(write_emoset(tmp_path / "world", 60, progress=False))
    first = train_understanding(on_disk, short(), "mini", progress=False)
    config = JointConfig.preset(
        "mini", steps=2, batch_size=4, num_queries=2, warm_start=2, keep_latents=True, cpu=True
    )
    folder = tmp_path / "second"
    result = train_joint(on_disk, config, first.model, folder=folder, progress=False)
    assert {"loss_diff", "word_accuracy", "accuracy"} <= result.metrics.keys()
    made = {p: p.stat().st_mtime_ns for p in folder.glob("latents/*/*.npy")}
    assert len(made) == 3
    again = train_joint(on_disk, config, first.model, folder=folder, progress=False)
    assert again.metrics == result.metrics
    assert made == {p: p.stat().st_mtime_ns for p in folder.glob("latents/*/*.npy")}


def test_what_stage_1_cannot_know_is_asked():
    world = paint_splits(num_train=8, num_val=8, num_test=8)
    encoder = train_understanding(world, short(), "mini", text={}, progress=False).model
    with pytest.raises(ValueError, match="whose text tower"):
        train_understanding(world, short(), encoder, progress=False)
