"""Builds FlashInfer's modules for the check where there is a compiler and no GPU, for
`kit.sh --modules`.

FlashInfer takes a module under `flashinfer/data/aot` as it is, and compiles any other where it
runs. A module depends on CUDA's runtime and on TVM's FFI, and not on Python or PyTorch: any Python
does that has PyTorch and the kit's version of FlashInfer. CUDA's compiler has to be of the other
machine's version; `CUDA_HOME` says where it is, else the one in `PATH` is taken.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from evals.gpu.kernels import SPECS, find_headers
from evals.options import folder

# Of an H100 or H200.
ARCHITECTURE = "9.0a"
EXIT_FAILED = 1


def prepare(work: Path) -> None:
    """Have FlashInfer, which reads this on import, build into `work` for a GPU that is not here.
    Raises: OSError, CalledProcessError."""
    stubs = work / "stubs"
    stubs.mkdir(parents=True, exist_ok=True)
    # The driver's library comes with the driver. Modules are to load it there, though the stub has
    # nothing that they need.
    stub = [os.environ.get("CC", "cc"), "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c"]
    subprocess.run([*stub, "/dev/null", "-o", str(stubs / "libcuda.so")], check=True)
    os.environ["FLASHINFER_CUDA_ARCH_LIST"] = ARCHITECTURE
    os.environ["FLASHINFER_WORKSPACE_BASE"] = str(work)
    find_headers()
    flags = os.environ.get("FLASHINFER_EXTRA_LDFLAGS", "")
    os.environ["FLASHINFER_EXTRA_LDFLAGS"] = f"{flags} -L{stubs} -Wl,--no-as-needed -lcuda".strip()


def build(out: Path, version: str) -> None:
    """Build the modules, and put each under its name into `out`. Raises: RuntimeError."""
    import flashinfer

    if flashinfer.__version__ != version:
        raise RuntimeError(f"FlashInfer {flashinfer.__version__} is here, not {version}")
    for name, make in reversed(SPECS.items()):  # The shortest first.
        began, spec = time.monotonic(), make()
        spec.build()
        target = out / spec.name / f"{spec.name}.so"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(spec.jit_library_path, target)
        subprocess.run(["strip", "--strip-unneeded", str(target)], check=True)
        took, size = time.monotonic() - began, target.stat().st_size / 2**20
        print(f"{name:<20}{took:>8.0f} s{size:>8.1f} MiB  {spec.name}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=folder, required=True, help="folder of the modules")
    parser.add_argument(
        "--work", type=folder, required=True, help="folder of what they are made of"
    )
    parser.add_argument("--flashinfer", required=True, help="its version")
    asked = parser.parse_args(argv)
    try:
        prepare(asked.work.resolve())
        build(asked.out, asked.flashinfer)
    except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"prebuilt: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
