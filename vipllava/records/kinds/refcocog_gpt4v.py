"""GPT-4V dialogues about one RefCOCOg object.

As ``refcocog`` without ``answer``, and ``conversations`` in which ``<bbox>`` stands for the mark.
"""

from __future__ import annotations

import numpy as np

from vipllava.records.fields import Fields, Parsed


def parse_refcocog_gpt4v(fields: Fields, rng: np.random.Generator) -> Parsed:
    """Return the dialogue with mentions."""
    regions = fields.regions(count=1, masks=True)
    return Parsed(fields.conversation(num_regions=1), tuple(regions))
