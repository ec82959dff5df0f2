"""`cpcompile doctor`: what is installed, what really works here, and the commands that mend the rest.

    look: files and metadata, nothing is imported ┐
    trials: a session, a Builder, NVML, each in a ┴ Finding per thing -> diagnosis: Target per engine -> table, JSON
            process of its own with a time limit

Every package may be missing, half installed, or raise, crash or hang when it is imported: that is a finding.
"""
