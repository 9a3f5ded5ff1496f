"""Pieces of an answer, joined, are the answer; none is half a character or part of a stop."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.conftest import byte_tokenizer
from tests.inference.tiny_engine import TEMPLATE
from tests.toy_stream import make_encoder
from vipllava.conversation import ConversationEncoder, get_template
from vipllava.conversation.pieces import Before
from vipllava.inference.answer_text import AnswerText, Detokenizer
from vipllava.inference.protocol import TokenLogprob


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def detokenizer_of(tokenizer, template=TEMPLATE) -> Detokenizer:
    return Detokenizer(ConversationEncoder(tokenizer, template, 259, 4, max_length=512))


def ids_of(tokenizer, text: bytes) -> list[int]:
    """One id per byte."""
    letters = tokenizer.backend_tokenizer.pre_tokenizer
    return [
        tokenizer.convert_tokens_to_ids(letter)
        for letter in "".join(piece for piece, _ in letters.pre_tokenize_str(text.decode()))
    ]


def pieces_of(tokenizer, text: str, *stops: str, streams=True) -> list[str]:
    """What each token gives, one byte each, and what the end gives."""
    answer = AnswerText(detokenizer_of(tokenizer), Before.TEXT, stops, streams)
    pieces = []
    for token in ids_of(tokenizer, text.encode()):
        ended = answer.add(token)
        if ended:
            break
        pieces.append(answer.take()[0])
    answer.finish()
    return [*pieces, answer.take()[0]]


def test_characters_come_whole_and_blanks_are_held(tokenizer):
    assert pieces_of(tokenizer, " a é") == ["", "a", "", "", " é", ""]
    assert pieces_of(tokenizer, "  \n a b \n") == ["", "", "", "", "a", "", " b", "", "", ""]
    assert pieces_of(tokenizer, " \U0001f642!") == ["", "", "", "", "\U0001f642", "!", ""]
    assert pieces_of(tokenizer, " ") == ["", ""]
    assert pieces_of(tokenizer, "") == [""]


def test_without_streaming_all_comes_at_the_end(tokenizer):
    assert pieces_of(tokenizer, " a é ", streams=False)[-1] == "a é"


def test_what_may_be_a_stop_is_held(tokenizer):
    assert pieces_of(tokenizer, " abcabx", "abd") == ["", "", "", "abc", "", "", "abx", ""]
    # Over the borders of tokens; what follows the stop is no more part of the answer.
    assert pieces_of(tokenizer, " yes###no", "###") == ["", "y", "e", "s", "", "", ""]
    assert pieces_of(tokenizer, " yes##", "###") == ["", "y", "e", "s", "", "", "##"]
    assert pieces_of(tokenizer, " one two", "o t", "wo")[-1] == ""
    assert "".join(pieces_of(tokenizer, " one two", "two", "e t")) == "on"
    assert "".join(pieces_of(tokenizer, " one two", "one")) == ""
    assert "".join(pieces_of(tokenizer, " ab cd", " c")) == "ab"


def test_the_lead_is_no_part_of_the_answer(tokenizer):
    # The template's space; a stop that is a space is met behind it.
    assert "".join(pieces_of(tokenizer, " red star", " ")) == "red"
    template = replace(TEMPLATE, assistant_lead=">> ")
    answer = AnswerText(detokenizer_of(tokenizer, template), Before.TEXT, (), True)
    pieces = []
    for token in ids_of(tokenizer, b">> hi >> ho"):
        answer.add(token)
        pieces.append(answer.take()[0])
    assert pieces == ["", "", "", "h", "i", "", " >", ">", "", " h", "o"]


def test_a_byte_that_is_no_character_is_told_as_such(tokenizer):
    lone = tokenizer.convert_tokens_to_ids("Ã")  # the first byte of two
    answer = AnswerText(detokenizer_of(tokenizer), Before.TEXT, (), True)
    given = []
    for token in (*ids_of(tokenizer, b" a"), lone, *ids_of(tokenizer, b"b"), lone):
        answer.add(token)
        given.append(answer.take()[0])
    answer.finish()
    assert [*given, answer.take()[0]] == ["", "a", "", "\ufffdb", "", "\ufffd"]


@pytest.mark.parametrize("seed", range(40))
def test_random_ids_give_what_they_give_at_once(tokenizer, seed):
    draw = random.Random(seed)
    letters = ids_of(tokenizer, "ab \n.é\U0001f642".encode())
    ids = [draw.choice(letters) for _ in range(60)]
    stops = tuple(draw.choice(["ab", "a b", ". ", "é", "\n\n"]) for _ in range(draw.randint(0, 2)))
    detokenizer = detokenizer_of(tokenizer)
    answer, joined = AnswerText(detokenizer, Before.TEXT, stops, True), ""
    read = []
    for token in ids:
        read.append(token)
        ended = answer.add(token)
        joined += answer.take()[0]
        if ended:
            break
    answer.finish()
    joined += answer.take()[0]

    whole = detokenizer.encoder.decode(read).removeprefix(" ")
    ends = [at for stop in stops if (at := whole.find(stop)) >= 0]
    assert joined == whole[: min(ends, default=None)].strip()
    assert answer.met_stop == bool(ends)
    assert len(read) == 60 or ends


def test_a_stop_in_the_last_letters_is_one(tokenizer):
    # Nothing is worked out before the end, where the template has no stop and nobody streams.
    answer = AnswerText(detokenizer_of(tokenizer), Before.TEXT, ("é",), False)
    for token in ids_of(tokenizer, b" caf"):
        assert not answer.add(token)
    assert not answer.add(ids_of(tokenizer, "é".encode())[0])
    assert answer.add(ids_of(tokenizer, "é".encode())[1])
    answer.finish()
    assert answer.take()[0] == "caf"
    assert answer.met_stop


def test_log_probabilities_come_with_their_texts(tokenizer):
    answer = AnswerText(detokenizer_of(tokenizer), Before.TEXT, ("##",), True)
    given = []
    for token, letter in zip(ids_of(tokenizer, b" a b##"), " a b##", strict=True):
        answer.add(token, TokenLogprob(letter, -1.0))
        text, logprobs = answer.take()
        given.append((text, "".join(each.token for each in logprobs)))
    answer.finish()
    # The lead begins where the answer does; of the stop nothing is told.
    assert given == [("", ""), ("a", " a"), ("", ""), (" b", " b"), ("", ""), ("", "")]
    assert answer.take() == ("", ())


def test_tokens_without_text_have_log_probabilities_too(tokenizer):
    answer = AnswerText(detokenizer_of(tokenizer), Before.TEXT, (), True)
    answer.add(ids_of(tokenizer, b" ")[0], TokenLogprob(" ", -1.0))
    assert answer.take() == ("", ())
    answer.finish()
    assert answer.take() == ("", (TokenLogprob(" ", -1.0),))


def test_a_template_that_stops_at_a_text(tokenizer):
    template = get_template("plain")
    answer = AnswerText(detokenizer_of(tokenizer, template), Before.NOTHING, ("\n",), True)
    given = []
    for token in ids_of(tokenizer, b"a cat"):
        answer.add(token)
        given.append(answer.take()[0])
    assert given == ["a", "", " c", "a", "t"]
    assert answer.add(ids_of(tokenizer, b"\n")[0])


@pytest.mark.parametrize("before", Before)
def test_bytes_of_a_sentencepiece_vocabulary(before):
    """Letters that it lacks are bytes, a newline is one; the first space may be its own."""
    encoder = make_encoder()
    text = " Zwei B\u00e4ren,\n\u4e2d\u6587 \U0001f642!"
    ids = encoder._pieces.typed(text, before)
    answer = AnswerText(Detokenizer(encoder), before, (), True)
    pieces = []
    for token in ids:
        answer.add(token)
        pieces.append(answer.take()[0])
    assert "".join(pieces) == text.strip()
    assert "\n\u4e2d" in pieces  # as soon as its third byte is there
    assert not any("\ufffd" in piece for piece in pieces)
    assert encoder.decode(ids, before).strip() == text.strip()
