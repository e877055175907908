"Emotion spaces: exact sums, samples that do not depend on their batch, files that are not whole."

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import ConcatDataset, DataLoader, Subset

from uniemo.data.folders import EmotionFolder
from uniemo.data.transforms import (
    CentreCrop,
    NetworkView,
    Transform,
    eval_transform,
    train_transform,
)
from uniemo.emotions import COORDINATES, MIKELS, mixture_weights, valence_arousal_mixture
from uniemo.files.emogen import load_emogen
from uniemo.files.weights import WeightsError
from uniemo.space import (
    KINDS,
    PARTS,
    EmotionSpace,
    fit_space,
    low_rank,
    seeded_generators,
)

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
NAMES = ("calm", "joy", "anger")
each_kind = pytest.mark.parametrize("kind", KINDS)


def triples(n=600, d=8, seed=0, offset=0.0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=g)
    x = (
        offset
        + labels[:, None]
        + torch.randn(n, 2, generator=g)
        @ torch.randn(2, 3 * d, generator=torch.Generator().manual_seed(7))
        + 0.5 * torch.randn(n, 3 * d, generator=g)
    )
    return *x.split(d, 1), labels


def fitted(kind, **kwargs):
    return EmotionSpace(NAMES, 8, kind, **{"rank": 2, "bank_size": 40, **kwargs}).update(*triples())


def assert_equal_statistics(a, b, rtol=1e-10):
    assert a.counts == b.counts
    for (_, m, s), (_, m_b, s_b) in zip(a.statistics, b.statistics):
        torch.testing.assert_close(m, m_b, rtol=rtol, atol=1e-12)
        torch.testing.assert_close(s, s_b, rtol=rtol, atol=1e-8)
    for (k, x), (k_b, x_b) in zip(a.banks or [], b.banks or []):
        assert (k == k_b).all() and torch.equal(x, x_b)


# ---- statistics


@pytest.mark.parametrize("offset", (0.0, 1e4))
def test_streamed_equals_two_passes(offset):
    c, s, o, labels = triples(offset=offset)
    space = EmotionSpace(NAMES, 8)
    for k in range(0, 600, 7):
        space.update(c[k : k + 7], s[k : k + 7], o[k : k + 7], labels[k : k + 7])
    for e in range(3):
        x = torch.cat([c, s, o], 1).double()[labels == e]
        n, mean, scatter = space.statistics[e]
        torch.testing.assert_close(mean, x.mean(0), rtol=1e-13, atol=0)
        torch.testing.assert_close(scatter / (n - 1), torch.cov(x.T), rtol=1e-9, atol=1e-9)


@each_kind
@pytest.mark.parametrize("cuts", ([1, 599], [200, 200, 200], [0, 600], [599, 1]))
def test_parts_merge_to_the_whole(kind, cuts):
    data = [x.split(cuts) for x in triples()]
    parts = [EmotionSpace(NAMES, 8, kind, rank=2, bank_size=40).update(*p) for p in zip(*data)]
    whole = parts[-1]
    for p in parts[:-1]:
        whole.merge(p)
    assert_equal_statistics(whole, fitted(kind))


@each_kind
def test_merged_spaces_go_their_own_ways(kind):
    a, b, more = fitted(kind), fitted(kind), triples(seed=1)
    joined = EmotionSpace(NAMES, 8, kind, rank=2, bank_size=40).merge(a).update(*more)
    assert_equal_statistics(a, b)
    assert_equal_statistics(joined, fitted(kind).update(*more))


def test_merging_with_itself_doubles():
    a = fitted("lowrank")
    n, mean, scatter = a.statistics[0]
    a.merge(a)
    assert a.statistics[0][0] == 2 * n
    torch.testing.assert_close(a.statistics[0][2], 2 * scatter)
    torch.testing.assert_close(a.statistics[0][1], mean)


def _gather(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    c, s, o, labels = triples()
    mine = torch.arange(600) % 2 == rank
    for kind in KINDS:
        EmotionSpace(NAMES, 8, kind, rank=2, bank_size=40).update(
            c[mine], s[mine], o[mine], labels[mine]
        ).gather().save(f"{folder}/{kind}{rank}", statistics=True)


def test_processes_gather(tmp_path):
    mp.spawn(_gather, (tmp_path,), 2)
    for kind in KINDS:
        assert_equal_statistics(EmotionSpace.load(tmp_path / f"{kind}0"), fitted(kind))
        assert (tmp_path / f"{kind}0").read_bytes() == (tmp_path / f"{kind}1").read_bytes()


def test_bank_is_a_random_sample():
    "Which triples are kept depends on nothing that could bias it: they have the mean of all."
    c, s, o, labels = triples(3000)
    space = EmotionSpace(NAMES, 8, "bank", bank_size=500).update(c, s, o, labels)
    for e in range(3):
        x, kept = torch.cat([c, s, o], 1)[labels == e], space.banks[e][1]
        assert (
            len(kept) == 500
            and (((kept.mean(0) - x.mean(0)) / x.std(0)).abs() < 4.5 / 500**0.5).all()
        )


@pytest.mark.parametrize("dtype", (torch.float64, torch.float16, torch.bfloat16))
def test_any_precision(dtype):
    c, s, o, labels = (x.to(dtype) if x.is_floating_point() else x for x in triples())
    space = EmotionSpace(NAMES, 8, "diagonal").update(c.requires_grad_(), s, o, labels.int())
    torch.testing.assert_close(
        space.distributions()["std"][1, :8], c[labels == 1].detach().double().std(0).float()
    )
    assert not space.distributions()["mean"].requires_grad
    assert space.sample("joy", 2, dtype=dtype)[0].dtype == dtype


def test_refused_batch_leaves_no_trace():
    space, (c, s, o, labels) = fitted("lowrank"), triples()
    before = list(space.statistics)
    bad = o.clone()
    bad[3, 1] = math.inf
    wrong = labels.clone()
    wrong[5] = -1
    for args, match in (
        ((c, s, bad, labels), "object features of 1 of 600"),
        ((c, s, o, wrong), "found -1 to 2"),
        ((c, s[:5], o, labels), "600 class features, but 5 scene"),
        ((c, s, o, labels[:5]), "600 class indices"),
        ((c[0], s, o, labels), r"class features must be \[B, 8\], not \[8\]"),
        ((c, None, o, labels), "scene"),
    ):
        with pytest.raises(ValueError, match=match):
            space.update(*args)
    assert all(a is b for a, b in zip(before, space.statistics))


def test_settings_are_checked():
    for kwargs, match in (
        (dict(kind="gauss"), "gauss"),
        (dict(rank=-1), "rank=-1"),
        (dict(bank_size=0), "bank_size=0"),
        (dict(parts=("scene", "class")), "in this order"),
        (dict(parts=()), "parts"),
    ):
        with pytest.raises(ValueError, match=match):
            EmotionSpace(NAMES, 8, **kwargs)
    with pytest.raises(ValueError, match="different rank"):
        fitted("lowrank").merge(fitted("lowrank", rank=3))
    with pytest.raises(ValueError, match="different emotions"):
        fitted("diagonal").merge(EmotionSpace(MIKELS, 8, "diagonal", rank=2, bank_size=40))


# ---- factors


@pytest.mark.parametrize("n,rank", ((3, 8), (10, 8), (25, 8), (300, 8), (300, 100), (2, 1)))
def test_low_rank_with_few_images(n, rank):
    "However few: finite, no negative variance, and each dimension's variance as it was."
    x = torch.randn(
        n, 60, generator=torch.Generator().manual_seed(n), dtype=torch.float64
    ) * torch.logspace(-3, 3, 60)
    S = torch.cov(x.T)
    F, v = low_rank(S, min(rank, n - 1))
    assert torch.isfinite(F).all() and (v >= 0).all()
    torch.testing.assert_close((F**2).sum(1) + v, S.diagonal())


def test_low_rank_does_not_depend_on_scale():
    S = torch.cov(
        torch.randn(24, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    scale = torch.logspace(-2, 2, 24, dtype=torch.float64)
    (F, v), (G, u) = low_rank(S, 3), low_rank(S * scale * scale[:, None], 3)
    torch.testing.assert_close(G @ G.T, (F @ F.T) * scale * scale[:, None])
    torch.testing.assert_close(u, v * scale**2)


def test_low_rank_is_likelier_than_principal_components():
    "What maximum likelihood promises, on dimensions with unequal noise."
    g = torch.Generator().manual_seed(3)
    A = torch.randn(30, 3, generator=g, dtype=torch.float64)
    noise = torch.logspace(-1, 1, 30, dtype=torch.float64)
    S = A @ A.T + noise.diag()
    R = S / S.diagonal().sqrt() / S.diagonal().sqrt()[:, None]
    value, U = torch.linalg.eigh(R)
    P = U[:, -3:] * value[-3:].sqrt()

    def nll(C):
        return float(torch.logdet(C) + torch.trace(torch.linalg.solve(C, R)))

    F, v = low_rank(R, 3)
    ours, pca = nll(F @ F.T + v.diag()), nll(P @ P.T + (1 - (P**2).sum(1)).clamp(min=1e-3).diag())
    assert ours < pca and abs(ours - float(torch.logdet(R)) - 30) < 1e-3


# ---- samples


@each_kind
@pytest.mark.parametrize("emotion", ("joy", 2, {"calm": 0.2, "anger": 0.8}))
def test_sample_does_not_depend_on_its_batch(kind, emotion):
    space = fitted(kind)
    whole = torch.cat(space.sample(emotion, 12, seed=5), 1)
    for sizes in ([12], [1] * 12, [5, 7], [0, 11, 1]):
        start, parts = 0, []
        for n in sizes:
            parts.append(torch.cat(space.sample(emotion, n, seed=5, start=start), 1))
            start += n
        assert torch.equal(torch.cat(parts), whole)
    assert len(whole.unique(dim=0)) == 12 and not torch.equal(
        torch.cat(space.sample(emotion, 12, seed=6), 1)[0], whole[1]
    )
    assert torch.equal(
        torch.cat(space.sample([emotion] * 3, generators=seeded_generators(5, 3, start=4)), 1),
        whole[4:7],
    )


def test_seeds_differ():
    numbers = [
        int(torch.randint(2**62, (), generator=g))
        for seed in (0, 1, 2, 4293)
        for g in seeded_generators(seed, 300)
    ]
    assert len(set(numbers)) == len(numbers)
    for bad in (-1, 1.5, "a", None):
        with pytest.raises(ValueError, match="integers"):
            seeded_generators(bad, 2)
    for seed, start in (
        (2**32, 0),
        (0, 1_000_002),
    ):  # the generator would read the seed of another sample
        with pytest.raises(ValueError, match="below 2\\*\\*32"):
            seeded_generators(seed, 2, start)


@each_kind
def test_moments_of_samples(kind):
    "Means and covariances are those of the images; of a mixture, the weighted ones."
    space, (c, s, o, labels) = fitted(kind, bank_size=1000), triples()
    x = torch.cat([c, s, o], 1)
    cov = {e: torch.cov(x[labels == i].T) for i, e in enumerate(NAMES)}
    if kind == "diagonal":
        cov = {e: v.diagonal().diag() for e, v in cov.items()}
    mean = {e: x[labels == i].mean(0) for i, e in enumerate(NAMES)}
    for mixture in (
        {"joy": 1.0},
        {"calm": 0.3, "anger": 0.7},
        {"calm": 0.2, "joy": 0.3, "anger": 0.5},
    ):
        y = torch.cat(space.sample(mixture, 2500), 1)
        m, C = (sum(w * v[e] for e, w in mixture.items()) for v in (mean, cov))
        assert ((y.mean(0) - m).abs() < 5 * (C.diagonal() / 2500).sqrt()).all()
        assert (torch.cov(y.T) - C).norm() / C.norm() < 0.15


def test_jitter_zero_gives_real_triples():
    space = fitted("bank", jitter=0.0)
    x = torch.cat(space.sample("joy", 10), 1)
    assert (x[:, None] - space.banks[1][1]).abs().amax(-1).min(1).values.max() < 1e-5


def test_emotions_with_few_images():
    c, s, o, _ = triples()

    def few(kind):
        return EmotionSpace(NAMES, 8, kind, rank=4).update(
            c[:4], s[:4], o[:4], torch.tensor([0, 1, 1, 1])
        )

    for kind in ("diagonal", "lowrank"):
        with pytest.raises(
            ValueError, match="no distribution of 'calm': it had 1 images.*there are joy"
        ):
            few(kind).sample({"calm": 0.5, "joy": 0.5})
        assert torch.isfinite(few(kind).sample("joy")[0]).all()
    assert torch.allclose(few("bank").sample("calm")[0], c[:1], atol=1e-5)
    for kind in KINDS:
        with pytest.raises(ValueError, match="'anger': it had 0 images"):
            few(kind).sample({"joy": 0.9, "anger": 0.1})
        few(kind).sample({"joy": 1.0, "anger": 0.0})
        with pytest.raises(ValueError, match="there are none"):
            EmotionSpace(NAMES, 8, kind).sample("joy")


def test_mixtures():
    assert (
        mixture_weights({"awe": 0.7, "fear": 0.3}).tolist() == [0, 0.7, 0, 0, 0, 0, 0.3, 0]
        and mixture_weights({0: 1 / 3, 1: 1 / 3, 2: 1 / 3}).sum() == 1
    )
    for bad, match in (
        ("feer", "did you mean 'fear'"),
        ("Awe", "did you mean 'awe'"),
        ("xyz", "Known: amusement"),
        (-1, "0 to 7"),
        (True, "unknown emotion True"),
        (None, "unknown"),
        ({"awe": 0.5}, r"sum to 0.5, not 1; as shares they are \{'awe': 1.0\}"),
        ({"awe": -1, "fear": 2}, "the weight of 'awe' is -1"),
        ({"awe": None}, "is None"),
        ({"awe": math.inf}, "inf"),
    ):
        with pytest.raises(ValueError, match=match):
            mixture_weights(bad)
    with pytest.raises(ValueError, match="2 emotions for 3 samples"):
        fitted("diagonal").sample(["joy", "calm"], 3)


# ---- files


@each_kind
def test_files(kind, tmp_path):
    space = fitted(kind)
    space.save(tmp_path / "sub/space.safetensors", statistics=True)
    whole = EmotionSpace.load(tmp_path / "sub/space.safetensors")
    assert_equal_statistics(whole, space)
    assert whole.settings == space.settings
    more = triples(seed=1)
    assert_equal_statistics(whole.update(*more), fitted(kind).update(*more))
    assert not list(tmp_path.rglob("*.tmp"))
    space.save_pretrained(tmp_path)
    small = EmotionSpace.from_pretrained(tmp_path)
    for a, b in zip(space.sample("calm", 4), small.sample("calm", 4)):
        assert torch.equal(a, b)
    for call in (
        lambda: small.update(*more),
        lambda: small.merge(space),
        lambda: space.merge(small),
        lambda: small.save(tmp_path / "x", statistics=True),
    ):
        with pytest.raises(ValueError, match="statistics=True"):
            call()
    small.save(tmp_path / "again.safetensors")
    assert torch.equal(
        EmotionSpace.load(tmp_path / "again.safetensors").sample("joy")[1], space.sample("joy")[1]
    )


def test_files_that_are_something_else(tmp_path):
    path = tmp_path / "f.safetensors"
    with pytest.raises(FileNotFoundError):
        EmotionSpace.load(path)
    for data in (b"", b"hello", fitted("bank").save(tmp_path / "g").read_bytes()[:500]):
        path.write_bytes(data)
        with pytest.raises(WeightsError, match="f.safetensors.*emotion space"):
            EmotionSpace.load(path)
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(WeightsError, match="f.safetensors is no emotion space"):
        EmotionSpace.load(path)
    about = dict(
        EmotionSpace(NAMES, 8).settings, count=[1, 1, 1], statistics=False, info={}, version=1
    )
    for change, match in (
        (dict(version=2), "version 2"),
        (dict(), "f.safetensors.* lacks"),
        (dict(kind="gauss"), "f.safetensors.*gauss"),
        (dict(count=[1, 1]), "f.safetensors.*count"),
        (dict(rank="many"), "f.safetensors"),
        (dict(colour="red"), "f.safetensors.*colour"),
    ):
        save_file(
            {"mean": torch.ones(3, 24)},
            path,
            metadata={"uniemo.space": json.dumps({**about, **change})},
        )
        with pytest.raises(WeightsError, match=match):
            EmotionSpace.load(path)


@each_kind
@pytest.mark.parametrize("statistics", [False, True])
def test_a_space_is_read_whole_or_not_at_all(kind, statistics, tmp_path):
    "Every tensor, taken away, of another shape, or not finite: one error that names it."
    good = fitted(kind).save(tmp_path / "good.safetensors", statistics=statistics)
    tensors = load_file(good)
    with safe_open(good, "pt") as file:
        head = file.metadata()
    path = tmp_path / "bad.safetensors"
    for name, tensor in tensors.items():
        broken = [{k: v for k, v in tensors.items() if k != name}, {**tensors, name: tensor[:-1]}]
        if tensor.is_floating_point():
            broken.append({**tensors, name: torch.full_like(tensor, math.nan)})
        for state in broken:
            save_file({k: v.contiguous() for k, v in state.items()}, path, head)
            with pytest.raises(WeightsError, match="bad.safetensors.*" + name.replace(".", "[.]")):
                EmotionSpace.load(path)


@pytest.mark.skipif(
    not (SHARED / "real/emogen").exists(), reason=f"no real files at {SHARED / 'real'}"
)
def test_emogen_files():
    files = load_emogen(SHARED / "real/emogen")
    space = EmotionSpace.from_statistics(files.space)
    assert space.emotions == MIKELS.names and space.hidden_size == 768 and space.parts == ("class",)
    for e in MIKELS:
        c, s, o = space.sample(e, 400)
        mean, std = files.space[e]["class"]
        assert s is None and o is None and ((c.mean(0) - mean).abs() <= 5 * std / 20 + 1e-6).all()


def test_the_authors_files(tmp_path):
    "As the released code writes them, read by `uniemo.files` and drawn from."
    from uniemo.files.uniemo import read_statistics

    g = torch.Generator().manual_seed(0)
    truth = {}
    for e in ("awe", "fear"):
        for name, part in zip(("cls_fea", "scene", "object"), PARTS):
            truth[e, part] = torch.randn(1, 16, generator=g), torch.rand(1, 16, generator=g)
            for what, v in zip(("mean", "std"), truth[e, part]):
                torch.save(v, tmp_path / f"{e}_{name}_{what}.pt")
    space = EmotionSpace.from_statistics(
        read_statistics(
            tmp_path,
            r"(?P<emotion>.+)_(?P<kind>cls_fea|scene|object)_mean\.pt",
            dict(cls_fea="class", scene="scene", object="object"),
        )
    )
    assert (
        space.kind == "diagonal"
        and space.counts["awe"] is None
        and space.counts["joy" if "joy" in space.counts else "anger"] == 0
    )
    for part, x in zip(PARTS, space.sample("fear", 1500)):
        mean, std = truth["fear", part]
        assert (
            (x.mean(0) - mean[0]).abs() <= 5 * std[0] / 1500**0.5 + 1e-6
        ).all() and torch.allclose(x.std(0), std[0], rtol=0.15)
    x = space.sample({"awe": 0.5, "fear": 0.5}, 3)[0]
    path = space.save(tmp_path / "s")
    assert torch.equal(EmotionSpace.load(path).sample({"awe": 0.5, "fear": 0.5}, 3)[0], x)


def test_statistics_that_do_not_fit():
    def one(d, mean=1.0, std=1.0):
        return {p: (torch.full((d,), mean), torch.full((d,), std)) for p in PARTS}

    only_class = {"class": (torch.ones(4), torch.ones(4))}
    for pairs, match in (
        ({}, "no emotion"),
        ({"awe": one(4), "fear": one(5)}, "'fear', class: 4 finite numbers, not 5"),
        ({"awe": one(4, std=-1.0)}, "none negative"),
        ({"awe": one(4, mean=math.nan)}, "finite"),
        ({"awe": one(4), "fear": only_class}, "'fear' has the parts class"),
        (
            {"awe": {"cls": (torch.ones(4), torch.ones(4))}},
            "has the parts cls; parts are class, scene, object",
        ),
    ):
        with pytest.raises(ValueError, match=match):
            EmotionSpace.from_statistics(pairs)
    assert EmotionSpace.from_statistics({"joy": one(4)}).emotions == ("joy",)


# ---- one pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from PIL import Image

    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for e in ("awe", "fear"):
        (root / e).mkdir()
        for k in range(5):
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(root / e / f"{k}.png")
    return root


def test_loaders_that_augment_or_leave_out_are_refused(folder):
    def encode(b):
        return (b["pixel_values"].mean((2, 3)),) * 3

    plain, crop = (EmotionFolder(folder, transform=t(8)) for t in (eval_transform, train_transform))
    flip = EmotionFolder(
        folder, transform=Transform(CentreCrop(flip=0.5), dict(pixel_values=NetworkView(8)))
    )
    for data in (crop, flip, Subset(crop, [0, 1]), ConcatDataset([plain, Subset(flip, [3])])):
        with pytest.raises(ValueError, match="augments at random"):
            fit_space(DataLoader(data, batch_size=4), encode, emotions=("awe", "fear"))
    with pytest.raises(ValueError, match="drop_last"):
        fit_space(DataLoader(plain, batch_size=4, drop_last=True), encode, emotions=("awe", "fear"))
    one, other = (
        fit_space(
            DataLoader(ConcatDataset([plain]), batch_size=n, shuffle=n == 3),
            encode,
            ("awe", "fear"),
            "diagonal",
        )
        for n in (3, 10)
    )
    assert_equal_statistics(one, other, rtol=1e-5)
    assert list(one.counts.values()) == [5, 5]


def test_an_encoder_without_queries(folder):
    "Has c alone; its mode and gradients are as before."
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from uniemo.queries import ExpertQueryModel

    model = ExpertQueryModel(
        CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=64,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=1,
                image_size=8,
                patch_size=4,
            )
        ),
        0,
        num_classes=2,
    )
    loader = DataLoader(EmotionFolder(folder, transform=eval_transform(8)), batch_size=4)
    for mode in (True, False):
        space = fit_space(loader, model.train(mode), ("awe", "fear"))
        assert model.training == mode and space.parts == ("class",) and space.hidden_size == 64
    with pytest.raises(ValueError, match="found 0 to 1"):
        fit_space(list(loader), model.train(), ("awe",))
    assert model.training


# ---- valence and arousal


def test_every_point_is_a_mixture():
    for v in np.linspace(-1, 1, 9):
        for a in np.linspace(-1, 1, 9):
            m = valence_arousal_mixture(v, a)
            mixture_weights(m)
            near = min(COORDINATES, key=lambda e: math.dist(COORDINATES[e], (v, a)))
            assert m[near] == max(m.values())
    assert (
        list(valence_arousal_mixture(0.3, 0.3, temperature=1e-9))
        and len(valence_arousal_mixture(0.3, 0.3, temperature=1e9)) == 8
    )
    with pytest.raises(ValueError, match="empty"):
        valence_arousal_mixture(0, 0, {})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    c, s, o, labels = triples()
    space = EmotionSpace(NAMES, 8).update(c.cuda().half(), s.cuda(), o.cuda(), labels.cuda())
    a = space.sample(
        "joy",
        4,
        generators=seeded_generators(0, 4, device="cuda"),
        device="cuda",
        dtype=torch.float16,
    )
    b = space.sample(
        "joy",
        2,
        generators=seeded_generators(0, 2, start=2, device="cuda"),
        device="cuda",
        dtype=torch.float16,
    )
    assert a[0].device.type == "cuda" and torch.equal(a[2][2:], b[2])
