from typing import Never

from typing_extensions import disjoint_base

@disjoint_base
class Page:
    def __init__(self, _: Never, /) -> None: ...  # a TypeError
