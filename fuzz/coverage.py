"""What gcov says of a build, by file: coverage.py TREE [-v]. fuzz/coverage calls it."""

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

tree = Path(sys.argv[1])
counts = defaultdict(lambda: defaultdict(int))  # file -> line -> times
for data in tree.glob("build/**/*.gcda"):
    said = subprocess.run(["gcov", "--json-format", "--stdout", data], cwd=tree, capture_output=True, check=True).stdout
    for document in said.splitlines():
        for file in json.loads(document)["files"]:
            name = Path(file["file"]).name
            for line in file["lines"]:
                counts[name][line["line_number"]] += line["count"]


def without_gil(path):
    """-> the numbers of the lines inside functions that run without the GIL."""
    lines, inside = set(), False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if re.match(r"\S", line) and not line.startswith((")", "#")):
            inside = line.startswith(("cdef", "cpdef"))
            opened, nogil = inside, False
        if inside:
            nogil = nogil or (opened and re.search(r"\bnogil:", line) is not None)
            if nogil and not re.match(r"\S|\s*(\"\"\"|#|cdef [^=]*$|$)", line):
                lines.add(number)
    return lines


total = [0, 0]
print(f"{'file':<24} {'lines':>6} {'reached':>8}")
for path in sorted((tree / "src/kvmexit").glob("_*.*")):
    if path.suffix not in (".pyx", ".h") or path.name not in counts:
        continue
    of = counts[path.name]
    lines = {n for n in of if path.suffix == ".h"} or set(of) & without_gil(path)
    if not lines:
        continue
    reached = {n for n in lines if of[n]}
    total[0] += len(lines)
    total[1] += len(reached)
    print(f"{path.name:<24} {len(lines):>6} {len(reached):>8} {100 * len(reached) / len(lines):>5.0f}%")
    if "-v" in sys.argv:
        text = path.read_text().splitlines()
        for n in sorted(lines - reached):
            print(f"    {n:>5} {text[n - 1]}")
print(f"{'in all':<24} {total[0]:>6} {total[1]:>8} {100 * total[1] / max(total[0], 1):>5.0f}%")
