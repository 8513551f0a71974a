"""Memory that a process keeps although nothing needs it, and how to give it back to the system.

All of it is advice: where the system takes none, more stays in memory and nothing else changes.
"""

import contextlib
import ctypes
import mmap
from collections.abc import Iterable

import torch
from torch import nn

_NO_ADVICE = (AttributeError, OSError, TypeError)  # another C library, or none that can be called
_PAGEOUT = 21  # MADV_PAGEOUT of Linux; Python has no name for it


def give_back() -> None:
    """Return what was freed to the system. glibc keeps it, scattered: of passes a quarter of DeiT-base's own size."""
    with contextlib.suppress(*_NO_ADVICE):
        ctypes.CDLL(None).malloc_trim(0)


def put_away(tensors: Iterable[torch.Tensor]) -> None:
    """Let tensors that are mapped from a file leave memory until they are read again.

    A base's weights are: what was read of them once would stay, beside their copy in another precision or on a GPU.
    """
    with contextlib.suppress(*_NO_ADVICE):
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for tensor in tensors:
            if tensor.device.type == "cpu" and not tensor.untyped_storage().resizable():  # not memory of torch's own
                first = -(-tensor.data_ptr() // mmap.PAGESIZE)  # whole pages only: the others belong to others too
                pages = max((tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE - first, 0)
                advise(first * mmap.PAGESIZE, pages * mmap.PAGESIZE, _PAGEOUT)


def hold(model: nn.Module, precision: torch.dtype) -> None:
    """Put what is frozen of a model into a precision, one weight after the other, so that it is never there twice."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.dtype != precision and not tensor.requires_grad:
            before, tensor.data = tensor.data, tensor.data.to(precision)
            put_away([before])
