"""Compile kernels for an H100 or H200 (sm_90) without a GPU, and look at the machine code.

    python -P tests/kernels/offline.py headway.kernels.triton.slots ...

Prints one JSON object a line for every entry of each module's `shipped()`: kernel, constants, registers used and
available per thread, bytes of spills and of shared memory, and how many instructions use tensor cores. Not under
Triton's interpreter, which compiles nothing.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("cuda", 90, 32)
REGISTERS = 1 << 16  # of one multiprocessor; a thread has at most 255
ALIGNED = 16
"""Bytes; what PyTorch's allocator gives for sure, and what strides of whole rows keep."""


def compiled(shipped):
    names = shipped.kernel.arg_names
    # As at a launch with aligned pointers: loads of 16 bytes may be used.
    attributes = {
        (at,): [["tt.divisibility", ALIGNED]]
        for at, name in enumerate(names)
        if shipped.signature.get(name, "").startswith("*")
    }
    signature = {name: shipped.signature.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in shipped.constants.items()}
    source = ASTSource(fn=shipped.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGET, options={"num_warps": shipped.warps, "num_stages": shipped.stages})


def cuobjdump():
    tool = Path(triton.__path__[0]) / "backends" / "nvidia" / "bin" / "cuobjdump"
    assert tool.exists(), f"{tool} is not there; install triton from its wheel"
    return str(tool)


def looked_at(kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([cuobjdump(), option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    registers, local = (int(re.findall(rf"\b{name}:(\d+)", usage)[0]) for name in ("REG", "LOCAL"))
    spilled = len(re.findall(r"\b(STL|LDL)\b", code))
    return {
        "registers": registers,
        "local_bytes": local,
        "spill_instructions": spilled,
        "shared_bytes": kernel.metadata.shared,
        "tensor_core_instructions": len(re.findall(r"\bHGMMA\b", code)),
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", code, re.MULTILINE)),
    }


def main():
    for name in sys.argv[1:]:
        for shipped in importlib.import_module(name).shipped():
            what = {"module": name, "kernel": shipped.kernel.fn.__name__, "constants": shipped.constants}
            facts = looked_at(compiled(shipped))
            facts["registers_available"] = min(255, REGISTERS // (32 * shipped.warps))
            print(json.dumps(what | facts | {"tensor_cores": shipped.tensor_cores}), flush=True)


if __name__ == "__main__":
    main()
