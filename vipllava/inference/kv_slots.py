"""Keys and values of the answers that run: one slot for each, which others may take over.

transformers' own caches hold a batch that starts and ends together. Here each row is written at
its own place and starts at column 0, so that rows come and go without the others being moved, and
a step copies nothing but its own keys and values. What a slot holds behind its row is masked.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin

_COLUMNS_AT_ONCE: Final = 64
_ROWS_AT_ONCE: Final = 4
_GROWTH: Final = 1.25  # of the columns, so that a long answer has them copied a few times only


class _Plan:
    """What the layers do with the keys and values that come next; one for all of them."""

    def __init__(self) -> None:
        self.shape: tuple[int, int] = (0, 0)  # rows and columns that there is room for
        self.first = 0  # slot of the first row that is prefilled
        self.columns = 0  # that a step looks at; 0 while rows are prefilled
        self._places: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def prefill(self, first: int) -> None:
        self.first, self.columns = first, 0

    def step(self, positions: torch.Tensor, columns: int) -> None:
        rows = torch.arange(len(positions), device=positions.device)
        self.columns, self._places = columns, {positions.device: (rows, positions)}

    def places(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return slots and columns that a step writes to, int64 [rows] each."""
        if device not in self._places:
            rows, positions = next(iter(self._places.values()))
            self._places[device] = rows.to(device), positions.to(device)
        return self._places[device]


class _Layer(CacheLayerMixin):
    """Keys and values of one decoder block, [rows, heads, columns, head_dim] each."""

    keys: Any
    values: Any

    def __init__(self, plan: _Plan, window: int | None) -> None:
        super().__init__()
        self.plan, self.sliding_window = plan, window
        self.is_sliding = window is not None  # how transformers finds the mask of a prefill

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, columns = self.plan.shape
        self.keys, self.values = (
            states.new_zeros(rows, states.shape[1], columns, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def fit(self) -> None:
        rows, columns = self.plan.shape
        for name in ("keys", "values"):
            old = getattr(self, name)
            if old is None or (old.shape[0] == rows and old.shape[2] == columns):
                continue
            # Masked columns are multiplied by zero: they must not hold what is no number.
            new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
            kept = min(columns, old.shape[2])
            new[: old.shape[0], :, :kept] = old[:, :, :kept]
            setattr(self, name, new)

    def cut(self) -> None:
        rows, columns = self.plan.shape
        if self.is_initialized:  # no copy, for which there may be no room
            self.keys, self.values = (
                states[:rows, :, :columns] for states in (self.keys, self.values)
            )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        num_rows, columns = len(key_states), self.plan.columns
        if not columns:
            rows = slice(self.plan.first, self.plan.first + num_rows)
            length = key_states.shape[2]
            self.keys[rows, :, :length] = key_states
            self.values[rows, :, :length] = value_states
            return key_states, value_states
        slots, positions = self.plan.places(self.keys.device)
        self.keys[slots, :, positions] = key_states[:, :, 0]
        self.values[slots, :, positions] = value_states[:, :, 0]
        return self.keys[:num_rows, :, :columns], self.values[:num_rows, :, :columns]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.plan.columns or query_length, 0

    def get_seq_length(self) -> int:
        return max(self.plan.columns - 1, 0)

    def get_max_length(self) -> int:
        return -1


class KVSlots(Cache):
    """The cache of a language model whose rows come and go.

    Args:
        text_config: the language model's.
        max_columns: positions that the model has.
    """

    def __init__(self, text_config: Any, max_columns: int) -> None:
        self._plan = _Plan()
        self._max_columns = max_columns
        windows = [getattr(layer, "sliding_window", None) for layer in _layers_of(text_config)]
        super().__init__(layers=[_Layer(self._plan, window) for window in windows])
        self.windows = frozenset(windows)  # what layers look back at; None for all

    @property
    def num_columns(self) -> int:
        """Columns that each slot has room for."""
        return self._plan.shape[1]

    def reserve(self, rows: int, columns: int, *, shrinks: bool = False) -> None:
        """Make room; layer by layer, so that no more than one is ever in memory twice.

        Args:
            rows: slots that are needed.
            columns: of each.
            shrinks: give back columns where less than half are needed.

        Raises:
            RuntimeError: there is no memory for it; what there was is there still.
        """
        has_rows, has_columns = self._plan.shape
        if columns > has_columns:
            columns = _rounded(max(columns, min(int(has_columns * _GROWTH), self._max_columns)))
        elif not (shrinks and _rounded(columns) * 2 < has_columns):
            columns = has_columns
        rows = max(-(-rows // _ROWS_AT_ONCE) * _ROWS_AT_ONCE, has_rows)
        self._plan.shape = rows, _rounded(columns)
        try:
            for layer in self._own_layers:
                layer.fit()
        except BaseException:  # out of memory: fewer rows go on with what there was
            self._plan.shape = has_rows, has_columns
            for layer in self._own_layers:
                layer.cut()
            raise

    def begin_prefill(self, first: int) -> None:
        """Have the next forward pass fill the slots from ``first`` on, each from column 0."""
        self._plan.prefill(first)

    def begin_step(self, positions: torch.Tensor, columns: int) -> None:
        """Have the next forward pass add a column to the first slots, at these positions."""
        self._plan.step(positions, columns)

    def move(self, source: int, target: int, length: int) -> None:
        """Put a row into another slot."""
        for layer in self._own_layers:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]

    def wipe(self, slot: int) -> None:
        """Forget what a slot holds, where that is no number."""
        for layer in self._own_layers:
            layer.keys[slot].zero_()
            layer.values[slot].zero_()

    def drop(self) -> None:
        """Give all memory back."""
        self._plan.shape = (0, 0)
        for layer in self._own_layers:
            layer.keys = layer.values = None
            layer.is_initialized = False

    @property
    def _own_layers(self) -> list[_Layer]:
        layers: Any = self.layers
        return layers


def bytes_per_token(text_config: Any, dtype: torch.dtype) -> int:
    """Return what one position of one answer takes in all layers."""
    heads = text_config.num_key_value_heads
    width = getattr(text_config, "head_dim", None)
    width = width or text_config.hidden_size // text_config.num_attention_heads
    return 2 * text_config.num_hidden_layers * heads * width * dtype.itemsize


def _rounded(columns: int) -> int:
    return -(-columns // _COLUMNS_AT_ONCE) * _COLUMNS_AT_ONCE


def _layers_of(text_config: Any) -> list[Any]:
    return DynamicCache(config=text_config).layers
