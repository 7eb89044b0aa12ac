"""The mask of a micro batch, made of its roles where it is used and once, in the form that the backend takes."""

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from cogview2.pipeline.models.coglm.masks import attention_mask, visible
from cogview2.pipeline.models.transformer.attention import SelfAttention, score_bias
from cogview2.pipeline.models.transformer.backends import BLOCK_SIZE, Backend, Mask


class Visibility:
    """Who sees whom in a micro batch.

    Only the roles, one number per token, come from elsewhere. A bias [B, 1, S, S] or a block mask is made at the
    first call that needs it, on the roles' device, and kept as long as this object.
    """

    def __init__(self, roles_BS: torch.Tensor, backend: Backend | None = None) -> None:
        """Take the roles.

        Args:
            roles_BS: int64, see masks.py.
            backend: which one to use; by default each attention says what suits it (`SelfAttention.backend`).
        """
        self.roles_BS = roles_BS
        self._backend = backend
        self._version = _version(roles_BS)
        self._biases: dict[torch.dtype, torch.Tensor] = {}
        self._blocks: BlockMask | None = None

    def mask_for(self, attention: SelfAttention, dtype: torch.dtype) -> Mask:
        """Return the mask for an attention whose input has this dtype."""
        backend = self._backend or attention.backend(self.roles_BS.device, dtype)
        return self.block_mask() if backend == "flex" else self.bias(dtype)

    def bias(self, dtype: torch.dtype) -> torch.Tensor:
        """Return what is added to the scores, `dtype` [B, 1, S, S]; see `score_bias`."""
        if dtype not in self._biases:
            self._biases[dtype] = score_bias(attention_mask(self.roles_BS), dtype)
        return self._biases[dtype]

    def block_mask(self) -> BlockMask:
        """Return the visible pairs for FlexAttention, for any head."""
        if self._blocks is None:
            # A copy: the kernels of the backward pass read it again, when the batch may be somebody else's.
            roles_BS = self.roles_BS.to(torch.int32)
            batch, length = roles_BS.shape

            def mask_mod(
                b: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
            ) -> torch.Tensor:
                return visible(roles_BS[b, query], roles_BS[b, key], query, key)

            self._blocks = create_block_mask(
                mask_mod, batch, None, length, length, device=roles_BS.device, BLOCK_SIZE=BLOCK_SIZE
            )
        return self._blocks

    def is_of(self, roles_BS: torch.Tensor) -> bool:
        """Whether this was made of the very memory of `roles_BS`, unchanged since; compares no numbers."""
        own, version = self.roles_BS, _version(roles_BS)
        if version is None or version != self._version or own.data_ptr() != roles_BS.data_ptr():
            return False
        layout = own.shape, own.stride(), own.device, own.dtype
        return layout == (roles_BS.shape, roles_BS.stride(), roles_BS.device, roles_BS.dtype)


def _version(tensor: torch.Tensor) -> int | None:
    """Return how often the memory was written to; None where PyTorch does not count."""
    return None if tensor.is_inference() else tensor._version


_latest: Visibility | None = None


def visibility_of(roles_BS: torch.Tensor) -> Visibility:
    """Return the visibility of these roles: the one of the last call where the tensor is the same or a view of all of it.

    So the blocks of a pipe stage, which get the roles one after the other, build one mask for a micro batch, also when
    an activation checkpoint runs them again on detached inputs. The last roles are kept alive, so that no other
    tensor can have taken their memory.
    """
    global _latest
    if _latest is None or not _latest.is_of(roles_BS):
        _latest = Visibility(roles_BS)
    return _latest
