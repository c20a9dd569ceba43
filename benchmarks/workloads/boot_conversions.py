"""A confidential guest's boot, as far as its conversions go: KVM_HC_MAP_GPA_RANGE, and a write to what it got.

Most are of less than 32 KiB, some of megabytes; one in three begins where the last one ended, some are as wanted
already, and a few the guest has no right to. Without private memory the hypercalls are a script's, and the backend only
notes what it is asked.
"""

from __future__ import annotations

import errno
import random
from itertools import groupby

from guest import ENCRYPTED, REGION, Step
from ways import MARK, PAGE, Job, Workload, converting_on, no_private_memory, ways_of

CONVERSIONS, LARGE, REFUSED = 5000, 30, 8
SMALL_PAGES, PAGES = 7, 8192  # of one; in all


def make(share: float = 1.0) -> Workload:
    """share: how much of it."""
    chance, scripted = random.Random(0), no_private_memory()
    count, pages = max(int(CONVERSIONS * share), 10), max(int(PAGES * share), 64)
    kinds = ["large"] * max(int(LARGE * share), 1) + ["refused"] * max(int(REFUSED * share), 1)
    kinds += ["small"] * (count - len(kinds))
    chance.shuffle(kinds)
    # What of each page the guest sees that no one else does; None: it is shared.
    model: list[int | None] = [None] * pages
    steps, last = [], 0
    for kind in kinds:
        if kind == "refused":  # its end is beyond the memory
            steps.append(call(pages - 1, 2, True, (1 << 64) - errno.EINVAL))
            continue
        size = chance.randint(pages // 16, pages // 4) if kind == "large" else chance.randint(1, SMALL_PAGES)
        touches = last + size <= pages and chance.randrange(3) == 0
        first = last if touches else chance.randrange(pages - size + 1)
        private = chance.random() < 0.6
        last = first + size
        steps.append(call(first, size, private, 0))
        model[first:last] = [page or 0 for page in model[first:last]] if private else [None] * size
        if not scripted:
            steps.append(Step("write", REGION + first * PAGE, len(steps)))
            model[first] = len(steps) - 1 if private else None
    job = Job([*steps, Step("end")], count + 1, convertible=pages * PAGE, private=runs(model),
              seen=[MARK if page is None else page for page in model], scripted=bool(scripted))
    return Workload(f"{count:,} conversions by KVM_HC_MAP_GPA_RANGE", converting_on(scripted), "exit", job.exits,
                    ways_of(job))  # fmt: skip


def call(first: int, size: int, private: bool, answer: int) -> Step:
    """The hypercall, of pages."""
    return Step("call", REGION + first * PAGE, size | (ENCRYPTED if private else 0) << 32, answer)


def runs(model: list[int | None]) -> list[tuple[int, int]]:
    """(gpa, size) of the pages that are private."""
    found, page = [], 0
    for private, same in groupby(model, lambda page: page is not None):
        size = len(list(same))
        if private:
            found.append((REGION + page * PAGE, size * PAGE))
        page += size
    return found
