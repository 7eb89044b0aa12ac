"""Calls into the compiled kernels: the C structure of csrc/problem.h, filled from tensors.

Dims: B batch, Y X query grid, H heads, D channels, T additional tokens. Nothing here is differentiable; autograd
lies above, in `registration`.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

Kernel = tuple[int, int]
DATA_TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_MESSAGE_BYTES = 1000
_ALIGNMENT_BYTES = 16


class _View(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("column", ctypes.c_int64),
        ("head", ctypes.c_int64),
    ]


class _Window(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("top", "bottom", "left", "right", "causal")]


class _Problem(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("data_type", "batch", "rows", "columns", "heads", "channels")),
        *((name, ctypes.c_int64) for name in ("cross_rows", "cross_columns", "tokens")),
        ("window", _Window),
        ("cross_window", _Window),
        ("scale", ctypes.c_double),
        ("dropout", ctypes.c_double),
        ("threads", ctypes.c_int64),
        *((name, _View) for name in ("query", "key", "value", "cross_key", "cross_value")),
        *((name, _View) for name in ("token_key", "token_value")),
        *((name, ctypes.c_void_p) for name in ("token_bias", "cross_bias", "seed")),
        ("out", _View),
        ("lse", ctypes.c_void_p),
        ("grad_out", _View),
        ("grad_lse", ctypes.c_void_p),
        *((f"grad_{name}", _View) for name in ("query", "key", "value", "cross_key", "cross_value")),
        *((f"grad_{name}", _View) for name in ("token_key", "token_value")),
        *((name, ctypes.c_void_p) for name in ("grad_token_bias", "grad_cross_bias", "workspace")),
    ]


class KernelError(RuntimeError):
    """A compiled kernel refused or failed; the message is its sentence."""


class Inputs(NamedTuple):
    """The tensors of one call, checked (see `functional`); None: not part of it."""

    query: torch.Tensor
    """[B, Y, X, H, D]."""
    key: torch.Tensor | None
    """[B, Y, X, H, D]."""
    value: torch.Tensor | None
    cross_key: torch.Tensor | None
    """[B, Y / a, X / b, H, D]."""
    cross_value: torch.Tensor | None
    token_key: torch.Tensor | None
    """[B, T, H, D]."""
    token_value: torch.Tensor | None
    token_bias: torch.Tensor | None
    """[B, T], float32 (float64 for float64 queries)."""
    cross_bias: torch.Tensor | None
    """One number, in the type of `token_bias`."""
    seed: torch.Tensor | None
    """One number, int64; given exactly if dropout > 0."""


@dataclass(frozen=True)
class Settings:
    """The numbers of one call."""

    kernel_size: Kernel
    cross_kernel_size: Kernel
    is_causal: bool
    scale: float
    dropout: float


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of sums, biases and log-sum-exps: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def window_extent(kernel_size: Kernel, is_causal: bool) -> tuple[int, int, int, int]:
    """Return how many cells a window reaches up, down, left and right of its centre."""
    rows, columns = kernel_size
    top, left = rows // 2, columns // 2
    return top, 0 if is_causal else rows - 1 - top, left, columns - 1 - left


def is_aligned(tensor: torch.Tensor) -> bool:
    """Return whether every cell of [..., D] begins on a 16-byte border."""
    size = tensor.element_size()
    steps = [step for count, step in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if count > 1]
    return all(
        offset % _ALIGNMENT_BYTES == 0 for offset in (tensor.data_ptr(), *(step * size for step in steps))
    )


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor`, copied where kernels could not read it (channels apart) or only slowly (CUDA, unaligned)."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        return tensor.contiguous()
    # A copy helps only where whole cells are multiples of the border.
    helps = tensor.is_cuda and tensor.shape[-1] * tensor.element_size() % _ALIGNMENT_BYTES == 0
    return tensor.clone(memory_format=torch.contiguous_format) if helps and not is_aligned(tensor) else tensor


def _view(tensor: torch.Tensor | None) -> _View:
    if tensor is None:
        return _View()
    # A step that is never taken is 0: kernels may form addresses one step outside without reading there.
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    strides: Sequence[int] = [step if size > 1 else 0 for size, step in sizes]
    if tensor.dim() == 4:  # tokens are columns of a single row
        strides = (strides[0], 0, strides[1], strides[2])
    return _View(tensor.data_ptr(), strides[0], strides[1], strides[2], strides[3])


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Library:
    """A loaded build of the kernels: `cpu`, `cuda`, or the CUDA sources emulated on the CPU."""

    def __init__(self, loaded: ctypes.CDLL) -> None:
        """Declare the functions of `loaded`.

        Raises:
            KernelError: it was built from another version of the C structure.
        """
        self._loaded = loaded
        loaded.local_attention_problem_bytes.restype = ctypes.c_int64
        loaded.local_attention_problem_bytes.argtypes = []
        theirs, ours = loaded.local_attention_problem_bytes(), ctypes.sizeof(_Problem)
        if theirs != ours:
            raise KernelError(
                f"the kernels expect a problem of {theirs} bytes, Python describes {ours}; rebuild them"
            )
        problem = ctypes.POINTER(_Problem)
        loaded.local_attention_workspace_bytes.restype = ctypes.c_int64
        loaded.local_attention_workspace_bytes.argtypes = [problem, ctypes.c_int32]
        loaded.local_attention_kernel.restype = ctypes.c_char_p
        loaded.local_attention_kernel.argtypes = [problem, ctypes.c_int32]
        for name in ("local_attention_forward", "local_attention_backward"):
            function = getattr(loaded, name)
            function.restype = ctypes.c_int32
            function.argtypes = [problem, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64]

    def kernel(self, inputs: Inputs, settings: Settings, *, backward: bool = False) -> str:
        """Return the name of the kernel that serves such a call."""
        problem = _problem(inputs, settings)
        return self._loaded.local_attention_kernel(ctypes.byref(problem), int(backward)).decode()

    def forward(self, inputs: Inputs, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the forward pass.

        Args:
            inputs: `readable` tensors on one device.
            settings: windows, scale, dropout.

        Returns:
            out [B, Y, X, H, D] in the type of the query, and lse [B, Y, X, H] in `wide_dtype`, both contiguous.

        Raises:
            KernelError: the library cannot serve the call.
        """
        out = torch.empty_like(inputs.query, memory_format=torch.contiguous_format)
        lse = out.new_empty(out.shape[:-1], dtype=wide_dtype(out.dtype))
        problem = _problem(inputs, settings)
        problem.out, problem.lse = _view(out), lse.data_ptr()
        self._run(problem, inputs.query, backward=False)
        return out, lse

    def backward(
        self,
        inputs: Inputs,
        settings: Settings,
        out: torch.Tensor,
        lse: torch.Tensor,
        grad_out: torch.Tensor,
        grad_lse: torch.Tensor | None,
        wanted: Sequence[bool],
    ) -> list[torch.Tensor | None]:
        """Run the backward pass.

        Args:
            inputs, settings: as in the forward pass, the same seed included.
            out, lse: its results.
            grad_out: [B, Y, X, H, D] in the type of the query, `readable`.
            grad_lse: [B, Y, X, H] contiguous in `wide_dtype`, or None.
            wanted: for every field of `Inputs`, whether its gradient is asked for.

        Returns:
            For every field of `Inputs` its gradient, contiguous, or None.
        """
        problem = _problem(inputs, settings)
        problem.out, problem.lse = _view(out), lse.data_ptr()
        problem.grad_out, problem.grad_lse = _view(grad_out), _pointer(grad_lse)
        grads: list[torch.Tensor | None] = []
        for name, tensor, want in zip(Inputs._fields, inputs, wanted, strict=True):
            if tensor is None or not want:
                grads.append(None)
                continue
            grad = torch.empty_like(tensor, memory_format=torch.contiguous_format)
            grads.append(grad)
            setattr(
                problem,
                f"grad_{name}",
                grad.data_ptr() if name in ("token_bias", "cross_bias") else _view(grad),
            )
        self._run(problem, inputs.query, backward=True)
        return grads

    def _run(self, problem: _Problem, query: torch.Tensor, *, backward: bool) -> None:
        size = self._loaded.local_attention_workspace_bytes(ctypes.byref(problem), int(backward))
        workspace = torch.empty(size, dtype=torch.uint8, device=query.device)
        problem.workspace = workspace.data_ptr()
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        function = self._loaded.local_attention_backward if backward else self._loaded.local_attention_forward
        if query.is_cuda:
            with torch.cuda.device(query.device):
                stream = torch.cuda.current_stream().cuda_stream
                failed = function(ctypes.byref(problem), stream, message, _MESSAGE_BYTES)
        else:
            failed = function(ctypes.byref(problem), None, message, _MESSAGE_BYTES)
        if failed:
            raise KernelError(message.value.decode(errors="replace"))


def _problem(inputs: Inputs, settings: Settings) -> _Problem:
    query = inputs.query
    problem = _Problem(data_type=DATA_TYPES[query.dtype])
    problem.batch, problem.rows, problem.columns, problem.heads, problem.channels = query.shape
    if inputs.cross_key is not None:
        problem.cross_rows, problem.cross_columns = inputs.cross_key.shape[1:3]
    if inputs.token_key is not None:
        problem.tokens = inputs.token_key.shape[1]
    top, bottom, left, right = window_extent(settings.kernel_size, settings.is_causal)
    problem.window = _Window(top, bottom, left, right, settings.is_causal)
    problem.cross_window = _Window(*window_extent(settings.cross_kernel_size, False), False)
    problem.scale, problem.dropout = settings.scale, settings.dropout
    problem.threads = torch.get_num_threads()
    for name in ("query", "key", "value", "cross_key", "cross_value", "token_key", "token_value"):
        setattr(problem, name, _view(getattr(inputs, name)))
    problem.token_bias, problem.cross_bias = _pointer(inputs.token_bias), _pointer(inputs.cross_bias)
    problem.seed = _pointer(inputs.seed)
    return problem
