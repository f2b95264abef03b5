"""Summaries and fits by hand, plots that are written, and a README that is up to date."""

import json

import pytest

from benchmarks import report
from benchmarks.harness import results, summary
from benchmarks.harness.growth import fit_exponent
from benchmarks.harness.tables import markdown_table, mib, ms, text_table
from tests.benchmarks.sample_results import attention_cases, entry, growth_cases, result, row


def _write(folder, content):
    path = folder / results.slug(content["machine"]) / f"{content['date']}-0123abc.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_the_pages_show_the_newest_results():
    """Otherwise: python -m benchmarks.report"""
    for page in report.PAGES:
        assert report.behind(page.read_text(encoding="utf-8")) == [], page.name


def test_summary_by_hand():
    found = summary.summarise(result(attention_cases()))
    single, half = found["cpu float32"], found["cpu bfloat16"]
    assert single["forward"]["best"] == pytest.approx(2.0)
    assert single["forward"]["eager"] == pytest.approx(4.0)
    assert single["forward"]["floor"] == pytest.approx(0.8)
    assert single["forward+backward"]["best"] == pytest.approx(3.0)
    assert single["forward+backward"]["extra_bytes"] == 3 << 20
    assert single["forward"]["to_float32"] == pytest.approx(1.0)
    assert half["forward"]["to_float32"] == pytest.approx(0.5)
    assert half["forward+backward"]["to_float32"] == pytest.approx(1.1)


def test_no_mean_over_fewer_than_the_three_cases():
    assert summary.summarise(result(attention_cases()[:2])) == {}


def test_a_wrong_peer_is_never_the_best():
    rows = [row("slow", "peer", 9, 9), {"candidate": "x", "kind": "peer", "status": "wrong"}]
    assert summary.best_peer(entry("b64-stage1", "float32", rows), "forward")["candidate"] == "slow"


def test_the_case_table_gives_reasons():
    table = summary.case_table(attention_cases()[0])
    assert "WRONG" in table
    assert "(floor)" in table


def test_a_section_is_replaced_between_its_markers(tmp_path):
    _write(tmp_path, result(attention_cases()))
    text = "a\n<!-- benchmark:attention -->\nold\n<!-- /benchmark:attention -->\nb\n"
    assert report.behind(text, tmp_path) == ["attention"]
    fresh = report.with_section(text, "attention", report.section("attention", tmp_path))
    assert report.behind(fresh, tmp_path) == []
    assert fresh.startswith("a\n<!-- benchmark:attention -->\nA CPU, 2 threads (avx2)")
    assert "| cpu float32 | forward | 2.00x | 4.00x | 80 % |" in fresh
    assert "| b64-stage1 float32 | cpu | forward | 10.0 | SDPA masked | 20.0 | 2.00x |" in fresh
    assert fresh.endswith("<!-- /benchmark:attention -->\nb\n")


def test_the_newest_complete_result_with_the_cases_counts(tmp_path):
    _write(tmp_path, result(attention_cases(), date="2026-01-01T000000"))
    _write(tmp_path, result(attention_cases(), date="2026-01-02T000000"))
    _write(tmp_path, result(growth_cases(), date="2026-01-03T000000"))
    _write(tmp_path, result(attention_cases(), date="2026-01-04T000000") | {"complete": False})
    _write(tmp_path, result([], date="2026-01-05T000000", benchmark="layer"))
    (machine,) = tmp_path.iterdir()
    found = results.newest(machine, "attention", summary.SUMMARY, {})
    assert found["date"] == "2026-01-02T000000"
    assert report.section("train_step", tmp_path) == "No result yet."


def test_fewer_peers_are_not_the_readmes(tmp_path):
    few = result(attention_cases(), date="2026-01-02T000000")
    few["settings"]["peers"] = ["eager"]
    _write(tmp_path, few)
    assert report.section("attention", tmp_path) == "No result yet."
    _write(tmp_path, result([*attention_cases(), *growth_cases()], date="2026-01-01T000000"))
    assert "2026-01-01" in report.section("attention", tmp_path)
    assert "growth-064" not in report.section("attention", tmp_path)


def test_the_growth_table(tmp_path):
    _write(tmp_path, result(growth_cases(1.25)))
    table = report.section("growth", tmp_path)
    assert "| cpu | 228.3 | 3072.0 | frames^1.25 | 32.0 | 256 | frames^1.00 |" in table
    assert "| eager | 543.1 | 12288.0 | frames^1.50 | 1024 | 65536 | frames^2.00 |" in table


def test_a_table_of_cuda_has_wall_times_and_graphs():
    found = entry("b64-stage1", "float32", [row("triton", "backend", 1, 3)])
    found["rows"][0]["forward"] |= {"wall": {"median_ms": 1.5}, "no_graph": "it waits"}
    head = summary.case_table(found).splitlines()[1].split("  ")
    assert "forward wall" in [cell.strip() for cell in head]
    assert "both wall" not in [cell.strip() for cell in head]
    assert "triton: no graph of forward: it waits" in summary.case_table(found)


def test_exponents_are_fitted():
    frames = [8, 16, 32, 64, 128]
    assert fit_exponent(frames, [3.0 * f**1.5 for f in frames]) == pytest.approx(1.5)
    assert fit_exponent(frames, [float(f) for f in frames], least=60.0) is None


def test_plots_are_written(tmp_path):
    cases = [*attention_cases(), *growth_cases()]
    _write(tmp_path, result(cases))
    written = report.write_plots(tmp_path, tmp_path / "plots")
    assert [p.name.split("cores-")[1] for p in written] == ["growth.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written)


def test_a_result_is_saved_while_it_grows_and_never_overwritten(tmp_path):
    content = result([]) | {"complete": False}
    path = results.save(content, tmp_path)
    assert path.parent.name == "a-cpu-avx2-2-cores"
    content["cases"].append(entry("b64-stage1", "float32", []))
    results.save(content, tmp_path)
    assert [e["case"] for e in results.read(path)["cases"]] == ["b64-stage1"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(FileExistsError, match="the result of another run"):
        results.record(content, lambda: None, tmp_path)


def test_tables_and_figures():
    assert text_table(("a", "b"), [("xyz", "1")]).splitlines() == ["a    b", "------", "xyz  1"]
    assert markdown_table(("a", "b"), [("x", "1")]).splitlines()[1] == "| :-- | --: |"
    assert [ms(x) for x in (None, 0.1234, 1.234, 12.34)] == ["-", "0.123", "1.23", "12.3"]
    assert [mib(x) for x in (None, 1 << 18, 3 << 20, 300 << 20)] == ["-", "0.25", "3.0", "300"]
