"""Everything that runs without real engines: their stand-in, traces, the simulation, a test bed and the demo.

Nothing outside of this package imports it, but for commands that are named in :mod:`dp_extproc.cli.main`.
"""
