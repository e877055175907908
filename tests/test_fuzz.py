"Every kind of file that the package reads, as it should not be: `UNIEMO_FUZZ` cases, seeded."

import os

import fuzz
import fuzz_weights  # noqa: F401 - its kinds join those of `fuzz`
import pytest

NUMBER = int(os.environ.get("UNIEMO_FUZZ", 1000))
SEED = int(os.environ.get("UNIEMO_FUZZ_SEED", 0))


@pytest.mark.parametrize("name", sorted(fuzz.KINDS))
def test_each_case_is_read_right_or_refused_clearly(name):
    number = -(-NUMBER // len(fuzz.KINDS))
    ends, faults = {"read": 0, "refused": 0}, []
    for _, seed in fuzz.cases(SEED, number):
        try:
            ends[fuzz.run_case(name, seed)] += 1
        except AssertionError as fault:
            faults.append(str(fault))
    assert not faults, f"{len(faults)} of {number}, first: {faults[0]}"
    assert sum(ends.values()) == number
