"""Processes of one run: communication between ranks, detection of lost ones, launching on CPUs, locks of folders."""

from mmssl.distributed.folder_lock import FolderLock
from mmssl.distributed.heartbeat import Heartbeat, peer_loss_as_user_error
from mmssl.distributed.launch import missing_processes, start_processes
from mmssl.distributed.world import (
    SINGLE_PROCESS,
    World,
    copy_into,
    current_world,
    full_tensor,
    local_tensor,
    process_group,
)

__all__ = [
    "SINGLE_PROCESS",
    "FolderLock",
    "Heartbeat",
    "World",
    "copy_into",
    "current_world",
    "full_tensor",
    "local_tensor",
    "missing_processes",
    "peer_loss_as_user_error",
    "process_group",
    "start_processes",
]
