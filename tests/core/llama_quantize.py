"""`llama-quantize IN OUT KIND` over a llama.cpp library, for machines that have the library without the program.

LIBLLAMA names the library, with those of ggml beside it, as `npm pack @node-llama-cpp/linux-x64` brings them. The
function called is the one that the program calls; of its parameters only the type (the second 32-bit number) is set.
"""

import ctypes
import os
import sys
from pathlib import Path

TYPES = {"Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}  # enum llama_ftype of llama.h


class Parameters(ctypes.Structure):
    """`llama_model_quantize_params`, and room for whatever newer versions add."""

    _fields_ = (("threads", ctypes.c_int32), ("type", ctypes.c_int32), ("rest", ctypes.c_byte * 504))


def main(source: str, target: str, kind: str) -> int:
    library = Path(os.environ["LIBLLAMA"])
    for name in ("libggml-base", "libggml."):
        for file in library.parent.glob(f"{name}*so*"):
            ggml = ctypes.CDLL(str(file), ctypes.RTLD_GLOBAL)
    ggml.ggml_backend_load_all_from_path(str(library.parent).encode())
    llama = ctypes.CDLL(str(library))
    llama.llama_backend_init()
    llama.llama_model_quantize_default_params.restype = Parameters
    parameters = llama.llama_model_quantize_default_params()
    parameters.type = TYPES[kind]
    return llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
