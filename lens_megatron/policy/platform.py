"""Makes CPU a platform for Megatron-Core: the one place where library functions are replaced.

Megatron-Core names CUDA literally in a few places (`device="cuda"`, `tensor.cuda()`, `torch.cuda.current_device()`).
On a machine without CUDA `install()` answers those with their CPU meaning. Where CUDA is there it does nothing.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.overrides import TorchFunctionMode

from lens_megatron.config import ConfigError
from lens_megatron.supervision.agreement import ToldError, told_by_main
from lens_megatron.supervision.channel import ChannelError, address_towards
from lens_megatron.supervision.control_store import ControlProcess, ControlStore

_installed: list[TorchFunctionMode] = []


class _CudaMeansCpu(TorchFunctionMode):
    """Replaces the device cuda by cpu; `Tensor.type()` answers as on a GPU, because clip_grads asserts on it."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        if function is torch.Tensor.cuda:
            return args[0]
        if function is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        result = function(*args, **kwargs)
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("torch.", "torch.cuda.", 1)
        return result


class _Stream:
    """Stands for a CUDA stream and for an event on one, where operations are done when they return."""

    def wait_stream(self, other: "_Stream") -> None:
        pass

    def record_event(self) -> "_Stream":
        return self

    def synchronize(self) -> None:
        pass


def _is_cuda(device: object) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


def install() -> torch.device:
    """Must be called once per process, before megatron.core is imported. Returns the device to compute on."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    if not _installed:
        _replace_cuda_functions()
        mode = _CudaMeansCpu()
        mode.__enter__()
        _installed.append(mode)
    return torch.device("cpu")


def _replace_cuda_functions() -> None:
    cpu, stream = torch.device("cpu"), _Stream()
    replacements: dict[str, object] = {
        "current_device": lambda: cpu,
        "synchronize": lambda *args, **kwargs: None,
        "Stream": _Stream,
        "current_stream": lambda *args, **kwargs: stream,
        "stream": lambda stream: nullcontext(),
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "FloatTensor": torch.FloatTensor,
        "IntTensor": torch.IntTensor,
        "LongTensor": torch.LongTensor,
        "DoubleTensor": torch.DoubleTensor,
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)

    from megatron.core.tensor_parallel import mappings
    from megatron.core.tensor_parallel import random as tensor_parallel_random

    tensor_parallel_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    tensor_parallel_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    from megatron.core.transformer.moe import token_dispatcher

    mappings._gather_along_first_dim = _gather_unequal(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = _scatter_unequal(mappings._reduce_scatter_along_first_dim)
    token_dispatcher.maybe_move_tensor_to_cpu = _as_if_moved


def _gather_unequal(gather: Callable) -> Callable:
    """Makes `gather` take ranks with different numbers of rows: gloo gathers equal sizes only."""

    def replacement(
        rows: torch.Tensor,
        group: ProcessGroup,
        output_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if output_split_sizes is None:
            return gather(rows, group, None, use_global_buffer)
        padded = rows.new_zeros(max(output_split_sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = gather(padded, group).unflatten(0, (len(output_split_sizes), len(padded)))
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    return replacement


def _scatter_unequal(reduce_scatter: Callable) -> Callable:
    """Makes `reduce_scatter` take them too: it sums everything on every rank and keeps this rank's rows."""

    def replacement(
        rows: torch.Tensor,
        group: ProcessGroup,
        input_split_sizes: list[int] | None = None,
        use_global_buffer: bool = False,
    ) -> torch.Tensor:
        if input_split_sizes is None:
            return reduce_scatter(rows, group, None, use_global_buffer)
        total = rows.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()]

    return replacement


def _as_if_moved(value: object, as_numpy: bool = False, record_stream: bool = False) -> object:
    """Turns a count into what the dispatcher of tokens to experts makes of it on a GPU.

    On a CPU it would leave a tensor, which gloo does not take for a list of sizes.
    """
    return value.numpy() if as_numpy and isinstance(value, torch.Tensor) else value


def init_process_group(device: torch.device, timeout_minutes: float = 30) -> None:
    """Joins torchrun's world (or makes a world of one) over NCCL and gloo, or gloo alone on CPU.

    A collective that takes longer than `timeout_minutes` fails.
    """
    if torch.distributed.is_initialized():
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_PORT="0")
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=timeout_minutes)
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    # torchrun keeps one store for all attempts; without a prefix a restarted rank calls at its dead peers' addresses.
    store = PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def open_control_store(device: torch.device) -> ControlStore:
    """Starts the store on rank 0 and connects every rank. A collective, after `init_process_group`.

    Raises:
        ConfigError: rank 0 cannot listen where the others would reach it, or this rank does not reach it.
    """
    processes: list[ControlProcess] = []

    def start() -> str:
        processes.append(ControlProcess(_host_for_the_others()))
        address = processes[0].address
        return f"{processes[0].secret.hex()} {address[0]} {address[1]}"

    try:
        secret, host, port = told_by_main(start, device).split()
    except (OSError, ToldError) as error:
        raise ConfigError(
            f"the ranks' control store cannot start: {error}; MASTER_ADDR must be an address of rank 0's machine that "
            "all machines of the run can reach"
        ) from error
    store = ControlStore([host, int(port)], bytes.fromhex(secret), process=processes[0] if processes else None)
    try:
        store.get([])
    except ChannelError as error:
        store.close()
        raise ConfigError(f"the control store of rank 0: {error}; its machine must let the others in there") from error
    return store


def _host_for_the_others() -> str:
    """This machine's address for the other ranks: loopback where all are here. Raises OSError."""
    world_size = torch.distributed.get_world_size()
    if int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) == world_size:
        return "127.0.0.1"
    name = os.environ["MASTER_ADDR"]
    host = address_towards(name, int(os.environ["MASTER_PORT"]))
    if host.startswith("127.") or host == "::1":
        raise OSError(f"MASTER_ADDR={name} is {host} on rank 0's machine, where no other machine can reach it")
    return host
