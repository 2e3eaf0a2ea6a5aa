"""With `--enable-trace`, a collector gets our waits, pauses, resumes and migrations as spans of the
trace that SGLang makes of each request, also of one that changes its instance."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.engine.operations import call
from tests.requests import generate

grpc = pytest.importorskip("grpc")
pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason="no OTLP exporter for SGLang")
from opentelemetry.proto.collector.trace.v1 import (  # noqa: E402
    trace_service_pb2,
    trace_service_pb2_grpc,
)

COUNT = 8
OURS = {"wait", "pause", "resume", "migration", "migration_blocking"}
# Little memory, and everybody moves and is paused now and then.
SETTINGS = {"force_migration": 0.02, "chaos": 0.05, "quantum_tokens": 50}


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that it gets."""

    def __init__(self):
        self.spans = []

    def Export(self, request, context):
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, name):
        return [span for span in self.spans if span.name == name]


def about(span):
    """A span's attributes."""
    values = ((each.key, each.value) for each in span.attributes)
    return {key: getattr(value, value.WhichOneof("value")) for key, value in values}


@pytest.fixture(scope="module")
def collected(serve):
    """The spans of requests that were paused and moved, with the requests' answers."""
    collector = Collector()
    receiver = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, receiver)
    port = receiver.add_insecure_port("127.0.0.1:0")
    receiver.start()
    flags = ["--max-total-tokens", "2500", "--dp-size", "2", "--enable-trace"]
    flags += ["--otlp-traces-endpoint", f"127.0.0.1:{port}"]
    more = {
        "SGLANG_OTLP_EXPORTER_SCHEDULE_DELAY_MILLIS": "100",
        "SGLANG_TRACE_LEVEL": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
    }
    bodies = [generate(f"Trace {i}", 40, 120, rid=f"traced{i}") for i in range(COUNT)]
    try:
        with serve(SETTINGS, flags, **more) as server:
            with ThreadPoolExecutor(COUNT) as pool:
                list(pool.map(lambda body: server.post("/generate", body), bodies))
            recent = {r["rid"]: r for i in server.instances() for r in i["recent"]}
            deadline = time.monotonic() + 60
            while not all(whole(collector, body["rid"]) for body in bodies):
                assert time.monotonic() < deadline, collector.spans
                time.sleep(0.1)
            assert call(server, "/flush_cache")[0] == 200
        yield collector, recent
    finally:
        receiver.stop(None)


def roots(collector):
    """The root spans that have ended, by trace."""
    found = (s for s in collector.spans if not s.parent_span_id and s.name.startswith(" Req"))
    return {span.trace_id: about(span)["rid"] for span in found}


def whole(collector, rid):
    """Whether the request's own span has come, and that of every instance it was on."""
    traces = [trace for trace, name in roots(collector).items() if name == rid]
    spans = [s for s in collector.spans if s.trace_id in traces]
    moves = [s for s in spans if s.name == "pascal_migration" and about(s)["outcome"] == "moved"]
    instances = [s for s in spans if "dp_rank" in about(s)]
    return bool(traces) and len(instances) > len(moves)


def test_every_span_of_ours_is_one_of_its_requests_trace(collected):
    collector, _ = collected
    known, ids = roots(collector), {span.span_id for span in collector.spans}
    # Beside the server's own first requests.
    assert {f"traced{i}" for i in range(COUNT)} <= set(known.values())
    for name in OURS:
        spans = collector.named(f"pascal_{name}")
        assert spans, name
        for span in spans:
            assert span.trace_id in known
            assert span.parent_span_id in ids
            assert span.start_time_unix_nano <= span.end_time_unix_nano
            assert abs(span.end_time_unix_nano / 1e9 - time.time()) < 300


def test_pauses_and_waits_say_why_and_where(collected):
    collector, _ = collected
    for span in collector.named("pascal_pause"):
        assert about(span)["why"] == "chaos"
        assert about(span)["tier"] in {"resident", "host", "recompute"}
    waits = [about(span) for span in collector.named("pascal_wait")]
    assert {"waiting", "resident", "host"} >= {each["status"] for each in waits}
    assert {"thinking"} <= {each["class"] for each in waits}


def test_a_trace_goes_on_at_the_instance_that_the_request_moved_to(collected):
    collector, _ = collected
    moved = [s for s in collector.named("pascal_migration") if about(s)["outcome"] == "moved"]
    assert moved, [about(s) for s in collector.named("pascal_migration")]
    for span in moved:
        instances = {
            about(other)["dp_rank"]
            for other in collector.spans
            if other.trace_id == span.trace_id and "dp_rank" in about(other)
        }
        assert instances == {0, 1}
    # Those of the controller are left to the collector of garbage, by SGLang itself.
    of_schedulers = [about(s) for s in collector.spans if "dp_rank" in about(s)]
    assert of_schedulers
    assert not [each for each in of_schedulers if "unclosed" in each.get("reason", "")]
