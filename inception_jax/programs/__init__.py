"""What the compilers of TPUs and GPUs make of a run's programs, without such a device.

`targets` names the devices, `compile` compiles a run's programs for one of them, `hlo` reads the
text of a compiled program, `audit` counts what it does and where, and `projection` derives times
from the counts and data sheets.
"""
