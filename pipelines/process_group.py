"""How Ray Train's workers find each other: as Ray does it, or on the loopback interface alone.

The store through which ranks of `torch.distributed` meet asks for no password. On a cluster of one machine that binds
loopback, torch would still let it listen on every interface, and gloo on that of the machine's name.
"""

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from torch.distributed import TCPStore  # type: ignore[attr-defined]

_LOOPBACK = "127.0.0.1"

# Lives as long as the process of rank 0, which serves it.
_served: list[TCPStore] = []


def torch_config(backend: str, timeout_s: int) -> TorchConfig:
    """The process group's configuration for the cluster that this driver is connected to.

    Args:
        backend: gloo or nccl.
        timeout_s: seconds after which a collective operation fails.
    """
    local = ray.util.get_node_ip_address() == _LOOPBACK
    return (LoopbackTorchConfig if local else TorchConfig)(backend=backend, timeout_s=timeout_s)


@dataclass
class LoopbackTorchConfig(TorchConfig):  # type: ignore[misc]
    """A process group whose sockets all listen on the loopback interface."""

    @property
    def backend_cls(self) -> Any:
        """The class that sets the group up; it differs from Ray's in that alone."""
        return _LoopbackBackend


class _LoopbackBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        timeout = timedelta(seconds=backend_config.timeout_s)
        size = len(worker_group)
        port = worker_group.execute_single(0, serve_store, _LOOPBACK, size, timeout)
        joining = [
            worker_group.execute_single_async(
                rank, join_group, backend_config.backend, (_LOOPBACK, port), rank, size, timeout
            )
            for rank in range(size)
        ]
        ray.get(joining)


def serve_store(host: str, size: int, timeout: timedelta) -> int:
    """Serve the store of a group of ``size`` ranks from this process, on this machine's address ``host`` alone.

    Returns its port.
    """
    listener = socket.create_server((host, 0))
    port = int(listener.getsockname()[1])
    store = TCPStore(
        host,
        port,
        size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        # The store owns the socket from here on.
        master_listen_fd=listener.detach(),
    )
    _served.append(store)
    return port


def join_group(backend: str, address: tuple[str, int], rank: int, size: int, timeout: timedelta) -> None:
    """Become a rank of the default process group, whose store is at ``address``; rank 0 is the process that serves it.

    Returns when all ranks have joined. A group that meets on loopback stays there.
    """
    host, port = address
    if host == _LOOPBACK and (interface := _loopback_interface()) is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    store = _served[-1] if rank == 0 else TCPStore(host, port, size, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _loopback_interface() -> str | None:
    """The name of the interface that has 127.0.0.1 (lo on Linux, lo0 on macOS)."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, addresses in interfaces if any(a.address == _LOOPBACK for a in addresses)), None)
