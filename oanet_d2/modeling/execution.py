"""
How the network is run: memory, memory format, precision, compilation. What it computes stays the
same, up to rounding.
"""

import os
import shutil
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Optional

import torch
from torch import nn

from .allocator import memory_used_again
from .lean import make_lean
from .parallel_roi_align import make_roi_align_parallel

__all__ = ["Execution"]

# Pixels from which on a map of 256 channels at stride 4 has 32 MiB.
LARGE = 2**19
AUTOCAST = {"": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Execution:
    """
    Attributes:
        channels_last: images, weights and feature maps are kept channels last.
        inference_mode: inference runs in :class:`torch.inference_mode`.
        autocast: what inference is autocast to; None: it is not.
        compile: the backbone is compiled with :func:`torch.compile`.
        reuse_memory: large images are run on a CPU in :func:`memory_used_again`.
        train_autocast: what training is autocast to, if it is not the trainer that does it.
    """

    channels_last: bool = False
    inference_mode: bool = False
    autocast: Optional[torch.dtype] = None
    compile: bool = False
    reuse_memory: bool = False
    train_autocast: Optional[torch.dtype] = None

    @classmethod
    def from_config(cls, cfg) -> "Execution":
        """
        What `cfg.MODEL.OANET` asks for.

        Raises:
            ValueError: it cannot work here; the message names the config key.
        """
        options = cfg.MODEL.OANET
        if options.AUTOCAST not in AUTOCAST:
            raise ValueError(
                f"MODEL.OANET.AUTOCAST is {options.AUTOCAST!r}; it must be one of {[*AUTOCAST]}."
            )
        if options.AUTOCAST == "float16" and cfg.MODEL.DEVICE == "cpu":
            raise ValueError(
                "MODEL.OANET.AUTOCAST is 'float16', which few CPUs compute in; use 'bfloat16', or "
                f"another MODEL.DEVICE than {cfg.MODEL.DEVICE!r}."
            )
        if options.COMPILE:
            _check_compile(cfg.MODEL.DEVICE)
        # Detectron2's AMPTrainer is for GPUs. On a CPU there is bfloat16, which needs no loss scale.
        amp_on_cpu = cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu"
        return cls(
            options.CHANNELS_LAST,
            options.INFERENCE_MODE,
            AUTOCAST[options.AUTOCAST],
            options.COMPILE,
            options.REUSE_MEMORY,
            torch.bfloat16 if amp_on_cpu else None,
        )

    def prepare(self, model: nn.Module) -> None:
        """
        Change a model that has just been built, in place. Names of parameters stay.
        """
        for name, part in model.named_children():
            # A compiler finds out for itself when a map is not needed any more.
            if not (self.compile and name == "backbone"):
                make_lean(part)
        make_roi_align_parallel(model)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)
        if self.compile:
            # Images come in many sizes.
            model.get_submodule("backbone").compile(dynamic=True)

    def images(self, batch: torch.Tensor) -> torch.Tensor:
        """
        (B, 3, H, W) images as the network should be given them.
        """
        return batch.contiguous(memory_format=torch.channels_last) if self.channels_last else batch

    @contextmanager
    def inference(self, device: torch.device, num_pixels: int):
        """
        What inference has to be run in.

        Args:
            num_pixels: of all images of the batch together.
        """
        with ExitStack() as stack:
            if self.reuse_memory and device.type == "cpu" and num_pixels >= LARGE:
                stack.enter_context(memory_used_again())
            if self.inference_mode:
                stack.enter_context(torch.inference_mode())
            if self.autocast is not None:
                stack.enter_context(torch.autocast(device.type, dtype=self.autocast))
            yield

    def training(self, device: torch.device):
        """
        What a training step's losses have to be computed in.
        """
        if self.train_autocast is None:  # then it may be that of the trainer
            return nullcontext()
        return torch.autocast(device.type, dtype=self.train_autocast)


def _check_compile(device: str) -> None:
    if not hasattr(nn.Module, "compile"):
        raise ValueError(
            "MODEL.OANET.COMPILE is True, which needs PyTorch 2.2 or newer; this is "
            f"{torch.__version__}."
        )
    compilers = [os.environ.get("CXX"), "g++", "clang++"]
    if device == "cpu" and not any(shutil.which(c) for c in compilers if c):
        raise ValueError(
            "MODEL.OANET.COMPILE is True, which needs a C++ compiler for MODEL.DEVICE 'cpu', but "
            "there is no g++ or clang++; install one or name it in the environment variable CXX."
        )
