"""Forced boundaries, typed special tokens, BOS, truncation, and what is refused."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from vipllava.conversation import ConversationEncoder, get_template, prove_labels
from vipllava.types import ConfigError, RecordError, Turn

IMAGE = 5000
ROLE_IDS = {"llava_v1": [369], "llava_v0": [596, 262, 595, 285]}

Encoders = dict[str, ConversationEncoder]


def released_ids(encoder: ConversationEncoder, turns: list[Turn]) -> list[int]:
    """Encode as the released code does: one string, cut at the picture, each side by itself."""
    tokenizer, template = encoder.tokenizer, encoder.template
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    ids: list[int] = []
    if not template.bos:
        ids += tokenizer("")["input_ids"]
    for index, part in enumerate(template.render(turns).split("<image>")):
        ids += [IMAGE] * 3 if index else []
        ids += tokenizer(part, add_special_tokens=False)["input_ids"]
    return ids


def pair(question: str, answer: str, has_image: bool = False) -> list[Turn]:
    return [Turn("user", question, has_image), Turn("assistant", answer)]


@pytest.mark.parametrize("conversation", ["picture", "text_only", "picture_late"])
@pytest.mark.parametrize("name", ["llava_v1", "llava_v0", "llama_3", "phi_3", "chatml"])
def test_plain_texts_get_the_released_ids(
    encoders: Encoders, conversations: dict[str, list[Turn]], name: str, conversation: str
) -> None:
    turns = conversations[conversation]
    assert encoders[name].encode(turns).input_ids.tolist() == released_ids(encoders[name], turns)


@pytest.mark.parametrize("name", ["plain", "plain/llama3", "phi_3/legacy"])
def test_released_ids_of_a_caption(encoders: Encoders, turns: list[Turn], name: str) -> None:
    encoder = encoders[name]
    assert encoder.encode(turns[:2]).input_ids.tolist() == released_ids(encoder, turns[:2])


@pytest.mark.parametrize("name", ["llava_v1", "llava_v0"])
@pytest.mark.parametrize("question", ["Sure?", "Sure? ", "Sure?   ", "", ' "', " #", "#", "\n"])
def test_role_strings_have_the_same_ids_after_any_text(
    encoders: Encoders, name: str, question: str
) -> None:
    prompt = encoders[name].encode_generation_prompt([Turn("user", question)]).tolist()
    assert prompt[-len(ROLE_IDS[name]) :] == ROLE_IDS[name]


def test_the_released_way_would_change_the_role_string(encoders: Encoders) -> None:
    """The reason for forced boundaries: two blanks are one token and take the role's space."""
    turns = pair("Sure? ", "Yes.")
    ids = released_ids(encoders["llava_v1"], turns)
    assert 369 not in ids
    assert 369 in encoders["llava_v1"].encode(turns).input_ids


def test_an_answer_that_starts_with_a_newline_keeps_its_prompt(encoders: Encoders) -> None:
    """Behind Llama-3's two newlines a third would merge with them in one string."""
    encoder = encoders["llama_3"]
    prompt = encoder.encode_generation_prompt([Turn("user", "Sure?")]).tolist()
    assert prompt[-3:] == [508, 513, 256]
    assert encoder.encode(pair("Sure?", "\nYes.")).input_ids.tolist() == [
        *prompt, *[198, 494, 13, 514],
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["llava_v1", "llava_v0", "llama_3", "phi_3", "chatml", "plain"])
def test_typed_special_tokens_stay_text(encoders: Encoders, name: str) -> None:
    encoder = encoders[name]
    tokenizer = encoder.tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    special_ids = [*tokenizer.get_added_vocab().values(), IMAGE]
    typed = " ".join(tokenizer.get_added_vocab()) + "<image>"

    def num_special(text: str) -> int:
        ids = encoder.encode([*pair(text, text, has_image=True), *pair(text, text)]).input_ids
        return sum(int(token_id) in special_ids for token_id in ids)

    assert num_special(typed) == num_special("a dog.")


def test_the_tokenizer_is_left_as_it_was(llama_like: PreTrainedTokenizerFast) -> None:
    before = llama_like.backend_tokenizer.to_str()
    encoder = ConversationEncoder(llama_like, "llava_v1", IMAGE, 3, 2048)
    encoder.encode(pair("Sure? </s>", "Yes."))
    assert llama_like.backend_tokenizer.to_str() == before


def test_what_a_tokenizer_was_last_used_for_does_not_matter(
    llama_like: PreTrainedTokenizerFast, encoders: Encoders, turns: list[Turn]
) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(llama_like.backend_tokenizer.to_str()),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        split_special_tokens=True,
    )
    tokenizer("a dog.", padding="max_length", truncation=True, max_length=2)
    encoder = ConversationEncoder(tokenizer, "llava_v1", IMAGE, 3, 2048)
    expected = encoders["llava_v1"].encode(turns).input_ids
    assert encoder.encode(turns).input_ids.tolist() == expected.tolist()
    assert tokenizer.backend_tokenizer.truncation is not None
    assert tokenizer.backend_tokenizer.encode_special_tokens


class TestBos:
    def test_a_template_that_spells_it_and_a_tokenizer_that_adds_it_make_one(
        self, encoders: Encoders, turns: list[Turn]
    ) -> None:
        ids = encoders["llama_3"].encode(turns).input_ids.tolist()
        assert ids[:2] == [510, 512]
        assert ids.count(510) == 1

    def test_it_is_spelt_where_the_tokenizer_adds_none(
        self, llama3_like: PreTrainedTokenizerFast, encoders: Encoders, turns: list[Turn]
    ) -> None:
        backend = Tokenizer.from_str(llama3_like.backend_tokenizer.to_str())
        backend.post_processor = TemplateProcessing(single="$A", special_tokens=[])
        silent = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
        )
        assert silent("a")["input_ids"] == [64]
        ids = ConversationEncoder(silent, "llama_3", IMAGE, 3, 2048).encode(turns).input_ids
        assert ids.tolist() == encoders["llama_3"].encode(turns).input_ids.tolist()
        plain = ConversationEncoder(silent, "plain", IMAGE, 3, 2048).encode(turns).input_ids
        assert plain.tolist() == [IMAGE, IMAGE, IMAGE, 64, 472, 273, 494, 273]

    def test_a_bos_that_opens_the_template_is_not_doubled(
        self, smol_like: PreTrainedTokenizerFast, encoders: Encoders, turns: list[Turn]
    ) -> None:
        adding = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(smol_like.backend_tokenizer.to_str()),
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            add_bos_token=True,
        )
        assert adding("a")["input_ids"] == [511, 64]
        ids = ConversationEncoder(adding, "chatml", IMAGE, 3, 2048).encode(turns).input_ids
        assert ids.tolist() == encoders["chatml"].encode(turns).input_ids.tolist()

    def test_an_added_eos_is_left_out(
        self, llama_like: PreTrainedTokenizerFast, encoders: Encoders, turns: list[Turn]
    ) -> None:
        adding = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(llama_like.backend_tokenizer.to_str()),
            bos_token="<s>",
            eos_token="</s>",
            add_bos_token=True,
            add_eos_token=True,
        )
        assert adding("?")["input_ids"][-1] == 2
        ids = ConversationEncoder(adding, "llava_v1", IMAGE, 3, 2048).encode(turns).input_ids
        assert ids.tolist() == encoders["llava_v1"].encode(turns).input_ids.tolist()


class TestStops:
    def test_tokens(self, encoders: Encoders) -> None:
        assert encoders["llava_v1"].stop_token_ids == (2,)
        assert encoders["llama_3"].stop_token_ids == (511, 514)
        assert encoders["phi_3"].stop_token_ids == (598, 601)
        assert encoders["chatml"].stop_token_ids == (512,)

    def test_strings(self, encoders: Encoders) -> None:
        assert encoders["llava_v1"].stop_strings == ()
        assert encoders["llava_v0"].stop_strings == ("###",)

    @pytest.mark.parametrize(
        "name", ["plain", "llava_v1", "llava_v0", "llama_3", "phi_3", "phi_3/legacy", "chatml"]
    )
    @pytest.mark.parametrize("answer", ["a dog.", "a cat and 犬", "(1) a: b"])
    def test_a_generated_answer_comes_back(
        self, encoders: Encoders, name: str, answer: str
    ) -> None:
        encoder = encoders[name]
        turns = pair("What is it?", answer, has_image=True)
        generated = encoder.encode(turns).input_ids[
            len(encoder.encode_generation_prompt(turns[:1])) :
        ]
        assert encoder.decode_answer(generated) == answer
        assert encoder.decode_answer([*generated.tolist(), 70, 70]) == answer


class TestTruncation:
    def test_whole_pairs_are_dropped(
        self, llama_like: PreTrainedTokenizerFast, turns: list[Turn]
    ) -> None:
        # Written out in test_encode_ids: 42 ids with one pair, 49 with two.
        whole = ConversationEncoder(llama_like, "llava_v1", IMAGE, 3, max_length=49)
        assert len(whole.encode(turns).input_ids) == 49
        assert whole.encode(turns).num_dropped_turns == 0

        short = ConversationEncoder(llama_like, "llava_v1", IMAGE, 3, max_length=48).encode(turns)
        assert short.num_dropped_turns == 2
        assert short.num_images == 1
        assert short.input_ids.tolist() == whole.encode(turns[:2]).input_ids.tolist()
        assert short.labels.tolist() == whole.encode(turns[:2]).labels.tolist()
        assert len(short.input_ids) == 42

    @pytest.mark.parametrize("max_length", [2, 3, 30, 41])
    def test_a_first_pair_that_does_not_fit_is_an_error(
        self, llama_like: PreTrainedTokenizerFast, turns: list[Turn], max_length: int
    ) -> None:
        encoder = ConversationEncoder(llama_like, "llava_v1", IMAGE, 3, max_length)
        with pytest.raises(RecordError) as error:
            encoder.encode(turns, "shard-000000/0017")
        assert str(error.value) == (
            "sample 'shard-000000/0017': its first question and answer need 42 ids (3 of the "
            "picture, 7 of the question, 2 of the answer, 30 of template 'llava_v1') and "
            f"max_length={max_length}; raise max_length, shorten the record, leave it out or pass "
            "too_long=cut"
        )

    def test_what_follows_the_last_answer_counts(self, smol_like: PreTrainedTokenizerFast) -> None:
        turns = pair("Sure?", "Yes.")
        length = len(
            ConversationEncoder(smol_like, "chatml", IMAGE, 3, 2048).encode(turns).input_ids
        )
        fits = ConversationEncoder(smol_like, "chatml", IMAGE, 3, length)
        assert len(fits.encode(turns).input_ids) == length
        with pytest.raises(RecordError, match="first question and answer need 60 ids"):
            ConversationEncoder(smol_like, "chatml", IMAGE, 3, length - 1).encode(turns)

    def test_a_later_picture_is_not_dropped(
        self, llama_like: PreTrainedTokenizerFast, conversations: dict[str, list[Turn]]
    ) -> None:
        encoder = ConversationEncoder(llama_like, "llava_v1", IMAGE, 3, max_length=40)
        with pytest.raises(
            RecordError,
            match=r"'k': the picture stands in a turn that does not fit into max_length=40 "
            r"\(turns 1 to 4 of 4 need 49 ids\)",
        ):
            encoder.encode(conversations["picture_late"], "k")

    def test_a_prompt_is_never_cut(self, llama_like: PreTrainedTokenizerFast) -> None:
        short = ConversationEncoder(llama_like, "llava_v1", IMAGE, 3, max_length=2)
        assert len(short.encode_generation_prompt([Turn("user", "Sure?", has_image=True)])) == 37


class TestRefusals:
    @pytest.mark.parametrize(
        ("roles", "named"),
        [
            ([], "none"),
            (["user"], "user"),
            (["assistant", "user"], "assistant, user"),
            (["user", "user", "assistant"], "user, user, assistant"),
            (["user", "assistant", "user"], "user, assistant, user"),
        ],
    )
    def test_roles(self, encoders: Encoders, roles: list[str], named: str) -> None:
        turns = [Turn(role, "a") for role in roles]  # type: ignore[arg-type]
        with pytest.raises(RecordError) as error:
            encoders["llava_v1"].encode(turns, "k")
        assert str(error.value) == (
            f"sample 'k': the roles are {named}; they must alternate, user first and assistant last"
        )

    def test_a_prompt_ends_with_a_user_turn(self, encoders: Encoders, turns: list[Turn]) -> None:
        with pytest.raises(RecordError, match="user first and user last"):
            encoders["llava_v1"].encode_generation_prompt(turns)

    def test_two_pictures(self, encoders: Encoders) -> None:
        turns = [*pair("a", "b", has_image=True), *pair("a", "b", has_image=True)]
        with pytest.raises(RecordError, match=r"turns \[1, 3\] each have a picture; one may"):
            encoders["llava_v1"].encode(turns, "k")

    def test_a_picture_in_an_answer(self, encoders: Encoders) -> None:
        turns = [Turn("user", "a"), Turn("assistant", "b", has_image=True)]
        with pytest.raises(RecordError, match="the picture stands before turn 2, an assistant's"):
            encoders["llava_v1"].encode(turns, "k")

    def test_half_a_surrogate_pair(self, encoders: Encoders) -> None:
        with pytest.raises(
            RecordError, match="sample 'k': text of turn 2: it holds half of a surrogate"
        ):
            encoders["llava_v1"].encode(pair("a", "\ud83d"), "k")

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"max_length": 1}, "max_length=1 must be at least 2"),
            ({"image_seq_length": 0}, "image_seq_length=0 must be at least 1"),
            ({"image_token_id": -200}, "image_token_id=-200 must be at least 0"),
            ({"image_token_id": 265}, "image_token_id=265 is the ordinary token '&'"),
            ({"template": "nope"}, "unknown chat template 'nope'"),
            (
                {"template": "llama_3"},
                r"'llama_3' needs the special token '<\|begin_of_text\|>', which this tokenizer "
                r"lacks \(it has: </s>, <s>, <unk>\)",
            ),
        ],
    )
    def test_arguments(
        self, llama_like: PreTrainedTokenizerFast, changed: dict[str, object], message: str
    ) -> None:
        arguments: dict[str, object] = {
            "template": "llava_v1",
            "image_token_id": IMAGE,
            "image_seq_length": 3,
            "max_length": 2048,
        }
        with pytest.raises(ConfigError, match=message):
            ConversationEncoder(llama_like, **(arguments | changed))  # type: ignore[arg-type]

    def test_a_slow_tokenizer(self) -> None:
        slow = SimpleNamespace(eos_token_id=2)
        with pytest.raises(ConfigError, match="SimpleNamespace is not backed by the tokenizers"):
            ConversationEncoder(slow, "plain", IMAGE, 3, 2048)  # type: ignore[arg-type]

    def test_a_tokenizer_that_writes_a_special_token_from_text(self) -> None:
        vocab = {"<": 0, "e": 1, ">": 2, "<e": 3, "<e>": 4, "a": 5}
        backend = Tokenizer(BPE(vocab=vocab, merges=[("<", "e"), ("<e", ">")]))
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens(["<e>"])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
        with pytest.raises(ConfigError, match="typed text '<e>' becomes the special token 4"):
            ConversationEncoder(tokenizer, "plain", IMAGE, 3, 2048)

    def test_a_tokenizer_that_writes_blanks_of_its_own(self) -> None:
        backend = Tokenizer(WordPiece(vocab={"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.decoder = decoders.WordPiece()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
        with pytest.raises(ConfigError, match="writes 'aa', encoded in two pieces, as 'a a'"):
            ConversationEncoder(tokenizer, "plain", IMAGE, 3, 2048)


def test_a_worker_rebuilds_the_encoder(encoders: Encoders, turns: list[Turn]) -> None:
    encoder = encoders["llava_v1"]
    again: ConversationEncoder = pickle.loads(pickle.dumps(encoder))
    assert again.template is not encoder.template
    assert again.template == get_template("llava_v1")
    assert again.encode(turns).input_ids.tolist() == encoder.encode(turns).input_ids.tolist()


def test_an_added_image_token_is_used(
    llama_like: PreTrainedTokenizerFast,
) -> None:
    """The exported tokenizer has ``<image>`` as an added token; typed, it is text all the same."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(llama_like.backend_tokenizer.to_str()),
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.add_tokens("<image>", special_tokens=True)
    image_token_id = tokenizer.get_added_vocab()["<image>"]
    encoder = ConversationEncoder(tokenizer, "plain", image_token_id, 3, 2048)
    encoded = encoder.encode(pair("", "<image>", has_image=True))
    assert encoded.input_ids.tolist() == [
        1, 598, 598, 598, 259, 287, 332, 336, 324, 330, 328, 289, 13,
    ]  # fmt: skip
    prove_labels(encoder, pair("", "<image>", has_image=True), encoded)
