"""Records: what a run leaves behind, read back and compared with a reference."""

from leaklib.records.record import (
    Record,
    Tolerance,
    code_version,
    compare_records,
    compare_tables,
    prepare_folder,
    provenance,
    read_record,
    write_record,
)

__all__ = [
    "Record",
    "Tolerance",
    "code_version",
    "compare_records",
    "compare_tables",
    "prepare_folder",
    "provenance",
    "read_record",
    "write_record",
]
