"""The console script: it answers at once, and imports what it needs only when it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vipllava import __version__, cli
from vipllava.types import VipLlavaError

ROOT = Path(__file__).resolve().parent.parent


def test_help_imports_nothing_heavy():
    script = (
        "import sys\n"
        "from vipllava.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "heavy = {'torch', 'lightning', 'transformers', 'numpy', 'hydra'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"vipllava {__version__}\n"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["shards", "--help"], "vipllava shards build [NAME=VALUE ...]"),
        (["shards", "index", "-h"], "vipllava shards index PATH ... [NAME=VALUE ...]"),
        (["data", "show", "v7w_test"], "Visual7W"),
        (["data", "--help"], "vipllava data fetch NAME [NAME=VALUE ...]"),
    ],
)
def test_commands_with_words_of_their_own(
    words: list[str], shown: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(words) == 0
    assert shown in capsys.readouterr().out


@pytest.mark.parametrize("command", ["data", "shards"])
def test_their_mistakes_are_messages(command: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main([command, "make"]) == 2
    assert f"error: {command} make: no such command; known: " in capsys.readouterr().err


def test_a_users_mistake_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(root: Path) -> None:
        raise VipLlavaError(f"cannot write {root}")

    monkeypatch.setattr("vipllava.sample_world.build.ensure_sample_world", fail)
    assert cli.main(["sample-data", "--data-root", "there"]) == 2
    assert capsys.readouterr().err == "error: cannot write there\n"


def test_unknown_words_are_refused(capsys: pytest.CaptureFixture[str]):
    for arguments in (["sample-date"], ["sample-data", "--foo"], []):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
    assert "unrecognized arguments: --foo" in capsys.readouterr().err
