"""Keys and values of the tokens seen so far, in memory that is allocated once (spec 3.2)."""

import torch


class PreallocatedCache:
    """A KeyValueCache of fixed length; layers advance independently.

    Dims: B batch, N heads, T all tokens so far, S new tokens, K head dim.
    """

    def __init__(self, layers: int, length: int) -> None:
        """Plan the cache; the memory is taken when the first keys show batch, dtype and device.

        Args:
            layers: layers of the model.
            length: most tokens it will ever hold.
        """
        self.length = length
        self._used = [0] * layers
        self._store: list[tuple[torch.Tensor, torch.Tensor]] = []

    def append(
        self, layer: int, k_BNSK: torch.Tensor, v_BNSK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the new tokens of `layer` and return all of its keys and values as views, [B, N, T, K].

        Raises:
            ValueError: more tokens than `length`.
        """
        start = self._used[layer]
        stop = start + k_BNSK.shape[2]
        if stop > self.length:
            raise ValueError(
                f"the cache holds {self.length} tokens, not {stop}; make it as long as the whole sequence"
            )
        if not self._store:
            batch, heads, _, width = k_BNSK.shape
            memory = k_BNSK.new_empty(len(self._used), 2, batch, heads, self.length, width)
            self._store = [(keys, values) for keys, values in memory]
        keys, values = self._store[layer]
        keys[:, :, start:stop] = k_BNSK
        values[:, :, start:stop] = v_BNSK
        self._used[layer] = stop
        return keys[:, :, :stop], values[:, :, :stop]
