"""A few small calls of every CUDA kernel, run by compute-sanitizer; not a test by itself."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
from compiled_kernels import served_by  # noqa: E402
from dense_attention import draw, gradients  # noqa: E402

from cogview2.ops.local_attention import local_attention_2d  # noqa: E402
from cogview2.ops.local_attention.flex import Layout  # noqa: E402

CASES = (
    (Layout((9, 21), (9, 9)), torch.bfloat16, 64),
    (Layout((9, 21), (5, 3), is_causal=True), torch.float16, 32),
    (Layout((6, 18), (9, 5), False, 20, (2, 6), (5, 5)), torch.bfloat16, 128),
    (Layout((6, 9), (5, 3), False, 3, (3, 3), (3, 3)), torch.float32, 20),
)

for layout, dtype, channels in CASES:
    call = draw(layout, dtype, "cuda", batch=1, channels=channels, biases=True).leaves()
    out = local_attention_2d(**call.keywords(), backend="cuda")
    gradients(call, out, torch.ones_like(out))
    print(layout, dtype, channels, *served_by(call))
torch.cuda.synchronize()
print("all passes ran")
