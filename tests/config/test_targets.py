from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from vipllava.config.checks import check_targets, find_target_problems, targets
from vipllava.types import ConfigError


def test_a_stop_while_a_module_is_imported_is_no_problem_of_it(tmp_path, monkeypatch):
    (tmp_path / "stopped.py").write_text("raise SystemExit(130)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match="130"):
        find_target_problems(OmegaConf.create({"a": {"_target_": "stopped.Thing"}}))


def test_unknown_arguments_and_targets():
    cfg = OmegaConf.create(
        {
            "a": {"_target_": "fractions.Fraction", "numerator": 1, "denominater": 2},
            "b": {"_target_": "fractions.Fractoin"},
            "c": [{"_target_": "argparse.Namespace", "anything": 1}],
            "d": "${a}",
            "e": "???",
        }
    )
    assert find_target_problems(cfg) == [
        "a.denominater: fractions.Fraction takes no such argument (did you mean denominator?)",
        "b._target_=fractions.Fractoin: there is no such class or function",
    ]
    with pytest.raises(ConfigError, match="2 problems"):
        check_targets(cfg)
    assert [path for path, _ in targets(cfg)] == ["a", "b", "c.0"]
