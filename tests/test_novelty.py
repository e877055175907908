"A model says when an image is unlike what it was trained on; one that cannot tell says nothing."

import shutil
import warnings
from pathlib import Path

import pytest
import torch

from uniemo import UniEmoPipeline
from uniemo.files.shipped import shipped_folder
from uniemo.measure.novelty import NOVELTY
from uniemo.mini.painting import render
from uniemo.mini.truth import draw_spec

OASIS = Path(__file__).resolve().parents[2] / "shared" / "real" / "oasis" / "images"


@pytest.fixture(scope="module")
def pipe():
    return UniEmoPipeline.from_pretrained("mini")


def read(pipe, images):
    "What was read, and what was said."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = pipe.understand(images)
    return found, [str(w.message) for w in said if "unlike" in str(w.message)]


def test_painted_pictures_are_known_and_noise_is_not(pipe):
    painted = [render(draw_spec(77, k)).image for k in range(12)]
    found, said = read(pipe, painted)
    assert found.unlike.mean() < 0.25 and not said
    noise = torch.randint(0, 255, (3, 64, 64, 3), dtype=torch.uint8).numpy()
    found, said = read(pipe, noise)
    assert found.unlike.all()
    assert len(said) == 1 and "painted pictures of the mini world" in said[0]
    assert found.to_pandas().unlike.tolist() == [True] * 3


def test_photographs_are_told_from_painted_pictures(pipe):
    paths = sorted(OASIS.glob("*.jpg"))[::20]
    if not paths:
        pytest.skip(f"the photographs of OASIS are not at {OASIS}")
    found, said = read(pipe, [str(path) for path in paths])
    assert found.unlike.mean() > 0.8
    assert len(said) == 1


def test_the_statistic_is_saved_and_a_folder_without_it_says_nothing(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "own", whole=False)
    again = UniEmoPipeline.from_pretrained(tmp_path / "own")
    assert again.novelty.threshold == pipe.novelty.threshold
    shutil.copytree(shipped_folder("uniemo"), tmp_path / "old")
    (tmp_path / "old" / NOVELTY).unlink()
    old = UniEmoPipeline.from_pretrained(tmp_path / "old")
    noise = torch.randint(0, 255, (2, 64, 64, 3), dtype=torch.uint8).numpy()
    found, said = read(old, noise)
    assert old.novelty is None and found.unlike is None and not said
    assert "unlike" not in found.to_pandas()


def test_a_mapper_for_other_models_is_refused_with_what_to_run(pipe):
    from uniemo.fusion import PseudoWordMapper

    width = pipe.encoder.config.backbone_config.hidden_size
    token = pipe.text_encoder.get_input_embeddings().embedding_dim
    for sizes in ((width + 8, token), (width, token + 8)):
        wrong = PseudoWordMapper(*sizes)
        with pytest.raises(ValueError, match="uniemo run joint -p backbone"):
            UniEmoPipeline.from_diffusion("mini", pipe.encoder, wrong, pipe.retriever)
