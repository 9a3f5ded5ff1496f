"""Properties that hold for any text, on every family of tokenizers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vipllava.conversation import ConversationEncoder, prove_labels
from vipllava.types import RecordError, Turn

NAMES = (
    "plain",
    "plain/llama3",
    "llava_v1",
    "llava_v0",
    "llama_3",
    "phi_3",
    "phi_3/legacy",
    "chatml",
)
MARKS = (
    *("USER:", " ASSISTANT:", "###", "###Human:", "<image>", "</s>", "<s>", "<unk>", "▁", "<0x0A>"),
    *("<|eot_id|>", "<|end|>", "<|im_end|>", "<|user|>\n", "<|im_start|>user\n", "\n\n", "  ", " "),
)
# Any text of Unicode, and the strings that templates are made of, in any order.
TEXTS = st.lists(
    st.one_of(st.sampled_from(MARKS), st.text(st.characters(codec="utf-8"), max_size=6)), max_size=5
).map("".join)
CLEAN_TEXTS = st.lists(
    st.sampled_from(["What", "is", "it", "a", "dog.", "red", "(1)", "x=3,", "犬", "é", "don't"]),
    min_size=1,
    max_size=6,
).map(" ".join)
SETTINGS = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

Encoders = dict[str, ConversationEncoder]


@st.composite
def conversations(draw: st.DrawFn, texts: st.SearchStrategy[str] = TEXTS) -> list[Turn]:
    """Draw one to three pairs, with at most one picture."""
    num_pairs = draw(st.integers(1, 3))
    picture = draw(st.sampled_from([None, *range(num_pairs)]))
    turns: list[Turn] = []
    for index in range(num_pairs):
        turns.append(Turn("user", draw(texts), has_image=index == picture))
        turns.append(Turn("assistant", draw(texts)))
    return turns


@pytest.mark.parametrize("name", NAMES)
@given(turns=conversations())
@SETTINGS
def test_labels_are_the_answers_and_prompts_are_prefixes(
    encoders: Encoders, name: str, turns: list[Turn]
) -> None:
    encoder = encoders[name]
    encoded = encoder.encode(turns)
    prove_labels(encoder, turns, encoded)
    for answer in range(1, len(turns), 2):
        prompt = encoder.encode_generation_prompt(turns[:answer])
        assert np.array_equal(prompt, encoded.input_ids[: len(prompt)])


@pytest.mark.parametrize("name", NAMES)
@given(turns=conversations())
@SETTINGS
def test_typed_text_never_becomes_a_special_token(
    encoders: Encoders, name: str, turns: list[Turn]
) -> None:
    encoder = encoders[name]
    special = {*encoder.tokenizer.backend_tokenizer.get_added_tokens_decoder(), 5000}
    blank = [Turn(turn.role, "a", turn.has_image) for turn in turns]

    def special_ids(turns: list[Turn]) -> list[int]:
        return [i for i in encoder.encode(turns).input_ids.tolist() if i in special]

    assert special_ids(turns) == special_ids(blank)


@pytest.mark.parametrize("name", NAMES)
@given(turns=conversations(), max_length=st.integers(2, 160))
@SETTINGS
def test_truncation_keeps_the_longest_run_of_whole_pairs(
    encoders: Encoders, name: str, turns: list[Turn], max_length: int
) -> None:
    whole = encoders[name]
    short = ConversationEncoder(
        whole.tokenizer, whole.template, whole.image_token_id, whole.image_seq_length, max_length
    )
    lengths = [len(whole.encode(turns[:end]).input_ids) for end in range(2, len(turns) + 1, 2)]
    num_fitting = sum(length <= max_length for length in lengths)
    has_image = any(turn.has_image for turn in turns)
    keeps_image = any(turn.has_image for turn in turns[: 2 * num_fitting])
    if num_fitting == 0 or has_image != keeps_image:
        with pytest.raises(RecordError, match="'k'"):
            short.encode(turns, "k")
        return
    encoded = short.encode(turns, "k")
    expected = whole.encode(turns[: 2 * num_fitting])
    assert encoded.num_dropped_turns == len(turns) - 2 * num_fitting
    assert encoded.num_images == has_image
    assert encoded.num_supervised > 0
    assert np.array_equal(encoded.input_ids, expected.input_ids)
    assert np.array_equal(encoded.labels, expected.labels)
    prove_labels(short, turns, encoded)


@pytest.mark.parametrize("name", NAMES)
@given(turns=conversations(CLEAN_TEXTS), alone=st.booleans())
@SETTINGS
def test_clean_texts_get_the_released_ids(
    encoders: Encoders, name: str, turns: list[Turn], alone: bool
) -> None:
    """One string, cut at the picture, each side encoded by itself, BOS once."""
    encoder = encoders[name]
    if alone:  # the picture is all that its turn says
        turns = [replace(turn, text="") if turn.has_image else turn for turn in turns]
    if encoder.template.drops_user_text:
        turns = turns[:2]
    backend = encoder.tokenizer.backend_tokenizer
    ids = [] if encoder.template.bos else backend.encode("").ids
    for index, part in enumerate(encoder.template.render(turns).split("<image>")):
        ids += [5000] * 3 if index else []
        if index and "Metaspace" in str(backend.pre_tokenizer) and part.startswith(" "):
            part = f" {part}"  # sentencepiece prefixes a space to this, too; Metaspace does not
        ids += backend.encode(part, add_special_tokens=False).ids
    assert encoder.encode(turns).input_ids.tolist() == ids
