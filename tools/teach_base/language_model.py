"""Teach the tiny language model the sample world's language, from text alone.

Pictures are replaced by words: a scene is spelt out object by object, marks included, and the
conversation about it follows. So the base knows names, answers, templates, and how to look up
"within the red rectangle" in what it has read; connecting that to pixels is the recipe's work.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vipllava.conversation.encode import ConversationEncoder
from vipllava.conversation.templates import get_template
from vipllava.keyed_random import generator_for
from vipllava.records import parse_record
from vipllava.sample_world.build import make_record
from vipllava.sample_world.records import FINETUNE_MIX, GPT4V_MIX, Record, RegionRecord, caption
from vipllava.sample_world.scenes import Scene, compose_scene, sample_kinds
from vipllava.types import IGNORE_INDEX, Region, Sample, Turn
from vipllava.visual_prompts.policies import VisualPromptPolicy, get_policy
from vipllava.visual_prompts.sampling import sample_plan
from vipllava.visual_prompts.shapes import PALETTE, SHAPES, prompt_words, refer_turns, shape_words

_LOG = logging.getLogger(__name__)

LARGEST_VOCABULARY = 1024
CHAT_TEMPLATE = "llava_v1"
_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
_MAX_LENGTH = 512
_CAPTION_SHARE = 0.15
_QUESTION_WEIGHT = 0.05
_NUM_SCENES = 400
"""Layouts are cheap to word in many ways; composing their pictures is what costs."""


def language_config(vocabulary_size: int) -> LlamaConfig:
    """Return the tiny Llama's configuration."""
    return LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train a BPE tokenizer of Llama's kind: dummy prefix space, byte fallback, BOS added.

    Digits and punctuation stand alone, so that an answer is the same token wherever it occurs.
    """
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first"),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=LARGEST_VOCABULARY,
        special_tokens=[*_SPECIAL_TOKENS, *byte_tokens],
        limit_alphabet=200,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return _as_transformers(backend)


def _as_transformers(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """Unmark the byte tokens as special (training adds them so) and wrap the tokenizer."""
    state = json.loads(backend.to_str())
    state["added_tokens"] = [
        token for token in state["added_tokens"] if token["content"] in _SPECIAL_TOKENS
    ]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


class SpeltScenes:
    """Documents about scenes whose pictures are spelt out.

    Args:
        policies: visual-prompt policies by record kind.
        seed: part of every random key.
    """

    def __init__(self, policies: Mapping[str, VisualPromptPolicy], seed: int = 0) -> None:
        self._policies, self._seed = policies, seed
        self._scenes = [
            compose_scene(generator_for("spelt", seed, index)) for index in range(_NUM_SCENES)
        ]

    def conversation(self, number: int) -> tuple[Turn, ...]:
        """Return document ``number`` as turns; its first user text starts with the scene."""
        rng = generator_for("spelt", self._seed, "document", number)
        scene = self._reshuffled(rng)
        mix = _MIXES[int(rng.choice(len(_MIXES), p=_MIX_RATES))]
        record, has_image = make_record(mix, scene, number, rng)
        picture = scene.jpeg() if has_image else None
        sample = parse_record(
            record, key=record["id"], dataset="spelt", image=picture, kind="auto", rng=rng
        )
        if not sample.regions:
            plan = sample_plan((), scene.image.size, _ANY, rng)
            turns = refer_turns(sample.turns, plan, rng)
            return _lead(turns, _spell(scene, {}, rng) + "\n") if has_image else turns
        policy = get_policy(self._policies, sample.policy)
        plan = sample_plan(sample.regions, scene.image.size, policy, rng, sample.fixed)
        turns = refer_turns(sample.turns, plan, rng)
        words = {_box(sample, p.region): prompt_words(p) for p in plan.prompts}
        return _lead(turns, _spell(scene, words, rng) + "\n")

    def caption(self, number: int) -> str:
        """Return a spelt scene and its caption: what stage 1 will ask of pictures."""
        rng = generator_for("spelt", self._seed, "caption", number)
        scene = self._reshuffled(rng)
        return f"{_spell(scene, {}, rng)}\n{caption(scene)}"

    def _reshuffled(self, rng: np.random.Generator) -> Scene:
        """Return a known layout with other kinds at its places."""
        scene = self._scenes[int(rng.integers(len(self._scenes)))]
        kinds = sample_kinds(len(scene.objects), rng)
        objects = zip(scene.objects, kinds, strict=True)
        return replace(scene, objects=tuple(replace(item, kind=kind) for item, kind in objects))


def drill_record(scene: Scene, number: int, rng: np.random.Generator) -> Record:
    """Mark every object and ask for each: looking up is learnt from many questions a scene."""
    order = rng.permutation(len(scene.objects)).tolist()
    turns: list[dict[str, str]] = []
    for place, index in enumerate(order):
        question = f"What is the object <bbox{index}>?"
        turns.append({"from": "human", "value": question if place else "<image>\n" + question})
        turns.append({"from": "gpt", "value": scene.objects[index].kind})
    boxes = [list(item.bbox_xyxy) for item in scene.objects]
    return {"id": f"drill{number}", "image": "drill.jpg", "bboxes": boxes, "conversations": turns}


_MIXES: tuple[Mapping[RegionRecord, float], ...] = ({drill_record: 1.0}, FINETUNE_MIX, GPT4V_MIX)
_MIX_RATES = (0.5, 0.35, 0.15)
_ANY = VisualPromptPolicy()


def _spell(scene: Scene, words: Mapping[tuple[int, ...], str], rng: np.random.Generator) -> str:
    """Name the objects in any order, each behind the words of its mark.

    Mark first, name second: what follows known words is the easiest thing to look up.
    """
    names = [
        f"{words[box]}: {item.kind}" if (box := _rounded(item.region)) in words else item.kind
        for item in scene.objects
    ]
    return "; ".join(names[int(index)] for index in rng.permutation(len(names)))


def _lead(turns: tuple[Turn, ...], text: str) -> tuple[Turn, ...]:
    first = Turn(turns[0].role, text + turns[0].text)
    return (first, *turns[1:])


def _rounded(region: Region) -> tuple[int, ...]:
    return tuple(round(value) for value in region.bbox_xyxy)


def _box(sample: Sample, index: int) -> tuple[int, ...]:
    return _rounded(sample.regions[index])


def teach_language_model(
    output: Path,
    policies: Mapping[str, VisualPromptPolicy],
    *,
    steps: int,
    batch_size: int = 32,
    seed: int = 0,
) -> float:
    """Train tokenizer and language model and save both as one Hugging Face folder.

    Returns:
        The mean loss per token over the last hundred steps.
    """
    torch.manual_seed(seed)
    scenes = SpeltScenes(policies, seed)
    tokenizer = train_tokenizer(_texts(scenes))
    tokenizer.save_pretrained(output)
    encoder = ConversationEncoder(tokenizer, CHAT_TEMPLATE, 10**6, 1, _MAX_LENGTH)
    model = LlamaForCausalLM._from_config(
        language_config(len(tokenizer)), attn_implementation="eager"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.05)
    losses: list[float] = []
    began = time.monotonic()
    model.train()
    for step in range(steps):
        documents = [
            _encode(scenes, encoder, tokenizer, step * batch_size + row)
            for row in range(batch_size)
        ]
        loss = _loss(model, documents)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0:
            speed = (step + 1) * batch_size / (time.monotonic() - began)
            recent = float(np.mean(losses[-100:]))
            _LOG.info("step %d/%d loss %.3f (%.0f texts/s)", step, steps, recent, speed)
    model.save_pretrained(output)
    return float(np.mean(losses[-100:]))


def _texts(scenes: SpeltScenes) -> Iterator[str]:
    for number in range(3000):
        yield scenes.caption(number)
        for turn in scenes.conversation(number):
            yield turn.text
    for shape in SHAPES:
        for colour in PALETTE:
            yield f"the object {shape_words(shape, colour)}"
            yield f"the object {shape_words(shape, colour, article=False)}?"
    for _ in range(100):
        yield get_template(CHAT_TEMPLATE).render([Turn("user", "a"), Turn("assistant", "b")])


@dataclass(frozen=True, slots=True)
class _Document:
    """Ids and weights of one document, both [length]."""

    ids: torch.Tensor
    weights: torch.Tensor


def _encode(
    scenes: SpeltScenes,
    encoder: ConversationEncoder,
    tokenizer: PreTrainedTokenizerFast,
    number: int,
) -> _Document:
    """Encode a caption of stage 1, or a conversation about a spelt scene.

    A conversation's questions are mostly chance; its answers carry nearly all of the weight.
    """
    if generator_for("spelt", "kind", number).random() < _CAPTION_SHARE:
        ids = torch.tensor(tokenizer.encode(scenes.caption(number) + "\n"))
        return _Document(ids, torch.ones(len(ids)))
    encoded = encoder.encode(scenes.conversation(number))
    weights = np.where(encoded.labels == IGNORE_INDEX, _QUESTION_WEIGHT, 1.0)
    return _Document(
        torch.from_numpy(encoded.input_ids), torch.from_numpy(weights.astype(np.float32))
    )


def _loss(model: LlamaForCausalLM, documents: list[_Document]) -> torch.Tensor:
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([document.ids for document in documents], batch_first=True)
    weights = pad([document.weights for document in documents], batch_first=True)[:, 1:]
    with torch.autocast("cpu", torch.bfloat16):
        # Right padding needs no mask under causal attention; its weight is 0.
        logits = model(input_ids=ids, use_cache=False).logits
    assert logits is not None
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none"
    )
    return (losses * weights).sum() / weights.sum()
