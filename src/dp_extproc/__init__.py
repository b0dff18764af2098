"""Data-parallel-rank-aware routing of prefill/decode LLM fleets, as an Envoy external processor."""

from importlib.metadata import version

__version__ = version("dp-extproc")
