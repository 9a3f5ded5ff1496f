"""A conversation that does not fit into ``max_length``: cut off, shortened by exchanges, refused.

The ids are those written out in ``test_encode_ids``. Of ``picture`` the system text takes 25, the
space before the image one (25), the image 26 to 28, the question with the role string 29 to 38, the
answer 39 and 40, its end 41; ``USER:`` 42 and 43, the second question 44, ``ASSISTANT:`` 45 and 46,
the second answer 47, its end 48.
"""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.conversation.test_encode_properties import NAMES, SETTINGS, Encoders, conversations
from vipllava.conversation import ConversationEncoder, prove_labels
from vipllava.conversation.encode import TooLong
from vipllava.types import IGNORE_INDEX, ConfigError, RecordError, Turn, VipLlavaError

IMAGE = 5000


def limited(tokenizer: PreTrainedTokenizerFast, length: int, way: TooLong) -> ConversationEncoder:
    return ConversationEncoder(tokenizer, "llava_v1", IMAGE, 3, length, way)


@pytest.mark.parametrize(
    ("max_length", "num_dropped", "supervised"),
    [
        (48, 0, [395, 567, 2, 577]),  # without the end of the last answer
        (47, 1, [395, 567, 2]),  # without the last answer
        (45, 1, [395, 567, 2]),
        (44, 2, [395, 567, 2]),  # ends with the role string
        (41, 2, [395, 567]),  # without the end of the first answer
        (40, 2, [395]),  # within the first answer
    ],
)
def test_it_is_cut_off_with_its_labels(
    llama_like: PreTrainedTokenizerFast,
    turns: list[Turn],
    max_length: int,
    num_dropped: int,
    supervised: list[int],
) -> None:
    encoder = limited(llama_like, max_length, "cut")
    encoded = encoder.encode(turns)
    assert encoded.length == max_length
    assert encoded.labels[encoded.labels != IGNORE_INDEX].tolist() == supervised
    assert (encoded.num_dropped_turns, encoded.num_images) == (num_dropped, 1)
    assert encoded.is_cut
    assert encoded.is_truncated
    prove_labels(encoder, turns, encoded)


def test_what_fits_is_left_alone(llama_like: PreTrainedTokenizerFast, turns: list[Turn]) -> None:
    for way in ("cut", "drop_turns", "error"):
        encoded = limited(llama_like, 49, way).encode(turns)
        assert (encoded.length, encoded.num_dropped_turns) == (49, 0)
        assert not encoded.is_truncated


@pytest.mark.parametrize("max_length", [2, 27, 39])
def test_nothing_left_to_learn_is_a_fault_of_its_own(
    llama_like: PreTrainedTokenizerFast, turns: list[Turn], max_length: int
) -> None:
    with pytest.raises(RecordError) as error:
        limited(llama_like, max_length, "cut").encode(turns, "k")
    assert error.value.fault == "unsupervised"
    assert str(error.value) == (
        "sample 'k': its first question and answer need 42 ids (3 of the picture, 7 of the "
        "question, 2 of the answer, 30 of template 'llava_v1') and "
        f"max_length={max_length}, which leaves no token of the answer; raise max_length, shorten "
        "the record or leave it out"
    )


def test_a_later_image_stays_or_it_is_an_error(
    llama_like: PreTrainedTokenizerFast, conversations: dict[str, list[Turn]]
) -> None:
    turns = conversations["picture_late"]  # its image takes 33 to 35
    encoded = limited(llama_like, 36, "cut").encode(turns)
    assert encoded.input_ids[-4:].tolist() == [259, 5000, 5000, 5000]
    assert (encoded.num_images, encoded.num_dropped_turns) == (1, 1)
    for max_length in (35, 31):
        with pytest.raises(RecordError, match="the picture stands in a turn that does not fit"):
            limited(llama_like, max_length, "cut").encode(turns)


def test_every_long_one_is_an_error(llama_like: PreTrainedTokenizerFast, turns: list[Turn]) -> None:
    with pytest.raises(RecordError) as error:
        limited(llama_like, 48, "error").encode(turns, "k")
    assert error.value.fault == "too-long"
    assert str(error.value) == (
        "sample 'k': turns 1 to 4 need 49 ids and max_length=48; raise max_length, split the "
        "conversation, or pass too_long=drop_turns or too_long=cut"
    )
    with pytest.raises(RecordError, match="leave it out or pass too_long=cut"):
        limited(llama_like, 41, "error").encode(turns, "k")


def test_the_way_is_known_and_travels(llama_like: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="too_long=keep: expected one of cut, drop_turns, error"):
        limited(llama_like, 48, "keep")  # type: ignore[arg-type]
    cut, dropped = limited(llama_like, 48, "cut"), limited(llama_like, 48, "drop_turns")
    assert pickle.loads(pickle.dumps(cut)).too_long == "cut"
    assert cut.identity != dropped.identity


@pytest.mark.parametrize("name", NAMES)
@given(turns=conversations(), max_length=st.integers(2, 160))
@SETTINGS
def test_a_cut_sample_is_the_beginning_of_the_whole(
    encoders: Encoders, name: str, turns: list[Turn], max_length: int
) -> None:
    base = encoders[name]
    sizes = base.image_token_id, base.image_seq_length, max_length
    short = ConversationEncoder(base.tokenizer, base.template, *sizes, "cut")
    whole = base.encode(turns)
    ids, labels = whole.input_ids[:max_length], whole.labels[:max_length]
    keeps_image = (ids == IMAGE).sum() == 3 * whole.num_images
    if not keeps_image or (labels == IGNORE_INDEX).all():
        with pytest.raises(RecordError, match="'k'"):
            short.encode(turns, "k")
        return
    encoded = short.encode(turns, "k")
    assert np.array_equal(encoded.input_ids, ids)
    assert np.array_equal(encoded.labels, labels)
    assert encoded.is_cut == (whole.length > max_length)
    prove_labels(short, turns, encoded)


def test_the_proof_sees_another_beginning(
    llama_like: PreTrainedTokenizerFast, turns: list[Turn]
) -> None:
    encoder = limited(llama_like, 45, "cut")
    encoded = encoder.encode(turns)
    labels, ids = encoded.labels.copy(), encoded.input_ids.copy()
    labels[41], ids[44] = IGNORE_INDEX, 13
    for changed, message in (
        ({"labels": labels}, "cut off, .* their labels part at position 41"),
        ({"input_ids": ids}, "cut off, .* their input_ids part at position 44"),
        ({"is_cut": False}, "4 turns less 1 dropped ones leave 3"),
    ):
        with pytest.raises(VipLlavaError, match=message):
            prove_labels(encoder, turns, dataclasses.replace(encoded, **changed))
