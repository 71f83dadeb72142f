"""The reading of scenarios: what YAML means here, where things were written, limits, and --set."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from mist.errors import ScenarioError
from mist.scenario.nodes import is_text, parse
from mist.scenario.source import Source, override, read_file, read_mapping


def data(text: str) -> object:
    return Source(parse(text, "a.yaml")).data()


def refused(text: str) -> list[tuple[int, int, str]]:
    with pytest.raises(ScenarioError) as caught:
        parse(text, "a.yaml")
    assert all(p.file == "a.yaml" for p in caught.value.problems)
    return [(p.line, p.column, p.message) for p in caught.value.problems]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("1e9", 1_000_000_000),
        ("1.5e-3", 0.0015),
        ("2.0", 2),
        ("1e300", 1e300),
        ("+.5", 0.5),
        ("1_000", 1000),
        ("0x10", 16),
        ("0o17", 15),
        ("010", 10),
        ("-3", -3),
        ("'12'", "12"),
        ("on", "on"),
        ("no", "no"),
        ("10:20", "10:20"),
        ("2023-11-16", "2023-11-16"),
        ("1.2.3", "1.2.3"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("null", None),
        ('""', ""),
    ],
)
def test_scalars_mean_what_they_look_like(written: str, meant: object) -> None:
    read = data(f"key: {written}")
    assert read == {"key": meant}
    assert type(read["key"]) is type(meant)  # type: ignore[index]


def test_keys_are_text_whatever_they_look_like() -> None:
    assert data("on: 1\n2: x\nnull: y") == {"on": 1, "2": "x", "null": "y"}


@pytest.mark.parametrize("text", ["1e9", "12", "true", "null", "~", ".nan", "-.inf", "0x1f", "1e999"])
def test_text_that_reads_as_something_else_is_known(text: str) -> None:
    assert not is_text(text)
    assert data(f"a: '{text}'") == {"a": text}


def test_anchors_aliases_and_merge_keys() -> None:
    text = "base: &b {tp: 1, count: 2}\none: *b\ntwo:\n  tp: 4\n  <<: *b\nthree: {<<: [*b, {x: 1, tp: 9}]}\n"
    read = data(text)
    assert read["one"] == {"tp": 1, "count": 2}  # type: ignore[index]
    assert read["two"] == {"tp": 4, "count": 2}  # type: ignore[index]
    assert read["three"] == {"tp": 1, "count": 2, "x": 1}  # type: ignore[index]


def test_every_bad_value_is_told_with_its_place() -> None:
    found = refused("a: .nan\nb:\n  c: 1e999\na: 3\nd: !!python/object:os.x y\ne: *gone\nf: &f [*f]\n? [k]\n: v\n")
    assert [(line, column) for line, column, _ in found] == [(1, 4), (3, 6), (4, 1), (5, 4), (6, 4), (7, 8), (8, 3)]
    assert "line 1" in str(ScenarioError(_problems("a: 1\na: 2")))


def _problems(text: str) -> tuple[object, ...]:
    with pytest.raises(ScenarioError) as caught:
        parse(text, "a.yaml")
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("", 0, "empty"),
        ("# only a comment\n", 0, "empty"),
        ("a: 1\n---\nb: 2\n", 2, "second document"),
        ("a:\n\tb: 1\n", 2, "not valid YAML"),
        ("a: [1, 2\nb: 3\n", 2, "not valid YAML"),
        ("a: 'x\n", 2, "not valid YAML"),
        ("a: b: c\n", 1, "not valid YAML"),
        ("a: x\x01y\n", 1, "U+0001"),
        ("a: 1\nb: \x00\n", 2, "U+0000"),
        ("{" * 200_000, 1, "50 levels"),
        ("a: " + "[" * 60 + "]" * 60, 1, "50 levels"),
        ("x: 1\n" * 300_000, 100_000, "100,000 values"),
        ("9" * 6000, 1, "finite"),
    ],
)
def test_what_cannot_be_read(text: str, line: int, says: str) -> None:
    found = refused(text)
    assert found[0][0] == line
    assert says in found[0][2]


def test_a_tab_gets_its_own_remedy() -> None:
    assert "spaces" in str(ScenarioError(_problems("a:\n\tb: 1\n")))


def test_an_alias_bomb_is_stopped() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    assert "aliases expanded" in refused("\n".join(lines))[0][2]


def test_files(tmp_path: Path) -> None:
    plain, zipped = tmp_path / "a.yaml", tmp_path / "b.yml.gz"
    plain.write_text("\ufeffname: x\n", encoding="utf-8")
    zipped.write_bytes(gzip.compress(b"name: y\n"))
    assert (read_file(plain).data(), read_file(plain).name) == ({"name": "x"}, "a")
    assert (read_file(zipped).data(), read_file(zipped).name) == ({"name": "y"}, "b")
    assert read_file(plain).folder == tmp_path


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: x\nb: caf\xe9\n")
    (tmp_path / "cut.yaml.gz").write_bytes(gzip.compress(b"name: y\n" * 1000)[:-20])
    (tmp_path / "fake.yaml.gz").write_bytes(b"name: y\n")
    (tmp_path / "big.yaml").write_bytes(b"# filler\n" * 600_000)
    (tmp_path / "bomb.yaml.gz").write_bytes(gzip.compress(b" " * 50_000_000))
    said = {}
    for name in ("latin.yaml", "cut.yaml.gz", "fake.yaml.gz", "big.yaml", "bomb.yaml.gz", "latn.yaml", ".", "x/y.yaml"):
        with pytest.raises(ScenarioError) as caught:
            read_file(tmp_path / name)
        said[name] = caught.value.problems[0]
        assert said[name].file == str(tmp_path / name)
    assert (said["latin.yaml"].line, said["latin.yaml"].column) == (2, 7)
    assert "UTF-8" in said["latin.yaml"].hint
    assert "latin.yaml" in said["latn.yaml"].hint
    assert "folder" in said["."].message
    assert "larger" in said["big.yaml"].message
    assert "larger" in said["bomb.yaml.gz"].message
    assert "no folder" in said["x/y.yaml"].hint


TEXT = """\
name: x
clients:
  gpu:
    tp: 2
    perf: [roofline, {roofline: {}}]
    batching: {chunked: {max_num_seqs: 4}}
"""


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ((), (1, 1)),
        (("name",), (1, 7)),
        (("clients",), (2, 1)),
        (("clients", "gpu"), (3, 3)),
        (("clients", "gpu", "tp"), (4, 9)),
        (("clients", "gpu", "perf", 0), (5, 12)),
        (("clients", "gpu", "perf", 1, "roofline"), (5, 23)),
        (("clients", "gpu", "batching", "chunked", "max_num_seqs"), (6, 40)),
        (("clients", "gpu", "batching", 0, "chunked", "max_num_seqs"), (6, 40)),
        (("clients", "gpu", "device"), (3, 3)),
        (("slo", "ttft_s"), (1, 1)),
    ],
)
def test_places(path: tuple[str | int, ...], place: tuple[int, int]) -> None:
    problem = Source(parse(TEXT, "a.yaml")).problem(path, "wrong")
    assert (problem.line, problem.column) == place


def test_the_place_of_a_key() -> None:
    problem = Source(parse(TEXT, "a.yaml")).problem(("clients", "gpu", "tp"), "wrong", key=True)
    assert (problem.line, problem.column) == (4, 5)


def test_set_changes_and_creates() -> None:
    source = Source(parse(TEXT, "a.yaml"))
    sets = ["clients.gpu.tp=4", "clients.gpu.batching.chunked.x=1e3", "slo.ttft_s={p99: 1}", "clients.gpu.perf.0=other",
            "name=", "clients.gpu.perf.1.roofline.x=[1, 2]"]  # fmt: skip
    changed = override(source, sets)
    read = changed.data()
    gpu = read["clients"]["gpu"]
    assert gpu["tp"] == 4
    assert gpu["batching"] == {"chunked": {"max_num_seqs": 4, "x": 1000}}
    assert gpu["perf"] == ["other", {"roofline": {"x": [1, 2]}}]
    assert read["slo"] == {"ttft_s": {"p99": 1}}
    assert read["name"] is None
    assert source.data()["clients"]["gpu"]["tp"] == 2
    assert changed.problem(("clients", "gpu", "tp"), "wrong").file == "--set clients.gpu.tp=4"
    assert changed.problem(("clients", "gpu", "batching"), "wrong").line == 6


def test_set_turns_a_name_into_a_mapping_of_it() -> None:
    source = override(read_mapping({"batching": "chunked"}), ["batching.chunked.max_num_seqs=8"])
    assert source.data() == {"batching": {"chunked": {"max_num_seqs": 8}}}


def test_bad_sets_are_told_together() -> None:
    source = Source(parse(TEXT, "a.yaml"))
    sets = ["tp", "=3", "a..b=1", "name.y=1", "clients.gpu.perf.7=a", "a=[1", "b=.inf", "clients.gpu.tp=3"]
    with pytest.raises(ScenarioError) as caught:
        override(source, sets)
    assert [p.file for p in caught.value.problems] == [f"--set {text}" for text in sets[:-1]]
    assert all(p.hint for p in caught.value.problems)


def test_mappings() -> None:
    import numpy as np

    source = read_mapping({"a": np.int64(3), "b": (1, 2.0), "c": Path("x"), 4: np.float64(0.5)})
    assert source.data() == {"a": 3, "b": [1, 2], "c": "x", "4": 0.5}
    loop: dict[str, object] = {}
    loop["loop"] = loop
    for bad in ({"a": float("nan")}, {"a": {"b": object()}}, loop):
        with pytest.raises(ScenarioError):
            read_mapping(bad)
