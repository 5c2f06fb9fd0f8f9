"""KVCache: the keys and values of what has been generated so far."""

from collections.abc import Callable, Hashable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer for a batch of sequences, each as long as it is, up to capacity tokens.

    layers, batch, capacity, kv_heads, head_dim: sizes, 1 or more; device and dtype: those of the layers' keys. Memory
    is contiguous, or with page_size (a multiple of 16) in `pages` pages, by default as many as capacity asks for, of
    which a sequence holds those that it fills.

    Layers are called with cache= and layer=, under torch.no_grad(), each once; then `advance` counts the tokens:

        for tokens in (prompt, *generated):
            for index, layer in enumerate(layers):
                x = layer(x, cache=cache, layer=index)
            cache.advance(x.shape[1])

    lengths (B,) int32: tokens of each sequence. memory: for each layer the keys and values of its cross-attention,
    computed at the first call of a generation and used until `reset`.
    Raises ValueError for sizes that do not fit and, in `reserve` and `advance`, where the cache is full; RuntimeError
    for a layer that is called again before `advance`. What a call that fails has changed is changed back.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        *,
        page_size: int | None = None,
        pages: int | None = None,
        device=None,
        dtype=None,
    ):
        sizes = {"layers": layers, "batch": batch, "capacity": capacity, "kv_heads": kv_heads, "head_dim": head_dim}
        for name, size in sizes.items():
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"KVCache: {name} must be an int, 1 or more, got {size}")
        if page_size is None:
            if pages is not None:
                raise ValueError("KVCache: pages must come with a page_size")
            blocks, page_size, block_table = batch, capacity, None
        else:
            if not isinstance(page_size, int) or page_size < 1 or page_size % 16:
                raise ValueError(f"KVCache: page_size must be a multiple of 16, got {page_size}")
            width = -(-capacity // page_size)
            blocks = batch * width if pages is None else pages
            if not isinstance(blocks, int) or blocks < 1:
                raise ValueError(f"KVCache: pages must be an int, 1 or more, got {pages}")
            block_table = torch.zeros(batch, width, dtype=torch.int32, device=device)
        self.capacity, self.page_size, self.block_table = capacity, page_size, block_table
        shape = (layers, blocks, kv_heads, page_size, head_dim)
        self.keys, self.values = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.memory: list[list[Tensor] | None] = [None] * layers
        self._lengths = [0] * batch  # on the host too, so that a full cache is seen without a synchronisation
        self._held: list[list[int]] = [[] for _ in range(batch)]  # pages of each sequence
        self._free = list(range(blocks))[::-1]
        self._new: list[int | None] = [None] * layers  # tokens that each was called with since `advance`
        self._kept: dict[Hashable, object] = {}

    @property
    def slots(self) -> int:
        """Positions that a sequence's table or memory covers: capacity, rounded up to whole pages."""
        return self.capacity if self.block_table is None else self.block_table.shape[1] * self.page_size

    def of_layer(self, layer: int | None) -> dict[str, Tensor | None]:
        """The arguments of `pyllm.ops.attention_decode` that say where a layer's keys and values are."""
        self.check_layer(layer)
        return {
            "key_cache": self.keys[layer],
            "value_cache": self.values[layer],
            "cache_seqlens": self.lengths,
            "block_table": self.block_table,
        }

    @property
    def empty(self) -> bool:
        """Whether no sequence has a token yet."""
        return not any(self._lengths)

    def check_layer(self, layer: int | None) -> None:
        """Raises ValueError if this is not the index of a layer, RuntimeError in a torch.jit.trace."""
        if torch._C._get_tracing_state() is not None:
            raise RuntimeError("KVCache: torch.jit.trace would keep its lengths of now; torch.compile follows them")
        if layer is None or not 0 <= layer < len(self.memory):
            raise ValueError(f"KVCache: layer must be from 0 to {len(self.memory) - 1}, got {layer}")

    def begin(self, layer: int | None, key: Tensor) -> None:
        """Makes room for the tokens of which key (B, Hkv, S, D) are the keys, in a layer called with them.

        Raises ValueError, TypeError or RuntimeError for keys that do not fit, a full cache, and a layer that was called
        since the last `advance`.
        """
        self.check_layer(layer)
        expected = (len(self._lengths), self.keys.shape[2], key.shape[2], self.keys.shape[4])
        if key.shape != expected:
            raise ValueError(f"KVCache: key must have shape (B, Hkv, S, D) = {expected}, got {tuple(key.shape)}")
        if key.dtype != self.keys.dtype:
            raise TypeError(f"KVCache: key must have the cache's dtype, {self.keys.dtype}, got {key.dtype}")
        if torch.is_grad_enabled() and key.requires_grad:
            raise RuntimeError("KVCache: what is stored has no gradient; call it under torch.no_grad()")
        if self._new[layer] is not None:
            raise RuntimeError(
                f"KVCache: layer {layer} was called before, and its {self._new[layer]} tokens were not counted: "
                "advance() counts them, advance(0) drops them"
            )
        self.reserve(key.shape[2])
        self._new[layer] = key.shape[2]

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Writes the keys and values (B, Hkv, S, D) of the first S tokens of each sequence, for which there is room."""
        where = self.of_layer(layer)
        positions = torch.arange(key.shape[2], device=key.device)
        for cache, rows in ((where["key_cache"], key), (where["value_cache"], value)):
            if self.block_table is None:
                cache[:, :, : key.shape[2]] = rows
            else:
                pages = self.block_table[:, positions // self.page_size].long()
                cache[pages, :, positions % self.page_size] = rows.transpose(1, 2)

    def positions(self, new: int) -> Tensor:
        """The positions (B, new) int64 of the next `new` tokens of each sequence."""
        return self.lengths[:, None].long() + torch.arange(new, device=self.lengths.device)

    def reserve(self, new: int) -> None:
        """Makes room for `new` more tokens of each sequence. Layers call it; before compiled layers, call it yourself.

        Raises ValueError if a sequence would pass capacity or no page is free, before anything is changed.
        """
        if torch.compiler.is_compiling():  # what it looks up changes at every step
            return
        self._check_room([new] * len(self._lengths))
        if self.block_table is None:
            return
        missing = [
            max(0, -(-(length + new) // self.page_size) - len(held))
            for length, held in zip(self._lengths, self._held, strict=True)
        ]
        if sum(missing) > len(self._free):
            raise ValueError(
                f"KVCache: the cache is full: {sum(missing)} pages are needed for {new} more tokens of each sequence, "
                f"and {len(self._free)} of {self.keys.shape[1]} are free"
            )
        for index, count in enumerate(missing):
            if count:
                held = self._held[index]
                held += [self._free.pop() for _ in range(count)]
                self.block_table[index, len(held) - count : len(held)] = self._on_device(held[-count:])

    def advance(self, new: int | Sequence[int] | Tensor) -> None:
        """Counts `new` tokens that every layer has been called with; one number, or one for each sequence.

        A sequence that counts fewer than it was called with, such as a prompt padded at its end, goes on after those; 0
        drops them. Raises ValueError for more than a layer was called with, and where the cache is full.
        """
        counts = new.tolist() if isinstance(new, Tensor) else new
        counts = [counts] * len(self._lengths) if isinstance(counts, int) else counts
        fits = isinstance(counts, Sequence) and len(counts) == len(self._lengths)
        if not (fits and all(isinstance(count, int) and count >= 0 for count in counts)):
            raise ValueError(f"KVCache: new must be a number, 0 or more, or {len(self._lengths)} of them, got {new}")
        self._check_room(counts)
        for layer, called in enumerate(self._new):
            if called is not None and max(counts) > called:
                raise ValueError(f"KVCache: new is {max(counts)}, but layer {layer} was called with {called} tokens")
        after = [length + count for length, count in zip(self._lengths, counts, strict=True)]
        for index, length in enumerate(after):
            if self.block_table is not None and length > len(self._held[index]) * self.page_size:
                raise ValueError(f"KVCache: sequence {index} has no pages for {length} tokens: call reserve() first")
        self.lengths += self._on_device(counts)
        self._lengths, self._new = after, [None] * len(self._new)

    def reset(self, index: int | None = None) -> None:
        """Empties sequence `index`, or all, and frees its pages.

        In any case the memory of cross-attention goes, and tokens that were not counted yet.
        """
        for i in range(len(self._lengths)) if index is None else (range(len(self._lengths))[index],):
            self._free += self._held[i][::-1]
            self._held[i] = []
            self._lengths[i] = 0
            self.lengths[i] = 0
            if self.block_table is not None:
                self.block_table[i] = 0
        self.memory = [None] * len(self.memory)
        self._new = [None] * len(self._new)

    @contextmanager
    def unless_failed(self):
        """Around the call of a layer: what an exception leaves unfinished is undone."""
        held, kept = [len(pages) for pages in self._held], list(self._kept)
        new, memory = self._new.copy(), self.memory.copy()
        try:
            yield
        except BaseException:
            self._new, self.memory = new, memory
            self._kept = {name: self._kept[name] for name in kept}
            for index, count in reversed(list(enumerate(held))):  # so that pages are free in the order of before
                pages = self._held[index]
                if len(pages) > count:
                    self.block_table[index, count : len(pages)] = 0
                    self._free += pages[count:][::-1]
                    del pages[count:]
            raise

    def kept(self, name: Hashable, make: Callable[[], object]):
        """What make() returned the first time: for what a layer needs at every step, and never changes."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def _on_device(self, counts: list[int]) -> Tensor:
        return torch.tensor(counts, dtype=torch.int32, device=self.lengths.device)

    def _check_room(self, counts: list[int]) -> None:
        for index, (length, count) in enumerate(zip(self._lengths, counts, strict=True)):
            if length + count > self.capacity:
                raise ValueError(
                    f"KVCache: the cache is full: sequence {index} has {length} tokens, {count} are to be added, "
                    f"and it holds {self.capacity}"
                )

    def __repr__(self) -> str:
        layers, blocks, kv_heads, _, head_dim = self.keys.shape
        paged = "" if self.block_table is None else f", page_size={self.page_size}, pages={blocks}"
        sizes = f"layers={layers}, batch={len(self._lengths)}, capacity={self.capacity}, kv_heads={kv_heads}"
        return f"KVCache({sizes}, head_dim={head_dim}{paged}, lengths={self._lengths})"
