"""The inspect page: everything escaped, nothing hidden, counts right, no other file needed."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.report.conftest import SIDE, Inspect, make_sample
from vipllava.report.inspect_page import (
    JobSummary,
    build_inspect_page,
    visible,
)
from vipllava.report.inspected import InspectedSample, RefusedSample
from vipllava.types import Mention
from vipllava.visual_prompts.rle import check_rle

ASKED = ("What <script>is</script> ", Mention(0), "?\n</s> ")
JOB = JobSummary(
    dataset="toys<1>",
    num_samples=12000,
    stage="finetune",
    model="tiny",
    chat_template="llava_v1",
    image_aspect="pad",
    image_size=SIDE,
    image_seq_length=3,
    max_length=2048,
    seed=42,
    chosen="the first that training meets",
    command="vipllava inspect --data toys --num-samples 3",
)
REFUSED = RefusedSample("bad&1", "toys<1>", "b.tar", "box [9, 1, 2, 3] of <region> 1 is reversed")


class Reader(HTMLParser):
    """Checks that tags close in order; collects tags, links and the texts of every class."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.styles: list[str] = []
        self.texts: dict[str, list[str]] = {}

    def handle_starttag(self, tag, attrs):
        values = {name: value or "" for name, value in attrs}
        assert not [name for name in values if name.startswith("on")]
        self.tags.append(tag)
        self.links += [values[name] for name in ("src", "href") if name in values]
        self.ids += [values["id"]] if "id" in values else []
        self.styles += [values["style"]] if "style" in values else []
        self.open.append((tag, values.get("class", "")))
        if values.get("class"):
            self.texts.setdefault(values["class"], []).append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for classes in {classes for _, classes in self.open if classes}:
            self.texts[classes][-1] += data


def read(source: str) -> Reader:
    reader = Reader()
    reader.feed(source)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def samples(inspect: Inspect) -> list[InspectedSample | RefusedSample]:
    marked = make_sample(
        ASKED, "a <u>dog</u> 😀\n\u202etxt", "Sure?", "Yes.", "Is it?" * 50, "No.",
        boxes=[(20, 10, 60, 40)],
    )  # fmt: skip
    return [
        inspect(marked, max_length=200),
        inspect(make_sample("Sure?", "Yes.", size=None)),
        REFUSED,
    ]


@pytest.fixture(scope="module")
def source(
    samples: list[InspectedSample | RefusedSample], tmp_path_factory: pytest.TempPathFactory
) -> str:
    path: Path = tmp_path_factory.mktemp("page") / "inspect.html"
    path.write_text(build_inspect_page(JOB, samples), "utf-8")
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def reader(source: str) -> Reader:
    return read(source)


def test_it_needs_no_other_file_and_no_script(source: str, reader: Reader):
    assert reader.ids == ["sample-1", "sample-2", "sample-3"]
    outside = [link for link in reader.links if not link.startswith("data:image/")]
    assert outside == ["#sample-1", "#sample-2", "#sample-3"]
    assert not {"script", "link", "iframe", "object", "form"} & set(reader.tags)
    assert not re.search(r"https?:|url\(|@import", source)


def test_what_a_record_says_never_becomes_markup(source: str, reader: Reader):
    assert "u" not in reader.tags
    assert "<title>Inspect: toys&lt;1&gt;</title>" in source
    assert reader.texts["key"] == ["set/7", "set/7", "bad&1"]
    assert reader.texts["fault"] == ["box [9, 1, 2, 3] of <region> 1 is reversed"]
    for style in reader.styles:
        for declaration in style.split("; "):
            assert re.fullmatch(r"[-a-z]+: [\d. ]+(%|px)?", declaration), style


def test_the_conversation_reads_as_it_is_trained(reader: Reader):
    marked, second, text_only = reader.texts["said given"]
    assert marked.startswith("<s>A chat between a curious human")
    asked = "What <script>is</script> within the red rectangle?\n</s> "
    assert marked.endswith(f"USER: picture \u00d7 3\n{asked} ASSISTANT:")
    assert second == "USER: Sure? ASSISTANT:"
    assert text_only.endswith("human's questions. USER: Sure? ASSISTANT:")
    assert reader.texts["said learned"] == [
        " a <u>dog</u> 😀\nU+202Etxt</s>",
        " Yes.</s>",
        " Yes.</s>",
    ]


def test_tokens_are_told_apart(source: str, reader: Reader):
    special = reader.texts["t special"]
    assert special == ["</s>", "<s>", "</s>", "</s>", "<s>", "</s>"]  # the first in the legend
    assert reader.texts["t image"] == ["picture \u00d7 3"] * 2  # legend and one picture
    # A Llama byte token is the byte plus 3.
    emoji = " ".join(str(byte + 3) for byte in "😀".encode())
    assert f'<span class="t typed" title="id {emoji}">😀</span>' in source
    assert '<span class="t fixed silent" title="id 259"></span>' in source  # the dummy prefix
    # The template's, the question's and the answer's.
    assert source.count('<span class="nl">\n</span>') == 3


def test_dropped_turns_are_struck_through_with_the_reason(source: str, reader: Reader):
    assert reader.texts["said dropped"] == ["Is it?" * 50, "No."]
    assert '<p class="said dropped"><s>No.</s></p>' in source
    assert reader.texts["why"] == [
        "2 turns dropped: with the next question and answer the sample would be longer than "
        "max_length=200. No id holds them; their text is the record's."
    ]


def test_where_a_sample_is_cut_off(inspect: Inspect):
    shown = inspect(make_sample("Is it?", "No." * 99, "Why?", "So."), max_length=90, too_long="cut")
    assert read(build_inspect_page(JOB, [shown])).texts["why"] == [
        "2 turns dropped: the conversation is cut off, be it within a text, at max_length=90. No "
        "id holds them; their text is the record's."
    ]


def test_the_plan_in_words(reader: Reader):
    assert reader.texts["words"] == ["\u201cwithin the red rectangle\u201d"]
    (marks,) = reader.texts["marks"]
    for text in (
        "colourrgb 255, 0, 0",
        "opacity60 %",
        "shaperectangle, line 4 stored px",
        "region 120, 10 to 60, 40 stored px; no mask",
        "size23 \u00d7 17 input px",
        "named inturn 1",
        "fixedshape, colour, width, alpha, by the record",
    ):
        assert text in marks
    assert "--rgb: 255 0 0; --alpha: 0.60" in reader.styles


def test_filled_areas_and_masks_in_words(inspect: Inspect):
    ring = ((20.0, 10.0), (60.0, 10.0), (40.0, 40.0))
    boxes = [(20, 10, 60, 40)]
    filled = inspect(make_sample(ASKED, "a dog.", boxes=boxes, polygons=[ring, ring], shape="mask"))
    lined = inspect(make_sample(ASKED, "a dog.", boxes=boxes, polygons=[ring]))
    (mark,) = lined.marks
    strokes = (*mark.prompt.strokes, replace(mark.prompt.strokes[0], width=0))
    mark = replace(mark, prompt=replace(mark.prompt, strokes=strokes))
    page = build_inspect_page(JOB, [filled, replace(lined, marks=(mark,))])
    first, second = read(page).texts["marks"]
    assert "shapemask, filled" in first
    assert "stored px; mask of 2 rings" in first
    assert "shaperectangle, line 4 stored px, filled head" in second
    assert "stored px; mask of 1 ring" in second


def test_run_lengths_in_words(inspect: Inspect):
    sample = make_sample(ASKED, "a dog.", boxes=[(20, 10, 60, 40)], shape="mask")
    mask = np.zeros((80, 100), bool)
    mask[10:40, 20:60] = True
    mask[15:20, 30:40] = False
    region = replace(sample.regions[0], rle=check_rle(mask, "mask"))
    page = build_inspect_page(JOB, [inspect(replace(sample, regions=(region,)))])
    (marks,) = read(page).texts["marks"]
    assert "shapemask, filled" in marks
    assert "stored px; mask of 1\u202f150 pixels" in marks


def test_counts_and_places(reader: Reader, samples: list[InspectedSample | RefusedSample]):
    first, second, _ = samples
    assert isinstance(first, InspectedSample)
    assert isinstance(second, InspectedSample)
    assert reader.texts["counts"][0] == (
        f"{first.num_ids} of 200 tokens3 picture"
        f"{first.num_ids - 3 - first.num_supervised} given text{first.num_supervised} supervised"
        "2 turns dropped"
    )
    assert reader.texts["where"] == [
        "toys, a.tar, policy plain_marks",
        "toys, a.tar, policy none",
        "toys<1>, b.tar",
    ]
    assert reader.texts["badge"] == ["regions", "regions"]
    assert reader.texts["none"] == [
        "Text only: the record has no picture, and the model gets none."
    ]
    total = first.num_ids + second.num_ids
    learned = first.num_supervised + second.num_supervised
    tiles = " ".join(reader.texts["tile"])
    for text in (
        "3 of 12\u202f000 samples",
        "labels of 2 proved to be the answers; 1 text only",
        "1 refused",
        f"{round(total / 2)} tokens on average",
        f"longest {first.num_ids} of 2\u202f048; 2 turns dropped",
        f"{100 * learned / total:.0f} % supervised",
        f"{learned} of {total} tokens carry loss",
        "1 mark drawn",
        "rectangle1",
    ):
        assert text in tiles
    (facts,) = reader.texts["facts"]
    for text in (
        "chat templatellava_v1",
        "56 \u00d7 56 px = 3 tokens",
        "pad: padded to a square, then resized",
        "42, 0",
        "vipllava inspect --data toys --num-samples 3",
    ):
        assert text in facts


def test_the_picture_is_not_changed(source: str, samples: list[InspectedSample | RefusedSample]):
    (code,) = re.findall(r'src="data:image/png;base64,([^"]+)"', source)
    image = Image.open(io.BytesIO(base64.b64decode(code)))
    assert isinstance(samples[0], InspectedSample)
    assert samples[0].image is not None
    assert image.tobytes() == samples[0].image.tobytes()
    assert "stored 100 \u00d7 80 \u2192 input 56 \u00d7 56 px, pad" in source
    assert "--shown: 336px; --large: 1008px" in source


def test_wrong_labels_are_said_before_all(samples: list[InspectedSample | RefusedSample]):
    assert isinstance(samples[0], InspectedSample)
    reader = read(build_inspect_page(JOB, [replace(samples[0], fault="not the answer")]))
    assert reader.texts["fault"] == ["Labels are wrong: not the answer"]
    assert reader.texts["badge wrong"] == ["1 with wrong labels"]
    assert "labels of 0 proved" in reader.texts["tile"][0]


@pytest.mark.parametrize(("count", "listed"), [(12, False), (13, True)])
def test_many_samples_have_a_table_of_contents(
    samples: list[InspectedSample | RefusedSample], count: int, listed: bool
):
    shown = [samples[1]] * (count - 1) + [samples[2]]
    reader = read(build_inspect_page(JOB, shown))
    assert ("nav" in reader.tags) == listed
    assert len(reader.ids) == count
    if listed:
        (contents,) = reader.texts["contents"]
        assert "1set/7regions, " in contents
        assert contents.endswith("13bad&1refused")
        assert reader.links.count("#sample-13") == 2


def test_without_samples_it_is_still_a_page():
    reader = read(build_inspect_page(JOB, []))
    assert reader.texts["tile"] == [
        "0 of 12\u202f000 sampleslabels of 0 proved to be the answers; 0 text only"
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a  b ", "a  b "),
        ("a\nb\tc", 'a<span class="nl">\n</span>b<span class="tab">\t</span>c'),
        ("<&\u202e", '&lt;&amp;<span class="code-point">U+202E</span>'),
        ("\x00\r", '<span class="code-point">U+0000</span><span class="code-point">U+000D</span>'),
        ("\u00a0\u200b\ufeff", "".join(
            f'<span class="code-point">U+{code}</span>' for code in ("00A0", "200B", "FEFF")
        )),
        ("👩\u200d👧 \u3000犬 क\u094d\u200cष", "👩\u200d👧 \u3000犬 क\u094d\u200cष"),
    ],
)  # fmt: skip
def test_nothing_is_hidden(text: str, shown: str):
    assert visible(text) == shown
