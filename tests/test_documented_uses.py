"""The uses of README and docs/use.md, run as they stand there, on a machine without a GPU.

The model is the quick start's network before its training, at the quick start's place; free ports
stand in the place of the documented ones. Both READMEs have the same examples.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

import vipllava as vl
from tests import preloaded
from vipllava import cli
from vipllava.checkpoints.export_meta import ExportMeta
from vipllava.checkpoints.hf_format import save_export
from vipllava.checkpoints.loading import build_model, load_tokenizer
from vipllava.config.composing import compose_job
from vipllava.inference.protocol import MOST_STOPS
from vipllava.sample_world.vip_bench import write_vip_bench
from vipllava.serve.bodies import STALLED_S
from vipllava.serve.limits import MOST_NAMES, MOST_OF_OBJECT, MOST_VALUES
from vipllava.serve.schema import MOST_MESSAGES
from vipllava.serve.settings import ServerSettings
from vipllava.training.job import model_spec
from vipllava.visual_prompts.mark_places import MOST_POINTS
from vipllava.visual_prompts.marks import MARKS, MOST_MARKS
from vipllava.visual_prompts.shapes import PALETTE, shape_words

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
CHINESE = (ROOT / "README.zh.md").read_text("utf-8")
USE = (ROOT / "docs" / "use.md").read_text("utf-8")
SERVING = (ROOT / "docs" / "serving.md").read_text("utf-8")
MODEL = "runs/quickstart/tiny-gpt4v/export"
SCENE = "data/sample_world-v3/ViP-Bench/source_image/0000.jpg"
ADDRESS = "http://127.0.0.1:8000"


def blocks_of(text: str, language: str = r"\w*") -> list[str]:
    """Return the code blocks of a page."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", text)


def section(text: str, heading: str) -> str:
    """Return what stands under a heading."""
    return re.split(rf"(?m)^## {heading}\n", text)[1].partition("\n## ")[0]


def words_of(command: str) -> list[str]:
    """Return a documented command's words behind ``vipllava``."""
    program, *words = shlex.split(command.replace("\\\n", " "), comments=True)
    assert program == "vipllava"
    return words


USES = section(README, "Use")
PYTHON = blocks_of(USES, "python")
SHELL = blocks_of(USES, "bash")
(PREVIEW,) = (block for block in blocks_of(SERVING, "bash") if "/preview" in block)
OWN_PYTHON = [block for block in blocks_of(USE, "python") if "openai" not in block]
OWN_CLIENTS = [block for block in blocks_of(USE, "python") if "openai" in block]
OWN_SHELL = blocks_of(USE, "bash")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a user whose quick start has ended, as far as these uses need it."""
    here = tmp_path_factory.mktemp("user")
    spec = replace(model_spec(compose_job(["stage=gpt4v"])), checkpoint=None)
    tokenizer = load_tokenizer(spec)
    network = build_model(spec, tokenizer, seed=1)
    tower: Any = network.config.vision_config
    meta = ExportMeta(
        stage="gpt4v", chat_template=spec.chat_template, image_aspect="pad",
        image_size=spec.image_size, image_seq_length=(spec.image_size // tower.patch_size) ** 2,
        feature_layers=spec.feature_layers, vision_tower=spec.vision_tower,
        language_model=spec.language_model,
    )  # fmt: skip
    save_export(network, tokenizer, here / MODEL, meta)
    write_vip_bench((here / SCENE).parents[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        yield here


@contextmanager
def serving(place: Path, command: str) -> Iterator[str]:
    """Run a documented command that serves, on a free port; yield its address; end it."""
    process = preloaded.Popen(
        [sys.executable, "-m", "vipllava.cli", *words_of(command), "--port", "0"],
        cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    said: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        else:
            pytest.fail("".join(said))
        with urllib.request.urlopen(f"{found[0]}/ready", timeout=10) as answer:
            assert answer.status == 200  # it has said that it serves
        yield found[0]
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0, "".join(said) + rest
    finally:
        process.kill()
        process.communicate()


def test_both_readmes_have_the_same_examples_links_and_figures():
    def without_comments(block: str) -> list[str]:
        return [re.sub(r"\s*#.*", "", line) for line in block.splitlines()]

    assert [*map(without_comments, blocks_of(CHINESE))] == [
        *map(without_comments, blocks_of(README))
    ]
    pages = [re.sub(r"(?ms)^```.*?^```", "", page) for page in (README, CHINESE)]
    for pattern in (r"\]\((?!https?:|README)([^)]+)\)", r"`([^`\n]+)`", r"https?://[^\s)]+"):
        english, chinese = (set(re.findall(pattern, page)) for page in pages)
        assert english
        assert english ^ chinese == set()
    english, chinese = (sorted(re.findall(r"\d+(?:\.\d+)*", page)) for page in pages)
    assert english == chinese
    assert "](README.zh.md)" in README
    assert "](README.md)" in CHINESE


def test_the_table_of_marks_is_what_the_classes_say():
    row = r"(?m)^\| ([a-z ]+) \| `vl\.(\w+)` \| `([a-z ]+)` \| ([^|]+) \| ([^|]+) \|$"
    found = re.findall(row, section(USE, "Marks"))
    assert [shape for shape, *_ in found] == list(MARKS)
    for shape, name, in_json, places, words in found:
        assert getattr(vl, name) is MARKS[shape]
        assert in_json == shape
        assert {place.split()[0] for place in places.split(", ")} == set(MARKS[shape].places)
        assert words == shape_words(shape, "red")
    colours = section(USE, "Marks").partition("| `colour` | ")[2].partition(", or red")[0]
    assert re.findall(r"`(\w+)`", colours) == list(PALETTE)


def test_there_are_five_uses():
    assert [len(PYTHON), len(SHELL)] == [2, 4]
    first_words = [block.split()[:2] for block in SHELL]
    assert first_words == [["vipllava", "chat"], ["vipllava", "serve"], ["curl", "--silent"],
                           ["vipllava", "demo"]]  # fmt: skip
    assert "vl.load(" in PYTHON[0]
    assert "from openai import OpenAI" in PYTHON[1]


def test_from_python(place: Path, capsys: pytest.CaptureFixture[str]):
    session: dict[str, Any] = {}
    exec(compile(PYTHON[0], "README.md", "exec"), session)
    with session["model"]:
        reply = session["reply"]
        assert capsys.readouterr().out.strip() == reply.text.strip()
        assert reply.question == "What is within the red rectangle?"
        assert Image.open("marked.png").tobytes() == reply.overlay.tobytes()


def test_more_from_python(place: Path, capsys: pytest.CaptureFixture[str]):
    session: dict[str, Any] = {}
    for block in OWN_PYTHON:
        exec(compile(block, "docs/use.md", "exec"), session)
    with session["model"]:
        assert session["stream"].reply.text
        assert session["chat"].words == ("within the red rectangle",)
    saved = json.loads((place / "chat.json").read_text())
    assert [turn["role"] for turn in saved["turns"]] == ["user", "assistant"] * 2
    assert (place / saved["overlay"]).is_file()
    assert "within the blue ellipse\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command",
    [
        block
        for block in (SHELL[0], *OWN_SHELL)
        if "vipllava chat" in block and "--question" in block
    ],
)
def test_in_a_terminal(place: Path, command: str, capsys: pytest.CaptureFixture[str]):
    words = words_of(command)
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    if "--json" in words:
        answers = [json.loads(line) for line in said.splitlines()]
        assert len(answers) == words.count("--question")
        assert all(len(answer["words"]) == words.count("--box") for answer in answers)
    else:
        assert said.strip()


def test_a_server_with_curl_and_the_official_client(
    place: Path, capsys: pytest.CaptureFixture[str]
):
    with serving(place, SHELL[1]) as address:
        asked = SHELL[2].replace(ADDRESS, address)
        assert asked != SHELL[2]
        curl = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
        answer = json.loads(curl.stdout)
        message = answer["choices"][0]["message"]
        assert message["vipllava"]["words"] == ["within the red rectangle"]
        preview = PREVIEW.replace(ADDRESS, address)
        subprocess.run(["bash", "-c", preview], check=True)
        with Image.open("marked.png") as drawn, Image.open(SCENE) as scene:
            assert drawn.size == scene.size
            assert drawn.format == "PNG"
        for block in (PYTHON[1], *OWN_CLIENTS):
            assert ADDRESS in block
            exec(compile(block.replace(ADDRESS, address), "README.md", "exec"), {})
            said = capsys.readouterr().out
            if block is PYTHON[1]:
                assert said == message["content"] + "\n"
            else:
                assert said


def test_the_limits_of_the_page_are_those_of_the_command():
    table = dict(re.findall(r"(?m)^\| `--([a-z-]+)` \|.*\| (\S+) \|$", section(SERVING, "Limits")))
    assert len(table) == 8
    command: Any = typer.main.get_command(cli.app)
    defaults = {each.opts[0]: each.default for each in command.commands["serve"].params}
    assert {name: float(value) for name, value in table.items()} == {
        name: defaults[f"--{name}"] for name in table
    }


def test_the_fixed_limits_are_those_of_the_server():
    text = section(SERVING, "Limits")
    fixed = ServerSettings()
    for said in (
        f"{MOST_MARKS} regions with {MOST_POINTS} points each",
        f"{MOST_MESSAGES} messages, {MOST_STOPS} texts to stop at",
        f"{MOST_VALUES} values and {MOST_NAMES} names in a body, {MOST_OF_OBJECT} names in an",
        f"{fixed.head_timeout_s:g} s for a header and {fixed.body_timeout_s:g} s for a body",
        f"{fixed.write_timeout_s:g} s for a client to read on, {fixed.max_connections} conn",
    ):
        assert said in text
    assert (STALLED_S, "stood still for a second" in text) == (1.0, True)


def test_the_page(place: Path):
    with serving(place, SHELL[3]) as address:
        with urllib.request.urlopen(address, timeout=30) as page:
            assert page.headers["content-type"].startswith("text/html")
            assert b"ViP-LLaVA" in page.read()
        with urllib.request.urlopen(f"{address}/v1/models", timeout=30) as models:
            assert json.load(models)["data"]
