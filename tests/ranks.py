"""Work on several processes that form a gloo group."""

import datetime
import multiprocessing

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Processes come from a server that has imported what is slow to import.
multiprocessing.set_forkserver_preload(["neusemslice", "torch.distributed.fsdp"])


def _started(rank, address, world, work, *args):
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=60)  # for a rank that waits for others in vain
    dist.init_process_group("gloo", address, limit, rank=rank, world_size=world)
    work(rank, world, *args)
    dist.destroy_process_group()


def on_ranks(world, work, folder, *args):
    """Runs ``work(rank, world, *args)`` in as many processes; an error in one is an error here."""
    address = f"file://{folder}/rendezvous"
    mp.start_processes(
        _started, (address, world, work, *args), nprocs=world, start_method="forkserver"
    )
