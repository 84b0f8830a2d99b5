"""Folded stacks: which functions were running, and how much of it was the kernel.

A stack is a line: functions from the outermost to the one that ran, with semicolons between them, and in how many samples
it was seen. `_[k]` marks functions of the kernel.
"""

import collections

KERNEL = "_[k]"


def counted(folded):
    """The stacks, as lists of functions, with their counts."""
    for line in folded.splitlines():
        stack, _, count = line.rpartition(" ")
        yield stack.split(";"), int(count)


def hottest(folded, most):
    """The functions that ran in the most samples, with their share."""
    own = collections.Counter()
    for functions, count in counted(folded):
        own[functions[-1]] += count
    whole = max(1, own.total())
    return [(name, count / whole) for name, count in own.most_common(most)]


def kernel_share(folded):
    """How much of the time the kernel ran."""
    own = collections.Counter()
    for functions, count in counted(folded):
        own[functions[-1].endswith(KERNEL)] += count
    return own[True] / max(1, own.total())
