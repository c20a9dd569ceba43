"""corpus/TARGET.txt, an input a line in base64: a file a target, whose diff says which inputs went and came.

corpus.py unpack CORPUS FOLDER            CORPUS/TARGET.txt -> FOLDER/TARGET/*
corpus.py pack CORPUS TARGET FOLDER MOST  FOLDER/* -> CORPUS/TARGET.txt, the smallest first, MOST bytes of text
"""

import base64
import shutil
import sys
from pathlib import Path


def unpack(corpus, folder):
    shutil.rmtree(folder, ignore_errors=True)
    for path in Path(corpus).glob("*.txt"):
        target = Path(folder) / path.stem
        target.mkdir(parents=True)
        for number, line in enumerate(path.read_text().split()):
            (target / f"{number:04}").write_bytes(base64.b64decode(line))


def pack(corpus, target, folder, most):
    lines, size = [], 0
    for data in sorted({path.read_bytes() for path in Path(folder).iterdir()}, key=lambda data: (len(data), data)):
        line = base64.b64encode(data).decode() + "\n"
        size += len(line)
        if size <= int(most) and data:
            lines.append(line)
    (Path(corpus) / f"{target}.txt").write_text("".join(lines))


if __name__ == "__main__":
    {"unpack": unpack, "pack": pack}[sys.argv[1]](*sys.argv[2:])
