"""Benchmarks of fastrnn against its peers: `python -m benchmarks --help`; the method is in README.md."""
