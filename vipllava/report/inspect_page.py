"""The page of ``vipllava inspect``: what the network will see, and which tokens it learns."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

from vipllava.report.html import Child, Html, embed_image, escape, markup, page, read_templates
from vipllava.report.inspected import InspectedSample, RefusedSample, ShownMark, ShownToken, Stretch
from vipllava.types import Turn
from vipllava.visual_prompts.mask_pixels import MaskPixels
from vipllava.visual_prompts.shapes import prompt_words

_TEMPLATES: Final = read_templates("inspect.html")
_WIDTH_SHOWN: Final = 336
_WIDTH_LARGE: Final = 1008
_LOSSLESS_UP_TO: Final = 160
"""Side in pixels up to which PNG costs little; a small image is enlarged, and would show JPEG's
blocks."""
_CONTENTS_FROM: Final = 13
_ASPECTS: Final = {
    "square": ": short side to size, centre crop",
    "pad": ": padded to a square, then resized",
    "resize": ": stretched to a square",
}
_JOINERS: Final = "\u200c\u200d"
"""Invisible, but part of how Persian, Indic scripts and emoji are written."""


@dataclass(frozen=True, slots=True)
class JobSummary:
    """The job whose data the page shows."""

    dataset: str
    num_samples: int  # in the data set
    stage: str
    model: str
    chat_template: str
    image_aspect: str  # ``square``, ``pad`` or ``resize``
    image_size: int  # side of the network's input, pixels
    image_seq_length: int  # tokens of one image
    max_length: int  # greatest number of tokens of a sample
    seed: int  # of wordings and marks
    epoch: int = 0  # whose marks and wordings are shown
    chosen: str = ""  # how the samples were chosen, e.g. ``the first that training meets``
    command: str = ""  # the command line that makes the page; empty to leave it out


Shown = InspectedSample | RefusedSample


def build_inspect_page(
    job: JobSummary, samples: Sequence[Shown], remarks: Sequence[str] = ()
) -> str:
    """Return the page, one file that needs no other and no network; remarks are on the samples."""
    remarks = remarks or [""] * len(samples)
    encoded = [sample for sample in samples if isinstance(sample, InspectedSample)]
    shapes = Counter(mark.prompt.shape for sample in encoded for mark in sample.marks)
    command = '<div class="wide"><dt>made by</dt><dd><code>{}</code></dd></div>'
    summary = {
        **asdict(job),
        "chosen": job.chosen and f", {job.chosen}",
        "image_aspect": job.image_aspect + _ASPECTS.get(job.image_aspect, ""),
        "max_length": _grouped(job.max_length),
        "command": markup(command, job.command) if job.command else None,
    }
    body = markup(
        _TEMPLATES["page"],
        **summary,
        job_class="job with-marks" if shapes else "job",
        tiles=_tiles(job, samples, encoded),
        shapes=_shapes(shapes) if shapes else None,
        image_chip=_image_chip(job.image_seq_length),
        contents=_contents(samples) if len(samples) >= _CONTENTS_FROM else None,
        samples=[
            _sample(number, sample, job, remark)
            for number, (sample, remark) in enumerate(zip(samples, remarks, strict=True), start=1)
        ],
    )
    return page(f"Inspect: {job.dataset}", body, "style.css", "inspect.css")


def _tiles(
    job: JobSummary, samples: Sequence[Shown], encoded: Sequence[InspectedSample]
) -> list[Html]:
    num_text_only = sum(sample.image is None for sample in encoded)
    num_faults = sum(bool(sample.fault) for sample in encoded)
    proved = f"labels of {len(encoded) - num_faults} proved to be the answers"
    remarks = [_soft(f"{proved}; {num_text_only} text only")]
    bad = {"refused": len(samples) - len(encoded), "with wrong labels": num_faults}
    if any(bad.values()):
        text = ", ".join(f"{count} {what}" for what, count in bad.items() if count)
        remarks.append(markup('<p><span class="badge wrong">{}</span></p>', text))
    tiles = [_tile(len(samples), f"of {_grouped(job.num_samples)} samples", remarks)]
    if encoded:
        lengths = [sample.num_ids for sample in encoded]
        total, learned = sum(lengths), sum(sample.num_supervised for sample in encoded)
        dropped = _count(sum(len(sample.dropped) for sample in encoded), "turn")
        longest = f"longest {_grouped(max(lengths))} of {_grouped(job.max_length)}"
        share = _soft(f"{_grouped(learned)} of {_grouped(total)} tokens carry loss")
        mean = _grouped(round(total / len(lengths)))
        tiles += [
            _tile(mean, "tokens on average", _soft(f"{longest}; {dropped} dropped")),
            _tile(_percent(learned / total), "supervised", share),
        ]
    return tiles


def _tile(number: Child, unit: str, more: Child) -> Html:
    return markup(_TEMPLATES["tile"], number=number, unit=unit, more=more)


def _soft(text: str) -> Html:
    return markup('<p class="soft">{}</p>', text)


def _shapes(shapes: Counter[str]) -> Html:
    most = max(shapes.values())
    row = '<li><span>{}</span><i style="width: {}%"></i><b>{}</b></li>'
    rows = [
        markup(row, shape, f"{100 * count / most:.0f}", count)
        for shape, count in shapes.most_common()
    ]
    unit = "mark drawn" if shapes.total() == 1 else "marks drawn"
    return _tile(_grouped(shapes.total()), unit, markup('<ul class="shapes">{}</ul>', rows))


def _contents(samples: Sequence[Shown]) -> Html:
    entries = [
        markup(
            _TEMPLATES["contents_entry"],
            number=number,
            key=sample.key,
            what=markup('<span class="soft">{}, {}</span>', sample.record_kind, sample.num_ids)
            if isinstance(sample, InspectedSample)
            else markup('<span class="wrong">refused</span>'),
        )
        for number, sample in enumerate(samples, start=1)
    ]
    return markup(_TEMPLATES["contents"], entries=entries)


def _sample(number: int, sample: Shown, job: JobSummary, remark: str) -> Html:
    where = f"{sample.dataset}, {sample.shard}"
    if isinstance(sample, InspectedSample):
        where += f", policy {sample.policy}"
        badge = markup('<span class="badge">{}</span>', sample.record_kind)
        body = _body(sample, job)
    else:
        badge = markup('<span class="badge wrong">refused</span>')
        body = markup('<p class="fault">{}</p>', sample.reason)
    badges = [badge, markup('<span class="badge">{}</span>', remark) if remark else None]
    return markup(
        _TEMPLATES["sample"], number=number, key=sample.key, badge=badges, where=where, body=body
    )


def _body(sample: InspectedSample, job: JobSummary) -> Html:
    fault = '<p class="fault">Labels are wrong: {}</p>'
    num_given = sample.num_ids - sample.num_image_ids - sample.num_supervised
    parts = [
        ("of-picture", sample.num_image_ids, "picture"),
        ("of-text", num_given, "given text"),
        ("of-answer", sample.num_supervised, "supervised"),
    ]
    whole = max(sample.max_length, sample.num_ids)
    bar, dot = '<i class="{}" style="width: {}%"></i>', '<i class="dot {}"></i>'
    counts = [(markup(dot, name), count, what) for name, count, what in parts]
    counts.append((Html(), len(sample.dropped), "turns dropped"))
    return markup(
        _TEMPLATES["body"],
        fault=markup(fault, sample.fault) if sample.fault else None,
        view=_view(sample, job),
        bar=[markup(bar, name, f"{100 * n / whole:.2f}") for name, n, _ in parts if n],
        num_ids=sample.num_ids,
        max_length=sample.max_length,
        counts=[markup("<li>{}<b>{}</b> {}</li>", *entry) for entry in counts],
        talk=_talk(sample),
        marks=_marks(sample) if sample.image else None,
    )


def _view(sample: InspectedSample, job: JobSummary) -> Html:
    if sample.image is None or sample.stored_size is None:
        text = "Text only: the record has no picture, and the model gets none."
        return markup('<div class="none">{}</div>', text)
    image, width = sample.image, sample.image.width
    alt, lossless = f"Input of the network for {sample.key}", width <= _LOSSLESS_UP_TO
    # Multiples of the image's width: whole pixels stay crisp.
    shown, large = (width * max(1, round(w / width)) for w in (_WIDTH_SHOWN, _WIDTH_LARGE))
    stored, given = (" \u00d7 ".join(map(str, size)) for size in (sample.stored_size, image.size))
    return markup(
        _TEMPLATES["view"],  # its check box makes the image large without a script
        shown=shown,
        large=large,
        image=embed_image(image, alt, ' decoding="async"', lossless=lossless, quality=92),
        stored=stored,
        given=given,
        aspect=job.image_aspect,
    )


def _talk(sample: InspectedSample) -> list[Html]:
    rows = [_stretch(stretch) for stretch in sample.stretches]
    rows += [_dropped(turn) for turn in sample.dropped]
    if sample.dropped or sample.is_cut:
        why = "with the next question and answer the sample would be longer than"
        if sample.is_cut:
            why = "the conversation is cut off, be it within a text, at"
        reason = (
            f"{_count(len(sample.dropped), 'turn')} dropped: {why} max_length={sample.max_length}. "
            "No id holds them; their text is the record's."
        )
        rows.append(markup('<div class="side"></div><p class="why">{}</p>', reason))
    return rows


def _stretch(stretch: Stretch) -> Html:
    return markup(
        '<div class="side {kind}"><b>{kind}</b> {count}</div><p class="said {kind}">{tokens}</p>',
        kind="learned" if stretch.supervised else "given",
        count=_count(stretch.num_ids, "token"),
        tokens=map(_token, stretch.tokens),
    )


def _dropped(turn: Turn) -> Html:
    return markup(
        '<div class="side"><b>dropped</b> {}</div><p class="said dropped"><s>{}</s></p>',
        turn.role,
        visible(turn.text),
    )


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
    return markup('<span class="{}" title="id {}">{}</span>', classes, ids, visible(token.text))


def _image_chip(count: int) -> Html:
    return markup('<span class="t image">picture \u00d7 {}</span>', count)


def visible(text: str) -> Html:
    """Return text as markup in which nothing is hidden.

    Newlines and tabs stay themselves behind a sign that the style sheet draws. Other characters
    that show nothing, or that turn the direction of what follows, are spelt by their code point.
    """
    return escape(map(_visible, text))


def _visible(character: str) -> str:
    if not _is_hidden(character):
        return character
    if character in "\n\t":
        return markup('<span class="{}">{}</span>', "nl" if character == "\n" else "tab", character)
    return markup('<span class="code-point">U+{}</span>', f"{ord(character):04X}")


def _is_hidden(character: str) -> bool:
    if character.isascii():
        return not character.isprintable()
    if character in _JOINERS or 0xE0020 <= ord(character) <= 0xE007F:  # the latter spell flags
        return False
    category = unicodedata.category(character)
    return category in ("Cc", "Cf", "Zl", "Zp") or (category == "Zs" and character != "\u3000")


def _marks(sample: InspectedSample) -> Html:
    if not sample.marks:
        return markup('<h3>Marks</h3><p class="soft">None are drawn.</p>')
    return markup(
        '<h3>{}, in drawing order</h3><ol class="marks">{}</ol>',
        _count(len(sample.marks), "mark"),
        [_mark(mark, sample.num_turns) for mark in sample.marks],
    )


def _mark(mark: ShownMark, num_turns: int) -> Html:
    prompt = mark.prompt
    red, green, blue = prompt.rgb
    share = prompt.alpha / 255
    size: Child = markup('<span class="wrong">none of it is in the input</span>')
    if mark.input_size is not None:
        size = " \u00d7 ".join(f"{max(1.0, side):.0f}" for side in mark.input_size) + " input px"
    facts: list[tuple[Child, Child]] = [
        ("colour", f"rgb {red}, {green}, {blue}"),
        ("opacity", _percent(share)),
        ("shape", f"{prompt.shape}, {_stroke(mark)}"),
        (f"region {prompt.region + 1}", _region(mark)),
        ("size", size),
        ("named in", _named_in(mark, num_turns)),
    ]
    if mark.fixed:
        facts.append(("fixed", f"{', '.join(mark.fixed)}, by the record"))
    return markup(
        _TEMPLATES["mark"],
        red=red,
        green=green,
        blue=blue,
        alpha=f"{share:.2f}",
        words=prompt_words(prompt),
        facts=[markup("<dt>{}</dt><dd>{}</dd>", *fact) for fact in facts],
    )


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
    if mark.region.rle is not None:
        mask = f"mask of {_count(MaskPixels.of(mark.region.rle).area, 'pixel')}"
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
