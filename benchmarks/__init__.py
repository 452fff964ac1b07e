"""Measurements that print a table and JSON; each is run as `python -m benchmarks.NAME`."""
