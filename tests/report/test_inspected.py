"""What is shown of a sample comes from its ids, character by character."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.report.conftest import SIDE, Inspect, make_sample
from vipllava.conversation.encode import ConversationEncoder
from vipllava.models.towers import CLIP
from vipllava.report.inspected import InspectedSample, ShownToken, inspect_trace
from vipllava.stream.image_transform import ImageTransform
from vipllava.stream.sample_encoder import SampleTrace
from vipllava.types import IGNORE_INDEX, Mention, Region, Turn, VisualPromptPlan
from vipllava.visual_prompts.shapes import prompt_words

TEMPLATES = [
    "plain",
    "plain/llama3",
    "llava_v1",
    "llava_v0",
    "llama_3",
    "phi_3",
    "phi_3/legacy",
    "chatml",
]
CONVERSATIONS = [
    "picture",
    "text_only",
    "picture_late",
    "non_latin",
    "blanks",
    "typed_marks",
]


def show(encoder: ConversationEncoder, turns: tuple[Turn, ...]) -> InspectedSample:
    """Show a conversation without its picture's pixels."""
    sample = make_sample(*(turn.text for turn in turns), size=None)
    trace = SampleTrace(
        sample, VisualPromptPlan((0, 0)), turns, encoder.encode(turns), image=None,
        pixel_values=None,
    )  # fmt: skip
    transform = ImageTransform(SIDE, "pad", CLIP.preprocessing)
    return inspect_trace(trace, encoder, transform, shard="a.tar", record_kind="regions")


def ends_of(encoder: ConversationEncoder) -> tuple[str, str]:
    """Return what the template puts before and after an answer."""
    return encoder.template.assistant_lead, encoder.template.assistant_end


def tokens_of(sample: InspectedSample) -> list[ShownToken]:
    return [token for stretch in sample.stretches for token in stretch.tokens]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_it_holds_every_id_once_and_supervised_is_what_the_assistant_says(
    encoders: dict[str, ConversationEncoder],
    conversations: dict[str, list[Turn]],
    template: str,
    conversation: str,
):
    encoder, turns = encoders[template], tuple(conversations[conversation])
    sample = show(encoder, turns)
    assert sample.fault == ""

    encoded = encoder.encode(turns)
    ids = [token_id for token in tokens_of(sample) for token_id in token.ids]
    assert ids == encoded.input_ids.tolist()
    assert sample.num_ids == len(ids)
    learned = np.repeat(
        [stretch.supervised for stretch in sample.stretches],
        [stretch.num_ids for stretch in sample.stretches],
    )
    np.testing.assert_array_equal(learned, encoded.labels != IGNORE_INDEX)

    lead, end = ends_of(encoder)
    said = "".join(stretch.text for stretch in sample.stretches if stretch.supervised)
    assert said == "".join(lead + turn.text + end for turn in turns[1::2])
    assert sample.num_image_ids == 3 * encoded.num_images


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_the_questions_are_told_from_the_template(
    encoders: dict[str, ConversationEncoder],
    conversations: dict[str, list[Turn]],
    template: str,
    conversation: str,
):
    turns = tuple(conversations[conversation])
    sample = show(encoders[template], turns)
    typed = [
        "".join(token.text for token in stretch.tokens if not token.from_template)
        for stretch in sample.stretches
        if not stretch.supervised
    ]
    typed = [text for text in typed if text.strip()]
    if template.startswith("plain"):
        assert typed == []
        return
    # The separator before a question may be one token with its first word or white space.
    assert [text.strip() for text in typed] == [turn.text.strip() for turn in turns[::2]]


def test_tokens_of_a_short_conversation(encoders: dict[str, ConversationEncoder]):
    turns = (Turn("user", "What 😀", has_image=True), Turn("assistant", "Yes."))
    given, learned = show(encoders["llava_v1"], turns).stretches

    opening, *rest = given.tokens
    assert opening == ShownToken("special", "<s>", (1,), from_template=True)
    at = next(i for i, token in enumerate(rest) if token.kind == "image")
    assert rest[at].ids == (5000, 5000, 5000)
    assert "".join(token.text for token in rest[:at]).endswith("human's questions. USER: ")
    shown = [(token.text, len(token.ids), token.from_template) for token in rest[at + 1 :]]
    assert shown[:2] == [("", 1, True), ("\n", 1, True)]  # dummy prefix, image suffix
    emoji = next(entry for entry in shown if "😀" in entry[0])
    assert emoji == ("😀", 4, False)  # four tokens of one byte
    assert shown[-1] == (" ASSISTANT:", 1, True)

    assert learned.supervised
    assert learned.text == " Yes.</s>"
    assert learned.tokens[-1] == ShownToken("special", "</s>", (2,))


@pytest.mark.parametrize("template", ["llava_v1", "llama_3", "phi_3/legacy"])
@pytest.mark.parametrize(
    "text",
    [
        "\ufffd",  # typed: not a sign of bytes that belong together
        "a\ufffd\ufffd😀\ufffd b",
        "犬と猫",
        "👩\u200d👩\u200d👧 مرحبا नमस्ते",
        "\x00\x07\u202e\u2028",
    ],
)
def test_characters_of_several_tokens_are_never_cut(
    encoders: dict[str, ConversationEncoder], template: str, text: str
):
    sample = show(encoders[template], (Turn("user", text), Turn("assistant", text)))
    lead, end = (
        encoders[template].template.assistant_lead,
        encoders[template].template.assistant_end,
    )
    (learned,) = (stretch for stretch in sample.stretches if stretch.supervised)
    assert learned.text == lead + text + end
    assert all(token.text.count("\ufffd") <= text.count("\ufffd") for token in learned.tokens)
    longest = max(len(token.text) for token in learned.tokens if token.kind == "text")
    assert longest <= 3  # one character each, or a little word


@pytest.mark.parametrize("template", ["llava_v1", "llama_3", "phi_3", "phi_3/legacy"])
@settings(max_examples=60, deadline=None)
@given(question=st.text(max_size=12), answer=st.text(max_size=12))
def test_any_text_is_shown_as_it_is_trained(
    encoders: dict[str, ConversationEncoder], template: str, question: str, answer: str
):
    sample = show(encoders[template], (Turn("user", question), Turn("assistant", answer)))
    lead, end = ends_of(encoders[template])
    assert sample.fault == ""
    assert "".join(s.text for s in sample.stretches if s.supervised) == lead + answer + end
    typed = [t.text for s in sample.stretches[:1] for t in s.tokens if not t.from_template]
    assert "".join(typed).strip() == question.strip()
    shown = "".join(token.text for token in tokens_of(sample))
    assert shown.count("\ufffd") == (question + answer).count("\ufffd")


def test_turns_beyond_the_limit_are_the_records(inspect: Inspect):
    texts = ("What is it?", "a dog.", "Sure?", "Yes.", "Is it red?", "No.")
    whole = inspect(make_sample(*texts))
    assert (whole.num_turns, whole.dropped) == (6, ())
    four = sum(stretch.num_ids for stretch in whole.stretches[:4])
    assert inspect(make_sample(*texts), max_length=four).num_turns == 4
    sample = inspect(make_sample(*texts), max_length=four - 1)
    assert sample.num_turns == 2
    assert sample.dropped == (
        Turn("user", "Sure?"),
        Turn("assistant", "Yes."),
        Turn("user", "Is it red?"),
        Turn("assistant", "No."),
    )
    assert [s.text for s in sample.stretches if s.supervised] == [" a dog.</s>"]
    assert sample.max_length == four - 1


def test_a_sample_that_is_cut_off(inspect: Inspect):
    texts = ("What is it?", "a dog.", "Sure?", "Yes.", "Is it red?", "No.")
    four = sum(stretch.num_ids for stretch in inspect(make_sample(*texts)).stretches[:4])
    sample = inspect(make_sample(*texts), max_length=four - 1, too_long="cut")
    assert (sample.num_turns, sample.num_ids, sample.is_cut) == (4, four - 1, True)
    assert [s.text for s in sample.stretches if s.supervised] == [" a dog.</s>", " Yes."]
    assert [turn.text for turn in sample.dropped] == ["Is it red?", "No."]
    two = sum(stretch.num_ids for stretch in sample.stretches[:2])
    asked = inspect(make_sample(*texts), max_length=two + 3, too_long="cut")  # USER: Sure | ?
    assert (asked.num_turns, asked.stretches[-1].text) == (3, "USER: Sure")
    assert inspect(make_sample(*texts)).is_cut is False


def test_the_picture_is_what_the_network_gets(inspect: Inspect):
    sample = inspect(make_sample("What is it?", "a dog."))
    assert sample.image is not None
    assert sample.image.size == (SIDE, SIDE)
    assert sample.stored_size == (100, 80)
    assert sample.image.getpixel((0, 0)) == (122, 116, 104)  # padded in CLIP's mean colour
    assert (sample.num_image_ids, sample.marks, sample.policy) == (3, (), "none")


def test_text_only(inspect: Inspect):
    sample = inspect(make_sample("Sure?", "Yes.", size=None))
    assert (sample.image, sample.stored_size, sample.num_image_ids) == (None, None, 0)
    assert (sample.key, sample.dataset, sample.shard) == ("set/7", "toys", "a.tar")


def test_a_mark(inspect: Inspect):
    asked = ("What is ", Mention(0), "?")
    sample = inspect(
        make_sample(asked, "a dog.", "Sure?", "Yes.", asked, "Yes.", boxes=[(20, 10, 60, 40)])
    )
    (mark,) = sample.marks
    assert prompt_words(mark.prompt) == "within the red rectangle"
    assert "What is within the red rectangle?" in sample.stretches[0].text
    assert (mark.prompt.region, mark.prompt.shape) == (0, "rectangle")
    assert (mark.prompt.rgb, mark.prompt.alpha) == ((255, 0, 0), 153)
    assert mark.region == Region((20, 10, 60, 40))
    assert mark.named_in == (1, 5)
    assert mark.fixed == ("shape", "colour", "width", "alpha")
    # 41 by 31 stored pixels; the padded picture of 100 pixels becomes one of 56.
    assert mark.input_size == pytest.approx((41 * 0.56, 31 * 0.56))


def test_a_mark_that_the_crop_takes_away(inspect: Inspect):
    asked = ("What is ", Mention(0), " and ", Mention(1), "?")
    boxes = [(2.0, 10.0, 20.0, 40.0), (110.0, 10.0, 200.0, 50.0)]
    sample = make_sample(asked, "a dog.", size=(300, 60), boxes=boxes, shape="mask")
    sample = replace(sample, fixed=(sample.fixed[0], replace(sample.fixed[1], colour="blue")))
    gone, cut = inspect(sample, aspect="square").marks
    assert gone.input_size is None
    assert cut.input_size is not None
    assert cut.input_size[0] == pytest.approx(56, abs=2)  # of 84 pixels


def test_labels_that_are_not_the_answers_are_reported(encoders: dict[str, ConversationEncoder]):
    encoder = encoders["llava_v1"]
    turns = (Turn("user", "Sure?"), Turn("assistant", "Yes."))
    encoded = encoder.encode(turns)
    labels = encoded.labels.copy()
    labels[5] = encoded.input_ids[5]
    trace = SampleTrace(
        make_sample("Sure?", "Yes.", size=None), VisualPromptPlan((0, 0)), turns,
        replace(encoded, labels=labels), image=None, pixel_values=None,
    )  # fmt: skip
    transform = ImageTransform(SIDE, "pad", CLIP.preprocessing)
    sample = inspect_trace(trace, encoder, transform, shard="a.tar", record_kind="regions")
    assert "1 positions outside the answers are supervised" in sample.fault
    assert [stretch.supervised for stretch in sample.stretches] == [False, True, False, True]
