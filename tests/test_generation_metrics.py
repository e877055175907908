"""What the notebooks of the measure shelf show in a line or not at all.

Other implementations agree, files are read, networks come back as they were, and the shipped judge
is good.
"""

import json
import sys
import warnings
from importlib.resources import files

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

from uniemo import measure as gm
from uniemo import mini, runs
from uniemo.emotions import MIKELS, EmotionSet
from uniemo.files.shipped import check_manifest, shipped_folder
from uniemo.measure.generation import MetricSettings, Networks

shipped = pytest.mark.skipif(
    not (files("uniemo") / "assets/mini/judge/model.safetensors").is_file(),
    reason="no judge in this checkout: run pretrain_judge and ship it",
)


def world(seed, n):
    specs = [mini.draw_spec(seed, i) for i in range(n)]
    return mini.paint(specs, workers=1, progress=False), np.array(
        [MIKELS.index(s.emotion) for s in specs]
    )


# ---- distances between sets


def test_fid_is_the_frechet_distance():
    "Against the matrix square root of scipy, on correlated features."
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(16, 16))
    a, b = rng.normal(size=(300, 16)) @ mix, rng.normal(size=(200, 16)) + 0.3
    ca, cb = np.cov(a.T), np.cov(b.T)
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert gm.fid(a, b) == pytest.approx(expected, rel=1e-6) and gm.fid(b, a) == pytest.approx(
        expected, rel=1e-6
    )


def test_kid_is_the_unbiased_mmd():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 5)), rng.normal(size=(60, 5)) + 0.5

    def k(x, y):
        return (x @ y.T / 5 + 1) ** 3

    def off(m):
        return (m.sum() - np.trace(m)) / (len(m) * (len(m) - 1))

    assert gm.kid(a, b) == pytest.approx(off(k(a, a)) + off(k(b, b)) - 2 * k(a, b).mean(), rel=1e-6)
    state = torch.random.get_rng_state()
    assert (
        gm.kid(a, b[:40], 5, seed=1) == gm.kid(a, b[:40], 5, seed=1) != gm.kid(a, b[:40], 5, seed=2)
    )
    assert torch.equal(state, torch.random.get_rng_state())  # nobody's random numbers are touched


def test_no_warning_and_no_other_network_is_needed():
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gm.fid(rng.normal(size=(50, 4)), rng.normal(size=(50, 4)))
        gm.kid(rng.normal(size=(50, 4)), rng.normal(size=(50, 4)))
    assert not {"torch_fidelity", "torchvision"} & set(sys.modules)


def test_without_torchmetrics_it_says_how_to_get_it(monkeypatch):
    for name in [m for m in sys.modules if m.split(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ImportError, match="pip install torchmetrics"):
        gm.kid(np.zeros((3, 2)), np.ones((3, 2)))


@pytest.mark.parametrize("block", [7, 10, 1000])
def test_blocks_change_nothing(block):
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 7, generator=g, dtype=torch.float64) for n in (53, 31))
    balls, whole = gm.Balls.around(x, 3, block), gm.Balls.around(x, 3)
    assert torch.allclose(balls.half_radii, whole.half_radii)
    assert torch.allclose(balls.ratio(y, block), whole.ratio(y))
    assert torch.equal(balls.hold(y, block), whole.hold(y))
    assert torch.allclose(balls.radii, torch.cdist(x, x).sort(1).values[:, 3])
    distance, index = gm.nearest(y, x, block)
    assert torch.equal(index, torch.cdist(y, x).argmin(1))
    assert torch.allclose(distance, torch.cdist(y, x).min(1).values)


def test_an_image_twice_has_a_ball_of_radius_zero_that_holds_itself():
    x = gm.unit(torch.eye(4).repeat(2, 1))
    balls = gm.Balls.around(x, 1)
    assert balls.half_radii.max() == 0 and balls.inside(x).all() and balls.hold(x).all()


def test_a_shifted_interval_without_draws():
    i = gm.shifted_bootstrap(np.mean, np.arange(5.0), n=0)
    assert i.value == 2 and np.isnan(i.low) and np.isnan(i.high)


# ---- LPIPS


def test_lpips_alex_equals_torchmetrics(tmp_path, monkeypatch):
    "AlexNet's file under torchvision's names; the distance of torchmetrics' own network."
    from torchmetrics.functional.image import lpips as theirs

    torch.manual_seed(0)
    layers = gm.alexnet_layers()
    flat = [m for layer in layers for m in layer]
    features = nn.Sequential(
        *flat[:2], nn.MaxPool2d(3, 2), *flat[3:5], nn.MaxPool2d(3, 2), *flat[6:], nn.MaxPool2d(3, 2)
    )
    torch.save(
        {f"features.{k}": v for k, v in features.state_dict().items()}
        | {"classifier.1.weight": torch.zeros(1)},
        tmp_path / gm.PRETRAINED["alexnet"][0],
    )
    monkeypatch.setattr(
        theirs, "_get_tv_model_features", lambda *a, **k: features
    )  # in place of torchvision
    x, y = torch.rand(2, 3, 3, 64, 64) * 2 - 1
    expected = theirs._LPIPS(net="alex")(x, y).flatten()
    ours = gm.lpips_alex(tmp_path)(x, y)
    assert ours.shape == (3,) and torch.allclose(ours, expected, rtol=1e-5, atol=1e-7)


# ---- networks


def test_networks_come_back_as_they_were():
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5))
    x = torch.rand(5, 3, 4, 4)
    assert torch.equal(gm.apply_network(net, x, batch_size=2), x.flatten(1)) and net.training
    one = nn.Linear(2, 2).half()
    assert gm.apply_network(lambda x: one(x.half()), torch.rand(3, 2)).dtype == torch.float32
    a, b = gm.apply_network(lambda x: (x, x[:, :1]), x, batch_size=2)
    assert a.shape == x.shape and len(b) == 5


def test_judge_is_saved_small_and_loads_the_same(tmp_path):
    torch.manual_seed(0)
    judge = mini.build_judge().half()
    judge.save_pretrained(tmp_path)
    again = mini.load_judge(tmp_path)
    assert (
        not again.training
        and next(again.parameters()).dtype == torch.float32
        and (tmp_path / "model.safetensors").stat().st_size < 2e6
    )
    assert all(
        torch.equal(v.float(), again.state_dict()[k].float()) for k, v in judge.state_dict().items()
    )
    x = torch.rand(5, 3, 64, 64)
    whole, parts = again(x), again(x, batch_size=2)
    assert (
        all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, parts))
        and torch.equal(again.train()(x)[0], whole[0])
        and again.training
    )


# ---- one table


class Words:
    "A CLIP of two dimensions: mean colour, and a fixed text."

    def __call__(self, x):
        return x.mean((2, 3))[:, :2]

    def text(self, prompts):
        return torch.tensor([[1.0, 0]] * len(prompts))


def test_any_network_will_do():
    rng = np.random.default_rng(0)
    images, real = rng.random((40, 8, 8, 3)), rng.integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    emotions = ["awe", "fear"] * 20

    def judge(x):
        return torch.eye(8)[[MIKELS.index("awe")] * len(x)]

    table = gm.evaluate_generation(
        images,
        emotions,
        real,
        Networks(
            judge=judge,
            features=lambda x: x.mean((2, 3)),
            distance=lambda x, y: (x - y).abs().mean((1, 2, 3)),
            clip=Words(),
        ),
        prompts="red",
        references=images,
        settings=MetricSettings(n=50, n_distances=10),
    )
    assert set(table.index) == {
        "fid",
        "kid",
        "precision",
        "recall",
        "lpips",
        "sem_d",
        "emo_a",
        "emo_a_2",
        "clip_txt",
        "clip_img",
    }
    assert table.attrs["left_out"] == dict(
        sem_c="needs scene and object probabilities from the judge"
    )
    assert (
        table.value["emo_a"] == 0.5
        and table.value["emo_a_2"] == 0.5
        and table.value["clip_img"] == pytest.approx(1)
    )
    assert (
        (table.low <= table.value).all()
        and (table.value <= table.high).all()
        and list(table.better[["fid", "recall"]]) == ["lower", "higher"]
    )
    again = gm.evaluate_generation(
        images, emotions, networks=Networks(judge), settings=MetricSettings(n=50)
    )
    assert again.value["emo_a"] == 0.5 and again.attrs["left_out"]["lpips"] == "needs distance"


def test_as_released_is_what_the_script_computes():
    "A list that grows, [0, 1] into the distance, pixels divided by 255 twice into the encoder."
    rng = np.random.default_rng(0)
    images = rng.random((24, 3, 8, 8)).astype(np.float32)
    emotions = np.repeat([0, 3, 5], 8)
    seen = []

    def distance(x, y):
        return seen.append(float(x.min())) or (x - y).abs().mean((1, 2, 3))

    def clip(x):
        return 10 * x.mean((2, 3))

    table = gm.evaluate_generation(
        images,
        emotions,
        networks=Networks(distance=distance, clip=clip),
        settings=MetricSettings(as_released=True, n=20),
    )
    pairs, of = gm.draw_pairs(emotions, as_released=True)
    assert len(pairs) == 30 and pairs[of == 0].max() < 8 and pairs[of == 5].min() < 16
    f = 10 * images.mean((2, 3)) / 255
    d = np.square(f[pairs[:, 0]] - f[pairs[:, 1]]).mean(1)
    assert (
        table.value["sem_d"]
        == pytest.approx(np.mean([d[of == e].mean() for e in (0, 3, 5)]), rel=1e-5)
        and min(seen) >= 0
    )


def test_another_set_of_emotions():
    two = EmotionSet(["calm", "joy"])
    table = gm.evaluate_generation(
        np.random.default_rng(0).random((6, 4, 4, 3)),
        ["joy"] * 6,
        networks=Networks(judge=lambda x: torch.tensor([[0.2, 0.8]] * len(x))),
        emotion_set=two,
        settings=MetricSettings(n=10),
    )
    assert (
        list(table.index) == ["emo_a"]
        and table.attrs["left_out"]["emo_a_2"] == "needs the polarity of the emotions"
        and table.value["emo_a"] == 1
    )


# ---- the judge


@shipped
def test_shipped_judge_is_good_and_another_network():
    judge, (data, labels) = mini.load_judge(), world(990, 1200)
    e, s, o = (p.numpy() for p in judge(data["images"]))
    one = data["objects"].sum(1) == 1
    assert (s.argmax(1) == data["scene"]).mean() > 0.98 and data["objects"][
        np.arange(1200), o.argmax(1)
    ][one].mean() > 0.9
    assert (e.argmax(1) == labels).mean() > 0.81  # Bayes: 0.857
    assert not any("attention" in n for n, _ in judge.named_modules()) and check_manifest() == []
    entry = json.loads((shipped_folder() / "manifest.json").read_text())["judge"]
    assert entry["notebook"] == "pretrain_judge"
    assert sum(p.stat().st_size for p in shipped_folder("judge").iterdir()) < 2e6


def test_pretrain_judge_runs(warm, tmp_path):
    done = runs.start(
        "pretrain_judge",
        dict(num_images=64, num_validation=120, steps=2, batch_size=8, eval_every=2, workers=1),
        runs_dir=tmp_path,
        progress=False,
    )
    assert done.status == "completed" and {
        "emotion",
        "scene",
        "object",
        "any_object",
        "bayes",
        "fit",
        "emotion_decoded",
    } <= set(done.summary())
    entry = mini.ship(done.dir, "judge", tmp_path / "shipped")
    assert entry["parameters"]["steps"] == 2 and check_manifest(tmp_path / "shipped") == []
    assert mini.load_judge(tmp_path / "shipped/judge")(torch.rand(2, 3, 64, 64)).scene.shape == (
        2,
        16,
    )


# ---- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_features_and_networks_on_a_gpu():
    judge = mini.load_judge().cuda()
    networks = mini.mini_networks(judge)
    networks.clip.cuda()
    networks.distance.cuda()
    images = torch.rand(16, 3, 64, 64, device="cuda")
    table = gm.evaluate_generation(
        images,
        torch.arange(16, device="cuda") % 8,
        images.flip(0),
        networks,
        prompts="a dog",
        references=images,
        settings=MetricSettings(n=5, n_distances=2),
    )
    assert table.value.notna().all() and table.value["clip_img"] == pytest.approx(1, abs=1e-3)
    x = gm.unit(torch.randn(40, 5, device="cuda"))
    scores = gm.coverage_scores(x, x)
    assert scores["coverage"] == scores["precision"] == 1
    assert gm.fid(x, x) == pytest.approx(0, abs=1e-6)
    assert gm.coverage_scores(x.cpu(), x)["coverage"] == 1
    assert gm.Balls.around(x, 3).inside(x.cpu()).device.type == "cuda"
    assert gm.nearest(x.cpu(), x)[0].max() < 1e-5
    gm.plot_attention(images[:2], dict(scene=torch.rand(2, 8, 8, device="cuda")))
    assert gm.evaluate(torch.arange(8).cuda(), torch.eye(8).cuda(), n=3).value["accuracy"] == 1
