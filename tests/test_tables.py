"""Tables: any table survives its text bit for bit, and every difference is named."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leaklib.records.tables import Tolerance, compare_tables, read_csv, tidy, write_csv

CELLS = {
    "float64": st.floats(allow_nan=True, width=64),
    "float32": st.floats(allow_nan=True, width=32),
    "int64": st.integers(-(2**63), 2**63 - 1),
    "bool": st.booleans(),
    "str": st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]), min_size=1)),
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_any_table_round_trips_through_text(data):
    rows = data.draw(st.integers(0, 4))
    table = tidy(
        pd.DataFrame(
            {
                kind: pd.Series(data.draw(st.lists(cell, min_size=rows, max_size=rows)), dtype=kind)
                for kind, cell in CELLS.items()
            }
        )
    )
    text, kinds = write_csv(table)
    back = read_csv(text, kinds)
    pd.testing.assert_frame_equal(back, table, check_exact=True)
    for name in ("float64", "float32"):  # signed zeros too
        assert back[name].to_numpy().tobytes() == table[name].to_numpy().tobytes() or (
            table[name].isna().any()
        )


TEXTS = [
    ["", "a"],
    [None, "a"],
    [None, None],
    ["NA", "nan"],
    ["1", "2"],
    ["a\r\n,b"],
    ["\r0", None],
    [" a ", "\t"],
    ['"', '""'],
]


@pytest.mark.parametrize("cells", TEXTS)
def test_texts_that_look_like_something_else_stay_texts(cells):
    table = tidy(pd.DataFrame({"a name, quoted": cells}))
    pd.testing.assert_frame_equal(read_csv(*write_csv(table)), table)


def test_tables_without_rows_or_columns_round_trip():
    for table in (pd.DataFrame(), pd.DataFrame({"a": pd.Series([], dtype="float64")})):
        pd.testing.assert_frame_equal(read_csv(*write_csv(tidy(table))), tidy(table))


def test_scalars_objects_and_named_indexes_become_plain_columns():
    torch = pytest.importorskip("torch")
    table = pd.DataFrame(
        {
            "psnr": pd.Series([torch.tensor(1.5), np.float32(2.5), None], dtype=object),
            "layers": [("fc",), ("conv", "fc"), ()],
            "maybe": pd.Series([1, None, 3], dtype=object),
            "flag": pd.Series([True, None, False], dtype=object),
        }
    ).set_index(pd.Index([7, 8, 9], name="image"))
    plain = tidy(table)
    assert list(plain.columns) == ["image", "psnr", "layers", "maybe", "flag"]
    assert plain["psnr"].tolist()[:2] == [1.5, 2.5]
    assert plain["layers"][1] == "('conv', 'fc')"
    pd.testing.assert_frame_equal(read_csv(*write_csv(plain)), plain)
    with pytest.raises(ValueError, match=r"\['a'\] more than once"):
        tidy(pd.DataFrame([[1, 2]], columns=["a", "a"]))
    with pytest.raises(TypeError, match="pandas DataFrame, got list"):
        tidy([1])


REFERENCE = pd.DataFrame(
    {"seed": [0, 1], "net": ["a", "b"], "psnr": [20.0, math.nan], "seconds": [1.0, 2.0]}
)
RULES = {"psnr": Tolerance(atol=0.2), "seconds": "ignore"}


def differences(table, reference=REFERENCE, keys=("seed",), tolerances=RULES):
    return compare_tables(table, reference, keys=keys, tolerances=tolerances)


def test_equal_tables_differ_in_nothing():
    assert differences(REFERENCE) == []
    shuffled = REFERENCE[::-1][["psnr", "seconds", "net", "seed"]]
    assert differences(shuffled.assign(psnr=[math.nan, 20.19], seconds=9.0)) == []
    assert differences(REFERENCE.drop(columns="seconds")) == []  # ignored


@pytest.mark.parametrize(
    ("table", "line"),
    [
        (
            REFERENCE.assign(psnr=[20.21, math.nan]),
            "row (seed=0), column 'psnr': got 20.21, reference 20.0, tolerance atol 0.2",
        ),
        (
            REFERENCE.assign(psnr=[20.0, 5.0]),
            "row (seed=1), column 'psnr': got 5.0, reference nan, tolerance atol 0.2",
        ),
        (
            REFERENCE.assign(psnr=[math.nan, math.nan]),
            "row (seed=0), column 'psnr': got nan, reference 20.0, tolerance atol 0.2",
        ),
        (
            REFERENCE.assign(net=["a", "c"]),
            "row (seed=1), column 'net': got 'c', reference 'b', tolerance exact",
        ),
        (REFERENCE[:1], "row (seed=1) is missing"),
        (
            pd.concat([REFERENCE, REFERENCE[:1].assign(seed=7)]),
            "row (seed=7) is not in the reference",
        ),
        (REFERENCE.drop(columns="net"), "column 'net' is missing"),
        (REFERENCE.assign(more=1), "column 'more' is not in the reference"),
        (REFERENCE.drop(columns="seed"), "column 'seed' is missing"),
    ],
)
def test_every_difference_is_named(table, line):
    assert differences(table) == [line]


@pytest.mark.parametrize(
    ("value", "reference", "rule", "same"),
    [
        (1.1, 1.0, Tolerance(rtol=0.11), True),
        (1.1, 1.0, Tolerance(rtol=0.09), False),
        (1.1, 1.0, Tolerance(rtol=0.05, atol=0.06), True),
        (-110.0, -100.0, Tolerance(rtol=0.1), True),
        (0.0, 1e-9, Tolerance(rtol=0.5), False),
        (math.inf, math.inf, Tolerance(), True),
        (-math.inf, math.inf, Tolerance(atol=1.0), False),
        (math.inf, 1.0, Tolerance(atol=math.inf), False),
        (2**53 + 1, 2**53, "exact", False),
        (1, 1.0, "exact", True),
        (None, None, "exact", True),
        ("a", None, "exact", False),
        ("a", 1.0, Tolerance(atol=9.0), False),
    ],
)
def test_tolerances(value, reference, rule, same):
    tables = (pd.DataFrame({"k": [0], "v": [cell]}) for cell in (value, reference))
    lines = differences(*tables, keys=["k"], tolerances={"v": rule})
    assert (lines == []) is same, lines


def test_nothing_agrees_with_nothing():
    assert Tolerance().allows(math.nan, math.nan)
    assert not Tolerance(atol=9).allows(math.nan, 1.0)
    assert not Tolerance(atol=9).allows(1.0, math.nan)


def test_wrong_questions_are_errors_not_agreement():
    with pytest.raises(ValueError, match="got 'psnr_db'"):
        differences(REFERENCE, tolerances={"psnr_db": "ignore"})
    with pytest.raises(ValueError, match="got 'image'"):
        differences(REFERENCE, keys=["image"])
    with pytest.raises(ValueError, match="got none"):
        differences(REFERENCE, keys=[])
    with pytest.raises(ValueError, match="'exact' or 'ignore', got 'roughly'"):
        differences(REFERENCE, tolerances={"psnr": "roughly"})
    with pytest.raises(ValueError, match=r"one row for \(net='a'\), got two"):
        differences(REFERENCE.assign(net="a"), keys=["net"])
    with pytest.raises(ValueError, match="tolerances >= 0"):
        Tolerance(atol=-1)
    with pytest.raises(ValueError, match="tolerances >= 0"):
        Tolerance(rtol=math.nan)
