"""Runs a script, the first argument, with accelerate's FSDP on CPU processes.

accelerate turns to FSDP only where processes have accelerators (`AcceleratorState` asks for MULTI_GPU and its like and
leaves MULTI_CPU to DDP), though nothing in its FSDP2 needs one: torch shards over gloo as well. So the processes are
called what they would be called on GPUs; all the rest is accelerate's own.
"""

import runpy
import sys

from accelerate.state import DistributedType, PartialState


initialize = PartialState.__init__


def initialize_as_on_gpus(self, *args, **kwargs):
    initialize(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = initialize_as_on_gpus
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
