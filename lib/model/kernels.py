"""The registry of attention kernels, and the choice among them: by name, or the best that the machine can use."""

import importlib
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch._library.custom_ops import CustomOpDef

from lib.errors import UserError
from lib.model.config import KernelName, ModelParams
from lib.model.flash import FLASH4, FlashAttend, attend_by_flash, attend_with, attend_with_flash4
from lib.model.sdpa import SDPA, Kernel
from lib.params import Precision

MAX_HEAD_DIM, HEAD_DIM_MULTIPLE = 256, 8  # of all three libraries


class KernelError(UserError):
    """The named kernel cannot be used; the message names key, what was found and the way out."""


class Library(NamedTuple):
    """Where a kernel comes from, and what it needs.

    Attributes:
        module: what is imported, when the kernel is asked for.
        install: how it gets there.
        capabilities: major compute capabilities of the GPUs that it is made for.
        attend: attention with that module.
    """

    module: str
    install: str
    capabilities: tuple[int, ...]
    attend: Callable[[ModuleType], FlashAttend]


LIBRARIES: dict[KernelName, Library] = {  # best first; sdpa needs none
    "flash3": Library("flash_attn_interface", "build hopper/ of github.com/Dao-AILab/flash-attention", (9,), attend_with),
    "flash4": Library(FLASH4, "pip install --pre flash-attn-4", (9, 10, 11), attend_with_flash4),
    "flash2": Library("flash_attn.flash_attn_interface", "pip install 'flash-attn>=2.8'", (8, 9, 10, 11, 12), attend_with),
}


def choose_kernel(wanted: KernelName, model: ModelParams, precision: Precision, device: torch.device) -> Kernel:
    """The named kernel, or for ``auto`` the best that can be used.

    Args:
        wanted: name of the kernel.
        model: what it is for; its head dimension matters.
        precision: precision of matrix products.
        device: where it runs.

    Raises:
        KernelError: the named kernel is not installed, or not made for this device, precision or head dimension.
    """
    obstacles: dict[str, list[str]] = {}
    for name in LIBRARIES if wanted == "auto" else {wanted} & LIBRARIES.keys():
        obstacle = _find_obstacle(name, model, precision, device)
        if obstacle is None:
            return Kernel(name, _give_reason(name, wanted, obstacles), partial(attend_by_flash, _load(LIBRARIES[name])))
        obstacles.setdefault(obstacle, []).append(name)
    if wanted not in ("auto", "sdpa"):
        raise KernelError(f"model.attention: expected a kernel that can be used here, found {wanted}, which {'; '.join(obstacles)}; "
                          "change that, or set model.attention to auto or sdpa")
    return Kernel("sdpa", _give_reason("sdpa", wanted, obstacles), SDPA.within)


def _load(library: Library) -> FlashAttend:
    return library.attend(importlib.import_module(library.module))


def _give_reason(name: str, wanted: KernelName, obstacles: dict[str, list[str]]) -> str:
    if name == wanted:
        return f"{name}: named by model.attention"
    return "; ".join([f"{name}: the best that can be used here", *(f"{', '.join(names)}: {text}" for text, names in obstacles.items())])


def _find_obstacle(name: KernelName, model: ModelParams, precision: Precision, device: torch.device) -> str | None:
    """Why a kernel of `LIBRARIES` cannot be used, and what would help; None if it can."""
    library, head_dim = LIBRARIES[name], model.head_dim
    if device.type != "cuda":
        return f"needs a CUDA device, found {device.type}"
    if precision != "bf16":
        return f"needs precision bf16, found {precision}"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in library.capabilities:
        return f"needs compute capability {' or '.join(f'{each}.x' for each in library.capabilities)}, found {major}.{minor}"
    if head_dim % HEAD_DIM_MULTIPLE or head_dim > MAX_HEAD_DIM:
        return f"needs a multiple of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM} for model_dim / num_heads, found {head_dim}"
    if name == "flash4" and major > 9 and 128 < head_dim < MAX_HEAD_DIM:  # _validate_head_dims of its interface.py
        return f"needs at most 128, or {MAX_HEAD_DIM}, for model_dim / num_heads on compute capability {major}.x, found {head_dim}"
    return _find_obstacle_of_module(name, library)


def _find_obstacle_of_module(name: KernelName, library: Library) -> str | None:
    try:
        module = importlib.import_module(library.module)
    except (ImportError, OSError) as error:  # OSError: a shared library that is missing
        return f"cannot be imported ({error}): {library.install}"
    if name != "flash4" and not isinstance(module._flash_attn_forward, CustomOpDef):
        return f"is too old for torch.compile, its forward pass is no custom operator: {library.install}"
    return None
