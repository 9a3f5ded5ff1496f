"""Which attention is chosen, and what a reader is told about the others."""

from __future__ import annotations

import pytest

from vipllava.config import hardware
from vipllava.config.attention import (
    KERNELS,
    attention_candidates,
    choose_attention,
    explain_attention,
    keeps_no_mask,
)

ALL = frozenset(kernel.package for kernel in KERNELS)


@pytest.mark.parametrize(
    ("without", "capability", "precision", "chosen"),
    [
        ((), (9, 0), "bf16-mixed", "flash_attention_3"),  # 4 only by name
        ((), (10, 0), "bf16-mixed", "flash_attention_2"),  # 3 is for Hopper alone
        ((), (8, 9), "bf16-mixed", "flash_attention_2"),
        (("flash_attn",), (8, 0), "16-mixed", "torch_varlen"),
        (("flash_attn", "flash_attn_3"), (9, 0), "bf16-true", "torch_varlen"),
        (("flash_attn", "torch_varlen"), (8, 0), "bf16-mixed", "sdpa"),
        ((), (7, 5), "16-mixed", "sdpa"),
        ((), (9, 0), "32-true", "sdpa"),
        ((), None, "bf16-mixed", "sdpa"),
    ],
)
def test_choice(without, capability, precision, chosen):
    assert choose_attention(attention_candidates(ALL - {*without}, capability, precision)) == chosen


def test_every_candidate_says_why_not():
    rows = attention_candidates({"flash_attn_4", "torch_varlen"}, (8, 6), "bf16-mixed")
    assert {row.name: row.why_not for row in rows} == {
        "flash_attention_4": "devices of compute capability 8.6 cannot run it, it needs 9.0 or "
        "more",
        "flash_attention_3": "needs flash-attn-3, which is not installed; devices of compute "
        "capability 8.6 cannot run it, it needs 9.0",
        "flash_attention_2": "needs flash_attn, which is not installed",
        "torch_varlen": "",
    }


def test_an_alpha_is_usable_and_not_chosen():
    (alpha, *_) = rows = attention_candidates({"flash_attn_4"}, (9, 0), "bf16-mixed")
    assert not alpha.missing
    assert alpha.unsupported is None
    assert choose_attention(rows) == "sdpa"
    assert alpha.why_not == "an alpha, used only where it is asked for by name"


def test_the_line_names_what_is_better_and_why_it_is_not_used():
    rows = attention_candidates({"torch_varlen"}, (8, 0), "bf16-mixed")
    assert explain_attention("torch_varlen", rows) == (
        "torch_varlen (flash_attention_3: needs flash-attn-3, which is not installed; devices of "
        "compute capability 8.0 cannot run it, it needs 9.0 | flash_attention_2: needs flash_attn, "
        "which is not installed)"
    )
    assert explain_attention("eager", rows) == (
        "eager, as configured (by itself it would be torch_varlen)"
    )
    rows = attention_candidates({"flash_attn_3"}, (9, 0), "bf16-mixed")
    assert explain_attention("flash_attention_3", rows) == "flash_attention_3"
    rows = attention_candidates({"torch_varlen"}, None, "32-true")
    assert explain_attention("sdpa", rows) == "sdpa (all others need CUDA devices)"


def test_which_need_no_mask():
    names = ("flash_attention_2", "flash_attention_4", "torch_varlen", "sdpa", "flex_attention")
    assert [keeps_no_mask(name) for name in names] == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("modules", "distributions", "found"),
    [
        ({"flash_attn"}, {"flash_attn"}, {"flash_attn"}),
        ({"flash_attn"}, {"flash_attn_4"}, {"flash_attn_4"}),  # which has the same import name
        ({"flash_attn"}, {"flash_attn", "flash_attn_4"}, {"flash_attn", "flash_attn_4"}),
        ({"flash_attn_interface"}, {"flash_attn_3"}, {"flash_attn_3"}),
        ({"flash_attn_interface"}, set(), set()),
        (set(), {"flash_attn"}, set()),
    ],
)
def test_releases_of_flash_attention_are_told_apart(modules, distributions, found, monkeypatch):
    def distribution(name):
        if name not in distributions:
            raise hardware.PackageNotFoundError(name)

    monkeypatch.undo()  # the machine of the other tests
    monkeypatch.setattr(hardware, "find_spec", lambda name: object() if name in modules else None)
    monkeypatch.setattr(hardware, "distribution", distribution)
    assert hardware.installed_packages() == found


def test_this_torch_has_its_own(monkeypatch):
    monkeypatch.undo()
    assert "torch_varlen" in hardware.installed_packages()
