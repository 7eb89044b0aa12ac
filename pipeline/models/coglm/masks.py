"""Attention masks of CogLM from one number per token, its role (spec 2.6, 3.2): no S x S mask ever travels.

A role packs three facts: is the token context (visible to all), does it read the image, and its segment.
Inside a segment attention is causal. Segment 0 means none.
"""

from typing import TypeVar

import numpy as np
import torch

Roles = TypeVar("Roles", torch.Tensor, np.ndarray)

HIDDEN = 0
"""Seen by nobody, sees the context."""
CONTEXT = 1
"""Seen by all, sees the context."""
READS_IMAGE = 2
"""A flag: also sees everything of the image segment."""
_SEGMENT_SHIFT = 2
IMAGE_SEGMENT = 1


def segment_role(segment: int, *, reads_image: bool = False) -> int:
    """Return the role of a token predicted inside `segment` (>= 1; 1 is the image, or the text regions)."""
    assert segment >= 1
    return segment << _SEGMENT_SHIFT | (READS_IMAGE if reads_image else 0)


IMAGE = segment_role(IMAGE_SEGMENT)
"""Predicted from the context and the image tokens before it."""


def segments(roles: Roles) -> Roles:
    """Return the segment of every role, same shape; 0 = none."""
    return roles >> _SEGMENT_SHIFT


def visible(
    query_roles: torch.Tensor, key_roles: torch.Tensor, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor:
    """Return whether each query sees each key: bool, the shape to which all arguments broadcast.

    visible(q, k) = k is context
                 or q and k share a segment and k <= q
                 or q reads the image and k is in the image segment.

    Args:
        query_roles, key_roles: integers, the roles.
        query, key: integers, the places in the sequence.
    """
    segment = segments(key_roles)
    context = (key_roles & CONTEXT) != 0
    same = (segment > 0) & (segment == segments(query_roles))
    reads = ((query_roles & READS_IMAGE) != 0) & (segment == IMAGE_SEGMENT)
    return context | (same & (key <= query)) | reads


def attention_mask(roles_BS: torch.Tensor) -> torch.Tensor:
    """Return who sees whom, bool [B, 1, S, S], True = visible, on the device of `roles_BS` (int64); see `visible`."""
    order = torch.arange(roles_BS.shape[1], device=roles_BS.device)
    return visible(roles_BS[:, :, None], roles_BS[:, None, :], order[:, None], order[None, :])[:, None]
