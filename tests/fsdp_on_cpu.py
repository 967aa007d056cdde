"""在没有显卡的机器上测 FSDP：由 accelerate launch 启动，参数同 a100_train.py（见 test_distributed.py）。

accelerate 只在显卡上选 FSDP，CPU 上悄悄改用 DDP。这里让它在 CPU 上也选 FSDP（通信走 gloo），其余都是真的。
另外让每个进程都记下自己的续写，看它们是不是一样。
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import accelerate.accelerator
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

import a100_train


class FSDPState(accelerate.accelerator.AcceleratorState):
    def __init__(self, *args, fsdp_plugin=None, **kwargs):
        super().__init__(*args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


def restrict(speed, args, original=a100_train.restrict_to_fsdp):
    as_cuda = speed | {"device": "cuda"}
    original(as_cuda, args)
    speed.update(as_cuda, device=speed["device"])


def generate(model, *args, original=a100_train.generate_samples):
    assert isinstance(model, FSDPModule) and isinstance(model.transformer.h[0], FSDPModule)
    samples = original(model, *args)
    with open(os.environ["SAMPLES"] + str(a100_train.RANK), "a", encoding="utf-8") as file:
        file.write(json.dumps(samples) + "\n")
    return samples


accelerate.accelerator.AcceleratorState = FSDPState
a100_train.restrict_to_fsdp, a100_train.generate_samples = restrict, generate
a100_train.plot_curve = lambda *_: None
a100_train.run(a100_train.main)
