"""The wheel and the sdist are whole; the image and the manifests are what their tools accept."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
K8S = ROOT / "launch" / "k8s"
KUBERNETES = "1.31"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with the wheel and the sdist of this tree."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--sdist", "--wheel"]
    done = subprocess.run(
        [*command, "--outdir", str(folder), str(ROOT)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def unpacked(built, tmp_path_factory):
    """The wheel as pip would leave it, without what it depends on."""
    folder = tmp_path_factory.mktemp("site")
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def outside(unpacked, *command):
    """Run Python away from any checkout, with what the wheel brought."""
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=unpacked.parent,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def files(folder):
    """Files of ours, by git, below a folder of the tree."""
    listed = subprocess.run(
        ["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(listed.stdout.split())


def test_the_wheel_has_every_file_of_the_package_and_of_evals(unpacked):
    wanted = {
        name
        for name in files("pascal_sglang") | files("evals")
        if not name.startswith("evals/results/")
    }
    assert wanted - {str(p.relative_to(unpacked)) for p in unpacked.rglob("*")} == set()
    assert (unpacked / "pascal_sglang" / "patches" / "seams.toml").exists()
    assert not (unpacked / "evals" / "results").exists()


def test_the_sdist_has_what_is_needed_to_build_and_to_test(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"pyproject.toml", "patches/seams.toml", "LICENSE", "tests/run.sh", "launch/env.sh"}
    assert wanted - names == set()


@pytest.mark.parametrize(
    "module",
    ["pascal_sglang.sim", "evals.serving", "evals.compare", "evals.burst"],
)
def test_commands_work_outside_the_tree(unpacked, module):
    assert "usage:" in outside(unpacked, "-m", module, "--help")


def test_the_code_that_runs_there_is_the_wheels(unpacked):
    where = "import evals, pascal_sglang; print(evals.__file__, pascal_sglang.__file__)"
    assert outside(unpacked, "-c", where).count(str(unpacked)) == 2


def test_the_scenarios_are_found_there(unpacked):
    found = "from pascal_sglang.sim.experiments import scenarios; print(scenarios.FOLDER)"
    folder = Path(outside(unpacked, "-c", found).strip())
    assert folder == unpacked / "evals" / "scenarios"
    assert list(folder.glob("*.toml"))


def test_both_ways_to_start_print_one_version(unpacked):
    """`python -m pascal_sglang`, and what the console script calls."""
    script = "import sys; from pascal_sglang.launch_server import main; sys.exit(main())"
    said = {
        outside(unpacked, "-m", "pascal_sglang", "--version"),
        outside(unpacked, "-c", script, "--version"),
    }
    assert len(said) == 1
    (metadata,) = unpacked.glob("*.dist-info/entry_points.txt")
    assert "pascal-sglang = pascal_sglang.launch_server:main" in metadata.read_text()
    version = re.search(r"^Version: (.+)$", (metadata.parent / "METADATA").read_text(), re.M)
    assert f"pascal_sglang {version[1]}," in said.pop()


def test_the_image_is_well_written():
    hadolint = shutil.which("hadolint", path=os.path.dirname(sys.executable)) or shutil.which(
        "hadolint"
    )
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    dockerfile = ROOT / "launch" / "docker" / "Dockerfile"
    done = subprocess.run(
        [hadolint, "--format", "json", str(dockerfile)], capture_output=True, text=True, timeout=60
    )
    assert json.loads(done.stdout) == []


def test_the_image_has_the_newest_sglang_that_is_supported():
    dockerfile = (ROOT / "launch" / "docker" / "Dockerfile").read_text()
    (version,) = re.findall(r"^ARG SGLANG=v(.+)$", dockerfile, re.M)
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'"sglang>=.*,<=(.+)"', pyproject)[1] == version


def test_what_the_image_copies_is_in_its_context():
    dockerfile = (ROOT / "launch" / "docker" / "Dockerfile").read_text()
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    copied = [
        word for line in re.findall(r"^COPY (.+) \S+$", dockerfile, re.M) for word in line.split()
    ]
    assert copied
    assert set(copied) == let_in


def manifests():
    import yaml

    for path in sorted(K8S.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            yield path.name, document


def test_kubernetes_takes_the_manifests():
    """Those that it knows; the others are checked against each other."""
    validate = pytest.importorskip("kubernetes_validate")
    checked = []
    for name, document in manifests():
        if document["apiVersion"].split("/")[0] in (
            "monitoring.coreos.com",
            "kustomize.config.k8s.io",
        ):
            continue
        validate.validate(document, KUBERNETES, strict=True)
        checked.append(name)
    assert checked == ["autoscaler.yaml", "deployment.yaml", "service.yaml"]


def test_the_manifests_name_each_other():
    named = dict(manifests())
    kustomization = named.pop("kustomization.yaml")
    assert set(kustomization["resources"]) == set(named)
    pod = named["deployment.yaml"]["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert named["deployment.yaml"]["spec"]["selector"]["matchLabels"] == labels
    assert named["service.yaml"]["spec"]["selector"] == labels
    assert named["podmonitor.yaml"]["spec"]["selector"]["matchLabels"] == labels
    (container,) = pod["spec"]["containers"]
    ports = {port["name"] for port in container["ports"]}
    assert named["service.yaml"]["spec"]["ports"][0]["targetPort"] in ports
    assert named["podmonitor.yaml"]["spec"]["podMetricsEndpoints"][0]["port"] in ports
    assert named["autoscaler.yaml"]["spec"]["scaleTargetRef"]["name"] == "pascal-sglang"
    assert {image["name"] for image in kustomization["images"]} == {container["image"]}


def test_the_server_takes_the_arguments_of_the_deployment():
    from pascal_sglang.config import from_flags
    from pascal_sglang.launch_server import parse

    (container,) = dict(manifests())["deployment.yaml"]["spec"]["template"]["spec"]["containers"]
    options, rest = parse(container["args"])
    assert from_flags(options).host_kv_gb == 32
    assert rest[:2] == ["--model-path", "Qwen/Qwen3-8B"]
