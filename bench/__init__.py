"""Measurements that take minutes: benchmarks beside their peers, a load on a server, a simulation of serving.

python -m bench.scheduling        one of them; `make bench` runs all, docs/benchmarks has what they found
"""
