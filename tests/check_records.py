#!/usr/bin/python3
"""Checks files of JSON lines against docs/record.schema.json. Exit 0: all conform; 1: some record does not; 2: usage.

For scripts: `check_records.py FILE...` ("-" is standard input). For tests: complaints(lines), and report_complaints(report)
for what finrace diagnose --json writes, against docs/report.schema.json.
"""
import json
import sys
from pathlib import Path

import jsonschema

DOCS = Path(__file__).resolve().parent.parent / "docs"
SCHEMA = DOCS / "record.schema.json"
REPORT = DOCS / "report.schema.json"


def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def flat_names() -> set:
    """The names of a record's values on one level, all that the schema knows: what --flat may write."""
    schema = json.loads(SCHEMA.read_text())
    names = set()

    def visit(part, way):
        while "$ref" in part:
            part = schema["$defs"][part["$ref"].rsplit("/", 1)[1]]
        if "properties" in part:
            for name, inner in part["properties"].items():
                visit(inner, (*way, name))
        else:
            names.add(".".join(way))

    for kind in ("verdict", "connection", "upstream", "health"):
        visit(schema["$defs"][f"{kind}_record"], ())
    return names


def refuse_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def complaints(lines) -> list:
    """One text for each thing wrong in these lines (bytes, each without its newline)."""
    check, found = validator(), []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.decode("utf-8"), parse_constant=refuse_constant)
        except ValueError as error:
            found.append(f"line {number}: {error}: {line[:200]!r}")
            continue
        for error in check.iter_errors(record):
            where = ".".join(str(part) for part in error.absolute_path) or "record"
            found.append(f"line {number}: {where}: {error.message[:300]}")
    return found


def report_complaints(report: dict) -> list:
    schema = json.loads(REPORT.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    shared = {SCHEMA.as_uri(): json.loads(SCHEMA.read_text())}
    # From where the file lies: against an empty base a reference within a reference resolves to nothing.
    check = jsonschema.Draft202012Validator(schema, resolver=jsonschema.RefResolver(REPORT.as_uri(), schema, store=shared))
    return [f"{'.'.join(str(part) for part in error.absolute_path) or 'report'}: {error.message[:300]}"
            for error in check.iter_errors(report)]


def main(paths: list) -> int:
    if not paths:
        print(__doc__, file=sys.stderr)
        return 2
    total, wrong = 0, 0
    for path in paths:
        try:
            content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        except OSError as error:
            print(f"check_records.py: {error}", file=sys.stderr)
            return 2
        if content and not content.endswith(b"\n"):
            print(f"{path}: the last line has no end", file=sys.stderr)
            wrong += 1
        lines = content.split(b"\n")[:-1]
        total += len(lines)
        for complaint in complaints(lines):
            wrong += 1
            print(f"{path}: {complaint}", file=sys.stderr)
    print(f"{total} records, {wrong} complaints")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
