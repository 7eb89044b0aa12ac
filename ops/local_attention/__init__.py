"""2D local attention: windows of the own grid, of a coarser grid and global tokens in one softmax."""

from cogview2.ops.local_attention.functional import (
    available_backends,
    local_attention_2d,
    merge_attentions,
)
from cogview2.ops.local_attention.reference import local_attention_2d_reference

__all__ = ["available_backends", "local_attention_2d", "local_attention_2d_reference", "merge_attentions"]
