"""The files in deploy/ fit the compose specification, each other and the commands' settings."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cli.declarations import WITH_SETTINGS

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
SERVICES = {"namespaces", "redis", "model", "router", "prefill", "decode", "encode", "prometheus"}
WORKERS = ("prefill", "decode", "encode")
OURS = ("model", "router", *WORKERS)


def load(name: str) -> dict:
    return yaml.safe_load((DEPLOY / name).read_text())


@pytest.fixture(scope="module")
def services() -> dict:
    return load("compose.yaml")["services"]


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_compose_files_fit_the_specification(name):
    command = (sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec")
    done = subprocess.run(
        [*command, str(DEPLOY / name)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_stack_is_whole(services):
    assert services.keys() == SERVICES
    assert load("compose.cuda.yaml")["services"].keys() <= services.keys()


@pytest.mark.parametrize("name", OURS)
def test_every_variable_is_a_setting_of_the_command_that_gets_it(services, name):
    (command,) = [c for c in WITH_SETTINGS if [c.name] == services[name]["command"]]
    known = {option.variable for group in command.groups for option in group.options()}
    assert services[name]["environment"].keys() <= known
    on_gpus = load("compose.cuda.yaml")["services"].get(name, {})
    assert on_gpus.get("environment", {}).keys() <= known | {"CUDA_VISIBLE_DEVICES"}


def test_two_workers_fit_on_one_gpu_by_default():
    services = load("compose.cuda.yaml")["services"]
    share = sum(
        float(defaulted(services[name]["environment"]["TANDEM_GPU_MEMORY_UTILIZATION"]))
        for name in ("prefill", "decode")
    )
    assert share == pytest.approx(0.9)
    for name in WORKERS:
        assert defaulted(services[name]["environment"]["CUDA_VISIBLE_DEVICES"]) == "0"
        (gpus,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        assert (gpus["count"], gpus["capabilities"]) == ("all", ["gpu"])


def defaulted(value: str) -> str:
    """What compose makes of `${VARIABLE:-default}` where the variable isn't set."""
    return value.removeprefix("${").removesuffix("}").partition(":-")[2]


def test_whatever_is_needed_is_a_service_with_a_health_check(services):
    for service in services.values():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in services
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[needed]


def test_workers_and_routers_wait_for_nobody_but_redis_and_the_model(services):
    # Or one of them that restarts would hold up the others.
    for name in ("router", *WORKERS):
        assert services[name]["depends_on"].keys() <= {"redis", "model", "namespaces"}
        assert services[name]["restart"] == "unless-stopped"


@pytest.mark.parametrize("name", WORKERS)
def test_workers_can_be_scaled_and_share_what_cuda_ipc_needs(services, name):
    worker = services[name]
    assert worker["pid"] == worker["ipc"] == "service:namespaces"
    assert services["namespaces"]["ipc"] == "shareable"
    # A second replica could have neither the name nor the port of the first.
    assert "container_name" not in worker
    assert "ports" not in worker
    assert "TANDEM_WORKER_ID" not in worker["environment"]


def test_no_model_has_encode_workers_beside_others(services):
    assert services["encode"]["scale"] == 0
    assert all("scale" not in services[name] for name in ("prefill", "decode"))


@pytest.mark.parametrize("name", WORKERS)
def test_gpu_workers_keep_their_compiled_kernels(name):
    cuda = load("compose.cuda.yaml")
    assert "triton:/triton" in cuda["services"][name]["volumes"]
    assert "triton" in cuda["volumes"]
    image = (DEPLOY / "Dockerfile.worker").read_text()
    assert "TRITON_CACHE_DIR=/triton\n" in image
    # A new volume gets the folder's owner, who isn't root.
    assert "chown tandem /cache /triton\n" in image


def test_keys_come_by_file_only(services):
    router = services["router"]
    assert router["secrets"] == ["api_keys"]
    assert router["environment"]["TANDEM_API_KEY_FILE"] == "/run/secrets/api_keys"
    assert all("TANDEM_API_KEY" not in s.get("environment", {}) for s in services.values())


def test_nothing_is_published_beyond_this_machine(services):
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_prometheus_scrapes_the_ports_that_services_listen_on(services):
    jobs = {
        job["job_name"]: job["dns_sd_configs"][0]
        for job in load("prometheus.yml")["scrape_configs"]
    }
    router, worker = jobs["tandem-router"], jobs["tandem-worker"]
    assert router["names"] == ["router"]
    assert str(router["port"]) == services["router"]["environment"]["TANDEM_PORT"]
    assert set(worker["names"]) == {*WORKERS}
    assert str(worker["port"]) == services["decode"]["environment"]["TANDEM_METRICS_PORT"]


@pytest.mark.parametrize("name", ["Dockerfile.router", "Dockerfile.worker"])
def test_images_copy_what_exists_and_what_the_context_lets_through(name):
    allowed = {
        line[1:]
        for line in (DEPLOY.parent / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    for line in (DEPLOY / name).read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            *sources, _ = line.split()[1:]
            for source in sources:
                assert (DEPLOY.parent / source).exists()
                assert source in allowed


def test_every_build_target_of_compose_is_in_its_dockerfile():
    for file in ("compose.yaml", "compose.cuda.yaml"):
        for service in load(file)["services"].values():
            target = service.get("build", {}).get("target")
            if target is not None:
                assert f" AS {target}\n" in (DEPLOY / "Dockerfile.worker").read_text()


def test_the_router_image_installs_no_torch():
    assert "torch" not in (DEPLOY / "Dockerfile.router").read_text().replace("no torch", "")
    assert "[worker]" not in (DEPLOY / "Dockerfile.router").read_text()
