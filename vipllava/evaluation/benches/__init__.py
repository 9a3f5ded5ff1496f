"""The benchmarks, one file each. Adding one is a file and a name in ``BENCHES``."""

from __future__ import annotations

from typing import Final

from vipllava.evaluation.bench import Bench
from vipllava.evaluation.benches.custom import CUSTOM
from vipllava.evaluation.benches.pointqa import POINTQA
from vipllava.evaluation.benches.refcocog import REFCOCOG
from vipllava.evaluation.benches.regions import REGIONS
from vipllava.evaluation.benches.v7w import V7W
from vipllava.evaluation.benches.vcr import VCR_QA, VCR_QAR, VCR_QAR_JOINT
from vipllava.evaluation.benches.vip_bench import VIP_BENCH
from vipllava.types import ConfigError

BENCHES: Final[dict[str, Bench]] = {
    bench.name: bench
    for bench in (
        REGIONS,
        VIP_BENCH,
        V7W,
        POINTQA,
        VCR_QA,
        VCR_QAR,
        VCR_QAR_JOINT,
        REFCOCOG,
        CUSTOM,
    )
}


def register_bench(bench: Bench) -> None:
    """Make a benchmark of one's own known under its name.

    Raises:
        ConfigError: there is one of this name.
    """
    if bench.name in BENCHES:
        raise ConfigError(
            f"there is a benchmark `{bench.name}` already; known: {', '.join(BENCHES)}. "
            "Choose another name"
        )
    BENCHES[bench.name] = bench


def get_bench(name: str) -> Bench:
    """Return the benchmark of this name.

    Raises:
        ConfigError: there is none; lists the known ones.
    """
    if name not in BENCHES:
        raise ConfigError(f"unknown benchmark `{name}`; known: {', '.join(BENCHES)}")
    return BENCHES[name]
