"""CIDEr-D of captions (R. Vedantam et al., CVPR 2015), as pycocoevalcap computes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

LONGEST_NGRAM: Final = 4
SIGMA: Final = 6.0
"""Width, in words, of the penalty for another length than the reference's."""


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> npt.NDArray[np.float64]:
    """Return the value of each item, 0 to 10; that of the set is their mean.

    An n-gram weighs by its count in the caption times log(items / items whose references have it),
    counted over these very items: values of different sets do not compare.

    Args:
        answers: one per item, tokens joined by blanks.
        references: one or more per item, likewise.
    """
    num_items = len(answers)
    hypotheses = [answer.split() for answer in answers]
    flat = [reference.split() for item in references for reference in item]
    item_of = np.repeat(np.arange(num_items), [len(item) for item in references])
    lengths = np.array([len(words) for words in hypotheses])
    difference = lengths[item_of] - np.array([len(words) for words in flat])
    similarity = np.zeros(len(flat))
    for n in range(1, LONGEST_NGRAM + 1):
        similarity += _cosines(hypotheses, flat, item_of, n)
    similarity *= np.exp(-(difference**2) / (2 * SIGMA**2)) * 10 / LONGEST_NGRAM
    return np.bincount(item_of, similarity, num_items) / np.bincount(item_of, minlength=num_items)


def _cosines(
    hypotheses: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
    item_of: npt.NDArray[np.intp],
    n: int,
) -> npt.NDArray[np.float64]:
    """Return the likeness of each reference's n-grams and its hypothesis's, ``[references]``.

    It is the cosine of their weights, but no n-gram of the hypothesis counts for more than it does
    in the reference: the D of CIDEr-D.
    """
    vocabulary: dict[tuple[str, ...], int] = {}
    of_hypothesis, gram, count = _count_ngrams(hypotheses, n, vocabulary)
    of_reference, ref_gram, ref_count = _count_ngrams(references, n, vocabulary)
    size = max(len(vocabulary), 1)
    in_items = np.unique(item_of[of_reference] * size + ref_gram) % size
    rarity = np.log(len(hypotheses)) - np.log(np.maximum(np.bincount(in_items, minlength=size), 1))
    weight, ref_weight = count * rarity[gram], ref_count * rarity[ref_gram]

    # The weight that each n-gram of a reference has in the hypothesis of its item.
    keys, wanted = of_hypothesis * size + gram, item_of[of_reference] * size + ref_gram
    order = np.argsort(keys)
    place = np.searchsorted(keys, wanted, sorter=order)
    found = np.append(order, -1)[place]
    same = (found >= 0) & (np.append(keys, -1)[found] == wanted)
    in_hypothesis = np.where(same, np.append(weight, 0.0)[found], 0.0)

    num = len(references)
    product = np.bincount(of_reference, np.minimum(in_hypothesis, ref_weight) * ref_weight, num)
    norm = np.sqrt(np.bincount(of_hypothesis, weight**2, len(hypotheses)))[item_of]
    norm *= np.sqrt(np.bincount(of_reference, ref_weight**2, num))
    return np.divide(product, norm, out=np.zeros(num), where=norm > 0)


def _count_ngrams(
    captions: Sequence[Sequence[str]], n: int, vocabulary: dict[tuple[str, ...], int]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Return rows (caption, n-gram, count), and number new n-grams in ``vocabulary``."""
    rows = [
        (index, vocabulary.setdefault(gram, len(vocabulary)), count)
        for index, words in enumerate(captions)
        for gram, count in Counter(
            zip(*(words[start:] for start in range(n)), strict=False)
        ).items()
    ]
    table = np.array(rows, dtype=np.intp).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]
