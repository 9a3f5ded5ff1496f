"""Tiny random networks and a byte tokenizer, made once per session for all rooms."""

from __future__ import annotations

import functools
import gc
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads cost more than they bring where the networks are tiny, and tests run beside each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as what a script starts with `&` has it
    signal.signal(signal.SIGINT, signal.default_int_handler)
CTRL_C = signal.getsignal(signal.SIGINT)
CONF = Path(__file__).resolve().parents[1] / "conf"


def pytest_collection_finish() -> None:
    """Spare the garbage collector what the imports have made: each round takes 0.3 s else."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def ctrl_c_is_as_at_the_start() -> Iterator[None]:
    """What a test calls in this process may listen to Ctrl-C, and would go on to in later tests."""
    yield
    if signal.getsignal(signal.SIGINT) is not CTRL_C:
        signal.signal(signal.SIGINT, CTRL_C)
        if (file := signal.set_wakeup_fd(-1)) != -1:
            os.close(file)  # ends the thread that would end this process at a second one


@pytest.fixture(scope="session", autouse=True)
def what_is_composed_twice_is_remembered() -> Iterator[None]:
    """Composing a job takes Hydra 0.3 s, parsing some 25 files a quarter of it; a copy 5 ms.

    A job is remembered by its overrides if nothing but the project's own files is in it, and a file
    by its time and size. Of what checking a job takes, 40 % is parsing the same interpolations.
    """
    import omegaconf.base
    from hydra.core.plugins import Plugins

    Plugins.instance()  # which executes the module of its file source anew
    from hydra._internal.core_plugins.file_config_source import FileConfigSource
    from hydra._internal.hydra import Hydra

    own = {"pkg://hydra.conf", "structured://", str(CONF)}
    compose, load = Hydra.compose_config, FileConfigSource.load_config
    pickled: dict[str, bytes] = {}

    def remember(key: str, make: Callable[[], Any]) -> Any:
        if key not in pickled:
            pickled[key] = pickle.dumps(make())
        return pickle.loads(pickled[key])

    def compose_once(self: Hydra, **given: Any) -> Any:
        def make() -> Any:
            return compose(self, **given)

        found = self.config_loader.get_search_path().get_path()
        if not {element.path for element in found} <= own:
            return make()
        return remember(repr(sorted(given.items())), make)

    def load_once(self: FileConfigSource, config_path: str) -> Any:
        def make() -> Any:
            return load(self, config_path)

        path = Path(self.path, self._normalize_file_name(config_path))
        if not path.is_file():
            return make()
        facts = path.stat()
        return remember(repr((self.provider, path, facts.st_mtime_ns, facts.st_size)), make)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hydra, "compose_config", compose_once)
        patch.setattr(FileConfigSource, "load_config", load_once)
        patch.setattr(omegaconf.base, "parse", functools.cache(omegaconf.base.parse))
        yield


@dataclass(frozen=True)
class TinySources:
    """Folders as a user would have them, and what is in them.

    The tower: 28 pixels, patches of 14, so 4 patches; width 32, 3 blocks. The language models:
    width 32, 2 blocks. The tokenizer: one id per byte and ``<unk>`` 0, ``<s>`` 1, ``</s>`` 2, so
    259 ids; ``<image>`` becomes 259 and ``<pad>`` 260, in 320 rows. ``rows_of_64`` is as wide as
    bitsandbytes needs for 4 bits on a CPU.
    """

    vision_tower: str
    clip: str
    language_model: str
    tied_language_model: str
    phi3: str
    mistral: str
    qwen2: str
    rows_of_64: str


@pytest.fixture(scope="session")
def tiny_sources(tmp_path_factory: pytest.TempPathFactory) -> TinySources:
    """Random CLIP towers and language models, saved as transformers saves them."""
    import torch
    from transformers import (
        CLIPConfig,
        CLIPModel,
        CLIPTextConfig,
        CLIPVisionConfig,
        CLIPVisionModel,
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Phi3Config,
        Phi3ForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("tiny_sources")
    tokenizer = byte_tokenizer()
    tower = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    text = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "initializer_range": 0.2,
    }
    clip_text = CLIPTextConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    # num_key_value_heads=2: grouped-query attention, as in Llama-3.
    models = {
        "vision_tower": lambda: CLIPVisionModel(tower),
        "clip": lambda: CLIPModel(
            CLIPConfig(text_config=clip_text.to_dict(), vision_config=tower.to_dict())
        ),
        "language_model": lambda: LlamaForCausalLM(LlamaConfig(**text, num_key_value_heads=2)),
        "tied_language_model": lambda: LlamaForCausalLM(
            LlamaConfig(**text, num_key_value_heads=2, tie_word_embeddings=True)
        ),
        "phi3": lambda: Phi3ForCausalLM(Phi3Config(**text)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**text, num_key_value_heads=2)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**text, num_key_value_heads=2)),
        "rows_of_64": lambda: LlamaForCausalLM(
            LlamaConfig(**text | {"hidden_size": 64, "intermediate_size": 128})
        ),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, make in models.items():
            make().save_pretrained(root / name)
            if name not in ("vision_tower", "clip"):
                tokenizer.save_pretrained(root / name)
    return TinySources(**{name: str(root / name) for name in models})


def byte_tokenizer():
    """A tokenizer of 259 ids that adds BOS: specials first, then one id per byte."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*specials, *letters])}
    backend = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in specials])
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
