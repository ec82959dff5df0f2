"""The formula on facts made by hand: what makes a build larger, and where."""

import dataclasses
import itertools
import json

import pytest

from cpcompile.core.config import BuildConfig, ValidateConfig
from cpcompile.core.errors import UsageError
from cpcompile.pipeline.estimation import Estimate, Facts, Libraries, Pace, RunShape, estimate
from cpcompile.pipeline.estimation.duration import in_words
from cpcompile.pipeline.estimation.facts import ContextFacts
from cpcompile.pipeline.estimation.formula import BESIDE, HEAP, JOBS, ONE_SEQUENCE
from cpcompile.pipeline.estimation.limit import memory_warning, require_memory

MB = 10**6
CONTEXTS = {
    "a": ContextFacts(kept_bytes=40 * MB, head_bytes=8 * MB, classes=2048),
    "b": ContextFacts(kept_bytes=30 * MB, head_bytes=8 * MB, classes=1024),
}
FACTS = Facts(
    model_type=None,
    bytes=100 * MB,
    tensors=50,
    dense_bytes=99 * MB,
    classes=2048,
    sequence=128,
    result_elements=None,
    vocabulary_bytes=8 * MB,
    tokenizer_bytes=100_000,
    contexts=CONTEXTS,
    union_bytes=60 * MB,
)
LIBRARIES = Libraries(build=400 * MB, validation=450 * MB, engine=70 * MB, eager=240 * MB)


def estimated(
    config: BuildConfig | None = None, *, shape: RunShape = ONE_SEQUENCE, memory: bool = True, **changed: object
) -> Estimate:
    facts = dataclasses.replace(FACTS, **changed)  # type: ignore[arg-type]
    return estimate(facts, LIBRARIES, config or BuildConfig(), ValidateConfig(memory=memory), shape)


def peaks(made: Estimate) -> dict[str, int]:
    return {stage.name: stage.peak_rss_bytes for stage in (*made.build, *made.validation)}


def changes(made: Estimate) -> dict[str, int]:
    """Changes of the peaks against the plain build, if not 0."""
    before = peaks(estimated())
    return {name: more for name, peak in peaks(made).items() if (more := peak - before[name])}


def test_the_parts_are_those_of_the_docstring() -> None:
    made = estimated()
    assert made.build[0].parts == {"libraries": 400 * MB, "weights": 100 * MB}
    assert made.build[1].parts == {"libraries": 400 * MB, "weights": 100 * MB, "graphs": 22_500_000}
    parity = made.validation[0].parts
    assert (parity["engine"], parity["float64"]) == (48 * MB, 200 * MB)
    assert parity["results"] == 5 * 16 * 128 * 2048  # below HEAP: 4 times as much for activations
    assert made.engines["b"].load_peak_rss_bytes == 108 * MB
    assert made.engines["b"].run_peak_rss_bytes - 108 * MB == 5 * 4 * 128 * 1024
    assert made.eager is not None and made.eager.load_peak_rss_bytes == 339 * MB
    assert made.validation[-1].parts[BESIDE] == made.eager.run_peak_rss_bytes


@pytest.mark.parametrize("field", ["bytes", "tensors", "dense_bytes", "classes", "sequence", "union_bytes"])
def test_more_of_anything_never_takes_less(field: str) -> None:
    for config in (BuildConfig(), BuildConfig(merged=True)):
        sizes = [estimated(config, **{field: getattr(FACTS, field) * times}) for times in (1, 3, 30)]
        for smaller, larger in itertools.pairwise(sizes):
            assert all(peaks(larger)[name] >= peak for name, peak in peaks(smaller).items())
            assert larger.bundle_bytes >= smaller.bundle_bytes
        assert (peaks(sizes[0]), sizes[0].bundle_bytes) != (peaks(sizes[-1]), sizes[-1].bundle_bytes)


def test_what_each_setting_adds_and_where() -> None:
    assert changes(estimated(BuildConfig(standalone=True))) == {"capture, freeze, export": 80 * MB}
    # The merged engine has what any context keeps, and the head again.
    timed = {"validate: parity", "validate: quality", "validate: speed"}
    assert changes(estimated(BuildConfig(merged=True))) == dict.fromkeys(timed, 20 * MB)
    after_load = {"capture, freeze, export", "validate: memory"} | timed
    assert changes(estimated(BuildConfig(vocabulary_coverage=1.0))) == dict.fromkeys(after_load, 8 * MB)
    traced = changes(estimated(model_type="llama"))
    assert traced == dict.fromkeys({"load"} | after_load, 250_000 * 50)
    assert "validate: memory" not in peaks(estimated(memory=False))


def test_other_shapes_of_runs_change_the_processes_alone() -> None:
    longer = estimated(shape=RunShape(batch=8, sequence=512))
    assert longer.engines["a"].run_peak_rss_bytes - longer.engines["a"].load_peak_rss_bytes == (
        4 * 4096 * 2048 + HEAP  # activations no longer grow in the heap
    )
    assert set(changes(longer)) == {"validate: memory"}
    assert longer.engines["a"].load_peak_rss_bytes == estimated().engines["a"].load_peak_rss_bytes


def test_the_bundle() -> None:
    graphs = 1_200 * 50
    assert estimated().bundle_bytes == 60 * MB + 2 * graphs + 100_000
    assert estimated(BuildConfig(standalone=True)).bundle_bytes == 70 * MB + 2 * graphs + 100_000
    assert estimated(BuildConfig(merged=True)).bundle_bytes == 60 * MB + 3 * graphs + 100_000
    assert (
        estimated(BuildConfig(vocabulary_coverage=1.0)).bundle_bytes == 60 * MB + 2 * graphs + 150_000
    )  # a tokenizer each


def test_without_a_dense_baseline_and_for_a_program() -> None:
    assert estimated(dense_bytes=None).eager is None
    program = estimated(classes=0, result_elements=1_000_000, dense_bytes=None)
    assert program.eager is not None
    assert program.eager.load_peak_rss_bytes == 500 * MB  # loading it imports what a build does
    assert program.eager.run_peak_rss_bytes == 520 * MB


PACE = Pace(build_seconds=8.0, validation_seconds=6.0, operations=5e10)
EVERYTHING = ValidateConfig()


def seconds(validation: ValidateConfig = EVERYTHING, **changed: object) -> tuple[float, float]:
    """Of the build and of its validation."""
    facts = dataclasses.replace(FACTS, text_tokens=16_384, **changed)  # type: ignore[arg-type]
    made = estimate(facts, dataclasses.replace(LIBRARIES, pace=PACE), BuildConfig(), validation)
    assert made.build_seconds is not None and made.validation_seconds is not None
    return made.build_seconds, made.validation_seconds


def test_how_long_it_takes() -> None:
    """The demo's model: 36 tensors, 2.75 million parameters, 1.13 of them kept; 12 s and some two minutes."""
    kept = ContextFacts(kept_bytes=4_530_000, head_bytes=0, classes=2048)
    build, validation = seconds(
        tensors=36, bytes=11_000_000, dense_bytes=11_000_000, contexts=dict.fromkeys("abc", kept)
    )
    assert 8 < build < 16
    assert 70 < validation < 240


@pytest.mark.parametrize("field", ["tensors", "dense_bytes", "classes", "text_tokens"])
def test_more_takes_longer(field: str) -> None:
    before = getattr(dataclasses.replace(FACTS, text_tokens=16_384), field)
    facts = [dataclasses.replace(FACTS, **{"text_tokens": 16_384, field: before * times}) for times in (1, 10)]
    less, more = (
        estimate(each, dataclasses.replace(LIBRARIES, pace=PACE), BuildConfig(), EVERYTHING) for each in facts
    )
    assert more.validation_seconds > less.validation_seconds
    assert more.build_seconds >= less.build_seconds


def test_what_is_left_out_takes_no_time() -> None:
    _, whole = seconds()
    for name in ("speed", "memory", "coherence", "layers"):
        assert seconds(dataclasses.replace(EVERYTHING, **{name: False}))[1] < whole


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (None, "a time that is not known before it has run"),
        (0.3, "less than 1 s"),
        (20.2, "about 20 s"),
        (89.0, "about 89 s"),
        (150.0, "about 2 min"),
        (7200.0, "about 2 h"),
    ],
)
def test_words_for_how_long(length: float | None, words: str) -> None:
    assert in_words(length) == words


def test_the_time_of_a_program_is_not_known() -> None:
    program = dataclasses.replace(FACTS, classes=0, result_elements=1_000_000, dense_bytes=None)
    made = estimate(program, dataclasses.replace(LIBRARIES, pace=PACE), BuildConfig(), EVERYTHING)
    assert made.validation_seconds is None
    assert made.duration == "about 12 s and its validation a time that is not known before it has run"


def test_its_json_has_these_keys() -> None:
    made = estimated()
    plain = json.loads(json.dumps(made.to_plain()))
    totals = ["peak_rss_bytes", "build_peak_rss_bytes", "process_peak_rss_bytes"]
    rest = ["build", "validation", "engines", "eager", "bundle_bytes"]
    assert list(plain) == [*totals, *rest, "duration", "build_seconds", "validation_seconds", "not_counted"]
    for stage in (*plain["build"], *plain["validation"]):
        assert list(stage) == ["name", "peak_rss_bytes", "parts"]
        assert stage["peak_rss_bytes"] == sum(stage["parts"].values())
    stages = {stage["name"]: stage for stage in (*plain["build"], *plain["validation"])}
    assert plain["peak_rss_bytes"] == stages["validate: memory"]["peak_rss_bytes"] == made.largest.peak_rss_bytes
    assert plain["build_peak_rss_bytes"] == stages["capture, freeze, export"]["peak_rss_bytes"]
    assert plain["process_peak_rss_bytes"] == stages["validate: speed"]["peak_rss_bytes"]
    assert list(plain["engines"]) == ["a", "b"]
    for process in (*plain["engines"].values(), plain["eager"]):
        assert list(process) == ["load_peak_rss_bytes", "run_peak_rss_bytes"]
    assert estimated(dense_bytes=None).to_plain()["eager"] is None


def test_jobs_take_their_memory_beside_the_process() -> None:
    plain = estimated()
    made = estimate(FACTS, LIBRARIES, BuildConfig(), ValidateConfig(jobs=8))
    assert "validate: parity" not in peaks(made) and made.largest.name == "validate: contexts"
    each = max(peaks(plain)["validate: parity"], peaks(plain)["validate: quality"]) - 450_000 * FACTS.tensors
    assert made.largest.parts[JOBS] == len(CONTEXTS) * each
    assert made.process_peak_rss_bytes <= plain.process_peak_rss_bytes
    with pytest.raises(UsageError, match=r"\(validate: contexts\); fewer --jobs need less"):
        require_memory(made, made.largest.peak_rss_bytes - 1)


def test_a_limit_and_what_helps() -> None:
    made = estimated()
    peak, alone = made.largest.peak_rss_bytes, made.process_peak_rss_bytes
    assert alone < peak
    require_memory(made, peak)
    assert memory_warning(made, peak) is None
    with pytest.raises(
        UsageError, match=r"--max-memory allows .* are needed at the peak \(validate: memory\); --no-mem"
    ):
        require_memory(made, peak - 1)
    with pytest.raises(UsageError, match="only a smaller model or a larger machine helps"):
        require_memory(made, alone - 1)
    assert "of memory are available, about" in str(memory_warning(made, peak - 1))
    require_memory(estimated(memory=False), alone)
