"""
A device for machines without one. Its tensors say that they are on "mps" and live on the CPU. As on
a real device they do not meet CPU tensors, and as on Apple's GPUs there is no float64. So a
forgotten `.to(device)` fails everywhere.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["DEVICE", "PretendDevice"]

DEVICE = torch.device("mps:0")
COPY = torch.ops.aten.copy_.default
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default)


class PretendTensor(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        if inner.dtype == torch.float64:
            raise TypeError("The device of pretence has no float64.")
        # PyTorch's C++ wants a device that every build has: "meta".
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        kind = {"dtype": inner.dtype, "device": "meta"}
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **layout, **kind)
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})

    @property
    def device(self):
        return DEVICE

    def tolist(self):
        return self.cpu().tolist()

    def new_tensor(self, data, **kwargs):
        return torch.tensor(data, **{"dtype": self.dtype, "device": DEVICE, **kwargs})


class PretendDevice(TorchDispatchMode):
    """
    In here `device=DEVICE` and `.to(DEVICE)` work.
    """

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(x, device=DEVICE) comes here then
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return run(op, args, kwargs or {})


def run(op, args, kwargs):
    # As on a real device, indices may be on the CPU.
    checked = args[:1] + args[2:] if op in INDEXING and isinstance(args[0], PretendTensor) else args
    tensors = [x for x in tree_leaves((checked, kwargs)) if isinstance(x, torch.Tensor)]
    devices = {x.device.type for x in tensors if x.dim() > 0 or isinstance(x, PretendTensor)}
    if len(devices) > 1 and op is not COPY:
        raise RuntimeError(f"{op}: tensors of the CPU and of the device of pretence meet.")
    on_device = isinstance(args[0], PretendTensor) if op is COPY else DEVICE.type in devices
    if kwargs.get("device") is not None:
        on_device = torch.device(kwargs["device"]).type in ("mps", "meta")
        kwargs = {**kwargs, "device": "cpu"}
    same = {id(x.inner): x for x in tensors if isinstance(x, PretendTensor)}
    args, kwargs = tree_map_only(PretendTensor, lambda x: x.inner, (args, kwargs))
    result = op(*args, **kwargs)
    if not on_device:
        return result

    def wrap(x):  # an operation in place gives back the tensor itself
        return same[id(x)] if id(x) in same else PretendTensor(x)

    return tree_map_only(torch.Tensor, wrap, result)
