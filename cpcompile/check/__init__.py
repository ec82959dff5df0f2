"""`cpcompile check`: is a bundle still as good as its baseline?

    report -> Snapshot (baseline.py)        the compared values of every engine; a baseline is a snapshot in a file
    Snapshot x Snapshot x limits -> Outcome (criteria.py)
    Outcomes -> table, JSON, JUnit, SARIF, GitHub (formats/), tests (pytest_plugin.py)

`cpcompile.pipeline.build.check_bundle` measures; nothing here imports torch.
"""
