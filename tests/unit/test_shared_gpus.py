"""Which GPU an instance starts on."""

from types import SimpleNamespace

import pytest
from sglang.srt.managers.data_parallel_controller import DataParallelController

from pascal_sglang.cluster.controller import PascalController
from pascal_sglang.config import PascalConfig


@pytest.mark.parametrize(
    ("gpus", "expected"), [(None, [2, 3, 4, 5]), (1, [2, 2, 2, 2]), (2, [2, 3, 2, 3])]
)
def test_instances_take_turns_on_the_gpus_they_share(monkeypatch, gpus, expected):
    started = []
    monkeypatch.setattr(
        DataParallelController,
        "launch_tensor_parallel_group",
        lambda self, server_args, port_args, base_gpu_id, dp_rank: started.append(base_gpu_id),
    )
    controller = object.__new__(PascalController)
    controller.pascal_config = PascalConfig(gpus=gpus)
    server_args = SimpleNamespace(base_gpu_id=2)
    for dp_rank in range(4):
        controller.launch_tensor_parallel_group(server_args, None, 2 + dp_rank, dp_rank)
    assert started == expected
