"Written claims and their verdicts: the reader, the statistics by other means, the rule."

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from uniemo import runs
from uniemo.commands.claims import verdicts_of
from uniemo.files.disk import FileError
from uniemo.measure.cells import CellFile
from uniemo.measure.claims import CLAIMS, EXAMPLE_CLAIMS, read_claims, read_seeds
from uniemo.measure.intervals import difference
from uniemo.measure.verdicts import (
    COLUMNS,
    beside_verdicts,
    detectable,
    holm,
    judge_claims,
    paired_p,
    plot_verdicts,
)
from uniemo.runs.cli import main
from uniemo.runs.tables import published


def protocol_of(tmp_path, **changes):
    "The example file with other fields of its first claim."
    document = yaml.safe_load(EXAMPLE_CLAIMS)
    document["claims"][0].update(changes)
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump(document))
    return read_claims(path)


def rows_of(claim, values, size=300, endpoint="accuracy"):
    "Result rows: arm -> one value a seed, from 100 on."
    return [
        (claim, arm, 100 + k, size, endpoint, value)
        for arm, own in values.items()
        for k, value in enumerate(own)
    ]


def table_of(*parts):
    return pd.DataFrame([row for part in parts for row in part], columns=COLUMNS)


# ---- the file


@pytest.mark.parametrize("field", ["claim", "source", "estimand", "primary", "seeds", "decision"])
def test_every_field_must_be_written(tmp_path, field):
    document = yaml.safe_load(EXAMPLE_CLAIMS)
    del document["claims"][1][field]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(FileError, match=rf"mine.yaml: claims 2 \(fid\): {field}: Field required"):
        read_claims(path)


def test_an_unknown_field_is_named_before_what_it_leaves_missing(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(EXAMPLE_CLAIMS.replace("at_least", "at_leest"))
    with pytest.raises(FileError, match="positive_control.at_leest: there is no such field"):
        read_claims(path)


@pytest.mark.parametrize("text", ["", "- a\n- b", "claims: {}", "\x00", "claims: [1]"])
def test_what_is_no_claims_file(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(FileError, match="mine.yaml"):
        read_claims(path)


def test_seeds():
    assert read_seeds("100-102") == [100, 101, 102]
    with pytest.raises(ValueError, match="-1"):
        read_seeds("-1")


def test_the_projects_claims_report_on_other_seeds_than_those_that_chose():
    own = read_claims(CLAIMS)
    assert own.status == "running" and own.world == "2.0" and len(own.claims) == 11
    for claim in own.claims:
        assert len(claim.seeds) >= 20 and not set(claim.seeds) & set(own.tuning_seeds)
        assert claim.primary.arm in claim.arms and claim.primary.against in claim.arms
        assert claim.arms[: len(claim.deciding_arms)] == claim.deciding_arms


def test_every_arm_of_a_claim_is_written():
    "What the file names can be made: no claim waits for an arm that nobody has."
    from uniemo.mini.contenders import CONTENDERS
    from uniemo.mini.joined import IMPLICIT
    from uniemo.mini.lessons import LESSONS
    from uniemo.mini.makers import MAKERS
    from uniemo.mini.specialists import EXPERTS

    written = CONTENDERS | EXPERTS | IMPLICIT | LESSONS | MAKERS
    named = {arm for claim in read_claims(CLAIMS).claims for arm in claim.arms}
    assert named <= set(written), named - set(written)


# ---- the statistics, as statsmodels 0.15 gives them


def test_holm_as_statsmodels():
    p = [0.011, 0.0004, 0.9, 0.03, 0.03, 0.012, 0.2, 0.008]
    expected = [0.066, 0.0032, 0.9, 0.12, 0.12, 0.066, 0.4, 0.056]
    np.testing.assert_allclose(holm(p), expected, atol=1e-12)
    np.testing.assert_allclose(holm([p, p[::-1]]), [expected, expected[::-1]], atol=1e-12)


@pytest.mark.parametrize(
    ("n", "alpha", "effect"),
    [
        (5, 0.05, 1.68200),
        (5, 0.00625, 2.97645),
        (20, 0.05, 0.66044),
        (20, 0.00625, 0.88816),
        (50, 0.05, 0.40418),
        (50, 0.00625, 0.52590),
    ],
)
def test_power_as_statsmodels(n, alpha, effect):
    assert detectable(1.0, n, alpha) == pytest.approx(effect, rel=1e-4)
    assert detectable(0.01, n, alpha) == pytest.approx(effect / 100, rel=1e-4)


def test_p_agrees_with_the_interval():
    rng = np.random.default_rng(3)
    a, b = rng.normal(0.7, 0.02, 12), rng.normal(0.69, 0.02, 12)
    p = float(paired_p(a - b))
    assert difference(a, b, level=1 - p).low == pytest.approx(0, abs=1e-9)


# ---- the rule


def test_by_hand(tmp_path):
    "Differences 0.02, 0.03, 0.04 against a margin of 0.01: t = 2 sqrt(3), two of freedom."
    protocol = protocol_of(tmp_path, seeds=[100, 101, 102], negative_control=None)
    values = dict(plain=[0.5, 0.6, 0.7], queries=[0.52, 0.63, 0.74], oracle=[0.9, 0.9, 0.91])
    found = judge_claims(protocol, table_of(rows_of("queries", values))).loc["queries"]
    t = 2 * np.sqrt(3)
    p = 1 - t / np.sqrt(2 + t**2)
    assert found.n == 3 and found.difference == pytest.approx(0.03)
    assert found.high - 0.03 == pytest.approx(4.302653 * 0.01 / np.sqrt(3), rel=1e-5)
    assert found.p == pytest.approx(p, rel=1e-6) and found.p_holm == pytest.approx(2 * p, rel=1e-6)
    assert found.detectable == pytest.approx(detectable(0.01, 3, 0.025), rel=1e-6)
    assert (found.positive_control, found.negative_control) == ("passed", "none")
    assert found.verdict == "undecided"


SEEDS = list(range(100, 120))
NOISE = np.resize([0.004, -0.004, 0.002, -0.002], 20)


@pytest.mark.parametrize(
    ("gain", "direction", "verdict"),
    [
        (0.03, "greater", "supported"),
        (0.01, "greater", "undecided"),
        (0.0, "greater", "refuted"),
        (-0.03, "greater", "refuted"),
        (-0.03, "less", "supported"),
        (0.03, "less", "refuted"),
    ],
)
def test_verdicts_follow_the_difference(tmp_path, gain, direction, verdict):
    primary = dict(endpoint="accuracy", arm="queries", against="plain", size=300, margin=0.01)
    protocol = protocol_of(
        tmp_path, primary=primary | dict(direction=direction), negative_control=None
    )
    plain = np.full(20, 0.6)
    values = dict(plain=plain, queries=plain + gain + NOISE, oracle=plain + 0.2 + NOISE)
    found = judge_claims(protocol, table_of(rows_of("queries", values)))
    assert found.verdict["queries"] == verdict
    assert found.verdict["fid"] == "not tested" and found.n["fid"] == 0


def test_what_was_not_tested_says_why(tmp_path):
    plain = np.full(20, 0.6)
    values = {"plain": plain, "queries": plain + 0.05 + NOISE, "oracle": plain + 0.2 + NOISE}
    values["plain again"] = plain + NOISE
    whole = table_of(rows_of("queries", values))
    protocol = protocol_of(tmp_path)
    assert judge_claims(protocol, whole).verdict["queries"] == "supported"
    # 1. a control too weak, and one that shows what it must not
    for arm, value, said in (("oracle", 0.62, "positive"), ("plain again", 0.65, "negative")):
        broken = whole.assign(value=whole.value.where(whole.arm != arm, value))
        found = judge_claims(protocol, broken).loc["queries"]
        assert (found.verdict, found.reason) == ("not tested", f"{said} control failed")
    # 2. rows that are missing
    for arm in ("queries", "oracle"):
        short = whole[(whole.arm != arm) | (whole.seed != 107)]
        found = judge_claims(protocol, short).loc["queries"]
        assert found.verdict == "not tested" and found.reason
    # 3. results of other seeds, sizes and endpoints help nobody
    for column, value in (("seed", 500), ("size", 100), ("endpoint", "loss")):
        one = whole[whole.arm == "plain"].iloc[:1].assign(**{column: value})
        found = judge_claims(protocol, pd.concat([whole, one])).loc["queries"]
        assert (found.verdict, found.n) == ("supported", 20)


def test_rows_in_any_order_and_untested_claims_count(tmp_path):
    plain = np.full(20, 0.6)
    values = dict(plain=plain, queries=plain + 0.05 + NOISE, oracle=plain + 0.2)
    table = table_of(rows_of("queries", values))
    protocol = protocol_of(tmp_path, negative_control=None)
    a, b = judge_claims(protocol, table), judge_claims(protocol, table[::-1])
    pd.testing.assert_frame_equal(a, b)
    assert a.p_holm["queries"] == pytest.approx(2 * a.p["queries"])


def test_others_stand_beside_without_a_verdict(tmp_path):
    values = dict(plain=[0.5, 0.6], queries=[0.6, 0.7], oracle=[0.9, 0.8])
    table = table_of(
        rows_of("queries", values),
        rows_of("queries", dict(plain=[0.1, 0.2], queries=[0.2, 0.4]), endpoint="override"),
    )
    beside = beside_verdicts(protocol_of(tmp_path), table).set_index(["endpoint", "against"])
    assert beside.difference["accuracy", "plain"] == pytest.approx(0.1)
    assert beside.difference["override", "plain"] == pytest.approx(0.15)
    assert len(beside) == 3 and set(beside.n) == {2}


def test_the_picture_tells_all_claims(tmp_path):
    protocol = protocol_of(tmp_path)
    verdicts = judge_claims(protocol, table_of())
    ax = plot_verdicts(verdicts, protocol)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["queries", "fid"]
    assert "2 not tested" in ax.get_title(loc="left")


# ---- from the shell


def test_verdicts_of_finished_cells(tmp_path, capsys):
    file = CellFile(tmp_path / "cells.jsonl", "some code")
    claim = read_claims(CLAIMS).claims[0]
    for seed in claim.seeds[:2]:
        for k, arm in enumerate(claim.arms):
            value = 0.5 + 0.1 * k + 0.001 * seed
            file.add(arm, claim.primary.size, seed, {claim.primary.endpoint: value}, 1.0)
    cells = str(file.path)
    assert main(["claims", "--cells", cells, "--seeds", "2"]) == 0
    said = capsys.readouterr().out
    assert f"{2 * len(claim.arms)} cells" in said
    assert main(["claims", "--cells", cells, "--seeds", "1"]) == 2


SHORT = """
status: not run
world: "2.0"
tuning_seeds: 0-9
claims:
  - name: head
    claim: A head alone is enough.
    source: this test
    estimand: mean difference of accuracy over training seeds
    primary: {endpoint: accuracy, arm: frozen head, against: Bayes of true names, size: 16}
    positive_control: null
    negative_control: null
    seeds: [100, 101, 102]
    decision: Accuracy is higher.
"""

OWN = """
import torch


def always_awe(contest):
    "Logits that say awe of every test image."
    count = len(contest.splits.tensor("test", "label"))
    return contest.told(torch.eye(8)[1].expand(count, 8))
"""


def test_what_is_missing_is_made_once(warm, tmp_path):
    (tmp_path / "claims.yaml").write_text(SHORT)
    (tmp_path / "mine.py").write_text(OWN)
    given = dict(
        claims_file=str(tmp_path / "claims.yaml"),
        cells_file=str(tmp_path / "cells.jsonl"),
        own=f"{tmp_path / 'mine.py'}:always_awe",
        num_seeds=2,
        num_test=24,
        steps=4,
    )
    done = runs.start("claims", given, tmp_path / "runs", progress=False)
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    # two arms of the claim and one of your own, two seeds each
    assert len(lines) == 6
    verdicts = pd.read_csv(done.dir / "verdicts.csv").set_index("claim")
    assert verdicts.loc["head", "n"] == 2 and verdicts.loc["head", "difference"] < 0
    beside = pd.read_csv(done.dir / "beside.csv")
    assert set(beside.against) == {"Bayes of true names", "always_awe"}
    # a second run finds all of them there
    runs.start("claims", given, tmp_path / "runs", progress=False)
    assert (tmp_path / "cells.jsonl").read_text().splitlines() == lines


def test_processes_share_the_seeds(warm, tmp_path):
    "Each makes the cells of its own seeds, and adds them to one file."
    (tmp_path / "claims.yaml").write_text(SHORT)
    file = CellFile(tmp_path / "cells.jsonl")
    given = dict(claims_file=str(tmp_path / "claims.yaml"), cells_file=str(file.path))
    given |= dict(num_test=24, steps=4, num_threads=1, parts=2)
    seeds = []
    for part in (0, 1):
        runs.start("claims", given | dict(part=part), tmp_path / "runs", progress=False)
        seeds.append({cell["seed"] for cell in file.read()})
    assert seeds == [{100, 102}, {100, 101, 102}]
    # two arms, three seeds, nothing twice
    assert len(file.read()) == 6


def test_a_process_that_fails_is_told(warm, tmp_path, monkeypatch, capsys):
    "What a method lacks is found before a cell is made; by one process, and by each of two."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("def other(contest):\n    return {}\n")
    asked = ["--run", "--deciding", "--own", "mine.py:nobody", "--quiet"]
    for jobs in ("1", "2"):
        assert main(["claims", *asked, "--jobs", jobs]) == 1
        assert "mine.py has no function 'nobody'" in capsys.readouterr().err
    assert not (tmp_path / "claims.jsonl").exists()


def test_the_readme_says_what_the_published_cells_say():
    verdicts, made = verdicts_of(published("claims") / "cells.jsonl")
    assert made > 100
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    for name, found in verdicts.iterrows():
        figures = f"{found.difference:+.3f} [{found.low:.3f}, {found.high:.3f}]"
        row = f"| {name} | {found.compared} | {figures} | **{found.verdict}** |"
        assert (row in readme) == (found.n == 20), f"{name}: execute nbs/index.ipynb, make readme"
