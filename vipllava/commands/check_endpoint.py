"""``vipllava check-endpoint URL --model EXPORT``: does a server say what our engine says?"""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from vipllava.commands.options import DataRoot, Json
from vipllava.commands.output import (
    make_console,
    print_json,
    print_table,
    progress_bars,
    rows_table,
    say,
)
from vipllava.types import RecordError, Turn, VipLlavaError

if TYPE_CHECKING:
    from vipllava.inference.agreement import Compared
    from vipllava.inference.endpoint_client import EndpointSettings
    from vipllava.inference.engine_settings import EngineSettings
    from vipllava.types import Request

_SEED: Final = 42
_SHOWN: Final = 20
"""Rows of the table; JSON has all."""
_LONGEST: Final = 40
"""Letters of a text in the table, around where it parts from the other."""
_DIFFERENT: Final = 1
"""Exit code if too few texts are equal."""


def check_endpoint(
    base_url: Annotated[
        str, typer.Argument(metavar="URL", help="Of the server, up to and with /v1.")
    ],
    model: Annotated[
        str, typer.Option(help="Our engine's: the folder, file or id that the server serves.")
    ],
    name: Annotated[
        str | None,
        typer.Option(help="Model as the server calls it.", show_default="the only one it serves"),
    ] = None,
    questions: Annotated[int, typer.Option(min=1, help="How many are asked.")] = 32,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Questions of your own: lines of JSON with image, question and regions.",
            show_default="those of the sample data",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, tokens.")] = 64,
    at_least: Annotated[
        float, typer.Option(min=0, max=1, help="Share of equal texts that is enough.")
    ] = 1.0,
    device: Annotated[str, typer.Option(help="Our engine's.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Our engine's; take the server's.")] = "auto",
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the server's key.")
    ] = None,
    data_root: DataRoot = "data",
    as_json: Json = False,
) -> None:
    """Compare a server's answers with our engine's.

    Both are asked the same questions, greedily, with their marks drawn. The exit code is 0 if
    enough are equal, 1 if not, 2 if it cannot be said.
    """
    from vipllava.inference.endpoint_client import EndpointSettings
    from vipllava.inference.engine_settings import EngineSettings

    theirs = EndpointSettings(base_url, name or "unknown", api_key_env=api_key_env)
    ours = EngineSettings(model, device, dtype)

    def read() -> Iterator[Request]:
        found = _sample_requests(data_root, questions) if data is None else read_questions(data)
        return islice(found, questions)

    compared = asyncio.run(_compare(ours, theirs, name is not None, read, max_new_tokens))
    if not compared:
        raise VipLlavaError(f"{data} has no questions")
    num_equal = sum(each.is_equal for each in compared)
    failures = [each for each in compared if each.theirs is None]
    share = num_equal / len(compared)
    if as_json:
        rows = [asdict(each) | {"equal": each.is_equal} for each in compared]
        counts = {"num_questions": len(compared), "num_equal": num_equal, "share": share}
        print_json(counts | {"questions": rows})
    else:
        _print(compared, num_equal)
    if failures:
        raise VipLlavaError(
            f"{len(failures)} of {len(compared)} questions were not answered by {base_url}, "
            f"{failures[0].key} because: {failures[0].failure}"
        )
    if share < at_least:
        raise typer.Exit(_DIFFERENT)


async def _compare(
    ours: EngineSettings,
    theirs: EndpointSettings,
    is_named: bool,
    read: Callable[[], Iterator[Request]],
    max_new_tokens: int,
) -> list[Compared]:
    """Make sure that the server can be asked, then open our engine and ask both."""
    from vipllava.inference.agreement import compare
    from vipllava.inference.engine_settings import LocalEngineSettings
    from vipllava.inference.openai_engine import OpenAIEngine

    async with AsyncExitStack() as opened:
        if not is_named:
            async with OpenAIEngine(theirs) as asked:
                served = [each.name for each in await asked.served_models()]
            theirs = replace(theirs, model=only_one(served, theirs.base_url))
        endpoint = await opened.enter_async_context(OpenAIEngine(theirs))
        await endpoint.check()
        requests = list(read())
        if any(each.image is not None for each in requests):
            await endpoint.check_images()
        engine = LocalEngineSettings(ours)(ours.device)
        opened.push_async_callback(engine.close)
        found: list[Compared] = []
        with progress_bars() as tell:
            async for each in compare(engine, endpoint, requests, max_new_tokens=max_new_tokens):
                found.append(each)
                tell("compared", "questions", len(found), len(requests))
        return found


def only_one(served: list[str], base_url: str) -> str:
    """Return the name of the model that a server serves.

    Raises:
        VipLlavaError: it serves none, or several.
    """
    from vipllava.inference.endpoint_client import short

    if len(served) != 1:
        listed = short(", ".join(served)) or "none"
        raise VipLlavaError(f"{base_url} serves {listed}: say which with --name NAME")
    return served[0]


def _sample_requests(data_root: str, num_questions: int) -> Iterator[Request]:
    """Return held-out questions about marks of all shapes; the sample data are made if missing."""
    from vipllava.config.places import manifests_dir
    from vipllava.evaluation.asking import Protocol, requests_of
    from vipllava.evaluation.bench import BenchData
    from vipllava.evaluation.benches.regions import REGIONS
    from vipllava.sample_world import TINY_POLICIES
    from vipllava.sample_world.build import ensure_sample_world
    from vipllava.shards.manifest import load_manifest

    ensure_sample_world(data_root)
    manifest = load_manifest("sample_regions", manifests_dir())
    data = BenchData(manifest, Path(data_root), TINY_POLICIES, _SEED, num_questions)
    return requests_of(REGIONS.items(data), Protocol(TINY_POLICIES, _SEED))


def read_questions(path: Path) -> Iterator[Request]:
    """Yield what the lines of a file ask, with their marks drawn.

    A line is ``{"image": "a.jpg", "question": "What is {0}?", "regions": [{"shape": ...}]}``; the
    image's path begins at the file's folder; without an image there are no regions.

    Raises:
        RecordError: a line cannot be read; names file and line.
    """
    from vipllava.inference.marked import mark_request
    from vipllava.records.image_decode import decode_image
    from vipllava.visual_prompts.mark_fields import parse_marks

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            given: Any = json.loads(line)
            if not isinstance(given, dict) or not isinstance(given.get("question"), str):
                raise RecordError("expected an object with a question")
            if unknown := sorted(set(given) - {"image", "question", "regions"}):
                raise RecordError(f"unknown field {unknown[0]}; known: image, question, regions")
            image = None
            if given.get("image") is not None:
                file = path.parent / str(given["image"])
                image = decode_image(file.read_bytes(), str(file))
            marks = parse_marks(given.get("regions") or [])
            turns = [Turn("user", given["question"])]
            yield mark_request(image, turns, marks, key=place).request
        except (OSError, ValueError, VipLlavaError) as error:
            raise RecordError(f"{place}: {error}") from error


def _print(compared: list[Compared], num_equal: int) -> None:
    rows = [_row(each) for each in compared if not each.is_equal]
    if rows:
        headers = ("question", "asked", "ours", "theirs", "letter", "token", "gap", "prompt tokens")
        right = ("letter", "token", "gap", "prompt tokens")
        table = rows_table(
            "Texts that differ",
            headers,
            rows[:_SHOWN],
            right=right,
            spare=("letter", "asked", "question"),
            console=make_console(),
        )
        print_table(table)
    if len(rows) > _SHOWN:
        say(f"{len(rows) - _SHOWN} more; --json has all")
    say(f"{num_equal} of {len(compared)} texts are equal ({num_equal / len(compared):.1%})")
    others = [each.prompt_tokens for each in compared if None not in each.prompt_tokens]
    if odd := [pair for pair in others if pair[0] != pair[1]]:
        say(
            f"prompts differ in length ({odd[0][0]} tokens here, {odd[0][1]} there): another chat "
            "template, image size or tokenizer; the texts cannot be expected to be equal"
        )
    if gaps := [each.gap for each in compared if each.gap is not None]:
        middle = statistics.median(gaps)
        say(
            f"where texts part, our token was likelier than the next by {middle:.3f} (median) to "
            f"{max(gaps):.3f} (natural logarithm): near 0 is a tie that rounding decides (try the "
            "server's --dtype), much more is another model or image"
        )


def _row(each: Compared) -> tuple[str, ...]:
    def around(text: str) -> str:
        start = max(0, (each.letter or 0) - _LONGEST // 2)
        cut = text[start : start + _LONGEST].replace("\n", " ")
        return f"{'...' * (start > 0)}{cut}{'...' * (len(text) > start + _LONGEST)}"

    asked = each.question.replace("\n", " ")
    return (
        each.key,
        f"{asked[:_LONGEST]}{'...' * (len(asked) > _LONGEST)}",
        around(each.ours),
        f"({each.failure})" if each.theirs is None else around(each.theirs),
        *("-" if value is None else str(value) for value in (each.letter, each.token)),
        "-" if each.gap is None else f"{each.gap:.3f}",
        " / ".join("?" if count is None else str(count) for count in each.prompt_tokens),
    )
