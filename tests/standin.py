"""A device that is not there: values live on the CPU, and PyTorch is told that they do not.

`with stand_in() as device:` gives a `torch.device`. What is moved to it computes as on the CPU, but
an operator whose tensors lie on different devices is refused, as a GPU would refuse it. So a
machine without a GPU finds the code that a GPU would stop at.
"""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    return_and_correct_aliasing,
)
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

# PyTorch keeps a place free for a device of somebody's own
_setup_privateuseone_for_python_backend("standin")
torch.standin.manual_seed = lambda seed: None
# gradient checkpointing asks every device for it, once this one is known
torch.standin.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
DEVICE = torch.device("standin", 0)
aten = torch.ops.aten

# operators that carry values from one device to another, or that read indices from the CPU
CROSSING = {
    aten._to_copy,
    aten.copy_,
    aten.index,
    aten.index_put,
    aten.index_put_,
    aten._index_put_impl_,
}


class DeviceMismatch(RuntimeError):
    "Tensors of one operator lie on different devices."


class Distant(torch.Tensor):
    "A tensor that says it lies on `DEVICE`; `values` are on the CPU."

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            requires_grad=values.requires_grad,
            device=DEVICE,
        )

    def __init__(self, values):
        self.values = values

    def __repr__(self):
        return f"Distant({self.values!r})"

    def tolist(self):
        return self.values.tolist()

    def storage(self):
        return self.values.storage()

    def untyped_storage(self):
        return self.values.untyped_storage()

    def __reduce_ex__(self, protocol):
        return self.values.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def refuse_mixture(func, flat):
    "An error where tensors with at least one dimension lie on different devices."
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    distant = [x for x in tensors if isinstance(x, Distant)]
    near = [x for x in tensors if not isinstance(x, Distant) and x.ndim > 0]
    if distant and near and func.overloadpacket not in CROSSING:
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in near)
        raise DeviceMismatch(f"{func}: tensors on the device meet tensors on the CPU: {shapes}")


def run(func, args, kwargs):
    "One operator: computed on the CPU, its result where a GPU would leave it."
    flat, _ = tree_flatten((args, kwargs))
    refuse_mixture(func, flat)
    asked = kwargs.get("device")
    distant = any(isinstance(x, Distant) for x in flat)
    if asked is not None:
        distant = torch.device(asked).type == DEVICE.type
        if distant:
            kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": False}
        if distant and kwargs.get("generator") is not None:
            raise DeviceMismatch(f"{func}: a CPU generator draws for the device")
    elif func.overloadpacket is aten.copy_:
        distant = isinstance(args[0], Distant)
    near_args, near_kwargs = tree_map_only(Distant, lambda x: x.values, (args, kwargs))
    out = func(*near_args, **near_kwargs)
    if distant:
        out = tree_map(lambda x: Distant(x) if type(x) is torch.Tensor else x, out)
    if asked is not None or not any(isinstance(x, Distant) for x in flat):
        return out
    return return_and_correct_aliasing(func, args, kwargs, out)


def empty_strided(size, stride, *, dtype=None, **kwargs):
    "Where PyTorch itself makes room on the device, as in `torch.tensor(..., device=DEVICE)`."
    return Distant(torch.empty_strided(size, stride, dtype=dtype))


def empty(size, *, dtype=None, **kwargs):
    "As `empty_strided`."
    return Distant(torch.empty(size, dtype=dtype))


def copy_from(source, target, non_blocking=False):
    "Where PyTorch itself fills that room."
    values = target.values if isinstance(target, Distant) else target
    values.copy_(source.values if isinstance(source, Distant) else source)
    return target


# kept for as long as the module is
library = torch.library.Library("aten", "IMPL")
library.impl("empty_strided", empty_strided, "PrivateUse1")
library.impl("empty.memory_format", empty, "PrivateUse1")
library.impl("_copy_from", copy_from, "PrivateUse1")


class Operators(TorchDispatchMode):
    "Every operator, those that make new tensors too."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


@contextmanager
def stand_in():
    "A context in which `DEVICE` can be computed with; gives the device."
    with Operators():
        yield DEVICE
