"""Placement: which provider ran which node, and in what precision.

It is taken from one profiled run, so it counts what the runtime really executed: after fusion, and after a
silent fallback of single nodes to another provider. (`get_provider_graph_assignment_info` of
ONNX Runtime 1.32 tells less: it is taken before the extended optimisations, and without types.)

The runtime keeps the arithmetic of shapes on the CPU for good reason; a node there that computes
anything but integers and truth values in an engine for another provider has fallen back: that fails.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cpcompile.bundle.reader import Variant
from cpcompile.core.types import Feeds
from cpcompile.files.whole_files import scratch_folder
from cpcompile.report.results import PlacedNode, Placement
from cpcompile.runtime.engine import Engine, create_session, session_options

CPU = "CPUExecutionProvider"
ONE_PLAN = "a plan runs as a whole on the GPU"
ONE_GRAPH = "OpenVINO runs the graph as a whole on the CPU"
INTEGERS = ("int64", "int32", "bool", None)
"""Element types of shapes, as ONNX Runtime names them."""


def measure_placement(variant: Variant, feeds: Feeds) -> Placement:
    """Profile one run of `variant` in a session of its own."""
    if not variant.provider:
        return Placement.without(ONE_PLAN if variant.plan else ONE_GRAPH)
    with scratch_folder("profile") as folder:
        options = session_options(variant, threads=1)
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "run")
        session = create_session(variant, options)
        Engine(variant, session).outputs(feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    nodes = tuple(
        PlacedNode(
            name=event["name"].removesuffix("_kernel_time"),
            operator=event["args"]["op_name"],
            provider=event["args"]["provider"],
            precision=next((name for output in event["args"]["output_type_shape"] for name in output), None),
        )
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    )
    if not nodes:
        return Placement.without("the profile of this runtime names no nodes")
    reason = fallen_back(nodes, variant.provider)
    return Placement(
        verdict="fail" if reason else "pass",
        reason=reason,
        nodes=nodes,
        providers=dict(Counter(node.provider for node in nodes)),
        operators=dict(Counter(node.operator for node in nodes)),
        precisions=dict(Counter(node.precision or "no tensor" for node in nodes)),
    )


def fallen_back(nodes: Sequence[PlacedNode], provider: str) -> str | None:
    """Which of `nodes` should have run on `provider` and did not; None if all is well."""
    elsewhere = [node for node in nodes if node.provider != provider]
    fallen = [node for node in elsewhere if node.provider != CPU or node.precision not in INTEGERS]
    if not fallen:
        return None
    first = f"{fallen[0].operator} {fallen[0].name} ran on {fallen[0].provider}"
    return f"{len(fallen)} of {len(nodes)} nodes fell back from {provider}: {first}"
