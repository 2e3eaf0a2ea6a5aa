"""The offline kit: what of each wheel it carries, its parts, and its stand-ins."""

import io
import os
import random
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distribution, entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest

from evals.gpu import kernels, kit, prebuilt

STANDIN = kit.HERE / "standin"
CONTENTS = kit.contents()


def wheel(folder, name, files):
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as made:
        for inner, text in files.items():
            made.writestr(inner, text)


def by_name(name):
    (found,) = (package for package in CONTENTS.packages if package.name == name)
    return found


def test_every_package_is_pinned_and_named_once():
    assert all("==" in package.requirement for package in CONTENTS.packages)
    names = [package.name for package in CONTENTS.packages]
    assert len(names) == len(set(names)) > 40
    assert by_name("sglang").requirement == "sglang==0.5.23"
    assert not {"torch", "triton", "transformers"} & set(names), "that machine has its own"


@pytest.mark.parametrize(
    ("package", "file", "carried"),
    [
        ("sglang", "sglang/srt/managers/scheduler.py", True),
        ("sglang", "sglang/srt/mem_cache/rust_tree_core/mem_cache.cpython-312-x.so", False),
        ("sglang", "sglang/srt/rust_extensions/_server.cpython-312-x.so", False),
        ("sglang", "sglang/multimodal_gen/registry.py", False),
        ("sglang", "sglang-0.5.23.dist-info/entry_points.txt", True),
        ("sglang", "sglang-0.5.23.dist-info/licenses/LICENSE", False),
        ("xgrammar", "xgrammar-0.2.7.dist-info/RECORD", True),
        ("flashinfer_python", "flashinfer/prefill.py", True),
        ("flashinfer_python", "flashinfer/data/csrc/batch_prefill.cu", True),
        ("flashinfer_python", "flashinfer/data/csrc/fused_moe/x.cu", False),
        ("flashinfer_python", "flashinfer/data/cutlass/include/cute/tensor.hpp", True),
        ("flashinfer_python", "flashinfer/data/cutlass/examples/00/x.cu", False),
        ("pydantic", "pydantic/main.py", True),
    ],
)
def test_what_is_carried(package, file, carried):
    assert by_name(package).carries(file) == carried


def test_a_wheel_is_unpacked_as_pip_would(tmp_path):
    files = {
        "one/a.py": "a",
        "one/tests/b.py": "b",
        "One_pkg-1.0.data/purelib/one/c.py": "c",
        "One_pkg-1.0.data/scripts/run": "no",
    }
    wheel(tmp_path, "one_pkg", files)
    site = tmp_path / "site"
    package = kit.Stripped("one-pkg==1.0", leave_out=("*/tests/*",))
    assert kit.unpack(package, tmp_path, site) == 2
    found = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    assert found == {"one/a.py", "one/c.py"}
    with pytest.raises(kit.KitError, match="0 wheels of two==1"):
        kit.unpack(kit.Stripped("two==1"), tmp_path, site)


@pytest.mark.parametrize("limit", [1000, 10**6])
def test_parts_are_bounded_and_together_the_site(tmp_path, limit):
    site, back = tmp_path / "site", tmp_path / "back"
    (site / "a" / "__pycache__").mkdir(parents=True)
    (site / "a" / "__pycache__" / "x.pyc").write_text("built elsewhere")
    (site / "a" / "x.py").write_bytes(random.Random(0).randbytes(5000))
    (site / "b.py").write_text("b")
    (tmp_path / f"{kit.ARCHIVE}.77").write_text("of an older kit")
    parts = kit.pack(site, tmp_path, limit)
    assert sorted(tmp_path.glob(f"{kit.ARCHIVE}.*")) == parts
    assert all(0 < part.stat().st_size <= limit for part in parts)
    assert (len(parts) > 1) == (limit == 1000)
    whole = io.BytesIO(b"".join(part.read_bytes() for part in parts))
    with tarfile.open(fileobj=whole, mode="r:xz") as archive:
        assert set(archive.getnames()) == {"a/x.py", "b.py"}
        archive.extractall(back, filter="data")
    assert (back / "a" / "x.py").read_bytes() == (site / "a" / "x.py").read_bytes()


def test_the_site_has_our_entry_points_and_what_stand_ins_claim(tmp_path):
    kit.add_standins(CONTENTS, tmp_path)
    kit.add_entry_points(tmp_path)
    found = entry_points(group="sglang.srt.plugins")
    by_hand = subprocess.run(
        [sys.executable, "-S", "-c", SHOW], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert by_hand.returncode == 0, by_hand.stderr
    plugins, version = by_hand.stdout.splitlines()
    assert plugins == str([found["pascal"].value])
    assert version == "0.4.10"
    assert (tmp_path / "soundfile.py").exists()
    assert "sglang.srt.platforms" in distribution("pascal_sglang").read_text("entry_points.txt")


SHOW = """
import sys
sys.path.insert(0, ".")
from importlib.metadata import entry_points, version
print([point.value for point in entry_points(group="sglang.srt.plugins")])
print(version("sglang-kernel"))
"""

# Names as SGLang imports them, without what the stand-in stands for.
IMPORTS = """
import sys
sys.path.insert(0, sys.argv[1])
import sgl_kernel
from sgl_kernel import rmsnorm, merge_state_v2
from sgl_kernel.scalar_type import ScalarType, scalar_types
from sgl_kernel.kvcacheio import transfer_kv_direct
import sgl_kernel.allreduce as allreduce
assert sgl_kernel.__file__.startswith(sys.argv[1]), sgl_kernel.__file__
assert {scalar_types.uint4: 1, scalar_types.uint8: 2}
assert not hasattr(sgl_kernel, "__wrapped__")
for missing in (merge_state_v2, ScalarType, transfer_kv_direct, allreduce.init_custom_ar):
    try:
        missing(1, key=2)
    except NotImplementedError as error:
        print(error)
try:
    import sgl_kernels_of_another_name
except ImportError:
    print("only below itself")
"""


def test_the_stand_in_can_be_imported_and_says_what_is_missing():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS, str(STANDIN)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "sgl_kernel.merge_state_v2 is in sglang-kernel, which is not installed"
    assert lines[1].startswith("sgl_kernel.scalar_type.ScalarType is in")
    assert lines[2].startswith("sgl_kernel.kvcacheio.transfer_kv_direct is in")
    assert lines[4:] == ["only below itself"]


CALLS = """
import sys, types
sys.path.insert(0, sys.argv[1])
seen = []
for module, names in {
    "norm": ("rmsnorm", "fused_add_rmsnorm"),
    "activation": ("silu_and_mul",),
    "sampling": ("top_k_renorm_probs", "top_p_renorm_probs"),
}.items():
    made = types.ModuleType(f"flashinfer.{module}")
    for name in names:
        setattr(made, name, lambda *a, _name=name, **k: seen.append((_name, a, k)) or _name)
    sys.modules[f"flashinfer.{module}"] = made
sys.modules["flashinfer"] = types.ModuleType("flashinfer")
import sgl_kernel
assert sgl_kernel.rmsnorm("x", "w", 1e-5, out="o") == "rmsnorm"
sgl_kernel.fused_add_rmsnorm("x", "r", "w", 1e-5)
assert sgl_kernel.silu_and_mul("x", "o") == "silu_and_mul"
assert sgl_kernel.top_k_renorm_prob("p", 3) == "top_k_renorm_probs"
assert sgl_kernel.top_p_renorm_prob("p", 0.5) == "top_p_renorm_probs"
print(seen)
"""


def test_what_qwen2_calls_goes_to_flashinfer():
    done = subprocess.run(
        [sys.executable, "-c", CALLS, str(STANDIN)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert eval(done.stdout) == [
        ("rmsnorm", ("x", "w", 1e-5), {"out": "o", "enable_pdl": None}),
        ("fused_add_rmsnorm", ("x", "r", "w", 1e-5), {"enable_pdl": None}),
        ("silu_and_mul", ("x",), {"out": "o", "enable_pdl": None}),
        ("top_k_renorm_probs", ("p", 3), {}),
        ("top_p_renorm_probs", ("p", 0.5), {}),
    ]


def test_the_stand_in_takes_what_flashinfer_takes():
    """The arguments that it passes on are FlashInfer's own."""
    source = Path(distribution("flashinfer-python").locate_file("flashinfer"))
    norm = (source / "norm" / "__init__.py").read_text()
    assert "def rmsnorm(\n    input: torch.Tensor,\n    weight: torch.Tensor,\n" in norm
    assert "enable_pdl: Optional[bool] = None" in norm
    sampling = (source / "sampling.py").read_text()
    assert "def top_k_renorm_probs(" in sampling
    assert "def top_p_renorm_probs(" in sampling


def test_pip_that_fails_is_one_error(tmp_path, monkeypatch, capsys):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: no matching distribution\n")
    asked = []
    monkeypatch.setattr(kit.subprocess, "run", lambda command, **_: asked.append(command) or failed)
    assert kit.main(["--out", str(tmp_path)]) == 1
    assert "no matching distribution" in capsys.readouterr().err
    (command,) = asked
    assert "--only-binary=:all:" in command
    assert command[command.index("--python-version") + 1] == "3.12"


def test_wheels_that_are_there_are_not_fetched_again(tmp_path, monkeypatch):
    wheel(tmp_path, "one_pkg", {"one.py": ""})
    wanted = kit.Contents(
        python="3.12",
        platforms=(),
        part_bytes=1,
        packages=(kit.Stripped("one-pkg==1.0"),),
        modules=(),
        installed={},
        environment={},
    )
    monkeypatch.setattr(kit.subprocess, "run", lambda *_, **__: pytest.fail("pip was run"))
    kit.fetch(wanted, tmp_path)


class Spec:
    """What FlashInfer builds a module from."""

    name = "batch_prefill_of_some_kind"

    def __init__(self, work):
        self.jit_library_path = work / "a.so"

    def build(self):
        flags = ["-lcuda", *os.environ["FLASHINFER_EXTRA_LDFLAGS"].split()]
        command = ["cc", "-shared", "-x", "c", "/dev/null", *flags, "-o", self.jit_library_path]
        subprocess.run(command, check=True)


@pytest.mark.parametrize("version", ["0.7.2", "0.6.13"])
def test_modules_are_put_where_flashinfer_looks_for_them(tmp_path, monkeypatch, capsys, version):
    """Linked as they are where there is a GPU's driver."""
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(__version__=version))
    monkeypatch.setattr(prebuilt, "SPECS", {"attention": lambda: Spec(tmp_path)})
    for name in (
        "FLASHINFER_CUDA_ARCH_LIST",
        "FLASHINFER_WORKSPACE_BASE",
        "FLASHINFER_EXTRA_LDFLAGS",
        kernels.FLAGS_ENV,
    ):
        monkeypatch.setenv(name, "")
    folders = ["--out", str(tmp_path / "aot"), "--work", str(tmp_path / "work")]
    code = prebuilt.main([*folders, "--flashinfer", "0.7.2"])
    module = tmp_path / "aot" / Spec.name / f"{Spec.name}.so"
    if version != "0.7.2":
        assert (code, module.exists()) == (1, False)
        assert "FlashInfer 0.6.13 is here, not 0.7.2" in capsys.readouterr().err
        return
    assert code == 0
    assert os.environ["FLASHINFER_CUDA_ARCH_LIST"] == "9.0a"
    assert "attention" in capsys.readouterr().out
    dynamic = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True)
    assert "libcuda.so.1" in dynamic.stdout


def test_modules_that_cannot_be_built_end_the_kit_in_one_line(tmp_path, monkeypatch):
    asked = []

    def run(command, **_):
        asked.extend(command)
        raise subprocess.CalledProcessError(1, command[:3])

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(kit.KitError, match="cannot be built here"):
        kit.build_modules(CONTENTS, tmp_path / "work", tmp_path / "site")
    assert asked[-2:] == ["--flashinfer", "0.7.2"]
    assert str(tmp_path / "site" / "flashinfer" / "data" / "aot") in asked


def test_headers_that_a_bare_cuda_lacks_are_those_of_pytorchs_packages(tmp_path, monkeypatch):
    include = tmp_path / "nvidia" / "cu13" / "include"
    include.mkdir(parents=True)
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setenv(kernels.FLAGS_ENV, "-DA")
    kernels.find_headers()
    assert os.environ[kernels.FLAGS_ENV] == "-DA"
    (include / "curand_kernel.h").touch()
    kernels.find_headers()
    assert os.environ[kernels.FLAGS_ENV] == f"-DA -isystem {include}"
