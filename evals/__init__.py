"""Benchmarks over HTTP: workloads, an open-loop client, metrics, reports and comparisons."""
