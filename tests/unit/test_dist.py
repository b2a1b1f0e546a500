"""Collectives on two gloo processes, and the identity without a process group."""

import json
import socket
import subprocess
import sys

import torch

from gruppo import dist


def test_alone_everything_is_the_identity():
    assert (dist.rank(), dist.world_size()) == (0, 1)
    assert dist.all_sum(torch.tensor([3, 4])).tolist() == [3, 4]
    assert dist.all_max(2.5) == 2.5


WORKER = """
import json, sys, torch
from gruppo import dist
rank, port = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group(
    "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
)
summed = dist.all_sum(torch.tensor([rank + 1, 10])).tolist()
print(json.dumps([dist.world_size(), summed, dist.all_max(float(rank))]))
torch.distributed.destroy_process_group()
"""


def test_two_ranks_agree():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), port], stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    said = [json.loads(rank.communicate(timeout=100)[0]) for rank in ranks]
    assert said == [[2, [3, 20], 1.0]] * 2
