"""The proof accepts what the encoder makes, and refuses each way to be wrong, with a reason."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from vipllava.conversation import ConversationEncoder, prove_labels, supervised_texts
from vipllava.types import IGNORE_INDEX, Encoded, Turn, VipLlavaError

Encoders = dict[str, ConversationEncoder]


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("plain", ["a dog.\nYes.\n"]),
        ("llava_v1", ["a dog.</s>", "Yes.</s>"]),
        ("llava_v0", ["a dog.###", "Yes.###"]),
        ("llama_3", ["a dog.<|eot_id|>", "Yes.<|eot_id|>"]),
        ("phi_3", ["a dog.<|end|>", "Yes.<|end|>"]),
        ("phi_3/legacy", ["a dog.<|end|>", "Yes.<|end|>"]),
        ("chatml", ["a dog.<|im_end|>", "Yes.<|im_end|>"]),
    ],
)
def test_supervised_texts(
    encoders: Encoders, turns: list[Turn], name: str, texts: list[str]
) -> None:
    assert supervised_texts(encoders[name], encoders[name].encode(turns)) == texts


def changed(encoded: Encoded, label: dict[int, int], ids: dict[int, int] | None = None) -> Encoded:
    """Return a copy with single labels and ids replaced."""
    labels, input_ids = encoded.labels.copy(), encoded.input_ids.copy()
    for position, value in label.items():
        labels[position] = value
    for position, value in (ids or {}).items():
        input_ids[position] = value
    return dataclasses.replace(encoded, labels=labels, input_ids=input_ids)


@pytest.fixture
def encoder(encoders: Encoders) -> ConversationEncoder:
    return encoders["llava_v1"]


@pytest.fixture
def encoded(encoder: ConversationEncoder, turns: list[Turn]) -> Encoded:
    # Ids from position 38: 369 [395 567 2] 583 285 574 290 369 [577 2]
    return encoder.encode(turns)


def test_the_message_shows_both_texts(encoder: ConversationEncoder, encoded: Encoded) -> None:
    turns = [
        Turn("user", "What is it?", has_image=True),
        Turn("assistant", "a dog."),
        Turn("user", "Sure?"),
        Turn("assistant", "No."),
    ]
    with pytest.raises(VipLlavaError) as error:
        prove_labels(encoder, turns, encoded, "shard-000000/0017")
    assert str(error.value) == (
        "labels of sample 'shard-000000/0017' (template 'llava_v1'), turn 4 of 4: what is "
        "supervised is not the answer and its end; they part at character 1\n"
        "  answer:     ' No.</s>'\n"
        "  supervised: ' Yes.</s>'"
    )


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({38: 369}, "1 positions outside the answers are supervised; .*'ASSISTANT: a dog.</s>'"),
        ({26: 5000}, "an image position is supervised"),
        ({0: 1}, "1 positions outside the answers are supervised"),
        ({39: IGNORE_INDEX}, "they part at character 0"),
        ({41: IGNORE_INDEX}, "turn 2 of 4: .* part at character 7\n.*a dog.</s>'\n.*a dog.'"),
        ({42: 583}, r"they part at character 11\n.*</s>'\n  supervised: ' a dog.</s>USER'"),
        ({47: IGNORE_INDEX, 48: IGNORE_INDEX}, "turn 4 of 4"),
        ({40: 395}, "position 40 has id 567 and label 395; a label is the id itself or -100"),
    ],
)
def test_wrong_labels(
    encoder: ConversationEncoder,
    encoded: Encoded,
    turns: list[Turn],
    label: dict[int, int],
    message: str,
) -> None:
    assert encoded.input_ids[38:].tolist() == [369, 395, 567, 2, 583, 285, 574, 290, 369, 577, 2]
    prove_labels(encoder, turns, encoded)
    with pytest.raises(VipLlavaError, match=message):
        prove_labels(encoder, turns, changed(encoded, label), "k")


def test_wrong_ids(encoder: ConversationEncoder, encoded: Encoded, turns: list[Turn]) -> None:
    with pytest.raises(VipLlavaError, match="2 image positions; 1 pictures of 3 positions need 3"):
        prove_labels(encoder, turns, changed(encoded, {}, {26: 13}))
    with pytest.raises(
        VipLlavaError, match=r"prompt of turn 2 \(39 ids\) .* \(49 ids\) begins: .* position 34"
    ):
        prove_labels(encoder, turns, changed(encoded, {}, {34: 13}))


def test_wrong_shapes_and_counts(
    encoder: ConversationEncoder, encoded: Encoded, turns: list[Turn]
) -> None:
    cut = dataclasses.replace(encoded, labels=encoded.labels[:-1])
    with pytest.raises(VipLlavaError, match=r"shapes \(49,\) and \(48,\)"):
        prove_labels(encoder, turns, cut)
    all_dropped = dataclasses.replace(encoded, num_dropped_turns=4)
    with pytest.raises(VipLlavaError, match="4 turns less 4 dropped ones leave 0"):
        prove_labels(encoder, turns, all_dropped)
    short = ConversationEncoder(encoder.tokenizer, "llava_v1", 5000, 3, max_length=48)
    with pytest.raises(VipLlavaError, match="49 ids exceed max_length=48"):
        prove_labels(short, turns, encoded)


def test_dropped_turns_are_accounted_for(encoder: ConversationEncoder, turns: list[Turn]) -> None:
    short = ConversationEncoder(encoder.tokenizer, "llava_v1", 5000, 3, max_length=45)
    encoded = short.encode(turns)
    assert encoded.num_dropped_turns == 2
    prove_labels(short, turns, encoded)
    with pytest.raises(VipLlavaError):
        prove_labels(short, turns, dataclasses.replace(encoded, num_dropped_turns=0))


def test_a_tokenizer_that_rewrites_text_is_taken_at_its_word(
    smol_like: PreTrainedTokenizerFast,
) -> None:
    backend = Tokenizer.from_str(smol_like.backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    encoder = ConversationEncoder(tokenizer, "chatml", 5000, 3, 2048)
    turns = [Turn("user", "Sure?"), Turn("assistant", "e\u0301")]
    encoded = encoder.encode(turns)
    assert supervised_texts(encoder, encoded) == ["\u00e9<|im_end|>"]
    prove_labels(encoder, turns, encoded)


def test_empty_answers_supervise_their_end(encoders: Encoders) -> None:
    turns = [Turn("user", "Sure?"), Turn("assistant", "")]
    for name, encoder in encoders.items():
        encoded = encoder.encode(turns)
        prove_labels(encoder, turns, encoded)
        assert encoded.num_supervised >= 1, name
        assert np.all(encoded.labels[encoded.labels != IGNORE_INDEX] > 0)
