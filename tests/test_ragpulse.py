"""RAGPulse traces: components become chained blocks and sizes, every bad record is told by its place; sizes travel.

Small traces made here; the public one where MIST_DATA names a folder that has it.
"""

from __future__ import annotations

import gzip
import json
import os
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mist.errors import ScenarioError
from mist.scenario.value import load
from mist.workload import RequestTable
from mist.workload.columns import Columns, write_trace
from mist.workload.ragpulse import COMPONENTS, RagPulse
from mist.workload.trace import detect, find_trace, limit, rate_scale, read_trace
from scenarios import sole_table

LENGTHS = {"sys_prompt": {1: 20, 2: 5}, "passages_ids": {10: 7, 11: 9, 12: 16}, "history": {20: 3},
           "web_search": {30: 8}, "user_input": {40: 2, 41: 2}}  # fmt: skip

Ids = dict[str, list[int]]


def ids_of(*, sys: Sequence[int] = (1,), passages: Sequence[int] = (), history: Sequence[int] = (),
           web: Sequence[int] = (), user: Sequence[int] = (40,)) -> Ids:  # fmt: skip
    return dict(zip(COMPONENTS, map(list, (sys, passages, history, web, user)), strict=True))


def tokens_of(ids: Ids) -> int:
    return sum(LENGTHS[name][each] for name, many in ids.items() for each in many)


def record(ids: Ids, *, beyond: int = 0, time: object = "0", output: int = 4) -> dict[str, Any]:
    return {"timestamp": time, "input_length": tokens_of(ids) + beyond, "output_length": output, "hash_ids": ids,
            "session_id": "a"}  # fmt: skip


def put(folder: Path, records: Sequence[object]) -> Path:
    """A trace of `records` with the files of `LENGTHS` beside it."""
    for name, component in COMPONENTS.items():
        rows = [{component.id_name: each, "token_length": n} for each, n in LENGTHS[name].items()]
        (folder / component.file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "0_trace.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


def problems_of(path: Path, form: RagPulse | None = None) -> list[str]:
    with pytest.raises(ScenarioError) as error:
        read_trace(path, form or RagPulse())
    return [str(problem).replace(f"{path.parent}{os.sep}", "") for problem in error.value.problems]


def keys_of(table: RequestTable) -> list[tuple[int, ...]]:
    assert table.block_keys is not None
    return table.block_keys


# --- reading ---


def test_times_lengths_and_sizes(tmp_path: Path) -> None:
    path = put(tmp_path, [
        record(ids_of(sys=[1, 2], passages=[10, 12], history=[20], web=[30], user=[41]), time="12"),
        record(ids_of(), time="10.5", output=0),
    ])  # fmt: skip
    table = read_trace(path)
    assert detect(path) == RagPulse()
    assert table.arrival_ns.tolist() == [0, 1_500_000_000]
    assert table.input_tokens.tolist() == [22, 61]
    assert table.output_tokens.tolist() == [0, 4]
    assert {name: values.tolist() for name, values in table.sizes.items()} == {
        "system_tokens": [20, 25], "passage_tokens": [0, 23], "history_tokens": [0, 3], "web_tokens": [0, 8],
        "query_tokens": [2, 2], "num_passages": [0, 2],
    }  # fmt: skip
    assert table.hash_block_size == 16
    assert [len(keys) for keys in keys_of(table)] == [2, 4]
    assert table.notes == ("1 rows of the trace were earlier than the row before them: sorted by arrival",)


def test_keys_are_chained_over_components_of_any_length(tmp_path: Path) -> None:
    prompts = [
        ids_of(passages=[10, 11, 12]),  # 20 + 7 + 9 + 16 + 2: blocks end inside and at the end of components
        ids_of(passages=[10, 11]),
        ids_of(passages=[11, 10]),
        ids_of(passages=[10, 11, 12], user=[41]),
    ]
    keys = read_trace(put(tmp_path, [record(each) for each in prompts]), RagPulse(hash_block_size=9)).block_keys
    assert keys is not None
    # 27 = the system prompt and passage 10, 36 = passage 11 too
    assert keys[0][:4] == keys[1][:4] == keys[3][:4] == (0, 1, 2, 3)
    assert keys[2][:2] == (0, 1)
    assert len(set(keys[0]) & set(keys[2])) == 2
    assert keys[0][4] == keys[3][4] == 4  # the first part of passage 12
    assert keys[0][5] != keys[3][5]  # another question in the same block
    assert [len(each) for each in keys] == [6, 5, 5, 6]
    assert sorted(set().union(*keys)) == list(range(len(set().union(*keys))))  # counted up from 0


def test_the_order_of_components_is_a_parameter(tmp_path: Path) -> None:
    prompts = [ids_of(passages=[10], history=[20]), ids_of(passages=[11], history=[20])]
    path = put(tmp_path, [record(each) for each in prompts])
    history_first = ("sys_prompt", "history", "passages_ids", "web_search", "user_input")

    def shared(form: RagPulse) -> int:
        first, second = keys_of(read_trace(path, form))
        return sum(a == b for a, b in zip(first, second, strict=False))

    assert (shared(RagPulse(1)), shared(RagPulse(1, history_first))) == (20, 23)
    with pytest.raises(ValueError, match="name each of sys_prompt, passages_ids, history, web_search, user_input once"):
        RagPulse(order=("sys_prompt",))
    with pytest.raises(ValueError, match="hash_block_size is 0"):
        RagPulse(hash_block_size=0)


def test_tokens_beyond_the_components_count_and_are_shared_with_nobody(tmp_path: Path) -> None:
    table = read_trace(put(tmp_path, [record(ids_of(), beyond=9), record(ids_of(), beyond=12)]), RagPulse(1))
    assert table.input_tokens.tolist() == [31, 34]
    first, second = keys_of(table)
    assert (len(first), len(second), len(set(first) & set(second))) == (31, 34, 22)
    assert table.notes == (
        "input_length is 9 to 12 tokens (mean 10.5) more than its components: it counts, and these tokens are at the "
        "prompt's end, shared with no other",
    )


def test_a_clock_that_starts_anew_is_said(tmp_path: Path) -> None:
    times = ["5", "600", "590", "604800", "0", "70"]
    table = read_trace(put(tmp_path, [record(ids_of(), time=time) for time in times]))
    assert (np.diff(table.arrival_ns) >= 0).all()
    assert "the trace's clock starts anew at line 5: what follows is laid over what came before" in table.notes


def test_zipped_and_plain_files_give_the_same(tmp_path: Path) -> None:
    path = put(tmp_path, [record(ids_of(passages=[12]))])
    plain = read_trace(path)
    for each in list(tmp_path.iterdir()):
        each.with_name(f"{each.name}.gz").write_bytes(gzip.compress(each.read_bytes()))
        each.unlink()
    zipped = read_trace(path.with_name("0_trace.jsonl.gz"))
    assert (zipped.block_keys, zipped.input_tokens.tolist()) == (plain.block_keys, plain.input_tokens.tolist())


@st.composite
def traces(draw: st.DrawFn) -> list[tuple[Ids, int]]:
    """Prompts of the components in `LENGTHS`, with tokens beyond these."""
    lists = {name: st.lists(st.sampled_from(sorted(known)), max_size=3) for name, known in LENGTHS.items()}
    ids = st.fixed_dictionaries(lists).filter(lambda each: tokens_of(each) > 0)
    return draw(st.lists(st.tuples(ids, st.integers(0, 4)), min_size=1, max_size=5))


@given(prompts=traces(), block_size=st.integers(1, 24))
def test_equal_keys_are_equal_tokens_from_the_start_on(
    prompts: list[tuple[Ids, int]], block_size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Against prompts written out token by token: two keys are equal exactly where all tokens up to there are."""
    path = put(tmp_path_factory.mktemp("trace"), [record(ids, beyond=beyond) for ids, beyond in prompts])
    table = read_trace(path, RagPulse(hash_block_size=block_size))
    content: dict[int, tuple[Any, ...]] = {}
    for row, ((ids, beyond), keys) in enumerate(zip(prompts, keys_of(table), strict=True)):
        tokens: list[Any] = [(each, i) for name in COMPONENTS for each in ids[name] for i in range(LENGTHS[name][each])]
        tokens += [(row, "template", i) for i in range(beyond)]
        assert len(keys) == -(-len(tokens) // block_size)
        for number, key in enumerate(keys, start=1):
            front = tuple(tokens[: number * block_size])
            assert content.setdefault(key, front) == front
    assert len(set(content.values())) == len(content)


# --- what can't be used ---


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"hash_ids": {"sys_prompt": [1]}}, "0_trace.jsonl:2: hash_ids is of sys_prompt\n    give lists of sys_prompt"),
        ({"hash_ids": [1, 2]}, "0_trace.jsonl:2: hash_ids is of list"),
        ({"hash_ids": None}, "0_trace.jsonl:2: hash_ids is of NoneType"),
        ({"hash_ids": {}}, "0_trace.jsonl:2: hash_ids is of nothing"),
        ({"hash_ids": {**ids_of(), "tools": []}}, "0_trace.jsonl:2: hash_ids is of sys_prompt, passages_ids, history"),
        ({"hash_ids": ids_of(passages=[99])}, "0_trace.jsonl:2: passages_ids '99' has no length"),
        ({"hash_ids": ids_of(passages=[1])}, "0_trace.jsonl:2: passages_ids '1' has no length"),  # a system prompt's
        ({"hash_ids": {**ids_of(), "history": [True]}}, "0_trace.jsonl:2: history 'True' has no length"),
        ({"hash_ids": {**ids_of(), "history": [[20]]}}, "0_trace.jsonl:2: history '[20]' has no length"),
        ({"hash_ids": {**ids_of(), "history": 20}}, "0_trace.jsonl:2: history is '20'"),
        ({"input_length": 21}, "0_trace.jsonl:2: input_length is 21, and its components have 22 tokens"),
        ({"input_length": 0}, "0_trace.jsonl:2: input_length is 0"),
        ({"input_length": "many"}, "0_trace.jsonl:2: input_length is 'many'"),
        ({"output_length": -1}, "0_trace.jsonl:2: output_length is -1"),
        ({"timestamp": "noon"}, "0_trace.jsonl:2: timestamp is 'noon'"),
    ],
)
def test_bad_records_are_told_by_their_line(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    path = put(tmp_path, [record(ids_of()), record(ids_of()) | change])
    assert problems_of(path)[0].startswith(told)


def test_all_problems_at_once(tmp_path: Path) -> None:
    bad = [
        record(ids_of()) | {"hash_ids": 5},
        record(ids_of()) | {"timestamp": -1},
        record(ids_of()) | {"input_length": 3},
    ]
    assert [each.split(": ")[0] for each in problems_of(put(tmp_path, [record(ids_of()), *bad]))] == [
        "0_trace.jsonl:2", "0_trace.jsonl:3", "0_trace.jsonl:4",
    ]  # fmt: skip


def test_a_column_that_is_missing(tmp_path: Path) -> None:
    made = record(ids_of())
    del made["input_length"]
    assert problems_of(put(tmp_path, [made]))[0].startswith("0_trace.jsonl:1: no column 'input_length'")


@pytest.mark.parametrize("name", COMPONENTS)
def test_missing_files_of_lengths(tmp_path: Path, name: str) -> None:
    path = put(tmp_path, [record(ids_of())])
    (tmp_path / COMPONENTS[name].file).unlink()
    (told,) = problems_of(path)
    assert told.startswith(f"{COMPONENTS[name].file}: is missing")
    assert "0_trace.jsonl" in told


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('{"passage_id": 13, "token_length": 0}', "2_passages.jsonl:4: token_length is 0"),
        ('{"passage_id": 13, "token_length": 1.5}', "2_passages.jsonl:4: token_length is 1.5"),
        ('{"passage_id": 13}', "2_passages.jsonl:4: token_length is missing"),
        ('{"passage_id": "x", "token_length": 4}', "2_passages.jsonl:4: passage_id is 'x'"),
        ('{"token_length": 4}', "2_passages.jsonl:4: passage_id is 'None'"),
        ('{"passage_id": 10, "token_length": 4}', "2_passages.jsonl:4: passage_id 10 has 4 tokens here and 7 before"),
        ("{", "2_passages.jsonl:4:2: bad JSON"),
    ],
)
def test_bad_lengths_are_told_by_their_line(tmp_path: Path, row: str, told: str) -> None:
    path = put(tmp_path, [record(ids_of())])
    with open(tmp_path / "2_passages.jsonl", "a") as file:
        file.write(row + "\n")
    assert problems_of(path)[0].startswith(told)


def test_files_of_lengths_with_other_columns(tmp_path: Path) -> None:
    path = put(tmp_path, [record(ids_of())])
    (tmp_path / "3_history.jsonl").write_text('{"id": 20, "tokens": 3}\n')
    assert [each.split("\n")[0] for each in problems_of(path)] == [
        "3_history.jsonl:1: no column 'history_id'", "3_history.jsonl:1: no column 'token_length'",
    ]  # fmt: skip


def test_damaged_bytes_give_a_table_or_a_scenario_error(tmp_path: Path) -> None:
    rng = random.Random(5)
    path = put(tmp_path, [record(ids_of(passages=[10, 11], history=[20]), beyond=i) for i in range(4)])
    failures, told = 0, []
    for name in ("0_trace.jsonl", "2_passages.jsonl", "4_user_input.jsonl"):
        whole = (tmp_path / name).read_bytes()
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(rng.randint(1, 3)):
                damaged[rng.randrange(len(damaged))] = rng.choice(b'0159{}[]",:-.eE \n\xffNx')
            (tmp_path / name).write_bytes(damaged)
            try:
                table = read_trace(path, RagPulse())
            except ScenarioError as error:
                told += [each.file for each in error.problems]
                failures += 1
                continue
            assert (table.input_tokens >= 1).all()
            assert all((values >= 0).all() for values in table.sizes.values())
        (tmp_path / name).write_bytes(whole)
    assert 100 < failures < 450
    assert all(file.startswith(str(tmp_path)) for file in told)


# --- sizes ---


@pytest.fixture
def sized() -> RequestTable:
    numbers = np.arange(4, dtype=np.int64)
    sizes = {"query_tokens": numbers * 3, "num_passages": numbers % 2}
    return RequestTable(numbers * 1000, numbers + 10, numbers, [(i,) for i in range(4)], 16, sizes=sizes)


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.csv.gz", "t.jsonl.gz"])
def test_sizes_survive_writing_scaling_and_limiting(sized: RequestTable, tmp_path: Path, name: str) -> None:
    write_trace(sized, tmp_path / name)
    assert detect(tmp_path / name) == Columns()
    for table in (read_trace(tmp_path / name), rate_scale(sized, 2.0)):
        assert {key: values.tolist() for key, values in table.sizes.items()} == {
            "query_tokens": [0, 3, 6, 9], "num_passages": [0, 1, 0, 1],
        }  # fmt: skip
    assert {key: values.tolist() for key, values in limit(sized, 2).sizes.items()} == {
        "query_tokens": [0, 3], "num_passages": [0, 1],
    }  # fmt: skip


def test_sizes_are_columns_by_name_and_follow_the_order_of_arrival(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("t_s,i,o,question,sizes.other\n5,9,1,4,7\n2,9,1,0,8\n")
    table = read_trace(path, Columns("t_s", "i", "o", sizes=("question",)))
    assert {key: values.tolist() for key, values in table.sizes.items()} == {"question": [0, 4]}
    assert read_trace(path, Columns("t_s", "i", "o")).sizes["other"].tolist() == [8, 7]
    assert read_trace(path, Columns("t_s", "i", "o", sizes=())).sizes == {}
    pq.write_table(pa.table({"t_s": [1], "i": [9], "o": [1], "question": [3]}), path.with_suffix(".parquet"))
    table = read_trace(path.with_suffix(".parquet"), Columns("t_s", "i", "o", sizes=("question",)))
    assert table.sizes["question"].tolist() == [3]


def test_bad_sizes_are_told_by_their_place(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("t_s,i,o,question\n5,9,1,-4\n6,9,1,1.5\n")
    with pytest.raises(ScenarioError) as error:
        read_trace(path, Columns("t_s", "i", "o", sizes=("question",)))
    assert [str(each).split("\n")[0].removeprefix(f"{tmp_path}{os.sep}") for each in error.value.problems] == [
        "log.csv:2:7: question is '-4'", "log.csv:3:7: question is '1.5'",
    ]  # fmt: skip
    with pytest.raises(ScenarioError, match="no column 'query'"):
        read_trace(path, Columns("t_s", "i", "o", sizes=("query",)))


DRAWN: dict[str, Any] = {
    "workload": {
        "arrivals": {"poisson": {"rate_per_s": 2}},
        "num_requests": 50,
        "input_tokens": {"lognormal": {"mean": 300, "cv": 1}},
        "output_tokens": {"uniform": {"low": 1, "high": 90}},
        "sizes": {"query_tokens": {"lognormal": {"mean": 20, "cv": 0.5}}, "passage_tokens": 512},
    },
    "clients": {"gpu": {"device": "h100-sxm", "model": "llama-3.1-8b"}},
}


def test_drawn_sizes_have_seeds_of_their_own() -> None:
    table = sole_table(load(DRAWN))
    assert table.sizes["passage_tokens"].tolist() == [512] * 50
    assert len(set(table.sizes["query_tokens"].tolist())) > 10
    assert table.sizes["query_tokens"].min() >= 1
    without = sole_table(load(DRAWN, ["workload.sizes={}"]))
    assert without.sizes == {}
    question = {"query_tokens": DRAWN["workload"]["sizes"]["query_tokens"]}
    fewer = sole_table(load({**DRAWN, "workload": {**DRAWN["workload"], "sizes": question}}))
    assert np.array_equal(fewer.sizes["query_tokens"], table.sizes["query_tokens"])
    for column in ("arrival_ns", "input_tokens", "output_tokens"):
        assert np.array_equal(getattr(table, column), getattr(without, column))


def test_sizes_are_in_the_resolved_scenario_and_checked() -> None:
    scenario = load(DRAWN)
    assert load(scenario.resolved()) == scenario
    assert scenario.resolved()["workload"]["sizes"]["passage_tokens"] == {"fixed": {"tokens": 512}}
    for name, value, told in (("Query", 5, "can't name a size"), ("query_tokens", -1, "at least 1")):
        bad = {**DRAWN, "workload": {**DRAWN["workload"], "sizes": {name: value}}}
        with pytest.raises(ScenarioError, match=told):
            load(bad)


def test_drawn_sizes_go_before_those_of_a_trace(tmp_path: Path) -> None:
    path = put(tmp_path, [record(ids_of(passages=[10])), record(ids_of())])
    workload = {"trace": str(path), "sizes": {"query_tokens": 5, "web_pages": 2}}
    table = sole_table(load({**DRAWN, "workload": workload}))
    assert table.sizes["query_tokens"].tolist() == [5, 5]
    assert table.sizes["web_pages"].tolist() == [2, 2]
    assert table.sizes["num_passages"].tolist() == [1, 0]


# --- the public trace ---


@pytest.fixture(scope="module")
def public() -> Path:
    try:
        return find_trace("ragpulse/0_trace.jsonl.gz", Path(), os.environ)
    except ScenarioError:
        pytest.skip("set MIST_DATA to a folder that holds the public trace ragpulse")


def hit_rate(table: RequestTable) -> float:
    """Share of the prompts' blocks that an infinite prefix cache has."""
    seen: set[int] = set()
    hits = 0
    for keys in keys_of(table):
        hits += len(seen.intersection(keys))
        seen.update(keys)
    return hits / sum(map(len, keys_of(table)))


def test_the_public_trace(public: Path) -> None:
    assert detect(public) == RagPulse()
    table = read_trace(public)
    assert len(table) == 7_106
    assert table.arrival_ns[-1] == 604_603 * 10**9
    known = np.sum([values for name, values in table.sizes.items() if name.endswith("_tokens")], axis=0)
    beyond = Counter((table.input_tokens - known).tolist())
    assert (min(beyond), max(beyond)) == (6, 12)
    assert table.sizes["num_passages"].max() == 7
    assert any("clock starts anew at line 3801" in note for note in table.notes)
    rate = hit_rate(table)
    print(f"RAGPulse: an infinite prefix cache has {rate:.4f} of the blocks of 16 tokens")
    assert rate == pytest.approx(0.3135, abs=5e-4)


def test_infinite_cache_hit_rates_of_other_traces() -> None:
    for name, expected in (("conversation", 0.366), ("synthetic", 0.640)):
        try:
            path = find_trace(f"mooncake_fast25/{name}_trace.jsonl.gz", Path(), os.environ)
        except ScenarioError:
            pytest.skip("set MIST_DATA to a folder that holds the public trace mooncake_fast25")
        rate = hit_rate(read_trace(path))
        print(f"Mooncake {name}: an infinite prefix cache has {rate:.4f} of the blocks of 512 tokens")
        assert rate == pytest.approx(expected, abs=0.01)
