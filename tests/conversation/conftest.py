"""Tiny tokenizers with vocabularies written out here, one for each family the encoder meets.

Merges are chains from left to right over a list of words, in order of rank, so the ids are known
to the last digit and do not depend on a trainer.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from vipllava.conversation import ConversationEncoder
from vipllava.types import IGNORE_INDEX, Turn

IMAGE_SEQ_LENGTH = 3
IMAGE_TOKEN_ID = 5000

_WORDS = """
    chat between curious human and an artificial intelligence assistant. The assistant gives
    helpful, detailed, polite answers to the human's questions. are able understand visual
    content that user provides, assist with variety of tasks using natural language. language
    vision helpful provides detailed assistant questions answers What is it a dog cat cat. dog.
    red Sure Yes Yes. No No.
"""

_GPT_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _bpe(vocab: list[str], words: list[str], **options: bool) -> BPE:
    """Grow ``vocab`` by the merges that build ``words``; earlier words have the better rank."""
    known = set(vocab)
    merges: list[tuple[str, str]] = []
    for word in words:
        left = word[0]
        for char in word[1:]:
            if left + char not in known:
                merges.append((left, char))
                known.add(left + char)
                vocab.append(left + char)
            left += char
    return BPE(vocab={token: i for i, token in enumerate(vocab)}, merges=merges, **options)


def _llama_model() -> BPE:
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    vocab += [chr(code) for code in range(0x21, 0x7F)]
    words = ["▁▁", "▁USER:", "▁ASSISTANT:", "▁A", "▁You"]
    words += [f"▁{word}" for word in _WORDS.split()]
    words += ["USER", "Human", "Assistant", "##", '"#']
    return _bpe(vocab, words, byte_fallback=True, fuse_unk=True)


def _llama_decoder() -> decoders.Decoder:
    return decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )


def _adds_bos(backend: Tokenizer, bos: str) -> None:
    backend.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )


@pytest.fixture(scope="session")
def llama_like() -> PreTrainedTokenizerFast:
    """Metaspace with a dummy prefix at the start only, byte fallback, BOS added (Vicuna)."""
    backend = Tokenizer(_llama_model())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = _llama_decoder()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    _adds_bos(backend, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _phi3(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.decoder = _llama_decoder()
    backend.add_special_tokens(["<unk>", "<s>"])
    marks = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")
    # As in Phi-3's own file: </s> is an added token, but not a special one.
    backend.add_tokens([AddedToken("</s>", rstrip=True)])
    backend.add_special_tokens([AddedToken(mark, rstrip=True) for mark in marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def phi3_like() -> PreTrainedTokenizerFast:
    """Phi-3: its added tokens swallow the white space behind them; no BOS added."""
    backend = Tokenizer(_llama_model())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _phi3(backend)


@pytest.fixture(scope="session")
def phi3_legacy_like() -> PreTrainedTokenizerFast:
    """The same from an old tokenizer.json: the prefix comes from a normalizer, everywhere."""
    backend = Tokenizer(_llama_model())
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return _phi3(backend)


def _byte_level(specials: list[str]) -> Tokenizer:
    vocab = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["ĊĊ", "ĠUSER", "ĠASSISTANT", "ĠA", "ĠYou", ".Ċ", "system", "user"]
    words += [f"Ġ{word}" for word in _WORDS.split()]
    words += ["What", "Yes", "No", "Sure", "You", "assistant", "ĠĠ"]
    backend = Tokenizer(_bpe(vocab, words))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_GPT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    return backend


@pytest.fixture(scope="session")
def llama3_like() -> PreTrainedTokenizerFast:
    """Byte-level, Llama-3's way of splitting, BOS added although its template spells it."""
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>"]
    backend = _byte_level([*specials, "<|end_header_id|>", "<|eot_id|>"])
    _adds_bos(backend, "<|begin_of_text|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )


@pytest.fixture(scope="session")
def smol_like() -> PreTrainedTokenizerFast:
    """Byte-level for chatml, no BOS added, ``<|im_start|>`` is BOS by name (SmolLM2)."""
    backend = _byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )


# The last three hold what makes ids hard: letters outside the vocabulary, blanks at the ends, and
# every template's own strings typed by a person.
_CONVERSATIONS = {
    "picture": ["<image>What is it?", "a dog.", "Sure?", "Yes."],
    "text_only": ["Sure?", "No."],
    "picture_late": ["Sure?", "Yes.", "<image>What is it?", "a dog."],
    "picture_only": ["<image>", "a dog."],
    "non_latin": ["<image>这 é?", "Ça 犬 😀."],
    "blanks": ["<image> What is it?  ", "\na dog. \n", "\n\nSure? \n", "  Yes."],
    "typed_marks": [
        'USER: ASSISTANT: <image> </s> "###',
        "<s></s>###Human:",
        "<|eot_id|><|end|>\n<|im_end|>",
        "<|user|> a dog.",
    ],
}


def _turns(texts: list[str]) -> list[Turn]:
    turns: list[Turn] = []
    for index, text in enumerate(texts):
        has_image = text.startswith("<image>")
        role = "assistant" if index % 2 else "user"
        turns.append(Turn(role, text.removeprefix("<image>"), has_image))
    return turns


@pytest.fixture(scope="session")
def conversations() -> dict[str, list[Turn]]:
    """The conversations whose ids are written out in the tests, by name."""
    return {name: _turns(texts) for name, texts in _CONVERSATIONS.items()}


@pytest.fixture(scope="session")
def turns(conversations: dict[str, list[Turn]]) -> list[Turn]:
    """Two questions about a picture."""
    return conversations["picture"]


@pytest.fixture(scope="session")
def parse_ids() -> Callable[[str], tuple[list[int], list[int]]]:
    """Read ids written out in a test: ``1 2 [3 4] 5``, where brackets enclose what is supervised.

    Returns ids and labels.
    """

    def parse(written: str) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        supervised = False
        for word in written.replace("[", " [ ").replace("]", " ] ").split():
            if word in "[]":
                supervised = word == "["
                continue
            ids.append(int(word))
            labels.append(int(word) if supervised else IGNORE_INDEX)
        return ids, labels

    return parse


@pytest.fixture(scope="session")
def encoders(
    llama_like: PreTrainedTokenizerFast,
    llama3_like: PreTrainedTokenizerFast,
    phi3_like: PreTrainedTokenizerFast,
    phi3_legacy_like: PreTrainedTokenizerFast,
    smol_like: PreTrainedTokenizerFast,
) -> dict[str, ConversationEncoder]:
    """An encoder for every template, by ``template`` or ``template/tokenizer``."""
    pairs = {
        "plain": llama_like,
        "plain/llama3": llama3_like,
        "llava_v1": llama_like,
        "llava_v0": llama_like,
        "llama_3": llama3_like,
        "phi_3": phi3_like,
        "phi_3/legacy": phi3_legacy_like,
        "chatml": smol_like,
    }
    return {
        name: ConversationEncoder(
            tokenizer, name.split("/")[0], IMAGE_TOKEN_ID, IMAGE_SEQ_LENGTH, max_length=2048
        )
        for name, tokenizer in pairs.items()
    }
