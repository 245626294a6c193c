# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""Three training steps with CLIP in each of two processes: `torchrun --nproc_per_node 2 encoder_ddp_probe.py`

DistributedDataParallel runs without `find_unused_parameters`, so that a parameter without a gradient is an error.
"""

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPVisionConfig

from modeling_tdd import TDDConfig, TDDForImageClassification


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
NUM_STEPS = 3


def main() -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    torch.manual_seed(0)
    vision_config = CLIPVisionConfig(image_size=32, patch_size=8, **SIZES)
    model = TDDForImageClassification(TDDConfig(vision_config=vision_config, num_labels=5, num_timesteps=20, **SIZES))
    before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    parallel = DistributedDataParallel(model).train()
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-3)
    torch.manual_seed(rank)  # each process has images and noise of its own
    for _ in range(NUM_STEPS):
        parallel(torch.randn(4, 3, 32, 32), torch.randint(5, (4,))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert not torch.equal(after, before)
    gathered = [torch.empty_like(after) for _ in range(distributed.get_world_size())]
    distributed.all_gather(gathered, after)
    assert len(gathered) == 2 and torch.equal(*gathered)
    print(f"rank {rank}: {NUM_STEPS} steps, equal weights", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
