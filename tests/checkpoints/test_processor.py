"""What an export's processor gives against our encoder, by template and kind of tokenizer."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import yaml
from transformers import AutoProcessor, AutoTokenizer

from tests import tiny_model
from tests.conversation.conftest import (  # noqa: F401
    llama3_like,
    llama_like,
    phi3_legacy_like,
    phi3_like,
    smol_like,
)
from tests.tiny_model import tiny_spec
from vipllava.checkpoints.export_meta import load_meta
from vipllava.checkpoints.hf_format import save_export
from vipllava.checkpoints.loading import build_model, load_tokenizer
from vipllava.checkpoints.model_card import model_card
from vipllava.checkpoints.processor import (
    IdAgreement,
    build_processor,
    compare_ids,
    processor_ids,
)
from vipllava.conversation import ConversationEncoder
from vipllava.conversation.templates import get_template, jinja_template
from vipllava.models.building import add_tokens
from vipllava.models.hub_models import load_config
from vipllava.types import Turn

META = replace(
    tiny_model.META,
    feature_layers=(-1,),
    vision_tower="openai/clip-vit-large-patch14-336",
    language_model="lmsys/vicuna-7b-v1.5",
)
ALL = {
    "a question about a picture",
    "a question without a picture",
    "a second question",
    "a picture in the second question",
    "a whole conversation",
}


def _processor(tokenizer, template: str):
    tokenizer = add_tokens(deepcopy(tokenizer))
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    vision = SimpleNamespace(model_type="clip_vision_model", patch_size=14)
    config = SimpleNamespace(image_token_id=image_id, vision_config=vision)
    meta = replace(META, chat_template=template)
    processor, agreement = build_processor(tokenizer, config, meta)
    return processor, agreement, ConversationEncoder(tokenizer, template, image_id, 4, 4096)


@pytest.mark.parametrize(
    ("template", "tokenizer"),
    [
        ("plain", "llama3_like"),
        ("llava_v1", "llama_like"),
        ("llava_v0", "llama_like"),
        ("llama_3", "llama3_like"),
        ("phi_3", "phi3_like"),
        ("phi_3", "phi3_legacy_like"),
        ("chatml", "smol_like"),
    ],
)
def test_the_processor_gives_the_ids_of_training(template, tokenizer, request):
    processor, agreement, encoder = _processor(request.getfixturevalue(tokenizer), template)

    assert (set(agreement.equal), agreement.different) == (ALL, {})
    question = Turn("user", "What is it?", has_image=True)
    expected = encoder.encode_generation_prompt([question]).tolist()
    assert processor_ids(processor, [question]) == expected
    alone = Turn("user", "", has_image=True)
    assert processor_ids(processor, [alone]) == encoder.encode_generation_prompt([alone]).tolist()


def test_a_caption_prompt_of_llama_keeps_one_space_more(llama_like):  # noqa: F811
    """Stage 1 begins a caption with a new word; a prompt that ends with the picture cannot."""
    processor, agreement, encoder = _processor(llama_like, "plain")
    question = Turn("user", "Describe it.", has_image=True)
    space = llama_like.convert_tokens_to_ids("▁")

    ours = encoder.encode_generation_prompt([question]).tolist()
    assert processor_ids(processor, [question]) == [*ours, space]
    assert set(agreement.different) == {
        "a question about a picture",
        "a picture in the second question",
    }
    whole = [question, Turn("assistant", "a dog.")]
    theirs = processor_ids(processor, whole, add_generation_prompt=False)
    assert theirs == encoder.encode(whole).input_ids.tolist()


def test_without_the_chosen_spelling_vicuna_would_lack_a_space(llama_like):  # noqa: F811
    processor, _, encoder = _processor(llama_like, "llava_v1")
    processor.chat_template = jinja_template(get_template("llava_v1"), bos="<s>")
    places = compare_ids(processor, encoder).different

    assert set(places) == ALL  # "A" is no new word behind a spelled <s>, "\n" none behind a picture
    processor.chat_template = jinja_template(get_template("llava_v1"), bos="<s> ")
    assert set(compare_ids(processor, encoder).different) == ALL - {"a question without a picture"}


def test_special_tokens_that_a_user_types_are_tokens_to_a_processor(llama3_like):  # noqa: F811
    """The one difference that stays; the card says so."""
    processor, _, encoder = _processor(llama3_like, "llama_3")
    turns = [Turn("user", "What does <|eot_id|> mean?")]
    end = llama3_like.convert_tokens_to_ids("<|eot_id|>")

    assert encoder.encode_generation_prompt(turns).tolist().count(end) == 2
    assert processor_ids(processor, turns).count(end) == 3


def test_the_tokenizer_alone_begins_a_chat_the_same_way(llama_like):  # noqa: F811
    processor, _, encoder = _processor(llama_like, "llava_v1")
    chat = [{"role": "user", "content": "Sure?"}]
    batch = processor.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    expected = encoder.encode_generation_prompt([Turn("user", "Sure?")]).tolist()
    assert batch["input_ids"] == expected
    assert expected[0] == llama_like.bos_token_id


@pytest.fixture(scope="module")
def export(tiny_sources, tmp_path_factory):
    spec = tiny_spec(tiny_sources)
    tokenizer = load_tokenizer(spec)
    meta = replace(
        META,
        feature_layers=(-1, -2, 1),
        data=("mine: my own licence",),
        visual_prompts={"ranges": {"anchor": 336}},
        code="0.1.0 (abc)",
    )
    return save_export(
        build_model(spec, tokenizer), tokenizer, tmp_path_factory.mktemp("x") / "export", meta
    )


def test_transformers_alone_reads_the_template(export):
    processor = AutoProcessor.from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(export)

    assert (export / "chat_template.jinja").is_file()
    assert processor.chat_template == tokenizer.chat_template
    encoder = ConversationEncoder(tokenizer, "llava_v1", 259, 4, 4096)
    assert compare_ids(processor, encoder).different == {}


def test_the_card_says_where_it_comes_from(export):
    card = (export / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])

    assert front["license"] == "other"
    assert front["base_model"] == [META.language_model, META.vision_tower]
    for text in (
        "lmsys/vicuna-7b-v1.5: Llama 2 Community License",
        "data mine: my own licence",
        "| Stage | finetune |",
        "vipllava-lightning 0.1.0 (abc)",
        "28 x 28 pixels, padded to a square",
        "human's questions. USER: <image>\nWhat is within the red box? ASSISTANT: A dog.</s>",
        "gives the ids of training",
        "anchor: 336",
    ):
        assert text in card, text


def test_the_card_names_no_folder_of_the_machine(export):
    meta = replace(load_meta(export), language_model="/home/me/models/llm")
    card = model_card(meta, "hf", load_config(str(export), "checkpoint"))
    assert "/home/me" not in card
    assert "`llm` (a local folder)" in card
    assert "not known to the program" in card


def test_what_differs_is_in_the_card(export):
    config = load_config(str(export), "checkpoint")
    agreement = IdAgreement(("a",), {"b": "6 ids instead of 5"})
    card = model_card(load_meta(export), "hf", config, agreement)
    assert "- b: 6 ids instead of 5" in card
