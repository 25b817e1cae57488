"""Finding benchmarks by name, and refusing what cannot be asked before a run starts."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tinylmm.config.spec import EvalSpec
from tinylmm.errors import ConfigError
from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.registry import benchmark_names, check_evaluation, get_benchmark


def test_every_module_that_defines_a_benchmark_is_one() -> None:
    expected = (
        "digits gqa llava_bench longvideobench mlvu mmbench mme mmmu mmvet mmvu mvbench pope qbench seed sqa textvqa "
        "videomme vizwiz vqav2"
    )
    assert benchmark_names() == tuple(expected.split())
    for name in benchmark_names():
        assert type(get_benchmark(name)).__module__.endswith(f".{name}") and get_benchmark(name).name == name


def test_a_benchmark_with_an_upload_writes_one_and_no_other_does() -> None:
    for name in benchmark_names():
        found = type(get_benchmark(name))
        assert bool(found.upload) == (found.write_submission is not Benchmark.write_submission)


def test_finding_one_benchmark_imports_no_other_and_no_pillow() -> None:
    code = (
        "import sys; from tinylmm.evaluation.benchmarks.registry import benchmark_names, get_benchmark; get_benchmark('gqa');"
        "others = [n for n in benchmark_names() if f'tinylmm.evaluation.benchmarks.{n}' in sys.modules];"
        "print(others, [m for m in ('PIL', 'torch', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['gqa'] []"


@pytest.mark.parametrize("name", ["vqav2", "gqa", "textvqa", "pope", "mme", "vizwiz"])
def test_a_benchmark_says_what_it_is(name: str) -> None:
    benchmark = get_benchmark(name)
    assert benchmark.name == name
    assert {"official", "llava", "lmms"} == set(benchmark.variants)
    assert benchmark.max_new_tokens == 128


def test_a_misspelt_name_gets_a_suggestion_and_an_unknown_split_the_choice() -> None:
    with pytest.raises(ConfigError, match=r"'textqva' is unknown\. Did you mean 'textvqa'\?"):
        get_benchmark("textqva")
    with pytest.raises(ConfigError, match=r"no split 'dev'\. Allowed: val, test-dev, test"):
        get_benchmark("vqav2", split="dev")
    with pytest.raises(ConfigError, match="It has one split"):
        get_benchmark("pope", split="dev")


@pytest.mark.parametrize(
    "name", ["os.path.X", "my_lab.bench.Mine", "tinylmm.models.lmm.LMM", "tinylmm.evaluation.images.X"]
)
def test_a_class_outside_trusted_packages_is_no_benchmark(name: str) -> None:
    with pytest.raises(ConfigError, match="a benchmark's class"):
        get_benchmark(name, ["other_lab"])


def test_a_class_that_is_no_benchmark_is_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_lab.py").write_text("class Thing:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"not derived from .*Benchmark"):
        get_benchmark("odd_lab.Thing", ["odd_lab"])
    assert import_module("odd_lab").Thing


JUDGE = {"base_url": "http://localhost:1/v1", "model": "m"}


def spec(**fields: Any) -> EvalSpec:
    return EvalSpec(**{"root": "x", "max_new_tokens": 8} | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"benchmark": "gqaa"}, r"eval\.mine\.benchmark: 'gqaa' is unknown\. Did you mean 'gqa'\?"),
        ({"benchmark": "lab.bench.Mine"}, r"eval\.mine\.benchmark: is 'lab\.bench\.Mine', which is not allowed"),
        ({"benchmark": "gqa", "variant": "oficial"}, r"eval\.mine\.variant: 'oficial' is unknown\. Did you mean 'official'\?"),
        ({"benchmark": "gqa", "options": {"ocr": True}}, r"eval\.mine\.options: do not fit benchmark gqa.*ocr"),
        ({"benchmark": "vqav2", "options": {"split": "dev"}}, r"eval\.mine\.options\.split: vqav2 has no split 'dev'"),
        (
            {"benchmark": "gqa", "judge": {"base_url": "http://localhost/v1", "model": "m"}},
            r"eval\.mine\.judge: is set, but gqa is scored by rules alone: nobody would be asked\. Leave it out",
        ),
        ({"benchmark": "pope", "judge": {"runs": 3}}, r"eval\.mine\.judge: is set, but pope is scored by rules alone"),
        ({"benchmark": "llava_bench", "judge": {"runs": 3}}, r"eval\.mine\.judge\.runs: is 3, but llava_bench lets"),
        ({"benchmark": "mmbench", "judge": {**JUDGE, "runs": 2}}, r"eval\.mine\.judge\.runs: is 2, but mmbench lets"),
    ],
)  # fmt: skip
def test_what_would_fail_after_training_is_refused_before(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_evaluation("mine", spec(**fields), [])


@pytest.mark.parametrize("name", benchmark_names())
def test_a_judge_is_refused_by_a_benchmark_that_asks_none_and_by_no_other(name: str) -> None:
    asks = "judge.ask(" in Path(inspect.getfile(type(get_benchmark(name)))).read_text()
    if asks:
        check_evaluation("mine", spec(benchmark=name, judge=JUDGE), [])
    else:
        with pytest.raises(ConfigError, match="by rules alone"):
            check_evaluation("mine", spec(benchmark=name, judge=JUDGE), [])


def test_answers_are_judged_again_where_runs_are_averaged() -> None:
    check_evaluation("mine", spec(benchmark="mmvet", judge={**JUDGE, "runs": 5}), [])


def test_a_benchmark_of_its_own_files_is_not_asked_from_a_source() -> None:
    data = {"name": "d", "root": "x", "sources": {"test": {"annotations": "a.jsonl", "format": "questions"}}}
    fields = {"root": None, "data": data, "source": "test"}
    check_evaluation("mine", spec(benchmark="digits", **fields), [])
    with pytest.raises(ConfigError, match=r"eval\.mine\.benchmark: is gqa, which reads its own files"):
        check_evaluation("mine", spec(benchmark="gqa", **fields), [])
