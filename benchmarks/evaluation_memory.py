"""What an evaluation of 2,000 and of 20,000 items holds at most, each in a process of its own.

Real items of the sample world, again and again as items of their own, are decoded, drawn and
worded; what answers them is a program. ``peak_mib`` goes up to the scores, the rewritten file and
the summary; ``before_mib`` is what the process holds when all is imported and nothing read.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from benchmarks.evaluation import PROTOCOL, ROOT, regions_data
from vipllava.evaluation.answerers import EngineAnswerer
from vipllava.evaluation.asking import ask_items
from vipllava.evaluation.bench import Item
from vipllava.evaluation.benches.regions import REGIONS
from vipllava.evaluation.journal import Journal
from vipllava.sample_world.build import ensure_sample_world
from vipllava.types import Request

NUM_ITEMS: Final = (2_000, 20_000)


def run(data_root: Path = Path("data"), sizes: Sequence[int] = NUM_ITEMS) -> dict[str, Any]:
    """Measure; ``kib_per_item`` is how much an item more costs."""
    ensure_sample_world(data_root)
    rows: list[dict[str, Any]] = []
    for num_items in sizes:
        command = [sys.executable, "-m", __name__, str(data_root.absolute()), str(num_items)]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout))
    few, many = rows[0], rows[-1]
    more = many["num_items"] - few["num_items"]
    kib = 1024 * (many["peak_mib"] - few["peak_mib"]) / more
    return {"rows": rows, "ratio": many["peak_mib"] / few["peak_mib"], "kib_per_item": kib}


class Says:
    """Says the same to every question."""

    def answer(
        self, requests: Sequence[Request], *, max_new_tokens: int = 64, batch_size: int = 16
    ) -> list[str]:
        """Return one text per request."""
        return ["a red square" for _ in requests]


def evaluate(data_root: Path, num_items: int) -> dict[str, Any]:
    """Evaluate in this process."""
    data = regions_data(data_root)
    samples = data.source()

    def items() -> Iterator[Item]:
        for number in range(num_items):
            sample = samples.sample(number % len(samples))
            assert sample.image is not None
            # Read by nobody, and another image for the intervals.
            image = sample.image + number.to_bytes(4)
            yield Item(f"sample_regions/{number}", replace(sample, image=image))

    before, began = _peak_mib(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="vipllava-bench-") as folder:
        journal = Journal(Path(folder), {})
        found = ask_items(items(), PROTOCOL, lambda: EngineAnswerer(Says()), journal)["kept"]
        assert all(each.has_answer for each in found)
        scored = list(REGIONS.score(found, data))
        journal.finish("kept", scored)
        REGIONS.summarise(scored, None)
    seconds = time.perf_counter() - began
    return {
        "num_items": num_items,
        "before_mib": before,
        "peak_mib": _peak_mib(),
        "items_per_s": num_items / seconds,
    }


def _peak_mib() -> float:
    # Of Linux; what `getrusage` says may be that of the parent.
    (line,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) / 1024


if __name__ == "__main__":
    sys.stdout.write(json.dumps(evaluate(Path(sys.argv[1]), int(sys.argv[2]))))
