"""The console script: it answers at once, and its mistakes are readable."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from vipllava import __version__, cli
from vipllava.types import ConfigError, VipLlavaError

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "lightning", "transformers", "numpy", "hydra", "rich", "openai"}


def run(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **variables},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("words", [["--help"], ["shards", "build", "--help"], ["lint", "-h"]])
def test_help_imports_nothing_heavy(words: list[str]):
    done = run(
        "import sys\n"
        "from vipllava.cli import main\n"
        f"assert main({words}) == 0\n"
        f"heavy = {HEAVY} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: vipllava")


def paths(command: object, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the words of every command, groups included."""
    found = [above]
    for name, inner in getattr(command, "commands", {}).items():
        found += paths(inner, (*above, name))
    return found


@pytest.mark.parametrize("columns", [80, 200])
def test_help_of_every_command_fits_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", str(columns))
    widest = 0
    known = [p for p in paths(typer.main.get_command(cli.app)) if p[:1] != ("train",)]
    assert len(known) >= 22
    for path in known:
        if path == ("evaluate",):
            continue  # Hydra's own
        assert cli.main([*path, "--help"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= columns, path
        assert not [line for line in lines if line.endswith("...") and "Usage" not in line], path
        widest = max(widest, *map(len, lines))
    assert widest > (100 if columns == 200 else 70)  # a wide terminal is used


def test_options_do_not_push_their_texts_aside(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["convert", "--help"]) == 0
    texts = [line for line in capsys.readouterr().out.splitlines() if line.startswith(" " * 8)]
    assert texts
    assert max(len(line) - len(line.lstrip()) for line in texts) <= 40


def _joined_lines(page: Path) -> str:
    return page.read_text("utf-8").replace("\\\n", " ")


def test_pages_name_commands_and_options_that_exist():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    lines = [
        (page.name, shlex.split(line))
        for page in pages
        for line in re.findall(r"(?m)(?:^|`)vipllava ([a-z][^`\n#>|]*)", _joined_lines(page))
    ]
    assert len(lines) > 50
    for page, words in lines:
        command = typer.main.get_command(cli.app)
        for word in words:
            command = getattr(command, "commands", {}).get(word, command)
        known = {"--help"} | {name for parameter in command.params for name in parameter.opts}
        given = {word for word in words if word.startswith("--")}
        assert command.name != "vipllava", (page, words)
        assert command.name in ("train", "evaluate") or given <= known, (page, words)
    table = (ROOT / "docs" / "commands.md").read_text("utf-8").partition("\n## ")[0]
    for path in paths(typer.main.get_command(cli.app))[1:]:
        groups = ("data", "shards")
        named = f"`{path[-1]}`" in table or f"`{' '.join(path)}`" in table
        assert named or path[-1] in groups, path


def test_version(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"vipllava {__version__}\n"


def test_a_users_mistake_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(root: Path) -> None:
        raise VipLlavaError(f"cannot write {root}")

    monkeypatch.setattr("vipllava.sample_world.build.ensure_sample_world", fail)
    assert cli.main(["sample-data", "--data-root", "there"]) == 2
    assert capsys.readouterr().err == "error: cannot write there\n"


@pytest.mark.parametrize("error", [KeyError("a defect"), EOFError("a pipe ended")])
def test_a_defect_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def fail(root: Path) -> None:
        raise error

    monkeypatch.setattr("vipllava.sample_world.build.ensure_sample_world", fail)
    with pytest.raises(type(error)) as caught:
        cli.main(["sample-data"])
    assert [entry.name for entry in caught.traceback][-2:] == ["sample_data", "fail"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample-date"], "Did you mean 'sample-data'?"),
        (
            ["sample-data", "--data-rot", "x"],
            "No such option: --data-rot (Possible options: --data-root)",
        ),
        (["sample-data", "data_root=x"], "unexpected extra argument(s) (data_root=x)"),
        (["data", "lits"], "No such command 'lits'. Did you mean 'list'?"),
        (["inspect", "--epoch", "1"], "No such option: --epoch"),
        (["lint", "--num-samples", "0"], "Invalid value for '--num-samples'"),
    ],
)
def test_unknown_words_are_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(words) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert len(shown.splitlines()) <= 4


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]):
    for words in ([], ["shards"]):
        assert cli.main(words) == 2
        shown = capsys.readouterr()
        assert "Commands:" in shown.out + shown.err


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("vipllava sha", "shards"),
        ("vipllava shards build --data-r", "--data-root"),
        ("vipllava data show v7w", "v7w_test"),
    ],
)
def test_a_shell_completes_commands_options_and_data_sets(typed: str, wanted: str):
    variables = {"_VIPLLAVA_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": typed}
    done = run("import sys; from vipllava.cli import main; sys.exit(main())", **variables)
    assert wanted in done.stdout, done.stderr


def job(*words: str) -> subprocess.CompletedProcess[str]:
    script = "import sys\nfrom vipllava.cli import main\nsys.argv = {}\nsys.exit(main())"
    return run(script.format(["vipllava", *words]))


def test_what_follows_train_and_evaluate_is_hydras():
    done = job("train", "stage=pretrain", "model=13b", "trainer=8xa100", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert "language_model: lmsys/vicuna-13b-v1.5" in done.stdout
    done = job("evaluate", "bench=region")
    assert done.returncode == 2
    assert "bench=region: no such option (did you mean regions?)" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_configuration_folder_of_ones_own(tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 7\n")
    own = ("--config-dir", str(tmp_path))
    done = job("train", "experiment=mine", *own, "--cfg", "job")
    assert "\nseed: 7\n" in done.stdout, done.stderr
    done = job("train", "model=mine", *own)
    assert done.returncode == 2
    assert f"{tmp_path} has no folder `model`" in done.stderr
    assert "experiment" not in done.stderr
    done = job("train", "--config-dir", "nowhere")
    assert done.returncode == 2
    assert "--config-dir nowhere: there is no such folder" in done.stderr


@pytest.mark.parametrize(
    ("words", "message", "shown"),
    [
        (
            ["shards", "build", "x", "--output", "o"],
            "pass a larger max_bad_rate (1 allows all), or another output=FOLDER",
            "pass a larger --max-bad-rate (1 allows all), or another --output FOLDER",
        ),
        (["shards", "stats", "x"], "a/data_root: set data_root", "a/data_root: set --data-root"),
        (["shards", "verify", "x"], "correct `num_samples`", "correct `num_samples`"),
        (["shards", "index", "x"], "fewer (num_workers=)", "fewer (--num-workers)"),
        (["sample-data"], "with data_root=FOLDER", "with --data-root FOLDER"),
        (["convert", "a", "b"], "use format=hf or llava", "use --format hf or llava"),
        (["convert", "a", "b"], "language_model='x'", "language_model='x'"),
        (["data", "fetch", "x"], "again=true fetches; data", "--again fetches; data"),
        (["data", "fetch", "x"], "http://a.b/c?again=true", "http://a.b/c?again=true"),
        (["lint", "data=x"], "data.num_workers, num_workers=", "data.num_workers, --num-workers"),
        (["train"], "data_root", "data_root"),
    ],
)
def test_messages_name_options_as_they_are_typed(words: list[str], message: str, shown: str):
    assert cli._message(VipLlavaError(message), words) == shown


def test_keys_of_a_job_stay_keys():
    error = ConfigError("data=x: no such option; data has num_workers, num_samples")
    assert cli._message(error, ["lint", "data=x"]) == str(error)


def test_a_command_says_its_own_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    nowhere = str(tmp_path / "nowhere")
    assert cli.main(["shards", "stats", "v7w_test", "--data-root", nowhere]) == 2
    assert "set --data-root" in capsys.readouterr().err
