"""Ids that are pictures, for batching that takes ids only.

Behind the vocabulary each picture gets ids of its own, one for each of its features, and the
embedding looks them up among the features. What comes after, transformers' prefix cache with it,
sees two prompts as the same where words and pictures are.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any, Final

import torch
from torch import nn

from vipllava.inference.features import ImageFeatures, Picture

_LARGEST_ID: Final = 2**31 - 1  # transformers holds ids in 32 bits


class WordsAndPictures(nn.Module):
    """The embedding of a language model, and behind its words rows of features.

    Args:
        words: the embedding.
        num_words: ids that are words.
        rows: features, [rows, width]; ids behind the words count them, over and over.
    """

    def __init__(self, words: nn.Module, num_words: int, rows: torch.Tensor) -> None:
        super().__init__()
        self.words, self.num_words = words, num_words
        self.register_buffer("rows", rows, persistent=False)

    @property
    def weight(self) -> Any:
        """The words' own."""
        return self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return embeddings; nothing depends on the ids' values but what is looked up."""
        is_picture = ids >= self.num_words
        words = self.words(ids.masked_fill(is_picture, 0))
        rows: Any = self.rows
        pictures = rows[(ids - self.num_words).remainder(len(rows))]
        return torch.where(is_picture[..., None], pictures.to(words), words)


class PictureIds:
    """Puts pictures' features where ids find them; threads may share it.

    A picture keeps its ids as long as there is room, so that a prefix with it is known again. When
    another one takes its rows, that one's ids are new all the same: no state that was worked out
    with the former can be taken for its own.

    Args:
        model: a VipLlava; its embedding is replaced until :meth:`close`.
        features: of pictures.
        num_slots: pictures that there is room for.
    """

    def __init__(self, model: Any, features: ImageFeatures, num_slots: int) -> None:
        config = model.config
        self._model, self._features = model, features
        self._length: int = config.image_seq_length
        self._words = model.get_input_embeddings()
        width, num_words = config.text_config.hidden_size, config.text_config.vocab_size
        weight = self._words.weight
        self._rows = torch.zeros(
            num_slots * self._length, width, dtype=weight.dtype, device=weight.device
        )
        self._num_words = num_words
        self._num_rounds = (_LARGEST_ID - num_words) // len(self._rows)
        self._lock = threading.Lock()
        self._slots: OrderedDict[bytes, int] = OrderedDict()  # who was asked about longest: first
        self._free = list(range(num_slots))
        self._rounds = [0] * num_slots  # how often each slot has been taken
        self._num_users = [0] * num_slots
        model.set_input_embeddings(WordsAndPictures(self._words, num_words, self._rows))

    @torch.inference_mode()
    def take(self, picture: Picture) -> range | None:
        """Return the ids of a picture, to be given back; None while all room is in use."""
        with self._lock:
            slot = self._slots.get(picture.digest)
            if slot is None:
                slot = self._make_room()
                if slot is None:
                    return None
                try:
                    (features,) = self._features.of([picture])
                except BaseException:
                    self._free.append(slot)
                    raise
                start = slot * self._length
                self._rows[start : start + self._length] = features
                if self._rows.is_cuda:  # other streams read it
                    torch.cuda.current_stream(self._rows.device).synchronize()
                self._rounds[slot] = (self._rounds[slot] + 1) % self._num_rounds
                self._slots[picture.digest] = slot
            self._slots.move_to_end(picture.digest)
            self._num_users[slot] += 1
            first = self._num_words + self._rounds[slot] * len(self._rows) + slot * self._length
            return range(first, first + self._length)

    def give_back(self, picture: Picture) -> None:
        """Take it that a request with this picture has ended."""
        with self._lock:
            self._num_users[self._slots[picture.digest]] -= 1

    def close(self) -> None:
        """Give the model its own embedding back."""
        self._model.set_input_embeddings(self._words)

    def _make_room(self) -> int | None:
        if self._free:
            return self._free.pop()
        for digest, slot in self._slots.items():
            if not self._num_users[slot]:
                del self._slots[digest]
                return slot
        return None
