"""What Hydra cannot read of a command line, and what a user is told instead."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra.errors import HydraException

from vipllava.config.composing import (
    CONFIG_DIR,
    compose_job,
    composition_message,
    find_override_problems,
)
from vipllava.config.overrides import quoted, readable_words


def found(*words: str) -> list[str]:
    return find_override_problems(words, CONFIG_DIR, "train")


@pytest.fixture(autouse=True)
def project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIG_DIR.parent)  # where manifests are


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("stage.checkpoint=runs/s/seed=1/export", """'stage.checkpoint="runs/s/seed=1/export"'"""),
        ("name=first (of two)", """'name="first (of two)"'"""),
        ("name=é", """'name="é"'"""),
        ("name=a,b", """'name="a,b"'"""),
        ('name=5" (wide)', """'name="5\\\\" (wide)"'"""),
    ],
)
def test_the_quoting_is_shown_and_works(word: str, shown: str):
    (problem,) = found(word)
    assert problem.startswith(f"`{word}`: ")
    assert shown.replace("\\\\", "\\") in problem
    key, _, value = word.partition("=")
    read = compose_job([shown.replace("\\\\", "\\").strip("'")])
    assert read.stage.checkpoint == value if key == "stage.checkpoint" else read.name == value


def test_a_path_that_is_there_needs_no_quotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/sweeps/s/seed=1,shapes=[a(é)]/export")
    folder.mkdir(parents=True)
    words = readable_words([f"stage.checkpoint={folder}", "+a.b=runs", "name=seed=1"])
    assert words == [f"stage.checkpoint='{folder}'", "+a.b=runs", "name=seed=1"]
    assert compose_job(words[:1]).stage.checkpoint == str(folder)
    # No name of a file: no error, either.
    assert readable_words(["a=(" + "x" * 5000]) == ["a=(" + "x" * 5000]


@pytest.mark.parametrize("text", ["a", "a=b,c", "it's", "(é)", "a\\", "$x", "", "{a: [b]}"])
def test_quoted_texts_are_read_as_they_are(text: str):
    assert compose_job([f"name={quoted(text)}"]).name == text


def test_options_stand_anywhere():
    given = ["seed=1,2", "-m", "name=x", "--config-dir", "a=b", "stage=pretrain"]
    ordered = ["seed=1,2", "name=x", "stage=pretrain", "-m", "--config-dir", "a=b"]
    assert readable_words(given) == ordered
    assert readable_words(["--cfg", "job", "seed=1", "--cfg"]) == [
        "seed=1",
        "--cfg",
        "job",
        "--cfg",
    ]


@pytest.mark.parametrize("words", [["name", "=", "x"], ["name=", "x"], ["name", "=x"]])
def test_spaces_around_the_equals_sign(words: list[str]):
    assert found("seed=1", *words, "stage=pretrain") == [
        f"`{' '.join(words)}`: write it without spaces, name=x"
    ]


def test_what_users_of_hydra_type():
    messages = {
        "trainer.fast_dev_run=true": "a plus adds it: +trainer.fast_dev_run=true",
        "visual_prompts.policies.vcr.colour=red": "+visual_prompts.policies.vcr.colour=red",
        "name=20261128": """name=20261128: expected a text, in quotes: 'name="20261128"'""",
        "resume=true": """resume=true: expected a text, in quotes: 'resume="true"'""",
        "trainer.val_check_interval=0.5": "pass validation.every_n_steps=N instead",
    }
    for message, problem in zip(messages.values(), found(*messages), strict=True):
        assert message in problem


def test_the_key_that_is_meant():
    meant = {
        "modle=7b": "model",
        "modle.name=x": "model.name",
        "stgae=finetune": "stage",
        "traner=cpu": "trainer",
        "train.max_steps=1": "trainer.max_steps",
        "max_step=1": "trainer.max_steps",
        "epochs=1": "stage.epochs",
        "stage.learning_rat=1": "stage.learning_rate",
        "stage.micro_batch_size=1": "machine.micro_batch_size",
        "visual_prompt=tiny": "visual_prompts",
        "logger.csv.foldr=me": "logger.csv.folder",
    }
    for (word, key), problem in zip(meant.items(), found(*meant), strict=True):
        start = f"{word.partition('=')[0]}: no such key (did you mean {key}?); "
        assert problem.startswith(start), problem


def test_a_key_that_another_option_brings():
    (problem,) = found("logger.wandb.entity=TEAM")
    assert problem.startswith("logger.wandb.entity: no such key (it comes with logger=wandb); ")


def test_a_word_without_a_key_spoils_none_before_it():
    (problem,) = found("seed=1", "=x")
    assert problem.startswith("`=x` is not KEY=VALUE: ")


def test_options_of_ones_own_folder_count(tmp_path: Path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nstage: {epochs: 2}\n")
    own = ("--config-dir", str(tmp_path))
    assert found(*own, "experiment=mine") == []
    (problem,) = found(*own, "experiment=mine", "stage.learning_rat=1")
    assert problem.startswith("stage.learning_rat: no such key")
    (problem,) = found(*own, "experiment=mien")
    assert problem == (
        "experiment=mien: no such option (did you mean mine?); experiment is one of mine, "
        "quickstart, released_recipe"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage:\n\tepochs: 2\n", "mine.yaml, line 3, column 1: found character '\\t' that cannot"),
        ("a: [1\n", "mine.yaml, line 3, column 1: expected ',' or ']'"),
        ("- 1\n", "`experiment=mine`: "),
        ("2\n", "`experiment=mine`: "),
    ],
)
def test_a_fault_in_a_file_of_ones_own(tmp_path: Path, text: str, message: str):
    file = tmp_path / "it's=1" / "experiment" / "mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(f"# @package _global_\n{text}")
    (problem,) = found("--config-dir", str(file.parents[1]), "experiment=mine")
    assert message in problem


@pytest.mark.skipif(find_spec("optuna") is not None, reason="Optuna is installed")
def test_a_plugin_that_is_missing_names_its_extra():
    for sweeper in ("optuna_example", "optuna"):
        words = [f"hydra/sweeper={sweeper}"]
        with pytest.raises(HydraException) as caught:
            compose_job(words)
        assert composition_message(words, CONFIG_DIR, "train", caught.value).splitlines()[1:] == [
            "  - the sweeper needs optuna, which is not installed: "
            'pip install "vipllava-lightning[sweep]"'
        ]
