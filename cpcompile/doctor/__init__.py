"""`cpcompile doctor`: what is installed, what works on this machine, and the commands that fix the rest.

    look: files and metadata, nothing is imported ┐
    trials: a session, a Builder, NVML, each in a ┴ Findings -> examination: a state per target -> table, JSON
            process of its own with a time limit

A package may be missing or half installed, or raise, crash or hang when it is imported: each is a finding.
"""
