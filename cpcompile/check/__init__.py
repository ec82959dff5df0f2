"""`cpcompile check`: is a bundle still as good as its baseline?

    report -> Snapshot (baseline.py)        what is compared, of every engine; a baseline is one in a file
    Snapshot x Snapshot x limits -> Outcome (criteria.py)
    Outcomes -> table, JSON, JUnit, SARIF, GitHub (formats/), tests (pytest_plugin.py)

`cpcompile.pipeline.build.check_bundle` measures; nothing here imports torch.
"""
