"""The emulator's own small kernels (cuda_emulator/probes.cu) on numpy arrays."""

import ctypes

import numpy as np

from tests.kernels.cuda_emulator.build import HERE, build


class Probes:
    """The kernels of probes.cu by name, on numpy arrays."""

    def __init__(self, *defines):
        self.emulated = build([HERE / "probes.cu"], defines=defines)

    def __call__(
        self, name, inputs=None, out=None, others=None, *,
        count=0, variant=0, blocks=1, threads=32, shared=0,
    ):  # fmt: skip
        pointers = [None if x is None else x.ctypes.data_as(ctypes.c_void_p)
                    for x in (inputs, others, out)]  # fmt: skip
        code = self.emulated.library.probe(
            name.encode(), *pointers, count, variant, ctypes.c_int64(blocks), threads, shared
        )
        self.emulated.check(code)
        return out

    def fresh(self):
        """With the default settings, and counters at 0."""
        self.emulated.configure()
        self.emulated.take_counters()
        return self


def rounded(x):
    """float32 -> the bits of bfloat16, cut off; exact where 16 bits suffice."""
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def widened(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)
