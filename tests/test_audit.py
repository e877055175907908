"The audit: twins against Bayes, hidden patches, words of which one part changes, the command."

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from uniemo.measure.audit import (
    against_truth,
    agreement,
    agreement_table,
    block_interval,
    log_odds_of,
    movement,
    probabilities_of,
    rank_correlation,
    togetherness,
    total_variation,
)
from uniemo.measure.occlusion import (
    Hiding,
    hidden,
    log_odds,
    occlusion_maps,
    quarter_losses,
    read_parts,
    windows,
)
from uniemo.mini.painting import render
from uniemo.mini.twins import CHANGES, look_at, looks_agreement, paint_twins, read_twins, twin_specs
from uniemo.mini.worlds import WORLDS
from uniemo.runs import start
from uniemo.runs.cli import application, main


@pytest.fixture(scope="module")
def twins():
    return paint_twins(8)


@pytest.fixture(scope="module")
def pipe():
    from uniemo import UniEmoPipeline

    pipe = UniEmoPipeline.from_pretrained("mini")
    pipe.set_progress_bar_config(disable=True)
    return pipe


# ---- twins


@pytest.mark.parametrize("version", WORLDS)
def test_a_twin_differs_in_what_it_says(version):
    world, rng = WORLDS[version], np.random.default_rng(0)
    for k in range(30):
        spec = world.draw(3, k)
        found = twin_specs(spec, world, rng)
        assert set(found) == {"base", *CHANGES}
        scene, thing, both = (found[change] for change in ("scene", "object", "both"))
        assert scene.scene != spec.scene and replace(scene, scene=spec.scene) == spec
        assert thing.objects[1:] == spec.objects[1:] and thing.objects[0] not in spec.objects
        assert replace(thing, objects=spec.objects) == spec
        assert both == replace(spec, scene=scene.scene, objects=thing.objects)
        assert found["painting"].seed != spec.seed
        assert replace(found["painting"], seed=spec.seed) == spec


@pytest.mark.parametrize("version", WORLDS)
def test_pixels_differ_only_where_they_should(version):
    "An object twin away from its object; a scene twin inside the object, but for its soft edge."
    world, pixel = WORLDS[version], (np.arange(64) + 0.5) / 64
    twins = paint_twins(6, version, seed=1)
    for k, spec in enumerate(twins.specs["base"]):
        base = twins.images["base"][k]
        x, y, width = render(spec, widths=world.widths).boxes[0]
        near = np.logical_and.outer(*[np.abs(pixel - c) < 0.7 * width for c in (y, x)])
        differs = (twins.images["object"][k] != base).any(-1)
        assert differs.any() and not differs[~near].any()
        # pixels that are surrounded by their object on all sides
        mask = np.pad(twins.masks[k].any(0), 2)
        shifts = [(i, j) for i in range(-2, 3) for j in range(-2, 3)]
        inside = np.all([np.roll(mask, s, (0, 1)) for s in shifts], axis=0)[2:-2, 2:-2]
        outside = ~twins.masks[k].any(0)
        moved = np.abs(twins.images["scene"][k].astype(int) - base).max(-1)
        assert moved[outside].mean() > 10 * moved[inside].mean() if inside.any() else True


def test_bayes_moves_with_names_alone(twins):
    assert (twins.truth["painting"] == twins.truth["base"]).all()
    assert total_variation(twins.truth["base"], twins.truth["both"]).max() > 0.3
    assert (twins.images["painting"] != twins.images["base"]).any((1, 2, 3)).all()
    again = paint_twins(8)
    assert all((again.images[c] == twins.images[c]).all() for c in twins.images)


# ---- movement


def test_movement_against_bayes_by_hand():
    "Two names, two emotions: (0.9, 0.1) to (0.1, 0.9) is 0.8 of belief and 2 log 9 of log-odds."
    p = np.array([[0.9, 0.1], [0.1, 0.9]])
    truth = dict(base=p, scene=p[::-1], painting=p)
    logits = {name: 0.25 * np.log(q) for name, q in truth.items()}
    table = against_truth(logits, truth, draws=20).value
    assert table["scene", "Bayes"] == pytest.approx(0.8)
    assert table["scene", "share"] == pytest.approx(0.25)
    quarter = 9**0.25 / (1 + 9**0.25)
    assert table["scene", "model"] == pytest.approx(2 * quarter - 1)
    assert table["painting", "model"] == 0 and np.isnan(table["painting", "share"])
    # another image is as far as the twin: 1 in units of it
    assert movement(truth, total_variation, draws=20).value["scene"] == pytest.approx(1)


def test_interval_holds_the_value_and_counts_images():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(50, 4))
    states = dict(
        base=base, near=base + 0.1 * rng.normal(size=base.shape), far=rng.permutation(base)
    )
    table = movement(states, draws=200)
    assert (table.n == 50).all() and (table.low <= table.value).all()
    assert table.high["near"] < table.low["far"]


def read_scene(twins):
    "Logits of a model that knows the scene's true table and looks at nothing else."
    world = WORLDS["1.0"]
    rows = {c: [world.posterior(s.scene, ()) for s in specs] for c, specs in twins.specs.items()}
    return {change: np.log(p) for change, p in rows.items()}


def test_a_model_that_reads_only_the_scene(twins):
    "It moves for scene twins as far as Bayes of the scene does, and for object twins not at all."
    logits = read_scene(twins)
    table = against_truth(logits, twins.truth, draws=20).value
    assert table["scene", "model"] > 0 == table["object", "model"] == table["object", "share"]
    assert table["scene", "share"] == pytest.approx(1)
    assert table["both", "model"] == pytest.approx(table["scene", "model"])
    moves = movement(logits, draws=20).value
    assert moves["object"] == moves["painting"] == 0 < moves["scene"]


def test_the_worlds_differ_in_what_is_read_together():
    "Bayes adds in the first world, and does not in the second; whoever adds takes no share."
    first = paint_twins(8)
    logits = {change: np.log(p) for change, p in first.truth.items()}
    table = togetherness(logits, first.truth, draws=10)
    assert table.value["Bayes"] < 1e-9 and np.isnan(table.value["share"])
    second = paint_twins(20, "2.0")
    exact = {change: np.log(p) + 3 for change, p in second.truth.items()}
    table = togetherness(exact, second.truth, draws=10)
    assert table.value["Bayes"] > 0.5 and table.value["share"] == pytest.approx(1)
    adds = {change: 0 * p for change, p in exact.items()}
    adds["scene"], adds["both"] = exact["scene"], exact["scene"]
    assert togetherness(adds, second.truth, draws=10).value["model"] == pytest.approx(0)


def test_log_odds_of_a_softmax_are_its_logits():
    z = np.random.default_rng(0).normal(size=(5, 8))
    centred = z - z.mean(1, keepdims=True)
    assert np.allclose(log_odds_of(probabilities_of(z)), centred)
    p = probabilities_of(z)[:, 2]
    assert np.allclose(log_odds(z, 2), np.log(p / (1 - p)))


def test_rank_correlation_is_scipys():
    from scipy.stats import spearmanr

    a, b = np.random.default_rng(0).integers(0, 5, (2, 3, 20))
    assert np.allclose(rank_correlation(a, b), [spearmanr(x, y)[0] for x, y in zip(a, b)])


@pytest.mark.parametrize(
    "states, part",
    [
        (dict(base=np.eye(3)), "one more at least"),
        (dict(scene=np.eye(3), object=np.eye(3)), "one more at least"),
        (dict(base=np.eye(3), scene=np.eye(3)[:2]), "the same images"),
        (dict(base=np.eye(3), scene=np.eye(3) * np.nan), "not finite"),
        (dict(base=np.ones((3, 2)), scene=np.eye(3)[:, :2]), "the same for all 3"),
    ],
)
def test_states_that_do_not_belong_together(states, part):
    with pytest.raises(ValueError, match=part):
        movement(states)


# ---- occlusion


def reads_a_patch(row, column):
    "A toy that reads the brightness of one patch of 8 pixels, and nothing else."
    rows, columns = (slice(8 * k, 8 * k + 8) for k in (row, column))

    def read(pixels):
        seen = pixels[:, :, rows, columns].mean((1, 2, 3)).numpy()
        return {"logits": np.stack([5 * seen, 0 * seen], 1), "object": seen[:, None]}

    return read


@pytest.mark.parametrize("fill", ["mean", "blur"])
@pytest.mark.parametrize("row, column", [(0, 0), (3, 5), (7, 7)])
def test_occlusion_finds_what_a_toy_reads(row, column, fill):
    image = torch.full((3, 64, 64), 0.1)
    image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 1
    for side in (1, None):
        maps = occlusion_maps(reads_a_patch(row, column), image, Hiding((8, 8), side, fill))
        for name in ("emotion", "object"):
            assert np.unravel_index(maps[name].argmax(), (8, 8)) == (row, column)
        far = np.add.outer(abs(np.arange(8) - row), abs(np.arange(8) - column)) > 4
        assert np.abs(maps["emotion"][far]).max() < 1e-5
    looks = np.zeros((8, 8))
    looks[row, column] = 1
    how = Hiding((8, 8), None, fill)
    losses = quarter_losses(reads_a_patch(row, column), image, dict(object=looks), how)
    assert losses["object, most"] > losses["by lot"] >= losses["object, least"] > -1e-5


def test_windows_cover_and_hide_what_they_say():
    for grid, side in [((8, 8), None), ((7, 7), 3), ((16, 16), None), ((4, 6), 4)]:
        masks = windows(grid, side)
        assert masks.any(0).all() and len({m.sum() for m in masks}) == 1
    image = torch.rand(3, 64, 64)
    masks = windows((8, 8))
    big = torch.from_numpy(masks).repeat_interleave(8, 1).repeat_interleave(8, 2)
    same = (hidden(image, masks) == image).all(1)
    assert same[~big].all() and not same[big].any()


def test_agreement_is_compared_with_that_of_other_images():
    maps = np.random.default_rng(0).random((12, 8, 8))
    table = agreement_table({"own": (maps, maps), "none": (maps, maps[::-1])}, draws=50).value
    assert table["own", "own"] == 1 and table["own", "beyond"] > 0.8
    assert abs(table["none", "beyond"]) < 0.3
    interval = block_interval(maps[0], maps[0] ** 2)
    assert interval.low == interval.value == interval.high == 1
    with pytest.raises(ValueError, match="the same patches"):
        agreement(maps, maps[:, :4])


def test_the_shipped_encoder_is_read_and_looked_at(pipe, twins):
    states = read_twins(pipe.encoder, twins)
    assert {name: v["base"].shape for name, v in states.items()} == {
        "logits": (8, 8),
        "scene": (8, 128),
        "object": (8, 128),
        "class": (8, 128),
    }
    seen = pipe.understand(twins.images["base"])
    assert np.allclose(probabilities_of(states["logits"]["base"]), seen.probabilities, atol=1e-4)
    looks = look_at(pipe.encoder, twins.images["base"][:2], side=4)
    assert np.allclose(looks.attention["object"], seen.maps["object"][:2], atol=1e-5)
    assert set(looks.lost) == {"emotion", "scene", "object", "class"} and len(looks.quarters) == 2
    assert (looks_agreement(looks, draws=20).n == 2).all()
    rows = read_parts(pipe.encoder, pipe.encoder_pixels(seen.images), batch_size=3)
    assert np.allclose(rows["scene"], states["scene"]["base"], atol=1e-4)


# ---- words


def test_one_part_of_a_word(pipe):
    "The same noise: the base again is the same image, another part is another one."
    from uniemo.mini.judge import load_judge
    from uniemo.mini.word_twins import PARTS, moved_table, paint_words, placed_table, twin_words
    from uniemo.sampling import Sampling

    twins = paint_twins(2, seed=2)
    emotions = [spec.emotion for spec in twins.specs["base"]]
    words = twin_words(pipe, read_twins(pipe.encoder, twins), emotions)
    assert set(words) == {"base", *PARTS}
    base = words["base"][0]
    assert all((words[part][0] != base).flatten(1).any(1).all() for part in PARTS)
    how = Sampling(num_inference_steps=1, guidance_scale=1.0)
    made = {part: paint_words(pipe, words[part], how) for part in ("base", "scene")}
    made["again"] = paint_words(pipe, words["base"], replace(how, batch_size=1))
    assert np.abs(made["again"].astype(int) - made["base"]).max() <= 2
    table = moved_table(load_judge(), made, twins, draws=20)
    assert table.value["scene", "pixels"] > table.value["again", "pixels"]
    assert (table.n == 2).all()
    edited = placed_table(
        {"base": twins.images["base"], "object": twins.images["object"]}, twins.masks
    )
    assert edited.value["object"] > 1


def test_the_audit_experiment(warm, tmp_path):
    few = dict(num_twins=4, num_hidden=2, num_painted=2, num_inference_steps=1, draws=10)
    run = start("audit", few, tmp_path, progress=False)
    assert run.summary()["images"] == 4 and len(list(run.dir.glob("figures/*.png"))) == 7
    moves = pd.read_csv(run.dir / "moves.csv")
    assert set(moves.change) == set(CHANGES) and (moves.n == 4).all()
    placed = pd.read_csv(run.dir / "placed.csv")
    assert set(placed.by) == {"word", "painted twins"}


# ---- the command


@pytest.fixture
def photos(tmp_path, monkeypatch, twins):
    from PIL import Image

    for k in range(2):
        Image.fromarray(twins.images["base"][k]).resize((90, 70)).save(tmp_path / f"{k}.png")
    (tmp_path / "notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_audit_of_two_photographs(photos):
    "JSON alone on stdout, a picture each, CSV with the same numbers."
    given = ["audit", "0.png", "1.png", "--json", "--csv", "t.csv", "--out", "out", "--window", "4"]
    result = CliRunner().invoke(application, given, catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    assert [row["path"] for row in rows] == ["0.png", "1.png"]
    for row in rows:
        for kind in ("scene", "object"):
            low, high = row[f"{kind}_agreement_low"], row[f"{kind}_agreement_high"]
            assert -1 <= low <= row[f"{kind}_agreement"] <= high <= 1
    table = pd.read_csv("t.csv")
    assert np.allclose(table.lot_quarter, [row["lot_quarter"] for row in rows])
    assert sorted(p.name for p in (photos / "out").iterdir()) == ["001-0.png", "002-1.png"]


@pytest.mark.parametrize(
    "args, part",
    [
        (["none.jpg"], "none.jpg: no such file"),
        (["notes.txt"], "notes.txt"),
        (["0.png", "--fill", "black"], "mean, blur"),
        (["0.png", "--window", "99"], "1 to 8 patches"),
        (["0.png", "--out", "."], "not empty"),
        (["0.png", "-m", "nowhere"], "nowhere"),
        ([], "Missing argument"),
    ],
)
def test_refused_with_one_line(photos, capsys, args, part):
    before = sorted(p.name for p in photos.iterdir())
    assert main(["audit", *args]) == 2
    err = capsys.readouterr().err.strip()
    assert part in err and len(err.splitlines()) == 1
    assert sorted(p.name for p in photos.iterdir()) == before


def test_a_model_without_queries_is_refused(pipe):
    from uniemo.commands.audit import audit_photo

    class Plain:
        def understand(self, image):
            from uniemo.results import Understanding

            return Understanding([image], ["awe", "fear"], np.array([[0.5, 0.5]]))

    with pytest.raises(ValueError, match="no queries"):
        audit_photo(Plain(), None)
