"""Counts: what Prometheus' own parser reads from them."""

from __future__ import annotations

import math
import threading

import pytest

from cdl_edge.server.request_metrics import BUCKETS_S, CONTENT_TYPE, RECENT, RequestMetrics, resident_bytes

HEALTH = {"status": "ok", "in_flight": 2, "capacity": 34, "longest_call_s": 0.5}


def read(text):
    """{(sample, labels): value}, by the parser that Prometheus gives to Python."""
    parser = pytest.importorskip("prometheus_client.parser", reason="prometheus_client is not installed")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_prometheus_reads():
    metrics = RequestMetrics()
    for seconds in (0.0004, 0.03, 0.04, 99):
        metrics.begin()
        metrics.end("predict", 200, seconds)
    metrics.begin()
    metrics.error("busy")
    metrics.swap(True)
    found = read(metrics.text(HEALTH, {"bundle": 'a "name"\\\n'}))
    assert found["cdl_edge_info", (("bundle", 'a "name"\\\n'),)] == 1
    assert found["cdl_edge_requests_total", (("endpoint", "predict"), ("status", "200"))] == 4
    assert found["cdl_edge_errors_total", (("kind", "busy"),)] == 1
    assert found["cdl_edge_swaps_total", (("result", "done"),)] == 1
    assert found["cdl_edge_swaps_total", (("result", "failed"),)] == 0
    assert found["cdl_edge_in_flight", ()] == 1 and found["cdl_edge_queue", ()] == 2
    assert found["cdl_edge_healthy", ()] == 1
    buckets = [
        found["cdl_edge_request_seconds_bucket", (("endpoint", "predict"), ("le", le))]
        for le in (*map(str, BUCKETS_S), "+Inf")
    ]
    assert buckets == sorted(buckets) and buckets[0] == 1 and buckets[-1] == 4
    assert found["cdl_edge_request_seconds_bucket", (("endpoint", "predict"), ("le", "0.03"))] == 2  # le: at most
    assert found["cdl_edge_request_seconds_count", (("endpoint", "predict"),)] == 4
    assert math.isclose(found["cdl_edge_request_seconds_sum", (("endpoint", "predict"),)], 99.0704)


def test_no_count_is_lost_between_threads():
    metrics = RequestMetrics()

    def work():
        for _ in range(2000):
            metrics.begin()
            metrics.end("predict", 200, 0.1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.in_flight == 0
    assert 'cdl_edge_requests_total{endpoint="predict",status="200"} 8000' in metrics.text(HEALTH, {})


def test_percentiles_of_the_last_answers():
    metrics = RequestMetrics()
    assert metrics.latency() == {"n": 0, "p50_ms": None, "p99_ms": None}
    for value in [1e6] * 5 + [*range(RECENT)]:
        metrics.predicted(value)
    assert metrics.latency() == {"n": RECENT, "p50_ms": 499.5, "p99_ms": 989.01}


def test_a_stuck_server_is_not_healthy():
    assert "cdl_edge_healthy 0" in RequestMetrics().text({**HEALTH, "status": "stuck"}, {})


def test_memory():
    assert resident_bytes() is None or resident_bytes() > 1_000_000


def test_over_http(client, tiny):
    client.post("/predict", content=tiny.png((255, 0, 0)), headers={"content-type": "image/png"})
    client.get("/nothing")
    answer = client.get("/metrics")
    assert answer.headers["content-type"] == CONTENT_TYPE
    found = read(answer.text)
    assert found["cdl_edge_requests_total", (("endpoint", "predict"), ("status", "200"))] == 1
    assert found["cdl_edge_requests_total", (("endpoint", "none"), ("status", "404"))] == 1
    assert found["cdl_edge_errors_total", (("kind", "not_found"),)] == 1
    assert found["cdl_edge_in_flight", ()] == 1  # this request
    (info,) = [labels for name, labels in found if name == "cdl_edge_info"]
    assert dict(info)["version"] == client.get("/health").json()["version"]
