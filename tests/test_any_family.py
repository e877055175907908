"Stage 2 from the command line and by its stages, with a folder of another family's pipeline."

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import STAGE, painted, tiny_encoder
from PIL import Image
from tiny_pipelines import build

from uniemo.diffusion.any_family import FamilyPipeline, open_trained
from uniemo.diffusion.latents import check_diffusion, image_side
from uniemo.explore.studio import Studio, Wish
from uniemo.explore.webpage import page_of
from uniemo.files.needed import diffusion_files, look_for
from uniemo.joint import JointConfig
from uniemo.mini.stages import (
    Budget,
    candidates,
    joint,
    load_world,
    metrics_of,
    open_pipeline,
    settings_of,
)
from uniemo.pipeline import UniEmoPipeline
from uniemo.runs import Run, find_notebook
from uniemo.runs.cli import main
from uniemo.runs.estimate import estimate

torch.set_num_threads(1)
WORLD = dict(num_train=16, num_val=8, num_test=8, seed=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Family -> the folder of a tiny random pipeline."
    places = {}

    def made(family):
        if family not in places:
            places[family] = tmp_path_factory.mktemp("diffusion")
            build(family).save_pretrained(places[family])
        return str(places[family])

    return made


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    "The folder of a stage 1."
    place = tmp_path_factory.mktemp("encoder")
    tiny_encoder().save_pretrained(place / "model")
    return place


def arguments(**params):
    "`-p key value` for each."
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in params.items()}
    return [word for k, v in texts.items() for word in ("-p", k, v)]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_joint_from_the_command_line(warm, folder, tmp_path, monkeypatch, capsys):
    "SD 3: three text towers, flow matching, no U-Net; a LoRA is trained as well, and kept."
    monkeypatch.chdir(tmp_path)
    params = dict(
        diffusion=folder("Stable Diffusion 3"),
        # fewer would leave an emotion without images to draw from
        num_train=64,
        num_test=8,
        understanding_steps=1,
        joint_steps=2,
        joint_settings=dict(warm_start=2, batch_size=4, lora_rank=2, lr_lora=0.1),
        num_images=1,
        num_inference_steps=2,
        num_threads=1,
    )
    code = main(["run", "joint", "-q", "--run-id", "one", *arguments(**params)])
    assert code == 0, capsys.readouterr().err
    run = Run(tmp_path / "runs" / "one")
    summary = run.summary()
    assert summary["family"] == "Stable Diffusion 3"
    assert np.isfinite(summary["stage2_val_loss_diff"])
    # 1. what was saved paints, and reads
    pipe = open_trained(run.dir / "uniemo")
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is FamilyPipeline
    how = dict(num_inference_steps=2, prompt="<emotion> dog")
    made = pipe.generate("awe", 2, **how)
    assert set(made.to_pandas().columns) >= {"emotion", "confidence", "scene", "object"}
    assert pipe.understand(made.images).emotion == made.predicted
    # 2. image 1 of a seed is the same alone
    alone = pipe.generate("awe", 1, start=1, **how)
    assert abs(painted(alone.images) - painted(made.images[1:])).max() <= 2
    # 3. the LoRA belongs to it
    with pytest.raises(ValueError, match="has no setting intensity"):
        pipe.generate("awe", intensity=2.0)
    pipe.diffusion.unload_lora_weights()
    without = pipe.generate("awe", 2, **how)
    assert (painted(without.images) != painted(made.images)).any()
    # 4. the everyday commands and the page take the same folder
    told = ["--model", str(run.dir), "--steps", "2", "-q"]
    ask = ["--prompt", "<emotion> dog", "-n", "2"]
    assert main(["generate", "awe", *told, *ask, "--out", "pictures"]) == 0
    photo = sorted((tmp_path / "pictures").glob("*.png"))[1]
    with Image.open(photo) as second:
        assert abs(painted([second]) - painted(made.images[1:])).max() <= 2
    assert main(["edit", str(photo), "fear", *told]) == 2
    assert "changes no photograph" in capsys.readouterr().err
    assert main(["generate", "awe", *told, "--intensity", "2"]) == 2
    assert "has no setting intensity" in capsys.readouterr().err
    studio = Studio(pipe, steps=2, sketch_steps=2)
    assert len(studio.paint(Wish("awe"), 1).images) == 1
    assert studio.sketch(Wish("awe", intensity=1)).size == made.images[0].size
    with pytest.raises(ValueError, match="changes no photograph"):
        studio.paint(Wish("fear"), 1, photo)
    # 5. the page without Python says what it cannot do
    with pytest.raises(ValueError, match="not with a StableDiffusion3Pipeline"):
        page_of(run.dir, None)


@pytest.mark.parametrize("family", ["Stable Diffusion 1.x and 2.x", "Stable Diffusion XL"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_stages_of_quickstart(family, folder, encoder, tmp_path):
    "As quickstart calls them, after stage 1; with a LoRA."
    place = folder(family)
    own = dict(vae_size=image_side(place), steps=1, batch_size=2, warm_start=2, lora_rank=2)
    config = settings_of(JointConfig.preset("mini", **(STAGE | own)))
    torch.manual_seed(3)
    text = {k: torch.randn(len(own), 24) for k, own in load_world(WORLD).names.items() if own}
    how = dict(config=config, diffusion=place, mapper=dict(separate=True), text=text)
    joint(tmp_path / "joint", WORLD, encoder, **how)
    pipe = open_pipeline(tmp_path / "joint")
    first = family == "Stable Diffusion 1.x and 2.x"
    assert type(pipe) is (UniEmoPipeline if first else FamilyPipeline)
    assert pipe.diffusion_name == place
    assert any("lora" in name for name, _ in pipe.diffusion.unet.named_parameters())
    candidates(tmp_path / "made", tmp_path / "joint", 1, num_inference_steps=1)
    found = metrics_of(tmp_path / "made")
    assert found["images"] == len(list((tmp_path / "made").glob("*.png"))) > 0
    assert found["images"] == 8 - len(found["left_out"])


def test_what_cannot_be_trained_is_refused_before_stage_1(tmp_path, monkeypatch):
    (tmp_path / "model_index.json").write_text(json.dumps(dict(_class_name="WanPipeline")))
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    # 1. as quickstart looks at it
    with pytest.raises(ValueError, match="WanPipeline: supported are pipelines of"):
        Budget(diffusion=str(tmp_path))
    # 2. as joint does: its cells up to the one that trains
    monkeypatch.setenv("UNIEMO_RUNS_DIR", str(tmp_path / "runs"))
    monkeypatch.setattr(
        "matplotlib_inline.backend_inline.set_matplotlib_formats", lambda *args, **kwargs: None
    )
    notebook = json.loads(find_notebook("joint").read_text(encoding="utf-8"))
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    before = itertools.takewhile(lambda source: "understanding, data=" not in source, cells)
    names = {}
    with pytest.raises(ValueError, match="WanPipeline: supported are pipelines of"):
        for source in before:
            exec(source, names)
            names["diffusion"] = str(tmp_path)


def test_a_model_is_looked_at_before_it_is_loaded(folder, tmp_path):
    place = folder("PixArt-Sigma")
    assert check_diffusion(place) == "PixArt-Sigma"
    with pytest.raises(ValueError, match="lora_rank: diffusers has no file of LoRA weights for a"):
        check_diffusion(place, lora=True)
    inpainting = tmp_path / "model_index.json"
    inpainting.write_text(json.dumps(dict(_class_name="StableDiffusionInpaintPipeline")))
    for part, config in (("unet", dict(in_channels=9, out_channels=4)), ("vae", {})):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="reads 9 channels and says 4"):
        check_diffusion(tmp_path)


def test_files_and_memory_of_a_folder(folder):
    place = folder("Stable Diffusion 3")
    files = diffusion_files(Path(place))
    assert {"transformer/config.json", "text_encoder_3/config.json"} <= set(files)
    assert {row["there"] for row in look_for("SD 3", Path(place), files, "")} == {"yes"}
    settings = dict(batch_size=2, vae_size=32, names=(3, 4), num_images=1)
    table = estimate("mini", ("joint",), ("fp32",), diffusion=place, device="cpu", **settings)
    assert {"transformer", "text_encoder_3"} <= set(table.index.get_level_values("part"))
    with pytest.raises(ValueError, match="ZImagePipeline cannot be estimated"):
        estimate("mini", ("joint",), ("fp32",), diffusion=folder("Z-Image"), device="cpu")
