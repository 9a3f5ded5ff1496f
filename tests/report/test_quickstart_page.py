"""The quick start's page: it holds the figures, is well-formed, and needs no other file."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vipllava.report.quickstart_page import Example, QuickstartPage, write_quickstart_page


class Reader(HTMLParser):
    """Checks that tags close in order; collects texts, classes and sources."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data + "\n"


def example(answer: str, marked: str | None, unmarked: str | None) -> Example:
    image = Image.new("RGB", (20, 16))
    question = "What is <it>?\nAnswer the question using a single word or phrase."
    return Example(image, question, answer, marked, unmarked, "mask contour")


def accuracy(correct: int, total: int, low: float, high: float) -> dict[str, Any]:
    return {"score": correct / total, "low": low, "high": high, "num_items": total}


def scores(total: float, low: float, high: float, **capabilities: float) -> dict[str, object]:
    cells = {name: {"score": score, "num_items": 9} for name, score in capabilities.items()}
    return {"total": total, "low": low, "high": high, "num_items": 60, "by_capability": cells}


@pytest.fixture(scope="module")
def content() -> QuickstartPage:
    return QuickstartPage(
        shapes_image=Image.new("RGB", (40, 20)),
        loss_curves={
            "pretrain": [(0, 5.0), (1, 2.5)],
            "finetune": [(0, 1.5)],
            "gpt4v": [(0, 0.5), (1, 0.25)],
        },
        regions={
            "marks": {
                "kept": {
                    **accuracy(712, 800, 0.866, 0.910),
                    "groups": {"arrow": accuracy(90, 100, 0.826, 0.945)},
                },
                "removed": {
                    **accuracy(188, 800, 0.207, 0.266),
                    "groups": {"arrow": accuracy(21, 100, 0.1, 0.3)},
                },
            },
            "faithfulness": {
                "gap": {"score": 0.655, "low": 0.62, "high": 0.69},
                "follows": accuracy(488, 800, 0.57, 0.64),
                "stays": accuracy(680, 712, 0.93, 0.97),
            },
        },
        vip_bench={
            "splits": {
                "bbox": scores(58.4, 50.1, 66.1, rec=71.25, math=10.0),
                "human": scores(56.0, 47.0, 65.0, rec=68.0),
            }
        },
        examples=[example("cup", "Cup", "<b>fish"), example("7", "", None)],
        seconds={"pretrain": 61.2, "all": 583.0},
        versions={"torch": "2.13.0"},
    )


@pytest.fixture(scope="module")
def source(content: QuickstartPage, tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("page") / "deeper" / "report.html"
    write_quickstart_page(path, content)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def reader(source: str) -> Reader:
    parser = Reader()
    parser.feed(source)
    parser.close()
    return parser


def test_it_is_well_formed(reader: Reader):
    assert reader.open == []
    assert reader.tags.count("article") == 2
    assert reader.tags.count("svg") == 3
    assert reader.tags.count("table") == 2


def test_it_needs_no_other_file(source: str, reader: Reader):
    assert len(reader.sources) == 4  # both halves of the shapes, two examples
    assert all(link.startswith("data:image/") for link in reader.sources)
    assert "script" not in reader.tags
    assert "link" not in reader.tags
    assert not re.search(r"https?:|url\(|@import", source)


@pytest.mark.parametrize(
    "text",
    [
        "89.0 %",
        "mark drawn: 89.0 % (86.6 to 91.0), 712 of 800",
        "mark not drawn: 23.5 % (20.7 to 26.6), 188 of 800",
        "of 800 held-out questions answered right with the mark",
        "+65.5 points over the control (95 %: +62.0 to +69.0, paired)",
        "61.0 % follow the mark to another region of the same scene",
        "95.5 % of the right ones stay right",
        "5.00 \u2192 3.33",
        "recognition\n71.2\n68.0",
        "mathematics\n10.0\n\u2013",
        "total\n58.4\n 50\u201366\n56.0\n 47\u201365",
        "arrow\n100\n90.0\n 83\u201394\n21.0\n 10\u201330",
        "What is <it>?",
        "pretrain 61 s, all 9 min 43 s",
        "torch 2.13.0",
    ],
)
def test_it_holds_the_figures(reader: Reader, text: str):
    assert text in reader.text


def test_right_and_wrong_answers_are_told_apart(source: str):
    assert re.findall(r'class="(verdict \w+|soft)">([^<]*)</span></dd>', source) == [
        ("verdict right", "\u2713 Cup"),
        ("verdict wrong", "\u2717 &lt;b&gt;fish"),
        ("verdict wrong", "\u2717 (nothing)"),
        ("soft", "not asked"),
    ]
