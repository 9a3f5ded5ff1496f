"""Proof that labels cover the assistant texts and their ends, and nothing else.

The encoder makes labels from pieces and never looks at them again. The proof goes the other way:
it decodes what is labelled and compares it with the texts, and it asks that what stands before
each answer is exactly the prompt a model would be given there. Of a conversation that was cut off
the whole one is proved, and that the sample is its beginning.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from vipllava.conversation.encode import ConversationEncoder
from vipllava.conversation.pieces import Before
from vipllava.types import IGNORE_INDEX, Encoded, Turn, VipLlavaError

_CONTEXT = 24
"""Characters shown on each side of the first difference."""


def supervised_texts(encoder: ConversationEncoder, encoded: Encoded) -> list[str]:
    """Return the text of each unbroken run of supervised positions, end tokens spelt out.

    The template's lead (the space behind ``ASSISTANT:``) is supervised with the text and left
    out here. A template without anything between two answers (``plain``) makes one run of them.
    """
    texts: list[str] = []
    supervised = np.concatenate([[False], encoded.labels != IGNORE_INDEX, [False]])
    edges = np.flatnonzero(supervised[1:] != supervised[:-1])
    for start, end in edges.reshape(-1, 2).tolist():
        before = encoder.what_stands_before(encoded.input_ids, start)
        text = encoder.decode(encoded.labels[start:end], before)
        texts.append(text.removeprefix(encoder.template.assistant_lead))
    return texts


def prove_labels(
    encoder: ConversationEncoder, turns: Sequence[Turn], encoded: Encoded, key: str = ""
) -> None:
    """Prove that ``encoded`` supervises the answers of ``turns`` and nothing else.

    Args:
        encoder: the encoder that made ``encoded``.
        turns: the conversation, dropped turns included.
        encoded: ids and labels.
        key: the record's key, for errors.

    Raises:
        VipLlavaError: a label differs from its id; the picture has not all its positions or one
            is supervised; the length limit is broken; an answer does not follow its own
            generation prompt; or the supervised text is not the answer with its end (the message
            shows both around the first difference).
    """
    name = f"labels of sample {key!r} (template {encoder.template.name!r})"
    _prove_arrays(name, encoder, encoded)
    if encoded.is_cut:
        whole = encoder.encode_whole(turns, key)
        for part in ("input_ids", "labels"):
            mine, all_of_them = getattr(encoded, part), getattr(whole, part)
            if not np.array_equal(mine, all_of_them[: len(mine)]):
                at = _first_difference(mine.tolist(), all_of_them.tolist())
                raise VipLlavaError(
                    f"{name}: it was cut off, and is not how the whole conversation begins: their "
                    f"{part} part at position {at}"
                )
        encoded = whole
    ids, labels = encoded.input_ids, encoded.labels
    kept = turns[: len(turns) - encoded.num_dropped_turns]
    if not kept or len(kept) % 2:
        raise VipLlavaError(
            f"{name}: {len(turns)} turns less {encoded.num_dropped_turns} dropped ones leave "
            f"{len(kept)}; whole pairs must stay, and one at least"
        )
    starts: list[int] = []
    for answer in range(1, len(kept), 2):
        prompt = encoder.encode_generation_prompt(kept[:answer], key)
        if not np.array_equal(prompt, ids[: len(prompt)]):
            at = _first_difference(prompt.tolist(), ids[: len(prompt)].tolist())
            raise VipLlavaError(
                f"{name}: the prompt of turn {answer + 1} ({len(prompt)} ids) is not how the "
                f"sample ({len(ids)} ids) begins: they part at position {at}"
            )
        starts.append(len(prompt))

    num_proved = 0
    for answer, start, limit in zip(
        range(1, len(kept), 2), starts, [*starts[1:], len(ids)], strict=True
    ):
        window = labels[start:limit]
        ignored = np.flatnonzero(window == IGNORE_INDEX)
        length = int(ignored[0]) if len(ignored) else len(window)
        _prove_text(
            f"{name}, turn {answer + 1} of {len(turns)}",
            encoder,
            before=encoder.what_stands_before(ids, start),
            expected=kept[answer].text,
            supervised_ids=window[:length],
        )
        num_proved += length
    if num_proved != encoded.num_supervised:
        stray = encoded.num_supervised - num_proved
        raise VipLlavaError(
            f"{name}: {stray} positions outside the answers are supervised; supervised in all: "
            f"{supervised_texts(encoder, encoded)}"
        )


def _prove_arrays(name: str, encoder: ConversationEncoder, encoded: Encoded) -> None:
    ids, labels = encoded.input_ids, encoded.labels
    if ids.ndim != 1 or ids.shape != labels.shape:
        raise VipLlavaError(
            f"{name}: ids and labels have shapes {ids.shape} and {labels.shape}; they must be "
            "equal and one-dimensional"
        )
    if len(ids) > encoder.max_length:
        raise VipLlavaError(f"{name}: {len(ids)} ids exceed max_length={encoder.max_length}")
    wrong = np.flatnonzero((labels != IGNORE_INDEX) & (labels != ids))
    if len(wrong):
        at = int(wrong[0])
        raise VipLlavaError(
            f"{name}: position {at} has id {ids[at]} and label {labels[at]}; a label is the id "
            f"itself or {IGNORE_INDEX}"
        )
    is_image = ids == encoder.image_token_id
    expected = encoded.num_images * encoder.image_seq_length
    if int(is_image.sum()) != expected:
        raise VipLlavaError(
            f"{name}: {int(is_image.sum())} image positions; {encoded.num_images} pictures of "
            f"{encoder.image_seq_length} positions need {expected}"
        )
    if bool((labels[is_image] != IGNORE_INDEX).any()):
        raise VipLlavaError(f"{name}: an image position is supervised")


def _prove_text(
    name: str,
    encoder: ConversationEncoder,
    *,
    before: Before,
    expected: str,
    supervised_ids: npt.NDArray[np.int64],
) -> None:
    """Raise unless the ids decode to the text with the template's lead and end."""
    supervised = encoder.decode(supervised_ids, before)
    lead, end = encoder.template.assistant_lead, encoder.template.assistant_end
    wanted = lead + expected + end
    if supervised == wanted:
        return
    # A tokenizer may rewrite text (Unicode normalisation, unknown characters). What it cannot
    # write is no fault of the labels: compare with what it makes of the text by itself.
    text_end = "" if encoder.template.ends_with_token else end
    rewritten = encoder.round_trip(lead + expected + text_end, before) + end.removeprefix(text_end)
    if supervised == rewritten:
        return
    at = _first_difference(wanted, supervised)
    first = max(0, at - _CONTEXT)
    shown = [_excerpt(text, first, at + _CONTEXT) for text in (wanted, supervised)]
    raise VipLlavaError(
        f"{name}: what is supervised is not the answer and its end; they part at character {at}\n"
        f"  answer:     {shown[0]}\n"
        f"  supervised: {shown[1]}"
    )


def _excerpt(text: str, first: int, last: int) -> str:
    return ("..." if first else "") + repr(text[first:last]) + ("..." if last < len(text) else "")


def _first_difference(a: Sequence[object], b: Sequence[object]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
