"""What PyTorch's kernel for rows of several samples computes, plainly, on any device."""

from __future__ import annotations

from itertools import pairwise

import torch


def attend_inside_segments(query, key, value, bounds, longest, *, scale, window):
    """Attend as :class:`vipllava.models.attention.Kernel` says, segment by segment."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    assert (bounds[0], bounds[-1]) == (0, len(query))
    assert longest >= bounds.diff().max()
    mixed = []
    for begin, end in pairwise(bounds.tolist()):
        q, k, v = (x[begin:end].transpose(0, 1) for x in (query, key, value))
        scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
        sees = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
        if window is not None:
            sees = sees.triu(1 - window)
        mixed.append((scores.masked_fill(~sees, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(mixed)
