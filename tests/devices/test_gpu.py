"""The CuPy device on a real GPU: `make test-gpu`, and nowhere else. docs/gpu.md has the figures."""

import time
from importlib.util import find_spec

import numpy as np
import pytest

from devices.conformance import RULES
from devices.conformance.suite import Trials
from hmm.registry import load_driver
from mm import PAGE_SIZE, Machine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("cupy") is None, reason="pip install 'hmm-migrate[cupy]'"),
]

SIZE = 256 << 20
ROUNDS = 7
REACH = 0.8  # of one pinned cudaMemcpy() of as many bytes


@pytest.fixture(scope="module")
def trials():
    return Trials(load_driver("cupy"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_rule(trials, rule):
    """A real GPU keeps every promise."""
    verdict = trials.verdict(rule)

    assert "pass" == verdict.outcome, verdict.evidence


def fastest(work):
    """Seconds of the fastest of several rounds."""
    spent = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        work()
        spent.append(time.perf_counter() - begin)
    return min(spent)


@pytest.mark.parametrize("order", ["contiguous", "scattered"])
@pytest.mark.parametrize("way", ["in", "out"])
def test_rate(order, way, capsys):
    """A copy of 256 MiB is told against one pinned DMA of as many bytes, in the same run."""
    machine, npages = Machine(("512MiB",)), SIZE // PAGE_SIZE
    gpu = load_driver("cupy")(machine, SIZE)
    system = machine.mem.payload
    in_a_row = np.arange(npages)
    rng = np.random.default_rng(1)
    pages = in_a_row if order == "contiguous" else rng.permutation(npages)
    rows = in_a_row if order == "contiguous" else rng.permutation(npages)
    ops = {"in": gpu.copy_in, "out": gpu.copy_out}

    def copy(some_pages, some_rows):
        fence = ops[way](some_pages, system, some_rows)
        if fence is not None:
            fence.wait(gpu.timeout)

    copy(pages, rows)  # kernels are compiled, buffers are there
    alone = fastest(lambda: copy(in_a_row, in_a_row))
    spent = fastest(lambda: copy(pages, rows))
    with capsys.disabled():
        print(
            f"\n{order} 256 MiB {way}: {spent * 1e3:.2f} ms, {alone / spent:.2f} of one DMA "
            f"({SIZE / alone / 1e9:.1f} GB/s); wanted {REACH}"
        )
    gpu.close()
