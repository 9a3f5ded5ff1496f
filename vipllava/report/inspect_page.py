"""The page of ``vipllava inspect``: what the network will see, and which tokens it learns."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from vipllava.files.atomic import write_whole
from vipllava.report.html import (
    Child,
    Html,
    element,
    embed_image,
    items,
    join,
    load_style,
    page,
    soft,
    terms,
)
from vipllava.report.inspected import (
    InspectedSample,
    RefusedSample,
    ShownMark,
    ShownToken,
    Stretch,
)
from vipllava.types import Turn
from vipllava.visual_prompts.shapes import prompt_words

_WIDTH_SHOWN: Final = 336
_WIDTH_LARGE: Final = 1008
_LOSSLESS_UP_TO: Final = 160
"""Side in pixels up to which PNG costs little; a small image is enlarged, and would show JPEG's
blocks."""
_CONTENTS_FROM: Final = 13
_ASPECTS: Final[Mapping[str, str]] = {
    "square": "short side to size, centre crop",
    "pad": "padded to a square, then resized",
    "resize": "stretched to a square",
}
_JOINERS: Final = "\u200c\u200d"
"""Invisible, but part of how Persian, Indic scripts and emoji are written."""


@dataclass(frozen=True, slots=True)
class JobSummary:
    """The job whose data the page shows.

    Attributes:
        dataset: name of the data set.
        num_samples: samples in it.
        stage: of the recipe.
        model: its name.
        chat_template: name of the template that the conversations are written in.
        image_aspect: ``square``, ``pad`` or ``resize``.
        image_size: side of the network's input, pixels.
        image_seq_length: tokens of one picture.
        max_length: greatest number of tokens of a sample.
        seed: of wordings and marks.
        epoch: whose marks and wordings are shown, counted from 0.
        chosen: how the samples were chosen, e.g. ``the first that training meets``.
        command: the command line that makes the page; empty to leave it out.
    """

    dataset: str
    num_samples: int
    stage: str
    model: str
    chat_template: str
    image_aspect: str
    image_size: int
    image_seq_length: int
    max_length: int
    seed: int
    epoch: int = 0
    chosen: str = ""
    command: str = ""


Shown = InspectedSample | RefusedSample


def write_inspect_page(path: Path, job: JobSummary, samples: Sequence[Shown]) -> None:
    """Write the page as one file that needs no other and no network."""
    write_whole(path, build_inspect_page(job, samples))


def build_inspect_page(job: JobSummary, samples: Sequence[Shown]) -> str:
    """Return the page's HTML."""
    encoded = [sample for sample in samples if isinstance(sample, InspectedSample)]
    return page(
        f"Inspect: {job.dataset}",
        load_style("style.css") + load_style("inspect.css"),
        element("h1", "What the model will see"),
        soft(_introduction(job)),
        _job(job, samples, encoded),
        _legend(job),
        _contents(samples) if len(samples) >= _CONTENTS_FROM else None,
        [_article(number, sample, job) for number, sample in enumerate(samples, start=1)],
    )


def _introduction(job: JobSummary) -> str:
    chosen = f", {job.chosen}" if job.chosen else ""
    return (
        f"Samples of {job.dataset}{chosen}, as stage {job.stage} of {job.model} trains on them: "
        "the picture after marks and transform, the conversation decoded from its token ids, and "
        "in colour the tokens that carry loss."
    )


def _job(job: JobSummary, samples: Sequence[Shown], encoded: Sequence[InspectedSample]) -> Html:
    shapes = Counter(mark.prompt.shape for sample in encoded for mark in sample.marks)
    unit = "mark drawn" if shapes.total() == 1 else "marks drawn"
    tile = _tile(_grouped(shapes.total()), unit, _shape_bars(shapes)) if shapes else None
    left = element("div", _tiles(job, samples, encoded), _facts(job), class_="left")
    return element("div", left, tile, class_="job with-marks" if shapes else "job")


def _tiles(job: JobSummary, samples: Sequence[Shown], encoded: Sequence[InspectedSample]) -> Html:
    num_refused = len(samples) - len(encoded)
    num_text_only = sum(sample.image is None for sample in encoded)
    num_faults = sum(bool(sample.fault) for sample in encoded)
    proved = f"labels of {len(encoded) - num_faults} proved to be the answers"
    remarks = [soft(f"{proved}; {num_text_only} text only")]
    if num_faults or num_refused:
        bad = {"refused": num_refused, "with wrong labels": num_faults}
        text = ", ".join(f"{count} {what}" for what, count in bad.items() if count)
        remarks.append(element("p", element("span", text, class_="badge wrong")))
    tiles = [_tile(len(samples), f"of {_grouped(job.num_samples)} samples", *remarks)]
    if encoded:
        lengths = [sample.num_ids for sample in encoded]
        total, learned = sum(lengths), sum(sample.num_supervised for sample in encoded)
        num_dropped = sum(len(sample.dropped) for sample in encoded)
        longest = f"longest {_grouped(max(lengths))} of {_grouped(job.max_length)}"
        dropped = soft(f"{longest}; {_count(num_dropped, 'turn')} dropped")
        share = soft(f"{_grouped(learned)} of {_grouped(total)} tokens carry loss")
        tiles += [
            _tile(_grouped(round(total / len(lengths))), "tokens on average", dropped),
            _tile(_percent(learned / total), "supervised", share),
        ]
    return element("div", tiles, class_="tiles")


def _tile(number: Child, unit: str, *more: Child) -> Html:
    head = element("div", number, " ", element("small", unit), class_="number")
    return element("div", head, *more, class_="tile")


def _shape_bars(shapes: Counter[str]) -> Html:
    most = max(shapes.values())
    rows = [
        [
            element("span", shape),
            element("i", style=f"width: {100 * count / most:.0f}%"),
            element("b", count),
        ]
        for shape, count in shapes.most_common()
    ]
    return items(rows, class_="shapes")


def _facts(job: JobSummary) -> Html:
    aspect = _ASPECTS.get(job.image_aspect, "")
    size = f"{job.image_size} \u00d7 {job.image_size}"
    facts = {
        "data set": job.dataset,
        "stage": job.stage,
        "model": job.model,
        "chat template": job.chat_template,
        "picture": f"{size} px = {job.image_seq_length} tokens",
        "image aspect": f"{job.image_aspect}: {aspect}" if aspect else job.image_aspect,
        "length limit": f"{_grouped(job.max_length)} tokens",
        "seed, epoch": f"{job.seed}, {job.epoch}",
    }
    entries = [element("div", term) for term in terms(facts)]
    if job.command:
        command = terms({"made by": element("code", job.command)})
        entries.append(element("div", command, class_="wide"))
    return element("dl", entries, class_="facts")


def _legend(job: JobSummary) -> Html:
    def token(text: str, *, learned: bool = False, kind: str = "") -> Html:
        shown = element("span", text, class_=f"t {kind}".strip())
        return element("span", shown, class_="learned") if learned else shown

    entries: list[Sequence[Child]] = [
        [token("supervised", learned=True), " the model learns to say it"],
        [token("a question", kind="typed"), " given, from the record"],
        [token("a role string", kind="fixed"), " given, from the chat template"],
        [token("</s>", kind="special"), " special token"],
        [_image_chip(job.image_seq_length), " the picture's tokens"],
        ["a", element("span", "b", class_="t"), "c a line ends each token"],
        [element("span", class_="nl"), " a newline in the text"],
        [element("span", " ", class_="t blank"), " a token of spaces"],
        [element("span", class_="t silent"), " a token that writes nothing"],
    ]
    return items(entries, class_="legend")


def _contents(samples: Sequence[Shown]) -> Html:
    entries = [
        element(
            "a",
            element("span", number, class_="at"),
            element("span", sample.key, class_="key"),
            soft(sample.record_kind, ", ", sample.num_ids, tag="span")
            if isinstance(sample, InspectedSample)
            else element("span", "refused", class_="wrong"),
            href=f"#sample-{number}",
        )
        for number, sample in enumerate(samples, start=1)
    ]
    return element(
        "nav",
        element("h2", "Samples"),
        soft("Key, record kind, number of tokens."),
        items(entries, "ol", class_="contents"),
        aria_label="Samples",
    )


def _article(number: int, sample: Shown, job: JobSummary) -> Html:
    where = f"{sample.dataset}, {sample.shard}"
    if isinstance(sample, InspectedSample):
        badge = element("span", sample.record_kind, class_="badge")
        body = _body(sample, job)
        where += f", policy {sample.policy}"
    else:
        badge = element("span", "refused", class_="badge wrong")
        body = element("p", sample.reason, class_="fault")
    title = element(
        "h2",
        element("a", number, href=f"#sample-{number}", class_="at"),
        element("span", sample.key, class_="key"),
    )
    header = element("header", title, badge, element("span", where, class_="where"))
    return element("article", header, body, id=f"sample-{number}", class_="sample")


def _body(sample: InspectedSample, job: JobSummary) -> Html:
    return element(
        "div",
        element("p", "Labels are wrong: ", sample.fault, class_="fault") if sample.fault else None,
        _view(sample, job),
        element("div", _budget(sample), _conversation(sample), _plan(sample), class_="reading"),
        class_="body",
    )


def _view(sample: InspectedSample, job: JobSummary) -> Html:
    if sample.image is None or sample.stored_size is None:
        text = "Text only: the record has no picture, and the model gets none."
        return element("div", text, class_="none")
    width = sample.image.width
    image = embed_image(
        sample.image,
        f"Input of the network for {sample.key}",
        lossless=width <= _LOSSLESS_UP_TO,
        quality=92,
        decoding="async",
    )
    # Multiples of the image's width: whole pixels stay crisp.
    shown, large = (width * max(1, round(w / width)) for w in (_WIDTH_SHOWN, _WIDTH_LARGE))
    # A check box makes the image large without a script.
    zoom = element("input", type="checkbox", class_="zoom", aria_label="Enlarge the picture")
    stored, given = (
        " \u00d7 ".join(map(str, size)) for size in (sample.stored_size, sample.image.size)
    )
    return element(
        "figure",
        element("label", zoom, image, style=f"--shown: {shown}px; --large: {large}px"),
        element("figcaption", f"stored {stored} \u2192 input {given} px, {job.image_aspect}"),
        class_="view",
    )


def _budget(sample: InspectedSample) -> Html:
    num_given = sample.num_ids - sample.num_image_ids - sample.num_supervised
    parts = [
        ("of-picture", sample.num_image_ids, "picture"),
        ("of-text", num_given, "given text"),
        ("of-answer", sample.num_supervised, "supervised"),
    ]
    whole = max(sample.max_length, sample.num_ids)
    bar = [
        element("i", class_=name, style=f"width: {100 * count / whole:.2f}%")
        for name, count, _ in parts
        if count
    ]
    counts: list[Sequence[Child]] = [
        [element("b", sample.num_ids), f" of {sample.max_length} tokens"],
        *(
            [element("i", class_=f"dot {name}"), element("b", count), f" {what}"]
            for name, count, what in parts
        ),
        [element("b", len(sample.dropped)), " turns dropped"],
    ]
    return element("div", element("div", bar, class_="budget"), items(counts, class_="counts"))


def _conversation(sample: InspectedSample) -> Html:
    rows = [_stretch(stretch) for stretch in sample.stretches]
    rows += [_dropped(turn) for turn in sample.dropped]
    if sample.dropped:
        reason = (
            f"{_count(len(sample.dropped), 'turn')} dropped: with the next question and answer "
            f"the sample would be longer than max_length={sample.max_length}. No id holds them; "
            "their text is the record's."
        )
        rows.append(join([element("div", class_="side"), element("p", reason, class_="why")]))
    return element("div", rows, class_="talk")


def _stretch(stretch: Stretch) -> Html:
    kind = "learned" if stretch.supervised else "given"
    side = element(
        "div", element("b", kind), " ", _count(stretch.num_ids, "token"), class_=f"side {kind}"
    )
    tokens = [_token(token) for token in stretch.tokens]
    return join([side, element("p", tokens, class_=f"said {kind}")])


def _dropped(turn: Turn) -> Html:
    side = element("div", element("b", "dropped"), " ", turn.role, class_="side")
    return join([side, element("p", element("s", visible(turn.text)), class_="said dropped")])


def _token(token: ShownToken) -> Html:
    if token.kind == "image":
        return _image_chip(len(token.ids))
    classes = "t special"
    if token.kind == "text":
        classes = "t fixed" if token.from_template else "t typed"
    if not token.text:
        classes += " silent"
    elif not token.text.strip(" "):
        classes += " blank"
    ids = " ".join(map(str, token.ids))
    return element("span", visible(token.text), class_=classes, title=f"id {ids}")


def _image_chip(count: int) -> Html:
    return element("span", f"picture \u00d7 {count}", class_="t image")


def visible(text: str) -> Html:
    """Return text as markup in which nothing is hidden.

    Newlines and tabs stay themselves behind a sign that the style sheet draws. Other characters
    that show nothing, or that turn the direction of what follows, are spelt by their code point.
    """
    return join(_visible(character) for character in text)


def _visible(character: str) -> Child:
    if not _is_hidden(character):
        return character
    if character in "\n\t":
        return element("span", character, class_="nl" if character == "\n" else "tab")
    return element("span", f"U+{ord(character):04X}", class_="code-point")


def _is_hidden(character: str) -> bool:
    if character.isascii():
        return not character.isprintable()
    if character in _JOINERS or 0xE0020 <= ord(character) <= 0xE007F:  # the latter spell flags
        return False
    category = unicodedata.category(character)
    return category in ("Cc", "Cf", "Zl", "Zp") or (category == "Zs" and character != "\u3000")


def _plan(sample: InspectedSample) -> Html | None:
    if sample.image is None:
        return None
    if not sample.marks:
        return join([element("h3", "Marks"), soft("None are drawn.")])
    marks = [_mark(mark, sample.num_turns) for mark in sample.marks]
    title = f"{_count(len(marks), 'mark')}, in drawing order"
    return join([element("h3", title), items(marks, "ol", class_="marks")])


def _mark(mark: ShownMark, num_turns: int) -> Sequence[Child]:
    prompt = mark.prompt
    red, green, blue = prompt.rgb
    share = prompt.alpha / 255
    if mark.input_size is None:
        size: Child = element("span", "none of it is in the input", class_="wrong")
    else:
        width, height = (max(1.0, side) for side in mark.input_size)
        size = f"{width:.0f} \u00d7 {height:.0f} input px"
    facts: dict[str, Child] = {
        "colour": f"rgb {red}, {green}, {blue}",
        "opacity": _percent(share),
        "shape": f"{prompt.shape}, {_stroke(mark)}",
        f"region {prompt.region + 1}": _region(mark),
        "size": size,
        "named in": _named_in(mark, num_turns),
    }
    if mark.fixed:
        facts["fixed"] = f"{', '.join(mark.fixed)}, by the record"
    swatch = element(
        "span", class_="swatch", style=f"--rgb: {red} {green} {blue}; --alpha: {share:.2f}"
    )
    words = element("span", f"\u201c{prompt_words(prompt)}\u201d", class_="words")
    return [swatch, words, element("dl", terms(facts))]


def _stroke(mark: ShownMark) -> str:
    """Name the widest line; a stroke of width 0 is a filled area (a mask, an arrow's head)."""
    widths = [stroke.width for stroke in mark.prompt.strokes]
    if not any(widths):
        return "filled"
    return f"line {max(widths)} stored px{'' if all(widths) else ', filled head'}"


def _region(mark: ShownMark) -> str:
    x1, y1, x2, y2 = (f"{value:.0f}" for value in mark.region.bbox_xyxy)
    num_rings = len(mark.region.polygons)
    mask = f"mask of {_count(num_rings, 'ring')}" if num_rings else "no mask"
    return f"{x1}, {y1} to {x2}, {y2} stored px; {mask}"


def _named_in(mark: ShownMark, num_turns: int) -> str:
    turns = [f"{turn}{' (dropped)' if turn > num_turns else ''}" for turn in mark.named_in]
    if not turns:
        return "no turn"
    return f"turn{'' if len(turns) == 1 else 's'} {', '.join(turns)}"


def _count(number: int, thing: str) -> str:
    return f"{_grouped(number)} {thing}{'' if number == 1 else 's'}"


def _grouped(number: int) -> str:
    """Write a number in groups of three digits, kept on one line."""
    return f"{number:,}".replace(",", "\u202f")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"
