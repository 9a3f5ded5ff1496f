"""Run the parts that are named, or all of them; each prints a table and writes a JSON file."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
PARTS = (
    "data",
    "open",
    "shards",
    "stream",
    "loading",
    "train",
    "contention",
    "evaluation",
    "evaluation_memory",
    "serve",
)
ASK_A_MODEL = frozenset(("evaluation", "serve"))
"""Parts that ask a trained model, too, where one is named."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run benchmarks and write ``OUTPUT/PART.json``."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="EXPORT",
        help=f"a trained model for {' and '.join(sorted(ASK_A_MODEL))}, e.g. the quick start's",
    )
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.parts) - set(PARTS)):
        parser.error(f"unknown parts {unknown}; known: {', '.join(PARTS)}")
    options.output.mkdir(parents=True, exist_ok=True)
    for part in options.parts or PARTS:
        named = {"checkpoint": options.checkpoint} if part in ASK_A_MODEL else {}
        result: dict[str, Any] = importlib.import_module(f"benchmarks.{part}").run(**named)
        result["machine"] = {"platform": platform.platform(), "python": platform.python_version()}
        path = options.output / f"{part}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        _show(part, result["rows"], path)
    return 0


def _show(part: str, rows: Sequence[dict[str, Any]], path: Path) -> None:
    table = Table(title=f"{part} (written to {path})")
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console().print(table)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
