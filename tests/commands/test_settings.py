from __future__ import annotations

from pathlib import Path

import pytest

from vipllava.commands.settings import (
    Setting,
    count,
    count_or_all,
    data_root_setting,
    describe_settings,
    manifests_setting,
    read_settings,
    switch,
    words_of,
)
from vipllava.types import ConfigError

SETTINGS = [
    Setting("num_workers", count, 4, "processes"),
    Setting("again", switch, False, "anew"),
    Setting("pictures", count_or_all, 10, "how many"),
    Setting("parts", words_of, ("a",), "which"),
]


def test_values_and_defaults() -> None:
    words = ["vcr", "num_workers=0", "pictures=all", "parts=[b, c]", "again=True"]
    assert read_settings(words, SETTINGS, positional=("NAME",)) == {
        "NAME": "vcr",
        "num_workers": 0,
        "again": True,
        "pictures": None,
        "parts": ("b", "c"),
    }
    assert read_settings([], SETTINGS) == {
        "num_workers": 4,
        "again": False,
        "pictures": 10,
        "parts": ("a",),
    }


def test_a_value_may_have_an_equals_sign() -> None:
    setting = Setting("json", str, None, "file")
    assert read_settings(["json=a=b"], [setting]) == {"json": "a=b"}


def test_all_problems_at_once() -> None:
    words = ["one", "two", "num_worker=3", "again=yes", "pictures=-1", "parts=a", "parts=b"]
    with pytest.raises(ConfigError) as error:
        read_settings(words, SETTINGS, positional=("NAME",))
    assert str(error.value) == (
        "these arguments cannot be used:\n"
        "  - `two`: not NAME=VALUE\n"
        "  - num_worker: no such setting (did you mean num_workers?); known: num_workers, again, "
        "pictures, parts\n"
        "  - again=yes: expected true or false\n"
        "  - pictures=-1: expected a number from 0\n"
        "  - parts is given twice"
    )
    with pytest.raises(ConfigError, match="NAME is missing"):
        read_settings([], SETTINGS, positional=("NAME",))


def test_help() -> None:
    assert describe_settings(SETTINGS[:2]) == "  num_workers= processes\n  again=       anew"
    assert describe_settings([]) == ""


def test_the_places_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIPLLAVA_DATA", "/somewhere")
    assert data_root_setting().default == "/somewhere"
    monkeypatch.delenv("VIPLLAVA_DATA")
    assert data_root_setting().default == "data"
    monkeypatch.chdir(tmp_path)
    assert (manifests_setting().default / "user_data.yaml").is_file()  # the checkout's
    (tmp_path / "data_manifests").mkdir()
    assert manifests_setting().default == Path("data_manifests")
