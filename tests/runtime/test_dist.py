"""What processes say of each other's faults, which device is whose, and tensors that outlive the mode they were made in."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from orderlab.config import UserError
from orderlab.data.tokens import tokenizer
from orderlab.models.transformer import _kept_rope_table, rope_table
from orderlab.order.policy import _cached_path
from orderlab.runtime import dist
from orderlab.training.optim import gradient_norm


@pytest.mark.parametrize(
    ("message", "is_lost"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:1234", True),
        ("[/gloo/transport/tcp/pair.cc:446] Connection reset by peer", True),
        ("[/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete", True),
        ("NCCL error: remote process exited or there was a network error, NCCL version 2.27\nncclRemoteError: A call failed", True),
        ("CUDA out of memory. Tried to allocate 2.00 GiB. NCCL workspace included", False),
        ("NCCL error: invalid usage, NCCL version 2.27\nncclInvalidUsage: Duplicate GPU detected : rank 0 and rank 1", False),
        ("mat1 and mat2 shapes cannot be multiplied (gloo)", False),
    ],
)
def test_only_a_peer_that_is_gone_is_called_lost(message: str, is_lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist.dist, "is_initialized", lambda: True)
    with pytest.raises(UserError if is_lost else RuntimeError, match="lost the others" if is_lost else None), dist.world():
        raise RuntimeError(message)


def test_more_processes_than_gpus_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert dist.own_device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"process 2 .* 2 are visible; start at most 2"):
        dist.own_device()


def test_the_norm_of_no_gradient_lies_where_the_model_lies() -> None:
    norm = gradient_norm(nn.Linear(2, 2, device="meta"))
    assert norm.device.type == "meta"
    assert gradient_norm(nn.Linear(2, 2)) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: rope_table((4, 4), 8, 100.0, torch.float32, torch.device("cpu")),
        lambda: _cached_path("spiral", 4, 4),
        lambda: next(tokenizer("fashion-8x8").parameters()),
    ],
    ids=["rope_table", "path", "tokenizer"],
)
def test_what_is_kept_from_sampling_can_be_trained_with(make: Callable[[], torch.Tensor]) -> None:
    for function in (_kept_rope_table, _cached_path, tokenizer):
        function.cache_clear()
    with torch.inference_mode():
        assert not make().is_inference()
