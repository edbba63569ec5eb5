"""Records: what a run leaves behind, read back and compared with a reference."""

from leaklib.code_hash import code_version
from leaklib.files import prepare_folder
from leaklib.records.record import Record, compare_records, read_record, write_record
from leaklib.records.tables import Tolerance, compare_tables
from leaklib.run_info import provenance

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
