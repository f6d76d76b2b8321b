"""tests/cuda_static/measured.py: a GPU's figures for docs/cuda_performance.md."""

from __future__ import annotations

import pytest

from cuda_static import measured


def measured_report(**machine: object) -> dict:
    def table(title: str, **speeds: float) -> dict:
        return {"title": title, "rows": [{"name": name, "G/s": speed} for name, speed in speeds.items()]}

    tables = [
        table("AdamW step, one fp32 parameter [16384, 4096]", **{"bnbops AdamW8bit": 150.0, "torch AdamW, fused": 1.0}),
        table("AdamW step, 1000 small fp32 parameters", **{"bnbops AdamW8bit": 2.0}),
        table("dequantize_4bit, NF4, 67108864 elements", **{"bnbops, bf16": 1.0, "bnbops, bf16, out=": 500.0}),
        table("NF4 8192x8192 bf16, forward, rows: 16", **{"bnbops Linear4bit": 64000.0}),
        table("NF4 8192x8192 bf16, forward, rows: 1", **{"bnbops Linear4bit": 4000.0}),  # predicted for fp32
    ]
    about = {"GPU": "NVIDIA H200", "driver": "580", "torch": "2.11.0", "bnbops": "0.1.0", **machine}
    return {"dry run": False, "machine": about, "stages": [{"tables": tables[:1]}, {"tables": tables[1:]}]}


def test_measured_figures_stand_beside_the_memorys():
    rows = measured.rows_of(measured_report(**{"bandwidth GB/s": 4800}))
    assert rows == [
        ["AdamW8bit, fp32", "3.35", "6.67", "50 %"],
        ["dequantize_4bit, bf16", "0.53", "2.00", "27 %"],
        ["linear_4bit, bf16, 16 rows", "0.12", "0.25", "47 %"],
    ]
    assert [row[1::2] for row in measured.rows_of(measured_report())] == [["-", "-"]] * 3
    assert "NVIDIA H200, driver 580, torch 2.11.0, bnbops 0.1.0:\n\n| work " in measured.section(measured_report())
    with pytest.raises(ValueError, match="dry run"):
        measured.section(measured_report() | {"dry run": True})


def test_the_page_has_a_place_for_measured_figures():
    _, _, rest = measured.PAGE.read_text().partition(measured.BEGIN)
    assert measured.END in rest
