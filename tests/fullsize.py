"""`make fullsize`: the paper's models in full size, with random weights, on photographs.

Two joint steps at batch 1 and one generation in three steps, each in a process of its own. Prints
what the operating system measured beside the estimate, and writes it to fullsize.json. Then one
joint step against a pipeline of SDXL's size, where the estimate stays below the limit and fits the
machine; else the figure is said, and the step is left out.
`python tests/fullsize.py --config mini` is the same with small models, without SDXL;
`--only sdxl` is that step alone; what the file says of the others stays.
`--table` measures nothing: it writes nbs/diffusion/memory.csv, what the larger families will take.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

LIMIT = 20e9  # bytes that may be used at most
TABLE = Path(__file__).resolve().parent.parent / "nbs" / "diffusion" / "memory.csv"
# side in pixels that a model paints, and what `--diffusion` is told; None: the preset's own
FAMILIES = {
    "Stable Diffusion 1.5": (512, None),
    "Stable Diffusion XL": (1024, "sdxl"),
    "Stable Diffusion 3.5 medium": (1024, "sd3.5-medium"),
    "FLUX.1": (1024, "flux"),
}
PHOTOS = ("astronaut", "coffee", "chelsea", "rocket")  # of scikit-image


def peak():
    "Largest resident memory of this process so far, in bytes (Linux counts in KiB)."
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if platform.system() == "Darwin" else 1024
    )


def photographs(encoder, vae_size):
    "Items as a data set gives them, one crop for encoder and autoencoder."
    import torch
    from PIL import Image
    from skimage import data

    from uniemo.data.transforms import joint_transform

    own = encoder.config
    view = joint_transform(own.image_size, own.image_mean, own.image_std, vae_size)
    rows = []
    for k, name in enumerate(PHOTOS):
        objects = torch.zeros(409)
        objects[[k, k + 7]] = 1
        rows.append(
            dict(view(Image.fromarray(getattr(data, name)())), label=k, scene=k, objects=objects)
        )
    return rows


def build(config, diffusion):
    import torch

    from uniemo.runs.parts import build_parts

    torch.manual_seed(0)
    return build_parts(config, diffusion)


def joint(config, diffusion, steps):
    "Joint steps by the trainer: seconds of each, and the last loss."
    from uniemo.joint import JointStage

    p = build(config, diffusion)
    stage = JointStage(p.encoder, p.mapper, p.retriever, p, config, p.text)
    return timed(stage, p.encoder, config)


def timed(stage, encoder, config):
    "Train a stage on photographs: seconds of each step, and the last loss."
    from uniemo.train.callbacks import Callback
    from uniemo.train.trainer import Trainer

    class Clock(Callback):
        def before_fit(self, t):
            self.times = [time.perf_counter()]

        def after_step(self, t):
            self.times.append(time.perf_counter())

    clock = Clock()
    images = photographs(encoder, config.vae_size)
    trainer = Trainer(stage, config, images, progress=False).add(clock).fit()
    return dict(
        seconds=[b - a for a, b in zip(clock.times, clock.times[1:])],
        loss=trainer.history[-1]["loss"],
    )


def sdxl(config, diffusion, steps):
    "Joint steps against a pipeline of SDXL's size: seconds of each, and the last loss."
    import torch

    from uniemo.joint import PipelineStage
    from uniemo.runs.larger import build_pipeline, larger_mapper
    from uniemo.runs.parts import build_parts, build_retriever

    torch.manual_seed(0)
    parts = build_parts(config)
    pipe = build_pipeline(diffusion)
    mapper = larger_mapper(parts.encoder, pipe)
    retriever = build_retriever(config, parts.text)
    stage = PipelineStage(parts.encoder, mapper, retriever, pipe, config, parts.text)
    return timed(stage, parts.encoder, config)


def generation(config, diffusion, steps):
    "One image in some steps, by the pipeline."
    import numpy as np
    import torch
    from diffusers import UniPCMultistepScheduler

    from uniemo.pipeline import UniEmoPipeline
    from uniemo.space import fit_space

    p = build(config, diffusion)
    rows = photographs(p.encoder.eval(), config.vae_size)
    batch = {
        k: torch.stack([torch.as_tensor(r[k]) for r in rows]) for k in ("pixel_values", "label")
    }
    batch = {
        "pixel_values": batch["pixel_values"].repeat(4, 1, 1, 1),
        "label": torch.arange(16) % 8,
    }
    space = fit_space([batch], p.encoder, kind="diagonal")
    pipe = UniEmoPipeline(
        p.vae.eval(),
        p.text_encoder.eval(),
        p.tokenizer,
        p.unet.eval(),
        UniPCMultistepScheduler.from_config(p.scheduler.config),
        p.encoder,
        p.mapper.eval(),
        p.retriever.eval(),
        space,
    )
    pipe.set_progress_bar_config(disable=True)
    times = []
    made = pipe.generate(
        "awe",
        1,
        num_inference_steps=steps,
        callback_on_step_end=lambda *args: times.append(time.perf_counter()) or {},
    )
    return dict(
        seconds=[b - a for a, b in zip(times, times[1:])],
        size=list(made.images[0].size),
        deviation=float(np.asarray(made.images[0]).std()),
    )


def configured(name, **changes):
    from uniemo.joint import JointConfig

    return JointConfig.preset(
        name,
        **{
            **dict(
                epochs=None,
                steps=2,
                batch_size=1,
                mixed_precision="no",
                workers=0,
                cpu=True,
                log_every=1,
                clip_norm=1.0,
            ),
            **changes,
        },
    )


def child(args):
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    program = peak()
    start = time.perf_counter()
    changes, diffusion = {}, args.diffusion
    if args.child == "sdxl":
        changes, diffusion = SDXL, "sdxl"
    config = configured(args.config, **changes)
    run = dict(joint=joint, generation=generation, sdxl=sdxl)[args.child]
    out = run(config, diffusion, 2 if args.child == "joint" else 3)
    print(json.dumps(dict(out, program=program, peak=peak(), total=time.perf_counter() - start)))


def main(args):
    "Both stages, each in a child; the table, and 0 where all is within its limits."
    import pandas as pd
    import psutil
    import torch

    from uniemo.runs.estimate import estimate

    if args.only == "sdxl":
        found = larger(args)
        if args.out and found:
            write(args.out, sdxl=found)
        return 0 if found else 1
    rows, ok = [], True
    for stage, steps in (("joint", 2), ("generation", 3)):
        t = estimate(
            configured(args.config),
            (stage,),
            ("fp32",),
            diffusion=args.diffusion,
            device="cpu",
            num_images=1,
        )["fp32 GB"]
        expected = float(t.iloc[-1])
        if expected * 1.2e9 > psutil.virtual_memory().available:
            free = psutil.virtual_memory().available / 1e9
            sys.exit(
                f"{stage} needs about {expected:.1f} GB, {free:.1f} GB are free: "
                "close something first"
            )
        m = measured(args, stage)
        s = m["seconds"]
        rows.append(
            {
                "stage": stage,
                "steps": steps,
                "peak GB": round(m["peak"] / 1e9, 2),
                "estimated GB": round(expected, 2),
                "off by": f"{expected / m['peak'] * 1e9 - 1:+.0%}",
                "seconds a step": round(sum(s) / len(s), 1),
                "seconds in all": round(m["total"]),
                "of it program GB": round(m["program"] / 1e9, 2),
            }
        )
        ok &= m["peak"] < LIMIT and abs(expected * 1e9 / m["peak"] - 1) <= 0.2
        print(
            pd.DataFrame(rows[-1:]).to_string(index=False),
            {k: m[k] for k in ("loss", "size", "deviation") if k in m},
            flush=True,
        )
    found = {} if args.config == "mini" else larger(args)
    ok &= found is not None
    if args.out:
        environment = dict(
            config=args.config,
            torch=torch.__version__,
            python=platform.python_version(),
            cores=os.cpu_count(),
            limit_gb=LIMIT / 1e9,
        )
        write(args.out, **environment, threads=args.threads, rows=rows, sdxl=found)
    print(
        "peak below the limit, estimates within 20%"
        if ok
        else f"NOT within limits: {LIMIT / 1e9:.0f} GB, and estimates within 20%"
    )
    return 0 if ok else 1


# half of SDXL's side, so that it fits; what is between is computed twice
SDXL = dict(vae_size=512, gradient_checkpointing=True, steps=1)


def larger(args):
    "The step of SDXL's size: what was measured, or why it was left out; None: outside its limits."
    import psutil

    from uniemo.runs.estimate import estimate

    config = configured("paper", **SDXL)
    how = dict(diffusion="sdxl", device="cpu")
    expected = float(estimate(config, ("joint",), ("fp32",), **how)["fp32 GB"].iloc[-1])
    free = psutil.virtual_memory().available / 1e9
    row = {"side": SDXL["vae_size"], "threads": args.threads, "estimated GB": round(expected, 2)}
    most = min(LIMIT / 1e9, free / 1.2)
    if expected > most:
        row["left out"] = f"{expected:.1f} GB are needed, and at most {LIMIT / 1e9:.0f} are used"
        if expected <= LIMIT / 1e9:
            row["left out"] = f"{expected:.1f} GB are needed, and {free:.1f} GB are free"
        print("a step of SDXL's size:", row["left out"], flush=True)
        return row
    m = measured(args, "sdxl")
    row |= {"peak GB": round(m["peak"] / 1e9, 2), "seconds a step": round(m["seconds"][-1], 1)}
    row["off by"] = f"{expected / m['peak'] * 1e9 - 1:+.0%}"
    print("a step of SDXL's size:", row, dict(loss=m["loss"]), flush=True)
    near = abs(expected * 1e9 / m["peak"] - 1) <= 0.2
    return row if near and m["peak"] < LIMIT else None


def predicted(family):
    "A row of the table: billions of parameters, and GB on a GPU in bf16."
    from uniemo.runs.estimate import estimate

    side, diffusion = FAMILIES[family]
    how = dict(device="cuda", diffusion=diffusion)
    step = dict(batch_size=1, vae_size=side, gradient_checkpointing=True)
    training = estimate("paper", ("joint",), ("bf16",), **how, **step).droplevel("stage")
    image = estimate("paper", ("generation",), ("bf16",), num_images=1, **how).droplevel("stage")
    count = training.parameters / 1e9
    texts = [part for part in count.index if part.startswith("text_encoder")]
    denoiser = count["unet" if "unet" in count else "transformer"]
    return {
        "side": side,
        "denoiser, billions": round(denoiser, 2),
        "text encoders, billions": round(count[texts].sum(), 2),
        "training step, GB": round(training["bf16 GB"]["all"], 1),
        "one image, GB": round(image["bf16 GB"]["all"], 1),
    }


def write_table():
    "Predict all of them."
    import pandas as pd

    rows = {family: predicted(family) for family in FAMILIES}
    table = pd.DataFrame(rows).T.rename_axis("family").astype({"side": int})
    print(table.to_string())
    table.to_csv(TABLE, lineterminator="\n")
    return 0


def write(path, **found):
    "Put what was found into the file; what it says beside that stays."
    path = Path(path)
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | found, indent=1) + "\n")


def measured(args, stage):
    "What a child process says of a stage."
    command = [sys.executable, __file__, "--child", stage, "--threads", str(args.threads)]
    command += ["--config", args.config]
    if args.diffusion:
        command += ["--diffusion", args.diffusion]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{stage} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--child", choices=["joint", "generation", "sdxl"])
    p.add_argument("--only", choices=["sdxl"])
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--config", default="paper")
    p.add_argument("--diffusion")
    p.add_argument("--out")
    p.add_argument("--table", action="store_true")
    a = p.parse_args()
    a.diffusion = a.diffusion or (
        "mini" if a.config == "mini" else "stable-diffusion-v1-5/stable-diffusion-v1-5"
    )
    sys.exit(child(a) if a.child else write_table() if a.table else main(a))
