"""The output head with a weight that is sharded over two processes, as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_RANK = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from kdpipe.stages.train.losses import Divergence, head_terms
from kdpipe.stages.train.losses.head import linear_logsumexp_gather

dist.init_process_group("gloo")
rank, size, form = dist.get_rank(), dist.get_world_size(), sys.argv[1]
torch.manual_seed(0)
weight, hidden = torch.randn(51, 8), torch.randn(size, 6, 8)  # 51 rows: shares of 26 and 25
labels = torch.randint(0, 51, (size, 6))


def loss(weight, hidden, labels):
    found = head_terms(hidden, weight, labels, [], divergence=Divergence("jsd"), form=form).loss
    if form == "in_forward":
        return found
    lse, picked = linear_logsumexp_gather(hidden, weight, labels[:, None], form=form)
    return found + (lse.square().sum() + picked.sum())


whole, every = weight.clone().requires_grad_(), hidden.clone().requires_grad_()
expected = [loss(whole, every[one], labels[one]) for one in range(size)]
sum(expected).backward()
shared = distribute_tensor(weight, init_device_mesh("cpu", (size,)), [Shard(0)]).requires_grad_()
own = hidden[rank].clone().requires_grad_()
found = loss(shared, own, labels[rank])
found.backward()
torch.testing.assert_close(found, expected[rank])
torch.testing.assert_close(own.grad, every.grad[rank])
assert shared.grad.placements == (Shard(0),) and len(shared.grad.to_local()) < 51
torch.testing.assert_close(shared.grad.full_tensor(), whole.grad)
print("fits")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("form", ["reference", "chunked", "in_forward"])
def test_a_sharded_weight_gives_the_loss_and_gradients_of_the_whole_one(form: str, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(_RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "rank.py"), form],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and done.stdout.count("fits") == 2, done.stderr
