"""Messages of library classes name arguments; a user of train.py reads configuration keys."""

from __future__ import annotations

import ast

import pytest
from omegaconf import OmegaConf

from vipllava.config.argument_names import KEYS, naming_keys, with_keys
from vipllava.config.composing import CONFIG_DIR, compose_job
from vipllava.stream.order import parse_mix
from vipllava.stream.quarantine import BadSamplePolicy
from vipllava.training.guard import LossGuard
from vipllava.types import RecordError, VipLlavaError

TRAINING = OmegaConf.create(
    {name: {} for name in ("data", "guard", "machine", "paths", "stage", "trainer", "tuning")}
)
EVALUATION = OmegaConf.create({"bench": {}, "paths": {}, "checkpoint": "runs/x"})


def test_every_key_is_one_of_a_training_job():
    cfg = compose_job(["data=packed"])
    for key in KEYS.values():
        section, _, name = key.rpartition(".")
        assert name in OmegaConf.select(cfg, section), key


@pytest.mark.parametrize(
    ("message", "keys"),
    [
        ("pack_length=8 is less than max_length=9", None),
        ("raise max_length or look", "raise stage.max_length or look"),
        ("raise max_length.", "raise stage.max_length."),
        ("or pass too_long=cut", "or pass stage.too_long=cut"),
        ("window=5 at least 20", "guard.window=5 at least 20"),
        ("the window of 5 steps, on 8 devices", "the window of 5 steps, on 8 devices"),
        ("the mix gives `a` no sample", "data.mix gives `a` no sample"),
        ("devices=3 x num_nodes=1", "trainer.devices=3 x trainer.num_nodes=1"),
        ("set cache_dir", "set paths.cache"),
        ("runs/max_length/a, max_length/a", "runs/max_length/a, max_length/a"),
        ("stage.max_length=9, held_out.max_length.x", "stage.max_length=9, held_out.max_length.x"),
    ],
)
def test_arguments_become_keys_and_nothing_else_does(message: str, keys: str | None):
    expected = keys or "data.pack_length=8 is less than stage.max_length=9"
    assert with_keys(message, TRAINING) == expected
    assert with_keys(expected, TRAINING) == expected


def test_an_evaluation_has_keys_of_its_own():
    assert with_keys("pass checkpoint=FOLDER", TRAINING) == "pass stage.checkpoint=FOLDER"
    assert with_keys("pass checkpoint=FOLDER", EVALUATION) == "pass checkpoint=FOLDER"
    assert with_keys("set data_root to it", EVALUATION) == "set paths.data_root to it"


@pytest.mark.parametrize(
    ("make", "argument", "key"),
    [
        (lambda: LossGuard(window=5), "window=5 at least 20", "guard.window=5 at least 20"),
        (
            lambda: BadSamplePolicy("error", max_fault_rate=2.0),
            "max_fault_rate=2.0: expected a number",
            "data.max_fault_rate=2.0: expected a number",
        ),
        (lambda: parse_mix({}), "the mix cannot be used", "data.mix cannot be used"),
    ],
)
def test_a_library_user_reads_the_argument_and_train_py_the_key(make, argument: str, key: str):
    with pytest.raises(VipLlavaError) as plain:
        make()
    assert argument in str(plain.value)
    assert key not in str(plain.value)
    with pytest.raises(type(plain.value)) as named, naming_keys(TRAINING):
        make()
    assert key in str(named.value)


def test_the_error_stays_what_it_was():
    with pytest.raises(RecordError, match=r"^data.pack_length=4$") as error, naming_keys(TRAINING):
        raise RecordError("pack_length=4", "too-long")
    assert error.value.fault == "too-long"


def test_no_library_class_names_a_key():
    of_jobs = {"run", "job", "preflight", "restart", "model_card"}
    package = CONFIG_DIR.parent / "vipllava"
    found: list[str] = []
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0]
        if room in ("config", "commands", "evaluation", "cli.py") or path.stem in of_jobs:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        prose = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = [key for key in KEYS.values() if key in node.value]
                if named and id(node) not in prose:
                    found.append(f"{path.relative_to(package)}:{node.lineno} {named}")
    assert found == []
