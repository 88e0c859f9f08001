"""Scripts whose answers a real kernel gave: Linux 6.12, with its own HMM test driver.

More of them, and what each field means, are where they were recorded; `hmm script --check DIR` runs
those of a folder.
"""

from pathlib import Path

import pytest

from hmm.script import check_script, recorded_scripts

RECORDINGS = Path(__file__).parent / "recordings"

# What these wait for, and do not say so themselves by EOPNOTSUPP.
WAITING = {
    "hand/13_thp": "huge pages",
    "hand/39_thp_more": "huge pages",
}


def name_of(script):
    return f"{script.parent.name}/{script.stem}"


@pytest.mark.parametrize("script", recorded_scripts(RECORDINGS), ids=name_of)
def test_agrees(script):
    """The model answers as the kernel did, counts and flags included, and no rule is broken."""
    if what := WAITING.get(name_of(script)):
        pytest.skip(f"waits for {what}")

    outcome = check_script(script, "should", verify=True)

    if outcome.difference and outcome.difference.model == "EOPNOTSUPP":
        pytest.skip(f"waits for {outcome.difference.op.split()[0]}")
    assert outcome.equal, str(outcome)
