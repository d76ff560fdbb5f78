"""The key-value cache of a session, which grows in place, and branches of it for several answers at once."""

from collections.abc import Iterable

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):
    """
    One layer's keys and values, `(1, heads, tokens, head size)`, in buffers with room for more.

    transformers' own dynamic layer copies everything for each new token. This one writes only what is new.
    """

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.buffers = [states[:, :, :0] for states in (key_states, value_states)]
        self.keys, self.values = self.buffers

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Appends keys and values, and returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.buffers[0].device != key_states.device:  # read from a file
            self.buffers = [buffer.to(key_states.device) for buffer in self.buffers]
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        if end > self.buffers[0].shape[2]:
            self.buffers = [enlarged(buffer[:, :, :start], end + end // 2) for buffer in self.buffers]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self._keep(end)
        return self.keys, self.values

    def cut_out(self, start: int, end: int) -> None:
        """Removes the tokens from `start` up to `end`. Those behind it move forward; their keys stay as they are."""
        length = self.get_seq_length()
        for buffer in self.buffers:
            buffer[:, :, start : length - end + start] = buffer[:, :, end:length].clone()
        self._keep(length - end + start)

    def _keep(self, length: int) -> None:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)


class BranchLayer(DynamicLayer):
    """A layer of several rows that all continue one `GrowingLayer`, which they share and do not change."""

    def __init__(self, trunk: GrowingLayer):
        super().__init__()
        self.trunk = trunk

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Appends to the rows' own keys and values, and returns them behind the shared ones."""
        own = super().update(key_states, value_states)
        shared = (self.trunk.keys, self.trunk.values)
        return tuple(
            torch.cat([before.expand(len(after), -1, -1, -1), after], dim=2)
            for before, after in zip(shared, own, strict=True)
        )

    def get_seq_length(self) -> int:
        """The number of tokens in a row, shared ones included."""
        return self.trunk.get_seq_length() + super().get_seq_length()


def new_cache() -> Cache:
    """An empty cache of growing layers. It gets as many as the language model has."""
    return Cache(layer_class_to_replicate=GrowingLayer)


@torch.inference_mode()
def cache_of(layers: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Cache:
    """A cache that holds copies of the keys and values of these layers."""
    cache = new_cache()
    for index, (keys, values) in enumerate(layers):
        cache.update(keys, values, index)
    return cache


def branch_of(cache: Cache) -> Cache:
    """A cache whose rows continue `cache`. It has no rows yet."""
    return Cache(layers=[BranchLayer(layer) for layer in cache.layers])


def enlarged(states: torch.Tensor, length: int) -> torch.Tensor:
    """A copy of `(1, heads, tokens, head size)` with room for `length` tokens."""
    larger = states.new_empty((*states.shape[:2], length, states.shape[3]))
    larger[:, :, : states.shape[2]] = states
    return larger
