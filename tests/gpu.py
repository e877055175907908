"""Everything that matters on an accelerator, in one script: `make gpu`.

Runs quickstart from the command line, one step of every stage at full size with random weights,
compares two runs of one seed and a run that was stopped, runs the tests of devices, and times each
stage beside a bare loop. Prints a line of JSON for each result, then a table; the exit code is 1
where something failed. Without an accelerator the same is tried on the CPU with the mini models.

Most of the time goes into compiling. `--warm PART` compiles what a part needs and times nothing;
with one TORCHINDUCTOR_CACHE_DIR, several such processes side by side make the second run short.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from diffusers import StableDiffusionPipeline, UniPCMultistepScheduler
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionModel

from uniemo.joint import JointConfig, JointStage
from uniemo.mini import paint_splits
from uniemo.pipeline import UniEmoPipeline
from uniemo.runs.estimate import estimate
from uniemo.runs.parts import CLIP_VISION, build_parts, read_config
from uniemo.space import EmotionSpace
from uniemo.train import MemoryData, Trainer
from uniemo.understanding import UnderstandingConfig, UnderstandingStage, build_encoder

TESTS = Path(__file__).resolve().parent
HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
# dense bf16 operations a second, as the makers state them
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
SIZE = "paper" if HAS_GPU else "mini"
DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5" if HAS_GPU else "mini"
BATCHES = dict(understanding=64, large=256, joint=32, images=8) if HAS_GPU else {}
NAMES = (254, 409)
ROWS = []
# `warm`: parts to compile for, no time is taken; `out`: a file for the lines of JSON
ASKED = argparse.Namespace(warm="", out=None)


def report(what, **values):
    "Print a result and keep it for the table."
    row = dict(
        what=what, **{k: round(v, 5) if isinstance(v, float) else v for k, v in values.items()}
    )
    ROWS.append(row)
    print(json.dumps(row), flush=True)
    if ASKED.out:
        with ASKED.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


@contextmanager
def section(name):
    "Time a part; a failure is reported, and the rest goes on."
    start = time.perf_counter()
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        report(name, failed=f"{type(error).__name__}: {error}"[:300])
    finally:
        report(f"{name}: seconds", value=time.perf_counter() - start)
        free()


def wait():
    if HAS_GPU:
        torch.cuda.synchronize()


def seconds_of(step, repeats=8, warm=3):
    "Mean seconds of `step()` after some steps that do not count."
    if not HAS_GPU or ASKED.warm:
        repeats, warm = 1, 1
    for _ in range(warm):
        step()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    wait()
    return (time.perf_counter() - start) / repeats


def peak():
    "What the device can do in a second, or None where that is not known."
    name = torch.cuda.get_device_name() if HAS_GPU else ""
    return next((value for key, value in PEAK.items() if key in name), None)


def utilisation(operations, seconds):
    return None if peak() is None else operations / seconds / peak()


def operations(build):
    "Floating point operations of what `build()` returns, counted without memory."
    with torch.device("meta"):
        run = build()
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def autocast():
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=HAS_GPU)


def free():
    gc.collect()
    if HAS_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory():
    "Gigabytes at the peak since `free()`."
    return torch.cuda.max_memory_allocated() / 1e9 if HAS_GPU else None


# ---- 1. the command line

LEAST = dict(
    num_train=48,
    num_test=32,
    understanding_steps=2,
    joint_steps=2,
    num_per_emotion=2,
    max_kept=2,
    num_inference_steps=1,
    num_threads=1,
)


def run_quickstart(folder):
    "The main job, as a user starts it; without an accelerator the least of it."
    given = {} if HAS_GPU else LEAST
    pairs = [part for key, value in given.items() for part in ("-p", key, str(value))]
    program = "import sys; from uniemo.runs.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "run", "quickstart", *pairs]
    done = subprocess.run(
        [*command, "--runs-dir", str(folder)], capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        raise RuntimeError(f"quickstart ended with {done.returncode}: {done.stderr[-1500:]}")
    run = next(Path(folder).glob("*quickstart*"))
    report("quickstart", **json.loads((run / "summary.json").read_text()))


# ---- 2. the same seed, and a run that was stopped


def short_training(splits, folder=None, stops=()):
    "Trained weights of a short stage 1, stopped and taken up again after the steps `stops`."
    config = UnderstandingConfig.preset(
        "mini",
        epochs=None,
        steps=9,
        eval_every=9,
        save_every=3,
        batch_size=16,
        num_queries=4,
        mixed_precision="auto",
    )
    data = {k: v for k, v in splits["train"].items() if k != "images"}
    for stop in (*stops, None):
        stage = UnderstandingStage(build_encoder("mini", config), config)
        Trainer(stage, config, data, folder=folder, progress=False).fit(until=stop)
    return {name: value.cpu() for name, value in stage.state_dict().items()}


def is_same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def check_equality(folder):
    splits = paint_splits(64, 16, 16)
    whole = short_training(splits)
    again = short_training(splits)
    resumed = short_training(splits, folder, stops=(4, 7))
    report("same seed twice", equal=is_same(whole, again))
    report("stopped twice and resumed", equal=is_same(whole, resumed))
    if not (is_same(whole, again) and is_same(whole, resumed)):
        raise RuntimeError("two runs of one seed differ")


# ---- 3. full size


def random_tensors(config, size, latents=None):
    "A data set of random images in memory."
    side = config.image_size
    tensors = dict(
        pixel_values=torch.randn(size, 3, side, side),
        label=torch.randint(8, (size,)),
        scene=torch.randint(NAMES[0], (size,)),
        objects=torch.zeros(size, NAMES[1]),
    )
    if latents is not None:
        tensors["latents"] = torch.randn(size, *latents)
    return MemoryData(tensors)


def step_of(stage, config, data):
    "One step of the trainer, again and again."
    trainer = Trainer(stage, config, data, progress=False)
    stage.train()
    batches = trainer.batches(0, 10**6)

    def step():
        trainer.one_step([next(batches) for _ in range(trainer.passes)])
        trainer.step += 1

    return step


def settings(preset, size, **changes):
    "Settings of a stage at one size."
    return preset.preset(
        SIZE,
        **dict(steps=10**6, epochs=None, batch_size=size, micro_batch=None, workers=0),
        **dict(mixed_precision="bf16" if HAS_GPU else "no"),
        image_size=224 if HAS_GPU else 64,
        **changes,
    )


@contextmanager
def quick_weights():
    "New weights from one small pool: a billion random numbers take longer than all the steps."
    pool = 0.02 * torch.randn(1 << 22)

    def fill(tensor, *args, **kwargs):
        flat = tensor.detach().view(-1)
        for first in range(0, len(flat), len(pool)):
            part = flat[first : first + len(pool)]
            part.copy_(pool[: len(part)])
        return tensor

    names = ("kaiming_uniform_", "_no_grad_normal_", "_no_grad_uniform_", "_no_grad_trunc_normal_")
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(torch.nn.init, name, fill))
        yield


def full_parts(config, diffusion=None):
    "The networks, with random weights; to compile, three layers of the encoder do."
    layers = dict(num_hidden_layers=3) if ASKED.warm and HAS_GPU else {}
    with quick_weights(), mock.patch.dict(CLIP_VISION, layers):
        return build_parts(config, diffusion, NAMES)


def bare_understanding(config, size):
    "The vision transformer with a linear head, as a script of ten lines would train it."
    model = CLIPVisionModel(read_config(config.backbone, "vision")).to(DEVICE)
    head = torch.nn.Linear(model.config.hidden_size, 8).to(DEVICE)
    weights = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-5)
    batch = random_tensors(config, size).to(DEVICE).tensors

    def step():
        with autocast():
            logits = head(model(batch["pixel_values"]).pooler_output)
            loss = torch.nn.functional.cross_entropy(logits.float(), batch["label"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def understanding_operations(config):
    "Of one image, forward and backward, in the bare network."
    vision = read_config(config.backbone, "vision")

    def build():
        model = CLIPVisionModel(vision)
        pixels = torch.randn(1, 3, config.image_size, config.image_size)
        return lambda: model(pixels).pooler_output.sum().backward()

    return operations(build)


def time_bare(config, work):
    "Seconds an image of the bare loop, at a small batch and, where it fits, at a large one."
    found = []
    for size in sorted({config.batch_size, BATCHES.get("large", config.batch_size)}):
        try:
            with quick_weights():
                step = bare_understanding(config, size)
            spent = seconds_of(step, repeats=5, warm=2)
        except torch.OutOfMemoryError:
            report(f"stage 1, bare loop, batch {size}", fits=False)
        else:
            used = utilisation(work * size, spent)
            report(f"stage 1, bare loop, batch {size}", images=size / spent, utilisation=used)
            found.append(spent / size)
        step = None
        free()
    return min(found)


def time_understanding():
    config = settings(UnderstandingConfig, BATCHES.get("understanding", 4))
    work = understanding_operations(config)
    bare = None if ASKED.warm else time_bare(config, work)
    # compiling takes minutes on a CPU
    size = BATCHES.get("large", config.batch_size)
    config = settings(UnderstandingConfig, size, compile=HAS_GPU)
    parts = full_parts(config)
    stage = UnderstandingStage(parts.encoder, config, *parts.text.values())
    spent = seconds_of(step_of(stage, config, random_tensors(config, size)))
    if not ASKED.warm:
        report(
            f"stage 1, batch {size}{', compiled' if HAS_GPU else ''}",
            images=size / spent,
            utilisation=utilisation(work * size, spent),
            to_bare=bare * size / spent,
            gigabytes=memory(),
        )


def joint_operations(config, parts):
    "Of one image: the encoder forward, the U-Net forward and backward to its text."
    vision = read_config(config.backbone, "vision")
    unet, side = parts.unet, parts.unet.config.sample_size
    width = parts.text_encoder.config.hidden_size

    def build():
        model = CLIPVisionModel(vision)
        pixels = torch.randn(1, 3, config.image_size, config.image_size)
        network = type(unet).from_config(unet.config).requires_grad_(False)
        latents = torch.randn(1, unet.config.in_channels, side, side)
        states = torch.randn(1, 77, width, requires_grad=True)
        timesteps = torch.ones(1)

        def run():
            with torch.no_grad():
                model(pixels)
            network(latents, timesteps, states).sample.sum().backward()

        return run

    return operations(build)


def joint_step(config, parts):
    "A step with cached latents, and the shape of those."
    side = parts.unet.config.sample_size
    shape = (parts.unet.config.in_channels, side, side)
    models = (parts.encoder, parts.mapper, parts.retriever, parts)
    stage = JointStage(*models, config, parts.text, cached=True)
    return step_of(stage, config, random_tensors(config, config.batch_size, shape))


def compare_memory(size, parts):
    "What a step takes that is not compiled, beside what the estimate says."
    config = settings(JointConfig, size)
    step = joint_step(config, parts)
    step()
    step()
    wait()
    how = dict(precisions=["bf16"], stages=["joint"], device="cuda")
    rows = estimate(config, **how).filter(like="bf16").iloc[:, 0].droplevel(0)
    # latents are cached, and what the program takes beside its tensors is not counted here
    said = rows["all"] - rows["program"] - rows["vae"]
    report("joint step, memory", gigabytes=memory(), estimated=float(said))


def time_joint():
    size = BATCHES.get("joint", 2)
    config = settings(JointConfig, size, compile=HAS_GPU)
    parts = full_parts(config, DIFFUSION)
    work = 0 if ASKED.warm else joint_operations(config, parts)
    if HAS_GPU and not ASKED.warm:
        compare_memory(size, parts)
        free()
    spent = seconds_of(joint_step(config, parts), repeats=5)
    if not ASKED.warm:
        report(
            f"joint step, batch {size}{', compiled' if HAS_GPU else ''}",
            images=size / spent,
            utilisation=utilisation(work * size, spent),
            gigabytes=memory(),
        )


def build_pipelines(count):
    "diffusers' pipeline and this one, over the same parts."
    dtype = torch.bfloat16 if HAS_GPU else torch.float32
    parts = full_parts(settings(JointConfig, count), DIFFUSION)
    names = ("vae", "text_encoder", "tokenizer", "unet")
    components = {name: getattr(parts, name) for name in names}
    components["scheduler"] = UniPCMultistepScheduler.from_config(parts.scheduler.config)
    rest = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    bare = StableDiffusionPipeline(**components, **rest).to(DEVICE, dtype)
    own = UniEmoPipeline(
        **components,
        encoder=parts.encoder.eval(),
        mapper=parts.mapper.eval(),
        retriever=parts.retriever.eval(),
        space=random_space(parts),
    ).to(DEVICE, dtype)
    for pipe in (bare, own):
        pipe.set_progress_bar_config(disable=True)
    return bare, own


def time_generation():
    "Images a second of `generate` beside the bare pipeline, the same steps and guidance."
    count = BATCHES.get("images", 2)
    bare, own = build_pipelines(count)
    steps = 20 if HAS_GPU and not ASKED.warm else 2
    sampling = dict(num_inference_steps=steps, guidance_scale=7.5)

    def paint_bare():
        bare(["a photo"] * count, **sampling)

    def paint():
        own.generate("awe", count, batch_size=count, judge=False, **sampling)

    if ASKED.warm:
        own.compile()
        paint()
        return
    # in turn, as a device's clock may rise or fall meanwhile
    pairs = []
    for number in range(4 if HAS_GPU else 1):
        runs = (paint_bare, paint)
        pairs.append([seconds_of(run, repeats=1, warm=int(number == 0)) for run in runs])
    slow, ours = (statistics.median(column) for column in zip(*pairs))
    ratio = statistics.median(ours / slow for slow, ours in pairs)
    report("generation, bare pipeline", images=count / slow)
    report("generation", images=count / ours, time_to_bare=ratio)
    if HAS_GPU:
        own.compile()
        fast = seconds_of(paint, repeats=3, warm=2)
        report("generation, compiled", images=count / fast, speed_to_bare=slow / fast)


def random_space(parts):
    "An emotion space of random features."
    emotions = parts.encoder.config.class_names
    width = parts.encoder.config.backbone_config.hidden_size
    space = EmotionSpace(emotions, width, kind="diagonal")
    labels = torch.arange(len(emotions)).repeat(4)
    space.update(*(torch.randn(len(labels), width) for _ in range(3)), labels)
    return space


# ---- everything


def run_tests():
    "The tests that ask for a device."
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(TESTS / "test_devices.py")]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], capture_output=True, text=True, cwd=TESTS
    )
    report("tests of devices", said=done.stdout.strip().splitlines()[-1])
    if done.returncode:
        raise RuntimeError(done.stdout[-1500:])


def print_table():
    "What was measured, a row a line."
    print()
    for row in ROWS:
        values = {k: v for k, v in row.items() if k != "what" and v is not None}
        said = "  ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()
        )
        print(f"{row['what']:<40} {said}")


PARTS = dict(
    quickstart=run_quickstart,
    tests=run_tests,
    equality=check_equality,
    understanding=time_understanding,
    joint=time_joint,
    generation=time_generation,
)
TIMED = ("understanding", "joint", "generation")
IN_A_FOLDER = {"quickstart", "equality"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument(
        "--warm", default="", help="compile for these parts alone: joint,generation"
    )
    parser.add_argument("--out", type=Path, help="a file that the lines of JSON are added to")
    parser.parse_args(namespace=ASKED)
    parts = [part for part in ASKED.warm.split(",") if part] or ASKED.only
    unknown = set(parts) - set(TIMED if ASKED.warm else PARTS)
    if unknown:
        parser.error(f"--warm takes {', '.join(TIMED)}, not {', '.join(sorted(unknown))}")
    name = torch.cuda.get_device_name() if HAS_GPU else "CPU"
    report("device", name=name, torch=torch.__version__)
    if not HAS_GPU:
        print("There is no accelerator here: a dry run on the CPU with the mini models.")
    for part in parts:
        with section(part), tempfile.TemporaryDirectory() as folder:
            PARTS[part](*[folder] * (part in IN_A_FOLDER))
    print_table()
    return int(any("failed" in row for row in ROWS))


if __name__ == "__main__":
    sys.exit(main())
